#include "plan.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <utility>

#include "plan_names.h"

namespace fastopt {
namespace {

// Tensors that are examined by one thread; from twice as many on, every thread gets its share of them, for torch wakes
// all of its threads or none.
constexpr int64_t examine_alone = 200, examine_grain = 50;
constexpr size_t groups_ahead = 8;

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

void Plan::clear() {
  built_ = gathered_ = false;
  found_.clear();
  shared_ = false;
  shares_.clear();
  states_.clear();
  tracked_.clear();
  devices_.clear();
  const auto blobs = std::exchange(blobs_, {});
  const auto kept = std::exchange(kept_, {});
  const auto wrapped = std::exchange(wrapped_, {});
  outlooks_.clear();
  // Releasing a reference may run arbitrary code that finds this plan again: take everything out first.
  const auto entries = std::exchange(entries_, {});
  const auto memo = std::exchange(memo_, {}), older = std::exchange(older_, {});
  const auto groups = std::exchange(groups_, {});
  const auto outer = std::exchange(outer_, {}), inner = std::exchange(inner_, {});
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
    key.stepped = true;
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
  if (pass_ != python_ran_) return;  // for the row alone: no pointer is followed, and all is looked at again
  if (entry.device >= 0)
    group.device_rows[entry.device] = devices_[entry.device].set(entry.number, found.data, *found.row);
  else if (!found.flat)
    layout_with(entry, (stepped ? found.grad : p->impl)->strides());
}

Verdict Plan::gather(PyObject* groups, PyObject* state, PyObject* sync) {
  const Turn turn(*this);
  find(groups, state, sync);
  if (gathered_) keep();
  return gathered_ && !released_ ? Verdict::ready : Verdict::rebuild;
}

// Once something does not fit, nothing does until the plan is built again.
void Plan::find(PyObject* groups, PyObject* state, PyObject* sync) {
  gathered_ = false;
  kept_.clear();
  gathered_ = inspect(groups, state, sync) == Verdict::ready;
  if (!gathered_) built_ = false;
}

Verdict Plan::inspect(PyObject* groups, PyObject* state, PyObject* sync) {
  if (!built_ || !PyList_Check(groups) || !PyDict_Check(state)) return Verdict::rebuild;
  if (static_cast<size_t>(PyList_GET_SIZE(groups)) != groups_.size()) return Verdict::rebuild;
  trim();
  ++looks_;
  uint64_t ran = python_ran_;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (i + groups_ahead < groups_.size()) prefetch(groups_[i + groups_ahead]);
    if (i >= static_cast<size_t>(PyList_GET_SIZE(groups))) return Verdict::rebuild;
    if (!check_group(groups_[i], PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(i)))) return Verdict::rebuild;
  }
  for (size_t i = 0; i < groups_.size(); ++i) foresee(groups_[i], asked(sync, i) != Py_False, outlooks_[i]);
  // The second time, all that Python can be asked for is known.
  for (int attempt = 0; attempt < 3; ++attempt) {
    if (ran != python_ran_ && !has_groups(groups)) return Verdict::rebuild;
    ran = python_ran_;
    if (!find_all(state, sync)) return Verdict::rebuild;
    if (ran == python_ran_) return Verdict::ready;
  }
  return Verdict::rebuild;
}

// Whether these are still the groups, with as many parameters.
bool Plan::has_groups(PyObject* groups) const {
  if (!PyList_Check(groups) || static_cast<size_t>(PyList_GET_SIZE(groups)) != groups_.size()) return false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* const dict = groups_[i].dict.get();
    if (PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(i)) != dict) return false;
    if (PyDict_GetItem(dict, names().params) != groups_[i].params.get() || !check_params(groups_[i])) return false;
  }
  return true;
}

// Looks at all parameters, and decides what becomes of each; false if the plan does not fit.
bool Plan::find_all(PyObject* state, PyObject* sync) {
  pass_ = python_ran_;
  found_.resize(entries_.size());
  if (!check_state(state)) return false;
  if (!wrapped_.empty()) {
    if (!check_objects(0, entries_.size()) || !check_wrapped() || !check_state(state)) return false;
    for (const Group& group : groups_)
      if (!check_params(group)) return false;
  }
  // This touches no Python object's reference count, so it may run on several threads at once.
  std::atomic<bool> intact = true, settled = shared_;
  const auto count = static_cast<int64_t>(entries_.size());
  crew_.run(Crew::Work::look, count, count < 2 * examine_alone ? count : examine_grain,
            [&](int64_t begin, int64_t end) {
              const auto first = static_cast<size_t>(begin), last = static_cast<size_t>(end);
              if (!check_objects(first, last))
                intact = false;
              else if (!examine(first, last))
                settled = false;
            });
  if (!intact) return false;
  if (settled && renew_devices()) return true;

  shared_ = false;
  shares_.clear();
  for (DevicePlan& device : devices_) device.begin_step();
  for (size_t i = 0; i < groups_.size(); ++i)
    if (!decide(groups_[i], asked(sync, i))) return false;
  if (pass_ != python_ran_) return true;  // and comes again
  for (Group& group : groups_) group.taken = group.last_row;
  shared_ = true;
  return true;
}

// Tells the devices what rows follow those of the last step.
bool Plan::renew_devices() {
  for (DevicePlan& device : devices_) device.begin_renewal();
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    group.used = outlooks_[i].likely;
    if (!group.used) continue;
    group.taken = group.last_row;
    for (size_t k = 0; k < group.device_rows.size(); ++k)
      if (group.device_rows[k] != DevicePlan::no_row && !devices_[k].renew_row(group.device_rows[k], *group.last_row))
        return false;
  }
  return std::all_of(devices_.begin(), devices_.end(), [](const DevicePlan& device) { return device.renewed(); });
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

bool Plan::find_and_run(PyObject* groups, PyObject* state, PyObject* sync, const std::vector<DeviceStep>& steps) {
  find(groups, state, sync);
  gathered_ = gathered_ && !released_;  // a checkpoint was loaded meanwhile, say
  if (!gathered_) return false;
  run_all(steps);
  return true;
}

bool Plan::run(PyObject* groups, PyObject* state, PyObject* sync, const std::vector<DeviceStep>& steps) {
  const Turn turn(*this);
  return steps.size() == devices_.size() && find_and_run(groups, state, sync, steps);
}

bool Plan::step(PyObject* optimizer, const std::vector<DeviceStep>& steps) {
  const Turn turn(*this);
  if (steps.size() != devices_.size()) return false;
  for (PyObject* name : names().called) {
    PyObject* const hooks = PyDict_GetItemWithError(optimizer, name);
    if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) > 0) return false;
  }
  for (PyObject* name : names().given)
    if (PyDict_GetItemWithError(optimizer, name)) return false;
  // Held, for another thread may exchange them while Python code runs.
  const Ref groups(PyDict_GetItemWithError(optimizer, names().param_groups));
  const Ref state(PyDict_GetItemWithError(optimizer, names().state));
  return groups && state && find_and_run(groups.get(), state.get(), Py_None, steps);
}

}  // namespace fastopt
