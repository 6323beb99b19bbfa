// What is one per process: the lock around oneCCL, the watchdog, and how a broken process leaves.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace falcon {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// oneCCL without worker threads makes progress inside the calls of its user and is not made for several
// callers at once: every call into it is made under this lock. It is never held while waiting.
std::mutex& library_lock();

// An operation that oneCCL swallowed (a spin inside the library, which no exception can end) stops the
// process: the watchdog writes one line and leaves with exit code 1.
class Watched {
 public:
  Watched(std::string group);
  ~Watched();
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;

  void begin(const char* operation, uint64_t sequence, Clock::time_point deadline);
  void end();

 private:
  friend void watch_all();
  const std::string group_;
  std::atomic<const char*> operation_{""};
  std::atomic<uint64_t> sequence_{0};
  std::atomic<int64_t> deadline_{0};
};

// From now on oneCCL may hold references to unfinished operations: nothing of it is destroyed any more and
// the process ends without the library's destructors, which would wait for peers for ever.
void poison(const std::string& reason);
bool poisoned();

// libfabric's shm provider makes a file of 64 MiB in /dev/shm per endpoint and leaves it there when its
// process is killed. Once all ranks have mapped each other's, the names are not needed any more.
void remove_shared_names();

}  // namespace falcon
