// Adam and its relatives: moments m, v with bias corrections folded into the coefficients.
#pragma once

#include "ops.h"

namespace fastopt {

// The moments alone: what a rule does that waits before it moves the parameter.
struct moments {
  static constexpr const char* name = "moments";
  static constexpr const char* state = "m v";
  static constexpr const char* coefficients = "w1 beta2 w2";
  template <class T>
  FASTOPT_HD static void apply(T&, T& g, T (&s)[2], const T (&c)[3]) {
    auto& [m, v] = s;
    const auto& [w1, beta2, w2] = c;
    m = lerp2(m, g, w1);
    v = fma(w2 * g, g, v * beta2);
  }
};

// Kingma and Ba 2015; step_size = lr / (1 - beta1^t).
struct adam {
  static constexpr const char* name = "adam";
  static constexpr const char* state = "m v";
  static constexpr const char* coefficients = "w1 beta2 w2 eps sqrt_bc2 step_size";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[2], const T (&c)[6]) {
    auto& [m, v] = s;
    const auto& [w1, beta2, w2, eps, sqrt_bc2, step_size] = c;
    m = lerp2(m, g, w1);
    v = fma(w2 * g, g, v * beta2);
    T d = sqrt(v) / sqrt_bc2 + eps;
    p = p - (step_size * m) / d;
  }
};

// Adam whose denominator never shrinks. (Reddi, Kale and Kumar 2018)
struct amsgrad {
  static constexpr const char* name = "amsgrad";
  static constexpr const char* state = "m v vmax";
  static constexpr const char* coefficients = "w1 beta2 w2 eps sqrt_bc2 step_size";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[3], const T (&c)[6]) {
    auto& [m, v, vmax] = s;
    const auto& [w1, beta2, w2, eps, sqrt_bc2, step_size] = c;
    m = lerp2(m, g, w1);
    v = fma(w2 * g, g, v * beta2);
    vmax = maximum(vmax, v);
    T d = sqrt(vmax) / sqrt_bc2 + eps;
    p = p - (step_size * m) / d;
  }
};

// Adam with the infinity norm; eps enters inside the maximum, as in torch. (Kingma and Ba 2015, section 7.1)
struct adamax {
  static constexpr const char* name = "adamax";
  static constexpr const char* state = "m u";
  static constexpr const char* coefficients = "w1 beta2 eps step_size";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[2], const T (&c)[4]) {
    auto& [m, u] = s;
    const auto& [w1, beta2, eps, step_size] = c;
    m = lerp2(m, g, w1);
    u = maximum(u * beta2, abs(g) + eps);
    p = p - (step_size * m) / u;
  }
};

// Adam with Nesterov momentum: c_g and c_m weigh the gradient and the momentum. (Dozat 2016)
struct nadam {
  static constexpr const char* name = "nadam";
  static constexpr const char* state = "m v";
  static constexpr const char* coefficients = "w1 beta2 w2 eps bc2 c_g c_m";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[2], const T (&c)[7]) {
    auto& [m, v] = s;
    const auto& [w1, beta2, w2, eps, bc2, c_g, c_m] = c;
    m = lerp2(m, g, w1);
    v = fma(w2 * g, g, v * beta2);
    T d = sqrt(v / bc2) + eps;
    p = p + (c_g * g) / d;
    p = p + (c_m * m) / d;
  }
};

// Adam whose step waits for the variance of the denominator to be finite. (Liu et al. 2020)
struct radam {
  static constexpr const char* name = "radam";
  static constexpr const char* state = "m v";
  static constexpr const char* coefficients = "w1 beta2 w2 eps bc1 lr sqrt_bc2 rectified rect";
  template <class T>
  FASTOPT_HD static void apply(T& p, T& g, T (&s)[2], const T (&c)[9]) {
    auto& [m, v] = s;
    const auto& [w1, beta2, w2, eps, bc1, lr, sqrt_bc2, rectified, rect] = c;
    m = lerp2(m, g, w1);
    v = fma(w2 * g, g, v * beta2);
    T u = (m / bc1) * lr;
    T q = (T(1) / (sqrt(v) + eps)) * sqrt_bc2;
    p = p - (rectified > T(0.5) ? u * q * rect : u);
  }
};

}  // namespace fastopt
