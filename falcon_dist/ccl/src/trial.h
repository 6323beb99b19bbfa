// One all_reduce of all ranks, for a program that only wants to know whether it works and how fast.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

namespace falcon {

// Bytes of the tensor on one rank per second, the best of a few tries; a collective call of all ranks. Throws what a
// group throws, and c10::Error where the sum is wrong. The group is never closed: the process is to leave by _exit.
double all_reduce_rate(
    c10::intrusive_ptr<c10d::Store> store, int rank, int size, std::chrono::milliseconds timeout);

}  // namespace falcon
