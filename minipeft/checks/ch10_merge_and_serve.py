"""Checks of chapter 10: what an adapter costs, merging, several adapters into one, a batch of mixed adapters.

Shapes as in the package: W (out, in), A (r, in), B (out, r), x (rows, tokens, in). TIES is Yadav et al. 2023, section 4.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from minipeft.checks.frame import Case, Draw, Refused, exercise, same_bytes

WAYS = ("LoRA", "LoRA, merged", "adapters")


# ---------------------------------------------------------------------------- what must wait for what


def _graph(stages: list[list[str]], adapted: set[str], way: str) -> tuple[int, int]:
    """(products, longest chain) of a pass, from a graph of products: the oracle."""
    depth, ends = [], [0]  # of each product, and of what the next stage waits for
    for stage in stages:
        waits, ends = max(ends), []
        for name in stage:
            depth.append(waits + 1)  # W x
            end = depth[-1]
            if name in adapted and way == "LoRA":  # A x begins with W x, B (A x) follows it; the sum waits for both
                depth += [waits + 1, waits + 2]
                end = max(end, depth[-1])
            elif name in adapted and way == "adapters":  # down waits for y = W x, up for down
                depth += [end + 1, end + 2]
                end = depth[-1]
            ends.append(end)
    return len(depth), max(depth)


@exercise("products-and-chain", points=2)
def products_and_chain(draw: Draw) -> Iterator[Case]:
    """`fn(stages, adapted, way) -> (products, chain)`: the matrix products of one pass.

    stages   lists of linear layers: those of one list can run at the same time, the next list waits for all of them
    adapted  the layers that have a piece
    way      "LoRA": beside the layer; "LoRA, merged"; "adapters": a bottleneck behind the layer
    chain    how many products the longest sequence has in which each waits for the one before
    """
    llama = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    blocks = [llama, [["qkv"], ["o"], ["up"], ["down"]], [["a", "b"], ["c", "d", "e"]]]
    for way, block in itertools.product(WAYS, blocks):
        times = draw.integer(2, 5)
        stages = [[f"{name}{i}" for name in stage] for i in range(times) for stage in block]
        kinds = sorted({name for stage in block for name in stage})
        some = {name for name in kinds if draw.integer(0, 1)} or {kinds[0]}
        if len(some) == len(kinds):
            some.discard(kinds[-1])
        adapted = {f"{name}{i}" for name in some for i in range(times)}
        products, chain = _graph(stages, adapted, way)
        plain, n = sum(map(len, stages)), len(adapted)
        yield Case(
            given={"stages": stages, "adapted": adapted, "way": way},
            want=(products, chain),
            mistakes={
                "a piece has two products, not one": (plain + n, chain),
                "a piece comes in addition to W, not in its place": (products - n, chain),
                "layers of one list do not wait for each other": (products, products),
                "the chain of the bare model; the pieces lengthen it": (products, len(stages)),
                "every list has an adapted layer here? look which of them have": (products, 2 * len(stages)),
                "only the first block is counted": _graph(stages[: len(block)], adapted, way),
                "both numbers, but in the other order": (chain, products),
            }
            | ({"merged, A and B are gone: nothing is multiplied by them": _graph(stages, adapted, "LoRA")} if way == "LoRA, merged" else {})
            | ({"beside a layer, A x need not wait for W x": (products, _graph(stages, adapted, "adapters")[1])} if way == "LoRA" else {})
            | ({"an adapter waits for the layer that it stands behind": (products, _graph(stages, adapted, "LoRA")[1])} if way == "adapters" else {}),
        )


@exercise("slowdown")
def slowdown(draw: Draw) -> Iterator[Case]:
    """`fn(own, base) -> float`: how many times as long, as the median over the turns of own / base of the same turn."""
    for turns in (5, 7, 4, 2 * draw.integer(4, 8) + 1):
        drift = [1 + 0.8 * k / turns + (3 if k == turns // 2 else 0) for k in range(turns)]  # a machine that slows down
        base = [0.1 * d * draw.uniform(0.95, 1.05) for d in drift]
        own = [b * draw.uniform(1.1, 1.5) for b in base]
        own[draw.integer(0, turns - 1)] *= 4  # somebody else's work fell into this measurement
        ratios = [a / b for a, b in zip(own, base, strict=True)]
        ordered = sorted(ratios)
        right = (ordered[(turns - 1) // 2] + ordered[turns // 2]) / 2
        yield Case(
            given={"own": own, "base": base},
            want=right,
            vacuous={"no slowdown": 1.0},
            mistakes={
                "turned over: that is base / own": statistics.median(b / a for a, b in zip(own, base, strict=True)),
                "the mean of the ratios: one disturbed turn moves it": sum(ratios) / turns,
                "the ratio of the sums: the machine's drift weighs the turns": sum(own) / sum(base),
                "the ratio of the medians, which may come from different turns": statistics.median(own) / statistics.median(base),
                "the ratio of the shortest times, which may come from different turns": min(own) / min(base),
                "the increase, not the ratio": right - 1,
                "in percent": 100 * right,
                "the difference in seconds": statistics.median(a - b for a, b in zip(own, base, strict=True)),
                "the last turn alone": ratios[-1],
                "the best turn": min(ratios),
            },
        )


# ---------------------------------------------------------------------------- find the bug


class _Foldable(nn.Module):
    """A linear layer with LoRA: weight (out, in), A (r, in), B (out, r), s, and `kept`, the weight before a merge."""

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor, s: float):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.A, self.B, self.s = nn.Parameter(A), nn.Parameter(B), s
        self.kept: Tensor | None = None


def _sum_of_products(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W + s B A in float64, as a sum of r outer products: the oracle. (out, in)"""
    total = W.double()
    for k in range(A.shape[0]):
        total = total + s * torch.outer(B[:, k].double(), A[k].double())
    return total


