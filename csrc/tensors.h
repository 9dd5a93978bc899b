// Looking at tensors below their Python objects: what kind they are, and whether they still lead where they led.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COWDeleter.h>

#include <cstring>

#include "device.h"
#include "python.h"

namespace fastopt {

// A tensor object, and what it led to when the plan was built: 48 bytes, since a step reads one for every parameter,
// state and counter from cold memory.
struct Tracked {
  PyObject* object;  // not kept alive
  c10::TensorImpl* impl;
  const c10::StorageImpl* storage;
  c10::VariableVersion version;  // the tensor's own counter
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
inline void prefetch_meta(const void* meta) { prefetch_between(meta, 0, 47); }  // autograd's data: type, name, gradient
inline void prefetch_sizes(const c10::TensorImpl* impl) { prefetch_between(impl, 56, 79); }  // of two dimensions
inline void prefetch_tensor(const c10::TensorImpl* impl) {
  prefetch_between(impl, 16, 47);  // storage, autograd's data, version; offset, count, type, flags and keys
  prefetch_between(impl, sizeof(c10::TensorImpl) - 32, sizeof(c10::TensorImpl) - 1);
}
inline void prefetch_storage(const c10::StorageImpl* storage) { prefetch_between(storage, 16, 63); }  // address, flags

// Which counter it is. The counter itself is private: it is told apart by its address, and counts 16 bytes into it,
// which only a prefetch relies on.
inline const char* identity(const c10::VariableVersion& version) {
  static_assert(sizeof version == sizeof(char*));
  const char* counter;
  std::memcpy(&counter, static_cast<const void*>(&version), sizeof counter);
  return counter;
}
inline void prefetch_count(const c10::VariableVersion& version) { __builtin_prefetch(identity(version) + 16, 1); }

// Without dtype or kind. The tensor will be written to: memory that it shares until then becomes its own.
Tracked track(PyObject* tensor);

inline const c10::StorageImpl* storage_of(const c10::TensorImpl* impl) {
  return impl->unsafe_storage().unsafeGetStorageImpl();
}

inline void* data_of(const c10::TensorImpl* impl) { return const_cast<void*>(impl->data()); }

// Where a tensor's first element is, or would be. Raises where torch has blocked the memory, as it does with outputs of
// a CUDA graph that has run again.
inline void* address_of(const c10::TensorImpl* impl) {
  const auto offset = static_cast<uintptr_t>(impl->storage_offset()) * impl->dtype().itemsize();
  const void* const storage = storage_of(impl)->data();  // null: released
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(storage) + offset);
}

// Whether a storage shares its memory with others until one of them is written to. (A tensor whose memory torch has
// blocked may have none.)
inline bool is_copied_on_write(const c10::StorageImpl* storage) {
  return storage && storage->data_ptr().get_deleter() == static_cast<c10::DeleterFnPtr>(c10::impl::cow::cow_deleter);
}

// Whether a tensor's memory is not all there is to it: operations are intercepted, or something is still to be done.
inline bool is_veiled(const c10::TensorImpl* impl) {
  constexpr c10::DispatchKeySet keys({c10::DispatchKey::Python, c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                      c10::DispatchKey::ZeroTensor});
  return impl->key_set().has_any(keys);
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % alignment == 0; }

// Whether a tensor object still leads to the same memory in the same layout, as far as that shows without strides. The
// old pointers are compared, never followed.
inline bool unchanged(const Tracked& tensor) {
  const c10::TensorImpl* impl = impl_of(tensor.object);
  return impl == tensor.impl && storage_of(impl) == tensor.storage &&
         identity(impl->version_counter()) == identity(tensor.version) && impl->dtype() == tensor.type &&
         address_of(impl) == tensor.data && impl->is_contiguous() == tensor.contiguous && !is_veiled(impl) &&
         !is_copied_on_write(tensor.storage);
}

// The tensor whose memory a tensor object stands for: the local shard of a DTensor, or itself.
Ref within(PyObject* tensor);

// The kernels' name of a tensor's dtype; false if they have none.
bool dtype_of(const c10::TensorImpl* impl, Dtype* dtype);

// Memory that kernels can read: strided, on the CPU or a CUDA device, not veiled.
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

// Counts a change of a tensor, for autograd; one that was made in inference mode has no counter.
inline void bump(c10::VariableVersion& version) {
  if (version.enabled()) version.bump();
}

}  // namespace fastopt
