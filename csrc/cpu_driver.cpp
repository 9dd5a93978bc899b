// Splits tensors over threads, and feeds each item's part to its kernel: directly where the streams are dense
// and stored as a kernel takes them, else tile by tile through an L1-sized scratch.
#include "cpu_driver.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "chains.h"

namespace fastopt {
namespace {

// Elements that one thread updates; from twice as many on, every thread gets its share of them, for torch wakes all of
// its threads or none.
constexpr int64_t alone = 16384, grain = 4096;
constexpr int64_t overhead = 64;    // elements that could be updated in the time that a tensor costs for being one
constexpr int64_t split_unit = 64;  // elements: parts of a tensor start on whole cache lines of every dtype

template <class... Chains>
int slots(List<Chains...>, int chain) {
  static constexpr int counts[] = {Chains::slots...};
  return counts[chain];
}

template <class... Chains>
std::vector<std::string> names(List<Chains...>) {
  return {Chains::name()...};
}

const InstructionSet& choose() {
  const char* wish = std::getenv("FASTOPT_ISA");
  const std::string name = wish ? wish : "";
  if (name == "baseline") return baseline();
  std::string offers = "baseline";
#if defined(FASTOPT_X86_KERNELS)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && (name.empty() || name == "avx512")) return avx512();
  if (has_avx2 && (name.empty() || name == "avx2")) return avx2();
  if (has_avx2) offers += ", avx2";
  if (has_avx512) offers += ", avx512";
#endif
  if (name.empty()) return baseline();
  throw std::invalid_argument("FASTOPT_ISA=" + name + ": this CPU and build offer " + offers +
                              "; unset it to choose automatically");
}

template <class T>
const Conversions<T>& conversions() {
  if constexpr (sizeof(T) == 4)
    return instruction_set().f32;
  else
    return instruction_set().f64;
}

template <class T>
constexpr Dtype compute_dtype = sizeof(T) == 4 ? Dtype::f32 : Dtype::f64;
template <class T>
constexpr Mix compute_mix = sizeof(T) == 4 ? Mix::f32 : Mix::f64;

const Update* updates(Mix mix) { return instruction_set().update[static_cast<int>(mix)]; }

// Calls f(offset into the stream, stride, count, position in the tile) for each run along the last dimension.
template <class F>
void for_runs(const Walk& walk, int stream, int64_t begin, int64_t n, F f) {
  const auto& sizes = walk.sizes;
  const auto& strides = walk.strides[stream];
  const int dims = static_cast<int>(sizes.size());
  int64_t at[max_dims], rest = begin, offset = 0;
  for (int d = dims - 1; d >= 0; --d) {
    at[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += at[d] * strides[d];
  }
  const int last = dims - 1;
  for (int64_t done = 0; done < n;) {
    const int64_t count = std::min(n - done, sizes[last] - at[last]);
    f(offset, strides[last], count, done);
    done += count;
    offset += count * strides[last];
    at[last] += count;
    for (int d = last; d > 0 && at[d] == sizes[d]; --d) {
      offset += strides[d - 1] - sizes[d] * strides[d];
      at[d] = 0;
      ++at[d - 1];
    }
  }
}

template <class Raw>
void gather(const Walk& walk, int stream, const void* from, int64_t begin, int64_t n, void* to) {
  for_runs(walk, stream, begin, n, [&](int64_t offset, int64_t stride, int64_t count, int64_t at) {
    const Raw* const run = static_cast<const Raw*>(from) + offset;
    if (stride == 1)
      std::copy(run, run + count, static_cast<Raw*>(to) + at);
    else
      for (int64_t i = 0; i < count; ++i) static_cast<Raw*>(to)[at + i] = run[i * stride];
  });
}

template <class Raw>
void scatter(const Walk& walk, int stream, void* to, int64_t begin, int64_t n, const void* from) {
  for_runs(walk, stream, begin, n, [&](int64_t offset, int64_t stride, int64_t count, int64_t at) {
    for (int64_t i = 0; i < count; ++i)
      static_cast<Raw*>(to)[offset + i * stride] = static_cast<const Raw*>(from)[at + i];
  });
}

// One stream of an item, seen tile by tile in the compute type.
template <class T>
struct Stream {
  void* data;
  Dtype dtype;
  const Walk* walk;  // null: dense
  int index;
  alignas(64) T scratch[tile_length];
  alignas(64) unsigned char raw[tile_length * 8];

  void set(const void* from, Dtype type, const Walk* of_item, int number) {
    data = const_cast<void*>(from);
    dtype = type;
    walk = of_item && !of_item->dense[number] ? of_item : nullptr;
    index = number;
  }
  bool in_place() const { return !walk && dtype == compute_dtype<T>; }
  char* at(int64_t i) const { return static_cast<char*>(data) + i * size_of(dtype); }
  void* gathered() { return dtype == compute_dtype<T> ? static_cast<void*>(scratch) : raw; }

  T* open(int64_t begin, int64_t n) {
    if (in_place()) return reinterpret_cast<T*>(at(begin));
    if (walk) {
      if (size_of(dtype) == 2) gather<uint16_t>(*walk, index, data, begin, n, gathered());
      if (size_of(dtype) == 4) gather<uint32_t>(*walk, index, data, begin, n, gathered());
      if (size_of(dtype) == 8) gather<uint64_t>(*walk, index, data, begin, n, gathered());
    }
    const void* const from = walk ? gathered() : at(begin);
    if (from != scratch) conversions<T>().load(dtype, from, scratch, n);
    return scratch;
  }

  void close(int64_t begin, int64_t n) {
    if (in_place()) return;
    void* const to = walk ? gathered() : at(begin);
    if (to != scratch) conversions<T>().store(dtype, scratch, to, n);
    if (!walk) return;
    if (size_of(dtype) == 2) scatter<uint16_t>(*walk, index, data, begin, n, to);
    if (size_of(dtype) == 4) scatter<uint32_t>(*walk, index, data, begin, n, to);
    if (size_of(dtype) == 8) scatter<uint64_t>(*walk, index, data, begin, n, to);
  }
};

void run_direct(const Update* kernels, const Item& item, int64_t begin, int64_t end, double shift) {
  const auto at = [=](const void* data, Dtype dtype) {
    return const_cast<char*>(static_cast<const char*>(data)) + begin * size_of(dtype);
  };
  Run run{at(item.p, item.p_dtype), at(item.g, item.g_dtype), {}, item.row, shift, end - begin};
  for (int k = 0; k < item.slots; ++k) run.s[k] = at(item.s[k], item.s_dtype[k]);
  kernels[item.chain](run);
}

template <class T>
void run_tiles(const Item& item, int64_t begin, int64_t end, double shift) {
  Stream<T> p, g, s[max_slots];
  p.set(item.p, item.p_dtype, item.walk, 0);
  g.set(item.g, item.g_dtype, item.walk, 1);
  for (int k = 0; k < item.slots; ++k) s[k].set(item.s[k], item.s_dtype[k], item.walk, 2 + item.first_slot + k);
  for (int64_t i = begin; i < end; i += tile_length) {
    const int64_t n = std::min(tile_length, end - i);
    Run run{p.open(i, n), g.open(i, n), {}, item.row, shift, n};
    for (int k = 0; k < item.slots; ++k) run.s[k] = s[k].open(i, n);
    updates(compute_mix<T>)[item.chain](run);
    p.close(i, n);
    for (int k = 0; k < item.slots; ++k) s[k].close(i, n);
  }
}

template <class T>
void run_part(const Item& item, int64_t begin, int64_t end, double shift) {
  if (const Update* kernels = updates(item.mix))
    run_direct(kernels, item, begin, end, shift);
  else
    run_tiles<T>(item, begin, end, shift);
}

// The mean of one slice of the gradient: summed without error in float64, rounded once to the compute type.
template <class T>
T mean(const Item& item, int64_t begin, int64_t n) {
  ExactSum sum;
  Stream<T> g;
  g.set(item.g, item.g_dtype, item.walk, 1);
  const int64_t step = g.in_place() ? n : tile_length;
  for (int64_t i = 0; i < n; i += step) {
    const int64_t m = std::min(step, n - i);
    conversions<T>().accumulate(sum, g.open(begin + i, m), m);
  }
  double *const hi = sum.hi, *const lo = sum.lo;
  for (int apart = ExactSum::lanes / 2; apart > 0; apart /= 2)
    for (int k = 0; k < apart; ++k) {
      const double t = hi[k] + hi[k + apart], z = t - hi[k];
      lo[k] += (hi[k] - (t - z)) + (hi[k + apart] - z) + lo[k + apart];
      hi[k] = t;
    }
  // Infinities leave NaN in the error term; the plain sum then has the right value.
  const double total = hi[0] + lo[0], plain = total == total ? total : hi[0];
  return static_cast<T>(plain / static_cast<double>(n));
}

template <class T>
void run_rows(const Item& item, int64_t begin, int64_t end) {
  const int64_t length = item.n / item.rows;
  for (int64_t i = begin; i < end; i += length) run_part<T>(item, i, i + length, mean<T>(item, i, length));
}

template <class T>
void run_as(const Item& item, int64_t begin, int64_t end) {
  if (item.rows > 0)
    run_rows<T>(item, begin, end);
  else
    run_part<T>(item, begin, end, 0);
}

// Where a part may start: whole cache lines, or whole slices where the gradient is centralised.
int64_t snap(const Item& item, int64_t at) {
  if (at == 0 || at >= item.n) return at;  // a whole tensor's, without a division
  const int64_t unit = item.rows > 0 ? item.n / item.rows : split_unit;
  return std::min(item.n, (at + unit - 1) / unit * unit);
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

Walk::Walk(const Layout& layout, int streams, bool in_order) {
  std::vector<size_t> order;
  for (size_t d = 0; d < layout.sizes.size(); ++d)
    if (layout.sizes[d] != 1) order.push_back(d);
  const auto before = [&](size_t a, size_t b) {
    return std::pair(-layout.strides[0][a], a) < std::pair(-layout.strides[0][b], b);
  };
  if (!in_order) std::sort(order.begin(), order.end(), before);
  for (const size_t d : order) {
    bool joins = !sizes.empty();
    for (int k = 0; k < streams && joins; ++k) joins = strides[k].back() == layout.strides[k][d] * layout.sizes[d];
    if (joins) sizes.back() *= layout.sizes[d];
    if (!joins) sizes.push_back(layout.sizes[d]);
    for (int k = 0; k < streams; ++k) {
      if (joins) strides[k].pop_back();
      strides[k].push_back(layout.strides[k][d]);
    }
  }
  if (sizes.empty()) sizes.push_back(1);
  for (int k = 0; k < streams; ++k) {
    strides[k].resize(sizes.size(), 1);
    int64_t next = 1;
    dense[k] = true;
    for (size_t d = sizes.size(); d-- > 0; next *= sizes[d]) dense[k] = dense[k] && strides[k][d] == next;
  }
}

std::vector<std::string> chain_names() { return names(Chains{}); }
std::vector<std::string> centralised_chain_names() { return names(Centralised{}); }
int chain_slots(int chain) { return slots(Chains{}, chain); }

void run_item(const Item& item, int64_t begin, int64_t end) {
  if (item.n == 0) return;
  const int64_t first = snap(item, begin), last = snap(item, end);
  if (first >= last) return;
  if (is_wide(item.mix))
    run_as<double>(item, first, last);
  else
    run_as<float>(item, first, last);
}

void Shares::clear() {
  begins_.assign(1, 0);
  elements_ = 0;
}

void Shares::add(int64_t n) {
  begins_.push_back(begins_.back() + overhead + n);
  elements_ += n;
}

void Shares::run(Crew& crew, Crew::Work work, const std::function<void(size_t, size_t)>& whole,
                 const std::function<void(size_t, int64_t, int64_t)>& part) const {
  const auto share = [&](int64_t begin, int64_t end) {
    // A tensor begins in one share, and may go on in the next.
    const auto from = [this](int64_t at) {
      return static_cast<size_t>(std::lower_bound(begins_.begin(), begins_.end() - 1, at) - begins_.begin());
    };
    const size_t first = from(begin), last = from(end);
    whole(first, last);
    for (size_t i = begins_[first] > begin ? first - 1 : first; i < last; ++i) {
      const int64_t n = begins_[i + 1] - begins_[i] - overhead, zero = begins_[i] + overhead;
      const int64_t own = std::clamp<int64_t>(begin - zero, 0, n), others = std::clamp<int64_t>(end - zero, 0, n);
      if (own < others) part(i, own, others);
    }
  };
  const int64_t all = begins_.back();
  crew.run(work, all, all < 2 * alone ? all : grain, std::cref(share));
}

}  // namespace fastopt
