// The last kinds of calls of an op, each with its work, found and run in one call from Python.
#pragma once

#include <Python.h>

namespace cvkernels {

// The type of KeptCalls, made once for the module that is being imported; null after an error.
PyTypeObject* make_kept_calls_type();

}  // namespace cvkernels
