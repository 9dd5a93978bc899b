// The coefficient rows of a group's parameters: made here where rows.h can, else asked of Python, and remembered.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "plan.h"
#include "plan_names.h"

namespace fastopt {
namespace {

constexpr size_t most_settings = 512;  // remembered before they are looked up afresh

}  // namespace

// Keeps the memos bounded: rows of past steps, and settings under a scheduler that never repeats a value.
void Plan::trim() {
  const bool settings_full = static_cast<size_t>(PyDict_GET_SIZE(settings_.get())) > most_settings;
  if (settings_full) PyDict_Clear(settings_.get());
  if (memo_.size() < Memo::usual) return;
  std::swap(memo_, older_);
  memo_.clear();
  for (Group& group : groups_) group.last_row = nullptr;
}

// What rows.h needs to know of a group's setting.
void Plan::read_row_setting(Group& group) const {
  ++python_ran_;
  Ref result = Ref::steal(PyObject_CallMethodNoArgs(group.setting.get(), names().on_device));
  group.quick = false;
  if (result.get() == Py_None) {
    group.on_device = std::move(result);
    return;
  }
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
  group.quick = std::all_of(row.sources, row.sources + max_hyper, [](Source from) { return from == Source::value; });
}

DeviceSetting Plan::device_setting(Group& group, PyObject* sync) {
  if (!group.on_device) read_row_setting(group);
  if (group.on_device.get() == Py_None)
    throw std::invalid_argument(
        "fastopt: this optimizer's coefficients are not in csrc/rows.h, without which the native "
        "backend cannot count its steps on a device: add them there, or take backend='triton', "
        "whose kernel is made from the rule's own formulas");
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

// The row as rows.h makes it; false where that is not a row of finite numbers, or of no step that there can be: Python
// then says what is wrong with it.
bool Plan::make_row(Group& group, const RowKey& key, Row& row) const {
  if (!group.on_device) read_row_setting(group);
  if (!group.quick || (key.stepped && !(key.t >= 1))) return false;
  const RowResult made = key.stepped ? row_of(group.row_setting, key.t, key.carry, key.single, key.sync)
                                     : pull_of(group.row_setting, key.carry);
  if (!std::isfinite(made.carry)) return false;
  for (int i = 0; i < made.count; ++i) {
    if (!std::isfinite(made.c[i])) return false;
    row.f64[i] = made.c[i];
    row.f32[i] = static_cast<float>(made.c[i]);
  }
  row.setting = Ref(key.setting);
  row.carry = made.carry;
  row.chain = made.chain;
  row.slots = static_cast<int8_t>(chain_slots(made.chain));
  row.first_slot = static_cast<int8_t>(made.way == Way::pull ? group.slots - 1 : 0);
  row.count = static_cast<int8_t>(made.count);
  return true;
}

const Row* Plan::row_for(Group& group, RowKey key) {
  const uint64_t own = group.symbolic ? looks_ : RowKey::settings_own;
  key.lr = own;
  if (group.moved) std::memcpy(&key.lr, &group.row_setting.hyper[0].value, sizeof key.lr);
  if (group.last_row && group.last_key == key) return group.last_row;
  const Row* row = memo_.find(key);
  if (!row) row = older_.find(key);
  if (!row) {
    Row fresh{};
    if (!make_row(group, key, fresh)) {
      if (group.moved) take_setting(group);  // Python knows learning rates by their setting
      key.setting = group.setting.get();
      key.lr = own;
      ++python_ran_;
      compute_row(key, fresh);  // may raise, and then leaves nothing behind
    }
    Row& kept = memo_.insert(key);
    kept = std::move(fresh);
    row = &kept;
  }
  group.last_key = key;
  group.last_row = row;
  group.carry = row->carry;
  return row;
}

// Makes the row that the parameters of a group will want if they go on as in the last step. Then they can take it while
// they are examined, on whatever thread, and nobody has to look at them again. `ahead` is that group's, and knows what
// never changes of it.
void Plan::foresee(Group& group, bool sync, Outlook& ahead) {
  ahead.sync = sync;
  ahead.likely = std::exchange(group.used, false) && group.last_key.stepped;
  if (!ahead.likely) return;
  RowKey key = group.last_key;
  key.setting = group.setting.get();
  key.t = counter_keys_.empty() ? 2 : key.t + 1;
  key.carry = group.carry;
  key.sync = sync;
  ahead.taken = group.taken;
  ahead.row = row_for(group, key);
  ahead.t = key.t;
  ahead.carry = key.carry;
  ahead.single = key.single;
}

}  // namespace fastopt
