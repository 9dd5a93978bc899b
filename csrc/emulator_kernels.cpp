// Every chain's device kernel for one mix, FASTOPT_MIX, as host code: compiled once for each mix, like cuda_kernels.cu.
#include "emulator_kernels.h"

#include <type_traits>

#include "device_kernels.h"
#include "emulator_warp.h"

namespace fastopt {
namespace {

template <class Chain, Mix mix, bool centralise, bool scaled>
void update_all(const LaunchHeader& header, const unsigned char* payload, uint32_t first, uint32_t warps) {
  // As many as whole blocks have: the surplus must do nothing.
  const uint32_t per_block = block_threads / lanes, all = (warps + per_block - 1) / per_block * per_block;
  for (uint32_t item = first; item < all; ++item)
    run_item<Chain, mix, centralise, scaled>(header, payload, item, EmulatedWarp{});
}

template <class Chain, Mix mix, bool centralise>
void update(const LaunchHeader& header, const unsigned char* payload, uint32_t first, uint32_t warps) {
  if (header.grad_scale)
    update_all<Chain, mix, centralise, true>(header, payload, first, warps);
  else
    update_all<Chain, mix, centralise, false>(header, payload, first, warps);
}

template <class Chain, Mix mix, class... Some>
constexpr EmulatedKernel centralised(List<Some...>) {
  if constexpr ((std::is_same_v<Chain, Some> || ...))
    return update<Chain, mix, true>;
  else
    return nullptr;
}

template <Mix mix, class... Chains>
EmulatedKernel find(int chain, bool centralise, List<Chains...>) {
  static constexpr EmulatedKernel plain[] = {update<Chains, mix, false>...};
  static constexpr EmulatedKernel centred[] = {centralised<Chains, mix>(Centralised{})...};
  return centralise ? centred[chain] : plain[chain];
}

}  // namespace

template <>
EmulatedKernel emulated_kernel<Mix::FASTOPT_MIX>(int chain, bool centralise) {
  return find<Mix::FASTOPT_MIX>(chain, centralise, Chains{});
}

}  // namespace fastopt
