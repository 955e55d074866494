"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353, equation 5).

    W' = m · V / ‖V‖,    V = W + s B A,    ‖V‖ the length of each row, (out,)

A weight is taken apart into magnitudes m (out,), one a row, and directions V / ‖V‖. LoRA moves the direction,
m is trained on its own. W is frozen; A (r, in), B (out, r) and m are trained. B starts at zero and m at ‖W‖,
so that nothing changes. Parameters: r (in + out) + out for each adapted module.

‖V‖ takes part in the forward pass but gets no gradient (section 4.3). The paper speaks of columns, for its W
is (in, out). With c = m / ‖V‖, and b the frozen bias, which is not scaled:

    y' = c V x + b = c (y + s B A x) + (1 - c) b,    y = W x + b

V is never built. ‖V‖² = ‖W‖² + 2 s Σ_r B ∘ (W Aᵀ) + s² Σ_r B ∘ (B A Aᵀ) needs one thin product, W Aᵀ (out, r). It
reads all of W, so ‖V‖ is kept, with the A and B that it was made of, until one of the three has changed. `mp.fit`
asks for it before the passes of a step (`prepare`), of as many modules at a time as there are passes side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import anatomy
from ..quant.nf4 import has_values
from ..sockets import trainable_like
from .lora import AddLowRank, LoRA, LowRank, add_low_rank, check_rank, low_rank_gradients

# Passes side by side: the first makes the norm, the others take it. A module cannot keep a lock, which has no copy.
LOCKS = [threading.Lock() for _ in range(64)]


@dataclass(frozen=True)
class DoRA(LoRA):
    """Settings of DoRA: those of LoRA, with the same meanings."""

    def parameter_count(self, out_features: int, in_features: int) -> int:
        """Trained numbers on one module: r (in + out) + out."""
        return super().parameter_count(out_features, in_features) + out_features

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        for path in anatomy.match(model, self.targets):
            module = model.get_submodule(path)
            check_rank(self, path, module)
            yield "module", path, Decomposed(self, module)


class Decomposed(LowRank):
    """y' = c (y + s B A x) + (1 - c) b on one module, c = m / ‖W + s B A‖. x (…, in), y (…, out).

    As in Hugging Face PEFT, `dropout` acts on what goes into V, but not on what the frozen module made:
    y' = y + c V x̃ - W x̃, x̃ = dropout(x).
    """

    only_adds, reads_weight = False, True

    def __init__(self, dora: DoRA, module: nn.Module):
        super().__init__(dora, *anatomy.linear_shape(module), anatomy.weight_of(module), **trainable_like(module))
        self.module = (module,)                  # in a tuple: the base's, not a part of this piece
        self.W_squared = None                    # (of which weight, ‖W‖² (out,))
        self.kept = None                         # (of which weight, of which A and B, ‖V‖ (out,))
        # What is wider than what went in is on its way into a non-linearity, which keeps it anyway.
        self.keeps_output = self.B.shape[0] > self.A.shape[1]
        self.m = nn.Parameter(self.norm().clone())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖W + s B A‖ by row, (out,), without gradient and at least in float32. It may be kept: do not write to it."""
        (A, B), module = self.factors(), self.module[0]
        stored = getattr(module, "stored", None)                 # of a 4-bit linear, its codes
        stored = module.weight if stored is None else stored
        which = (stored._version, stored.untyped_storage()._cdata, A.dtype, A.device)
        if self._is_kept(A, B, which):
            return self.kept[3]
        with LOCKS[id(self) // 64 % len(LOCKS)], torch.autocast(A.device.type, enabled=False):
            if not has_values(A):
                return self._norm(A, B, which)
            if not self._is_kept(A, B, which):
                self.kept = which, A.clone(), B.clone(), self._norm(A, B, which)
            return self.kept[3]

    def _is_kept(self, A: Tensor, B: Tensor, which: tuple) -> bool:
        """By value, not by version: some optimizers write past autograd's count of versions."""
        kept = self.kept
        return kept is not None and kept[0] == which and torch.equal(kept[1], A) and torch.equal(kept[2], B)

    def _norm(self, A: Tensor, B: Tensor, which: tuple) -> Tensor:
        s, W = self.scale, anatomy.weight_of(self.module[0]).to(A.dtype)  # (out, in); no copy of a float32 base
        if self.W_squared is None or self.W_squared[0] != which:  # the base has changed: merged, moved, loaded
            self.W_squared = which, torch.linalg.vector_norm(W, dim=1).square()
        cross = (B.T * (A @ W.T)).sum(0)                         # (out,)
        square = (B @ (A @ A.T) * B).sum(1)                      # (out,)
        squared = self.W_squared[1] + 2 * s * cross + s * s * square
        return squared.clamp_min(torch.finfo(A.dtype).tiny).sqrt()  # a row of zeros has no direction

    prepare = norm                               # what does not depend on the input

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (A, B), b = (factor.to(y.dtype) for factor in self.factors()), self.module[0].bias
        if self.dropout is not None and self.training:
            x = self.dropout(x).to(y.dtype)                      # x̃
            Wx = x @ anatomy.weight_of(self.module[0]).to(y.dtype).T
            rest, c = y - Wx, self.m / self.norm()
            return (rest + c * AddLowRank.apply(Wx, x, A, B, self.scale)).to(y.dtype)
        return AddDecomposed.apply(y, x.to(y.dtype), A, B, self.m, self.norm(), b, self.scale, self.keeps_output)

    def merged(self, W: Tensor) -> Tensor:
        """m V / ‖V‖ for a frozen weight W (out, in)."""
        V = W.to(self.A.dtype) + self.delta()
        length = torch.linalg.vector_norm(V, dim=1).clamp_min(torch.finfo(V.dtype).tiny)
        return ((self.m / length)[:, None] * V).to(W.dtype)


