// Coefficient rows in C++: the twin of `Setting.at` in fastopt/setting.py and of the rules' `coefficients`.
//
// The compiled plan makes its rows with it, for Python is slow to ask in a step. And a counter in device memory must
// not be waited for, so a kernel that runs before the others makes each tensor's row there, in double, one thread per
// tensor, and picks the chain that takes the tensor. On the host the doubles are Python's bit for bit: `**` is libm's
// pow. CUDA's pow is within 2 ulp of the exact value and libm's within 1, so on a device a coefficient may differ in
// its last bits, by more where 1 - beta^t cancels. Built with contraction off.
#pragma once

#include <cmath>
#include <cstdint>

#include "chain.h"

namespace fastopt {

// What a step may do to a tensor: bit 0 says that it ends at the slow weights, bit 1 that the rule waits. pull: a
// tensor without a gradient meets its slow weights.
enum class Way : int8_t { update, update_lookahead, wait, wait_lookahead, pull };
inline constexpr int ways = 5;

enum class Decay : int8_t { none, l2, shrink };

// Where a hyper-parameter is: in the setting, or a scalar in device memory.
enum class Source : int8_t { value, f32, f64 };
union Scalar {
  double value;
  const float* f32;
  const double* f64;
};

inline constexpr int max_hyper = 6;

// One distinct set of hyper-parameters. Plain data, passed by value in a kernel's parameters.
struct RowSetting {
  Scalar hyper[max_hyper];  // in the order of the rule's `hyper`; the first is lr
  double weight_decay;
  double alpha;          // the step of the slow weights
  double period;         // > 0: slow weights synchronise every so many steps of a tensor's own; 0: when asked
  int16_t chains[ways];  // by Way; -1: cannot occur
  Source sources[max_hyper];
  int8_t rule;  // its place in RowRules
  Decay decay;
  bool maximize;
  bool slow;  // has slow weights
};

struct RowResult {
  double c[max_coefficients];
  double carry;  // the second counter after the step
  int32_t count;
  int16_t chain;
  Way way;
};

template <int n>
struct Values {
  double at[n];
};

namespace rows {

// x ** 0.5 as Python computes it. On a device the correctly rounded root: nearer to libm's pow, and cheaper, than pow.
FASTOPT_HD double root(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return ::pow(x, 0.5);
#endif
}

FASTOPT_HD double to_single(double x) { return static_cast<double>(static_cast<float>(x)); }

// What most rules do: no second counter, no step that waits.
struct plain {
  static constexpr bool patient = false;
  template <class Hyper>
  FASTOPT_HD static double carried(const Hyper&, double, double carry, bool) {
    return carry;
  }
};

struct sgd : plain {
  static constexpr const char* name = "sgd";
  static constexpr const char* hyper = "lr";
  FASTOPT_HD static Values<1> coefficients(const double (&h)[1], double, double) { return {-h[0]}; }
};

struct momentum : plain {
  static constexpr const char* name = "momentum";
  static constexpr const char* hyper = "lr momentum dampening";
  FASTOPT_HD static Values<4> coefficients(const double (&h)[3], double t, double) {
    const auto& [lr, mu, dampening] = h;
    return {t == 1 ? 1.0 : 0.0, mu, 1 - dampening, -lr};
  }
};

struct rmsprop : plain {
  static constexpr const char* name = "rmsprop";
  static constexpr const char* hyper = "lr alpha eps";
  FASTOPT_HD static Values<4> coefficients(const double (&h)[3], double, double) {
    const auto& [lr, alpha, eps] = h;
    return {alpha, 1 - alpha, eps, -lr};
  }
};

struct rmsprop_momentum : plain {
  static constexpr const char* name = "rmsprop_momentum";
  static constexpr const char* hyper = "lr alpha eps momentum";
  FASTOPT_HD static Values<5> coefficients(const double (&h)[4], double, double) {
    const auto& [lr, alpha, eps, mu] = h;
    return {alpha, 1 - alpha, eps, -lr, mu};
  }
};

struct adagrad : plain {
  static constexpr const char* name = "adagrad";
  static constexpr const char* hyper = "lr lr_decay eps";
  FASTOPT_HD static Values<2> coefficients(const double (&h)[3], double t, double) {
    const auto& [lr, lr_decay, eps] = h;
    return {eps, lr / (1 + (t - 1) * lr_decay)};
  }
};

struct adam : plain {
  static constexpr const char* name = "adam";
  static constexpr const char* hyper = "lr beta1 beta2 eps";
  FASTOPT_HD static Values<6> coefficients(const double (&h)[4], double t, double) {
    const auto& [lr, beta1, beta2, eps] = h;
    return {1 - beta1, beta2, 1 - beta2, eps, root(1 - ::pow(beta2, t)), lr / (1 - ::pow(beta1, t))};
  }
};

struct adamax : plain {
  static constexpr const char* name = "adamax";
  static constexpr const char* hyper = "lr beta1 beta2 eps";
  FASTOPT_HD static Values<4> coefficients(const double (&h)[4], double t, double) {
    const auto& [lr, beta1, beta2, eps] = h;
    return {1 - beta1, beta2, eps, lr / (1 - ::pow(beta1, t))};
  }
};

// The second counter is the product of mu, in the dtype torch keeps it in.
struct nadam : plain {
  static constexpr const char* name = "nadam";
  static constexpr const char* hyper = "lr beta1 beta2 eps momentum_decay";
  FASTOPT_HD static double mu(const double (&h)[5], double t) { return h[1] * (1.0 - 0.5 * ::pow(0.96, t * h[4])); }
  FASTOPT_HD static double carried(const double (&h)[5], double t, double carry, bool single) {
    return single ? to_single(carry * to_single(mu(h, t))) : carry * mu(h, t);
  }
  FASTOPT_HD static Values<7> coefficients(const double (&h)[5], double t, double carry) {
    const auto& [lr, beta1, beta2, eps, momentum_decay] = h;
    const double mu_now = mu(h, t), mu_next = mu(h, t + 1);
    return {1 - beta1,
            beta2,
            1 - beta2,
            eps,
            1 - ::pow(beta2, t),
            -lr * (1.0 - mu_now) / (1.0 - carry),
            (-lr * mu_next) / (1.0 - carry * mu_next)};
  }
};

// `waits`, not 0: until the step is rectified, only the moments move.
struct radam : plain {
  static constexpr const char* name = "radam";
  static constexpr const char* hyper = "lr beta1 beta2 eps threshold waits";
  static constexpr bool patient = true;
  FASTOPT_HD static double rectification(const double (&h)[6], double t) {
    const double beta2 = h[2], threshold = h[4];
    const double bc2 = 1 - ::pow(beta2, t);
    const double rho_inf = 2 / (1 - beta2) - 1;
    const double rho = rho_inf - 2 * t * ::pow(beta2, t) / bc2;
    if (!(rho > threshold)) return 0;
    return root((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho));
  }
  FASTOPT_HD static bool waits(const double (&h)[6], double t) { return h[5] != 0 && rectification(h, t) == 0; }
  FASTOPT_HD static Values<3> moments(const double (&h)[6]) { return {1 - h[1], h[2], 1 - h[2]}; }
  FASTOPT_HD static Values<9> coefficients(const double (&h)[6], double t, double) {
    const auto& [lr, beta1, beta2, eps, threshold, waiting] = h;
    const double rect = rectification(h, t);
    return {1 - beta1, beta2, 1 - beta2, eps, 1 - ::pow(beta1, t), lr, root(1 - ::pow(beta2, t)), rect > 0 ? 1.0 : 0.0,
            rect};
  }
};

FASTOPT_HD void append(RowResult& row, double value) { row.c[row.count++] = value; }
template <int n>
FASTOPT_HD void append(RowResult& row, const Values<n>& values) {
  for (int i = 0; i < n; ++i) append(row, values.at[i]);
}

FASTOPT_HD double read(const RowSetting& s, int i) {
  switch (s.sources[i]) {
    case Source::f32:
      return *s.hyper[i].f32;
    case Source::f64:
      return *s.hyper[i].f64;
    default:
      return s.hyper[i].value;
  }
}

template <class Rule>
inline constexpr int hyper_of = count_words(Rule::hyper);

// Any rule's row at step t.
template <class Rule>
FASTOPT_HD void write(const RowSetting& s, double t, double carry, bool single, bool asked, RowResult& row) {
  double h[hyper_of<Rule>];
  for (int i = 0; i < hyper_of<Rule>; ++i) h[i] = read(s, i);
  row.carry = Rule::carried(h, t, carry, single);
  bool waits = false;
  if constexpr (Rule::patient) waits = Rule::waits(h, t);
  const bool synchronised = s.slow && (s.period > 0 ? ::fmod(t, s.period) == 0 : asked);
  row.way = static_cast<Way>(2 * waits + synchronised);
  append(row, s.maximize ? -1.0 : 1.0);
  if constexpr (Rule::patient)
    if (waits) append(row, Rule::moments(h));
  if (!waits) {
    if (s.decay == Decay::l2) append(row, s.weight_decay);
    if (s.decay == Decay::shrink) append(row, s.weight_decay == 0 ? 1.0 : 1 - h[0] * s.weight_decay);
    append(row, Rule::coefficients(h, t, row.carry));
  }
  if (synchronised) append(row, s.alpha);
}

template <class... Rules>
struct List {
  static constexpr int size = sizeof...(Rules);
  static_assert(((hyper_of<Rules> <= max_hyper) && ...));
  static constexpr const char* names[] = {Rules::name...};
  static constexpr const char* hyper[] = {Rules::hyper...};

