#include "alarm.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <mutex>
#include <thread>

namespace falcon {

namespace {

using std::chrono::milliseconds;

constexpr auto kLookEvery = milliseconds(1000);
constexpr auto kTick = milliseconds(10);
constexpr auto kOthersNeed = milliseconds(1500);  // a look of theirs, and their writing
constexpr auto kWriting = milliseconds(2000);
const char* const kKey = "alarm";

// Never destroyed: threads may look at it while the process ends.
struct Alarm {
  std::mutex lock;
  StackWriter writer;
  c10::intrusive_ptr<c10d::Store> store;  // none where nobody watches
  std::atomic<bool> written{false};
};

Alarm& alarm_state() {
  static Alarm* const instance = new Alarm();
  return *instance;
}

c10::intrusive_ptr<c10d::Store> watched_store() {
  Alarm& self = alarm_state();
  std::lock_guard<std::mutex> guard(self.lock);
  return self.store;
}

// Runs it in a thread that is left behind where it takes longer: the store may be as dead as a peer, and the
// interpreter may be held.
void run_at_most(milliseconds patience, std::function<void()> action) {
  const auto done = std::make_shared<std::atomic<bool>>(false);
  std::thread([done, action = std::move(action)] {
    try {
      action();
    } catch (const std::exception&) {
      // Nobody is there to hear or to be told.
    }
    *done = true;
  }).detach();
  for (auto waited = milliseconds(0); !*done && waited < patience; waited += kTick) {
    std::this_thread::sleep_for(kTick);
  }
}

void look() {
  while (const auto store = watched_store()) {
    try {
      if (store->check({kKey})) {
        const std::vector<uint8_t> text = store->get(kKey);
        write_stacks(std::string(text.begin(), text.end()));
        return;
      }
    } catch (const std::exception&) {
      return;  // the store has gone with its process
    }
    std::this_thread::sleep_for(kLookEvery);
  }
}

}  // namespace

void set_stack_writer(StackWriter writer) {
  Alarm& self = alarm_state();
  std::lock_guard<std::mutex> guard(self.lock);
  self.writer = std::move(writer);
}

void write_stacks(const std::string& reason) {
  Alarm& self = alarm_state();
  StackWriter writer;
  {
    std::lock_guard<std::mutex> guard(self.lock);
    writer = self.writer;
  }
  if (!writer || self.written.exchange(true)) {
    return;
  }
  std::fprintf(stderr, "ccl: %s\nccl: where this rank stands:\n", reason.c_str());
  std::fflush(stderr);
  run_at_most(kWriting, writer);
}

void watch_for_alarm(c10d::Store& store) {
  if (watched_store()) {
    return;
  }
  auto own = store.clone();  // a connection: the look may hang on it
  Alarm& self = alarm_state();
  std::lock_guard<std::mutex> guard(self.lock);
  if (!self.store) {
    self.store = std::move(own);
    std::thread(look).detach();
  }
}

void stop_watching() {
  Alarm& self = alarm_state();
  std::lock_guard<std::mutex> guard(self.lock);
  self.store.reset();
}

void raise_alarm(const std::string& reason) {
  if (const auto store = watched_store()) {
    run_at_most(kOthersNeed, [store, reason] {
      if (!store->check({kKey})) {
        store->set(kKey, std::vector<uint8_t>(reason.begin(), reason.end()));
      }
      std::this_thread::sleep_for(kOthersNeed);
    });
  }
}

}  // namespace falcon
