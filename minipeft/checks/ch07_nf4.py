"""Checks of chapter 7, NF4 (Dettmers et al. 2023, arXiv:2305.14314, §3 and appendix E).

A tensor is taken as one row of n numbers x, cut into blocks. s is a block's largest |x|, a code the index
of the level nearest to x/s; levels are in ascending order, from -1 to 1. Codes: integers from 0 to 15.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from minipeft.checks.frame import Case, Draw, Refused, exercise
from minipeft.quant.double_quant import MAP
from minipeft.quant.nf4 import CODEBOOK, OFFSET


def _quantile(p: float) -> float:
    """Φ⁻¹(p), by halving an interval around it."""
    low, high = -9.0, 9.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < p else (low, middle)
    return (low + high) / 2


def _quantile_levels(above: int, below: int, offset: float) -> list[float]:
    """The oracle: the levels one by one, over the largest."""
    up = [_quantile(0.5 + (offset - 0.5) * i / above) for i in range(1, above + 1)]
    down = [-_quantile(0.5 + (offset - 0.5) * i / below) for i in range(1, below + 1)]
    return [level / up[-1] for level in (*reversed(down), 0.0, *up)]


@exercise("nf4-levels", points=2)
def quantile_levels(draw: Draw) -> Iterator[Case]:
    """`fn(above, below, offset) -> levels`: (below + 1 + above,) float32, ascending, from -1 to 1, zero among them.

    The `above` positive ones: Φ⁻¹ of `above` probabilities, `offset` the largest, in equal steps down to 0.5,
    which itself is left out. The `below` negative ones likewise, with their own steps and a minus. Divided by the largest.
    """
    some = draw.integer(9, 20)
    for above, below, offset in ((8, 7, OFFSET), (4, 3, draw.uniform(0.9, 0.95)), (2, 1, draw.uniform(0.8, 0.9)),
                                 (some, some - draw.integer(2, 5), draw.uniform(0.96, 0.99))):  # fmt: skip
        n = above + below + 1
        want = _quantile_levels(above, below, offset)
        top = _quantile(offset)
        up = [_quantile(offset + (0.5 - offset) * i / max(above - 1, 1)) for i in range(above)]
        middles = [_quantile((i + 0.5) / n) for i in range(n)]
        yield Case(
            given={"above": above, "below": below, "offset": offset},
            want=torch.tensor(want),
            mistakes={name: torch.tensor(levels) for name, levels in {
                "equal steps: a uniform grid, not quantiles": [-1 + 2 * i / (n - 1) for i in range(n)],
                "Φ⁻¹((i + ½)/n): then no level is exactly zero": [level / middles[-1] for level in middles],
                "not divided by the largest level": [top * level for level in want],
                "divided twice": [level / top for level in want],
                "the fewer levels are above zero and the more below": [-level for level in reversed(want)],
                "the lower side has the upper side's levels; it has its own, wider steps":
                    [-level for level in reversed(want[below + 1:][-below:])] + want[below:],
                "zero is there more than once: leave out the quantile of 0.5":
                    want[: below + 1] + [level / top for level in reversed(up)],
                "not in ascending order": want[below + 1:] + want[: below + 1],
                "in descending order": want[::-1],
                "the probabilities themselves, without Φ⁻¹": _linear_probabilities(above, below, offset),
            }.items()},
        )  # fmt: skip


def _linear_probabilities(above: int, below: int, offset: float) -> list[float]:
    """What is left of the levels where Φ⁻¹ is forgotten: equal steps on each side."""
    return [-i / below for i in range(below, 0, -1)] + [i / above for i in range(above + 1)]


# ---------------------------------------------------------------------------- blocks


def _some_levels(draw: Draw, below: int = 7, above: int = 8) -> torch.Tensor:
    """Levels of no particular kind: ascending, from -1 through 0 to 1."""
    down, up = ([draw.uniform(0.6, 1.4) for _ in range(count)] for count in (below, above))
    down, up = ([sum(steps[: i + 1]) / sum(steps) for i in range(len(steps))] for steps in (down, up))
    return torch.tensor([-level for level in reversed(down)] + [0.0] + up)


def _block(draw: Draw, levels: torch.Tensor, size: int, scale: float, largest: int) -> tuple[list[int], list[float]]:
    """Codes drawn first, then numbers that round to them: none is near the middle between two levels.

    `largest` is the code of the block's largest |number|, 0 or the last.
    """
    codes = draw.integers(size, 0, len(levels) - 1)
    at = draw.integer(0, size - 1)
    codes[at] = largest
    values = []
    for i, code in enumerate(codes):
        level = levels[code].item()
        near = draw.pick([levels[other].item() for other in (code - 1, code + 1) if 0 <= other < len(levels)])
        values.append(scale * (level if i == at else level + draw.uniform(0.05, 0.4) * (near - level)))
    return codes, values


def _coded(x: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, nearest=None) -> list[int]:
    """The codes of x (n,) with one scale a number: the nearest level, or what `nearest` makes of x/s."""
    z = x.double() / scales.double().clamp(min=1e-300)
    if nearest is not None:
        return nearest(z).tolist()
    return (z[:, None] - levels.double()).abs().argmin(1).tolist()


@exercise("quantize-blocks", points=2)
def quantize_blocks(draw: Draw) -> Iterator[Case]:
    """`fn(x, levels, block_size) -> (codes, scales)`: x (n,) float32 -> codes (n,), whole numbers, and scales
    (⌈n/block_size⌉,) float32, the largest |x| of each block. The last block may be short, a block all zeros.
    """
    for n, block, levels in ((7 * 64 + 5, 64, CODEBOOK), (3, 32, _some_levels(draw)), (128, 32, CODEBOOK),
                             (draw.integer(70, 90), 16, _some_levels(draw))):  # fmt: skip
        codes, values, scales = [], [], []
        for number, start in enumerate(range(0, n, block)):
            size = min(block, n - start)
            if number == 1:                                       # nothing but zeros: their code is that of zero
                more = [int(levels.abs().argmin())] * size, [0.0] * size
            else:
                more = _block(draw, levels, size, 10 ** draw.uniform(-3, 1), largest=15 * (number % 2))
            codes, values = codes + more[0], values + more[1]
            scales.append(max(abs(value) for value in more[1]))
        x, per_block = torch.tensor(values), torch.tensor(scales)
        signed = torch.stack([part.max() for part in x.split(block)])
        spread = torch.stack([part.double().square().mean().sqrt() for part in x.split(block)])
        whole = x.abs().max().expand(len(per_block))
        each = per_block.repeat_interleave(block)[:n]

        def answer(s, nearest=None, x=x, levels=levels, block=block, n=n):
            codes = _coded(x, levels, s.repeat_interleave(block)[:n], nearest)
            return {"codes": codes, "scales": s.double()}

        yield Case(
            given={"x": x, "levels": levels, "block_size": block},
            want={"codes": codes, "scales": per_block.double()},
            observe=_codes_and_scales,
            mistakes={
                "one scale for the whole tensor": answer(whole),
                "the largest x, not the largest |x|": answer(signed),
                "the scale is the root of the mean square, not the largest |x|": answer(spread),
                "rounded down to the level below, not to the nearest":
                    answer(per_block, lambda z, levels=levels: ((levels.double() <= z[:, None]).sum(1) - 1).clamp(min=0)),
                "rounded up to the level above, not to the nearest":
                    answer(per_block, lambda z, levels=levels: (levels.double() < z[:, None] - 1e-6).sum(1).clamp(max=15)),
                "a uniform grid: the codes are not those of the nearest of `levels`":
                    answer(per_block, lambda z: ((z + 1) * 7.5).round().long()),
                "x is not divided by its scale":
                    {"codes": _coded(x, levels, torch.ones(n)), "scales": per_block.double()},
                "the scales are the reciprocals": {"codes": codes, "scales": 1 / per_block.double().clamp(min=1e-30)},
                "codes and numbers belong to different blocks":
                    {"codes": _coded(x, levels, each.roll(block)), "scales": per_block.double()},
            },
        )  # fmt: skip


def _codes_and_scales(value, after: dict, given: dict) -> dict:
    """What the student returned, the codes as a list; refuses what is no pair, and codes that are no whole numbers."""
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise Refused(f"it returned a {type(value).__name__}, expected two tensors, codes and scales")
    codes, scales = value
    n = len(given["x"])
    if not (type(codes) is torch.Tensor and type(scales) is torch.Tensor):
        raise Refused(f"it returned a {type(codes).__name__} and a {type(scales).__name__}, expected two tensors")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise Refused(f"the codes are {codes.dtype}; a code is a whole number (torch.uint8 or torch.int64, say)")
    if tuple(codes.shape) != (n,):
        raise Refused(f"the codes have shape {tuple(codes.shape)}, expected {(n,)}: one a number, also in a short last block")
    return {"codes": codes.tolist(), "scales": scales}


# ---------------------------------------------------------------------------- bytes


def _codes(draw: Draw, n: int) -> list[int]:
    """Codes of which no two neighbours are equal."""
    codes = draw.integers(n, 1, 15)
    for i in range(1, n):
        if codes[i] == codes[i - 1]:
            codes[i] = codes[i] % 15 + 1
    return codes


@exercise("pack-nibbles")
def pack(draw: Draw) -> Iterator[Case]:
    """`fn(codes) -> packed`: (n,) uint8 from 0 to 15 -> (⌈n/2⌉,) uint8, the earlier code in the high half of its byte.

    Where n is odd, the last low half is 0.
    """
    for n in (6, 1, 64, 2 * draw.integer(10, 30) + 1):
        codes = _codes(draw, n)
        even = codes + [0] * (n % 2)
        pairs = list(zip(even[::2], even[1::2], strict=True))
        half = len(pairs)
        yield Case(
            given={"codes": torch.tensor(codes, dtype=torch.uint8)},
            want=torch.tensor([16 * a + b for a, b in pairs], dtype=torch.uint8),
            mistakes={name: torch.tensor(packed, dtype=torch.uint8) for name, packed in {
                "the earlier code is in the low half; it belongs in the high one": [16 * b + a for a, b in pairs],
                "the two codes are added without shifting one": [a + b for a, b in pairs],
                "shifted by 8, all of it out of the byte": [b for _, b in pairs],
                "shifted by 1, not by 4": [(2 * a) | b for a, b in pairs],
                "a byte holds neighbours, not one code of the first half and one of the second":
                    [16 * even[i] + even[half + i] for i in range(half)],
                "joined by & instead of |": [(16 * a) & b for a, b in pairs],
            }.items()},
        )  # fmt: skip


@exercise("decode-nf4", points=2)
def decode(draw: Draw) -> Iterator[Case]:
    """`fn(packed, scales, levels, block_size, n) -> x`: (n,) float32, each scale times the level of the code.

    packed (⌈n/2⌉,) uint8, the earlier code in the high half; scales (⌈n/block_size⌉,) float32, one a block of numbers.
    """
    for n, block, levels in ((7 * 64, 64, CODEBOOK), (2 * draw.integer(40, 60) + 1, 32, CODEBOOK), (3, 32, _some_levels(draw)),
                             (draw.integer(50, 90), 16, _some_levels(draw))):  # fmt: skip
        codes = _codes(draw, n)
        even = codes + [draw.integer(1, 15)] * (n % 2)
        packed = [16 * a + b for a, b in zip(even[::2], even[1::2], strict=True)]
        scales = torch.tensor([draw.uniform(0.2, 3.0) for _ in range(math.ceil(n / block))])
        values = levels.double()

        def numbers(codes, at=lambda i, block=block: i // block, scales=scales, values=values):
            return torch.tensor([(scales[at(i) % len(scales)].item() * values[c].item()) for i, c in enumerate(codes)], dtype=torch.float64)

        each = scales.double().repeat_interleave(block)[:n]
        signed = torch.tensor(codes, dtype=torch.float64) - 8
        yield Case(
            given={"packed": torch.tensor(packed, dtype=torch.uint8), "scales": scales, "levels": levels, "block_size": block, "n": n},
            want=numbers(codes),
            mistakes={
                "decoded as (nibble - 8)/8: a uniform grid. A code is the number of a level": signed / 8 * each,
                "decoded as (nibble - 8)/7: a uniform grid. A code is the number of a level": signed / 7 * each,
                "decoded as nibble - 8: a uniform grid. A code is the number of a level": signed * each,
                "the halves of each byte are in the wrong order": numbers([c for p in packed for c in (p & 15, p >> 4)][:n]),
                "all high halves, then all low ones; they alternate":
                    numbers(([p >> 4 for p in packed] + [p & 15 for p in packed])[:n]),
                "another block's scale: block_size counts numbers, not bytes": numbers(codes, lambda i, b=block: i // (2 * b)),
                "another block's scale: the scales are repeated in turn, not each for a block": numbers(codes, lambda i: i),
                "the scales are missing": values[torch.tensor(codes)],
                "divided by the scales": values[torch.tensor(codes)] / each,
                "one scale for all blocks": numbers(codes, lambda i: 0),
            },
        )  # fmt: skip


# ---------------------------------------------------------------------------- scales


@exercise("bits-per-weight")
def bits_per_weight(draw: Draw) -> Iterator[Case]:
    """`fn(block_size, nested) -> float`: bits that a weight costs in 4 bits, its share of the scales included.

    nested None: one float32 scale a block. Otherwise a scale is one byte, and `nested` scales share one float32.
    """
    for block, nested in ((64, None), (64, 256), (32, 128), (draw.integer(3, 900), None), (draw.integer(3, 900), draw.integer(3, 900))):
        want = 4 + 32 / block if nested is None else 4 + 8 / block + 32 / (block * nested)
        wrong = {
            "the scales cost something too": 4.0,
            "a float32 has 4 bytes, so 32 bits": 4 + 4 / block if nested is None else 4 + 1 / block + 4 / (block * nested),
            "these are bytes, not bits": want / 8,
            "the scale is divided by the bytes of a block, not by its numbers": 2 * want - 4,
            "that is a block's cost, not a weight's": want * block,
        }
        if nested is None:
            wrong |= {"the scale is a float32, not 16 bits": 4 + 16 / block, "one scale a weight": 36.0}
        else:
            wrong |= {
                "the second scales are shared by nested · block_size weights, not by nested": 4 + 8 / block + 32 / nested,
                "the scales' own bytes are missing": 4 + 32 / (block * nested),
                "the second scales are missing": 4 + 8 / block,
                "the float32 scales are gone once their bytes are there": 4 + 40 / block + 32 / (block * nested),
            }
        yield Case(given={"block_size": block, "nested": nested}, want=want, mistakes=wrong)


def _nearest(z: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    return levels[(z[:, None] - levels).abs().argmin(1)]


def _twice(s: torch.Tensor, levels: torch.Tensor, nested: int, offset=None, top=lambda part: part.abs().max(), back=True) -> torch.Tensor:
    """The oracle: block by block in float64, s (blocks,) -> what is left of it after 8 bits."""
    offset = s.mean() if offset is None else offset
    rest = [top(part) * _nearest(part / top(part), levels) for part in (s - offset).split(nested)]
    return torch.cat(rest) + (offset if back else 0)


@exercise("double-quantize", points=2)
def double_quantize(draw: Draw) -> Iterator[Case]:
    """`fn(scales, levels, nested) -> scales`: (blocks,) float32, what double quantisation leaves of them.

    Subtract the mean of all scales; in blocks of `nested`, replace each number by the largest |number| of its
    block times the nearest of `levels`, (k,) ascending within ±1; add the mean again.
    """
    few = torch.linspace(-1, 1, 15)
    few = few.sign() * few.abs() ** 1.5
    for n, nested, levels, side in ((600, 256, MAP, 1), (37, 16, few, -1), (draw.integer(20, 30), 64, few, -1), (9, 4, few, 1)):
        middles = (levels[1:] + levels[:-1]).double() / 2
        middles = middles[levels.diff() > 1e-4]
        while True:                                               # until no number is near the middle between two levels
            scales = 2 + side * draw.normal(n).abs().clamp(max=1.9)      # most of them on one side
            s, d = scales.double(), levels.double()
            z = torch.cat([part / part.abs().max() for part in (s - s.mean()).split(nested)])
            if (z[:, None] - middles).abs().min() > 5e-6:
                break
        yield Case(
            given={"scales": scales, "levels": levels, "nested": nested},
            want=_twice(s, d, nested),
            mistakes={
                "the mean is not subtracted first": _twice(s, d, nested, offset=torch.zeros(())),
                "the mean is not added again": _twice(s, d, nested, back=False),
                "one scale for all blocks": _twice(s, d, n),
                "the largest number, not the largest |number|": _twice(s, d, nested, top=lambda part: part.max().clamp(min=1e-9)),
                "the mean of each block was taken, not that of all scales":
                    torch.cat([_twice(part, d, nested) for part in s.split(nested)]),
                "a uniform grid: round(127 x), not the nearest of `levels`":
                    torch.cat([(127 * p / p.abs().max()).round() / 127 * p.abs().max() for p in (s - s.mean()).split(nested)]) + s.mean(),
                "the smallest scale was subtracted, not the mean": _twice(s, d, nested, offset=s.min()),
            },
        )  # fmt: skip