  FASTOPT_HD static void write(const RowSetting& s, double t, double carry, bool single, bool asked, RowResult& row) {
    int i = 0;
    static_cast<void>(((s.rule == i++ ? (rows::write<Rules>(s, t, carry, single, asked, row), true) : false) || ...));
  }
};

}  // namespace rows

// Which coefficients there are. A rule's number is its place here and in ROW_RULES of fastopt/rule.py.
using RowRules = rows::List<rows::sgd, rows::momentum, rows::rmsprop, rows::rmsprop_momentum, rows::adagrad, rows::adam,
                            rows::adamax, rows::nadam, rows::radam>;

// The row at step t = 1, 2, ... (a counter may have been loaded that makes it anything). `single` says that the second
// counter is stored in float32, `asked` that the whole group synchronises.
FASTOPT_HD RowResult row_of(const RowSetting& s, double t, double carry, bool single, bool asked) {
  RowResult row{};
  RowRules::write(s, t, carry, single, asked, row);
  row.chain = s.chains[static_cast<int>(row.way)];
  return row;
}

// The row of a tensor without a gradient whose slow weights synchronise.
FASTOPT_HD RowResult pull_of(const RowSetting& s, double carry) {
  RowResult row{};
  row.carry = carry;
  row.way = Way::pull;
  rows::append(row, s.alpha);
  row.chain = s.chains[static_cast<int>(row.way)];
  return row;
}

}  // namespace fastopt
