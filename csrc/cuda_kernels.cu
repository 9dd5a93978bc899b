// Every chain as CUDA kernels for one mix, FASTOPT_MIX; compiled once for each mix. No torch header.
#include "cuda_kernels.h"

#include <type_traits>

namespace fastopt {
namespace {

// How many blocks an SM should hold, by the states of a chain: as many as ptxas fits without a spill on sm_90, whose
// memory asks for the most bytes in flight for its registers: each thread has one vector of every stream on its way.
// For sm_100 ptxas takes more registers; sm_80 has half the bandwidth. tests/test_cuda_compiled.py lists what comes of
// it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 9
constexpr bool packed = true;
#else
constexpr bool packed = false;
#endif

template <class Chain, Mix mix, bool centralise>
constexpr int blocks_per_sm() {
  using M = MixOf<mix>;
  constexpr int slots = Chain::slots;
  if constexpr (M::any) {
    return centralise ? 1 : 2;
  } else if constexpr (centralise) {
    return M::V == 4 && slots <= 2 ? 3 : 2;
  } else if constexpr (M::V == 2) {
    constexpr int f64[] = {4, 3, 2, 2, 2};
    return f64[slots];
  } else if constexpr (packed) {
    constexpr int f32[] = {6, 5, 4, 4, 4}, mixed[] = {5, 4, 3, 3, 2}, narrow[] = {5, 4, 4, 3, 3};
    if (M::V == 8) return M::s_dtype == Dtype::f32 ? mixed[slots] : narrow[slots];
    // Ten coefficients beside five vectors are more than 64 registers hold.
    return slots == 3 && Chain::coefficients >= 10 ? 3 : f32[slots];
  } else {
    constexpr int f32[] = {5, 4, 3, 3, 2}, narrow[] = {5, 4, 3, 2, 2};
    return M::V == 8 ? narrow[slots] : f32[slots];
  }
}

template <class Chain, Mix mix, bool centralise, int tier>
__global__ void __launch_bounds__(block_threads, (blocks_per_sm<Chain, mix, centralise>()))
    update(const __grid_constant__ Arguments<tier> arguments) {
  run_item<Chain, mix, centralise>(arguments.header, arguments.payload, CudaWarp::item(), CudaWarp());
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
