"""Checks of chapter 5, LoRA (Hu et al. 2021, equation 3): h = W x + (alpha / r) B A x.

Shapes as in the paper and in this package: W (out, in), A (r, in), B (out, r), x (batch, tokens, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from minipeft.checks.frame import Case, Draw, Refused, exercise, same_bytes


def _delta(A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """scale B A in float64, as a sum of r outer products: the oracle of every check here. (out, in)"""
    delta = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for k in range(A.shape[0]):
        delta += scale * torch.outer(B[:, k].double(), A[k].double())
    return delta


def _layer(draw: Draw, d_in: int, d_out: int, r: int, dtype: torch.dtype) -> tuple:
    """W, A, B and alpha, such that the base and the update are of one size and alpha / r is not near 1."""
    scale = draw.pick([0.3, 0.45, 2.3, 3.7]) * draw.uniform(0.9, 1.1)  # alpha / r
    W = draw.normal(d_out, d_in, scale=d_in**-0.5, dtype=dtype)
    A = draw.normal(r, d_in, scale=d_in**-0.5, dtype=dtype)
    B = draw.normal(d_out, r, scale=r**-0.5 / scale, dtype=dtype)
    return W, A, B, scale * r


def _shapes(draw: Draw) -> Iterator[tuple[int, int, int, int, int, torch.dtype]]:
    """(batch, tokens, in, out, r, dtype): one square layer, where swapped matrices fit, then awkward ones."""
    yield 2, 3, 11, 11, 4, torch.float32
    yield 1, 1, 7, 5, 2, torch.float32
    yield 3, 5, 10, 17, 6, torch.float64
    yield 1, 13, 33, 12, 1, torch.float32
    yield draw.integer(1, 4), draw.integer(1, 9), draw.integer(9, 30), draw.integer(31, 40), draw.integer(3, 7), torch.float32


@exercise("lora-forward", points=2)
def lora_forward(draw: Draw) -> Iterator[Case]:
    """`fn(x, W, A, B, alpha, rank) -> y`: a linear layer with LoRA.

    y = x Wᵀ + (alpha / rank) x Aᵀ Bᵀ;  x (batch, tokens, in), W (out, in), A (r, in), B (out, r),
    y (batch, tokens, out), of x's dtype.
    """
    for batch, tokens, d_in, d_out, r, dtype in _shapes(draw):
        W, A, B, alpha = _layer(draw, d_in, d_out, r, dtype)
        x = draw.normal(batch, tokens, d_in, dtype=dtype)
        xd, Wd, Ad, Bd = (t.double() for t in (x, W, A, B))
        base, unscaled = xd @ Wd.T, xd @ Ad.T @ Bd.T
        yield Case(
            given={"x": x, "W": W, "A": A, "B": B, "alpha": alpha, "rank": r},
            want=torch.einsum("bti,oi->bto", xd, Wd + _delta(A, B, alpha / r)),
            vacuous={"the frozen layer's output": base},
            mistakes={
                "the scale alpha / rank is missing": base + unscaled,
                "scaled by alpha, not by alpha / rank": base + alpha * unscaled,
                "scaled by rank / alpha": base + r / alpha * unscaled,
                "scaled by alpha / √rank, which is rsLoRA": base + alpha / math.sqrt(r) * unscaled,
                "the frozen layer's output x Wᵀ is missing": alpha / r * unscaled,
                "the update is subtracted": base - alpha / r * unscaled,
                "the frozen layer's output is scaled too": alpha / r * (base + unscaled),
                "A and B are swapped": lambda xd=xd, Ad=Ad, Bd=Bd, base=base, s=alpha / r: base + s * xd @ Bd @ Ad,
                "W is not transposed": lambda xd=xd, Wd=Wd, u=unscaled, s=alpha / r: xd @ Wd + s * u,
            },
        )


@exercise("lora-init")
def lora_init(draw: Draw) -> Iterator[Case]:
    """`fn(out_features, in_features, rank) -> (A, B)`: the start of training.

    A (rank, in) random with mean 0 and standard deviation 1 / √(3 in), as torch.nn.Linear's own
    weights (uniform between ±1 / √in); B (out, rank) zero, so that ΔW = B A = 0.
    """
    for d_out, d_in, r in ((37, 501, 8), (5, 1030, 3), (129, 300, 16), (draw.integer(50, 90), draw.integer(700, 900), 5)):
        normal = draw.normal(r, d_in, scale=(3 * d_in) ** -0.5)
        yield Case(
            given={"out_features": d_out, "in_features": d_in, "rank": r},
            test=_init_reason,
            vacuous={
                "zeros": (torch.zeros(r, d_in), torch.zeros(d_out, r)),
                "ones": (torch.ones(r, d_in) * (3 * d_in) ** -0.5, torch.zeros(d_out, r)),
                "one row repeated": (normal[:1].expand(r, d_in), torch.zeros(d_out, r)),
            },
        )


def _init_reason(value: tuple, given: dict) -> str | None:
    d_out, d_in, r = given.values()
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        return f"it returned a {type(value).__name__}, expected two tensors, A and B"
    A, B = value
    for name, matrix, shape in (("A", A, (r, d_in)), ("B", B, (d_out, r))):
        if type(matrix) not in (torch.Tensor, nn.Parameter):
            return f"{name} is a {type(matrix).__name__}, expected a tensor of shape {shape}"
        if tuple(matrix.shape) != shape:
            turned = " (transposed?)" if tuple(matrix.shape)[::-1] == shape else ""
            return f"{name} has shape {tuple(matrix.shape)}, expected {shape}{turned}"
        if matrix.dtype != torch.float32:
            return f"{name} is {matrix.dtype}, expected torch.float32"
        if not matrix.isfinite().all():
            return f"{name} holds NaN or infinity"
    A, B = A.detach().double(), B.detach().double()
    if not A.any() and not B.any():
        return "A and B are both zero: then both gradients are zero too, and nothing ever trains"
    if not A.any():
        return "A is zero and B is not: ΔW is zero, but the paper has it the other way round"
    if B.any():
        return f"B is not zero, so ΔW = B A is not zero: the model has changed before training (largest {B.abs().max():.3g})"
    std, right = A.std().item(), (3 * d_in) ** -0.5
    for wrong, what in (
        (1.0, "1: scale the entries down by √in"),
        (d_in**-0.5, "1/√in: uniform between ±1/√in has 1/√(3 in)"),
        ((3 * r) ** -0.5, "1/√(3 r): the fan-in of A is in, not r"),
        (1 / r, "1/r"),
        ((3 * d_out) ** -0.5, "1/√(3 out): the fan-in of A is in, not out"),
        ((2 / d_in) ** 0.5, "√(2/in): Kaiming's gain for ReLU; here a = √5"),
    ):
        if abs(std / wrong - 1) < 0.05 < abs(right / wrong - 1):
            return f"the standard deviation of A is {what}"
    if abs(std / right - 1) > 0.05:
        return f"the standard deviation of A is {std:.4g}, expected 1/√(3 in) = {right:.4g}"
    if abs(A.mean().item()) > 6 * right / math.sqrt(A.numel()):
        return f"the mean of A is {A.mean().item():.3g}, expected about 0"
    if torch.linalg.matrix_rank(A) < min(r, d_in) or A.unique().numel() < A.numel() / 2:
        return "the entries of A are not drawn independently: some repeat"
    return None


@exercise("lora-parameter-count")
def lora_parameter_count(draw: Draw) -> Iterator[Case]:
    """`fn(shapes, rank) -> int`: numbers that LoRA trains in layers of these (out, in) shapes."""
    for layers, r in ((1, 3), (4, 8), (7, draw.integer(5, 40)), (2, draw.integer(60, 90))):
        shapes = [(draw.integer(3, 700), draw.integer(701, 3000)) for _ in range(layers)]
        matrices = [torch.empty(shape, device="meta") for o, i in shapes for shape in ((r, i), (o, r))]
        count = sum(matrix.numel() for matrix in matrices)
        yield Case(
            given={"shapes": shapes, "rank": r},
            want=count,
            mistakes={
                "that is the size of ΔW, not of its factors": sum(o * i for o, i in shapes),
                "only A is counted": sum(r * i for _, i in shapes),
                "only B is counted": sum(r * o for o, _ in shapes),
                "A and B are multiplied, not added": sum(r * o * r * i for o, i in shapes),
                "the rank is missing": sum(o + i for o, i in shapes),
                "every layer is taken as square": sum(2 * r * i for _, i in shapes),
                "the frozen weights are counted too": count + sum(o * i for o, i in shapes),
                "the rank is doubled": 2 * count,
            },
        )


@exercise("lora-merge", points=2)
def lora_merge(draw: Draw) -> Iterator[Case]:
    """`fn(W, A, B, alpha, rank) -> W'`: the weight that does the same without LoRA.

    W' = W + (alpha / rank) B A, a new tensor of W's shape and dtype; W itself stays as it was.
    """
    for _, _, d_in, d_out, r, dtype in _shapes(draw):
        W, A, B, alpha = _layer(draw, d_in, d_out, r, dtype)
        Wd, Ad, Bd, s = W.double(), A.double(), B.double(), alpha / r
        yield Case(
            given={"W": W, "A": A, "B": B, "alpha": alpha, "rank": r},
            want=Wd + _delta(A, B, s),
            test=_merge_reason,
            mistakes={
                "the scale alpha / rank is missing": Wd + Bd @ Ad,
                "scaled by alpha, not by alpha / rank": Wd + alpha * Bd @ Ad,
                "scaled by alpha / √rank, which is rsLoRA": Wd + alpha / math.sqrt(r) * Bd @ Ad,
                "that is ΔW alone, without W": s * Bd @ Ad,
                "the update is subtracted: that unmerges": Wd - s * Bd @ Ad,
                "W is scaled too": s * (Wd + Bd @ Ad),
                "ΔW is transposed": lambda Wd=Wd, Ad=Ad, Bd=Bd, s=s: Wd + s * (Bd @ Ad).T,
            },
        )


def _merge_reason(value: torch.Tensor, given: dict) -> str | None:
    """rank(W' - W) <= r, by singular values in float64."""
    spread = torch.linalg.svdvals(value.detach().double() - given["W"].double())
    r = given["rank"]
    if len(spread) > r and spread[r] > 1e-4 * spread[0]:
        return f"W' - W has a rank above {r}"
    return None


# ---------------------------------------------------------------------------- find the bug


class _LoRALinear(nn.Module):
    def __init__(self, draw: Draw, d_in: int, d_out: int, r: int):
        super().__init__()
        self.base = nn.Linear(d_in, d_out)
        self.A = nn.Parameter(draw.normal(r, d_in))
        self.B = nn.Parameter(draw.normal(d_out, r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


class _Small(nn.Module):
    """Embedding, norms, linears with and without LoRA; two base tensors whose names only look like A and B."""

    def __init__(self, draw: Draw, width: int, r: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(19, width)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            linears = [_LoRALinear(draw, width, 2 * width, r), nn.ReLU(), nn.Linear(2 * width, width)]
            self.blocks.append(nn.Sequential(nn.LayerNorm(width), *linears))
        self.gain_A = nn.Parameter(draw.normal(width))
        self.BASE = nn.Linear(width, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)  # (batch, tokens, width)
        for block in self.blocks:
            h = h + block(h)
        return self.BASE(h * self.gain_A)


@exercise("freeze", points=2)
def freeze(draw: Draw) -> Iterator[Case]:
    """`fn(model)`: afterwards only the parameters called `A` or `B` train; works in place.

    Judged by a training step on a fresh random model: which tensors moved, byte by byte.
    """
    for width, r, layers in ((5, 2, 1), (8, 3, 3), (draw.integer(6, 12), 1, 2)):
        model = _Small(draw, width, r, layers)
        names = {name for name, _ in model.named_parameters()}
        want = {name for name in names if name.split(".")[-1] in ("A", "B")}
        linears = {f"{p}.{k}" for p, m in model.named_modules() if isinstance(m, nn.Linear) for k in ("weight", "bias")}
        yield Case(
            given={"model": model},
            want=want,
            observe=_what_trains,
            may_change=("model",),
            vacuous={"a model that trains everything": names, "a model that trains nothing": set()},
            mistakes={
                "nothing is frozen: requires_grad set on a *module* is only an attribute of that name; "
                "it is the parameters that have it (module.requires_grad_(False) sets theirs)": names,
                "everything is frozen, A and B too: nothing would train": set(),
                "only the linear layers are frozen; embeddings and norms still train": names - linears,
                "the weights are frozen, the biases are not": {n for n in names if n in want or n.endswith("bias")},
                "names that merely contain or end in A or B are not LoRA's": {n for n in names if "A" in n or "B" in n},
            },
        )


def _what_trains(returned, after: dict, before: dict) -> set[str]:
    """The names of the parameters that one step of SGD moves."""
    model = after["model"]
    names = [name for name, _ in before["model"].named_parameters()]
    if [name for name, _ in model.named_parameters()] != names:
        raise Refused("the model's parameters are not the same ones as before: names appeared or vanished")
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in before["model"].named_parameters():
        if not same_bytes(old[name], parameter.detach()):
            raise Refused(f"it changed the values of {name!r}; freezing changes no value")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return set()
    model(torch.arange(15).reshape(3, 5)).square().sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    return {name for name, p in model.named_parameters() if not same_bytes(p.detach(), old[name])}
