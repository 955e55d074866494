"""Checks of chapter 4, bottleneck adapters (Houlsby et al. 2019): h' = h + W_up relu(W_down h + b_down) + b_up.

Shapes as in the chapter and in this package: h (batch, tokens, d), W_down (m, d), b_down (m,), W_up (d, m), b_up (d,).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minipeft.checks.frame import Case, Draw, Refused, exercise, relative_error


def _adapter(h, W_down, b_down, W_up, b_up) -> torch.Tensor:
    """The adapter in float64, number by number of the bottleneck: the oracle of every check here. (batch, tokens, d)"""
    h, W_down, b_down, W_up, b_up = (t.detach().double() for t in (h, W_down, b_down, W_up, b_up))
    out = h + b_up
    for k in range(len(W_down)):
        z = (h * W_down[k]).sum(-1) + b_down[k]  # (batch, tokens)
        out = out + (z * (z > 0))[..., None] * W_up[:, k]
    return out


def _weights(draw: Draw, d: int, m: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """W_down, b_down, W_up, b_up, such that f(h) and h are of one size."""
    return (
        draw.normal(m, d, scale=d**-0.5, dtype=dtype),
        draw.normal(m, scale=0.5, dtype=dtype),
        draw.normal(d, m, scale=1.5 * m**-0.5, dtype=dtype),
        draw.normal(d, scale=0.5, dtype=dtype),
    )


def _shapes(draw: Draw) -> Iterator[tuple[int, int, int, int, torch.dtype]]:
    """(batch, tokens, d, m, dtype)"""
    yield 2, 3, 11, 4, torch.float32
    yield 1, 1, 7, 1, torch.float32
    yield 3, 5, 10, 17, torch.float64  # a bottleneck that is none
    yield 4, 4, 4, 4, torch.float64  # everything square
    yield draw.integer(1, 4), draw.integer(1, 9), draw.integer(20, 40), draw.integer(2, 9), torch.float32


@exercise("adapter-forward", points=2)
def adapter_forward(draw: Draw) -> Iterator[Case]:
    """`fn(h, W_down, b_down, W_up, b_up) -> h'`: one bottleneck adapter with ReLU, its skip included.

    h, h' (batch, tokens, d), W_down (m, d), b_down (m,), W_up (d, m), b_up (d,); h' has h's dtype.
    """
    for batch, tokens, d, m, dtype in _shapes(draw):
        h = draw.normal(batch, tokens, d, dtype=dtype)
        given = {"h": h} | dict(zip(("W_down", "b_down", "W_up", "b_up"), _weights(draw, d, m, dtype), strict=True))
        hd, Wd, bd, Wu, bu = (t.double() for t in given.values())
        z, want = hd @ Wd.T + bd, _adapter(*given.values())
        yield Case(
            given=given,
            want=want,
            mistakes={
                "the skip is missing: h is not added": want - hd,
                "the skip is added twice": want + hd,
                "the activation is missing: then two matrices are one, of rank m": hd + z @ Wu.T + bu,
                "the activation stands after W_up, not before it": hd + (z @ Wu.T + bu).relu(),
                "the activation also bends the sum": want.relu(),
                "that is GELU, not ReLU": hd + F.gelu(z) @ Wu.T + bu,
                "b_down is missing": hd + (hd @ Wd.T).relu() @ Wu.T + bu,
                "b_up is missing": want - bu,
                "b_down is added after the activation": hd + ((hd @ Wd.T).relu() + bd) @ Wu.T + bu,
                "W_down and W_up are swapped": lambda h=hd, d=Wd, u=Wu, b=bd, c=bu: h + (h @ u + b).relu() @ d + c,
                "W_down is not transposed": lambda h=hd, d=Wd, u=Wu, b=bd, c=bu: h + (h @ d + b).relu() @ u.T + c,
            },
        )


@exercise("adapter-parameter-count")
def adapter_parameter_count(draw: Draw) -> Iterator[Case]:
    """`fn(d, m, blocks, placement) -> int`: numbers that adapters train in an encoder of so many blocks.

    placement is "houlsby" (after the attention and after the feed-forward) or "pfeiffer" (after the feed-forward).
    """
    for placement in ("houlsby", "pfeiffer", "houlsby", "pfeiffer"):
        d, m, blocks = draw.integer(300, 1000), draw.integer(3, 90), draw.integer(3, 30)
        number = blocks * len({"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",)}[placement])
        one = sum(torch.empty(shape, device="meta").numel() for shape in ((m, d), (m,), (d, m), (d,)))
        yield Case(
            given={"d": d, "m": m, "blocks": blocks, "placement": placement},
            want=number * one,
            mistakes={
                "the biases are missing": number * 2 * m * d,
                "the bias of d numbers is missing": number * (one - d),
                "the bias of m numbers is missing": number * (one - m),
                "only one of the two matrices is counted": number * (one - m * d),
                "both biases are taken as d numbers": number * (one - m + d),
                "one adapter in each block, whatever the placement": blocks * one,
                "two adapters in each block, whatever the placement": 2 * blocks * one,
                "that is one block": number // blocks * one,
                "m and d are added, not multiplied": number * 3 * (m + d),
                "a norm is counted too, which this adapter has not": number * (one + 2 * d),
            },
        )


# ---------------------------------------------------------------------------- where it stands


class _Sublayer(nn.Module):
    """Mixes the tokens of a row, then its numbers: not linear, and no two alike."""

    def __init__(self, draw: Draw, d: int):
        super().__init__()
        self.mix = nn.Parameter(draw.normal(d, d, scale=d**-0.5, dtype=torch.float64))
        self.shift = nn.Parameter(draw.normal(d, dtype=torch.float64))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh((h + 0.5 * h.roll(1, dims=1)) @ self.mix + self.shift)


class _Adapter(nn.Module):
    """A bottleneck adapter with its skip, far from the identity."""

    def __init__(self, draw: Draw, d: int, m: int):
        super().__init__()
        self.weights = nn.ParameterList(_weights(draw, d, m, torch.float64))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        W_down, b_down, W_up, b_up = self.weights
        return y + (y @ W_down.T + b_down).relu() @ W_up.T + b_up


def _norm(draw: Draw, d: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(d, dtype=torch.float64)
    norm.weight.data, norm.bias.data = draw.normal(d, dtype=torch.float64), draw.normal(d, dtype=torch.float64)
    return norm


@exercise("adapted-block", points=2)
def adapted_block(draw: Draw) -> Iterator[Case]:
    """`fn(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2) -> h`: a BERT block with Houlsby's adapters.

    All but h (batch, tokens, d) are modules, to be called with one tensor. Each adapter has its own skip. It acts on
    what its sub-layer returns, before the block's residual is added; the norm comes after the addition.
    """
    for batch, tokens, d, m in ((2, 3, 8, 3), (1, 1, 5, 2), (3, 7, 6, 9), (draw.integer(1, 3), draw.integer(2, 6), draw.integer(9, 14), 4)):
        h = draw.normal(batch, tokens, d, dtype=torch.float64)
        att, ff = _Sublayer(draw, d), _Sublayer(draw, d)
        n1, n2 = _norm(draw, d), _norm(draw, d)
        a1, a2 = _Adapter(draw, d, m), _Adapter(draw, d, m)
        with torch.no_grad():
            y = _adapter(att(h), *a1.weights)
            g = n1(h + y)
            want = n2(g + _adapter(ff(g), *a2.weights))
            bare = n1(h + att(h))
            outside = a1(n1(h + att(h)))
            before_norm = n1(a1(h + att(h)))
            inputs = n1(h + att(a1(h)))
            no_residual = n1(y)
            beside = n1(h + att(h) + a1(h) - h)
            swapped = n1(h + a2(att(h)))
            other_norms = n2(h + y)
            vacuous = {"the block without adapters": n2(bare + ff(bare)), "the first half alone": g}
            mistakes = {
                "the adapters stand after the norm, outside the residual": a2(n2(outside + ff(outside))),
                "the adapters stand after the addition; they belong before it": n2(a2(before_norm + ff(before_norm))),
                "the adapters act on what goes into the sub-layers, not on what comes out": n2(inputs + ff(a2(inputs))),
                "the block's residual is missing": n2(a2(ff(no_residual))),
                "the second residual is h, not what the first half returned": n2(h + a2(ff(g))),
                "the feed-forward gets h, not what the first half returned": n2(g + a2(ff(h))),
                "only the feed-forward has an adapter: that is Pfeiffer's placement": n2(bare + a2(ff(bare))),
                "only the attention has an adapter": n2(g + ff(g)),
                "the adapters stand beside the sub-layers": n2(beside + ff(beside) + a2(beside) - beside),
                "the adapters are swapped": n2(swapped + a1(ff(swapped))),
                "the norms are swapped": n1(other_norms + a2(ff(other_norms))),
                "the norms are missing": h + y + a2(ff(h + y)),
                "the norms act on the sub-layer, before the addition": h + n1(y) + n2(a2(ff(h + n1(y)))),
            }
        modules = {"attention": att, "feed_forward": ff, "norm_1": n1, "norm_2": n2, "adapter_1": a1, "adapter_2": a2}
        yield Case(given={"h": h} | modules, want=want, vacuous=vacuous, mistakes=mistakes)


# ---------------------------------------------------------------------------- find the bug


@exercise("trainable-adapter", points=2)
def trainable_adapter(draw: Draw) -> Iterator[Case]:
    """`fn(d, m, dtype) -> nn.Module`: h -> h + W_up relu(W_down h + b_down) + b_up, with four parameters that train.

    Judged by what `parameters()` lists, by what it computes with other numbers in them, and by a training step.
    """
    for d, m, dtype in ((9, 4, torch.float64), (6, 2, torch.bfloat16), (draw.integer(20, 30), draw.integer(3, 8), torch.float64), (7, 13, torch.float32)):
        h, (W_down, b_down, W_up, b_up) = draw.normal(2, 5, d, dtype=dtype), _weights(draw, d, m, dtype)
        b_down.copy_(-(h @ W_down.T).flatten(0, 1).median(0).values)  # each unit is alive for half of the positions
        weights = {"W_down": W_down, "b_down": b_down, "W_up": W_up, "b_up": b_up}
        y = _adapter(h, *weights.values())
        yield Case(
            given={"d": d, "m": m, "dtype": dtype},
            observe=partial(_after_a_step, h=h, weights=weights),
            test=lambda value, given, h=h, y=y: _adapter_reason(value, h, y),
            vacuous={"the identity": h, "no skip": (y - h.double()).to(dtype), "zeros": torch.zeros_like(h)},
        )


def _after_a_step(returned, after: dict, before: dict, h: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the module computes of h with these weights in its parameters, all of which a training step moves."""
    d, m, dtype = before.values()
    if not isinstance(returned, nn.Module):
        raise Refused(f"it returned a {type(returned).__name__}, expected an nn.Module")
    names = {tuple(t.shape): name for name, t in weights.items()}
    found = sorted(tuple(p.shape) for p in returned.parameters())
    if found != sorted(names):
        loose = [n for mod in returned.modules() for n, t in vars(mod).items() if isinstance(t, torch.Tensor)]
        lost = f"; {', '.join(loose)} are plain tensors, which no optimizer is given: `.to` returns a new tensor" if loose else ""
        raise Refused(f"its parameters have the shapes {found or 'of none'}, expected {sorted(names)}{lost}")
    for name, p in returned.named_parameters():
        if p.dtype != dtype:
            raise Refused(f"the parameter {name!r} is {p.dtype}, expected {dtype}")
        if not p.requires_grad:
            raise Refused(f"the parameter {name!r} does not train: its requires_grad is False")
        if not p.isfinite().all():
            raise Refused(f"the parameter {name!r} holds NaN or infinity")
    module = copy.deepcopy(returned)
    place = {names[tuple(p.shape)]: p for p in module.parameters()}
    with torch.no_grad():
        for name, p in place.items():
            p.copy_(weights[name])
    got = module(h)
    if isinstance(got, torch.Tensor) and got.requires_grad:
        got.float().square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    if still := [name for name, p in place.items() if torch.equal(p.detach(), weights[name])]:
        raise Refused(f"a training step does not move {', '.join(still)}")
    return got.detach()