@exercise("merge-switch", points=2)
def merge_switch(draw: Draw) -> Iterator[Case]:
    """`fn(layer, merge)`: afterwards layer.weight is W + s B A, or W to the bit; in place, however often it is called.

    layer.kept is W while the layer is merged, and None otherwise.
    """
    shapes = ((7, 5, 2, torch.float32), (16, 16, 4, torch.bfloat16), (9, draw.integer(10, 30), 3, torch.float32))
    for (d_out, d_in, r, dtype), merged, merge in itertools.product(shapes, (False, True), (True, False)):
        W = draw.normal(d_out, d_in, dtype=dtype)
        A, B, s = draw.normal(r, d_in, scale=d_in**-0.5), draw.normal(d_out, r), draw.uniform(0.4, 0.7)
        layer, folded = _Foldable(W.clone(), A, B, s), _sum_of_products(W, A, B, s)
        if merged:
            layer.kept = W.clone()
            layer.weight.data = folded.to(dtype)
        near = 0.05 if dtype == torch.bfloat16 else 1e-4  # of the update; bfloat16 rounds by about 0.002 of the weight
        right = {"weight": folded if merge else W.double(), "kept": W.double() if merge else None}
        now = layer.weight.detach().double()
        change = folded - W.double()
        yield Case(
            given={"layer": layer, "merge": merge},
            observe=_folded_state,
            test=lambda value, given, right=right, change=change, near=near: _switch_reason(value, right, change, near),
            may_change=("layer",),
            vacuous={"zeros": {"weight": 0 * now, "kept": None}, "a kept weight that is not W": {"weight": right["weight"], "kept": 0 * now}},
            mistakes={
                "as published": {"weight": now + change if merge else now - change, "kept": right["kept"]},
                "nothing is done": {"weight": now, "kept": W.double() if merged else None},
                "the other way round": {"weight": W.double() if merge else folded, "kept": right["kept"]},
                "s is missing": {"weight": W.double() + change / s if merge else W.double(), "kept": right["kept"]},
            },
        )


def _folded_state(returned, after: dict, before: dict) -> dict:
    layer, old = after["layer"], before["layer"]
    if returned is not None:
        raise Refused(f"it returned a {type(returned).__name__}; it works in place and returns nothing")
    if type(getattr(layer, "weight", None)) is not nn.Parameter:
        raise Refused("layer.weight is not the parameter that it was; write into layer.weight.data")
    if layer.weight.dtype != old.weight.dtype or layer.weight.shape != old.weight.shape:
        raise Refused(f"layer.weight is {layer.weight.dtype} {tuple(layer.weight.shape)}, was {old.weight.dtype} {tuple(old.weight.shape)}")
    for name in ("A", "B"):
        if not same_bytes(getattr(layer, name), getattr(old, name)):
            raise Refused(f"it changed layer.{name}: the factors stay as they are")
    kept = layer.kept
    if kept is not None and not isinstance(kept, Tensor):
        raise Refused(f"layer.kept is a {type(kept).__name__}; it is W while the layer is merged, else None")
    if kept is not None and kept.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr():
        raise Refused("layer.kept is the weight itself, not a copy: what changes the weight changes it too")
    if layer.s != old.s:
        raise Refused("it changed layer.s")
    return {"weight": layer.weight.detach().double(), "kept": None if kept is None else kept.detach().double()}


