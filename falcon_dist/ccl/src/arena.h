// all_reduce between the ranks of one host, over memory they share.
//
// oneCCL moves such data through libfabric, which costs a system call or a second copy per message and holds
// bfloat16 sums in bfloat16; measured, that is the limit (docs/oneccl.md). Here the data goes in chunks
// through a ring of slots that stays in the caches: every rank copies its chunk in, reduces its share of the
// chunk over all ranks, and copies the others' shares out. All ranks walk through the same chunks, so three
// counters per rank are all the synchronisation there is, and a rank may run ahead by the whole ring.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace falcon {

class Arena {
 public:
  static size_t bytes(int size);

  // `memory` is zeroed and shared by all `size` ranks of the group.
  Arena(char* memory, int rank, int size);

  // Begins an all_reduce of `data` in place. The same call on every rank, in the same order.
  void begin(char* data, size_t count, Element element, Fold operation);

  // Does what can be done without waiting. True when the all_reduce is finished.
  bool advance();

 private:
  struct Counters;
  struct Span {
    size_t offset;  // bytes
    size_t count;   // elements
  };

  Counters& counters(int rank) const;
  char* slot(int rank, uint64_t chunk) const;
  uint64_t least(std::atomic<uint64_t> Counters::*counter) const;
  Span chunk(uint64_t index) const;
  Span share(const Span& chunk, int rank) const;

  void copy_in();
  void reduce();
  void copy_out();

  char* const memory_;
  const int rank_;
  const int size_;
  std::vector<const char*> inputs_;

  char* data_ = nullptr;
  size_t count_ = 0;
  Element element_ = Element::kFloat32;
  Fold operation_ = Fold::kSum;
  // Chunks are numbered through the life of the group.
  uint64_t first_ = 0;
  uint64_t end_ = 0;
  uint64_t filled_ = 0;
  uint64_t reduced_ = 0;
  uint64_t done_ = 0;
};

}  // namespace falcon
