"""LoftQ: quantise a weight and start its LoRA together (Li et al. 2023, arXiv:2310.08659, algorithm 1).

    min ‖W - Q - s B A‖,    Q in 4 bits, B A of rank r

Plain QLoRA starts at B A = 0, with the whole error of quantisation in the model. LoftQ gives a part of it to
the LoRA, by turns:

    Q = quantise(W - s B A),    s B A = the best approximation of W - Q of rank r (its r largest singular values)

With one iteration Q is what `mp.quantize` gives, so the adapter works on any NF4 copy of its base. With more,
Q depends on the adapter: the codes belong to the pair, and `model.state_dict()` must be kept with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import anatomy, sockets
from ..methods.lora import LoRA
from . import nf4
from .linear4bit import HEAD, quantisable, quantize
from .nf4 import Quantized


def quantize_loftq(model: nn.Module, lora: LoRA, name: str = "default", *, iterations: int = 1, block_size: int = 64,
                   double_quant: bool = True, skip: tuple[str, ...] = (HEAD,)) -> dict[str, list[float]]:
    """Quantise a full-precision model as `mp.quantize` does and attach `lora`, started by LoftQ.

    Returns, by path, ‖W - Q - s B A‖ / ‖W‖ (Frobenius) without LoRA and after each iteration. An iteration
    that does not make it smaller is not used, and is the last.
    Raises `TypeError` for another method than `mp.LoRA`, `ValueError` for a target that is not quantised, a bad
    number of iterations, and what `mp.quantize` and `mp.attach` refuse; nothing has been changed then.
    """
    if type(lora) is not LoRA:
        raise TypeError(f"lora is {lora!r}; accepted are the settings of LoRA, mp.LoRA(…)")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; accepted is a whole number from 1")
    if lora.init == "pissa":
        raise ValueError("init is 'pissa', which is another start than LoftQ's; accepted are 'kaiming' and 'gaussian'")
    sockets.check_new_name(model, name)
    paths = anatomy.match(model, lora.targets)
    left = set(paths) - set(quantisable(model, skip))
    if left:
        raise ValueError(f"{sorted(left)[0]} is a target of the LoRA, but is not quantised (skip is {skip!r})")
    weights = {path: anatomy.weight_of(model.get_submodule(path)).detach() for path in paths}
    quantize(model, block_size=block_size, double_quant=double_quant, skip=skip)
    residuals, starts = {}, {}
    for path, W in weights.items():
        Q, A, B, residuals[path] = alternate(W, lora, iterations, block_size, double_quant)
        starts[path] = A, B
        model.get_submodule(path).store(Q)
    adapter = sockets.attach(model, lora, name)
    with torch.no_grad():
        for path, (A, B) in starts.items():
            piece = adapter.get_submodule(path)
            piece.A.copy_(A)
            piece.B.copy_(B)
    return residuals


@torch.no_grad()
def alternate(W: Tensor, lora: LoRA, iterations: int, block_size: int = 64,
              double_quant: bool = True) -> tuple[Quantized, Tensor, Tensor, list[float]]:
    """W (out, in) -> Q, A (r, in), B (out, r), and the relative residuals: without LoRA, then after each iteration."""
    r, s = lora.rank, lora.scale
    exact = W.float()
    A, B = exact.new_zeros(r, W.shape[1]), exact.new_zeros(len(W), r)
    Q = nf4.quantize(W, block_size, double_quant=double_quant)
    residuals = [relative(exact - nf4.dequantize(Q, torch.float32), exact)]
    for t in range(iterations):
        new_Q = nf4.quantize((exact - s * (B @ A)).to(W.dtype), block_size, double_quant=double_quant) if t else Q
        rest = exact - nf4.dequantize(new_Q, torch.float32)      # (out, in)
        U, S, Vt = torch.linalg.svd(rest, full_matrices=False)
        root = (S[:r] / s).sqrt()                                # (r,), or fewer where W has no r singular values
        new_A, new_B = torch.zeros_like(A), torch.zeros_like(B)
        new_A[:len(root)], new_B[:, :len(root)] = root[:, None] * Vt[:r], U[:, :r] * root
        residuals.append(relative(rest - s * (new_B @ new_A), exact))
        if residuals[-1] >= residuals[-2]:
            break
        Q, A, B = new_Q, new_A, new_B
    return Q, A, B, residuals


def relative(error: Tensor, exact: Tensor) -> float:
    """‖error‖ / ‖exact‖."""
    return (error.norm() / exact.norm()).item()
