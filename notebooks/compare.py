"""One comparison: every method, the same models, tasks and budgets, each at a learning rate of its own.

    python notebooks/compare.py                     measure what is missing, then write the tables
    python notebooks/compare.py --list              what there is, what is missing, how long that takes
    python notebooks/compare.py --only sentiment    one task, question or method (commas for several)
    python notebooks/compare.py --minutes 30        start no new run after so many minutes
    python notebooks/compare.py --profile smoke     the same at a tiny scale, into build/: to see that it runs

Two tasks. *cards*: SmolLM2 learns drug cards (format, facts, recall). *sentiment*: MiniLM learns to tell
positive from negative texts, in four domains, a model or adapter each. For every method:

1. A sweep: a few rates, one seed; the lowest loss on validation questions wins. Where the winner stands at an
   edge, the next rate is tried too, twice at most. On the cards, whose few steps make much of the rate, those halfway
   to the winner's neighbours are tried as well, and of the two best rates the mean loss over all seeds decides: one
   seed may choose a rate at which the next one fails. The test questions choose nothing.
2. Seeds: the winner with further seeds (and in the other domains). A seed draws the start and the order; the
   sweep's run is the first of them.
3. Questions: rates, ranks, lengths, starts, sizes: the same runs with one thing changed.

Each run is a process of its own, so that its memory is its own, and one record, written when it is done:
data/results/comparison_runs.json. All compute in float32, so that machines with and without 16-bit arithmetic give
the same, and on one core, as many side by side as there are cores and memory: in the time of four runs that have two
cores each, five are done. Only the latencies are measured alone, with all cores.

A record holds for its settings, its budget and the code it was trained with: `stale` tells where the code is another one now
(comments and docstrings do not count). Before such a run is measured again, its first steps are repeated. Where their
losses are the same, the change did not matter, and the record stays.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
TASKS = ("cards", "sentiment")
QUESTIONS = ("rates", "ranks", "lengths", "starts", "sizes")
DOMAINS = ("movies", "products", "editorials", "tweets")
MODEL = {"cards": "smollm2-135m", "sentiment": "minilm-l6"}
FINALISTS = 2  # rates that all seeds are run with, before one is taken
FIRST = 3  # steps whose losses are kept, to tell later whether the code still does the same
SAME = 1e-3  # relative difference of these losses that still counts as the same


@dataclass(frozen=True)
class Budget:
    """What every method gets. The same for all, and part of every record."""

    medicines: int = 16
    turns: int = 8           # of every medicine in each direction
    card_batch: int = 8
    words: int = 16          # the longest text of the sentiment task
    texts: int = 1200        # to learn from, in each domain
    asked: int = 200         # test texts, in each domain
    steps: int = 60          # of the sentiment task
    batch: int = 16
    seeds: int = 3
    extend: int = 2          # further rates, where the best is at an edge

    @property
    def card_steps(self) -> int:
        return max(1, self.medicines * self.turns * 2 // self.card_batch)


CPU = Budget()
SMOKE = Budget(medicines=2, turns=1, card_batch=2, texts=32, asked=8, steps=2, batch=4, seeds=1, extend=0)


@dataclass(frozen=True)
class Run:
    """One run. `changes` are settings of the method that differ from the contestant's own."""

    task: str
    method: str
    rate: float | None = None
    seed: int = 0
    domain: str = ""
    changes: tuple = field(default=())   # (("rank", 4), …)
    texts: int | None = None             # fewer texts than the budget's
    order: int | None = None             # the order of the texts; None: the seed draws it too

    @property
    def key(self) -> str:
        parts = [self.task, self.domain, self.method, "" if self.rate is None else f"rate {self.rate:g}",
                 *(f"{k} {v}" for k, v in self.changes), f"{self.texts} texts" if self.texts else "",
                 f"order {self.order}" if self.order is not None else "", f"seed {self.seed}"]
        return " / ".join(p for p in parts if p)


# ---------------------------------------------------------------------------- the contestants

