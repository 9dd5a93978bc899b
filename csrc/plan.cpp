#include "plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "plan_names.h"

namespace fastopt {
namespace {

// Tensors that are examined by one thread; from twice as many on, every thread gets its share of them, for torch wakes
// all of its threads or none.
constexpr int64_t examine_alone = 200, examine_grain = 50;
// How many entries ahead cache lines are asked for: what is known by address, then gradients, then their storages; in
// the pass that changes something, what counts its changes, then elements. A look at an entry takes some 28 lines: what
// is asked for much earlier has left the nearest cache, of 512 lines, before it is used.
constexpr size_t far = 12, near = 6, nearer = 3;
constexpr size_t counts_ahead = 8, data_ahead = 2;
constexpr size_t groups_ahead = 8;
constexpr int64_t release_above = 1 << 20;  // elements worth letting other Python threads run meanwhile

// Who has kernels of his own tells by a gradient's address whether there is one. That of an empty one nobody follows.
const void* present_at(const void* gradient) { return gradient ? gradient : reinterpret_cast<const void*>(16); }

// What of `sync` is a group's.
PyObject* asked(PyObject* sync, size_t group) {
  return sync == Py_None ? Py_False : PyList_GET_ITEM(sync, static_cast<Py_ssize_t>(group));
}

}  // namespace

Plan::Plan(PyObject* hyper, PyObject* counters, PyObject* ignored, PyObject* intern, PyObject* memory, Devices kernels)
    : hyper_(sequence(hyper)),
      counter_keys_(sequence(counters)),
      ignored_(sequence(ignored)),
      intern_(intern),
      settings_(Ref::steal(PyDict_New())),
      memory_(memory),
      kernels_(kernels) {
  instruction_set();  // a wish that cannot be met is refused here, before any step
  if (counter_keys_.size() > 2) throw std::invalid_argument("fastopt: at most two counters per parameter");
}

int Plan::traverse(visitproc visit, void* arg) const {
  auto refs = [&](const std::vector<Ref>& list) {
    for (const Ref& ref : list) Py_VISIT(ref.get());
    return 0;
  };
  int found = 0;
  const auto see = [&](PyObject* setting) { found = found || !setting ? found : visit(setting, arg); };
  memo_.visit_settings(see);
  older_.visit_settings(see);
  if (found) return found;
  for (const Entry& entry : entries_) Py_VISIT(entry.param.get());
  for (const Wrapped& wrapped : wrapped_) {
    Py_VISIT(wrapped.spec.get());
    Py_VISIT(wrapped.grad.get());
  }
  Py_VISIT(intern_.get());
  Py_VISIT(memory_.get());
  Py_VISIT(settings_.get());
  for (const DictItem& item : outer_) Py_VISIT(item.key.get());
  for (const DictItem& item : inner_) Py_VISIT(item.key.get());
  for (const Group& group : groups_) {
    Py_VISIT(group.dict.get());
    Py_VISIT(group.params.get());
    Py_VISIT(group.setting.get());
    Py_VISIT(group.layout.get());
    Py_VISIT(group.on_device.get());
    if (int result = refs(group.items)) return result;
  }
  return 0;
}

void Plan::release() {
  wait_until_idle();
  clear();
}

void Plan::clear() {
  built_ = gathered_ = false;
  found_.clear();
  shared_ = false;
  shares_.clear();
  states_.clear();
  tracked_.clear();
  devices_.clear();
  const auto blobs = std::exchange(blobs_, {});
  const auto wrapped = std::exchange(wrapped_, {});
  // Releasing a reference may run arbitrary code that finds this plan again: take everything out first.
  const auto entries = std::exchange(entries_, {});
  const auto memo = std::exchange(memo_, {}), older = std::exchange(older_, {});
  const auto groups = std::exchange(groups_, {});
  const auto outer = std::exchange(outer_, {}), inner = std::exchange(inner_, {});
}

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

void Plan::add_counted(Entry& entry, const Found& found, const DeviceSetting& setting) {
  const bool stepped = found.grad != nullptr;
  devices_[entry.device].set(entry.number, stepped ? found.data : tensors(entry)->data, setting, stepped,
                             entry.slot_count);
}

// Finds the row of a parameter that takes part in this step.
void Plan::activate(Entry& entry, Group& group, Found& found, bool sync) {
  const bool stepped = found.grad != nullptr;
  RowKey key{group.setting.get(), 0, 0, true, sync};
  if (stepped) {
    key.t = found.t;
    key.carry = found.carry;
    key.single = entry.counter_count < 2 || tensors(entry)[counters_at(entry) + 1].kind == CounterKind::f32;
  }
  found.row = row_for(group, key);
  group.used = true;
  const Tracked* const p = tensors(entry);
  if (!stepped) {
    found.flat = !entry.layout;
    found.data = p->data;
    found.dtype = p->dtype;
  }
  if (entry.device >= 0)
    group.device_rows[entry.device] = devices_[entry.device].set(entry.number, found.data, *found.row);
  else if (!found.flat)
    layout_with(entry, (stepped ? found.grad : p->impl)->strides());
}

// Once something does not fit, nothing does until the plan is built again.
Verdict Plan::gather(PyObject* groups, PyObject* state, PyObject* sync) {
  const Verdict verdict = inspect(groups, state, sync);
  gathered_ = verdict == Verdict::ready;
  if (!gathered_) built_ = false;
  return verdict;
}

Verdict Plan::inspect(PyObject* groups, PyObject* state, PyObject* sync) {
  wait_until_idle();
  if (!built_ || !PyList_Check(groups) || !PyDict_Check(state)) return Verdict::rebuild;
  if (static_cast<size_t>(PyList_GET_SIZE(groups)) != groups_.size()) return Verdict::rebuild;
  trim();
  ++looks_;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (i + groups_ahead < groups_.size()) prefetch(groups_[i + groups_ahead]);
    if (!check_group(groups_[i], PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(i)))) return Verdict::rebuild;
  }
  if (!check_state(state)) return Verdict::rebuild;

  found_.resize(entries_.size());
  if (!wrapped_.empty() && !(check_objects(0, entries_.size()) && check_wrapped())) return Verdict::rebuild;

  for (size_t i = 0; i < groups_.size(); ++i) foresee(groups_[i], asked(sync, i) != Py_False);
  // This touches no Python object's reference count, so it may run on several threads at once.
  std::atomic<bool> intact = true, settled = shared_;
  const auto count = static_cast<int64_t>(entries_.size());
  parallel(count, count < 2 * examine_alone ? count : examine_grain, [&](int64_t begin, int64_t end) {
    const auto first = static_cast<size_t>(begin), last = static_cast<size_t>(end);
    if (!check_objects(first, last))
      intact = false;
    else if (!examine(first, last, sync))
      settled = false;
  });
  if (!intact) return Verdict::rebuild;
  if (settled && renew_devices()) return Verdict::ready;

  shared_ = false;
  shares_.clear();
  for (DevicePlan& device : devices_) device.begin_step();
  for (size_t i = 0; i < groups_.size(); ++i)
    if (!decide(groups_[i], asked(sync, i))) return Verdict::rebuild;
  for (Group& group : groups_) group.taken = group.last_row;
  shared_ = true;
  return Verdict::ready;
}