class AddDecomposed(torch.autograd.Function):
    """y' = c z + (1 - c) b, z = V x + b = y + s B A x, c = m / ‖V‖. y (…, out) is overwritten by z, as in AddLowRank.

    With g = ∂loss/∂y', the product with V gets c g, and ∂loss/∂c = Σ_N g ∘ (z - b) needs z; or y', for
    z - b = (y' - b) / c. `keeps_output` asks for y' to be kept, in the place of z, which takes no memory of its own
    where the model keeps y' too; no c may then be 0. b (out,) is the frozen bias, or None.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, m, norm, b, s, keeps_output):
        c, z = m / norm, y                                       # (out,), (…, out)
        low_rank = add_low_rank(z, x, A, B, s)
        ctx.keeps_output = keeps_output and (not has_values(c) or bool(c.all()))
        out = z if ctx.keeps_output else torch.empty_like(z)
        if z.dtype != c.dtype:                                   # z + (c - 1) (z - b): c is near 1, and c - 1 loses
            torch.addcmul(z, (c - 1).to(z.dtype), z if b is None else z - b, out=out)  # little in 16 bits
        else:
            torch.mul(c, z, out=out) if b is None else torch.addcmul((1 - c) * b, c, z, out=out)
        if ctx.keeps_output:
            ctx.mark_dirty(y)
        ctx.save_for_backward(out if ctx.keeps_output else z, c, norm, b, *low_rank)
        ctx.s = s
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):                                        # ∂loss/∂y', (…, out)
        kept, c, norm, b, *low_rank = ctx.saved_tensors
        grad_z = torch.addcmul(g, (c - 1).to(g.dtype), g)        # c g
        grad_m = grad_b = None
        if ctx.needs_input_grad[4]:
            grad_c = (g * kept).reshape(-1, len(c)).sum(0).to(c.dtype)
            if b is not None:
                grad_c = grad_c - b * g.reshape(-1, len(c)).sum(0)
            grad_m = (grad_c / c if ctx.keeps_output else grad_c) / norm
        if b is not None and ctx.needs_input_grad[6]:
            grad_b = ((1 - c) * g.reshape(-1, len(c)).sum(0)).to(b.dtype)
        return grad_z, *low_rank_gradients(low_rank, grad_z, ctx.s, ctx.needs_input_grad[1:4]), grad_m, None, grad_b, None, None
