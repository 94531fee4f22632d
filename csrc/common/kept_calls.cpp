// A call of one pixel is all host time: PyTorch's own takes one microsecond, and each attribute of
// a tensor that Python asks for a twentieth of that. So tensors are read through PyTorch's C
// interface, which has a door from Python since torch 2.14; before, no call is kept here.
#include "kept_calls.h"

#include <structmember.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "direct_call.h"
#include "gil.h"

extern "C" {
// Of torch/csrc/stable/c/shim.h in torch 2.14; null before.
__attribute__((weak)) AOTITorchError torch_has_storage(AtenTensorHandle, bool*);
__attribute__((weak)) AOTITorchError torch_tensor_from_pyobject(void*, AtenTensorHandle*);
__attribute__((weak)) AOTITorchError torch_tensor_to_pyobject(AtenTensorHandle, void*, void**);
}

namespace cvkernels {
namespace {

// More than any op has, of tensors, options and results together.
constexpr Py_ssize_t MOST = 16;
// Kinds of calls: a network's pools and concatenations differ in a few dozen shapes.
constexpr size_t CAPACITY = 64;
constexpr int64_t DIMS = 4;
// Elements up to which work is done before another thread could take the GIL.
constexpr int64_t BRIEF = 4096;

struct Failed {};  // an error of PyTorch's: its message is gone, the call runs the ordinary way

void check(AOTITorchError error) {
  if (error != 0) throw Failed();
}

struct Delete {
  void operator()(AtenTensorOpaque* tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using Handle = std::unique_ptr<AtenTensorOpaque, Delete>;

Handle handle_of(PyObject* tensor) {
  AtenTensorHandle handle = nullptr;
  check(torch_tensor_from_pyobject(tensor, &handle));
  return Handle(handle);
}

// All that a plan knows of a tensor on the CPU.
struct Kind {
  int64_t dim = -1;  // no tensor
  int32_t dtype = 0;
  std::array<int64_t, DIMS> sizes{}, strides{};

  bool operator==(const Kind&) const = default;

  // How many elements lie from the first to the last.
  int64_t extent() const {
    int64_t extent = 1;
    for (int64_t d = 0; d < dim; ++d) extent += (sizes[d] - 1) * strides[d];
    return extent;
  }
};

// Fails for what is not a dense tensor of few dimensions on the CPU, or wraps one for a transform.
Kind kind_of(const Handle& tensor) {
  int32_t layout = 0, device = 0;
  bool stored = false;
  Kind kind;
  check(torch_has_storage(tensor.get(), &stored));
  check(aoti_torch_get_layout(tensor.get(), &layout));
  check(aoti_torch_get_device_type(tensor.get(), &device));
  check(aoti_torch_get_dim(tensor.get(), &kind.dim));
  if (!stored || layout != 0 || device != 0 || kind.dim > DIMS) throw Failed();
  int64_t *sizes = nullptr, *strides = nullptr;
  check(aoti_torch_get_dtype(tensor.get(), &kind.dtype));
  check(aoti_torch_get_sizes(tensor.get(), &sizes));
  check(aoti_torch_get_strides(tensor.get(), &strides));
  std::copy_n(sizes, kind.dim, kind.sizes.begin());
  std::copy_n(strides, kind.dim, kind.strides.begin());
  return kind;
}

void* address_of(const Handle& tensor) {
  void* address = nullptr;
  check(aoti_torch_get_data_ptr(tensor.get(), &address));
  return address;
}

int64_t offset_of(const Handle& tensor) {
  int64_t offset = 0;
  check(aoti_torch_get_storage_offset(tensor.get(), &offset));
  return offset;
}

// One of a call's results: the tensor `of` these, or a view of it.
struct Result {
  size_t of;  // the arguments, and behind them what is made for the call
  bool whole;
  Kind kind;
  int64_t offset;
};

// What runs calls with tensors like some, whatever their options.
struct Recipe {
  std::vector<Kind> tensors, made;
  std::vector<int64_t> itemsizes;   // of the tensors
  PyObject* direct_call = nullptr;  // held
  std::vector<int> sources;         // which tensor each address of its work is; -1 for none
  std::vector<Result> results;
  bool writes = false;  // whether a result is an argument
  bool brief = true;    // whether the work is a matter of a microsecond

  ~Recipe() { Py_XDECREF(direct_call); }
};

struct Entry {
  std::shared_ptr<const Recipe> recipe;
  PyObject* options = nullptr;  // held

  Entry(std::shared_ptr<const Recipe> recipe, PyObject* options)
      : recipe(std::move(recipe)), options(Py_NewRef(options)) {}
  Entry(Entry&& other) noexcept { *this = std::move(other); }
  Entry& operator=(Entry&& other) noexcept {
    std::swap(recipe, other.recipe);
    options = std::exchange(other.options, options);
    return *this;
  }
  ~Entry() { Py_XDECREF(options); }
};

struct KeptCalls {
  PyObject_HEAD vectorcallfunc call;
  Py_ssize_t tensors;   // how many of the arguments are tensors or None: the first
  PyObject* variables;  // ((ContextVar, value), ...) that must hold
  PyObject* quiet;      // functions that must return something false
  PyObject* classes;    // what a tensor must be exactly
  std::vector<Entry>* entries;
};

KeptCalls& of(PyObject* self) { return *reinterpret_cast<KeptCalls*>(self); }

struct Raised {};  // an error of Python's is set

// Whether nothing around the call has to see it or changes what it means.
bool undisturbed(const KeptCalls& calls) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(calls.variables); ++i) {
    PyObject *pair = PyTuple_GET_ITEM(calls.variables, i), *value = nullptr;
    if (PyContextVar_Get(PyTuple_GET_ITEM(pair, 0), nullptr, &value) < 0) throw Raised();
    Py_XDECREF(value);  // the context or the variable holds it
    if (value != PyTuple_GET_ITEM(pair, 1)) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(calls.quiet); ++i) {
    PyObject* value = PyObject_CallNoArgs(PyTuple_GET_ITEM(calls.quiet, i));
    if (value == nullptr) throw Raised();
    const int loud = PyObject_IsTrue(value);
    Py_DECREF(value);
    if (loud != 0) return false;
  }
  return true;
}

// Only of numbers, strings, None and tuples of these: what else is the same object may have
// changed.
bool same(PyObject* now, PyObject* before) {
  if (Py_TYPE(now) != Py_TYPE(before)) return false;
  if (PyTuple_CheckExact(now)) {
    if (PyTuple_GET_SIZE(now) != PyTuple_GET_SIZE(before)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(now); ++i)
      if (!same(PyTuple_GET_ITEM(now, i), PyTuple_GET_ITEM(before, i))) return false;
    return true;
  }
  if (now == Py_None || PyBool_Check(now)) return now == before;
  if (!PyLong_CheckExact(now) && !PyFloat_CheckExact(now) && !PyUnicode_CheckExact(now))
    return false;
  if (now == before) return true;
  const int equal = PyObject_RichCompareBool(now, before, Py_EQ);
  if (equal < 0) throw Raised();
  return equal != 0;
}

// The arguments of one call, as far as they are tensors.
struct Given {
  std::array<Handle, MOST> handles;
  std::array<Kind, MOST> kinds;
  Py_ssize_t count;

