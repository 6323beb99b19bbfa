// The collectives that move pieces between ranks: gathers, scatters and all-to-alls.
#include <algorithm>
#include <numeric>

#include "backend.h"
#include "task.h"

namespace falcon {

namespace {

void check_pair(const at::Tensor& large, const at::Tensor& small, int size, const char* name) {
  TORCH_CHECK_TYPE(
      large.scalar_type() == small.scalar_type(),
      "ccl ", name, ": input and output differ in dtype: ", small.scalar_type(), " and ", large.scalar_type());
  TORCH_CHECK_VALUE(
      large.numel() == small.numel() * size,
      "ccl ", name, ": the larger tensor needs ", size, " times the ", small.numel(),
      " elements of the smaller one, not ", large.numel());
}

void check_list(const Tensors& tensors, int size, const char* name) {
  TORCH_CHECK_VALUE(
      static_cast<int>(tensors.size()) == size,
      "ccl ", name, ": a list of ", size, " tensors is needed, one per rank, not ", tensors.size());
}

// Signatures compare the ranks' own tensors, so the root's list has to be like its own.
void check_even(const Tensors& list, const at::Tensor& own, const char* name) {
  for (size_t rank = 0; rank < list.size(); ++rank) {
    TORCH_CHECK_VALUE(
        list[rank].nbytes() == own.nbytes(),
        "ccl ", name, ": tensor ", rank, " of the list has ", list[rank].nbytes(), " bytes, the root's own tensor ",
        own.nbytes(), "; all of them need one size");
  }
}

// Bytes between this rank and every other: its own view, and per rank what it told and heard (sent, expected).
struct Counts {
  std::vector<size_t> send;
  std::vector<size_t> receive;
  std::vector<int64_t> told;
  std::vector<int64_t> heard;

