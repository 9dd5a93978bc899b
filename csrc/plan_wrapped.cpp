// Parameters whose memory is another tensor's: a DTensor, sharded by FSDP2, has a local tensor, and so have its
// gradient and its states. Which these are is asked of the objects at every step, as an attribute: an eighth of a
// microsecond, where `to_local()` takes ten.
#include <stdexcept>

#include "plan.h"
#include "plan_names.h"

namespace fastopt {
namespace {

struct WrappedNames {
  PyObject *spec = interned("_spec"), *placements = interned("placements"), *grad = interned("grad");
};
const WrappedNames& wrapped_names() {
  static const WrappedNames instance;
  return instance;
}

Ref spec_of(PyObject* tensor) { return attribute(tensor, wrapped_names().spec); }

// A gradient placed otherwise than its parameter has other elements in its local tensor, or not their sum.
bool placed_alike(const Ref& spec, const Ref& other) {
  if (!spec || spec.get() == other.get()) return true;
  if (!other) throw std::invalid_argument("fastopt: a distributed parameter has a gradient that is not distributed");
  const Ref ours = Ref::steal(PyObject_GetAttr(spec.get(), wrapped_names().placements));
  const Ref theirs = Ref::steal(PyObject_GetAttr(other.get(), wrapped_names().placements));
  const int equal = PyObject_RichCompareBool(ours.get(), theirs.get(), Py_EQ);
  if (equal < 0) throw PythonError{};
  return equal;
}

// The tensor within the gradient, null if there is none; false if that is not what the parameter's is.
bool find_gradient(PyObject* param, const Ref& spec, Ref* found) {
  const Ref grad = Ref::steal(PyObject_GetAttr(param, wrapped_names().grad));
  *found = {};
  if (grad.get() == Py_None) return true;
  if (!placed_alike(spec, spec_of(grad.get()))) return false;
  *found = within(grad.get());
  return true;
}

}  // namespace

PyObject* Plan::unwrap(Entry& entry) {
  PyObject* const param = entry.param.get();
  Ref local = within(param);
  entry.wrapped = local.get() != param;
  if (!entry.wrapped) return param;
  Wrapped& wrapped = wrapped_.emplace_back();
  wrapped.entry = static_cast<size_t>(&entry - entries_.data());
  wrapped.local = local.get();  // the parameter holds it
  wrapped.spec = spec_of(param);
  find_gradient(param, wrapped.spec, &wrapped.grad);
  return wrapped.local;
}

// Whether wrapped parameters and states still hold the tensors they held; finds their gradients.
bool Plan::check_wrapped() {
  wrappers_.clear();
  for (const Wrapped& wrapped : wrapped_)
    for (int k = 0; k < entries_[wrapped.entry].slot_count; ++k) wrappers_.emplace_back(wrapped.wrappers[k]);
  for (Wrapped& wrapped : wrapped_) {
    const Entry& entry = entries_[wrapped.entry];
    if (within(entry.param.get()).get() != wrapped.local) return false;
    for (int k = 0; k < entry.slot_count; ++k)
      if (within(wrapped.wrappers[k]).get() != wrapped.slots[k]) return false;
    if (!find_gradient(entry.param.get(), wrapped.spec, &wrapped.grad)) return false;  // fastopt/engine.py places it
    found_[wrapped.entry].grad = wrapped.grad ? impl_of(wrapped.grad.get()) : nullptr;
  }
  wrappers_.clear();
  return true;
}

}  // namespace fastopt
