// The kernels' bodies: what a warp does with its work item. nvcc compiles them for the lanes of a warp; for tests g++
// compiles them too, and the lanes run one after the other (emulator.cpp).
#pragma once

#include <type_traits>

#include "chains.h"
#include "device.h"
#include "device_memory.h"

namespace fastopt {

// V elements are 16 bytes of the widest stream: were they 16 of the narrowest, a lane would read and write 32 of the
// widest in two halves, each of which reaches half of every sector of memory that it touches. Where L1 does not keep a
// sector for the second half, it is fetched twice, which took twice as long on an H200.
template <Mix mix>
struct MixOf : StreamsOf<mix> {
  static constexpr bool any = is_any(mix);
  static constexpr int V = vector_length(mix);
};

// Knuth's two-sum. Its error term of infinities is NaN, which total() knows.
FASTOPT_HD Pair add(Pair a, Pair b) {
  const double hi = a.hi + b.hi, z = hi - a.hi;
  return {hi, a.lo + b.lo + ((a.hi - (hi - z)) + (b.hi - z))};
}
FASTOPT_HD double total(Pair sum) {
  const double both = sum.hi + sum.lo;
  return both == both ? both : sum.hi;
}

// A lane's part of the sum of n contiguous gradients, wherever they begin: two 16-byte reads are under way at a time.
template <class S, class T>
FASTOPT_HD Pair sum_dense(const typename S::Raw* from, int n, const float* scale, int lane) {
  constexpr int each = alignment / sizeof(typename S::Raw), deep = 2;
  using V = Vector<S, each>;
  const auto plus = [&](Pair sum, T g) {
    return add(sum, {static_cast<double>(scale ? g / static_cast<T>(*scale) : g), 0});
  };
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(from) % alignment / sizeof(typename S::Raw));
  const int head = past == 0 ? 0 : each - past < n ? each - past : n, last = head + (n - head) / each * each;
  Pair sum{0, 0};
  for (int i = head + lane * each; i < last; i += deep * lanes * each) {
    V v[deep];
#pragma unroll
    for (int k = 0; k < deep; ++k)
      if (i + k * lanes * each < last) v[k] = V::read(from + i + k * lanes * each);
#pragma unroll
    for (int k = 0; k < deep; ++k)
      if (i + k * lanes * each < last)
#pragma unroll
        for (int j = 0; j < each; ++j) sum = plus(sum, v[k].template get<T>(j));
  }
  // Fewer than a vector before and after: together less than a warp.
  if (lane < head + (n - last)) sum = plus(sum, S::template load<T>(from[lane < head ? lane : last + (lane - head)]));
  return sum;
}

// The gradient of a tensor, for what needs nothing else of it.
template <class T>
struct Gradient {
  const void* data;
  const float* scale;
  const DeviceStrides* strides;
  Dtype dtype;

  FASTOPT_HD T operator[](int64_t i) const {
    const T g = read_any<T>(data, dtype, offset_of(strides, 1, i));
    return scale ? g / static_cast<T>(*scale) : g;
  }
  // This lane's part of the sum of [begin, end).
  FASTOPT_HD Pair sum(int64_t begin, int64_t end, int lane) const {
    if (strides) {
      Pair all{0, 0};
      for (int64_t i = begin + lane; i < end; i += lanes) all = add(all, {static_cast<double>((*this)[i]), 0});
      return all;
    }
    switch (dtype) {
      case Dtype::f32:
        return dense<Stored<Dtype::f32>>(begin, end, lane);
      case Dtype::f64:
        return dense<Stored<Dtype::f64>>(begin, end, lane);
      case Dtype::bf16:
        return dense<Stored<Dtype::bf16>>(begin, end, lane);
      default:
        return dense<Stored<Dtype::f16>>(begin, end, lane);
    }
  }

 private:
  template <class S>
  FASTOPT_HD Pair dense(int64_t begin, int64_t end, int lane) const {
    return sum_dense<S, T>(static_cast<const typename S::Raw*>(data) + begin, static_cast<int>(end - begin), scale,
                           lane);
  }
};

// One tensor's streams and coefficients, and the chain applied to a range of them. `scaled`: gradients are divided by
// the loss scale and written back.
template <class Chain, Mix mix, bool scaled>
struct Update {
  using M = MixOf<mix>;
  using T = typename M::T;
  static constexpr int S = Chain::slots, C = Chain::coefficients, V = M::V;

  const DeviceTensor& tensor;
  int64_t n;
  int first_slot;  // s[k] is the tensor's state first_slot + k
  void* p;
  void* g;
  void* s[S + 1];
  T c[C + 1];
  T shift;  // taken off every gradient
  const float* scale;

