#include "plan.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>

#include "plan_names.h"

namespace fastopt {
namespace {

constexpr size_t most_settings = 512;   // remembered before they are looked up afresh
constexpr int64_t examine_grain = 200;  // tensors worth a thread of their own
constexpr size_t far = 32, near = 16;   // how many entries ahead cache lines are asked for: addresses, then contents
constexpr int64_t release_above = 1 << 20;  // elements worth letting other Python threads run meanwhile

}  // namespace

double Plan::read(const Counter& counter) { return read_counter(counter.memory.data, counter.kind); }

void Plan::write(const Counter& counter, double value) { write_counter(counter.memory.data, counter.kind, value); }

Plan::Plan(PyObject* hyper, PyObject* counters, PyObject* ignored, PyObject* intern, PyObject* memory, bool emulate)
    : hyper_(sequence(hyper)),
      counter_keys_(sequence(counters)),
      ignored_(sequence(ignored)),
      intern_(intern),
      settings_(Ref::steal(PyDict_New())),
      memory_(memory),
      emulate_(emulate) {
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
    Py_VISIT(wrapped.local.get());
    Py_VISIT(wrapped.spec.get());
    Py_VISIT(wrapped.grad.get());
    for (const Ref& slot : wrapped.slots) Py_VISIT(slot.get());
    for (const Ref& wrapper : wrapped.wrappers) Py_VISIT(wrapper.get());
  }
  Py_VISIT(intern_.get());
  Py_VISIT(memory_.get());
  Py_VISIT(settings_.get());
  if (int result = refs(outer_)) return result;
  if (int result = refs(inner_)) return result;
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

void Plan::clear() {
  built_ = false;
  items_.clear();
  active_.clear();
  states_.clear();
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
  if (!unchanged(entry.object, entry.memory) || fingerprint(entry.memory.impl->sizes()) != entry.shape) return false;
  for (int k = 0; k < entry.slot_count; ++k) {
    const Slot& slot = entry.slots[k];
    if (!unchanged(slot.object, slot.memory) || slot.memory.impl->numel() != entry.n) return false;
  }
  for (int k = 0; k < entry.counter_count; ++k)
    if (!unchanged(entry.counters[k].object, entry.counters[k].memory)) return false;
  return (entry.memory.contiguous && !entry.layout) || check_strides(entry);
}

// Strides may change where neither address nor size does.
bool Plan::check_strides(const Entry& entry) const {
  const c10::TensorImpl* p = entry.memory.impl;
  if (!entry.layout) {
    for (int k = 0; k < entry.slot_count; ++k)
      if (!same_strides(p, entry.slots[k].memory.impl)) return false;
    return p->is_non_overlapping_and_dense();
  }
  if (p->sizes() != c10::IntArrayRef(entry.layout->sizes)) return false;
  if (p->strides() != c10::IntArrayRef(entry.layout->strides[0])) return false;
  for (int k = 0; k < entry.slot_count; ++k)
    if (entry.slots[k].memory.impl->strides() != c10::IntArrayRef(entry.layout->strides[2 + k])) return false;
  return true;
}

// What the kernel that makes rows needs to know of a group's setting.
void Plan::read_row_setting(Group& group) {
  Ref result = Ref::steal(PyObject_CallMethodNoArgs(group.setting.get(), names().on_device));
  if (result.get() == Py_None)
    throw std::invalid_argument("fastopt: this optimizer has no coefficient rows on a device: see csrc/rows.h");
  RowSetting row;
  std::memset(&row, 0, sizeof row);  // padding too: settings are compared as bytes
  int rule, decay, maximize, slow;
  PyObject *hyper, *chains;
  if (!PyArg_ParseTuple(result.get(), "iippdddO!O!", &rule, &decay, &maximize, &slow, &row.weight_decay, &row.alpha,
                        &row.period, &PyTuple_Type, &hyper, &PyTuple_Type, &chains))
    throw PythonError{};
  row.rule = static_cast<int8_t>(rule);
  row.decay = static_cast<Decay>(decay);
  row.maximize = maximize;
  row.slow = slow;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(hyper) && i < max_hyper; ++i) {
    PyObject* value = PyTuple_GET_ITEM(hyper, i);
    if (!is_tensor(value)) {
      row.hyper[i].value = PyFloat_AsDouble(value);
      if (row.hyper[i].value == -1.0 && PyErr_Occurred()) throw PythonError{};
      continue;
    }
    Dtype dtype;
    if (!dtype_of(impl_of(value), &dtype) || size_of(dtype) < 4)
      throw std::invalid_argument("fastopt: a hyper-parameter on a device must be float32 or float64");
    row.sources[i] = dtype == Dtype::f64 ? Source::f64 : Source::f32;
    row.hyper[i].f64 = static_cast<const double*>(data_of(impl_of(value)));
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(chains) && i < ways; ++i)
    row.chains[i] = static_cast<int16_t>(PyLong_AsLong(PyTuple_GET_ITEM(chains, i)));
  group.row_setting = row;
  group.on_device = std::move(result);
}

