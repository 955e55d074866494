"""Several LoRA adapters into one: arithmetic on what they change (Ilharco et al. 2022, arXiv:2212.04089).

    ΔW = Σ_i w_i ΔW_i,    ΔW_i = s_i B_i A_i

    "cat"     this sum, exactly: A = [A_1; A_2; …], B = [w_1 s_1 B_1, w_2 s_2 B_2, …]. The ranks add up
    "svd"     the matrix of a given rank that is closest to this sum
    "linear"  A = Σ √(w_i s_i) A_i, B = Σ √(w_i s_i) B_i, as Hugging Face PEFT does under this name. It is cheap, but
              its product also holds B_i A_j of two different adapters, which nobody has trained
    "ties"    trim, elect, merge (Yadav et al. 2023, arXiv:2306.01708, section 4): of each ΔW_i the share `density`
              of largest size is kept; at each place the sign of the larger sum wins; the mean of what has this
              sign. Then "svd"
    "dare"    drop and rescale (Yu et al. 2023, arXiv:2311.03099, section 3): of each ΔW_i a random share `density` is
              kept, divided by `density`, so that the mean stays. Then "svd" of the sum

The last two work on whole matrices ΔW_i, (out, in), one module after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import anatomy, sockets
from .methods.lora import LoRA, LowRank

HOW = ("cat", "svd", "linear", "ties", "dare")


@torch.no_grad()
def combine(model, weights: dict[str, float], name: str, how: str = "cat", *, rank: int | None = None,
            density: float = 0.2, seed: int = 0) -> sockets.Adapter:
    """A new LoRA adapter called `name` on the same model, made of those in `weights` ({name: w_i}); it acts alone.

    rank     of the result of "svd", "ties" and "dare"; the largest of theirs unless you say otherwise
    density  the share that "ties" and "dare" keep, above 0 and at most 1
    seed     for what "dare" draws

    A module that only some of them change gets those only. Nothing has been changed when this raises: `TypeError`
    for an adapter of another method, `ValueError` for unknown names, an unknown `how`, numbers out of range, ranks
    that differ with "linear", and adapters that bring an output head of their own.
    """
    if how not in HOW:
        raise ValueError(f"how is {how!r}; accepted are {', '.join(map(repr, HOW))}")
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"weights is {weights!r}; accepted is a number for each adapter, {{name: weight}}")
    for of, w in weights.items():
        if isinstance(w, bool) or not isinstance(w, int | float) or not math.isfinite(w) or (how == "linear" and w < 0):
            raise ValueError(f"the weight of {of!r} is {w!r}; accepted is a finite number"
                             + (", not below 0, whose root is taken" if how == "linear" else ""))
    if not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; accepted is a number above 0, up to 1")
    chosen = {of: sockets.the_adapter(model, of) for of in weights}
    sockets.check_nothing_merged(model)
    sockets.check_new_name(model, name)
    pieces = {of: _low_rank(adapter) for of, adapter in chosen.items()}
    ranks = {of: next(iter(mine.values())).factors()[0].shape[0] for of, mine in pieces.items()}
    if how == "linear" and len(set(ranks.values())) > 1:
        raise ValueError(f"the ranks are {ranks}; \"linear\" adds A to A and B to B, so they must be equal")
    if rank is not None and (how in ("cat", "linear") or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r} with how={how!r}; accepted is a whole number from 1, with svd, ties and dare")
    r = sum(ranks.values()) if how == "cat" else rank or max(ranks.values())

    paths = [path for path in anatomy.base_modules(model) if any(path in mine for mine in pieces.values())]
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for path in paths:
        here = {of: mine[path] for of, mine in pieces.items() if path in mine}
        factors[path] = _combined({of: (weights[of], piece) for of, piece in here.items()}, how, r, density, draw)
    settings = LoRA(rank=r, alpha=r, targets=tuple(paths), dropout=min(a.method.dropout for a in chosen.values()))
    made = sockets.attach(model, settings, name)                 # scale 1: s_i is in the factors
    for path, (A, B) in factors.items():
        piece = made.pieces()[path]
        piece.A.zero_()[: len(A)] = A                            # of fewer adapters than elsewhere: the rest is zero
        piece.B.zero_()[:, : len(A)] = B
    sockets.activate(model, name)
    return made


def reduce_rank(model, name: str, rank: int, new_name: str) -> sockets.Adapter:
    """A new adapter `new_name`: the LoRA `name` at a lower rank, by "svd"; it acts alone. Errors as of `combine`."""
    return combine(model, {name: 1.0}, new_name, "svd", rank=rank)


def _low_rank(adapter: sockets.Adapter) -> dict[str, LowRank]:
    pieces = adapter.pieces()
    for path, piece in pieces.items():
        if isinstance(piece, sockets.OwnHead):
            raise ValueError(f"adapter {adapter.name!r} has an output head of its own at {path!r}; heads are not combined")
        if type(piece) is not LowRank:
            raise TypeError(f"adapter {adapter.name!r} is {type(adapter.method).__name__}; only LoRA adapters are combined")
    return pieces


def _combined(parts: dict[str, tuple[float, LowRank]], how: str, r: int, density: float, draw) -> tuple[Tensor, Tensor]:
    """A (≤ r, in) and B (out, ≤ r) with B A = the combination, from {name: (w, piece)}."""
    if how in ("cat", "linear"):
        A, B = zip(*(piece.factors() for _, piece in parts.values()), strict=True)
        ws = [w * piece.scale for w, piece in parts.values()]
        if how == "cat":
            return torch.cat(A), torch.cat([x * b for x, b in zip(ws, B, strict=True)], dim=1)
        return (sum(math.sqrt(x) * a for x, a in zip(ws, A, strict=True)),
                sum(math.sqrt(x) * b for x, b in zip(ws, B, strict=True)))
    w = torch.tensor([w for w, _ in parts.values()])
    deltas = torch.stack([piece.delta() for _, piece in parts.values()])              # (adapters, out, in)
    w = w.to(deltas)[:, None, None]
    if how == "ties":
        deltas = torch.stack([trimmed(delta, density) for delta in deltas])
        elected = torch.where(deltas.sum(0) >= 0, 1, -1)                              # (out, in)
        agree = deltas.sign() == elected
        change = (w * deltas * agree).sum(0) / agree.sum(0).clamp_min(1)
    elif how == "dare":
        kept = torch.rand(deltas.shape, generator=draw).to(deltas.device) < density
        change = (w * deltas * kept / density).sum(0)
    else:
        change = (w * deltas).sum(0)
    return nearest_of_rank(change, r)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """delta with all but its ⌊density · n⌋ entries of largest size set to zero."""
    flat = delta.flatten()
    largest = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_put((largest,), flat[largest]).view_as(delta)


def nearest_of_rank(delta: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), at most as many as delta (out, in) has, with B A closest to it (Eckart and Young 1936)."""
    U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root
