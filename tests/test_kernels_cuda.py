"""The CUDA kernels: compiled for every architecture and read from the compiler's report; built whole with PyTorch;
and on a GPU, against the readable PyTorch of nf4.py. Each part says what it lacks where it skips."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minipeft.fetch import cache_folder
from minipeft.quant import double_quant, kernels, nf4

REPO = Path(__file__).resolve().parents[1]
CUDA = kernels.source_folder() / "cuda"
ARCHITECTURES = [a.replace(".", "") for a in kernels.ARCHITECTURES]
VERSIONS = {"quantize": 5, "dequantize": 5, "product": 4}
TYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- compiled, for every architecture ----

def compiled(name: str) -> str:
    """What nvcc and ptxas say of kernels/cuda/name.cu; from the cache, if the same text has been compiled before."""
    if kernels.toolkit() is None:
        pytest.skip("no nvcc here (CUDA toolkit): the CUDA kernels are not compiled")
    nvcc = str(kernels.toolkit() / "bin" / "nvcc")
    version = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    command = [nvcc, "-c", str(CUDA / f"{name}.cu"), "-o", os.devnull, *kernels.CUDA_CFLAGS, "-Xptxas", "-v", "--threads", "2"]
    command += [part for a in ARCHITECTURES for part in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    text = (CUDA / f"{name}.cu").read_text() + (CUDA / "nf4.cuh").read_text()
    kept = cache_folder() / "ptxas" / f"{name}-{hashlib.sha256((version + str(command[1:]) + text).encode()).hexdigest()[:16]}.txt"
    if not kept.exists():
        done = subprocess.run(command, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout + done.stderr)
    return kept.read_text()


@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_compiles_for_every_architecture_and_the_last_spills_no_register(name):
    report = compiled(name)
    assert "warning" not in report
    found = re.findall(r"entry function '(\w+)' for 'sm_(\w+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(found) == report.count("spill stores"), "the report has another form than this test reads"
    kinds = {(re.search(rf"{name}_\d", entry)[0], arch) for entry, arch, *_ in found}
    assert kinds == {(f"{name}_{v}", a) for v in range(1, VERSIONS[name] + 1) for a in ARCHITECTURES}
    last = [(entry, arch, spilt) for entry, arch, *spilt in found if f"{name}_{VERSIONS[name]}" in entry]
    assert len(last) == len(TYPES) * len(ARCHITECTURES)
    assert all(spilt == ["0", "0", "0"] for *_, spilt in last), last


# ---- built whole, with a CUDA build of PyTorch ----

BUILD = """
import json, sys
sys.path += json.loads(sys.argv[1])     # what that Python lacks and this one has
import torch
from minipeft.quant import kernels, nf4
built = kernels.build()
operators = ["nf4_quantize", "nf4_dequantize", "nf4_dequantize_out", "nf4_product"]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "built": built, "why": kernels._failed,
                  "sources": sorted({p.suffix for p in kernels.sources()}),
                  "operators": [built and torch._C._dispatch_has_kernel_for_dispatch_key(f"minipeft::{o}", key)
                                for o in operators for key in ("CUDA", "CPU")],
                  "sum": nf4.dequantize(nf4.quantize(torch.ones(64))).sum().item()}))
"""


def test_the_extension_builds_and_loads_whole_with_a_cuda_build_of_pytorch():
    python = sys.executable if torch.version.cuda else os.environ.get("MINIPEFT_CUDA_PYTHON")
    if kernels.toolkit() is None:
        pytest.skip("no nvcc here (CUDA toolkit): the extension is not built with CUDA")
    if not python:
        pytest.skip("this PyTorch is a CPU build; MINIPEFT_CUDA_PYTHON can name a Python with a CUDA build of it")
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    settings = {"PYTHONPATH": str(REPO)}
    if not torch.cuda.is_available():       # all architectures are compiled above: one is enough here
        settings["TORCH_CUDA_ARCH_LIST"] = "8.0"
    answer = subprocess.run([python, "-c", BUILD, json.dumps(lent)], text=True, capture_output=True, env=os.environ | settings)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["cuda"] and found["built"], (found, answer.stderr)
    assert found["sources"] == [".cpp", ".cu"] and all(found["operators"]) and found["sum"] == 64.0


# ---- on a GPU ----

@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here (torch.cuda.is_available() is False): the CUDA kernels are not run")
    if kernels.toolkit() is None:
        pytest.skip("no nvcc here (CUDA toolkit): the CUDA kernels cannot be built")
    assert kernels.build(), kernels._failed
    return torch.device("cuda")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 4095, 4096, 1_000_003])
def test_on_a_gpu_codes_scales_and_values_are_those_of_the_readable_pytorch(gpu, n, dtype):
    torch.manual_seed(n)
    x = (torch.randn(n) * torch.logspace(-3, 3, n)).to(dtype)
    for block_size in (64, 128):
        packed, absmax = (t.cpu() for t in kernels.quantize(x.to(gpu), block_size))
        theirs = nf4.quantize_blocks(x, block_size)
        assert torch.equal(packed, theirs[0]) and torch.equal(absmax, theirs[1])
        for scales in (absmax, double_quant.quantize_scales(absmax) if len(absmax) > 1 else absmax):
            spread = scales if isinstance(scales, torch.Tensor) else double_quant.dequantize_scales(scales)
            levels = nf4.CODEBOOK[torch.stack([packed >> 4, packed & 15], 1).view(-1)[:n].int()]
            wanted = (levels * spread.repeat_interleave(block_size)[:n]).to(dtype)
            moved = scales.to(gpu) if isinstance(scales, torch.Tensor) else double_quant.QuantizedScales(
                scales.codes.to(gpu), scales.absmax.to(gpu), scales.offset.to(gpu))
            assert torch.equal(kernels.dequantize(packed.to(gpu), moved, n, block_size, dtype=dtype).cpu(), wanted)
            room = torch.full((n + 2,), torch.nan, dtype=dtype, device=gpu)      # an address that is not aligned
            kernels.dequantize(packed.to(gpu), moved, n, block_size, out=room[1:-1])
            assert torch.equal(room[1:-1].cpu(), wanted) and room[0].isnan() and room[-1].isnan()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_on_a_gpu_products_and_their_gradients_have_the_accuracy_of_their_type(gpu, dtype):
    torch.manual_seed(0)
    for rows, outputs, columns in [(1, 5, 77), (2, 3, 1), *((r, 37, 192) for r in (1, 2, 3, 4, 5, 64, 65)), (3, 6, 40), (7, 33, 2080)]:
        packed, absmax = kernels.quantize(torch.randn(outputs, columns, device=gpu))
        W = kernels.dequantize(packed, absmax, outputs * columns).view(outputs, columns).double().cpu()
        x = torch.randn(rows, columns, device=gpu).to(dtype).requires_grad_()
        y = kernels.gemm(x, packed, absmax, (outputs, columns))
        y.sum().backward()
        for ours, exact in ((y, x.detach().double().cpu() @ W.T), (x.grad, torch.ones(rows, outputs).double() @ W)):
            error = (ours.detach().double().cpu() - exact).abs().max() / exact.abs().max()
            assert ours.dtype == dtype and error < max(4 * torch.finfo(dtype).eps, 1e-5), (rows, outputs, columns, error)


def test_on_a_gpu_the_kernels_run_in_the_current_stream(gpu):
    x = torch.randn(1 << 22, device=gpu)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x * 2                           # late
        packed, absmax = kernels.quantize(y)
    stream.synchronize()
    assert torch.equal(absmax.cpu(), (x.cpu() * 2).view(-1, 64).abs().amax(1))
