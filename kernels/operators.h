// What the operators of the CPU (cpu/operators.cpp) and of CUDA (cuda/cuda_operators.cpp) have in common: their checks.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace nf4 {

// A double-quantised scale is code -> map -> times the absmax of its 256 -> plus offset. All three or none are given.
using Maybe = std::optional<at::Tensor>;

inline void check_blocks(std::int64_t block_size) {
    TORCH_CHECK_VALUE(block_size > 0 && block_size % 2 == 0, "block_size must be even and positive; it is ", block_size);
}

inline void check_packed(const at::Tensor& packed, const at::Tensor& absmax, std::int64_t n, std::int64_t block_size,
                         const Maybe& nested, const Maybe& map, const Maybe& offset) {
    check_blocks(block_size);
    std::int64_t blocks = (n + block_size - 1) / block_size;
    TORCH_CHECK_VALUE(n >= 0, "the number of elements must not be negative; it is ", n);
    TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "packed must be uint8; it is ", packed.scalar_type());
    TORCH_CHECK_VALUE(packed.numel() == (n + 1) / 2 && packed.is_contiguous(), "packed must be ", (n + 1) / 2,
                      " contiguous bytes for ", n, " elements; it has shape ", packed.sizes());
    TORCH_CHECK_VALUE(absmax.numel() == blocks && absmax.is_contiguous(), "absmax must be ", blocks,
                      " contiguous scales for ", n, " elements in blocks of ", block_size, "; it has shape ", absmax.sizes());
    TORCH_CHECK_VALUE(nested.has_value() == map.has_value() && nested.has_value() == offset.has_value(),
                      "give all three of the nested scales (absmax, map, offset), or none");
    TORCH_CHECK_TYPE(absmax.scalar_type() == (nested ? at::kByte : at::kFloat), "absmax must be ",
                     nested ? "uint8, being double-quantised" : "float32", "; it is ", absmax.scalar_type());
    if (!nested) return;
    TORCH_CHECK_VALUE(nested->numel() == (blocks + 255) / 256 && nested->is_contiguous(), "the nested absmax must be ",
                      (blocks + 255) / 256, " contiguous scales for ", blocks, " blocks; it has shape ", nested->sizes());
    TORCH_CHECK_VALUE(map->numel() == 256 && map->is_contiguous(), "the nested map must be 256 values; it has shape ", map->sizes());
    TORCH_CHECK_VALUE(offset->numel() == 1, "the nested offset must be one value; it has shape ", offset->sizes());
    for (const Maybe& t : {nested, map, offset}) {
        TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, "the nested scales must be float32; one is ", t->scalar_type());
        TORCH_CHECK_VALUE(t->device() == packed.device(), "packed is on ", packed.device(), ", a nested scale on ", t->device());
    }
}

inline void check_product(const at::Tensor& x, std::int64_t outputs, std::int64_t columns, bool transposed) {
    std::int64_t wanted = transposed ? outputs : columns;
    TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == wanted, "the last dimension of x must be ", wanted, "; x has shape ", x.sizes());
    TORCH_CHECK_TYPE(x.is_floating_point(), "x must be floating point; it is ", x.scalar_type());
}

}  // namespace nf4