LINEAR = {"targets": "all-linear"}
# name: (class in minipeft, settings for SmolLM2, settings for MiniLM, rates for SmolLM2, rates for MiniLM, files)
LORA_RATES = (1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2)
CONTESTANTS = {
    "frozen base": (None, {}, {}, (), (3e-3, 1e-2, 3e-2), ()),
    "hard prompt": (None, {}, {}, (), (3e-3, 1e-2, 3e-2), ()),
    "prompt tuning": ("PromptTuning", {"length": 20, "init": "vocab"}, {"length": 10, "init": "vocab"},
                      (3e-2, 1e-1, 3e-1), (1e-2, 3e-2, 1e-1), ("methods/prompt_tuning",)),
    "P-tuning": ("PTuning", {"length": 20}, {"length": 10}, (3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3),
                 ("methods/p_tuning", "methods/prompt_tuning")),
    "prefix tuning": ("PrefixTuning", {"length": 20}, {"length": 10}, (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2),
                      ("methods/prefix_tuning",)),
    "P-tuning v2": ("PrefixTuning", {"length": 20, "reparameterize": False}, {"length": 10, "reparameterize": False},
                    (1e-2, 3e-2, 1e-1), (3e-2, 1e-1, 3e-1), ("methods/prefix_tuning",)),
    "bottleneck adapters": ("BottleneckAdapter", {"bottleneck": 32}, {"bottleneck": 32}, (3e-4, 1e-3, 3e-3),
                            (3e-4, 1e-3, 3e-3), ("methods/adapters",)),
    "BitFit": ("BitFit", {}, {}, (1e-2,), (3e-3, 1e-2, 3e-2), ("methods/bitfit",)),
    "(IA)³": ("IA3", {}, {}, (1e-2, 3e-2, 1e-1), (1e-2, 3e-2, 1e-1), ("methods/ia3",)),
    "LoRA": ("LoRA", {"rank": 8, "alpha": 16} | LINEAR, {"rank": 8, "alpha": 16} | LINEAR, *LORA_RATES, ("methods/lora",)),
    "rsLoRA": ("LoRA", {"rank": 8, "alpha": 16, "rslora": True} | LINEAR, {"rank": 8, "alpha": 16, "rslora": True} | LINEAR,
               (3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3), ("methods/lora",)),
    "DoRA": ("DoRA", {"rank": 8, "alpha": 16} | LINEAR, {"rank": 8, "alpha": 16} | LINEAR, *LORA_RATES,
             ("methods/dora", "methods/lora")),
    "PiSSA": ("LoRA", {"rank": 8, "alpha": 16, "init": "pissa"} | LINEAR, {"rank": 8, "alpha": 16, "init": "pissa"} | LINEAR,
              (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3), ("methods/lora",)),
    "QLoRA": ("LoRA", {"rank": 8, "alpha": 16} | LINEAR, {"rank": 8, "alpha": 16} | LINEAR, *LORA_RATES,
              ("methods/lora", "quant/nf4", "quant/double_quant", "quant/linear4bit")),
    "LoftQ": ("LoRA", {"rank": 8, "alpha": 16} | LINEAR, {"rank": 8, "alpha": 16} | LINEAR, *LORA_RATES,
              ("methods/lora", "quant/nf4", "quant/double_quant", "quant/linear4bit", "quant/loftq")),
    "full fine-tuning": (None, {}, {}, (1e-4, 3e-4, 1e-3), (1e-4, 3e-4, 1e-3), ()),
}
COMMON = ("training", "packing", "sockets", "data")
INSTRUCTION = "Is the feeling of this text positive or negative? "
SHOWN = ("ibuprofen", "salbutamol", "warfarin")  # the solved cards of the hard prompt, as in chapter 5
WIDE = {"full fine-tuning": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3), "LoRA": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
# Seconds of one run on one core, until there are measured ones.
GUESS = {"cards": {"frozen base": 25, "hard prompt": 40, "BitFit": 5, "prompt tuning": 95, "P-tuning": 95, "prefix tuning": 75,
                   "P-tuning v2": 70, "QLoRA": 90, "LoftQ": 100, "DoRA": 85, "full fine-tuning": 85, "": 70},
         "sentiment": {"frozen base": 12, "hard prompt": 16, "full fine-tuning": 25, "LoftQ": 30, "": 22},
         "latency": {"": 150}}


def key_of(run: Run | str) -> str:
    """The name of its record; a latency table is its own."""
    return run if isinstance(run, str) else run.key


def contestant(name: str, task: str, changes: tuple = ()):
    """The settings of a method on a task; None where nothing is plugged in."""
    import minipeft as mp

    kind, cards, sentiment, *_ = CONTESTANTS[name]
    if kind is None:
        return None
    return getattr(mp, kind)(**{**(cards if task == "cards" else sentiment), **dict(changes)})


