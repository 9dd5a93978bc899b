// Coefficient rows for tensors whose counters live on the device: one thread makes one row, before the kernels that
// read it, and advances the counters.
#pragma once

#include "device.h"
#include "rows.h"

namespace fastopt {

// A tensor's counters; carry is null for rules that have one.
struct DeviceCounters {
  void* step;
  void* carry;
  CounterKind step_kind, carry_kind;
};

// A setting as one group uses it. Slow weights synchronise when the group's own counter says so, or when the host does.
struct DeviceSetting {
  RowSetting setting;
  const float* group_step;  // steps the group has taken; null: `asked` decides
  double group_period;
  bool asked;
};

// What a step does with a tensor: bits 0-13 the number of its setting, or nothing at all.
enum Code : uint16_t { absent = 0, present = 1 << 14, stepped = 1 << 15, setting_mask = (1 << 14) - 1 };

// By value but the payload: codes (uint16_t), and at settings_at the settings.
struct RowsHeader {
  const DeviceCounters* counters;  // these two by tensor
  DeviceRow* rows;
  const float* found_inf;
  uint32_t count;
  uint32_t first_tensor;  // the first in the payload
  uint32_t settings_at;
};

template <int tier>
struct RowsArguments {
  RowsHeader header;
  alignas(16) unsigned char payload[tier_bytes[tier] - (sizeof(RowsHeader) + 15) / 16 * 16];
};
static_assert(sizeof(RowsArguments<0>) == tier_bytes[0] && sizeof(RowsArguments<1>) == tier_bytes[1]);

FASTOPT_HD void make_row(const RowsHeader& header, const unsigned char* payload, uint32_t at) {
  if (at >= header.count || (header.found_inf && *header.found_inf != 0)) return;
  const uint16_t code = reinterpret_cast<const uint16_t*>(payload)[at];
  DeviceRow& row = header.rows[header.first_tensor + at];
  row.chain = -1;
  if (!(code & present)) return;
  const auto& own = reinterpret_cast<const DeviceSetting*>(payload + header.settings_at)[code & setting_mask];
  const DeviceCounters& counters = header.counters[header.first_tensor + at];
  const bool asked = own.group_step ? ::fmod(*own.group_step + 1.0, own.group_period) == 0 : own.asked;
  if (!(code & stepped)) {
    if (!asked) return;
    const RowResult pull = pull_of(own.setting, 0);
    row.c[0] = pull.c[0];
    row.chain = pull.chain;
    return;
  }
  const double t = next_count(counters.step, counters.step_kind);
  const double carry = counters.carry ? read_counter(counters.carry, counters.carry_kind) : 0;
  const RowResult result =
      row_of(own.setting, t, carry, !counters.carry || counters.carry_kind == CounterKind::f32, asked);
  for (int k = 0; k < result.count; ++k) row.c[k] = result.c[k];
  row.chain = result.chain;
  write_counter(counters.step, counters.step_kind, t);
  if (counters.carry) write_counter(counters.carry, counters.carry_kind, result.carry);
}

}  // namespace fastopt
