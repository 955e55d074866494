"""Which method for which situation: a rule book that shows its reasons.

    print(mp.recommend("8B", memory=24, tasks=5))

The rules, in the order in which they are asked:

1. No access to the weights: a written prompt. Every other method needs gradients or the model's inside.
2. A budget of trained numbers: the method with the most room that keeps it.
3. Everything must change (a new language), or quality at any cost: full fine-tuning, if the memory is there.
4. Simple classification on ten billion parameters and more: prompt tuning. Below, it stays behind.
5. Everything else: LoRA, on all linear layers. Merged for one task, unmerged for several.
6. Memory decides how the base is kept: 16 bits, then activations recomputed, then 4 bits (QLoRA).

What fits is computed (`mp.memory_bill`). Each reason names a measured figure of this course, with its value where
data/results has it, or a paper. Where texts that you may meet say something else, the answer says that too.
"""

from __future__ import annotations

import difflib
import html
import json
import math
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import torch

from . import sockets
from .bill import MemoryBill, memory_bill, parameter_report
from .data import data_folder
from .methods.bitfit import BitFit
from .methods.ia3 import IA3
from .methods.lora import LoRA
from .methods.prompt_tuning import PromptTuning

# name: width, inner width, layers, heads, key/value heads, words, tied embeddings; the Llamas as published
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "1B": (2048, 8192, 16, 32, 8, 128256, True),
    "3B": (3072, 8192, 28, 24, 8, 128256, True),
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "8B": (4096, 14336, 32, 32, 8, 128256, False),
    "13B": (5120, 13824, 40, 40, 40, 32000, False),
    "30B": (6656, 17920, 60, 52, 52, 32000, False),
    "65B": (8192, 22016, 80, 64, 64, 32000, False),
    "70B": (8192, 28672, 80, 64, 8, 32000, False),
    "405B": (16384, 53248, 126, 128, 8, 128256, False),
}
MODELS = ("minilm-l6", *SHAPES)
GOALS = ("general", "format", "facts", "classification", "generation", "language", "high stakes")
PAPERS = {
    "Hu 2021": "Hu et al. 2021, LoRA, arXiv:2106.09685",
    "Lester 2021": "Lester et al. 2021, prompt tuning, arXiv:2104.08691, figure 1",
    "Dettmers 2023": "Dettmers et al. 2023, QLoRA, arXiv:2305.14314",
    "Liu 2022": "Liu et al. 2022, (IA)³, arXiv:2205.05638",
    "Houlsby 2019": "Houlsby et al. 2019, adapters, arXiv:1902.00751",
    "Schulman 2025": "Schulman et al. 2025, LoRA Without Regret",
    "Rücklé 2021": "Rücklé et al. 2021, AdapterDrop, arXiv:2010.11918",
    "Liu 2021": "Liu et al. 2021, P-tuning v2, arXiv:2110.07602",
}
LARGE = 10e9  # parameters from which prompt tuning comes close to full fine-tuning (Lester et al., figure 1)


@dataclass(frozen=True)
class Reason:
    """One reason: what it says, where it is from, and the figure, where there is one and it has been measured."""

    text: str
    source: str
    figure: float | None = None

    def __str__(self) -> str:
        shown = f" = {self.figure:.3g}" if self.figure is not None else ""
        return f"{self.text} [{self.source}{shown}]"


