// y[r, o] = sum over k of x[r, k] * W[o, k] for a few rows of x, straight from the codes of W (outputs, columns).
//
//   1  a thread a result: neighbouring threads read codes that are a whole row of W apart
//   2  a warp a result: neighbours read neighbouring bytes, and shuffles add the 32 sums up
//   3  16 bytes of codes a lane, the codebook in shared memory, and four rows of x for each decoded value: W is
//      read and decoded once for four rows instead of once for each
//   4  four outputs a warp, so that x too is read once for four; and four bytes of codes a lane, eight columns, so
//      that the lanes' pieces of x lie side by side (in version 3 one read of x is scattered over 2 KB)
//
// Sums are float32 whatever the type. Many rows are another matter: cuda_operators.cpp dequantises and calls cuBLAS.
#include "nf4.cuh"

#define SCALES const float *absmax, const uint8_t *codes, const float *map, const float *offset
#define THE_SCALES absmax, codes, map, offset

template <class T>
__global__ void product_1(const T* x, const uint8_t* packed, SCALES, T* y, int rows, int64_t outputs, int64_t columns, int block_size) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * outputs) return;
    int64_t r = i / outputs, o = i % outputs;
    float sum = 0;
    for (int64_t k = 0; k < columns; ++k) {
        int64_t w = o * columns + k;
        int code = w % 2 ? packed[w / 2] & 15 : packed[w / 2] >> 4;
        sum += to_float(x[r * columns + k]) * (LEVEL[code] * scale_of(w / block_size, THE_SCALES));
    }
    put(y[i], sum);
}

template <class T>
__global__ void product_2(const T* x, const uint8_t* packed, SCALES, T* y, int rows, int64_t outputs, int64_t columns, int block_size) {
    int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (i >= rows * outputs) return;                            // the whole warp leaves
    int64_t r = i / outputs, o = i % outputs;
    float sum = 0;
    for (int64_t k = lane; k < columns; k += 32) {
        int64_t w = o * columns + k;
        int code = w % 2 ? packed[w / 2] & 15 : packed[w / 2] >> 4;
        sum += to_float(x[r * columns + k]) * (LEVEL[code] * scale_of(w / block_size, THE_SCALES));
    }
    for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
    if (lane == 0) put(y[i], sum);
}

// blockIdx.y counts fours of rows. Wants columns and block_size to be multiples of 32, and x and packed at
// multiples of 16 bytes.
template <class T>
__global__ void __launch_bounds__(256) product_3(const T* x, const uint8_t* packed, SCALES, T* y, int rows, int64_t outputs, int64_t columns, int block_size) {
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = LEVEL[threadIdx.x];
    __syncthreads();
    int64_t o = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32, r0 = 4 * blockIdx.y;
    if (o >= outputs) return;
    constexpr int MANY = 16 / sizeof(T);
    float sum[4] = {};
    for (int64_t k = 32 * lane; k < columns; k += 1024) {
        int64_t w = o * columns + k;
        Sixteen<uint8_t> bytes = *reinterpret_cast<const Sixteen<uint8_t>*>(packed + w / 2);
        float part[4] = {};
#pragma unroll
        for (int s = 0; s < 32 / MANY; ++s) {
            float v[MANY];
#pragma unroll
            for (int j = 0; j < MANY; j += 2) {
                int byte = bytes.v[(s * MANY + j) / 2];
                v[j] = level[byte >> 4];
                v[j + 1] = level[byte & 15];
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                if (r0 + r >= rows) break;
                Sixteen<T> u = reinterpret_cast<const Sixteen<T>*>(x + (r0 + r) * columns + k)[s];
#pragma unroll
                for (int j = 0; j < MANY; ++j) part[r] += to_float(u.v[j]) * v[j];
            }
        }
        float scale = scale_of(w / block_size, THE_SCALES);     // leaves the inner loop: 32 elements have the same
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] += part[r] * scale;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        for (int bits = 16; bits; bits /= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], bits);
        if (lane == 0 && r0 + r < rows) put(y[(r0 + r) * outputs + o], sum[r]);
    }
}

