// RMSprop (Hinton 2012), centered (Graves 2013), with and without momentum.
#pragma once

#include "ops.h"

namespace fastopt {

struct rmsprop {
  static constexpr const char* name = "rmsprop";
  static constexpr const char* state = "v";
  static constexpr const char* coefficients = "alpha w eps minus_lr";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[1], const T (&c)[4]) {
    auto& [v] = s;
    const auto& [alpha, w, eps, minus_lr] = c;
    v = fma(w * g, g, v * alpha);
    p = p + (minus_lr * g) / (sqrt(v) + eps);
  }
};

struct rmsprop_momentum {
  static constexpr const char* name = "rmsprop_momentum";
  static constexpr const char* state = "v buf";
  static constexpr const char* coefficients = "alpha w eps minus_lr mu";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[2], const T (&c)[5]) {
    auto& [v, buf] = s;
    const auto& [alpha, w, eps, minus_lr, mu] = c;
    v = fma(w * g, g, v * alpha);
    buf = buf * mu + g / (sqrt(v) + eps);
    p = fma(minus_lr, buf, p);
  }
};

struct rmsprop_centered {
  static constexpr const char* name = "rmsprop_centered";
  static constexpr const char* state = "v ga";
  static constexpr const char* coefficients = "alpha w eps minus_lr";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[2], const T (&c)[4]) {
    auto& [v, ga] = s;
    const auto& [alpha, w, eps, minus_lr] = c;
    v = fma(w * g, g, v * alpha);
    ga = lerp2(ga, g, w);
    p = p + (minus_lr * g) / (sqrt(fma(-ga, ga, v)) + eps);
  }
};

struct rmsprop_centered_momentum {
  static constexpr const char* name = "rmsprop_centered_momentum";
  static constexpr const char* state = "v ga buf";
  static constexpr const char* coefficients = "alpha w eps minus_lr mu";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[3], const T (&c)[5]) {
    auto& [v, ga, buf] = s;
    const auto& [alpha, w, eps, minus_lr, mu] = c;
    v = fma(w * g, g, v * alpha);
    ga = lerp2(ga, g, w);
    buf = buf * mu + g / (sqrt(fma(-ga, ga, v)) + eps);
    p = fma(minus_lr, buf, p);
  }
};

}  // namespace fastopt