@dataclass(frozen=True)
class Recommendation:
    """The answer of `recommend`.

    method       the name: "LoRA", "QLoRA", "hard prompt", …; "none fits" where the memory is too small
    settings     the method's settings, for `mp.attach`; None where nothing is attached
    quantized    whether the base goes into 4 bits first (`mp.quantize`)
    checkpointing  whether activations are recomputed (`FitConfig(gradient_checkpointing=True)`)
    merged       whether to merge after training (`mp.merge`)
    rate         a learning rate to sweep around; None where nothing is trained
    bill         the memory of one training step; None where nothing is trained
    reasons      why
    against      what other texts say for this situation, and what speaks against it
    """

    method: str
    settings: object = None
    quantized: bool = False
    checkpointing: bool = False
    merged: bool = False
    rate: float | None = None
    bill: MemoryBill | None = None
    reasons: tuple[Reason, ...] = ()
    against: tuple[Reason, ...] = ()
    situation: dict = field(default_factory=dict)

    def steps(self) -> list[str]:
        """What to do, in order, as lines of code or words."""
        if self.method == "none fits":
            return ["take a smaller model, a shorter text, or more memory"]
        if self.settings is None and self.rate is None:
            return ["write the task, and some solved examples, in front of every question"]
        lines = ["mp.quantize(model)"] * self.quantized
        lines += [f"mp.attach(model, mp.{self.settings!r})"] if self.settings is not None else []
        more = ", gradient_checkpointing=True" if self.checkpointing else ""
        lines.append(f"mp.fit(model, tokenizer, data, mp.FitConfig(lr={self.rate:g}{more}))   # sweep around this rate")
        return lines + ["mp.merge(model)"] * self.merged

    def __str__(self) -> str:
        asked = ", ".join(f"{k} {v}" for k, v in self.situation.items())
        bill = [f"memory: {self.bill.total / 1e9:.1f} GB for {self.bill.assumed}"] if self.bill else []
        lines = [f"{self.method}   (for: {asked})", *("    " + step for step in self.steps()), *bill, "because"]
        lines += [f"  - {reason}" for reason in self.reasons]
        return "\n".join(lines + (["other texts"] + [f"  - {r}" for r in self.against] if self.against else []))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def items(reasons):
            return "".join(f"<li>{html.escape(r.text)} <small>[{html.escape(str(r).rpartition('[')[2])}</small></li>" for r in reasons)

        asked = html.escape(", ".join(f"{k} {v}" for k, v in self.situation.items()))
        bill = f"<p>Memory of a step: <b>{self.bill.total / 1e9:.1f} GB</b> <small>({html.escape(self.bill.assumed)})</small></p>" if self.bill else ""
        other = f"<p>Other texts:</p><ul>{items(self.against)}</ul>" if self.against else ""
        code = html.escape("\n".join(self.steps()))
        return f"<p><b>{self.method}</b> <small>for: {asked}</small></p><pre>{code}</pre>{bill}<p>Because:</p><ul>{items(self.reasons)}</ul>{other}"


def recommend(model="8B", *, memory: float | None = None, tasks: int = 1, goal: str = "general", examples: int | None = None,
              latency: bool = False, weights: bool = True, any_cost: bool = False, budget: float | None = None,
              batch: int = 1, seq: int = 512) -> Recommendation:
    """A method, its settings, its memory bill and the reasons, for one situation.

    model     a size, "1B" to "405B" (Llamas as published), "smollm2-135m", "minilm-l6", or a transformers config
    memory    GB (10⁹ bytes) that training may use; None: as much as it takes
    tasks     how many tasks one base has to serve
    goal      "general", "format" (behaviour), "facts" (new names and facts), "classification", "generation",
              "language" (a new one: everything shifts), "high stakes"
    examples  how many there are to learn from; None: enough
    latency   whether no pass may take longer than the base's
    weights   False: there is only an interface that takes text and gives text
    any_cost  quality counts, cost does not
    budget    the largest share of trained numbers, in percent
    batch, seq  of one training step; the bill is for these, in bfloat16 with AdamW

    Raises `ValueError` or `TypeError` for what is not accepted.
    """
    config = _config(model)
    _check(memory, tasks, goal, examples, batch, seq, budget, latency, weights, any_cost)
    situation = {"model": model if isinstance(model, str) else type(config).__name__, "memory": None if memory is None else f"{memory:g} GB",
                 "tasks": tasks, "goal": goal, "examples": examples, "budget": None if budget is None else f"{budget:g} %",
                 "latency": "none to spare" if latency else None, "weights": None if weights else "not accessible", "cost": "any" if any_cost else None}
    situation = {k: v for k, v in situation.items() if v is not None}
    case = _Case(config, memory, tasks, goal, examples, latency, any_cost, budget, batch, seq)
    if not weights:
        answer = _no_weights()
    elif budget is not None:
        answer = _small(case)
    elif any_cost or goal == "language":
        answer = _everything(case)
    elif goal == "classification" and case.parameters >= LARGE and not latency:
        answer = _large_classifier(case)
    else:
        answer = _lora(case)
    return replace(answer, situation=situation)


# ---------------------------------------------------------------------------- the situation


@dataclass(frozen=True)
class _Case:
    config: object
    memory: float | None
    tasks: int
    goal: str
    examples: int | None
    latency: bool
    any_cost: bool
    budget: float | None
    batch: int
    seq: int

    def bill(self, method, quantized: bool = False, checkpointing: bool = False) -> MemoryBill:
        return _bill(_frozen(self.config), method, quantized, checkpointing, self.batch, self.seq)

    @property
    def parameters(self) -> int:
        return _counts(_frozen(self.config), IA3())[1]

    @property
    def decoder(self) -> bool:
        return self.config.model_type != "bert"

    def fits(self, bill: MemoryBill) -> bool:
        return self.memory is None or bill.fits(1e9 * self.memory)


