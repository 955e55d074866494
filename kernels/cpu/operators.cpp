// The operators torch.ops.minipeft.nf4_*: their schemas, their CPU implementations, and the gradient of the product.
#include "../operators.h"
#include "nf4.h"
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <algorithm>
#include <atomic>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nf4 {
namespace {

using at::Tensor;

std::vector<const Path*> paths() {      // those that this processor has, the fastest first
    std::vector<const Path*> found;
#ifdef NF4_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) found.push_back(&avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back(&avx2);
#endif
    found.push_back(&plain);
    return found;
}

const Path* chosen = paths().front();

// The names of the paths that this processor has, separated by spaces, the one in use first. A name puts that one in use.
std::string path(const std::string& name) {
    for (const Path* p : paths())
        if (p->name == name) chosen = p;
    CHECK_VALUE(name.empty() || chosen->name == name, "this processor has no path '", name, "'; it has: ", path(""));
    std::string names = chosen->name;
    for (const Path* p : paths())
        if (p != chosen) names += std::string(" ") + p->name;
    return names;
}

template <class Do> void with_type(at::ScalarType type, const Do& run) {
    switch (type) {
        case at::kFloat: return run(chosen->f32, float());
        case at::kHalf: return run(chosen->f16, at::Half());
        case at::kBFloat16: return run(chosen->bf16, at::BFloat16());
        default: CHECK_TYPE(false, "NF4 wants float32, float16 or bfloat16; this is ", type);
    }
}

Scales scales_of(const Tensor& absmax, const Maybe& nested, const Maybe& map, const Maybe& offset) {
    Scales s;
    if (nested) {
        s.absmax = nested->const_data_ptr<float>();
        s.codes = absmax.const_data_ptr<std::uint8_t>();
        s.map = map->const_data_ptr<float>();
        s.offset = *offset->const_data_ptr<float>();
    } else {
        s.absmax = absmax.const_data_ptr<float>();
    }
    return s;
}

constexpr std::int64_t FAIR_SHARE = 1 << 15;    // elements below which another thread costs more than it brings
constexpr std::int64_t CACHES = 1 << 24;        // bytes; a larger result is written past the caches

std::tuple<Tensor, Tensor> quantize(const Tensor& t, std::int64_t block_size) {
    check_blocks(block_size);
    Tensor x = t.contiguous();
    std::int64_t n = x.numel(), blocks = (n + block_size - 1) / block_size;
    Tensor packed = at::empty({(n + 1) / 2}, x.options().dtype(at::kByte));
    Tensor absmax = at::empty({blocks}, x.options().dtype(at::kFloat));
    with_type(x.scalar_type(), [&](auto coder, auto type) {
        auto* from = x.const_data_ptr<decltype(type)>();
        auto* to = packed.mutable_data_ptr<std::uint8_t>();
        auto* scales = absmax.mutable_data_ptr<float>();
        at::parallel_for(0, blocks, std::max<std::int64_t>(1, FAIR_SHARE / block_size), [&](auto first, auto last) {
            coder.quantize(from, n, block_size, to, scales, first, last);
        });
    });
    return {packed, absmax};
}

void decode(const Tensor& packed, Scales scales, std::int64_t block_size, const Tensor& out, std::int64_t first,
            std::int64_t last, bool stream) {
    with_type(out.scalar_type(), [&](auto coder, auto type) {
        auto* from = packed.const_data_ptr<std::uint8_t>();
        auto* to = out.mutable_data_ptr<decltype(type)>();
        // Shares begin and end between blocks.
        at::parallel_for(first / block_size, (last + block_size - 1) / block_size,
                         std::max<std::int64_t>(1, FAIR_SHARE / block_size), [&](auto b, auto end) {
            std::int64_t i = std::max(first, b * block_size), stop = std::min(last, end * block_size);
            coder.dequantize(from, scales, block_size, to + (i - first), i, stop, stream);
        });
    });
}

// Fresh memory comes page by page, each cleared first: of 64 MiB that takes several times as long as decoding into
// them. In pages of 2 MiB, where the system has them, it takes a fraction.
void in_large_pages([[maybe_unused]] const Tensor& fresh) {
#ifdef __linux__
    constexpr std::uintptr_t PAGE = 1 << 21;
    auto first = reinterpret_cast<std::uintptr_t>(fresh.data_ptr()), last = first + fresh.nbytes();
    first = (first + PAGE - 1) / PAGE * PAGE;
    if (first < last / PAGE * PAGE) madvise(reinterpret_cast<void*>(first), last / PAGE * PAGE - first, MADV_HUGEPAGE);
#endif
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, std::int64_t block_size, const Maybe& nested,
                    const Maybe& map, const Maybe& offset, Tensor& out) {
    std::int64_t n = out.numel();
    check_packed(packed, absmax, n, block_size, nested, map, offset);
    CHECK_VALUE(out.is_contiguous(), "out must be contiguous; it has strides ", out.strides());
    decode(packed, scales_of(absmax, nested, map, offset), block_size, out, 0, n,
           n * static_cast<std::int64_t>(out.element_size()) > CACHES);
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, std::int64_t n, std::int64_t block_size, at::ScalarType dtype,
                  const Maybe& nested, const Maybe& map, const Maybe& offset) {
    check_packed(packed, absmax, n, block_size, nested, map, offset);
    Tensor out = at::empty({n}, packed.options().dtype(dtype));
    bool large = n * static_cast<std::int64_t>(out.element_size()) > CACHES;
    if (large) in_large_pages(out);
    decode(packed, scales_of(absmax, nested, map, offset), block_size, out, 0, n, large);
    return out;
}

bool has_bf16_products() {
#ifdef NF4_X86
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
#else
    return false;
#endif
}

constexpr std::int64_t PANEL = 1 << 22;     // elements of W that are decoded for one call of the BLAS; with fewer it is slower

// Up to FEW rows: chosen->product, straight from the codes. x is float32 and contiguous.
void few_rows(const Tensor& x, const Tensor& packed, Scales scales, std::int64_t block_size, const Tensor& y) {
    std::int64_t rows = x.size(0), columns = x.size(1), outputs = y.size(1);
    const float* from = x.const_data_ptr<float>();
    Tensor shuffled;            // where it lies at a multiple of 64 bytes: a load over two cache lines takes twice as long
    if (rows <= chosen->shuffled && block_size % 64 == 0 && columns % block_size == 0) {
        shuffled = at::empty({rows * (columns + PAD)}, x.options());
        auto* into = shuffled.mutable_data_ptr<float>();
        for (std::int64_t r = 0; r < rows; ++r) chosen->shuffle_x(from + r * columns, columns, into + r * (columns + PAD));
        from = into;
    }
    auto* codes = packed.const_data_ptr<std::uint8_t>();
    auto* to = y.mutable_data_ptr<float>();
    // Shares of four outputs and more, taken one after the other: a thread that comes late takes fewer of them.
    std::int64_t fours = (outputs + 3) / 4, grain = std::max<std::int64_t>(1, 2 * FAIR_SHARE / (4 * columns * rows + 1));
    std::int64_t threads = std::min<std::int64_t>(at::get_num_threads(), (fours + grain - 1) / grain);
    std::int64_t share = std::max(grain, fours / (8 * threads));
    std::atomic<std::int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](auto, auto) {
        for (std::int64_t i; (i = next.fetch_add(share)) < fours;)
            chosen->product(from, rows, columns, codes, scales, block_size, to, outputs, 4 * i, std::min(outputs, 4 * (i + share)));
    });
}