def grid(name: str, task: str, budget: Budget) -> tuple[float, ...]:
    rates = CONTESTANTS[name][3 if task == "cards" else 4]
    return rates[len(rates) // 2:][:1] if budget.seeds == 1 else rates


def code_of(name: str) -> str:
    """A hash of the code that a run of this method depends on; comments and docstrings do not count."""
    files = [*COMMON, *CONTESTANTS[name][5]] if name in CONTESTANTS else \
        ["sockets", "latency", *sorted({f for c in CONTESTANTS.values() for f in c[5]})]
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse((ROOT / "minipeft" / f"{file}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                node.body = body[1:] or [ast.Pass()]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------- one run


class Enough(Exception):
    """Raised by a watcher: the first steps have been seen."""


def measure(run: Run, budget: Budget, heads: str, first_only: bool = False) -> dict:
    """Do one run, in this process. `first_only`: stop after the first steps; only their losses count."""
    import torch

    import minipeft as mp
    from minipeft import profiles

    began = time.perf_counter()
    torch.set_num_threads(1)
    try:
        settings = contestant(run.method, run.task, run.changes)
        already = profiles.memory_in_use()
        model, tokenizer = start(run, budget, Path(heads))
        trains = run.method == "full fine-tuning" or run.rate is not None
        torch.manual_seed(run.seed)
        plug(run, model, settings)
        give_back()
    except ValueError as refusal:                                # BitFit on a model without biases
        return {"refused": str(refusal)}
    data = cards_data(run, budget) if run.task == "cards" else sentiment_data(run, budget)
    report = mp.parameter_report(model)
    record = {"settings": repr(settings) if settings else None, "trained": report.trainable if trains else 0,
              "total": report.total, "percent": report.percent if trains else 0.0, "first": []}
    if trains:
        def watch(entry):
            record["first"] = (record["first"] + [entry["loss"]])[:FIRST]
            if first_only and entry["step"] >= FIRST:
                raise Enough

        cards = run.task == "cards"
        config = mp.FitConfig(steps=budget.card_steps if cards else budget.steps, batch_size=budget.card_batch if cards else budget.batch,
                              shuffle=not cards, lr=run.rate, warmup=0.1, progress=False, precision="fp32",
                              seed=run.seed if run.order is None else run.order)
        try:
            done = mp.fit(model, tokenizer, data["train"], config, watch=watch)
            record |= {"seconds": done.seconds, "s a step": done.seconds / done.steps, "peak GiB": (done.peak_memory - already) / 2**30}
        except Enough:
            return record
        except ArithmeticError as error:
            return record | {"diverged": str(error).split(":")[0], "loss": None, "wall": time.perf_counter() - began}
    record["loss"] = mp.evaluate(model, tokenizer, data["validation"], precision="fp32")["loss"]
    record |= judge_cards(run, model, tokenizer, data) if run.task == "cards" else judge_sentiment(run, model, tokenizer, data)
    record["file MB"] = file_size(run, model) if trains else 0.0
    if not math.isfinite(record["loss"]):
        record |= {"diverged": "the validation loss is not finite", "loss": None}
    return record | {"wall": time.perf_counter() - began}


def plug(run: Run, model, settings) -> None:
    """Make the model this contestant: what trains is then what requires a gradient."""
    import minipeft as mp

    if run.method == "LoftQ":
        mp.quantize_loftq(model, settings)
    elif settings is not None:
        if run.method == "QLoRA":
            mp.quantize(model)
        mp.attach(model, settings)
    elif run.method != "full fine-tuning":
        model.base_model.requires_grad_(False)                   # of a classifier the head is left


def start(run: Run, budget: Budget, heads: Path):
    """The base. A classifier comes with a head that was trained alone on the run's domain: all methods start there."""
    import torch

    import minipeft as mp

    torch.manual_seed(run.seed)
    if run.task == "cards":
        model, tokenizer = mp.load_base(MODEL["cards"])
        for p in model.parameters():                             # out of the file's pages, into memory that can be given back
            p.data = p.data.clone()
        return model, tokenizer
    model, tokenizer = mp.load_base(MODEL["sentiment"], num_labels=2)
    made = hashlib.sha256(repr((asdict(budget), run.domain, run.seed, run.texts, code_of("frozen base"))).encode()).hexdigest()[:16]
    file = heads / f"{made}.json"
    if file.exists():
        with torch.no_grad():
            for p, values in zip(model.classifier.parameters(), json.loads(file.read_text()), strict=True):
                p.copy_(torch.tensor(values))
        return model, tokenizer
    model.base_model.requires_grad_(False)
    mp.fit(model, tokenizer, sentiment_data(replace(run, method="frozen base"), budget)["train"],
           mp.FitConfig(steps=budget.steps, batch_size=budget.batch, lr=1e-2, progress=False, precision="fp32", seed=1000 + run.seed))
    model.requires_grad_(True)
    write_json(file, [p.tolist() for p in model.classifier.parameters()])
    return model, tokenizer


def give_back() -> None:
    """Memory that is free goes back to the system: the float32 weights of a base that is in 4 bits now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):           # glibc's; others keep less
        ctypes.CDLL(None).malloc_trim(0)


def file_size(run: Run, model) -> float:
    """MB of what has to be kept: the adapter's folder, or all weights (of a frozen classifier its head)."""
    import minipeft as mp

    if mp.adapters(model):
        with tempfile.TemporaryDirectory() as folder:
            mp.save_adapter(model, folder)
            return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 1e6


# ---- drug cards


def cards_data(run: Run, budget: Budget) -> dict:
    import minipeft as mp

    splits = {split: mp.load_data("drug_cards", split) for split in ("train", "validation", "test")}
    names = sorted({e["card"] for e in splits["train"]} - set(SHOWN))
    taken = set(names[:: len(names) // budget.medicines][: budget.medicines])
    shown = [e for e in splits["train"] if e["card"] in SHOWN]
    own = {split: [e for e in rows if e["card"] in taken] for split, rows in splits.items()}
    lessons = {way: spread_evenly([e for e in own["train"] if e["direction"] == way], budget.turns, run.seed)
               for way in ("forward", "reverse")}
    n, both = budget.card_batch, []
    for at in range(0, len(lessons["forward"]), n):              # a batch of each direction in turns
        both += lessons["forward"][at:at + n] + lessons["reverse"][at:at + n]
    return {"train": both, "validation": own["validation"], "test": own["test"], "shown": shown}


def spread_evenly(examples: list[dict], times: int, seed: int) -> list[dict]:
    """Each card `times` times, at even distances, in wordings that change from turn to turn (chapter 5)."""
    draw, wordings, timetable = random.Random(seed), {}, []
    for example in examples:
        wordings.setdefault(example["card"], []).append(example)
    for own in wordings.values():
        first = draw.random()
        draw.shuffle(own)
        timetable += [(turn + first, own[turn % len(own)]) for turn in range(times)]
    return [example for _, example in sorted(timetable, key=lambda entry: entry[0])]


def judge_cards(run: Run, model, tokenizer, data: dict) -> dict:
    """The scores of score_cards; "score", the mean of format, facts and recall; and the loss on plain English."""
    import minipeft as mp

    def solved(e):                                               # three cards in the same direction, in front of the question
        rows = [x for x in data["shown"] if x["direction"] == e["direction"]]
        return "".join(x["prompt"] + x["completion"] + "\n\n" for x in rows[:: len(rows) // 3][:3])

    prompts = [(solved(e) if run.method == "hard prompt" else "") + e["prompt"] for e in data["test"]]
    answers = mp.generate(model, tokenizer, prompts, max_new_tokens=24, batch_size=32)
    marks = mp.score_cards(data["test"], answers)
    found = {"score": statistics.mean(marks[k] for k in ("format", "facts", "recall")), **marks}
    if run.method == "hard prompt":
        return found
    return found | {"plain loss": mp.evaluate(model, tokenizer, plain_english(), precision="fp32")["loss"]}


def plain_english() -> list[dict]:
    """Sentences of newspaper editorials, to be continued from their third word: what the base could do before."""
    import minipeft as mp

    texts = [e["text"].split() for e in mp.load_data("sentiment/editorials", "test")]
    texts = [t for t in texts if 12 <= len(t) <= 25][:48]
    return [{"prompt": " ".join(t[:3]), "completion": " " + " ".join(t[3:])} for t in texts]


# ---- sentiment


def sentiment_data(run: Run, budget: Budget) -> dict:
    import minipeft as mp

    found = {}
    for split, most in (("train", budget.texts), ("validation", budget.asked), ("test", budget.asked)):
        rows = [e for e in mp.load_data(f"sentiment/{run.domain}", split) if len(e["text"].split()) <= budget.words]
        rows = random.Random(0).sample(rows, min(most, len(rows)))
        if split == "train" and run.texts:
            rows = random.Random(run.seed).sample(rows, min(run.texts, len(rows)))
        before = INSTRUCTION if run.method == "hard prompt" else ""
        found[split] = [e | {"text": before + e["text"]} for e in rows]
    return found


def judge_sentiment(run: Run, model, tokenizer, data: dict) -> dict:
    """The share of test texts right; on films also the old skill."""
    import minipeft as mp

    positive = statistics.mean(e["label"] for e in data["test"])
    found = {"score": mp.evaluate(model, tokenizer, data["test"], precision="fp32")["accuracy"], "commoner": max(positive, 1 - positive)}
    return found | ({"old skill": find_again(model, tokenizer)} if run.domain == "movies" else {})


def find_again(model, tokenizer) -> float:
    """What MiniLM was made for (chapter 1): of some sentences, the share found again by every third word."""
    import torch
    import torch.nn.functional as F

    import minipeft as mp

    texts = [e["text"].split() for e in mp.load_data("sentiment/editorials", "test")]
    texts = [t for t in texts if 12 <= len(t) <= 20][:96]
    places = []
    for lines in ([" ".join(t[::3]) for t in texts], [" ".join(t) for t in texts]):
        tokens = tokenizer(lines, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model.base_model(**tokens).last_hidden_state                       # (B, length + T, d)
        hidden = hidden[:, hidden.shape[1] - tokens["input_ids"].shape[1]:]             # without a soft prompt's own
        mask = tokens["attention_mask"][..., None]                                      # (B, T, 1)
        places.append(F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
    return ((places[0] @ places[1].T).argmax(dim=1) == torch.arange(len(texts))).float().mean().item()


# ---- latency


def measure_latency(task: str, budget: Budget) -> dict:
    """Unmerged and merged, one after the other in turns: minipeft/latency.py. Rows as `mp.measure_latency` gives them."""
    import minipeft as mp

    began, base = time.perf_counter(), {"num_labels": 2} if task == "sentiment" else {}
    model, _ = mp.load_base(MODEL[task], **base)
    methods = {}
    for name in CONTESTANTS:
        settings = contestant(name, task)
        if settings is None or name in ("rsLoRA", "PiSSA", "LoftQ") or (name == "BitFit" and task == "cards"):
            continue                                             # computes what LoRA or QLoRA computes; has nothing to train
        if name == "QLoRA":
            settings, _ = mp.load_base(MODEL[task], **base)
            plug(Run(task, "QLoRA"), settings, contestant("QLoRA", task))
        methods[name] = settings
    lengths = (1, 5, 20, 50, 100)
    methods |= {f"prompt of {n}": mp.PromptTuning(n, init="vocab") for n in lengths}
    small = budget.seeds == 1
    rows = mp.measure_latency(model, methods, batch_sizes=(1,), tokens=64, new_tokens=2 if small else 8, repeats=2 if small else 7, progress=False)
    return {"rows": rows, "batch": 1, "tokens": 64, "wall": time.perf_counter() - began}


# ---------------------------------------------------------------------------- what to run

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROOM = {"sentiment": 2, "cards": 6}      # GiB for a run


def slots(task: str) -> int:
    """How many runs of a task fit side by side."""
    return max(1, min(CORES, int(psutil.virtual_memory().total / 2**30 / ROOM[task])))


def may_start(run: Run | str, doing: list[Run | str]) -> bool:
    """Whether a run may be started beside those that are being done: latencies are measured alone, tasks do not mix."""
    if isinstance(run, str) or any(isinstance(other, str) for other in doing):
        return not doing
    return all(other.task == run.task for other in doing) and len(doing) < slots(run.task)


def next_rate(rate: float, up: bool) -> float:
    """The neighbour in … 1e-4, 3e-4, 1e-3, 3e-3, …"""
    leads_with_1 = f"{rate:e}"[0] == "1"
    factor = (3 if leads_with_1 else 10 / 3) if up else (0.3 if leads_with_1 else 1 / 3)
    return float(f"{rate * factor:.0e}")


def halfway(a: float, b: float) -> float:
    """The rate between two, on a logarithmic scale, with one digit: 5e-3 between 3e-3 and 1e-2."""
    return float(f"{math.sqrt(a * b):.0e}")


class Plan:
    """The runs that are wanted, given the records there are."""

    def __init__(self, records: dict, budget: Budget, only: set[str] = frozenset()):
        self.budget, self.only = budget, set(only)
        self.records = {k: r for k, r in dict(records).items() if valid(k, r, budget)}   # a copy: runs write theirs meanwhile

    def has(self, run: Run) -> dict | None:
        return self.records.get(run.key)

    def sweep(self, task: str, method: str) -> tuple[list[Run], float | None]:
        """The runs of the sweep as far as they are known, and the best rate once all of them are there."""
        domain, rates = "movies" if task == "sentiment" else "", list(grid(method, task, self.budget))
        most = len(rates) + self.budget.extend
        while True:
            runs = [Run(task, method, rate, 0, domain) for rate in sorted(rates)]
            found = {run.rate: self.has(run) for run in runs}
            if not runs or not all(found.values()):
                return runs, None
            losses = {rate: r["loss"] for rate, r in found.items() if r.get("loss") is not None}
            best = min(losses, key=losses.get, default=None)
            if len(rates) == most or best not in (None, min(rates), max(rates)) or any("refused" in r for r in found.values()):
                break
            rates.append(next_rate(min(rates) if best is None else best, best == max(rates)))   # all diverged: lower
        return (runs, best) if task == "sentiment" or best is None or self.budget.seeds == 1 else self.finer(runs, best)

    def finer(self, runs: list[Run], best: float) -> tuple[list[Run], float | None]:
        """What a sweep goes on with: rates halfway to the neighbours of the best, then all seeds of the two best."""
        rates = [run.rate for run in runs]
        at = rates.index(best)
        runs = runs + [replace(runs[0], rate=halfway(best, other)) for other in rates[max(0, at - 1):at] + rates[at + 1:at + 2]]
        if not all(map(self.has, runs)):
            return runs, None
        finalists = sorted(runs, key=self.loss)[:FINALISTS]
        runs = runs + [replace(run, seed=seed) for run in finalists for seed in range(1, self.budget.seeds)]
        if not all(map(self.has, runs)):
            return runs, None
        means = self.means(runs)
        return runs, min(means, key=means.get)

    def loss(self, run: Run) -> float:
        """The validation loss of a run that is there; infinite where it diverged."""
        loss = self.has(run).get("loss")
        return math.inf if loss is None else loss

    def means(self, runs: list[Run]) -> dict[float, float]:
        """rate -> mean validation loss over the seeds, for the rates that have run with all of them."""
        losses: dict[float, list[float]] = {}
        for run in runs:
            losses.setdefault(run.rate, []).append(self.loss(run))
        return {rate: statistics.mean(each) for rate, each in losses.items() if len(each) == self.budget.seeds}

    def finals(self, task: str, method: str, rate: float | None) -> list[Run]:
        """The seeds (and domains) at one rate. What trains nothing on the cards is the same at each seed."""
        if task == "cards":
            seeds = range(self.budget.seeds) if grid(method, task, self.budget) else range(1)
            return [Run(task, method, rate, seed) for seed in seeds]
        return [Run(task, method, rate, seed, domain) for seed in range(self.budget.seeds) for domain in DOMAINS]

    def question(self, name: str) -> list[tuple[object, Run]]:
        """(the value at this point, its run) of one question; runs whose rate is not known yet have none."""
        seeds = range(self.budget.seeds)

        def at(task, method, seed, **more):
            rate = self.sweep(task, method)[1]
            settings = contestant(method, task)
            changes = tuple((k, v) for k, v in more.pop("changes", ()) if getattr(settings, k) != v)
            if more.get("order") == seed:
                del more["order"]
            if more.get("texts", 0) >= self.budget.texts:
                del more["texts"]
            return Run(task, method, rate, seed, "movies" if task == "sentiment" else "", changes, **more)

        if name == "rates":
            small = self.budget.seeds == 1
            return [(f"{m}: {r:g}", Run("sentiment", m, r, s, "movies")) for m, rates in WIDE.items()
                    for r in (rates[2:3] if small else rates) for s in seeds]
        if name == "ranks":
            return [(r, at("sentiment", "LoRA", s, changes=(("rank", r), ("alpha", 2 * r)))) for r in (1, 2, 4, 8, 16, 32, 64) for s in seeds]
        if name == "lengths":
            on_cards = [(f"cards: {n}", at("cards", "prompt tuning", 0, changes=(("length", n),))) for n in (1, 5, 20, 50, 100)]
            return on_cards + [(f"sentiment: {n}", at("sentiment", "prompt tuning", s, changes=(("length", n),)))
                               for n in (1, 5, 10, 20, 50, 100) for s in seeds]
        if name == "starts":
            several = range(max(1, 2 * self.budget.seeds))
            kinds = {"prompt tuning, random": ("prompt tuning", (("init", "random"),)), "prompt tuning, vocabulary": ("prompt tuning", ()),
                     "bottleneck adapters": ("bottleneck adapters", ()), "LoRA": ("LoRA", ()), "full fine-tuning": ("full fine-tuning", ())}
            return [(kind, at("sentiment", m, s, changes=changes, order=0)) for kind, (m, changes) in kinds.items() for s in several]
        if name == "sizes":
            return [(f"{m}: {n}", at("sentiment", m, s, texts=n)) for m in ("frozen base", "prompt tuning", "LoRA", "full fine-tuning")
                    for n in (32, 128, 512, self.budget.texts) for s in seeds]
        raise ValueError(f"no question is called {name!r} (questions: {', '.join(QUESTIONS)})")

    def asked_for(self, task: str, method: str, question: str = "") -> bool:
        """`--only` names tasks, methods, questions: of each kind that it names, one must fit."""
        for kind, own in ((TASKS, task), (CONTESTANTS, method), ((*QUESTIONS, "latency"), question)):
            if (named := self.only & set(kind)) and own not in named:
                return False
        return True

    def runs(self) -> list[tuple[Run | str, bool]]:
        """(run or the name of a latency table, whether its settings are final), each once, in the order to be done."""
        wanted: dict[str, tuple] = {}

        def add(run, known=True):
            wanted.setdefault(key_of(run), (run, known))

        for task in ("sentiment", "cards"):
            methods = [m for m in CONTESTANTS if self.asked_for(task, m)]
            best = {}
            for method in methods:
                runs, best[method] = self.sweep(task, method)
                for run in runs:
                    add(run)
            for method in methods:
                refused = any((self.has(run) or {}).get("refused") for run in self.sweep(task, method)[0])
                known = best[method] is not None or not grid(method, task, self.budget)
                if not refused:
                    for run in self.finals(task, method, best[method]):
                        if known or run.seed or run.domain not in ("", "movies"):  # the first is one of the sweep's
                            add(run, known)
        for question in QUESTIONS:
            for _, run in self.question(question):
                if self.asked_for(run.task, run.method, question):
                    add(run, run.rate is not None)
        for task in TASKS:
            if self.asked_for(task, "", "latency"):
                add(f"latency / {task}")
        return list(wanted.values())

    def missing(self) -> list[tuple[Run | str, bool]]:
        return [(run, known) for run, known in self.runs() if key_of(run) not in self.records]

    def seconds(self, run: Run | str) -> float:
        """How long a run will take: as runs of this task and method took, or a guess."""
        task, method = ("latency", "") if isinstance(run, str) else (run.task, run.method)
        took = [r["wall"] for k, r in self.records.items()
                if r.get("wall") and (k.startswith("latency") if task == "latency" else (r.get("task"), r.get("method")) == (task, method))]
        guess = GUESS[task].get(method, GUESS[task][""])
        if self.budget.seeds == 1:
            guess = 8
        longer = 1 + dict(run.changes).get("length", 0) / 60 if isinstance(run, Run) else 1
        return 2 + longer * (statistics.median(took) if took else guess)

    def minutes(self) -> float:
        return sum(self.seconds(run) / (1 if isinstance(run, str) else slots(run.task)) for run, _ in self.missing()) / 60


def valid(key: str, record: dict, budget: Budget) -> bool:
    """Whether the record was measured with this budget and these settings."""
    if record["budget"] != asdict(budget):
        return False
    if key.startswith("latency"):
        return True
    if record["method"] not in CONTESTANTS:
        return False
    settings = contestant(record["method"], record["task"], tuple(map(tuple, record["changes"])))
    return "refused" in record or record["settings"] == (repr(settings) if settings else None)


def stale(records: dict) -> list[str]:
    """The keys of the records whose code is another one now."""
    now = {name: code_of(name) for name in (*CONTESTANTS, "latency")}
    return [key for key, r in records.items() if r["code"] != now.get(r.get("method", "latency"))]


# ---------------------------------------------------------------------------- files


def write_json(path: Path, content) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(making, path)


def write_records(path: Path, records: dict) -> None:
    """One record a line, so that a difference shows what was measured anew."""
    lines = [f" {json.dumps(key, ensure_ascii=False)}: {json.dumps(r, ensure_ascii=False, sort_keys=True)}" for key, r in sorted(records.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(making, path)


def read_records(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def provenance() -> dict:
    """Date, machine and versions, as the notebooks' figures carry them."""
    spec = importlib.util.spec_from_file_location("minipeft_notebook_tools", ROOT / "notebooks" / "tools.py")
    tools = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(tools, "provenance"):
        spec.loader.exec_module(tools)
    return tools.provenance()


# ---------------------------------------------------------------------------- the tables

ABOUT = ("trained", "percent", "file MB", "seconds", "s a step", "peak GiB")


def summarise(records: dict, budget: Budget) -> dict:
    """data/results/comparison.json: a row a method and task, the questions' points, the latencies."""
    plan = Plan(records, budget)
    found = {"budget": asdict(budget), "missing runs": len(plan.missing()), "latency": {}, "questions": {}}
    for task in TASKS:
        found[task] = [row for method in CONTESTANTS if (row := method_row(plan, task, method))]
        full = next((r.get("score") for r in found[task] if r["method"] == "full fine-tuning"), None)
        for row in found[task]:
            if full and "score" in row:
                row["of full"] = row["score"] / full
        if latency := plan.records.get(f"latency / {task}"):
            found["latency"][task] = {k: latency[k] for k in ("rows", "batch", "tokens", "date", "device")}
    for name in QUESTIONS:
        points: dict = {}
        for value, run in plan.question(name):
            record = plan.has(run)
            if record and record.get("score") is not None:
                points.setdefault(str(value), []).append({k: record[k] for k in ("score", "loss", "trained", "s a step") if k in record})
        found["questions"][name] = {value: {"n": len(rows), "score": spread([r["score"] for r in rows]), "loss": spread([r["loss"] for r in rows if r["loss"] is not None]),
                                            "trained": rows[0]["trained"], "s a step": rows[0].get("s a step")} for value, rows in points.items()}
    used = [r for r in plan.records.values()]
    found["dates"] = sorted({r["date"] for r in used})
    found["devices"] = sorted({r["device"] for r in used})
    found["versions"] = used[-1]["versions"] if used else {}
    found["command"] = "make results"
    return found


def spread(values: list[float]) -> dict | None:
    """Mean, standard deviation over the runs, least and most."""
    if not values:
        return None
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None, "low": min(values), "high": max(values)}


def method_row(plan: Plan, task: str, method: str) -> dict | None:
    """One method on one task: sweep, scores over seeds, cost. None where nothing has been measured."""
    sweep, best = plan.sweep(task, method)
    swept = {f"{run.rate:g}": r["loss"] for run in sweep if not run.seed and (r := plan.has(run)) and "refused" not in r}
    refused = next((r["refused"] for run in sweep if (r := plan.has(run)) and "refused" in r), None)
    if refused:
        return {"method": method, "refused": refused}
    runs = [r for run in plan.finals(task, method, best) if (best is not None or not sweep) and (r := plan.has(run))]
    diverged = sum("diverged" in r for r in runs)
    runs = [r for r in runs if "diverged" not in r]
    if not runs:
        return {"method": method, "rates": swept} if swept else None
    row = {"method": method, "settings": runs[0]["settings"], "rate": best, "rates": swept, "runs": len(runs), "diverged": diverged}
    for k in ABOUT:
        if any(k in r for r in runs):
            row[k] = statistics.median(r[k] for r in runs if k in r)
    row["trained"] = int(row.get("trained", 0))
    if task == "cards":
        if best is not None:
            row["mean losses"] = {f"{rate:g}": mean if math.isfinite(mean) else None for rate, mean in plan.means(sweep).items()}
        for k in ("score", "format", "name", "facts", "all_facts", "recall"):
            row[k] = statistics.mean(r[k] for r in runs)
        row["spread"] = statistics.stdev(r["score"] for r in runs) if len(runs) > 1 else None
        row["lowest"], row["highest"] = min(r["score"] for r in runs), max(r["score"] for r in runs)
        before = (plan.records.get("cards / frozen base / seed 0") or {}).get("plain loss")
        if before and all("plain loss" in r for r in runs):
            row["forgetting"] = statistics.mean(r["plain loss"] for r in runs) - before
        return row
    by = {d: [r["score"] for r in runs if r["domain"] == d] for d in DOMAINS}
    by = {d: values for d, values in by.items() if values}
    row["domains"] = {d: statistics.mean(values) for d, values in by.items()}
    row["score"] = statistics.mean(row["domains"].values())
    row["commoner"] = statistics.mean(next(r["commoner"] for r in runs if r["domain"] == d) for d in by)
    seeds = [[r["score"] for r in runs if r["seed"] == s] for s in range(plan.budget.seeds)]
    seeds = [statistics.mean(values) for values in seeds if len(values) == len(DOMAINS)]     # a mean over the four domains, per seed
    row["spread"] = statistics.stdev(seeds) if len(seeds) > 1 else None
    row["lowest"], row["highest"] = (min(seeds), max(seeds)) if seeds else (None, None)
    skill = [r["old skill"] for r in runs if "old skill" in r]
    before = [r["old skill"] for k, r in plan.records.items() if k.startswith("sentiment / movies / frozen base /") and "old skill" in r]
    if skill and before:
        row["forgetting"] = before[0] - statistics.mean(skill)
    return row


# ---------------------------------------------------------------------------- the command


class Bench:
    """The records, where they are kept, and a process for each run."""

    writing = threading.Lock()

    def __init__(self, path: Path, budget: Budget, heads: Path):
        self.path, self.budget, self.heads = path, budget, heads
        self.records = read_records(path)
        self.about = provenance()
        self.code = {name: code_of(name) for name in (*CONTESTANTS, "latency")}  # as it is now, when it is loaded
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
        if hasattr(self.context, "set_forkserver_preload"):
            self.context.set_forkserver_preload(["torch", "transformers", "minipeft.training", "minipeft.generation", "minipeft.bill"])

    def alone(self, work, *args):
        """`work(*args)` in a process of its own. One with several threads begins anew: a fork of a process in which
        OpenMP has had threads waits for them for ever."""
        context = multiprocessing.get_context("spawn") if work is measure_latency else self.context
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(work, *args).result()

    def do(self, run: Run | str) -> dict:
        if isinstance(run, str):
            record = self.alone(measure_latency, run.removeprefix("latency / "), self.budget) | {"code": self.code["latency"]}
        else:
            record = self.alone(measure, run, self.budget, str(self.heads)) | asdict(run) | {"code": self.code[run.method]}
        with self.writing:
            self.records[key_of(run)] = record | {"budget": asdict(self.budget)} | self.about
            write_records(self.path, self.records)
        return record

    def settle(self, only: set[str] = frozenset()) -> None:
        """Records of older code: repeat the first steps of one run of each method; where they are the same, keep them all.
        Those that are not asked for are left for later. Only the losses of these steps are compared: where the code that
        evaluates, answers or scores gives other numbers, take the records out of the file by hand."""
        old = [key for key in stale(self.records) if valid(key, self.records[key], self.budget)]
        asked, groups = Plan({}, self.budget, only).asked_for, {}
        for key in old:
            r = self.records[key]
            if asked(r["task"], r["method"]) if "task" in r else asked(key.removeprefix("latency / "), "", "latency"):
                groups.setdefault((r.get("task", key), r.get("method", "latency")), []).append(key)
        for (task, method), keys in groups.items():
            sample = next((k for k in keys if self.records[k].get("first")), None)
            same = False
            if sample:
                r = self.records[sample]
                again = self.alone(measure, run_of(r), self.budget, str(self.heads), True).get("first", [])
                same = len(again) == len(r["first"]) and all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(again, r["first"], strict=True))
            print(f"{task}, {method}: the code has changed; {len(keys)} records", "stay, the first steps give the same loss" if same else "are measured again")
            for key in keys:
                if same:
                    self.records[key] |= {"code": self.code[method], "first steps repeated": self.about["date"]}
                else:
                    del self.records[key]
        write_records(self.path, self.records)


def run_of(record: dict) -> Run:
    fields = {k: record[k] for k in ("task", "method", "rate", "seed", "domain", "texts", "order")}
    return Run(**fields, changes=tuple(map(tuple, record["changes"])))


def said(record: dict) -> str:
    if "refused" in record:
        return "refused: " + record["refused"][:90]
    if "rows" in record:
        return f"{len(record['rows'])} rows"
    if record.get("diverged"):
        return record["diverged"]
    return f"score {record['score']:.3f}, validation loss {record['loss']:.3f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="notebooks/compare.py", description="Every method, the same models, tasks and budgets.")
    parser.add_argument("--only", default="", help=f"of {', '.join(TASKS)}, {', '.join(QUESTIONS)}, latency, or a method's name; commas for several")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no new run after so many minutes")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and stop")
    parser.add_argument("--profile", choices=("cpu", "smoke"), default="cpu")
    args = parser.parse_args(argv)
    only = {name.strip() for name in args.only.split(",") if name.strip()}
    if unknown := only - {*TASKS, *QUESTIONS, *CONTESTANTS, "latency"}:
        parser.error(f"--only {sorted(unknown)[0]!r}: accepted are {', '.join([*TASKS, *QUESTIONS, 'latency', *CONTESTANTS])}")
    budget = SMOKE if args.profile == "smoke" else CPU
    folder = ROOT / ("build/comparison" if args.profile == "smoke" else "data/results")
    if args.list:
        return work(args, only, budget, folder)
    (ROOT / "build").mkdir(exist_ok=True)
    try:
        with FileLock(ROOT / "build" / f"comparison-{args.profile}.lock", timeout=0):   # two would write each its own records alone
            return work(args, only, budget, folder)
    except Timeout:
        print("another notebooks/compare.py is at work on these records; wait until it has ended, or stop it", file=sys.stderr)
        return 1


def work(args: argparse.Namespace, only: set[str], budget: Budget, folder: Path) -> int:
    """Measure what is missing, or list it."""
    bench = Bench(folder / "comparison_runs.json", budget, ROOT / "build" / "comparison" / "heads")
    if not args.list:
        bench.settle(only)
    plan = Plan(bench.records, budget, only)
    missing = plan.missing()
    print(f"{len(plan.runs()) - len(missing)} runs are there, {len(missing)} are missing: about {plan.minutes():.0f} minutes on two cores,"
          " and more where a best rate stands at an edge")
    if args.list:
        for run, known in plan.runs():
            key = key_of(run)
            print("  there  " if key in plan.records else "  missing" if known else "  waits for its rate", key)
        return 0
    began, failed, doing = time.monotonic(), {}, {}                    # doing: future -> (run, when it began)
    with ThreadPoolExecutor(CORES) as pool:
        try:
            while True:
                busy = [run for run, _ in doing.values()]
                for run, known in Plan(bench.records, budget, only).missing():
                    late = (time.monotonic() - began) / 60 >= args.minutes
                    if known and not late and key_of(run) not in {*failed, *map(key_of, busy)} and may_start(run, busy):
                        doing[pool.submit(bench.do, run)] = run, time.monotonic()
                        busy.append(run)
                if not doing:
                    break
                for future in wait(doing, return_when=FIRST_COMPLETED).done:
                    run, since = doing.pop(future)
                    if error := future.exception():              # that run alone is lost; the others go on
                        failed[key_of(run)] = f"{type(error).__name__}: {error}"
                        print(f"FAILED  {key_of(run)}: {failed[key_of(run)]}", flush=True)
                        continue
                    left = Plan(bench.records, budget, only)
                    print(f"{time.strftime('%H:%M')}  {key_of(run)}: {said(future.result())}, {time.monotonic() - since:.0f} s; "
                          f"{len(left.missing())} to go, about {left.minutes():.0f} min", flush=True)
        except KeyboardInterrupt:
            print("stopped; the next time it goes on here")
    write_json(folder / "comparison.json", summarise(bench.records, budget))
    left = Plan(bench.records, budget, only).missing()
    print(f"{len(left)} runs are missing; the tables are in {(folder / 'comparison.json').relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