  // Fails where one has to be seen by autograd, is of a class of its own, or is a view that negates
  // what is in memory.
  Given(const KeptCalls& calls, PyObject* const* arguments) : count(calls.tensors) {
    const bool grad = aoti_torch_grad_mode_is_enabled();
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* argument = arguments[i];
      if (argument == Py_None) continue;
      if (!known(calls.classes, Py_TYPE(argument))) throw Failed();
      if (grad && requires_grad(argument)) throw Failed();
      if (negates(argument)) throw Failed();
      handles[i] = handle_of(argument);
      kinds[i] = kind_of(handles[i]);
    }
  }

  static bool known(PyObject* classes, PyTypeObject* type) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); ++i)
      if (PyTuple_GET_ITEM(classes, i) == reinterpret_cast<PyObject*>(type)) return true;
    return false;
  }

  static bool requires_grad(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("requires_grad");
    PyObject* value = PyObject_GetAttr(tensor, name);
    if (value == nullptr) throw Raised();
    Py_DECREF(value);  // True and False stay
    return value == Py_True;
  }

  static bool negates(PyObject* tensor) {
    // The method itself: to look it up takes longer than its call.
    static PyObject* const is_neg =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(tensor)), "is_neg");
    PyObject* value = is_neg == nullptr ? nullptr : PyObject_CallOneArg(is_neg, tensor);
    if (value == nullptr) throw Raised();
    Py_DECREF(value);  // True and False stay
    return value == Py_True;
  }

  bool fit(const Entry& entry, PyObject* const* options, Py_ssize_t count) const {
    const auto& tensors = entry.recipe->tensors;
    if (!std::equal(tensors.begin(), tensors.end(), kinds.begin())) return false;
    if (PyTuple_GET_SIZE(entry.options) != count) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!same(options[i], PyTuple_GET_ITEM(entry.options, i))) return false;
    return true;
  }
};

