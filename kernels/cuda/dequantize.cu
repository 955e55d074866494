// NF4 -> float32, float16 or bfloat16: out[i] = LEVEL[code of i] * scale of i's block.
//
//   1  a thread an element. Each byte is read twice; the codebook is in constant memory, which serves one address
//      at a time, so that 32 threads with 32 codes wait for up to 16 reads
//   2  a thread a byte: it is read once and gives two elements
//   3  the codebook in shared memory, which serves all threads at once (the first 16 threads put it there; the
//      barrier keeps the others from reading before)
//   4  a thread 16 bytes, read with one instruction: 32 elements, whose scale is read once; stores of 16 bytes,
//      so that 16-bit results leave eight at a time
//   5  neighbours write next to each other, too: in version 4 each thread writes a stretch of its own, and one store
//      of a warp is scattered. Here a thread reads four bytes, eight elements, which in 16 bits are one store of 16 bytes, 512 in a
//      row for a warp. Four such parts a thread, all read before the first is used; a shift in place of a division
//
// Least traffic for a 16-bit result: 0.5 + 4/64 + 2 = 2.5625 bytes an element.
#include "nf4.cuh"

#define SCALES const float *absmax, const uint8_t *codes, const float *map, const float *offset
#define THE_SCALES absmax, codes, map, offset

template <class T>
__global__ void dequantize_1(const uint8_t* packed, SCALES, T* out, int64_t n, int block_size) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
    put(out[i], LEVEL[code] * scale_of(i / block_size, THE_SCALES));
}

template <class T>
__global__ void dequantize_2(const uint8_t* packed, SCALES, T* out, int64_t n, int block_size) {
    int64_t i = 2 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i >= n) return;
    int byte = packed[i / 2];
    float scale = scale_of(i / block_size, THE_SCALES);     // of both: a block has an even size
    put(out[i], LEVEL[byte >> 4] * scale);
    if (i + 1 < n) put(out[i + 1], LEVEL[byte & 15] * scale);
}

template <class T>
__global__ void dequantize_3(const uint8_t* packed, SCALES, T* out, int64_t n, int block_size) {
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = LEVEL[threadIdx.x];
    __syncthreads();
    int64_t i = 2 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i >= n) return;
    int byte = packed[i / 2];
    float scale = scale_of(i / block_size, THE_SCALES);
    put(out[i], level[byte >> 4] * scale);
    if (i + 1 < n) put(out[i + 1], level[byte & 15] * scale);
}

// Wants packed and out at multiples of 16 bytes, and a block size that is a multiple of 32.
template <class T>
__global__ void dequantize_4(const uint8_t* packed, SCALES, T* out, int64_t n, int block_size) {
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = LEVEL[threadIdx.x];
    __syncthreads();
    int64_t i = 32 * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float scale = scale_of(i / block_size, THE_SCALES);
    if (i + 32 <= n) {
        constexpr int MANY = 16 / sizeof(T);                // elements of one store
        Sixteen<uint8_t> bytes = *reinterpret_cast<const Sixteen<uint8_t>*>(packed + i / 2);
#pragma unroll
        for (int s = 0; s < 32 / MANY; ++s) {
            Sixteen<T> values;
#pragma unroll
            for (int j = 0; j < MANY; j += 2) {
                int byte = bytes.v[(s * MANY + j) / 2];
                put(values.v[j], level[byte >> 4] * scale);
                put(values.v[j + 1], level[byte & 15] * scale);
            }
            reinterpret_cast<Sixteen<T>*>(out + i)[s] = values;
        }
    } else {
        for (int64_t k = i; k < n; ++k) put(out[k], level[k % 2 ? packed[k / 2] & 15 : packed[k / 2] >> 4] * scale);
    }
}

// Wants packed at a multiple of 4 bytes and out at one of 16, and a block size that is a power of two from 8.
template <class T>
__global__ void dequantize_5(const uint8_t* packed, SCALES, T* out, int64_t n, int block_size) {
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = LEVEL[threadIdx.x];
    __syncthreads();
    constexpr int PARTS = 4, MANY = 16 / sizeof(T);         // elements of one store
    int bits = log2_of(block_size), apart = 8 * blockDim.x;
    int64_t first = PARTS * (int64_t(blockIdx.x) * apart) + 8 * threadIdx.x;
    unsigned word[PARTS];
    float scale[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        int64_t i = first + p * apart;
        if (i + 8 > n) continue;
        word[p] = *reinterpret_cast<const unsigned*>(packed + i / 2);
        scale[p] = scale_of(i >> bits, THE_SCALES);
    }
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
        int64_t i = first + p * apart;
        if (i + 8 <= n) {
#pragma unroll
            for (int s = 0; s < 8 / MANY; ++s) {
                Sixteen<T> values;
#pragma unroll
                for (int j = 0; j < MANY; j += 2) {
                    int byte = word[p] >> 4 * (s * MANY + j) & 255;     // the lowest comes first
                    put(values.v[j], level[byte >> 4] * scale[p]);
                    put(values.v[j + 1], level[byte & 15] * scale[p]);
                }
                reinterpret_cast<Sixteen<T>*>(out + i)[s] = values;
            }
        } else {
            for (int64_t k = i; k < n; ++k)
                put(out[k], level[k % 2 ? packed[k / 2] & 15 : packed[k / 2] >> 4] * scale_of(k >> bits, THE_SCALES));
        }
    }
}

#ifdef __CUDACC__
template <class T>
void dequantize_launch(const uint8_t* packed, SCALES, T* out, int64_t n, int block_size, cudaStream_t stream) {
    bool wide = block_size >= 8 && (block_size & (block_size - 1)) == 0 && reinterpret_cast<uintptr_t>(packed) % 4 == 0 &&
                reinterpret_cast<uintptr_t>(out) % 16 == 0;
    if (wide) dequantize_5<T><<<unsigned((n + 8191) / 8192), 256, 0, stream>>>(packed, THE_SCALES, out, n, block_size);
    else dequantize_3<T><<<unsigned((n + 511) / 512), 256, 0, stream>>>(packed, THE_SCALES, out, n, block_size);
}
template void dequantize_launch(const uint8_t*, SCALES, float*, int64_t, int, cudaStream_t);
template void dequantize_launch(const uint8_t*, SCALES, __half*, int64_t, int, cudaStream_t);
template void dequantize_launch(const uint8_t*, SCALES, __nv_bfloat16*, int64_t, int, cudaStream_t);
// The earlier versions are compiled too, so that the benchmark can show what each idea brings.
#define KEEP(T) template __global__ void dequantize_1(const uint8_t*, SCALES, T*, int64_t, int); \
                template __global__ void dequantize_2(const uint8_t*, SCALES, T*, int64_t, int); \
                template __global__ void dequantize_4(const uint8_t*, SCALES, T*, int64_t, int);
KEEP(float) KEEP(__half) KEEP(__nv_bfloat16)
#endif
