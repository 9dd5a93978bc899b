// Stages that prepare the gradient or the parameter before the rule.
#pragma once

#include "ops.h"

namespace fastopt {

// One factor on the gradient: -1 to maximize; exact, as is 1.
struct scale {
  static constexpr const char* name = "scale";
  static constexpr const char* state = "";
  static constexpr const char* coefficients = "factor";
  template <class T>
  FASTOPT_HD static void apply(T&, T& g, const T (&c)[1]) {
    g = g * c[0];
  }
};

// Coupled weight decay, before the moments.
struct l2 {
  static constexpr const char* name = "l2";
  static constexpr const char* state = "";
  static constexpr const char* coefficients = "weight_decay";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, const T (&c)[1]) {
    g = fma(c[0], p, g);
  }
};

// Decoupled weight decay (Loshchilov and Hutter 2019): factor = 1 - lr * weight_decay.
struct shrink {
  static constexpr const char* name = "shrink";
  static constexpr const char* state = "";
  static constexpr const char* coefficients = "factor";
  template <class T>
  FASTOPT_HD static void apply(T& p, T&, const T (&c)[1]) {
    p = p * c[0];
  }
};

}  // namespace fastopt