Handle empty_of(const Kind& kind) {
  AtenTensorHandle made = nullptr;
  check(aoti_torch_empty_strided(kind.dim, kind.sizes.data(), kind.strides.data(), kind.dtype,
                                 aoti_torch_device_type_cpu(), 0, &made));
  return Handle(made);
}

PyObject* object_of(const Handle& tensor) {
  void* object = nullptr;
  check(torch_tensor_to_pyobject(tensor.get(), nullptr, &object));
  return static_cast<PyObject*>(object);
}

PyObject* object_of(const Result& result, const Handle* made) {
  if (result.whole) return object_of(*made);
  AtenTensorHandle view = nullptr;
  check(aoti_torch__reinterpret_tensor(made->get(), result.kind.dim, result.kind.sizes.data(),
                                       result.kind.strides.data(), result.offset, &view));
  return object_of(Handle(view));
}

// Whether a tensor that is written may share memory with another one: addresses in between count.
bool entangled(const Recipe& recipe, void* const* addresses) {
  const auto span = [&](size_t i) {
    const auto* first = static_cast<const char*>(addresses[i]);
    return std::pair(first, first + recipe.tensors[i].extent() * recipe.itemsizes[i]);
  };
  for (const Result& result : recipe.results) {
    if (result.of >= recipe.tensors.size()) continue;
    const auto [first, last] = span(result.of);
    for (size_t i = 0; i < recipe.tensors.size(); ++i) {
      if (i == result.of || recipe.tensors[i].dim < 0) continue;
      const auto [begin, end] = span(i);
      if (begin < last && first < end) return true;
    }
  }
  return false;
}

void work(const Recipe& recipe, void* const* addresses) {
  void* operands[MOST];
  for (size_t i = 0; i < recipe.sources.size(); ++i)
    operands[i] = recipe.sources[i] < 0 ? nullptr : addresses[recipe.sources[i]];
  const Work& work = work_of(recipe.direct_call);
  if (recipe.brief) return work.run(operands);
  without_gil([&] { work.run(operands); });
}

// What the call returns; null, without an error, where autograd or its memory forbids it.
PyObject* run(const Recipe& recipe, const Given& given, PyObject* const* arguments) {
  const size_t count = recipe.tensors.size();
  void* addresses[MOST] = {};
  for (size_t i = 0; i < count; ++i)
    if (given.handles[i]) addresses[i] = address_of(given.handles[i]);
  if (recipe.writes && (aoti_torch_grad_mode_is_enabled() || entangled(recipe, addresses)))
    return nullptr;
  std::array<Handle, MOST> made;
  for (size_t i = 0; i < recipe.made.size(); ++i) {
    made[i] = empty_of(recipe.made[i]);
    addresses[count + i] = address_of(made[i]);
  }
  work(recipe, addresses);
  const auto object = [&](const Result& result) {
    return result.of < count ? Py_NewRef(arguments[result.of])
                             : object_of(result, &made[result.of - count]);
  };
  if (recipe.results.size() == 1) return object(recipe.results[0]);
  PyObject* results = PyTuple_New(static_cast<Py_ssize_t>(recipe.results.size()));
  if (results == nullptr) throw Raised();
  for (size_t i = 0; i < recipe.results.size(); ++i)
    PyTuple_SET_ITEM(results, static_cast<Py_ssize_t>(i), object(recipe.results[i]));
  return results;
}