def _frozen(config) -> str:
    return json.dumps({"type": type(config).__name__} | config.to_dict(), sort_keys=True, default=str)


@lru_cache(maxsize=256)
def _counts(frozen: str, method) -> tuple[int, int]:
    """(trained numbers, the base's numbers), counted on a model of shapes without values."""
    import transformers

    fields = json.loads(frozen)
    config = getattr(transformers, fields.pop("type")).from_dict(fields)
    kind = transformers.AutoModelForSequenceClassification if config.model_type == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
        base = parameter_report(model).total
        sockets.attach(model, replace(method, init="random") if isinstance(method, PromptTuning) else method)
    return parameter_report(model).trainable, base


@lru_cache(maxsize=256)
def _bill(frozen: str, method, quantized: bool, checkpointing: bool, batch: int, seq: int) -> MemoryBill:
    """A bill takes seconds for a large model, so each is made once."""
    import transformers

    fields = json.loads(frozen)
    config = getattr(transformers, fields.pop("type")).from_dict(fields)
    if isinstance(method, PromptTuning):
        seq = min(seq, config.max_position_embeddings - method.length)     # the prompt takes positions of the text
    return memory_bill(config, method, batch=batch, seq=seq, dtype="bfloat16", quantized=quantized, gradient_checkpointing=checkpointing)


def _config(model):
    """The config of a size or name, or the config given."""
    import transformers

    if isinstance(model, transformers.PretrainedConfig):
        return model
    if not isinstance(model, str):
        raise TypeError(f"model is {model!r}; accepted are a transformers config or one of {', '.join(MODELS)}")
    if model not in MODELS:
        near = difflib.get_close_matches(model, MODELS, 1, 0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no model is called {model!r}{hint} (models: {', '.join(MODELS)})")
    if model == "minilm-l6":
        return transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    width, inner, layers, heads, kv, words, tied = SHAPES[model]
    return transformers.LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                                    num_key_value_heads=kv, vocab_size=words, tie_word_embeddings=tied, max_position_embeddings=8192)


def _check(memory, tasks, goal, examples, batch, seq, budget, *flags) -> None:
    def number(v):
        return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)

    for name, value in (("tasks", tasks), ("examples", examples), ("batch", batch), ("seq", seq)):
        if not (name == "examples" and value is None) and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ValueError(f"{name} is {value!r}; accepted is a whole number from 1" + (" or None" if name == "examples" else ""))
    if memory is not None and not (number(memory) and memory > 0):
        raise ValueError(f"memory is {memory!r}; accepted is a number of GB above 0, or None")
    if budget is not None and not (number(budget) and 0 < budget <= 100):
        raise ValueError(f"budget is {budget!r}; accepted is a share in percent, above 0, or None")
    if goal not in GOALS:
        near = difflib.get_close_matches(str(goal), GOALS, 1)
        raise ValueError(f"no goal is called {goal!r}{f'; did you mean {near[0]!r}?' if near else ''} (goals: {', '.join(GOALS)})")
    for name, value in zip(("latency", "weights", "any_cost"), flags, strict=True):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; accepted are True and False")


# ---------------------------------------------------------------------------- figures


@cache
def _results(name: str) -> dict:
    path = data_folder() / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measured(text: str, task: str, method: str, key: str) -> Reason:
    """A reason from the comparison: `key` of a method's row, or of its latency row."""
    results = _results("comparison")
    table = results.get("latency", {}).get(task, {}).get("rows", ()) if key.endswith("/ base") else results.get(task, ())
    row = next((r for r in table if method in (r.get("method"), r.get("model"))), {})
    where = f"data/results/comparison.json: {task}, {method}, {key}"
    value = row.get(key)
    return Reason(text, where if value is not None else where + ", not measured yet: make results", value)


def paper(text: str, name: str) -> Reason:
    return Reason(text, PAPERS[name])


def computed(text: str, value: float | None = None) -> Reason:
    return Reason(text, "computed with mp.memory_bill" if value is not None else "by construction", value)


# ---------------------------------------------------------------------------- the rules


def _no_weights() -> Recommendation:
    return Recommendation(
        "hard prompt",
        reasons=(computed("a soft prompt enters behind the embedding and is trained with gradients: an interface that takes text gives neither"),
                 measured("what solved examples in front of the question reach on the cards", "cards", "hard prompt", "score"),
                 paper("a model of hundreds of billions follows a written prompt; a small one much less", "Lester 2021")),
        against=(Reason("“Prompt tuning or hard prompts for API-only access”: of the two only the hard prompt needs no weights", "scenario table, row 3"),))


