// Python objects in C++: strong references, and how an exception that is already set travels.
#pragma once

#include <Python.h>
#include <c10/core/TensorImpl.h>

#include <utility>
#include <vector>

namespace fastopt {

// Implemented by module.cpp, the only unit that knows torch's Python headers.
bool is_tensor(PyObject* object);
bool is_exact_tensor(PyObject* object);  // a torch.Tensor or torch.nn.Parameter, and of no class derived from them
c10::TensorImpl* impl_of(PyObject* tensor);

struct PythonError {};  // a Python exception is set

// A strong reference.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* borrowed) : object_(borrowed) { Py_XINCREF(object_); }
  static Ref steal(PyObject* owned) {
    if (!owned) throw PythonError{};
    Ref ref;
    ref.object_ = owned;
    return ref;
  }
  Ref(const Ref& other) : Ref(other.object_) {}
  Ref(Ref&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Ref& operator=(Ref other) {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// The attribute, null where there is none: asked for once, where a question before would be a second search.
inline Ref attribute(PyObject* object, PyObject* name) {
  if (PyObject* const found = PyObject_GetAttr(object, name)) return Ref::steal(found);
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw PythonError{};
  PyErr_Clear();
  return {};
}

// Puts the exception that is set aside, for code that must not find one.
class ErrorKept {
 public:
#if PY_VERSION_HEX >= 0x030C0000
  ErrorKept() : error_(PyErr_GetRaisedException()) {}
  ~ErrorKept() { PyErr_SetRaisedException(error_); }
#else
  ErrorKept() { PyErr_Fetch(&type_, &error_, &trace_); }
  ~ErrorKept() { PyErr_Restore(type_, error_, trace_); }
#endif
  ErrorKept(const ErrorKept&) = delete;
  ErrorKept& operator=(const ErrorKept&) = delete;

 private:
#if PY_VERSION_HEX < 0x030C0000
  PyObject *type_, *trace_;
#endif
  PyObject* error_;
};

// An entry of a dict, to be recognised later. Its value is not kept alive, for it may be large: it is compared by
// address and type, and followed only after the dict was seen to hold such an object there. Whether that leads to the
// memory it led to is for whoever follows it to see.
struct DictItem {
  Ref key;
  PyObject* value;
  PyTypeObject* type;
  DictItem(PyObject* key, PyObject* value) : key(key), value(value), type(Py_TYPE(value)) {}
  bool is(PyObject* other_key, PyObject* other) const {
    return key.get() == other_key && value == other && type == Py_TYPE(other);
  }
};

inline std::vector<Ref> sequence(PyObject* object) {
  Ref fast = Ref::steal(PySequence_Fast(object, "fastopt: a sequence was expected"));
  std::vector<Ref> items;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.get()); ++i)
    items.emplace_back(PySequence_Fast_GET_ITEM(fast.get(), i));
  return items;
}

inline PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (!name) throw PythonError{};
  return name;
}

}  // namespace fastopt
