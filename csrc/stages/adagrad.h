// Adagrad (Duchi, Hazan and Singer 2011).
#pragma once

#include "ops.h"

namespace fastopt {

struct adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr const char* state = "s";
  static constexpr const char* coefficients = "eps clr";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&state)[1], const T (&c)[2]) {
    auto& [s] = state;
    const auto& [eps, clr] = c;
    s = fma(g, g, s);
    p = p - (clr * g) / (sqrt(s) + eps);
  }
};

}  // namespace fastopt
