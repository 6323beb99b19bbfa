// Runs the operations of one group, one after the other in the order in which they were issued.
#pragma once

#include <ATen/ThreadLocalState.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <oneapi/ccl.hpp>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "library.h"
#include "peers.h"
#include "signature.h"

namespace falcon {

using Events = std::vector<ccl::event>;

// One operation. `submit` hands it to oneCCL (under the library lock), `finish` runs when the data is there.
struct Task {
  c10d::OpType type;
  const char* name = "";               // "all_reduce", a literal
  Signature signature;
  std::function<void(Events&)> submit;
  std::function<std::string(Events&)> follow;  // may be empty: submits what comes after, or says what forbids it
  std::function<bool()> advance;       // instead of events: does what can be done now; true at the end
  std::function<void()> finish;        // may be empty
  std::vector<at::Tensor> outputs;     // the value of the work's future
  std::vector<at::Tensor> kept;        // memory that has to live until the end
  milliseconds timeout{0};
};

class CclWork final : public c10d::Work {
 public:
  CclWork(int rank, uint64_t sequence, const Task& task);

  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  std::vector<at::Tensor> result() override { return outputs_; }
  uint64_t getSequencenumber() const override { return sequence_; }
  void abort() override {}

  void complete(std::exception_ptr error);
  // Does so only where nobody has asked for the future: whose callbacks it runs may wait for anything.
  bool complete_without_callbacks(std::exception_ptr error);

 private:
  void settle(std::exception_ptr error);

  const uint64_t sequence_;
  std::vector<at::Tensor> outputs_;
  const c10::intrusive_ptr<c10::ivalue::Future> future_;
  std::mutex handing_out_;
  bool handed_out_ = false;
};

// Two numbers per rank of which oneCCL takes the minimum, beside an operation, to see that all ranks called
// the same: min(x) and min(~x) are x and ~x everywhere only if x is the same everywhere. Without it a
// smaller buffer on one rank would go through with a wrong result.
struct Agreement {
  int64_t values[2];
  int64_t mine[2];
  ccl::event event;
  bool pending = false;
};
using AgreementStart = std::function<void(Agreement&)>;

class Executor {
 public:
  // `group` names the group in errors, `rank` is this process's global rank.
  Executor(std::string group, int64_t rank, std::shared_ptr<Peers> peers);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Has every operation compared with the other ranks' through `start`, for groups that no board covers.
  void compare_calls(AgreementStart start) { start_agreement_ = std::move(start); }

  // A synchronous task runs on the caller when nothing is queued, which is the shortest way; everything else
  // runs on a thread of this group, under the caller's thread-local state (inference mode and such). Throws c10::DistBackendError when a synchronous task fails, and
  // at once when an earlier operation of the group had failed.
  c10::intrusive_ptr<c10d::Work> run(Task task, bool asynchronous);

  // Waits until nothing is queued or running. False when that did not come true by the deadline.
  bool drain(Clock::time_point deadline);

  // No operation is accepted any more, and what is queued fails where it is not over by then. True when the
  // threads have ended; otherwise they still run in this object, which must then never be destroyed.
  bool close(milliseconds patience);

  // The error that broke this group; empty while it is whole.
  std::string broken() const;

  uint64_t sequence() const;

 private:
  struct Queued {
    Task task;
    c10::intrusive_ptr<CclWork> work;
    at::ThreadLocalState callers;
  };

  void loop();
  void serve(std::unique_lock<std::mutex>& guard);
  std::exception_ptr attempt(Queued& next, const std::string& broken);
  void wake();
  void execute(Task& task, bool own_thread);
  // What oneCCL may still write to. Never freed after a failure.
  struct Flight {
    Events events;
    Agreement agreement;
    bool followed = false;
  };

  void take_off(Flight& flight, const Task& task);
  bool finished(Flight& flight, const Task& task);
  void poll(Flight& flight, const Task& task, bool own_thread);
  bool is_lonely(const Signature& mine) const;
  [[noreturn]] void give_up_disagreeing(const Signature& mine);
  void look_around(const Signature& mine, Clock::time_point started, Clock::time_point deadline);
  [[noreturn]] void give_up(const Signature& mine, const std::string& reason);
  [[noreturn]] void give_up_late(const Signature& mine, Clock::duration waited);
  void check_open() const;

  const std::string group_;
  const int64_t rank_;
  const std::shared_ptr<Peers> peers_;
  Watched watched_;
  AgreementStart start_agreement_;  // may be empty

  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable ready_;   // for the threads
  std::condition_variable idle_;    // for drain()
  std::deque<Queued> queue_;
  bool running_ = false;      // an operation is being executed, here or on the thread
  bool closed_ = false;
  uint64_t sequence_ = 0;
  std::string broken_;
  // One as a rule. More where callbacks of a future wait for another operation of the group.
  std::vector<std::thread> threads_;
  size_t in_callbacks_ = 0;  // how many of them run such callbacks

  Clock::time_point next_look_;
};

}  // namespace falcon
