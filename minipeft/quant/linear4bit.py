"""A frozen linear layer whose weight is kept in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, equation 5).

    y = x Wᵀ + b,    W = dequantise(codes, scales)   for the moment of the product only

Nothing here is trained. The gradient goes through to x, ∂loss/∂x = ∂loss/∂y W, and for it W is dequantised
again instead of being kept. Pieces plug in as into any linear layer: QLoRA is LoRA on a quantised model.

    0.5 byte a weight for the codes, and 4/64 bytes for its block's scale, or 1/64 + 4/(64·256) with
    double quantisation: 4.127 bits a weight; float32 takes 32
"""

from __future__ import annotations

import difflib
import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import anatomy, sockets
from . import kernels, nf4
from .double_quant import BLOCK, QuantizedScales
from .nf4 import Quantized

HEAD = "lm_head"    # in `skip`: the output head, whatever its name


class Linear4bit(nn.Module):
    """y = x Wᵀ + b with W (out, in) in NF4; x (…, in), y (…, out), computed in x's dtype.

    `weight` is W, dequantised at each access, in `dtype`: the dtype that the weight had, and that
    `.to(dtype)` changes. The scales stay as they are. The codes are buffers, so `state_dict` holds them.
    `Linear4bit.of(linear)` makes one of an nn.Linear or a Conv1D, whose (in, out) weight is turned round.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, block_size: int = 64,
                 double_quant: bool = True, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        nf4.check_block_size(block_size)
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.dtype = block_size, dtype or torch.get_default_dtype()
        n = in_features * out_features
        scales = math.ceil(n / block_size)
        float32 = {"device": device, "dtype": torch.float32}
        self.register_buffer("packed", torch.zeros(math.ceil(n / 2), dtype=torch.uint8, device=device))
        if double_quant:
            self.register_buffer("absmax", torch.zeros(scales, dtype=torch.uint8, device=device))
            self.register_buffer("nested_absmax", torch.zeros(math.ceil(scales / BLOCK), **float32))
            self.register_buffer("offset", torch.zeros((), **float32))
        else:
            self.register_buffer("absmax", torch.zeros(scales, **float32))
            self.register_buffer("nested_absmax", None)
            self.register_buffer("offset", None)
        self.register_buffer("merged", None)                     # W in full precision, while an adapter is in it
        self._seen = None                                        # `q`, and the tensors that it is made of
        self.register_parameter("bias", nn.Parameter(
            torch.zeros(out_features, device=device, dtype=self.dtype), requires_grad=False) if bias else None)

    @classmethod
    def of(cls, linear: nn.Module, block_size: int = 64, double_quant: bool = True) -> Linear4bit:
        """The 4-bit form of an nn.Linear or Conv1D; on the meta device, and of fake tensors, its shapes only."""
        out_features, in_features = anatomy.linear_shape(linear)
        W = linear.weight.detach()
        new = cls(in_features, out_features, linear.bias is not None, block_size=block_size,
                  double_quant=double_quant, device=W.device, dtype=W.dtype)
        if nf4.has_values(W):
            W = W.T if anatomy.is_transposed(linear) else W      # (out, in)
            new.store(nf4.quantize(W, block_size, double_quant=double_quant))
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return new.train(linear.training)

    @property
    def q(self) -> Quantized:
        """Codes and scales. Kept until one of the tensors is replaced: a token of an answer asks in every layer."""
        own = self._buffers
        parts = (own["packed"], own["absmax"], own["nested_absmax"], own["offset"])
        if self._seen is None or not all(map(operator.is_, parts, self._seen[0])):
            packed, absmax, nested, offset = parts
            scales = absmax if offset is None else QuantizedScales(absmax, nested, offset)
            self._seen = parts, Quantized(packed, scales, (self.out_features, self.in_features), self.dtype, self.block_size)
        return self._seen[1]

    def store(self, q: Quantized | Tensor) -> None:
        """Put other codes and scales in the place of these; or W itself beside them, which then counts."""
        self.merged = q if isinstance(q, Tensor) else None
        self._seen = None
        if self.merged is not None:
            return
        self.packed = q.packed
        if self.offset is None:
            self.absmax = q.scales
        else:
            self.absmax, self.nested_absmax, self.offset = q.scales.codes, q.scales.absmax, q.scales.offset

    def dequantize(self, q: Quantized | None = None) -> Tensor:
        """W (out, in) in `dtype`: of these codes, or of others. Where W is kept beside its codes, W."""
        if q is None and self.merged is not None:
            return self.merged
        return nf4.dequantize(q or self.q, self.dtype)

    @property
    def stored(self) -> Tensor:
        """What W is made of at present: the codes, or W itself; another tensor, or another version, for another W."""
        return self.packed if self.merged is None else self.merged

    def requantized(self, W: Tensor) -> Quantized:
        """Codes for another W (out, in), of the same kind as these."""
        return nf4.quantize(W.float() if W.dtype == torch.float64 else W, self.block_size,
                            double_quant=self.offset is not None)

    weight = property(dequantize)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        bias, merged = self._parameters["bias"], self._buffers["merged"]   # in a quarter of the time of self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        if merged is not None:
            return F.linear(x, merged.to(x.dtype), bias)
        return matmul(x, self.q, bias)

    def _apply(self, fn, recurse=True):
        """What `.to`, `.half`, `.cuda` … do to every tensor; the scales change device, not dtype."""
        scales = [self.absmax, self.nested_absmax, self.offset]
        self._seen = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype

        def moved(t):
            new = fn(t)
            return t.to(new.device) if any(t is s for s in scales) and new.dtype != t.dtype else new

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"block_size={self.block_size}, double_quant={self.offset is not None}, dtype={self.dtype}")


class Product(torch.autograd.Function):
    """x Wᵀ for a W in 4 bits. Only the codes are kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, nf4.dequantize(q, x.dtype))           # (…, out)

    @staticmethod
    def backward(ctx, grad_y):                                   # (…, out)
        return grad_y @ nf4.dequantize(ctx.q, grad_y.dtype), None  # (…, in)


