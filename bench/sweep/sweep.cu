// Which shape of kernel moves an optimizer's streams fastest: every shape x cache hints x way of storing, interleaved
// round by round, and what a launch costs the host by the size of its parameters. Rows of CSV on stdout, one line as
// soon as it is known; what was tried and why on stderr. The update itself is the project's own (csrc/stages).
//
//   sweep [seconds]      at most about that long; the most telling groups come first
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "chain.h"
#include "stages/adam.h"
#include "stages/gradient.h"

#define CHECK(call)                                                                                   \
  do {                                                                                                \
    cudaError_t error_ = (call);                                                                      \
    if (error_ != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

namespace fastopt {
namespace {

constexpr int max_states = 3, threads = 256, max_row = 16;

// The arithmetic removed: one subtraction a stream keeps every load alive and every value in bounds.
template <int S>
struct Stripped {
  static constexpr int slots = S;
  template <class T>
  __device__ static void apply(T& p, T& g, T* s, const T*) {
    p = g - p;
    for (int k = 0; k < S; ++k) s[k] = g - s[k];
  }
};
using Adam = Chain<scale, shrink, adam>;
using AmsGrad = Chain<scale, shrink, amsgrad>;

struct Tensor {
  void* p;
  void* s[max_states];
  const void* g;  // for the kernels that find gradients in the table
  int64_t n;
};
struct Item {
  uint32_t tensor, chunk;
};

template <int NG>
struct Args {
  const Tensor* tensors;
  const Item* items;
  int count;
  float row[max_row];
  const void* g[NG];
};

enum class Access { gradient, streamed, parameter };

template <bool Hints, Access A>
__device__ __forceinline__ uint4 load16(const void* from) {
  uint4 v;
  if constexpr (Hints && A == Access::gradient)
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  else if constexpr (Hints)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  else
    v = *static_cast<const uint4*>(from);
  return v;
}

template <bool Hints, Access A>
__device__ __forceinline__ void store16(void* to, uint4 v) {
  if constexpr (Hints && A == Access::streamed)
    __stcs(static_cast<uint4*>(to), v);
  else
    *static_cast<uint4*>(to) = v;
}

// N elements of T in 16-byte pieces.
template <class T, int N>
struct Piece {
  static constexpr int count = N * sizeof(T) / 16, each = 16 / sizeof(T);
  static_assert(count >= 1 && N * sizeof(T) % 16 == 0);
  uint4 raw[count];

  template <bool Hints, Access A>
  __device__ __forceinline__ void load(const void* base, int64_t at) {
    const T* from = static_cast<const T*>(base) + at;
#pragma unroll
    for (int k = 0; k < count; ++k) raw[k] = load16<Hints, A>(from + k * each);
  }
  template <bool Hints, Access A>
  __device__ __forceinline__ void store(void* base, int64_t at) const {
    T* to = static_cast<T*>(base) + at;
#pragma unroll
    for (int k = 0; k < count; ++k) store16<Hints, A>(to + k * each, raw[k]);
  }
  __device__ __forceinline__ float get(int i) const {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(raw);
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(words[i]);
    else
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
  __device__ __forceinline__ void put(int i, float x) {
    uint32_t* words = reinterpret_cast<uint32_t*>(raw);
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(x);
    } else {
      const uint32_t h = __bfloat16_as_ushort(__float2bfloat16_rn(x));
      words[i / 2] = i % 2 ? (words[i / 2] & 0xffffu) | (h << 16) : (words[i / 2] & 0xffff0000u) | h;
    }
  }
};

// What one thread holds of all streams between loading and storing.
template <class C, class P, class S, int N, bool Hints>
struct Pack {
  static constexpr int states = C::slots;
  Piece<P, N> p, g;
  Piece<S, N> s[states];

  __device__ __forceinline__ void load(const Tensor& t, const void* gradient, int64_t at) {
    g.template load<Hints, Access::gradient>(gradient, at);
    p.template load<Hints, Access::parameter>(t.p, at);
#pragma unroll
    for (int k = 0; k < states; ++k) s[k].template load<Hints, Access::streamed>(t.s[k], at);
  }
  __device__ __forceinline__ void update(const float* row) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float x = p.get(i), d = g.get(i), v[states];
#pragma unroll
      for (int k = 0; k < states; ++k) v[k] = s[k].get(i);
      C::apply(x, d, v, row);
      p.put(i, x);
#pragma unroll
      for (int k = 0; k < states; ++k) s[k].put(i, v[k]);
    }
  }
  __device__ __forceinline__ void store(const Tensor& t, int64_t at) const {
    p.template store<Hints, Access::parameter>(t.p, at);
#pragma unroll
    for (int k = 0; k < states; ++k) s[k].template store<Hints, Access::streamed>(t.s[k], at);
  }
};

// 16 bytes of the narrowest stream: 4 elements of fp32, 8 where anything is bf16.
template <class P>
constexpr int elements_of = 16 / sizeof(P);

// A warp takes an item of Length elements, Packs packs at a time.
template <class C, class P, class S, bool Hints, int NG, int Length, bool InTable, int Packs = 1>
__global__ void __launch_bounds__(threads, Packs > 1                         ? 2
                                           : sizeof(P) == 4 && C::slots == 3 ? 3
                                                                             : 4)
    warp_items(const __grid_constant__ Args<NG> args) {
  constexpr int N = elements_of<P>;
  const int w = blockIdx.x * (threads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (w >= args.count) return;
  const Item item = args.items[w];
  const Tensor& t = args.tensors[item.tensor];
  const void* g = InTable ? t.g : args.g[item.tensor];
  const int64_t base = int64_t(item.chunk) * Length, end = min(base + Length, t.n);
#pragma unroll 1
  for (int64_t at = base + lane * N; at < end; at += 32 * N * Packs) {
    Pack<C, P, S, N, Hints> pack[Packs];
#pragma unroll
    for (int k = 0; k < Packs; ++k)
      if (at + k * 32 * N < end) pack[k].load(t, g, at + k * 32 * N);
#pragma unroll
    for (int k = 0; k < Packs; ++k)
      if (at + k * 32 * N < end) {
        pack[k].update(args.row);
        pack[k].store(t, at + k * 32 * N);
      }
  }
}

// The same by a grid that stays: what the next item is is read while this one is worked on.
template <class C, class P, class S, bool Hints, int NG, int Length>
__global__ void __launch_bounds__(threads, sizeof(P) == 4 && C::slots == 3 ? 3 : 4)
    persistent_warp_items(const __grid_constant__ Args<NG> args) {
  constexpr int N = elements_of<P>;
  const int lane = threadIdx.x % 32, step = gridDim.x * (threads / 32);
  int w = blockIdx.x * (threads / 32) + threadIdx.x / 32;
  if (w >= args.count) return;
  Item item = args.items[w];
  while (true) {
    const int next = w + step;
    const Item ahead = next < args.count ? args.items[next] : item;
    const Tensor& t = args.tensors[item.tensor];
    const void* g = args.g[item.tensor];
    const int64_t base = int64_t(item.chunk) * Length, end = min(base + Length, t.n);
    for (int64_t at = base + lane * N; at < end; at += 32 * N) {
      Pack<C, P, S, N, Hints> pack;
      pack.load(t, g, at);
      pack.update(args.row);
      pack.store(t, at);
    }
    if (next >= args.count) return;
    w = next;
    item = ahead;
  }
}

// A block takes an item of Rounds x threads packs.
template <class C, class P, class S, bool Hints, int NG, int Rounds>
__global__ void __launch_bounds__(threads, sizeof(P) == 4 && C::slots == 3 ? 3 : 4)
    block_items(const __grid_constant__ Args<NG> args) {
  constexpr int N = elements_of<P>;
  const Item item = args.items[blockIdx.x];
  const Tensor& t = args.tensors[item.tensor];
  const void* g = args.g[item.tensor];
  const int64_t base = int64_t(item.chunk) * (Rounds * threads * N);
#pragma unroll 1
  for (int r = 0; r < Rounds; ++r) {
    const int64_t at = base + (r * threads + threadIdx.x) * N;
    if (at >= t.n) return;
    Pack<C, P, S, N, Hints> pack;
    pack.load(t, g, at);
    pack.update(args.row);
    pack.store(t, at);
  }
}

// The same, the next pack on its way while this one is worked on.
template <class C, class P, class S, bool Hints, int NG, int Rounds>
__global__ void __launch_bounds__(threads, C::slots == 3 ? 2 : 3)
    pipelined_items(const __grid_constant__ Args<NG> args) {
  constexpr int N = elements_of<P>;
  const Item item = args.items[blockIdx.x];
  const Tensor& t = args.tensors[item.tensor];
  const void* g = args.g[item.tensor];
  int64_t at = int64_t(item.chunk) * (Rounds * threads * N) + threadIdx.x * N;
  if (at >= t.n) return;
  Pack<C, P, S, N, Hints> now, next;
  now.load(t, g, at);
#pragma unroll
  for (int r = 1; r <= Rounds; ++r) {
    const int64_t ahead = at + threads * N;
    const bool more = r < Rounds && ahead < t.n;
    if (more) next.load(t, g, ahead);
    now.update(args.row);
    now.store(t, at);
    if (!more) return;
    now = next;
    at = ahead;
  }
}

// Tiles brought to shared memory by the bulk copy engine, three at a time; stores as above. (sm_90 on)
template <class C, class P, class S>
struct Bulk {
  static constexpr int tile = 2048, stages = 3;
  static constexpr int p_bytes = tile * sizeof(P), s_bytes = tile * sizeof(S);
  static constexpr int stage_bytes = 2 * p_bytes + C::slots * s_bytes;
  static constexpr int shared_bytes = stages * stage_bytes;
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}
__device__ __forceinline__ void expect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n.reg .pred q;\nmbarrier.try_wait.parity.shared::cta.b64 q, [%1], %2;\nselp.u32 %0, 1, 0, q;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
#endif
}

template <class C, class P, class S, bool Hints, int NG>
__global__ void __launch_bounds__(threads, 2) bulk_items(const __grid_constant__ Args<NG> args) {
  using B = Bulk<C, P, S>;
  constexpr int N = elements_of<P>;
  extern __shared__ __align__(128) unsigned char buffer[];
  __shared__ uint64_t full[B::stages];
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0)
    for (int k = 0; k < B::stages; ++k)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[k])) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  __syncthreads();

  auto begin = [&](int w, int stage) {
    const Item item = args.items[w];
    const Tensor& t = args.tensors[item.tensor];
    const int64_t base = int64_t(item.chunk) * B::tile;
    const uint32_t n = static_cast<uint32_t>(min(int64_t(B::tile), t.n - base));
    unsigned char* to = buffer + stage * B::stage_bytes;
    expect(&full[stage], n * (2 * sizeof(P) + C::slots * sizeof(S)));
    bulk_load(to, static_cast<const P*>(t.p) + base, n * sizeof(P), &full[stage]);
    bulk_load(to + B::p_bytes, static_cast<const P*>(args.g[item.tensor]) + base, n * sizeof(P), &full[stage]);
    for (int k = 0; k < C::slots; ++k)
      bulk_load(to + 2 * B::p_bytes + k * B::s_bytes, static_cast<const S*>(t.s[k]) + base, n * sizeof(S),
                &full[stage]);
  };
  const int first = blockIdx.x, step = gridDim.x;
  if (threadIdx.x == 0)
    for (int k = 0; k < B::stages; ++k)
      if (first + k * step < args.count) begin(first + k * step, k);

  int turn = 0;
  for (int w = first; w < args.count; w += step, ++turn) {
    const int stage = turn % B::stages;
    wait(&full[stage], (turn / B::stages) & 1);
    const Item item = args.items[w];
    const Tensor& t = args.tensors[item.tensor];
    const int64_t base = int64_t(item.chunk) * B::tile, n = min(int64_t(B::tile), t.n - base);
    const unsigned char* from = buffer + stage * B::stage_bytes;
    for (int j = threadIdx.x * N; j < n; j += threads * N) {
      Pack<C, P, S, N, Hints> pack;
      pack.p.template load<false, Access::parameter>(from, j);
      pack.g.template load<false, Access::parameter>(from + B::p_bytes, j);
#pragma unroll
      for (int k = 0; k < C::slots; ++k)
        pack.s[k].template load<false, Access::parameter>(from + 2 * B::p_bytes + k * B::s_bytes, j);
      pack.update(args.row);
      pack.store(t, base + j);
    }
    __syncthreads();
    if (threadIdx.x == 0 && w + B::stages * step < args.count) begin(w + B::stages * step, stage);
  }
}

