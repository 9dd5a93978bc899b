// Launches the kernels of cuda_kernels.cu. It links the CUDA runtime statically and shares torch's contexts and
// streams; whatever a call fails with is thrown at once, with the kernel's name.
#include "cuda_driver.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "chains.h"
#include "cuda_kernels.h"
#include "device_driver.h"
#include "device_rows.h"

#if CUDART_VERSION < 12010
#error "fastopt's kernels take 32 KB of parameters: they need CUDA 12.1 or later"
#endif

namespace fastopt {
namespace {

using FindKernel = const CudaKernel& (*)(int chain, int tier);

// FASTOPT_CUDA_MIXES holds names separated by a space.
constexpr bool is_built(std::string_view mix) {
  std::string_view rest = FASTOPT_CUDA_MIXES;
  while (!rest.empty()) {
    const size_t end = rest.find(' ');
    if (rest.substr(0, end) == mix) return true;
    rest = end == rest.npos ? "" : rest.substr(end + 1);
  }
  return false;
}

template <int mix>
constexpr FindKernel find_kernel() {
  if constexpr (is_built(mix_names[mix]))
    return cuda_kernel<static_cast<Mix>(mix)>;
  else
    return nullptr;
}

template <int... mix>
const CudaKernel* find(Mix wanted, int chain, int tier, std::integer_sequence<int, mix...>) {
  static constexpr FindKernel finders[] = {find_kernel<mix>()...};
  const FindKernel finder = finders[static_cast<int>(wanted)];
  return finder ? &finder(chain, tier) : nullptr;
}

template <class... Chains>
std::string chain_name(int chain, List<Chains...>) {
  static const std::string names[] = {Chains::name()...};
  return names[chain];
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// What to do about an error, as far as it says.
std::string advice(cudaError_t error, int device) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
      return cuda_why_not(device);
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return "what was launched before on this device has failed, perhaps elsewhere than in fastopt; with "
             "CUDA_LAUNCH_BLOCKING=1 the error appears where it happens";
    default:
      return "";
  }
}

[[noreturn]] void fail(cudaError_t error, const std::string& kernel, int device) {
  cudaGetLastError();  // it is reported here and must not be met again by the next launch
  std::string text = "fastopt: launching " + kernel + " on cuda:" + std::to_string(device) +
                     " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  if (const std::string more = advice(error, device); !more.empty()) text += "; " + more;
  throw std::runtime_error(text);
}

// Calls f on a device that is current only meanwhile.
template <class F>
cudaError_t on_device(int device, const F& f) {
  int before;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  error = f();
  if (before != device) cudaSetDevice(before);
  return error;
}

// Launches enough blocks for so many warps or threads, `per_block` of them in each. `name` is called when something
// fails.
template <class Name>
void launch(const Target& target, const void* kernel, const void* parameters, uint32_t count, int per_block,
            const Name& name) {
  void* arguments[] = {const_cast<void*>(parameters)};
  const dim3 blocks((count + per_block - 1) / per_block);
  const cudaError_t error = on_device(target.device, [&] {
    return cudaLaunchKernel(kernel, blocks, dim3(block_threads), arguments, 0,
                            static_cast<cudaStream_t>(target.stream));
  });
  if (error != cudaSuccess) fail(error, name(), target.device);
}

template <class T, int tier>
__global__ void __launch_bounds__(block_threads, 8) sum_rows_kernel(const __grid_constant__ Arguments<tier> arguments) {
  sum_item<T>(arguments.header, arguments.payload, CudaWarp::item(), CudaWarp());
}

template <int tier>
__global__ void __launch_bounds__(block_threads)
    make_rows_kernel(const __grid_constant__ RowsArguments<tier> arguments) {
  make_row(arguments.header, arguments.payload, blockIdx.x * block_threads + threadIdx.x);
}

template <class... Arguments>
const void* address(void (*kernel)(Arguments...)) {
  return reinterpret_cast<const void*>(kernel);
}

template <class... Chains>
constexpr int count(List<Chains...>) {
  return sizeof...(Chains);
}

void update(const Target& target, const Launch& what, Mix mix, int chain, bool centralise) {
  const bool scaled = static_cast<const LaunchHeader*>(what.arguments)->grad_scale;
  const CudaKernel* const found = find(mix, chain, what.tier, std::make_integer_sequence<int, mixes>{});
  const void* const kernel = found ? found->address[centralise][scaled] : nullptr;
  const auto name = [&] {
    return chain_name(chain, Chains{}) + " (" + mix_names[static_cast<int>(mix)] + (centralise ? ", centralised" : "") +
           (scaled ? ", scaled)" : ")");
  };
  if (!kernel) throw std::logic_error("fastopt: there is no kernel " + name());
  launch(target, kernel, what.arguments, what.warps, block_threads / lanes, name);
}

const void* sum_rows_of(int tier, bool wide) {
  static const void* const kernels[tiers][2] = {
      {address(sum_rows_kernel<float, 0>), address(sum_rows_kernel<double, 0>)},
      {address(sum_rows_kernel<float, 1>), address(sum_rows_kernel<double, 1>)}};
  return kernels[tier][wide];
}

const void* make_rows_of(int tier) {
  static const void* const kernels[tiers] = {address(make_rows_kernel<0>), address(make_rows_kernel<1>)};
  return kernels[tier];
}

void load(int device, Mix mix, bool centralise) {
  const bool wide = is_wide(mix);
  std::vector<const void*> kernels;
  for (int tier = 0; tier < tiers; ++tier) {
    for (int chain = 0; chain < count(Chains{}); ++chain) {
      const CudaKernel* const found = find(mix, chain, tier, std::make_integer_sequence<int, mixes>{});
      if (found) kernels.insert(kernels.end(), found->address[0], found->address[centralise ? 2 : 1]);
    }
    if (centralise) kernels.push_back(sum_rows_of(tier, wide));
    kernels.push_back(make_rows_of(tier));
  }
  const cudaError_t error = on_device(device, [&] {
    cudaFuncAttributes attributes;
    cudaError_t first = cudaSuccess;
    for (const void* kernel : kernels)
      if (kernel && first == cudaSuccess) first = cudaFuncGetAttributes(&attributes, kernel);
    return first;
  });
  if (error != cudaSuccess)
    fail(error, "the first of the kernels for " + std::string(mix_names[static_cast<int>(mix)]), device);
}

void sum_rows(const Target& target, const Launch& what, bool wide) {
  launch(target, sum_rows_of(what.tier, wide), what.arguments, what.warps, block_threads / lanes,
         [] { return std::string("the sums of rows"); });
}

void make_rows(const Target& target, const RowsLaunch& what) {
  launch(target, make_rows_of(what.tier), what.arguments, what.threads, block_threads,
         [] { return std::string("the coefficient rows"); });
}

template <int... mix>
constexpr DeviceDriver driver_of(std::integer_sequence<int, mix...>) {
  return {"cuda", {is_built(mix_names[mix])...}, load, update, sum_rows, make_rows};
}

std::string why_no_device() {
  int count = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (error == cudaSuccess || error == cudaErrorNoDevice)
    return count > 0 ? "" : "no GPU is visible to CUDA (see nvidia-smi and CUDA_VISIBLE_DEVICES)";
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "there is no NVIDIA driver: install one";
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver is for CUDA " + version(driver) + ", fastopt's kernels were built with CUDA " +
           version(CUDART_VERSION) + ": update the driver, or rebuild with a toolkit no newer than the driver";
  return std::string("CUDA does not start: ") + cudaGetErrorString(error);
}

}  // namespace

const DeviceDriver* cuda_driver() {
  static constexpr DeviceDriver driver = driver_of(std::make_integer_sequence<int, mixes>{});
  return &driver;
}

const char* cuda_archs() { return FASTOPT_CUDA_ARCHS; }

std::string cuda_why_not(int device) {
  if (std::string reason = why_no_device(); !reason.empty()) return reason;
  int major = 0, minor = 0;
  const bool known = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  cudaGetLastError();
  if (!known) return "there is no cuda:" + std::to_string(device);
  const int capability = 10 * major + minor;
  if (archs_cover(cuda_archs(), capability)) return "";
  const std::string arch = std::to_string(capability);
  return std::string("the kernels were built for FASTOPT_CUDA_ARCHS=\"") + cuda_archs() +
         "\" and cuda:" + std::to_string(device) + " is sm_" + arch + ": rebuild with FASTOPT_CUDA_ARCHS=" + arch;
}

}  // namespace fastopt
