// Threads that help the host with what it does for a device.
//
// torch has threads, but while a device works they fall asleep, and a step that comes then waits until all of them are
// awake: with sixteen, longer than one alone takes for a thousand tensors. Of these threads only as many are woken as
// there is work for, and nobody waits for one that comes too late.
#pragma once

#include <cstdint>
#include <functional>

namespace fastopt {

// Calls f on parts of [0, n), in the calling thread and in those of up to `threads` - 1 helpers that find some left.
// One thread at a time has their help; others do all by themselves. Rethrows what f throws, when all have ended.
void with_help(int64_t n, int threads, const std::function<void(int64_t, int64_t)>& f);

}  // namespace fastopt
