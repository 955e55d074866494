"""The frame of the exercise checks: what a check is, and what keeps it honest.

A check is a function that draws cases. The frame calls the student's answer on each and compares:

    @exercise("scale", points=1)
    def scale(draw):
        "fn(x, alpha) -> alpha x"
        for rows, columns in ((1, 7), (5, 3), (4, 13)):
            x, alpha = draw.normal(rows, columns), draw.uniform(0.3, 0.8)
            yield Case(
                given={"x": x, "alpha": alpha},
                want=alpha * x.double(),
                mistakes={"divided instead of multiplied": lambda x=x, alpha=alpha: x / alpha},
            )

    scale(my_answer)        # -> Check: passed, failed (why), not attempted, not checked, or broken

- The seed is fresh each time (os.urandom) and printed on a failure; `scale(my_answer, seed=…)`
  repeats it.
- The answer gets deep copies. Changing them is a failure, found by comparing bytes.
- Answers are compared in float64, relative to the largest right entry.
- Vacuity guard: zeros, each input of the right shape, and whatever the case lists as `vacuous`
  must miss by more than 100 tolerances, and every named mistake must be wrong in some case.
  Otherwise the check says that it is *broken*, whatever the answer was.
- None, `...` and NotImplementedError are *not attempted*, never *passed*.
- *not checked* is an answer that this machine cannot judge, for want of a compiler, say.
"""

from __future__ import annotations

import copy
import dis
import html
import math
import numbers
import operator
import os
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

MARGIN = 100  # how many tolerances a vacuous answer must miss by
FEWEST_CASES = 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
CHECK_MIME = "application/vnd.minipeft.check+json"  # read by the notebook runner
COLOUR = {"passed": "#009E73", "failed": "#D55E00", "not attempted": "#6e7781", "not checked": "#6e7781", "broken": "#CC79A7"}


@dataclass(frozen=True)
class Check:
    """What a check found. True in a condition only if it passed."""

    exercise: str
    status: str  # "passed", "failed", "not attempted", "not checked" or "broken"
    why: str = ""
    case: str = ""  # the arguments for which it failed
    likely: str = ""  # the mistake that gives exactly this answer, if there is one
    seed: int | None = None
    points: int = 1

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return "\n".join(["  ".join(filter(None, [self._head(), self.why])), *self._notes()])

    __repr__ = __str__

    def _head(self) -> str:
        return f"{self.exercise}: {self.status}" + (f" ({self.points} points)" if self.passed and self.points > 1 else "")

    def _notes(self) -> list[str]:
        notes = [f"likely mistake: {self.likely}"] if self.likely else []
        if self.status == "failed":
            notes += [f"with {self.case}"] if self.case else []
            notes.append(f"to see this very case again: seed={self.seed}")
        return notes

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        why = f"<div>{html.escape(self.why)}</div>" if self.why else ""
        notes = "".join(f'<div style="color:#57606a">{html.escape(note)}</div>' for note in self._notes())
        markup = (
            f'<div style="border-left:4px solid {COLOUR[self.status]};padding:.3em .9em;margin:.4em 0">'
            f"<b>{html.escape(self._head())}</b>{why}{notes}</div>"
        )
        found = {"exercise": self.exercise, "status": self.status, "why": self.why, "points": self.points}
        return {"text/html": markup, "text/plain": str(self), CHECK_MIME: found}


@dataclass(frozen=True)
class Case:
    """One question put to the student's function, with the oracle's answer.

    given       the arguments, in order
    want        the right answer, computed in float64 from `given`; None if only `test` decides
    vacuous     answers that show nothing, such as the base's output: each must be refused
    mistakes    name -> the answer (or a function without arguments that gives it) of a likely mistake
    test        (value, given) -> None, or why the value is refused
    observe     (returned, given after the call, given) -> the value to judge, for functions that work
                in place; raises `Refused` with the reason. A function of a module, or a partial of one:
                a grader sends it to the process where the answer runs
    may_change  names in `given` that the function may change
    told        what `given` cannot say of the case, for the report of a failure
    """

    given: dict[str, Any]
    want: Any = None
    vacuous: Mapping[str, Any] = field(default_factory=dict)
    mistakes: Mapping[str, Any] = field(default_factory=dict)
    test: Callable[[Any, dict], str | None] | None = None
    observe: Callable[[Any, dict, dict], Any] | None = None
    may_change: tuple[str, ...] = ()
    told: str = ""

    @property
    def like(self) -> torch.Tensor | None:
        """The input whose dtype and device the answer must have: the first tensor of floats."""
        return next((v for v in self.given.values() if isinstance(v, torch.Tensor) and v.is_floating_point()), None)

    @property
    def allowed(self) -> float:
        return tolerance(self.want, self.like)

    def refuse(self, value: Any) -> str | None:
        """Why `value` is not the right answer, or None."""
        if self.want is not None:
            if reason := wrong_kind(value, self.want, self.like):
                return reason
            if not distance(value, self.want) <= self.allowed:
                return _how_far(value, self.want, self.allowed)
        return self.test(value, self.given) if self.test else None

    def shows_nothing(self, value: Any) -> bool:
        """Whether `value`, an answer without content, would come near passing."""
        if self.want is None:
            return self.refuse(value) is None
        return distance(value, self.want) <= MARGIN * self.allowed


