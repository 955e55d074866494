// The operators torch.ops.minipeft.nf4_* on CUDA: on the device of their arguments, in its current stream.
#include "../operators.h"
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#define SCALES const float *absmax, const uint8_t *codes, const float *map, const float *offset
template <class T> void quantize_launch(const T*, uint8_t*, float*, int64_t, int, cudaStream_t);
template <class T> void dequantize_launch(const uint8_t*, SCALES, T*, int64_t, int, cudaStream_t);
template <class T> void product_launch(const T*, const uint8_t*, SCALES, T*, int, int64_t, int64_t, int, cudaStream_t);

namespace nf4 {
namespace {

using at::Tensor;
constexpr int64_t FEW = 4;      // rows up to which the product is made from the codes: measured on an H100, tests/bench_gpu.py

template <class Do> void with_type(at::ScalarType type, const Do& run) {
    switch (type) {
        case at::kFloat: return run(float());
        case at::kHalf: return run(__half());
        case at::kBFloat16: return run(__nv_bfloat16());
        default: CHECK_TYPE(false, "NF4 wants float32, float16 or bfloat16; this is ", type);
    }
}

struct Pointers { const float* absmax; const uint8_t* codes; const float *map, *offset; };
Pointers pointers(const Tensor& absmax, const Maybe& nested, const Maybe& map, const Maybe& offset) {
    if (!nested) return {absmax.const_data_ptr<float>(), nullptr, nullptr, nullptr};
    return {nested->const_data_ptr<float>(), absmax.const_data_ptr<uint8_t>(), map->const_data_ptr<float>(), offset->const_data_ptr<float>()};
}
void check_device(const Tensor& a, const Tensor& b) {
    CHECK_VALUE(a.device() == b.device(), "all tensors must be on one device; here are ", a.device(), " and ", b.device());
}

std::tuple<Tensor, Tensor> quantize(const Tensor& t, int64_t block_size) {
    check_blocks(block_size);
    c10::cuda::CUDAGuard here(t.device());
    Tensor x = t.contiguous();
    int64_t n = x.numel(), blocks = (n + block_size - 1) / block_size;
    Tensor packed = at::empty({(n + 1) / 2}, x.options().dtype(at::kByte)), absmax = at::empty({blocks}, x.options().dtype(at::kFloat));
    with_type(x.scalar_type(), [&](auto type) {
        if (n) quantize_launch(static_cast<const decltype(type)*>(x.const_data_ptr()), packed.mutable_data_ptr<uint8_t>(),
                               absmax.mutable_data_ptr<float>(), n, static_cast<int>(block_size), c10::cuda::getCurrentCUDAStream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {packed, absmax};
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, int64_t block_size, const Maybe& nested, const Maybe& map,
                    const Maybe& offset, Tensor& out) {
    check_packed(packed, absmax, out.numel(), block_size, nested, map, offset);
    check_device(packed, absmax);
    check_device(packed, out);
    CHECK_VALUE(out.is_contiguous(), "out must be contiguous; it has strides ", out.strides());
    c10::cuda::CUDAGuard here(packed.device());
    Pointers s = pointers(absmax, nested, map, offset);
    with_type(out.scalar_type(), [&](auto type) {
        if (out.numel()) dequantize_launch(packed.const_data_ptr<uint8_t>(), s.absmax, s.codes, s.map, s.offset,
                                           static_cast<decltype(type)*>(out.mutable_data_ptr()), out.numel(),
                                           static_cast<int>(block_size), c10::cuda::getCurrentCUDAStream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, int64_t n, int64_t block_size, at::ScalarType dtype,
                  const Maybe& nested, const Maybe& map, const Maybe& offset) {
    Tensor out = at::empty({n}, packed.options().dtype(dtype));
    dequantize_out(packed, absmax, block_size, nested, map, offset, out);
    return out;
}

Tensor product(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t outputs, int64_t columns, int64_t block_size,
               bool transposed, const Maybe& nested, const Maybe& map, const Maybe& offset) {
    check_packed(packed, absmax, outputs * columns, block_size, nested, map, offset);
    check_product(x, outputs, columns, transposed);
    check_device(packed, absmax);
    check_device(packed, x);
    auto sizes = x.sizes().vec();
    sizes.back() = transposed ? columns : outputs;
    if (x.numel() == 0 || sizes.back() == 0) return at::zeros(sizes, x.options());
    c10::cuda::CUDAGuard here(packed.device());
    Tensor flat = x.reshape({-1, x.size(-1)}).contiguous();
    int64_t rows = flat.size(0);
    if (transposed || rows > FEW || x.scalar_type() == at::kDouble) {
        auto type = x.scalar_type() == at::kDouble ? at::kFloat : x.scalar_type();
        Tensor W = dequantize(packed, absmax, outputs * columns, block_size, type, nested, map, offset).view({outputs, columns}).to(x.scalar_type());
        return at::matmul(flat, transposed ? W : W.t()).view(sizes);
    }
    Tensor y = at::empty({rows, outputs}, x.options());
    Pointers s = pointers(absmax, nested, map, offset);
    with_type(x.scalar_type(), [&](auto type) {
        product_launch(static_cast<const decltype(type)*>(flat.const_data_ptr()), packed.const_data_ptr<uint8_t>(), s.absmax, s.codes,
                       s.map, s.offset, static_cast<decltype(type)*>(y.mutable_data_ptr()), static_cast<int>(rows), outputs, columns,
                       static_cast<int>(block_size), c10::cuda::getCurrentCUDAStream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y.view(sizes);
}

}  // namespace
}  // namespace nf4

TORCH_LIBRARY_IMPL(minipeft, CUDA, m) {
    m.impl("nf4_quantize", nf4::quantize);
    m.impl("nf4_dequantize", nf4::dequantize);
    m.impl("nf4_dequantize_out", nf4::dequantize_out);
    m.impl("nf4_product", nf4::product);
}
