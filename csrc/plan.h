// The Plan: from an optimizer's param_groups and state to a list of work items, re-validated on every step.
//
// build() records, for every parameter the kernels take, the identity of its objects and the memory behind them.
// gather() walks what is *now* in param_groups and state, compares, reads every gradient, and finds the coefficient row
// of each parameter; it changes nothing, and answers Rebuild when anything structural differs. launch() then advances
// the counters and runs the kernels. States are not kept alive between steps: who takes them out of optimizer.state
// gets their memory back. What lies at an address that is used again is examined as what was there before, so that
// nothing depends on its being the same object.
//
// Python code that is called on the way may let other threads run, and these may change all that was looked at. So a
// thread has the plan to itself (Turn), and what was found counts only if no such code ran after it (python_ran_).
#pragma once

#include <memory>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cpu_driver.h"
#include "device_plan.h"
#include "memo.h"
#include "python.h"
#include "tensors.h"

namespace fastopt {

enum class Verdict { ready = 0, rebuild = 1 };

class Plan {
 public:
  // hyper: the group keys that make a setting. counters: the state keys of 0-dim counters, "step" first. ignored: group
  // keys that change every step and mean nothing here. intern: the Python callable group -> setting.
  // memory: the Python object that allocates device memory.
  // kernels: whose run on a device: CUDA's, the same emulated on CPU tensors, or somebody else's on either.
  enum class Devices { cuda, emulated, external };
  Plan(PyObject* hyper, PyObject* counters, PyObject* ignored, PyObject* intern, PyObject* memory, Devices kernels);

  // Per group a sequence over its parameters: whether the kernels take it, over how many leading slices its gradient is
  // centralised (0: not), and whether its state is fresh.
  void build(PyObject* groups, PyObject* state, PyObject* native, PyObject* rows, PyObject* fresh);
  // sync: None, or per group whether the slow weights synchronise; where the group counts on its device, its counter (a
  // float32 tensor) and the steps between synchronisations.
  // What it finds is kept alive until launch() is done, for Python code that runs in between.
  Verdict gather(PyObject* groups, PyObject* state, PyObject* sync);
  // The devices that launch() will be asked for, beside the host.
  std::vector<int> devices() const;
  // For each of devices(): the stream to use and, or null, where the overflow flag and the loss scale are.
  struct DeviceStep {
    void* stream;
    const float* found_inf;
    const float* grad_scale;
  };
  void launch(const std::vector<DeviceStep>& steps);
  // gather() and launch() in one, so that nothing has to be kept alive in between. False if the plan has to be built
  // anew, and then nothing has changed.
  bool run(PyObject* groups, PyObject* state, PyObject* sync, const std::vector<DeviceStep>& steps);
  // The same for an optimizer that this plan serves alone, given its __dict__ and the stream to use on each of
  // devices(). False also if there is more to do than that.
  bool step(PyObject* optimizer, const std::vector<DeviceStep>& steps);
  // How many kernels the last launch() started on devices.
  int device_launches() const;
  // Of external kernels: what gather() found for the tensors of one of devices(); see DevicePlan.
  DevicePlan& external(size_t device);

  int traverse(visitproc visit, void* arg) const;
  void clear();
  // The same, or if the plan is in use when it no longer is.
  void release();

