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
  // tensors: those whose memory and version must stay as they are.
  Guard(const pybind11::sequence& modules, const pybind11::sequence& code,
        const pybind11::sequence& tensors) {
    for (const auto& item : modules) {
      const auto entry = item.cast<pybind11::sequence>();
      modules_.emplace_back(entry[0].cast<pybind11::object>(), entry[1].cast<pybind11::sequence>(),
                            entry[2].cast<pybind11::sequence>());
    }
    for (const auto& item : code) {
      const auto entry = item.cast<pybind11::sequence>();
      auto owner = entry[0].cast<pybind11::object>();
      auto name = interned(entry[1]);
      code_.push_back({owner, name, owner.attr(name)});
    }
    for (const auto& item : tensors) {
      auto tensor = item.cast<pybind11::object>();
      tensors_.push_back(
          {tensor, number(tensor.attr("data_ptr")().ptr()), number(tensor.attr("_version").ptr())});
    }
  }

  bool holds() const {
    for (const Module& module : modules_)
      if (!module.holds()) return false;
    for (const Code& code : code_) {
      PyObject* now = PyObject_GetAttr(code.owner.ptr(), code.name.ptr());
      if (now == nullptr) throw pybind11::error_already_set();
      Py_DECREF(now);
      if (now != code.value.ptr()) return false;
    }
    static const pybind11::object data_ptr = intern("data_ptr"), version = intern("_version");
    for (const Held& held : tensors_) {
      if (taken(PyObject_CallMethodNoArgs(held.tensor.ptr(), data_ptr.ptr())) != held.address ||
          taken(PyObject_GetAttr(held.tensor.ptr(), version.ptr())) != held.version)
        return false;
    }
    return true;
  }

 private:
  using Object = pybind11::object;

  static Object intern(const char* text) {
    return pybind11::reinterpret_steal<Object>(PyUnicode_InternFromString(text));
  }

  static Object interned(const pybind11::handle& name) {
    return intern(name.cast<std::string>().c_str());
  }

  static uint64_t number(PyObject* value) {
    const uint64_t result = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    return result;
  }

  // The number that a new reference is, or the error that there is none.
  static uint64_t taken(PyObject* value) {
    if (value == nullptr) throw pybind11::error_already_set();
    const auto owned = pybind11::reinterpret_steal<Object>(value);
    return number(value);
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

  static bool equal(const Object& now, const Object& kept) {
    if (now.ptr() == kept.ptr()) return true;
    if (now.ptr() == nullptr || kept.ptr() == nullptr || Py_TYPE(now.ptr()) != Py_TYPE(kept.ptr()))
      return false;
    if (!PyLong_Check(now.ptr()) && !PyFloat_Check(now.ptr()) && !PyUnicode_Check(now.ptr()) &&
        !PyTuple_Check(now.ptr()))
      return false;  // others count by identity
    const int result = PyObject_RichCompareBool(now.ptr(), kept.ptr(), Py_EQ);
    if (result < 0) throw pybind11::error_already_set();
    return result != 0;
  }

  // A dict that must keep its values, each the same object.
  struct Values {
    Object name;
    std::vector<std::pair<Object, Object>> items;

    Values(const char* text, PyObject* attributes) : name(intern(text)) {
      for (const auto& [key, value] : at(attributes, name.ptr()).cast<pybind11::dict>())
        items.emplace_back(pybind11::reinterpret_borrow<Object>(key),
                           pybind11::reinterpret_borrow<Object>(value));
    }

    bool hold(PyObject* attributes) const {
      const Object dict = at(attributes, name.ptr());
      if (!dict || PyDict_Size(dict.ptr()) != static_cast<Py_ssize_t>(items.size())) return false;
      for (const auto& [key, value] : items)
        if (at(dict.ptr(), key.ptr()).ptr() != value.ptr()) return false;
      return true;
    }
  };

  struct Module {
    Object module, attributes;
    PyTypeObject* type;
    std::vector<std::pair<Object, Object>> options;
    std::vector<Object> absent;
    Values parameters, buffers, children;

    Module(Object of, const pybind11::sequence& names, const pybind11::sequence& shadows)
        : module(std::move(of)),
          attributes(module.attr("__dict__")),
          type(Py_TYPE(module.ptr())),
          parameters("_parameters", attributes.ptr()),
          buffers("_buffers", attributes.ptr()),
          children("_modules", attributes.ptr()) {
      for (const auto& name : names) {
        const Object key = interned(name);
        options.emplace_back(key, at(attributes.ptr(), key.ptr()));
      }
      for (const auto& name : shadows) absent.push_back(interned(name));
    }

    bool holds() const {
      static const Object hooks[] = {intern("_forward_hooks"), intern("_forward_pre_hooks"),
                                     intern("_backward_hooks"), intern("_backward_pre_hooks")};
      if (Py_TYPE(module.ptr()) != type) return false;
      PyObject* dict = attributes.ptr();
      for (const Object& name : hooks) {
        const Object hooked = at(dict, name.ptr());
        if (!hooked || PyDict_Size(hooked.ptr()) != 0) return false;
      }
      for (const auto& [name, value] : options)
        if (!equal(at(dict, name.ptr()), value)) return false;
      for (const Object& name : absent)
        if (at(dict, name.ptr())) return false;
      return parameters.hold(dict) && buffers.hold(dict) && children.hold(dict);
    }
  };

  struct Code {
    Object owner, name, value;
  };

  struct Held {
    Object tensor;
    uint64_t address, version;
  };

  std::vector<Module> modules_;
  std::vector<Code> code_;
  std::vector<Held> tensors_;
};

}  // namespace cvkernels
