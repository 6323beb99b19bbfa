#include "task.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace falcon {

namespace {

void put(char* field, size_t room, const std::string& text) {
  std::memset(field, 0, room);
  std::memcpy(field, text.data(), std::min(text.size(), room - 1));
}

std::optional<ccl::datatype> datatype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return ccl::datatype::float32;
    case at::kDouble:
      return ccl::datatype::float64;
    case at::kHalf:
      return ccl::datatype::float16;
    case at::kBFloat16:
      return ccl::datatype::bfloat16;
    case at::kChar:
      return ccl::datatype::int8;
    case at::kByte:
    case at::kBool:
      return ccl::datatype::uint8;
    case at::kShort:
      return ccl::datatype::int16;
    case at::kInt:
      return ccl::datatype::int32;
    case at::kLong:
      return ccl::datatype::int64;
    default:
      return std::nullopt;
  }
}

std::optional<ccl::reduction> operation_of(const c10d::ReduceOp& op, at::ScalarType dtype) {
  const bool truth = dtype == at::kBool;  // bytes of 0 and 1: "or" is max, "and" is min
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return truth ? ccl::reduction::max : ccl::reduction::sum;
    case c10d::ReduceOp::AVG:
      return at::isFloatingType(dtype) ? std::optional(ccl::reduction::sum) : std::nullopt;
    case c10d::ReduceOp::PRODUCT:
      return truth ? ccl::reduction::min : ccl::reduction::prod;
    case c10d::ReduceOp::MIN:
      return ccl::reduction::min;
    case c10d::ReduceOp::MAX:
      return ccl::reduction::max;
    case c10d::ReduceOp::BAND:
      return truth ? std::optional(ccl::reduction::min) : std::nullopt;
    case c10d::ReduceOp::BOR:
      return truth ? std::optional(ccl::reduction::max) : std::nullopt;
    default:
      return std::nullopt;
  }
}

Fold fold_of(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::AVG:
      return Fold::kAverage;
    case c10d::ReduceOp::PRODUCT:
      return Fold::kProduct;
    case c10d::ReduceOp::MIN:
      return Fold::kMin;
    case c10d::ReduceOp::MAX:
      return Fold::kMax;
    default:
      return Fold::kSum;
  }
}

}  // namespace

const char* reduction_name(const c10d::ReduceOp& op) {
  static constexpr const char* kNames[] = {
      "sum", "avg", "product", "min", "max", "band", "bor", "bxor", "premul_sum"};
  return op.op_ < std::size(kNames) ? kNames[op.op_] : "unknown";
}

Reduction reduction_of(const c10d::ReduceOp& op, at::ScalarType dtype, const char* name) {
  const auto type = datatype_of(dtype);
  const auto operation = operation_of(op, dtype);
  TORCH_CHECK_TYPE(
      type && operation,
      "ccl ", name, ": no ", reduction_name(op), " of ", dtype,
      " tensors; convert the tensor or use the gloo backend");
  const auto element = dtype == at::kFloat ? std::optional(Element::kFloat32)
      : dtype == at::kBFloat16             ? std::optional(Element::kBfloat16)
                                           : std::nullopt;
  return {*operation, *type, op.op_ == c10d::ReduceOp::AVG, element, fold_of(op)};
}

void check_tensor(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(
      tensor.device().is_cpu() && tensor.layout() == at::kStrided,
      "ccl ", name, ": a dense CPU tensor is needed, not ", tensor.layout(), " on ", tensor.device());
}

at::Tensor& single(Tensors& tensors, const char* name) {
  TORCH_CHECK_VALUE(
      tensors.size() == 1, "ccl ", name, ": one tensor per rank is needed, not ", tensors.size());
  check_tensor(tensors[0], name);
  return tensors[0];
}

std::vector<size_t> bytes_of(const Tensors& tensors) {
  std::vector<size_t> bytes;
  for (const at::Tensor& tensor : tensors) {
    bytes.push_back(tensor.nbytes());
  }
  return bytes;
}

