// What a kept plan asks before it runs: are the modules, and the code and the tensors behind them,
// still the ones that it was made from? Checked in C, since a batch of one spends as long in Python
// as in a small convolution. Contents of tensors: sample.h.
//
// A network has hundreds of modules of a dozen names each, all out of the cache when their turn
// comes. So modules and code are looked through once, and then left alone as long as CPython's own
// counters of changes to their dicts and types stand still (Stamps).
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>

#include "stamps.h"

namespace cvkernels {

class Guard {
 public:
  // modules: (module, options, absent) each; options are names of attributes that must stay equal,
  // absent are names that must stay out of the module's __dict__.
  // code: (owner, name) each, attributes that must stay the same objects.
  // tensors: those whose memory, sizes, strides and version must stay as they are. Of a vector the
  // version does not count: all of its contents are compared.
  Guard(const pybind11::sequence& modules, const pybind11::sequence& code,
        const pybind11::sequence& tensors) {
    for (const auto& item : modules) {
      const auto entry = item.cast<pybind11::sequence>();
      modules_.push_back(module_of(entry[0].cast<Object>(), entry[1].cast<pybind11::sequence>(),
                                   entry[2].cast<pybind11::sequence>()));
    }
    for (const auto& item : code) {
      const auto entry = item.cast<pybind11::sequence>();
      const auto owner = entry[0].cast<Object>();
      const Object name = interned(entry[1]);
      code_.push_back({kept(owner), kept(name), kept(owner.attr(name))});
    }
    for (const auto& item : tensors) {
      const auto tensor = item.cast<Object>();
      tensors_.push_back(held(tensor));
    }
  }

  bool holds() {
    if (!stamps_.hold()) {
      stamps_ = {};
      // A module stands behind its parent: where that has the same children still, it is alive.
      for (const Module& module : modules_)
        if (!module.holds()) return false;
      for (const Code& code : code_)
        if (attribute(code.owner, code.name).ptr() != code.value) return false;
      stamp();
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (i + AHEAD < tensors_.size()) tensors_[i + AHEAD].prefetch();
      if (!tensors_[i].holds()) return false;
    }
    return true;
  }

 private:
  using Object = pybind11::object;

  // How many tensors are asked for before their turn.
  static constexpr size_t AHEAD = 8;

  struct Names {
    Object hooks[4] = {intern("_forward_hooks"), intern("_forward_pre_hooks"),
                       intern("_backward_hooks"), intern("_backward_pre_hooks")};
    Object tensor = pybind11::module_::import("torch").attr("_C").attr("TensorBase"),
           data_ptr = tensor.attr("data_ptr"), numel = tensor.attr("numel"),
           stride = tensor.attr("stride"), version = tensor.attr("_version");

    // Never destroyed: at exit the interpreter goes first.
    static const Names& get() {
      static const Names* names = new Names;
      return *names;
    }
  };

  static Object intern(const char* text) {
    return pybind11::reinterpret_steal<Object>(PyUnicode_InternFromString(text));
  }

  static Object interned(const pybind11::handle& name) {
    return intern(name.cast<std::string>().c_str());
  }

  static Object owned(PyObject* reference) {
    if (reference == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<Object>(reference);
  }

  static Object attribute(PyObject* of, PyObject* name) {
    return owned(PyObject_GetAttr(of, name));
  }

  // A method, and a property, of all tensors, past the names of one tensor's own.
  static Object called(PyObject* tensor, const Object& method) {
    return owned(PyObject_CallOneArg(method.ptr(), tensor));
  }

  static Object property(PyObject* tensor, const Object& descriptor) {
    PyObject* found = descriptor.ptr();
    return owned(Py_TYPE(found)->tp_descr_get(found, tensor, nullptr));
  }

  static uint64_t number(const Object& value) {
    const uint64_t result = PyLong_AsUnsignedLongLong(value.ptr());
    if (result == static_cast<uint64_t>(-1) && PyErr_Occurred())
      throw pybind11::error_already_set();
    return result;
  }

  // The value of a key as a reference of its own; null where it is absent.
  static Object at(PyObject* dict, PyObject* key) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* value = nullptr;
    if (PyDict_GetItemRef(dict, key, &value) < 0) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<Object>(value);
#else
    PyObject* value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    return pybind11::reinterpret_borrow<Object>(value);
#endif
  }

  // Numbers, strings and tuples of them by value, all else by identity.
  static bool equal(PyObject* now, PyObject* before) {
    if (now == before) return true;
    if (now == nullptr || before == nullptr || Py_TYPE(now) != Py_TYPE(before)) return false;
    if (!PyLong_Check(now) && !PyFloat_Check(now) && !PyUnicode_Check(now) && !PyTuple_Check(now))
      return false;
    const int result = PyObject_RichCompareBool(now, before, Py_EQ);
    if (result < 0) throw pybind11::error_already_set();
    return result != 0;
  }

  using Items = std::vector<std::pair<PyObject*, PyObject*>>;

  // A dict of a module that must keep its values, each the same object.
  struct Values {
    PyObject* name;
    Items items;