def _small(case: _Case) -> Recommendation:
    """The most room within a share of trained numbers: a LoRA, (IA)³, BitFit or a soft prompt."""
    def share(method) -> float:
        trained, base = _counts(_frozen(case.config), method)
        return 100 * trained / base

    rooms = [(f"LoRA of rank {r}", LoRA(rank=r, alpha=2 * r, targets="all-linear"), 2e-4) for r in (16, 8, 4, 2, 1)]
    rooms += [("(IA)³", IA3(), 3e-3)] + ([] if case.decoder else [("BitFit", BitFit(), 3e-3)]) + \
             ([] if case.latency else [(f"prompt tuning with {n} tokens", PromptTuning(n, init="vocab"), 1e-1) for n in (20, 5, 1)])
    ordered = sorted(((name, method, rate, share(method)) for name, method, rate in rooms), key=lambda room: -room[3])
    found = next((r for r in ordered if r[3] <= case.budget), None)
    if found is None:
        return Recommendation("none fits", reasons=(computed(f"even {'one soft token' if isinstance(ordered[-1][1], PromptTuning) else ordered[-1][0]} is {ordered[-1][3]:.2g} %", ordered[-1][3]),))
    name, method, rate, percent = found
    against = ()
    if percent <= 0.1:
        ia3, prompt = share(IA3()), share(PromptTuning(20))
        against = (Reason(f"“(IA)³ trains the fewest numbers, fewer than prompt tuning”: here it is {ia3:.2g} %, a prompt of 20 tokens {prompt:.2g} %",
                          "computed with mp.memory_bill", ia3 / prompt),)
    kind = "LoRA" if isinstance(method, LoRA) else "prompt tuning" if isinstance(method, PromptTuning) else name
    fitted = _fit_base(case, method)
    return replace(fitted, method=fitted.method if fitted.method == "none fits" else kind, rate=rate,
                   merged=fitted.method != "none fits" and not isinstance(method, PromptTuning) and case.tasks == 1 and not fitted.quantized,
                   reasons=(computed(f"{name} is {percent:.2g} % of the model, the most room below {case.budget:g} %", percent), *fitted.reasons,
                            measured(f"what {kind} reaches on the four domains, of full fine-tuning's score", "sentiment", kind, "of full")),
                   against=against)


def _everything(case: _Case) -> Recommendation:
    for checkpointing in (False, True):
        bill = case.bill(None, checkpointing=checkpointing)
        if case.fits(bill):
            break
    score = measured("LoRA's share of full fine-tuning's score on the cards", "cards", "LoRA", "of full")
    tried = computed(f"full fine-tuning of this model takes {bill.total / 1e9:.0f} GB in bfloat16", bill.total / 1e9)
    if case.fits(bill):
        near = ()
        if score.figure is not None and score.figure >= 0.95:
            near = (Reason("“quality at any cost means full fine-tuning”: on the course's cards LoRA comes within 5 %, so try it first", score.source, score.figure),)
        return Recommendation("full fine-tuning", checkpointing=checkpointing, rate=1e-5 if case.parameters > 1e9 else 2e-4, bill=bill, against=near,
                              reasons=(tried, paper("where much must change, low rank may not be enough: many data, a new language", "Schulman 2025"), score))
    answer = _lora(case, rank=64)
    return replace(answer, reasons=(tried, *answer.reasons, score))


def _large_classifier(case: _Case) -> Recommendation:
    fitted = _fit_base(case, PromptTuning(20, init="vocab"))
    return replace(fitted, method=fitted.method if fitted.method == "none fits" else "prompt tuning", rate=1e-1, reasons=(
        paper("from ten billion parameters prompt tuning comes close to full fine-tuning", "Lester 2021"), *fitted.reasons,
        computed("its numbers are a few rows of the embedding: a file of kilobytes, and every row of a batch may have another task"),
        measured("on a small encoder it does not: its share of full fine-tuning's score there", "sentiment", "prompt tuning", "of full")))


