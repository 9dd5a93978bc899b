// Every chain as a CPU kernel for one instruction set, FASTOPT_ISA. The compiler vectorises the shared stages; results
// do not depend on the vector width because contraction is off and every stage operation is correctly rounded.
#include "cpu_kernels.h"

#include <cstring>

#include "chains.h"

namespace fastopt {
namespace {

// What a run holds, as a chain and a mix know it.
template <class Chain, Mix mix>
struct Operands {
  using M = StreamsOf<mix>;
  using T = typename M::T;
  static constexpr int S = Chain::slots, C = Chain::coefficients;

  explicit Operands(const Run& run)
      : p(static_cast<typename M::PRaw*>(run.p)),
        g(static_cast<const typename M::PRaw*>(run.g)),
        shift(static_cast<T>(run.shift)) {
    for (int k = 0; k < S; ++k) s[k] = static_cast<typename M::SRaw*>(run.s[k]);
    for (int k = 0; k < C; ++k) c[k] = static_cast<const T*>(run.row)[k];
  }

  typename M::PRaw* p;
  const typename M::PRaw* g;
  typename M::SRaw* s[S + 1];
  T c[C + 1];
  T shift;
};

// Elements whose streams the compiler can convert one by one, and itself makes vectors of.
template <class Chain, Mix mix>
void update_elements(const Run& run) {
  using M = StreamsOf<mix>;
  using T = typename M::T;
  constexpr int S = Chain::slots;
  const Operands<Chain, mix> with(run);
  // Streams never overlap except element by element (the plan sends overlapping parameters elsewhere). No software
  // prefetch: the hardware's follows up to six streams by itself, and every distance tried made it slower or no faster.
#pragma clang loop vectorize(assume_safety)
#pragma GCC ivdep
  for (int64_t j = 0; j < run.n; ++j) {
    T x = M::P::template load<T>(with.p[j]), d = M::P::template load<T>(with.g[j]) - with.shift, v[S + 1];
    for (int k = 0; k < S; ++k) v[k] = M::State::template load<T>(with.s[k][j]);
    Chain::apply(x, d, v, with.c);
    with.p[j] = M::P::template store<T>(x);
    for (int k = 0; k < S; ++k) with.s[k][j] = M::State::template store<T>(v[k]);
  }
}

// Streams of 16 bits, whose vectors the compiler would shuffle more than compute. A vector of them at a time is
// converted in registers, and need not keep its order, as long as all streams of a tensor have the same.
#if defined(__AVX512F__)
constexpr size_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr size_t vector_bytes = 32;
#else
constexpr size_t vector_bytes = 16;
#endif
constexpr int block = vector_bytes / sizeof(uint16_t);

template <Dtype dtype>
struct Blocks {
  static constexpr bool exist = false;
  static void load(const uint16_t* from, float* to);
  static void store(const float* from, uint16_t* to);
};

// A vector of pairs becomes one of their first elements and one of their second: the upper half of a float is a bf16.
template <>
struct Blocks<Dtype::bf16> {
  [[maybe_unused]] static constexpr bool exist = true;  // by a baseline that has no other

  static void load(const uint16_t* from, float* to) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    const Words first = pairs << 16, second = pairs & 0xffff0000u;
    std::memcpy(to, &first, sizeof first);
    std::memcpy(to + block / 2, &second, sizeof second);
  }
  static void store(const float* from, uint16_t* to) {
    const Words pairs = (rounded(from) >> 16) | (rounded(from + block / 2) & 0xffff0000u);
    std::memcpy(to, &pairs, sizeof pairs);
  }

 private:
  using Words = uint32_t __attribute__((vector_size(vector_bytes)));
  using Floats = float __attribute__((vector_size(vector_bytes)));

  // As to_bf16, in the upper halves.
  static Words rounded(const float* from) {
    Floats x;
    Words u;
    std::memcpy(&x, from, sizeof x);
    std::memcpy(&u, from, sizeof u);
    return x == x ? u + 0x7fffu + ((u >> 16) & 1u) : Words{} + 0x7fc00000u;
  }
};

#if defined(__AVX512F__)
// Whole vectors, as the loop between has them: it would wait for halves that were stored and come back as one. (With a
// mask, for g++ 12 warns of its own headers' others.)
template <>
struct Blocks<Dtype::f16> {  // in order
  static constexpr bool exist = true;