template <int Bytes>
struct Block {
  char bytes[Bytes];
};
template <int Bytes>
__global__ void takes_parameters(const __grid_constant__ Block<Bytes> block, int* out) {
  if (out) *out = block.bytes[threadIdx.x];
}

__global__ void fill(void* to, int64_t n, int bytes, uint32_t seed, bool positive) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u + seed;
    h ^= h >> 15, h *= 2246822519u, h ^= h >> 13;
    const float x = h * 0x1p-32f * (positive ? 1.f : 2.f) - (positive ? 0.f : 1.f);
    if (bytes == 4)
      static_cast<float*>(to)[i] = x;
    else
      static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(x);
  }
}

// ---- host

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
double deadline;

struct Stats {
  double p20, p50, p80;
};
Stats stats(std::vector<double> v) {
  if (v.empty()) return {0, 0, 0};
  std::sort(v.begin(), v.end());
  auto at = [&](double q) { return v[std::min(v.size() - 1, static_cast<size_t>(q * v.size()))]; };
  return {at(0.2), at(0.5), at(0.8)};
}

void* device_bytes(size_t bytes) {
  void* p = nullptr;
  CHECK(cudaMalloc(&p, bytes));
  return p;
}
template <class T>
T* upload(const std::vector<T>& v) {
  T* p = static_cast<T*>(device_bytes(v.size() * sizeof(T)));
  CHECK(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

// Tensors of one way of storing, and their table.
struct Memory {
  std::vector<void*> owned;
  std::vector<Tensor> tensors;
  Tensor* table = nullptr;
  int64_t elements;
  int bytes_per_element;

  Memory(int count, int64_t n, int p_bytes, int s_bytes, int states)
      : elements(count * n), bytes_per_element(3 * p_bytes + 2 * states * s_bytes) {
    auto make = [&](int bytes, bool positive) {
      void* p = device_bytes(elements * bytes);
      fill<<<1024, 256>>>(p, elements, bytes, static_cast<uint32_t>(owned.size() * 977 + 1), positive);
      owned.push_back(p);
      return static_cast<char*>(p);
    };
    char *p = make(p_bytes, false), *g = make(p_bytes, false), *s[max_states] = {};
    for (int k = 0; k < states; ++k) s[k] = make(s_bytes, k > 0);
    for (int i = 0; i < count; ++i) {
      Tensor t{p + i * n * p_bytes, {}, g + i * n * p_bytes, n};
      for (int k = 0; k < states; ++k) t.s[k] = s[k] + i * n * s_bytes;
      tensors.push_back(t);
    }
    table = upload(tensors);
    CHECK(cudaDeviceSynchronize());
  }
  ~Memory() {
    for (void* p : owned) cudaFree(p);
    cudaFree(table);
  }
  Item* items(int64_t length, int* count) const {
    std::vector<Item> list;
    for (uint32_t i = 0; i < tensors.size(); ++i)
      for (int64_t at = 0; at < tensors[i].n; at += length) list.push_back({i, static_cast<uint32_t>(at / length)});
    *count = static_cast<int>(list.size());
    return upload(list);
  }
};

struct Variant {
  std::string shape, chain, mix;
  bool hints;
  std::function<void()> launch;
  int registers, local, blocks_per_sm;
  std::vector<double> ms;
};

int multiprocessors() {
  static int n = [] {
    int device, value;
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device));
    return value;
  }();
  return n;
}

