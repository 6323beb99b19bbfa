// The c10d backend "ccl": collectives of CPU tensors over oneCCL.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <oneapi/ccl.hpp>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "executor.h"

namespace falcon {

using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

// Makes the process group that carries what oneCCL has not: send, recv, bitwise and sparse reductions.
using InnerFactory = std::function<c10::intrusive_ptr<c10d::Backend>()>;

class CclBackend final : public c10d::Backend {
 public:
  struct Settings {
    std::string group;                  // name in errors
    std::vector<int64_t> global_ranks;  // of the members, in group order
    milliseconds timeout;
    InnerFactory inner;
  };

  // A collective call of all members. Throws c10::DistBackendError naming the step and the time when a
  // member does not come.
  CclBackend(c10::intrusive_ptr<c10d::Store> store, int rank, int size, Settings settings);
  ~CclBackend() override;

  const std::string getBackendName() const override { return "ccl"; }
  // Not virtual in torch 2.8, virtual later: no "override".
  c10::intrusive_ptr<Options> getBackendOptions() { return options_; }
  void setTimeout(milliseconds timeout) { options_->timeout = timeout; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return executor_->sequence(); }
  c10d::ErrorType getError() override;
  void shutdown() override;
  void abort() override;

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;

  WorkPtr allgather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(
      at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr reduce_scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override;

  WorkPtr gather(
      std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override;
  WorkPtr scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override;
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_splits,
      std::vector<int64_t>& input_splits,
      const c10d::AllToAllOptions& options) override;

  WorkPtr send(Tensors& tensors, int to, int tag) override;
  WorkPtr recv(Tensors& tensors, int from, int tag) override;
  WorkPtr recvAnysource(Tensors& tensors, int tag) override;

 private:
  friend class TaskBuilder;

  struct Part;

  void connect();
  WorkPtr allreduce_all(Tensors& tensors, const c10d::AllreduceOptions& options, c10d::OpType type);
  WorkPtr allreduce_here(class TaskBuilder& builder, std::vector<Part> parts, bool asynchronous);
  WorkPtr gather_all(
      class TaskBuilder& builder, Tensors& inputs, Tensors& outputs, bool asynchronous);
  WorkPtr reduce_scatter_all(
      class TaskBuilder& builder,
      Tensors& inputs,
      Tensors& outputs,
      const c10d::ReduceOp& op,
      bool asynchronous);
  // Sends pieces of `from` to every rank and receives pieces of `to`; counts are bytes per rank.
  WorkPtr exchange(
      class TaskBuilder& builder,
      const at::Tensor& from,
      std::vector<size_t> send,
      const at::Tensor& to,
      std::vector<size_t> receive,
      bool asynchronous);
  // The same after all ranks have compared their counts.
  WorkPtr exchange_compared(
      class TaskBuilder& builder,
      const at::Tensor& from,
      std::vector<size_t> send,
      const at::Tensor& to,
      std::vector<size_t> receive,
      bool asynchronous);
  c10d::Backend& inner();

  const std::vector<int64_t> global_ranks_;
  const InnerFactory inner_factory_;
  const c10::intrusive_ptr<Options> options_;
  std::shared_ptr<Peers> peers_;
  // Kept for ever where a peer would be waited for. Operations hold plain pointers to both.
  std::shared_ptr<Executor> executor_;
  std::shared_ptr<ccl::communicator> communicator_;  // none in a group of one
  bool down_ = false;
  std::mutex inner_lock_;
  c10::intrusive_ptr<c10d::Backend> inner_;
};

// Closes every live group of this process: its queue is run to the end (not longer than `patience`) and its
// communicator given back while the interpreter and libccl are still whole.
void close_all_groups(milliseconds patience);

}  // namespace falcon
