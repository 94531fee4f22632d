// A type of CPython's own and not pybind11's: a call costs as little as one of a built-in function.
#include "direct_call.h"

#include <structmember.h>

#include <cstddef>
#include <exception>
#include <utility>

#include "gil.h"

namespace cvkernels {
namespace {

// More than any op has.
constexpr Py_ssize_t MOST = 16;

struct DirectCall {
  PyObject_HEAD vectorcallfunc call;
  Py_ssize_t count;
  Work* work;
};

DirectCall& of(PyObject* self) { return *reinterpret_cast<DirectCall*>(self); }

PyObject* call(PyObject* self, PyObject* const* arguments, size_t flags, PyObject* keywords) {
  const DirectCall& direct = of(self);
  const Py_ssize_t given = PyVectorcall_NARGS(flags);
  if (given != direct.count || (keywords != nullptr && PyTuple_GET_SIZE(keywords) != 0))
    return PyErr_Format(PyExc_TypeError, "DirectCall takes %zd addresses, got %zd", direct.count,
                        given);
  void* addresses[MOST];
  for (Py_ssize_t i = 0; i < given; ++i) {
    addresses[i] = PyLong_AsVoidPtr(arguments[i]);
    if (addresses[i] == nullptr && PyErr_Occurred()) return nullptr;
  }
  try {
    without_gil([&] { direct.work->run(addresses); });
  } catch (const std::exception& raised) {
    PyErr_SetString(PyExc_RuntimeError, raised.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* addresses(PyObject* self, void*) {
  const auto& values = of(self).work->addresses;
  PyObject* result = PyTuple_New(static_cast<Py_ssize_t>(values.size()));
  for (size_t i = 0; result != nullptr && i < values.size(); ++i) {
    PyObject* value = PyLong_FromVoidPtr(values[i]);
    if (value == nullptr) {
      Py_DECREF(result);
      return nullptr;
    }
    PyTuple_SET_ITEM(result, static_cast<Py_ssize_t>(i), value);
  }
  return result;
}

void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete of(self).work;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(DirectCall, call), READONLY, nullptr},
    {"count", T_PYSSIZET, offsetof(DirectCall, count), READONLY,
     "How many addresses a call takes."},
    {}};

PyGetSetDef getters[] = {
    {"addresses", addresses, nullptr, "Those of the tensors that the op was called with.", nullptr},
    {}};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("The work of one call of an op, on the memory at the addresses "
                                  "that it is called with; see direct().")},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, members},
    {Py_tp_getset, getters},
    {}};

PyType_Spec spec = {
    "cvkernels._C.DirectCall", sizeof(DirectCall), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};

}  // namespace

PyTypeObject* make_direct_call_type() {
  return reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
}

const Work& work_of(PyObject* direct_call) { return *of(direct_call).work; }

PyObject* new_direct_call(PyTypeObject* type, Work&& work) {
  if (work.addresses.size() > MOST) {
    PyErr_SetString(PyExc_RuntimeError, "direct: the op has too many tensors");
    return nullptr;
  }
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  of(self).call = call;
  of(self).count = static_cast<Py_ssize_t>(work.addresses.size());
  of(self).work = new Work(std::move(work));
  return self;
}

}  // namespace cvkernels