  FASTOPT_HD Update(const LaunchHeader& header, const unsigned char* payload, uint32_t number, const void* gradient)
      : tensor(header.table[number]),
        n(tensor.n),
        first_slot(header.first_slot),
        p(tensor.p),
        g(const_cast<void*>(gradient)),
        shift(0),
        scale(scaled ? header.grad_scale : nullptr) {
#pragma unroll
    for (int k = 0; k < S; ++k) s[k] = tensor.s[first_slot + k];
    if (header.rows) {
#pragma unroll
      for (int k = 0; k < C; ++k) c[k] = static_cast<T>(header.rows[number].c[k]);
    } else {
      const auto* numbers = reinterpret_cast<const uint16_t*>(payload + header.indices_at);
      const T* row =
          reinterpret_cast<const T*>(payload + header.rows_at) + uint32_t{numbers[number - header.first_tensor]} * C;
#pragma unroll
      for (int k = 0; k < C; ++k) c[k] = row[k];
    }
  }

  // The same for a tensor that is stored as this mix says, but was taken for one of any dtypes.
  template <Mix any>
  FASTOPT_HD explicit Update(const Update<Chain, any, scaled>& from)
      : tensor(from.tensor),
        n(from.n),
        first_slot(from.first_slot),
        p(from.p),
        g(from.g),
        shift(from.shift),
        scale(from.scale) {
#pragma unroll
    for (int k = 0; k < S; ++k) s[k] = from.s[k];
#pragma unroll
    for (int k = 0; k < C; ++k) c[k] = from.c[k];
  }

  // This lane's part of the sum of the gradients [begin, end).
  FASTOPT_HD Pair sum(int64_t begin, int64_t end, int lane) const {
    if constexpr (M::any)
      return Gradient<T>{g, scale, tensor.strides, tensor.g_dtype}.sum(begin, end, lane);
    else
      return sum_dense<typename M::P, T>(static_cast<typename M::PRaw*>(g) + begin, static_cast<int>(end - begin),
                                         scale, lane);
  }

  // This lane's part of the elements [begin, end).
  FASTOPT_HD void range(int64_t begin, int64_t end, int lane) const {
    if constexpr (M::any) {
      if (known(begin, end, lane)) return;
      for (int64_t i = begin + lane; i < end; i += lanes) any_element(i);
    } else {
      // From a whole vector on. Fewer than V elements lie before it: less than a warp.
      const int64_t whole = (begin + V - 1) / V * V, first = whole < end ? whole : end;
      if (lane < first - begin) element(streams(begin), lane);
      run<lanes * V>(streams(first + lane * V), static_cast<int>(end - first) - lane * V);
    }
  }

  // The same, of streams that may begin anywhere.
  FASTOPT_HD void spread(int64_t begin, int64_t end, int lane) const {
    Streams at = streams(begin + lane);
    int left = static_cast<int>(end - begin) - lane;
#pragma unroll 1
    for (; left > (V - 1) * lanes; left -= V * lanes) {
      vector<Spread>(at);
      at.advance(V * lanes);
    }
#pragma unroll 1
    for (int i = 0; i < left; i += lanes) element(at, i);
  }

  // This lane's part of an item that is dealt out together with others.
  FASTOPT_HD void dealt(uint32_t chunk, int lane, int together) const {
    constexpr int stride = dealt_together * lanes * V;
    const int64_t begin = static_cast<int64_t>(chunk / dealt_together) * together, all = n - begin;
    const int first = (static_cast<int>(chunk % dealt_together) * lanes + lane) * V;
    run<stride>(streams(begin + first), static_cast<int>(all < together ? all : together) - first);
  }

 private:
  struct Streams {
    typename M::PRaw *p, *g;
    typename M::SRaw* s[S + 1];

    FASTOPT_HD void advance(int by) {
      p += by, g += by;
#pragma unroll
      for (int k = 0; k < S; ++k) s[k] += by;
    }
  };

  FASTOPT_HD Streams streams(int64_t from) const {
    Streams at{static_cast<typename M::PRaw*>(p) + from, static_cast<typename M::PRaw*>(g) + from, {}};
#pragma unroll
    for (int k = 0; k < S; ++k) at.s[k] = static_cast<typename M::SRaw*>(s[k]) + from;
    return at;
  }