// Memory for n numbers, the calling thread's own and kept from call to call: the system hands out fresh memory page by
// page, and filling it took longer than decoding into it. At most PANEL numbers, or one row of W.
Tensor scratch(std::int64_t n, at::ScalarType type) {
    static thread_local Tensor kept;
    if (!kept.defined() || kept.scalar_type() != type || kept.numel() < n) {
        c10::InferenceMode ordinary(false);
        kept = Tensor();
        kept = at::empty({n}, at::TensorOptions().dtype(type));
    }
    return kept.narrow(0, 0, n);
}

// y = x W^T, or x W if `transposed`; W (outputs, columns) is what is packed. x (..., columns), or (..., outputs).
Tensor product(const Tensor& x, const Tensor& packed, const Tensor& absmax, std::int64_t outputs, std::int64_t columns,
               std::int64_t block_size, bool transposed, const Maybe& nested, const Maybe& map, const Maybe& offset) {
    check_packed(packed, absmax, outputs * columns, block_size, nested, map, offset);
    check_product(x, outputs, columns, transposed);
    auto sizes = x.sizes().vec();
    std::int64_t in = sizes.back(), out = transposed ? columns : outputs;
    sizes.back() = out;
    if (x.numel() == 0 || out == 0) return at::zeros(sizes, x.options());
    Scales scales = scales_of(absmax, nested, map, offset);
    Tensor flat = x.reshape({-1, in});
    std::int64_t rows = flat.size(0);
    at::ScalarType type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    if (rows <= FEW && !transposed && type == at::kFloat) {
        Tensor y = at::empty({rows, out}, x.options().dtype(at::kFloat));
        few_rows(flat.to(at::kFloat).contiguous(), packed, scales, block_size, y);
        return y.to(x.scalar_type()).view(sizes);
    }
    // Many rows: a panel of W is decoded, and the BLAS multiplies with it while it is still in the caches.
    if (x.scalar_type() == at::kBFloat16 && has_bf16_products()) type = at::kBFloat16;
    flat = flat.to(type);
    Tensor y = at::empty({rows, out}, flat.options());
    std::int64_t height = std::clamp<std::int64_t>(PANEL / std::max<std::int64_t>(columns, 1), 1, outputs);
    Tensor buffer = scratch(height * columns, type == at::kDouble ? at::kFloat : type).view({height, columns});
    for (std::int64_t o = 0; o < outputs; o += height) {
        Tensor panel = buffer.narrow(0, 0, std::min(height, outputs - o));
        decode(packed, scales, block_size, panel, o * columns, o * columns + panel.numel(), false);
        panel = panel.to(type);
        if (!transposed) {
            Tensor part = y.narrow(1, o, panel.size(0));
            at::mm_out(part, flat, panel.t());
        } else if (o == 0) {
            at::mm_out(y, flat.narrow(1, o, panel.size(0)), panel);
        } else {
            y.addmm_(flat.narrow(1, o, panel.size(0)), panel);
        }
    }
    return y.to(x.scalar_type()).view(sizes);
}

