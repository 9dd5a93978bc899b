// Element types: their sizes, and conversion to and from the compute type with one rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "stages/ops.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastopt {

enum class Dtype : int8_t { f32, f64, bf16, f16 };

FASTOPT_HD constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

FASTOPT_HD uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
FASTOPT_HD float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// Rounding to odd, so that a second rounding from float to 16 bits is the only one.
FASTOPT_HD float narrow(float x) { return x; }
FASTOPT_HD float narrow(double x) {
  float f = static_cast<float>(x);
  double back = f;
  uint32_t u = bits(f);
  if (back == x || x != x || (u & 1) || (u & 0x7f800000u) == 0x7f800000u) return f;
  return from_bits((back < x) == (x > 0) ? u + 1 : u - 1);  // away from zero, or towards it
}

FASTOPT_HD float from_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }
FASTOPT_HD uint16_t to_bf16(float x) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  uint32_t u = bits(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

FASTOPT_HD float from_f16(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#elif defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Shift exponent and mantissa into place and rebias. A subnormal is its mantissa times 2^-24, without a float32 that
  // is one on the way: a processor may have been told to take those for zero.
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float value = from_bits(magnitude + (112u << 23));
  if ((h & 0x7c00u) == 0) value = static_cast<float>(static_cast<int32_t>(h & 0x3ffu)) * 0x1p-24f;
  if ((h & 0x7c00u) == 0x7c00u) value = from_bits(magnitude | 0x7f800000u);
  return from_bits(bits(value) | sign);
#endif
}
FASTOPT_HD uint16_t to_f16(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#elif defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t u = bits(x), sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (u < 0x38800000u) return static_cast<uint16_t>(sign | (bits(from_bits(u) + 0.5f) - bits(0.5f)));
  u += 0xfffu + ((u >> 13) & 1);
  return static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13));
#endif
}

// How an element of a dtype lies in memory, and its way to the compute type T and back.
template <Dtype dtype>
struct Stored;
template <>
struct Stored<Dtype::f32> {
  using Raw = float;
  template <class T>
  FASTOPT_HD static T load(float x) {
    return static_cast<T>(x);
  }
  template <class T>
  FASTOPT_HD static float store(T x) {
    return static_cast<float>(x);
  }
};
template <>
struct Stored<Dtype::f64> {
  using Raw = double;
  template <class T>
  FASTOPT_HD static T load(double x) {
    return static_cast<T>(x);
  }
  template <class T>
  FASTOPT_HD static double store(T x) {
    return x;
  }
};
template <>
struct Stored<Dtype::bf16> {
  using Raw = uint16_t;
  template <class T>
  FASTOPT_HD static T load(uint16_t x) {
    return from_bf16(x);
  }
  template <class T>
  FASTOPT_HD static uint16_t store(T x) {
    return to_bf16(narrow(x));
  }
};
template <>
struct Stored<Dtype::f16> {
  using Raw = uint16_t;
  template <class T>
  FASTOPT_HD static T load(uint16_t x) {
    return from_f16(x);
  }
  template <class T>
  FASTOPT_HD static uint16_t store(T x) {
    return to_f16(narrow(x));
  }
};

// Counters are single numbers of one of these types.
enum class CounterKind : int8_t { f32, f64, i32, i64 };

FASTOPT_HD double read_counter(const void* counter, CounterKind kind) {
  switch (kind) {
    case CounterKind::f32:
      return *static_cast<const float*>(counter);
    case CounterKind::f64:
      return *static_cast<const double*>(counter);
    case CounterKind::i32:
      return *static_cast<const int32_t*>(counter);
    default:
      return static_cast<double>(*static_cast<const int64_t*>(counter));
  }
}
// What it will hold after one more step: a float32 stops counting at 2^24, as torch's `step += 1` does.
FASTOPT_HD double next_count(const void* counter, CounterKind kind) {
  const double next = read_counter(counter, kind) + 1;
  return kind == CounterKind::f32 ? static_cast<double>(static_cast<float>(next)) : next;
}
FASTOPT_HD void write_counter(void* counter, CounterKind kind, double value) {
  switch (kind) {
    case CounterKind::f32:
      *static_cast<float*>(counter) = static_cast<float>(value);
      break;
    case CounterKind::f64:
      *static_cast<double*>(counter) = value;
      break;
    case CounterKind::i32:
      *static_cast<int32_t*>(counter) = static_cast<int32_t>(value);
      break;
    default:
      *static_cast<int64_t*>(counter) = static_cast<int64_t>(value);
  }
}

}  // namespace fastopt
