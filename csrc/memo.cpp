#include "memo.h"

#include <algorithm>
#include <stdexcept>

namespace fastopt {

size_t Memo::slot(const RowKey& key) const {
  uint64_t h = reinterpret_cast<uint64_t>(key.setting) >> 4;
  h = (h ^ RowKey::bits(key.t)) * 0x9E3779B97F4A7C15u;
  h = (h ^ key.lr ^ (h >> 31)) * 0x94D049BB133111EBu;
  h = (h ^ RowKey::bits(key.carry) ^ (h >> 29)) * 0xBF58476D1CE4E5B9u + key.stepped * 4 + key.single * 2 + key.sync;
  size_t i = (h ^ (h >> 32)) & (table_.size() - 1);
  while (table_[i] >= 0 && !(rows_[table_[i]].first == key)) i = (i + 1) & (table_.size() - 1);
  return i;
}

const Row* Memo::find(const RowKey& key) const {
  if (used_ == 0) return nullptr;
  const int32_t at = table_[slot(key)];
  return at < 0 ? nullptr : &rows_[at].second;
}

Row& Memo::insert(const RowKey& key) {
  if (table_.size() < 4 * (used_ + 1)) {
    table_.assign(std::max<size_t>(4 * usual, table_.size() * 4), -1);
    for (size_t i = 0; i < used_; ++i) table_[slot(rows_[i].first)] = static_cast<int32_t>(i);
  }
  const size_t i = slot(key);
  if (used_ == rows_.size()) rows_.emplace_back();
  rows_[used_].first = key;
  table_[i] = static_cast<int32_t>(used_);
  return rows_[used_++].second;
}

void Memo::clear() {
  std::fill(table_.begin(), table_.end(), -1);
  used_ = 0;
}

void Memo::visit_settings(const std::function<void(PyObject*)>& visit) const {
  for (const auto& [key, row] : rows_) visit(row.setting.get());
}

namespace {

PyObject* row_name() {
  static PyObject* const name = interned("row");
  return name;
}

}  // namespace

void compute_row(const RowKey& key, Row& row) {
  Ref t = key.stepped ? Ref::steal(PyFloat_FromDouble(key.t)) : Ref(Py_None);
  Ref carry = Ref::steal(PyFloat_FromDouble(key.carry));
  Ref result =
      Ref::steal(PyObject_CallMethodObjArgs(key.setting, row_name(), t.get(), carry.get(),
                                            key.single ? Py_True : Py_False, key.sync ? Py_True : Py_False, nullptr));
  long chain, first_slot, slots;
  double next;
  PyObject* values;
  if (!PyArg_ParseTuple(result.get(), "lllO!d", &chain, &first_slot, &slots, &PyTuple_Type, &values, &next))
    throw PythonError{};
  const Py_ssize_t n = PyTuple_GET_SIZE(values);
  if (n > max_coefficients) throw std::invalid_argument("fastopt: too many coefficients");
  row.setting = Ref(key.setting);
  for (Py_ssize_t i = 0; i < n; ++i) {
    row.f64[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(values, i));
    if (row.f64[i] == -1.0 && PyErr_Occurred()) throw PythonError{};
    row.f32[i] = static_cast<float>(row.f64[i]);
  }
  row.carry = next;
  row.chain = static_cast<int16_t>(chain);
  row.first_slot = static_cast<int8_t>(first_slot);
  row.slots = static_cast<int8_t>(slots);
  row.count = static_cast<int8_t>(n);
}

}  // namespace fastopt
