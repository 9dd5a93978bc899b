#include "plan.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>

namespace fastopt {
namespace {

constexpr size_t most_settings = 512;   // remembered before they are looked up afresh
constexpr int64_t examine_grain = 200;  // tensors worth a thread of their own
constexpr size_t far = 32, near = 16;   // how many entries ahead cache lines are asked for: addresses, then contents
constexpr int64_t release_above = 1 << 20;  // elements worth letting other Python threads run meanwhile

struct Names {
  PyObject *params = interned("params"), *layout = interned("layout"), *slots = interned("slots"),
           *on_device = interned("on_device"), *counts_on_device = interned("counts_on_device");
};
const Names& names() {
  static const Names instance;
  return instance;
}

// A number that changes whenever a dict does, so that an unchanged one need not be walked; 0 where there is none.
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

bool holds(const std::vector<Ref>& refs, PyObject* object) {
  return std::any_of(refs.begin(), refs.end(), [&](const Ref& ref) { return ref.get() == object; });
}

bool is_immutable_number(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (!is_immutable_number(PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) || value == Py_None;
}

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

// Memory that kernels can read: strided, on the CPU or a CUDA device, no subclass that intercepts operations, no
// pending conjugation or negation. The key set decides it all, and most tensors share one.
bool is_plain(const c10::TensorImpl* impl) {
  thread_local c10::DispatchKeySet last;
  const c10::DispatchKeySet keys = impl->key_set();
  if (keys == last) return true;
  if (!(impl->device().is_cpu() || impl->device().is_cuda()) || impl->layout() != c10::Layout::Strided ||
      !impl->has_storage() || keys.has(c10::DispatchKey::Python) || keys.has(c10::DispatchKey::Conjugate) ||
      keys.has(c10::DispatchKey::Negative) || keys.has(c10::DispatchKey::ZeroTensor))
    return false;
  last = keys;
  return true;
}

void* data_of(const c10::TensorImpl* impl) { return const_cast<void*>(impl->data()); }

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

void bump(c10::TensorImpl* impl) {
  if (impl->version_counter().enabled()) impl->bump_version();
}

}  // namespace

const c10::TensorImpl* grad_of(const c10::TensorImpl* impl) {
  const c10::AutogradMetaInterface* meta = impl->autograd_meta();
  if (!meta) return nullptr;
  const at::Tensor& grad = meta->grad();
  return grad.defined() ? grad.unsafeGetTensorImpl() : nullptr;
}

Plan::Memory Plan::memory_of(PyObject* tensor) {
  c10::TensorImpl* impl = impl_of(tensor);
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  // The counter itself is private; only a prefetch takes its address, and any address will do for that.
  const void* version;
  std::memcpy(&version, static_cast<const void*>(&impl->version_counter()), sizeof version);
  return {impl,
          storage,
          version,
          storage->data(),
          impl->storage_offset(),
          data_of(impl),
          impl->dtype(),
          impl->is_contiguous()};
}

// Whether a tensor object still leads to the same memory in the same layout, as far as that shows without strides. The
// old pointers are compared, never followed.
bool Plan::unchanged(PyObject* tensor, const Memory& memory) {
  const c10::TensorImpl* impl = impl_of(tensor);
  return impl == memory.impl && impl->unsafe_storage().unsafeGetStorageImpl() == memory.storage &&
         memory.storage->data() == memory.base && impl->storage_offset() == memory.offset &&
         impl->dtype() == memory.type && impl->is_contiguous() == memory.contiguous;
}

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
  // Releasing a reference may run arbitrary code that finds this plan again: take everything out first.
  const auto entries = std::exchange(entries_, {});
  const auto memo = std::exchange(memo_, {}), older = std::exchange(older_, {});
  const auto groups = std::exchange(groups_, {});
  const auto outer = std::exchange(outer_, {}), inner = std::exchange(inner_, {});
}

// The setting of a group: looked up by the values of its hyper-parameters when all are immutable numbers, else asked of
// Python, which also resolves tensors and lists.
Ref Plan::setting_of(PyObject* dict, bool* immutable) {
  Ref key = Ref::steal(PyTuple_New(static_cast<Py_ssize_t>(hyper_.size())));
  *immutable = true;
  for (size_t i = 0; i < hyper_.size(); ++i) {
    PyObject* value = PyDict_GetItemWithError(dict, hyper_[i].get());
    if (!value && PyErr_Occurred()) throw PythonError{};
    if (!value) value = Py_None;
    if (!is_immutable_number(value)) *immutable = false;
    Py_INCREF(value);
    PyTuple_SET_ITEM(key.get(), static_cast<Py_ssize_t>(i), value);
  }
  if (!*immutable) return Ref::steal(PyObject_CallOneArg(intern_.get(), dict));
  if (PyObject* known = PyDict_GetItemWithError(settings_.get(), key.get())) return Ref(known);
  if (PyErr_Occurred()) throw PythonError{};
  Ref setting = Ref::steal(PyObject_CallOneArg(intern_.get(), dict));
  if (PyDict_SetItem(settings_.get(), key.get(), setting.get()) < 0) throw PythonError{};
  return setting;
}

void Plan::record_group(Group& group, PyObject* dict) {
  group.dict = Ref(dict);
  group.items.clear();
  PyObject *key, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(dict, &at, &key, &value)) {
    group.items.emplace_back(key);
    group.items.emplace_back(holds(ignored_, key) ? nullptr : value);
  }
}

