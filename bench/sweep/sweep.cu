// Which shape of kernel moves an optimizer's streams fastest: who takes which elements, how many at a time, with which
// cache hints, and how many threads a multiprocessor holds; interleaved round by round. And what a launch costs the
// host by the size of its parameters. Rows of CSV on stdout, the rows of a group as soon as it is done; what went wrong
// on stderr. The update itself is the project's own (csrc/stages).
//
//   sweep [seconds]      begins no group after that time; the most telling come first
//
// A first version had blocks that stay and fetch their next item early, software pipelines, and tiles brought to shared
// memory by the bulk copy engine: none was faster than the plain shapes (bench/results/tuning.csv).
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <unistd.h>

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

constexpr int max_states = 3, max_row = 16;

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
  const void* g;
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

// Hints: none of them unless a bit is set.
enum : int { plain = 0, loads_no_allocate = 1, states_streaming = 2 };

template <int Hints>
__device__ __forceinline__ uint4 load16(const void* from) {
  uint4 v;
  if constexpr (Hints & loads_no_allocate)
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
  else
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

template <bool Streaming>
__device__ __forceinline__ void store16(void* to, uint4 v) {
  if constexpr (Streaming)
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

  template <int Hints>
  __device__ __forceinline__ void load(const void* base, int64_t at) {
    const T* from = static_cast<const T*>(base) + at;
#pragma unroll
    for (int k = 0; k < count; ++k) raw[k] = load16<Hints>(from + k * each);
  }
  template <bool Streaming>
  __device__ __forceinline__ void store(void* base, int64_t at) const {
    T* to = static_cast<T*>(base) + at;
#pragma unroll
    for (int k = 0; k < count; ++k) store16<Streaming>(to + k * each, raw[k]);
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
template <class C, class P, class S, int N, int Hints>
struct Pack {
  static constexpr int states = C::slots;
  Piece<P, N> p, g;
  Piece<S, N> s[states];

  __device__ __forceinline__ void load(const Tensor& t, const void* gradient, int64_t at) {
    g.template load<Hints>(gradient, at);
    p.template load<Hints>(t.p, at);
#pragma unroll
    for (int k = 0; k < states; ++k) s[k].template load<Hints>(t.s[k], at);
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
    p.template store<false>(t.p, at);
#pragma unroll
    for (int k = 0; k < states; ++k) s[k].template store<(Hints & states_streaming) != 0>(t.s[k], at);
  }
};

// 16 bytes of the narrowest stream: 4 elements of fp32, 8 where anything is bf16.
template <class P>
constexpr int elements_of = 16 / sizeof(P);

// Who takes an item: a warp, or a block whose threads go through it together. `rounds` packs a thread, `packs` of them
// loaded before the first is stored.
template <int Threads, int Blocks, bool ByBlock, int Packs, int Rounds>
struct Shape {
  static constexpr int threads = Threads, blocks = Blocks;  // of a block, and blocks that a multiprocessor should hold
  static constexpr bool by_block = ByBlock;
  static constexpr int packs = Packs, rounds = Rounds, together = ByBlock ? Threads : 32;
};

template <class C, class P, class S, class Form, int Hints, int NG>
__global__ void __launch_bounds__(Form::threads, Form::blocks) update(const __grid_constant__ Args<NG> args) {
  constexpr int N = elements_of<P>, together = Form::together;
  constexpr int64_t length = int64_t{Form::rounds} * together * N;
  const int w = Form::by_block ? blockIdx.x : blockIdx.x * (Form::threads / 32) + threadIdx.x / 32;
  if (w >= args.count) return;
  const Item item = args.items[w];
  const Tensor& t = args.tensors[item.tensor];
  const void* g = args.g[item.tensor];
  const int64_t base = item.chunk * length, end = min(base + length, t.n);
#pragma unroll 1
  for (int64_t at = base + threadIdx.x % together * N; at < end; at += Form::packs * together * N) {
    Pack<C, P, S, N, Hints> pack[Form::packs];
#pragma unroll
    for (int k = 0; k < Form::packs; ++k)
      if (at + k * together * N < end) pack[k].load(t, g, at + k * together * N);
#pragma unroll
    for (int k = 0; k < Form::packs; ++k)
      if (at + k * together * N < end) {
        pack[k].update(args.row);
        pack[k].store(t, at + k * together * N);
      }
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
  std::string shape, chain;
  int hints;
  std::function<void()> launch;
  int registers, local, blocks_per_sm;
  std::vector<double> ms;
};

const char* name_of(int hints) {
  static const char* const names[] = {"none", "loads", "states", "both"};
  return names[hints];
}

// Coefficients of Adam at its tenth step, AMSGrad's are the same: factor, factor of the decay, w1 beta2 w2 eps ...
constexpr float coefficients[max_row] = {1.f, 0.99999f, 0.1f, 0.999f, 0.001f, 1e-8f, 0.0998f, 1.535e-3f};
constexpr int tensors_by_value = 1000;

struct Group {
  const Memory& memory;
  std::string mix;
  std::vector<Variant> variants{};
  std::vector<void*> uploaded{};

  ~Group() {
    for (void* p : uploaded) cudaFree(p);
  }

  template <class C, class P, class S, class Form, int Hints>
  void add(const char* chain) {
    auto* const kernel = update<C, P, S, Form, Hints, tensors_by_value>;
    const int together = Form::together;
    Args<tensors_by_value> args{};
    args.tensors = memory.table;
    args.items = memory.items(int64_t{Form::rounds} * together * elements_of<P>, &args.count);
    uploaded.push_back(const_cast<Item*>(args.items));
    std::memcpy(args.row, coefficients, sizeof coefficients);
    for (size_t i = 0; i < memory.tensors.size(); ++i) args.g[i] = memory.tensors[i].g;
    cudaFuncAttributes attributes;
    CHECK(cudaFuncGetAttributes(&attributes, kernel));
    int blocks = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Form::threads, 0));
    const int each = Form::threads / together, grid = (args.count + each - 1) / each;
    const std::string name = std::string(Form::by_block ? "block" : "warp") + " of " + std::to_string(together) +
                             ", rounds " + std::to_string(Form::rounds) + ", at once " + std::to_string(Form::packs) +
                             ", blocks wanted " + std::to_string(Form::blocks) + " x " + std::to_string(Form::threads);
    variants.push_back({name,
                        chain,
                        Hints,
                        [=] { kernel<<<grid, Form::threads>>>(args); },
                        attributes.numRegs,
                        static_cast<int>(attributes.localSizeBytes),
                        blocks,
                        {}});
  }

  // Rounds interleave the variants, so that what the machine does to one it does to all. A pause keeps it cool.
  void run(int rounds) {
    cudaEvent_t start, end;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    for (int r = -3; r < rounds && now() < deadline; ++r)
      for (Variant& v : variants) {
        usleep(400);
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
                mix.c_str(), name_of(v.hints), static_cast<long long>(memory.elements), v.ms.size(), s.p20, s.p50,
                s.p80, gigabytes / (s.p50 * 1e-3), v.registers, v.local, v.blocks_per_sm);
  }
};

template <class C, class P, class S, class Form>
void add_hints(Group& group, const char* chain) {
  group.add<C, P, S, Form, plain>(chain);
  group.add<C, P, S, Form, loads_no_allocate>(chain);
  group.add<C, P, S, Form, states_streaming>(chain);
  group.add<C, P, S, Form, loads_no_allocate | states_streaming>(chain);
}

// B: blocks of 256 threads that a multiprocessor should hold.
template <class C, class P, class S, int B>
void sweep_mix(const char* chain, const char* mix) {
  if (now() > deadline) return;
  Memory memory(200, 1'000'000, sizeof(P), sizeof(S), C::slots);
  Group group{memory, mix};
  add_hints<C, P, S, Shape<256, B, false, 1, 32 / elements_of<P>>>(group, chain);
  add_hints<C, P, S, Shape<256, B, true, 1, 4>>(group, chain);
  group.add<C, P, S, Shape<256, B, false, 1, 8 / elements_of<P>>, plain>(chain);
  group.add<C, P, S, Shape<256, B, true, 1, 1>, plain>(chain);
  group.add<C, P, S, Shape<256, B, true, 1, 2>, plain>(chain);
  group.add<C, P, S, Shape<256, B, true, 1, 8>, plain>(chain);
  group.add<C, P, S, Shape<256, B, true, 1, 16>, plain>(chain);
  group.add<C, P, S, Shape<256, B + 1, true, 1, 4>, plain>(chain);
  group.add<C, P, S, Shape<256, B - 1, true, 1, 4>, plain>(chain);
  group.add<C, P, S, Shape<128, 2 * B, true, 1, 4>, plain>(chain);
  group.add<C, P, S, Shape<512, B / 2, true, 1, 4>, plain>(chain);
  group.add<C, P, S, Shape<128, B, true, 2, 2>, plain>(chain);
  group.add<C, P, S, Shape<256, B / 2, true, 2, 4>, plain>(chain);
  group.add<Stripped<C::slots>, P, S, Shape<256, B, true, 1, 4>, plain>("none: same streams");
  group.add<Stripped<C::slots>, P, S, Shape<128, B, true, 2, 2>, plain>("none: same streams");
  group.run(15);
}

// What a launch costs the host by the size of its parameters.
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
}

void sweep(double seconds) {
  deadline = now() + seconds;
  std::printf(
      "shape,chain,mix,hints,elements,rounds,ms_p20,ms_p50,ms_p80,gb_per_s,registers,local_bytes,blocks_per_sm,host_"
      "us\n");
  CHECK(cudaFree(nullptr));
  sweep_mix<Adam, float, float, 5>("adam", "fp32");
  sweep_mix<Adam, __nv_bfloat16, __nv_bfloat16, 5>("adam", "bf16");
  sweep_mix<Adam, __nv_bfloat16, float, 4>("adam", "bf16, fp32 states");
  sweep_mix<AmsGrad, float, float, 5>("amsgrad", "fp32");
  sweep_mix<AmsGrad, __nv_bfloat16, __nv_bfloat16, 4>("amsgrad", "bf16");
  sweep_host();
}

}  // namespace
}  // namespace fastopt

int main(int count, char** words) {
  fastopt::sweep(count > 1 ? std::atof(words[1]) : 40.0);
  return 0;
}
