// A page of shared memory on which the ranks of one host write which collective they are in.
//
// Writing costs a few stores, so it is always on: a rank sees at once that a neighbour called something
// else, and a timeout can name who never came. Ranks of other hosts are seen through the store instead.
#pragma once

#include <optional>
#include <string>

#include "signature.h"

namespace falcon {

class Board {
 public:
  static size_t bytes(int size);
  explicit Board(char* memory);

  void write(int rank, const Signature& signature);
  // This rank's part of operation `sequence` is done.
  void finish(int rank, uint64_t sequence);

  // What `rank` wrote for operation `sequence`; nothing where it has not come or the entry was overwritten.
  std::optional<Signature> read(int rank, uint64_t sequence) const;

  // The newest operation `rank` has entered; 0 before the first.
  uint64_t newest(int rank) const;
  // The newest operation of which `rank` has done its part; 0 before the first.
  uint64_t finished(int rank) const;

 private:
  struct Lane;
  Lane* const lanes_;
};

}  // namespace falcon
