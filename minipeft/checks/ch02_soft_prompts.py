"""Checks of chapter 2, soft prompts (Lester et al. 2021; Liu et al. 2021): e' = [P; e].

Shapes as in the papers and in this package: P (m, d), e (B, T, d), the embedding table (V, d).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipeft.checks.frame import Case, Draw, Refused, exercise

# ---------------------------------------------------------------------------- a longer sequence


@exercise("lengthen")
def lengthen(draw: Draw) -> Iterator[Case]:
    """`fn(mask, labels, length) -> (mask, labels)`: both (B, T) before, (B, length + T) after.

    In front of each row `length` places: attended to (1), and without a loss (-100).
    """
    for rows, tokens, length in ((1, 4, 3), (3, 6, 1), (2, 5, draw.integer(4, 9)), (draw.integer(2, 4), 7, 7)):
        mask, labels = torch.ones(rows, tokens, dtype=torch.long), torch.full((rows, tokens), -100)
        for row in range(rows):                              # padded on the left, on the right, or not at all
            padding, side = (draw.integer(1, 2), draw.pick(("left", "right"))) if row else (0, "left")
            mask[row, :padding] = 0 if side == "left" else 1
            mask[row, tokens - padding:] = 0 if side == "right" and padding else 1
            answer = slice(tokens - 2, tokens) if side == "left" else slice(tokens - padding - 2, tokens - padding)
            labels[row, answer] = torch.tensor(draw.integers(2, 5, 900))
        if rows > 1:
            mask[-1, 0], mask[-1, 1:] = 0, 1                 # one row is padded in front for certain
        want = _longer(mask, labels, length)
        front = (rows, length)
        yield Case(
            given={"mask": mask, "labels": labels, "length": length},
            want=want,
            vacuous={"the mask and labels as they were": (mask, labels)},
            mistakes={
                "the prompt is masked out: nothing can read it": (
                    torch.cat([mask.new_zeros(front), mask], 1), want[1]),
                "the prompt stands behind the text": (
                    torch.cat([mask, mask.new_ones(front)], 1), torch.cat([labels, labels.new_full(front, -100)], 1)),
                "the labels of the prompt are 0, which is a token; the loss ignores -100": (
                    want[0], torch.cat([labels.new_zeros(front), labels], 1)),
                "the labels were not lengthened": (want[0], labels),
                "the mask was not lengthened": (mask, want[1]),
                "the mask of padding is lost: every place is attended to": (torch.ones_like(want[0]), want[1]),
                "one place for the whole prompt; it has `length` places": (
                    torch.cat([mask.new_ones(rows, 1), mask], 1), torch.cat([labels.new_full((rows, 1), -100), labels], 1)),
            },
        )


def _longer(mask: Tensor, labels: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Place by place: the oracle of `lengthen`."""
    rows, tokens = mask.shape
    longer = torch.empty(rows, length + tokens, dtype=mask.dtype), torch.empty(rows, length + tokens, dtype=labels.dtype)
    for row in range(rows):
        for place in range(length + tokens):
            text = place - length
            longer[0][row, place] = 1 if text < 0 else mask[row, text]
            longer[1][row, place] = -100 if text < 0 else labels[row, text]
    return longer


# ---------------------------------------------------------------------------- where it starts