// The product is linear in x, so its gradient is the other product, and the gradient of that is this one again.
Tensor call_product(const Tensor& x, const Tensor& packed, const Tensor& absmax, std::int64_t outputs, std::int64_t columns,
                    std::int64_t block_size, bool transposed, const Maybe& nested, const Maybe& map, const Maybe& offset) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("minipeft::nf4_product", "").typed<decltype(product)>();
    return op.call(x, packed, absmax, outputs, columns, block_size, transposed, nested, map, offset);
}

struct Product : torch::autograd::Function<Product> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& packed, const Tensor& absmax,
                          std::int64_t outputs, std::int64_t columns, std::int64_t block_size, bool transposed,
                          const Maybe& nested, const Maybe& map, const Maybe& offset) {
        at::AutoDispatchBelowADInplaceOrView below;
        context->save_for_backward({packed, absmax, nested.value_or(Tensor()), map.value_or(Tensor()), offset.value_or(Tensor())});
        context->saved_data["sizes"] = std::vector<std::int64_t>{outputs, columns, block_size, transposed};
        return call_product(x, packed, absmax, outputs, columns, block_size, transposed, nested, map, offset);
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context, torch::autograd::variable_list gradient) {
        auto saved = context->get_saved_variables();
        auto sizes = context->saved_data["sizes"].toIntVector();
        auto maybe = [](const Tensor& t) { return t.defined() ? Maybe(t) : Maybe(); };
        Tensor gx = call_product(gradient[0], saved[0], saved[1], sizes[0], sizes[1], sizes[2], !sizes[3],
                                 maybe(saved[2]), maybe(saved[3]), maybe(saved[4]));
        torch::autograd::variable_list gradients(10);
        gradients[0] = gx;
        return gradients;
    }
};

Tensor product_with_gradient(const Tensor& x, const Tensor& packed, const Tensor& absmax, std::int64_t outputs,
                             std::int64_t columns, std::int64_t block_size, bool transposed, const Maybe& nested,
                             const Maybe& map, const Maybe& offset) {
    if (x.requires_grad() && at::GradMode::is_enabled())
        return Product::apply(x, packed, absmax, outputs, columns, block_size, transposed, nested, map, offset);
    at::AutoDispatchBelowADInplaceOrView below;
    return call_product(x, packed, absmax, outputs, columns, block_size, transposed, nested, map, offset);
}

}  // namespace
}  // namespace nf4

#define NESTED "Tensor? nested_absmax=None, Tensor? nested_map=None, Tensor? nested_offset=None"
TORCH_LIBRARY(minipeft, m) {
    m.def("nf4_path(str name) -> str", nf4::path);
    m.def("nf4_quantize(Tensor t, int block_size) -> (Tensor packed, Tensor absmax)");
    m.def("nf4_dequantize(Tensor packed, Tensor absmax, int n, int block_size, ScalarType dtype, " NESTED ") -> Tensor");
    m.def("nf4_dequantize_out(Tensor packed, Tensor absmax, int block_size, " NESTED ", *, Tensor(a!) out) -> ()");
    m.def("nf4_product(Tensor x, Tensor packed, Tensor absmax, int outputs, int columns, int block_size, bool transposed=False, " NESTED ") -> Tensor");
}
TORCH_LIBRARY_IMPL(minipeft, CPU, m) {
    m.impl("nf4_quantize", nf4::quantize);
    m.impl("nf4_dequantize", nf4::dequantize);
    m.impl("nf4_dequantize_out", nf4::dequantize_out);
    m.impl("nf4_product", nf4::product);
}
TORCH_LIBRARY_IMPL(minipeft, Autograd, m) { m.impl("nf4_product", nf4::product_with_gradient); }
