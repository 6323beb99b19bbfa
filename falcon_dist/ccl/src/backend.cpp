#include "backend.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <future>
#include <limits>
#include <numeric>
#include <set>

#include "alarm.h"
#include "kvs.h"
#include "task.h"
#include "trial.h"

namespace falcon {

namespace {

// Never destroyed: groups may be closed while the process ends.
struct Groups {
  std::mutex lock;
  std::set<CclBackend*> live;
  std::set<Executor*> executors;
  std::set<int64_t> connected;  // global ranks that oneCCL's transport has met
};

Groups& groups() {
  static Groups* const instance = new Groups();
  return *instance;
}

std::string ranks_text(const std::vector<int64_t>& ranks) {
  std::ostringstream out;
  for (size_t index = 0; index < ranks.size() && index < 16; ++index) {
    out << (index ? "," : "") << ranks[index];
  }
  out << (ranks.size() > 16 ? ",..." : "");
  return out.str();
}

// oneCCL connects all processes when its first communicator is made and cannot meet new ones later.
// True where the group has all of them.
bool check_members(const std::vector<int64_t>& ranks, const std::string& group) {
  Groups& all = groups();
  std::lock_guard<std::mutex> guard(all.lock);
  if (all.connected.empty()) {
    all.connected.insert(ranks.begin(), ranks.end());
  }
  for (const int64_t rank : ranks) {
    TORCH_CHECK_VALUE(
        all.connected.count(rank),
        "ccl: group ", group, " has rank ", rank, ", which was not in this process's first ccl group (",
        ranks_text({all.connected.begin(), all.connected.end()}),
        "): open the group of all ranks first, with init_process_group(\"ccl\")");
  }
  return all.connected.size() == ranks.size();
}

std::string interface_text() {
  const char* name = std::getenv("FI_TCP_IFACE");
  return name ? std::string(" (here FI_TCP_IFACE is ") + name + ")" : "";
}

template <typename T>
void keep_for_ever(const std::shared_ptr<T>& object) {
  (void)new std::shared_ptr<T>(object);
}

// A group in which oneCCL took two ranks for one would go on, and every rank keep its own data.
void check_exchange(const ccl::communicator& communicator, int rank, int size) {
  int64_t sum = rank + 1;
  ccl::allreduce(&sum, &sum, 1, ccl::datatype::int64, ccl::reduction::sum, communicator).wait();
  TORCH_CHECK_WITH(
      DistBackendError, sum == int64_t{size} * (size + 1) / 2,
      "oneCCL does not add up the ranks' data: got ", sum, " for the sum of 1 to ", size);
}

}  // namespace

// One tensor of an all_reduce.
struct CclBackend::Part {
  at::Tensor memory;
  Reduction reduction;
};

CclBackend::CclBackend(c10::intrusive_ptr<c10d::Store> store, int rank, int size, Settings settings)
    : Backend(rank, size),
      global_ranks_(std::move(settings.global_ranks)),
      inner_factory_(std::move(settings.inner)),
      options_(c10::make_intrusive<Options>("ccl", settings.timeout)) {
  const Clock::time_point started = Clock::now();
  try {
    peers_ = std::make_shared<Peers>(store->clone(), rank, global_ranks_, settings.timeout);
  } catch (const c10::ValueError&) {
    throw;
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(
        DistBackendError,
        c10::str("rank ", global_ranks_.at(rank), " of group ", settings.group, ": a member of ",
                 ranks_text(global_ranks_), " did not come to open the group within ",
                 settings.timeout.count() / 1000.0, " s (a peer is gone or out of reach): ",
                 error.what_without_backtrace()));
  }
  executor_ = std::make_shared<Executor>(settings.group, global_ranks_.at(rank), peers_);
  if (size > 1) {
    watch_for_alarm(*store);
    const bool everybody = check_members(global_ranks_, settings.group);
    options_->timeout = settings.timeout - std::chrono::duration_cast<milliseconds>(Clock::now() - started);
    connect();
    options_->timeout = settings.timeout;
    const char* workers = std::getenv("CCL_WORKER_COUNT");
    if (!peers_->board_shows_all()) {
      executor_->compare_calls([communicator = communicator_.get()](Agreement& agreement) {
        agreement.event = ccl::allreduce(
            agreement.values, agreement.values, 2, ccl::datatype::int64, ccl::reduction::min, *communicator);
      });
    }
    if (everybody && (!workers || std::string(workers) == "1")) {
      // Opening the group sent a message between any two endpoints when there is one per rank. They are made anew
      // where all groups had been destroyed.
      peers_->meet("connected", settings.timeout);
      remove_shared_names();
    }
  }
  std::lock_guard<std::mutex> guard(groups().lock);
  groups().live.insert(this);
  groups().executors.insert(executor_.get());
}

// Communicators are made by a thread that can be left behind: inside, oneCCL spins until its peers answer,
// and no deadline reaches there.
void CclBackend::connect() {
  const Clock::time_point deadline = Clock::now() + options_->timeout;
  {
    // Other groups' operations make progress only while nobody holds the library.
    std::lock_guard<std::mutex> guard(groups().lock);
    for (Executor* executor : groups().executors) {
      executor->drain(deadline);
    }
  }
  auto made = std::make_shared<std::promise<ccl::communicator>>();
  std::future<ccl::communicator> result = made->get_future();
  std::thread([made, store = peers_->store(), deadline, rank = rank_, size = size_] {
    std::lock_guard<std::mutex> library(library_lock());
    try {
      ccl::init();
      auto kvs = std::make_shared<StoreKvs>(
          c10::make_intrusive<c10d::PrefixStore>("kvs", store), deadline);
      auto communicator = ccl::create_communicator(size, rank, std::shared_ptr<ccl::kvs_interface>(kvs));
      check_exchange(communicator, rank, size);
      made->set_value(std::move(communicator));
    } catch (...) {
      made->set_exception(std::current_exception());
    }
  }).detach();
  std::string reason;
  if (result.wait_until(deadline + std::chrono::seconds(1)) != std::future_status::ready) {
    reason = "oneCCL could not reach all members: check FI_TCP_IFACE and firewalls between the hosts";
  } else {
    try {
      communicator_ = std::make_shared<ccl::communicator>(result.get());
      return;
    } catch (const c10::Error& error) {
      reason = error.what_without_backtrace();
    } catch (const std::exception& error) {
      reason = error.what();
    }
  }
  const std::string text = "rank " + std::to_string(global_ranks_[rank_]) + ", opening a ccl group of ranks " +
      ranks_text(global_ranks_) + ": " + reason + interface_text();
  poison(text);
  C10_THROW_ERROR(DistBackendError, text);
}

CclBackend::~CclBackend() {
  shutdown();
  std::lock_guard<std::mutex> guard(groups().lock);
  groups().live.erase(this);
}

void CclBackend::shutdown() {
  if (!executor_ || down_) {
    return;
  }
  down_ = true;
  {
    std::lock_guard<std::mutex> guard(groups().lock);
    groups().executors.erase(executor_.get());
    if (groups().executors.empty()) {
      stop_watching();
    }
  }
  const bool broken = !executor_->broken().empty();
  const bool ended = executor_->close(broken ? milliseconds(0) : options_->timeout);
  if (poisoned() || !ended) {
    keep_for_ever(communicator_);  // its destructor would wait for a peer
    if (!ended) {
      keep_for_ever(executor_);
    }
  } else if (communicator_) {
    std::lock_guard<std::mutex> library(library_lock());
    communicator_.reset();
  }
  std::lock_guard<std::mutex> guard(inner_lock_);
  inner_.reset();
}

void CclBackend::abort() {
  poison("abort() was called");
  shutdown();
}

void close_all_groups(milliseconds patience) {
  std::set<CclBackend*> live;
  {
    std::lock_guard<std::mutex> guard(groups().lock);
    live = groups().live;
  }
  for (CclBackend* group : live) {
    group->setTimeout(patience);
    group->shutdown();
  }
}

c10d::ErrorType CclBackend::getError() {
  return executor_->broken().empty() ? c10d::ErrorType::SUCCESS : c10d::ErrorType::COMM_ERROR;
}

WorkPtr CclBackend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  single(tensors, "all_reduce");
  const auto op = options.reduceOp.op_;
  const bool bitwise = op == c10d::ReduceOp::BAND || op == c10d::ReduceOp::BOR || op == c10d::ReduceOp::BXOR;
  if (bitwise && tensors[0].scalar_type() != at::kBool) {
    return inner().allreduce(tensors, options);
  }
  return allreduce_all(tensors, options, c10d::OpType::ALLREDUCE);
}

