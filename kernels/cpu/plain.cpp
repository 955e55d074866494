// NF4 in plain C++: the reference for the two files with vector instructions, and what runs on other processors.
#include "nf4.h"
#include <algorithm>
#include <vector>

namespace nf4 {
namespace {

template <class T>
void quantize(const T* x, std::int64_t n, std::int64_t block_size, std::uint8_t* packed, float* absmax,
              std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) {
        std::int64_t count = std::min(block_size, n - b * block_size);
        quantize_block(x + b * block_size, count, count == block_size, packed + b * block_size / 2, absmax + b);
    }
}

template <class T>
void dequantize(const std::uint8_t* packed, Scales scales, std::int64_t block_size, T* out,
                std::int64_t first, std::int64_t last, bool) {
    for (std::int64_t i = first; i < last;) {
        std::int64_t end = std::min(last, (i / block_size + 1) * block_size);
        float scale = scales[i / block_size];
        for (; i < end; ++i) out[i - first] = static_cast<T>(level(packed, i) * scale);
    }
}

// One row of W is decoded, then used for every row of x: decoding costs more than multiplying.
void product(const float* x, std::int64_t rows, std::int64_t columns, const std::uint8_t* packed, Scales scales,
             std::int64_t block_size, float* y, std::int64_t outputs, std::int64_t first, std::int64_t last) {
    std::vector<float> w(columns);
    for (std::int64_t o = first; o < last; ++o) {
        dequantize(packed, scales, block_size, w.data(), o * columns, (o + 1) * columns, false);
        for (std::int64_t r = 0; r < rows; ++r) {
            float sums[8] = {};         // eight sums, so that the compiler may use registers of four
            std::int64_t k = 0;
            for (; k + 8 <= columns; k += 8)
                for (int j = 0; j < 8; ++j) sums[j] += x[r * columns + k + j] * w[k + j];
            for (; k < columns; ++k) sums[0] += x[r * columns + k] * w[k];
            y[r * outputs + o] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        }
    }
}

}  // namespace

const Path plain = {"plain", 0,
                    {quantize<float>, dequantize<float>},
                    {quantize<c10::Half>, dequantize<c10::Half>},
                    {quantize<c10::BFloat16>, dequantize<c10::BFloat16>},
                    nullptr, product};

}  // namespace nf4