 private:
  // While it exists, no other thread is in the plan.
  class Turn {
   public:
    explicit Turn(Plan& plan);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Plan& plan_;
  };
  // A parameter whose memory is another tensor's, as a DTensor's is its local shard's.
  struct Wrapped {
    size_t entry;
    PyObject* local;                // the tensor within the parameter
    PyObject* slots[max_slots];     // and within its states
    PyObject* wrappers[max_slots];  // the states themselves
    Ref spec;                       // how the parameter is placed, if it says
    Ref grad;                       // the tensor within this step's gradient
  };
  // A parameter. In tracked_ from `first` on: the tensor with its memory (itself, unless it is wrapped), its states,
  // its counters. One cache line, for the same reason as Tracked's.
  struct Entry {
    Ref param;
    const void* meta;
    uint64_t shape;  // a fingerprint of p's sizes
    int64_t n;
    int64_t rows;
    std::unique_ptr<Layout> layout;  // set when p and its states do not share one dense layout
    uint32_t first;
    uint32_t number;  // in its device's plan
    int8_t slot_count;
    int8_t counter_count;
    int8_t device;  // in devices_; -1: the host's kernels
    Dtype g_dtype;  // on a device: what its table says of the gradient
    Mix mix;        // of p and its states
    bool native : 1;
    bool wrapped : 1;
    bool has_state : 1;
    bool counted : 1;  // its counters are on the device
    bool aligned : 1;  // on a device: every stream must start at 16 bytes
    bool fresh : 1;    // no step was taken with the state it has
  };
  static_assert(sizeof(Entry) <= 64);
  // What every step reads of a group begins it: where there are hundreds, each line of the cache counts.
  struct alignas(64) Group {
    Ref dict;
    uint64_t version = 0;
    Ref params;
    Ref setting;
    size_t first = 0, count = 0;
    bool immutable = false;  // every hyper-parameter is an immutable number: same identity means same value
    bool symbolic = false;   // hyper-parameters are tensors on a device: the same setting is another row every time
    bool quick = false;      // rows can be made from row_setting here
    bool moved = false;      // the learning rate in row_setting is the group's, and no longer its setting's
    bool used = false;       // a parameter took that row in the last step
    RowKey last_key{};
    const Row* last_row = nullptr;
    double carry = 0;                   // what that row carries over
    const Row* taken = nullptr;         // by parameters in the last step; only compared
    std::vector<uint32_t> device_rows;  // its number, by device; no_row: it has none there
    std::vector<Ref> items;  // key, value, key, value ... as PyDict_Next yields them; ignored keys have no value
    size_t lr_at = 0;        // where the learning rate is in items; 0: there is none
    Ref layout;
    int slots = 0;                  // how many states a parameter has
    bool counts_on_device = false;  // so its setting says; what counts is where the counters are
    Ref on_device;                  // what row_setting was read from, and holds the tensors it points to
    RowSetting row_setting;
  };
  // What the threads that look at a group's parameters read of it, in one line of the cache: it was written a moment
  // ago, by one of them.
  struct alignas(64) Outlook {
    size_t begin = 0, end = 0;  // its parameters
    PyObject* params = nullptr;
    const Row* row = nullptr;    // that they may take in this step
    const Row* taken = nullptr;  // that they took in the last one
    double t = 0, carry = 0;     // what they then must find
    bool likely = false, single = false, sync = false;
  };
  static_assert(sizeof(Outlook) == 64);
  struct State {
    PyObject* dict = nullptr;  // null: none that the kernels use
    uint64_t version = 0;
    size_t first = 0, count = 0;  // its part of inner_
  };
  // What this step's look at an entry found, and what the step does with it.
  struct Found {
    const c10::TensorImpl* grad;  // null: none, and then no counter advances
    const void* data;
    double t, carry;
    const Row* row;  // null: made on the device
    Dtype dtype;
    bool fits;    // everything is where the plan says
    bool flat;    // the gradient shares the dense layout of p
    bool active;  // takes part in this step
  };

  Tracked* tensors(const Entry& entry) { return &tracked_[entry.first]; }
  const Tracked* tensors(const Entry& entry) const { return &tracked_[entry.first]; }
  static int counters_at(const Entry& entry) { return 1 + entry.slot_count; }
  // What of `sync` is a group's.
  static PyObject* asked(PyObject* sync, size_t group) {
    return sync == Py_None ? Py_False : PyList_GET_ITEM(sync, static_cast<Py_ssize_t>(group));
  }
  // Who has kernels of his own tells by a gradient's address whether there is one. That of an empty one nobody follows.
  static const void* present_at(const void* gradient) {
    return gradient ? gradient : reinterpret_cast<const void*>(16);
  }

