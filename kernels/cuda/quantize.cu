// float32, float16 or bfloat16 -> NF4: the scale of a block is its largest absolute value; a code is the number of
// thresholds below x / scale. Full blocks multiply by the reciprocal, a last one that is not full divides, and a
// scale below 1e-38 divides as 1e-38: so does bitsandbytes, and the codes are its codes.
//
//   1  a thread a block of 64: simple, but 32 threads read 32 places far apart, and few threads have work
//   2  a CUDA block for each: neighbours read neighbours; the maximum is found in shared memory, half of the
//      threads dropping out at each of the barriers
//   3  a warp a block: the maximum goes from register to register by shuffles, without a barrier
//   4  for full blocks of 64: eight lanes a block, eight elements a lane, read 16 bytes at a time and written four
//   5  the thresholds in shared memory: in constant memory, which serves one address at a time, 32 lanes whose
//      searches go different ways wait for one another
#include "nf4.cuh"

__device__ inline float threshold(int i) { return (LEVEL[i] + LEVEL[i + 1]) / 2; }
struct Constant { __device__ float operator()(int i) const { return threshold(i); } };
struct Shared { const float* kept; __device__ float operator()(int i) const { return kept[i]; } };
// The number of thresholds below v, by halving.
template <class Thresholds> __device__ inline int encode(float v, Thresholds at) {
    int code = v > at(7) ? 8 : 0;
#pragma unroll
    for (int step = 4; step; step /= 2)
        if (v > at(code + step - 1)) code += step;
    return code;
}
// The larger one; a NaN counts as the largest and stays, so that the caller sees it in the scale.
__device__ inline float larger(float a, float b) { return b > a || b != b ? b : a; }

struct Divide {
    float divisor, reciprocal;
    bool full;
    __device__ Divide(float largest, bool full) : divisor(largest < 1e-38f ? 1e-38f : largest), reciprocal(1.0f / divisor), full(full) {}
    template <class Thresholds = Constant> __device__ int code(float v, Thresholds at = {}) const {
        return encode(full ? v * reciprocal : v / divisor, at);
    }
};

template <class T>
__global__ void quantize_1(const T* x, uint8_t* packed, float* absmax, int64_t n, int block_size) {
    int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, first = b * block_size;
    if (first >= n) return;
    int64_t end = min(n, first + block_size);
    float largest = 0;
    for (int64_t i = first; i < end; ++i) largest = larger(largest, fabsf(to_float(x[i])));
    Divide by(largest, end - first == block_size);
    absmax[b] = by.full ? largest : by.divisor;
    for (int64_t i = first; i < end; i += 2)
        packed[i / 2] = by.code(to_float(x[i])) << 4 | (i + 1 < end ? by.code(to_float(x[i + 1])) : 7);
}

// 64 threads a CUDA block.
template <class T>
__global__ void quantize_2(const T* x, uint8_t* packed, float* absmax, int64_t n, int block_size) {
    __shared__ float most[64];
    int64_t first = int64_t(blockIdx.x) * block_size, end = min(n, first + block_size);
    float largest = 0;
    for (int64_t i = first + threadIdx.x; i < end; i += 64) largest = larger(largest, fabsf(to_float(x[i])));
    most[threadIdx.x] = largest;
    for (int half = 32; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) most[threadIdx.x] = larger(most[threadIdx.x], most[threadIdx.x + half]);
    }
    __syncthreads();
    Divide by(most[0], end - first == block_size);
    if (threadIdx.x == 0) absmax[blockIdx.x] = by.full ? most[0] : by.divisor;
    for (int64_t i = first + 2 * threadIdx.x; i < end; i += 128)
        packed[i / 2] = by.code(to_float(x[i])) << 4 | (i + 1 < end ? by.code(to_float(x[i + 1])) : 7);
}

