// The CPU kernels' interface: plain functions on contiguous runs, one table of them per instruction set.
// No torch header here: cpu_kernels.cpp is compiled once per instruction set, and inline functions shared with other
// units could be merged by the linker into code that an older CPU cannot execute.
#pragma once

#include <cstdint>

#include "chain.h"
#include "mix.h"

namespace fastopt {

inline constexpr int64_t tile_length = 512;  // elements converted at a time: six streams of them stay in a 32 KB L1

// One contiguous run of elements, stored as the kernel's mix says.
struct Run {
  void* p;
  const void* g;
  void* s[max_slots];
  const void* row;  // coefficients, of the compute type
  double shift;     // subtracted from every gradient: a row mean as the compute type has it, or 0
  int64_t n;
};
using Update = void (*)(const Run&);

// Error-free summation in pairs of doubles: its rounded total does not depend on the order of the terms. As many lanes
// as keep the additions of a vector from waiting for each other.
struct ExactSum {
  static constexpr int lanes = 16;
  double hi[lanes] = {};
  double lo[lanes] = {};
};

template <class T>
struct Conversions {
  void (*load)(Dtype, const void* from, T* to, int64_t n);   // widen to the compute type
  void (*store)(Dtype, const T* from, void* to, int64_t n);  // one rounding to nearest even
  void (*accumulate)(ExactSum&, const T* x, int64_t n);
};

struct InstructionSet {
  const char* name;
  const Update* update[mixes];  // by chain; null: what is stored so is converted to the compute type, and back
  Conversions<float> f32;
  Conversions<double> f64;
};

const InstructionSet& baseline();
const InstructionSet& avx2();
const InstructionSet& avx512();

}  // namespace fastopt
