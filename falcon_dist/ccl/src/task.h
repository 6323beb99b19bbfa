// Turns the tensors of a call into a Task: checks, staging of strided memory, and the copy back.
#pragma once

#include "backend.h"

namespace falcon {

// How oneCCL sees the elements of a reduction, and how the arena of one host does.
struct Reduction {
  ccl::reduction operation;
  ccl::datatype dtype;
  bool average;                    // divided by the group's size at the end: oneCCL has no average on CPUs
  std::optional<Element> element;  // none where the arena has no kernel
  Fold fold;
};

// Throws c10::TypeError naming dtype and operation where there is no such reduction.
Reduction reduction_of(const c10d::ReduceOp& op, at::ScalarType dtype, const char* name);
const char* reduction_name(const c10d::ReduceOp& op);

// Refuses what no collective can take: other devices, sparse layouts. Throws c10::TypeError.
void check_tensor(const at::Tensor& tensor, const char* name);
// Refuses a list that does not have exactly one tensor. Throws c10::ValueError.
at::Tensor& single(Tensors& tensors, const char* name);

std::vector<size_t> bytes_of(const Tensors& tensors);
// Five digits that tell lists of sizes apart, for signatures.
std::string digest(const std::vector<size_t>& sizes);

class TaskBuilder {
 public:
  TaskBuilder(CclBackend& backend, c10d::OpType type, const char* name, milliseconds timeout);

  // A contiguous tensor with this tensor's elements, for reading.
  at::Tensor readable(const at::Tensor& tensor);
  // A contiguous tensor that stands for this one, for writing; copied back at the end where it is not it.
  at::Tensor writable(const at::Tensor& tensor);
  // The same, holding the elements from the start.
  at::Tensor in_place(const at::Tensor& tensor);
  // One flat tensor that is handed out to these at the end, in order.
  at::Tensor flat_output(const Tensors& tensors);
  // One flat tensor with the elements of these, in order.
  at::Tensor flat_input(const Tensors& tensors);

  void describe(int64_t count, at::ScalarType dtype, std::string detail = "");
  void describe_bytes(int64_t count, std::string detail = "");
  void outputs(Tensors tensors) { task_.outputs = std::move(tensors); }
  void average(const at::Tensor& tensor);

  // What is submitted when the events of `submit` are over.
  void follow(std::function<std::string(Events&)> step) { task_.follow = std::move(step); }
  // `submit` hands the operation to oneCCL; `advance` is one that is carried out here.
  WorkPtr run(std::function<void(Events&)> submit, bool asynchronous);
  WorkPtr run_here(std::function<bool()> advance, bool asynchronous);

 private:
  WorkPtr run_task(bool asynchronous);

  CclBackend& backend_;
  Task task_;
  std::vector<std::function<void()>> finish_;
};

}  // namespace falcon