def matmul(x: Tensor, q: Quantized, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b: x (…, in), q of a W (out, in), bias (out,) or None. By the compiled kernel where there is one."""
    kernels = nf4.compiled(x, q.kind)
    y = Product.apply(x, q) if kernels is None else kernels.gemm(x, q.packed, q.scales, q.shape, q.block_size)
    return y if bias is None else y.add_(bias)


def quantize(model: nn.Module, *, block_size: int = 64, double_quant: bool = True,
             skip: tuple[str, ...] = (HEAD,)) -> nn.Module:
    """Put a frozen `Linear4bit` in the place of every nn.Linear and Conv1D; returns the same model.

    block_size    weights behind one scale: 32, 64, … 4096
    double_quant  the scales in 8 bits too
    skip          what keeps its precision: names of modules, or ends of their paths. "lm_head" means the
                  output head, whatever its name

    The first call on a machine compiles the kernels, about a minute (kernels.py); without a compiler it goes on.
    Embeddings and norms are not linear layers and stay; so do a classification head, which every adapter
    trains, and a linear layer that shares its weight with another module (a tied head). Adapters that
    are attached stay attached. Raises, before anything is changed, `ValueError` for a name in `skip`
    that the model does not have, a model that is quantised already or has a merged adapter, or a weight
    that is not finite, and `TypeError` for a weight that is not float32, float16 or bfloat16.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted is a torch.nn.Module")
    modules = anatomy.base_modules(model)
    for path, module in modules.items():
        if isinstance(module, Linear4bit):
            raise ValueError(f"{path!r} is in 4 bits already; quantise the model that it was made from")
    for name in getattr(getattr(model, sockets.HOME, None), "merged", ()):
        raise ValueError(f"adapter {name!r} is merged into the base; unmerge it first")

    new, paths = {}, quantisable(model, skip)
    if any(nf4.has_values(modules[path].weight) for path in paths):      # of a bill's model there is nothing to compute
        kernels.build()
    for path in paths:
        weight = modules[path].weight
        if weight.dtype not in nf4.DTYPES:
            raise TypeError(f"{path} holds {weight.dtype}; accepted are float32, float16 and bfloat16 "
                            "(model.float() makes it float32)")
        try:
            new[modules[path]] = Linear4bit.of(modules[path], block_size, double_quant)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for old, linear in new.items():                              # hooks, and with them adapters, go along
        linear.__dict__.update({name: value for name, value in old.__dict__.items() if "hooks" in name})
    for adapter in sockets.adapters(model).values():
        for piece in adapter.pieces().values():
            if getattr(piece, "module", ())[:1] and piece.module[0] in new:   # DoRA looks at its module
                piece.module = (new[piece.module[0]],)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in new:
                module._modules[name] = new[child]
    return model


def quantisable(model: nn.Module, skip: tuple[str, ...] = (HEAD,)) -> list[str]:
    """The paths of the linear layers that are neither skipped, nor a classification head, nor tied."""
    from transformers.pytorch_utils import Conv1D

    modules = anatomy.base_modules(model)
    skip = [skip] if isinstance(skip, str) else list(skip)
    left = sockets.own_heads(model)
    for name in skip:
        if name == HEAD:
            continue
        found = [path for path in modules if path and f".{path}".endswith(f".{name}")]
        if not found:
            near = difflib.get_close_matches(str(name), {path.rpartition(".")[2] for path in modules} | {HEAD}, n=1)
            raise ValueError(f"skip holds {name!r}, which no module's path ends in"
                             + (f"; did you mean {near[0]!r}?" if near else ""))
        left += found
    owners = {}
    for path, module in modules.items():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(path)
    linear = [path for path, m in modules.items() if isinstance(m, nn.Linear | Conv1D)]
    if HEAD in skip:
        linear = [path for path in anatomy.match(model, "all-linear") if path in linear]
    paths = [path for path in linear if len(owners[modules[path].weight]) == 1
             and not any(f"{path}.".startswith(f"{kept}.") for kept in left)]
    if not paths:
        raise ValueError(f"nothing to quantise: this {type(model).__name__} has no linear layer beside its head "
                         "and what `skip` names")
    return paths
