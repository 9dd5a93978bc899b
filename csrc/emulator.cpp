// A device that is the CPU: the kernels' own source, lane by lane, in the memory of ordinary tensors. It is slow and
// exists so that tables, parameters and kernels can be tested where there is no GPU.
#include <stdexcept>

#include "device_driver.h"
#include "device_rows.h"
#include "emulator_kernels.h"
#include "emulator_warp.h"

namespace fastopt {
namespace {

uint32_t only_last = 0;
bool loaded[mixes], loaded_centralised[mixes];

void load(int, Mix mix, bool centralise) {
  loaded[static_cast<int>(mix)] = true;
  if (centralise) loaded_centralised[static_cast<int>(mix)] = true;
}

// A launch that reads rows made on the device may be captured; its kernel has to be there already.
void check_loaded(const LaunchHeader& header, Mix mix, bool centralise) {
  if (header.rows && !(centralise ? loaded_centralised : loaded)[static_cast<int>(mix)])
    throw std::logic_error("fastopt: a kernel was launched that was not loaded");
}

template <int... k>
EmulatedKernel find(Mix mix, int chain, bool centralise, std::integer_sequence<int, k...>) {
  EmulatedKernel found = nullptr;
  ((mix == static_cast<Mix>(k) && (found = emulated_kernel<static_cast<Mix>(k)>(chain, centralise))), ...);
  return found;
}

// Reads the parameters as the tier's kernel would, and no further.
template <class F>
void with_arguments(const Launch& launch, F f) {
  const auto run = [&](const auto& arguments) { f(arguments.header, arguments.payload); };
  if (launch.tier == 0)
    run(Arguments<0>(*static_cast<const Arguments<0>*>(launch.arguments)));
  else
    run(Arguments<1>(*static_cast<const Arguments<1>*>(launch.arguments)));
}

void update(const Target&, const Launch& launch, Mix mix, int chain, bool centralise) {
  const EmulatedKernel kernel = find(mix, chain, centralise, std::make_integer_sequence<int, mixes>{});
  if (!kernel) throw std::logic_error("fastopt: a kernel was launched that does not exist");
  with_arguments(launch, [&](const LaunchHeader& header, const unsigned char* payload) {
    check_loaded(header, mix, centralise);
    kernel(header, payload, only_last && only_last < launch.warps ? launch.warps - only_last : 0, launch.warps);
  });
}

void sum_rows(const Target&, const Launch& launch, bool wide) {
  with_arguments(launch, [&](const LaunchHeader& header, const unsigned char* payload) {
    for (uint32_t item = 0; item < launch.warps; ++item)
      wide ? sum_item<double>(header, payload, item, EmulatedWarp{})
           : sum_item<float>(header, payload, item, EmulatedWarp{});
  });
}

void make_rows(const Target&, const RowsLaunch& launch) {
  const auto run = [&](const auto& arguments) {
    const uint32_t all = (launch.threads + block_threads - 1) / block_threads * block_threads;
    for (uint32_t at = 0; at < all; ++at) make_row(arguments.header, arguments.payload, at);
  };
  if (launch.tier == 0)
    run(RowsArguments<0>(*static_cast<const RowsArguments<0>*>(launch.arguments)));
  else
    run(RowsArguments<1>(*static_cast<const RowsArguments<1>*>(launch.arguments)));
}

}  // namespace

void emulate_only_last(uint32_t items) { only_last = items; }

const DeviceDriver* emulator() {
  static constexpr DeviceDriver driver{
      "emulator", {true, true, true, true, true, true, true, true}, load, update, sum_rows, make_rows};
  return &driver;
}

}  // namespace fastopt
