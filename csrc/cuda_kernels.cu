// Every chain as CUDA kernels for one mix, FASTOPT_MIX; compiled once for each mix. No torch header.
#include "cuda_kernels.h"

#include <type_traits>

#include "device_kernels.h"

namespace fastopt {
namespace {

// The lanes of the warp that a thread belongs to.
struct CudaWarp {
  int lane;
  template <class F>
  __device__ void each(F f) const {
    f(lane);
  }
  template <class F>
  __device__ Pair sum(F f) const {
    Pair all = f(lane);
    for (int apart = lanes / 2; apart > 0; apart /= 2)
      all = add(all, {__shfl_xor_sync(~0u, all.hi, apart), __shfl_xor_sync(~0u, all.lo, apart)});
    return all;
  }
};

// Blocks of 256 threads that an SM should hold: as many as keep 64 KB of loads in flight without spilling.
template <class Chain, Mix mix>
constexpr int blocks_per_sm = Chain::slots <= 2 && MixOf<mix>::V <= 4 ? 4 : 2;

template <class Chain, Mix mix, bool centralise, int tier>
__global__ void __launch_bounds__(block_threads, (blocks_per_sm<Chain, mix>))
    update(const __grid_constant__ Arguments<tier> arguments) {
  const CudaWarp warp{static_cast<int>(threadIdx.x % lanes)};
  const uint32_t item = blockIdx.x * (block_threads / lanes) + threadIdx.x / lanes;
  run_item<Chain, mix, centralise>(arguments.header, arguments.payload, item, warp);
}

template <class Chain, class Chains>
constexpr bool is_in = false;
template <class Chain, class... Chains>
constexpr bool is_in<Chain, List<Chains...>> = (std::is_same_v<Chain, Chains> || ...);

template <class Chain, Mix mix, int tier>
CudaKernel kernel_of() {
  CudaKernel kernel{reinterpret_cast<const void*>(&update<Chain, mix, false, tier>), nullptr};
  if constexpr (is_in<Chain, Centralised>)
    kernel.centralised = reinterpret_cast<const void*>(&update<Chain, mix, true, tier>);
  return kernel;
}

// A mix that takes any tensor is for the few that are unusual: they go in small launches.
template <Mix mix, int tier, class... Chains>
const CudaKernel* kernels(List<Chains...>) {
  static const CudaKernel table[] = {kernel_of<Chains, mix, MixOf<mix>::any ? 0 : tier>()...};
  return table;
}

}  // namespace

template <>
const CudaKernel& cuda_kernel<Mix::FASTOPT_MIX>(int chain, int tier) {
  return (tier == 0 ? kernels<Mix::FASTOPT_MIX, 0>(Chains{}) : kernels<Mix::FASTOPT_MIX, 1>(Chains{}))[chain];
}

}  // namespace fastopt
