// Work on torch's threads, where it is worth waiting for them.
//
// Whoever gives work to all threads waits for the last of them, and where other processes keep the cores busy (those
// that load a training's data, say) that one may be a time slice away: a step of a tenth of a millisecond then takes
// ten. A crew notices, and lets the calling thread do the work alone for a while.
#pragma once

#include <cstdint>
#include <functional>

namespace fastopt {

class Crew {
 public:
  enum class Work { look, count, update };  // each at a speed of its own
  // Calls f on parts of [0, n), on torch's threads and each at least `grain` long, or on all of it.
  void run(Work work, int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f);
  // Whether the others are to be asked the next time.
  bool together() const { return rest_ == 0; }
  // What n units of work took, on so many threads.
  void note(Work work, int64_t n, double seconds, int threads);

 private:
  struct Pace {           // seconds a unit; 0: not known
    double together = 0;  // the shortest of late, when all worked
    double alone = 0;
  };
  static constexpr int shortest = 8, longest = 1024;

  Pace paces_[3];
  int rest_ = 0;  // how many runs are left for the calling thread alone
  int pause_ = shortest;
  int good_ = 0;  // runs of all threads since one of them was late
};

}  // namespace fastopt
