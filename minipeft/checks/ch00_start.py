"""The warm-up check of chapter 0: count what trains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from minipeft.checks.frame import Case, Draw, exercise


def _half_frozen(draw: Draw, width: int, layers: int, tied: bool) -> nn.Module:
    """A small model, some of it frozen; its embedding and head may be one tensor."""
    model = nn.Sequential(nn.Embedding(width + 3, width), *[nn.Linear(width, width, bias=i % 2 == 0) for i in range(layers)])
    model.append(nn.Linear(width, width + 3))
    if tied:
        model[-1].weight = model[0].weight
    for layer in list(model)[1 : 1 + draw.integer(1, layers)]:
        layer.requires_grad_(False)
    return model


def _numbers(parameters) -> int:
    """How many numbers these tensors hold, counted one by one."""
    return sum(len(p.detach().reshape(-1).tolist()) for p in parameters)


@exercise("count-trainable")
def count_trainable(draw: Draw) -> Iterator[Case]:
    """`fn(model) -> int`: how many numbers of the model train, each counted once."""
    for width, layers, tied in ((3, 1, False), (7, 3, True), (draw.integer(4, 9), 2, False), (5, 4, True)):
        model = _half_frozen(draw, width, layers, tied)
        training = [p for p in model.parameters() if p.requires_grad]
        twice = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        yield Case(
            given={"model": model},
            want=_numbers(training),
            mistakes={
                "the frozen numbers are counted too": _numbers(model.parameters()),
                "those are the frozen ones": _numbers(p for p in model.parameters() if not p.requires_grad),
                "tensors are counted, not the numbers in them": len(training),
                "a tensor used in two places is counted twice": _numbers(twice),
            },
        )