// Coefficients of Adam at its tenth step, AMSGrad's are the same: factor, factor of the decay, w1 beta2 w2 eps ...
constexpr float coefficients[max_row] = {1.f, 0.99999f, 0.1f, 0.999f, 0.001f, 1e-8f, 0.0998f, 1.535e-3f};
constexpr int tensors_by_value = 1000;
using Given = Args<tensors_by_value>;

struct Group {
  const Memory& memory;
  std::string mix;
  std::vector<Variant> variants{};
  std::vector<void*> uploaded{};

  ~Group() {
    for (void* p : uploaded) cudaFree(p);
  }

  template <class Kernel>
  void add(Kernel kernel, const char* shape, const char* chain, bool hints, int64_t length, bool per_warp,
           int shared = 0, bool persistent = false) {
    Given args{};
    args.tensors = memory.table;
    args.items = memory.items(length, &args.count);
    uploaded.push_back(const_cast<Item*>(args.items));
    std::memcpy(args.row, coefficients, sizeof coefficients);
    for (size_t i = 0; i < memory.tensors.size(); ++i) args.g[i] = memory.tensors[i].g;
    if (shared) CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaFuncAttributes attributes;
    CHECK(cudaFuncGetAttributes(&attributes, kernel));
    int blocks = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared));
    int grid = per_warp ? (args.count + threads / 32 - 1) / (threads / 32) : args.count;
    if (persistent) grid = std::min(grid, blocks * multiprocessors());
    auto launch = [=] { kernel<<<grid, threads, shared>>>(args); };
    variants.push_back(
        {shape, chain, mix, hints, launch, attributes.numRegs, static_cast<int>(attributes.localSizeBytes), blocks});
  }

  // Rounds interleave the variants, so that what the machine does to one it does to all.
  void run(int rounds) {
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    for (int r = -3; r < rounds && now() < deadline; ++r)
      for (Variant& v : variants) {
        CHECK(cudaEventRecord(start));
        v.launch();
        CHECK(cudaGetLastError());
        CHECK(cudaEventRecord(end));
        CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, start, end));
        if (r >= 0) v.ms.push_back(ms);
      }
    CHECK(cudaEventDestroy(start));
    CHECK(cudaEventDestroy(end));
    for (const Variant& v : variants) print(v);
    std::fflush(stdout);
  }

  void print(const Variant& v) const {
    if (v.ms.empty()) return;
    const Stats s = stats(v.ms);
    const double gigabytes = 1e-9 * memory.elements * memory.bytes_per_element;
    std::printf("\"%s\",%s,\"%s\",%s,%lld,%zu,%.5f,%.5f,%.5f,%.1f,%d,%d,%d,\n", v.shape.c_str(), v.chain.c_str(),
                v.mix.c_str(), v.hints ? "yes" : "no", static_cast<long long>(memory.elements), v.ms.size(), s.p20,
                s.p50, s.p80, gigabytes / (s.p50 * 1e-3), v.registers, v.local, v.blocks_per_sm);
  }
};