def _switch_reason(value: dict, right: dict, change: Tensor, near: float) -> str | None:
    """The merged weight to rounding, the unmerged one and what is kept to the bit."""
    got, want, merged = value["weight"], right["weight"], right["kept"] is not None
    if not isinstance(got, Tensor) or got.shape != want.shape or not got.is_floating_point():
        return "the weight is no longer a matrix of its shape"
    off, more, less = ((((got - want) + k * change).norm() / change.norm()).item() for k in (0, -1, 1))
    if not math.isfinite(off):
        return "the weight holds NaN or infinity"
    if merged and more < 0.05:
        return "the update is in the weight twice: the layer had been merged already"
    if not merged and less < 0.05:
        return "the update was taken out of a weight that did not hold it: the layer was not merged"
    if off > near:
        return f"the weight is off by {off:.2g} of the update (s B A, merged; nothing of it, unmerged)"
    if not merged and not torch.equal(got, want):
        return "the weight is W only up to rounding: what was added and subtracted does not cancel to the bit, so keep W"
    kept = value["kept"]
    if merged and kept is None:
        return "layer.kept is None although the layer is merged: then nobody can know that it is"
    if merged and not torch.equal(kept, right["kept"]):
        return "layer.kept is not W to the bit"
    if not merged and kept is not None:
        return "layer.kept is still there although the layer is not merged: the next merge would be refused"
    return None


# ---------------------------------------------------------------------------- several adapters into one


@exercise("as-one", points=2)
def as_one(draw: Draw) -> Iterator[Case]:
    """`fn(As, Bs, scales, weights) -> (A, B)`: one LoRA whose product B A is exactly Σ w_i s_i B_i A_i.

    As[i] (r_i, in), Bs[i] (out, r_i); the ranks may differ. A (R, in), B (out, R), R at most Σ r_i.
    """
    for d_out, d_in, ranks in ((23, 19, (2, 3)), (31, 40, (4, 1, 6)), (20, 20, (3, 3)), (draw.integer(30, 40), 29, (1, 5, 2, 4))):
        As = [draw.normal(r, d_in, dtype=torch.float64) for r in ranks]
        Bs = [draw.normal(d_out, r, dtype=torch.float64) for r in ranks]
        scales = [draw.pick([0.3, 0.5, 2.0, 3.0]) * draw.uniform(0.9, 1.1) for _ in ranks]
        weights = [draw.uniform(-0.8, -0.6), *(draw.pick([-0.7, 0.4, 1.6]) * draw.uniform(0.9, 1.1) for _ in ranks[1:])]
        deltas = [_sum_of_products(torch.zeros(d_out, d_in), A, B, s) for A, B, s in zip(As, Bs, scales, strict=True)]

        def total(factors, deltas=deltas):
            return sum(f * d for f, d in zip(factors, deltas, strict=True))

        least = min(ranks)
        crossed = sum(w * s * B[:, :least] for w, s, B in zip(weights, scales, Bs, strict=True)) @ sum(A[:least] for A in As)
        turned = torch.cat([w * s * B for w, s, B in zip(weights, scales, Bs, strict=True)][::-1], dim=1) @ torch.cat(As)
        yield Case(
            given={"As": As, "Bs": Bs, "scales": scales, "weights": weights},
            want=total(weights),
            observe=partial(_product, R=sum(ranks), shape=(d_out, d_in)),
            vacuous={"the first one alone": deltas[0], "the plain sum": total([1.0] * len(ranks))},
            mistakes={
                "the scales s_i are missing": total([w / s for w, s in zip(weights, scales, strict=True)]),
                "the weights w_i are missing": total([1.0] * len(ranks)),
                "w_i s_i is on A_i and on B_i, so it counts twice": total([w * w * s for w, s in zip(weights, scales, strict=True)]),
                "the weights are shared out so that they add up to 1; nobody asked for that": total([w / sum(weights) for w in weights]),
                "A_1 + A_2 and B_1 + B_2: their product also holds B_1 A_2, which nobody has trained": crossed,
                "the A_i and the B_i stand in different orders": turned,
                "the mean, not the sum": total([w / len(ranks) for w in weights]),
            },
        )


