// NF4 on the GPU: what the operations have in common. The layout is that of cpu/nf4.h.
// The same text runs in the emulator (kernels/emulator), which then has given CUDA's words their meaning.
#pragma once
#ifdef __CUDACC__
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

static __constant__ float LEVEL[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void put(float& to, float v) { to = v; }
__device__ inline void put(__half& to, float v) { to = __float2half_rn(v); }
__device__ inline void put(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

// The scale of a block. Double-quantised (codes given): code -> map, times the absmax of 256 blocks, plus offset.
// The build says --fmad=false, so that this rounds twice, as the CPU does.
__device__ inline float scale_of(int64_t b, const float* absmax, const uint8_t* codes, const float* map, const float* offset) {
    return codes ? map[codes[b]] * absmax[b >> 8] + *offset : absmax[b];
}

// For a power of two: b >> log2_of(n) is b / n without the division, which for 64 bits takes dozens of instructions.
__device__ inline int log2_of(int n) {
    int bits = 0;
    while (n >> bits > 1) ++bits;
    return bits;
}

// 16 bytes of any type, read or written in one instruction.
template <class T> struct alignas(16) Sixteen { T v[16 / sizeof(T)]; };