  // Which rank sees it otherwise; empty where none does.
  std::string fault(const std::vector<int64_t>& names) const {
    for (size_t rank = 0; rank < names.size(); ++rank) {
      const auto sent = static_cast<size_t>(heard[2 * rank]);
      const auto expected = static_cast<size_t>(heard[2 * rank + 1]);
      if (sent != receive[rank]) {
        return c10::str("rank ", names[rank], " sends ", sent, " bytes to this rank, which expects ", receive[rank]);
      }
      if (expected != send[rank]) {
        return c10::str("rank ", names[rank], " expects ", expected, " bytes of this rank, which sends ", send[rank]);
      }
    }
    return "";
  }
};

// Splits of all_to_all_single in bytes; even when none are given.
std::vector<size_t> bytes_of_splits(
    const std::vector<int64_t>& splits,
    const at::Tensor& tensor,
    int size,
    const char* which) {
  if (splits.empty()) {
    TORCH_CHECK_VALUE(
        tensor.dim() > 0 && tensor.size(0) % size == 0,
        "ccl all_to_all_single: the first dimension of the ", which, " (shape ", tensor.sizes(),
        ") cannot be divided by ", size, " ranks; give split sizes");
    return std::vector<size_t>(size, tensor.nbytes() / size);
  }
  const int64_t total = std::accumulate(splits.begin(), splits.end(), int64_t{0});
  TORCH_CHECK_VALUE(
      static_cast<int>(splits.size()) == size && tensor.dim() > 0 && total == tensor.size(0),
      "ccl all_to_all_single: ", splits.size(), " ", which, " splits with sum ", total, " do not fit shape ",
      tensor.sizes(), " and ", size, " ranks");
  std::vector<size_t> bytes;
  for (const int64_t rows : splits) {
    bytes.push_back(total == 0 ? 0 : tensor.nbytes() / total * rows);
  }
  return bytes;
}

}  // namespace

// Inputs of this rank, outputs of size() times as many elements; one oneCCL call per pair.
WorkPtr CclBackend::gather_all(TaskBuilder& builder, Tensors& inputs, Tensors& outputs, bool asynchronous) {
  TORCH_CHECK_VALUE(inputs.size() == outputs.size(), "ccl all_gather: as many inputs as outputs are needed");
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;
  int64_t total = 0;
  for (size_t index = 0; index < inputs.size(); ++index) {
    check_pair(outputs[index], inputs[index], size_, "all_gather_into_tensor");
    const at::Tensor from = builder.readable(inputs[index]);
    const at::Tensor to = builder.writable(outputs[index]);
    total += static_cast<int64_t>(from.nbytes());
    if (from.nbytes() > 0) {
      pairs.emplace_back(from, to);
    }
  }
  builder.describe_bytes(total, inputs.size() > 1 ? "sizes " + digest(bytes_of(inputs)) : "");
  builder.outputs(outputs);
  return builder.run(
      [communicator = communicator_.get(), size = size_, pairs = std::move(pairs)](Events& events) {
        for (const auto& [from, to] : pairs) {
          if (communicator) {
            const std::vector<size_t> counts(size, from.nbytes());
            events.push_back(ccl::allgatherv(
                from.data_ptr(), from.nbytes(), to.data_ptr(), counts, ccl::datatype::uint8, *communicator));
          } else {
            to.view(-1).copy_(from.view(-1));
          }
        }
      },
      asynchronous);
}

WorkPtr CclBackend::_allgather_base(
    at::Tensor& output,
    at::Tensor& input,
    const c10d::AllgatherOptions& options) {
  TaskBuilder builder(*this, c10d::OpType::_ALLGATHER_BASE, "all_gather_into_tensor", options.timeout);
  Tensors inputs{input};
  Tensors outputs{output};
  return gather_all(builder, inputs, outputs, options.asyncOp);
}

WorkPtr CclBackend::allgather_into_tensor_coalesced(
    Tensors& outputs,
    Tensors& inputs,
    const c10d::AllgatherOptions& options) {
  TaskBuilder builder(*this, c10d::OpType::COALESCED, "all_gather_into_tensor", options.timeout);
  return gather_all(builder, inputs, outputs, options.asyncOp);
}

// Output tensors may differ in size between ranks.
WorkPtr CclBackend::allgather(
    std::vector<Tensors>& outputs,
    Tensors& inputs,
    const c10d::AllgatherOptions& options) {
  single(inputs, "all_gather");
  TORCH_CHECK_VALUE(outputs.size() == 1, "ccl all_gather: one output list per rank is needed");
  check_list(outputs[0], size_, "all_gather");
  TORCH_CHECK_VALUE(
      outputs[0][rank_].nbytes() == inputs[0].nbytes(),
      "ccl all_gather: output ", rank_, " has ", outputs[0][rank_].nbytes(), " bytes, this rank's input ",
      inputs[0].nbytes());
  TaskBuilder builder(*this, c10d::OpType::ALLGATHER, "all_gather", options.timeout);
  const std::vector<size_t> counts = bytes_of(outputs[0]);
  const at::Tensor from = builder.readable(inputs[0]);
  const at::Tensor to = builder.flat_output(outputs[0]);
  const bool even = std::all_of(counts.begin(), counts.end(), [&](size_t count) { return count == counts[0]; });
  builder.describe_bytes(static_cast<int64_t>(to.nbytes()), even ? "" : "sizes " + digest(counts));
  builder.outputs(outputs[0]);
  return builder.run(
      [communicator = communicator_.get(), from, to, counts](Events& events) {
        if (!communicator) {
          to.copy_(from.view(-1));
        } else if (to.nbytes() > 0) {
          events.push_back(ccl::allgatherv(
              from.data_ptr(), from.nbytes(), to.data_ptr(), counts, ccl::datatype::uint8, *communicator));
        }
      },
      options.asyncOp);
}

WorkPtr CclBackend::allgather_coalesced(
    std::vector<Tensors>& outputs,
    Tensors& inputs,
    const c10d::AllgatherOptions& options) {
  TORCH_CHECK_VALUE(
      static_cast<int>(outputs.size()) == size_, "ccl all_gather_coalesced: one output list per rank is needed");
  // outputs[rank][index]; every index is one gather, the last one's work stands for all before it.
  WorkPtr last;
  for (size_t index = 0; index < inputs.size(); ++index) {
    std::vector<Tensors> column(1);
    for (const Tensors& row : outputs) {
      column[0].push_back(row.at(index));
    }
    Tensors input{inputs[index]};
    last = allgather(column, input, options);
  }
  TORCH_CHECK_VALUE(last, "ccl all_gather_coalesced: at least one tensor is needed");
  return last;
}

WorkPtr CclBackend::reduce_scatter_all(
    TaskBuilder& builder,
    Tensors& inputs,
    Tensors& outputs,
    const c10d::ReduceOp& op,
    bool asynchronous) {
  TORCH_CHECK_VALUE(inputs.size() == outputs.size(), "ccl reduce_scatter: as many inputs as outputs are needed");
  struct Part {
    at::Tensor from;
    at::Tensor to;
    Reduction reduction;
  };
  std::vector<Part> parts;
  int64_t total = 0;
  for (size_t index = 0; index < inputs.size(); ++index) {
    check_pair(inputs[index], outputs[index], size_, "reduce_scatter_tensor");
    Part part{builder.readable(inputs[index]), builder.writable(outputs[index]),
              reduction_of(op, inputs[index].scalar_type(), "reduce_scatter")};
    total += part.from.numel();
    if (part.reduction.average) {
      builder.average(part.to);
    }
    if (part.from.numel() > 0) {
      parts.push_back(std::move(part));
    }
  }
  if (!inputs.empty()) {
    const std::string sizes = inputs.size() > 1 ? digest(bytes_of(inputs)) + " " : "";
    builder.describe(total, inputs[0].scalar_type(), sizes + reduction_name(op));
  }
  builder.outputs(outputs);
  return builder.run(
      [communicator = communicator_.get(), parts = std::move(parts)](Events& events) {
        for (const Part& part : parts) {
          if (communicator) {
            events.push_back(ccl::reduce_scatter(
                part.from.data_ptr(), part.to.data_ptr(), part.to.numel(), part.reduction.dtype,
                part.reduction.operation, *communicator));
          } else {
            part.to.view(-1).copy_(part.from.view(-1));
          }
        }
      },
      asynchronous);
}

WorkPtr CclBackend::_reduce_scatter_base(
    at::Tensor& output,
    at::Tensor& input,
    const c10d::ReduceScatterOptions& options) {
  TaskBuilder builder(*this, c10d::OpType::_REDUCE_SCATTER_BASE, "reduce_scatter_tensor", options.timeout);
  Tensors inputs{input};
  Tensors outputs{output};
  return reduce_scatter_all(builder, inputs, outputs, options.reduceOp, options.asyncOp);
}

WorkPtr CclBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs,
    Tensors& inputs,
    const c10d::ReduceScatterOptions& options) {
  TaskBuilder builder(
      *this, c10d::OpType::_REDUCE_SCATTER_BASE, "reduce_scatter_tensor", options.timeout);
  return reduce_scatter_all(builder, inputs, outputs, options.reduceOp, options.asyncOp);
}

