// NF4 with AVX-512: sixteen floats a register, so that the 16 levels are exactly one, and decoding is one permute.
// The algorithms are in simd.h; here is what they are made of.
#include "nf4.h"
#ifdef NF4_X86
#include <bit>
#include <immintrin.h>
#include <vector>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline

namespace nf4 {
namespace {

using F = __m512;
using I = __m512i;
constexpr int W = 16;
constexpr int X_ROWS = 4;               // 4 rows of W times 4 of x: 16 of the 32 registers hold sums

INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE F load(const c10::Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE F load(const c10::BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE void store(c10::Half* p, F v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
INLINE __m256i to_bf16(F v) {           // round to nearest, ties to even
    I bits = _mm512_castps_si512(v);
    I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16));
}
INLINE void store(c10::BFloat16* p, F v) { _mm256_storeu_si256((__m256i*)p, to_bf16(v)); }
INLINE void stream(float* p, F v) { _mm512_stream_ps(p, v); }
INLINE void stream(c10::Half* p, F v) { _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void stream(c10::BFloat16* p, F v) { _mm256_stream_si256((__m256i*)p, to_bf16(v)); }

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F all(float v) { return _mm512_set1_ps(v); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// Magnitudes have the order of their bits taken as integers, and a NaN is above them all and stays.
INLINE F larger_magnitude(F a, F b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(_mm512_abs_ps(b))));
}
INLINE float sum(F v) { return _mm512_reduce_add_ps(v); }
INLINE float largest(F v) { return std::bit_cast<float>(_mm512_reduce_max_epi32(_mm512_castps_si512(v))); }

// The permute looks at the low four bits of every lane alone: no mask is needed.
INLINE F look_up(I code) { return _mm512_permutexvar_ps(code, _mm512_loadu_ps(LEVEL)); }
// 16 bytes are 32 elements. Sixteen elements are eight bytes: lanes 0-7 get the first four, lanes 8-15 the
// other four, and each shifts its own code down.
INLINE void decode32(const std::uint8_t* p, F out[2]) {
    const I shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    I words = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
    out[0] = look_up(_mm512_srlv_epi32(_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), words), shift));
    out[1] = look_up(_mm512_srlv_epi32(_mm512_permutexvar_epi32(_mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3), words), shift));
}
// 128 elements, without any reordering of codes: lane i holds elements 8i..8i+7 in its 32 bits, and round j looks up the
// code j of every lane. x comes in that order. The two elements of a byte change places, because the earlier one is in
// the high half. Lanes 0-7 and lanes 8-15 may be in different blocks; at the end of a row the latter may hold nothing.
constexpr int GROUP = 128, ROUNDS = 8;
constexpr std::int64_t SHUFFLED = FEW;  // rows of x
constexpr int order(int k) { return 8 * (k % 16) + (k / 16 ^ 1); }
INLINE F round(I words, int j) { return look_up(j ? _mm512_srli_epi32(words, 4 * j) : words); }
// One load, and what it brings stays in a register: GCC would load anew for each use, and a core has too few loads.
INLINE I kept(I v) { asm("" : "+v"(v)); return v; }
INLINE F kept(F v) { asm("" : "+v"(v)); return v; }
struct Group {
    I words;
    F scales;
};
template <bool full> INLINE Group group(const std::uint8_t* w, const float* halves) {
    if (!full) return {_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)w)), _mm512_maskz_broadcastss_ps(0x00ff, _mm_load_ss(halves))};
    return {kept(_mm512_loadu_si512(w)), _mm512_mask_broadcastss_ps(all(halves[0]), 0xff00, _mm_load_ss(halves + 1))};
}

// One row of x with O rows of W: what is decoded goes straight into the product, and the scales multiply the sum of a
// group once instead of each of its elements.
template <int O, bool full>
INLINE void one_row_group(const float* x, std::int64_t columns, std::int64_t at, const std::uint8_t* w, const float* halves, F totals[O]) {
    Group g[O];
    F parts[O];
    for (int j = 0; j < O; ++j) g[j] = group<full>(w + (j * columns + at) / 2, halves + (j * columns + at) / 64);
    for (int i = 0; i < ROUNDS; ++i) {
        F u = kept(load(x + at + i * W));
        for (int j = 0; j < O; ++j) parts[j] = i ? fma(round(g[j].words, i), u, parts[j]) : mul(round(g[j].words, i), u);
    }
    for (int j = 0; j < O; ++j) totals[j] = fma(parts[j], g[j].scales, totals[j]);
}
template <int O>
TARGET void one_row(const float* x, std::int64_t columns, const std::uint8_t* w, const float* halves, float* y) {
    F totals[O];
    for (int j = 0; j < O; ++j) totals[j] = zero();
    std::int64_t at = 0;
    for (; at + GROUP <= columns; at += GROUP) one_row_group<O, true>(x, columns, at, w, halves, totals);
    if (at < columns) one_row_group<O, false>(x, columns, at, w, halves, totals);
    for (int j = 0; j < O; ++j) y[j] = sum(totals[j]);
}