  Ref setting_of(PyObject* dict, bool* immutable);
  void fill(PyObject* groups, PyObject* state, PyObject* native, PyObject* rows, PyObject* fresh);
  void find(PyObject* groups, PyObject* state, PyObject* sync);
  Verdict inspect(PyObject* groups, PyObject* state, PyObject* sync);
  bool find_all(PyObject* state, PyObject* sync);
  bool find_and_run(PyObject* groups, PyObject* state, PyObject* sync, const std::vector<DeviceStep>& steps);
  void run_all(const std::vector<DeviceStep>& steps);
  void keep();
  bool has_groups(PyObject* groups) const;
  bool was_recorded(const Entry& entry, const Wrapped* wrapped, const State& own) const;
  bool check_group(Group& group, PyObject* dict);
  bool check_params(const Group& group) const;
  void record_group(Group& group, PyObject* dict);
  bool check_state(PyObject* state);
  bool check_objects(size_t begin, size_t end);
  bool check_items(PyObject* dict, const DictItem* items, size_t count) const;
  bool check_tensors(const Entry& entry) const;
  bool check_strides(const Entry& entry) const;
  bool check_wrapped();
  PyObject* unwrap(Entry& entry);
  using States = std::unordered_map<PyObject*, Ref>;  // by parameter
  void build_entry(Entry& entry, const Group& group, const States& states, const std::vector<Ref>& slot_keys);
  bool build_slots(Entry& entry, PyObject* state, const std::vector<Ref>& slot_keys);
  bool build_counters(Entry& entry, PyObject* state, bool on_device);
  void record_state(PyObject* state);
  void lay_out(Entry& entry);
  void plan_device(Entry& entry);
  void read_row_setting(Group& group) const;
  void take_setting(Group& group);
  bool make_row(Group& group, const RowKey& key, Row& row) const;
  DeviceSetting device_setting(Group& group, PyObject* sync);
  void add_counted(Entry& entry, const Found& found, const DeviceSetting& setting);
  void place_devices();
  bool examine(size_t begin, size_t end);
  void look(const Entry& entry, Found& found) const;
  bool check_grad(const Entry& entry, Found& found) const;
  bool fits_table(const Entry& entry, const Found& found) const;
  void layout_with(Entry& entry, c10::IntArrayRef gradient) const;
  void prefetch(const Entry& entry) const;
  void prefetch(const Group& group) const;
  void prefetch_counts(size_t k) const;
  void prefetch_data(size_t k) const;
  const c10::TensorImpl* find_grad(const Entry& entry) const;
  void check_unscaling() const;
  void foresee(Group& group, bool sync, Outlook& ahead);
  std::vector<Outlook>::const_iterator outlook_of(size_t entry) const;
  bool take_likely(const Entry& entry, const Outlook& outlook, Found& found);
  bool renew_devices();
  bool decide(Group& group, PyObject* asked);
  void activate(Entry& entry, Group& group, Found& found, bool sync);
  Item item(const Entry& entry, const Found& found) const;
  void commit(Entry& entry, const Found& found);
  void launch_kernels(const std::vector<DeviceStep>& steps);
  void run_kernels(bool counts, bool updates);
  const Row* row_for(Group& group, RowKey key);
  void read_symbolic(Group& group) const;
  void trim();

  std::vector<Ref> hyper_, counter_keys_, ignored_;
  Ref intern_;
  Ref settings_;  // dict: tuple of hyper-parameter values -> setting
  std::vector<Group> groups_;
  std::vector<Outlook> outlooks_;  // by group
  std::vector<Entry> entries_;
  std::vector<Tracked> tracked_;
  uint64_t state_version_ = 0;
  uint64_t looks_ = 0;           // how often gather() has looked
  std::vector<DictItem> outer_;  // parameter and state, as PyDict_Next yields them from optimizer.state
  std::vector<DictItem> inner_;  // key and tensor of every state the kernels use
  std::vector<State> states_;    // by entry
  Memo memo_, older_;            // two generations: what a step needs again soon is in one of them
  std::vector<Wrapped> wrapped_;
  std::vector<Found> found_;  // by entry
  Shares shares_;             // likewise
  Crew crew_;
  bool shared_ = false;  // they are those of found_
  // Memory of parameters, gradients and states, while other Python code may run: it may put another behind a tensor.
  std::vector<c10::intrusive_ptr<c10::StorageImpl>> kept_;
  bool built_ = false;
  bool gathered_ = false;            // and not launched since, nor built again
  mutable uint64_t python_ran_ = 0;  // how often, and so perhaps other threads
  uint64_t pass_ = 0;                // python_ran_ when this look at all parameters began
  std::vector<Ref> wrappers_;        // while they are looked into
  unsigned long owner_ = 0;          // the thread whose turn it is
  uint64_t owner_forks_ = 0;         // how often the process had forked when it began
  bool released_ = false;            // during this turn
  int waiting_ = 0;                  // threads, for theirs
  Ref memory_;
  Devices kernels_;
  std::vector<DevicePlan> devices_;
  std::vector<Ref> blobs_;                    // device memory of devices_
  std::unordered_set<PyObject*> misaligned_;  // parameters met with a misaligned gradient: only a hint
};

}  // namespace fastopt
