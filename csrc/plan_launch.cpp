// How the Plan does what a look has found to be done: it starts the devices, advances the counters, and runs the host's
// kernels.
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "plan.h"

namespace fastopt {
namespace {

// How many entries ahead cache lines are asked for: of what counts changes, then of elements.
constexpr size_t counts_ahead = 8, data_ahead = 2;
constexpr int64_t release_above = 1 << 20;  // elements worth letting other Python threads run meanwhile

// As fastopt/routing.py: overlaps_itself.
bool may_overlap(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;
  for (const auto& [stride, n] : dims) {
    if (stride < reach) return true;
    reach += stride * (n - 1);
  }
  return false;
}

// Lets other Python threads run for a scope.
class Unlocked {
 public:
  Unlocked() : thread_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(thread_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* thread_;
};

}  // namespace

// What commit() writes. Of many tensors, what they were examined by is gone from the nearer caches by then.
void Plan::prefetch_counts(size_t k) const {
  const Entry& entry = entries_[k];
  if (!found_[k].active) return;
  const Tracked* const tensor = tensors(entry);
  const int counters = counters_at(entry);
  for (int i = 0; i < counters; ++i) prefetch_count(tensor[i].version);
  for (int i = counters; !entry.counted && i < counters + entry.counter_count; ++i)
    __builtin_prefetch(tensor[i].data, 1);
}

void Plan::commit(Entry& entry, const Found& found) {
  Tracked* const tensor = tensors(entry);
  if (found.grad) {
    const Tracked* const counter = tensor + counters_at(entry);
    if (entry.counter_count > 0 && !entry.counted) write_counter(counter[0].data, counter[0].kind, found.t);
    if (entry.counter_count > 1 && !entry.counted) write_counter(counter[1].data, counter[1].kind, found.row->carry);
    entry.fresh = false;
  }
  bump(tensor[0].version);
  if (entry.wrapped) {
    c10::VariableVersion version = impl_of(entry.param.get())->version_counter();
    bump(version);
  }
  const int first = found.row ? found.row->first_slot : 0;
  const int slots = found.row ? found.row->slots : entry.slot_count;
  for (int k = first; k < first + slots; ++k) bump(tensor[1 + k].version);
}

Item Plan::item(const Entry& entry, const Found& found) const {
  const Tracked* const tensor = tensors(entry);
  const Row& row = *found.row;
  Item item;
  item.p = tensor[0].data;
  item.g = found.data;
  const bool named = found.flat && found.dtype == tensor[0].dtype;
  item.mix = named ? entry.mix : any_mix(tensor[0].dtype);
  item.row = is_wide(item.mix) ? static_cast<const void*>(row.f64) : row.f32;
  item.n = entry.n;
  item.rows = found.grad ? entry.rows : 0;
  item.chain = row.chain;
  item.slots = row.slots;
  item.first_slot = row.first_slot;
  item.p_dtype = tensor[0].dtype;
  item.g_dtype = found.dtype;
  for (int k = 0; k < row.slots; ++k) {
    item.s[k] = tensor[1 + row.first_slot + k].data;
    item.s_dtype[k] = tensor[1 + row.first_slot + k].dtype;
  }
  item.walk = found.flat ? nullptr : entry.layout->walk.get();
  return item;
}

std::vector<int> Plan::devices() const {
  std::vector<int> indices;
  for (const DevicePlan& device : devices_) indices.push_back(device.device());
  return indices;
}

DevicePlan& Plan::external(size_t device) {
  if (kernels_ != Devices::external) throw std::logic_error("fastopt: this plan's kernels are its own");
  return devices_.at(device);
}

int Plan::device_launches() const {
  int launches = 0;
  for (const DevicePlan& device : devices_) launches += device.launches();
  return launches;
}

// Kernels write the unscaled gradient back: each of its elements must be there once.
void Plan::check_unscaling() const {
  for (size_t k = 0; k < entries_.size(); ++k) {
    const bool scaled = found_[k].active && found_[k].grad && entries_[k].device >= 0;
    const Layout* layout = scaled ? entries_[k].layout.get() : nullptr;
    if (layout && may_overlap(layout->sizes, layout->strides[1]))
      throw std::runtime_error(
          "a scaled gradient whose elements share memory cannot be unscaled in place: give p.grad memory of its own");
  }
}

// The hardware notices a stream only after some lines, which is all there is of a small tensor.
void Plan::prefetch_data(size_t k) const {
  constexpr int64_t bytes = 256;
  const Entry& entry = entries_[k];
  const auto head = [&](const void* data, Dtype dtype) {
    const int64_t n = std::min(bytes, entry.n * size_of(dtype));
    for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
  };
  if (!found_[k].active || entry.device >= 0) return;
  head(found_[k].data, found_[k].dtype);
  const Tracked* const tensor = tensors(entry);
  head(tensor[0].data, tensor[0].dtype);
  const Row& row = *found_[k].row;
  for (int i = 1 + row.first_slot; i < 1 + row.first_slot + row.slots; ++i) head(tensor[i].data, tensor[i].dtype);
}

// Each thread counts its tensors, then updates them. One by one would be slower: a counter is written atomically, and
// what follows that waits for it.
void Plan::run_kernels(bool counts, bool updates) {
  shares_.run(
      crew_, updates ? Crew::Work::update : Crew::Work::count,
      [=, this](size_t first, size_t last) {
        if (!counts) return;
        for (size_t k = first; k < std::min(first + counts_ahead, last); ++k) prefetch_counts(k);
        for (size_t k = first; k < last; ++k) {
          if (k + counts_ahead < last) prefetch_counts(k + counts_ahead);
          if (found_[k].active) commit(entries_[k], found_[k]);
        }
      },
      [=, this](size_t k, int64_t begin, int64_t end) {
        if (!updates) return;
        if (k + data_ahead < entries_.size()) prefetch_data(k + data_ahead);
        if (found_[k].active) run_item(item(entries_[k], found_[k]), begin, end);
      });
}

void Plan::launch(const std::vector<DeviceStep>& steps) {
  const Turn turn(*this);
  if (!gathered_) throw std::runtime_error("fastopt: another thread has changed this optimizer during step()");
  run_all(steps);
}

void Plan::run_all(const std::vector<DeviceStep>& steps) {
  gathered_ = false;
  launch_kernels(steps);
  kept_.clear();
  for (Wrapped& wrapped : wrapped_) wrapped.grad = {};
}

void Plan::launch_kernels(const std::vector<DeviceStep>& steps) {
  if (steps.size() != devices_.size()) throw std::invalid_argument("fastopt: launch() wants a step for each device");
  if (std::any_of(steps.begin(), steps.end(), [](const DeviceStep& step) { return step.grad_scale; }))
    check_unscaling();
  for (DevicePlan& device : devices_) device.pack();  // what cannot be launched is found before anything is
  // The devices first: they work while the host counts. (If a launch fails, none of this step was counted.)
  for (size_t k = 0; k < devices_.size(); ++k)
    devices_[k].launch(steps[k].stream, steps[k].found_inf, steps[k].grad_scale);
  if (shares_.elements() < release_above) return run_kernels(true, true);
  run_kernels(true, false);
  keep();  // another thread may drop gradients and states while the kernels use them
  const Unlocked unlocked;
  run_kernels(false, true);
}

void Plan::keep() {
  if (!kept_.empty()) return;
  const auto keep_one = [this](const c10::StorageImpl* storage) {
    kept_.push_back(decltype(kept_)::value_type::reclaim_copy(const_cast<c10::StorageImpl*>(storage)));
  };
  for (size_t k = 0; k < entries_.size(); ++k) {
    if (!found_[k].active) continue;
    if (found_[k].grad) keep_one(storage_of(found_[k].grad));
    const Tracked* const tensor = tensors(entries_[k]);
    const int count = counters_at(entries_[k]) + entries_[k].counter_count;
    for (int i = 0; i < count; ++i) keep_one(tensor[i].storage);
  }
}

}  // namespace fastopt