class Refused(Exception):
    """Raised by a case's `observe`: the answer is wrong, and the message says why."""


class NotHere(Exception):
    """Raised by a case's `observe`: this machine cannot judge the answer, and the message says why."""


class Draw:
    """Random numbers of one seed, for drawing cases. Independent of torch's global state."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)).to(dtype)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def integers(self, count: int, low: int, high: int) -> list[int]:
        return [self.integer(low, high) for _ in range(count)]

    def pick(self, options: Iterable) -> Any:
        options = list(options)
        return options[self.integer(0, len(options) - 1)]


# ---------------------------------------------------------------------------- the registry

_EXERCISES: dict[str, Exercise] = {}


DRAWS = 5  # of a check's numbers, before it is called broken


class Exercise:
    """A check that can be called with a student's answer, and listed by its id."""

    def __init__(self, id: str, points: int, cases: Callable[[Draw], Iterator[Case]]):
        self.id, self.points, self.cases = id, points, cases
        self.chapter = cases.__module__.rsplit(".", 1)[-1]
        self.__name__, self.__doc__, self.__module__ = cases.__name__, cases.__doc__, cases.__module__

    def __repr__(self) -> str:
        return f"<exercise {self.id!r} of {self.chapter}>"

    def __call__(self, answer: Any, *, seed: int | None = None) -> Check:
        """Check `answer`. Give `seed` only to repeat a case that failed."""
        return self.judge(lambda case: attempt(answer, case), seed=seed)

    def judge(self, attempt: Callable[[Case], Attempt], *, seed: int | None = None) -> Check:
        """Check an answer that may live in another process: `attempt(case)` tells what it made of a case."""
        seed = int.from_bytes(os.urandom(4), "big") if seed is None else seed
        before = random.getstate()
        with torch.random.fork_rng(devices=[]):  # the student's own random numbers go on undisturbed
            torch.manual_seed(seed)
            random.seed(seed)
            try:
                found = self._judge(attempt, seed)
            finally:
                random.setstate(before)
        return Check(self.id, seed=seed, points=self.points, **found)

    def _judge(self, attempt: Callable[[Case], Attempt], seed: int) -> dict[str, str]:
        """Status, reason, case and likely mistake of an answer, as fields of a Check."""
        for luck in range(DRAWS):                                # numbers may happen to show nothing: then others are drawn
            cases = list(self.cases(Draw((seed + luck * 0x9E3779B9) % 2**32)))
            trouble = broken(cases)
            if not trouble:
                break
        if trouble:
            return {"status": "broken", "why": f"the check itself is wrong, not your answer: {trouble}"}
        for number, case in enumerate(cases, start=1):
            status, why, likely = _compare(attempt(case), case, first=number == 1)
            if status == "failed":
                return {"status": status, "why": why, "likely": likely, "case": case.told or describe(case.given)}
            if status != "passed":
                return {"status": status, "why": why}
        return {"status": "passed"}


@dataclass(frozen=True)
class Attempt:
    """What an answer made of one case, before anything is compared."""

    value: Any = None
    status: str = "returned"  # or "nothing" (returned), "not attempted", "not checked" or "failed", with the reason
    why: str = ""


