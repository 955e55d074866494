"""Double quantisation: the scales of the blocks, quantised too (Dettmers et al. 2023, arXiv:2305.14314, §3).

NF4 keeps one float32 scale for 64 weights: 0.5 bit a weight. The scales are positive and alike, so

    s = offset + absmax₂ · M[code],     offset = mean(s),  a float32 absmax₂ for 256 scales

and a scale costs a byte: (8 + 32/256)/64 = 0.127 bit a weight instead of 0.5. M is the dynamic map
(Dettmers 2015, arXiv:1511.04561): 256 levels with more digits the larger they are, and more range
below than a grid has:

    ± 10⁻ᵉ · (midpoints of 2⁶⁻ᵉ equal steps from 0.1 to 1),   e = 0 … 6;   beside them 0 and 1

Bit for bit what bitsandbytes does on a CPU. There it looks codes up in a table of 65,536 points of
[-1, 1], so a value is first rounded to the nearest point. On a GPU it searches without that rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256    # scales behind one float32
POINTS = 65536


def _dynamic_map() -> Tensor:
    """The 256 levels in ascending order, float32."""
    levels = [0.0, 1.0]
    for e in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (6 - e) + 1)         # float32, as everything here
        middles = (steps[:-1] + steps[1:]) / 2
        levels += (10**-e * middles).tolist() + (-(10**-e) * middles).tolist()
    return torch.tensor(sorted(levels))


MAP = _dynamic_map()                                             # (256,)
_GRID = torch.arange(POINTS) / (POINTS - 1) * 2 - 1              # the points of [-1, 1]
_CODE = torch.bucketize(_GRID, (MAP[:-1] + MAP[1:]) / 2).to(torch.uint8)  # the level nearest to each


@dataclass(frozen=True)
class QuantizedScales:
    """`codes` (blocks,) uint8; `absmax` (⌈blocks/256⌉,) float32; `offset` () float32."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def to(self, device) -> QuantizedScales:
        """The same on another device."""
        return QuantizedScales(self.codes.to(device), self.absmax.to(device), self.offset.to(device))


def quantize_scales(scales: Tensor) -> QuantizedScales:
    """(blocks,) float32 -> their 8-bit form."""
    offset = scales.mean()
    x = scales - offset                                          # (blocks,)
    rows = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    absmax = rows.abs().amax(1)                                  # (⌈blocks/256⌉,)
    z = rows * (1 / absmax)[:, None]                             # 0/0 where all scales are equal: any code does
    z = z.nan_to_num(nan=-1.0).clamp(-1, 1)
    point = ((z + 1) * 0.5 * (POINTS - 1) + 0.5).long()          # rounded to the nearest
    return QuantizedScales(_CODE.to(x.device)[point].view(-1)[:len(x)], absmax, offset)


def dequantize_scales(q: QuantizedScales) -> Tensor:
    """Their float32 values again, (blocks,)."""
    levels = MAP.to(q.codes.device)[q.codes.int()]               # (blocks,)
    return levels * q.absmax.repeat_interleave(BLOCK)[:len(levels)] + q.offset
