"""Checks of chapter 9: QLoRA (Dettmers et al. 2023, equation 5) and LoftQ (Li et al. 2023, algorithm 1).

Shapes as in the package: W (out, in), A (r, in), B (out, r), x (tokens, in); the base's codes in blocks of
64 consecutive weights, taken row by row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minipeft.checks.frame import Case, Draw, Refused, exercise, same_bytes
from minipeft.quant import nf4
from minipeft.quant.linear4bit import Linear4bit

BLOCK = 64


def _four_bit_bytes(shapes: list[tuple[int, int]]) -> int:
    """Bytes of the buffers of 4-bit layers of these (out, in) shapes: the oracle, made without memory."""
    layers = [Linear4bit(d_in, d_out, bias=False, device="meta") for d_out, d_in in shapes]
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())


@exercise("qlora-bytes", points=2)
def qlora_bytes(draw: Draw) -> Iterator[Case]:
    """`fn(shapes, others, rank) -> int`: bytes that stand during a QLoRA run, activations aside.

    shapes   (out, in) of the 4-bit layers: two codes a byte, a byte for each 64 weights, a float32 for
             each 256 of these bytes, and one float32 more
    others   numbers kept in 16 bits
    rank     of the LoRA beside every 4-bit layer: weights, gradients and two states of Adam in float32
    """
    for layers, r in ((1, 3), (5, 8), (3, draw.integer(5, 40)), (7, draw.integer(1, 9))):
        shapes = [(2 * draw.integer(4, 350) + 1, 2 * draw.integer(200, 1500) + 1) for _ in range(layers)]
        others = draw.integer(1000, 90_000)
        n = sum(o * i for o, i in shapes)
        blocks = [-(-o * i // BLOCK) for o, i in shapes]
        lora = sum(r * (o + i) for o, i in shapes)
        base = _four_bit_bytes(shapes)
        codes = sum(-(-o * i // 2) for o, i in shapes)
        right = base + 2 * others + 16 * lora
        yield Case(
            given={"shapes": shapes, "others": others, "rank": r},
            want=right,
            vacuous={"the 4-bit weights alone": base, "the adapter alone": 16 * lora},
            mistakes={
                "the scales are counted as float32: that is without double quantisation": right - base + codes + 4 * sum(blocks),
                "the scales are missing": right - base + codes,
                "the float32 behind 256 scales, and the offset, are missing": right - base + codes + sum(blocks),
                "the offset, one float32 a layer, is missing": right - 4 * layers,
                "a code is counted as a whole byte": right + n - codes,
                "what stays in 16 bits is missing": right - 2 * others,
                "what stays in 16 bits is counted as float32": right + 2 * others,
                "the gradients are missing": right - 4 * lora,
                "the optimizer's states are missing": right - 8 * lora,
                "Adam keeps two states a number, not one": right - 4 * lora,
                "the adapter is counted in 16 bits": right - 8 * lora,
                "the adapter's own weights are missing": right - 4 * lora,
                "the frozen weights have no gradients": right + 2 * n,
                "4.127 bits a weight is a rounded figure; count the bytes": round(4.127 / 8 * n) + 2 * others + 16 * lora,
                "the last block need not be full: round up": right - base + sum(o * i // 2 + o * i // 64 + 4 * (o * i // 64 // 256) + 4 for o, i in shapes),
            },
        )


def _decoded(codes: Tensor, absmax: Tensor) -> Tensor:
    """W (out, in) in float64, one weight after the other: the oracle of the backward pass."""
    flat = [nf4.CODEBOOK[int(code)].double() * absmax[k // BLOCK].double() for k, code in enumerate(codes.flatten())]
    return torch.stack(flat).view(codes.shape)


@exercise("qlora-backward", points=3)
def qlora_backward(draw: Draw) -> Iterator[Case]:
    """`fn(grad_y, x, codes, absmax, A, B, s) -> (grad_x, grad_A, grad_B)` of y = x Wᵀ + s x Aᵀ Bᵀ.

    grad_y (tokens, out), x (tokens, in); codes (out, in) uint8, one code each; absmax, a scale for each
    64 consecutive weights; A (r, in), B (out, r). The levels are `mp.nf4.CODEBOOK`.
    """
    shapes = [(5, 16, 16, 3), (1, 7, 11, 2), (4, 33, 10, 4), (3, draw.integer(20, 30), draw.integer(9, 19), 1)]
    for tokens, d_in, d_out, r in shapes:
        s = draw.pick([0.3, 0.45, 2.3, 3.7]) * draw.uniform(0.9, 1.1)
        codes = torch.tensor(draw.integers(d_out * d_in, 0, 15), dtype=torch.uint8).view(d_out, d_in)
        absmax = torch.tensor([draw.uniform(0.3, 1.6) for _ in range(-(-codes.numel() // BLOCK))])
        g, x = draw.normal(tokens, d_out), draw.normal(tokens, d_in)
        A, B = draw.normal(r, d_in, scale=d_in**-0.5), draw.normal(d_out, r, scale=r**-0.5 / s)
        W, xd, Ad, Bd = _decoded(codes, absmax), *(t.double().requires_grad_() for t in (x, A, B))
        y = xd @ W.T + s * (xd @ Ad.T) @ Bd.T
        dx, dA, dB = torch.autograd.grad(y, (xd, Ad, Bd), g.double())
        through_base = g.double() @ W
        scales = absmax.double().repeat_interleave(BLOCK)[:codes.numel()].view(codes.shape)
        linear = (codes.double() - 8) / 7 * scales
        yield Case(
            given={"grad_y": g, "x": x, "codes": codes, "absmax": absmax, "A": A, "B": B, "s": s},
            want=(dx, dA, dB),
            vacuous={"only the base's share": (through_base, torch.zeros_like(dA), torch.zeros_like(dB))},
            mistakes={
                "grad_x lacks the frozen weight: it does not train, but the gradient passes through it": (dx - through_base, dA, dB),
                "grad_x lacks the path through A and B": (through_base, dA, dB),
                "the scale s is missing in all three": (through_base + (dx - through_base) / s, dA / s, dB / s),
                "the scale s is missing in the gradients of A and B": (dx, dA / s, dB / s),
                "the scale s is missing in grad_x": (through_base + (dx - through_base) / s, dA, dB),
                "the gradients of A and B are transposed": (dx, dA.T, dB.T),
                "A and B are in each other's place": (dx, dB, dA),
                "W is transposed in grad_x": lambda g=g, W=W, dx=dx, t=through_base, dA=dA, dB=dB: (g.double() @ W.T + dx - t, dA, dB),
                "the codes are levels of NF4, not steps of equal size": (g.double() @ linear + dx - through_base, dA, dB),
                "the codes are not multiplied by their block's scale": (g.double() @ nf4.CODEBOOK.double()[codes.long()] + dx - through_base, dA, dB),
            },
        )


def _rounded(t: Tensor) -> Tensor:
    """`quantise`: to NF4 and back, in t's dtype."""
    return nf4.dequantize(nf4.quantize(t.float())).to(t.dtype)