std::string digest(const std::vector<size_t>& sizes) {
  uint64_t value = 14695981039346656037ull;  // FNV-1a
  for (const size_t size : sizes) {
    value = (value ^ size) * 1099511628211ull;
  }
  char text[8];
  std::snprintf(text, sizeof(text), "%05x", static_cast<unsigned>(value >> 44));
  return text;
}

TaskBuilder::TaskBuilder(CclBackend& backend, c10d::OpType type, const char* name, milliseconds timeout)
    : backend_(backend) {
  task_.type = type;
  task_.name = name;
  task_.timeout = timeout.count() > 0 ? timeout : backend.options_->timeout;
  put(task_.signature.operation, sizeof(task_.signature.operation), name);
}

at::Tensor TaskBuilder::readable(const at::Tensor& tensor) {
  check_tensor(tensor, task_.name);
  at::Tensor memory = tensor.contiguous();
  if (memory.is_conj() || memory.is_neg()) {
    memory = memory.resolve_conj().resolve_neg();
  }
  task_.kept.push_back(memory);
  return memory;
}

at::Tensor TaskBuilder::writable(const at::Tensor& tensor) {
  check_tensor(tensor, task_.name);
  if (tensor.is_contiguous()) {
    task_.kept.push_back(tensor);
    return tensor;
  }
  const at::Tensor memory = at::empty(tensor.sizes(), tensor.options());
  finish_.emplace_back([tensor, memory] { tensor.copy_(memory); });
  return memory;
}

at::Tensor TaskBuilder::in_place(const at::Tensor& tensor) {
  const at::Tensor memory = writable(tensor);
  if (!memory.is_same(tensor)) {
    memory.copy_(tensor);
  }
  return memory;
}

at::Tensor TaskBuilder::flat_output(const Tensors& tensors) {
  int64_t total = 0;
  for (const at::Tensor& tensor : tensors) {
    check_tensor(tensor, task_.name);
    total += tensor.numel();
  }
  const at::Tensor memory = at::empty({total}, tensors.at(0).options());
  finish_.emplace_back([tensors, memory] {
    int64_t offset = 0;
    for (const at::Tensor& tensor : tensors) {
      tensor.copy_(memory.narrow(0, offset, tensor.numel()).view(tensor.sizes()));
      offset += tensor.numel();
    }
  });
  return memory;
}

at::Tensor TaskBuilder::flat_input(const Tensors& tensors) {
  Tensors rows;
  for (const at::Tensor& tensor : tensors) {
    check_tensor(tensor, task_.name);
    rows.push_back(tensor.reshape({-1}));
  }
  task_.kept.push_back(at::cat(rows));
  return task_.kept.back();
}

void TaskBuilder::describe(int64_t count, at::ScalarType dtype, std::string detail) {
  describe_bytes(count, std::move(detail));
  put(task_.signature.dtype, sizeof(task_.signature.dtype), c10::toString(dtype));
}

void TaskBuilder::describe_bytes(int64_t count, std::string detail) {
  task_.signature.count = count;
  put(task_.signature.detail, sizeof(task_.signature.detail), detail);
}

void TaskBuilder::average(const at::Tensor& tensor) {
  finish_.emplace_back([tensor, size = backend_.getSize()] { tensor.div_(size); });
}

WorkPtr TaskBuilder::run(std::function<void(Events&)> submit, bool asynchronous) {
  task_.submit = std::move(submit);
  return run_task(asynchronous);
}

WorkPtr TaskBuilder::run_here(std::function<bool()> advance, bool asynchronous) {
  task_.advance = std::move(advance);
  return run_task(asynchronous);
}

WorkPtr TaskBuilder::run_task(bool asynchronous) {
  if (!finish_.empty()) {
    // The copy back comes last, after any average.
    task_.finish = [steps = std::move(finish_)] {
      for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
        (*step)();
      }
    };
  }
  return backend_.executor_->run(std::move(task_), asynchronous);
}

}  // namespace falcon
