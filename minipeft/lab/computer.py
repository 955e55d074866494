"""What this machine can do, and one seed for everything that draws random numbers."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from minipeft.lab.pages import Page, table


@dataclass(frozen=True)
class Machine:
    """Cores, memory and accelerators of this machine, in words that hold no names or paths of it."""

    cpu: str
    cores: int
    memory_gib: float  # what this process may use
    vector: str  # widest vector unit: "AVX-512", "AVX2", "NEON" or "none"
    amx: bool  # Intel's matrix unit: bf16 training is about twice as fast with it
    gpu: str | None
    gpu_memory_gib: float
    gpu_bf16: bool
    compiler: str | None  # a C++ compiler, for the CPU kernels
    nvcc: str | None  # CUDA's compiler, for the GPU kernels
    python: str
    torch: str

    @property
    def summary(self) -> str:
        """One line, for tables of results: `2 cores of Intel Xeon (AVX-512, AMX), 23 GiB`."""
        units = ", ".join([u for u in (self.vector,) if u != "none"] + (["AMX"] if self.amx else []))
        line = f"{self.cores} {'core' if self.cores == 1 else 'cores'} of {self.cpu}"
        line += f" ({units})" if units else ""
        line += f", {self.memory_gib:.0f} GiB"
        return line + (f"; {self.gpu}, {self.gpu_memory_gib:.0f} GiB" if self.gpu else ", no GPU")

    def _page(self) -> Page:
        gpu = f"{self.gpu}, {self.gpu_memory_gib:.0f} GiB, bf16: {'yes' if self.gpu_bf16 else 'no'}"
        rows = [
            ("processor", f"{self.cpu}, {self.cores} cores"),
            ("memory", f"{self.memory_gib:.1f} GiB"),
            ("vector unit", self.vector + (", AMX" if self.amx else "")),
            ("GPU", gpu if self.gpu else "none; every chapter runs without one"),
            ("C++ compiler", self.compiler or "none; the CPU kernels of the kernel chapters need one"),
            ("nvcc", self.nvcc or "none; CUDA kernels run in the emulator instead"),
            ("versions", f"Python {self.python}, torch {self.torch}"),
        ]
        return table([{"": name, "this machine": value} for name, value in rows])

    def _repr_html_(self) -> str:
        return self._page()._repr_html_()

    def __str__(self) -> str:
        return repr(self._page())


def machine() -> Machine:
    """Look at this machine: cores, memory, GPU, vector units, compilers."""
    import torch

    flags = _cpu_flags()
    capability = torch.backends.cpu.get_cpu_capability()
    if "avx512f" in flags or "AVX512" in capability:
        vector = "AVX-512"
    elif "avx2" in flags or "AVX2" in capability:
        vector = "AVX2"
    else:
        vector = "NEON" if platform.machine() in ("arm64", "aarch64") else "none"
    gpu, gpu_memory, gpu_bf16 = None, 0.0, False
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu, gpu_memory = properties.name, properties.total_memory / 2**30
        gpu_bf16 = torch.cuda.get_device_capability(0) >= (8, 0)
    return Machine(
        cpu=_cpu_name(),
        cores=_cores(),
        memory_gib=_memory() / 2**30,
        vector=vector,
        amx="amx_tile" in flags,
        gpu=gpu,
        gpu_memory_gib=gpu_memory,
        gpu_bf16=gpu_bf16,
        compiler=next(filter(None, map(_tool, ("c++", "g++", "clang++"))), None),
        nvcc=_tool("nvcc"),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers (CPU and GPU)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpu_name() -> str:
    name = _cpuinfo("model name")
    if not name and platform.system() == "Darwin":
        name = _first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*$", " ", name or platform.processor() or platform.machine())
    return " ".join(name.split())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    """Bytes this process may use: the machine's memory, or its container's if that is less."""
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _tool(name: str) -> str | None:
    """Name and version of a compiler on the path, such as `g++ 13.2.0`."""
    if shutil.which(name) is None:
        return None
    if name == "nvcc":
        release = re.search(r"release ([\d.]+)", _output([name, "--version"]))
        return f"nvcc {release[1]}" if release else "nvcc"
    first = _first_line([name, "--version"])
    version = re.search(r"\d+\.\d+(\.\d+)?", first)
    return f"{name} {version[0]}" if version else name


def _first_line(command: list[str]) -> str:
    return next(iter(_output(command).splitlines()), "")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
