// A warp on the CPU: its lanes run one after the other.
#pragma once

#include "device_kernels.h"

namespace fastopt {

struct EmulatedWarp {
  template <class F>
  void each(F f) const {
    for (int lane = 0; lane < lanes; ++lane) f(lane);
  }
  template <class F>
  Pair sum(F f) const {
    Pair all{0, 0};
    for (int lane = 0; lane < lanes; ++lane) all = add(all, f(lane));
    return all;
  }
};

}  // namespace fastopt
