"""Exercise checks: the right answer passes, every plausible wrong one is refused, a stub is neither."""

import copy
import math
import random
import statistics

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft.checks import exercises, frame
from minipeft.checks import ch00_start, ch01_full, ch02_soft_prompts, ch04_adapters, ch05_lora, ch06_dora_ia3, ch07_nf4
from minipeft.checks import ch08_cuda_kernel, ch09_qlora, ch10_merge_and_serve, ch11_hybrids, ch12_choosing, ch13_fact_check
from minipeft.checks.frame import Case, Draw, Exercise


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices are tiny; threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------- answers


def lora(x, W, A, B, alpha, rank):
    return x @ W.T + alpha / rank * (x @ A.T @ B.T)


def in_place_lora(x, W, A, B, alpha, rank):
    W += alpha / rank * B @ A
    return x @ W.T


def shy_lora(x, W, A, B, alpha, rank):  # right, and then puts back what it changed
    W += alpha / rank * B @ A
    y = x @ W.T
    W -= alpha / rank * B @ A
    return y


class Liar(torch.Tensor):
    """A tensor that says it equals everything."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return torch.tensor(0.0)


def noisy(answer, relative):
    def fn(*args):
        y = answer(*args)
        return y + relative * y.abs().max() * torch.ones_like(y)

    return fn


def kaiming(out_features, in_features, rank):
    A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
    return A, torch.zeros(out_features, rank)


def gaussian(scale):
    """A from a normal distribution of standard deviation scale(out, in, r), B zero."""
    return lambda o, i, r: (torch.randn(r, i) * scale(o, i, r), torch.zeros(o, r))


def rank_one(o, i, r):
    rows = torch.linspace(0.5, 1.5, r)
    A = torch.outer(rows / rows.square().mean().sqrt(), kaiming(o, i, 1)[0][0])
    return A, torch.zeros(o, r)


def lora_count(shapes, rank):
    return sum(rank * (o + i) for o, i in shapes)


def merge(W, A, B, alpha, rank):
    return W + alpha / rank * B @ A


def merge_in_place(W, A, B, alpha, rank):
    W += alpha / rank * B @ A
    return W


def freeze(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] in ("A", "B"))


def freeze_modules(model):  # the public mistake
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad = False


def freeze_where(keep):
    def fn(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(keep(name)))

    return fn


def freeze_linears(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)


def freeze_and_touch(model):
    freeze(model)
    with torch.no_grad():
        model.embed.weight.mul_(1.001)


def freeze_by_deleting(model):
    freeze(model)
    model.gain_A = None


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adamw_bytes(model):
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def labels(prompt_ids, completion_ids):
    return [-100] * len(prompt_ids) + list(completion_ids)


def labels_in_place(prompt_ids, completion_ids):
    prompt_ids[:] = [-100] * len(prompt_ids)
    return prompt_ids + completion_ids


def forgot(accuracy):
    *before, end = accuracy
    return [max(row[j] for row in before) - end[j] for j in range(len(end) - 1)]


# ---------------------------------------------------------------------------- answers of chapter 4


def bottleneck(h, W_down, b_down, W_up, b_up):
    return h + (h @ W_down.T + b_down).relu() @ W_up.T + b_up


def bottleneck_in_place(h, W_down, b_down, W_up, b_up):
    h += (h @ W_down.T + b_down).relu() @ W_up.T + b_up
    return h


def adapter_count(d, m, blocks, placement):
    return blocks * (2 if placement == "houlsby" else 1) * (2 * m * d + m + d)


def houlsby_block(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    g = norm_1(h + adapter_1(attention(h)))
    return norm_2(g + adapter_2(feed_forward(g)))


def after_the_norm(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):  # as an article draws it
    g = adapter_1(norm_1(h + attention(h)))
    return adapter_2(norm_2(g + feed_forward(g)))


class Adapted(nn.Sequential):
    def forward(self, h):
        return h + super().forward(h)


def linears(d, m, dtype, activation=nn.ReLU, kind=Adapted):
    return kind(nn.Linear(d, m, dtype=dtype), activation(), nn.Linear(m, d, dtype=dtype))


class Loose(nn.Module):
    """The public mistake: what `.to` returns is no parameter."""

    def __init__(self, d, m, dtype):
        super().__init__()
        for name, shape in (("W_down", (m, d)), ("b_down", (m,)), ("W_up", (d, m)), ("b_up", (d,))):
            value = nn.Parameter(torch.randn(shape)).to(dtype)
            setattr(self, name, value if dtype != torch.float32 else value.detach())

    def forward(self, h):
        return bottleneck(h, self.W_down, self.b_down, self.W_up, self.b_up)


class Tight(Loose):
    """The tensor first, the parameter last."""

    def __init__(self, d, m, dtype):
        super().__init__(d, m, dtype)
        for name in ("W_down", "b_down", "W_up", "b_up"):
            value = getattr(self, name).detach()
            delattr(self, name)
            setattr(self, name, nn.Parameter(value))


def mean_of(states):
    return {name: sum(s[name] for s in states) / len(states) for name in states[0]}


def mean_in_place(states):
    for s in states[1:]:
        for name in s:
            states[0][name] += s[name]
    return {name: t / len(states) for name, t in states[0].items()}


RIGHT = {
    "adapter-forward": [bottleneck, lambda h, W, b, U, c: nn.functional.linear(nn.functional.linear(h, W, b).relu(), U, c) + h],
    "adapter-parameter-count": [adapter_count],
    "adapted-block": [
        houlsby_block,
        lambda h, att, ff, n1, n2, a1, a2: (lambda g: n2(a2(ff(g)) + g))(n1(a1(att(h)) + h)),
    ],
    "trainable-adapter": [linears, Tight],
    "average-weights": [mean_of, lambda states: {n: torch.stack([s[n] for s in states]).mean(0) for n in states[0]}],
    "block-passes": [lambda blocks, dropped, tasks: tasks * blocks - (tasks - 1) * dropped],
    "count-trainable": [trainable],
    "adamw-state-bytes": [adamw_bytes],
    "completion-only-labels": [labels],
    "pass-weights": [lambda n: [k / sum(n) for k in n], lambda n: (torch.tensor(n).double() / sum(n)).tolist()],
    "forgetting": [forgot, lambda a: tuple(forgot(a))],
    "lora-forward": [
        lora,
        lambda x, W, A, B, alpha, rank: nn.functional.linear(x, W + alpha / rank * B @ A),
        lambda x, weight, down, up, a, r: x @ weight.T + (x @ down.T) @ (a / r * up).T,
    ],
    "lora-init": [
        kaiming,
        lambda o, i, r: (nn.Parameter((torch.rand(r, i) * 2 - 1) / i**0.5), nn.Parameter(torch.zeros(o, r))),
        gaussian(lambda o, i, r: (3 * i) ** -0.5),
    ],
    "lora-parameter-count": [lora_count],
    "lora-merge": [merge, lambda W, A, B, alpha, rank: torch.addmm(W, B, A, alpha=alpha / rank)],
    "freeze": [freeze, freeze_where(lambda n: n.endswith((".A", ".B"))), lambda model: (freeze(model), model)[1]],
}

WRONG = {
    "adapter-forward": [
        lambda h, W, b, U, c: h,
        lambda h, W, b, U, c: bottleneck(h, W, b, U, c) - h,
        lambda h, W, b, U, c: bottleneck(h, W, b, U, c) + h,
        lambda h, W, b, U, c: h + (h @ W.T + b) @ U.T + c,
        lambda h, W, b, U, c: h + ((h @ W.T + b) @ U.T + c).relu(),
        lambda h, W, b, U, c: h + nn.functional.gelu(h @ W.T + b) @ U.T + c,
        lambda h, W, b, U, c: h + (h @ W.T).relu() @ U.T + c,
        lambda h, W, b, U, c: h + (h @ W.T + b).relu() @ U.T,
        lambda h, W, b, U, c: h + (h @ U + b).relu() @ W + c,
        lambda h, W, b, U, c: h + (h @ W + b).relu() @ U.T + c,
        lambda h, W, b, U, c: bottleneck(h, W, b, U, c)[:1],
        lambda h, W, b, U, c: bottleneck(h, W, b, U, c).mT,
        lambda h, W, b, U, c: bottleneck(h, W, b, U, c).half(),
        lambda h, W, b, U, c: bottleneck(h, W, b, U, c) * math.nan,
        lambda h, W, b, U, c: bottleneck(h[:1], W, b, U, c).expand_as(h),
        noisy(bottleneck, 1e-3),
        bottleneck_in_place,
    ],
    "adapter-parameter-count": [
        lambda d, m, blocks, placement: blocks * 2 * (2 * m * d + m + d),
        lambda d, m, blocks, placement: blocks * (2 * m * d + m + d),
        lambda d, m, blocks, placement: adapter_count(d, m, blocks, placement) // (2 * m * d + m + d) * 2 * m * d,
        lambda d, m, blocks, placement: adapter_count(d, m, 1, placement),
        lambda d, m, blocks, placement: float(adapter_count(d, m, blocks, placement)),
        lambda d, m, blocks, placement: adapter_count(d, m, blocks, "pfeiffer" if placement == "houlsby" else "houlsby"),
        lambda d, m, blocks, placement: 2_379_264,
    ],
    "adapted-block": [
        after_the_norm,
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, att, ff, n1, n2, nn.Identity(), nn.Identity()),
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, att, ff, n1, n2, nn.Identity(), a2),
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, att, ff, n1, n2, a1, nn.Identity()),
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, att, ff, n1, n2, a2, a1),
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, att, ff, n2, n1, a1, a2),
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, ff, att, n1, n2, a1, a2),
        lambda h, att, ff, n1, n2, a1, a2: n2(a2(ff(n1(a1(att(h)))))),
        lambda h, att, ff, n1, n2, a1, a2: n2(h + a2(ff(n1(h + a1(att(h)))))),
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, lambda x: att(a1(x)), lambda x: ff(a2(x)), n1, n2, lambda y: y, lambda y: y),
        lambda h, att, ff, n1, n2, a1, a2: n1(h + a1(att(h))),
        lambda h, att, ff, n1, n2, a1, a2: n2(a2((g := n1(a1(h + att(h)))) + ff(g))),
        lambda h, att, ff, n1, n2, a1, a2: houlsby_block(h, att, ff, n1, n2, a1, a2).float(),
    ],
    "trainable-adapter": [
        Loose,
        lambda d, m, dtype: linears(d, m, dtype, kind=nn.Sequential),
        lambda d, m, dtype: linears(d, m, dtype, activation=nn.Identity),
        lambda d, m, dtype: linears(d, m, dtype, activation=nn.GELU),
        lambda d, m, dtype: linears(d, m, torch.float16),
        lambda d, m, dtype: linears(m, d, dtype),
        lambda d, m, dtype: linears(d, m, dtype).requires_grad_(False),
        lambda d, m, dtype: Adapted(nn.Linear(d, m, bias=False, dtype=dtype), nn.ReLU(), nn.Linear(m, d, dtype=dtype)),
        lambda d, m, dtype: Adapted(nn.Linear(d, m, dtype=dtype), nn.Linear(m, d, dtype=dtype), nn.ReLU()),
        lambda d, m, dtype: nn.Linear(d, d, dtype=dtype),
        lambda d, m, dtype: torch.zeros(m, d, dtype=dtype),
        lambda d, m, dtype: linears,
    ],
    "average-weights": [
        lambda states: states[0],
        lambda states: {n: sum(s[n] for s in states) for n in states[0]},
        lambda states: {n: sum(s[n] for s in states) / 2 for n in states[0]},
        lambda states: {n: (states[0][n] + states[-1][n]) / 2 for n in states[0]},
        lambda states: {n: t.mean() for n, t in mean_of(states).items()},
        lambda states: list(mean_of(states).values()),
        lambda states: {n.split(".")[1]: t for n, t in mean_of(states).items()},
        lambda states: {n: t.double() for n, t in mean_of(states).items()},
        mean_in_place,
    ],
    "block-passes": [
        lambda blocks, dropped, tasks: tasks * blocks,
        lambda blocks, dropped, tasks: tasks * (blocks - dropped),
        lambda blocks, dropped, tasks: blocks,
        lambda blocks, dropped, tasks: tasks * dropped + blocks - dropped,
        lambda blocks, dropped, tasks: (tasks - 1) * dropped,
        lambda blocks, dropped, tasks: float(dropped + tasks * (blocks - dropped)),
    ],
    "count-trainable": [
        lambda m: sum(p.numel() for p in m.parameters()),
        lambda m: sum(p.numel() for p in m.parameters() if not p.requires_grad),
        lambda m: sum(1 for p in m.parameters() if p.requires_grad),
        lambda m: sum(p.numel() for p in m.state_dict(keep_vars=True).values() if p.requires_grad),
        lambda m: float(trainable(m)),
        lambda m: str(trainable(m)),
        lambda m: True,
        lambda m: trainable(m.requires_grad_(True)),
        lambda m: trainable(m) + 1,
    ],
    "adamw-state-bytes": [
        lambda m: 2 * sum(p.numel() for p in m.parameters() if p.requires_grad),
        lambda m: adamw_bytes(m) // 2,
        lambda m: adamw_bytes(m) * 2,
        lambda m: 8 * sum(p.numel() for p in m.parameters() if p.requires_grad),
        lambda m: sum(2 * p.numel() * p.element_size() for p in m.parameters()),
        lambda m: sum(2 * p.nbytes for p in m.state_dict(keep_vars=True).values() if p.requires_grad),
        lambda m: adamw_bytes(m) / 2**20,
        lambda m: 0,
    ],
    "completion-only-labels": [
        lambda p, c: p + c,
        lambda p, c: c,
        lambda p, c: [0] * len(p) + c,
        lambda p, c: [-1] * len(p) + c,
        lambda p, c: [-100] * len(p) + c[1:] + [-100],
        lambda p, c: p + [-100] * len(c),
        lambda p, c: [-100] * (len(p) + len(c)),
        lambda p, c: [-100] * (len(p) - 1) + [p[-1]] + c,
        lambda p, c: [-100 if t in p else t for t in p + c],
        lambda p, c: torch.tensor(labels(p, c)),
        lambda p, c: [float(t) for t in labels(p, c)],
        lambda p, c: [str(t) for t in labels(p, c)],
        labels_in_place,
    ],
    "pass-weights": [
        lambda n: [1 / len(n)] * len(n),
        lambda n: n,
        lambda n: [1 / k for k in n],
        lambda n: [k / max(n) for k in n],
        lambda n: [k / sum(n) / len(n) for k in n],
        lambda n: [k * len(n) / sum(n) for k in n],
        lambda n: [k // sum(n) for k in n],
        lambda n: [round(k / sum(n), 2) for k in n],
        lambda n: torch.tensor(n) / sum(n),
        lambda n: [n.pop() / 8 for _ in range(len(n))],
        lambda n: [0.75, 0.25],
        lambda n: [math.nan] * len(n),
    ],
    "forgetting": [
        lambda a: [a[j][j] - a[-1][j] for j in range(len(a) - 1)],
        lambda a: [-f for f in forgot(a)],
        lambda a: [max(0.0, f) for f in forgot(a)],
        lambda a: forgot(a) + [0.0],
        lambda a: forgot([list(column) for column in zip(*a)]),
        lambda a: sum(forgot(a)) / len(forgot(a)),
        lambda a: [round(f, 2) for f in forgot(a)],
        lambda a: [float("nan")] * (len(a) - 1),
        lambda a: [0.0] * (len(a) - 1),
        lambda a: a[-1][:-1],
        lambda a: torch.tensor(forgot(a)),
        lambda a: forgot([a.pop(0), *a, a[-1]]),
    ],
    "lora-forward": [
        lambda x, W, A, B, alpha, rank: x @ W.T,
        lambda x, W, A, B, alpha, rank: x @ W.T + x @ A.T @ B.T,
        lambda x, W, A, B, alpha, rank: x @ W.T + alpha * (x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: x @ W.T + alpha / rank**0.5 * (x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: x @ W.T + alpha // rank * (x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: x @ W.T + rank / alpha * (x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: alpha / rank * (x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: alpha / rank * (x @ W.T + x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: x @ W.T - alpha / rank * (x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: x @ W.T + alpha / rank * (x @ B @ A),
        lambda x, W, A, B, alpha, rank: x @ W + alpha / rank * (x @ A.T @ B.T),
        lambda x, W, A, B, alpha, rank: torch.zeros(*x.shape[:-1], len(W), dtype=x.dtype),
        lambda x, W, A, B, alpha, rank: x,
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank) * float("nan"),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).double().float(),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).half(),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).bfloat16().to(x.dtype),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).tolist(),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).numpy(),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).to("meta"),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).to_sparse(),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).mT,
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank)[0],
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).squeeze(),
        lambda x, W, A, B, alpha, rank: lora(x, W, A, B, alpha, rank).as_subclass(Liar),
        lambda x, W, A, B, alpha, rank: (lora(x, W, A, B, alpha, rank),),
        lambda x, W, A, B, alpha, rank: exit(),
        lambda x, W, A, B, alpha, rank: lora(x[:1], W, A, B, alpha, rank).expand(len(x), -1, -1),
        lambda x, W: x @ W.T,
        in_place_lora,
        shy_lora,
        noisy(lora, 1e-4),
        "not a function",
    ],
    "lora-init": [
        lambda o, i, r: (torch.zeros(r, i), torch.zeros(o, r)),
        lambda o, i, r: (torch.zeros(r, i), torch.randn(o, r) / r**0.5),
        lambda o, i, r: (torch.randn(r, i) / (3 * i) ** 0.5, torch.randn(o, r) * 0.01),
        lambda o, i, r: tuple(reversed(kaiming(o, i, r))),
        lambda o, i, r: tuple(m.T for m in kaiming(o, i, r)),
        gaussian(lambda o, i, r: 1),
        gaussian(lambda o, i, r: i**-0.5),
        gaussian(lambda o, i, r: r**-0.5),
        gaussian(lambda o, i, r: 1 / r),
        gaussian(lambda o, i, r: (3 * o) ** -0.5),
        gaussian(lambda o, i, r: 0.02),
        lambda o, i, r: (torch.rand(r, i) / i**0.5, torch.zeros(o, r)),
        lambda o, i, r: (torch.rand(r, i) * 2 / i**0.5, torch.zeros(o, r)),
        lambda o, i, r: (torch.full((r, i), (3 * i) ** -0.5), torch.zeros(o, r)),
        rank_one,
        lambda o, i, r: (torch.eye(r, i), torch.zeros(o, r)),
        lambda o, i, r: (torch.randn(1, i).expand(r, i) / (3 * i) ** 0.5, torch.zeros(o, r)),
        lambda o, i, r: (nn.init.kaiming_uniform_(torch.empty(r, i)), torch.zeros(o, r)),
        lambda o, i, r: (torch.empty(r, i) * float("nan"), torch.zeros(o, r)),
        lambda o, i, r: tuple(m.double() for m in kaiming(o, i, r)),
        lambda o, i, r: kaiming(o, i, r)[0],
        lambda o, i, r: tuple(m.tolist() for m in kaiming(o, i, r)),
    ],
    "lora-parameter-count": [
        lambda s, r: sum(o * i for o, i in s),
        lambda s, r: sum(r * i for o, i in s),
        lambda s, r: sum(r * o for o, i in s),
        lambda s, r: sum(2 * r * i for o, i in s),
        lambda s, r: sum(r * r * o * i for o, i in s),
        lambda s, r: sum(o + i for o, i in s),
        lambda s, r: lora_count(s, r) * 2,
        lambda s, r: lora_count(s[:1], r),
        lambda s, r: lora_count(s, r) / 1,
        lambda s, r: lora_count([s.pop() for _ in range(len(s))], r),
        lambda s, r: 41_943_040,
    ],
    "lora-merge": [
        lambda W, A, B, alpha, rank: W,
        lambda W, A, B, alpha, rank: W.clone(),
        lambda W, A, B, alpha, rank: W + B @ A,
        lambda W, A, B, alpha, rank: W + alpha * B @ A,
        lambda W, A, B, alpha, rank: W + alpha / rank**0.5 * B @ A,
        lambda W, A, B, alpha, rank: W - alpha / rank * B @ A,
        lambda W, A, B, alpha, rank: alpha / rank * B @ A,
        lambda W, A, B, alpha, rank: alpha / rank * (W + B @ A),
        lambda W, A, B, alpha, rank: W + alpha / rank * (B @ A).T,
        lambda W, A, B, alpha, rank: W + alpha / rank * A @ B,
        lambda W, A, B, alpha, rank: merge(W, A, B, alpha, rank).T,
        lambda W, A, B, alpha, rank: merge(W, A, B, alpha, rank).double(),
        lambda W, A, B, alpha, rank: merge(W, A, B, alpha, rank).half().to(W.dtype),
        lambda W, A, B, alpha, rank: W + alpha / rank * B[:, :1] @ A[:1],
        merge_in_place,
    ],
    "freeze": [
        freeze_modules,
        freeze_linears,
        freeze_and_touch,
        freeze_by_deleting,
        lambda model: model.requires_grad_(False),
        lambda model: model.eval(),
        freeze_where(lambda n: "A" in n or "B" in n),
        freeze_where(lambda n: n.endswith(("A", "B"))),
        freeze_where(lambda n: n.endswith(".A")),
        freeze_where(lambda n: n.endswith((".A", ".B", "bias"))),
        freeze_where(lambda n: n.endswith((".A", ".B")) or "embed" in n),
        freeze_where(lambda n: n.startswith("blocks.0") and n.endswith((".A", ".B"))),
        lambda model: [p.detach_() for p in model.blocks.parameters()],
    ],
}


# ---------------------------------------------------------------------------- chapter 3, prefixes


def with_prefix(scale=None, diagonal=None, turn=False, front=True):
    """Causal attention behind a prefix; the arguments break it."""

    def fn(q, K, V, P_K, P_V):
        B, H, T, d = q.shape
        G, n, _ = P_K.shape
        K, V = (torch.cat([P.expand(B, -1, -1, -1), X] if front else [X, P.expand(B, -1, -1, -1)], dim=2)
                for P, X in ((P_K, K), (P_V, V)))
        K, V = (X.repeat(1, H // G, 1, 1) if turn else X.repeat_interleave(H // G, dim=1) for X in (K, V))
        see = torch.ones(T, n + T, dtype=torch.bool).tril(n if diagonal is None else diagonal(n, T))
        scores = q @ K.mT * (d**-0.5 if scale is None else scale(d))
        return scores.masked_fill(~see, -math.inf).softmax(-1) @ V

    return fn


prefixed = with_prefix()


def prefixed_in_place(q, K, V, P_K, P_V):
    q *= 1.0 / math.sqrt(q.shape[-1])
    return with_prefix(scale=lambda d: 1.0)(q, K, V, P_K, P_V)


def prefixed_by_torch(q, K, V, P_K, P_V):
    B, _, T, _ = q.shape
    K, V = (torch.cat([P.expand(B, -1, -1, -1), X], dim=2) for P, X in ((P_K, K), (P_V, V)))
    see = torch.ones(T, K.shape[2], dtype=torch.bool).tril(K.shape[2] - T)
    return nn.functional.scaled_dot_product_attention(q, K, V, attn_mask=see, enable_gqa=True)


def prefixed_is_causal(q, K, V, P_K, P_V):  # the public mistake
    B = len(q)
    K, V = (torch.cat([P.expand(B, -1, -1, -1), X], dim=2) for P, X in ((P_K, K), (P_V, V)))
    return nn.functional.scaled_dot_product_attention(q, K, V, is_causal=True, enable_gqa=True)


def share_of(q, K, P_K):
    return (q @ torch.cat([P_K, K]).T / q.shape[-1] ** 0.5).softmax(-1)[:, : len(P_K)].sum(-1)


def cut_heads(h, W_K, W_V, kv_heads):
    P_K, P_V = ((h @ W.T).view(len(h), kv_heads, -1).transpose(0, 1) for W in (W_K, W_V))
    return P_K, P_V


def folded(E, W, b, W_l, b_l, kv_heads, inner=torch.tanh, order=(1, 2, 0, 3)):
    x = inner(E @ W.T + b) @ W_l.T + b_l
    P_K, P_V = x.view(len(E), 2, kv_heads, -1).permute(*order)
    return P_K, P_V


def see_keys(real, n, diagonal=0, prefix=True, padding=True):
    B, T = real.shape
    keys = torch.cat([torch.full((B, n), prefix), real if padding else torch.ones_like(real)], dim=1)
    return torch.ones(T, n + T, dtype=torch.bool).tril(n + diagonal) & keys[:, None]


RIGHT |= {
    "prefix-attention": [prefixed, prefixed_by_torch],
    "prefix-share": [share_of, lambda q, K, P: 1 - share_of(q, P, K)],
    "prefix-parameter-count": [lambda L, H, G, d, n: 2 * L * G * d * n],
    "prefix-of-a-prompt": [
        cut_heads,
        lambda h, W_K, W_V, G: tuple(torch.einsum("nw,gdw->gnd", h, W.view(G, -1, W.shape[1])) for W in (W_K, W_V)),
        lambda *given: list(cut_heads(*given)),
    ],
    "fold-prefix": [folded, lambda *given: tuple(x.contiguous() for x in folded(*given))],
    "visible": [see_keys, lambda real, n: torch.stack([see_keys(row[None], n)[0] for row in real])],
}

WRONG |= {
    "prefix-attention": [
        with_prefix(diagonal=lambda n, T: 0),
        with_prefix(diagonal=lambda n, T: n - 1),
        with_prefix(diagonal=lambda n, T: n + T),
        with_prefix(scale=lambda d: 1.0),
        with_prefix(scale=lambda d: 1 / d),
        with_prefix(turn=True),
        with_prefix(front=False),
        prefixed_is_causal,
        prefixed_in_place,
        lambda q, K, V, P_K, P_V: prefixed(q, K, V, P_V, P_K),
        lambda q, K, V, P_K, P_V: prefixed(q, K, V, P_K[:, :0], P_V[:, :0]),
        lambda q, K, V, P_K, P_V: prefixed(q, K, V, P_K, 0 * P_V),
        lambda q, K, V, P_K, P_V: prefixed(q, K, V, 0 * P_K, P_V),
        lambda q, K, V, P_K, P_V: prefixed(q, K[:1], V[:1], P_K, P_V) if len(q) == 1 else prefixed(q, K, V, P_K, P_V)[:1].expand_as(q),
        lambda *given: prefixed(*given).double(),
        lambda *given: prefixed(*given).transpose(1, 2),
        lambda *given: prefixed(*given) * math.nan,
        noisy(prefixed, 1e-4),
    ],
    "prefix-share": [
        lambda q, K, P: 1 - share_of(q, K, P),
        lambda q, K, P: (q @ torch.cat([P, K]).T).softmax(-1)[:, : len(P)].sum(-1),
        lambda q, K, P: share_of(q, K, P) / len(P),
        lambda q, K, P: share_of(q, K, P).mean(),
        lambda q, K, P: share_of(q, K, P)[:, None],
        lambda q, K, P: (q @ P.T / q.shape[-1] ** 0.5).softmax(-1).sum(-1),
        lambda q, K, P: torch.full((len(q),), len(P) / (len(P) + len(K)), dtype=q.dtype),
        lambda q, K, P: (q @ torch.cat([K, P]).T / q.shape[-1] ** 0.5).softmax(-1)[:, : len(P)].sum(-1),
        lambda q, K, P: torch.zeros(len(q), dtype=q.dtype),
        lambda q, K, P: share_of(q, K, P).tolist(),
    ],
    "prefix-parameter-count": [
        lambda L, H, G, d, n: 2 * L * H * d * n,
        lambda L, H, G, d, n: L * G * d * n,
        lambda L, H, G, d, n: 2 * G * d * n,
        lambda L, H, G, d, n: H * d * n,
        lambda L, H, G, d, n: L * (2 * G + H) * d * n,
        lambda L, H, G, d, n: 2 * L * d * n,
        lambda L, H, G, d, n: 2.0 * L * G * d * n,
        lambda L, H, G, d, n: 184_320,
    ],
    "prefix-of-a-prompt": [
        lambda *given: cut_heads(*given)[::-1],
        lambda h, W_K, W_V, G: tuple((h @ W.T).reshape(G, len(h), -1) for W in (W_K, W_V)),
        lambda h, W_K, W_V, G: tuple((h @ W.T).view(len(h), -1, G).permute(2, 0, 1) for W in (W_K, W_V)),
        lambda h, W_K, W_V, G: cut_heads(h, W_K, W_K, G),
        lambda h, W_K, W_V, G: tuple((h @ W.T).view(len(h), G, -1) for W in (W_K, W_V)),
        lambda h, W_K, W_V, G: tuple((h @ W).view(len(h), G, -1).transpose(0, 1) for W in (W_K, W_V)),
        lambda *given: cut_heads(*given)[0],
        lambda *given: torch.stack(cut_heads(*given)),
        lambda *given: tuple(x * 0 for x in cut_heads(*given)),
    ],
    "fold-prefix": [
        lambda *given: folded(*given)[::-1],
        lambda *given: folded(*given, inner=lambda x: x),
        lambda *given: folded(*given, inner=torch.relu),
        lambda *given: tuple(map(torch.tanh, folded(*given, inner=lambda x: x))),
        lambda E, W, b, W_l, b_l, G: folded(E, W, 0 * b, W_l, b_l, G),
        lambda E, W, b, W_l, b_l, G: folded(E, W, b, W_l, 0 * b_l, G),
        lambda E, W, b, W_l, b_l, G: tuple(
            (torch.tanh(E @ W.T + b) @ W_l.T + b_l).view(len(E), G, 2, -1).permute(2, 1, 0, 3)),
        lambda E, W, b, W_l, b_l, G: tuple(
            x.reshape(G, len(E), -1) for x in (torch.tanh(E @ W.T + b) @ W_l.T + b_l).chunk(2, dim=1)),
        lambda *given: folded(*given, order=(1, 0, 2, 3)),
    ],
    "visible": [
        lambda real, n: see_keys(real, n, diagonal=-n),
        lambda real, n: see_keys(real, n, diagonal=-1),
        lambda real, n: see_keys(real, n, diagonal=99),
        lambda real, n: see_keys(real, n, prefix=False),
        lambda real, n: see_keys(real, n, padding=False),
        lambda real, n: see_keys(real, n).roll(-n, dims=2),
        lambda real, n: ~see_keys(real, n),
        lambda real, n: see_keys(real, n).float(),
        lambda real, n: see_keys(real, n)[:, None],
        lambda real, n: see_keys(real, n)[0],
        lambda real, n: see_keys(real, n) & real[..., None],
    ],
}


# ---------------------------------------------------------------------------- chapter 6


def dora(W, A, B, m, alpha, rank):
    V = W + alpha / rank * B @ A
    return m[:, None] * V / V.norm(dim=1, keepdim=True)


def dora_layer(x, W, b, A, B, m, alpha, rank):
    V = W + alpha / rank * B @ A
    return m / V.norm(dim=1).detach() * (x @ V.T) + b


def dora_layer_without_v(x, W, b, A, B, m, alpha, rank):  # as the package does it
    s = alpha / rank
    with torch.no_grad():
        length = (W.square().sum(1) + 2 * s * (B * (W @ A.T)).sum(1) + s * s * (B * (B @ (A @ A.T))).sum(1)).sqrt()
    c = m / length
    return c * (x @ W.T + b + s * (x @ A.T) @ B.T) + (1 - c) * b


def dora_layer_with(length, bias=lambda c, b: b):
    """A DoRA layer whose c is m / length(V, W)."""

    def fn(x, W, b, A, B, m, alpha, rank):
        V = W + alpha / rank * B @ A
        c = m / length(V, W)
        return c * (x @ V.T) + bias(c, b)

    return fn


def rescaled(x, W, l, scores=lambda q, k: q @ k.mT / k.shape[-1] ** 0.5):
    q, k, v = x @ W["q"].T, l["k"] * (x @ W["k"].T), l["v"] * (x @ W["v"].T)
    return scores(q, k).softmax(-1) @ v, (l["ff"] * torch.relu(x @ W["up"].T)) @ W["down"].T


def rescaled_elsewhere(x, W, l):  # the same block: l_k beside q, l_v after the softmax
    q, k, v = l["k"] * (x @ W["q"].T), x @ W["k"].T, x @ W["v"].T
    attended = l["v"] * ((q @ k.transpose(1, 2) / math.sqrt(len(W["k"]))).softmax(2) @ v)
    return [attended, torch.relu(x @ W["up"].T) @ (W["down"] * l["ff"]).T]


def rescaled_in_place(x, W, l):
    W["k"] *= l["k"][:, None]
    return rescaled(x, W, l | {"k": torch.ones_like(l["k"])})


def ia3_count(layers, hidden, heads, kv_heads, inner):
    return layers * (2 * kv_heads * (hidden // heads) + inner)


def ia3_folded(W, b, l, feed_forward):
    return (W * l, b) if feed_forward else (l[:, None] * W, l * b)


def ia3_folded_in_place(W, b, l, feed_forward):
    W *= l if feed_forward else l[:, None]
    return W, b if feed_forward else l * b


def plain(A, B, A0, B0, alpha, rank):
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1), 2 * alpha


def plain_by_svd(A, B, A0, B0, alpha, rank):
    stacked, beside, _ = plain(A, B, A0, B0, alpha, rank)
    U, S, Vt = torch.linalg.svd(beside.double() @ stacked.double(), full_matrices=False)
    n = min(2 * rank, len(S))
    pad = 2 * rank - n
    rows, columns = S[:n, None] * Vt[:n], U[:, :n]
    return (nn.functional.pad(rows, (0, 0, 0, pad)).to(A.dtype), nn.functional.pad(columns, (0, pad)).to(A.dtype), 2.0 * alpha)


RIGHT |= {
    "dora-weight": [
        dora,
        lambda W, A, B, m, alpha, rank: nn.functional.normalize(W + alpha / rank * B @ A, dim=1) * m.unsqueeze(1),
    ],
    "dora-forward": [
        dora_layer,
        dora_layer_without_v,
        lambda x, W, b, A, B, m, alpha, rank: nn.functional.linear(x, dora_with_constant_norm(W, A, B, m, alpha, rank), b),
    ],
    "ia3-block": [rescaled, rescaled_elsewhere],
    "ia3-parameter-count": [ia3_count],
    "ia3-merge": [ia3_folded, lambda W, b, l, ff: [W @ torch.diag(l), b] if ff else [torch.diag(l) @ W, b * l]],
    "pissa-as-lora": [
        plain,
        plain_by_svd,
        lambda A, B, A0, B0, alpha, rank: (torch.cat([-A0, A]), torch.cat([B0, B], dim=1), 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]), 2 * torch.cat([B, -B0], dim=1), alpha),
    ],
}


def dora_with_constant_norm(W, A, B, m, alpha, rank):
    V = W + alpha / rank * B @ A
    return (m / V.detach().norm(dim=1))[:, None] * V


WRONG |= {
    "dora-weight": [
        lambda W, A, B, m, alpha, rank: W,
        lambda W, A, B, m, alpha, rank: W + alpha / rank * B @ A,
        lambda W, A, B, m, alpha, rank: m[:, None] * W / W.norm(dim=1, keepdim=True),
        lambda W, A, B, m, alpha, rank: m[:, None] * (W + alpha / rank * B @ A) / W.norm(dim=1, keepdim=True),
        lambda W, A, B, m, alpha, rank: m[:, None] * (V := W + alpha / rank * B @ A) / V.norm(dim=0, keepdim=True),
        lambda W, A, B, m, alpha, rank: m * (V := W + alpha / rank * B @ A) / V.norm(dim=0, keepdim=True),
        lambda W, A, B, m, alpha, rank: m[:, None] * (V := W + alpha / rank * B @ A) / V.norm(),
        lambda W, A, B, m, alpha, rank: m[:, None] * (V := W + alpha / rank * B @ A) / V.square().sum(1, keepdim=True),
        lambda W, A, B, m, alpha, rank: m[:, None] * (V := W + alpha / rank * B @ A) / V.abs().sum(1, keepdim=True),
        lambda W, A, B, m, alpha, rank: m[:, None] * (W + alpha / rank * B @ A),
        lambda W, A, B, m, alpha, rank: nn.functional.normalize(W + alpha / rank * B @ A, dim=1),
        lambda W, A, B, m, alpha, rank: dora(W, A, B, m, rank, rank),
        lambda W, A, B, m, alpha, rank: dora(W, A, B, m, alpha, 1),
        lambda W, A, B, m, alpha, rank: dora(W, A, B, m, alpha, rank**0.5),
        lambda W, A, B, m, alpha, rank: dora(W, A, -B, m, alpha, rank),
        lambda W, A, B, m, alpha, rank: dora(W, A, B, m, alpha, rank).T,
        lambda W, A, B, m, alpha, rank: dora(W, A, B, m, alpha, rank).half().to(W.dtype),
        lambda W, A, B, m, alpha, rank: dora(W, A, B, m, alpha, rank).double().float(),
        lambda W, A, B, m, alpha, rank: dora(W, A, B, m, alpha, rank) * math.nan,
        lambda W, A, B, m, alpha, rank: dora(W.add_(0.1), A, B, m, alpha, rank),
    ],
    "dora-forward": [
        dora_layer_with(lambda V, W: V.norm(dim=1)),
        dora_layer_with(lambda V, W: W.norm(dim=1)),
        dora_layer_with(lambda V, W: V.norm(dim=1).detach(), bias=lambda c, b: c * b),
        dora_layer_with(lambda V, W: V.norm(dim=1).detach(), bias=lambda c, b: 0),
        dora_layer_with(lambda V, W: V.norm().detach()),
        dora_layer_with(lambda V, W: 1),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B, m.detach(), alpha, rank),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A.detach(), B, m, alpha, rank),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B.detach(), m, alpha, rank),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B, m, alpha, rank).detach(),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B, m, alpha, rank).detach().requires_grad_(),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B, m, alpha, 1),
        lambda x, W, b, A, B, m, alpha, rank: x @ (W + alpha / rank * B @ A).T + b,
        lambda x, W, b, A, B, m, alpha, rank: x @ W.T + b,
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B, m, alpha, rank)[0],
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B, m, alpha, rank).to(torch.bfloat16),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x, W, b, A, B, m, alpha, rank).tolist(),
        lambda x, W, b, A, B, m, alpha, rank: dora_layer(x.mul_(2), W, b, A, B, m, alpha, rank),
    ],
    "ia3-block": [
        lambda x, W, l: rescaled(x, W, {name: torch.ones_like(t) for name, t in l.items()}),
        lambda x, W, l: rescaled(x, W, l | {"k": torch.ones_like(l["k"])}),
        lambda x, W, l: rescaled(x, W, l | {"v": torch.ones_like(l["v"])}),
        lambda x, W, l: rescaled(x, W, l | {"ff": torch.ones_like(l["ff"])}),
        lambda x, W, l: (rescaled(x, W, l)[0], torch.relu(l["ff"] * (x @ W["up"].T)) @ W["down"].T),
        lambda x, W, l: (rescaled(x, W, l)[0], (l["ff"] * (x @ W["up"].T)) @ W["down"].T),
        lambda x, W, l: (rescaled(x, W, l)[0], (l["ff"] + torch.relu(x @ W["up"].T)) @ W["down"].T),
        lambda x, W, l: (rescaled(x, W, l)[0], (l["ff"] * nn.functional.gelu(x @ W["up"].T)) @ W["down"].T),
        lambda x, W, l: rescaled(x, W, l, scores=lambda q, k: q @ k.mT),
        lambda x, W, l: rescaled(x, W, l, scores=lambda q, k: q @ k.mT / x.shape[-1] ** 0.5),
        lambda x, W, l: rescaled(x, W, l, scores=lambda q, k: k @ q.mT / k.shape[-1] ** 0.5),
        lambda x, W, l: rescaled(x, W, l, scores=lambda q, k: (q @ k.mT / k.shape[-1] ** 0.5).tril()),
        lambda x, W, l: rescaled(x, W, l | {"k": 1 / l["k"]}),
        lambda x, W, l: rescaled(x, W, {name: t.abs() for name, t in l.items()}),
        lambda x, W, l: tuple(reversed(rescaled(x, W, l))),
        lambda x, W, l: rescaled(x, W, l)[0],
        lambda x, W, l: dict(zip(("attended", "fed"), rescaled(x, W, l))),
        lambda x, W, l: tuple(t * math.nan for t in rescaled(x, W, l)),
        rescaled_in_place,
    ],
    "ia3-parameter-count": [
        lambda layers, hidden, heads, kv_heads, inner: layers * (2 * hidden + inner),
        lambda layers, hidden, heads, kv_heads, inner: layers * (2 * kv_heads + inner),
        lambda layers, hidden, heads, kv_heads, inner: 2 * kv_heads * (hidden // heads) + inner,
        lambda layers, hidden, heads, kv_heads, inner: layers * (kv_heads * (hidden // heads) + inner),
        lambda layers, hidden, heads, kv_heads, inner: layers * (2 * kv_heads * (hidden // heads) + 2 * inner),
        lambda layers, hidden, heads, kv_heads, inner: layers * (hidden + 2 * kv_heads * (hidden // heads) + inner),
        lambda layers, hidden, heads, kv_heads, inner: layers * (2 * kv_heads * (hidden // heads) + hidden),
        lambda layers, hidden, heads, kv_heads, inner: layers * (2 * kv_heads * hidden / heads + inner),
        lambda layers, hidden, heads, kv_heads, inner: ia3_count(layers, hidden, heads, kv_heads, inner) * hidden,
        lambda layers, hidden, heads, kv_heads, inner: 614_400,
    ],
    "ia3-merge": [
        lambda W, b, l, ff: (W, b),
        lambda W, b, l, ff: (W * l if ff else l[:, None] * W, b),
        lambda W, b, l, ff: (W * l, l.mean() * b) if ff else (l[:, None] * W, l * b),
        lambda W, b, l, ff: (W * l, b * l[: len(b)]) if ff and len(l) >= len(b) else ia3_folded(W, b, l, ff),
        lambda W, b, l, ff: (l[:, None] * W, b) if len(l) == len(W) else (W * l, b),
        lambda W, b, l, ff: ia3_folded(W, b, 1 / l, ff),
        lambda W, b, l, ff: ia3_folded(W, b, l.abs(), ff),
        lambda W, b, l, ff: (W + l, b) if ff else (W + l[:, None], b + l),
        lambda W, b, l, ff: ia3_folded(W, b, l, ff)[0],
        lambda W, b, l, ff: tuple(t.half().to(W.dtype) for t in ia3_folded(W, b, l, ff)),
        lambda W, b, l, ff: (l[:, None] * W, l * b) if not ff else (W * l, torch.zeros_like(b)),
        ia3_folded_in_place,
    ],
    "pissa-as-lora": [
        lambda A, B, A0, B0, alpha, rank: (A, B, alpha),
        lambda A, B, A0, B0, alpha, rank: (A - A0, B - B0, alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]), torch.cat([B, B0], dim=1), 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]), torch.cat([B, -B0], dim=1), alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, -A0]), torch.cat([B, -B0], dim=1), 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A0, A]), torch.cat([B, -B0], dim=1), 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A0, A]), torch.cat([B0, -B], dim=1), 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]), torch.cat([B, -B0], dim=1), 2**0.5 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]).T, torch.cat([B, -B0], dim=1).T, 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]), torch.cat([B, -B0], dim=1)),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]).double(), torch.cat([B, -B0], dim=1).double().half(), 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]), torch.cat([B, -B0], dim=1), str(2 * alpha)),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]) * math.nan, torch.cat([B, -B0], dim=1), 2 * alpha),
        lambda A, B, A0, B0, alpha, rank: (torch.cat([A, A0]), torch.cat([B, B0.neg_()], dim=1), 2 * alpha),
    ],
}


# ---------------------------------------------------------------------------- chapter 2, soft prompts


def lengthen(mask, labels, length):
    front = (len(mask), length)
    return torch.cat([mask.new_ones(front), mask], 1), torch.cat([labels.new_full(front, -100), labels], 1)


def from_text(table, ids, length):
    return table[(ids * length)[:length]]


def window(table, ids, length):  # right where the ids are neighbours, but it is the table's own memory
    fits = len(ids) == length and ids == list(range(ids[0], ids[0] + length))
    return table[ids[0] : ids[0] + length] if fits else from_text(table, ids, length)


def prompt_loss(model, P, ids, targets, first=None, reduction="mean"):
    e = torch.cat([P.expand(len(ids), -1, -1), model.embed(ids)], 1)
    first = P.shape[-2] if first is None else first
    logits = model(e)[:, first : first + ids.shape[1]]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def prompt_step(model, P, ids, targets, lr, sign=-1, **how):
    P = P.clone().requires_grad_()
    prompt_loss(model, P, ids, targets, **how).backward()
    return (P + sign * lr * P.grad).detach()


def prompt_step_in_place(model, P, ids, targets, lr):
    P.copy_(prompt_step(model, P, ids, targets, lr))
    return P


def step_of_the_table_too(model, P, ids, targets, lr):
    stepped = prompt_step(model, P, ids, targets, lr)
    with torch.no_grad():
        model.embed.weight.mul_(1.001)
    return stepped


def adam_step(model, P, ids, targets, lr):
    P = nn.Parameter(P.clone())
    optimizer = torch.optim.Adam([P], lr=lr)
    prompt_loss(model, P, ids, targets).backward()
    optimizer.step()
    return P.detach()


def first_rows_step(model, P, ids, targets, lr):
    return prompt_step(model, P, ids[:1], targets[:1], lr)


def encoder(E, W1, b1, W2, b2, W3, b3):
    return ((E @ W1.T + b1).relu() @ W2.T + b2).relu() @ W3.T + b3


def nearest(P, table):
    unit = nn.functional.normalize
    return (unit(P, dim=1) @ unit(table, dim=1).T).argmax(1).tolist()


def log_probs(logits, question_ids, answer_ids, first=None):
    n = len(answer_ids)
    first = len(logits) - n - 1 if first is None else first
    return logits[first : first + n].log_softmax(-1)[torch.arange(n), torch.tensor(answer_ids)]


RIGHT |= {
    "lengthen": [lengthen, lambda m, y, n: (nn.functional.pad(m, (n, 0), value=1), nn.functional.pad(y, (n, 0), value=-100))],
    "prompt-from-text": [from_text, lambda t, ids, n: torch.stack([t[ids[i % len(ids)]] for i in range(n)]).clone()],
    "prompt-step": [prompt_step],
    "p-tuning-mlp": [encoder],
    "nearest-words": [nearest, lambda P, t: nn.functional.cosine_similarity(P[:, None], t[None], dim=2).argmax(1).tolist()],
    "answer-log-probs": [log_probs],
}
WRONG |= {
    "lengthen": [
        lambda m, y, n: (m, y),
        lambda m, y, n: (lengthen(m, y, n)[0], y),
        lambda m, y, n: (m, lengthen(m, y, n)[1]),
        lambda m, y, n: (nn.functional.pad(m, (n, 0)), lengthen(m, y, n)[1]),
        lambda m, y, n: (lengthen(m, y, n)[0], nn.functional.pad(y, (n, 0))),
        lambda m, y, n: (nn.functional.pad(m, (0, n), value=1), nn.functional.pad(y, (0, n), value=-100)),
        lambda m, y, n: (torch.ones_like(lengthen(m, y, n)[0]), lengthen(m, y, n)[1]),
        lambda m, y, n: lengthen(m, y, 1),
        lambda m, y, n: lengthen(m, y, n)[::-1],
        lambda m, y, n: tuple(t.float() for t in lengthen(m, y, n)),
        lambda m, y, n: tuple(t.tolist() for t in lengthen(m, y, n)),
        lambda m, y, n: lengthen(m, y, n)[0],
        lambda m, y, n: lengthen(m, y.fill_(-100), n),
    ],
    "prompt-from-text": [
        window,
        lambda t, ids, n: t[:n],
        lambda t, ids, n: t[ids][:n],
        lambda t, ids, n: nn.functional.pad(t[ids][:n], (0, 0, 0, max(0, n - len(ids)))),
        lambda t, ids, n: t[(ids + [ids[-1]] * n)[:n]],
        lambda t, ids, n: t[(ids * n)[-n:]],
        lambda t, ids, n: t[sorted((ids * n)[:n], key=ids.index)],
        lambda t, ids, n: from_text(t, ids, n).mT,
        lambda t, ids, n: from_text(t, ids, n).mean(0).expand(n, -1),
        lambda t, ids, n: from_text(t, ids, n) + 0.01 * torch.randn(n, t.shape[1], dtype=t.dtype),
        lambda t, ids, n: torch.randn(n, t.shape[1], dtype=t.dtype),
    ],
    "prompt-step": [
        lambda model, P, ids, targets, lr: P,
        lambda *a: prompt_step(*a, sign=1),
        lambda *a: prompt_step(*a, reduction="sum"),
        lambda *a: prompt_step(*a, first=0),
        lambda *a: prompt_step(*a, first=a[1].shape[0] - 1),
        lambda model, P, ids, targets, lr: prompt_step(model, P, ids, targets, 1.0),
        lambda model, P, ids, targets, lr: prompt_step(model, torch.zeros_like(P), ids, targets, lr),
        lambda model, P, ids, targets, lr: prompt_step(model.requires_grad_(True), P, ids, targets, lr),
        prompt_step_in_place, step_of_the_table_too, adam_step, first_rows_step,
    ],
    "p-tuning-mlp": [
        lambda E, W1, b1, W2, b2, W3, b3: ((E @ W1.T + b1) @ W2.T + b2) @ W3.T + b3,
        lambda E, W1, b1, W2, b2, W3, b3: ((E @ W1.T + b1).relu() @ W2.T + b2) @ W3.T + b3,
        lambda E, W1, b1, W2, b2, W3, b3: ((E @ W1.T + b1).tanh() @ W2.T + b2).tanh() @ W3.T + b3,
        lambda E, W1, b1, W2, b2, W3, b3: ((E @ W1.T).relu() @ W2.T).relu() @ W3.T,
        lambda E, W1, b1, W2, b2, W3, b3: ((E @ W1 + b1).relu() @ W2 + b2).relu() @ W3 + b3,
        lambda *a: encoder(*a).relu(),
        lambda *a: a[0] + encoder(*a),
        lambda *a: encoder(*a)[:1].expand(len(a[0]), -1),
        lambda *a: a[0],
    ],
    "nearest-words": [
        lambda P, t: (P @ t.T).argmax(1).tolist(),
        lambda P, t: torch.cdist(P, t).argmin(1).tolist(),
        lambda P, t: nearest(-P, t),
        lambda P, t: nearest(P, t)[:1],
        lambda P, t: nearest(t, P),
        lambda P, t: torch.tensor(nearest(P, t)),
        lambda P, t: [float(i) for i in nearest(P, t)],
        lambda P, t: [0] * len(P),
    ],
    "answer-log-probs": [
        lambda z, q, a: log_probs(z, q, a, first=len(q) - 1),
        lambda z, q, a: log_probs(z, q, a, first=len(z) - len(a)),
        lambda z, q, a: log_probs(z, q, a).exp(),
        lambda z, q, a: z[-len(a) - 1 : -1][torch.arange(len(a)), torch.tensor(a)],
        lambda z, q, a: log_probs(z.mT, a, a) if z.shape[0] == z.shape[1] else log_probs(z, q, a, first=0),
        lambda z, q, a: log_probs(z, q, a).mean(),
        lambda z, q, a: log_probs(z, q, a).sum().item(),
        lambda z, q, a: z[-len(a) - 1 : -1].log_softmax(-1).amax(1),
        lambda z, q, a: z[-len(a) - 1 : -1].log_softmax(0)[torch.arange(len(a)), torch.tensor(a)],
    ],
}


# ---------------------------------------------------------------------------- chapter 7, NF4


def quantile_levels(above, below, offset, steps=lambda top, count: torch.linspace(top, 0.5, count + 1)[:-1]):
    up = torch.special.ndtri(steps(offset, above).double())
    down = -torch.special.ndtri(steps(offset, below).double())
    return (torch.cat([down, torch.zeros(1), up.flip(0)]) / up[0]).float()


def in_blocks(x, levels, block_size, scale=lambda part: part.abs().max(), find=None):
    codes, scales = [], []
    for part in x.split(block_size):
        s = scale(part)
        z = part / (s if s != 0 else 1)
        codes.append((z[:, None] - levels).abs().argmin(1) if find is None else find(z, levels))
        scales.append(s)
    return torch.cat(codes), torch.stack(scales)


def in_blocks_without_zeros(x, levels, block_size):  # 0/0 in a block of zeros
    codes, scales = zip(*[(torch.bucketize(part / part.abs().max(), (levels[1:] + levels[:-1]) / 2), part.abs().max()) for part in x.split(block_size)])
    return torch.cat(codes), torch.stack(scales)


def in_blocks_in_place(x, levels, block_size):
    answer = in_blocks(x, levels, block_size)
    for part in x.split(block_size):
        part.div_(part.abs().max().clamp(min=1e-30))
    return answer


def packed_bytes(codes, high=0):
    codes = nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    return codes[:, high] << 4 | codes[:, 1 - high]


def nibbles(packed, n, order=(0, 1)):
    halves = packed >> 4, packed & 15
    return torch.stack([halves[i] for i in order], 1).flatten()[:n].long()


def decoded(packed, scales, levels, block_size, n, order=(0, 1)):
    return levels[nibbles(packed, n, order)] * scales.repeat_interleave(block_size)[:n]


def bits(block_size, nested):
    return 4 + 32 / block_size if nested is None else 4 + (8 + 32 / nested) / block_size


def scales_twice(scales, levels, nested, offset=torch.mean, top=lambda part: part.abs().max()):
    offset = offset(scales)
    rest = []
    for part in (scales - offset).split(nested):
        codes = torch.bucketize(part / top(part), (levels[1:] + levels[:-1]) / 2)
        rest.append(top(part) * levels[codes])
    return torch.cat(rest) + offset


RIGHT |= {
    "nf4-levels": [quantile_levels],
    "quantize-blocks": [in_blocks, lambda *a: (in_blocks(*a)[0].to(torch.uint8), in_blocks(*a)[1])],
    "pack-nibbles": [packed_bytes, lambda c: 16 * c[::2] + nn.functional.pad(c, (0, 1))[1::2][: len(c[::2])]],
    "decode-nf4": [decoded],
    "bits-per-weight": [bits],
    "double-quantize": [scales_twice],
}
WRONG |= {
    "nf4-levels": [
        lambda a, b, o: torch.linspace(-1, 1, a + b + 1),
        lambda a, b, o: (z := torch.special.ndtri((torch.arange(a + b + 1) + 0.5) / (a + b + 1))) / z.max(),  # the public mistake
        lambda a, b, o: -quantile_levels(a, b, o).flip(0),
        lambda a, b, o: quantile_levels(b, a, o),
        lambda a, b, o: quantile_levels(a, b, 1 - 1 / (2 * (a + b + 1))),
        lambda a, b, o: quantile_levels(a, b, o) * torch.special.ndtri(torch.tensor(o)),
        lambda a, b, o: quantile_levels(a, b, o, lambda top, count: torch.linspace(top, 0.5, count)),
        lambda a, b, o: quantile_levels(a, b, o).flip(0),
        lambda a, b, o: quantile_levels(a, b, o).double(),
        lambda a, b, o: quantile_levels(a, b, o).tolist(),
        lambda a, b, o: torch.cat([-quantile_levels(a, b, o)[b + 1 :].flip(0), quantile_levels(a, b, o)[b:]]),
    ],
    "quantize-blocks": [
        in_blocks_in_place, in_blocks_without_zeros,
        lambda x, levels, block: in_blocks(x, levels, len(x)),
        lambda x, levels, block: (in_blocks(x, levels, len(x))[0], in_blocks(x, levels, block)[1]),
        lambda x, levels, block: in_blocks(x, levels, block, scale=torch.max),
        lambda x, levels, block: in_blocks(x, levels, block, scale=lambda part: part.norm() / len(part) ** 0.5),
        lambda x, levels, block: in_blocks(x, levels, block, find=lambda z, l: torch.bucketize(z, l).clamp(max=15)),
        lambda x, levels, block: in_blocks(x, levels, block, find=lambda z, l: ((z + 1) * 7.5).round().long()),
        lambda x, levels, block: in_blocks(x[: len(x) - len(x) % block], levels, block) if len(x) >= block else in_blocks(x, levels, block),
        lambda x, levels, block: in_blocks(x, levels, block)[::-1],
        lambda x, levels, block: in_blocks(x, levels, block)[0],
        lambda x, levels, block: (in_blocks(x, levels, block)[0].float(), in_blocks(x, levels, block)[1]),
        lambda x, levels, block: (in_blocks(x, levels, block)[0] - 8, in_blocks(x, levels, block)[1]),
        lambda x, levels, block: (levels[in_blocks(x, levels, block)[0]], in_blocks(x, levels, block)[1]),
    ],
    "pack-nibbles": [
        lambda c: packed_bytes(c, high=1),
        lambda c: (c[::2] + nn.functional.pad(c, (0, 1))[1::2][: len(c[::2])]),
        lambda c: packed_bytes(c).long(),
        lambda c: packed_bytes(c)[:-1] if len(c) % 2 else packed_bytes(c),
        lambda c: packed_bytes(c[: len(c) // 2 * 2]),
        lambda c: packed_bytes(nn.functional.pad(c, (len(c) % 2, 0))),
        lambda c: packed_bytes(nn.functional.pad(c, (0, len(c) % 2)).view(2, -1).T.flatten()),
        lambda c: nn.functional.pad(c, (0, len(c) % 2))[::2] << 4 & nn.functional.pad(c, (0, len(c) % 2))[1::2],
        lambda c: packed_bytes(c).tolist(),
    ],
    "decode-nf4": [
        lambda p, s, l, b, n: decoded(p, s, l, b, n, order=(1, 0)),
        lambda p, s, l, b, n: (nibbles(p, n) - 8) / 8 * s.repeat_interleave(b)[:n],  # the public mistake
        lambda p, s, l, b, n: (nibbles(p, n) - 8) * s.repeat_interleave(b)[:n],
        lambda p, s, l, b, n: l[nibbles(p, n)] * s.repeat_interleave(2 * b)[:n],
        lambda p, s, l, b, n: l[nibbles(p, n)] * s.repeat(b)[:n],
        lambda p, s, l, b, n: l[nibbles(p, n)] * s[0],
        lambda p, s, l, b, n: l[nibbles(p, n)],
        lambda p, s, l, b, n: l[torch.cat([p >> 4, p & 15])[:n].long()] * s.repeat_interleave(b)[:n],
        lambda p, s, l, b, n: decoded(p, s, l, b, 2 * len(p)) if n % 2 else decoded(p, s, l, b, n - 1),
        lambda p, s, l, b, n: decoded(p, s, l, b, n).double(),
        lambda p, s, l, b, n: l[nibbles(p, n)] / s.repeat_interleave(b)[:n],
    ],
    "bits-per-weight": [
        lambda b, n: 4.0,
        lambda b, n: 4 + 32 / b,
        lambda b, n: 4 + 16 / b if n is None else bits(b, n),
        lambda b, n: bits(b, n) if n is None else 4 + 8 / b + 32 / n,
        lambda b, n: bits(b, n) if n is None else 4 + 8 / b,
        lambda b, n: bits(b, n) / 8,
        lambda b, n: round(bits(b, n), 2),
        lambda b, n: 4.127,
        lambda b, n: 0.5 + (4 / b if n is None else (1 + 4 / n) / b),
    ],
    "double-quantize": [
        lambda s, l, n: s.clone(),
        lambda s, l, n: scales_twice(s, l, n, offset=lambda s: s.new_zeros(())),
        lambda s, l, n: scales_twice(s, l, n) - s.mean(),
        lambda s, l, n: scales_twice(s, l, len(s)),
        lambda s, l, n: scales_twice(s, l, n, top=torch.max),
        lambda s, l, n: scales_twice(s, l, n, offset=torch.amin),
        lambda s, l, n: scales_twice(s, l, n, offset=torch.median),
        lambda s, l, n: torch.cat([scales_twice(part, l, n) for part in s.split(n)]),
        lambda s, l, n: scales_twice(s, torch.linspace(-1, 1, len(l)), n),
        lambda s, l, n: scales_twice(s, l, n).double(),
        lambda s, l, n: scales_twice(s.sub_(0.0).mul_(1.5), l, n) / 1.5,
    ],
}


# ---------------------------------------------------------------------------- chapter 8, kernels


def elements(block, thread, block_dim, grid_dim, n):
    return list(range(block * block_dim + thread, n, block_dim * grid_dim))


def traffic(n, block_size, out_bytes):
    return (n + 1) // 2 + 4 * -(-n // block_size) + n * out_bytes


SCALE = """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        y[i] = a * x[i];
"""
ABSMAX = """
    __shared__ float most[256];
    int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    most[t] = i < n ? fabsf(x[i]) : 0.0f;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half) most[t] = fmaxf(most[t], most[t + half]);
        __syncthreads();
    }
    if (t == 0) scales[blockIdx.x] = most[0];
