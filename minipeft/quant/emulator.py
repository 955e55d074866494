"""Run CUDA on a computer without a GPU: the same text, compiled by a C++ compiler, block after block.

    run(source, "scale", grid=4, block=256, args=[x, y, 1000, 2.0])

Every thread of a block is run, in several orders. An access outside an argument, a race between two barriers, a
barrier or shuffle that not all threads reach, a loop without end, and a result that depends on the order of the
threads are errors with the line. The kernel runs in a process of its own: what it breaks, it breaks there.

A pass here is a pass of the emulator (kernels/emulator), not of a GPU, and says nothing of speed. It wants Linux
and GCC, whose thread sanitiser marks every access to memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..fetch import cache_folder
from .kernels import source_folder

ORDERS = ("rising", "falling", "shuffled", "shuffled again")
_alone = threading.Lock()       # the machine runs one kernel at a time


class EmulatorError(RuntimeError):
    """The kernel does not compile, or did something that a GPU would not forgive; the message says what and where."""


class _Value(ctypes.Structure):     # the three structures of kernels/emulator
    _fields_ = [("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("real", ctypes.c_double), ("element_size", ctypes.c_int64)]


class _Variable(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_int64), ("bytes", ctypes.c_int64), ("name", ctypes.c_char_p), ("shared", ctypes.c_bool)]


def run(source: str | Path, kernel: str, grid, block, args, *, orders=ORDERS) -> None:
    """Run one kernel; tensors in `args` are changed in place, as a GPU would change them.

    source  CUDA, or the path of a .cu file. kernel: its name, with template arguments: "add<float>"
    grid, block  a number or up to three: blocks, and threads in a block
    args    tensors on the CPU for pointers (None for a null one), numbers for numbers
    orders  of the threads, from ORDERS; each starts from the same tensors, and all must give the same

    Raises `EmulatorError`, and leaves the tensors as they were.
    """
    Program(source, [kernel]).run(kernel, grid, block, args, orders=orders)


class Program:
    """A source, compiled once for several kernels."""

    def __init__(self, source: str | Path, kernels: list[str]):
        text = source.read_text() if isinstance(source, Path) else source
        self.name = source.name if isinstance(source, Path) else "kernel.cu"
        self.kernels = kernels
        self.file = _compiled(text, self.name, source.parent if isinstance(source, Path) else source_folder() / "cuda", kernels)
        try:
            self.machine = ctypes.CDLL(str(_machine()), mode=ctypes.RTLD_GLOBAL)
            self.library = ctypes.CDLL(str(self.file))
        except OSError as error:
            raise EmulatorError(f"what the compiler made cannot be loaded (the emulator wants Linux and GCC): {error}") from None
        self.variables = _variables(self.file)

    def run(self, kernel: str, grid, block, args, *, orders=ORDERS) -> None:
        """As the function `run`, for one of `kernels`."""
        number = self.kernels.index(kernel)
        grid, block = ([*(n if isinstance(n, (tuple, list)) else [n]), 1, 1][:3] for n in (grid, block))
        if not 0 < block[0] * block[1] * block[2] <= 1024 or min(*grid, *block) < 1 or max(grid[1:]) > 65535:
            raise EmulatorError(f"block {tuple(block)}, grid {tuple(grid)}: a block has 1 to 1024 threads, a grid at "
                                "least 1 block, and at most 65535 in its second and third direction")
        self._check(number, kernel, args)
        first = None
        for order in orders:
            now = _copies(args)
            self._once(number, kernel, grid, block, now, order)
            first = first or now
            for i, (a, b) in enumerate(zip(first, now, strict=True)):
                if isinstance(a, Tensor) and not torch.equal(_bytes(a), _bytes(b)):
                    at = int((_bytes(a) != _bytes(b)).nonzero()[0])
                    line = self._once(number, kernel, grid, block, _copies(args), order, watch=(i, at))
                    raise EmulatorError(f"{kernel}{line}: argument {i}, element {at // a.element_size()}, depends on the "
                                        f"order of the threads ({orders[0]} against {order})")
        for a, b in zip(args, first or args, strict=True):
            if isinstance(a, Tensor):
                a.copy_(b)

    def _check(self, number: int, kernel: str, args) -> None:
        sizes = (ctypes.c_int * 64)()
        wanted = getattr(self.library, f"emulator_signature_{number}")(sizes)
        if wanted != len(args):
            raise EmulatorError(f"{kernel} takes {wanted} arguments; {len(args)} are given")
        for i, (size, a) in enumerate(zip(sizes, args, strict=False)):
            pointer = a is None or isinstance(a, Tensor)
            if pointer != (size > 0):
                raise EmulatorError(f"{kernel}: argument {i} is {'a pointer' if size > 0 else 'a number'}; a {type(a).__name__} is given")
            if isinstance(a, Tensor) and (a.element_size() != size or a.device.type != "cpu"):
                raise EmulatorError(f"{kernel}: argument {i} points at elements of {size} bytes on the CPU; the tensor is {a.dtype} on {a.device}")

    def _once(self, number, kernel, grid, block, args, order, watch=(-1, 0)) -> str:
        """Run in one order; args are changed. The line of the last write to `watch`, (argument, byte)."""
        n = len(args)
        values, sizes = (_Value * max(n, 1))(), (ctypes.c_int64 * max(n, 1))()
        for i, a in enumerate(args):
            sizes[i] = a.numel() * a.element_size() if isinstance(a, Tensor) else -1
            values[i] = (_Value(a.data_ptr(), 0, 0.0, a.element_size()) if isinstance(a, Tensor)
                         else _Value(None, int(a or 0), float(a or 0), 0))
        variables = (_Variable * max(len(self.variables), 1))(*self.variables)
        text, places = ctypes.create_string_buffer(1000), (ctypes.c_uint64 * 2)()
        with _alone:
            failed = self.machine.emulator_run(
                getattr(self.library, f"emulator_entry_{number}"), (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block),
                values, sizes, n, variables, len(self.variables), ORDERS.index(order), (ctypes.c_int64 * 2)(*watch), text,
                ctypes.c_size_t(len(text)), places)
        line, other = (self._line(place) for place in places)
        if failed:
            other = f" (that was{other.replace(',', '')})" if other else ""
            raise EmulatorError(f"{kernel}{line}: {text.value.decode()}{other}; order of the threads: {order}")
        return line

    def _line(self, place: int) -> str:
        """", line 12" for a place in the library; "" if that is not known."""
        if not place or not shutil.which("addr2line"):
            return ""
        answer = subprocess.run(["addr2line", "-i", "-e", str(self.file), hex(place - 1)], text=True, capture_output=True).stdout
        found = [(Path(file).name, line) for file, line in re.findall(r"(.*):(\d+)", answer)]
        for name, line in found:               # the innermost place that is in the student's own text
            if name == self.name:
                return f", line {line}"
        return next((f", {name} line {line}" for name, line in found if name.endswith(".cuh")), "")


def _copies(args) -> list:
    return [a.clone(memory_format=torch.contiguous_format) if isinstance(a, Tensor) else a for a in args]


def _bytes(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


@cache
def _machine() -> Path:
    """emulator.cpp, compiled."""
    source = source_folder() / "emulator"
    return _build((source / "emulator.cpp").read_text() + (source / "emulator.h").read_text(),
                  ["-O2", "-U_FORTIFY_SOURCE", "-shared", "-I", str(source), str(source / "emulator.cpp")], "emulator.cpp")


def _compiled(text: str, name: str, folder: Path, kernels: list[str]) -> Path:
    header = source_folder() / "emulator" / "emulator.h"
    entries = "".join(f'\nextern "C" void emulator_entry_{i}(const emulator::Value* v) {{ emulator::call(&{k}, v); }}'
                      f'\nextern "C" int emulator_signature_{i}(int* s) {{ return emulator::signature(&{k}, s); }}'
                      for i, k in enumerate(kernels))
    beside = "".join(path.read_text() for path in sorted(folder.glob("*.cuh")))
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / name
        file.write_text(f'{text}\n#line 1 "the call of {", ".join(kernels)}"{entries}\n')
        part = Path(work) / "part.o"
        # Instrumented here, and linked without the sanitiser: emulator.cpp answers its calls.
        key = text + header.read_text() + beside + entries
        return _build(key, ["-O1", "-g", "-fsanitize=thread", "-include", str(header), "-I", str(folder), "-x", "c++", "-c", str(file)],
                      name, link=part)


def _build(key: str, arguments: list[str], name: str, link: Path | None = None) -> Path:
    """The library made by the compiler with these arguments, from the cache if it has been made before."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or not shutil.which(compiler):
        raise EmulatorError("the emulator needs a C++ compiler, and none is found (on Debian and Ubuntu: the package g++)")
    stem = hashlib.sha256(f"{compiler} {name} {key}".encode()).hexdigest()[:16]
    target = cache_folder() / "emulator" / f"{stem}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        made = Path(work) / "new.so"
        common = [compiler, "-std=c++20", "-fPIC", "-ffp-contract=off", "-w"]
        commands = [[*common, *arguments, "-o", str(link or made)]]
        if link:
            commands.append([compiler, "-shared", str(link), "-o", str(made)])
        for command in commands:
            done = subprocess.run(command, text=True, capture_output=True)
            if done.returncode:
                raise EmulatorError(_readable(done.stderr, name))
        os.replace(made, target)
    return target


def _readable(stderr: str, name: str) -> str:
    """The compiler's errors with the student's own lines, and nothing of its wanderings."""
    errors = []
    for line in stderr.splitlines():
        if match := re.match(r"(.*?):(\d+):(?:\d+:)? (?:fatal )?error: (.*)", line):
            file, number, what = match.groups()
            errors.append(f"{name}, line {number}: {what}" if Path(file).name == name else f"{file.rsplit('/')[-1]}: {what}")
    return "does not compile:\n  " + "\n  ".join(errors[:5] or stderr.splitlines()[-3:])


def _variables(library: Path) -> list[_Variable]:
    """The variables of the library. Those of a function are its __shared__ ones. Where the compiler puts the C++
    library into what it makes, that has some, too."""
    answer = subprocess.run(["nm", "-C", "-S", "--defined-only", str(library)], text=True, capture_output=True).stdout
    found = re.findall(r"^([0-9a-f]+) ([0-9a-f]+) [bBdDuVv] (?!std::|__gnu_cxx::|__cxxabiv1::)(.*)$", answer, re.MULTILINE)
    return [_Variable(int(at, 16), int(size, 16), name.rpartition("::")[2].encode(), ")::" in name) for at, size, name in found]