// Tells the devices what rows follow those of the last step.
bool Plan::renew_devices() {
  for (DevicePlan& device : devices_) device.begin_renewal();
  for (Group& group : groups_) {
    if (!group.used) continue;
    group.taken = group.last_row;
    for (size_t k = 0; k < group.device_rows.size(); ++k)
      if (group.device_rows[k] != DevicePlan::no_row && !devices_[k].renew_row(group.device_rows[k], *group.last_row))
        return false;
  }
  return std::all_of(devices_.begin(), devices_.end(), [](const DevicePlan& device) { return device.renewed(); });
}

// Whether all that is to be decided of this parameter is decided: it takes part as it did in the last step, with the
// row that was foreseen.
bool Plan::take_likely(const Entry& entry, Group& group, Found& found, bool sync) {
  if (!entry.native) return !found.active;
  const bool kernels_count = entry.counted && kernels_ != Devices::external;  // by rows of the plan's making
  if (!found.fits || kernels_count || found.active != (found.grad != nullptr)) return false;
  if (!found.grad) return !(sync && entry.has_state);
  if (entry.counted) {
    devices_[entry.device].renew(entry.number, present_at(found.data));
    return true;
  }
  const RowKey& key = group.last_key;
  const bool single = entry.counter_count < 2 || tensors(entry)[counters_at(entry) + 1].kind == CounterKind::f32;
  if (!group.likely || !found.flat || found.t != key.t || found.carry != key.carry || single != key.single)
    return false;
  if (entry.device >= 0) {
    if (found.row != group.taken) return false;
    devices_[entry.device].renew(entry.number, found.data);
  }
  found.row = group.last_row;
  if (std::atomic_ref used(group.used); !used.load(std::memory_order_relaxed))
    used.store(true, std::memory_order_relaxed);
  return true;
}

