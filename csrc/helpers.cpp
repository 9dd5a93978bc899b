#include "helpers.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace fastopt {
namespace {

using Function = std::function<void(int64_t, int64_t)>;

constexpr int most_helpers = 15;
// What a thread takes at a time: enough for what is fetched ahead to arrive, little enough that all end together.
constexpr int64_t least_part = 32;
constexpr int parts_each = 6;
// A step has a second job for them soon after the first.
constexpr auto awake = std::chrono::microseconds(50);
constexpr int patience = 2000;  // pauses, before a processor is left to whom it may be short of

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Helpers {
 public:
  void run(int64_t n, int count, const Function& f) {
    {
      const std::lock_guard lock(mutex_);
      while (started_ < count && start(started_)) ++started_;
      count_ = std::min(count, started_);
      f_ = &f;
      n_ = n;
      part_ = std::max(least_part, n / (parts_each * (count_ + 1)));
      next_ = 0;
      ++job_;
    }
    wake(0);
    wake(1);
    work(f);
    {
      const std::lock_guard lock(mutex_);
      f_ = nullptr;  // who comes now comes too late
    }
    for (int turns = 0; inside_.load(std::memory_order_acquire) > 0; ++turns)
      turns < patience ? pause() : std::this_thread::yield();
    if (const std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
  }

 private:
  bool start(int helper) {
    // Python handles signals in its own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread([this, helper] { help(helper); }).detach();
    } catch (const std::system_error&) {
      started = false;  // no more threads are to be had: others do the work
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  // Each wakes two more, for waking a thread takes some microseconds.
  void wake(int helper) {
    if (helper < count_) called_[helper].notify_one();
  }

  [[noreturn]] void help(int helper) {
    for (uint64_t done = 0;;) {
      const auto until = std::chrono::steady_clock::now() + awake;
      while (job_.load(std::memory_order_relaxed) == done && std::chrono::steady_clock::now() < until) pause();
      const Function* f;
      {
        std::unique_lock lock(mutex_);
        called_[helper].wait(lock, [&] { return job_.load(std::memory_order_relaxed) != done; });
        done = job_;
        f = f_;
        if (!f || helper >= count_) continue;
        inside_.fetch_add(1, std::memory_order_relaxed);
        wake(2 * helper + 2);
        wake(2 * helper + 3);
      }
      work(*f);
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  void work(const Function& f) {
    for (int64_t begin; (begin = next_.fetch_add(part_, std::memory_order_relaxed)) < n_;) {
      try {
        f(begin, std::min(n_, begin + part_));
      } catch (...) {
        const std::lock_guard lock(mutex_);
        error_ = std::current_exception();
      }
    }
  }

  std::mutex mutex_;
  std::array<std::condition_variable, most_helpers> called_;
  std::atomic<uint64_t> job_ = 0;
  std::atomic<int64_t> next_ = 0;
  std::atomic<int> inside_ = 0;  // helpers that have come and not yet gone
  const Function* f_ = nullptr;  // null: there is nothing to do
  int64_t n_ = 0, part_ = 1;
  int count_ = 0, started_ = 0;
  std::exception_ptr error_;
};

// Never destroyed: its threads wait in it until the process ends. A process that was forked has none of them, and
// starts anew.
std::atomic<Helpers*> helpers = nullptr;
std::atomic_flag in_use = ATOMIC_FLAG_INIT;

void forget() {
  helpers = nullptr;
  in_use.clear();
}

Helpers& get() {
  if (Helpers* known = helpers) return *known;
  static const int registered = pthread_atfork(nullptr, nullptr, forget);
  static_cast<void>(registered);
  helpers = new Helpers;
  return *helpers;
}

}  // namespace

void with_help(int64_t n, int threads, const std::function<void(int64_t, int64_t)>& f) {
  const int count = std::min({threads - 1, most_helpers, static_cast<int>(std::min<int64_t>(n, 1 << 20) / least_part)});
  if (n <= 0) return;
  if (count <= 0 || in_use.test_and_set(std::memory_order_acquire)) return f(0, n);
  struct Release {
    ~Release() { in_use.clear(std::memory_order_release); }
  } const release;
  get().run(n, count, f);
}

}  // namespace fastopt
