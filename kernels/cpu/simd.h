// The algorithms that avx2.cpp and avx512.cpp share. Included by them inside their own namespace, so that each
// compiles it for its registers of W floats (types F and I, and the small functions over them).

template <class T>
TARGET void quantize(const T* x, std::int64_t n, std::int64_t block_size, std::uint8_t* packed, float* absmax,
                     std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
        const T* block = x + b * block_size;
        std::uint8_t* bytes = packed + b * block_size / 2;
        std::int64_t count = n - b * block_size < block_size ? n - b * block_size : block_size;
        if (count < block_size || block_size % 32) {
            quantize_block(block, count, count == block_size, bytes, absmax + b);
            continue;
        }
        F most = zero();
        for (std::int64_t i = 0; i < count; i += W) most = larger_magnitude(most, load(block + i));
        float scale = largest(most);
        absmax[b] = scale;
        F reciprocal = all(1.0f / (scale < SMALLEST ? SMALLEST : scale));
        for (std::int64_t i = 0; i < count; i += 32) encode32(block + i, reciprocal, bytes + i / 2);
    }
}

template <class T, bool past_the_caches>
TARGET void dequantize_range(const std::uint8_t* packed, Scales scales, std::int64_t block_size, T* out,
                             std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last;) {
        std::int64_t block = i / block_size, end = (block + 1) * block_size;
        if (end > last) end = last;
        float scale = scales[block];
        F everywhere = all(scale);
        if (i % 2) { out[i - first] = static_cast<T>(level(packed, i) * scale); ++i; }
        for (; i + 32 <= end; i += 32) {
            F v[32 / W];
            decode32(packed + i / 2, v);
            for (int j = 0; j < 32 / W; ++j) {
                if (past_the_caches) stream(out + (i - first) + j * W, mul(v[j], everywhere));
                else store(out + (i - first) + j * W, mul(v[j], everywhere));
            }
        }
        for (; i < end; ++i) out[i - first] = static_cast<T>(level(packed, i) * scale);
    }
    if (past_the_caches) _mm_sfence();
}

template <class T>
TARGET void dequantize(const std::uint8_t* packed, Scales scales, std::int64_t block_size, T* out,
                       std::int64_t first, std::int64_t last, bool past_the_caches) {
    // Such a store wants an aligned address: every block must start at one.
    bool aligned = reinterpret_cast<std::uintptr_t>(out) % 64 == 0 && first % block_size == 0 && block_size % 32 == 0;
    if (past_the_caches && aligned) dequantize_range<T, true>(packed, scales, block_size, out, first, last);
    else dequantize_range<T, false>(packed, scales, block_size, out, first, last);
}

// x in the order in which shuffled_rows meets the elements. Where the last GROUP is not full, zeros fill it.
TARGET void shuffle_x(const float* x, std::int64_t columns, float* shuffled) {
    for (std::int64_t i = 0; i < columns; i += GROUP)
        for (int k = 0; k < GROUP; ++k) shuffled[i + k] = i + order(k) < columns ? x[i + order(k)] : 0;
}

constexpr int W_ROWS = 4;               // rows of W that are decoded together
constexpr std::int64_t DEPTH = 1024;    // elements of each: 16 KiB, which stays in the first cache

// y[r, o] += the product over `depth` elements, for R rows of x and W_ROWS of W; the sums stay in registers.
template <int R>
TARGET void tile(const float* x, std::int64_t columns, const float* w, std::int64_t depth, float* y,
                 std::int64_t outputs, std::int64_t kept) {
    F sums[R][W_ROWS];
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < W_ROWS; ++o) sums[r][o] = zero();
    for (std::int64_t k = 0; k < depth; k += W) {
        F u[R];
        for (int r = 0; r < R; ++r) u[r] = load(x + r * columns + k);
        for (int o = 0; o < W_ROWS; ++o) {
            F v = load(w + o * DEPTH + k);
            for (int r = 0; r < R; ++r) sums[r][o] = fma(u[r], v, sums[r][o]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < kept; ++o) y[r * outputs + o] += sum(sums[r][o]);
}

// Several rows of x: a tile of W is decoded into the first cache and used by all of them.
TARGET void many_rows(const float* x, std::int64_t rows, std::int64_t columns, const std::uint8_t* packed,
                      Scales scales, std::int64_t block_size, float* y, std::int64_t outputs,
                      std::int64_t first, std::int64_t last) {
    alignas(64) float w[W_ROWS * DEPTH] = {};
    for (std::int64_t o = first; o < last; o += W_ROWS) {
        std::int64_t kept = last - o < W_ROWS ? last - o : W_ROWS;
        for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t j = 0; j < kept; ++j) y[r * outputs + o + j] = 0;
        for (std::int64_t k = 0; k < columns; k += DEPTH) {
            std::int64_t depth = columns - k < DEPTH ? columns - k : DEPTH, whole = depth / W * W;
            for (std::int64_t j = 0; j < kept; ++j) {
                std::int64_t at = (o + j) * columns + k;
                dequantize_range<float, false>(packed, scales, block_size, w + j * DEPTH, at, at + depth);
            }
            std::int64_t r = 0;
            for (; r + X_ROWS <= rows; r += X_ROWS)
                tile<X_ROWS>(x + r * columns + k, columns, w, whole, y + r * outputs + o, outputs, kept);
            for (; r + 2 <= rows; r += 2) tile<2>(x + r * columns + k, columns, w, whole, y + r * outputs + o, outputs, kept);
            for (; r < rows; ++r) tile<1>(x + r * columns + k, columns, w, whole, y + r * outputs + o, outputs, kept);
            for (std::int64_t i = whole; i < depth; ++i)        // columns that fill no register
                for (r = 0; r < rows; ++r)
                    for (std::int64_t j = 0; j < kept; ++j)
                        y[r * outputs + o + j] += x[r * columns + k + i] * w[j * DEPTH + i];
        }
    }
}

TARGET void product(const float* x, std::int64_t rows, std::int64_t columns, const std::uint8_t* packed,
                    Scales scales, std::int64_t block_size, float* y, std::int64_t outputs,
                    std::int64_t first, std::int64_t last) {
    if (rows <= SHUFFLED && block_size % 64 == 0 && columns % block_size == 0) {   // then x comes shuffled
        shuffled_rows(x, rows, columns, packed, scales, block_size, y, outputs, first, last);
        return;
    }
    many_rows(x, rows, columns, packed, scales, block_size, y, outputs, first, last);
}

#define NF4_PATH(name) {name, SHUFFLED, {quantize<float>, dequantize<float>}, {quantize<c10::Half>, dequantize<c10::Half>}, \
                        {quantize<c10::BFloat16>, dequantize<c10::BFloat16>}, shuffle_x, product}
