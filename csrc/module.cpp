// The Python module cvkernels._C: its import registers the CPU ops; build_info() says how it and
// the CUDA library beside it were built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "build_info.h"
#include "common/direct_call.h"
#include "common/gil.h"
#include "common/guard.h"
#include "common/instruction_sets.h"
#include "common/kept_calls.h"
#include "common/recording.h"
#include "common/sample.h"

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

// The instruction sets that calls take on this processor, the best one last.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> sets;
  for (int set = 0; set < static_cast<int>(std::size(cvkernels::INSTRUCTION_SETS)); ++set)
    if (cvkernels::takes(static_cast<cvkernels::InstructionSet>(set)))
      sets.push_back(cvkernels::INSTRUCTION_SETS[set]);
  return sets;
}

// Why the operating system refuses the tiles that the processor has; empty where it does not.
std::string amx_refusal() {
  const int error = cvkernels::amx_error();
  return error == 0 || error == ENODEV ? "" : std::strerror(error);
}

// Let calls take no better set than this one.
void limit_instruction_sets(const std::string& name) {
  for (int set = 0; set < static_cast<int>(std::size(cvkernels::INSTRUCTION_SETS)); ++set)
    if (name == cvkernels::INSTRUCTION_SETS[set]) {
      cvkernels::instruction_set_limit = set;
      return;
    }
  throw std::invalid_argument("there is no instruction set " + name);
}

// What the CPU ops did in one call of a function, for later: on the same memory, which is not kept.
class Program {
 public:
  explicit Program(std::vector<cvkernels::Work> works) : works_(std::move(works)) {}

  // Signals are asked for now and then: a large batch takes seconds, and Ctrl-C should end it.
  void run() const {
    using Clock = std::chrono::steady_clock;
    for (size_t done = 0; done < works_.size();) {
      cvkernels::without_gil([&] {
        const auto pause = Clock::now() + BETWEEN_SIGNALS;
        do {
          works_[done++]();
        } while (done < works_.size() && Clock::now() < pause);
      });
      if (done < works_.size() && PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
  }

  size_t size() const { return works_.size(); }

 private:
  // Another thread may keep the GIL for 5 ms.
  static constexpr std::chrono::milliseconds BETWEEN_SIGNALS{100};

  std::vector<cvkernels::Work> works_;
};

std::vector<cvkernels::Work> works_of(const py::function& function) {
  using cvkernels::recording;
  if (recording != nullptr) throw std::runtime_error("record: this thread is recording already");
  std::vector<cvkernels::Work> works;
  struct Scope {
    explicit Scope(std::vector<cvkernels::Work>* to) { recording = to; }
    ~Scope() { recording = nullptr; }
  } scope(&works);
  function();
  return works;
}

py::object direct(PyTypeObject* type, const py::function& function) {
  std::vector<cvkernels::Work> works = works_of(function);
  if (works.size() != 1)
    throw std::runtime_error("direct: function must call one CPU op that has work to do, got " +
                             std::to_string(works.size()));
  PyObject* made = cvkernels::new_direct_call(type, std::move(works.front()));
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

using Entry = std::tuple<uint64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>, bool>;

cvkernels::Sample sample_of(const std::vector<Entry>& entries) {
  std::vector<cvkernels::Sampled> tensors;
  for (const auto& [data, itemsize, sizes, strides, whole] : entries)
    tensors.push_back({data, itemsize, sizes, strides, whole});
  return cvkernels::Sample(tensors);
}

uint64_t digest_of(const cvkernels::Sample& sample) {
  return sample.digest([](int64_t count, const auto& part) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) part(i);
    });
  });
}

}  // namespace

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled part of cvkernels. Importing it registers the CPU ops.";
  py::class_<Program>(module, "Program", "Recorded work of the CPU ops; see record().")
      .def("__call__", &Program::run, "Do the work.")
      .def("__len__", &Program::size, "How many calls of ops are in it.");
  PyTypeObject* direct_call = cvkernels::make_direct_call_type();
  if (direct_call == nullptr) throw py::error_already_set();
  module.add_object("DirectCall", reinterpret_cast<PyObject*>(direct_call));
  PyTypeObject* kept_calls = cvkernels::make_kept_calls_type();
  if (kept_calls == nullptr) throw py::error_already_set();
  module.add_object("KeptCalls", reinterpret_cast<PyObject*>(kept_calls));
  module.def(
      "direct",
      [direct_call](const py::function& function) { return direct(direct_call, function); },
      py::arg("function"),
      "Call function(), in which one CPU op checks its arguments and does nothing, and return its "
      "work as a DirectCall: called with the addresses of the op's tensors, in the order of its "
      "schema, 0 for one that is absent, and last of a result that it returns, it does the work on "
      "any memory of the same sizes and strides.");
  py::class_<cvkernels::Sample>(module, "Sample", "A sample of the contents of tensors.")
      .def(py::init(&sample_of), py::arg("entries"),
           "Each entry is (address, bytes of an element, sizes, strides, whole); the memory is not "
           "kept.")
      .def("digest", &digest_of,
           "64 bits of all elements of a whole tensor, and of max(K, C) of a weight [K, C, ...] "
           "that touch every filter and every input channel.");
  module.def(
      "record", [](const py::function& function) { return Program(works_of(function)); },
      py::arg("function"),
      "Call function(), in which the CPU ops check their arguments and do nothing, and return "
      "their work as a Program. It reads and writes the memory of the same tensors, which have "
      "to outlive it.");
  py::class_<cvkernels::Guard>(
      module, "Guard",
      "Whether modules, their code and their tensors are still what a plan was made from.")
      .def(py::init<py::sequence, py::sequence, py::sequence>(), py::arg("modules"),
           py::arg("code"), py::arg("tensors"))
      .def("holds", &cvkernels::Guard::holds);
  module.def("instruction_sets", &instruction_sets,
             "Those that calls of the CPU ops take here, the best one last.");
  module.def("amx_refusal", &amx_refusal,
             "Why the operating system refuses AMX to this process, empty where it does not.");
  module.def("limit_instruction_sets", &limit_instruction_sets,
             "Let calls of the CPU ops take no better set than the one of this name.");
  module.def("build_info", &build_info,
             "How the compiled part was built. cuda_archs and cuda_toolkit are empty without CUDA, "
             "git_revision is empty for a build outside a git checkout.");
}
