#include "board.h"

#include <atomic>
#include <cstring>

namespace falcon {

namespace {
constexpr uint64_t kRing = 32;  // how far one rank may run ahead before entries are lost
}  // namespace

// One writer, any number of readers. `stamp` is 0 while an entry is being written.
struct Board::Lane {
  struct Entry {
    std::atomic<uint64_t> stamp;
    Signature signature;
  };
  alignas(64) std::atomic<uint64_t> newest;
  std::atomic<uint64_t> finished;
  Entry ring[kRing];
};

size_t Board::bytes(int size) {
  return sizeof(Lane) * size;
}

Board::Board(char* memory) : lanes_(reinterpret_cast<Lane*>(memory)) {}

void Board::write(int rank, const Signature& signature) {
  Lane& lane = lanes_[rank];
  Lane::Entry& entry = lane.ring[signature.sequence % kRing];
  entry.stamp.store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  std::memcpy(&entry.signature, &signature, sizeof(signature));
  entry.stamp.store(signature.sequence, std::memory_order_release);
  lane.newest.store(signature.sequence, std::memory_order_release);
  // Who writes first and reads the others' entries then: of two ranks at least one sees the other's.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void Board::finish(int rank, uint64_t sequence) {
  lanes_[rank].finished.store(sequence, std::memory_order_release);
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

uint64_t Board::finished(int rank) const {
  return lanes_[rank].finished.load(std::memory_order_acquire);
}

}  // namespace falcon
