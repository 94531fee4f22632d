// Work that other Python threads run beside.
#pragma once

#include <Python.h>

#include <exception>

#if defined(__GLIBCXX__) && defined(__linux__)
#include <cxxabi.h>
#include <unistd.h>
#endif

namespace cvkernels {

// Takes the GIL back. Up to Python 3.13 a daemon thread that asks for it while the interpreter
// exits is ended by unwinding its stack: through destructors, which end the process, and through
// others, which use Python. As from 3.14 on, it waits here for the end of the process instead.
inline void take_gil(PyThreadState* state) {
#if defined(__GLIBCXX__) && defined(__linux__)
  try {
    PyEval_RestoreThread(state);
  } catch (const abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  PyEval_RestoreThread(state);
#endif
}

// work(), without the GIL. What it throws must be a std::exception.
template <typename Function>
void without_gil(Function&& work) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr raised;
  try {
    work();
  } catch (const std::exception&) {
    raised = std::current_exception();
  }
  take_gil(state);
  if (raised) std::rethrow_exception(raised);
}

}  // namespace cvkernels