// What this step does with each parameter of a group.
bool Plan::decide(Group& group, PyObject* asked) {
  const bool synchronise = asked != Py_False;
  std::optional<DeviceSetting> setting;
  group.device_rows.assign(devices_.size(), DevicePlan::no_row);
  for (size_t k = group.first; k < group.first + group.count; ++k) {
    Entry& entry = entries_[k];
    Found& found = found_[k];
    if (entry.native && !found.fits) return false;
    found.active = entry.native && (found.grad || (synchronise && entry.has_state));
    if (found.active && !entry.has_state) return false;
    shares_.add(found.active && entry.device < 0 ? entry.n : 0);
    found.row = nullptr;
    if (!found.active) continue;
    if (!entry.counted) {
      if (PyTuple_Check(asked)) throw std::invalid_argument("fastopt: a group counts on a device, its state does not");
      activate(entry, group, found, synchronise);
      continue;
    }
    if (kernels_ == Devices::external) {  // so are the rows somebody else's
      if (found.grad) devices_[entry.device].renew(entry.number, present_at(found.data));
      continue;
    }
    if (!setting) setting = device_setting(group, asked);
    add_counted(entry, found, *setting);
  }
  return true;
}

// A tensor is spread over half a dozen cache lines that nothing else keeps warm. Their addresses are known from the
// last step, except a gradient's, so each is asked for some entries ahead of its use.
bool Plan::examine(size_t begin, size_t end, PyObject* sync) {
  bool settled = true;
  size_t at = 0;
  for (size_t k = begin; k < std::min(begin + far, end); ++k) prefetch(entries_[k]);
  for (size_t k = begin; k < std::min(begin + near, end); ++k) found_[k].grad = find_grad(entries_[k]);
  for (size_t k = begin; k < end; ++k) {
    if (k + far < end) prefetch(entries_[k + far]);
    if (k + near < end) found_[k + near].grad = find_grad(entries_[k + near]);
    if (k + nearer < end && found_[k + nearer].grad)
      prefetch_storage(found_[k + nearer].grad->unsafe_storage().unsafeGetStorageImpl());
    while (k >= groups_[at].first + groups_[at].count) ++at;
    look(entries_[k], found_[k]);
    settled = take_likely(entries_[k], groups_[at], found_[k], asked(sync, at) != Py_False) && settled;
  }
  return settled;
}

void Plan::look(const Entry& entry, Found& found) const {
  if (!entry.native) return;
  found.fits = check_tensors(entry) && (!found.grad || check_grad(entry, found));
  if (!found.fits || !found.grad || entry.counted) return;
  // A rule without a counter knows its first step by the state that was just created for it.
  const Tracked* const counter = tensors(entry) + counters_at(entry);
  found.t = entry.counter_count > 0 ? read_counter(counter[0].data, counter[0].kind) + 1 : entry.fresh ? 1 : 2;
  found.carry = entry.counter_count > 1 ? read_counter(counter[1].data, counter[1].kind) : 0;
}

bool Plan::check_grad(const Entry& entry, Found& found) const {
  const c10::TensorImpl *p = tensors(entry)->impl, *grad = found.grad;
  if (!is_plain(grad) || !dtype_of(grad, &found.dtype) || grad->sizes() != p->sizes()) return false;
  if (entry.device >= 0 && !fits_table(entry, found)) return false;
  found.flat = !entry.layout && ((tensors(entry)->contiguous && grad->is_contiguous()) || same_strides(p, grad));
  found.data = grad->data();
  return found.data || entry.n == 0;  // a released storage has no address
}

