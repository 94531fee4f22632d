// The Python module cvkernels._C: its import registers the CPU ops; build_info() says how it and
// the CUDA library beside it were built.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "recording.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

py::dict build_info() {
  py::dict info;
  info["cuda_archs"] = CVK_CUDA_ARCHS;
  info["cuda_toolkit"] = CVK_CUDA_TOOLKIT;
  info["compiler"] = compiler();
  info["torch_target"] = CVK_TORCH_TARGET;
  info["git_revision"] = CVK_GIT_REVISION;
  return info;
}

// What the CPU ops did in one call of a function, for later: on the same memory, which is not kept.
class Program {
 public:
  explicit Program(std::vector<cvkernels::Work> works) : works_(std::move(works)) {}
  void run() const {
    const py::gil_scoped_release released;
    for (const cvkernels::Work& work : works_) work();
  }
  size_t size() const { return works_.size(); }

 private:
  std::vector<cvkernels::Work> works_;
};

Program record(const py::function& function) {
  using cvkernels::recording;
  if (recording != nullptr) throw std::runtime_error("record: this thread is recording already");
  std::vector<cvkernels::Work> works;
  struct Scope {
    explicit Scope(std::vector<cvkernels::Work>* to) { recording = to; }
    ~Scope() { recording = nullptr; }
  } scope(&works);
  function();
  return Program(std::move(works));
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled part of cvkernels. Importing it registers the CPU ops.";
  py::class_<Program>(module, "Program", "Recorded work of the CPU ops; see record().")
      .def("__call__", &Program::run, "Do the work.")
      .def("__len__", &Program::size, "How many calls of ops are in it.");
  module.def(
      "record", &record, py::arg("function"),
      "Call function(), in which the CPU ops check their arguments and do nothing, and return "
      "their work as a Program. It reads and writes the memory of the same tensors, which have "
      "to outlive it.");
  module.def("build_info", &build_info,
             "How the compiled part was built. cuda_archs and cuda_toolkit are empty without CUDA, "
             "git_revision is empty for a build outside a git checkout.");
}
