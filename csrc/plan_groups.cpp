// The plan's walk over what Python holds: param_groups, their hyper-parameters, and optimizer.state.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "plan.h"
#include "plan_names.h"

namespace fastopt {
namespace {

constexpr size_t states_ahead = 32;  // dicts asked for before their versions are read

bool holds(const std::vector<Ref>& refs, PyObject* object) {
  return std::any_of(refs.begin(), refs.end(), [&](const Ref& ref) { return ref.get() == object; });
}

// Also numpy's, which schedules computed with numpy leave in groups.
bool is_float(PyObject* value) {
  return PyFloat_CheckExact(value) ||
         (PyFloat_Check(value) && std::strcmp(Py_TYPE(value)->tp_name, "numpy.float64") == 0);
}

bool is_immutable_number(PyObject* value) {
  if (PyTuple_CheckExact(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i)
      if (!is_immutable_number(PyTuple_GET_ITEM(value, i))) return false;
    return true;
  }
  if (is_float(value)) {  // -0.0 is another number than the 0.0 it equals
    const double x = PyFloat_AS_DOUBLE(value);
    return x != 0 || !std::signbit(x);
  }
  return PyLong_CheckExact(value) || PyBool_Check(value) || value == Py_None;
}

}  // namespace

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
  if (*immutable) {
    if (PyObject* known = PyDict_GetItemWithError(settings_.get(), key.get())) return Ref(known);
    if (PyErr_Occurred()) throw PythonError{};
  }
  ++python_ran_;
  Ref setting = Ref::steal(PyObject_CallOneArg(intern_.get(), dict));
  // Remembered unless another thread has edited the group meanwhile.
  for (size_t i = 0; *immutable && i < hyper_.size(); ++i) {
    PyObject* value = PyDict_GetItem(dict, hyper_[i].get());
    if ((value ? value : Py_None) != PyTuple_GET_ITEM(key.get(), static_cast<Py_ssize_t>(i))) return setting;
  }
  if (*immutable && PyDict_SetItem(settings_.get(), key.get(), setting.get()) < 0) throw PythonError{};
  return setting;
}

void Plan::record_group(Group& group, PyObject* dict) {
  group.dict = Ref(dict);
  group.items.clear();
  group.lr_at = 0;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(dict, &at, &key, &value)) {
    group.items.emplace_back(key);
    group.items.emplace_back(holds(ignored_, key) ? nullptr : value);
    if (PyUnicode_Check(key) && PyUnicode_CompareWithASCIIString(key, "lr") == 0) group.lr_at = group.items.size() - 1;
  }
}

// The setting of a group as its dict is now; what was derived from an older one goes.
void Plan::take_setting(Group& group) {
  Ref setting = setting_of(group.dict.get(), &group.immutable);
  if (setting.get() == group.setting.get() && !group.moved) return;
  group.setting = std::move(setting);
  group.last_row = nullptr;
  group.on_device = {};
  group.quick = group.moved = false;
  read_symbolic(group);
}

void Plan::read_symbolic(Group& group) const {
  group.symbolic = Ref::steal(PyObject_GetAttr(group.setting.get(), names().symbolic)).get() == Py_True;
}

// Whether the parameters of a group are in a list of the length it had; which they are is for check_objects to see.
bool Plan::check_params(const Group& group) const {
  PyObject* params = group.params.get();
  return (PyList_CheckExact(params) || PyTuple_CheckExact(params)) &&
         static_cast<size_t>(Py_SIZE(params)) == group.count;
}

// Whether the group still has the structure the plan was built for; refreshes its setting when a value changed. The
// learning rate alone, which a scheduler changes at every step, does not take a setting of its own.
bool Plan::check_group(Group& group, PyObject* dict) {
  if (dict != group.dict.get()) return false;
  const uint64_t version = version_of(dict);
  if (group.immutable && version != 0 && version == group.version) return check_params(group);
  bool same = group.immutable && static_cast<size_t>(PyDict_GET_SIZE(dict)) * 2 == group.items.size();
  PyObject *key, *value, *params = nullptr, *lr = nullptr;
  Py_ssize_t at = 0;
  for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); i += 2) {
    if (key == names().params) params = value;
    if (!same) continue;
    if (key != group.items[i].get())
      same = false;
    else if (group.items[i + 1] && value != group.items[i + 1].get()) {
      same = group.quick && i + 1 == group.lr_at && is_float(value);
      lr = value;
    }
  }
  if (!params) params = PyDict_GetItemWithError(dict, names().params);
  if (!params || params != group.params.get()) return false;
  if (!check_params(group)) return false;
  if (same && lr) {
    group.items[group.lr_at] = Ref(lr);
    group.row_setting.hyper[0].value = PyFloat_AS_DOUBLE(lr);
    group.moved = true;
    group.last_row = nullptr;
  }
  if (!same) {
    // Before Python is asked: what is edited meanwhile, and what Python refuses, is news to the next look too.
    record_group(group, dict);
    auto items = std::exchange(group.items, {});
    take_setting(group);
    Ref layout = Ref::steal(PyObject_GetAttr(group.setting.get(), names().layout));
    if (layout.get() != group.layout.get()) return false;
    group.items = std::move(items);
  }
  group.version = version;
  return true;
}

// Whether a dict still yields these keys and values, by identity, in this order.
bool Plan::check_items(PyObject* dict, const DictItem* items, size_t count) const {
  if (static_cast<size_t>(PyDict_GET_SIZE(dict)) != count) return false;
  PyObject *key, *value;
  Py_ssize_t at = 0;
  for (size_t i = 0; PyDict_Next(dict, &at, &key, &value); ++i)
    if (!items[i].is(key, value)) return false;
  return true;
}

// Whether optimizer.state holds the objects it held; what they hold is for check_objects to see.
bool Plan::check_state(PyObject* state) {
  const uint64_t version = version_of(state);
  if (version != 0 && version == state_version_) return true;
  if (!check_items(state, outer_.data(), outer_.size())) return false;
  state_version_ = version;
  return true;
}

// Whether the lists still hold these parameters, and their states these tensors. A list has no version, so each is
// compared.
bool Plan::check_objects(size_t begin, size_t end) {
  for (auto group = outlook_of(begin); group != outlooks_.end() && group->begin < end; ++group) {
    PyObject* const* const objects = PySequence_Fast_ITEMS(group->params);
    const size_t last = std::min(end, group->end);
    for (size_t k = std::max(begin, group->begin); k < last; ++k)
      if (objects[k - group->begin] != entries_[k].param.get()) return false;
  }
  for (size_t k = begin; k < end; ++k) {
    if (k + states_ahead < end) prefetch_version(states_[k + states_ahead].dict);
    State& own = states_[k];
    if (!own.dict) continue;
    const uint64_t version = version_of(own.dict);
    if (version != 0 && version == own.version) continue;
    if (!check_items(own.dict, inner_.data() + own.first, own.count)) return false;
    own.version = version;
  }
  return true;
}

}  // namespace fastopt
