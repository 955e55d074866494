// A GPU made of a CPU: put before a .cu file (g++ -include emulator.h -x c++ file.cu), it gives CUDA's words a
// meaning in C++. Blocks run one after the other. The threads of a block are fibres: one runs until it comes to
// a barrier or a warp shuffle, then another. In which order, the caller says (emulator.cpp).
//
// The compiler reports every access to memory (-fsanitize=thread writes the calls; emulator.cpp answers them, not
// the sanitiser's own library), so the text needs no change for bounds and races to be checked.
//
// Left out: shared memory whose size the launch gives (extern __shared__), textures, cooperative groups, streams.

#pragma once
#include <cmath>
#include <cstdlib>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

using std::abs;                                     // of real numbers, too: C's alone is that of int

#define __global__
#define __device__ __attribute__((always_inline))   // so that an access is told with the line that called for it
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static                           // blocks run one after the other, so one copy is enough
#define EMULATED inline __attribute__((always_inline))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {
struct Place { dim3 thread, block, block_size, grid_size; };
extern Place here;                                  // of the thread that runs
struct Value { void* pointer; std::int64_t integer; double real; std::int64_t element_size; };
void barrier(int line, int place);
std::uint64_t exchange(unsigned mask, std::uint64_t bits, int from_lane, bool orders_memory, int line);
int lane();
void atomic(bool begins);

template <class T> __attribute__((no_sanitize_thread)) T argument(const Value& v) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(v.pointer);
    else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(v.real);
    else return static_cast<T>(v.integer);
}
template <class... T, std::size_t... i>
__attribute__((no_sanitize_thread)) void call(void (*kernel)(T...), const Value* values, std::index_sequence<i...>) {
    kernel(argument<std::remove_cv_t<T>>(values[i])...);
}
// Calls the kernel with arguments of the types that it wants.
template <class... T> void call(void (*kernel)(T...), const Value* values) { call(kernel, values, std::index_sequence_for<T...>()); }
// Bytes that an argument points at, 0 for a number, -1 for a real number: for the caller to check.
template <class A> constexpr int points_at() {
    if constexpr (std::is_pointer_v<A>) return static_cast<int>(sizeof(std::remove_pointer_t<A>));
    else return std::is_floating_point_v<A> ? -1 : 0;
}
template <class... T> __attribute__((no_sanitize_thread)) int signature(void (*)(T...), int* sizes) {
    int i = 0;
    ((sizes[i++] = points_at<std::remove_cv_t<T>>()), ...);
    return sizeof...(T);
}
template <class T> EMULATED T shuffle(unsigned mask, T v, int from, int line) {
    std::uint64_t bits = 0;
    static_assert(sizeof(T) <= 8);
    std::memcpy(&bits, &v, sizeof(T));
    bits = exchange(mask, bits, from, false, line);
    std::memcpy(&v, &bits, sizeof(T));
    return v;
}
inline void warp_barrier(int line, unsigned mask = 0xffffffffu) { exchange(mask, 0, lane(), true, line); }
}  // namespace emulator

#define threadIdx emulator::here.thread
#define blockIdx emulator::here.block
#define blockDim emulator::here.block_size
#define gridDim emulator::here.grid_size
#define warpSize 32
#define __syncthreads() emulator::barrier(__LINE__, __COUNTER__)     // two in one line are two barriers
#define __syncwarp(...) emulator::warp_barrier(__LINE__ __VA_OPT__(,) __VA_ARGS__)
#define __shfl_sync(mask, v, from) emulator::shuffle(mask, v, from, __LINE__)
#define __shfl_xor_sync(mask, v, bits) emulator::shuffle(mask, v, emulator::lane() ^ (bits), __LINE__)
#define __shfl_down_sync(mask, v, by) emulator::shuffle(mask, v, emulator::lane() + (by), __LINE__)
#define __shfl_up_sync(mask, v, by) emulator::shuffle(mask, v, emulator::lane() - (by), __LINE__)

template <class T, class V> EMULATED T atomicAdd(T* p, V v) {
    emulator::atomic(true);
    T before = *p;
    *p = before + static_cast<T>(v);
    emulator::atomic(false);
    return before;
}
template <class T, class V> EMULATED T atomicMax(T* p, V v) {
    static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "CUDA has atomicMax for int, unsigned and long long, not for real numbers");
    emulator::atomic(true);
    T before = *p;
    *p = before < static_cast<T>(v) ? static_cast<T>(v) : before;
    emulator::atomic(false);
    return before;
}
inline int __float_as_int(float f) { int i; std::memcpy(&i, &f, 4); return i; }
inline float __int_as_float(int i) { float f; std::memcpy(&f, &i, 4); return f; }
template <class T> EMULATED T __ldg(const T* p) { return *p; }
template <class A, class B> EMULATED auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B> EMULATED auto max(A a, B b) { return a < b ? b : a; }

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __half { std::uint16_t bits; };
struct __nv_bfloat16 { std::uint16_t bits; };
inline float __half2float(__half h) {
    std::uint32_t sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
    if (rest >= 0x7c00u) { std::uint32_t u = sign | 0x7f800000u | (rest & 0x3ffu) << 13; float f; std::memcpy(&f, &u, 4); return f; }
    float size = std::ldexp(static_cast<float>(rest < 0x400u ? rest : (rest & 0x3ffu) | 0x400u), (rest < 0x400u ? 1 : static_cast<int>(rest >> 10)) - 25);
    return sign ? -size : size;
}
inline __half __float2half_rn(float f) {
    std::uint32_t u;
    std::memcpy(&u, &f, 4);
    auto sign = static_cast<std::uint16_t>(u >> 16 & 0x8000u);
    float size = std::fabs(f);
    if (!(size < 65520.0f)) return {static_cast<std::uint16_t>(sign | (f != f ? 0x7e00u : 0x7c00u))};
    int e = size < 6.103515625e-05f ? -14 : std::ilogb(size);
    auto steps = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 10 - e)));   // 1024..2048, or less if denormal
    return {static_cast<std::uint16_t>(sign | (((e + 14) << 10) + steps))};
}
inline float __bfloat162float(__nv_bfloat16 h) {
    std::uint32_t u = static_cast<std::uint32_t>(h.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    std::uint32_t u;
    std::memcpy(&u, &f, 4);
    return {static_cast<std::uint16_t>(f != f ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