WorkPtr CclBackend::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  return allreduce_all(tensors, options, c10d::OpType::ALLREDUCE_COALESCED);
}

WorkPtr CclBackend::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  // torch hands sparse tensors over here without a check of its own; gloo makes them dense or refuses.
  return inner().allreduce(tensors, options);
}

WorkPtr CclBackend::allreduce_all(
    Tensors& tensors,
    const c10d::AllreduceOptions& options,
    c10d::OpType type) {
  TaskBuilder builder(*this, type, "all_reduce", options.timeout);
  std::vector<Part> parts;
  int64_t total = 0;
  for (const at::Tensor& tensor : tensors) {
    check_tensor(tensor, "all_reduce");
    const bool additive = options.reduceOp.op_ == c10d::ReduceOp::SUM || options.reduceOp.op_ == c10d::ReduceOp::AVG;
    const at::Tensor real = tensor.is_complex() && additive ? at::view_as_real(tensor) : tensor;
    Part part{builder.in_place(real), reduction_of(options.reduceOp, real.scalar_type(), "all_reduce")};
    total += part.memory.numel();
    if (part.memory.numel() > 0) {
      parts.push_back(std::move(part));
    }
  }
  if (!tensors.empty()) {
    const std::string sizes = tensors.size() > 1 ? digest(bytes_of(tensors)) + " " : "";
    builder.describe(total, tensors[0].scalar_type(), sizes + reduction_name(options.reduceOp));
  }
  builder.outputs(tensors);
  const auto here = [](const Part& part) { return part.reduction.element.has_value(); };
  if (peers_->arena() && !parts.empty() && std::all_of(parts.begin(), parts.end(), here)) {
    return allreduce_here(builder, std::move(parts), options.asyncOp);
  }
  for (const Part& part : parts) {
    if (part.reduction.average) {
      builder.average(part.memory);
    }
  }
  return builder.run(
      [communicator = communicator_.get(), parts = std::move(parts)](Events& events) {
        for (const Part& part : parts) {
          if (communicator) {
            void* data = part.memory.data_ptr();
            events.push_back(ccl::allreduce(
                data, data, part.memory.numel(), part.reduction.dtype, part.reduction.operation, *communicator));
          }
        }
      },
      options.asyncOp);
}