DeviceSetting Plan::device_setting(Group& group, PyObject* sync) {
  if (!group.on_device) read_row_setting(group);
  DeviceSetting setting;
  std::memset(&setting, 0, sizeof setting);
  std::memcpy(&setting.setting, &group.row_setting, sizeof setting.setting);
  if (PyTuple_Check(sync)) {
    setting.group_step = static_cast<const float*>(data_of(impl_of(PyTuple_GET_ITEM(sync, 0))));
    setting.group_period = PyFloat_AsDouble(PyTuple_GET_ITEM(sync, 1));
  }
  setting.asked = sync == Py_True;
  return setting;
}

void Plan::add_counted(Entry& entry, const Found& found, const DeviceSetting& setting) {
  const bool stepped = found.grad != nullptr;
  devices_[entry.device].set(entry.number, stepped ? found.data : entry.memory.data, setting, stepped,
                             entry.slot_count);
  active_.push_back({&entry, nullptr, stepped});
}

// Keeps the memos bounded: rows of past steps, and settings under a scheduler that never repeats a value.
void Plan::trim() {
  const bool settings_full = static_cast<size_t>(PyDict_GET_SIZE(settings_.get())) > most_settings;
  if (settings_full) PyDict_Clear(settings_.get());
  if (memo_.size() < Memo::usual) return;
  std::swap(memo_, older_);
  memo_.clear();
  for (Group& group : groups_) group.last_row = nullptr;
}

const Row* Plan::row_for(Group& group, const RowKey& key) {
  if (group.last_row && group.last_key == key) return group.last_row;
  const Row* row = memo_.find(key);
  if (!row) row = older_.find(key);
  if (!row) {
    Row fresh{};
    compute_row(key, fresh);  // may raise, and then leaves nothing behind
    Row& kept = memo_.insert(key);
    kept = std::move(fresh);
    row = &kept;
  }
  group.last_key = key;
  group.last_row = row;
  return row;
}

void Plan::add_item(Entry& entry, Group& group, const Found& found, bool sync) {
  const bool stepped = found.grad != nullptr;
  RowKey key{group.setting.get(), 0, 0, true, sync};
  if (stepped) {
    key.t = found.t;
    key.carry = found.carry;
    key.single = entry.counter_count < 2 || entry.counters[1].kind == CounterKind::f32;
  }
  const Row* row = row_for(group, key);
  active_.push_back({&entry, row, stepped});
  if (entry.device >= 0) {
    devices_[entry.device].set(entry.number, stepped ? found.data : entry.memory.data, *row);
    return;
  }
  const bool flat = stepped ? found.flat : !entry.layout;
  Item& item = items_.emplace_back();
  item.p = entry.memory.data;
  item.g = stepped ? found.data : entry.memory.data;
  item.wide = entry.dtype == Dtype::f64;
  item.row = item.wide ? static_cast<const void*>(row->f64) : row->f32;
  item.n = entry.n;
  item.rows = stepped ? entry.rows : 0;
  item.chain = row->chain;
  item.slots = row->slots;
  item.first_slot = row->first_slot;
  item.p_dtype = entry.dtype;
  item.g_dtype = stepped ? found.dtype : entry.dtype;
  for (int k = 0; k < row->slots; ++k) {
    item.s[k] = entry.slots[row->first_slot + k].memory.data;
    item.s_dtype[k] = entry.slots[row->first_slot + k].dtype;
  }
  item.layout = flat ? nullptr : layout_with(entry, stepped ? found.grad->strides() : entry.memory.impl->strides());
  item.direct = flat && entry.one_dtype && item.g_dtype == entry.dtype;
  total_ += entry.n;
}