def _off_the_thresholds(draw: Draw, d_out: int, d_in: int) -> Tensor:
    """A weight in float64 of which no entry is so near the middle of two levels that rounding may choose either."""
    t = 0.05 * draw.normal(d_out, d_in)
    nearest = _rounded(t)
    return (nearest + 0.8 * (t - nearest)).double()


def _pair(draw: Draw, d_out: int, d_in: int, r: int) -> tuple[Tensor, Tensor, float]:
    """A, B and s in float64, with s B A about a third of a weight of `_off_the_thresholds`."""
    s = draw.pick([0.4, 2.0, 3.0]) * draw.uniform(0.9, 1.1)
    A = draw.normal(r, d_in, dtype=torch.float64)
    return A, draw.normal(d_out, r, scale=0.015 / s * r**-0.5, dtype=torch.float64), s


def _nearest_of_rank(M: Tensor, r: int) -> Tensor:
    """The best approximation of M of rank r: M projected on its leading eigenvectors of M Mᵀ."""
    _, vectors = torch.linalg.eigh(M @ M.T)                  # ascending
    lead = vectors[:, -r:]
    return lead @ (lead.T @ M)


@exercise("loftq-step", points=3)
def loftq_step(draw: Draw) -> Iterator[Case]:
    """`fn(W, A, B, s, quantise) -> (Q, A, B)`: one alternation of LoftQ.

    Q = quantise(W - s B A), then s B A becomes the best approximation of W - Q of A's rank.
    W (out, in), Q the same; A (r, in), B (out, r). How s B A is shared out between A and B is free.
    """
    for d_out, d_in, r in ((24, 40, 4), (33, 65, 3), (48, 20, 5), (draw.integer(10, 20), draw.integer(70, 90), 1)):
        A, B, s = _pair(draw, d_out, d_in, r)
        target = _off_the_thresholds(draw, d_out, d_in)
        W = target + s * B @ A
        Q = _rounded(target)
        new = _nearest_of_rank(W - Q, r)
        U, S, Vt = torch.linalg.svd(W - Q, full_matrices=False)
        plain = _rounded(W)
        other = _rounded(W - B @ A)
        yield Case(
            given={"W": W, "A": A, "B": B, "s": s, "quantise": _rounded},
            want=(Q, new),
            observe=_pair_as_product,
            vacuous={"W itself and nothing beside it": (W, torch.zeros_like(W)), "what it was given": (Q, s * B @ A)},
            mistakes={
                "W is quantised, without taking s B A off first": (plain, _nearest_of_rank(W - plain, r)),
                "the scale s is missing in what is quantised": (other, _nearest_of_rank(W - other, r)),
                "the scale s is missing in the new pair: s B A comes out s times too large": (Q, s * new),
                "what is decomposed is W - Q, without the old s B A": (Q, _nearest_of_rank(target - Q, r)),
                "the sign: W - Q, not Q - W": (Q, -new),
                "W itself is decomposed, not W - Q": (Q, _nearest_of_rank(W, r)),
                "A and B stay as they were": (Q, s * B @ A),
                "the singular values are in both A and B: each gets their root": (Q, (U[:, :r] * S[:r] ** 2) @ Vt[:r]),
                "the singular values are missing": (Q, U[:, :r] @ Vt[:r]),
                "Q is not quantised": (target, _nearest_of_rank(W - target, r)),
            },
        )


