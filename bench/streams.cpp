// The streams of an optimizer with the arithmetic removed: g is read, every other tensor read and written, in one pass
// over memory. What a step could reach on this machine if its arithmetic were free. Compiled by streams.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

template <int N>
void pass(const float* __restrict g, float* const* updated, std::int64_t begin, std::int64_t end) {
  float* __restrict a = updated[0];
  float* __restrict b = updated[N > 1 ? 1 : 0];
  float* __restrict c = updated[N > 2 ? 2 : 0];
  float* __restrict d = updated[N > 3 ? 3 : 0];
#pragma GCC ivdep
  for (std::int64_t i = begin; i < end; ++i) {
    a[i] = g[i] - a[i];
    if constexpr (N > 1) b[i] = g[i] - b[i];
    if constexpr (N > 2) c[i] = g[i] - c[i];
    if constexpr (N > 3) d[i] = g[i] - d[i];
  }
}

}  // namespace

// Threads take the next piece as they come to it: a core that is held up does not hold up the other.
extern "C" void streams(const float* g, float* const* updated, int count, std::int64_t numel, int threads) {
  constexpr std::int64_t piece = 1 << 17;
  std::atomic<std::int64_t> next{0};
  auto work = [&] {
    for (std::int64_t begin; (begin = next.fetch_add(piece)) < numel;) {
      const std::int64_t end = std::min(numel, begin + piece);
      if (count == 1) pass<1>(g, updated, begin, end);
      if (count == 2) pass<2>(g, updated, begin, end);
      if (count == 3) pass<3>(g, updated, begin, end);
      if (count == 4) pass<4>(g, updated, begin, end);
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work);
  work();
  for (auto& other : others) other.join();
}
