"""NF4: four bits a number, at the quantiles of the normal distribution (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314, §3 and appendix E).

Trained weights are close to normal. A code of 4 bits holds the most of them when its 16 levels are
equally likely, so they stand at quantiles of N(0, 1): 8 above zero, 7 below, zero itself. (That is
the paper's aim; scaling each block by its largest misses it in part: chapter 7, step 2.) In blocks of
64 consecutive numbers x, each with its largest absolute value as scale,

    s = max |x|,    code = the nearest of the 16 levels to x/s,    x ≈ s · level[code]

A tie goes to the lower level. Two codes make a byte, the earlier number in the high half. That is
4 bits and 32/64 for the scale: 4.5 bits a number, or 4.127 with the scales quantised as well
(double_quant.py). Everything equals bitsandbytes bit for bit, its corners included: a scale below 1e-38
divides as 1e-38, and a last block that is not full is divided by its scale where the full ones are
multiplied by the scale's reciprocal.

Beside it, for comparison: "fp4", a sign, 2 bits of exponent and 1 of fraction; "int4", equal steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from .double_quant import QuantizedScales, dequantize_scales, quantize_scales

OFFSET = 0.9677083                     # where the outermost quantile lies: 1 - (1/32 + 1/30)/2, rounded
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST = 1e-38                       # the least divisor


def normal_quantiles(probabilities: Tensor) -> Tensor:
    """Φ⁻¹, computed in float64."""
    return torch.special.ndtri(probabilities.double()).float()


def _codebook() -> Tensor:
    """The 16 levels of NF4, ascending, from -1 to 1."""
    above = normal_quantiles(torch.linspace(OFFSET, 0.5, 9)[:-1])   # 8, falling
    below = -normal_quantiles(torch.linspace(OFFSET, 0.5, 8)[:-1])  # 7, rising
    levels = torch.cat([below, torch.zeros(1), above.flip(0)])
    return levels / levels.max()


CODEBOOK = _codebook()                                           # (16,) float32
_FP4 = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12         # by code; the exponent's codes are not in order
LEVELS = {
    "nf4": CODEBOOK,
    "fp4": torch.cat([_FP4, 0 - _FP4]),
    "int4": torch.arange(-8, 8) / 7,                             # the lowest is never the nearest
}
# Both levels of a byte: (256, 2). One look-up gives two numbers.
_PAIRS = {kind: torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1) for kind, levels in LEVELS.items()}


@dataclass(frozen=True)
class Quantized:
    """A tensor in 4 bits.

    packed      (⌈n/2⌉,) uint8, the earlier number in the high half; an odd n leaves the last half unused
    scales      (⌈n/block_size⌉,) float32, or their 8-bit form
    shape, dtype  of the tensor that it was
    kind        "nf4", "fp4" or "int4"
    """

    packed: Tensor
    scales: Tensor | QuantizedScales
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    kind: str = "nf4"

    @property
    def absmax(self) -> Tensor:
        """The scales as float32, (⌈n/block_size⌉,)."""
        return self.scales if isinstance(self.scales, Tensor) else dequantize_scales(self.scales)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        s = self.scales
        parts = [s] if isinstance(s, Tensor) else [s.codes, s.absmax, s.offset]
        return self.packed.nbytes + sum(part.nbytes for part in parts)

    def to(self, device) -> Quantized:
        """The same on another device."""
        return replace(self, packed=self.packed.to(device), scales=self.scales.to(device))

    @property
    def bits(self) -> float:
        """Bits a number."""
        return 8 * self.nbytes / math.prod(self.shape)


def quantize(t: Tensor, block_size: int = 64, kind: str = "nf4", *, double_quant: bool = False) -> Quantized:
    """Four bits for each number of `t`, a floating-point tensor of any shape, taken row by row.

    Raises `TypeError` for another dtype than float32, float16 and bfloat16, `ValueError` for an empty
    tensor, for another block size or kind, and for a number that is not finite, with its position.
    """
    if not isinstance(t, Tensor) or t.dtype not in DTYPES:
        raise TypeError(f"t is {t.dtype if isinstance(t, Tensor) else type(t).__name__}; accepted are tensors of "
                        "float32, float16 and bfloat16")
    if t.numel() == 0:
        raise ValueError(f"t is empty, {tuple(t.shape)}; at least one number is needed")
    check_block_size(block_size)
    if kind not in LEVELS:
        raise ValueError(f"kind is {kind!r}; accepted are {', '.join(map(repr, LEVELS))}")
    flat = t.detach().reshape(-1)                                # (n,)
    kernels = compiled(flat, kind)
    packed, scales = quantize_blocks(flat, block_size, kind) if kernels is None else kernels.quantize(flat, block_size)
    if has_values(scales) and not scales.isfinite().all():
        at = (~t.detach().isfinite()).nonzero()[0].tolist()
        raise ValueError(f"t{at} is {t[tuple(at)].item()}; only finite numbers can be quantised")
    if double_quant:
        scales = quantize_scales(scales)
        if has_values(scales.offset) and not scales.offset.isfinite():
            raise ValueError("the mean of the scales is beyond float32; double_quant=False keeps them as they are")
    return Quantized(packed, scales, tuple(t.shape), t.dtype, block_size, kind)


def check_block_size(block_size: int) -> None:
    """`ValueError` unless bitsandbytes takes it too."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size!r}; accepted are {', '.join(map(str, BLOCK_SIZES))}")