// R rows of x with O rows of W: each register of W is decoded once and used by all rows, and the sums stay in registers.
template <int R, int O, bool full>
INLINE void several_group(const float* x, std::int64_t columns, std::int64_t at, const std::uint8_t* w, const float* halves, F sums[R][O]) {
    Group g[O];
    for (int j = 0; j < O; ++j) g[j] = group<full>(w + (j * columns + at) / 2, halves + (j * columns + at) / 64);
#pragma GCC unroll 8                // else GCC keeps the loop, and the shift is one by a variable
    for (int i = 0; i < ROUNDS; ++i) {
        F v[O];
        for (int j = 0; j < O; ++j) v[j] = mul(round(g[j].words, i), g[j].scales);
        for (int r = 0; r < R; ++r) {
            F u = kept(load(x + r * shuffled_row(columns) + at + i * W));
            for (int j = 0; j < O; ++j) sums[r][j] = fma(u, v[j], sums[r][j]);
        }
    }
}
template <int R, int O>
TARGET void several(const float* x, std::int64_t columns, const std::uint8_t* w, const float* halves, float* y, std::int64_t outputs) {
    F sums[R][O];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < O; ++j) sums[r][j] = zero();
    std::int64_t at = 0;
    for (; at + GROUP <= columns; at += GROUP) several_group<R, O, true>(x, columns, at, w, halves, sums);
    if (at < columns) several_group<R, O, false>(x, columns, at, w, halves, sums);
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < O; ++j) y[r * outputs + j] = sum(sums[r][j]);
}

template <int O>
TARGET void all_rows(const float* x, std::int64_t rows, std::int64_t columns, const std::uint8_t* w, const float* halves, float* y,
                     std::int64_t outputs) {
    std::int64_t r = 0, next = shuffled_row(columns);
    for (; r + 8 <= rows; r += 8) several<8, O>(x + r * next, columns, w, halves, y + r * outputs, outputs);
    if (r + 4 <= rows) { several<4, O>(x + r * next, columns, w, halves, y + r * outputs, outputs); r += 4; }
    if (r + 2 <= rows) { several<2, O>(x + r * next, columns, w, halves, y + r * outputs, outputs); r += 2; }
    if (r < rows) one_row<O>(x + r * next, columns, w, halves, y + r * outputs);
}

TARGET void shuffled_rows(const float* x, std::int64_t rows, std::int64_t columns, const std::uint8_t* packed, Scales scales,
                          std::int64_t block_size, float* y, std::int64_t outputs, std::int64_t first, std::int64_t last) {
    std::vector<float> made(2 * columns / 64);          // scales of two rows of W, one for each half of a group
    for (std::int64_t o = first; o < last; o += 2) {
        std::int64_t count = last - o < 2 ? 1 : 2, block = o * columns / block_size, in_block = 0;
        const float* halves = made.data();
        if (!scales.codes && block_size == 64) halves = scales.absmax + block;
        else for (std::int64_t half = 0; half < count * columns / 64; ++half) {
            made[half] = scales[block];
            if ((in_block += 64) == block_size) { in_block = 0; ++block; }
        }
        (count == 2 ? all_rows<2> : all_rows<1>)(x, rows, columns, packed + o * columns / 2, halves, y + o, outputs);
    }
}

// Four comparisons find one of 16: the thresholds form a tree, and each answer picks the next threshold.
INLINE I deeper(F v, I code, F row) {   // 2 code + (v > row[code])
    __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(code, row), _CMP_GT_OQ);
    code = _mm512_add_epi32(code, code);
    return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
}
INLINE I encode(F v) {
    const float* t = THRESHOLD;
    I code = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(v, all(t[7]), _CMP_GT_OQ), _mm512_set1_epi32(1));
    code = deeper(v, code, _mm512_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    code = deeper(v, code, _mm512_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    return deeper(v, code, _mm512_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14], 0, 0, 0, 0, 0, 0, 0, 0));
}
// 32 elements become 16 bytes.
template <class T> INLINE void encode32(const T* x, F reciprocal, std::uint8_t* out) {
    __m128i a = _mm512_cvtepi32_epi8(encode(mul(load(x), reciprocal)));
    __m128i b = _mm512_cvtepi32_epi8(encode(mul(load(x + 16), reciprocal)));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set_m128i(b, a), _mm256_set1_epi16(0x0110));    // 16 * earlier + later
    _mm_storeu_si128((__m128i*)out, _mm256_cvtepi16_epi8(pairs));
}

#include "simd.h"

}  // namespace

const Path avx512 = NF4_PATH("avx512");

}  // namespace nf4
#endif