PyObject* call(PyObject* self, PyObject* const* arguments, size_t flags, PyObject*) {
  const KeptCalls& calls = of(self);
  const Py_ssize_t options = PyVectorcall_NARGS(flags) - calls.tensors;
  try {
    if (calls.entries->empty() || options < 0 || !undisturbed(calls)) Py_RETURN_NONE;
    const Given given(calls, arguments);
    for (const Entry& entry : *calls.entries) {
      if (!given.fit(entry, arguments + calls.tensors, options)) continue;
      // Another thread may drop the entry while the work runs.
      const std::shared_ptr<const Recipe> recipe = entry.recipe;
      if (PyObject* result = run(*recipe, given, arguments)) return result;
      break;
    }
  } catch (const Failed&) {
  } catch (const Raised&) {
    return nullptr;
  } catch (const std::exception& raised) {
    PyErr_SetString(PyExc_RuntimeError, raised.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// The tensors of a tuple of tensors and None.
std::vector<Handle> handles_of(PyObject* tensors) {
  std::vector<Handle> handles;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    PyObject* tensor = PyTuple_GET_ITEM(tensors, i);
    handles.push_back(tensor == Py_None ? Handle() : handle_of(tensor));
  }
  return handles;
}

std::vector<Kind> kinds_of(const std::vector<Handle>& tensors) {
  std::vector<Kind> kinds;
  for (const Handle& tensor : tensors) kinds.push_back(tensor ? kind_of(tensor) : Kind());
  return kinds;
}

// Which of the tensors lies at the address, -1 for none; fails where several do.
int source_of(const void* address, const std::vector<Handle>& tensors) {
  if (address == nullptr) return -1;
  int source = -1;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i] || address_of(tensors[i]) != address) continue;
    if (source >= 0) throw Failed();
    source = static_cast<int>(i);
  }
  if (source < 0) throw Failed();
  return source;
}

int64_t itemsize_of(PyObject* tensor) {
  if (tensor == Py_None) return 0;
  PyObject* size = PyObject_GetAttrString(tensor, "itemsize");
  if (size == nullptr) throw Raised();
  const int64_t itemsize = PyLong_AsLongLong(size);
  Py_DECREF(size);
  return itemsize;
}

constexpr char RECIPE[] = "cvkernels._C.recipe";
using Shared = std::shared_ptr<const Recipe>;

Shared recipe_of(PyObject* direct_call, PyObject* given, PyObject* made, PyObject* results) {
  std::vector<Handle> tensors = handles_of(given);
  const size_t count = tensors.size();
  auto recipe = std::make_shared<Recipe>();
  recipe->tensors = kinds_of(tensors);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i)
    recipe->itemsizes.push_back(itemsize_of(PyTuple_GET_ITEM(given, i)));
  std::vector<Handle> fresh = handles_of(made);
  recipe->made = kinds_of(fresh);
  std::move(fresh.begin(), fresh.end(), std::back_inserter(tensors));
  for (const auto& kinds : {recipe->tensors, recipe->made})
    for (const Kind& kind : kinds) recipe->brief = recipe->brief && kind.extent() <= BRIEF;
  recipe->direct_call = Py_NewRef(direct_call);
  const auto& addresses = work_of(direct_call).addresses;
  if (tensors.size() > MOST || addresses.size() > MOST) throw Failed();
  for (const void* address : addresses) recipe->sources.push_back(source_of(address, tensors));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(results); ++i) {
    PyObject* result = PyTuple_GET_ITEM(results, i);
    size_t of = 0;
    const auto object = [&](size_t j) {
      return j < count ? PyTuple_GET_ITEM(given, j) : PyTuple_GET_ITEM(made, j - count);
    };
    while (of < tensors.size() && object(of) != result) ++of;
    const bool whole = of < tensors.size();
    // A view is of the last tensor that is made.
    if (!whole) of = tensors.size() - 1;
    const Handle handle = handle_of(result);
    recipe->results.push_back({of, whole, kind_of(handle), offset_of(handle)});
    recipe->writes = recipe->writes || of < count;
  }
  return recipe;
}