Verdict Plan::gather(PyObject* groups, PyObject* state, PyObject* sync) {
  if (running_) throw std::runtime_error("fastopt: this optimizer is inside step() in another thread");
  items_.clear();
  active_.clear();
  total_ = 0;
  if (!built_ || !PyList_Check(groups) || !PyDict_Check(state)) return Verdict::rebuild;
  if (static_cast<size_t>(PyList_GET_SIZE(groups)) != groups_.size()) return Verdict::rebuild;
  trim();
  for (DevicePlan& device : devices_) device.begin_step();
  for (size_t i = 0; i < groups_.size(); ++i)
    if (!check_group(groups_[i], PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(i)))) return Verdict::rebuild;
  if (!check_state(state)) return Verdict::rebuild;

  found_.resize(entries_.size());
  if (!check_wrapped()) return Verdict::rebuild;

  // This touches no Python object's reference count, so it may run on several threads at once.
  parallel(static_cast<int64_t>(entries_.size()), examine_grain,
           [this](int64_t begin, int64_t end) { examine(static_cast<size_t>(begin), static_cast<size_t>(end)); });

  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    PyObject* const asked = sync == Py_None ? Py_False : PyList_GET_ITEM(sync, static_cast<Py_ssize_t>(i));
    const bool synchronise = asked != Py_False;
    std::optional<DeviceSetting> setting;
    for (size_t k = group.first; k < group.first + group.count; ++k) {
      Entry& entry = entries_[k];
      const Found& found = found_[k];
      if (!entry.native) continue;
      if (!found.fits) return Verdict::rebuild;
      if (!found.grad && !(synchronise && entry.has_state)) continue;
      if (!entry.has_state) return Verdict::rebuild;
      if (!entry.counted) {
        if (PyTuple_Check(asked))
          throw std::invalid_argument("fastopt: a group counts on a device, its state does not");
        add_item(entry, group, found, synchronise);
        continue;
      }
      if (!setting) setting = device_setting(group, asked);
      add_counted(entry, found, *setting);
    }
  }
  return Verdict::ready;
}

// A tensor is spread over half a dozen cache lines that nothing else keeps warm. Their addresses are known from the
// last step, except a gradient's, so each is asked for some entries ahead of its use.
void Plan::examine(size_t begin, size_t end) {
  for (size_t k = begin; k < std::min(begin + far, end); ++k) prefetch(entries_[k]);
  for (size_t k = begin; k < std::min(begin + near, end); ++k) found_[k].grad = find_grad(entries_[k]);
  for (size_t k = begin; k < end; ++k) {
    if (k + far < end) prefetch(entries_[k + far]);
    if (k + near < end) found_[k + near].grad = find_grad(entries_[k + near]);
    const Entry& entry = entries_[k];
    Found& found = found_[k];
    if (!entry.native) continue;
    found.fits = check_tensors(entry) && (!found.grad || check_grad(entry, found));
    if (!found.fits || !found.grad) continue;
    // A rule without a counter knows its first step by the state that was just created for it.
    if (entry.counted) continue;
    found.t = entry.counter_count > 0 ? read(entry.counters[0]) + 1 : entry.fresh ? 1 : 2;
    found.carry = entry.counter_count > 1 ? read(entry.counters[1]) : 0;
  }
}

bool Plan::check_grad(const Entry& entry, Found& found) {
  const c10::TensorImpl *p = entry.memory.impl, *grad = found.grad;
  if (!is_plain(grad) || !dtype_of(grad, &found.dtype) || grad->sizes() != p->sizes()) return false;
  if (entry.device >= 0 && !fits_table(entry, found)) return false;
  found.flat = !entry.layout && ((entry.memory.contiguous && grad->is_contiguous()) || same_strides(p, grad));
  found.data = grad->data();
  return found.data || entry.n == 0;  // a released storage has no address
}

// Whether a gradient is of the kind that a device's table says it is.
bool Plan::fits_table(const Entry& entry, const Found& found) {
  const c10::TensorImpl *p = entry.memory.impl, *grad = found.grad;
  if (found.dtype != entry.g_dtype || grad->device() != p->device()) return false;
  if (entry.aligned && !is_aligned(grad->data())) return false;
  if (entry.layout) return grad->strides() == c10::IntArrayRef(entry.layout->strides[1]);
  return (entry.memory.contiguous && grad->is_contiguous()) || same_strides(p, grad);
}

