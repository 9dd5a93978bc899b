#include "gradients.h"

#include "plan_names.h"
#include "tensors.h"

namespace fastopt {
namespace {

// How many parameters ahead cache lines are asked for: the object, its implementation, autograd's data, the gradient.
constexpr Py_ssize_t objects_ahead = 16, impls_ahead = 12, metas_ahead = 8, grads_ahead = 4;

const c10::AutogradMetaInterface* meta_of(PyObject* param) { return impl_of(param)->autograd_meta(); }

// Items of a list while they are there: letting go of a tensor may run any code, which may change the list.
PyObject* item(PyObject* list, Py_ssize_t at) {
  PyObject* const found = at < PyList_GET_SIZE(list) ? PyList_GET_ITEM(list, at) : nullptr;
  return found && is_exact_tensor(found) ? found : nullptr;
}

void prefetch_ahead(PyObject* params, Py_ssize_t at) {
  if (at + objects_ahead < PyList_GET_SIZE(params)) {
    const PyObject* const object = PyList_GET_ITEM(params, at + objects_ahead);
    __builtin_prefetch(object);
    prefetch_object(object);
  }
  if (PyObject* const param = item(params, at + impls_ahead)) prefetch_between(impl_of(param), 16, 47);
  if (PyObject* const param = item(params, at + metas_ahead)) prefetch_meta(meta_of(param));
  PyObject* const near = item(params, at + grads_ahead);
  const c10::TensorImpl* const grad = near ? grad_of(impl_of(near)) : nullptr;
  if (grad) {
    __builtin_prefetch(reinterpret_cast<const char*>(grad) + 8, 1);
    prefetch_tensor(grad);
  }
}

void drop(PyObject* params, std::vector<Ref>& left) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    prefetch_ahead(params, i);
    const Ref param(PyList_GET_ITEM(params, i));
    if (!is_exact_tensor(param.get())) {
      left.push_back(param);
      continue;
    }
    c10::TensorImpl* const impl = impl_of(param.get());
    if (!grad_of(impl)) continue;
    const at::Tensor gone = std::move(impl->mutable_grad());  // goes when the parameter has none any more
  }
}

}  // namespace

std::vector<Ref> drop_gradients(PyObject* groups) {
  std::vector<Ref> left;
  for (const Ref& group : sequence(groups)) {
    const Ref params = Ref::steal(PyObject_GetItem(group.get(), names().params));
    if (PyList_Check(params.get()))
      drop(params.get(), left);
    else
      for (const Ref& param : sequence(params.get())) left.push_back(param);
  }
  return left;
}

}  // namespace fastopt
