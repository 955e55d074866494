"""BitFit: only the biases are trained (Ben Zaken et al. 2022, arXiv:2106.10199, section 3).

    y = W x + b + d

The base is frozen, its bias b too; what is trained is d (out,), the change of b. It starts at zero, so that
nothing changes. Parameters: one for each number of the biases, about 0.1 % of a BERT. Models without biases
(Llama, T5) have nothing to train. The smallest baseline for every other method.

Plugged into the module socket: (x, y) -> y + d, on every linear and every norm that has a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import anatomy
from ..sockets import trainable_like


@dataclass(frozen=True)
class BitFit:
    """BitFit has no settings."""

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        found = [(path, module) for path, module in anatomy.base_modules(model).items()
                 if isinstance(getattr(module, "bias", None), Tensor)
                 and (anatomy.is_linear(module) or "norm" in type(module).__name__.lower())]
        if not found:
            raise ValueError(f"no linear and no norm of this {type(model).__name__} has a bias, so BitFit has nothing "
                             "to train")
        for path, module in found:
            yield "module", path, BiasChange(module)


class BiasChange(nn.Module):
    """y' = y + d on one module. y (…, out), d (out,)."""

    only_adds = True

    def __init__(self, module: nn.Module):
        super().__init__()
        self.d = nn.Parameter(torch.zeros(module.bias.shape, **trainable_like(module)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y + self.d).to(y.dtype)

    def merged_bias(self, b: Tensor) -> Tensor:
        """b + d for a frozen bias b (out,)."""
        return (b + self.d).to(b.dtype)
