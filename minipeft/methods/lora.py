"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, equation 3).

    h = W x + ΔW x,    ΔW = s B A,    s = alpha / rank

W (out, in) is frozen. A (r, in) and B (out, r) are trained, so ΔW has rank at most r.
B starts at zero, so that nothing changes before training; A starts at random, so that B's gradient
is not zero. Parameters: r (in + out) for each adapted module, against in × out in W.

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2) takes s = alpha / √rank, which keeps the
size of the update from shrinking as the rank grows.

PiSSA (Meng et al. 2024, arXiv:2404.02948, section 3) starts from the r largest singular values of W = U S Vᵀ:

    A₀ = √(S/s) Vᵀ,    B₀ = U √(S/s),    ΔW = s (B A - B₀ A₀)

The authors take s B₀ A₀ out of W and freeze the rest. Here W stays whole and the start is subtracted instead: the
same function and gradients, and what was trained is a plain LoRA of rank 2r, ΔW = s [B, -B₀] [A; A₀].

Plugged into the module socket: (x, y) -> y + s B A x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import anatomy
from ..sockets import trainable_like

INITS = ("kaiming", "gaussian", "pissa")


@dataclass(frozen=True)
class LoRA:
    """Settings of LoRA.

    rank      r, a positive integer
    alpha     numerator of the scale; positive. The scale is alpha/rank, with `rslora` alpha/√rank
    dropout   probability with which an entry of x is dropped on its way into A, in training
    targets   which modules: name suffixes, "attention", "all-linear", or a regular expression
    init      of A, with B at zero. "kaiming": uniform in ±1/√in, as in the authors' code.
              "gaussian": normal with standard deviation 1/rank, the distribution the paper names.
              Of both, "pissa": the principal singular vectors of W; rank is then at most in and out
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    init: str = "kaiming"
    rslora: bool = False

    def __post_init__(self):
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}; accepted is a whole number from 1")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) \
                or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha!r}; accepted is a number above 0")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; accepted is a number from 0 to below 1")
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}; accepted are {', '.join(map(repr, INITS))}")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora is {self.rslora!r}; accepted are True and False")

    @property
    def scale(self) -> float:
        """s in ΔW = s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def parameter_count(self, out_features: int, in_features: int) -> int:
        """Trained numbers on one module: r (in + out)."""
        return self.rank * (in_features + out_features)

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        modules = anatomy.base_modules(model)
        for path in anatomy.match(model, self.targets):
            module = modules[path]
            check_rank(self, path, module)
            out_features, in_features = anatomy.linear_shape(module)
            W = anatomy.weight_of(module) if self.init == "pissa" else None
            yield "module", path, LowRank(self, out_features, in_features, W, **trainable_like(module))


def check_rank(lora: LoRA, path: str, module: nn.Module) -> None:
    """`ValueError` where the start asks for more singular values than this module's weight has."""
    shape = anatomy.linear_shape(module)
    if lora.init == "pissa" and lora.rank > min(shape):
        raise ValueError(f"rank is {lora.rank}, but the weight of {path!r}, {tuple(shape)}, has only {min(shape)} singular values")


class LowRank(nn.Module):
    """y' = y + s B A x on one module. x (…, in), y (…, out). PiSSA looks at the frozen weight W (out, in)."""

    only_adds = True                             # to y, something that does not depend on y or on the weight

    def __init__(self, lora: LoRA, out_features: int, in_features: int, W: Tensor | None = None, device=None,
                 dtype=None):
        super().__init__()
        self.scale = lora.scale
        self.dropout = nn.Dropout(lora.dropout) if lora.dropout else None
        self.A = nn.Parameter(torch.empty(lora.rank, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(out_features, lora.rank, device=device, dtype=dtype))
        if lora.init == "kaiming":
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(-1/√in, 1/√in)
        elif lora.init == "gaussian":
            nn.init.normal_(self.A, std=1 / lora.rank)
        else:
            self._start_at_principal(W.detach().to(self.A.dtype))

    @torch.no_grad()
    def _start_at_principal(self, W: Tensor) -> None:
        r = self.A.shape[0]
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        root = (S[:r] / self.scale).sqrt()                       # (r,)
        self.A.copy_(root[:, None] * Vt[:r])
        self.B.copy_(U[:, :r] * root)
        self.register_buffer("A0", self.A.clone())
        self.register_buffer("B0", self.B.clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of ΔW = s B A; of PiSSA's the ones of rank 2r, [A; A₀] and [B, -B₀]."""
        if not hasattr(self, "A0"):
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.dropout is not None:
            x = self.dropout(x)
        # y + s (x Aᵀ) Bᵀ, in the precision in which the base computes
        A, B = self.factors()
        return AddLowRank.apply(y, x.to(y.dtype), A.to(y.dtype), B.to(y.dtype), self.scale)

    def delta(self) -> Tensor:
        """ΔW = s B A, (out, in)."""
        A, B = self.factors()
        return self.scale * (B @ A)

    def merged(self, W: Tensor) -> Tensor:
        """W + ΔW for a frozen weight W (out, in), added in the wider of the two precisions."""
        return (W.to(self.A.dtype) + self.delta()).to(W.dtype)


class AddLowRank(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ, written into y: no second (…, out) tensor is made.

    y (…, out) is what a frozen linear module just returned. Autograd needs no linear's output for
    its backward pass, so it can be overwritten. x (…, in), A (r, in), B (out, r); N = all of "…".

    Each product is written so that the long sides N, in, out are contiguous and the short side r is
    not: A xᵀ (r, N) where the formula says x Aᵀ (N, r), and a copy of B as Bᵀ (r, out). BLAS then
    takes a half to a sixth of the time.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, s):
        ctx.save_for_backward(*add_low_rank(y, x, A, B, s))
        ctx.s = s
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable                         # what it keeps has no history: no gradient of the gradient
    def backward(ctx, grad_y):                                   # ∂loss/∂y', (…, out)
        return grad_y, *low_rank_gradients(ctx.saved_tensors, grad_y, ctx.s, ctx.needs_input_grad[1:4]), None


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, ...]:
    """y += s (x Aᵀ) Bᵀ. Returns what `low_rank_gradients` needs."""
    x = x.reshape(-1, x.shape[-1])                               # (N, in)
    h, Bt = A @ x.T, B.T.contiguous()                            # (r, N), (r, out)
    if y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(h.T, Bt, alpha=s)         # (N, out)
    else:
        y.add_((h.T @ Bt).view(y.shape), alpha=s)
    return x, h, A, Bt


def low_rank_gradients(kept: tuple[Tensor, ...], grad_y: Tensor, s: float, wanted: tuple[bool, ...]) -> tuple:
    """∂loss/∂x (…, in), ∂loss/∂A, ∂loss/∂B of s (x Aᵀ) Bᵀ, those that are wanted; grad_y is ∂loss/∂y, (…, out)."""
    x, h, A, Bt = kept
    g = grad_y.reshape(-1, grad_y.shape[-1])                     # (N, out)
    grad_h = s * (Bt @ g.T)                                      # (r, N)
    return (
        (grad_h.T @ A).view(*grad_y.shape[:-1], A.shape[1]) if wanted[0] else None,  # (…, in)
        grad_h @ x if wanted[1] else None,                       # (r, in)
        s * (h @ g).T if wanted[2] else None,                    # (out, r)
    )
