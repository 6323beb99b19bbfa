#include "library.h"

#include "alarm.h"

#include <dirent.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace falcon {

namespace {

constexpr auto kGrace = std::chrono::seconds(5);  // for the operation's own deadline to be noticed

// Never destroyed: threads may look at these while the process ends.
struct Process {
  std::mutex calls;
  std::mutex registry;
  std::vector<Watched*> watched;
  std::string poisoned_by;
  std::atomic<bool> poisoned{false};
  pid_t pid = 0;
};

Process& process() {
  static Process* const instance = new Process();
  return *instance;
}

void leave_poisoned(int status, void*) {
  Process& self = process();
  if (!self.poisoned || self.pid != getpid()) {
    return;
  }
  if (status == 0) {
    std::fprintf(stderr, "ccl: exit code 0 becomes 1, a collective had failed: %s\n", self.poisoned_by.c_str());
    status = 1;
  }
  remove_shared_names();
  std::fflush(nullptr);
  _exit(status);
}

}  // namespace

void remove_shared_names() {
  const std::string own = std::to_string(getpid()) + ":";
  DIR* const folder = opendir("/dev/shm");
  if (!folder) {
    return;
  }
  while (const dirent* const entry = readdir(folder)) {
    const std::string name = entry->d_name;
    if (name.rfind(own, 0) == 0) {
      shm_unlink(("/" + name).c_str());
    }
  }
  closedir(folder);
}

void watch_all() {
  for (;;) {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    const int64_t now = Clock::now().time_since_epoch().count();
    Process& self = process();
    std::lock_guard<std::mutex> guard(self.registry);
    for (const Watched* one : self.watched) {
      const int64_t deadline = one->deadline_;
      if (deadline != 0 && now > deadline + Clock::duration(kGrace).count()) {
        std::fprintf(
            stderr,
            "ccl: group %s: %s #%llu is stuck inside oneCCL past its timeout; this process ends with exit code 1\n",
            one->group_.c_str(),
            one->operation_.load(),
            static_cast<unsigned long long>(one->sequence_.load()));
        write_stacks("stuck inside oneCCL");
        raise_alarm("a rank of group " + one->group_ + " is stuck inside oneCCL");
        remove_shared_names();
        std::fflush(nullptr);
        _exit(1);
      }
    }
  }
}

std::mutex& library_lock() {
  return process().calls;
}

Watched::Watched(std::string group) : group_(std::move(group)) {
  Process& self = process();
  std::lock_guard<std::mutex> guard(self.registry);
  if (self.pid == 0) {
    self.pid = getpid();
    // Registered after libccl is loaded, so it runs before that library's static destructors.
    on_exit(leave_poisoned, nullptr);
    std::thread(watch_all).detach();
  }
  self.watched.push_back(this);
}

Watched::~Watched() {
  Process& self = process();
  std::lock_guard<std::mutex> guard(self.registry);
  self.watched.erase(std::remove(self.watched.begin(), self.watched.end(), this), self.watched.end());
}

void Watched::begin(const char* operation, uint64_t sequence, Clock::time_point deadline) {
  operation_ = operation;
  sequence_ = sequence;
  deadline_ = deadline.time_since_epoch().count();
}

void Watched::end() {
  deadline_ = 0;
}

void poison(const std::string& reason) {
  Process& self = process();
  std::lock_guard<std::mutex> guard(self.registry);
  if (!self.poisoned) {
    self.poisoned_by = reason;
    self.poisoned = true;
    remove_shared_names();  // such a process may leave by _exit
  }
}

bool poisoned() {
  return process().poisoned;
}

}  // namespace falcon