@exercise("prompt-from-text")
def prompt_from_text(draw: Draw) -> Iterator[Case]:
    """`fn(table, ids, length) -> P`: the vectors of a text's tokens, (length, d).

    A text that is too short is repeated from its start, one that is too long is cut at its end. P has
    memory of its own: when it is trained, the table must not move.
    """
    shapes = ((9, 4, 5, 5), (17, 3, 3, 8), (23, 7, 9, 4), (31, 5, 4, draw.integer(9, 14)), (12, 6, 2, 1))
    for number, (words, d, count, length) in enumerate(shapes):
        table = draw.normal(words, d, dtype=draw.pick((torch.float32, torch.float64)))
        start = draw.integer(1, words - count)
        ids = list(range(start, start + count))
        if number == 1 or (number > 1 and count > 2 and draw.integer(0, 1)):
            ids = ids[::-1]                                  # in the first case a slice of the table would fit too
        rows = [ids[i % count] for i in range(length)]
        want = torch.stack([table[i] for i in rows])
        longer = max(0, length - count)
        pad = F.pad(table[ids][:length], (0, 0, 0, longer))
        yield Case(
            given={"table": table, "ids": ids, "length": length},
            want=want,
            observe=_own_memory,
            mistakes={
                "a short text is filled with zeros, not repeated": pad,
                "a short text is filled with its last token": table[(ids + [ids[-1]] * longer)[:length]],
                "each token is repeated in its place; the whole text is": table[sorted((ids * length)[:length], key=ids.index)],
                "a long text is cut at its start": table[(ids * length)[-length:]],
                "those are the table's first rows, not the text's": table[torch.arange(length) % words],
                "the rows are reversed": want.flip(0),
            },
        )


def _own_memory(value, after: dict, before: dict):
    """The value, unless it is a window on the table."""
    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == after["table"].untyped_storage().data_ptr():
        raise Refused("P shares its memory with the table: each step that trains P would also change the frozen table")
    if value is None:
        raise Refused("it returned nothing")
    return value


# ---------------------------------------------------------------------------- what trains


class _Reader(nn.Module):
    """A frozen model with one layer of causal attention: embeddings (B, T, d) -> logits (B, T, V)."""

    def __init__(self, draw: Draw, words: int, d: int):
        super().__init__()
        self.embed = nn.Embedding(words, d)
        self.q, self.k, self.v, self.head = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, words)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(draw.normal(*parameter.shape, scale=1.0 if parameter.dim() == 1 else d**-0.5))
            self.embed.weight.copy_(draw.normal(words, d))
        self.requires_grad_(False)

    def forward(self, e: Tensor) -> Tensor:
        T = e.shape[1]
        scores = self.q(e) @ self.k(e).mT / e.shape[2] ** 0.5                   # (B, T, T)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        return self.head(e + scores.softmax(-1) @ self.v(e))                    # (B, T, V)


