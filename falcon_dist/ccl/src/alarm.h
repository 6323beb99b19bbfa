// When one rank gives up waiting, every rank writes down where it stands: the one that is waited for too, which
// is in no collective and has nothing to give up.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <functional>
#include <string>

namespace falcon {

// Writes the stacks of all threads of this process to stderr. May wait for the interpreter.
using StackWriter = std::function<void()>;

// Registered once, before the first group; an empty one takes it back before the interpreter ends.
void set_stack_writer(StackWriter writer);

// Writes `reason` and the stacks, once per process; waits for that two seconds at most.
void write_stacks(const std::string& reason);

// Starts looking for the other ranks' alarm in the store of the process's first group, every second.
void watch_for_alarm(c10d::Store& store);
void stop_watching();

// Tells the others, so that they write their stacks; returns when they have had the time to.
void raise_alarm(const std::string& reason);

}  // namespace falcon