def _product(returned, after: dict, before: dict, R: int, shape: tuple[int, int]) -> Tensor:
    """B A, where the factors have the right shapes."""
    if not (isinstance(returned, (tuple, list)) and len(returned) == 2):
        raise Refused(f"it returned a {type(returned).__name__}, expected two tensors, A and B")
    for name, M in zip("AB", returned, strict=True):
        if type(M) not in (Tensor, nn.Parameter) or M.dim() != 2:
            raise Refused(f"{name} is not a matrix")
        if M.dtype != torch.float64:
            raise Refused(f"{name} is {M.dtype}, expected torch.float64, the inputs' own")
    A, B = returned
    if A.shape[1] != shape[1] or B.shape[0] != shape[0] or A.shape[0] != B.shape[1]:
        raise Refused(f"A is {tuple(A.shape)} and B {tuple(B.shape)}; expected (R, {shape[1]}) and ({shape[0]}, R)")
    if A.shape[0] > R:
        raise Refused(f"the rank is {A.shape[0]}; the ranks add up to {R}, and no more is needed")
    return (B @ A).detach()


def _ties(deltas: Tensor, density: float) -> Tensor:
    """Trim, elect, merge, entry after entry in float64: the oracle. (n, out, in) -> (out, in)"""
    n, d_out, d_in = deltas.shape
    trimmed = []
    for one in deltas.double():
        order = sorted(((abs(one[i, j].item()), i, j) for i in range(d_out) for j in range(d_in)), reverse=True)
        kept = torch.zeros_like(one)
        for _, i, j in order[: int(density * d_out * d_in)]:
            kept[i, j] = one[i, j]
        trimmed.append(kept)
    merged = torch.zeros(d_out, d_in, dtype=torch.float64)
    for i in range(d_out):
        for j in range(d_in):
            here = [t[i, j].item() for t in trimmed]
            up, down = sum(v for v in here if v > 0), sum(v for v in here if v < 0)
            winners = [v for v in here if v > 0] if up >= -down else [v for v in here if v < 0]
            merged[i, j] = sum(winners) / len(winners) if winners else 0.0
    return merged


def _trim(deltas: Tensor, density: float, size=torch.abs, largest: bool = True) -> Tensor:
    flat = deltas.flatten(1)
    at = size(flat).topk(int(density * flat.shape[1]), largest=largest).indices
    return torch.zeros_like(flat).scatter(1, at, flat.gather(1, at)).view_as(deltas)


def _mean_of_sign(t: Tensor, elected: Tensor) -> Tensor:
    agree = t.sign() == elected
    return (t * agree).sum(0) / agree.sum(0).clamp_min(1)


@exercise("ties", points=3)
def ties(draw: Draw) -> Iterator[Case]:
    """`fn(deltas, density) -> (out, in)`: TIES of the matrices deltas (n, out, in).

    Trim: of each matrix the ⌊density · out · in⌋ entries of largest size stay, the others become 0. Elect: at each place
    the sign of the sum of what is left. Merge: at each place the mean of the entries that have this sign; 0 without any.
    """
    for n, d_out, d_in, density in ((3, 6, 9, 0.5), (2, 11, 4, 0.3), (5, 8, 8, 0.6), (4, draw.integer(5, 9), 7, draw.uniform(0.35, 0.7))):
        sizes = torch.tensor([draw.uniform(0.5, 2) for _ in range(n)])[:, None, None]  # one adapter changes more than another
        deltas = draw.normal(n, d_out, d_in) * sizes
        t, whole = _trim(deltas, density).double(), deltas.double()
        elected = torch.where(t.sum(0) >= 0, 1.0, -1.0)
        kept = (whole.abs() >= whole.abs().flatten().topk(int(density * whole.numel())).values[-1]) * whole
        yield Case(
            given={"deltas": deltas, "density": density},
            want=_ties(deltas, density),
            vacuous={"the plain mean": whole.mean(0), "the plain sum": whole.sum(0), "the first one alone": whole[0]},
            mistakes={
                "nothing is trimmed": _mean_of_sign(whole, torch.where(whole.sum(0) >= 0, 1.0, -1.0)),
                "the smallest entries are kept": _mean_of_sign(s := _trim(deltas, density, largest=False).double(), s.sum(0).sign()),
                "kept by value, so that large negative entries are lost": _mean_of_sign(s := _trim(deltas, density, size=lambda d: d).double(), s.sum(0).sign()),
                "trimmed all together: each matrix keeps its own share": _mean_of_sign(kept, kept.sum(0).sign()),
                "the share that is dropped, not the share that is kept": _mean_of_sign(s := _trim(deltas, 1 - density).double(), s.sum(0).sign()),
                "no election: the mean of all that is left": t.sum(0) / (t != 0).sum(0).clamp_min(1),
                "the sum, not the mean": (t * (t.sign() == elected)).sum(0),
                "divided by all n, not by those that have the sign": (t * (t.sign() == elected)).sum(0) / n,
                "elected by counting heads: the sum of the entries decides, not of their signs": _mean_of_sign(t, torch.where(t.sign().sum(0) >= 0, 1.0, -1.0)),
                "elected before trimming": _mean_of_sign(t, whole.sum(0).sign()),
                "the mean of the losers": _mean_of_sign(t, -elected),
            },
        )