// Whether the list of parameters is as it was; a list has no version, so each is compared.
bool Plan::check_params(const Group& group) const {
  PyObject* params = group.params.get();
  if (!PyList_CheckExact(params) && !PyTuple_CheckExact(params)) return false;
  if (static_cast<size_t>(Py_SIZE(params)) != group.count) return false;
  PyObject** objects = PySequence_Fast_ITEMS(params);
  for (size_t i = 0; i < group.count; ++i)
    if (objects[i] != entries_[group.first + i].param.get()) return false;
  return true;
}

// Whether the group still has the structure the plan was built for; refreshes its setting when a value changed.
bool Plan::check_group(Group& group, PyObject* dict) {
  if (dict != group.dict.get()) return false;
  const uint64_t version = version_of(dict);
  if (group.immutable && version != 0 && version == group.version) return check_params(group);
  bool same = group.immutable && static_cast<size_t>(PyDict_GET_SIZE(dict)) * 2 == group.items.size();
  PyObject *key, *value, *params = nullptr;
  Py_ssize_t at = 0;
  for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2) {
    if (key == names().params) params = value;
    if (same && (key != group.items[i].get() || (group.items[i + 1] && value != group.items[i + 1].get())))
      same = false;
  }
  if (!params) params = PyDict_GetItemWithError(dict, names().params);
  if (!params || params != group.params.get()) return false;
  if (!check_params(group)) return false;
  group.version = version;
  if (same) return true;

  group.setting = setting_of(dict, &group.immutable);
  Ref layout = Ref::steal(PyObject_GetAttr(group.setting.get(), names().layout));
  if (layout.get() != group.layout.get()) return false;
  record_group(group, dict);
  group.last_row = nullptr;
  group.on_device = {};
  return true;
}

// Whether a dict still yields these keys and values, by identity, in this order.
bool Plan::check_pairs(PyObject* dict, const Ref* pairs, size_t count) const {
  if (static_cast<size_t>(PyDict_GET_SIZE(dict)) * 2 != count) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2)
    if (pairs[i].get() != key || pairs[i + 1].get() != value) return false;
  return true;
}

