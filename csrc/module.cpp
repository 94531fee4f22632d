// The Python module cvkernels._C: its import registers the CPU ops; build_info() says how it and
// the CUDA library beside it were built.
#include <pybind11/pybind11.h>

#include <string>

#include "build_info.h"

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

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled part of cvkernels. Importing it registers the CPU ops.";
  module.def("build_info", &build_info,
             "How the compiled part was built. cuda_archs and cuda_toolkit are empty without CUDA, "
             "git_revision is empty for a build outside a git checkout.");
}