def attempt(answer: Any, case: Case) -> Attempt:
    """Call `answer` on copies of what the case gives. Needs only `given`, `observe` and `may_change` of the case."""
    if answer is None or answer is Ellipsis:
        return Attempt(status="not attempted")
    if not callable(answer):
        return Attempt(status="failed", why=f"expected a function, got a {type(answer).__name__}")
    mine = copy.deepcopy(case.given)
    try:
        value = answer(*mine.values())
    except NotImplementedError as error:
        return Attempt(status="not attempted", why=str(error))
    except (Exception, SystemExit) as error:
        return Attempt(status="failed", why=f"raised {type(error).__name__}: {error}{_line_of(error, answer)}")
    if value is Ellipsis or (value is None and case.observe is None) or (value is None and is_stub(answer)):
        return Attempt(status="nothing")
    for name, original in case.given.items():
        if name not in case.may_change and not same_bytes(mine[name], original):
            return Attempt(status="failed", why=f"it changed its argument {name!r} in place")
    try:
        return Attempt(case.observe(value, mine, case.given) if case.observe else value)
    except Refused as refusal:
        return Attempt(status="failed", why=str(refusal))
    except NotHere as reason:
        return Attempt(status="not checked", why=str(reason))
    except Exception as error:  # an object that breaks when it is looked at
        return Attempt(status="failed", why=_unjudgeable(error))


def _compare(found: Attempt, case: Case, first: bool) -> tuple[str, str, str]:
    """Status, reason and likely mistake."""
    if found.status == "nothing":
        if first:
            return "not attempted", "it returned nothing (if you did write it, is a return missing?)", ""
        return "failed", "it returned nothing here, though it did in an earlier case", ""
    if found.status != "returned":
        return found.status, found.why, ""
    try:
        reason = case.refuse(found.value)
        return ("failed", reason, _named_mistake(case, found.value)) if reason else ("passed", "", "")
    except Exception as error:
        return "failed", _unjudgeable(error), ""


def _unjudgeable(error: Exception) -> str:
    return f"what it returned cannot be judged: {type(error).__name__}: {error}"


def exercise(id: str, *, points: int = 1) -> Callable[[Callable[[Draw], Iterator[Case]]], Exercise]:
    """Register a function that draws cases as the check of exercise `id`. Ids are unique in the course."""

    def register(cases: Callable[[Draw], Iterator[Case]]) -> Exercise:
        known = _EXERCISES.get(id)
        if known is not None and known.__module__ != cases.__module__:
            raise ValueError(f"two exercises have the id {id!r}: in {known.__module__} and in {cases.__module__}")
        _EXERCISES[id] = Exercise(id, points, cases)
        return _EXERCISES[id]

    return register


# ---------------------------------------------------------------------------- the guards


def broken(cases: list[Case]) -> str | None:
    """What is wrong with these cases: too few, a right answer that is refused, an empty one that is not."""
    if len(cases) < FEWEST_CASES:
        return f"it has {len(cases)} cases; at least {FEWEST_CASES} are needed"
    visible: dict[str, bool] = {}
    for case in cases:
        where = f"[{describe(case.given)}]"
        if case.want is not None and case.test and (reason := case.test(case.want, case.given)):
            return f"its own right answer is refused: {reason} {where}"
        empty = dict(case.vacuous)
        if case.want is not None:
            empty["zeros"] = zeros_like(case.want)
            empty |= {f"the input {name}": value for name, value in case.given.items()}
        for name, value in empty.items():
            if value is not None and case.shows_nothing(value):
                return f"{name} would pass, or nearly {where}"
        for name in case.mistakes:
            value = _mistaken(case, name)
            wrong = value is not _NOT_HERE and not case.shows_nothing(value)
            visible[name] = visible.get(name, False) or wrong
    unseen = [name for name, seen in visible.items() if not seen]
    return f"the mistake {unseen[0]!r} gives the right answer in every case" if unseen else None


_NOT_HERE = object()  # a mistake that cannot be made with these shapes


def _mistaken(case: Case, name: str) -> Any:
    value = case.mistakes[name]
    try:
        return value() if callable(value) else value
    except RuntimeError:  # shapes that do not fit
        return _NOT_HERE


def _named_mistake(case: Case, value: Any) -> str:
    """The mistake of `case` that gives exactly `value`, or ""."""
    for name in case.mistakes:
        mistaken = _mistaken(case, name)
        if mistaken is not _NOT_HERE and distance(value, mistaken) <= 10 * case.allowed:
            return name
    return ""