// Whether optimizer.state, and every state that the kernels use, holds the objects it held.
bool Plan::check_state(PyObject* state) {
  if (const uint64_t version = version_of(state); version == 0 || version != state_version_) {
    if (!check_pairs(state, outer_.data(), outer_.size())) return false;
    state_version_ = version;
  }
  for (size_t i = 0; i < states_.size(); ++i) {
    if (i + far < states_.size()) __builtin_prefetch(states_[i + far].dict);
    State& own = states_[i];
    const uint64_t version = version_of(own.dict);
    if (version != 0 && version == own.version) continue;
    if (!check_pairs(own.dict, inner_.data() + own.first, own.count)) return false;
    own.version = version;
  }
  return true;
}

// Whether the memory behind p, its states and its counters is still the memory the plan recorded.
bool Plan::check_tensors(const Entry& entry) const {
  if (!unchanged(entry.param.get(), entry.memory) || fingerprint(entry.memory.impl->sizes()) != entry.shape)
    return false;
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

bool Plan::build_slots(Entry& entry, PyObject* state, const std::vector<Ref>& slot_keys) {
  if (slot_keys.size() > static_cast<size_t>(max_slots)) throw std::invalid_argument("fastopt: too many state tensors");
  for (const Ref& key : slot_keys) {
    PyObject* object = PyDict_GetItemWithError(state, key.get());
    if (!object) return false;
    if (!is_tensor(object)) throw std::invalid_argument("fastopt: a state is not a tensor");
    Slot& slot = entry.slots[entry.slot_count++];
    const c10::TensorImpl* impl = impl_of(object);
    if (!is_plain(impl) || !dtype_of(impl, &slot.dtype) || impl->sizes() != entry.memory.impl->sizes() ||
        impl->device() != entry.memory.impl->device())
      throw std::invalid_argument("fastopt: a state tensor does not match its parameter");
    slot.object = object;
    slot.memory = memory_of(object);
  }
  return true;
}

// The counters are on the CPU or all on the parameter's device; then, or if `on_device`, the device counts.
bool Plan::build_counters(Entry& entry, PyObject* state, bool on_device) {
  for (const Ref& key : counter_keys_) {
    PyObject* object = PyDict_GetItemWithError(state, key.get());
    if (!object) return false;
    if (!is_tensor(object)) throw std::invalid_argument("fastopt: a counter is not a tensor");
    Counter& counter = entry.counters[entry.counter_count++];
    const c10::TensorImpl* impl = impl_of(object);
    const bool here = impl->device().is_cpu();
    if (!is_plain(impl) || impl->numel() != 1 || !(here || impl->device() == entry.memory.impl->device()))
      throw std::invalid_argument("fastopt: a counter is not a single number on the CPU or its parameter's device");
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
    counter.object = object;
    counter.memory = memory_of(object);
  }
  entry.counted = on_device && entry.counter_count > 0;
  return true;
}

// Decides between one flat run of memory and an element walk over strides.
void Plan::lay_out(Entry& entry) {
  bool flat = entry.memory.impl->is_non_overlapping_and_dense();
  entry.one_dtype = entry.dtype == Dtype::f32 || entry.dtype == Dtype::f64;
  for (int k = 0; k < entry.slot_count; ++k) {
    flat = flat && same_strides(entry.memory.impl, entry.slots[k].memory.impl);
    entry.one_dtype = entry.one_dtype && entry.slots[k].dtype == entry.dtype;
  }
  const auto sizes = entry.memory.impl->sizes(), strides = entry.memory.impl->strides();
  if (entry.rows > 0 && entry.rows != sizes[0]) throw std::invalid_argument("fastopt: rows is not the first dimension");
  const bool rows_contiguous = entry.rows == 0 || entry.rows == 1 || entry.n == 0 || strides[0] == entry.n / entry.rows;
  if (flat && rows_contiguous) return;
  if (sizes.size() > static_cast<size_t>(max_dims)) throw std::invalid_argument("fastopt: too many dimensions");
  layout_with(entry, strides);
}

void Plan::build_entry(Entry& entry, const Group& group, PyObject* state, const std::vector<Ref>& slot_keys) {
  const c10::TensorImpl* impl = impl_of(entry.param.get());
  if (!is_plain(impl) || !dtype_of(impl, &entry.dtype))
    throw std::invalid_argument("fastopt: a parameter that the kernels cannot take was planned for them");
  entry.n = impl->numel();
  entry.memory = memory_of(entry.param.get());
  entry.meta = impl->autograd_meta();
  entry.shape = fingerprint(impl->sizes());
  PyObject* own = PyDict_GetItemWithError(state, entry.param.get());
  if (!own && PyErr_Occurred()) throw PythonError{};
  if (slot_keys.empty() && counter_keys_.empty())
    entry.has_state = true;
  else
    entry.has_state = own && PyDict_Check(own) && build_slots(entry, own, slot_keys) &&
                      build_counters(entry, own, emulate_ && group.counts_on_device);
  if (!entry.has_state) entry.slot_count = entry.counter_count = 0;
  entry.counted = entry.counted && entry.has_state;
  lay_out(entry);
  entry.device = -1;
  if (impl->device().is_cuda() || emulate_) plan_device(entry);
}

namespace {

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % alignment == 0; }

}  // namespace