WorkPtr CclBackend::reduce_scatter(
    Tensors& outputs,
    std::vector<Tensors>& inputs,
    const c10d::ReduceScatterOptions& options) {
  single(outputs, "reduce_scatter");
  TORCH_CHECK_VALUE(inputs.size() == 1, "ccl reduce_scatter: one input list per rank is needed");
  check_list(inputs[0], size_, "reduce_scatter");
  for (const at::Tensor& tensor : inputs[0]) {
    TORCH_CHECK_VALUE(
        tensor.numel() == outputs[0].numel(),
        "ccl reduce_scatter: inputs of ", outputs[0].numel(), " elements like the output are needed, not ",
        tensor.numel());
  }
  TaskBuilder builder(*this, c10d::OpType::REDUCE_SCATTER, "reduce_scatter", options.timeout);
  Tensors flat{builder.flat_input(inputs[0])};
  return reduce_scatter_all(builder, flat, outputs, options.reduceOp, options.asyncOp);
}

WorkPtr CclBackend::exchange(
    TaskBuilder& builder,
    const at::Tensor& from,
    std::vector<size_t> send,
    const at::Tensor& to,
    std::vector<size_t> receive,
    bool asynchronous) {
  return builder.run(
      [communicator = communicator_.get(), from, to, send = std::move(send), receive = std::move(receive)](
          Events& events) {
        if (communicator) {
          events.push_back(ccl::alltoallv(
              from.data_ptr(), send, to.data_ptr(), receive, ccl::datatype::uint8, *communicator));
        } else {
          to.view(-1).copy_(from.view(-1));
        }
      },
      asynchronous);
}

// oneCCL believes every rank's own counts, so any two ranks tell each other theirs first.
WorkPtr CclBackend::exchange_compared(
    TaskBuilder& builder,
    const at::Tensor& from,
    std::vector<size_t> send,
    const at::Tensor& to,
    std::vector<size_t> receive,
    bool asynchronous) {
  ccl::communicator* const communicator = communicator_.get();
  if (!communicator) {
    return exchange(builder, from, std::move(send), to, std::move(receive), asynchronous);
  }
  const auto counts = std::make_shared<Counts>(Counts{std::move(send), std::move(receive), {}, {}});
  counts->told.resize(2 * size_);
  counts->heard.resize(2 * size_);
  for (int rank = 0; rank < size_; ++rank) {
    counts->told[2 * rank] = static_cast<int64_t>(counts->send[rank]);
    counts->told[2 * rank + 1] = static_cast<int64_t>(counts->receive[rank]);
  }
  builder.follow([counts, from, to, communicator, names = global_ranks_](Events& events) {
    const std::string fault = counts->fault(names);
    if (fault.empty()) {
      events.push_back(ccl::alltoallv(
          from.data_ptr(), counts->send, to.data_ptr(), counts->receive, ccl::datatype::uint8, *communicator));
    }
    return fault;
  });
  return builder.run(
      [counts, communicator](Events& events) {
        events.push_back(
            ccl::alltoall(counts->told.data(), counts->heard.data(), 2, ccl::datatype::int64, *communicator));
      },
      asynchronous);
}