def quantize_blocks(x: Tensor, block_size: int, kind: str = "nf4") -> tuple[Tensor, Tensor]:
    """(n,) -> codes (⌈n/2⌉,) uint8 and scales (⌈n/block_size⌉,) float32, a NaN or ±∞ where x has one."""
    full = x.numel() - x.numel() % block_size
    blocks = x[:full].float().view(-1, block_size)               # (blocks, block_size)
    scales = blocks.abs().amax(1)                                # (blocks,)
    z = (blocks * (1 / scales.clamp(min=SMALLEST))[:, None]).view(-1)
    if full < x.numel():
        last = x[full:].float()
        scale = last.abs().max().clamp(min=SMALLEST)
        z, scales = torch.cat([z, last / scale]), torch.cat([scales, scale[None]])
    z = F.pad(z.clamp_(-1, 1), (0, z.numel() % 2))               # (2 ⌈n/2⌉,)
    levels, order = LEVELS[kind].to(x.device).sort(stable=True)  # order: the codes by rising level
    codes = torch.bucketize(z, (levels[:-1] + levels[1:]) / 2, out_int32=True)  # a midpoint goes to the lower level
    if kind == "fp4":
        codes = order[codes]
    codes = codes.to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], scales


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that the codes stand for, in the shape of the tensor that it was.

    s · level is computed in float32, then rounded to `dtype`, the original one unless you name another.
    """
    n, full = math.prod(q.shape), math.prod(q.shape) // q.block_size
    dtype, kernels = dtype or q.dtype, compiled(q.packed, q.kind)
    if kernels is not None:
        direct = dtype if dtype in DTYPES else torch.float32
        return kernels.dequantize(q.packed, q.scales, n, q.block_size, dtype=direct).view(q.shape).to(dtype)
    x = _PAIRS[q.kind].to(q.packed.device).index_select(0, q.packed.int()).view(-1)[:n]  # (n,) levels
    scales = q.absmax
    x[:full * q.block_size].view(-1, q.block_size).mul_(scales[:full, None])
    x[full * q.block_size:].mul_(scales[full:])                  # a last block that is not full
    return x.view(q.shape).to(dtype)


def compiled(t: Tensor, kind: str):
    """The module of the compiled kernels, where they are built and made for a tensor like `t`; else None."""
    from . import kernels

    return kernels if kind == "nf4" and kernels.available() and t.device.type in kernels.devices else None


def has_values(t: Tensor) -> bool:
    """False on the meta device and for fake tensors, which have shapes only."""
    return t.device.type != "meta" and not isinstance(t, FakeTensor)