// Blocks from `start` on, for what version 4 leaves over.
template <class T>
__global__ void quantize_3(const T* x, uint8_t* packed, float* absmax, int64_t n, int block_size, int64_t start) {
    int64_t b = start + (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32, first = b * block_size;
    int lane = threadIdx.x % 32;
    if (first >= n) return;                                     // the whole warp leaves
    int64_t end = min(n, first + block_size);
    float largest = 0;
    for (int64_t i = first + lane; i < end; i += 32) largest = larger(largest, fabsf(to_float(x[i])));
    for (int bits = 16; bits; bits /= 2) largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, bits));
    Divide by(largest, end - first == block_size);
    if (lane == 0) absmax[b] = by.full ? largest : by.divisor;
    for (int64_t i = first + 2 * lane; i < end; i += 64)
        packed[i / 2] = by.code(to_float(x[i])) << 4 | (i + 1 < end ? by.code(to_float(x[i + 1])) : 7);
}

template <class T, class Thresholds>
__device__ inline void full_blocks(const T* x, uint8_t* packed, float* absmax, int64_t blocks, Thresholds at) {
    int64_t lane = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, b = lane / 8;
    bool here = b < blocks;                                     // lanes behind the end take part in the shuffles
    constexpr int MANY = 16 / sizeof(T);
    float v[8] = {};
    if (here) {
#pragma unroll
        for (int s = 0; s < 8 / MANY; ++s) {
            Sixteen<T> part = reinterpret_cast<const Sixteen<T>*>(x + 8 * lane)[s];
#pragma unroll
            for (int j = 0; j < MANY; ++j) v[s * MANY + j] = to_float(part.v[j]);
        }
    }
    float largest = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = larger(largest, fabsf(v[j]));
    for (int bits = 4; bits; bits /= 2) largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, bits));
    if (!here) return;
    Divide by(largest, true);
    if (lane % 8 == 0) absmax[b] = largest;
    unsigned word = 0;
#pragma unroll
    for (int j = 0; j < 8; j += 2) word |= unsigned(by.code(v[j], at) << 4 | by.code(v[j + 1], at)) << 4 * j;
    *reinterpret_cast<unsigned*>(packed + 4 * lane) = word;
}

// Full blocks of 64 only. Wants x at a multiple of 16 bytes and packed at one of 4.
template <class T>
__global__ void quantize_4(const T* x, uint8_t* packed, float* absmax, int64_t blocks) {
    full_blocks(x, packed, absmax, blocks, Constant{});
}

template <class T>
__global__ void quantize_5(const T* x, uint8_t* packed, float* absmax, int64_t blocks) {
    __shared__ float kept[16];
    if (threadIdx.x < 15) kept[threadIdx.x] = threshold(threadIdx.x);
    __syncthreads();
    full_blocks(x, packed, absmax, blocks, Shared{kept});
}

#ifdef __CUDACC__
template <class T>
void quantize_launch(const T* x, uint8_t* packed, float* absmax, int64_t n, int block_size, cudaStream_t stream) {
    bool wide = block_size == 64 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    int64_t blocks = (n + block_size - 1) / block_size, whole = wide ? n / 64 : 0;
    if (whole) quantize_5<T><<<unsigned((whole + 31) / 32), 256, 0, stream>>>(x, packed, absmax, whole);
    if (blocks > whole) quantize_3<T><<<unsigned((blocks - whole + 7) / 8), 256, 0, stream>>>(x, packed, absmax, n, block_size, whole);
}
template void quantize_launch(const float*, uint8_t*, float*, int64_t, int, cudaStream_t);
template void quantize_launch(const __half*, uint8_t*, float*, int64_t, int, cudaStream_t);
template void quantize_launch(const __nv_bfloat16*, uint8_t*, float*, int64_t, int, cudaStream_t);
#define KEEP(T) template __global__ void quantize_1(const T*, uint8_t*, float*, int64_t, int); \
                template __global__ void quantize_2(const T*, uint8_t*, float*, int64_t, int); \
                template __global__ void quantize_4(const T*, uint8_t*, float*, int64_t);
KEEP(float) KEEP(__half) KEEP(__nv_bfloat16)
#endif
