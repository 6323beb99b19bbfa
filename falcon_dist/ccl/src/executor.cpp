#include "executor.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/prctl.h>

#include <algorithm>

#include "alarm.h"

namespace falcon {

namespace {

constexpr auto kLookEvery = milliseconds(20);     // liveness of neighbours and deadlines
constexpr auto kTellAfter = std::chrono::seconds(1);  // when the store is told where this rank stands
constexpr auto kDeathGrace = std::chrono::seconds(1);  // its last messages may still be on their way
// In every error that a peer's end may be the cause of, see PEER_IS_GONE in falcon_dist/contract.py.
constexpr const char* kPeerIsGone = " (a peer is gone or out of reach)";

std::string seconds_text(Clock::duration duration) {
  std::ostringstream out;
  out << std::chrono::duration<double>(duration).count();
  return out.str();
}

// Between two looks at an unfinished operation. A look that took long has moved data, so the next one
// follows at once; when nothing moves for a while the core is given away, for longer the longer it lasts: it
// may be needed by the very rank that is waited for, and who spins is scheduled last afterwards. The group's
// own thread shares its core with the computation it overlaps, so its pauses grow much longer.
class Backoff {
 public:
  explicit Backoff(bool own_thread)
      : spin_(own_thread ? kSpinOwnThread : kSpinCaller), longest_(own_thread ? kLongestOwnThread : kLongestCaller) {}

  void pause(Clock::time_point before, Clock::time_point now) {
    if (now - before > kMovedData) {
      idle_since_ = now;
      return;
    }
    const Clock::duration idle = now - idle_since_;
    if (idle < spin_) {
      __builtin_ia32_pause();
    } else {
      std::this_thread::sleep_for(std::clamp<Clock::duration>(idle / 8, kShortest, longest_));
    }
  }

 private:
  static constexpr auto kMovedData = std::chrono::microseconds(4);
  static constexpr auto kSpinCaller = std::chrono::microseconds(200);
  static constexpr auto kSpinOwnThread = std::chrono::microseconds(20);
  static constexpr auto kShortest = std::chrono::microseconds(10);
  static constexpr auto kLongestCaller = std::chrono::microseconds(100);
  static constexpr auto kLongestOwnThread = std::chrono::microseconds(2000);
  const Clock::duration spin_;
  const Clock::duration longest_;
  Clock::time_point idle_since_ = Clock::now();
};

// The thread of a group does what little arithmetic it has (averages) alone: a second OpenMP team would
// fight with the one that computes.
void single_openmp_thread() {
  using Set = void (*)(int);
  if (const auto set = reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"))) {
    set(1);
  }
}

}  // namespace

CclWork::CclWork(int rank, uint64_t sequence, const Task& task)
    : Work(rank, task.type, task.signature.operation),
      sequence_(sequence),
      outputs_(task.outputs),
      future_(c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()))) {}

c10::intrusive_ptr<c10::ivalue::Future> CclWork::getFuture() {
  std::lock_guard<std::mutex> guard(handing_out_);
  handed_out_ = true;
  return future_;
}

void CclWork::settle(std::exception_ptr error) {
  if (error) {
    future_->setError(error);
  } else {
    future_->markCompleted(c10::IValue(outputs_));
  }
}

void CclWork::complete(std::exception_ptr error) {
  settle(error);
  finish(error);
}

bool CclWork::complete_without_callbacks(std::exception_ptr error) {
  {
    std::lock_guard<std::mutex> guard(handing_out_);
    if (handed_out_) {
      return false;
    }
    settle(error);
  }
  finish(error);
  return true;
}

Executor::Executor(std::string group, int64_t rank, std::shared_ptr<Peers> peers)
    : group_(std::move(group)), rank_(rank), peers_(std::move(peers)), watched_(group_) {}

Executor::~Executor() {
  close(milliseconds(0));
}

void Executor::check_open() const {
  TORCH_CHECK_WITH(
      DistBackendError, broken_.empty(), "group ", group_, " cannot be used any more: ", broken_);
  TORCH_CHECK_WITH(DistBackendError, !closed_, "group ", group_, " has been destroyed");
}

c10::intrusive_ptr<c10d::Work> Executor::run(Task task, bool asynchronous) {
  std::unique_lock<std::mutex> guard(mutex_);
  check_open();
  task.signature.sequence = ++sequence_;
  auto work = c10::make_intrusive<CclWork>(static_cast<int>(rank_), sequence_, task);
  if (asynchronous || running_ || !queue_.empty()) {
    queue_.push_back({std::move(task), work, {}});
    wake();
    return work;
  }
  running_ = true;
  guard.unlock();
  std::exception_ptr error;
  try {
    execute(task, false);
  } catch (...) {
    error = std::current_exception();
  }
  guard.lock();
  running_ = false;
  wake();
  guard.unlock();
  work->complete(error);
  if (error) {
    std::rethrow_exception(error);
  }
  return work;
}

