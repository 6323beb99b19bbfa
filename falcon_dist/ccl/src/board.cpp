#include "board.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace falcon {

namespace {
constexpr uint64_t kRing = 32;  // how far one rank may run ahead before entries are lost

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}
}  // namespace

// One writer, any number of readers. `stamp` is 0 while an entry is being written.
struct Board::Lane {
  struct Entry {
    std::atomic<uint64_t> stamp;
    Signature signature;
  };
  alignas(64) std::atomic<uint64_t> newest;
  Entry ring[kRing];
};

Board::Board(int descriptor, int size) : descriptor_(descriptor), size_(size) {
  void* memory =
      mmap(nullptr, sizeof(Lane) * size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    ::close(descriptor);
    errno = error;
    fail("mmap of the shared board");
  }
  lanes_ = static_cast<Lane*>(memory);
}

Board Board::create(int size) {
  const int descriptor = memfd_create("falcon-ccl-board", MFD_CLOEXEC);
  if (descriptor < 0) {
    fail("memfd_create");
  }
  if (ftruncate(descriptor, static_cast<off_t>(sizeof(Lane) * size)) != 0) {
    fail("ftruncate of the shared board");
  }
  return Board(descriptor, size);
}

Board Board::open(int pid, int descriptor, int size) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
  const int own = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (own < 0) {
    fail(path);
  }
  return Board(own, size);
}

Board::Board(Board&& other) noexcept
    : descriptor_(other.descriptor_), size_(other.size_), lanes_(other.lanes_) {
  other.descriptor_ = -1;
  other.lanes_ = nullptr;
}

Board::~Board() {
  if (lanes_) {
    munmap(lanes_, sizeof(Lane) * size_);
  }
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
}

void Board::write(int rank, const Signature& signature) {
  Lane& lane = lanes_[rank];
  Lane::Entry& entry = lane.ring[signature.sequence % kRing];
  entry.stamp.store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  std::memcpy(&entry.signature, &signature, sizeof(signature));
  entry.stamp.store(signature.sequence, std::memory_order_release);
  lane.newest.store(signature.sequence, std::memory_order_release);
}

std::optional<Signature> Board::read(int rank, uint64_t sequence) const {
  const Lane::Entry& entry = lanes_[rank].ring[sequence % kRing];
  if (entry.stamp.load(std::memory_order_acquire) != sequence) {
    return std::nullopt;
  }
  Signature copy;
  std::memcpy(&copy, &entry.signature, sizeof(copy));
  std::atomic_thread_fence(std::memory_order_acquire);
  if (entry.stamp.load(std::memory_order_relaxed) != sequence) {
    return std::nullopt;  // overwritten while it was read
  }
  return copy;
}

uint64_t Board::newest(int rank) const {
  return lanes_[rank].newest.load(std::memory_order_acquire);
}

}  // namespace falcon
