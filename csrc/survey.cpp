#include "survey.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "tensors.h"

namespace fastopt {
namespace {

constexpr size_t most_dims = 64, most_device_dims = 8;  // fastopt/routing.py: MOST_HOST_DIMS, MOST_DIMS

using Extent = std::pair<uintptr_t, uintptr_t>;

// Whether all of a tensor is its memory, in one of the kernels' dtypes. (What torch has blocked has no storage, and the
// keys of what has one.)
bool is_memory(const c10::TensorImpl* impl) {
  constexpr c10::DispatchKeySet transformed(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  Dtype dtype;
  return is_plain(impl) && storage_of(impl) && !impl->key_set().has_any(transformed) &&
         !impl->has_symbolic_sizes_strides() && dtype_of(impl, &dtype);
}

// Where its elements lie, from the first byte to behind the last; empty if the storage has no room for them, or there
// are none.
Extent extent_of(const c10::TensorImpl* impl) {
  const c10::StorageImpl* const storage = storage_of(impl);
  const auto first = reinterpret_cast<uintptr_t>(storage->data_ptr().get());
  const auto sizes = impl->sizes(), strides = impl->strides();
  int64_t last = impl->storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const size_t size = impl->dtype().itemsize();
  const size_t end = (static_cast<size_t>(last) + 1) * size;
  if (!first || impl->numel() == 0 || end > storage->nbytes()) return {};
  return {first + static_cast<size_t>(impl->storage_offset()) * size, first + end};
}

bool is_empty(const Extent& extent) { return extent.first == extent.second; }

bool is_ordinary_gradient(const c10::TensorImpl* grad, const c10::TensorImpl* p) {
  return is_memory(grad) && grad->device() == p->device() && grad->sizes() == p->sizes() && !is_empty(extent_of(grad));
}

// The extent of an ordinary parameter; of another an empty one.
Extent look(PyObject* param) {
  if (!is_exact_tensor(param)) return {};
  c10::TensorImpl* const impl = impl_of(param);
  if (!is_memory(impl) || impl->is_inference() || !impl->is_non_overlapping_and_dense() ||
      impl->sizes().size() > most_dims)
    return {};
  const c10::TensorImpl* const grad = grad_of(impl);
  return !grad || is_ordinary_gradient(grad, impl) ? extent_of(impl) : Extent{};
}

// What a backend asks of an ordinary parameter beside its group's setting: a number for those of which it is the same.
class Kinds {
 public:
  // 0, which calls for a closer look, when there are more than a byte can tell apart.
  char of(const c10::TensorImpl* p) {
    const Kind kind{p->device(), p->sizes().size() > most_device_dims};
    const auto at = std::find(seen_.begin(), seen_.end(), kind);
    const auto number = static_cast<size_t>(at - seen_.begin()) + 1;
    if (number > most) return 0;
    if (at == seen_.end()) seen_.push_back(kind);
    return static_cast<char>(number);
  }

 private:
  using Kind = std::pair<c10::Device, bool>;
  static constexpr size_t most = 127;
  std::vector<Kind> seen_;
};

bool are_apart(std::vector<Extent> extents) {
  std::sort(extents.begin(), extents.end());
  for (size_t k = 0; k < extents.size(); ++k)
    if (is_empty(extents[k]) || (k > 0 && extents[k].first < extents[k - 1].second)) return false;
  return true;
}

bool has_room(const c10::TensorImpl* impl) { return impl->numel() == 0 || !is_empty(extent_of(impl)); }

bool is_state(PyObject* found, const c10::TensorImpl* p) {
  if (!found || !is_exact_tensor(found)) return false;
  const c10::TensorImpl* const impl = impl_of(found);
  return is_memory(impl) && impl->sizes() == p->sizes() && impl->device() == p->device() &&
         impl->is_non_overlapping_and_dense() && has_room(impl);
}

bool is_counter(PyObject* key, PyObject* found, c10::Device device) {
  if (!found || !is_exact_tensor(found)) return false;
  const c10::TensorImpl* const impl = impl_of(found);
  const auto dtype = impl->dtype().toScalarType();
  const bool whole = dtype == c10::ScalarType::Int || dtype == c10::ScalarType::Long;
  if (!is_plain(impl) || !storage_of(impl) || impl->device() != device || !has_room(impl)) return false;
  if (whole) return PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "step") == 0;  // no product is whole
  return dtype == c10::ScalarType::Float || dtype == c10::ScalarType::Double;
}

Ref item(PyObject* dict, PyObject* key) {
  Ref found(PyDict_GetItemWithError(dict, key));
  if (!found && PyErr_Occurred()) throw PythonError{};
  return found;
}

// A group, as find_complete() is told of it.
struct Told {
  std::vector<Ref> params, slots, counters;
  bool counts_on_device;
  explicit Told(PyObject* group) {
    const std::vector<Ref> parts = sequence(group);
    params = sequence(parts.at(0).get());
    slots = sequence(parts.at(1).get());
    counters = sequence(parts.at(2).get());
    counts_on_device = parts.at(3).get() == Py_True;
  }
};

bool is_complete(PyObject* param, PyObject* own, const Told& group) {
  if (group.slots.empty() && group.counters.empty()) return true;
  if (!is_exact_tensor(param) || !own || !PyDict_CheckExact(own)) return false;
  const c10::TensorImpl* const p = impl_of(param);
  if (!is_memory(p)) return false;
  for (const Ref& key : group.slots)
    if (!is_state(item(own, key.get()).get(), p)) return false;
  // All counters are where the first one is, or where the device counts.
  const Ref first = group.counters.empty() ? Ref() : item(own, group.counters[0].get());
  if (!first || !is_tensor(first.get())) return group.counters.empty();
  const c10::Device home = group.counts_on_device ? p->device() : impl_of(first.get())->device();
  for (const Ref& key : group.counters)
    if (!is_counter(key.get(), item(own, key.get()).get(), home)) return false;
  return true;
}

}  // namespace

std::pair<std::string, bool> find_ordinary(PyObject* params) {
  std::pair<std::string, bool> found;
  std::vector<Extent> extents;
  Kinds kinds;
  for (const Ref& param : sequence(params)) {
    extents.push_back(look(param.get()));
    found.first.push_back(is_empty(extents.back()) ? 0 : kinds.of(impl_of(param.get())));
    if (!found.first.back()) extents.back() = {};
  }
  found.second = are_apart(std::move(extents));
  return found;
}

std::string find_complete(PyObject* groups, PyObject* state) {
  std::unordered_map<PyObject*, Ref> states;  // by parameter: to ask the dict would cost a call of Tensor.__hash__
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) states.emplace(key, Ref(value));
  std::string found;
  for (const Ref& told : sequence(groups)) {
    const Told group(told.get());
    for (const Ref& param : group.params) {
      const auto own = states.find(param.get());
      found.push_back(
          static_cast<char>(is_complete(param.get(), own == states.end() ? nullptr : own->second.get(), group)));
    }
  }
  return found;
}

}  // namespace fastopt
