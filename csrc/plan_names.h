// What the plan's units know of Python's side: attribute names, and the versions of dicts.
#pragma once

#include "python.h"

namespace fastopt {

struct Names {
  PyObject *params = interned("params"), *layout = interned("layout"), *slots = interned("slots"),
           *on_device = interned("on_device"), *counts_on_device = interned("counts_on_device");
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

}  // namespace fastopt