# ---------------------------------------------------------------------------- a batch of mixed adapters


@exercise("gathered-update", points=3)
def gathered_update(draw: Draw) -> Iterator[Case]:
    """`fn(x, A, B, s, which) -> (rows, tokens, out)`: the update s B A x of each row by the adapter that it asks for.

    x (rows, tokens, in), A (U, r, in), B (U, out, r), s (U,), which (rows,) integers: the adapter of each row, -1 for none.
    """
    plans = (([1, -1, 0, 1], 3, 3, 8, 8, 2), ([0], 5, 2, 7, 9, 3), ([2, 0, -1, 1, 1, -1], 1, 4, 12, 5, 1))
    drawn = [0, -1, *draw.integers(draw.integer(2, 4), 0, 1)], 2, 3, 9, draw.integer(10, 20), 4
    for which, tokens, U, d_in, d_out, r in (*plans, drawn):  # nobody asks for the last adapter, which -1 means to an index
        rows = len(which)
        x, A, B = draw.normal(rows, tokens, d_in), draw.normal(U, r, d_in, scale=d_in**-0.5), draw.normal(U, d_out, r)
        s = torch.tensor([draw.pick([0.3, 0.5, 2.0, 3.0]) * draw.uniform(0.9, 1.1) for _ in range(U)])
        deltas = [_sum_of_products(torch.zeros(d_out, d_in), A[u], B[u], s[u].item()) for u in range(U)]

        def updates(of, x=x, deltas=deltas):
            """Row i by the matrix of(i), None for zeros."""
            zero = torch.zeros_like(deltas[0])
            return torch.stack([row.double() @ (zero if of(i) is None else of(i)).T for i, row in enumerate(x)])

        yield Case(
            given={"x": x, "A": A, "B": B, "s": s, "which": torch.tensor(which)},
            want=updates(lambda i, w=which, d=deltas: None if w[i] < 0 else d[w[i]]),
            mistakes={
                "to an index, -1 is the last adapter": updates(lambda i, w=which, d=deltas: d[w[i]]),
                "-1 was taken as adapter 0": updates(lambda i, w=which, d=deltas: d[max(w[i], 0)]),
                "row i got adapter i; `which` says which": updates(lambda i, d=deltas: d[i % len(d)]),
                "all rows got the first row's adapter": updates(lambda i, w=which, d=deltas: None if w[i] < 0 else d[w[0]]),
                "all rows got the mean of the adapters": updates(lambda i, w=which, d=deltas: None if w[i] < 0 else sum(d) / len(d)),
                "the scales are missing": updates(lambda i, w=which, d=deltas, s=s: None if w[i] < 0 else d[w[i]] / s[w[i]].double()),
                "the scale of the row's number, not of its adapter": updates(
                    lambda i, w=which, d=deltas, s=s: None if w[i] < 0 else d[w[i]] / s[w[i]].double() * s[i % len(s)].double()),
                "the rows came back in another order": updates(lambda i, w=which, d=deltas: None if w[i] < 0 else d[w[i]]).flip(0),
                "A and B are swapped": lambda x=x, A=A, B=B, s=s, w=which: torch.stack(
                    [row @ (s[k] * B[k] @ A[k]) * (k >= 0) for row, k in zip(x, w, strict=True)]).double(),
            },
        )