def _lora(case: _Case, rank: int | None = None) -> Recommendation:
    """The usual answer. Rank by the task, base by the memory, merged by the number of tasks."""
    if rank is None:
        rank = 16 if case.goal in ("facts", "high stakes", "generation") else 8
        if case.examples is not None and case.examples < 200:
            rank = 4
    method = LoRA(rank=rank, alpha=2 * rank, targets="all-linear")
    fitted = _fit_base(case, method)
    if fitted.method == "none fits":
        return fitted
    name = "QLoRA" if fitted.quantized else "LoRA"
    task = "cards" if case.decoder else "sentiment"
    merged = case.tasks == 1 and not fitted.quantized
    reasons = [measured(f"{name}'s share of full fine-tuning's score", task, name, "of full"),
               paper("its best rate is about ten times that of full fine-tuning, on all linear layers", "Schulman 2025"), *fitted.reasons]
    against = []
    if case.tasks > 1:
        reasons.append(computed(f"unmerged: {case.tasks} tasks on one base, and rows of one batch may ask for different ones"))
        reasons.append(measured("what that costs: time of a pass, 1 is the base", task, "LoRA", "forward / base"))
        if case.tasks >= 5:
            against.append(Reason("“Adapters for five tasks and more”: a LoRA switches as an adapter does, and can be merged when one task is left; put aside, either leaves the base as it was",
                                  PAPERS["Rücklé 2021"] + ": adapters cost time at every use"))
        if case.latency:
            reasons.append(computed(f"no time to spare and several tasks exclude each other: merged, you need {case.tasks} copies of the weights",
                                    case.tasks * fitted.bill.weights / 1e9))
    elif merged:
        reasons.append(measured("merged it costs nothing: time of a pass, 1 is the base", task, "LoRA, merged", "forward / base"))
    else:
        reasons.append(computed("merging into 4 bits rounds the update away in part: serve it unmerged, or merge into the dequantised weights and keep them in 16 bits (chapter 9)"))
        if case.latency:
            reasons.append(computed("no time to spare: merge into the dequantised weights, in 16 bits, which must fit where you serve", 2 * fitted.bill.parameters / 1e9))
    if rank != 64:
        reasons.append(Reason(f"rank {rank}: " + ("little data" if rank == 4 else "facts need room" if rank == 16 else "behaviour needs little room"),
                              PAPERS["Hu 2021"] + ", section 7.2"))
    if case.goal == "facts":
        reasons.append(measured("a soft prompt recalls less: its share of full fine-tuning's score on the cards", "cards", "prompt tuning", "of full"))
    if case.goal == "generation":
        against.append(measured("“prefix tuning for generation”: its share of full fine-tuning's score on the cards", "cards", "prefix tuning", "of full"))
    if case.goal == "classification":
        against.append(measured("“Prompt tuning for simple classification”: on a small model it stays behind; its share of full fine-tuning's score",
                                "sentiment", "prompt tuning", "of full"))
    if case.goal == "high stakes":
        against.append(Reason("“A hybrid of LoRA and adapter”: chapter 11 compares hybrids with their parts at equal size. "
                              "Choose by your own held-out questions, not by a label", "chapter 11, results recorded by make results-chapters"))
    if case.parameters >= 30e9:
        against.append(paper("“Rank 64 for 70B”: the task asks for rank, not the size; on 175B rank 1 was already near the best", "Hu 2021"))
    return replace(fitted, method=name, rate=2e-4 if case.parameters > 1e9 else 3e-3, merged=merged, reasons=tuple(reasons),
                   against=(*against, *fitted.against))


def _fit_base(case: _Case, method) -> Recommendation:
    """How the base is kept, so that a step fits: 16 bits, activations recomputed, 4 bits."""
    ways = [(False, False), (False, True), (True, True)]
    if case.memory is not None and 2 * case.parameters > 1e9 * case.memory:   # the 16-bit weights alone are too much
        ways = ways[2:]
    for quantized, checkpointing in ways:
        bill = case.bill(method, quantized, checkpointing)
        if case.fits(bill):
            break
    gb = bill.total / 1e9
    smaller = 2 * case.parameters / bill.weights
    against = ()
    if case.memory is not None and case.parameters > 60e9 and case.memory <= 24:
        against = (Reason(f"“65B fits one card of 24 GB with QLoRA”: its 4-bit weights alone are {bill.weights / 1e9:.1f} GB; the paper used 48 GB",
                          PAPERS["Dettmers 2023"], bill.weights / 1e9),)
    if not case.fits(bill):
        return Recommendation("none fits", bill=bill, quantized=True, checkpointing=True, against=against,
                              reasons=(computed(f"with 4-bit weights and recomputed activations a step still takes {gb:.1f} GB, and {case.memory:g} GB are there", gb),))
    if quantized:
        says = f"16-bit weights do not fit; in 4 bits, {smaller:.1f} times smaller, a step takes {gb:.1f} GB"
        reasons = (computed(says, gb), paper("NF4 with LoRA on all linear layers matched 16-bit fine-tuning", "Dettmers 2023"))
    else:
        reasons = (computed(f"a step takes {gb:.1f} GB" + (" with activations recomputed" if checkpointing else ""), gb),)
    return Recommendation("", settings=method, quantized=quantized, checkpointing=checkpointing, bill=bill, reasons=reasons, against=against)