template <class C, class P, class S, bool Hints>
void add_shapes(Group& group, const char* chain) {
  constexpr int NG = tensors_by_value, N = elements_of<P>;
  group.add(warp_items<C, P, S, Hints, NG, 1024, false>, "warp 1K", chain, Hints, 1024, true);
  group.add(warp_items<C, P, S, Hints, NG, 2048, false>, "warp 2K", chain, Hints, 2048, true);
  group.add(warp_items<C, P, S, Hints, NG, 4096, false>, "warp 4K", chain, Hints, 4096, true);
  group.add(warp_items<C, P, S, Hints, NG, 2048, false, 2>, "warp 2K, two packs", chain, Hints, 2048, true);
  group.add(warp_items<C, P, S, Hints, NG, 2048, true>, "warp 2K; gradients in the table", chain, Hints, 2048, true);
  group.add(persistent_warp_items<C, P, S, Hints, NG, 2048>, "warp 2K, persistent", chain, Hints, 2048, true, 0, true);
  group.add(block_items<C, P, S, Hints, NG, 1>, "block, one round", chain, Hints, threads * N, false);
  group.add(block_items<C, P, S, Hints, NG, 4>, "block, four rounds", chain, Hints, 4 * threads * N, false);
  group.add(pipelined_items<C, P, S, Hints, NG, 4>, "block, four rounds, pipelined", chain, Hints, 4 * threads * N,
            false);
}