def _pair_as_product(returned, after: dict, before: dict) -> tuple[Tensor, Tensor]:
    """(Q, s B A) of the (Q, A, B) that was returned."""
    if not (isinstance(returned, (tuple, list)) and len(returned) == 3 and all(isinstance(t, Tensor) for t in returned)):
        raise Refused("expected three tensors: Q, A and B")
    Q, A, B = returned
    for name, new, old in (("A", A, before["A"]), ("B", B, before["B"])):
        if new.shape != old.shape:
            raise Refused(f"{name} has shape {tuple(new.shape)}, expected {tuple(old.shape)}")
    return Q, before["s"] * B @ A


@exercise("merge-4bit", points=2)
def merge_4bit(draw: Draw) -> Iterator[Case]:
    """`fn(W, A, B, s, quantise) -> (stored, lost)`: merge into a 4-bit weight and say what rounding took.

    W (out, in) is the dequantised weight; stored = quantise(W + s B A), as numbers again;
    lost = ‖stored - (W + s B A)‖ / ‖s B A‖ (Frobenius), a number.
    """
    for d_out, d_in, r in ((24, 24, 4), (33, 65, 3), (48, 20, 5), (draw.integer(10, 20), draw.integer(70, 90), 1)):
        A, B, s = _pair(draw, d_out, d_in, r)
        merged = _off_the_thresholds(draw, d_out, d_in)
        delta = sum(s * torch.outer(B[:, k], A[k]) for k in range(r))
        W, stored = merged - delta, _rounded(merged)
        error, change = (stored - merged).square().sum().sqrt(), delta.square().sum().sqrt()
        lost = (error / change).item()
        apart, pieces = _rounded(W) + delta, W + _rounded(delta)
        unscaled = _rounded(W + B @ A)
        yield Case(
            given={"W": W, "A": A, "B": B, "s": s, "quantise": _rounded},
            want=(stored, lost),
            vacuous={"nothing rounded, nothing lost": (merged, 0.0), "the base as it was": (W, lost)},
            mistakes={
                "the error is divided by the size of the merged weight, not of the change": (stored, (error / merged.norm()).item()),
                "the error is divided by the size of the base": (stored, (error / W.norm()).item()),
                "that is how far the weight moved, not how far rounding moved it": (stored, ((stored - W).norm() / change).item()),
                "the error is squared": (stored, lost**2),
                "the error is not divided by the change": (stored, error.item()),
                "the mean error beside the mean change is not the Frobenius norm": (stored, ((stored - merged).abs().mean() / delta.abs().mean()).item()),
                "the merged weight is not rounded": (merged, lost),
                "the base is rounded, then the update added": (apart, ((apart - merged).norm() / change).item()),
                "the update is rounded, then added": (pieces, ((pieces - merged).norm() / change).item()),
                "the scale s is missing": (unscaled, ((unscaled - W - B @ A).norm() / (B @ A).norm()).item()),
            },
        )


