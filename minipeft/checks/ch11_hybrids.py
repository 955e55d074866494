"""Checks of chapter 11, hybrids: several methods on one model, each in its own socket.

    embedding  e -> [P; e]      key/value  (K, V) -> ([P_K; K], [P_V; V])      module  (x, y) -> y'

Pieces on one module act one after the other: the later one sees what the earlier one returned. Models in the cases
are tiny Llamas in float64 with random weights, their adapters far from their start.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minipeft import sockets
from minipeft.checks.frame import Case, Draw, Refused, exercise, same_bytes

# ---------------------------------------------------------------------------- how large


@exercise("hybrid-budget")
def hybrid_budget(draw: Draw) -> Iterator[Case]:
    """`fn(budget, width, shapes, least) -> (rank, length)`: a prompt and a LoRA that together train at most `budget` numbers.

    shapes: (out, in) of each adapted weight. First the largest rank that leaves room for a prompt of `least` vectors
    of `width` numbers; then as many vectors as still fit.
    """
    for modules in (3, 1, 5, draw.integer(2, 8)):
        width, shapes = draw.integer(20, 60), [(draw.integer(30, 90), draw.integer(100, 190)) for _ in range(modules)]
        one = sum(o + i for o, i in shapes)                      # what one rank costs
        least = one // width + draw.integer(1, 6)                # the prompt takes the room of one rank and more
        rank, spare = draw.integer(5, 12), draw.integer(1, 3)
        left = spare * width + draw.integer(1, width - 1)        # of one rank, not enough for another
        while left >= one:
            left -= width
        budget = rank * one + least * width + left
        length, greedy = least + left // width, budget // one
        yield Case(
            given={"budget": budget, "width": width, "shapes": shapes, "least": least},
            want=(rank, length),
            mistakes={
                "the prompt is forgotten when the rank is chosen": (greedy, (budget - greedy * one) // width),
                "what is left over is not given to the prompt": (rank, least),
                "the rank is rounded up: that is over the budget": (rank + 1, least),
                "that is how many vectors come on top of the least": (rank, left // width),
                "out times in is the size of the weight, not what a rank costs": (budget - least * width) // sum(o * i for o, i in shapes),
                "only the first weight is counted": (
                    r := (budget - least * width) // sum(shapes[0]), (budget - r * sum(shapes[0])) // width),
                "only in is counted, not out": (r := (budget - least * width) // sum(i for _, i in shapes), (budget - r * one) // width),
                "the prompt's length is rounded up": (rank, length + 1),
                "the prompt costs its length, not length times width": (r := (budget - least) // one, budget - r * one),
            },
        )


# ---------------------------------------------------------------------------- two pieces on one module


def _in_order(x: Tensor, W, A, B, s, W_down, W_up) -> Tensor:
    """The oracle: the adapter reads what the adapted weight gives, one output at a time, in float64."""
    x, W, A, B, W_down, W_up = (t.double() for t in (x, W, A, B, W_down, W_up))
    changed = W + sum(s * torch.outer(B[:, r], A[r]) for r in range(len(A)))
    y = torch.stack([(x * row).sum(-1) for row in changed], dim=-1)
    z = torch.stack([(y * row).sum(-1) for row in W_down], dim=-1)
    z = z * (z > 0)
    return y + torch.stack([(z * row).sum(-1) for row in W_up], dim=-1)


@exercise("lora-then-adapter", points=2)
def lora_then_adapter(draw: Draw) -> Iterator[Case]:
    """`fn(x, W, A, B, s, W_down, W_up) -> y'`: a LoRA, and behind it a bottleneck adapter, on one frozen linear.

    x (batch, in), W (out, in), A (r, in), B (out, r), W_down (m, out), W_up (out, m), ReLU, no biases, the adapter's
    skip included; y' (batch, out), of x's dtype.
    """
    for batch, i, o, r, m, dtype in ((3, 7, 5, 2, 4, torch.float32), (1, 4, 9, 3, 2, torch.float32), (2, 6, 6, 1, 8, torch.float64),
                                     (4, draw.integer(9, 14), 8, 4, 3, torch.float32)):
        x, W = draw.normal(batch, i, dtype=dtype), draw.normal(o, i, scale=i**-0.5, dtype=dtype)
        A, B = draw.normal(r, i, scale=i**-0.5, dtype=dtype), draw.normal(o, r, scale=r**-0.5, dtype=dtype)
        s, W_down = draw.uniform(0.4, 0.8), draw.normal(m, o, scale=o**-0.5, dtype=dtype)
        W_up = draw.normal(o, m, scale=1.5 * m**-0.5, dtype=dtype)
        xd, w, a, b, down, up = (t.double() for t in (x, W, A, B, W_down, W_up))
        h, low = xd @ w.T, s * xd @ a.T @ b.T
        first, z = (h + low)[0], down @ (h + low)[0]
        down[0] += (0.5 + z[0].abs()) * first / first.square().sum()  # in the first row ReLU passes one number
        down[1] -= (0.5 + z[1].abs()) * first / first.square().sum()  # and stops another, whatever was drawn
        W_down.copy_(down)

        def adapted(y, down=down, up=up):
            return (y @ down.T).relu() @ up.T

        y = h + low
        yield Case(
            given={"x": x, "W": W, "A": A, "B": B, "s": s, "W_down": W_down, "W_up": W_up},
            want=_in_order(x, W, A, B, s, W_down, W_up),
            vacuous={"the frozen module alone": h, "LoRA alone": y, "the adapter alone": h + adapted(h)},
            mistakes={
                "the adapter reads what the frozen module gave, before LoRA: that is the other order": y + adapted(h),
                "the adapter's skip is missing": adapted(y),
                "the skip is added twice": 2 * y + adapted(y),
                "the frozen module's output is counted twice": h + low + h + adapted(h),
                "the adapter reads LoRA's update alone": y + adapted(low),
                "the skip goes around LoRA: it must carry W x + s B A x": h + adapted(y),
                "the scale s is missing": (z := h + xd @ a.T @ b.T) + adapted(z),
                "the ReLU is missing": y + y @ down.T @ up.T,
                "the ReLU also bends the sum": (y + adapted(y)).relu(),
                "A and B are swapped": lambda x=xd, h=h, a=a, b=b, s=s, f=adapted: (z := h + s * x @ b @ a) + f(z),
                "LoRA reads what the adapter gives, not x": lambda h=h, a=a, b=b, s=s, f=adapted: (z := h + f(h)) + s * z @ a.T @ b.T,
            },
        )


# ---------------------------------------------------------------------------- one part learns, the others act


def _tiny(seed: int, methods: dict) -> nn.Module:
    """A Llama of two blocks in float64 with these adapters on it, all at random states."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
                         num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3)
    model = LlamaForCausalLM(config).double().eval()
    for name, method in methods.items():
        for parameter in sockets.attach(model, method, name).parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def _state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, in float32: transformers computes the loss in it."""
    return {name: p.detach().float() for name, p in model.named_parameters()}


def _stepped(model: nn.Module, ids: Tensor, lr: float, trained: tuple[str, ...], act: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """The oracle: all parameters after p <- p - lr ∂loss/∂p for the adapters `trained`, the loss written out."""
    twin = copy.deepcopy(model)
    if act is not None:
        sockets.activate(twin, act)
    own = {n: p for n, p in twin.named_parameters() if any(n.startswith(f"{sockets.HOME}.{name}.") for name in trained)}
    twin.requires_grad_(False)
    for p in own.values():
        p.requires_grad_(True)
    logp = twin(input_ids=ids).logits.log_softmax(-1)            # (B, P + T, vocabulary)
    P = logp.shape[1] - ids.shape[1]
    targets = ids if P else ids[:, 1:]                           # behind a prompt, the first token is predicted too
    logp = logp[:, max(P - 1, 0) : -1]
    loss = -sum(logp[b, t, targets[b, t]] for b in range(len(ids)) for t in range(targets.shape[1])) / targets.numel()
    gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    with torch.no_grad():
        for p, gradient in zip(own.values(), gradients, strict=True):
            if gradient is not None:
                p -= lr * gradient
    return _state(twin)


def _trained_alone(returned, mine: dict, given: dict) -> dict[str, Tensor]:
    model, before, name = mine["model"], given["model"], given["name"]
    if sockets.active_names(model) != sockets.active_names(before):
        raise Refused(f"afterwards {list(sockets.active_names(model))} act; before, it was {list(sockets.active_names(before))}. "
                      "A frozen part still acts")
    for n, p in model.named_parameters():
        own = n.startswith(f"{sockets.HOME}.{name}.")
        if p.requires_grad != own:
            raise Refused(f"{n} does not require gradients, but {name!r} is to be trained" if own else
                          f"{n} still requires gradients; only {name!r} is to be trained, now and in later steps")
    return _state(model)


@exercise("train-one-part", points=2)
def train_one_part(draw: Draw) -> Iterator[Case]:
    """`fn(model, name, ids, lr) -> None`: one step of plain gradient descent for one adapter; all adapters act.

    Afterwards only that adapter's parameters require gradients; nothing else has moved. The loss is
    `model(input_ids=ids, labels=ids).loss`. ids (B, T). In some cases an adapter is frozen at first.
    """
    from minipeft import BottleneckAdapter, LoRA, PrefixTuning, PromptTuning

    lora, prompt = LoRA(rank=2, targets="attention"), PromptTuning(3)
    for methods, name, asleep in (
        ({"lora": lora, "prompt": prompt}, "prompt", None),
        ({"prefix": PrefixTuning(2, reparameterize=False), "lora": lora}, "lora", "lora"),
        ({"lora": lora, "adapter": BottleneckAdapter(3), "prompt": prompt}, "adapter", "prompt"),
    ):
        model = _tiny(draw.integer(0, 10**6), methods)
        if asleep:
            sockets.adapters(model)[asleep].requires_grad_(False)
        ids = torch.tensor([draw.integers(5, 3, 22) for _ in range(2)])
        lr, others = draw.uniform(0.3, 0.8), tuple(n for n in methods if n != name)
        want, start = _stepped(model, ids, lr, (name,)), _state(model)

        def others_stay(value, given, name=name, start=start):
            moved = [n for n, p in value.items() if not n.startswith(f"{sockets.HOME}.{name}.") and not torch.equal(p, start[n])]
            return f"{moved[0]} has moved; only {name!r} was to be trained" if moved else None

        yield Case(
            given={"model": model, "name": name, "ids": ids, "lr": lr},
            want=want,
            test=others_stay,
            vacuous={"nothing trained": start},
            observe=_trained_alone,
            may_change=("model",),
            told=f"the adapters {', '.join(methods)}; to be trained: {name!r}" + (f"; {asleep!r} is frozen at first" if asleep else ""),
            mistakes={
                "all adapters were trained": _stepped(model, ids, lr, tuple(methods)),
                "the other adapters were trained": _stepped(model, ids, lr, others),
                "the other adapters did not act: a frozen part must still act": _stepped(model, ids, lr, (name,), (name,)),
                "a step uphill": {n: 2 * start[n] - p for n, p in want.items()},
                "the rate is missing": _stepped(model, ids, 1.0, (name,)),
            },
        )


# ---------------------------------------------------------------------------- folded where possible


def _folded(W: Tensor, parts: list[tuple]) -> tuple[Tensor, int]:
    """The oracle: W' read off column by column, in float64, and how many of the parts are in it."""
    count = next((i for i, part in enumerate(parts) if part[0] == "adapter"), len(parts))
    columns = []
    for x in torch.eye(W.shape[1], dtype=torch.float64):
        y = (W.double() * x).sum(-1)
        for _, A, B, s in parts[:count]:
            y = y + s * sum(B.double()[:, r] * (A.double()[r] * x).sum() for r in range(len(A)))
        columns.append(y)
    return torch.stack(columns, dim=1), count