void Plan::prefetch(const Entry& entry) {
  if (!entry.native) return;
  const auto touch = [](PyObject* object, const TensorMemory& memory) {
    __builtin_prefetch(reinterpret_cast<const char*>(object) + 16);
    __builtin_prefetch(memory.impl);
    __builtin_prefetch(reinterpret_cast<const char*>(memory.impl) + sizeof(c10::TensorImpl) - 1);
    __builtin_prefetch(memory.storage);
    __builtin_prefetch(memory.version, 1);
  };
  touch(entry.object, entry.memory);
  __builtin_prefetch(reinterpret_cast<const char*>(entry.memory.impl) + 64);
  __builtin_prefetch(entry.meta);
  for (int k = 0; k < entry.slot_count; ++k) touch(entry.slots[k].object, entry.slots[k].memory);
  for (int k = 0; k < entry.counter_count; ++k) {
    touch(entry.counters[k].object, entry.counters[k].memory);
    __builtin_prefetch(entry.counters[k].memory.data, 1);
  }
}

const c10::TensorImpl* Plan::find_grad(const Entry& entry) const {
  if (!entry.native) return nullptr;
  if (entry.wrapped) return found_[static_cast<size_t>(&entry - entries_.data())].grad;  // check_wrapped found it
  const c10::TensorImpl* grad = grad_of(impl_of(entry.object));
  if (grad) {
    __builtin_prefetch(grad);
    __builtin_prefetch(reinterpret_cast<const char*>(grad) + 64);
    __builtin_prefetch(reinterpret_cast<const char*>(grad) + sizeof(c10::TensorImpl) - 1);
  }
  return grad;
}

void Plan::commit(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const Active& active = active_[i];
    Entry& entry = *active.entry;
    if (active.stepped) {
      if (entry.counter_count > 0 && !entry.counted) write(entry.counters[0], read(entry.counters[0]) + 1);
      if (entry.counter_count > 1 && !entry.counted) write(entry.counters[1], active.row->carry);
      entry.fresh = false;
    }
    bump(entry.memory.impl);
    if (entry.wrapped) bump(impl_of(entry.param.get()));
    const int first = active.row ? active.row->first_slot : 0;
    const int slots = active.row ? active.row->slots : entry.slot_count;
    for (int k = first; k < first + slots; ++k) bump(entry.slots[k].memory.impl);
  }
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

int Plan::device_launches() const {
  int launches = 0;
  for (const DevicePlan& device : devices_) launches += device.launches();
  return launches;
}

// Kernels write the unscaled gradient back: each of its elements must be there once.
void Plan::check_unscaling() const {
  for (const Active& active : active_) {
    const Layout* layout = active.stepped && active.entry->device >= 0 ? active.entry->layout.get() : nullptr;
    for (size_t d = 0; layout && d < layout->sizes.size(); ++d)
      if (layout->sizes[d] > 1 && layout->strides[1][d] == 0)
        throw std::runtime_error(
            "a scaled gradient whose elements share memory cannot be unscaled in place: give p.grad memory of its own");
  }
}

void Plan::launch(const std::vector<DeviceStep>& steps) {
  if (steps.size() != devices_.size()) throw std::invalid_argument("fastopt: launch() wants a step for each device");
  if (std::any_of(steps.begin(), steps.end(), [](const DeviceStep& step) { return step.grad_scale; }))
    check_unscaling();
  parallel(static_cast<int64_t>(active_.size()), examine_grain,
           [this](int64_t begin, int64_t end) { commit(static_cast<size_t>(begin), static_cast<size_t>(end)); });
  for (size_t k = 0; k < devices_.size(); ++k)
    devices_[k].launch(steps[k].stream, steps[k].found_inf, steps[k].grad_scale);
  if (total_ < release_above) {
    driver_.run(items_);
    return;
  }
  // Another thread may drop a gradient while the kernels read it, so hold them all.
  for (const Active& active : active_)
    if (active.stepped && active.entry->device < 0)
      kept_.push_back(active.entry->memory.impl->autograd_meta()->grad().getIntrusivePtr());
  {
    const Unlocked unlocked(running_);
    driver_.run(items_);
  }
  kept_.clear();
}

}  // namespace fastopt
