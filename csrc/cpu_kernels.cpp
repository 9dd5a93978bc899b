// Every chain as a CPU kernel for one instruction set, FASTOPT_ISA. The compiler vectorises the shared stages; results
// do not depend on the vector width because contraction is off and every stage operation is correctly rounded.
#include "cpu_kernels.h"

#include <cstring>

#include "chains.h"

namespace fastopt {
namespace {

template <class Chain, class T>
void update(const Run<T>& run) {
  constexpr int S = Chain::slots, C = Chain::coefficients;
  T* const p = run.p;
  const T* const g = run.g;
  T* s[S + 1];
  for (int k = 0; k < S; ++k) s[k] = run.s[k];
  T c[C + 1];
  for (int k = 0; k < C; ++k) c[k] = run.row[k];
  const T shift = run.shift;

  // Streams never overlap except element by element (the plan sends overlapping parameters elsewhere). No software
  // prefetch: the hardware's follows up to six streams by itself, and every distance tried made it slower or no faster.
#pragma GCC ivdep
  for (int64_t j = 0; j < run.n; ++j) {
    T x = p[j], d = g[j] - shift, v[S + 1];
    for (int k = 0; k < S; ++k) v[k] = s[k][j];
    Chain::apply(x, d, v, c);
    p[j] = x;
    for (int k = 0; k < S; ++k) s[k][j] = v[k];
  }
}

template <class T>
void load(Dtype dtype, const void* from, T* to, int64_t n) {
  switch (dtype) {
    case Dtype::f32:
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<const float*>(from)[i]);
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<const double*>(from)[i]);
      break;
    case Dtype::bf16:
      for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(static_cast<const uint16_t*>(from)[i]);
      break;
    case Dtype::f16: {
      int64_t i = 0;
#if defined(__F16C__)
      if constexpr (sizeof(T) == 4)
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                       reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i))));
#endif
      for (; i < n; ++i) to[i] = from_f16(static_cast<const uint16_t*>(from)[i]);
      break;
    }
  }
}

// The instruction that rounds 32 floats at once takes subnormal numbers for zero and keeps the bits of NaNs: where
// there is either, the portable form does it. Half the time of the compiler's own code for that, measured on a Zen 4.
#if defined(__AVX512DQ__)
#define FASTOPT_HAS_BF16 __builtin_cpu_supports("avx512bf16")
__attribute__((target("avx512bf16"))) int64_t store_bf16(const float* from, uint16_t* to, int64_t n) {
  constexpr int nan_or_subnormal = 0xa1;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 low = _mm512_loadu_ps(from + i), high = _mm512_loadu_ps(from + i + 16);
    if (_mm512_fpclass_ps_mask(low, nan_or_subnormal) | _mm512_fpclass_ps_mask(high, nan_or_subnormal)) [[unlikely]] {
      for (int64_t k = i; k < i + 32; ++k) to[k] = to_bf16(from[k]);
    } else {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      std::memcpy(to + i, &rounded, sizeof rounded);
    }
  }
  return i;
}
#else
#define FASTOPT_HAS_BF16 false
int64_t store_bf16(const float*, uint16_t*, int64_t) { return 0; }
#endif

template <class T>
void store(Dtype dtype, const T* from, void* to, int64_t n) {
  switch (dtype) {
    case Dtype::f32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = static_cast<float>(from[i]);
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = from[i];
      break;
    case Dtype::bf16: {
      int64_t i = 0;
      if constexpr (sizeof(T) == 4)
        if (FASTOPT_HAS_BF16) i = store_bf16(from, static_cast<uint16_t*>(to), n);
      for (; i < n; ++i) static_cast<uint16_t*>(to)[i] = to_bf16(narrow(from[i]));
      break;
    }
    case Dtype::f16: {
      int64_t i = 0;
#if defined(__F16C__)
      if constexpr (sizeof(T) == 4)
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + i),
                           _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
      for (; i < n; ++i) static_cast<uint16_t*>(to)[i] = to_f16(narrow(from[i]));
      break;
    }
  }
}

// Knuth's two-sum in every lane.
template <class T>
void accumulate(ExactSum& sum, const T* x, int64_t n) {
  constexpr int L = ExactSum::lanes;
  double hi[L], lo[L];
  std::memcpy(hi, sum.hi, sizeof hi);
  std::memcpy(lo, sum.lo, sizeof lo);
  for (int64_t i = 0; i < n; i += L) {
    const int m = n - i < L ? static_cast<int>(n - i) : L;
    for (int k = 0; k < L; ++k) {
      const double a = hi[k], b = k < m ? static_cast<double>(x[i + (k < m ? k : 0)]) : 0.0;
      const double t = a + b, z = t - a;
      lo[k] += (a - (t - z)) + (b - z);
      hi[k] = t;
    }
  }
  std::memcpy(sum.hi, hi, sizeof hi);
  std::memcpy(sum.lo, lo, sizeof lo);
}

template <class T, class... Chains>
constexpr typename Kernels<T>::Update table[sizeof...(Chains)] = {update<Chains, T>...};

template <class T, class... Chains>
constexpr Kernels<T> kernels(List<Chains...>) {
  return {table<T, Chains...>, load<T>, store<T>, accumulate<T>};
}

}  // namespace

#define FASTOPT_TEXT_(x) #x
#define FASTOPT_TEXT(x) FASTOPT_TEXT_(x)

const InstructionSet& FASTOPT_ISA() {
  static constexpr InstructionSet set{FASTOPT_TEXT(FASTOPT_ISA), kernels<float>(Chains{}), kernels<double>(Chains{})};
  return set;
}

}  // namespace fastopt
