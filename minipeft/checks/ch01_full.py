"""Checks of chapter 1, full fine-tuning: what AdamW keeps, what the loss sees, how passes add up, what is forgotten."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from minipeft.checks.frame import Case, Draw, exercise


def _moments(model: nn.Module) -> int:
    """Bytes of AdamW's two moments, measured: torch's own AdamW takes a step on a copy."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    return sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))


@exercise("adamw-state-bytes")
def adamw_state_bytes(draw: Draw) -> Iterator[Case]:
    """`fn(model) -> int`: bytes of AdamW's two moments, once it has taken a step.

    Each is of the parameter's own shape and dtype; parameters that do not train have none.
    (The step counter, 4 bytes a tensor, is left out.)
    """
    kinds = ((torch.float32, 0, False), (torch.float32, 2, True), (torch.bfloat16, 1, False), (torch.float64, 1, True))
    for dtype, frozen, tied in kinds:
        width = draw.integer(3, 11)
        model = nn.Sequential(nn.Embedding(13, width), nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 13)).to(dtype)
        if tied:
            model[3].weight = model[0].weight
        for layer in list(model)[1 : 1 + frozen]:
            layer.requires_grad_(False)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = dtype.itemsize
        twice = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
        yield Case(
            given={"model": model},
            want=_moments(model),
            mistakes={
                "those are numbers, not bytes": 2 * count,
                "AdamW keeps two moments a number, not one": count * size,
                "the gradients are counted too": 3 * count * size,
                "weights and gradients are counted too": 4 * count * size,
                "frozen parameters have no moments": 2 * size * sum(p.numel() for p in model.parameters()),
                "4 bytes a number hold only for float32": 8 * count,
                "a tensor used in two places has one state": 2 * twice * size,
            },
        )


@exercise("completion-only-labels")
def completion_only_labels(draw: Draw) -> Iterator[Case]:
    """`fn(prompt_ids, completion_ids) -> labels`: a list as long as both together.

    -100 where the loss must not look (the prompt), the token itself in the completion. Nothing is
    shifted: the model does that.
    """
    for prompt, completion in ((1, 5), (6, 1), (4, 9), (draw.integer(10, 20), draw.integer(3, 8))):
        p, c = draw.integers(prompt, 1, 9), draw.integers(completion, 1, 9)  # few tokens, so that some are in both
        c[0] = p[0]
        want = [-100] * prompt
        for token in c:
            want.append(token)
        yield Case(
            given={"prompt_ids": p, "completion_ids": c},
            want=want,
            mistakes={
                "the prompt is not masked": p + c,
                "the completion is masked, not the prompt": p + [-100] * completion,
                "everything is masked: there is nothing to learn from": [-100] * (prompt + completion),
                "masked with 0, which is a token; the loss ignores -100": [0] * prompt + c,
                "masked with -1; the loss ignores -100": [-1] * prompt + c,
                "the prompt's positions are missing: labels are as long as the input": c,
                "the labels are shifted by one; the model shifts them itself": want[1:] + [-100],
                "masked by value: a token of the prompt also stands in the completion": [-100 if t in p else t for t in p + c],
                "the completion comes before the mask": c + [-100] * prompt,
            },
        )


@exercise("pass-weights")
def pass_weights(draw: Draw) -> Iterator[Case]:
    """`fn(targets) -> list`: by what the mean loss of each pass of a batch is multiplied.

    `targets[i]` is how many targets pass i has. The weighted means must add up to the mean over all
    targets of the batch: targets[i] / sum(targets).
    """
    for counts in ([6, 2], [1, 12, 3], [5], draw.integers(4, 1, 40) + [41]):
        total = 0
        for n in counts:
            total += n
        passes = len(counts)
        yield Case(
            given={"targets": counts},
            want=[n / total for n in counts],
            mistakes={
                "each pass counts the same, however many targets it has": [1 / passes] * passes,
                "that turns means into sums; the batch's mean is asked for": [float(n) for n in counts],
                "turned round: a pass with few targets counts most": [1 / n for n in counts],
                "divided by the targets of the largest pass, not of all": [n / max(counts) for n in counts],
                "divided by the number of passes, too": [n / total / passes for n in counts],
                "relative to the mean pass: the sum is the number of passes, not 1": [n * passes / total for n in counts],
            },
        )


def _forgetting(accuracy: list[list[float]]) -> list[float]:
    """f_j = max over l < T-1 of a[l][j], minus a[T-1][j], for j = 0 … T-2, spelt out."""
    answer = []
    for task in range(len(accuracy) - 1):
        best = accuracy[0][task]
        for row in accuracy[1:-1]:
            if row[task] > best:
                best = row[task]
        answer.append(best - accuracy[-1][task])
    return answer


@exercise("forgetting", points=2)
def forgetting(draw: Draw) -> Iterator[Case]:
    """`fn(accuracy) -> list`: what each task has lost by the end (Chaudhry et al. 2018, equation 3).

    `accuracy[i][j]` is the accuracy on task j after training on tasks 0 … i in turn, T rows of T.
    For each task but the last: the best accuracy it ever had before the last stage, minus the one
    it has after it. Negative where the last stage helped. T - 1 numbers.
    """
    for tasks in (3, 5, 2, draw.integer(4, 7)):
        a = [[draw.uniform(0.3, 0.95) for _ in range(tasks)] for _ in range(tasks)]
        if tasks == 5:
            a[-1][1] = 0.97  # the last stage helped task 1
            a[2][0] = 0.96  # task 0 was at its best later than right after its own training
        last = range(tasks - 1)
        yield Case(
            given={"accuracy": a},
            want=_forgetting(a),
            mistakes={
                "the sign is turned round: forgetting is what was lost": [a[-1][j] - max(r[j] for r in a[:-1]) for j in last],
                "measured from right after the task's own training, not from its best": [a[j][j] - a[-1][j] for j in last],
                "rows and columns are exchanged": [max(a[j][:-1]) - a[j][-1] for j in last],
                "the last stage is part of the maximum, so it cannot be negative": [max(r[j] for r in a) - a[-1][j] for j in last],
                "the last task is counted too; it had no time to be forgotten": [
                    max(r[j] for r in (a[:-1])) - a[-1][j] for j in range(tasks)
                ],
                "measured from the first stage": [a[0][j] - a[-1][j] for j in last],
                "that is the average; one number a task is asked for": sum(_forgetting(a)) / (tasks - 1),
            },
        )