  // Every stride-th of `left` elements in vectors. What is less than a vector at the end is one lane's.
  template <int stride>
  FASTOPT_HD void run(Streams at, int left) const {
    // A second vector could not be read before the first is written: unrolling would only cost registers.
#pragma unroll 1
    for (; left >= V; left -= stride) {
      vector<Vector>(at);
      at.advance(stride);
    }
#pragma unroll 1
    for (int i = 0; i < left; ++i) element(at, i);
  }

  FASTOPT_HD T divided(T gradient) const { return gradient / static_cast<T>(*scale); }

  template <template <class, int> class Held>
  FASTOPT_HD void vector(const Streams& at) const {
    using PVector = Held<typename M::P, V>;
    using SVector = Held<typename M::State, V>;
    PVector d = PVector::read(at.g), x = PVector::read(at.p);
    SVector v[S + 1];
#pragma unroll
    for (int k = 0; k < S; ++k) v[k] = SVector::read(at.s[k]);
    if constexpr (scaled) {
      PVector q = d;
#pragma unroll
      for (int j = 0; j < V; ++j) q.template set<T>(j, divided(d.template get<T>(j)));
      q.write(at.g);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      T a = x.template get<T>(j), b = d.template get<T>(j), w[S + 1];
#pragma unroll
      for (int k = 0; k < S; ++k) w[k] = v[k].template get<T>(j);
      if constexpr (scaled) b = divided(b);
      b = b - shift;
      Chain::apply(a, b, w, c);
      x.template set<T>(j, a);
#pragma unroll
      for (int k = 0; k < S; ++k) v[k].template set<T>(j, w[k]);
    }
    x.write(at.p);
#pragma unroll
    for (int k = 0; k < S; ++k) v[k].write(at.s[k]);
  }

  FASTOPT_HD void element(const Streams& at, int i) const {
    T a = M::P::template load<T>(at.p[i]), b = M::P::template load<T>(at.g[i]), w[S + 1];
#pragma unroll
    for (int k = 0; k < S; ++k) w[k] = M::State::template load<T>(at.s[k][i]);
    if constexpr (scaled) at.g[i] = M::P::template store<T>(b = divided(b));
    b = b - shift;
    Chain::apply(a, b, w, c);
    at.p[i] = M::P::template store<T>(a);
#pragma unroll
    for (int k = 0; k < S; ++k) at.s[k][i] = M::State::template store<T>(w[k]);
  }

  // range() of a dense tensor that is stored as one of these mixes: many elements are under way at a time, and their
  // dtypes are known. False: it is no such tensor. (None is in float16 or with a loss scale: not worth the compiler's
  // time.)
  FASTOPT_HD bool known(int64_t begin, int64_t end, int lane) const {
    if constexpr (scaled)
      return false;
    else if constexpr (sizeof(T) == 8)
      return is<Mix::f64>(begin, end, lane);
    else
      return is<Mix::f32>(begin, end, lane) || is<Mix::bf16>(begin, end, lane) || is<Mix::bf16_f32>(begin, end, lane);
  }
  template <Mix one>
  FASTOPT_HD bool is(int64_t begin, int64_t end, int lane) const {
    if (tensor.strides || tensor.stored != one) return false;
    Update<Chain, one, scaled>(*this).spread(begin, end, lane);
    return true;
  }

  FASTOPT_HD void any_element(int64_t i) const {
    int64_t at[2 + S];
#pragma unroll
    for (int k = 0; k < 2 + S; ++k) at[k] = offset_of(tensor.strides, k < 2 ? k : first_slot + k, i);
    T a = read_any<T>(p, tensor.p_dtype, at[0]), b = 0, w[S + 1];
    // Without a gradient there is p in its place, and the table speaks of another.
    if constexpr (!std::is_same_v<Chain, Pull>) b = read_any<T>(g, tensor.g_dtype, at[1]);
#pragma unroll
    for (int k = 0; k < S; ++k) w[k] = read_any<T>(s[k], tensor.s_dtype[first_slot + k], at[2 + k]);
    if constexpr (scaled) write_any<T>(g, tensor.g_dtype, at[1], b = divided(b));
    b = b - shift;
    Chain::apply(a, b, w, c);
    write_any<T>(p, tensor.p_dtype, at[0], a);
#pragma unroll
    for (int k = 0; k < S; ++k) write_any<T>(s[k], tensor.s_dtype[first_slot + k], at[2 + k], w[k]);
  }
};

