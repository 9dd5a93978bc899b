// Making the plan: what is recorded of every parameter, and its place in the tables of its device.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "plan.h"
#include "plan_names.h"

namespace fastopt {

bool Plan::build_slots(Entry& entry, PyObject* state, const std::vector<Ref>& slot_keys) {
  if (slot_keys.size() > static_cast<size_t>(max_slots)) throw std::invalid_argument("fastopt: too many state tensors");
  for (const Ref& key : slot_keys) {
    const Ref found(PyDict_GetItemWithError(state, key.get()));
    if (!found) return false;
    PyObject* object = found.get();
    if (!is_tensor(object)) throw std::invalid_argument("fastopt: a state is not a tensor");
    if (entry.wrapped) {
      wrapped_.back().wrappers[entry.slot_count] = object;
      object = within(object).get();  // which holds it
      wrapped_.back().slots[entry.slot_count] = object;
    }
    ++entry.slot_count;
    const c10::TensorImpl *impl = impl_of(object), *p = tensors(entry)->impl;
    Tracked slot = track(object);
    if (!is_plain(impl) || !dtype_of(impl, &slot.dtype) || impl->sizes() != p->sizes() || impl->device() != p->device())
      throw std::invalid_argument("fastopt: a state is not plain memory of its parameter's shape on its device");
    tracked_.push_back(std::move(slot));
  }
  return true;
}

// The counters are all on the CPU or all on the parameter's device; then, or if `on_device`, the device counts. (Where
// the CPU is the device, the setting tells.)
bool Plan::build_counters(Entry& entry, PyObject* state, bool on_device) {
  for (const Ref& key : counter_keys_) {
    PyObject* object = PyDict_GetItemWithError(state, key.get());
    if (!object) return false;
    if (!is_tensor(object)) throw std::invalid_argument("fastopt: a counter is not a tensor");
    const c10::TensorImpl* impl = impl_of(object);
    Tracked counter = track(object);
    const bool here = impl->device().is_cpu();
    if (!is_plain(impl) || impl->numel() != 1 || !(here || impl->device() == tensors(entry)->impl->device()))
      throw std::invalid_argument("fastopt: a counter is not a single number on the CPU or its parameter's device");
    if (entry.counter_count > 0 && here != impl_of(PyDict_GetItem(state, counter_keys_[0].get()))->device().is_cpu())
      throw std::invalid_argument("fastopt: some counters of a parameter are on the CPU and some on its device");
    on_device = on_device || !here;
    switch (impl->dtype().toScalarType()) {
      case c10::ScalarType::Float:
        counter.kind = CounterKind::f32;
        break;
      case c10::ScalarType::Double:
        counter.kind = CounterKind::f64;
        break;
      case c10::ScalarType::Int:
        counter.kind = CounterKind::i32;
        break;
      case c10::ScalarType::Long:
        counter.kind = CounterKind::i64;
        break;
      default:
        throw std::invalid_argument("fastopt: a counter has an unsupported dtype");
    }
    tracked_.push_back(std::move(counter));
    ++entry.counter_count;
  }
  entry.counted = on_device && entry.counter_count > 0;
  return true;
}

// Decides between one flat run of memory and an element walk over strides.
void Plan::lay_out(Entry& entry) {
  const Tracked* const tensor = tensors(entry);
  const c10::TensorImpl* const p = tensor[0].impl;
  bool flat = p->is_non_overlapping_and_dense();
  Dtype states[max_slots];
  for (int k = 1; k <= entry.slot_count; ++k) {
    flat = flat && same_strides(p, tensor[k].impl);
    states[k - 1] = tensor[k].dtype;
  }
  entry.mix = mix_of(tensor[0].dtype, states, entry.slot_count);
  const auto sizes = p->sizes(), strides = p->strides();
  if (entry.rows > 0 && entry.rows != sizes[0]) throw std::invalid_argument("fastopt: rows is not the first dimension");
  const bool rows_contiguous = entry.rows == 0 || entry.rows == 1 || entry.n == 0 || strides[0] == entry.n / entry.rows;
  if (flat && rows_contiguous) return;
  if (sizes.size() > static_cast<size_t>(max_dims)) throw std::invalid_argument("fastopt: too many dimensions");
  layout_with(entry, strides);
}

// The strides of p and its states, made on first need, with those of this step's gradient.
void Plan::layout_with(Entry& entry, c10::IntArrayRef gradient) const {
  if (!entry.layout) {
    const Tracked* const tensor = tensors(entry);
    entry.layout = std::make_unique<Layout>();
    entry.layout->sizes = tensor[0].impl->sizes().vec();
    entry.layout->strides[0] = tensor[0].impl->strides().vec();
    for (int k = 1; k <= entry.slot_count; ++k) entry.layout->strides[1 + k] = tensor[k].impl->strides().vec();
  }
  auto& strides = entry.layout->strides[1];
  if (entry.layout->walk && gradient == c10::IntArrayRef(strides)) return;
  strides.assign(gradient.begin(), gradient.end());
  entry.layout->walk = std::make_unique<Walk>(*entry.layout, 2 + entry.slot_count, entry.rows > 0);
}

void Plan::build_entry(Entry& entry, const Group& group, const States& states, const std::vector<Ref>& slot_keys) {
  entry.first = static_cast<uint32_t>(tracked_.size());
  Tracked own_memory = track(unwrap(entry));
  const c10::TensorImpl* impl = own_memory.impl;
  if (!is_plain(impl) || !dtype_of(impl, &own_memory.dtype))
    throw std::invalid_argument("fastopt: a parameter that the kernels cannot take was planned for them");
  tracked_.push_back(std::move(own_memory));
  entry.n = impl->numel();
  entry.meta = impl->autograd_meta();
  entry.shape = fingerprint(impl->sizes());
  if (slot_keys.empty() && counter_keys_.empty()) {
    entry.has_state = true;
  } else {
    const auto found = states.find(entry.param.get());
    PyObject* const own = found == states.end() ? nullptr : found->second.get();
    const bool counted = kernels_ != Devices::cuda && impl->device().is_cpu() && group.counts_on_device;
    entry.has_state =
        own && PyDict_Check(own) && build_slots(entry, own, slot_keys) && build_counters(entry, own, counted);
  }
  if (!entry.has_state) {
    entry.slot_count = entry.counter_count = 0;
    tracked_.resize(entry.first + 1);
  }
  entry.counted = entry.counted && entry.has_state;
  lay_out(entry);
  entry.device = -1;
  if (impl->device().is_cuda() || kernels_ != Devices::cuda) plan_device(entry);
}

// Enters a parameter into the tables of its device, with the gradient it has now: one of another kind later on, and
// the tables are made again.
void Plan::plan_device(Entry& entry) {
  const Tracked* const memory = tensors(entry);
  const c10::TensorImpl* const p = memory->impl;
  const c10::TensorImpl* const grad = !entry.wrapped         ? grad_of(p)
                                      : wrapped_.back().grad ? impl_of(wrapped_.back().grad.get())
                                                             : nullptr;
  entry.g_dtype = memory->dtype;
  if (grad && is_plain(grad) && is_copied_on_write(storage_of(grad)))
    const_cast<c10::TensorImpl*>(grad)->mutable_data();  // makes the memory its own
  if (grad && is_plain(grad) && grad->sizes() == p->sizes() && dtype_of(grad, &entry.g_dtype)) {
    if (entry.layout || !same_strides(p, grad)) layout_with(entry, grad->strides());
    if (!is_aligned(grad->data())) misaligned_.insert(entry.param.get());
  }
  DeviceEntry planned{};
  DeviceTensor& tensor = planned.tensor;
  tensor.p = memory->data;
  tensor.n = entry.n;
  tensor.row_length = entry.rows > 0 ? entry.n / entry.rows : 0;
  tensor.p_dtype = memory->dtype;
  tensor.g_dtype = entry.g_dtype;
  // Whoever has the kernels looks at every step's addresses.
  entry.aligned = kernels_ != Devices::external && is_aligned(tensor.p) && !misaligned_.count(entry.param.get());
  for (int k = 0; k < entry.slot_count; ++k) {
    tensor.s[k] = memory[1 + k].data;
    tensor.s_dtype[k] = memory[1 + k].dtype;
    entry.aligned = entry.aligned && is_aligned(tensor.s[k]);
  }
  planned.walk = entry.layout ? entry.layout->walk.get() : nullptr;
  planned.slots = entry.slot_count;

  const int index = p->device().is_cuda() ? p->device().index() : 0;
  size_t k = 0;
  while (k < devices_.size() && devices_[k].device() != index) ++k;
  if (k == devices_.size()) {
    const DeviceDriver* driver = kernels_ == Devices::emulated ? emulator()
                                 : kernels_ == Devices::cuda   ? cuda_driver()
                                                               : nullptr;
    if (!driver && kernels_ != Devices::external)
      throw std::invalid_argument("fastopt: this extension was built without the device's kernels");
    devices_.emplace_back(driver, index);
  }
  entry.device = static_cast<int8_t>(k);
  DeviceCounters counters{};
  const bool counts_here = entry.counted && kernels_ != Devices::external;
  if (counts_here) {
    const Tracked* const counter = memory + counters_at(entry);
    counters.step = counter[0].data;
    counters.step_kind = counter[0].kind;
    if (entry.counter_count > 1) {
      counters.carry = counter[1].data;
      counters.carry_kind = counter[1].kind;
    }
  }
  entry.number = static_cast<uint32_t>(devices_[k].add(planned, entry.aligned, counts_here ? &counters : nullptr));
}

void Plan::place_devices() {
  const DeviceMemory memory{
      [this](int device, size_t bytes) {
        blobs_.push_back(Ref::steal(PyObject_CallMethod(memory_.get(), "allocate", "in", device, bytes)));
        return static_cast<char*>(data_of(impl_of(blobs_.back().get())));
      },
      [this](int, char*, const char* from, size_t bytes) {
        Ref::steal(PyObject_CallMethod(memory_.get(), "upload", "OKn", blobs_.back().get(),
                                       reinterpret_cast<unsigned long long>(from), bytes));
      }};
  for (DevicePlan& device : devices_) device.place(memory);
}

void Plan::record_state(PyObject* state) {
  PyObject *key, *value;
  Py_ssize_t at = 0;
  std::unordered_map<PyObject*, PyObject*> states;
  while (PyDict_Next(state, &at, &key, &value)) {
    outer_.emplace_back(key, value);
    states.emplace(key, value);
  }
  state_version_ = version_of(state);
  for (const Entry& entry : entries_) {
    State& own = states_.emplace_back();
    const auto found = entry.native ? states.find(entry.param.get()) : states.end();
    if (found == states.end() || !PyDict_Check(found->second)) continue;
    own.dict = found->second;
    own.version = version_of(own.dict);
    own.first = inner_.size();
    at = 0;
    while (PyDict_Next(own.dict, &at, &key, &value)) inner_.emplace_back(key, value);
    own.count = inner_.size() - own.first;
  }
}

// Whether the states and counters of an entry are those that were recorded to recognise its state by.
bool Plan::was_recorded(const Entry& entry, const Wrapped* wrapped, const State& own) const {
  const auto first = inner_.begin() + static_cast<ptrdiff_t>(own.first),
             last = first + static_cast<ptrdiff_t>(own.count);
  for (int k = 1; k < counters_at(entry) + entry.counter_count; ++k) {
    PyObject* const object = wrapped && k <= entry.slot_count ? wrapped->wrappers[k - 1] : tensors(entry)[k].object;
    if (std::none_of(first, last, [&](const DictItem& item) { return item.value == object; })) return false;
  }
  return true;
}

// What other threads have changed meanwhile leaves the plan unbuilt.
void Plan::build(PyObject* groups, PyObject* state, PyObject* native, PyObject* rows, PyObject* fresh) {
  const Turn turn(*this);
  clear();
  fill(groups, state, native, rows, fresh);
}

void Plan::fill(PyObject* groups, PyObject* state, PyObject* native, PyObject* rows, PyObject* fresh) {
  trim();
  const std::vector<Ref> dicts = sequence(groups), natives = sequence(native), row_counts = sequence(rows),
                         freshes = sequence(fresh);
  if (natives.size() != dicts.size() || row_counts.size() != dicts.size() || freshes.size() != dicts.size()) return;
  States states;
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &value);) states.emplace(key, Ref(value));
  for (size_t i = 0; i < dicts.size(); ++i) {
    Group group;
    record_group(group, dicts[i].get());
    group.params = Ref(PyDict_GetItem(dicts[i].get(), names().params));
    if (!group.params) return;
    group.setting = setting_of(dicts[i].get(), &group.immutable);
    read_symbolic(group);
    group.layout = Ref::steal(PyObject_GetAttr(group.setting.get(), names().layout));
    group.counts_on_device =
        Ref::steal(PyObject_GetAttr(group.setting.get(), names().counts_on_device)).get() == Py_True;
    group.first = entries_.size();
    const std::vector<Ref> slot_keys = sequence(Ref::steal(PyObject_GetAttr(group.setting.get(), names().slots)).get());
    group.slots = static_cast<int>(slot_keys.size());
    const std::vector<Ref> params = sequence(group.params.get());
    const std::vector<Ref> takes = sequence(natives[i].get()), counts = sequence(row_counts[i].get()),
                           news = sequence(freshes[i].get());
    group.count = params.size();
    if (takes.size() != group.count || counts.size() != group.count || news.size() != group.count) return;
    for (size_t k = 0; k < params.size(); ++k) {
      Entry& entry = entries_.emplace_back();
      entry.param = params[k];
      entry.native = takes[k].get() == Py_True;
      entry.fresh = news[k].get() == Py_True;
      entry.rows = PyLong_AsLongLong(counts[k].get());
      if (entry.native) build_entry(entry, group, states, slot_keys);
    }
    outlooks_.push_back({group.first, group.first + group.count, group.params.get()});
    groups_.push_back(std::move(group));
  }

  place_devices();
  record_state(state);
  // From the record on, nothing but this ran.
  built_ = has_groups(groups) && check_objects(0, entries_.size());
  auto wrapped = wrapped_.begin();
  for (size_t k = 0; built_ && k < entries_.size(); ++k)
    if (entries_[k].native) built_ = was_recorded(entries_[k], entries_[k].wrapped ? &*wrapped++ : nullptr, states_[k]);
}

}  // namespace fastopt
