"""Exercise checks: the right answer passes, every plausible wrong one is refused, a stub is neither."""

import math
import random

import pytest
import torch
from torch import nn

from minipeft.checks import exercises, frame
from minipeft.checks import ch00_start, ch01_full, ch05_lora
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


RIGHT = {
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


def stub(*args):
    """What a student finds: nothing but this text."""
    ...


def unwritten(*args):
    raise NotImplementedError


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
        ("adamw-state-bytes", lambda m: adamw_bytes(m) // 2, "two moments"),
        ("completion-only-labels", lambda p, c: p + c, "the prompt is not masked"),
        ("forgetting", lambda a: [a[j][j] - a[-1][j] for j in range(len(a) - 1)], "from its best"),
        ("count-trainable", lambda m: sum(p.numel() for p in m.parameters()), "frozen numbers"),
    ],
)
def test_the_likely_mistake_is_named(id, answer, words):
    assert words in exercises()[id](answer).likely


# ---------------------------------------------------------------------------- the frame itself


@pytest.mark.parametrize(
    "module, oracle, lie, id, right",
    [
        (ch05_lora, "_delta", lambda A, B, s: torch.zeros(len(B), A.shape[1]).double(), "lora-merge", merge),
        (ch05_lora, "_delta", lambda A, B, s: torch.zeros(len(B), A.shape[1]).double(), "lora-forward", lora),
        (ch05_lora, "_init_reason", lambda value, given: None, "lora-init", kaiming),
        (ch01_full, "_moments", lambda model: 0, "adamw-state-bytes", adamw_bytes),
        (ch01_full, "_forgetting", lambda a: [0.0] * (len(a) - 1), "forgetting", forgot),
        (ch00_start, "_numbers", lambda parameters: 0, "count-trainable", trainable),
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
