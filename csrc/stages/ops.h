// The arithmetic that stages may use besides + - *: each function is one correctly rounded IEEE operation (lerp2 aside)
// and means the same on the host, scalar or vectorised, and on the device. Built with contraction off: a product and a
// sum become one rounding only where fma is written.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FASTOPT_HD __host__ __device__ __forceinline__
#else
#define FASTOPT_HD inline __attribute__((always_inline))
#endif

namespace fastopt {

FASTOPT_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTOPT_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

FASTOPT_HD float sqrt(float x) { return __builtin_sqrtf(x); }
FASTOPT_HD double sqrt(double x) { return __builtin_sqrt(x); }

FASTOPT_HD float abs(float x) { return __builtin_fabsf(x); }
FASTOPT_HD double abs(double x) { return __builtin_fabs(x); }

// NaN from either side survives, as in torch.maximum.
template <class T>
FASTOPT_HD T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// a + w (b - a) as torch.lerp computes it, signs of zeros included: from the nearer end, so that w = 1 gives b.
template <class T>
FASTOPT_HD T lerp2(T a, T b, T w) {
  return abs(w) < T(0.5) ? fma(w, b - a, a) : fma(b - a, w - T(1), b);
}

}  // namespace fastopt