// Called with mutex_ held: what is queued is taken up, or who waits for the end of it all is told.
void Executor::wake() {
  if (queue_.empty()) {
    idle_.notify_all();
    return;
  }
  if (in_callbacks_ == threads_.size() && !closed_) {
    threads_.emplace_back([this] { loop(); });
  }
  ready_.notify_one();
}

void Executor::loop() {
  pthread_setname_np(pthread_self(), "falcon-ccl");
  prctl(PR_SET_TIMERSLACK, 1000UL);  // short sleeps end on time
  single_openmp_thread();
  std::unique_lock<std::mutex> guard(mutex_);
  for (;;) {
    ready_.wait(guard, [this] { return queue_.empty() ? closed_ : !running_; });
    if (queue_.empty()) {
      return;
    }
    serve(guard);
  }
}

// `guard` holds mutex_ before and after.
void Executor::serve(std::unique_lock<std::mutex>& guard) {
  std::optional<Queued> next(std::move(queue_.front()));
  queue_.pop_front();
  running_ = true;
  const std::string broken = broken_;
  guard.unlock();
  const std::exception_ptr error = attempt(*next, broken);
  next->task = Task{};  // tensors are let go before anybody learns of the end
  const bool told = next->work->complete_without_callbacks(error);
  if (!told) {
    guard.lock();
    running_ = false;
    ++in_callbacks_;
    wake();
    guard.unlock();
    next->work->complete(error);
  }
  next.reset();  // what it holds of Python's may need the interpreter, so not under the lock
  guard.lock();
  if (told) {
    running_ = false;
  } else {
    --in_callbacks_;
  }
  idle_.notify_all();
}