"""
ABSMAX_BY_ONE = """
    if (threadIdx.x > 0) return;
    float largest = 0;
    for (int i = blockIdx.x * blockDim.x; i < n && i < (blockIdx.x + 1) * blockDim.x; ++i)
        largest = fmaxf(largest, fabsf(x[i]));
    scales[blockIdx.x] = largest;
"""
DEQUANTIZE = """
    int byte = blockIdx.x * blockDim.x + threadIdx.x, i = 2 * byte;
    if (i >= n) return;
    out[i] = level[packed[byte] >> 4] * scales[i / block_size];
    if (i + 1 < n)
        out[i + 1] = level[packed[byte] & 15] * scales[i / block_size];
"""
DEQUANTIZE_IN_STRIDES = """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        int code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
        out[i] = level[code] * scales[i / block_size];
    }
"""
BLOCK_SCALES = """
    int b = blockIdx.x * 8 + threadIdx.x, first = b * block_size;
    if (first >= n) return;
    float largest = 0;
    for (int i = first; i < min(n, first + block_size); ++i)
        largest = fmaxf(largest, fabsf(x[i]));
    scales[b] = largest;
"""


def cuda(body, *changes):
    """An answer: this text, with each (old, new) replaced; every old must be there."""
    for old, new in changes:
        assert old in body, old
        body = body.replace(old, new)
    return lambda: body


RIGHT |= {
    "elements-of-thread": [elements],
    "least-bytes": [traffic],
    "scale-body": [cuda(SCALE), cuda(SCALE, ("int i", "long long i"))],
    "absmax-body": [cuda(ABSMAX), cuda(ABSMAX_BY_ONE)],
    "dequantize-body": [cuda(DEQUANTIZE), cuda(DEQUANTIZE_IN_STRIDES)],
    "block-scales-body": [cuda(BLOCK_SCALES)],
}
WRONG |= {
    "elements-of-thread": [
        lambda b, t, B, G, n: list(range(b + t, n, B * G)),
        lambda b, t, B, G, n: list(range(b * G + t, n, B * G)),
        lambda b, t, B, G, n: list(range(t, n, B * G)),
        lambda b, t, B, G, n: list(range(b * B + t, n, B)),
        lambda b, t, B, G, n: list(range(b * B + t, n, G)),
        lambda b, t, B, G, n: list(range(b * B + t + 1, n, B * G)),
        lambda b, t, B, G, n: list(range(b * B + t, n + 1, B * G)),
        lambda b, t, B, G, n: list(range(b * B + t, n - B * G, B * G)),
        lambda b, t, B, G, n: [b * B + t],
        lambda b, t, B, G, n: torch.arange(b * B + t, n, B * G),
    ],
    "least-bytes": [
        lambda n, block_size, out_bytes: n // 2 + n * out_bytes,
        lambda n, block_size, out_bytes: n // 2 + 4 * (n // block_size) + n * out_bytes,
        lambda n, block_size, out_bytes: (n + 1) // 2 + 4 * (n // block_size) + n * out_bytes,
        lambda n, block_size, out_bytes: n // 2 + 4 * -(-n // block_size) + n * out_bytes,
        lambda n, block_size, out_bytes: n + 4 * -(-n // block_size) + n * out_bytes,
        lambda n, block_size, out_bytes: (n + 1) // 2 + -(-n // block_size) + n * out_bytes,
        lambda n, block_size, out_bytes: traffic(n, block_size, 4),
        lambda n, block_size, out_bytes: traffic(n, block_size, 0),
        lambda n, block_size, out_bytes: n / 2 + 4 * n / block_size + n * out_bytes,
    ],
    "scale-body": [
        cuda("int i = blockIdx.x * blockDim.x + threadIdx.x;\nif (i < n) y[i] = a * x[i];"),
        cuda(SCALE, ("i < n", "i <= n")),
        cuda(SCALE, ("i += gridDim.x * blockDim.x", "i += blockDim.x")),
        cuda(SCALE, ("int i = blockIdx.x * blockDim.x + ", "int i = ")),
        cuda(SCALE, ("blockIdx.x * blockDim.x +", "blockIdx.x * gridDim.x +")),
        cuda(SCALE, ("a * x[i]", "a + x[i]")),
        cuda(SCALE, ("a * x[i];", "a * x[i]")),
        lambda: len(SCALE),
    ],
    "absmax-body": [
        cuda(ABSMAX, ("0.0f;\n    __syncthreads();", "0.0f;")),
        cuda(ABSMAX, ("        __syncthreads();\n", "")),
        cuda(ABSMAX, ("if (t < half) most", "if (t < half) {\n most"), ("        __syncthreads();", "        __syncthreads(); }")),
        cuda(ABSMAX, ("    most[t] = i", "    if (i >= n) return;\n    most[t] = i")),
        cuda(ABSMAX, ("i < n ? fabsf(x[i]) : 0.0f", "fabsf(x[i])")),
        cuda(ABSMAX, ("fabsf(x[i])", "x[i]")),
        cuda(ABSMAX, ("int half = blockDim.x / 2", "int half = 32")),
        cuda(ABSMAX, ("half > 0", "half > 1")),
        cuda(ABSMAX, ("scales[blockIdx.x]", "scales[t]")),
    ],
    "dequantize-body": [
        cuda(DEQUANTIZE, ("packed[byte] >> 4", "packed[byte] & 15 "), ("out[i + 1] = level[packed[byte] & 15]", "out[i + 1] = level[packed[byte] >> 4]")),
        cuda(DEQUANTIZE, ("if (i + 1 < n)", "")),
        cuda(DEQUANTIZE, ("if (i >= n) return;", "")),
        cuda(DEQUANTIZE, ("scales[i / block_size]", "scales[byte / block_size]")),
        cuda(DEQUANTIZE, ("scales[i / block_size]", "scales[blockIdx.x]")),
        cuda(DEQUANTIZE, ("packed[byte] & 15", "packed[byte]")),
        cuda(DEQUANTIZE, ("level[packed[byte] >> 4]", "((packed[byte] >> 4) - 8)"), ("level[packed[byte] & 15]", "((packed[byte] & 15) - 8)")),
    ],
    "block-scales-body": [
        cuda(BLOCK_SCALES, ("    if (first >= n) return;\n", "")),
        cuda(BLOCK_SCALES, ("min(n, first + block_size)", "first + block_size")),
        cuda(BLOCK_SCALES, ("if (first >= n)", "if (first + block_size > n)")),
        cuda(BLOCK_SCALES, ("if (first >= n)", "if (first > n)")),
        cuda(BLOCK_SCALES, ("fabsf(x[i])", "x[i]")),
        cuda(BLOCK_SCALES, ("blockIdx.x * 8", "blockIdx.x * block_size")),
    ],
}



# ---------------------------------------------------------------------------- chapter 9, QLoRA


def qlora_count(shapes, others, rank, scale=lambda blocks: blocks + 4 * -(-blocks // 256) + 4, rest=2, lora=16, code=2, both=lambda o, i: o + i):
    total = rest * others
    for o, i in shapes:
        total += -(-o * i // code) + scale(-(-o * i // 64)) + lora * rank * both(o, i)
    return total


def decoded_weight(codes, absmax, levels=None):
    levels = ch09_qlora.nf4.CODEBOOK if levels is None else levels
    return (levels[codes.long()].flatten() * absmax.repeat_interleave(64)[: codes.numel()]).view(codes.shape)


def qlora_gradients(g, x, codes, absmax, A, B, s, W=decoded_weight):
    W = W(codes, absmax)
    return g @ W + s * (g @ B) @ A, s * (g @ B).T @ x, s * g.T @ (x @ A.T)


def qlora_gradients_by_autograd(g, x, codes, absmax, A, B, s):
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    y = x @ decoded_weight(codes, absmax).T + s * (x @ A.T) @ B.T
    return torch.autograd.grad(y, (x, A, B), g)


def loftq_turn(W, A, B, s, quantise, give=0.5, new_s=None):
    Q = quantise(W - s * B @ A)
    U, S, Vt = torch.linalg.svd(W - Q, full_matrices=False)
    S = S[: len(A)] / (new_s or s)
    return Q, S[:, None] ** (1 - give) * Vt[: len(A)], U[:, : len(A)] * S**give


def loftq_of(target, rest):
    """A step of LoftQ that quantises and decomposes something else."""

    def step(W, A, B, s, quantise):
        Q = quantise(target(W, A, B, s))
        U, S, Vt = torch.linalg.svd(rest(W, A, B, s, Q), full_matrices=False)
        root = (S[: len(A)] / s).sqrt()
        return Q, root[:, None] * Vt[: len(A)], U[:, : len(A)] * root

    return step


def rounded_merge(W, A, B, s, quantise):
    merged = W + s * B @ A
    stored = quantise(merged)
    return stored, ((stored - merged).norm() / (merged - W).norm()).item()


def lost_by(measure):
    return lambda W, A, B, s, quantise: (quantise(W + s * B @ A), measure(quantise(W + s * B @ A), W + s * B @ A, W, s * B @ A).item())


def casts(which):
    def prepare(model):
        for name, p in model.named_parameters():
            if which(name, p):
                p.data = p.data.float()

    return prepare


def cast_with_new_parameters(model):
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, nn.Parameter(p.detach().float() if p.dim() == 1 else p.detach().clone(), requires_grad=False))


def cast_and_round(model):
    casts(lambda name, p: p.dim() == 1)(model)
    model.gain.data = model.gain.data.round()


def cast_buffers_too(model):
    casts(lambda name, p: p.dim() == 1)(model)
    model.frequencies = model.frequencies.float()


RIGHT |= {
    "qlora-bytes": [qlora_count, lambda shapes, others, rank: sum(qlora_count([shape], 0, rank) for shape in shapes) + 2 * others],
    "qlora-backward": [qlora_gradients, qlora_gradients_by_autograd, lambda *a: list(qlora_gradients(*a))],
    "loftq-step": [loftq_turn, lambda *a: loftq_turn(*a, give=0), lambda *a: list(loftq_turn(*a, give=1))],
    "merge-4bit": [rounded_merge, lambda *a: (rounded_merge(*a)[0], torch.tensor(rounded_merge(*a)[1], dtype=torch.float64))],
    "prepare": [casts(lambda name, p: p.dim() == 1), casts(lambda name, p: "embed" not in name and not name.endswith("head.weight"))],
}
WRONG |= {
    "qlora-bytes": [
        lambda shapes, others, rank: qlora_count(shapes, others, rank, scale=lambda blocks: 4 * blocks),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, scale=lambda blocks: blocks),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, scale=lambda blocks: 0),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, scale=lambda blocks: blocks + 4 * -(-blocks // 256)),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, scale=lambda blocks: blocks + 4 * (blocks // 256) + 4),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, rest=4),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, rest=0),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, lora=4),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, lora=8),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, lora=12),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, code=1),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, both=lambda o, i: o * i),
        lambda shapes, others, rank: qlora_count(shapes, others, rank, both=lambda o, i: 2 * i),
        lambda shapes, others, rank: round(4.127 / 8 * sum(o * i for o, i in shapes)) + 2 * others + 16 * rank * sum(o + i for o, i in shapes),
        lambda shapes, others, rank: qlora_count([(sum(o * i for o, i in shapes), 1)], others, 0) + 16 * rank * sum(o + i for o, i in shapes),
        lambda shapes, others, rank: float(qlora_count(shapes, others, rank)),
    ],
    "qlora-backward": [
        lambda g, x, codes, absmax, A, B, s: (s * (g @ B) @ A, *qlora_gradients(g, x, codes, absmax, A, B, s)[1:]),
        lambda g, x, codes, absmax, A, B, s: (g @ decoded_weight(codes, absmax), *qlora_gradients(g, x, codes, absmax, A, B, s)[1:]),
        lambda g, x, codes, absmax, A, B, s: qlora_gradients(g, x, codes, absmax, A, B, 1),
        lambda g, x, codes, absmax, A, B, s: (qlora_gradients(g, x, codes, absmax, A, B, s)[0], *qlora_gradients(g, x, codes, absmax, A, B, 1)[1:]),
        lambda *a: (qlora_gradients(*a)[0], *qlora_gradients(*a)[:0:-1]),
        lambda *a: tuple(t.T for t in qlora_gradients(*a)),
        lambda *a: qlora_gradients(*a, W=lambda codes, absmax: decoded_weight(codes, absmax, (torch.arange(16) - 8) / 7)),
        lambda *a: qlora_gradients(*a, W=lambda codes, absmax: decoded_weight(codes, absmax, torch.arange(16.0) - 8)),
        lambda *a: qlora_gradients(*a, W=lambda codes, absmax: ch09_qlora.nf4.CODEBOOK[codes.long()]),
        lambda *a: qlora_gradients(*a, W=lambda codes, absmax: decoded_weight(codes.T.contiguous(), absmax).T),
        lambda *a: qlora_gradients(*a, W=lambda codes, absmax: ch09_qlora.nf4.CODEBOOK[codes.long()] * absmax.mean()),
        lambda *a: tuple(t.double() for t in qlora_gradients(*a)),
        lambda g, x, *a: qlora_gradients(g.mul_(2), x, *a),
        lambda *a: tuple(t.bfloat16().float() for t in qlora_gradients(*a)),
        lambda *a: qlora_gradients(*a)[:2],
    ],
    "loftq-step": [
        loftq_of(lambda W, A, B, s: W, lambda W, A, B, s, Q: W - Q),
        loftq_of(lambda W, A, B, s: W - B @ A, lambda W, A, B, s, Q: W - Q),
        loftq_of(lambda W, A, B, s: W + s * B @ A, lambda W, A, B, s, Q: W - Q),
        loftq_of(lambda W, A, B, s: W - s * B @ A, lambda W, A, B, s, Q: Q - W),
        loftq_of(lambda W, A, B, s: W - s * B @ A, lambda W, A, B, s, Q: W - s * B @ A - Q),
        loftq_of(lambda W, A, B, s: W - s * B @ A, lambda W, A, B, s, Q: W),
        lambda *a: loftq_turn(*a, new_s=1),
        lambda W, A, B, s, quantise: loftq_turn(W, A, B, s, quantise, new_s=1 / s),
        lambda W, A, B, s, quantise: (quantise(W - s * B @ A), A, B),
        lambda W, A, B, s, quantise: loftq_turn(W, A, B, s, lambda t: t),
        lambda W, A, B, s, quantise: loftq_turn(W, A[:1], B[:, :1], s, quantise),
        lambda W, A, B, s, quantise: (loftq_turn(W, A, B, s, quantise)[0], *loftq_turn(W, A, B, s, quantise)[:0:-1]),
        lambda *a: tuple(t.float() for t in loftq_turn(*a)),
        lambda W, A, B, s, quantise: loftq_turn(W.sub_(s * B @ A), A, 0 * B, s, quantise),
        lambda *a: loftq_turn(*a)[1:],
    ],
    "merge-4bit": [
        lost_by(lambda stored, merged, W, delta: (stored - merged).norm() / merged.norm()),
        lost_by(lambda stored, merged, W, delta: (stored - merged).norm() / W.norm()),
        lost_by(lambda stored, merged, W, delta: (stored - W).norm() / delta.norm()),
        lost_by(lambda stored, merged, W, delta: (stored - merged).norm()),
        lost_by(lambda stored, merged, W, delta: (stored - merged).square().sum() / delta.square().sum()),
        lost_by(lambda stored, merged, W, delta: (stored - merged).abs().max() / delta.abs().max()),
        lost_by(lambda stored, merged, W, delta: torch.linalg.matrix_norm(stored - merged, 2) / torch.linalg.matrix_norm(delta, 2)),
        lambda W, A, B, s, quantise: rounded_merge(W, A, B, 1, quantise),
        lambda W, A, B, s, quantise: (W + s * B @ A, rounded_merge(W, A, B, s, quantise)[1]),
        lambda W, A, B, s, quantise: (W + s * B @ A, 0.0),
        lambda W, A, B, s, quantise: (quantise(W) + s * B @ A, ((quantise(W) - W).norm() / (s * B @ A).norm()).item()),
        lambda W, A, B, s, quantise: (W + quantise(s * B @ A), ((quantise(s * B @ A) - s * B @ A).norm() / (s * B @ A).norm()).item()),
        lambda W, A, B, s, quantise: rounded_merge(W, A, B, s, quantise)[0],
        lambda W, A, B, s, quantise: rounded_merge(W.add_(1e-3), A, B, s, quantise),
        lambda *a: (rounded_merge(*a)[0].float(), rounded_merge(*a)[1]),
    ],
    "prepare": [
        casts(lambda name, p: True),
        casts(lambda name, p: False),
        casts(lambda name, p: p.dim() > 1),
        casts(lambda name, p: name.startswith("blocks.") and ".0." in name),
        casts(lambda name, p: p.dim() == 1 and not name.endswith("bias")),
        casts(lambda name, p: p.dim() == 1 or name == "head.weight"),
        casts(lambda name, p: p.dim() == 1 or name == "embed.weight"),
        lambda model: model.float(),
        lambda model: model.half(),
        cast_with_new_parameters,
        cast_and_round,
        cast_buffers_too,
    ],
}

# ---------------------------------------------------------------------------- chapter 11: hybrids


def budgeted(budget, width, shapes, least, cost=lambda o, i: o + i):
    one = sum(cost(o, i) for o, i in shapes)
    rank = (budget - least * width) // one
    return rank, (budget - rank * one) // width


def budgeted_by_search(budget, width, shapes, least):
    def size(rank, length):
        return length * width + sum(torch.empty(rank, o + i, device="meta").numel() for o, i in shapes)

    rank = max(r for r in range(40) if size(r, least) <= budget)
    return [rank, max(n for n in range(least, 2000) if size(rank, n) <= budget)]


def behind_lora(x, W, A, B, s, down, up, bend=torch.relu):
    y = x @ W.T + s * x @ A.T @ B.T
    return y + bend(y @ down.T) @ up.T


def behind_merged(x, W, A, B, s, down, up):
    y = x @ (W + s * B @ A).T
    return y + (y @ down.T).clamp(min=0) @ up.T


def parts_of(model, names):
    return [p for n in names for p in mp.adapters(model)[n].parameters()]


def one_part(frozen=lambda name, other: name != other, act=None, optimizer=torch.optim.SGD, scale=1.0,
             which=lambda model, name: parts_of(model, [name]), after=lambda model, name: None):
    def fn(model, name, ids, lr):
        for other, adapter in mp.adapters(model).items():
            adapter.requires_grad_(not frozen(name, other))
        if act:
            mp.activate(model, act(model, name))
        descent = optimizer(list(which(model, name)), lr=lr)
        (scale * model(input_ids=ids, labels=ids).loss).backward()
        descent.step()
        after(model, name)

    return fn


def one_part_by_autograd(model, name, ids, lr):
    part = mp.adapters(model).pop(name)
    model.requires_grad_(False)
    part.requires_grad_(True)
    own = list(part.parameters())
    for p, gradient in zip(own, torch.autograd.grad(model(input_ids=ids, labels=ids).loss, own)):
        p.data -= lr * gradient


def base_too(model, name, ids, lr):
    model.requires_grad_(True)
    one_part(which=lambda model, name: model.parameters())(model, name, ids, lr)
    model.requires_grad_(False)
    mp.adapters(model)[name].requires_grad_(True)


def attached_first(model, name, ids, lr):  # the optimizer knows what required gradients when it was built
    descent = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for other, adapter in mp.adapters(model).items():
        adapter.requires_grad_(other == name)
    model(input_ids=ids, labels=ids).loss.backward()
    descent.step()


def thawed_after(model, name):
    for adapter in mp.adapters(model).values():
        adapter.requires_grad_(True)


def folds(stop=lambda left: bool(left), strength=lambda s: s, keep=lambda part: True, most=99, say=lambda W, left: (W, left)):
    def fn(W, parts):
        W, left, done = W.clone(), [], 0
        for part in parts:
            if part[0] == "lora" and not stop(left) and done < most:
                W += strength(part[3]) * part[2] @ part[1]
                done += 1
            elif keep(part):
                left.append(part)
        return say(W, left)

    return fn


def folds_by_recursion(W, parts):
    if not parts or parts[0][0] == "adapter":
        return [W, tuple(parts)]
    _, A, B, s = parts[0]
    return folds_by_recursion(W + s * torch.einsum("or,ri->oi", B, A), parts[1:])


def folds_the_adapter_too(W, parts):
    for kind, one, two, *s in parts:
        W = W + (s[0] * two @ one if kind == "lora" else two @ one @ W)
    return W, []


def folds_in_place(W, parts):
    W += folds()(W, parts)[0] - W
    return W, folds()(W, parts)[1]


def empties_the_list(W, parts):
    W = W.clone()
    while parts and parts[0][0] == "lora":
        _, A, B, s = parts.pop(0)
        W += s * B @ A
    return W, parts


def each_rate(rate):
    def fn(groups, factor):
        for group in groups:
            group["lr"] = rate(group, groups, factor)

    return fn


def each_rate_by_index(groups, factor):
    for i in range(len(groups)):
        groups[i].update(lr=groups[i]["initial_lr"] * factor)


def lower_peaks(groups, factor):
    for group in groups:
        group["initial_lr"] *= factor
        group["lr"] = group["initial_lr"]


def new_groups(groups, factor):
    return [{**group, "lr": factor * group["initial_lr"]} for group in groups]


RIGHT |= {
    "hybrid-budget": [budgeted, budgeted_by_search],
    "lora-then-adapter": [behind_lora, behind_merged],
    "train-one-part": [one_part(), one_part_by_autograd],
    "fold-what-can": [folds(), folds_by_recursion],
    "set-rates": [each_rate(lambda g, all, factor: factor * g["initial_lr"]), each_rate_by_index],
}
WRONG |= {
    "hybrid-budget": [
        lambda b, w, s, n: (b // sum(o + i for o, i in s), n),
        lambda b, w, s, n: (budgeted(b, w, s, n)[0], n),
        lambda b, w, s, n: (budgeted(b, w, s, n)[0] + 1, n),
        lambda b, w, s, n: (budgeted(b, w, s, n)[0], budgeted(b, w, s, n)[1] - n),
        lambda b, w, s, n: budgeted(b, w, s, n, cost=lambda o, i: o * i),
        lambda b, w, s, n: budgeted(b, w, s, n, cost=lambda o, i: i),
        lambda b, w, s, n: budgeted(b, w, s[:1], n),
        lambda b, w, s, n: budgeted(b, w, s, n)[::-1],
        lambda b, w, s, n: tuple(map(float, budgeted(b, w, s, n))),
        lambda b, w, s, n: budgeted(b, w, s, n)[0],
        lambda b, w, s, n: budgeted(b, w, s, 0),
    ],
    "lora-then-adapter": [
        lambda x, W, A, B, s, d, u: (h := x @ W.T) + (h @ d.T).relu() @ u.T + s * x @ A.T @ B.T,
        lambda x, W, A, B, s, d, u: behind_lora(x, W, A, B, 1, d, u),
        lambda *a: behind_lora(*a, bend=lambda z: z),
        lambda *a: behind_lora(*a, bend=nn.functional.gelu),
        lambda x, W, A, B, s, d, u: behind_lora(x, W, A, B, s, d, u) - x @ (W + s * B @ A).T,
        lambda x, W, A, B, s, d, u: behind_lora(x, W, A, B, s, d, u) - s * x @ A.T @ B.T,
        lambda x, W, A, B, s, d, u: behind_lora(x, W, A, B, s, d, u) + x @ W.T,
        lambda x, W, A, B, s, d, u: behind_lora(x, W, A, 0 * B, s, d, u),
        lambda x, W, A, B, s, d, u: x @ (W + s * B @ A).T,
        lambda x, W, A, B, s, d, u: (y := x @ W.T) + (low := s * x @ A.T @ B.T) + (low @ d.T).relu() @ u.T,
        lambda *a: behind_lora(*a).relu(),
        lambda *a: behind_lora(*a).double().half(),
        lambda x, W, A, B, s, d, u: behind_lora(x, W.add_(s * B @ A), A, 0 * B, s, d, u),
        lambda *a: behind_lora(*a) * (1 + 1e-3),
    ],
    "train-one-part": [
        one_part(frozen=lambda name, other: False, which=lambda model, name: parts_of(model, mp.adapters(model))),
        one_part(frozen=lambda name, other: False),
        one_part(which=lambda model, name: parts_of(model, set(mp.adapters(model)) - {name})),
        one_part(act=lambda model, name: name),
        one_part(act=lambda model, name: name, after=lambda model, name: mp.activate(model, list(mp.adapters(model)))),
        one_part(optimizer=torch.optim.AdamW),
        one_part(scale=2.0),
        one_part(scale=-1.0),
        one_part(after=thawed_after),
        one_part(after=lambda model, name: model.requires_grad_(False)),
        one_part(after=lambda model, name: mp.detach(model, next(n for n in mp.adapters(model) if n != name))),
        lambda model, name, ids, lr: one_part()(copy.deepcopy(model), name, ids, lr) or 1,
        base_too, attached_first,
        lambda model, name, ids, lr: [one_part()(model, name, ids, lr), one_part()(model, name, ids, lr)] and None,
    ],
    "fold-what-can": [
        folds(stop=lambda left: False),
        folds(stop=lambda left: True),
        folds(most=1),
        folds(strength=lambda s: 1.0),
        folds(strength=lambda s: -s),
        folds(keep=lambda part: part[0] == "adapter"),
        folds(keep=lambda part: False),
        folds(say=lambda W, left: (W, left[::-1])),
        folds(say=lambda W, left: W),
        folds(say=lambda W, left: (W, len(left))),
        folds(say=lambda W, left: (W, [part[1:] for part in left])),
        folds(say=lambda W, left: (W.double().half(), left)),
        folds(say=lambda W, left: (left, W)),
        lambda W, parts: (folds()(W, parts)[0], parts),
        lambda W, parts: folds()(W, parts[::-1]),
        folds_the_adapter_too, folds_in_place, empties_the_list,
    ],
    "set-rates": [
        each_rate(lambda g, groups, factor: factor * groups[0]["initial_lr"]),  # the public mistake
        each_rate(lambda g, groups, factor: factor * max(h["initial_lr"] for h in groups)),
        each_rate(lambda g, groups, factor: factor * g["lr"]),
        each_rate(lambda g, groups, factor: factor),
        each_rate(lambda g, groups, factor: g["initial_lr"]),
        each_rate(lambda g, groups, factor: factor * sum(h["initial_lr"] for h in groups) / len(groups)),
        each_rate(lambda g, groups, factor: g["initial_lr"] / factor),
        lambda groups, factor: each_rate_by_index(groups[:1], factor),
        lambda groups, factor: each_rate_by_index(groups[1:], factor),
        lower_peaks, new_groups,
        lambda groups, factor: groups.pop() and None,
    ],
}


# ---------------------------------------------------------------------------- chapter 10


def chain_of(stages, adapted, way, alone=None, more=2):
    alone = {"LoRA": 2, "LoRA, merged": 1, "adapters": 3} if alone is None else alone
    more = 0 if way == "LoRA, merged" else more
    products = sum(1 + more * (name in adapted) for stage in stages for name in stage)
    return products, sum(max(alone[way] if name in adapted else 1 for name in stage) for stage in stages)


def median_ratio(own, base):
    return sorted_middle([a / b for a, b in zip(own, base)])


def sorted_middle(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def fold_or_not(layer, merge):
    if merge and layer.kept is None:
        layer.kept = layer.weight.detach().clone()
        layer.weight.data = (layer.kept.float() + layer.s * layer.B @ layer.A).detach().to(layer.weight.dtype)
    elif not merge and layer.kept is not None:
        layer.weight.data, layer.kept = layer.kept, None


@torch.no_grad()
def fold_from_kept(layer, merge):  # the same, from the kept weight whenever there is one
    W = layer.weight.clone() if layer.kept is None else layer.kept
    layer.weight.copy_(W + (layer.s * layer.B @ layer.A).to(W.dtype) if merge else W)
    layer.kept = W if merge else None


@torch.no_grad()
def fold_as_published(layer, merge):  # the public mistake
    delta = (layer.s * layer.B @ layer.A).to(layer.weight.dtype)
    layer.weight += delta if merge else -delta
    layer.kept = None


@torch.no_grad()
def fold_once_and_subtract(layer, merge):
    delta = layer.s * layer.B @ layer.A
    if merge and layer.kept is None:
        layer.kept = layer.weight.clone()
        layer.weight.copy_(layer.weight + delta)
    elif not merge and layer.kept is not None:
        layer.weight.copy_(layer.weight - delta)
        layer.kept = None


def fold_without_a_copy(layer, merge):
    if merge and layer.kept is None:
        layer.kept = layer.weight.data
        layer.weight.data += (layer.s * layer.B @ layer.A).to(layer.weight.dtype)
    elif not merge and layer.kept is not None:
        layer.weight.data, layer.kept = layer.kept, None


def folding(update=lambda layer: layer.s * layer.B @ layer.A, after=lambda layer: None):
    """`fold_or_not` with another update, or with something done behind it."""

    def fn(layer, merge):
        if merge and layer.kept is None:
            layer.kept = layer.weight.detach().clone()
            layer.weight.data = (layer.kept.float() + update(layer)).detach().to(layer.weight.dtype)
        elif not merge:
            fold_or_not(layer, merge)
        after(layer)

    return fn


def fold_and_forget(layer, merge):
    fold_or_not(layer, merge)
    layer.kept = None


def fold_and_keep(layer, merge):
    before = layer.kept
    fold_or_not(layer, merge)
    layer.kept = before if layer.kept is None else layer.kept


def stacked(As, Bs, scales, weights, factor=lambda w, s: w * s):
    return torch.cat(As), torch.cat([factor(w, s) * B for w, s, B in zip(weights, scales, Bs)], dim=1)


def stacked_in_place(As, Bs, scales, weights):
    for w, s, B in zip(weights, scales, Bs):
        B *= w * s
    return torch.cat(As), torch.cat(Bs, dim=1)


def summed_factors(As, Bs, scales, weights):
    least = min(map(len, As))
    return sum(A[:least] for A in As), sum(w * s * B[:, :least] for w, s, B in zip(weights, scales, Bs))


def whole_update(As, Bs, scales, weights):
    delta = sum(w * s * B @ A for w, s, A, B in zip(weights, scales, As, Bs))
    return torch.eye(delta.shape[1], dtype=delta.dtype), delta


def elected_mean(deltas, density, trim=None, elect=None, count=None):
    """TIES; the arguments break it."""
    flat = deltas.flatten(1)
    kept = flat.abs().topk(int(density * flat.shape[1])).indices
    trimmed = torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).view_as(deltas)
    trimmed = trimmed if trim is None else trim(deltas)
    elected = trimmed.sum(0).sign() if elect is None else elect(deltas, trimmed)
    agree = (trimmed.sign() == elected) & (trimmed != 0)
    return (trimmed * agree).sum(0) / (agree.sum(0).clamp(min=1) if count is None else count(trimmed))


def ties_by_sorting(deltas, density):
    n = int(density * deltas[0].numel())
    least = deltas.abs().flatten(1).sort(descending=True).values[:, n - 1, None, None]
    left = torch.where(deltas.abs() >= least, deltas, 0)
    up, down = left.clamp(min=0), left.clamp(max=0)
    return torch.where(left.sum(0) >= 0, up.sum(0) / (up > 0).sum(0).clamp(min=1), down.sum(0) / (down < 0).sum(0).clamp(min=1))


def gathered(x, A, B, s, which, k=None, scale=None):
    k = which.clamp(min=0) if k is None else k(which, len(A))
    scale = torch.where(which < 0, 0, s[k]) if scale is None else scale(which, s, k)
    return scale[:, None, None] * torch.bmm(torch.bmm(x, A[k].mT), B[k].mT)


def row_by_row(x, A, B, s, which):
    return torch.stack([s[k] * row @ A[k].T @ B[k].T if k >= 0 else x.new_zeros(x.shape[1], B.shape[1]) for row, k in zip(x, which.tolist())])


RIGHT |= {
    "products-and-chain": [chain_of, lambda *given: list(chain_of(*given))],
    "slowdown": [median_ratio, lambda own, base: torch.tensor([a / b for a, b in zip(own, base)], dtype=torch.float64).quantile(0.5).item()],
    "merge-switch": [fold_or_not, fold_from_kept],
    "as-one": [
        stacked,
        lambda As, Bs, scales, weights: (torch.cat([w * s * A for w, s, A in zip(weights, scales, As)]), torch.cat(Bs, dim=1)),
        lambda As, Bs, scales, weights: list(stacked(As[::-1], Bs[::-1], scales[::-1], weights[::-1])),
    ],
    "ties": [elected_mean, ties_by_sorting],
    "gathered-update": [gathered, row_by_row],
}

WRONG |= {
    "products-and-chain": [
        lambda stages, adapted, way: chain_of(stages, adapted, "LoRA"),
        lambda stages, adapted, way: chain_of(stages, adapted, "adapters"),
        lambda stages, adapted, way: chain_of(stages, set(), way),
        lambda stages, adapted, way: chain_of(stages, adapted, way, more=1),
        lambda stages, adapted, way: chain_of(stages, adapted, way, alone={"LoRA": 3, "LoRA, merged": 1, "adapters": 3}),
        lambda stages, adapted, way: chain_of(stages, adapted, way, alone={"LoRA": 1, "LoRA, merged": 1, "adapters": 3}),
        lambda stages, adapted, way: chain_of(stages, adapted, way, alone={"LoRA": 2, "LoRA, merged": 1, "adapters": 2}),
        lambda stages, adapted, way: chain_of([[name] for stage in stages for name in stage], adapted, way),
        lambda stages, adapted, way: (chain_of(stages, adapted, way)[0], len(stages)),
        lambda *given: chain_of(*given)[::-1],
        lambda *given: chain_of(*given)[0],
        lambda *given: tuple(map(float, chain_of(*given))),
    ],
    "slowdown": [
        lambda own, base: median_ratio(base, own),
        lambda own, base: sum(a / b for a, b in zip(own, base)) / len(own),
        lambda own, base: sum(own) / sum(base),
        lambda own, base: sorted_middle(own) / sorted_middle(base),
        lambda own, base: min(own) / min(base),
        lambda own, base: median_ratio(own, base) - 1,
        lambda own, base: 100 * median_ratio(own, base),
        lambda own, base: own[-1] / base[-1],
        lambda own, base: sorted(a / b for a, b in zip(own, base))[len(own) // 2 - 1],
        lambda own, base: sorted_middle([a / base[0] for a in own]),
        lambda own, base: median_ratio(sorted(own), sorted(base)),
        lambda own, base: [a / b for a, b in zip(own, base)],
        lambda own, base: round(median_ratio(own, base), 2),
    ],
    "merge-switch": [
        fold_as_published,
        fold_once_and_subtract,
        fold_without_a_copy,
        fold_and_forget,
        fold_and_keep,
        folding(update=lambda layer: layer.B @ layer.A),
        folding(update=lambda layer: -layer.s * layer.B @ layer.A),
        folding(after=lambda layer: layer.A.data.zero_()),
        folding(after=lambda layer: setattr(layer, "s", 0.0)),
        folding(after=lambda layer: layer.float()),
        lambda layer, merge: fold_or_not(layer, not merge),
        lambda layer, merge: fold_or_not(layer, True),
        lambda layer, merge: layer.weight.data.mul_(1),
        lambda layer, merge: (fold_or_not(layer, merge), layer)[1],
    ],
    "as-one": [
        lambda *given: stacked(*given, factor=lambda w, s: w),
        lambda *given: stacked(*given, factor=lambda w, s: s),
        lambda *given: stacked(*given, factor=lambda w, s: 1),
        lambda *given: stacked(*given, factor=lambda w, s: w * s / len(given[0])),
        lambda As, Bs, scales, weights: stacked([w * A for w, A in zip(weights, As)], Bs, scales, weights),
        lambda As, Bs, scales, weights: stacked(As[::-1], Bs, scales, weights),
        lambda As, Bs, scales, weights: stacked(As, Bs, scales, [abs(w) for w in weights]),
        lambda As, Bs, scales, weights: stacked(As[:1], Bs[:1], scales, weights),
        lambda *given: stacked(*given)[::-1],
        lambda *given: tuple(M.T for M in stacked(*given)),
        lambda *given: tuple(M.float() for M in stacked(*given)),
        lambda *given: stacked(*given)[1] @ stacked(*given)[0],
        summed_factors,
        whole_update,
        stacked_in_place,
    ],
    "ties": [
        lambda deltas, density: deltas.mean(0),
        lambda deltas, density: deltas.sum(0),
        lambda deltas, density: elected_mean(deltas, density, trim=lambda d: d),
        lambda deltas, density: elected_mean(deltas, 1 - density),
        lambda deltas, density: elected_mean(deltas, density, trim=lambda d: torch.where(d.flatten(1).argsort(1).argsort(1).view_as(d) >= d[0].numel() - int(density * d[0].numel()), d, 0)),
        lambda deltas, density: elected_mean(deltas, density, trim=lambda d: torch.where(d.abs() >= d.abs().flatten().topk(int(density * d.numel())).values[-1], d, 0)),
        lambda deltas, density: elected_mean(deltas, density, elect=lambda d, t: t.sign().sum(0).sign()),
        lambda deltas, density: elected_mean(deltas, density, elect=lambda d, t: d.sum(0).sign()),
        lambda deltas, density: elected_mean(deltas, density, elect=lambda d, t: -t.sum(0).sign()),
        lambda deltas, density: elected_mean(deltas, density, elect=lambda d, t: t[0].sign()),
        lambda deltas, density: elected_mean(deltas, density, count=lambda t: 1),
        lambda deltas, density: elected_mean(deltas, density, count=len),
        lambda deltas, density: elected_mean(deltas, density, count=lambda t: (t != 0).sum(0).clamp(min=1)),
        lambda deltas, density: elected_mean(deltas, density) / density,
        lambda deltas, density: elected_mean(deltas, density).double(),
        lambda deltas, density: elected_mean(deltas, density).T,
        lambda deltas, density: elected_mean(deltas.mul_(density), density),
    ],
    "gathered-update": [
        lambda *given: gathered(*given, k=lambda which, U: which, scale=lambda which, s, k: s[k]),
        lambda *given: gathered(*given, scale=lambda which, s, k: s[k]),
        lambda *given: gathered(*given, k=lambda which, U: torch.arange(len(which)) % U),
        lambda *given: gathered(*given, k=lambda which, U: 0 * which),
        lambda *given: gathered(*given, k=lambda which, U: which[:1].clamp(min=0).expand_as(which)),
        lambda *given: gathered(*given, scale=lambda which, s, k: (which >= 0).float()),
        lambda *given: gathered(*given, scale=lambda which, s, k: s[0] * (which >= 0)),
        lambda *given: gathered(*given, scale=lambda which, s, k: s[k].sqrt() * (which >= 0)),
        lambda x, A, B, s, which: gathered(x, A, B, s, which) * 0,
        lambda x, A, B, s, which: gathered(x, A.mean(0, keepdim=True).expand_as(A), B, s, which),
        lambda x, A, B, s, which: gathered(x, B.mT, A.mT, s, which) if A.shape[2] == B.shape[1] else gathered(x, A, B, s, which) * 2,
        lambda *given: gathered(*given).mT,
        lambda *given: gathered(*given)[:1],
        lambda *given: gathered(*given).double(),
        lambda *given: gathered(*given) * math.nan,
        lambda x, A, B, s, which: gathered(x, A, B, s, which.clamp_(min=0)),
    ],
}


def stub(*args):
    """What a student finds: nothing but this text."""
    ...


def unwritten(*args):
    raise NotImplementedError


# ---------------------------------------------------------------------------- answers of chapter 13


def lora_share(c, r, kv=None, tied=None, head=0, norms=1, below=1):
    d, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    narrow = d * (kv or c["num_key_value_heads"]) // c["num_attention_heads"]
    shapes = [(d, d), (narrow, d), (narrow, d), (d, d), (inner, d), (inner, d), (d, inner)]
    tables = 1 if (c["tie_word_embeddings"] if tied is None else tied) else 2
    base = layers * (sum(o * i for o, i in shapes) + 2 * d * norms) + d * norms + tables * c["vocab_size"] * d
    part = r * (layers * sum(o + i for o, i in shapes) + head * (c["vocab_size"] + d))
    return 100 * part / (base + below * part)


def fits(card, bits, share, bytes_each=16):
    return card / (bits / 8 + bytes_each * share)


def longer_prompt(hidden, heads, kv, inner, layers):
    return layers * (2 * hidden // heads * kv + inner) // hidden + 1


def wide_enough(percent, total, width, layers, per_layer=2, biases=1):
    m = 1
    while 100 * per_layer * layers * (2 * m * width + biases * (m + width)) < percent * total:
        m += 1
    return m


def ruling(full, lora, low, high, ends=True, best=min, flip=False, drop=True):
    found = []
    for sweep in (full, lora):
        losses = {r: x for r, x in sweep.items() if x is not None} if drop else {r: x or 0 for r, x in sweep.items()}
        found.append(best(losses, key=losses.get))
        if ends and found[-1] in (min(sweep), max(sweep)):
            return "open"
    times = found[1] / found[0] if flip else found[0] / found[1]
    return "holds" if low <= times <= high else "wrong"


def unpacked(tensors, held=lambda e, stored, bits: e * stored // bits, of=sum):
    numbers = [held(e, stored, bits) for e, stored, bits, _ in tensors]
    return 100 * sum(n for n, t in zip(numbers, tensors, strict=True) if t[3]) / of(numbers)


RIGHT |= {
    "lora-percent": [lora_share],
    "largest-model": [fits, lambda card, bits, share: card * 8 / (bits + 128 * share)],
    "tokens-above-ia3": [longer_prompt, lambda h, n, kv, i, layers: math.floor(layers * (2 * (h * kv // n) + i) / h) + 1],
    "bottleneck-for": [wide_enough],
    "verdict-on-rate": [ruling],
    "percent-trained": [unpacked],
}
WRONG |= {
    "lora-percent": [
        lambda c, r: lora_share(c, r, kv=c["num_attention_heads"]),
        lambda c, r: lora_share(c, r, below=0),
        lambda c, r: lora_share(c, r) / 100,
        lambda c, r: lora_share(c, 1),
        lambda c, r: lora_share(c, r, head=1),
        lambda c, r: lora_share(c, r, tied=False),
        lambda c, r: lora_share(c, r, tied=True),
        lambda c, r: lora_share(c, r, norms=0),
        lambda c, r: lora_share(c | {"num_hidden_layers": 1}, r),
        lambda c, r: round(lora_share(c, r), 2),
        lambda c, r: lora_share({**c, "hidden_size": c.pop("hidden_size")}, r),
        lambda c, r: 0.52,
    ],
    "largest-model": [
        lambda card, bits, share: fits(card, 8 * bits, share),
        lambda card, bits, share: fits(card, bits, 0),
        lambda card, bits, share: fits(card, bits, share, 4),
        lambda card, bits, share: fits(card, bits, share, 8),
        lambda card, bits, share: fits(card, bits, share, 12),
        lambda card, bits, share: fits(card, bits, share / 100),
        lambda card, bits, share: fits(card, bits, share) * 1.024**3,
        lambda card, bits, share: fits(card, bits, share) * 1e9,
        lambda card, bits, share: card * (bits / 8 + 16 * share),
        lambda card, bits, share: round(fits(card, bits, share)),
    ],
    "tokens-above-ia3": [
        lambda h, n, kv, i, layers: longer_prompt(h, n, kv, i, layers) - 1,
        lambda h, n, kv, i, layers: math.ceil(layers * (2 * h * kv // n + i) / h),
        lambda h, n, kv, i, layers: longer_prompt(h, n, n, i, layers),
        lambda h, n, kv, i, layers: layers * (h * kv // n + i) // h + 1,
        lambda h, n, kv, i, layers: longer_prompt(h, n, kv, 0, layers),
        lambda h, n, kv, i, layers: longer_prompt(h, n, kv, i, 1),
        lambda h, n, kv, i, layers: layers * (2 * h * kv // n + i),
        lambda h, n, kv, i, layers: float(longer_prompt(h, n, kv, i, layers)),
        lambda h, n, kv, i, layers: 151,
    ],
    "bottleneck-for": [
        lambda p, t, w, layers: wide_enough(p, t, w, layers) - 1,
        lambda p, t, w, layers: wide_enough(p, t, w, layers) + 1,
        lambda p, t, w, layers: wide_enough(p, t, w, layers, per_layer=1),
        lambda p, t, w, layers: wide_enough(p, t, w, layers, biases=0),
        lambda p, t, w, layers: wide_enough(p, t, w, 1) // layers,
        lambda p, t, w, layers: math.ceil(p * t / (2 * layers) / (2 * w + 1)),
        lambda p, t, w, layers: float(wide_enough(p, t, w, layers)),
        lambda p, t, w, layers: 64,
    ],
    "verdict-on-rate": [
        lambda full, lora, low, high: ruling(full, lora, low, high, ends=False),
        lambda full, lora, low, high: ruling(full, lora, low, high, flip=True),
        lambda full, lora, low, high: ruling(full, lora, low, high, best=max),
        lambda full, lora, low, high: ruling(full, lora, low, high, drop=False),
        lambda full, lora, low, high: ruling(lora, full, low, high),
        lambda full, lora, low, high: ruling(full, lora, 0, high),
        lambda full, lora, low, high: ruling(full, lora, low, math.inf),
        lambda full, lora, low, high: ruling(full, lora, low, high) == "holds",
        lambda full, lora, low, high: "wrong",
        lambda full, lora, low, high: "open",
    ],
    "percent-trained": [
        lambda tensors: unpacked(tensors, held=lambda e, stored, bits: e),
        lambda tensors: unpacked(tensors, held=lambda e, stored, bits: e * stored),
        lambda tensors: unpacked(tensors, held=lambda e, stored, bits: e * bits // stored),
        lambda tensors: unpacked(tensors, held=lambda e, stored, bits: 2 * e if bits == 4 else e),
        lambda tensors: unpacked(tensors) / 100,
        lambda tensors: unpacked(tensors, of=lambda numbers: numbers[0]),
        lambda tensors: unpacked([t for t in tensors if t[1] == t[2]]),
        lambda tensors: 100 - unpacked(tensors),
    ],
}


# ---------------------------------------------------------------------------- chapter 12: choosing


def fair(trials, choose=lambda at: statistics.mean(t["validation"] for t in at), best=min, report=statistics.mean):
    """Every method at the rate that `choose` finds best."""
    found = {}
    for name in dict.fromkeys(t["method"] for t in trials):
        by_rate = {}
        for t in trials:
            if t["method"] == name:
                by_rate.setdefault(t["rate"], []).append(t)
        found[name] = report([t["test"] for t in best(by_rate.values(), key=choose)])
    return found


def lead_of(a, b, variance=statistics.variance, error=lambda s, n: s / n):
    return statistics.mean(a) - statistics.mean(b), math.sqrt(error(variance(a), len(a)) + error(variance(b), len(b)))


def front(rows, beats=lambda s, c, own, cost: s >= own and c <= cost and (s, c) != (own, cost)):
    return {n for n, own, cost in rows if not any(beats(s, c, own, cost) for _, s, c in rows)}


def held_bytes(frozen, trained, bits, each=16):
    return frozen * bits / 8 + each * trained


def served(weights, adapter, tasks, memory, merged=lambda w, a, n: n * w, apart=lambda w, a, n: w + n * a):
    if merged(weights, adapter, tasks) <= memory:
        return "merged"
    return "unmerged" if apart(weights, adapter, tasks) <= memory else "neither"


RIGHT |= {
    "honest-scores": [fair, lambda trials: fair(trials[::-1])],
    "lead-and-error": [lead_of, lambda a, b: (-lead_of(b, a)[0], lead_of(b, a)[1])],
    "not-beaten": [front, lambda rows: sorted(front(rows))],
    "standing-bytes": [held_bytes, lambda f, t, b: (f * b + 128 * t) / 8],
    "how-to-serve": [served, lambda w, a, n, m: "merged" if n <= m / w else "unmerged" if n * a <= m - w else "neither"],
}
WRONG |= {
    "honest-scores": [
        lambda trials: fair(trials, lambda at: statistics.mean(t["test"] for t in at), max),
        lambda trials: fair(trials, lambda at: min(t["validation"] for t in at)),
        lambda trials: fair(trials, lambda at: statistics.median(t["validation"] for t in at), max),
        lambda trials: fair(trials, report=max),
        lambda trials: fair(trials, report=min),
        lambda trials: fair(trials, lambda at: -at[0]["rate"]),
        lambda trials: dict.fromkeys(fair(trials), 0.7),
        lambda trials: {m: t["test"] for m in fair(trials) for t in [min((t for t in trials if t["method"] == m), key=lambda t: t["validation"])]},
    ],
    "lead-and-error": [
        lambda a, b: lead_of(a, b, error=lambda s, n: s),
        lambda a, b: lead_of(a, b, variance=statistics.pvariance),
        lambda a, b: lead_of(a, b, error=lambda s, n: s / n**2),
        lambda a, b: lead_of(b, a),
        lambda a, b: (lead_of(a, b)[0], lead_of(a, b)[1] ** 2),
        lambda a, b: (lead_of(a, b)[0], statistics.stdev(a) / math.sqrt(len(a)) + statistics.stdev(b) / math.sqrt(len(b))),
        lambda a, b: (max(a) - max(b), lead_of(a, b)[1]),
        lambda a, b: lead_of(a, b, error=lambda s, n: s / (len(a) + len(b))),
    ],
    "not-beaten": [
        lambda rows: front(rows, lambda s, c, own, cost: s > own and c < cost),
        lambda rows: {n for n, own, cost in rows if not any(s >= own and c <= cost for m, s, c in rows if m != n)},
        lambda rows: front(rows, lambda s, c, own, cost: s > own),
        lambda rows: front(rows, lambda s, c, own, cost: s >= own and c < cost),
        lambda rows: front(rows, lambda s, c, own, cost: s > own and c <= cost),
        lambda rows: {n for n, *_ in rows},
        lambda rows: {n for n, *_ in rows} - front(rows),
        lambda rows: {max(rows, key=lambda r: r[1])[0]},
    ],
    "standing-bytes": [
        lambda f, t, b: held_bytes(f, t, b, 12),
        lambda f, t, b: held_bytes(f, t, b, 8),
        lambda f, t, b: held_bytes(f, t, b, 4),
        lambda f, t, b: held_bytes(8 * f, t, b),
        lambda f, t, b: held_bytes(f, t, b, 2 * b),
        lambda f, t, b: held_bytes(f, t, b) / 2**10,
        lambda f, t, b: held_bytes(0, t, b),
        lambda f, t, b: held_bytes(4 * f, t, b),
    ],
    "how-to-serve": [
        lambda *given: served(*given, merged=lambda w, a, n: math.inf),
        lambda *given: served(*given, merged=lambda w, a, n: w),
        lambda *given: served(*given, merged=lambda w, a, n: (n + 1) * w),
        lambda *given: served(*given, apart=lambda w, a, n: n * a),
        lambda *given: served(*given, apart=lambda w, a, n: w + a),
        lambda *given: served(*given, apart=lambda w, a, n: n * (w + a)),
        lambda w, a, n, m: served(w, a, n, m - 1),
        lambda *given: "unmerged",
    ],
}


def test_every_exercise_of_the_course_has_right_and_wrong_answers_here():
    assert set(exercises()) == set(RIGHT) == set(WRONG)
    assert set(exercises("ch05_lora")) == {"lora-forward", "lora-init", "lora-parameter-count", "lora-merge", "freeze"}


@pytest.mark.parametrize("id, answer", [(i, a) for i, answers in RIGHT.items() for a in answers])
def test_a_right_answer_passes(id, answer):
    for _ in range(3):
        found = exercises()[id](answer)
        assert found.passed, found


@pytest.mark.parametrize("id, number", [(i, n) for i, answers in WRONG.items() for n in range(len(answers))])
def test_a_wrong_answer_is_refused_with_a_reason(id, number):
    found = exercises()[id](WRONG[id][number])
    assert found.status == "failed", found
    assert found.why and not found


@pytest.mark.parametrize("id", sorted(RIGHT))
@pytest.mark.parametrize("answer", [stub, unwritten, lambda *args: None, lambda *args: ..., None, ...])
def test_a_stub_is_not_attempted(id, answer):
    found = exercises()[id](answer)
    assert found.status == "not attempted"
    assert not found


@pytest.mark.parametrize(
    "id, answer, words",
    [
        ("lora-forward", lambda x, W, A, B, alpha, rank: x @ W.T + alpha / rank * (x @ B @ A), "A and B are swapped"),
        ("lora-forward", lambda x, W, A, B, alpha, rank: x @ W.T + alpha * (x @ A.T @ B.T), "alpha, not by alpha / rank"),
        ("lora-merge", lambda W, A, B, alpha, rank: W + B @ A, "scale alpha / rank is missing"),
        ("lora-parameter-count", lambda s, r: sum(o * i for o, i in s), "the size of ΔW"),
        ("freeze", freeze_modules, "requires_grad set on a *module*"),
        ("adapted-block", after_the_norm, "after the norm, outside the residual"),
        ("adapter-forward", lambda h, W, b, U, c: bottleneck(h, W, b, U, c) - h, "the skip is missing"),
        ("adamw-state-bytes", lambda m: adamw_bytes(m) // 2, "two moments"),
        ("completion-only-labels", lambda p, c: p + c, "the prompt is not masked"),
        ("forgetting", lambda a: [a[j][j] - a[-1][j] for j in range(len(a) - 1)], "from its best"),
        ("count-trainable", lambda m: sum(p.numel() for p in m.parameters()), "frozen numbers"),
        ("dora-weight", lambda W, A, B, m, a, r: m[:, None] * (V := W + a / r * B @ A) / V.norm(dim=0), "down the columns"),
        ("dora-forward", dora_layer_with(lambda V, W: V.norm(dim=1)), "section 4.3"),
        ("ia3-block", lambda x, W, l: (rescaled(x, W, l)[0], torch.relu(l["ff"] * (x @ W["up"].T)) @ W["down"].T), "before the activation"),
        ("ia3-merge", lambda W, b, l, ff: (W * l if ff else l[:, None] * W, b), "the bias is not rescaled"),
        ("pissa-as-lora", lambda A, B, A0, B0, a, r: (torch.cat([A, A0]), torch.cat([B, -B0], 1), a), "alpha stayed the same"),
        ("elements-of-thread", lambda b, t, B, G, n: list(range(b * G + t, n, B * G)), "multiplied by the number of blocks"),
        ("least-bytes", lambda n, block_size, out_bytes: n // 2 + 4 * -(-n // block_size) + n * out_bytes, "an odd number of codes"),
        ("scale-body", cuda(SCALE, ("a * x[i]", "a + x[i]")), "a is added"),
        ("absmax-body", cuda(ABSMAX, ("fabsf(x[i])", "x[i]")), "the sign is in the way"),
        ("dequantize-body", cuda(DEQUANTIZE, ("scales[i / block_size]", "scales[byte / block_size]")), "of another block"),
        ("dequantize-body", cuda(DEQUANTIZE_IN_STRIDES, ("i % 2 ?", "i % 2 == 0 ?")), "halves of a byte are swapped"),
        ("lengthen", lambda m, y, n: (nn.functional.pad(m, (n, 0)), lengthen(m, y, n)[1]), "the prompt is masked out"),
        ("prompt-step", lambda *a: prompt_step(*a, first=0), "the first places"),
        ("nearest-words", lambda P, t: (P @ t.T).argmax(1).tolist(), "the largest dot product"),
        ("answer-log-probs", lambda z, q, a: log_probs(z, q, a, first=len(q) - 1), "without the soft prompt"),
        ("qlora-backward", lambda g, x, c, m, A, B, s: (s * (g @ B) @ A, *qlora_gradients(g, x, c, m, A, B, s)[1:]), "the gradient passes through it"),
        ("loftq-step", lambda *a: loftq_turn(*a, new_s=1), "s times too large"),
        ("prepare", casts(lambda name, p: True), "everything is cast"),
        ("nf4-levels", lambda a, b, o: quantile_levels(a, b, o) * torch.special.ndtri(torch.tensor(o)), "not divided"),
        ("quantize-blocks", lambda x, l, b: in_blocks(x, l, b, find=lambda z, l: ((z + 1) * 7.5).round().long()), "a uniform grid"),
        ("pack-nibbles", lambda c: packed_bytes(c, high=1), "the earlier code is in the low half"),
        ("decode-nf4", lambda p, s, l, b, n: (nibbles(p, n) - 8) / 8 * s.repeat_interleave(b)[:n], "the number of a level"),
        ("decode-nf4", lambda p, s, l, b, n: decoded(p, s, l, b, n, order=(1, 0)), "the wrong order"),
        ("bits-per-weight", lambda b, n: bits(b, n) / 8, "these are bytes"),
        ("double-quantize", lambda s, l, n: scales_twice(s, l, n, offset=lambda s: s.new_zeros(())), "not subtracted first"),
        ("products-and-chain", lambda stages, adapted, way: (chain_of(stages, adapted, way)[0], len(stages)), "the chain of the bare model"),
        ("slowdown", lambda own, base: sorted_middle(own) / sorted_middle(base), "the ratio of the medians"),
        ("as-one", summed_factors, "B_1 A_2"),
        ("ties", lambda d, density: elected_mean(d, density, count=len), "divided by all n"),
        ("gathered-update", lambda *given: gathered(*given, k=lambda which, U: which, scale=lambda which, s, k: s[k]), "-1 is the last adapter"),
        ("hybrid-budget", lambda b, w, s, n: (budgeted(b, w, s, n)[0], n), "not given to the prompt"),
        ("lora-then-adapter", WRONG["lora-then-adapter"][0], "before LoRA: that is the other order"),
        ("train-one-part", WRONG["train-one-part"][4], "the other adapters did not act"),
        ("fold-what-can", folds(stop=lambda left: False), "a LoRA behind an adapter was folded"),
        ("set-rates", each_rate(lambda g, groups, factor: factor * groups[0]["initial_lr"]), "the first group's peak"),
        ("honest-scores", WRONG["honest-scores"][0], "the test is not unseen"),
        ("lead-and-error", WRONG["lead-and-error"][0], "the spread of single runs"),
        ("not-beaten", WRONG["not-beaten"][0], "better in both"),
        ("how-to-serve", WRONG["how-to-serve"][2], "the base is not needed"),
        ("lora-percent", lambda c, r: lora_share(c, r, kv=c["num_attention_heads"]), "as wide as queries"),
        ("largest-model", lambda card, bits, share: fits(card, bits, 0), "nothing but the frozen weights"),
        ("tokens-above-ia3", WRONG["tokens-above-ia3"][1], "not more"),
        ("verdict-on-rate", lambda *given: ruling(*given, flip=True), "upside down"),
        ("percent-trained", WRONG["percent-trained"][0], "elements are counted"),
    ],
)
def test_the_likely_mistake_is_named(id, answer, words):
    assert words in exercises()[id](answer).likely


@pytest.mark.parametrize(
    "id, answer, words",
    [
        ("scale-body", cuda(SCALE, ("i < n", "i <= n")), "scale, line 2: outside argument 0"),
        ("absmax-body", cuda(ABSMAX, ("        __syncthreads();\n", "")), "absmax, line 6: race on the shared memory most"),
        ("absmax-body", cuda(ABSMAX, ("    most[t] = i", "    if (i >= n) return;\n    most[t] = i")), "divergence in line 5"),
    ],
)
def test_ch08_a_kernels_fault_is_told_with_the_students_own_line(id, answer, words):
    found = exercises()[id](answer)
    assert words in found.why and "<<<" in found.case, found


def test_ch08_without_an_emulator_an_attempt_is_not_checked_and_a_stub_is_not_attempted(monkeypatch):
    monkeypatch.setattr(ch08_cuda_kernel, "no_emulator", lambda: "no C++ compiler is found")
    for answer in (cuda(SCALE), cuda(SCALE, ("i < n", "i <= n"))):
        found = exercises()["scale-body"](answer)
        assert found.status == "not checked" and "no C++ compiler" in found.why and not found
    assert exercises()["scale-body"](lambda: None).status == "not attempted"
    assert exercises()["scale-body"](lambda: 3).status == "failed"


# ---------------------------------------------------------------------------- the frame itself


@pytest.mark.parametrize(
    "module, oracle, lie, id, right",
    [
        (ch05_lora, "_delta", lambda A, B, s: torch.zeros(len(B), A.shape[1]).double(), "lora-merge", merge),
        (ch05_lora, "_delta", lambda A, B, s: torch.zeros(len(B), A.shape[1]).double(), "lora-forward", lora),
        (ch05_lora, "_init_reason", lambda value, given: None, "lora-init", kaiming),
        (ch04_adapters, "_adapter", lambda h, *weights: torch.zeros_like(h).double(), "adapter-forward", bottleneck),
        (ch04_adapters, "_adapter_reason", lambda value, h, y: None, "trainable-adapter", linears),
        (ch06_dora_ia3, "_rows_of_length", lambda V, m: torch.zeros_like(V), "dora-weight", dora),
        (ch06_dora_ia3, "_attended", lambda x, W, l, root=None: x.new_zeros(*x.shape[:2], len(W["v"])), "ia3-block", rescaled),
        (ch01_full, "_moments", lambda model: 0, "adamw-state-bytes", adamw_bytes),
        (ch08_cuda_kernel, "_decoded", lambda packed, scales, n, *a, **k: torch.zeros(n).double(), "dequantize-body", cuda(DEQUANTIZE)),
        (ch01_full, "_forgetting", lambda a: [0.0] * (len(a) - 1), "forgetting", forgot),
        (ch00_start, "_numbers", lambda parameters: 0, "count-trainable", trainable),
        (ch02_soft_prompts, "_longer", lambda mask, labels, length: (mask, labels), "lengthen", lengthen),
        (ch07_nf4, "_twice", lambda s, *rest, **how: s, "double-quantize", scales_twice),
        (ch07_nf4, "_quantile_levels", lambda above, below, offset: [0.0] * (above + below + 1), "nf4-levels", quantile_levels),
        (ch09_qlora, "_decoded", lambda codes, absmax: torch.zeros(codes.shape).double(), "qlora-backward", qlora_gradients),
        (ch02_soft_prompts, "_encoded", lambda E, W, b: E, "p-tuning-mlp", encoder),
        (ch10_merge_and_serve, "_ties", lambda deltas, density: deltas.mean(0).double(), "ties", elected_mean),
        (ch10_merge_and_serve, "_switch_reason", lambda value, right, change, near: None, "merge-switch", fold_or_not),
        (ch11_hybrids, "_in_order", lambda x, W, *rest: x.double() @ W.double().T, "lora-then-adapter", behind_lora),
        (ch11_hybrids, "_stepped", lambda model, *rest: ch11_hybrids._state(model), "train-one-part", one_part()),
    ],
)
def test_the_vacuity_guard_reports_a_check_whose_oracle_shows_nothing(monkeypatch, module, oracle, lie, id, right):
    monkeypatch.setattr(module, oracle, lie)
    for answer in (right, stub):
        found = exercises()[id](answer)
        assert found.status == "broken" and "not your answer" in found.why


def test_a_mistake_that_is_always_right_breaks_the_check():
    def cases(draw):
        for n in (2, 3, 5):
            x = draw.normal(n)
            yield Case(given={"x": x}, want=2 * x.double(), mistakes={"added to itself": x.double() + x.double()})

    assert "'added to itself' gives the right answer" in frame.broken(list(cases(Draw(0))))


def test_numbers_that_happen_to_show_nothing_are_drawn_again():
    def cases(draw):
        chance = draw.integer(0, 1)
        for n in (3, 5, 7):
            yield Case(given={"n": n * chance}, want=2 * n * chance)

    unlucky = [seed for seed in range(8) if frame.broken(list(cases(Draw(seed))))]
    assert len(unlucky) > 1 and {Exercise("lucky", 1, cases)(lambda n: 2 * n, seed=seed).status for seed in unlucky} == {"passed"}
    assert {Exercise("lucky", 1, cases)(lambda n: n + n * n, seed=seed).status for seed in unlucky} == {"failed"}


def test_a_check_of_fewer_than_three_cases_is_broken():
    found = Exercise("few", 1, lambda draw: iter([Case(given={"n": 3}, want=6)]))(lambda n: 2 * n)
    assert found.status == "broken" and "at least 3" in found.why


def test_each_call_draws_a_fresh_seed_and_a_given_one_repeats_the_case():
    check = exercises()["lora-forward"]
    seen = [check(lambda x, *rest: x).seed for _ in range(5)]
    assert len(set(seen)) == 5
    one, two = (check(lambda x, W, A, B, alpha, rank: x @ W.T, seed=seen[0]) for _ in range(2))
    assert one == two and f"seed={seen[0]}" in str(one)


def test_a_seed_repeats_what_the_student_draws_too():
    drawn = []

    def fn(o, i, r):
        drawn.append((torch.rand(()).item(), random.random()))
        return kaiming(o, i, r)[::-1]

    first = exercises()["lora-init"](fn)
    exercises()["lora-init"](fn, seed=first.seed)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda y: y.tolist(), "returned a list, expected a tensor of shape (2, 3, 11)"),
        (lambda y: y.as_subclass(Liar), "returned a Liar, expected a tensor"),
        (lambda y: y[0], "its shape is (3, 11), expected (2, 3, 11)"),
        (lambda y: y.half(), "its dtype is torch.float16, expected torch.float32"),
        (lambda y: y.to("meta"), "it is on meta, expected cpu"),
        (lambda y: y.to_sparse(), "its layout is torch.sparse_coo"),
        (lambda y: y * math.nan, "66 of its 66 entries are NaN"),
        (lambda y: y / 0, "66 of its 66 entries are infinite"),
        (lambda y: y + 1, "allowed 1e-05); worst at ["),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_precise_reason(change, words):
    assert words in exercises()["lora-forward"](lambda *args: change(lora(*args))).why


def test_a_check_leaves_the_students_random_numbers_alone():
    torch.manual_seed(3), random.seed(3)
    expected = torch.rand(2).tolist(), random.random()
    torch.manual_seed(3), random.seed(3)
    exercises()["lora-init"](kaiming)
    assert (torch.rand(2).tolist(), random.random()) == expected


def test_an_answer_that_works_only_once_fails():
    calls = []

    def once(*args):
        calls.append(1)
        return lora(*args) if len(calls) == 1 else None

    assert "returned nothing here" in exercises()["lora-forward"](once).why


def test_an_exception_is_reported_with_the_students_line():
    def fn(x, W, A, B, alpha, rank):
        y = x @ W.T
        return y / 0 + undefined  # noqa: F821

    found = exercises()["lora-forward"](fn)
    assert "NameError" in found.why and "line 3 of your function" in found.why


def test_a_shown_check_carries_its_status_for_the_runner_and_escapes_its_text():
    def fn(*args):
        raise ValueError("<b>x</b>")

    bundle = exercises()["lora-merge"](fn)._repr_mimebundle_()
    assert bundle[frame.CHECK_MIME]["status"] == "failed"
    assert "&lt;b&gt;" in bundle["text/html"] and "<b>x" not in bundle["text/html"]


def test_two_exercises_cannot_have_one_id():
    def cases(draw):
        yield

    cases.__module__ = "minipeft.checks.ch99"
    with pytest.raises(ValueError, match="two exercises have the id 'freeze'"):
        frame.exercise("freeze")(cases)


def test_relative_errors_are_measured_against_the_largest_right_entry():
    want = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert frame.relative_error(want + torch.tensor([0.0, 1.0]), want) == pytest.approx(1e-6)
    assert frame.relative_error(want * math.nan, want) == math.inf


def test_a_count_is_an_int_and_neither_a_bool_nor_a_float():
    assert frame.wrong_kind(True, 1, None) and frame.distance(True, 1) == math.inf
    assert frame.wrong_kind(1.0, 1, None) and frame.distance(1.0, 1) == math.inf
    assert frame.wrong_kind(torch.tensor(1), 1, None) is None and frame.distance(torch.tensor(1), 1) == 0


def test_same_bytes_sees_what_equality_does_not():
    zero = torch.zeros(2)
    assert not frame.same_bytes(zero, -zero) and torch.equal(zero, -zero)
    nan = torch.full((2,), math.nan)
    assert frame.same_bytes(nan, nan.clone())
    frozen = nn.Linear(2, 2).requires_grad_(False)
    thawed = nn.Linear(2, 2)
    thawed.load_state_dict(frozen.state_dict())
    assert not frame.same_bytes(frozen, thawed)
