// Stochastic gradient descent and its two momenta.
#pragma once

#include "ops.h"

namespace fastopt {

struct sgd {
  static constexpr const char* name = "sgd";
  static constexpr const char* state = "";
  static constexpr const char* coefficients = "minus_lr";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, const T (&c)[1]) {
    p = fma(c[0], g, p);
  }
};

// The first gradient enters undamped. (Polyak 1964)
struct momentum {
  static constexpr const char* name = "momentum";
  static constexpr const char* state = "buf";
  static constexpr const char* coefficients = "first mu undamped";
  template <class T>
  FASTOPT_HD static void apply(T&, T& g, T (&s)[1], const T (&c)[3]) {
    auto& [buf] = s;
    const auto& [first, mu, undamped] = c;
    buf = first > T(0.5) ? g : fma(undamped, g, buf * mu);
    g = buf;
  }
};

// Momentum looked up one step ahead. (Sutskever et al. 2013)
struct nesterov {
  static constexpr const char* name = "nesterov";
  static constexpr const char* state = "buf";
  static constexpr const char* coefficients = "first mu undamped";
  template <class T>
  FASTOPT_HD static void apply(T&, T& g, T (&s)[1], const T (&c)[3]) {
    auto& [buf] = s;
    const auto& [first, mu, undamped] = c;
    buf = first > T(0.5) ? g : fma(undamped, g, buf * mu);
    g = fma(mu, buf, g);
  }
};

}  // namespace fastopt
