// What is asked of the CUDA driver before it is used. Nothing here throws, whatever machine it is.
#pragma once

#include <string>

namespace fastopt {

// Why the CUDA kernels cannot run on this device, and what to do; empty if they can.
std::string cuda_why_not(int device);

// The architectures the kernels were built for, as in FASTOPT_CUDA_ARCHS; empty: built without.
const char* cuda_archs();

// Whether kernels built for `archs` run on a device of compute capability `capability`, 90 for 9.0: machine code does
// on its own major version from its minor version on, PTX on whatever is newer.
constexpr bool archs_cover(const char* archs, int capability) {
  for (const char* at = archs; *at;) {
    int arch = 0;
    for (; *at >= '0' && *at <= '9'; ++at) arch = 10 * arch + (*at - '0');
    const bool ptx = *at == '+';
    if (capability >= arch && (ptx || capability / 10 == arch / 10)) return true;
    while (*at && *at != ';') ++at;
    at += *at == ';';
  }
  return false;
}
static_assert(archs_cover("90", 90) && archs_cover("80", 86) && archs_cover("80;90;100+PTX", 120));
static_assert(!archs_cover("90", 80) && !archs_cover("86", 80) && !archs_cover("80;90", 100) && !archs_cover("", 90));

}  // namespace fastopt
