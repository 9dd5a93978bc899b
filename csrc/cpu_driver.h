// Runs work items on the CPU, and splits them over torch's threads.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#include "crew.h"

namespace fastopt {

inline constexpr int max_dims = 64;

struct Layout;

// Elements as they are visited, in row-major order of these sizes: dimensions from the widest stride of p to the
// closest, as one where all streams have them one behind the other. A 3x3 filter in channels_last is so read in runs of
// its channels and not of three elements, and on a CPU streams that lie as p does need no copies.
struct Walk {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides[2 + max_slots];
  bool dense[2 + max_slots];  // streams whose elements are visited as they lie

  // `in_order`: dimensions stay in the order of the shape, whose leading slices are told apart.
  Walk(const Layout& layout, int streams, bool in_order);
};

// Strides of every stream over one shape, for tensors that do not share one dense layout.
struct Layout {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides[2 + max_slots];  // p, g, state...
  std::unique_ptr<const Walk> walk;
};

struct Item {
  void* p;
  const void* g;
  void* s[max_slots];
  const void* row;   // coefficients, of the mix's compute type
  const Walk* walk;  // null: all streams are dense and share their strides
  int64_t n;
  int64_t rows;  // > 0: the gradient is centralised over this many leading slices
  int16_t chain;
  int8_t slots, first_slot;  // s[k] is state first_slot + k of the walk
  Mix mix;                   // any_f32 or any_f64 unless dense
  Dtype p_dtype, g_dtype, s_dtype[max_slots];
};

// What the process runs on: the widest instruction set that was compiled and that this CPU has, or the one named by
// the environment variable FASTOPT_ISA (for tests: results must not depend on it).
const InstructionSet& instruction_set();

std::vector<std::string> chain_names();
std::vector<std::string> centralised_chain_names();  // those that a device has with a centralised gradient too
int chain_slots(int chain);

// Updates the elements [begin, end) of an item, both moved up to where its parts may start.
void run_item(const Item& item, int64_t begin, int64_t end);

// Deals tensors out to torch's threads: a tensor weighs as much as its elements and a fixed amount for being one, and
// is cut where a thread's share ends.
class Shares {
 public:
  void clear();
  void add(int64_t n);
  int64_t elements() const { return elements_; }
  // On every thread of a crew: calls `whole(first, last)` for the tensors [first, last) that begin in its share, then
  // `part(i, begin, end)` for what is in it of each tensor i, unless that is nothing.
  void run(Crew& crew, Crew::Work work, const std::function<void(size_t, size_t)>& whole,
           const std::function<void(size_t, int64_t, int64_t)>& part) const;

 private:
  std::vector<int64_t> begins_{0};  // where each tensor begins in the range of all weights, and where the last one ends
  int64_t elements_ = 0;
};

}  // namespace fastopt
