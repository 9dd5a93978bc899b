// Where the CUDA driver finds the kernels: host addresses that cudaLaunchKernel takes. And a warp as they see it.
#pragma once

#include "device_kernels.h"

namespace fastopt {

// Null where a chain has none. Those that divide gradients by a loss scale take the largest parameters only, or in the
// mixes that take any tensor the smallest: a question for each element would cost the others registers and time.
struct CudaKernel {
  const void* address[2][2];  // whether gradients are centralised, and whether they are scaled
};
inline constexpr int scaled_tier(bool any) { return any ? 0 : tiers - 1; }

template <Mix mix>
const CudaKernel& cuda_kernel(int chain, int tier);

// The warp that a thread belongs to: it runs functions of a lane.
struct CudaWarp {
  static __device__ uint32_t item() { return blockIdx.x * (block_threads / lanes) + threadIdx.x / lanes; }

  template <class F>
  __device__ void each(F f) const {
    f(static_cast<int>(threadIdx.x % lanes));
  }
  template <class F>
  __device__ Pair sum(F f) const {
    Pair all = f(static_cast<int>(threadIdx.x % lanes));
    for (int apart = lanes / 2; apart > 0; apart /= 2)
      all = add(all, {__shfl_xor_sync(~0u, all.hi, apart), __shfl_xor_sync(~0u, all.lo, apart)});
    return all;
  }
};

}  // namespace fastopt
