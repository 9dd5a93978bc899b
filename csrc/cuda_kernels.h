// Where the CUDA driver finds the kernels: host addresses that cudaLaunchKernel takes. And a warp as they see it.
#pragma once

#include "device_kernels.h"

namespace fastopt {

struct CudaKernel {
  const void* plain;
  const void* centralised;  // null: this chain has none
};

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
