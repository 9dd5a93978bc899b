// What the plan's units know of Python's side: attribute names, and the versions of dicts.
#pragma once

#include "python.h"

namespace fastopt {

struct Names {
  PyObject *params = interned("params"), *layout = interned("layout"), *slots = interned("slots"),
           *on_device = interned("on_device"), *symbolic = interned("symbolic"),
           *counts_on_device = interned("counts_on_device"), *param_groups = interned("param_groups"),
           *state = interned("state");
  // What an optimizer has in its __dict__ when a step is more than the plan's work: somebody to call, or something to
  // divide gradients by.
  PyObject* called[2] = {interned("_optimizer_step_pre_hooks"), interned("_optimizer_step_post_hooks")};
  PyObject* given[3] = {interned("grad_scale"), interned("found_inf"), interned("_drive")};
};
inline const Names& names() {
  static const Names instance;
  return instance;
}

// A number that changes whenever a dict does, so that an unchanged one need not be walked; 0 where there is none.
inline uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

inline void prefetch_version(const PyObject* dict) {
  __builtin_prefetch(reinterpret_cast<const char*>(dict) + sizeof(PyObject) + sizeof(Py_ssize_t));  // after the size
}

}  // namespace fastopt