def _which_stay(returned, mine: dict, given: dict) -> tuple:
    """(W', numbers of the parts that stay)."""
    if not isinstance(returned, list | tuple) or len(returned) != 2 or not isinstance(returned[1], list | tuple):
        raise Refused(f"it returned a {type(returned).__name__}, expected (W', the list of the parts that stay)")
    stay = []
    for part in returned[1]:
        found = [i for i, own in enumerate(given["parts"]) if type(part) is tuple and same_bytes(part, own)]
        if not found:
            raise Refused("the second value holds something that is none of the parts: give those that stay as they came")
        stay += found
    return returned[0], stay


@exercise("fold-what-can", points=2)
def fold_what_can(draw: Draw) -> Iterator[Case]:
    """`fn(W, parts) -> (W', stay)`: fold as many parts as possible into W; those that stay, in their order.

    W (out, in), frozen. parts: in the order in which they act, ("lora", A (r, in), B (out, r), s) or
    ("adapter", W_down (m, out), W_up (out, m)). W' with the parts that stay computes what W with all of them did.
    """
    for kinds, dtype in (("la", torch.float32), ("al", torch.float64), ("llal", torch.float32), ("ll", torch.float32),
                         ("lalal", torch.float64), ("l" * draw.integer(2, 3) + "aal", torch.float32)):
        o, i = draw.integer(7, 11), draw.integer(4, 6)
        W, parts = draw.normal(o, i, dtype=dtype), []
        for kind in kinds:
            r = draw.integer(1, 3)
            if kind == "l":
                parts.append(("lora", draw.normal(r, i, dtype=dtype), draw.normal(o, r, dtype=dtype), draw.uniform(0.3, 0.7)))
            else:
                parts.append(("adapter", draw.normal(r, o, dtype=dtype), draw.normal(o, r, dtype=dtype)))
        want, count = _folded(W, parts)
        everything = list(range(len(parts)))
        loras, stay = [n for n in everything if kinds[n] == "l"], everything[count:]

        def plus(numbers, scale=lambda s: s, W=W, parts=parts):
            return W.double() + sum(scale(parts[n][3]) * parts[n][2].double() @ parts[n][1].double() for n in numbers)

        bent = want
        for n in stay:
            bent = plus([n], W=bent) if kinds[n] == "l" else bent + parts[n][2].double() @ parts[n][1].double() @ bent
        yield Case(
            given={"W": W, "parts": parts},
            want=(want, stay),
            vacuous={"nothing folded": (W, everything)} if count else {},
            observe=_which_stay,
            told="the parts in order: " + ", ".join(part[0] for part in parts),
            mistakes={
                "a LoRA behind an adapter was folded: it then acts before it": (plus(loras), [n for n in everything if n not in loras]),
                "only the first part was folded": (plus(loras[:1]), everything[1:]) if count else (want, stay),
                "nothing was folded": (W, everything),
                "the scale s is missing": (plus(range(count), lambda s: 1.0), stay),
                "what was folded is still among the parts: it acts twice": (want, everything),
                "a LoRA behind the adapter was dropped": (want, [n for n in stay if n not in loras]),
                "all parts were dropped": (want, []),
                "the parts that stay are in another order": (want, stay[::-1]),
                "an adapter was folded as if it had no ReLU": (bent, []),
            },
        )


