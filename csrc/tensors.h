// Looking at tensors below their Python objects: what kind they are, and whether they still lead where they led.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COWDeleter.h>

#include "device.h"
#include "python.h"

namespace fastopt {

// A tensor object, and what it led to when the plan was built: 48 bytes, since a step reads one for every parameter,
// state and counter from cold memory.
struct Tracked {
  PyObject* object;  // not kept alive
  c10::TensorImpl* impl;
  const c10::StorageImpl* storage;
  const void* version;  // where it counts
  void* data;
  caffe2::TypeMeta type;
  bool contiguous;
  Dtype dtype;       // of p and its states
  CounterKind kind;  // of counters
};

// Asks for the cache lines that a look at a tensor reads. Allocators align objects to 16 bytes: what lies within 64
// bytes may begin in one line and end in the next.
inline void prefetch_between(const void* object, size_t first, size_t last) {
  __builtin_prefetch(static_cast<const char*>(object) + first);
  __builtin_prefetch(static_cast<const char*>(object) + last);
}
inline void prefetch_object(const PyObject* tensor) {  // its pointer to the implementation
  __builtin_prefetch(reinterpret_cast<const char*>(tensor) + sizeof(PyObject));
}
inline void prefetch_tensor_head(const c10::TensorImpl* impl) {  // storage, autograd's data, version
  prefetch_between(impl, 0, 47);
}
inline void prefetch_sizes(const c10::TensorImpl* impl) { prefetch_between(impl, 48, 111); }
inline void prefetch_tensor(const c10::TensorImpl* impl) {  // the head, and offset, count, type, flags and keys
  prefetch_tensor_head(impl);
  prefetch_between(impl, sizeof(c10::TensorImpl) - 32, sizeof(c10::TensorImpl) - 1);
}
inline void prefetch_storage(const c10::StorageImpl* storage) { prefetch_between(storage, 16, 63); }  // address, flags

// Without dtype or kind. The tensor will be written to: memory that it shares until then becomes its own.
Tracked track(PyObject* tensor);

inline void* data_of(const c10::TensorImpl* impl) { return const_cast<void*>(impl->data()); }

// Whether a storage shares its memory with others until one of them is written to.
inline bool is_copied_on_write(const c10::StorageImpl* storage) {
  return storage->data_ptr().get_deleter() == static_cast<c10::DeleterFnPtr>(c10::impl::cow::cow_deleter);
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % alignment == 0; }

// Whether a tensor object still leads to the same memory in the same layout, as far as that shows without strides. The
// old pointers are compared, never followed.
inline bool unchanged(const Tracked& tensor) {
  const c10::TensorImpl* impl = impl_of(tensor.object);
  return impl == tensor.impl && impl->unsafe_storage().unsafeGetStorageImpl() == tensor.storage &&
         impl->data() == tensor.data && impl->dtype() == tensor.type && impl->is_contiguous() == tensor.contiguous &&
         !is_copied_on_write(tensor.storage);
}

// The tensor whose memory a tensor object stands for: the local shard of a DTensor, or itself.
Ref within(PyObject* tensor);

// The kernels' name of a tensor's dtype; false if they have none.
bool dtype_of(const c10::TensorImpl* impl, Dtype* dtype);

// Memory that kernels can read: strided, on the CPU or a CUDA device, no subclass that intercepts operations, no
// pending conjugation or negation.
bool is_plain(const c10::TensorImpl* impl);

// The gradient of a tensor; null if it has none.
inline const c10::TensorImpl* grad_of(const c10::TensorImpl* impl) {
  const c10::AutogradMetaInterface* meta = impl->autograd_meta();
  if (!meta) return nullptr;
  const at::Tensor& grad = meta->grad();
  return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
}

uint64_t fingerprint(c10::IntArrayRef sizes);

// Whether two tensors have the same sizes and, where it matters, the same strides.
bool same_strides(const c10::TensorImpl* a, const c10::TensorImpl* b);

// Counts a change of the tensor, for autograd.
inline void bump(c10::TensorImpl* impl) {
  if (impl->version_counter().enabled()) impl->bump_version();
}

}  // namespace fastopt
