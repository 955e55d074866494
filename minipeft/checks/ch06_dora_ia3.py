"""Checks of chapter 6: DoRA (Liu et al. 2024, equation 5), (IA)³ (Liu et al. 2022, section 3.3), PiSSA.

Shapes as in this package: W (out, in), A (r, in), B (out, r), m (out,), x (batch, tokens, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from minipeft.checks.ch05_lora import _delta, _layer, _shapes
from minipeft.checks.frame import Case, Draw, Refused, exercise


def _rows_of_length(V: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """The rows of V, each stretched to the length in m, row by row in float64: the oracle for DoRA. (out, in)"""
    rows = [length * row / math.sqrt(sum(number * number for number in row.tolist())) for row, length in zip(V, m)]
    return torch.stack(rows)


def _dora_layer(draw: Draw, d_in: int, d_out: int, r: int, dtype: torch.dtype) -> tuple:
    """W, A, B, m and alpha; m far from ‖W‖ and from ‖W + ΔW‖, and of another length in each row."""
    W, A, B, alpha = _layer(draw, d_in, d_out, r, dtype)
    V = W.double() + _delta(A, B, alpha / r)
    factors = [draw.uniform(0.3, 0.6) if draw.integer(0, 1) else draw.uniform(1.7, 2.8) for _ in range(d_out)]
    return W, A, B, (V.norm(dim=1) * torch.tensor(factors, dtype=torch.float64)).to(dtype), alpha


@exercise("dora-weight")
def dora_weight(draw: Draw) -> Iterator[Case]:
    """`fn(W, A, B, m, alpha, rank) -> W'`: the weight of DoRA.

    V = W + (alpha / rank) B A;  row i of W' is row i of V, stretched to the length m[i].
    """
    for _, _, d_in, d_out, r, dtype in _shapes(draw):
        W, A, B, m, alpha = _dora_layer(draw, d_in, d_out, r, dtype)
        Wd, Ad, Bd, md, s = W.double(), A.double(), B.double(), m.double()[:, None], alpha / r
        V, unscaled, long = Wd + s * Bd @ Ad, Wd + Bd @ Ad, Wd + alpha * Bd @ Ad
        yield Case(
            given={"W": W, "A": A, "B": B, "m": m, "alpha": alpha, "rank": r},
            want=_rows_of_length(Wd + _delta(A, B, s), m.double()),
            vacuous={"LoRA's weight": V, "directions only": V / V.norm(dim=1, keepdim=True)},
            mistakes={
                "the lengths are taken down the columns, one an input; DoRA has one an output, a row of W (out, in)":
                    md * V / V.norm(dim=0),
                "divided by the length of W, not of V = W + s B A": md * V / Wd.norm(dim=1, keepdim=True),
                "one length for the whole matrix instead of one a row": md * V / V.norm(),
                "not divided by the length of V": md * V,
                "divided by the squared length": md * V / V.square().sum(1, keepdim=True),
                "m is missing: every row has length 1": V / V.norm(dim=1, keepdim=True),
                "the direction is W's, and the update is added afterwards": md * Wd / Wd.norm(dim=1, keepdim=True) + s * Bd @ Ad,
                "the scale alpha / rank is missing": md * unscaled / unscaled.norm(dim=1, keepdim=True),
                "scaled by alpha, not by alpha / rank": md * long / long.norm(dim=1, keepdim=True),
                "m is multiplied along the columns": lambda V=V, md=md: V / V.norm(dim=1, keepdim=True) * md.T,
            },
        )


@exercise("dora-forward", points=2)
def dora_forward(draw: Draw) -> Iterator[Case]:
    """`fn(x, W, b, A, B, m, alpha, rank) -> y`: a linear layer with DoRA, b its frozen bias.

    y = x W'ᵀ + b with W' = m V / ‖V‖. In the backward pass ‖V‖ counts as a constant (section 4.3).
    Judged by y and by the gradients of A, B and m for a random gradient of y.
    """
    for batch, tokens, d_in, d_out, r, dtype in _shapes(draw):
        W, A, B, m, alpha = _dora_layer(draw, d_in, d_out, r, dtype)
        x, b = draw.normal(batch, tokens, d_in, dtype=dtype), draw.normal(d_out, dtype=dtype)
        g = draw.normal(batch, tokens, d_out, dtype=dtype)       # ∂loss/∂y
        given = {"x": x, "W": W, "b": b} | {name: t.clone().requires_grad_() for name, t in
                                            {"A": A, "B": B, "m": m}.items()} | {"alpha": alpha, "rank": r}
        yield Case(
            given=given,
            want=_dora_by_hand(x, W, b, A, B, m, alpha / r, g),
            observe=partial(_with_gradients, g=g),
            vacuous={"LoRA": _differentiated(given, g, lambda x, W, b, V, m: x @ V.T + b + 0 * m)},
            mistakes={
                name: lambda wrong=wrong, given=given, g=g: _differentiated(given, g, wrong)
                for name, wrong in {
                    "the gradient also goes through ‖V‖, which section 4.3 holds fixed":
                        lambda x, W, b, V, m: x @ (m / V.norm(dim=1) * V.T) + b,
                    "the bias is scaled too; DoRA changes the weight alone":
                        lambda x, W, b, V, m: m / V.norm(dim=1).detach() * (x @ V.T + b),
                    "the bias is missing": lambda x, W, b, V, m: x @ (m / V.norm(dim=1).detach() * V.T),
                    "divided by the length of W, not of V": lambda x, W, b, V, m: x @ (m / W.norm(dim=1) * V.T) + b,
                    "the lengths are taken down the columns":
                        lambda x, W, b, V, m: x @ (m * V.T / V.norm(dim=0)[:, None].detach()) + b,
                    "all of m / ‖V‖ is held fixed: then m never learns":
                        lambda x, W, b, V, m: x @ ((m / V.norm(dim=1)).detach() * V.T) + b + 0 * m,
                    "V itself is held fixed: then A and B never learn":
                        lambda x, W, b, V, m: x @ (m / V.norm(dim=1).detach() * V.detach().T) + b + 0 * V.sum(),
                }.items()
            },
        )


def _dora_by_hand(x, W, b, A, B, m, s: float, g) -> dict[str, torch.Tensor]:
    """y and the gradients in float64, from the formulas: with c = m / ‖V‖ held fixed, ∂L/∂V = c gᵀ x."""
    x, W, b, A, B, m, g = (t.detach().double() for t in (x, W, b, A, B, m, g))
    V = W + _delta(A, B, s)
    length = V.square().sum(1).sqrt()                            # (out,)
    Vx = torch.einsum("bti,oi->bto", x, V)
    grad_V = torch.einsum("bto,bti->oi", g * (m / length), x)    # (out, in)
    return {"y": torch.einsum("bti,oi->bto", x, _rows_of_length(V, m)) + b, "gradient of A": s * B.T @ grad_V,
            "gradient of B": s * grad_V @ A.T, "gradient of m": (g * Vx / length).sum((0, 1))}


def _differentiated(given: dict, g: torch.Tensor, formula) -> dict[str, torch.Tensor]:
    """y and gradients of formula(x, W, b, V, m) by autograd in float64."""
    x, W, b, A, B, m = (given[name].detach().double() for name in ("x", "W", "b", "A", "B", "m"))
    A, B, m = A.requires_grad_(), B.requires_grad_(), m.requires_grad_()
    y = formula(x, W, b, W + given["alpha"] / given["rank"] * B @ A, m)
    return _named(y.detach(), torch.autograd.grad(y, (A, B, m), g.double()))


def _named(y, gradients) -> dict[str, torch.Tensor]:
    return {"y": y} | {f"gradient of {name}": grad for name, grad in zip("ABm", gradients, strict=True)}


def _with_gradients(returned, after: dict, before: dict, g: torch.Tensor) -> dict[str, torch.Tensor]:
    if type(returned) is not torch.Tensor:
        raise Refused(f"it returned a {type(returned).__name__}, expected a tensor y of shape {tuple(g.shape)}")
    if returned.shape != g.shape or returned.dtype != g.dtype:
        raise Refused(f"y is {tuple(returned.shape)} of {returned.dtype}, expected {tuple(g.shape)} of {g.dtype}")
    learn = [after[name] for name in ("A", "B", "m")]
    if not returned.requires_grad:
        raise Refused("y has no gradient at all, so nothing would learn: only ‖V‖ is held fixed, with .detach()")
    gradients = torch.autograd.grad(returned, learn, g, allow_unused=True)
    return _named(returned.detach(), [torch.zeros_like(p) if grad is None else grad
                                      for p, grad in zip(learn, gradients, strict=True)])


# ---------------------------------------------------------------------------- (IA)³


def _vector(draw: Draw, n: int, dtype: torch.dtype) -> torch.Tensor:
    """A vector l of (IA)³, far from 1, some of its entries negative."""
    l = 1 + 1.2 * draw.normal(n, dtype=torch.float64)
    l[draw.integer(0, n - 1)] = -draw.uniform(0.7, 1.8)
    return l.to(dtype)


@exercise("ia3-block", points=2)
def ia3_block(draw: Draw) -> Iterator[Case]:
    """`fn(x, W, l) -> (attended, fed)`: one attention head and one feed-forward with (IA)³.

    x (batch, tokens, d);  W a dict of weights: "q", "k" (d_k, d), "v" (d_v, d), "up" (inner, d), "down" (d, inner);
    l a dict of vectors: "k" (d_k,), "v" (d_v,), "ff" (inner,).
    attended = softmax(q (l_k ∘ k)ᵀ / √d_k) (l_v ∘ v), softmax over the keys: (batch, tokens, d_v)
    fed = W_down (l_ff ∘ relu(W_up x)): (batch, tokens, d)
    """
    sizes = [(2, 5, 7, 7, 7, 7), (1, 4, 6, 3, 8, 11), (3, 2, 9, 4, 4, 5),
             (draw.integer(1, 3), draw.integer(3, 8), draw.integer(8, 14), draw.integer(3, 7), 9, draw.integer(15, 22))]
    for number, (batch, tokens, d, d_k, d_v, inner) in enumerate(sizes):
        dtype = torch.float64 if number == 2 else torch.float32
        x = draw.normal(batch, tokens, d, dtype=dtype)
        shapes = {"q": (d_k, d), "k": (d_k, d), "v": (d_v, d), "up": (inner, d), "down": (d, inner)}
        W = {name: draw.normal(*shape, scale=1.5 * shape[1] ** -0.5, dtype=dtype) for name, shape in shapes.items()}
        l = {"k": _vector(draw, d_k, dtype), "v": _vector(draw, d_v, dtype), "ff": _vector(draw, inner, dtype)}
        xd, Wd, ld = x.double(), {k: t.double() for k, t in W.items()}, {k: t.double() for k, t in l.items()}
        one = {name: torch.ones_like(t) for name, t in ld.items()}
        attended, fed = _attended(xd, Wd, ld), _fed(xd, Wd, ld)
        yield Case(
            given={"x": x, "W": W, "l": l},
            want=(attended, fed),
            vacuous={
                "the frozen block's output": (_attended(xd, Wd, one), _fed(xd, Wd, one)),
                "the right attention and a frozen feed-forward": (attended, _fed(xd, Wd, one)),
            },
            mistakes={
                "l_k is missing": (_attended(xd, Wd, ld | {"k": one["k"]}), fed),
                "l_v is missing": (_attended(xd, Wd, ld | {"v": one["v"]}), fed),
                "l_k and l_v are swapped":
                    lambda xd=xd, Wd=Wd, ld=ld, fed=fed: (_attended(xd, Wd, {"k": ld["v"], "v": ld["k"]}), fed),
                "l_ff multiplies before the activation, not after it":
                    (attended, torch.relu(xd @ Wd["up"].T * ld["ff"]) @ Wd["down"].T),
                "l_ff multiplies what comes out of W_down, not what goes in":
                    lambda xd=xd, Wd=Wd, ld=ld, at=attended: (at, _fed(xd, Wd, {"ff": torch.ones_like(ld["ff"])}) * ld["ff"]),
                "the activation is missing": (attended, (xd @ Wd["up"].T * ld["ff"]) @ Wd["down"].T),
                "the vectors are added, not multiplied": (attended, (torch.relu(xd @ Wd["up"].T) + ld["ff"]) @ Wd["down"].T),
                "the scores are not divided by √d_k": (_attended(xd, Wd, ld, root=1.0), fed),
                "divided by √d, the width of x, and not by √d_k": (_attended(xd, Wd, ld, root=math.sqrt(d)), fed),
            },
        )


def _attended(x, W: dict, l: dict, root: float | None = None) -> torch.Tensor:
    """softmax(q (l_k ∘ k)ᵀ / √d_k) (l_v ∘ v), query by query. (batch, tokens, d_v)"""
    q, k, v = x @ W["q"].T, x @ W["k"].T @ torch.diag(l["k"]), x @ W["v"].T @ torch.diag(l["v"])
    root = math.sqrt(q.shape[-1]) if root is None else root
    rows = []
    for example in range(len(x)):
        for query in q[example]:
            weights = ((k[example] @ query) / root).exp()
            rows.append((weights / weights.sum()) @ v[example])
    return torch.stack(rows).reshape(*x.shape[:2], -1)


def _fed(x, W: dict, l: dict) -> torch.Tensor:
    """W_down diag(l_ff) relu(W_up x). (batch, tokens, d)"""
    return (x @ W["up"].T).clamp_min(0) @ torch.diag(l["ff"]) @ W["down"].T


@exercise("ia3-parameter-count")
def ia3_parameter_count(draw: Draw) -> Iterator[Case]:
    """`fn(layers, hidden, heads, kv_heads, inner) -> int`: numbers that (IA)³ trains in a decoder.

    Keys and values have kv_heads heads, each as wide as a query head, hidden / heads.
    """
    drawn = [(layers, heads * width, heads, kv, inner)
             for layers, heads, kv, width, inner in (
                 (draw.integer(2, 40), 12, draw.pick([2, 3, 4]), 2 * draw.integer(8, 40), draw.integer(900, 4000)),
                 (draw.integer(2, 40), 9, 3, 64, 1536), (1, 4, 1, 17, 333), (draw.integer(2, 9), 6, 6, 32, 700))]
    for layers, hidden, heads, kv_heads, inner in drawn:
        width, kv = hidden // heads, hidden // heads * kv_heads
        block = [torch.empty(kv_heads, width, device="meta"), torch.empty(kv_heads, width, device="meta"),
                 torch.empty(inner, device="meta")]
        yield Case(
            given={"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "inner": inner},
            want=layers * sum(vector.numel() for vector in block),
            mistakes={
                "keys and values are taken as wide as the model; with fewer key/value heads they are narrower":
                    layers * (2 * hidden + inner),
                "one of keys and values is missing": layers * (kv + inner),
                "the feed-forward is missing": layers * 2 * kv,
                "queries get no vector": layers * (hidden + 2 * kv + inner),
                "l_ff is as wide as the inner activation, not as the model": layers * (2 * kv + hidden),
                "the layers are missing": 2 * kv + inner,
                "whole heads are counted, not their width": layers * (2 * kv_heads + inner),
                "up and gate have no vector each: it is one, for what goes into down": layers * (2 * kv + 2 * inner),
                "whole matrices are counted, not vectors": layers * (2 * kv * hidden + hidden * inner),
            },
        )


@exercise("ia3-merge", points=2)
def ia3_merge(draw: Draw) -> Iterator[Case]:
    """`fn(W, b, l, feed_forward) -> (W', b')`: the layer that does the same without (IA)³.

    feed_forward False, keys and values: y = l ∘ (x Wᵀ + b). True, the last linear: y = (l ∘ x) Wᵀ + b.
    """
    for d_out, d_in, feed_forward, dtype in ((6, 6, False, torch.float32), (6, 6, True, torch.float32), (5, 9, False, torch.float32),
                                             (draw.integer(10, 19), 7, True, torch.float64), (1, 8, False, torch.float64)):
        W, b = draw.normal(d_out, d_in, dtype=dtype), draw.normal(d_out, dtype=dtype)
        l = _vector(draw, d_in if feed_forward else d_out, dtype)
        Wd, bd, ld = W.double(), b.double(), l.double()
        rows, columns = lambda Wd=Wd, ld=ld: ld[:, None] * Wd, lambda Wd=Wd, ld=ld: Wd * ld
        want = (Wd @ torch.diag(ld), bd) if feed_forward else (torch.diag(ld) @ Wd, torch.diag(ld) @ bd)
        wrong = {
            "the bias is not rescaled, but what goes out of keys and values is rescaled whole": (want[0], bd),
            "the bias of the last linear is rescaled; there only what goes in is": lambda w=want[0], b=bd, l=ld: (w, l * b),
            "rows and columns of W are confused: l stands on the side on which it acts":
                lambda w=rows if feed_forward else columns, b=want[1]: (w(), b),
            "l is added, not multiplied": (Wd + (ld if feed_forward else ld[:, None]), want[1]),
            "divided by l: that unmerges": (Wd / (ld if feed_forward else ld[:, None]), bd if feed_forward else bd / ld),
        }
        yield Case(given={"W": W, "b": b, "l": l, "feed_forward": feed_forward}, want=want,
                   vacuous={"the frozen layer": (Wd, bd)}, mistakes=wrong)


# ---------------------------------------------------------------------------- PiSSA


@exercise("pissa-as-lora", points=2)
def pissa_as_lora(draw: Draw) -> Iterator[Case]:
    """`fn(A, B, A0, B0, alpha, rank) -> (A', B', alpha')`: a trained PiSSA as a plain LoRA of rank 2 · rank.

    PiSSA's update is s (B A - B0 A0) with s = alpha / rank. The plain LoRA's is alpha' / (2 rank) B' A', with
    A' (2 rank, in) and B' (out, 2 rank).
    """
    for _, _, d_in, d_out, r, dtype in _shapes(draw):
        _, A, B, alpha = _layer(draw, d_in, d_out, r, dtype)
        A0, B0 = draw.normal(r, d_in, scale=d_in**-0.5, dtype=dtype), draw.normal(d_out, r, scale=r**-0.5 * r / alpha, dtype=dtype)
        s, now, start = alpha / r, _delta(A, B, alpha / r), _delta(A0, B0, alpha / r)
        crossed = s * ((B.double() - B0.double()) @ (A.double() - A0.double()))
        yield Case(
            given={"A": A, "B": B, "A0": A0, "B0": B0, "alpha": alpha, "rank": r},
            want=now - start,
            observe=_plain_delta,
            vacuous={"the trained part alone": now, "the start alone": -start},
            mistakes={
                "the start is added, not subtracted": now + start,
                "alpha stayed the same, so with twice the rank the scale is halved": (now - start) / 2,
                "the sign is turned in both A and B, so it cancels; or the start comes first": start - now,
                "B - B0 and A - A0: a product of differences is no difference of products": crossed,
            },
        )


def _plain_delta(returned, after: dict, before: dict) -> torch.Tensor:
    """alpha' / (2 r) B' A' in float64, given back in A's dtype. (out, in)"""
    A, B, r = before["A"], before["B"], before["rank"]
    if not (isinstance(returned, (tuple, list)) and len(returned) == 3):
        raise Refused(f"it returned a {type(returned).__name__}, expected three things: A', B' and alpha'")
    for name, got, shape in (("A'", returned[0], (2 * r, A.shape[1])), ("B'", returned[1], (B.shape[0], 2 * r))):
        if type(got) is not torch.Tensor:
            raise Refused(f"{name} is a {type(got).__name__}, expected a tensor of shape {shape}")
        if tuple(got.shape) != shape:
            raise Refused(f"{name} has shape {tuple(got.shape)}, expected {shape}")
        if got.dtype != A.dtype:
            raise Refused(f"{name} is {got.dtype}, expected {A.dtype}, as A and B are")
    alpha = returned[2]
    if isinstance(alpha, (bool, torch.Tensor)) or not isinstance(alpha, (int, float)):
        raise Refused(f"alpha' is a {type(alpha).__name__}, expected a number")
    product = returned[1].detach().double() @ returned[0].detach().double()
    return (float(alpha) / (2 * r) * product).to(A.dtype)
