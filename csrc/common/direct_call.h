// One op's work as a Python object that is called with addresses.
#pragma once

#include <Python.h>

#include "recording.h"

namespace cvkernels {

// The type of DirectCall, made once for the module that is being imported; null after an error.
PyTypeObject* make_direct_call_type();

// A DirectCall; null after an error.
PyObject* new_direct_call(PyTypeObject* type, Work&& work);

// What it does, which lives as long as it.
const Work& work_of(PyObject* direct_call);

}  // namespace cvkernels
