"""The compiled kernels of NF4: the same results as the readable PyTorch of nf4.py, only faster.

    build()                 compiles kernels/ once, about a minute, into the cache; says what it does.
                            `mp.quantize(model)` does it for you
    available()             whether they can be used now, which costs next to nothing to ask
    quantize, dequantize, gemm     torch.ops.minipeft.nf4_*, with shapes and errors written out

The sources are in kernels/: C++ with AVX-512, AVX2 and neither, chosen by the processor when they are loaded,
and CUDA, which is compiled where PyTorch is a CUDA build and nvcc is found. They are operators of PyTorch:
`torch.compile`, fake tensors and the meta device know their shapes, and `gemm` has a gradient of any order.
Without a compiler everything in minipeft works as it does with one, in PyTorch.

`MINIPEFT_KERNELS` in the environment names the path ("avx512", "avx2", "plain"), or is "off".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..fetch import cache_folder
from .double_quant import MAP, QuantizedScales

CFLAGS = ("-O3", "-std=c++20", "-ffp-contract=off", *(("-fopenmp",) if sys.platform == "linux" else ()))
CUDA_CFLAGS = ("-O3", "-std=c++20", "--fmad=false")
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")   # built for where there is no GPU to ask
devices = ("cpu",)  # that the kernels are built for, once they are loaded
_loaded = False
_failed = ""        # why the last build failed; it is said once
_maps = {torch.device("cpu"): MAP}     # the 256 values of double quantisation's codes, copied to each device once


def source_folder() -> Path:
    """The folder with the sources: in the package, or in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "_kernels"
    return inside if inside.exists() else package.parent / "kernels"


@cache
def sources() -> tuple[Path, ...]:
    """The files to compile: C++, and CUDA where this PyTorch and this machine can."""
    kinds = [("cpu", "*.cpp")] + [("cuda", "*.cu"), ("cuda", "*.cpp")] * bool(cuda_home())
    return tuple(path for folder, kind in kinds for path in sorted((source_folder() / folder).glob(kind)))


@cache
def toolkit() -> Path | None:
    """The CUDA toolkit, the folder with bin/nvcc and its headers; None if there is none. The nvcc of the PATH may be
    a script that calls another."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return next((home for home in map(Path, filter(None, candidates))
                 if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists()), None)


@cache
def why_no_cuda() -> str:
    """Why CUDA is not compiled here; empty if it is."""
    if not torch.version.cuda:
        return "this PyTorch is built without it"
    if toolkit() is None:
        return "no nvcc is found"
    answer = subprocess.run([toolkit() / "bin" / "nvcc", "--version"], text=True, capture_output=True).stdout
    release = re.search(r"release (\d+)", answer)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release[1] if release else '?'}, PyTorch of CUDA {torch.version.cuda}"
    return ""


def cuda_home() -> Path | None:
    """The CUDA toolkit, if PyTorch is a CUDA build of the same major version; else None."""
    return None if why_no_cuda() else toolkit()


@cache
def architectures() -> str:
    """What CUDA is compiled for: TORCH_CUDA_ARCH_LIST, or this machine's GPUs, or without one, all of ARCHITECTURES."""
    here = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(sorted({f"{a}.{b}" for a, b in here}) or ARCHITECTURES)


@cache
def library() -> Path:
    """Where the built file is kept. Its folder is named by everything that it depends on."""
    what = hashlib.sha256(repr((
        torch.__version__, platform.machine(), sys.platform, CFLAGS, str(cuda_home()),
        *((CUDA_CFLAGS, architectures()) if cuda_home() else ()))).encode())
    folders = ["cpu", "cuda"] if cuda_home() else ["cpu"]
    for path in [p for f in folders for p in sorted((source_folder() / f).glob("*.*"))] + [source_folder() / "operators.h"]:
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            what.update(path.name.encode() + path.read_bytes())
    return cache_folder() / "kernels" / what.hexdigest()[:16] / "minipeft_kernels.so"


def available() -> bool:
    """True once the kernels are built, now or by an earlier process. Builds nothing."""
    if _loaded or torch.compiler.is_compiling():
        return _loaded
    if os.environ.get("MINIPEFT_KERNELS") == "off" or _failed or not library().exists():
        return False
    return _load()


def build(verbose: bool = True) -> bool:
    """Compile the kernels if they are not in the cache, and load them. True if they can be used.

    Where they cannot be built, the reason is said once, and False returned: minipeft then uses PyTorch.
    Any number of processes may ask at once: one builds, the others wait for it.
    """
    global _failed
    if available() or _failed or os.environ.get("MINIPEFT_KERNELS") == "off":
        return _loaded
    from filelock import FileLock

    try:
        library().parent.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{library().parent}.lock"):
            if not library().exists():
                _compile(verbose)
    except Exception as error:      # of many kinds: no compiler, no ninja, no room, a compiler that stops
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _failed = next((line for line in lines if "error:" in line), lines[0])      # the compiler's own, if it got so far
        print(f"The compiled kernels cannot be built here ({_failed}). minipeft uses PyTorch in their place: "
              "the same results, more slowly.", file=sys.stderr)
        return False
    return _load()