// Enters a parameter into the tables of its device, with the gradient it has now: one of another kind later on, and
// the tables are made again.
void Plan::plan_device(Entry& entry) {
  const c10::TensorImpl *p = entry.memory.impl, *grad = grad_of(p);
  entry.g_dtype = entry.dtype;
  if (grad && is_plain(grad) && grad->sizes() == p->sizes() && dtype_of(grad, &entry.g_dtype)) {
    if (entry.layout || !same_strides(p, grad)) layout_with(entry, grad->strides());
    if (!is_aligned(grad->data())) misaligned_.insert(entry.param.get());
  }
  DeviceEntry planned{};
  DeviceTensor& tensor = planned.tensor;
  tensor.p = entry.memory.data;
  tensor.n = entry.n;
  tensor.row_length = entry.rows > 0 ? entry.n / entry.rows : 0;
  tensor.p_dtype = entry.dtype;
  tensor.g_dtype = entry.g_dtype;
  entry.aligned = is_aligned(tensor.p) && !misaligned_.count(entry.param.get());
  for (int k = 0; k < entry.slot_count; ++k) {
    tensor.s[k] = entry.slots[k].memory.data;
    tensor.s_dtype[k] = entry.slots[k].dtype;
    entry.aligned = entry.aligned && is_aligned(tensor.s[k]);
  }
  planned.layout = entry.layout.get();

  const int index = emulate_ ? 0 : p->device().index();
  size_t k = 0;
  while (k < devices_.size() && devices_[k].device() != index) ++k;
  if (k == devices_.size()) {
    const DeviceDriver* driver = emulate_ ? emulator() : cuda_driver();
    if (!driver) throw std::invalid_argument("fastopt: this extension was built without the device's kernels");
    devices_.emplace_back(*driver, index);
  }
  entry.device = static_cast<int8_t>(k);
  DeviceCounters counters{};
  if (entry.counted) {
    counters.step = entry.counters[0].memory.data;
    counters.step_kind = entry.counters[0].kind;
    if (entry.counter_count > 1) counters.carry = entry.counters[1].memory.data;
    counters.carry_kind = entry.counters[1].kind;
  }
  entry.number = static_cast<uint32_t>(devices_[k].add(planned, entry.aligned, entry.counted ? &counters : nullptr));
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

void Plan::build(PyObject* groups, PyObject* state, PyObject* native, PyObject* rows, PyObject* fresh) {
  if (running_) throw std::runtime_error("fastopt: this optimizer is inside step() in another thread");
  clear();
  trim();
  const std::vector<Ref> dicts = sequence(groups), natives = sequence(native), row_counts = sequence(rows),
                         freshes = sequence(fresh);
  size_t total = 0;
  for (const Ref& dict : dicts)
    total += static_cast<size_t>(PyObject_Length(PyDict_GetItem(dict.get(), names().params)));
  entries_.reserve(total);
  for (size_t i = 0; i < dicts.size(); ++i) {
    Group group;
    record_group(group, dicts[i].get());
    group.params = Ref(PyDict_GetItem(dicts[i].get(), names().params));
    group.setting = setting_of(dicts[i].get(), &group.immutable);
    group.layout = Ref::steal(PyObject_GetAttr(group.setting.get(), names().layout));
    group.counts_on_device =
        Ref::steal(PyObject_GetAttr(group.setting.get(), names().counts_on_device)).get() == Py_True;
    group.first = entries_.size();
    const std::vector<Ref> slot_keys = sequence(Ref::steal(PyObject_GetAttr(group.setting.get(), names().slots)).get());
    const std::vector<Ref> params = sequence(group.params.get());
    const std::vector<Ref> takes = sequence(natives[i].get()), counts = sequence(row_counts[i].get()),
                           news = sequence(freshes[i].get());
    group.count = params.size();
    for (size_t k = 0; k < params.size(); ++k) {
      Entry& entry = entries_.emplace_back();
      entry.param = params[k];
      entry.native = takes[k].get() == Py_True;
      entry.fresh = news[k].get() == Py_True;
      entry.rows = PyLong_AsLongLong(counts[k].get());
      if (entry.native) build_entry(entry, group, state, slot_keys);
    }
    groups_.push_back(std::move(group));
  }

  std::unordered_map<PyObject*, bool> deep;
  for (const Entry& entry : entries_) deep[entry.param.get()] = entry.native;
  PyObject *param, *value, *key, *tensor;
  Py_ssize_t at = 0;
  while (PyDict_Next(state, &at, &param, &value)) {
    outer_.emplace_back(param);
    outer_.emplace_back(value);
    if (!deep.count(param) || !deep[param] || !PyDict_Check(value)) continue;
    const size_t first = inner_.size();
    Py_ssize_t inner = 0;
    while (PyDict_Next(value, &inner, &key, &tensor)) {
      inner_.emplace_back(key);
      inner_.emplace_back(tensor);
    }
    states_.push_back({value, version_of(value), first, inner_.size() - first});
  }
  state_version_ = version_of(state);
  place_devices();
  built_ = true;
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

// The strides of p and its states, made on first need, with those of this step's gradient.
const Layout* Plan::layout_with(Entry& entry, c10::IntArrayRef gradient) {
  if (!entry.layout) {
    entry.layout = std::make_unique<Layout>();
    entry.layout->sizes = entry.memory.impl->sizes().vec();
    entry.layout->strides[0] = entry.memory.impl->strides().vec();
    for (int k = 0; k < entry.slot_count; ++k)
      entry.layout->strides[2 + k] = entry.slots[k].memory.impl->strides().vec();
  }
  entry.layout->strides[1].assign(gradient.begin(), gradient.end());
  return entry.layout.get();
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

  // Nothing below touches a Python object's reference count, so it may run on several threads at once.
  found_.resize(entries_.size());
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
  const auto touch = [](PyObject* object, const Memory& memory) {
    __builtin_prefetch(reinterpret_cast<const char*>(object) + 16);
    __builtin_prefetch(memory.impl);
    __builtin_prefetch(reinterpret_cast<const char*>(memory.impl) + sizeof(c10::TensorImpl) - 1);
    __builtin_prefetch(memory.storage);
    __builtin_prefetch(memory.version, 1);
  };
  touch(entry.param.get(), entry.memory);
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
  const c10::TensorImpl* grad = grad_of(impl_of(entry.param.get()));
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

void Plan::launch(const std::vector<DeviceStep>& steps) {
  if (steps.size() != devices_.size()) throw std::invalid_argument("fastopt: launch() wants a step for each device");
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