// The slices of one item: each one's mean is taken off its gradient. `warp` runs a function for its lanes, or sums
// what the lanes return.
template <class U, class Warp>
FASTOPT_HD void run_rows(U& update, const LaunchHeader& header, const WorkItem& item, const Warp& warp) {
  using T = typename U::T;
  const DeviceTensor& tensor = update.tensor;
  const int64_t length = tensor.row_length;
  const bool is_long = length > longest_row;
  int64_t begin, stop;
  if (is_long) {  // the item is a piece of a slice, whose parts are summed already
    const int64_t pieces = pieces_of(length), parts = parts_of(length), row = item.chunk / pieces;
    const Pair* const own = tensor.parts + row * parts;
    const Pair sum = warp.sum([&](int lane) {
      Pair all{0, 0};
#pragma unroll 1
      for (int64_t k = lane; k < parts; k += lanes) all = add(all, own[k]);
      return all;
    });
    update.shift = static_cast<T>(total(sum) / static_cast<double>(length));
    begin = row * length + item.chunk % pieces * longest_row;
    stop = begin + longest_row < (row + 1) * length ? begin + longest_row : (row + 1) * length;
  } else {
    const int64_t together = rows_per_item(length, int64_t{1} << header.row_bits) * length;
    begin = item.chunk * together;
    stop = begin + together < tensor.n ? begin + together : tensor.n;
  }
  const int step = static_cast<int>(is_long ? longest_row : length);
  for (; begin < stop; begin += step) {
    const int64_t end = begin + step < stop ? begin + step : stop;
    if (!is_long) {
      const Pair sum = warp.sum([&](int lane) { return update.sum(begin, end, lane); });
      update.shift = static_cast<T>(total(sum) / static_cast<double>(step));
    }
    warp.each([&](int lane) { update.range(begin, end, lane); });
  }
}

// Brings the list of items to the L2 cache before its turn: the next in line would wait for memory.
FASTOPT_HD void prefetch_item(const LaunchHeader& header, uint32_t at) {
#if defined(__CUDA_ARCH__)
  constexpr uint32_t far = 8192;
  if (at + far < header.item_count && at % (128 / sizeof(WorkItem)) == 0)
    asm volatile("prefetch.global.L2 [%0];" : : "l"(header.items + at + far));
#else
  (void)header, (void)at;
#endif
}

FASTOPT_HD bool skips(const LaunchHeader& header) { return header.found_inf && *header.found_inf != 0; }

FASTOPT_HD const void* gradient_of(const LaunchHeader& header, const unsigned char* payload, uint32_t number) {
  return reinterpret_cast<const void* const*>(payload)[number - header.first_tensor];
}

// One work item of an update.
template <class Chain, Mix mix, bool centralise, bool scaled, class Warp>
FASTOPT_HD void run_item(const LaunchHeader& header, const unsigned char* payload, uint32_t at, const Warp& warp) {
  if (at >= header.item_count || skips(header)) return;
  prefetch_item(header, at);
  const WorkItem item = header.items[at];
  const void* const gradient = gradient_of(header, payload, item.tensor);
  if (!gradient || (header.rows && header.rows[item.tensor].chain != header.chain)) return;
  Update<Chain, mix, scaled> update(header, payload, item.tensor, gradient);
  if constexpr (centralise) {
    if (update.tensor.row_length > 0) {
      run_rows(update, header, item, warp);
      return;
    }
  }
  if constexpr (MixOf<mix>::any) {
    const int64_t begin = item.chunk * any_length, end = begin + any_length;
    warp.each([&](int lane) { update.range(begin, end < update.tensor.n ? end : update.tensor.n, lane); });
  } else {
    warp.each([&](int lane) { update.dealt(item.chunk, lane, header.together); });
  }
}

// One work item of the pass that sums slices too long for one warp: the item.chunk-th part of all of a tensor's.
template <class T, class Warp>
FASTOPT_HD void sum_item(const LaunchHeader& header, const unsigned char* payload, uint32_t at, const Warp& warp) {
  if (at >= header.item_count || skips(header)) return;
  const WorkItem item = header.items[at];
  const void* const data = gradient_of(header, payload, item.tensor);
  if (!data) return;
  const DeviceTensor& tensor = header.table[item.tensor];
  const Gradient<T> gradient{data, header.grad_scale, tensor.strides, tensor.g_dtype};
  const int64_t parts = parts_of(tensor.row_length), part = part_of(tensor.row_length), row = item.chunk / parts;
  const int64_t begin = row * tensor.row_length + item.chunk % parts * part, end = (row + 1) * tensor.row_length;
  const Pair sum =
      warp.sum([&](int lane) { return gradient.sum(begin, begin + part < end ? begin + part : end, lane); });
  warp.each([&](int lane) {
    if (lane == 0) tensor.parts[item.chunk] = sum;
  });
}

}  // namespace fastopt
