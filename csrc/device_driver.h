// What a device offers to the plan: its kernels, launched on a stream. Two implementations: cuda_driver.cu, and
// emulator.cpp for tests, where the device is the CPU.
#pragma once

#include <cstdint>

#include "device.h"

namespace fastopt {

// Where kernels go: a device by number and its stream as the raw handle torch uses. Work is only enqueued.
struct Target {
  int device;
  void* stream;
};

// Parameters of one launch: an Arguments<tier>, in memory for the largest, and how many warps it asks for.
struct Launch {
  int tier;
  const void* arguments;
  uint32_t warps;
};

// The same for a RowsArguments<tier>: one thread for each tensor.
struct RowsLaunch {
  int tier;
  const void* arguments;
  uint32_t threads;
};

// Failures are thrown as std::runtime_error that names the kernel.
struct DeviceDriver {
  const char* name;
  bool has_mix[mixes];  // kernels compiled for it; where they are not, an any_ mix does the work
  // Brings the mix's kernels of every chain, and those of the rows, to the device. A kernel is otherwise loaded by its
  // first launch, which may be in the capture of a graph, where not everything that loading needs is allowed.
  void (*load)(int device, Mix mix, bool centralise);
  void (*update)(const Target&, const Launch&, Mix mix, int chain, bool centralise);
  void (*sum_rows)(const Target&, const Launch&, bool wide);  // wide: the compute type is double
  void (*make_rows)(const Target&, const RowsLaunch&);
};

// Null where the extension was built without.
const DeviceDriver* cuda_driver();
const DeviceDriver* emulator();

// For tests of tensors too large to emulate whole: every launch runs its last items only; 0: all.
void emulate_only_last(uint32_t items);

}  // namespace fastopt
