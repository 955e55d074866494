"""The CUDA kernels on a GPU, version by version, beside bitsandbytes, cuBLAS and a copy: `make bench`.

    python tests/bench_gpu.py [--repeats 30] [--side 8192]

Each time is the GPU's own (CUDA events), the median of repeats in which all ways take turns. Before each run
the cache is overwritten, so that codes and rows come from memory, as in a model, whose layers follow one another.
Every result is compared before it is timed. GB/s are of the bytes that must be moved at least. The table goes to
`data/results/kernels_gpu.json`, with the device's name. Without a GPU or without nvcc it says so, and ends.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)

# One version of one kernel, started with 256 threads a block (quantize_2: 64).
START = """
#include "quantize.cu"
#undef KEEP
#include "dequantize.cu"
#undef KEEP
#include "product.cu"
using H = __half;
extern "C" int quantize(int version, const H* x, uint8_t* packed, float* absmax, int64_t n) {
    int64_t blocks = n / 64;
    if (version == 1) quantize_1<<<(blocks + 255) / 256, 256>>>(x, packed, absmax, n, 64);
    if (version == 2) quantize_2<<<blocks, 64>>>(x, packed, absmax, n, 64);
    if (version == 3) quantize_3<<<(blocks + 7) / 8, 256>>>(x, packed, absmax, n, 64, int64_t(0));
    if (version == 4) quantize_4<<<(blocks + 31) / 32, 256>>>(x, packed, absmax, blocks);
    if (version == 5) quantize_5<<<(blocks + 31) / 32, 256>>>(x, packed, absmax, blocks);
    return cudaGetLastError();
}
extern "C" int dequantize(int version, const uint8_t* packed, const float* absmax, H* out, int64_t n) {
    auto kernel = version == 1 ? dequantize_1<H> : version == 2 ? dequantize_2<H> : version == 3 ? dequantize_3<H>
                : version == 4 ? dequantize_4<H> : dequantize_5<H>;
    int64_t each = 256 * (version == 1 ? 1 : version < 4 ? 2 : 32);
    kernel<<<(n + each - 1) / each, 256>>>(packed, absmax, nullptr, nullptr, nullptr, out, n, 64);
    return cudaGetLastError();
}
extern "C" int product(int version, const H* x, const uint8_t* packed, const float* absmax, H* y, int rows, int64_t side) {
    if (version == 1) product_1<<<(rows * side + 255) / 256, 256>>>(x, packed, absmax, nullptr, nullptr, nullptr, y, rows, side, side, 64);
    if (version == 2) product_2<<<(rows * side + 7) / 8, 256>>>(x, packed, absmax, nullptr, nullptr, nullptr, y, rows, side, side, 64);
    if (version == 3) product_3<<<dim3((side + 7) / 8, (rows + 3) / 4), 256>>>(x, packed, absmax, nullptr, nullptr, nullptr, y, rows, side, side, 64);
    if (version == 4) product_4<<<dim3((side + 31) / 32, (rows + 3) / 4), 256>>>(x, packed, absmax, nullptr, nullptr, nullptr, y, rows, side, side, 64);
    return cudaGetLastError();
}
"""


def compiled_versions(folder: str) -> ctypes.CDLL:
    """The three functions of START, compiled for this GPU, with the flags of the package."""
    from minipeft.quant import kernels
    source, library = Path(folder) / "start.cu", Path(folder) / "start.so"
    source.write_text(START)
    major, minor = torch.cuda.get_device_capability()
    subprocess.run([kernels.toolkit() / "bin" / "nvcc", *kernels.CUDA_CFLAGS, f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler",
                    "-fPIC", "-I", kernels.source_folder() / "cuda", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def call(function, *arguments):
    """A function of the library: tensors as their addresses, whole numbers as 64 bits; an error as an exception."""
    made = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) for a in arguments]

    def run():
        if error := function(*made):
            raise RuntimeError(f"{function.__name__}: CUDA error {error}")
    return run


def milliseconds(ways: dict, repeats: int) -> dict[str, float]:
    """Median of each way; they take turns, and the cache is overwritten before each."""
    cache = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    taken = {name: [] for name in ways}
    for repeat in range(repeats + 3):
        for name, run in ways.items():
            cache.fill_(repeat)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            taken[name].append((before, after))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in events[3:]) for name, events in taken.items()}


def measure(side: int, repeats: int) -> list[dict]:
    from minipeft.quant import double_quant, kernels, nf4
    assert kernels.build(), kernels._failed
    torch.manual_seed(0)
    W = torch.randn(side, side, device="cuda").half()
    n = W.numel()
    packed, absmax = kernels.quantize(W)
    nested = double_quant.quantize_scales(absmax)
    wanted = nf4.quantize_blocks(W.cpu().view(-1)[: 2**22], 64)
    assert torch.equal(packed[: 2**21].cpu(), wanted[0]) and torch.equal(absmax[: 2**16].cpu(), wanted[1])
    full = kernels.dequantize(packed, absmax, n, dtype=torch.float16)
    rows = []
    try:
        from bitsandbytes import functional as bnb
        theirs = bnb.quantize_4bit(W, quant_type="nf4")
        same = (theirs[0].view(-1) == packed).float().mean().item()
        rows.append({"what": "bytes of codes equal to bitsandbytes'", "way": "on this GPU", "share": same})
    except ImportError:
        bnb = None

    def table(what: str, ways: dict, bytes_: float) -> None:
        for way, ms in milliseconds(ways, repeats).items():
            rows.append({"what": what, "way": way, "ms": round(ms, 4), "GB/s": round(bytes_ / ms / 1e6, 1)})

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        library = compiled_versions(folder)
        codes, scales, out = torch.empty_like(packed), torch.empty_like(absmax), torch.empty_like(full)

        ways = {}
        for v in (1, 2, 3, 4, 5):
            ways[f"version {v}"] = call(library.quantize, v, W, codes, scales, n)
            codes.zero_(), scales.zero_()
            ways[f"version {v}"]()
            assert torch.equal(codes, packed) and torch.equal(scales, absmax), v
        ways["minipeft"] = lambda: kernels.quantize(W)
        if bnb:
            ways["bitsandbytes"] = lambda: bnb.quantize_4bit(W, quant_type="nf4")
        table("quantise", ways, n * (2 + 0.5 + 4 / 64))

        ways = {}
        for v in (1, 2, 3, 4, 5):
            ways[f"version {v}"] = call(library.dequantize, v, packed, absmax, out, n)
            out.zero_()
            ways[f"version {v}"]()
            assert torch.equal(out, full), v
        ways["minipeft"] = lambda: kernels.dequantize(packed, absmax, n, dtype=torch.float16)
        ways["minipeft, double-quantised"] = lambda: kernels.dequantize(packed, nested, n, dtype=torch.float16)
        if bnb:
            ways["bitsandbytes"] = lambda: bnb.dequantize_4bit(*theirs)
        table("dequantise", ways, n * (0.5 + 4 / 64 + 2))
        table("copy of the result", {"torch": lambda: out.copy_(full)}, 4 * n)

        for r in ROWS:
            x, y = torch.randn(r, side, device="cuda").half(), torch.empty(r, side, dtype=torch.float16, device="cuda")
            exact, ways = x.double() @ full.view(side, side).double().T, {}
            for v in (1, 2, 3, 4) if r <= 64 else ():
                ways[f"version {v}"] = call(library.product, v, x, packed, absmax, y, r, side)
                y.zero_()
                ways[f"version {v}"]()
                assert (y - exact).abs().max() < 2e-3 * exact.abs().max(), (v, r)
            ways["minipeft"] = lambda x=x: kernels.gemm(x, packed, absmax, (side, side))
            ways["float16, not quantised"] = lambda x=x: x @ full.view(side, side).T
            if bnb:
                import bitsandbytes
                ways["bitsandbytes"] = lambda x=x: bitsandbytes.matmul_4bit(x, theirs[0].t(), quant_state=theirs[1])
            for name in ("minipeft", "bitsandbytes"):
                assert name not in ways or (ways[name]() - exact).abs().max() < 4e-3 * exact.abs().max(), (name, r)
            table(f"product, rows {r}", ways, n * (0.5 + 4 / 64) + 4 * r * side)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--side", type=int, default=8192, help="of the square matrix; a multiple of 64")
    chosen = parser.parse_args()
    from minipeft.quant import kernels
    if chosen.side % 64 or chosen.side <= 0 or chosen.repeats < 1:
        parser.error(f"--side is {chosen.side}, --repeats {chosen.repeats}; accepted are a multiple of 64, and 1 or more")
    if not torch.cuda.is_available() or kernels.cuda_home() is None:
        print(f"\nthe CUDA kernels are not measured: {kernels.why_no_cuda() or 'no GPU here'}")
        return
    rows = measure(chosen.side, chosen.repeats)
    device = torch.cuda.get_device_name()
    print(f"\n{chosen.side}×{chosen.side}, float16, blocks of 64, on {device}\n{'':24}{'':30}{'ms':>9}{'GB/s':>9}")
    for row in rows:
        print(f"{row['what']:24}{row['way']:30}" + (f"{row['ms']:9.4f}{row['GB/s']:9.1f}" if "ms" in row else f"{row['share']:9.6f}"))
    result = {"command": "python tests/bench_gpu.py", "date": time.strftime("%Y-%m-%d"), "device": device, "side": chosen.side,
              "repeats": chosen.repeats, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
    path = REPOSITORY / "data" / "results" / "kernels_gpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
