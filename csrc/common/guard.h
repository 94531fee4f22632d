// What a kept plan asks before it runs: are the modules, and the code and the tensors behind them,
// still the ones that it was made from? Checked in C, since a batch of one spends as long in Python
// as in a small convolution. Contents of tensors: sample.h.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>

namespace cvkernels {

class Guard {
 public:
  // modules: (module, options, absent) each; options are names of attributes that must stay equal,
  // absent are names that must stay out of the module's __dict__.
  // code: (owner, name) each, attributes that must stay the same objects.
  // tensors: those whose memory, version and strides must stay as they are.
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
      tensors_.push_back({kept(tensor), taken(tensor.attr("data_ptr")()),
                          taken(tensor.attr("_version")), strides_of(tensor)});
    }
  }

  bool holds() const {
    // A module stands behind its parent: where that has the same children still, it is alive.
    for (const Module& module : modules_)
      if (!module.holds()) return false;
    for (const Code& code : code_)
      if (attribute(code.owner, code.name).ptr() != code.value) return false;
    const Names& names = Names::get();
    for (const Held& held : tensors_) {
      PyObject* tensor = held.tensor;
      if (taken(called(tensor, names.data_ptr)) != held.address ||
          taken(attribute(tensor, names.version)) != held.version)
        return false;
      if (held.strides && !equal(called(tensor, names.stride).ptr(), held.strides)) return false;
    }
    return true;
  }

 private:
  using Object = pybind11::object;

  struct Names {
    Object data_ptr = intern("data_ptr"), version = intern("_version"), stride = intern("stride");
    Object hooks[4] = {intern("_forward_hooks"), intern("_forward_pre_hooks"),
                       intern("_backward_hooks"), intern("_backward_pre_hooks")};

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

  static Object attribute(PyObject* of, const Object& name) {
    return owned(PyObject_GetAttr(of, name.ptr()));
  }

  static Object attribute(PyObject* of, PyObject* name) {
    return owned(PyObject_GetAttr(of, name));
  }

  static Object called(PyObject* of, const Object& name) {
    return owned(PyObject_CallMethodNoArgs(of, name.ptr()));
  }

  static uint64_t taken(const Object& value) {
    const uint64_t result = PyLong_AsUnsignedLongLong(value.ptr());
    if (PyErr_Occurred()) throw pybind11::error_already_set();
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

  struct Held {
    PyObject* tensor;
    uint64_t address, version;
    PyObject* strides;  // of a weight; null for a vector
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

  PyObject* strides_of(const Object& tensor) {
    const Object strides = tensor.attr("stride")();
    return PyTuple_Size(strides.ptr()) > 1 ? kept(strides) : nullptr;
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

  std::vector<Object> kept_;
  std::vector<Module> modules_;
  std::vector<Code> code_;
  std::vector<Held> tensors_;
};

}  // namespace cvkernels