    bool hold(PyObject* attributes) const {
      const Object dict = at(attributes, name);
      if (!dict || PyDict_Size(dict.ptr()) != static_cast<Py_ssize_t>(items.size())) return false;
      for (const auto& [key, value] : items)
        if (at(dict.ptr(), key).ptr() != value) return false;
      return true;
    }
  };

  struct Module {
    PyObject* module;
    PyTypeObject* type;
    Items options;
    std::vector<PyObject*> absent;
    Values parameters, buffers, children;

    bool holds() const {
      if (Py_TYPE(module) != type) return false;
      const Object dict = owned(PyObject_GenericGetDict(module, nullptr));
      PyObject* attributes = dict.ptr();
      for (const Object& name : Names::get().hooks) {
        const Object hooked = at(attributes, name.ptr());
        if (!hooked || PyDict_Size(hooked.ptr()) != 0) return false;
      }
      for (const auto& [name, value] : options)
        if (!equal(at(attributes, name).ptr(), value)) return false;
      for (PyObject* name : absent)
        if (at(attributes, name)) return false;
      return parameters.hold(attributes) && buffers.hold(attributes) && children.hold(attributes);
    }
  };

  struct Code {
    PyObject *owner, *name, *value;
  };

  // Strides and the count of elements say the sizes, since no two elements share memory.
  struct Held {
    PyObject* tensor;
    uint64_t address, count, version;
    PyObject* strides;  // null for a vector
    // Where PyTorch's own objects for the tensor and its memory lie: asked for ahead, never read.
    const char *impl, *storage;

    void prefetch() const {
      __builtin_prefetch(tensor);
      for (int byte = 0; byte < 192; byte += 64) __builtin_prefetch(impl + byte);
      __builtin_prefetch(storage);
    }

    bool holds() const {
      const Names& names = Names::get();
      if (number(called(tensor, names.data_ptr)) != address ||
          number(called(tensor, names.numel)) != count)
        return false;
      return !strides || (number(property(tensor, names.version)) == version &&
                          equal(called(tensor, names.stride).ptr(), strides));
    }
  };

  // The object, kept alive as long as the guard.
  PyObject* kept(const Object& object) {
    if (object) kept_.push_back(object);
    return object.ptr();
  }

  // As kept(), but for what may lead back to the module, whose plans hold this guard: a model that
  // nothing refers to any more has to go at once, as it would without plans.
  PyObject* kept_unless_cyclic(const Object& object) {
    const bool plain =
        object && (!PyObject_GC_IsTracked(object.ptr()) || PyType_Check(object.ptr()));
    return plain ? kept(object) : object.ptr();
  }

  Held held(const Object& tensor) {
    const Object strides = tensor.attr("stride")();
    const bool vector = PyTuple_Size(strides.ptr()) == 1;
    const auto place = [](const Object& of) {
      return reinterpret_cast<const char*>(number(of.attr("_cdata")));
    };
    return {kept(tensor),
            number(tensor.attr("data_ptr")()),
            number(tensor.attr("numel")()),
            number(tensor.attr("_version")),
            vector ? nullptr : kept(strides),
            place(tensor),
            place(tensor.attr("untyped_storage")())};
  }

  Values values_of(const char* text, const Object& attributes, bool owns) {
    const Object name = intern(text);
    Values values{kept(name), {}};
    for (const auto& [key, value] : at(attributes.ptr(), name.ptr()).cast<pybind11::dict>())
      values.items.emplace_back(
          kept(pybind11::reinterpret_borrow<Object>(key)),
          owns ? kept(pybind11::reinterpret_borrow<Object>(value)) : value.ptr());
    return values;
  }

  Module module_of(const Object& module, const pybind11::sequence& names,
                   const pybind11::sequence& shadows) {
    const Object attributes = module.attr("__dict__");
    Module result{module.ptr(),
                  Py_TYPE(module.ptr()),
                  {},
                  {},
                  values_of("_parameters", attributes, true),
                  values_of("_buffers", attributes, true),
                  values_of("_modules", attributes, false)};
    kept(pybind11::type::of(module));
    for (const auto& name : names) {
      const Object key = interned(name);
      result.options.emplace_back(kept(key), kept_unless_cyclic(at(attributes.ptr(), key.ptr())));
    }
    for (const auto& name : shadows) result.absent.push_back(kept(interned(name)));
    return result;
  }

  void stamp() {
    Stamps stamps;
    for (const Module& module : modules_) {
      const Object attributes = owned(PyObject_GenericGetDict(module.module, nullptr));
      std::vector<PyObject*> dicts;
      for (const Object& name : Names::get().hooks)
        dicts.push_back(at(attributes.ptr(), name.ptr()).ptr());
      for (const Values* values : {&module.parameters, &module.buffers, &module.children})
        dicts.push_back(at(attributes.ptr(), values->name).ptr());
      stamps.add_module(module.module, attributes.ptr(), dicts);
    }
    for (const Code& code : code_) stamps.add_code(code.owner);
    stamps.close();
    stamps_ = std::move(stamps);
  }

  std::vector<Object> kept_;
  std::vector<Module> modules_;
  std::vector<Code> code_;
  std::vector<Held> tensors_;
  Stamps stamps_;
};

}  // namespace cvkernels
