// Stages appended after a rule.
#pragma once

#include "ops.h"

namespace fastopt {

// Slow weights take a step of alpha towards the fast ones, which restart there. (Zhang et al. 2019)
struct lookahead {
  static constexpr const char* name = "lookahead";
  static constexpr const char* state = "slow";
  static constexpr const char* coefficients = "alpha";
  template <class T>
  FASTOPT_HD static void apply(T& p, T&, T (&s)[1], const T (&c)[1]) {
    auto& [slow] = s;
    slow = lerp2(slow, p, c[0]);
    p = slow;
  }
};

}  // namespace fastopt
