// How a lane reaches memory: a vector at a time, as many elements apart where a stream may begin anywhere, or one
// element of a dtype that is only known when the kernel runs.
#pragma once

#include "device.h"

namespace fastopt {

// What a lane reads or writes at once.
template <int words>
struct alignas(4 * words) Access {
  uint32_t word[words];
};

// Without cache hints: an H200 is slower with them (docs/performance.md).
template <int words>
FASTOPT_HD Access<words> read(const void* from) {
  static_assert(words == 2 || words == 4);
  Access<words> x;
#if defined(__CUDA_ARCH__)
  if constexpr (words == 4)
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "l"(from));
  else
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.word[0]), "=r"(x.word[1]) : "l"(from));
#else
  memcpy(&x, from, sizeof x);
#endif
  return x;
}
template <int words>
FASTOPT_HD void write(void* to, const Access<words>& x) {
#if defined(__CUDA_ARCH__)
  if constexpr (words == 4)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
  else
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(to), "r"(x.word[0]), "r"(x.word[1]) : "memory");
#else
  memcpy(to, &x, sizeof x);
#endif
}

// One element.
template <class Raw>
FASTOPT_HD Raw read_one(const Raw* from) {
  Raw x;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Raw) == 2)
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(from));
  else if constexpr (sizeof(Raw) == 4)
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
  else
    asm volatile("ld.global.f64 %0, [%1];" : "=d"(x) : "l"(from));
#else
  memcpy(&x, from, sizeof x);
#endif
  return x;
}
template <class Raw>
FASTOPT_HD void write_one(Raw* to, Raw x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Raw) == 2)
    asm volatile("st.global.u16 [%0], %1;" : : "l"(to), "h"(x) : "memory");
  else if constexpr (sizeof(Raw) == 4)
    asm volatile("st.global.f32 [%0], %1;" : : "l"(to), "f"(x) : "memory");
  else
    asm volatile("st.global.f64 [%0], %1;" : : "l"(to), "d"(x) : "memory");
#else
  memcpy(to, &x, sizeof x);
#endif
}

// V elements of a stream. All of a tensor's streams are read before any is converted.
template <class S, int V>
struct Vector {
  static constexpr int words = V * sizeof(typename S::Raw) / 4;
  Access<words> held;

  FASTOPT_HD static Vector read(const typename S::Raw* from) { return {fastopt::read<words>(from)}; }
  FASTOPT_HD void write(typename S::Raw* to) const { fastopt::write(to, held); }
  template <class T>
  FASTOPT_HD T get(int i) const {
    typename S::Raw raw[V];
    memcpy(raw, &held, sizeof raw);
    return S::template load<T>(raw[i]);
  }
  template <class T>
  FASTOPT_HD void set(int i, T value) {
    typename S::Raw raw[V];
    memcpy(raw, &held, sizeof raw);
    raw[i] = S::template store<T>(value);
    memcpy(&held, raw, sizeof raw);
  }
};

// V elements of a stream that may begin anywhere: a warp's lie side by side, and a lane's a warp apart.
template <class S, int V>
struct Spread {
  typename S::Raw held[V];

  FASTOPT_HD static Spread read(const typename S::Raw* from) {
    Spread x;
#pragma unroll
    for (int j = 0; j < V; ++j) x.held[j] = read_one(from + j * lanes);
    return x;
  }
  FASTOPT_HD void write(typename S::Raw* to) const {
#pragma unroll
    for (int j = 0; j < V; ++j) write_one(to + j * lanes, held[j]);
  }
  template <class T>
  FASTOPT_HD T get(int j) const {
    return S::template load<T>(held[j]);
  }
  template <class T>
  FASTOPT_HD void set(int j, T value) {
    held[j] = S::template store<T>(value);
  }
};

// One element of a stream whose dtype is only known now.
template <class T>
FASTOPT_HD T read_any(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<T>(static_cast<const float*>(data)[i]);
    case Dtype::f64:
      return static_cast<T>(static_cast<const double*>(data)[i]);
    case Dtype::bf16:
      return static_cast<T>(from_bf16(static_cast<const uint16_t*>(data)[i]));
    default:
      return static_cast<T>(from_f16(static_cast<const uint16_t*>(data)[i]));
  }
}
template <class T>
FASTOPT_HD void write_any(void* data, Dtype dtype, int64_t i, T x) {
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(data)[i] = static_cast<float>(x);
      break;
    case Dtype::f64:
      static_cast<double*>(data)[i] = static_cast<double>(x);
      break;
    case Dtype::bf16:
      static_cast<uint16_t*>(data)[i] = to_bf16(narrow(x));
      break;
    default:
      static_cast<uint16_t*>(data)[i] = to_f16(narrow(x));
  }
}

// Where element i of a shape lies in one of its streams.
FASTOPT_HD int64_t offset_of(const DeviceStrides* layout, int stream, int64_t i) {
  if (!layout) return i;
  int64_t offset = 0;
  for (int d = layout->dims - 1; d >= 0; --d) {
    offset += i % layout->sizes[d] * layout->strides[stream][d];
    i /= layout->sizes[d];
  }
  return offset;
}

}  // namespace fastopt
