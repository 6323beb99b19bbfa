// What this rank knows about the other ranks of a group, apart from their data: who shares the host, who is
// alive, who is in which collective. Used when an operation takes long, so that an error can name ranks.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arena.h"
#include "board.h"
#include "library.h"
#include "shared_memory.h"
#include "signature.h"

namespace falcon {

class Peers {
 public:
  // Exchanges one record per rank through `store`. `names` are the global ranks of the group's members.
  // Throws what the store throws where a rank does not come within `timeout`.
  Peers(c10::intrusive_ptr<c10d::Store> store, int rank, std::vector<int64_t> names, milliseconds timeout);
  ~Peers();
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  // This group's own connection; nobody else waits on it once the group is open.
  const c10::intrusive_ptr<c10d::Store>& store() const { return store_; }

  // Whether every disagreement is seen on the board.
  bool board_shows_all() const { return board_ && local_.size() == names_.size(); }

  // Waits until every rank has come to the place of this name. Throws what the store throws.
  void meet(const char* place, milliseconds timeout);

  // The fast way for all_reduce; null unless all ranks of the group share this host and its memory.
  Arena* arena() { return arena_ ? &*arena_ : nullptr; }

  // Says on the board that this rank has entered an operation, or has done its part of it.
  void arrive(const Signature& mine);
  void leave(const Signature& mine);

  // A neighbour on this host that entered another call as its operation of the same number.
  std::optional<std::string> disagreement(const Signature& mine) const;

  // Ranks of this host whose process has ended before their part of this operation was done:
  // "rank 1 (process 77)"; nothing where there are none.
  std::optional<std::string> dead(const Signature& mine) const;

  // The store side, for ranks of other hosts. The store may be as dead as a peer, so it is only ever spoken
  // to from a thread of its own; `look` starts one such conversation unless one is under way.
  enum class Ask { kFailureOnly, kEverybody };
  void look(const Signature& mine, Ask ask);
  bool looking() const;
  std::optional<std::string> remote_disagreement(const Signature& mine) const;
  std::optional<std::string> remote_failure() const;

  // Tells the other ranks that this one gave up. Waits a moment at most.
  void tell_failure(const std::string& text);

  // Who has not entered operation `mine`, as far as the board and the last `look` know.
  std::string absent(const Signature& mine) const;

 private:
  struct Seen;

  std::string name(int rank) const;
  std::optional<Signature> seen(int rank) const;
  void share_memory(milliseconds timeout);
  bool map_memory(milliseconds timeout);

  const c10::intrusive_ptr<c10d::Store> store_;
  const int rank_;
  const std::vector<int64_t> names_;
  std::vector<int> local_;    // ranks that share this host, this one included
  std::vector<int> pids_;     // per rank
  std::vector<int> pidfds_;   // per rank; -1 where it is not on this host
  std::optional<SharedMemory> memory_;
  std::optional<Board> board_;
  std::optional<Arena> arena_;
  std::shared_ptr<Seen> seen_;
};

}  // namespace falcon
