#include "arena.h"

#include <algorithm>
#include <cstring>

namespace falcon {

namespace {
constexpr size_t kSlotBytes = 512 << 10;  // of one rank's chunk: some of them fit into a core's own cache
constexpr uint64_t kSlots = 8;            // how many chunks a rank may run ahead
constexpr size_t kLine = 64;
}  // namespace

// How many chunks this rank has copied in, reduced its share of, and copied out.
struct Arena::Counters {
  alignas(kLine) std::atomic<uint64_t> filled;
  alignas(kLine) std::atomic<uint64_t> reduced;
  alignas(kLine) std::atomic<uint64_t> done;
};

size_t Arena::bytes(int size) {
  return size * (sizeof(Counters) + kSlots * kSlotBytes);
}

Arena::Arena(char* memory, int rank, int size)
    : memory_(memory), rank_(rank), size_(size), inputs_(size) {}

Arena::Counters& Arena::counters(int rank) const {
  return reinterpret_cast<Counters*>(memory_)[rank];
}

char* Arena::slot(int rank, uint64_t chunk) const {
  return memory_ + sizeof(Counters) * size_ + (rank * kSlots + chunk % kSlots) * kSlotBytes;
}

uint64_t Arena::least(std::atomic<uint64_t> Counters::*counter) const {
  uint64_t value = (counters(0).*counter).load(std::memory_order_acquire);
  for (int rank = 1; rank < size_; ++rank) {
    value = std::min(value, (counters(rank).*counter).load(std::memory_order_acquire));
  }
  return value;
}

Arena::Span Arena::chunk(uint64_t index) const {
  const size_t width = bytes_of(element_);
  const size_t start = (index - first_) * (kSlotBytes / width);
  return {start * width, std::min(kSlotBytes / width, count_ - start)};
}

// Shares begin at cache lines, so that two ranks never write to one.
Arena::Span Arena::share(const Span& chunk, int rank) const {
  const size_t width = bytes_of(element_);
  const size_t line = kLine / width;
  const size_t lines = (chunk.count + line - 1) / line;
  const size_t begin = std::min(chunk.count, lines * rank / size_ * line);
  const size_t end = std::min(chunk.count, lines * (rank + 1) / size_ * line);
  return {begin * width, end - begin};
}

void Arena::begin(char* data, size_t count, Element element, Fold operation) {
  data_ = data;
  count_ = count;
  element_ = element;
  operation_ = operation;
  const size_t per_chunk = kSlotBytes / bytes_of(element);
  first_ = end_;
  end_ = first_ + (count + per_chunk - 1) / per_chunk;
}

bool Arena::advance() {
  for (;;) {
    // What is oldest comes first: it is still in the cache, and it lets the others go on.
    if (done_ < reduced_ && least(&Counters::reduced) > done_) {
      copy_out();
    } else if (reduced_ < filled_ && least(&Counters::filled) > reduced_) {
      reduce();
    } else if (filled_ < end_ && filled_ - least(&Counters::done) < kSlots) {
      copy_in();
    } else {
      return done_ == end_;
    }
  }
}

// The others' shares only: this rank's own is read where it is.
void Arena::copy_in() {
  const Span whole = chunk(filled_);
  char* const to = slot(rank_, filled_);
  for (int rank = 0; rank < size_; ++rank) {
    if (rank != rank_) {
      const Span part = share(whole, rank);
      std::memcpy(to + part.offset, data_ + whole.offset + part.offset, part.count * bytes_of(element_));
    }
  }
  counters(rank_).filled.store(++filled_, std::memory_order_release);
}

void Arena::reduce() {
  const Span whole = chunk(reduced_);
  const Span part = share(whole, rank_);
  char* const own = data_ + whole.offset + part.offset;
  for (int rank = 0; rank < size_; ++rank) {
    inputs_[rank] = rank == rank_ ? own : slot(rank, reduced_) + part.offset;
  }
  fold(element_, operation_, inputs_.data(), size_, own, slot(rank_, reduced_) + part.offset, part.count);
  counters(rank_).reduced.store(++reduced_, std::memory_order_release);
}

void Arena::copy_out() {
  const Span whole = chunk(done_);
  for (int rank = 0; rank < size_; ++rank) {
    if (rank != rank_) {
      const Span part = share(whole, rank);
      std::memcpy(
          data_ + whole.offset + part.offset, slot(rank, done_) + part.offset, part.count * bytes_of(element_));
    }
  }
  counters(rank_).done.store(++done_, std::memory_order_release);
}

}  // namespace falcon
