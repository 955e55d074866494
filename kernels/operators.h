// What the operators of the CPU (cpu/operators.cpp) and of CUDA (cuda/cuda_operators.cpp) have in common: their checks.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

// A message is put together without streams. Where a compiler puts the C++ library into what it makes, there are two
// of it in the process, and streams of the one crash over the other's.
#define CHECK_VALUE(good, ...) TORCH_CHECK_VALUE(good, nf4::message(__VA_ARGS__))
#define CHECK_TYPE(good, ...) TORCH_CHECK_TYPE(good, nf4::message(__VA_ARGS__))

namespace nf4 {

inline std::string word(const char* s) { return s; }
inline std::string word(const std::string& s) { return s; }
inline std::string word(std::int64_t n) { return std::to_string(n); }
inline std::string word(at::ScalarType type) { return c10::toString(type); }
inline std::string word(at::Device device) { return device.str(); }
inline std::string word(at::IntArrayRef sizes) {
    std::string all;
    for (std::int64_t size : sizes) all += (all.empty() ? "" : ", ") + std::to_string(size);
    return "[" + all + "]";
}
template <class... Part> std::string message(const Part&... part) { return (word(part) + ...); }

// A double-quantised scale is code -> map -> times the absmax of its 256 -> plus offset. All three or none are given.
using Maybe = std::optional<at::Tensor>;

inline void check_blocks(std::int64_t block_size) {
    CHECK_VALUE(block_size > 0 && block_size % 2 == 0, "block_size must be even and positive; it is ", block_size);
}

inline void check_packed(const at::Tensor& packed, const at::Tensor& absmax, std::int64_t n, std::int64_t block_size,
                         const Maybe& nested, const Maybe& map, const Maybe& offset) {
    check_blocks(block_size);
    std::int64_t blocks = (n + block_size - 1) / block_size;
    CHECK_VALUE(n >= 0, "the number of elements must not be negative; it is ", n);
    CHECK_TYPE(packed.scalar_type() == at::kByte, "packed must be uint8; it is ", packed.scalar_type());
    CHECK_VALUE(packed.numel() == (n + 1) / 2 && packed.is_contiguous(), "packed must be ", (n + 1) / 2,
                      " contiguous bytes for ", n, " elements; it has shape ", packed.sizes());
    CHECK_VALUE(absmax.numel() == blocks && absmax.is_contiguous(), "absmax must be ", blocks,
                      " contiguous scales for ", n, " elements in blocks of ", block_size, "; it has shape ", absmax.sizes());
    CHECK_VALUE(nested.has_value() == map.has_value() && nested.has_value() == offset.has_value(),
                      "give all three of the nested scales (absmax, map, offset), or none");
    CHECK_TYPE(absmax.scalar_type() == (nested ? at::kByte : at::kFloat), "absmax must be ",
                     nested ? "uint8, being double-quantised" : "float32", "; it is ", absmax.scalar_type());
    if (!nested) return;
    CHECK_VALUE(nested->numel() == (blocks + 255) / 256 && nested->is_contiguous(), "the nested absmax must be ",
                      (blocks + 255) / 256, " contiguous scales for ", blocks, " blocks; it has shape ", nested->sizes());
    CHECK_VALUE(map->numel() == 256 && map->is_contiguous(), "the nested map must be 256 values; it has shape ", map->sizes());
    CHECK_VALUE(offset->numel() == 1, "the nested offset must be one value; it has shape ", offset->sizes());
    for (const Maybe& t : {nested, map, offset}) {
        CHECK_TYPE(t->scalar_type() == at::kFloat, "the nested scales must be float32; one is ", t->scalar_type());
        CHECK_VALUE(t->device() == packed.device(), "packed is on ", packed.device(), ", a nested scale on ", t->device());
    }
}

inline void check_product(const at::Tensor& x, std::int64_t outputs, std::int64_t columns, bool transposed) {
    std::int64_t wanted = transposed ? outputs : columns;
    CHECK_VALUE(x.dim() > 0 && x.size(-1) == wanted, "the last dimension of x must be ", wanted, "; x has shape ", x.sizes());
    CHECK_TYPE(x.is_floating_point(), "x must be floating point; it is ", x.scalar_type());
}

}  // namespace nf4