// Whether a gradient is of the kind that a device's table says it is.
bool Plan::fits_table(const Entry& entry, const Found& found) const {
  const c10::TensorImpl *p = tensors(entry)->impl, *grad = found.grad;
  if (found.dtype != entry.g_dtype || grad->device() != p->device()) return false;
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
    prefetch_address(tensor[k].storage);
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
  item.layout = found.flat ? nullptr : entry.layout.get();
  return item;
}

namespace {

// Lets other Python threads run, and marks the plan as busy, for a scope.
class Unlocked {
 public:
  explicit Unlocked(bool& busy) : busy_(busy), thread_((busy = true, PyEval_SaveThread())) {}
  ~Unlocked() {
    PyEval_RestoreThread(thread_);
    busy_ = false;
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  bool& busy_;
  PyThreadState* thread_;
};

}  // namespace

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
    for (size_t d = 0; layout && d < layout->sizes.size(); ++d)
      if (layout->sizes[d] > 1 && layout->strides[1][d] == 0)
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
void Plan::run(bool counts, bool updates) {
  shares_.run(
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
  if (!gathered_) throw std::runtime_error("fastopt: another thread has changed this optimizer during step()");
  gathered_ = false;
  launch_kernels(steps);
  kept_.clear();
  for (Wrapped& wrapped : wrapped_) wrapped.grad = {};
}

void Plan::launch_kernels(const std::vector<DeviceStep>& steps) {
  if (steps.size() != devices_.size()) throw std::invalid_argument("fastopt: launch() wants a step for each device");
  if (std::any_of(steps.begin(), steps.end(), [](const DeviceStep& step) { return step.grad_scale; }))
    check_unscaling();
  // The devices first: they work while the host counts. (If a launch fails, none of this step was counted.)
  for (size_t k = 0; k < devices_.size(); ++k)
    devices_[k].launch(steps[k].stream, steps[k].found_inf, steps[k].grad_scale);
  if (shares_.elements() < release_above) return run(true, true);
  run(true, false);
  keep();  // another thread may drop gradients and states while the kernels use them
  const Unlocked unlocked(running_);
  run(false, true);
}

void Plan::keep() {
  const auto keep_one = [this](const c10::TensorImpl* impl) {
    kept_.push_back(decltype(kept_)::value_type::reclaim_copy(const_cast<c10::TensorImpl*>(impl)));
  };
  kept_.clear();
  for (size_t k = 0; k < entries_.size(); ++k) {
    if (!found_[k].active) continue;
    if (found_[k].grad) keep_one(found_[k].grad);
    const Tracked* const tensor = tensors(entries_[k]);
    const int count = counters_at(entries_[k]) + entries_[k].counter_count;
    for (int i = 0; i < count; ++i) keep_one(tensor[i].impl);
  }
}

// A step of this optimizer in another thread, which has released the interpreter lock, is let finish. Who waits for
// that gets the lock while the step runs, and not in the moment between two: so a thread that comes back leaves it a
// turn.
void Plan::wait_until_idle() {
  const auto pause = [] {
    PyThreadState* const thread = PyEval_SaveThread();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    PyEval_RestoreThread(thread);
  };
  for (int turns = 0; waiting_ > 0 && !running_ && turns < 20; ++turns) pause();
  ++waiting_;
  while (running_) pause();
  --waiting_;
}

bool Plan::step(PyObject* optimizer, const std::vector<DeviceStep>& steps) {
  if (steps.size() != devices_.size()) return false;
  for (PyObject* name : names().called) {
    PyObject* const hooks = PyDict_GetItemWithError(optimizer, name);
    if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) > 0) return false;
  }
  for (PyObject* name : names().given)
    if (PyDict_GetItemWithError(optimizer, name)) return false;
  PyObject* const groups = PyDict_GetItemWithError(optimizer, names().param_groups);
  PyObject* const state = PyDict_GetItemWithError(optimizer, names().state);
  if (!groups || !state || gather(groups, state, Py_None) != Verdict::ready) return false;
  launch(steps);
  return true;
}

}  // namespace fastopt