// blockIdx.y counts fours of rows. Wants columns to be a multiple of 8, block_size a power of two from 8, x at a
// multiple of 16 bytes and packed at one of 4.
template <class T>
__global__ void __launch_bounds__(256) product_4(const T* x, const uint8_t* packed, SCALES, T* y, int rows, int64_t outputs, int64_t columns, int block_size) {
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = LEVEL[threadIdx.x];
    __syncthreads();
    int64_t o0 = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32 * 4;
    int lane = threadIdx.x % 32, r0 = 4 * blockIdx.y, bits = log2_of(block_size);
    if (o0 >= outputs) return;                                  // the whole warp leaves
    constexpr int MANY = 16 / sizeof(T);
    float sum[4][4] = {};                                       // of output and row
#pragma unroll 2
    for (int64_t k = 8 * lane; k < columns; k += 256) {
        unsigned word[4];
        float scale[4], u[4][8];
#pragma unroll
        for (int o = 0; o < 4; ++o) {
            int64_t w = min(o0 + o, outputs - 1) * columns + k; // behind the last output: that one again, and not written
            word[o] = *reinterpret_cast<const unsigned*>(packed + w / 2);
            scale[o] = scale_of(w >> bits, THE_SCALES);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if (r0 + r >= rows) break;
#pragma unroll
            for (int s = 0; s < 8 / MANY; ++s) {
                Sixteen<T> part = reinterpret_cast<const Sixteen<T>*>(x + (r0 + r) * columns + k)[s];
#pragma unroll
                for (int j = 0; j < MANY; ++j) u[r][s * MANY + j] = to_float(part.v[j]);
            }
        }
#pragma unroll
        for (int o = 0; o < 4; ++o) {
            float part[4] = {};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float v = level[word[o] >> 4 * (j ^ 1) & 15];   // the earlier of two is in the high half of its byte
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    if (r0 + r >= rows) break;
                    part[r] = fmaf(u[r][j], v, part[r]);
                }
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[o][r] += part[r] * scale[o];
        }
    }
#pragma unroll
    for (int o = 0; o < 4; ++o) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            for (int to = 16; to; to /= 2) sum[o][r] += __shfl_xor_sync(0xffffffffu, sum[o][r], to);
            if (lane == 0 && r0 + r < rows && o0 + o < outputs) put(y[(r0 + r) * outputs + o0 + o], sum[o][r]);
        }
    }
}

#ifdef __CUDACC__
template <class T>
void product_launch(const T* x, const uint8_t* packed, SCALES, T* y, int rows, int64_t outputs, int64_t columns, int block_size, cudaStream_t stream) {
    auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    bool power = block_size >= 8 && (block_size & (block_size - 1)) == 0;
    // Up to two rows version 3 was the faster on an H100 (tests/bench_gpu.py): it has four times the warps.
    if (rows <= 2 && columns % 32 == 0 && block_size % 32 == 0 && at(packed) % 16 == 0 && at(x) % 16 == 0)
        product_3<T><<<dim3(unsigned((outputs + 7) / 8), (rows + 3) / 4), 256, 0, stream>>>(x, packed, THE_SCALES, y, rows, outputs, columns, block_size);
    else if (columns % 8 == 0 && power && at(packed) % 4 == 0 && at(x) % 16 == 0)
        product_4<T><<<dim3(unsigned((outputs + 31) / 32), (rows + 3) / 4), 256, 0, stream>>>(x, packed, THE_SCALES, y, rows, outputs, columns, block_size);
    else product_2<T><<<unsigned((rows * outputs + 7) / 8), 256, 0, stream>>>(x, packed, THE_SCALES, y, rows, outputs, columns, block_size);
}
#define KEEP(T) template void product_launch(const T*, const uint8_t*, SCALES, T*, int, int64_t, int64_t, int, cudaStream_t); \
                template __global__ void product_1(const T*, const uint8_t*, SCALES, T*, int, int64_t, int64_t, int);
KEEP(float) KEEP(__half) KEEP(__nv_bfloat16)
#endif