// One part after the other through the memory that all ranks of the group share.
WorkPtr CclBackend::allreduce_here(TaskBuilder& builder, std::vector<Part> parts, bool asynchronous) {
  return builder.run_here(
      [arena = peers_->arena(), parts = std::move(parts), next = size_t{0}]() mutable {
        for (;;) {
          if (next > 0 && !arena->advance()) {
            return false;
          }
          if (next == parts.size()) {
            return true;
          }
          const Part& part = parts[next++];
          arena->begin(
              static_cast<char*>(part.memory.data_ptr()), part.memory.numel(), *part.reduction.element,
              part.reduction.fold);
        }
      },
      asynchronous);
}

WorkPtr CclBackend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor tensor = single(tensors, "broadcast");
  TaskBuilder builder(*this, c10d::OpType::BROADCAST, "broadcast", options.timeout);
  const bool root = options.rootRank == rank_;
  const at::Tensor memory = root ? builder.readable(tensor) : builder.writable(tensor);
  builder.describe_bytes(static_cast<int64_t>(memory.nbytes()), "root " + std::to_string(options.rootRank));
  builder.outputs(tensors);
  return builder.run(
      [communicator = communicator_.get(), memory, from = static_cast<int>(options.rootRank)](Events& events) {
        if (communicator && memory.nbytes() > 0) {
          events.push_back(
              ccl::broadcast(memory.data_ptr(), memory.nbytes(), ccl::datatype::uint8, from, *communicator));
        }
      },
      options.asyncOp);
}