template <class C, class P, class S>
void sweep_mix(const char* chain, const char* mix) {
  if (now() > deadline) return;
  Memory memory(200, 1'000'000, sizeof(P), sizeof(S), C::slots);
  Group group{memory, mix};
  add_shapes<C, P, S, true>(group, chain);
  add_shapes<C, P, S, false>(group, chain);
  add_shapes<Stripped<C::slots>, P, S, true>(group, "none: same streams");
  group.run(25);
}

template <class C, class P, class S>
void sweep_bulk(const char* chain, const char* mix) {
  if (now() > deadline) return;
  int major = 0;
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  if (major < 9) return;
  constexpr int NG = tensors_by_value;
  Memory memory(200, 1'000'000, sizeof(P), sizeof(S), C::slots);
  Group group{memory, mix};
  group.add(bulk_items<C, P, S, true, NG>, "bulk copy, three tiles of 2K", chain, true, Bulk<C, P, S>::tile, false,
            Bulk<C, P, S>::shared_bytes, true);
  group.add(warp_items<C, P, S, true, NG, 2048, false>, "warp 2K", chain, true, 2048, true);
  group.run(25);
}

// What the host pays: a launch by the size of its parameters, and gradients by value against a copy to a table.
void host_row(const char* shape, const char* chain, const std::function<void()>& launch) {
  std::vector<double> us;
  for (int batch = 0; batch < 40; ++batch) {
    const double start = now();
    for (int i = 0; i < 50; ++i) launch();
    const double each = (now() - start) / 50 * 1e6;
    CHECK(cudaDeviceSynchronize());
    if (batch >= 5) us.push_back(each);
  }
  CHECK(cudaGetLastError());
  std::printf("%s,%s,,,,%zu,,,,,,,,%.3f\n", shape, chain, us.size(), stats(us).p50);
  std::fflush(stdout);
}

