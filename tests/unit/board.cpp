// Two threads enter the same operations at the same moments, as two ranks that disagree would.
#include "board.h"

#include <sched.h>

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

using namespace falcon;

constexpr uint64_t kRounds = 20000;

struct alignas(64) Line {
  std::atomic<uint64_t> reached{0};
  bool saw = false;
};

// Beside each other, where there are two cpus: `turn` counts those that are allowed.
void take_cpu(int turn) {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof(allowed), &allowed);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && turn-- == 0) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      sched_setaffinity(0, sizeof(one), &one);
      return;
    }
  }
}

int main() {
  std::vector<char> room(Board::bytes(2) + 64);
  Board board(room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64));
  Line lines[2];
  const auto meet = [&lines](int me, uint64_t place) {
    lines[me].reached = place;
    for (int spins = 0; lines[1 - me].reached < place; ++spins) {
      if (spins > 2000) {
        std::this_thread::yield();
      }
    }
  };
  uint64_t missed = 0;
  const auto rank = [&](int me) {
    take_cpu(1 - me);
    for (uint64_t round = 1; round <= kRounds; ++round) {
      Signature mine;
      mine.sequence = round;
      meet(me, 2 * round);
      board.write(me, mine);
      lines[me].saw = board.read(1 - me, round).has_value();
      meet(me, 2 * round + 1);
      missed += me == 0 && !lines[0].saw && !lines[1].saw;
    }
  };
  std::thread other(rank, 1);
  rank(0);
  other.join();
  std::printf("%lu of %lu calls were missed by both\n", missed, kRounds);
}
