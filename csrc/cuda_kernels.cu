// Every chain as CUDA kernels for one mix, FASTOPT_MIX; compiled once for each mix. No torch header.
#include "cuda_kernels.h"

#include <type_traits>

namespace fastopt {
namespace {

// What a thread holds at the same time: addresses and a vector of every stream, the coefficients, and room to compute,
// more of it the more there is to keep apart. ptxas gets no more registers than that, in steps of eight, so that an SM
// holds as many threads as it can: bandwidth depends on how many bytes they have under way. None of it may spill;
// tests/test_cuda_compiled.py looks.
template <class Chain, Mix mix>
constexpr int registers_of() {
  using M = MixOf<mix>;
  constexpr int slots = Chain::slots, addresses = 2 * (2 + slots);
  constexpr int vectors = M::V * (2 * size_of(M::p_dtype) + slots * size_of(M::s_dtype)) / 4;
  constexpr int coefficients = Chain::coefficients * sizeof(typename M::T) / 4;
  constexpr bool wide = sizeof(typename M::T) == 8, mixed = M::p_dtype != M::s_dtype;
  constexpr int room = (wide ? 36 : M::V == 8 ? 20 : mixed ? 18 : 16) + (slots < 3 ? 0 : mixed ? 14 : 8);
  return (addresses + vectors + coefficients + room + 7) / 8 * 8;
}

template <class Chain, Mix mix, bool centralise, bool scaled>
constexpr int blocks_per_sm() {
  if constexpr (scaled)
    return 1;
  else if constexpr (MixOf<mix>::any)
    return centralise ? 2 : 4;
  else if constexpr (centralise)
    return 4;
  else
    return 65536 / (block_threads * registers_of<Chain, mix>());
}

template <class Chain, Mix mix, bool centralise, bool scaled, int tier>
__global__ void __launch_bounds__(block_threads, (blocks_per_sm<Chain, mix, centralise, scaled>()))
    update(const __grid_constant__ Arguments<tier> arguments) {
  run_item<Chain, mix, centralise, scaled>(arguments.header, arguments.payload, CudaWarp::item(), CudaWarp());
}

template <class Chain, class Chains>
constexpr bool is_in = false;
template <class Chain, class... Chains>
constexpr bool is_in<Chain, List<Chains...>> = (std::is_same_v<Chain, Chains> || ...);

template <class Chain, Mix mix, bool centralise, bool scaled, int tier>
const void* address() {
  return reinterpret_cast<const void*>(&update<Chain, mix, centralise, scaled, tier>);
}

template <class Chain, Mix mix, int tier>
CudaKernel kernel_of() {
  constexpr int scaled = scaled_tier(MixOf<mix>::any);
  CudaKernel kernel{{{address<Chain, mix, false, false, tier>(), nullptr}, {nullptr, nullptr}}};
  if constexpr (!std::is_same_v<Chain, Pull>) kernel.address[0][1] = address<Chain, mix, false, true, scaled>();
  if constexpr (is_in<Chain, Centralised>) {
    kernel.address[1][0] = address<Chain, mix, true, false, tier>();
    kernel.address[1][1] = address<Chain, mix, true, true, scaled>();
  }
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
