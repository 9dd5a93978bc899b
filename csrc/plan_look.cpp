// How the Plan looks at a parameter in every step: what is known of it must still be so, and its gradient is new.
// Neither a tensor nor a reference count is changed here, so several threads may look at once.
#include <algorithm>

#include "plan.h"

namespace fastopt {
namespace {

// How many entries ahead cache lines are asked for: what is known by address, then gradients, then their storages. A
// look at an entry takes some 28 lines: what is asked for much earlier has left the nearest cache, of 512 lines, before
// it is used.
constexpr size_t far = 12, near = 6, nearer = 3;

}  // namespace

// Whether the memory behind p, its states and its counters is still the memory the plan recorded.
bool Plan::check_tensors(const Entry& entry) const {
  const Tracked* const tensor = tensors(entry);
  if (!unchanged(tensor[0]) || fingerprint(tensor[0].impl->sizes()) != entry.shape) return false;
  for (int k = 1; k <= entry.slot_count; ++k)
    if (!unchanged(tensor[k]) || tensor[k].impl->numel() != entry.n) return false;
  for (int k = 0; k < entry.counter_count; ++k)
    if (!unchanged(tensor[counters_at(entry) + k])) return false;
  return (tensor[0].contiguous && !entry.layout) || check_strides(entry);
}

// Strides may change where neither address nor size does.
bool Plan::check_strides(const Entry& entry) const {
  const Tracked* const tensor = tensors(entry);
  const c10::TensorImpl* const p = tensor[0].impl;
  if (!entry.layout) {
    for (int k = 1; k <= entry.slot_count; ++k)
      if (!same_strides(p, tensor[k].impl)) return false;
    return p->is_non_overlapping_and_dense();
  }
  if (p->sizes() != c10::IntArrayRef(entry.layout->sizes)) return false;
  if (p->strides() != c10::IntArrayRef(entry.layout->strides[0])) return false;
  for (int k = 1; k <= entry.slot_count; ++k)
    if (tensor[k].impl->strides() != c10::IntArrayRef(entry.layout->strides[1 + k])) return false;
  return true;
}

// Whether all that is to be decided of this parameter is decided: it takes part as it did in the last step, with the
// row that was foreseen.
bool Plan::take_likely(const Entry& entry, const Outlook& outlook, Found& found) {
  if (!entry.native) return !found.active;
  const bool kernels_count = entry.counted && kernels_ != Devices::external;  // by rows of the plan's making
  if (!found.fits || kernels_count || found.active != (found.grad != nullptr)) return false;
  if (!found.grad) return !(outlook.sync && entry.has_state);
  if (entry.counted) {
    devices_[entry.device].renew(entry.number, present_at(found.data));
    return true;
  }
  const bool single = entry.counter_count < 2 || tensors(entry)[counters_at(entry) + 1].kind == CounterKind::f32;
  if (!outlook.likely || !found.flat || found.t != outlook.t || found.carry != outlook.carry ||
      single != outlook.single)
    return false;
  if (entry.device >= 0) {
    if (found.row != outlook.taken) return false;
    devices_[entry.device].renew(entry.number, found.data);
  }
  found.row = outlook.row;
  return true;
}

// A tensor is spread over half a dozen cache lines that nothing else keeps warm. Their addresses are known from the
// last step, except a gradient's, so each is asked for some entries ahead of its use.
bool Plan::examine(size_t begin, size_t end) {
  bool settled = true;
  auto outlook = outlook_of(begin);
  for (size_t k = begin; k < std::min(begin + far, end); ++k) prefetch(entries_[k]);
  for (size_t k = begin; k < std::min(begin + near, end); ++k) found_[k].grad = find_grad(entries_[k]);
  for (size_t k = begin; k < end; ++k) {
    if (k + far < end) prefetch(entries_[k + far]);
    if (k + near < end) found_[k + near].grad = find_grad(entries_[k + near]);
    if (k + nearer < end && found_[k + nearer].grad) prefetch_storage(storage_of(found_[k + nearer].grad));
    while (k >= outlook->end) ++outlook;
    look(entries_[k], found_[k]);
    settled = take_likely(entries_[k], *outlook, found_[k]) && settled;
  }
  return settled;
}

// Of the group of an entry. The groups before are left alone: there may be hundreds, each a line of the cache.
std::vector<Plan::Outlook>::const_iterator Plan::outlook_of(size_t entry) const {
  return std::partition_point(outlooks_.begin(), outlooks_.end(),
                              [&](const Outlook& other) { return other.end <= entry; });
}

void Plan::look(const Entry& entry, Found& found) const {
  if (!entry.native) return;
  found.fits = check_tensors(entry) && (!found.grad || check_grad(entry, found));
  if (!found.fits || !found.grad || entry.counted) return;
  // A rule without a counter knows its first step by the state that was just created for it.
  const Tracked* const counter = tensors(entry) + counters_at(entry);
  found.t = entry.counter_count > 0 ? next_count(counter[0].data, counter[0].kind) : entry.fresh ? 1 : 2;
  found.carry = entry.counter_count > 1 ? read_counter(counter[1].data, counter[1].kind) : 0;
}

bool Plan::check_grad(const Entry& entry, Found& found) const {
  const c10::TensorImpl *p = tensors(entry)->impl, *grad = found.grad;
  if (!is_plain(grad) || !dtype_of(grad, &found.dtype) || grad->sizes() != p->sizes()) return false;
  if (grad->device() != p->device()) return false;
  if (entry.device >= 0 && !fits_table(entry, found)) return false;
  found.flat = !entry.layout && ((tensors(entry)->contiguous && grad->is_contiguous()) || same_strides(p, grad));
  found.data = grad->data();
  return found.data || entry.n == 0;  // a released storage has no address
}

// Whether a gradient is of the kind that a device's table says it is.
bool Plan::fits_table(const Entry& entry, const Found& found) const {
  const c10::TensorImpl *p = tensors(entry)->impl, *grad = found.grad;
  if (found.dtype != entry.g_dtype) return false;
  if (is_copied_on_write(storage_of(grad))) return false;  // unscaled where it lies
  if (entry.aligned && !is_aligned(grad->data())) return false;
  if (entry.layout) return grad->strides() == c10::IntArrayRef(entry.layout->strides[1]);
  return (tensors(entry)->contiguous && grad->is_contiguous()) || same_strides(p, grad);
}

void Plan::prefetch(const Entry& entry) const {
  if (!entry.native) return;
  const Tracked* const tensor = tensors(entry);
  const int counters = counters_at(entry);
  for (int k = 0; k < counters + entry.counter_count; ++k) {
    prefetch_object(tensor[k].object);
    prefetch_tensor(tensor[k].impl);
    prefetch_storage(tensor[k].storage);
    if (k >= counters) __builtin_prefetch(tensor[k].data, 1);
  }
  prefetch_sizes(tensor[0].impl);
  prefetch_meta(entry.meta);
}

// What check_group() reads, with the list's length.
void Plan::prefetch(const Group& group) const {
  prefetch_object(group.dict.get());
  prefetch_object(group.params.get());
}

const c10::TensorImpl* Plan::find_grad(const Entry& entry) const {
  if (!entry.native) return nullptr;
  if (entry.wrapped) return found_[static_cast<size_t>(&entry - entries_.data())].grad;  // check_wrapped found it
  const c10::TensorImpl* grad = grad_of(impl_of(tensors(entry)->object));
  if (grad) {
    prefetch_tensor(grad);
    prefetch_sizes(grad);
  }
  return grad;
}

}  // namespace fastopt
