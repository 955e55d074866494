"""Checks of chapter 8, kernels. A student's CUDA is the body of a kernel, text that the answer returns.

It is put between the braces of the kernel's signature and run in the emulator, in every order of the
threads, on outputs that hold NaN before. The oracles are PyTorch in float64. A machine that cannot run
the emulator cannot judge: the answer is then *not checked*.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from minipeft.checks.frame import Case, Draw, NotHere, Refused, exercise
from minipeft.quant import emulator, nf4

SIGNATURES = {
    "scale": "__global__ void scale(const float* x, float* y, float a, int n)",
    "absmax": "__global__ void absmax(const float* x, float* scales, int n)",
    "dequantize": "__global__ void dequantize(const uint8_t* packed, const float* scales, const float* level, "
                  "float* out, int n, int block_size)",
    "block_scales": "__global__ void block_scales(const float* x, float* scales, int n, int block_size)",
}  # fmt: skip


def kernel_text(name: str, body: str) -> str:
    """The kernel `name` with this body. Line numbers in messages count the lines of the body."""
    return f'{SIGNATURES[name]} {{\n#line 1\n{textwrap.dedent(body).strip(chr(10))}\n}}\n'


@cache
def no_emulator() -> str:
    """Why the emulator cannot run here, or ""."""
    y = torch.zeros(1)
    try:
        emulator.run("__global__ void one(float* y) { *y = 1; }", "one", 1, 1, [y], orders=("rising",))
    except emulator.EmulatorError as error:
        return str(error).splitlines()[0]
    return ""


def _ran(body: str, after: dict, before: dict, name: str, grid: int, block: int, args: list, out: int) -> Tensor:
    """The output, argument number `out`, of the returned body as kernel `name`."""
    if not isinstance(body, str):
        raise Refused(f"it returned a {type(body).__name__}, expected a str: the kernel's body in CUDA")
    if missing := no_emulator():
        raise NotHere(f"no emulator: {missing}")
    given = [a.clone() if isinstance(a, Tensor) else a for a in args]
    given[out].fill_(torch.nan)
    try:
        emulator.run(kernel_text(name, body), name, grid, block, given)
    except emulator.EmulatorError as error:
        raise Refused(str(error)) from None
    return given[out]


def _runs(name: str, grid: int, block: int, args: list, out: int) -> Callable:
    """For a case: run the returned body as kernel `name`, and give its output, argument number `out`."""
    return partial(_ran, name=name, grid=grid, block=block, args=args, out=out)


def _launch(name: str, grid: int, block: int, **numbers) -> str:
    """`scale<<<3, 64>>>, n 1,000`: what a case was, for the report."""
    return ", ".join([f"{name}<<<{grid}, {block}>>>", *(f"{key} {value:,}" for key, value in numbers.items())])


# ---------------------------------------------------------------------------- what a thread does


@exercise("elements-of-thread")
def elements_of_thread(draw: Draw) -> Iterator[Case]:
    """`fn(block, thread, block_dim, grid_dim, n) -> list[int]`: the elements below n that one thread works on.

    The grid has grid_dim blocks of block_dim threads. A thread begins at its own number in the grid and goes on
    by the number of threads in the grid.
    """
    small = draw.integer(2, 5), draw.integer(6, 12)
    for case, (grid_dim, block_dim, rounds) in enumerate(((3, 4, 3), (5, 32, 2), (1, 7, 4), (*small, 3))):
        threads = grid_dim * block_dim
        block, thread = draw.integer(grid_dim // 2, grid_dim - 1), draw.integer(block_dim // 2, block_dim - 2)
        first = block * block_dim + thread
        # The next element would be n itself, or the thread's last one is the last of all.
        n = first + (rounds - 1) * threads + 1 if case % 2 else first + rounds * threads

        def went(first=first, step=threads, n=n):
            return list(range(first, n, step))

        yield Case(
            given={"block": block, "thread": thread, "block_dim": block_dim, "grid_dim": grid_dim, "n": n},
            want=[i for i in range(n) if i % threads == first],
            vacuous={"its first element only": [first], "all elements": list(range(n)), "nothing": []},
            mistakes={
                "the block's number is not multiplied by the threads of a block": went(first=block + thread),
                "the block's number is multiplied by the number of blocks": went(first=block * grid_dim + thread),
                "the block's number is missing": went(first=thread),
                "it goes on by the threads of one block, so that blocks do the same elements": went(step=block_dim),
                "it goes on by the number of blocks": went(step=grid_dim),
                "threads and blocks are counted from 1": went(first=first + 1),
                "n itself is taken for an element": went(n=n + 1),
                "neighbours in a row: one thread gets what 32 neighbours should read together":
                    list(range(first * rounds, min(n, (first + 1) * rounds))),
            },
        )  # fmt: skip


@exercise("scale-body", points=2)
def scale_body(draw: Draw) -> Iterator[Case]:
    """`fn() -> str`: the body of `scale`: y[i] = a x[i] for every i < n, whatever the grid is.

    __global__ void scale(const float* x, float* y, float a, int n)
    """
    for n, grid, block in ((1, 1, 32), (1000, 3, 64), (65, 4, 32), (draw.integer(200, 600), draw.integer(2, 4), 33)):
        x, a = draw.normal(n), draw.pick([-2.5, 0.3, 3.5]) * draw.uniform(0.9, 1.1)
        yield Case(
            given={},
            want=(torch.tensor(a).double() * x.double()).float(),     # a is float32 in the kernel
            observe=_runs("scale", grid, block, [x, torch.empty(n), a, n], out=1),
            vacuous={"x itself": x},
            mistakes={"a is added, not multiplied": x + a, "divided by a": x / a},
            told=_launch("scale", grid, block, n=n),
        )


# ---------------------------------------------------------------------------- a barrier


def _with_negative_peaks(x: Tensor, block_size: int) -> Tensor:
    """x with the largest |x| of each block made negative, and in the first block at its end; in place."""
    for part in x.split(block_size):
        part[part.abs().argmax()] = -part.abs().max()
    x[:block_size][-1] = -1.5 * x[:block_size].abs().max()
    return x


@exercise("absmax-body", points=3)
def absmax_body(draw: Draw) -> Iterator[Case]:
    """`fn() -> str`: the body of `absmax`: scales[b] = the largest |x| of the block's blockDim.x numbers.

    __global__ void absmax(const float* x, float* scales, int n); blockDim.x is a power of two, at most 256.
    The last block may have fewer than blockDim.x numbers.
    """
    for n, block in ((1, 32), (65, 64), (1000, 128), (256 * 3 - draw.integer(1, 255), 256), (512, 64)):
        x = _with_negative_peaks(draw.normal(n), block)
        parts = [part.double() for part in x.split(block)]
        grid = len(parts)

        def each(f, parts=parts):
            return torch.stack([f(part) for part in parts]).float()

        yield Case(
            given={},
            want=each(lambda part: part.abs().max()),
            observe=_runs("absmax", grid, block, [x, torch.empty(grid), n], out=1),
            vacuous={"the first number of each block": each(lambda part: part[0])},
            mistakes={
                "the sign is in the way: the largest x, not the largest |x|": each(lambda part: part.max().clamp(min=0)),
                "the sum of |x|, not the largest": each(lambda part: part.abs().sum()),
                "only half of the block's threads are looked at": each(lambda part: part[: max(1, block // 2)].abs().max()),
                "only the first 64 numbers of the block are looked at": each(lambda part: part[:64].abs().max()),
            },
            told=_launch("absmax", grid, block, n=n),
        )


# ---------------------------------------------------------------------------- NF4


def _decoded(packed: Tensor, scales: Tensor, n: int, block_size: int, *, low_first: bool = False, block_of=None) -> Tensor:
    """level[code] · scale, one number after the other, in float64: the oracle. (n,)"""
    out = torch.empty(n, dtype=torch.float64)
    for i in range(n):
        byte = int(packed[i // 2])
        code = byte >> 4 if (i % 2 == 0) != low_first else byte & 15
        block = min(i // block_size if block_of is None else block_of(i), len(scales) - 1)
        out[i] = nf4.CODEBOOK[code].double() * scales[block].double()
    return out


@exercise("dequantize-body", points=3)
def dequantize_body(draw: Draw) -> Iterator[Case]:
    """`fn() -> str`: the body of `dequantize`: out[i] = level[code of i] · scale of i's block, for every i < n.

    __global__ void dequantize(const uint8_t* packed, const float* scales, const float* level,
                               float* out, int n, int block_size)
    packed (⌈n/2⌉,), the earlier number in the high half; scales (⌈n/block_size⌉,); level (16,). At least ⌈n/2⌉ threads
    are launched, often more.
    """
    for n, block_size, block in ((1, 64, 32), (65, 64, 32), (2 * draw.integer(90, 140), 32, 64), (2 * draw.integer(150, 200) + 1, 64, 128)):
        bytes_ = (n + 1) // 2
        packed = torch.tensor(draw.integers(bytes_, 0, 255), dtype=torch.uint8)
        packed[0] = draw.pick([0x0F, 0xE1, 0x2D])
        scales = 0.5 + draw.normal((n + block_size - 1) // block_size).abs() * 3
        grid = (bytes_ + block - 1) // block + draw.integer(0, 1)
        levels = _decoded(packed, torch.ones_like(scales), n, block_size)
        mistakes = {
            "the halves of a byte are swapped: the earlier number is in the high half":
                _decoded(packed, scales, n, block_size, low_first=True),
            "the scale is that of another block: a byte's number is not its numbers' number":
                _decoded(packed, scales, n, block_size, block_of=lambda i: i // 2 // block_size),
            "the scale is taken by the CUDA block, not by the block of numbers":
                _decoded(packed, scales, n, block_size, block_of=lambda i: i // 2 // block),
            "the scale is missing": levels,
            "a code is taken for a number, code − 8, and not for the place of a level":
                _decoded(packed, scales, n, block_size).new_tensor(
                    [(int(packed[i // 2]) >> 4 if i % 2 == 0 else int(packed[i // 2]) & 15) - 8 for i in range(n)])
                * scales.double().repeat_interleave(block_size)[:n],
        }  # fmt: skip
        yield Case(
            given={},
            want=_decoded(packed, scales, n, block_size).float(),
            observe=_runs("dequantize", grid, block, [packed, scales, nf4.CODEBOOK.clone(), torch.empty(n), n, block_size], out=3),
            mistakes=mistakes,
            told=_launch("dequantize", grid, block, n=n, block_size=block_size),
        )


@exercise("least-bytes")
def least_bytes(draw: Draw) -> Iterator[Case]:
    """`fn(n, block_size, out_bytes) -> int`: the fewest bytes to read and write to dequantise n numbers.

    Each code, of 4 bits, and each scale, of 4 bytes, is read once; each number, of out_bytes bytes, written once.
    """
    for n, block_size, out_bytes in ((1, 64, 4), (4096 * draw.integer(2, 9), 64, 2), (64 * draw.integer(10, 99) + 1, 64, 4),
                                     (2 * draw.integer(1000, 2000) + 1, 32, 2)):  # fmt: skip
        codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device="meta").nbytes
        scales = torch.empty(-(-n // block_size), device="meta").nbytes
        out = n * out_bytes
        yield Case(
            given={"n": n, "block_size": block_size, "out_bytes": out_bytes},
            want=codes + scales + out,
            mistakes={
                "the scales are missing": codes + out,
                "the numbers written are missing": codes + scales,
                "only what is written is counted": out,
                "a code is counted as a byte; two share one": n + scales + out,
                "a scale is counted as one byte; it is a float32": codes + scales // 4 + out,
                "a scale for each number": codes + 4 * n + out,
                "the last block, which is not full, has a scale too": codes + 4 * (n // block_size) + out,
                "an odd number of codes fills its last byte by half; it is a byte all the same": n // 2 + scales + out,
                "each byte of codes is read twice": 2 * codes + scales + out,
                "bits, not bytes": 8 * (codes + scales + out),
            },
        )


# ---------------------------------------------------------------------------- find the bug


@exercise("block-scales-body", points=2)
def block_scales_body(draw: Draw) -> Iterator[Case]:
    """`fn() -> str`: the body of `block_scales`: scales[b] = the largest |x| in block b of block_size numbers.

    __global__ void block_scales(const float* x, float* scales, int n, int block_size)
    A thread a block of numbers, eight threads a CUDA block. Neither the number of blocks is a multiple of 8, nor n
    one of block_size; scales has ⌈n/block_size⌉ entries.
    """
    for n, block_size in ((64 * 8, 64), (64 * 10, 64), (64 * 8 + 63, 64), (1, 32), (32 * draw.integer(9, 15) + draw.integer(1, 31), 32)):
        x = _with_negative_peaks(draw.normal(n), block_size)
        blocks = -(-n // block_size)
        grid = (blocks + 7) // 8

        def each(f, x=x, block_size=block_size):
            return torch.stack([f(part.double()) for part in x.split(block_size)]).float()

        yield Case(
            given={},
            want=each(lambda part: part.abs().max()),
            observe=_runs("block_scales", grid, 8, [x, torch.empty(blocks), n, block_size], out=1),
            vacuous={"the first number of each block": each(lambda part: part[0])},
            mistakes={
                "the sign is in the way: the largest x, not the largest |x|": each(lambda part: part.max().clamp(min=0)),
                "the last block, which is not full, was left out": lambda x=x, n=n, b=block_size: torch.stack(
                    [part.abs().max() if len(part) == b else part.new_zeros(()) for part in x.split(b)]),
            },
            told=_launch("block_scales", grid, 8, n=n, block_size=block_size),
        )  # fmt: skip
