// Coefficient rows by key: a setting, the step it takes, and what the step carries over.
#pragma once

#include <bit>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "chain.h"
#include "python.h"

namespace fastopt {

struct Row {
  Ref setting;  // the memo is keyed by its address
  alignas(64) float f32[max_coefficients];
  alignas(64) double f64[max_coefficients];
  double carry;
  int16_t chain;
  int8_t first_slot;
  int8_t slots;
  int8_t count;
};

struct RowKey {
  static constexpr uint64_t settings_own = ~uint64_t{0};
  PyObject* setting;
  double t;      // the step to take
  double carry;  // the second counter's value
  bool single;   // the second counter is float32, and its next value is rounded to it
  bool sync;
  bool stepped = false;        // else there is no gradient, and slow weights only synchronise
  uint64_t lr = settings_own;  // else the bits of what it is now; of a setting with tensors, when it was looked at
  bool operator==(const RowKey& other) const {  // NaN is NaN
    return setting == other.setting && bits(t) == bits(other.t) && bits(carry) == bits(other.carry) &&
           single == other.single && sync == other.sync && stepped == other.stepped && lr == other.lr;
  }
  static uint64_t bits(double x) { return std::bit_cast<uint64_t>(x); }
};

// Rows in storage that is reused and never moves, so that the steady state allocates nothing.
class Memo {
 public:
  static constexpr size_t usual = 64;  // rows of a generation, unless one step needs more
  Memo() : rows_(usual) {}
  const Row* find(const RowKey& key) const;
  Row& insert(const RowKey& key);
  size_t size() const { return used_; }
  void clear();
  void visit_settings(const std::function<void(PyObject*)>& visit) const;

 private:
  size_t slot(const RowKey& key) const;

  std::deque<std::pair<RowKey, Row>> rows_;
  std::vector<int32_t> table_;  // open addressing, a power of two; -1: empty
  size_t used_ = 0;
};

// Asks the setting, a Python object, for the row of a key.
void compute_row(const RowKey& key, Row& row);

}  // namespace fastopt
