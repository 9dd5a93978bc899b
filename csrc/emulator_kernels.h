// Where the emulator finds the kernels of a mix.
#pragma once

#include "device.h"

namespace fastopt {

using EmulatedKernel = void (*)(const LaunchHeader&, const unsigned char* payload, uint32_t first, uint32_t warps);

template <Mix mix>
EmulatedKernel emulated_kernel(int chain, bool centralise);

}  // namespace fastopt