std::exception_ptr Executor::attempt(Queued& next, const std::string& broken) {
  try {
    TORCH_CHECK_WITH(
        DistBackendError, broken.empty(), "group ", group_, " cannot be used any more: ", broken);
    const at::ThreadLocalStateGuard as_caller(next.callers);
    execute(next.task, true);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void Executor::execute(Task& task, bool own_thread) {
  at::NoGradGuard no_grad;
  const Signature mine = task.signature;
  const Clock::time_point deadline = Clock::now() + task.timeout;
  peers_->arrive(mine);
  if (const auto other = peers_->disagreement(mine)) {
    give_up(mine, "but " + *other);
  }
  watched_.begin(task.name, mine.sequence, deadline);
  auto flight = std::make_unique<Flight>();
  try {
    take_off(*flight, task);
    poll(*flight, task, own_thread);
    peers_->leave(mine);
    if (task.finish) {
      task.finish();
    }
  } catch (const ccl::exception& error) {
    watched_.end();
    (void)flight.release();
    (void)new Task(std::move(task));  // its tensors too
    give_up(mine, std::string("oneCCL reported: ") + error.what() + (is_lonely(mine) ? kPeerIsGone : ""));
  } catch (...) {
    watched_.end();
    (void)flight.release();
    (void)new Task(std::move(task));
    throw;
  }
  watched_.end();
}

void Executor::take_off(Flight& flight, const Task& task) {
  if (task.advance) {
    return;
  }
  std::lock_guard<std::mutex> library(library_lock());
  if (start_agreement_) {
    // First, so that it meets its like on ranks that called something else.
    Agreement& agreement = flight.agreement;
    agreement.mine[0] = agreement.values[0] = static_cast<int64_t>(task.signature.hash());
    agreement.mine[1] = agreement.values[1] = ~agreement.mine[0];
    start_agreement_(agreement);
    agreement.pending = true;
  }
  task.submit(flight.events);
}

bool Executor::finished(Flight& flight, const Task& task) {
  if (task.advance) {
    return task.advance();
  }
  Agreement& agreement = flight.agreement;
  bool compared = false;
  {
    std::lock_guard<std::mutex> library(library_lock());
    if (agreement.pending && agreement.event.test()) {
      agreement.pending = false;
      compared = true;
    }
    while (!flight.events.empty() && flight.events.back().test()) {
      flight.events.pop_back();
    }
  }
  if (compared && (agreement.values[0] != agreement.mine[0] || agreement.values[1] != agreement.mine[1])) {
    give_up_disagreeing(task.signature);
  }
  if (agreement.pending || !flight.events.empty()) {
    return false;
  }
  if (!task.follow || flight.followed) {
    return true;
  }
  flight.followed = true;
  std::unique_lock<std::mutex> library(library_lock());
  const std::string fault = task.follow(flight.events);
  library.unlock();
  if (!fault.empty()) {
    give_up(task.signature, "but " + fault);
  }
  return flight.events.empty();
}

void Executor::poll(Flight& flight, const Task& task, bool own_thread) {
  Backoff backoff(own_thread);
  const Clock::time_point started = Clock::now();
  Clock::time_point before = started;
  next_look_ = started + kLookEvery;
  while (!finished(flight, task)) {
    const Clock::time_point now = Clock::now();
    if (now >= next_look_) {
      next_look_ = now + kLookEvery;
      look_around(task.signature, started, started + task.timeout);
    }
    backoff.pause(before, now);
    before = Clock::now();
  }
}

// Whether an error of oneCCL may be a broken connection: a peer of this host has ended, which is seen a moment
// after its connections close, or some are on other hosts.
bool Executor::is_lonely(const Signature& mine) const {
  for (int tick = 0; tick < 10; ++tick) {
    if (!peers_->board_shows_all() || peers_->dead(mine)) {
      return true;
    }
    std::this_thread::sleep_for(milliseconds(20));
  }
  return false;
}

// Every rank learns of it at the same time and writes down what it had called; who it was is read there.
void Executor::give_up_disagreeing(const Signature& mine) {
  std::optional<std::string> other;
  for (int tick = 0; !other && tick < 100; ++tick) {
    if (!peers_->looking()) {
      peers_->look(mine, Peers::Ask::kEverybody);
    }
    std::this_thread::sleep_for(milliseconds(20));
    other = peers_->remote_disagreement(mine);
  }
  give_up(mine, "but " + other.value_or("another rank called something else"));
}

void Executor::look_around(const Signature& mine, Clock::time_point started, Clock::time_point deadline) {
  const Clock::time_point now = Clock::now();
  const Clock::duration waited = now - started;
  if (const auto other = peers_->disagreement(mine)) {
    give_up(mine, "but " + *other);
  }
  if (const auto gone = peers_->dead(mine); gone && waited > kDeathGrace) {
    give_up(mine, "the process of " + *gone + " has ended" + kPeerIsGone);
  }
  if (now >= deadline) {
    give_up_late(mine, waited);
  }
  if (waited > kTellAfter) {
    if (const auto failure = peers_->remote_failure()) {
      const bool said = failure->find(kPeerIsGone) != std::string::npos;
      give_up(mine, "another rank gave up first: " + *failure + (said ? "" : kPeerIsGone));
    }
    if (const auto other = peers_->remote_disagreement(mine)) {
      give_up(mine, "but " + *other);
    }
    // Every second a cheap question, and the whole picture once a quarter of the time is gone.
    const bool second = waited % std::chrono::seconds(1) < 2 * kLookEvery;
    if (second && !peers_->looking()) {
      peers_->look(mine, waited > (deadline - started) / 4 ? Peers::Ask::kEverybody : Peers::Ask::kFailureOnly);
    }
  }
}

void Executor::give_up_late(const Signature& mine, Clock::duration waited) {
  peers_->look(mine, Peers::Ask::kEverybody);
  for (int tick = 0; peers_->looking() && tick < 100; ++tick) {
    std::this_thread::sleep_for(milliseconds(20));
  }
  if (const auto other = peers_->remote_disagreement(mine)) {
    give_up(mine, "but " + *other);
  }
  const std::string absent = peers_->absent(mine);
  const std::string store = peers_->looking() ? "; the rendezvous store does not answer" : "";
  watched_.end();
  write_stacks(mine.text() + " is not finished in time");
  raise_alarm("rank " + std::to_string(rank_) + " of group " + group_ + " gives up waiting in " + mine.text());
  give_up(
      mine,
      "not finished within " + seconds_text(waited) + " s, " +
          (absent.empty() ? "though every rank has come: the network between them is blocked or too slow"
                          : "because these have not come: " + absent) +
          store + kPeerIsGone);
}

void Executor::give_up(const Signature& mine, const std::string& reason) {
  std::string text = "rank " + std::to_string(rank_) + " of group " + group_ + ", " + mine.text() + ": " + reason;
  watched_.end();
  {
    std::lock_guard<std::mutex> guard(mutex_);
    if (broken_.empty()) {
      broken_ = text;
    }
  }
  poison(text);
  peers_->tell_failure(text);
  C10_THROW_ERROR(DistBackendError, text);
}

bool Executor::drain(Clock::time_point deadline) {
  std::unique_lock<std::mutex> guard(mutex_);
  return idle_.wait_until(guard, deadline, [this] { return !running_ && queue_.empty() && in_callbacks_ == 0; });
}

bool Executor::close(milliseconds patience) {
  const bool drained = drain(Clock::now() + patience);
  const std::string unfinished = "group " + group_ + " was destroyed while an operation was running";
  std::vector<std::thread> threads;
  {
    std::lock_guard<std::mutex> guard(mutex_);
    closed_ = true;
    threads.swap(threads_);
    if (!drained && broken_.empty()) {
      broken_ = unfinished;  // what is still queued fails, and is not taken for done
    }
  }
  ready_.notify_all();
  if (!drained) {
    poison(unfinished);
  }
  for (std::thread& thread : threads) {
    if (drained) {
      thread.join();
    } else {
      thread.detach();
    }
  }
  return drained;
}

std::string Executor::broken() const {
  std::lock_guard<std::mutex> guard(mutex_);
  return broken_;
}

uint64_t Executor::sequence() const {
  std::lock_guard<std::mutex> guard(mutex_);
  return sequence_;
}

}  // namespace falcon