void drop_recipe(PyObject* capsule) {
  delete static_cast<Shared*>(PyCapsule_GetPointer(capsule, RECIPE));
}

// recipe(direct_call, tensors, made, results)
PyObject* recipe(PyObject*, PyObject* arguments) {
  PyObject *direct_call, *tensors, *made, *results;
  if (!PyArg_ParseTuple(arguments, "OO!O!O!", &direct_call, &PyTuple_Type, &tensors, &PyTuple_Type,
                        &made, &PyTuple_Type, &results))
    return nullptr;
  if (torch_tensor_from_pyobject == nullptr) Py_RETURN_NONE;
  try {
    auto shared = std::make_unique<Shared>(recipe_of(direct_call, tensors, made, results));
    PyObject* capsule = PyCapsule_New(shared.get(), RECIPE, drop_recipe);
    if (capsule != nullptr) (void)shared.release();
    return capsule;
  } catch (const Failed&) {
    Py_RETURN_NONE;
  } catch (const Raised&) {
    return nullptr;
  }
}

// keep(recipe, options)
PyObject* keep(PyObject* self, PyObject* arguments) {
  PyObject *capsule, *options;
  if (!PyArg_ParseTuple(arguments, "OO!", &capsule, &PyTuple_Type, &options)) return nullptr;
  const auto* shared = static_cast<Shared*>(PyCapsule_GetPointer(capsule, RECIPE));
  if (shared == nullptr) return nullptr;
  auto& entries = *of(self).entries;
  if (entries.size() == CAPACITY) entries.erase(entries.begin());
  entries.emplace_back(*shared, options);
  Py_RETURN_NONE;
}

PyObject* clear(PyObject* self, PyObject*) {
  of(self).entries->clear();
  Py_RETURN_NONE;
}

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
  Py_ssize_t tensors;
  PyObject *variables, *quiet, *classes;
  if (!PyArg_ParseTuple(arguments, "nO!O!O!", &tensors, &PyTuple_Type, &variables, &PyTuple_Type,
                        &quiet, &PyTuple_Type, &classes))
    return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  KeptCalls& calls = of(self);
  calls.call = call;
  calls.tensors = tensors;
  calls.variables = Py_NewRef(variables);
  calls.quiet = Py_NewRef(quiet);
  calls.classes = Py_NewRef(classes);
  calls.entries = new std::vector<Entry>;
  return self;
}

void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  KeptCalls& calls = of(self);
  delete calls.entries;
  Py_XDECREF(calls.variables);
  Py_XDECREF(calls.quiet);
  Py_XDECREF(calls.classes);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(KeptCalls, call), READONLY, nullptr}, {}};

PyMethodDef methods[] = {
    {"recipe", recipe, METH_VARARGS | METH_STATIC,
     "recipe(direct_call, tensors, made, results): how to do a DirectCall's work for arguments "
     "like "
     "tensors: on what is like made, made anew, and returning what is like results: arguments, "
     "tensors that are made, or views of the last of them. It holds none of these. None where "
     "PyTorch is older than 2.14, or two tensors lie at one address."},
    {"keep", keep, METH_VARARGS,
     "keep(recipe, options): what a call on tensors like the recipe's does, with these options."},
    {"clear", clear, METH_NOARGS, "Keep none of the calls."},
    {}};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>(
                    "KeptCalls(tensors, variables, quiet, classes): the last kinds of calls of an "
                    "op. Called with so many tensors or None, and options, it does a call like one "
                    "that is kept, or returns None where there is none, where a context variable "
                    "has another value than the one beside it in variables, a function of quiet "
                    "returns something true, or a tensor requires a gradient or is not exactly of "
                    "one of the classes.")},
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, members},
    {Py_tp_methods, methods},
    {}};

PyType_Spec spec = {"cvkernels._C.KeptCalls", sizeof(KeptCalls), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};

}  // namespace

PyTypeObject* make_kept_calls_type() {
  return reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
}

}  // namespace cvkernels
