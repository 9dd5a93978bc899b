// Stands in for the device drivers that a build leaves out; it alone knows which those are.
#include "cuda_driver.h"
#include "device_driver.h"

namespace fastopt {

#if !defined(FASTOPT_WITH_CUDA)
const DeviceDriver* cuda_driver() { return nullptr; }
const char* cuda_archs() { return ""; }
std::string cuda_why_not(int) {
  return "the extension was built without CUDA kernels: install the CUDA toolkit (nvcc), then rebuild with "
         "FASTOPT_CUDA=1";
}
#endif

#if !defined(FASTOPT_WITH_EMULATOR)
const DeviceDriver* emulator() { return nullptr; }
void emulate_only_last(uint32_t) {}
#endif

}  // namespace fastopt
