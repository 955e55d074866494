// NF4 with AVX-512: sixteen floats a register, so that the 16 levels are exactly one, and decoding is one permute.
// The algorithms are in simd.h; here is what they are made of.
#include "nf4.h"
#ifdef NF4_X86
#include <bit>
#include <immintrin.h>
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
// 64 elements, out[k] being element order(k): without any reordering of codes, so x comes in this order.
// Lanes i and i+8 hold elements 8i..8i+7 in their 32 bits, the second shifted by one code; round j takes the
// codes 2j and 2j+1. The two elements of a byte change places, because the earlier one is in the high half.
constexpr int order(int k) { return 8 * (k % 8) + (k / 8 ^ 1); }
INLINE void decode64(const std::uint8_t* p, F out[4]) {
    I words = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
    words = _mm512_srlv_epi32(words, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4));
    out[0] = look_up(words);
    out[1] = look_up(_mm512_srli_epi32(words, 8));
    out[2] = look_up(_mm512_srli_epi32(words, 16));
    out[3] = look_up(_mm512_srli_epi32(words, 24));
}
INLINE F dot64(const std::uint8_t* p, const float* x) {
    F w[4];
    decode64(p, w);
    F a = mul(w[0], load(x)), b = mul(w[1], load(x + 16));
    return add(fma(w[2], load(x + 32), a), fma(w[3], load(x + 48), b));
}
constexpr int TOGETHER = 8;             // rows of x: with 2 rows of W, 16 of the 32 registers hold sums

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

const Path avx512 = NF4_PATH("avx512", FEW);

}  // namespace nf4
#endif
