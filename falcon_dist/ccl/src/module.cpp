// What Python sees: create() and close_all().
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "alarm.h"
#include "backend.h"

namespace py = pybind11;

namespace {

// A Python callable that C++ threads may hold, call and let go.
falcon::InnerFactory keep(py::function make) {
  std::shared_ptr<py::function> kept(new py::function(std::move(make)), [](py::function* function) {
    py::gil_scoped_acquire gil;
    delete function;
  });
  return [kept] {
    py::gil_scoped_acquire gil;
    return (*kept)().cast<c10::intrusive_ptr<c10d::Backend>>();
  };
}

c10::intrusive_ptr<c10d::Backend> create(
    const c10::intrusive_ptr<c10d::Store>& store,
    int rank,
    int size,
    double timeout_s,
    std::string group,
    std::vector<int64_t> global_ranks,
    py::function make_inner) {
  falcon::CclBackend::Settings settings{
      std::move(group),
      std::move(global_ranks),
      std::chrono::milliseconds(static_cast<int64_t>(timeout_s * 1000)),
      keep(std::move(make_inner))};
  py::gil_scoped_release no_gil;
  return c10::make_intrusive<falcon::CclBackend>(store, rank, size, std::move(settings));
}

void write_python_stacks() {
  constexpr int kStderr = 2;
  py::gil_scoped_acquire gil;
  py::module_::import("faulthandler").attr("dump_traceback")(py::arg("file") = kStderr, py::arg("all_threads") = true);
}

}  // namespace

PYBIND11_MODULE(_falcon_ccl, module) {
  // The types that are passed here are registered by torch's own module.
  py::module_::import("torch._C._distributed_c10d");
  falcon::set_stack_writer(write_python_stacks);
  module.def(
      "create",
      &create,
      py::kw_only(),
      py::arg("store"),
      py::arg("rank"),
      py::arg("size"),
      py::arg("timeout_s"),
      py::arg("group"),
      py::arg("global_ranks"),
      py::arg("make_inner"));
  module.def(
      "close_all",
      [](double patience_s) {
        falcon::set_stack_writer({});
        falcon::close_all_groups(std::chrono::milliseconds(static_cast<int64_t>(patience_s * 1000)));
      },
      py::call_guard<py::gil_scoped_release>());
}
