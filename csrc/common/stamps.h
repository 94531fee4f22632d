// CPython's own counters of changes: each change of a dict, up to Python 3.12, and each change of a
// type's attributes gives it a number that nothing had before.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cvkernels {

// Whether modules and the code behind them are untouched since they were looked through. It holds
// no references: a module's dicts live as long as the dict that holds them is unchanged, and a
// module as long as its parent's children.
class Stamps {
 public:
#if PY_VERSION_HEX < 0x030D0000
  void add_module(PyObject* module, PyObject* attributes, const std::vector<PyObject*>& dicts) {
    modules_.push_back({module, Py_TYPE(module), static_cast<int64_t>(dicts.size()) + 1});
    dicts_.push_back({attributes, version_of(attributes)});
    for (PyObject* dict : dicts) dicts_.push_back({dict, version_of(dict)});
  }

  // owner is a type, or a Python module.
  void add_code(PyObject* owner) {
    if (!PyType_Check(owner)) {
      PyObject* attributes = PyModule_GetDict(owner);
      libraries_.push_back({attributes, version_of(attributes)});
      return;
    }
    const auto* type = reinterpret_cast<PyTypeObject*>(owner);
    types_.push_back({type, type->tp_version_tag});
  }

  // Called when all that it stands for has been added.
  void close() { closed_ = true; }

  bool hold() const {
    if (!closed_) return false;
    for (const auto& [type, version] : types_)
      if (version == 0 || type->tp_version_tag != version) return false;
    for (const Dict& dict : libraries_)
      if (version_of(dict.object) != dict.version) return false;
    const Dict *dict = dicts_.data(), *ahead = dict, *end = dict + dicts_.size();
    for (size_t i = 0; i < modules_.size(); ++i) {
      if (i + AHEAD < modules_.size()) __builtin_prefetch(modules_[i + AHEAD].object);
      for (; ahead != end && ahead - dict < DICTS_AHEAD; ++ahead)
        __builtin_prefetch(&reinterpret_cast<PyDictObject*>(ahead->object)->ma_version_tag);
      const Module& module = modules_[i];
      if (Py_TYPE(module.object) != module.type || attributes_of(module.object) != dict->object)
        return false;
      for (const Dict* last = dict + module.dicts; dict != last; ++dict)
        if (version_of(dict->object) != dict->version) return false;
    }
    return true;
  }

 private:
  // How many modules, and how many dicts, are asked for before their turn.
  static constexpr size_t AHEAD = 8;
  static constexpr ptrdiff_t DICTS_AHEAD = 64;

  struct Module {
    PyObject* object;
    PyTypeObject* type;
    int64_t dicts;
  };
  struct Dict {
    PyObject* object;
    uint64_t version;
  };
  struct Type {
    const PyTypeObject* object;
    unsigned int version;
  };

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  static uint64_t version_of(PyObject* dict) {
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
  }
#pragma GCC diagnostic pop

  static PyObject* attributes_of(PyObject* module) {
    PyObject* attributes = PyObject_GenericGetDict(module, nullptr);
    Py_XDECREF(attributes);  // the module holds it
    return attributes;
  }

  std::vector<Module> modules_;
  std::vector<Dict> dicts_, libraries_;
  std::vector<Type> types_;
  bool closed_ = false;
#else
  // Dicts have no number of their own here: all is looked through at each call.
  void add_module(PyObject*, PyObject*, const std::vector<PyObject*>&) {}
  void add_code(PyObject*) {}
  void close() {}
  bool hold() const { return false; }
#endif
};

}  // namespace cvkernels
