"""CUDA tensors without CUDA: shapes, dtypes and devices are worked out, no number is.

    with fake_cuda():                       # a T4; fake_cuda((8, 0)) is an A100
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
        model(torch.zeros(2, 7, dtype=torch.long, device="cuda"))   # all on "cuda:0"

A tensor left on the CPU meets one on the GPU as it would on a student's machine: with an error.
Forward passes work, under autocast too. Backward passes do not: torch's engine wants a real GPU.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

# A torch built without CUDA asks who guards the current CUDA device, even for fake tensors.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""


@functools.cache
def _load_guard() -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("fake CUDA tensors need a C++ compiler, and there is none")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "guard.cpp").write_text(GUARD)
        subprocess.run(
            [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder}/include", "guard.cpp",
             f"-L{torch_folder}/lib", "-lc10", "-o", "guard.so"],
            cwd=work, check=True,
        )  # fmt: skip
        ctypes.CDLL(f"{work}/guard.so")


@contextmanager
def fake_cuda(capability: tuple[int, int] = (7, 5)):
    """Until the end of the block there is a GPU of this compute capability, for fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not torch.backends.cuda.is_built():
        _load_guard()
    with (
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: capability),
        mock.patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: capability >= (8, 0)),
        # torch would now start the GPU before it makes a fake tensor of it
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None),
        mock.patch.object(FakeTensorMode, "avoid_device_init", True),
        FakeTensorMode(),
    ):
        yield