template <int Bytes>
void launch_cost(const char* shape) {
  static Block<Bytes> block{};
  host_row(shape, "launch: host us", [] { takes_parameters<Bytes><<<1, 32>>>(block, nullptr); });
}

void sweep_host() {
  launch_cost<64>("64 B of parameters");
  launch_cost<1024>("1 KB of parameters");
  launch_cost<4000>("4 KB of parameters");
  launch_cost<8192>("8 KB of parameters");
  launch_cost<32000>("32 KB of parameters");

  Memory memory(1000, 1000, 4, 4, 2);
  Group group{memory, "fp32, 1000 x 1000"};
  constexpr int NG = tensors_by_value;
  group.add(warp_items<Adam, float, float, true, NG, 1024, false>, "warp 1K; gradients by value", "adam", true, 1024,
            true);
  group.add(warp_items<Adam, float, float, true, NG, 2048, false>, "warp 2K; gradients by value", "adam", true, 2048,
            true);
  group.add(warp_items<Adam, float, float, true, NG, 1024, true>, "warp 1K; gradients in the table", "adam", true, 1024,
            true);
  group.run(100);
  host_row("1000 gradients by value", "step: host us", group.variants[0].launch);
  void* pinned = nullptr;
  CHECK(cudaMallocHost(&pinned, 1 << 20));
  void* target = device_bytes(8000);
  const auto& launch = group.variants[2].launch;
  int slot = 0;
  host_row("1000 gradients copied to a table", "step: host us", [&] {
    CHECK(cudaMemcpyAsync(target, static_cast<char*>(pinned) + slot, 8000, cudaMemcpyHostToDevice));
    slot = (slot + 8192) % (1 << 20);
    launch();
  });
  CHECK(cudaFree(target));
  CHECK(cudaFreeHost(pinned));
}

void sweep(double seconds) {
  deadline = now() + seconds;
  std::printf(
      "shape,chain,mix,hints,elements,rounds,ms_p20,ms_p50,ms_p80,gb_per_s,registers,local_bytes,blocks_per_sm,host_"
      "us\n");
  CHECK(cudaFree(nullptr));
  sweep_mix<Adam, float, float>("adam", "fp32");
  sweep_mix<Adam, __nv_bfloat16, float>("adam", "bf16, fp32 states");
  sweep_mix<Adam, __nv_bfloat16, __nv_bfloat16>("adam", "bf16");
  sweep_mix<AmsGrad, float, float>("amsgrad", "fp32");
  sweep_host();
  sweep_bulk<Adam, float, float>("adam", "fp32");
  sweep_bulk<Adam, __nv_bfloat16, float>("adam", "bf16, fp32 states");
  sweep_bulk<Adam, __nv_bfloat16, __nv_bfloat16>("adam", "bf16");
}

}  // namespace
}  // namespace fastopt

int main(int count, char** words) {
  fastopt::sweep(count > 1 ? std::atof(words[1]) : 40.0);
  return 0;
}