WorkPtr CclBackend::alltoall_base(
    at::Tensor& output,
    at::Tensor& input,
    std::vector<int64_t>& output_splits,
    std::vector<int64_t>& input_splits,
    const c10d::AllToAllOptions& options) {
  TORCH_CHECK_TYPE(
      input.scalar_type() == output.scalar_type(), "ccl all_to_all_single: input and output differ in dtype");
  TaskBuilder builder(*this, c10d::OpType::ALLTOALL_BASE, "all_to_all_single", options.timeout);
  auto send = bytes_of_splits(input_splits, input, size_, "input");
  auto receive = bytes_of_splits(output_splits, output, size_, "output");
  const at::Tensor from = builder.readable(input);
  const at::Tensor to = builder.writable(output);
  builder.outputs({output});
  return exchange_compared(builder, from, std::move(send), to, std::move(receive), options.asyncOp);
}

WorkPtr CclBackend::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  check_list(outputs, size_, "all_to_all");
  check_list(inputs, size_, "all_to_all");
  TaskBuilder builder(*this, c10d::OpType::ALLTOALL, "all_to_all", options.timeout);
  const at::Tensor from = builder.flat_input(inputs);
  const at::Tensor to = builder.flat_output(outputs);
  builder.outputs(outputs);
  return exchange_compared(builder, from, bytes_of(inputs), to, bytes_of(outputs), options.asyncOp);
}

WorkPtr CclBackend::gather(
    std::vector<Tensors>& outputs,
    Tensors& inputs,
    const c10d::GatherOptions& options) {
  const at::Tensor input = single(inputs, "gather");
  TaskBuilder builder(*this, c10d::OpType::GATHER, "gather", options.timeout);
  std::vector<size_t> send(size_, 0);
  send.at(options.rootRank) = input.nbytes();
  std::vector<size_t> receive(size_, 0);
  const at::Tensor from = builder.readable(input);
  at::Tensor to = from.view(-1).narrow(0, 0, 0);
  if (options.rootRank == rank_) {
    TORCH_CHECK_VALUE(outputs.size() == 1, "ccl gather: one output list is needed on the root");
    check_list(outputs[0], size_, "gather");
    check_even(outputs[0], input, "gather");
    receive = bytes_of(outputs[0]);
    to = builder.flat_output(outputs[0]);
    builder.outputs(outputs[0]);
  }
  builder.describe_bytes(static_cast<int64_t>(input.nbytes()), "root " + std::to_string(options.rootRank));
  return exchange(builder, from, std::move(send), to, std::move(receive), options.asyncOp);
}

WorkPtr CclBackend::scatter(
    Tensors& outputs,
    std::vector<Tensors>& inputs,
    const c10d::ScatterOptions& options) {
  const at::Tensor output = single(outputs, "scatter");
  TaskBuilder builder(*this, c10d::OpType::SCATTER, "scatter", options.timeout);
  std::vector<size_t> receive(size_, 0);
  receive.at(options.rootRank) = output.nbytes();
  std::vector<size_t> send(size_, 0);
  const at::Tensor to = builder.writable(output);
  at::Tensor from = to.view(-1).narrow(0, 0, 0);
  if (options.rootRank == rank_) {
    TORCH_CHECK_VALUE(inputs.size() == 1, "ccl scatter: one input list is needed on the root");
    check_list(inputs[0], size_, "scatter");
    check_even(inputs[0], output, "scatter");
    send = bytes_of(inputs[0]);
    from = builder.flat_input(inputs[0]);
  }
  builder.outputs(outputs);
  builder.describe_bytes(static_cast<int64_t>(output.nbytes()), "root " + std::to_string(options.rootRank));
  return exchange(builder, from, std::move(send), to, std::move(receive), options.asyncOp);
}

}  // namespace falcon
