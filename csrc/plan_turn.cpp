// One thread at a time is in a plan. While it calls Python or runs the kernels the interpreter lock goes round, and
// others may come for the same plan: they wait, and what they ask to be let go of is let go of at the end.
#include <pthread.h>

#include <chrono>
#include <stdexcept>
#include <thread>

#include "plan.h"

namespace fastopt {
namespace {

uint64_t forks = 0;  // of this process and those it comes from

// A child has none of its parent's threads but one: no turn of another will end.
[[maybe_unused]] const int counts_forks = pthread_atfork(nullptr, nullptr, [] { ++forks; });

void pause() {
  PyThreadState* const thread = PyEval_SaveThread();
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  PyEval_RestoreThread(thread);
}

}  // namespace

// Who waits gets the interpreter lock while a step runs, and not in the moment between two: so a thread that comes back
// leaves it a turn.
Plan::Turn::Turn(Plan& plan) : plan_(plan) {
  const unsigned long self = PyThread_get_thread_ident();
  if (plan.owner_forks_ != forks) {
    plan.owner_ = 0;
    plan.waiting_ = 0;
    plan.released_ = false;
  }
  if (plan.owner_ == self) throw std::runtime_error("fastopt: a step of this optimizer began within another of its");
  for (int turns = 0; plan.waiting_ > 0 && !plan.owner_ && turns < 20; ++turns) pause();
  ++plan.waiting_;
  while (plan.owner_) pause();
  --plan.waiting_;
  plan.owner_ = self;
  plan.owner_forks_ = forks;
}

Plan::Turn::~Turn() {
  if (plan_.released_) {
    const ErrorKept kept;  // which may be what ends the turn
    plan_.released_ = false;
    plan_.clear();
  }
  plan_.owner_ = 0;
}

void Plan::release() {
  if (owner_ && owner_forks_ == forks)
    released_ = true;
  else
    clear();
}

}  // namespace fastopt