WorkPtr CclBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  const at::Tensor tensor = single(tensors, "reduce");
  TaskBuilder builder(*this, c10d::OpType::REDUCE, "reduce", options.timeout);
  const Reduction reduction = reduction_of(options.reduceOp, tensor.scalar_type(), "reduce");
  const at::Tensor memory = builder.in_place(tensor);
  const int root = static_cast<int>(options.rootRank);
  if (reduction.average && root == rank_) {
    builder.average(memory);
  }
  builder.describe(
      memory.numel(), tensor.scalar_type(), reduction_name(options.reduceOp) + (">" + std::to_string(root)));
  builder.outputs(tensors);
  return builder.run(
      [communicator = communicator_.get(), memory, reduction, root](Events& events) {
        if (communicator && memory.numel() > 0) {
          void* data = memory.data_ptr();
          events.push_back(ccl::reduce(
              data, data, memory.numel(), reduction.dtype, reduction.operation, root, *communicator));
        }
      },
      options.asyncOp);
}

WorkPtr CclBackend::barrier(const c10d::BarrierOptions& options) {
  // Not ccl::barrier: that returns when all have come, and the library is held until then.
  TaskBuilder builder(*this, c10d::OpType::BARRIER, "barrier", options.timeout);
  Part token{builder.in_place(at::zeros({1}, at::kFloat)), reduction_of(c10d::ReduceOp::SUM, at::kFloat, "barrier")};
  if (peers_->arena()) {
    return allreduce_here(builder, {std::move(token)}, options.asyncOp);
  }
  return builder.run(
      [communicator = communicator_.get(), token](Events& events) {
        if (communicator) {
          void* data = token.memory.data_ptr();
          events.push_back(ccl::allreduce(data, data, 1, token.reduction.dtype, token.reduction.operation, *communicator));
        }
      },
      options.asyncOp);
}

c10d::Backend& CclBackend::inner() {
  std::lock_guard<std::mutex> guard(inner_lock_);
  if (!inner_) {
    inner_ = inner_factory_();
  }
  return *inner_;
}

WorkPtr CclBackend::send(Tensors& tensors, int to, int tag) {
  return inner().send(tensors, to, tag);
}

WorkPtr CclBackend::recv(Tensors& tensors, int from, int tag) {
  return inner().recv(tensors, from, tag);
}

WorkPtr CclBackend::recvAnysource(Tensors& tensors, int tag) {
  return inner().recvAnysource(tensors, tag);
}

double all_reduce_rate(c10::intrusive_ptr<c10d::Store> store, int rank, int size, milliseconds timeout) {
  constexpr int64_t kFloats = 4 << 20;  // these and the check as in falcon_dist/exchange.py
  constexpr int kTries = 3;
  CclBackend::Settings settings{"default", std::vector<int64_t>(size), timeout, nullptr};
  std::iota(settings.global_ranks.begin(), settings.global_ranks.end(), 0);
  auto* const group = c10::make_intrusive<CclBackend>(std::move(store), rank, size, std::move(settings)).release();
  Tensors tensors{at::ones({kFloats})};
  c10d::BarrierOptions together;
  c10d::AllreduceOptions sum;
  together.asyncOp = sum.asyncOp = false;
  double least = std::numeric_limits<double>::infinity();
  for (int attempt = 0; attempt < kTries; ++attempt) {
    group->barrier(together);
    const Clock::time_point started = Clock::now();
    group->allreduce(tensors, sum);
    least = std::min(least, std::chrono::duration<double>(Clock::now() - started).count());
  }
  const float wanted = static_cast<float>(std::pow(size, kTries));
  const float* const data = tensors[0].const_data_ptr<float>();
  const bool right = std::all_of(data, data + kFloats, [wanted](float got) { return got == wanted; });
  TORCH_CHECK(right, "all_reduce gave a wrong sum");
  return static_cast<double>(tensors[0].nbytes()) / least;
}

}  // namespace falcon