# ---------------------------------------------------------------------------- find the bug


class _Small(nn.Module):
    """16 bits: an embedding that a head may share, norms, 4-bit layers with biases, a buffer."""

    def __init__(self, draw: Draw, width: int, layers: int, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(37, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), Linear4bit.of(nn.Linear(width, 2 * width)), nn.GELU(),
                          Linear4bit.of(nn.Linear(2 * width, width))) for _ in range(layers))  # fmt: skip
        self.gain = nn.Parameter(torch.ones(width))              # a norm without a class of its own
        self.head = nn.Linear(width, 37)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("frequencies", draw.normal(width))
        for parameter in self.parameters():
            parameter.data = draw.normal(*parameter.shape)
        self.to(torch.bfloat16).requires_grad_(False)


@exercise("prepare", points=2)
def prepare(draw: Draw) -> Iterator[Case]:
    """`fn(model)`: parameters of one dimension (norms, biases) become float32; works in place.

    Matrices keep their dtype, codes and other buffers too, and no value changes.
    """
    for width, layers, tied in ((8, 1, True), (12, 3, False), (2 * draw.integer(5, 9), 2, True)):
        model = _Small(draw, width, layers, tied)
        dims = {name: p.dim() for name, p in model.named_parameters()}
        norms = {f"{path}.{leaf}" for path, m in model.named_modules() if isinstance(m, nn.LayerNorm) for leaf in ("weight", "bias")}

        def cast(those, dims=dims):
            return {name: "float32" if name in those else "bfloat16" for name in dims}

        yield Case(
            given={"model": model},
            want=cast({name for name, d in dims.items() if d == 1}),
            observe=_dtypes,
            may_change=("model",),
            vacuous={"the model as it was": cast(())},
            mistakes={
                "everything is cast, the embedding and the head too: they are the largest tensors that are left": cast(dims),
                "the matrices are cast, not the vectors": cast({name for name, d in dims.items() if d > 1}),
                "only layers of the class LayerNorm are cast; a norm can be a bare parameter": cast(norms),
                "biases have one dimension too": cast(norms | {"gain"}),
                "the head is cast": cast({name for name, d in dims.items() if d == 1 or name.startswith("head")}),
                "the embedding is cast": cast({name for name, d in dims.items() if d == 1 or name.startswith("embed")}),
            },
        )


def _dtypes(returned, after: dict, before: dict) -> dict[str, str]:
    """The dtype of every parameter, where the values and buffers are what they were."""
    model, old = after["model"], before["model"]
    new, parameters = dict(model.named_parameters()), dict(old.named_parameters())
    if new.keys() != parameters.keys():
        raise Refused("the model's parameters are not the same ones as before: names appeared or vanished (is a tied head still tied?)")
    for name, p in parameters.items():
        if not torch.equal(new[name].detach().double(), p.detach().double()):
            raise Refused(f"it changed the values of {name!r}")
    buffers = dict(model.named_buffers())
    for name, b in old.named_buffers():
        if name not in buffers or not same_bytes(buffers[name], b):
            raise Refused(f"it changed the buffer {name!r}: buffers stay as they are")
    return {name: str(p.dtype).removeprefix("torch.") for name, p in new.items()}