# ---------------------------------------------------------------------------- find the bug


def _rates(returned, mine: dict, given: dict) -> list[float]:
    for group, before in zip(mine["groups"], given["groups"], strict=True):
        if not same_bytes({**group, "lr": 0}, {**before, "lr": 0}):
            raise Refused('only "lr" of each group is to be changed; the peak in "initial_lr" is needed again in the next step')
    return [group["lr"] for group in mine["groups"]]


@exercise("set-rates", points=2)
def set_rates(draw: Draw) -> Iterator[Case]:
    """`fn(groups, factor) -> None`: every group's "lr" becomes `factor` times its own peak, in place.

    groups: an optimizer's param_groups in the middle of training: dicts with "params", "lr" (of the step before)
    and "initial_lr" (the peak). Only "lr" may change.
    """
    for count in (2, 3, 5):
        peaks = [draw.uniform(0.5, 1.5) * 10.0 ** -(k % 3) for k in range(1, count + 1)]
        before, factor = draw.uniform(0.2, 0.4), draw.uniform(0.5, 0.9)
        groups = [{"params": [nn.Parameter(draw.normal(3))], "lr": before * peak, "initial_lr": peak} for peak in peaks]
        want = [factor * peak for peak in peaks]
        yield Case(
            given={"groups": groups, "factor": factor},
            want=want,
            vacuous={"the rates of the step before": [g["lr"] for g in groups]},
            observe=_rates,
            may_change=("groups",),
            told=f"peaks {', '.join(f'{p:.3g}' for p in peaks)}, factor {factor:.3g}",
            mistakes={
                "every group gets the first group's peak": [factor * peaks[0]] * count,
                "every group gets the largest peak": [factor * max(peaks)] * count,
                "every group gets the smallest peak": [factor * min(peaks)] * count,
                "every group gets the mean of the peaks": [factor * sum(peaks) / count] * count,
                "the rate of the step before is multiplied, and the factors pile up": [factor * before * peak for peak in peaks],
                "the factor itself is the rate": [factor] * count,
                "the schedule is lost: the peaks themselves": list(peaks),
                "only the first group is set": [want[0]] + [g["lr"] for g in groups[1:]],
            },
        )
