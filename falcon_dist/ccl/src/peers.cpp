#include "peers.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <system_error>
#include <thread>

namespace falcon {

namespace {

using Bytes = std::vector<uint8_t>;

// Two processes see each other's /proc only on the same kernel and in the same pid namespace.
std::string host_identity() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  char space[PATH_MAX] = {};
  if (readlink("/proc/self/ns/pid", space, sizeof(space) - 1) < 0) {
    return boot + "/" + std::to_string(getpid());  // alone: nothing is shared with anybody
  }
  return boot + "/" + space;
}

std::string host_name() {
  char name[HOST_NAME_MAX + 1] = {};
  gethostname(name, HOST_NAME_MAX);
  return name;
}

Bytes to_bytes(const std::string& text) {
  return {text.begin(), text.end()};
}

std::string await(c10d::Store& store, const std::string& key, milliseconds timeout) {
  store.wait({key}, timeout);
  const Bytes value = store.get(key);
  return {value.begin(), value.end()};
}

size_t round_to_page(size_t bytes) {
  return (bytes + 4095) / 4096 * 4096;
}

std::string key(const char* kind, int rank) {
  return std::string(kind) + "/" + std::to_string(rank);
}

}  // namespace

// Shared with the thread that talks to the store, which may outlive the group.
struct Peers::Seen {
  std::mutex lock;
  bool busy = false;
  std::vector<std::optional<Signature>> ranks;
  std::string failure;
};

Peers::Peers(
    c10::intrusive_ptr<c10d::Store> store,
    int rank,
    std::vector<int64_t> names,
    milliseconds timeout)
    : store_(std::move(store)), rank_(rank), names_(std::move(names)), seen_(std::make_shared<Seen>()) {
  const int size = static_cast<int>(names_.size());
  seen_->ranks.resize(size);
  pids_.assign(size, 0);
  pidfds_.assign(size, -1);
  const std::string here = host_identity();
  store_->set(key("host", rank_), to_bytes(here + " " + std::to_string(getpid()) + " " + host_name()));
  std::vector<std::string> hosts(size);
  std::map<std::string, int> known;  // process and host name
  for (int other = 0; other < size; ++other) {
    std::istringstream record(await(*store_, key("host", other), timeout));
    std::string host;
    record >> hosts[other] >> pids_[other] >> host;
    const auto [same, fresh] = known.emplace(std::to_string(pids_[other]) + " of " + host, other);
    TORCH_CHECK_VALUE(
        fresh,
        name(same->second), " and ", name(other), " are both process ", same->first,
        ", and oneCCL takes two such ranks for one: give every host a name of its own");
    if (hosts[other] == here) {
      local_.push_back(other);
      if (other != rank_) {
        pidfds_[other] = static_cast<int>(syscall(SYS_pidfd_open, pids_[other], 0));
      }
    }
  }
  share_memory(timeout);
}

// Who cannot map the memory (another user's process, say) does without, and then nobody uses the arena: all
// ranks must go the same way.
void Peers::share_memory(milliseconds timeout) {
  if (local_.size() < 2) {
    return;
  }
  const bool mapped = map_memory(timeout);
  const int size = static_cast<int>(names_.size());
  const size_t board_bytes = round_to_page(Board::bytes(size));
  if (mapped) {
    board_.emplace(memory_->data());
  }
  if (static_cast<int>(local_.size()) < size) {
    return;
  }
  const char* wanted = std::getenv("FALCON_CCL_SHARED_MEMORY");
  const bool willing = mapped && !(wanted && std::string(wanted) == "0");
  store_->set(key("arena", rank_), to_bytes(willing ? "yes" : "no"));
  bool all = true;
  for (int other = 0; other < size; ++other) {
    all = await(*store_, key("arena", other), timeout) == "yes" && all;
  }
  if (all) {
    arena_.emplace(memory_->data() + board_bytes, rank_, size);
  }
}

bool Peers::map_memory(milliseconds timeout) {
  const int size = static_cast<int>(names_.size());
  const size_t bytes = round_to_page(Board::bytes(size)) +
      (static_cast<int>(local_.size()) == size ? Arena::bytes(size) : 0);
  const int first = local_.front();
  try {
    if (first == rank_) {
      memory_.emplace(SharedMemory::create("falcon-ccl", bytes));
      store_->set(key("memory", rank_), to_bytes(std::to_string(memory_->descriptor())));
    } else {
      const int descriptor = std::stoi(await(*store_, key("memory", first), timeout));
      memory_.emplace(SharedMemory::open(pids_[first], descriptor, bytes));
    }
  } catch (const std::system_error&) {
    if (first == rank_) {
      store_->set(key("memory", rank_), to_bytes("-1"));
    }
    return false;
  }
  return true;
}

void Peers::meet(const char* place, milliseconds timeout) {
  store_->set(key(place, rank_), to_bytes("here"));
  for (int other = 0; other < static_cast<int>(names_.size()); ++other) {
    await(*store_, key(place, other), timeout);
  }
}