def is_stub(function: Callable) -> bool:
    """Whether a function's body does nothing at all: only a docstring, `...` or `pass`."""
    if not hasattr(function, "__code__"):
        return False
    idle = ("RESUME", "NOP", "POP_TOP", "CACHE", "RETURN", "LOAD_CONST", "LOAD_COMMON_CONSTANT", "COPY_FREE_VARS")
    return all(i.opname.startswith(idle) for i in dis.get_instructions(function))


def same_bytes(a: Any, b: Any) -> bool:
    """Equal to the bit, NaN included: tensors, modules (with their requires_grad), containers, plain values."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
            return False
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(*raw)
    if isinstance(a, nn.Module):
        one, two = dict(a.named_parameters()) | dict(a.named_buffers()), dict(b.named_parameters()) | dict(b.named_buffers())
        return one.keys() == two.keys() and all(same_bytes(one[name], two[name]) for name in one)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_bytes, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bytes(a[k], b[k]) for k in a)
    return a == b


# ---------------------------------------------------------------------------- comparing answers


def tolerance(want: Any, like: torch.Tensor | None) -> float:
    """The relative error allowed: by the dtype of the inputs `like`; exact for counts and names."""
    if isinstance(want, torch.Tensor):
        return TOLERANCE.get(like.dtype if like is not None else want.dtype, 0.0)
    if isinstance(want, (list, tuple)) and want:
        return max(tolerance(part, like) for part in want)
    if isinstance(want, Mapping) and want:
        return max(tolerance(part, like) for part in want.values())
    return 1e-9 if isinstance(want, float) else 0.0


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|, in float64. Infinite if anything in `got` is not finite."""
    got, want = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    if got.numel() == 0:
        return 0.0
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    return (error / scale if scale else error) if math.isfinite(error) else math.inf


def distance(got: Any, want: Any) -> float:
    """How far `got` is from `want`: 0 for equal, a relative error for numbers, infinite for another kind."""
    if isinstance(want, torch.Tensor):
        comparable = type(got) in (torch.Tensor, nn.Parameter) and got.layout == torch.strided and not got.is_meta
        return relative_error(got, want) if comparable and got.shape == want.shape else math.inf
    if _is_numbers(want):
        if not _is_numbers(got) or len(got) != len(want):
            return math.inf
        if any(isinstance(part, float) for part in want):
            return relative_error(torch.tensor(got, dtype=torch.float64), torch.tensor(want, dtype=torch.float64))
        return 0.0 if [operator.index(g) if _countable(g) else g for g in got] == list(want) else math.inf
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return math.inf
        return max(map(distance, got, want), default=0.0)
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping) or got.keys() != want.keys():
            return math.inf
        return max((distance(got[key], want[key]) for key in want), default=0.0)
    if isinstance(want, (set, frozenset)):
        return 0.0 if isinstance(got, (set, frozenset, list, tuple)) and set(got) == want else math.inf
    if isinstance(want, bool) or not isinstance(want, numbers.Real):
        return 0.0 if type(got) is type(want) and got == want else math.inf
    if isinstance(want, int):
        return 0.0 if _countable(got) and operator.index(got) == want else math.inf
    if not _is_number(got):
        return math.inf
    error = abs(float(got) - float(want))
    return error / abs(want) if want and math.isfinite(error) else error if math.isfinite(error) else math.inf


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.dim() == 0
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_number, value))