  static void load(const uint16_t* from, float* to) {
    for (int i = 0; i < block; i += 16)
      _mm512_storeu_ps(to + i,
                       _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  }
  static void store(const float* from, uint16_t* to) {
    for (int i = 0; i < block; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
};
#elif defined(__F16C__)
template <>
struct Blocks<Dtype::f16> {  // in order
  static constexpr bool exist = true;

  static void load(const uint16_t* from, float* to) {
    for (int i = 0; i < block; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  static void store(const float* from, uint16_t* to) {
    for (int i = 0; i < block; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
};
#endif

// Its loop is over arrays, not update_elements' over pointers to them, which took up to 1.5 times as long (RAdam,
// AVX2).
template <class Chain, Dtype dtype>
FASTOPT_HD void update_block(uint16_t* p, const uint16_t* g, uint16_t* const* s, const float* c, float shift) {
  constexpr int S = Chain::slots;
  alignas(64) float x[block], d[block], v[S + 1][block];
  Blocks<dtype>::load(p, x);
  Blocks<dtype>::load(g, d);
  for (int k = 0; k < S; ++k) Blocks<dtype>::load(s[k], v[k]);
#pragma clang loop vectorize(assume_safety)
#pragma GCC ivdep
  for (int i = 0; i < block; ++i) {
    float at = x[i], by = d[i] - shift, w[S + 1];
    for (int k = 0; k < S; ++k) w[k] = v[k][i];
    Chain::apply(at, by, w, c);
    x[i] = at;
    for (int k = 0; k < S; ++k) v[k][i] = w[k];
  }
  Blocks<dtype>::store(x, p);
  for (int k = 0; k < S; ++k) Blocks<dtype>::store(v[k], s[k]);
}

template <class Chain, Mix mix>
void update_blocks(const Run& run) {
  constexpr int S = Chain::slots;
  constexpr Dtype dtype = StreamsOf<mix>::p_dtype;
  const Operands<Chain, mix> with(run);
  uint16_t* s[S + 1];
  for (int k = 0; k < S; ++k) s[k] = with.s[k];
  int64_t j = 0;
  for (; j + block <= run.n; j += block) {
    update_block<Chain, dtype>(with.p + j, with.g + j, s, with.c, with.shift);
    for (int k = 0; k < S; ++k) s[k] += block;
  }
  if (j == run.n) return;
  // The rest in a block of its own, filled up with zeros.
  const size_t bytes = static_cast<size_t>(run.n - j) * sizeof(uint16_t);
  uint16_t rest[2 + S][block] = {}, *states[S + 1];
  std::memcpy(rest[0], with.p + j, bytes);
  std::memcpy(rest[1], with.g + j, bytes);
  for (int k = 0; k < S; ++k) std::memcpy(states[k] = rest[2 + k], s[k], bytes);
  update_block<Chain, dtype>(rest[0], rest[1], states, with.c, with.shift);
  std::memcpy(with.p + j, rest[0], bytes);
  for (int k = 0; k < S; ++k) std::memcpy(s[k], states[k], bytes);
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
      const auto* const raw = static_cast<const uint16_t*>(from);
      int64_t i = 0;
      if constexpr (sizeof(T) == 4 && Blocks<Dtype::f16>::exist)
        for (; i + block <= n; i += block) Blocks<Dtype::f16>::load(raw + i, to + i);
      for (; i < n; ++i) to[i] = from_f16(raw[i]);
      break;
    }
  }
}

template <class T>
void store(Dtype dtype, const T* from, void* to, int64_t n) {
  switch (dtype) {
    case Dtype::f32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = static_cast<float>(from[i]);
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = from[i];
      break;
    case Dtype::bf16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(to)[i] = to_bf16(narrow(from[i]));
      break;
    case Dtype::f16: {
      auto* const raw = static_cast<uint16_t*>(to);
      int64_t i = 0;
      if constexpr (sizeof(T) == 4 && Blocks<Dtype::f16>::exist)
        for (; i + block <= n; i += block) Blocks<Dtype::f16>::store(from + i, raw + i);
      for (; i < n; ++i) raw[i] = to_f16(narrow(from[i]));
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
  const auto add = [&](const T* terms) {
    for (int k = 0; k < L; ++k) {
      const double a = hi[k], b = static_cast<double>(terms[k]);
      const double t = a + b, z = t - a;
      lo[k] += (a - (t - z)) + (b - z);
      hi[k] = t;
    }
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) add(x + i);
  if (i < n) {
    T rest[L] = {};
    std::memcpy(rest, x + i, static_cast<size_t>(n - i) * sizeof(T));
    add(rest);
  }
  std::memcpy(sum.hi, hi, sizeof hi);
  std::memcpy(sum.lo, lo, sizeof lo);
}

template <Mix mix, class Chain>
constexpr Update kernel() {
  using M = StreamsOf<mix>;
  if constexpr (M::p_dtype == M::s_dtype && Blocks<M::p_dtype>::exist)
    return update_blocks<Chain, mix>;
  else
    return update_elements<Chain, mix>;
}

template <Mix mix, class... Chains>
constexpr Update kernels[sizeof...(Chains)] = {kernel<mix, Chains>()...};

template <class... Chains>
constexpr InstructionSet instruction_set_of(const char* name, List<Chains...>) {
  InstructionSet set{
      name, {}, {load<float>, store<float>, accumulate<float>}, {load<double>, store<double>, accumulate<double>}};
  const auto has = [&](Mix mix, const Update* of) { set.update[static_cast<int>(mix)] = of; };
  has(Mix::f32, kernels<Mix::f32, Chains...>);
  has(Mix::f64, kernels<Mix::f64, Chains...>);
#if !defined(__x86_64__) || defined(__AVX2__)  // the baseline of x86 serves few: not worth as much again to compile
  has(Mix::bf16, kernels<Mix::bf16, Chains...>);
  has(Mix::bf16_f32, kernels<Mix::bf16_f32, Chains...>);
#endif
  if constexpr (Blocks<Dtype::f16>::exist) has(Mix::f16, kernels<Mix::f16, Chains...>);
  return set;
}

}  // namespace

#define FASTOPT_TEXT_(x) #x
#define FASTOPT_TEXT(x) FASTOPT_TEXT_(x)

const InstructionSet& FASTOPT_ISA() {
  static constexpr InstructionSet set = instruction_set_of(FASTOPT_TEXT(FASTOPT_ISA), Chains{});
  return set;
}

}  // namespace fastopt