Peers::~Peers() {
  for (const int descriptor : pidfds_) {
    if (descriptor >= 0) {
      ::close(descriptor);
    }
  }
}

std::string Peers::name(int rank) const {
  return "rank " + std::to_string(names_[rank]);
}

void Peers::arrive(const Signature& mine) {
  if (board_) {
    board_->write(rank_, mine);
  }
}

void Peers::leave(const Signature& mine) {
  if (board_) {
    board_->finish(rank_, mine.sequence);
  }
}

std::optional<std::string> Peers::disagreement(const Signature& mine) const {
  if (!board_) {
    return std::nullopt;
  }
  for (const int other : local_) {
    const std::optional<Signature> theirs = board_->read(other, mine.sequence);
    if (theirs && !mine.same_call(*theirs)) {
      return name(other) + " called " + theirs->text();
    }
  }
  return std::nullopt;
}

std::optional<std::string> Peers::dead(const Signature& mine) const {
  std::string text;
  for (const int other : local_) {
    if (board_ && board_->finished(other) >= mine.sequence) {
      continue;
    }
    pollfd ended{pidfds_[other], POLLIN, 0};
    if (pidfds_[other] >= 0 && ::poll(&ended, 1, 0) == 1 && (ended.revents & POLLIN)) {
      text += (text.empty() ? "" : ", ") + name(other) + " (process " + std::to_string(pids_[other]) + ")";
    }
  }
  return text.empty() ? std::nullopt : std::optional<std::string>(text);
}

void Peers::look(const Signature& mine, Ask ask) {
  {
    std::lock_guard<std::mutex> guard(seen_->lock);
    if (seen_->busy) {
      return;
    }
    seen_->busy = true;
  }
  std::thread([seen = seen_, store = store_, rank = rank_, size = names_.size(), mine, ask] {
    std::vector<std::optional<Signature>> ranks;
    std::string failure;
    try {
      Bytes own(sizeof(mine));
      std::memcpy(own.data(), &mine, sizeof(mine));
      store->set(key("at", rank), own);
      for (int other = 0; ask == Ask::kEverybody && other < static_cast<int>(size); ++other) {
        ranks.emplace_back();
        if (store->check({key("at", other)})) {
          const Bytes theirs = store->get(key("at", other));
          if (theirs.size() == sizeof(Signature)) {
            std::memcpy(&ranks.back().emplace(), theirs.data(), sizeof(Signature));
          }
        }
      }
      if (store->check({"failed"})) {
        const Bytes text = store->get("failed");
        failure.assign(text.begin(), text.end());
      }
    } catch (const std::exception&) {
      // The store has gone with its process; what is known stays as it is.
    }
    std::lock_guard<std::mutex> guard(seen->lock);
    if (ranks.size() == size) {
      seen->ranks = std::move(ranks);
    }
    if (!failure.empty()) {
      seen->failure = std::move(failure);
    }
    seen->busy = false;
  }).detach();
}

bool Peers::looking() const {
  std::lock_guard<std::mutex> guard(seen_->lock);
  return seen_->busy;
}

std::optional<std::string> Peers::remote_disagreement(const Signature& mine) const {
  std::lock_guard<std::mutex> guard(seen_->lock);
  for (size_t other = 0; other < names_.size(); ++other) {
    const std::optional<Signature>& theirs = seen_->ranks[other];
    if (theirs && theirs->sequence == mine.sequence && !mine.same_call(*theirs)) {
      return name(static_cast<int>(other)) + " called " + theirs->text();
    }
  }
  return std::nullopt;
}

std::optional<std::string> Peers::remote_failure() const {
  std::lock_guard<std::mutex> guard(seen_->lock);
  return seen_->failure.empty() ? std::nullopt : std::optional<std::string>(seen_->failure);
}

void Peers::tell_failure(const std::string& text) {
  const auto told = std::make_shared<std::atomic<bool>>(false);
  std::thread([told, store = store_, text] {
    try {
      if (!store->check({"failed"})) {
        store->set("failed", to_bytes(text));
      }
    } catch (const std::exception&) {
      // Nobody left to tell.
    }
    *told = true;
  }).detach();
  for (int waited = 0; !*told && waited < 50; ++waited) {
    std::this_thread::sleep_for(milliseconds(10));
  }
}

std::optional<Signature> Peers::seen(int rank) const {
  if (board_ && std::find(local_.begin(), local_.end(), rank) != local_.end()) {
    const uint64_t newest = board_->newest(rank);
    return newest == 0 ? std::nullopt : board_->read(rank, newest);
  }
  std::lock_guard<std::mutex> guard(seen_->lock);
  return seen_->ranks[rank];
}

std::string Peers::absent(const Signature& mine) const {
  std::string text;
  for (int other = 0; other < static_cast<int>(names_.size()); ++other) {
    const std::optional<Signature> theirs = seen(other);
    if (other == rank_ || (theirs && theirs->sequence >= mine.sequence)) {
      continue;
    }
    text += (text.empty() ? "" : ", ") + name(other);
    if (theirs) {
      text += " (last in " + theirs->text() + ")";
    }
  }
  return text;
}

}  // namespace falcon