def _adapter_reason(value, h: torch.Tensor, y: torch.Tensor) -> str | None:
    if type(value) is not torch.Tensor or value.shape != h.shape or value.dtype != h.dtype:
        return f"called with a tensor {tuple(h.shape)} of {h.dtype}, it does not return one of that shape and dtype"
    error = relative_error(value, y)
    if not error < (5e-2 if h.dtype == torch.bfloat16 else 1e-5):
        return f"with other numbers in its parameters it is off by {error:.1e} of the largest right entry"
    return None


# ---------------------------------------------------------------------------- several adapters


@exercise("average-weights")
def average_weights(draw: Draw) -> Iterator[Case]:
    """`fn(states) -> dict`: the mean of several adapters, weight by weight. `states` is a list of dicts name -> tensor."""
    for number, d, m in ((2, 5, 3), (3, 8, 2), (draw.integer(4, 6), draw.integer(4, 9), 1)):
        names = ("0.down.weight", "0.down.bias", "0.up.weight", "0.up.bias")
        states = [{n: w + 3 for n, w in zip(names, _weights(draw, d, m, torch.float32), strict=True)}  # no mean is near 0,
                  for _ in range(number)]                                                              # where rounding shows
        total = {n: torch.stack([s[n].double() for s in states]).sum(0) for n in names}
        yield Case(
            given={"states": states},
            want={n: (t / number).float() for n, t in total.items()},
            vacuous={"the first adapter": states[0], "the last adapter": states[-1]},
            mistakes={
                "that is the sum, not the mean": {n: t.float() for n, t in total.items()},
                "halved, though there are more than two": {n: (t / 2).float() for n, t in total.items()},
                "only the first and the last are averaged": {n: (states[0][n] + states[-1][n]) / 2 for n in names},
                "divided by one too many": {n: (t / (number + 1)).float() for n, t in total.items()},
                "divided by the number of tensors, not of adapters": {n: (t / len(names)).float() for n, t in total.items()},
            },
        )


@exercise("block-passes")
def block_passes(draw: Draw) -> Iterator[Case]:
    """`fn(blocks, dropped, tasks) -> int`: blocks computed to get the answers of all tasks for one input.

    The first `dropped` of the `blocks` have no adapters, so that all tasks share what they compute.
    """
    for _ in range(4):
        blocks, tasks = draw.integer(6, 30), draw.integer(3, 12)
        dropped = draw.integer(2, blocks - 2)
        done = {(None if block < dropped else task, block) for task in range(tasks) for block in range(blocks)}
        yield Case(
            given={"blocks": blocks, "dropped": dropped, "tasks": tasks},
            want=len(done),
            mistakes={
                "nothing is shared": tasks * blocks,
                "the shared blocks are not computed at all; once is needed": tasks * (blocks - dropped),
                "everything is shared": blocks,
                "the shared blocks run for each task, and the others once": tasks * dropped + blocks - dropped,
                "that is what is saved": (tasks - 1) * dropped,
                "the tasks are added, not multiplied": dropped + (blocks - dropped) + tasks,
            },
        )

