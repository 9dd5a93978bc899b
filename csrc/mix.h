// How the streams of a tensor are stored: p and its gradient in one dtype, its states in one. Plain data, no torch.
#pragma once

#include <algorithm>

#include "dtype.h"

namespace fastopt {

// The named ones have kernels of their own; the last two take every other combination of dtypes.
enum class Mix : int8_t { f32, f64, bf16, f16, bf16_f32, f16_f32, any_f32, any_f64 };
inline constexpr int mixes = 8;
inline constexpr const char* mix_names[mixes] = {"f32",      "f64",     "bf16",    "f16",
                                                 "bf16_f32", "f16_f32", "any_f32", "any_f64"};

constexpr bool is_any(Mix mix) { return mix == Mix::any_f32 || mix == Mix::any_f64; }
constexpr bool is_wide(Mix mix) { return mix == Mix::f64 || mix == Mix::any_f64; }  // computes in double
constexpr Mix any_mix(Dtype p) { return p == Dtype::f64 ? Mix::any_f64 : Mix::any_f32; }

// The mix of a parameter whose gradient has its dtype, given its states'.
inline Mix mix_of(Dtype p, const Dtype* states, int slots) {
  const auto all = [&](Dtype dtype) {
    return std::all_of(states, states + slots, [=](Dtype state) { return state == dtype; });
  };
  constexpr Mix alike[] = {Mix::f32, Mix::f64, Mix::bf16, Mix::f16};
  if (all(p)) return alike[static_cast<int>(p)];
  if (all(Dtype::f32) && p == Dtype::bf16) return Mix::bf16_f32;
  if (all(Dtype::f32) && p == Dtype::f16) return Mix::f16_f32;
  return any_mix(p);
}

template <Dtype PG, Dtype S, class Compute>
struct Streams {
  static constexpr Dtype p_dtype = PG, s_dtype = S;
  using T = Compute;
  using P = Stored<PG>;
  using State = Stored<S>;
  using PRaw = typename P::Raw;
  using SRaw = typename State::Raw;
};
template <class Compute>
struct AnyStreams {
  using T = Compute;
  using PRaw = void;
  using SRaw = void;
};

template <Mix mix>
struct StreamsOf;
template <>
struct StreamsOf<Mix::f32> : Streams<Dtype::f32, Dtype::f32, float> {};
template <>
struct StreamsOf<Mix::f64> : Streams<Dtype::f64, Dtype::f64, double> {};
template <>
struct StreamsOf<Mix::bf16> : Streams<Dtype::bf16, Dtype::bf16, float> {};
template <>
struct StreamsOf<Mix::f16> : Streams<Dtype::f16, Dtype::f16, float> {};
template <>
struct StreamsOf<Mix::bf16_f32> : Streams<Dtype::bf16, Dtype::f32, float> {};
template <>
struct StreamsOf<Mix::f16_f32> : Streams<Dtype::f16, Dtype::f32, float> {};
template <>
struct StreamsOf<Mix::any_f32> : AnyStreams<float> {};
template <>
struct StreamsOf<Mix::any_f64> : AnyStreams<double> {};

}  // namespace fastopt
