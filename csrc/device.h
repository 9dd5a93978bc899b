// What the host and a device's kernels agree on: plain data, no torch, no CUDA.
//
// A launch runs one chain over work items of tensors that store their streams alike (a Mix). The table of tensors and
// the list of items lie in device memory and change only when the plan is rebuilt. What changes every step travels by
// value in the kernel's parameters: a gradient address and the number of a coefficient row for each tensor, and the
// rows. A null gradient leaves a tensor out. When `step` itself lives on the device, the rows do too: a kernel that
// runs before writes one for each tensor.
#pragma once

#include <cstdint>

#include "chain.h"
#include "mix.h"

namespace fastopt {

// Elements of a vector, what a lane reads at once of every stream: 16 bytes of the widest (device_kernels.h says why).
// The mixes that take any dtypes take any alignment and any strides too, one element at a time, or many where the
// dtypes are a known mix's and only the alignment is not.
constexpr int vector_length(Mix mix) {
  if (is_any(mix)) return 1;
  return mix == Mix::f64 ? 2 : mix == Mix::bf16 || mix == Mix::f16 ? 8 : 4;
}

inline constexpr int lanes = 32;               // of a warp, which takes one work item
inline constexpr int block_threads = 128;      // four items
inline constexpr int alignment = 16;           // bytes: what the named mixes ask of every stream
inline constexpr int max_device_dims = 8;      // of a strided tensor
inline constexpr int64_t longest_row = 4096;   // elements of a slice that one warp centralises by itself
inline constexpr int64_t part_length = 16384;  // elements of a longer slice that one warp sums, at least
inline constexpr int64_t most_parts = 256;     // of a slice

// An unevaluated sum of doubles.
struct alignas(16) Pair {
  double hi, lo;
};

struct DeviceStrides {
  int64_t sizes[max_device_dims];
  int64_t strides[2 + max_slots][max_device_dims];  // p, g, state...
  int32_t dims;
};

// A row of the table: what is known of a tensor when the plan is built.
struct alignas(16) DeviceTensor {
  void* p;
  void* s[max_slots];
  int64_t n;
  int64_t row_length;            // elements of a leading slice whose mean is taken off the gradient; 0: not centralised
  Pair* parts;                   // where slices longer than longest_row are summed, parts_of(row_length) each
  const DeviceStrides* strides;  // null: all streams are dense and share their strides
  Dtype p_dtype, g_dtype, s_dtype[max_slots];
  Mix stored;  // all of these together
};

// One warp's share, the chunk-th of a tensor. Where slices are centralised rows_per_item of them, from
// chunk * rows_per_item on, or of a slice longer than longest_row one of the pieces_of(row_length) runs of longest_row.
// Else, in the mixes that take any tensor, a run of any_length elements, and in the others a vector of every stream for
// each lane, `vectors` times: warps in a row, dealt_together of them, take turns, so that what they read and write at
// the same time lies together.
struct alignas(8) WorkItem {
  uint32_t tensor;
  uint32_t chunk;
};

inline constexpr int64_t any_length = 256;
inline constexpr int dealt_together = 8;

FASTOPT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The items of a tensor of n elements, given how many are a warp's vectors: the last that take turns have no more warps
// than vectors.
FASTOPT_HD constexpr int64_t dealt_items(int64_t n, int64_t at_once, int vectors) {
  const int64_t together = at_once * vectors * dealt_together, rest = ceil_div(n % together, at_once);
  return n / together * dealt_together + (rest < dealt_together ? rest : dealt_together);
}
FASTOPT_HD constexpr int64_t pieces_of(int64_t row_length) { return ceil_div(row_length, longest_row); }
FASTOPT_HD constexpr int64_t part_of(int64_t row_length) {
  const int64_t least = ceil_div(row_length, most_parts);
  return least > part_length ? least : part_length;
}
FASTOPT_HD constexpr int64_t parts_of(int64_t row_length) { return ceil_div(row_length, part_of(row_length)); }
FASTOPT_HD constexpr int64_t rows_per_item(int64_t row_length, int64_t chunk) {
  return row_length >= chunk ? 1 : chunk / row_length;
}

// A coefficient row made on the device.
struct DeviceRow {
  double c[max_coefficients];
  int32_t chain;  // the only one that takes this tensor at this step; -1: none does
};

// Everything by value but the payload: gradients (const void*), row numbers (uint16_t) at indices_at, and at rows_at
// the rows in the compute type.
struct LaunchHeader {
  const DeviceTensor* table;
  const WorkItem* items;
  const DeviceRow* rows;    // by tensor; null: the rows are in the payload
  const float* found_inf;   // non-zero: nothing happens
  const float* grad_scale;  // gradients are divided by it and written back; null: they are taken as they are
  uint32_t item_count;
  uint32_t first_tensor;  // the first in the payload
  uint16_t together;      // elements that dealt_together items take turns at
  uint16_t row_bits;      // slices shorter than 2^row_bits share an item, as many as that has room for
  uint32_t indices_at, rows_at;
  int16_t chain;
  int16_t first_slot;
};

// Kernels exist for two sizes of the parameters: a small one that is cheap to launch, and the largest that CUDA takes
// (32,764 bytes since 12.1, of which whole 16 bytes are used).
inline constexpr int tiers = 2;
inline constexpr int tier_bytes[tiers] = {4080, 32752};

template <int tier>
struct Arguments {
  LaunchHeader header;
  alignas(16) unsigned char payload[tier_bytes[tier] - (sizeof(LaunchHeader) + 15) / 16 * 16];
};
static_assert(sizeof(Arguments<0>) == tier_bytes[0] && sizeof(Arguments<1>) == tier_bytes[1]);

inline constexpr int payload_bytes[tiers] = {sizeof(Arguments<0>::payload), sizeof(Arguments<1>::payload)};

}  // namespace fastopt
