"""Checks of chapter 3, prefix tuning (Li & Liang 2021, section 4.2): attention(q, [P_K; K], [P_V; V]) in every layer.

Shapes: q (B, H, T, d) of H query heads; K, V (B, G, T, d) of G key/value heads, H a multiple of G, query head h
reading key/value head h // (H / G); P_K, P_V (G, n, d), the same for every row of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minipeft.checks.frame import Case, Draw, exercise


# ---------------------------------------------------------------------------- attention with a prefix


def _attended(q: Tensor, K: Tensor, V: Tensor, P_K: Tensor, P_V: Tensor) -> Tensor:
    """The oracle: one query at a time, in float64. (B, H, T, d)"""
    B, H, T, d = q.shape
    share = H // K.shape[1]
    out = torch.zeros(B, H, T, d, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // share
            for t in range(T):
                keys = torch.cat([P_K[g], K[b, g, : t + 1]]).double()
                values = torch.cat([P_V[g], V[b, g, : t + 1]]).double()
                weights = (keys @ q[b, h, t].double() / math.sqrt(d)).exp()
                out[b, h, t] = (weights / weights.sum()) @ values
    return out


def _softmax(q, K, V, see, scale) -> Tensor:
    """softmax(scale q Kᵀ where `see`) V, with keys and values given for each query head."""
    scores = (scale * q @ K.mT).masked_fill(~see, -math.inf)
    return scores.softmax(-1) @ V


@exercise("prefix-attention", points=2)
def prefix_attention(draw: Draw) -> Iterator[Case]:
    """`fn(q, K, V, P_K, P_V) -> y`: causal attention over a prefix and the tokens.

    Query t sees every prefix position, and the tokens 0 … t. q (B, H, T, d), K and V (B, G, T, d),
    P_K and P_V (G, n, d), y (B, H, T, d), of q's dtype.
    """
    for B, H, G, T, d, n, dtype in (
        (2, 4, 2, 5, 3, 3, torch.float32),
        (1, 3, 3, 1, 7, 2, torch.float32),
        (1, 6, 3, 7, 4, 1, torch.float64),
        (3, 6, 2, 4, 5, draw.integer(5, 9), torch.float32),
    ):
        q, K, V = (draw.normal(B, heads, T, d, dtype=dtype) for heads in (H, G, G))
        P_K, P_V = (draw.normal(G, n, d, dtype=dtype) for _ in "KV")
        qd, Kd, Vd, Pk, Pv = (t.double() for t in (q, K, V, P_K, P_V))
        scale, tokens = d**-0.5, torch.ones(T, T, dtype=torch.bool).tril()
        ahead, corner = (torch.ones(T, n + T, dtype=torch.bool).tril(k) for k in (n, 0))

        def joined(P, X, G=G, H=H, turn=False):
            X = torch.cat([P.expand(len(X), -1, -1, -1), X], dim=2)                 # (B, G, n + T, d)
            return X.repeat(1, H // G, 1, 1) if turn else X.repeat_interleave(H // G, 1)

        keys, values = joined(Pk, Kd), joined(Pv, Vd)
        base = _softmax(qd, keys[:, :, n:], values[:, :, n:], tokens, scale)
        alone = _softmax(qd, keys[:, :, :n], values[:, :, :n], torch.ones(T, n, dtype=torch.bool), scale)
        yield Case(
            given={"q": q, "K": K, "V": V, "P_K": P_K, "P_V": P_V},
            want=_attended(q, K, V, P_K, P_V),
            vacuous={"attention without the prefix": base, "attention over the prefix alone": alone},
            mistakes={
                "the causal mask starts in the top left corner: query t sees the first t + 1 positions, "
                "and those are the prefix": _softmax(qd, keys, values, corner, scale),
                "no causal mask: queries see later tokens": _softmax(qd, keys, values, torch.ones_like(ahead), scale),
                "not divided by √d": _softmax(qd, keys, values, ahead, 1.0),
                "divided by d, not by √d": _softmax(qd, keys, values, ahead, 1 / d),
                "two softmaxes, added: the prefix must share one softmax with the tokens": base + alone,
                "P_K and P_V are swapped": _softmax(qd, joined(Pv, Kd), joined(Pk, Vd), ahead, scale),
                "query head h reads key/value head h mod G; it is h // (H / G)": _softmax(
                    qd, joined(Pk, Kd, turn=True), joined(Pv, Vd, turn=True), ahead, scale),
            },
        )


@exercise("prefix-share")
def prefix_share(draw: Draw) -> Iterator[Case]:
    """`fn(q, K, P_K) -> λ`: how much of each query's attention goes to the prefix, between 0 and 1.

    One head, every token visible. q (T, d), K (S, d), P_K (n, d), λ (T,), of q's dtype.
    """
    for T, S, d, n, dtype in ((3, 5, 4, 2, torch.float32), (1, 3, 7, 1, torch.float32), (6, 2, 3, 5, torch.float64),
                              (4, draw.integer(6, 12), 5, 3, torch.float32)):
        q, K, P_K = draw.normal(T, d, dtype=dtype), draw.normal(S, d, dtype=dtype), draw.normal(n, d, dtype=dtype)
        want = torch.zeros(T, dtype=torch.float64)
        for t in range(T):
            front = sum(math.exp(float(q[t].double() @ k.double()) / math.sqrt(d)) for k in P_K)
            rest = sum(math.exp(float(q[t].double() @ k.double()) / math.sqrt(d)) for k in K)
            want[t] = front / (front + rest)

        def share(scale, q=q, K=K, P_K=P_K, n=n):
            return (scale * q.double() @ torch.cat([P_K, K]).double().T).softmax(-1)[:, :n]

        yield Case(
            given={"q": q, "K": K, "P_K": P_K},
            want=want,
            vacuous={"ones": torch.ones(T), "the prefix's share of the positions": torch.full((T,), n / (n + S))},
            mistakes={
                "that is the tokens' share, 1 - λ": 1 - want,
                "not divided by √d": share(1.0).sum(-1),
                "divided by d, not by √d": share(1 / d).sum(-1),
                "the prefix's weights are averaged, not summed": share(d**-0.5).mean(-1),
                "only the largest weight of the prefix": share(d**-0.5).amax(-1),
                "the weight relative to the tokens': it can exceed 1": want / (1 - want),
                "only the first prefix position": share(d**-0.5)[:, 0],
            },
        )


# ---------------------------------------------------------------------------- what is trained


@exercise("prefix-parameter-count")
def prefix_parameter_count(draw: Draw) -> Iterator[Case]:
    """`fn(layers, heads, kv_heads, head_dim, length) -> int`: numbers trained, without the network.

    In each layer P_K and P_V, each (kv_heads, length, head_dim).
    """
    for layers, G, share in ((2, 3, 3), (5, 2, 4), (1, 7, 1), (draw.integer(3, 9), draw.integer(2, 5), 2)):
        d, n = draw.integer(3, 90), draw.integer(2, 60)
        H, count = G * share, 0
        for _ in range(layers):
            for _ in "KV":
                count += torch.empty(G, n, d, device="meta").numel()
        yield Case(
            given={"layers": layers, "heads": H, "kv_heads": G, "head_dim": d, "length": n},
            want=count,
            mistakes={
                "counted with the query heads: keys and values have fewer heads than queries here": 2 * layers * n * H * d,
                "only one of keys and values is counted": layers * n * G * d,
                "that is one layer": 2 * n * G * d,
                "the length is missing": 2 * layers * G * d,
                "that is a soft prompt, length × width of the model": n * H * d,
                "queries are counted too: they get no prefix": layers * n * (2 * G + H) * d,
                "the heads are missing": 2 * layers * n * d,
            },
        )


@exercise("prefix-of-a-prompt")
def prefix_of_a_prompt(draw: Draw) -> Iterator[Case]:
    """`fn(h, W_K, W_V, kv_heads) -> (P_K, P_V)`: what a layer makes of n prompt positions.

    h (n, width) goes into the layer's attention; W_K and W_V (kv_heads · d, width), no biases, no rotation.
    P_K and P_V (kv_heads, n, d): head g has the outputs g d … g d + d - 1.
    """
    for n, G, d, width, dtype in ((3, 2, 4, 8, torch.float32), (1, 3, 5, 11, torch.float32), (5, 2, 3, 7, torch.float64),
                                  (4, 1, 6, draw.integer(12, 20), torch.float32)):
        h = draw.normal(n, width, dtype=dtype)
        W_K, W_V = (draw.normal(G * d, width, scale=width**-0.5, dtype=dtype) for _ in "KV")
        want = tuple(torch.stack([h.double() @ W[g * d : g * d + d].double().T for g in range(G)]) for W in (W_K, W_V))
        flat = [h.double() @ W.double().T for W in (W_K, W_V)]                      # (n, G d)
        yield Case(
            given={"h": h, "W_K": W_K, "W_V": W_V, "kv_heads": G},
            want=want,
            mistakes={
                "keys and values are swapped": want[::-1],
                "cut as (heads, n, d) at once: that mixes positions; cut (n, heads, d), then swap the first two":
                    tuple(x.reshape(G, n, d) for x in flat),
                "the heads' outputs are interleaved": tuple(x.view(n, d, G).permute(2, 0, 1) for x in flat),
                "W_K is used for both": (want[0], want[0]),
                "W_V is used for both": (want[1], want[1]),
                "W is not transposed": lambda h=h, W_K=W_K, W_V=W_V, n=n, G=G, d=d: tuple(
                    (h.double() @ W.double()).view(n, G, d).transpose(0, 1) for W in (W_K, W_V)),
            },
        )


@exercise("fold-prefix")
def fold_prefix(draw: Draw) -> Iterator[Case]:
    """`fn(E, W, b, W_l, b_l, kv_heads) -> (P_K, P_V)`: the network's prefix for one layer.

    x = W_l tanh(W e + b) + b_l for each row e of E (n, D); W (hidden, D), W_l (2 G d, hidden). The first G d
    outputs are the keys, the rest the values; within each, head by head. P_K and P_V (kv_heads, n, d).
    """
    for n, G, d, hidden, dtype in ((3, 2, 4, 5, torch.float32), (1, 3, 2, 9, torch.float32), (4, 2, 5, 3, torch.float64),
                                   (5, 1, 6, draw.integer(7, 14), torch.float32)):
        D = G * d
        E, W, b = draw.normal(n, D, dtype=dtype), draw.normal(hidden, D, dtype=dtype), draw.normal(hidden, dtype=dtype)
        W_l, b_l = draw.normal(2 * D, hidden, dtype=dtype), draw.normal(2 * D, dtype=dtype)
        e, w, c, w_l, c_l = (t.double() for t in (E, W, b, W_l, b_l))
        want = tuple(torch.zeros(G, n, d, dtype=torch.float64) for _ in "KV")
        for i in range(n):
            row = w_l @ torch.tanh(w @ e[i] + c) + c_l
            for part in (0, 1):
                for g in range(G):
                    start = part * D + g * d
                    want[part][g, i] = row[start : start + d]

        def cut(x, n=n, G=G, d=d):                                                  # (n, 2 G d) -> two of (G, n, d)
            return tuple(x.view(n, 2, G, d).permute(1, 2, 0, 3))

        linear = (e @ w.T + c) @ w_l.T + c_l
        right = torch.tanh(e @ w.T + c) @ w_l.T + c_l
        yield Case(
            given={"E": E, "W": W, "b": b, "W_l": W_l, "b_l": b_l, "kv_heads": G},
            want=want,
            mistakes={
                "keys and values are swapped": want[::-1],
                "the tanh is missing": cut(linear),
                "the tanh comes last, not between the two layers": cut(torch.tanh(linear)),
                "the first bias is missing": cut(torch.tanh(e @ w.T) @ w_l.T + c_l),
                "the second bias is missing": cut(torch.tanh(e @ w.T + c) @ w_l.T),
                "keys and values alternate head by head; the first half of the outputs is the keys":
                    tuple(right.view(n, G, 2, d).permute(2, 1, 0, 3)),
                "cut as (heads, n, d) at once: that mixes positions": tuple(x.reshape(G, n, d) for x in right.chunk(2, dim=1)),
            },
        )


# ---------------------------------------------------------------------------- find the bug


@exercise("visible", points=2)
def visible(draw: Draw) -> Iterator[Case]:
    """`fn(real, n) -> see`: which keys each query of a causal model may look at, with n prefix positions in front.

    real (B, T), bool: False where a token is padding, on either side. see (B, T, n + T), bool: query t sees all
    of the prefix, and of the tokens 0 … t those that are real.
    """
    for B, T, n in ((2, 4, 3), (1, 1, 2), (3, 5, 1), (2, draw.integer(6, 8), draw.integer(2, 5))):
        real = torch.ones(B, T, dtype=torch.bool)
        for b in range(B if T > 1 else 0):
            padding = draw.integer(1, T - 2)
            real[b, :padding] = real[b, :padding] & bool(b % 2)                     # on the left, or on the right
            real[b, T - padding :] = real[b, T - padding :] & (not b % 2)
        want = torch.zeros(B, T, n + T, dtype=torch.bool)
        for b in range(B):
            for t in range(T):
                want[b, t, :n] = True
                for s in range(t + 1):
                    want[b, t, n + s] = real[b, s]
        ones, wide = torch.ones(B, n, dtype=torch.bool), torch.ones(T, n + T, dtype=torch.bool)
        keys = torch.cat([ones, real], dim=1)[:, None]                              # (B, 1, n + T)
        yield Case(
            given={"real": real, "n": n},
            want=want,
            vacuous={"everything": torch.ones_like(want), "nothing": torch.zeros_like(want)} if T > 1 else {},
            mistakes={
                "the triangle starts in the top left corner, as is_causal=True has it": wide.tril() & keys,
                "no triangle: queries see later tokens": keys.expand(B, T, n + T),
                "padding is visible": wide.tril(n).expand(B, T, n + T),
                "the prefix is hidden": want & torch.cat([~ones, torch.ones_like(real)], dim=1)[:, None],
                "the prefix stands behind the tokens": want.roll(-n, dims=2),
                "query t does not see token t itself": wide.tril(n - 1) & keys,
                "True where a key is hidden; it is the other way round": ~want,
            },
        )
