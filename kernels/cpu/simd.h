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

// x in the order in which dot64 meets the elements.
TARGET void shuffle_x(const float* x, std::int64_t columns, float* shuffled) {
    for (std::int64_t i = 0; i < columns; i += 64)
        for (int k = 0; k < 64; ++k) shuffled[i + k] = x[i + order(k)];
}

constexpr std::int64_t AHEAD = 4096;    // bytes: the codes come from memory, and the hardware looks less far ahead

// One row of x: decoded values go from the permute straight into the product, and the scale multiplies
// the sum of a block once instead of each of its elements.
TARGET void one_row(const float* x, std::int64_t columns, const std::uint8_t* packed, Scales scales,
                    std::int64_t block_size, float* y, std::int64_t first, std::int64_t last) {
    std::int64_t blocks = columns / block_size;
    for (std::int64_t o = first; o < last; ++o) {
        const std::uint8_t* w = packed + o * columns / 2;
        const float* at = x;
        F total = zero();
        for (std::int64_t b = 0; b < blocks; ++b) {
            _mm_prefetch(reinterpret_cast<const char*>(w) + AHEAD, _MM_HINT_T0);
            F part = dot64(w, at);
            for (std::int64_t k = 64; k < block_size; k += 64) part = add(part, dot64(w + k / 2, at + k));
            total = fma(part, all(scales[o * blocks + b]), total);
            w += block_size / 2;
            at += block_size;
        }
        y[o] = sum(total);
    }
}

// R rows of x with O rows of W: each register of W is decoded once and used by all rows, and the sums stay in registers.
template <int R, int O>
TARGET void together(const float* x, std::int64_t columns, const std::uint8_t* packed, Scales scales,
                     std::int64_t block_size, float* y, std::int64_t outputs, std::int64_t o) {
    F sums[R][O];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < O; ++j) sums[r][j] = zero();
    for (std::int64_t at = 0; at < columns; at += 64) {
        F w[O][64 / W];
        for (int j = 0; j < O; ++j) {
            std::int64_t first = (o + j) * columns + at;
            decode64(packed + first / 2, w[j]);
            F scale = all(scales[first / block_size]);
            for (int i = 0; i < 64 / W; ++i) w[j][i] = mul(w[j][i], scale);
        }
        for (int i = 0; i < 64 / W; ++i)
            for (int r = 0; r < R; ++r) {
                F u = load(x + r * (columns + PAD) + at + i * W);
                for (int j = 0; j < O; ++j) sums[r][j] = fma(u, w[j][i], sums[r][j]);
            }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < O; ++j) y[r * outputs + o + j] = sum(sums[r][j]);
}

// Rows of x in the order of decode64.
template <int O>
TARGET void shuffled_rows(const float* x, std::int64_t rows, std::int64_t columns, const std::uint8_t* packed, Scales scales,
                          std::int64_t block_size, float* y, std::int64_t outputs, std::int64_t o) {
    std::int64_t r = 0;
    for (; r + 8 <= rows; r += 8) together<8, O>(x + r * (columns + PAD), columns, packed, scales, block_size, y + r * outputs, outputs, o);
    if (r + 4 <= rows) { together<4, O>(x + r * (columns + PAD), columns, packed, scales, block_size, y + r * outputs, outputs, o); r += 4; }
    if (r + 2 <= rows) { together<2, O>(x + r * (columns + PAD), columns, packed, scales, block_size, y + r * outputs, outputs, o); r += 2; }
    if (r < rows) together<1, O>(x + r * (columns + PAD), columns, packed, scales, block_size, y + r * outputs, outputs, o);
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
    bool whole = block_size % 64 == 0 && columns % block_size == 0;     // then x comes shuffled
    if (whole && rows == 1) {
        one_row(x, columns, packed, scales, block_size, y, first, last);
        return;
    }
    if constexpr (TOGETHER > 0)
        if (whole) {
            for (; first + 2 <= last; first += 2) shuffled_rows<2>(x, rows, columns, packed, scales, block_size, y, outputs, first);
            if (first < last) shuffled_rows<1>(x, rows, columns, packed, scales, block_size, y, outputs, first);
            return;
        }
    many_rows(x, rows, columns, packed, scales, block_size, y, outputs, first, last);
}

#define NF4_PATH(name, shuffled) {name, shuffled, {quantize<float>, dequantize<float>}, {quantize<c10::Half>, dequantize<c10::Half>}, \
                        {quantize<c10::BFloat16>, dequantize<c10::BFloat16>}, shuffle_x, product}
