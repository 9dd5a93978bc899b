// Where the CUDA driver finds the kernels: host addresses that cudaLaunchKernel takes.
#pragma once

#include "device.h"

namespace fastopt {

struct CudaKernel {
  const void* plain;
  const void* centralised;  // null: this chain has none
};

template <Mix mix>
const CudaKernel& cuda_kernel(int chain, int tier);

}  // namespace fastopt