def _compile(verbose: bool) -> None:
    """Build into a folder beside the final one, and rename: a build that is stopped half-way leaves nothing."""
    from torch.utils import cpp_extension

    target = library().parent
    with_cuda = cuda_home() is not None
    if verbose:
        print(f"Compiling minipeft's kernels ({'C++ and CUDA' if with_cuda else f'C++; no CUDA: {why_no_cuda()}'}) with "
              f"{cpp_extension.get_cxx_compiler()}: {'several minutes' if with_cuda else 'about a minute'}, "
              f"once. The result is kept in {target}.", file=sys.stderr)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as part, _tools(with_cuda):
        cpp_extension._write_ninja_file_and_build_library(
            name=library().stem, sources=[str(path) for path in sources()], extra_cflags=list(CFLAGS),
            extra_cuda_cflags=list(CUDA_CFLAGS), extra_sycl_cflags=None, extra_ldflags=None,
            extra_include_paths=[str(cuda_home() / "include")] if with_cuda else [], build_directory=part,
            verbose=False, with_cuda=with_cuda, with_sycl=False)
        target.mkdir(exist_ok=True)
        os.replace(Path(part) / library().name, library())
    if verbose:
        print(f"Compiled in {time.perf_counter() - began:.0f} s.", file=sys.stderr)


@contextlib.contextmanager
def _tools(with_cuda: bool):
    """For the build: ninja beside this Python, this CUDA toolkit, and architectures even where no GPU is."""
    from torch.utils import cpp_extension

    before, home = dict(os.environ), cpp_extension.CUDA_HOME
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if with_cuda:
        cpp_extension.CUDA_HOME = str(cuda_home())
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = home
        os.environ.clear()
        os.environ.update(before)


def _load() -> bool:
    global _loaded, _failed, devices
    try:
        torch.ops.load_library(str(library()))
    except OSError as error:
        _failed = str(error)
        print(f"The compiled kernels cannot be loaded ({error}). minipeft uses PyTorch in their place.", file=sys.stderr)
        return False
    if wanted := os.environ.get("MINIPEFT_KERNELS"):
        path(wanted)
    _tell_shapes()
    _loaded, devices = True, ("cpu", "cuda") if cuda_home() else ("cpu",)
    return True


def _tell_shapes() -> None:
    """What the operators return for tensors without values: for `torch.compile` and the meta device."""

    @torch.library.register_fake("minipeft::nf4_quantize")
    def _(t, block_size):
        n = t.numel()
        return t.new_empty((n + 1) // 2, dtype=torch.uint8), t.new_empty((n + block_size - 1) // block_size, dtype=torch.float32)

    @torch.library.register_fake("minipeft::nf4_dequantize")
    def _(packed, absmax, n, block_size, dtype, nested_absmax=None, nested_map=None, nested_offset=None):
        return packed.new_empty(n, dtype=dtype)

    @torch.library.register_fake("minipeft::nf4_dequantize_out")
    def _(packed, absmax, block_size, nested_absmax=None, nested_map=None, nested_offset=None, *, out):
        return None

    @torch.library.register_fake("minipeft::nf4_product")
    def _(x, packed, absmax, outputs, columns, block_size, transposed=False, nested_absmax=None, nested_map=None,
          nested_offset=None):
        return x.new_empty(*x.shape[:-1], columns if transposed else outputs)


def paths() -> list[str]:
    """The paths that this processor has, the one in use first: of "avx512", "avx2", "plain"."""
    return torch.ops.minipeft.nf4_path("").split()


def path(name: str) -> None:
    """Use this path from now on. Raises `ValueError` for one that this processor does not have."""
    torch.ops.minipeft.nf4_path(name)


def quantize(flat: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """n elements -> codes (⌈n/2⌉,) uint8, the earlier element in the high half, and scales (⌈n/block_size⌉,) float32.

    float32, float16 or bfloat16, of any shape. A block with a NaN or an infinity has it as its scale.
    Raises `ValueError` for a block size that is odd or not positive, `TypeError` for another dtype.
    """
    return torch.ops.minipeft.nf4_quantize(flat.detach(), block_size)


def dequantize(packed: Tensor, scales: Tensor | QuantizedScales, n: int, block_size: int = 64, out: Tensor | None = None,
               dtype: torch.dtype = torch.float32) -> Tensor:
    """level · scale, computed in float32 and rounded to `dtype`: (n,), or into `out`, contiguous, of n elements.

    scales as `quantize` gives them, or double-quantised: then each is computed where it is used.
    Raises `ValueError` where sizes do not fit, `TypeError` for a dtype other than float32, float16, bfloat16.
    """
    absmax, nested = _nested(scales)
    if out is None:
        return torch.ops.minipeft.nf4_dequantize(packed, absmax, n, block_size, dtype, *nested)
    if out.numel() != n:
        raise ValueError(f"out has {out.numel()} elements; {n} are wanted")
    torch.ops.minipeft.nf4_dequantize_out(packed, absmax, block_size, *nested, out=out)
    return out


def gemm(x: Tensor, packed: Tensor, scales: Tensor | QuantizedScales, shape: tuple[int, int], block_size: int = 64) -> Tensor:
    """x Wᵀ for W of `shape` (out, in) in NF4; x (…, in) of any floating dtype, result (…, out) in the same.

    Up to 32 rows (on a GPU, 4) are computed straight from the codes, in float32; more with panels of W, decoded one
    after the other. Has a gradient for x, for which W is decoded again. Raises `ValueError` where sizes do not fit.
    """
    absmax, nested = _nested(scales)
    return torch.ops.minipeft.nf4_product(x, packed, absmax, shape[0], shape[1], block_size, False, *nested)


def _nested(scales: Tensor | QuantizedScales) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The scales as the operators take them: (absmax, ()) or (codes, (absmax of 256, map, offset))."""
    if isinstance(scales, Tensor):
        return scales, ()
    device = scales.codes.device
    if device not in _maps:
        _maps[device] = MAP.to(device)
    return scales.codes, (scales.absmax, _maps[device], scales.offset)