def _countable(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def zeros_like(want: Any) -> Any:
    """The answer of the same kind in which every number is zero, or None where there is none."""
    if isinstance(want, torch.Tensor):
        return torch.zeros_like(want)
    if isinstance(want, (list, tuple)):
        return type(want)(zeros_like(part) for part in want)
    if isinstance(want, Mapping):
        return {key: zeros_like(part) for key, part in want.items()}
    if isinstance(want, (set, frozenset)):
        return set()
    return type(want)(0) if isinstance(want, (int, float)) else None


def wrong_kind(got: Any, want: Any, like: torch.Tensor | None) -> str | None:
    """Why `got` cannot be compared at all: type, shape, dtype, device, NaN. None if it can."""
    if isinstance(want, torch.Tensor):
        if type(got) not in (torch.Tensor, nn.Parameter):
            return f"it returned a {type(got).__name__}, expected a tensor of shape {tuple(want.shape)}"
        if got.shape != want.shape:
            turned = " (transposed?)" if tuple(reversed(got.shape)) == tuple(want.shape) else ""
            return f"its shape is {tuple(got.shape)}, expected {tuple(want.shape)}{turned}"
        dtype, device = (like.dtype, like.device) if like is not None else (want.dtype, want.device)
        if got.dtype != dtype:
            return f"its dtype is {got.dtype}, expected {dtype}, the inputs' own"
        if got.device != device:
            return f"it is on {got.device}, expected {device}, where the inputs are"
        if got.layout != torch.strided:
            return f"its layout is {got.layout}, expected an ordinary tensor"
        if got.isnan().any():
            return f"{int(got.isnan().sum())} of its {got.numel()} entries are NaN"
        return f"{int(got.isinf().sum())} of its {got.numel()} entries are infinite" if got.isinf().any() else None
    if isinstance(want, bool):
        return None if isinstance(got, bool) else f"it returned {_short(got)}, expected True or False"
    if isinstance(want, int):
        return None if _countable(got) else f"it returned {_short(got)}, a {type(got).__name__}; a count is an int"
    if isinstance(want, float):
        if not _is_number(got):
            return f"it returned {_short(got)}, a {type(got).__name__}; expected a number"
        return None if math.isfinite(float(got)) else f"it returned {float(got)}"
    if isinstance(want, (list, tuple)):
        kind = type(want).__name__
        if not isinstance(got, (list, tuple)):
            return f"it returned a {type(got).__name__}, expected a {kind} of {len(want)}"
        if len(got) != len(want):
            return f"it returned {len(got)} entries, expected {len(want)}"
        found = ((i, wrong_kind(g, w, like)) for i, (g, w) in enumerate(zip(got, want, strict=True)))
        return next((f"entry {i}: {reason}" for i, reason in found if reason), None)
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping):
            return f"it returned a {type(got).__name__}, expected a dict with {', '.join(map(repr, want))}"
        if got.keys() != want.keys():
            return f"its keys are {sorted(map(str, got))}, expected {sorted(map(str, want))}"
        return next((f"{k!r}: {r}" for k in want if (r := wrong_kind(got[k], want[k], like))), None)
    if isinstance(want, (set, frozenset)):
        return None if isinstance(got, (set, frozenset, list, tuple)) else f"it returned a {type(got).__name__}, expected a set"
    return None if isinstance(got, type(want)) else f"it returned a {type(got).__name__}, expected a {type(want).__name__}"


def _how_far(got: Any, want: Any, allowed: float) -> str:
    if isinstance(want, torch.Tensor):
        off = (got.detach().double() - want.double()).abs()
        at = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
        return (
            f"off by {relative_error(got, want):.2g} of the largest right entry (allowed {allowed:.0e}); "
            f"worst at {at}: {got.detach()[tuple(at)].item():.4g}, right is {want[tuple(at)].item():.4g}"
        )
    if isinstance(want, (list, tuple)) and not _is_numbers(want):
        parts = [(i, g, w) for i, (g, w) in enumerate(zip(got, want, strict=True)) if not distance(g, w) <= allowed]
        return f"entry {parts[0][0]}: {_how_far(parts[0][1], parts[0][2], allowed)}"
    if isinstance(want, Mapping):
        key = next(k for k in want if not distance(got[k], want[k]) <= allowed)
        return f"{key!r}: {_how_far(got[key], want[key], allowed)}"
    if isinstance(want, (set, frozenset)):
        missing, surplus = sorted(map(str, want - set(got))), sorted(map(str, set(got) - want))
        return "; ".join(
            f"{len(names)} {what}: {_short(names)}" for what, names in (("missing", missing), ("too many", surplus)) if names
        )
    return f"it returned {_short(got)}, right is {_short(want)}"


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "…"


def describe(given: Mapping[str, Any]) -> str:
    """The arguments of a case, short: `x (3, 5, 10), W (17, 10), alpha 6.2`."""

    def one(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return str(tuple(value.shape))
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, nn.Module):
            return f"with {sum(1 for _ in value.parameters())} parameter tensors"
        return _short(value)

    return ", ".join(f"{name} {one(value)}" for name, value in given.items())


def _line_of(error: BaseException, answer: Callable) -> str:
    """` (line 3 of your function)`, where the traceback passes through it."""
    code = getattr(answer, "__code__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    return f" (line {lines[-1] - code.co_firstlineno + 1} of your function)" if lines else ""
