// NF4 with AVX2: eight floats a register. The algorithms are in simd.h; here is what they are made of.
#include "nf4.h"
#ifdef NF4_X86
#include <bit>
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline

namespace nf4 {
namespace {

using F = __m256;
using I = __m256i;
constexpr int W = 8;
constexpr int X_ROWS = 3;               // 4 rows of W times 3 of x: 12 of the 16 registers hold sums

// The bytes of the 16 levels: all first bytes, all second bytes, and so on.
struct Planes { std::uint8_t plane[4][16]; };
constexpr Planes byte_planes() {
    Planes p{};
    for (int i = 0; i < 16; ++i)
        for (int b = 0; b < 4; ++b)
            p.plane[b][i] = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(LEVEL[i]) >> 8 * b);
    return p;
}

INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE F load(const c10::Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE F load(const c10::BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
INLINE void store(c10::Half* p, F v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
INLINE __m128i to_bf16(F v) {           // round to nearest, ties to even
    I bits = _mm256_castps_si256(v);
    I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08));
}
INLINE void store(c10::BFloat16* p, F v) { _mm_storeu_si128((__m128i*)p, to_bf16(v)); }
INLINE void stream(float* p, F v) { _mm256_stream_ps(p, v); }
INLINE void stream(c10::Half* p, F v) { _mm_stream_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void stream(c10::BFloat16* p, F v) { _mm_stream_si128((__m128i*)p, to_bf16(v)); }

INLINE F zero() { return _mm256_setzero_ps(); }
INLINE F all(float v) { return _mm256_set1_ps(v); }
INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// Magnitudes have the order of their bits taken as integers, and a NaN is above them all and stays.
INLINE F larger_magnitude(F a, F b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a),
                                                _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), b))));
}
INLINE float sum(F v) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
INLINE float largest(F v) {
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(_mm256_castps_si256(v)), _mm256_extracti128_si256(_mm256_castps_si256(v), 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(h));
}

// 16 levels of four bytes. A byte shuffle looks up 32 codes at once, but only bytes: so the first bytes of all
// levels are one table, the second bytes another, and four look-ups, woven together, are 32 floats. (A permute of
// floats knows eight entries, not sixteen: two permutes and a choice for eight elements take twice as long.)
// From 32 codes, one a byte: out[i] gets the codes 4i..4i+3 of the lower half and those of the upper half.
INLINE void look_up(I codes, F out[4]) {
    alignas(16) static constexpr auto TABLE = byte_planes();
    I b[4];
    for (int i = 0; i < 4; ++i)
        b[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)TABLE.plane[i])), codes);
    I low = _mm256_unpacklo_epi8(b[0], b[1]), low_top = _mm256_unpacklo_epi8(b[2], b[3]);
    I high = _mm256_unpackhi_epi8(b[0], b[1]), high_top = _mm256_unpackhi_epi8(b[2], b[3]);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low_top));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low_top));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high_top));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high_top));
}
// 16 bytes are 32 elements. Each byte is doubled, in the order in which look_up wants it; the first of the two
// keeps its high half, the second its low half.
INLINE void decode32(const std::uint8_t* p, F out[4]) {
    I bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    bytes = _mm256_shuffle_epi8(bytes, _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,
                                                        2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
    look_up(_mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(0x000f)),
                            _mm256_and_si256(bytes, _mm256_set1_epi16(0x0f00))), out);
}
// x[k] times element ORDER[k], for 64 elements: without any reordering of codes, so x comes in this order.
// First the 32 high halves, then the 32 low halves; of each, four bytes of the lower 16 and four of the upper.
constexpr int order(int k) {
    int half = k / 32, i = k % 32 / 8, lane = k % 8 / 4, byte = 16 * lane + 4 * i + k % 4;
    return 2 * byte + half;
}
INLINE F dot64(const std::uint8_t* p, const float* x) {
    I bytes = _mm256_loadu_si256((const I*)p), mask = _mm256_set1_epi8(15);
    F v[4], a, b;
    look_up(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), v);
    a = mul(v[0], load(x));
    b = mul(v[1], load(x + 8));
    a = fma(v[2], load(x + 16), a);
    b = fma(v[3], load(x + 24), b);
    look_up(_mm256_and_si256(bytes, mask), v);
    a = fma(v[0], load(x + 32), a);
    b = fma(v[1], load(x + 40), b);
    a = fma(v[2], load(x + 48), a);
    b = fma(v[3], load(x + 56), b);
    return add(a, b);
}

INLINE void decode64(const std::uint8_t*, F*);      // rows together would need more than the 16 registers there are
constexpr int TOGETHER = 0;

// Four comparisons find one of 16: the thresholds form a tree, and each answer picks the next threshold,
// with the cheapest instruction that can: a choice of two, of four, of eight.
INLINE F above(F v, F threshold) { return _mm256_cmp_ps(v, threshold, _CMP_GT_OQ); }    // all ones, which is -1
INLINE I deeper(I code, F answer) { return _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(answer)); }
INLINE I encode(F v) {
    const float* t = THRESHOLD;
    F first = above(v, all(t[7]));
    I code = _mm256_srli_epi32(_mm256_castps_si256(first), 31);
    code = deeper(code, above(v, _mm256_blendv_ps(all(t[3]), all(t[11]), first)));
    code = deeper(code, above(v, _mm256_permutevar_ps(_mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]), code)));
    return deeper(code, above(v, _mm256_permutevar8x32_ps(_mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]), code)));
}
// 32 elements become 16 bytes.
template <class T> INLINE void encode32(const T* x, F reciprocal, std::uint8_t* out) {
    I a = encode(mul(load(x), reciprocal)), b = encode(mul(load(x + 8), reciprocal));
    I c = encode(mul(load(x + 16), reciprocal)), d = encode(mul(load(x + 24), reciprocal));
    I bytes = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    I pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));   // 16 * earlier + later
    pairs = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(pairs));
}

#include "simd.h"

}  // namespace

const Path avx2 = NF4_PATH("avx2", 1);

}  // namespace nf4
#endif