def _loss(model: _Reader, P: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over the text's places, in float64; nothing is asked at the prompt's. P (m, d) or (B, m, d)."""
    text = model.embed.weight[ids]                                              # (B, T, d)
    logits = model(torch.cat([P.expand(len(ids), -1, -1), text], dim=1))
    places = [logits[b, P.shape[-2] + t].log_softmax(-1)[targets[b, t]] for b in range(len(ids)) for t in range(ids.shape[1])]
    return -torch.stack(places).mean()


def _slope(loss, P: Tensor, step: float = 1e-5) -> Tensor:
    """dloss/dP by differences, entry by entry: slow, and without autograd."""
    g = torch.empty_like(P)
    for i in range(P.numel()):
        there = [P.clone() for _ in range(2)]
        there[0].view(-1)[i] += step
        there[1].view(-1)[i] -= step
        g.view(-1)[i] = (loss(there[0]) - loss(there[1])) / (2 * step)
    return g


@exercise("prompt-step", points=3)
def prompt_step(draw: Draw) -> Iterator[Case]:
    """`fn(model, P, ids, targets, lr) -> P`: one step of gradient descent on the prompt alone.

    model(e) gives logits (B, T, V) for embeddings e (B, T, d); model.embed is its embedding, ids and
    targets are (B, T). The loss is the mean cross-entropy at the text's places. Nothing in the model moves.
    """
    for rows, tokens, m, d in ((1, 4, 2, 3), (3, 2, 1, 4), (2, 5, 4, 3), (draw.integer(2, 3), 3, 3, draw.integer(5, 6))):
        words = draw.integer(7, 12)
        model = _Reader(draw, words, d)
        P = draw.normal(m, d)
        ids, targets = (torch.tensor([draw.integers(tokens, 0, words - 1) for _ in range(rows)]) for _ in range(2))
        exact = _double(model)
        Pd = P.double()
        g = _slope(lambda p, exact=exact, ids=ids, targets=targets: _loss(exact, p, ids, targets), Pd)
        lr = draw.uniform(0.4, 0.8) * (P.abs().max() / g.abs().max()).item()

        def other(way, exact=exact, Pd=Pd, ids=ids, targets=targets, lr=lr):
            p = Pd.clone().requires_grad_()
            return lambda: Pd - lr * torch.autograd.grad(way(exact, p, ids, targets), p)[0]

        yield Case(
            given={"model": model, "P": P, "ids": ids, "targets": targets, "lr": lr},
            want=Pd - lr * g,
            vacuous={"the prompt as it was": P},
            mistakes={
                "the step goes uphill": Pd + lr * g,
                "that is the gradient, not the new prompt": g,
                "the loss is summed over the places, not their mean": Pd - lr * g * ids.numel(),
                "the loss is summed over the rows, not their mean": Pd - lr * g * rows,
                "the learning rate is missing": Pd - g,
                "the loss looks at the first places, which are the prompt's": other(_first_places),
                "the prompt stands behind the text, where causal attention cannot read it": other(_behind),
                "one sign step, as Adam's first: plain gradient descent is asked": Pd - lr * g.sign(),
            },
        )


def _double(model: _Reader) -> _Reader:
    twin = _Reader(Draw(0), model.embed.num_embeddings, model.embed.embedding_dim).double()
    twin.load_state_dict(model.state_dict())
    return twin


def _first_places(model, P, ids, targets) -> Tensor:
    logits = model(torch.cat([P.expand(len(ids), -1, -1), model.embed(ids)], dim=1))[:, : ids.shape[1]]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _behind(model, P, ids, targets) -> Tensor:
    logits = model(torch.cat([model.embed(ids), P.expand(len(ids), -1, -1)], dim=1))[:, len(P):]
    return F.cross_entropy(logits.flatten(0, 1)[: targets.numel()], targets.flatten()[: logits.flatten(0, 1).shape[0]])


# ---------------------------------------------------------------------------- P-tuning's network


@exercise("p-tuning-mlp")
def p_tuning_mlp(draw: Draw) -> Iterator[Case]:
    """`fn(E, W1, b1, W2, b2, W3, b3) -> P`: P-tuning's network, P = W₃ relu(W₂ relu(W₁ E + b₁) + b₂) + b₃.

    E (m, d), W1 (h, d), W2 (h, h), W3 (d, h); the rows of E are the places, so W1 acts as E W₁ᵀ. P (m, d).
    """
    for m, d, h, dtype in ((4, 12, 12, torch.float32), (1, 4, 17, torch.float32), (6, 8, 9, torch.float64),
                           (draw.integer(2, 9), 6, 11, torch.float32)):
        E = draw.normal(m, d, dtype=dtype)
        W = [draw.normal(o, i, scale=(2 / i) ** 0.5, dtype=dtype) for o, i in ((h, d), (h, h), (d, h))]
        b = [draw.normal(o, dtype=dtype) for o in (h, h, d)]
        Ed, Wd, bd = E.double(), [w.double() for w in W], [v.double() for v in b]
        want = _encoded(Ed, Wd, bd)
        none = [torch.zeros_like(v) for v in bd]
        yield Case(
            given={"E": E, "W1": W[0], "b1": b[0], "W2": W[1], "b2": b[1], "W3": W[2], "b3": b[2]},
            want=want,
            mistakes={
                "the relus are missing: three matrices in a row are one matrix": _linear(Ed, Wd, bd, ()),
                "the second relu is missing": _linear(Ed, Wd, bd, (0,)),
                "the first relu is missing": _linear(Ed, Wd, bd, (1,)),
                "a relu too many, after the last layer: no entry could be negative": want.relu(),
                "the biases are missing": _encoded(Ed, Wd, none),
                "E is added at the end; P-tuning has no such shortcut": Ed + want,
                "the matrices are not transposed": lambda Ed=Ed, Wd=Wd, bd=bd: (
                    ((Ed @ Wd[0] + bd[0]).relu() @ Wd[1] + bd[1]).relu() @ Wd[2] + bd[2]),
                "W1 and W2 are swapped": lambda Ed=Ed, Wd=Wd, bd=bd: _encoded(Ed, [Wd[1], Wd[0], Wd[2]], bd),
            },
        )


def _encoded(E: Tensor, W: list[Tensor], b: list[Tensor]) -> Tensor:
    """Place by place, unit by unit in float64: the oracle of `p_tuning_mlp`."""
    rows = []
    for x in E:
        for layer in range(3):
            x = torch.stack([(w * x).sum() + c for w, c in zip(W[layer], b[layer], strict=True)])
            if layer < 2:
                x = torch.where(x > 0, x, torch.zeros_like(x))
        rows.append(x)
    return torch.stack(rows)


def _linear(E: Tensor, W: list[Tensor], b: list[Tensor], relus: tuple[int, ...]) -> Tensor:
    for layer in range(3):
        E = E @ W[layer].T + b[layer]
        E = E.relu() if layer in relus else E
    return E


# ---------------------------------------------------------------------------- what it is near to


@exercise("nearest-words", points=2)
def nearest_words(draw: Draw) -> Iterator[Case]:
    """`fn(P, table) -> ids`: for each vector of P (m, d) the row of the table (V, d) at the smallest angle.

    A list of m ints. The length of a vector plays no part.
    """
    for m, d, words in ((1, 3, 15), (4, 6, 40), (7, 5, draw.integer(20, 60)), (5, 5, 5)):
        while True:                                          # until each mistake gives something else
            table = draw.normal(words, d) * draw.normal(words, 1).exp()
            P = draw.normal(m, d) * draw.uniform(0.5, 4)
            want = _by_angle(P, table)
            mistakes = {
                "that is the largest dot product, which long vectors win": (P @ table.T).argmax(1).tolist(),
                "that is the smallest distance, which depends on the lengths": torch.cdist(P, table).argmin(1).tolist(),
                "that is the largest angle": _by_angle(-P, table),
            }
            if any(want) and want not in mistakes.values():
                break
        yield Case(given={"P": P, "table": table}, want=want, mistakes=mistakes)


def _by_angle(P: Tensor, table: Tensor) -> list[int]:
    """By the angles themselves, pair by pair in float64."""
    nearest = []
    for p in P.double():
        angles = [torch.arccos(((p * w).sum() / (p.norm() * w.norm())).clamp(-1, 1)).item() for w in table.double()]
        nearest.append(angles.index(min(angles)))
    return nearest


# ---------------------------------------------------------------------------- find the bug


@exercise("answer-log-probs", points=2)
def answer_log_probs(draw: Draw) -> Iterator[Case]:
    """`fn(logits, question_ids, answer_ids) -> (A,)`: log-probability of each token of the answer.

    logits (L, V) are what the model returned for question and answer together, with or without a soft
    prompt in front; L tells. The logits at one place are about the token after it.
    """
    for length, asked, answer, words in ((4, 3, 2, 9), (0, 5, 3, 7), (9, 2, 1, 13), (draw.integer(2, 6), 6, 4, 8)):
        dtype = torch.float64 if length == 9 else torch.float32
        logits = draw.normal(length + asked + answer, words, scale=2, dtype=dtype)
        q, a = draw.integers(asked, 0, words - 1), draw.integers(answer, 0, words - 1)
        exact = logits.double()
        p = exact.exp() / exact.exp().sum(1, keepdim=True)
        rows = torch.arange(answer)

        def at(first: int, table: Tensor, a=a, rows=rows) -> Tensor:
            return table[first + rows, torch.tensor(a)]

        right, text = length + asked - 1, asked - 1          # the place before the answer, with the prompt and without
        yield Case(
            given={"logits": logits, "question_ids": q, "answer_ids": a},
            want=at(right, p).log(),
            mistakes={
                "the places are counted without the soft prompt: these logits are about other tokens": at(text, p).log(),
                "one place too late: the logits at a token are about the next one": at(right + 1, p).log(),
                "those are logits; log-probabilities need a log-softmax over the vocabulary": at(right, exact),
                "those are probabilities, not their logarithms": at(right, p),
                "the softmax runs over the places, not over the vocabulary": at(right, exact.log_softmax(0)),
            },
        )
