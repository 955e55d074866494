// NF4 on the CPU: what the three instruction sets (plain.cpp, avx2.cpp, avx512.cpp) have in common.
//
// Two elements share a byte: the earlier one in the HIGH four bits. Elements go in blocks of
// `block_size` (64); one float32 scale a block, its largest absolute value ("absmax").
//     element i = LEVEL[code i] * scale[i / block_size]
// Double quantisation stores the scales themselves in 8 bits; `Scales` reads either kind.
//
// Nothing here knows torch's tensors or threads: operators.cpp hands out ranges to threads.

#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cstdint>

namespace nf4 {

// The 16 levels: quantiles of the normal distribution, scaled to [-1, 1] (minipeft/quant/nf4.py derives them).
constexpr float LEVEL[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// The code of v is the number of thresholds below v; threshold i lies halfway between levels i and i+1.
#define BETWEEN(i) (LEVEL[i] + LEVEL[i + 1]) / 2
constexpr float THRESHOLD[15] = {BETWEEN(0), BETWEEN(1), BETWEEN(2), BETWEEN(3), BETWEEN(4),
                                 BETWEEN(5), BETWEEN(6), BETWEEN(7), BETWEEN(8), BETWEEN(9),
                                 BETWEEN(10), BETWEEN(11), BETWEEN(12), BETWEEN(13), BETWEEN(14)};
#undef BETWEEN

// A block of zeros has scale 0; the division uses this instead (a denormal number).
constexpr float SMALLEST = 1e-38f;

struct Scales {
    const float* absmax = nullptr;      // one a block, or, if double-quantised, one for 256 of them
    const std::uint8_t* codes = nullptr; // double-quantised: one a block
    const float* map = nullptr;         // double-quantised: the 256 values that the codes stand for
    float offset = 0;                   // double-quantised: the mean that was subtracted
    float operator[](std::int64_t block) const {
        return codes ? map[codes[block]] * absmax[block >> 8] + offset : absmax[block];
    }
};

constexpr std::int64_t PAD = 16;    // floats behind each shuffled row: at equal distances of 2^n they would share few places in a cache
constexpr std::int64_t FEW = 32;    // rows up to which the product is made here, and not by the BLAS

// One instruction set. T is float, c10::Half or c10::BFloat16.
template <class T> struct Coder {
    // Blocks first..last-1 of the n elements x. A last block that is not full divides by its scale;
    // the full ones multiply by the reciprocal (bitsandbytes does so, and the codes must be its codes).
    void (*quantize)(const T* x, std::int64_t n, std::int64_t block_size, std::uint8_t* packed, float* absmax,
                     std::int64_t first, std::int64_t last);
    // Elements first..last-1 into out[0..]. `stream`: write past the caches (for results larger than they are).
    void (*dequantize)(const std::uint8_t* packed, Scales scales, std::int64_t block_size, T* out,
                       std::int64_t first, std::int64_t last, bool stream);
};
struct Path {
    const char* name;
    std::int64_t shuffled;      // the most rows of x that `product` wants in the order of `shuffle_x`
    Coder<float> f32;
    Coder<c10::Half> f16;
    Coder<c10::BFloat16> bf16;
    // Puts a row of x into that order, if columns % block_size == 0 and block_size % 64 == 0; else x stays as it is.
    void (*shuffle_x)(const float* x, std::int64_t columns, float* shuffled);
    // y[r, o] = sum over k of x[r, k] * W[o, k], for o in first..last-1. x: (rows, columns), y: (rows, outputs). Shuffled
    // rows of x are columns + PAD apart.
    void (*product)(const float* x, std::int64_t rows, std::int64_t columns, const std::uint8_t* packed,
                    Scales scales, std::int64_t block_size, float* y, std::int64_t outputs,
                    std::int64_t first, std::int64_t last);
};

extern const Path plain;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define NF4_X86 1
extern const Path avx2, avx512;
#endif

// Elements one at a time, for the ends of a range that fill no register. Plain C++ uses it for everything.
template <class T>
inline void quantize_block(const T* x, std::int64_t count, bool full, std::uint8_t* packed, float* absmax) {
    float largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        float v = static_cast<float>(x[i]);
        v = v < 0 ? -v : v;
        if (v > largest || v != v) largest = v;     // a NaN stays, for the caller to see
    }
    float divisor = largest < SMALLEST ? SMALLEST : largest;
    *absmax = full ? largest : divisor;
    float reciprocal = 1.0f / divisor;
    auto code = [&](std::int64_t i) {
        if (i >= count) return 7;       // an odd number of elements: the spare four bits hold level 0.0
        float v = full ? static_cast<float>(x[i]) * reciprocal : static_cast<float>(x[i]) / divisor;
        int c = v > THRESHOLD[7] ? 8 : 0;
        for (int step = 4; step; step /= 2)
            if (v > THRESHOLD[c + step - 1]) c += step;
        return c;
    };
    for (std::int64_t i = 0; i < count; i += 2)
        packed[i / 2] = static_cast<std::uint8_t>(code(i) << 4 | code(i + 1));
}

inline float level(const std::uint8_t* packed, std::int64_t i) {
    return LEVEL[packed[i / 2] >> (i % 2 ? 0 : 4) & 15];
}

}  // namespace nf4
