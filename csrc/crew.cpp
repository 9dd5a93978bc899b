#include "crew.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>

// The entry of torch's OpenMP runtime, GCC's, that `#pragma omp parallel` calls. By name, for another compiler's pragma
// calls a runtime of its own, with threads of its own that torch.set_num_threads does not reach.
extern "C" {
void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
}

namespace fastopt {
namespace {

// A thread was late if all of them took this many times what one is expected to take, and longer than a step's noise.
constexpr double late = 4, noise = 1e-3;
constexpr int trust = 64;  // runs without one after which the next pause is a short one again

// As at::parallel_for, which without a compiler's own OpenMP would run on one thread.
void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  struct Work {
    const int64_t n, grain;
    const std::function<void(int64_t, int64_t)>& f;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error;
  } work{n, grain, f};
  const auto share = [](void* of) {
    auto& [n, grain, f, failed, error] = *static_cast<Work*>(of);
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), at::divup(n, grain)), each = at::divup(n, threads);
    const int64_t begin = omp_get_thread_num() * each;
    if (begin >= n) return;
    try {
      f(begin, std::min(n, begin + each));
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  };
  GOMP_parallel(share, &work, 0, 0);
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace

void Crew::note(Work work, int64_t n, double seconds, int threads) {
  Pace& pace = paces_[static_cast<int>(work)];
  const double each = seconds / static_cast<double>(n);
  if (threads == 1) {
    pace.alone = pace.alone > 0 ? pace.alone + (each - pace.alone) / 4 : each;
    if (rest_ > 0) --rest_;
    return;
  }
  // All threads at most do that many times what one does. Where one has shown what it does, that counts: a best time of
  // more threads, or of another memory, may never come again.
  const double most = threads * pace.together, expected = pace.alone > 0 ? pace.alone : most;
  if (most > 0 && seconds > noise && each > late * expected) {
    rest_ = pause_;
    pause_ = std::min(longest, 2 * pause_);
    good_ = 0;
    return;
  }
  pace.together = most > 0 ? std::min(each, 1.01 * pace.together) : each;
  if (++good_ == trust) pause_ = shortest;
}

void Crew::run(Work work, int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  at::internal::lazy_init_num_threads();
  if (n <= 0) return;
  if (n <= grain || at::get_num_threads() == 1 || at::in_parallel_region()) return f(0, n);
  using Clock = std::chrono::steady_clock;
  const bool all = together();
  const auto began = Clock::now();
  all ? parallel(n, grain, f) : f(0, n);
  note(work, n, std::chrono::duration<double>(Clock::now() - began).count(), all ? at::get_num_threads() : 1);
}

}  // namespace fastopt
