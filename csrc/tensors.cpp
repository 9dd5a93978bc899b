#include "tensors.h"

namespace fastopt {

bool dtype_of(const c10::TensorImpl* impl, Dtype* dtype) {
  switch (impl->dtype().toScalarType()) {
    case c10::ScalarType::Float:
      *dtype = Dtype::f32;
      return true;
    case c10::ScalarType::Double:
      *dtype = Dtype::f64;
      return true;
    case c10::ScalarType::BFloat16:
      *dtype = Dtype::bf16;
      return true;
    case c10::ScalarType::Half:
      *dtype = Dtype::f16;
      return true;
    default:
      return false;
  }
}

// The key set decides it all, and most tensors share one.
bool is_plain(const c10::TensorImpl* impl) {
  thread_local c10::DispatchKeySet last;
  const c10::DispatchKeySet keys = impl->key_set();
  if (keys == last) return true;
  if (!(impl->device().is_cpu() || impl->device().is_cuda()) || impl->layout() != c10::Layout::Strided ||
      !impl->has_storage() || is_veiled(impl))
    return false;
  last = keys;
  return true;
}

uint64_t fingerprint(c10::IntArrayRef sizes) {
  uint64_t h = sizes.size();
  for (const int64_t size : sizes) h = h * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(size);
  return h;
}

bool same_strides(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  const auto sizes = a->sizes(), as = a->strides(), bs = b->strides();
  if (sizes != b->sizes()) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && as[d] != bs[d]) return false;
  return true;
}

Tracked track(PyObject* tensor) {
  c10::TensorImpl* impl = impl_of(tensor);
  impl->mutable_data();  // raises where there is no memory, or none to be written to
  const c10::StorageImpl* storage = storage_of(impl);
  return {tensor, impl, storage, impl->version_counter(), address_of(impl), impl->dtype(), impl->is_contiguous(),
          {},     {}};
}

Ref within(PyObject* tensor) {
  static PyObject* const name = interned("_local_tensor");
  if (!impl_of(tensor)->key_set().has(c10::DispatchKey::Python)) return Ref(tensor);
  const Ref local = attribute(tensor, name);
  return local ? local : Ref(tensor);
}

}  // namespace fastopt
