"""Training and evaluation of whatever is trainable on a model: adapters, or all of it.

    fit(model, tokenizer, data, FitConfig(...))      evaluate(model, tokenizer, data)

An example is `{"prompt": str, "completion": str}` or `{"text": str, "label": int}`. For the first
kind the loss is the mean cross-entropy over the completion's tokens and the end token:

    loss = -1/N Σ_n log p(token_n | tokens before it),    N = the batch's completion tokens

Three things make it light. (1) The output head runs only where the next token is a target, so the
prompt never becomes vocabulary-sized logits; the last token, which nothing follows, is not read.
(2) A batch is sorted by length and cut into passes of at most `max_tokens` tokens, whose gradients
add up to the batch's; memory follows the pass, not the batch, and little is padding. (3) On a CPU the rows of a decoder lie
behind one another in one sequence, without padding (packing.py); where that cannot be, it is padded on
the right, where causal attention never looks, so it needs no attention mask. On a CPU passes run side
by side, one core each, which is faster than all cores in each matrix product of one pass.

Every random number is a function of (seed, step), so a run that was killed goes on from its last
checkpoint and ends, on a CPU, with the same weights to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packing, profiles, sockets

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    steps         optimizer steps; None takes as many as `epochs` passes over the data need
    batch_size    examples behind one optimizer step
    shuffle       each epoch in an order of its own; False keeps the order of the data
    max_tokens    tokens on their way at one time, with the padding where there is any: a batch is cut into
                  as many passes as that takes and their gradients are accumulated
    lr, schedule  peak rate; after the warm-up it falls along a cosine or a line to 0, or stays
    warmup        share of the steps in which the rate climbs from 0
    optimizer     "adamw"; "adamw8bit" keeps its two states in a byte each instead of four, and
                  "paged_adamw8bit" lets them move to the CPU's memory when the GPU's is full: both
                  through bitsandbytes, on a GPU
    clip          largest norm of the whole gradient; 0 for none
    precision     "auto": bf16 autocast where the machine computes in it, fp16 with loss scaling on a
                  GPU without bf16, otherwise fp32
    eval_every    steps between evaluations on `eval_data`; 0 for none but the last
    patience      stop after so many evaluations without a better loss and go back to the best
    folder        where checkpoints and log.jsonl go; save_every: steps between checkpoints
    resume        go on from the newest checkpoint in `folder`
    """

    steps: int | None = None
    epochs: float = 1
    batch_size: int = 16
    shuffle: bool = True
    max_tokens: int = 1024
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    eval_every: int = 0
    patience: int = 0
    seed: int = 0
    folder: str | os.PathLike | None = None
    save_every: int = 0
    resume: bool = False
    progress: bool = True

    def __post_init__(self):
        def check(name, ok, accepted):
            if not ok(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted is {accepted}")

        def whole(low):
            return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low

        def number(v):
            return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)

        check("steps", lambda v: v is None or whole(1)(v), "a whole number from 1, or None")
        check("epochs", lambda v: number(v) and v > 0, "a number above 0")
        for name in ("batch_size", "max_tokens"):
            check(name, whole(1), "a whole number from 1")
        for name in ("eval_every", "patience", "save_every", "seed"):
            check(name, whole(0), "a whole number from 0")
        check("shuffle", lambda v: isinstance(v, bool), "True or False")
        check("lr", lambda v: number(v) and v > 0, "a number above 0")
        for name in ("weight_decay", "clip"):
            check(name, lambda v: number(v) and v >= 0, "a number from 0")
        check("warmup", lambda v: number(v) and 0 <= v <= 1, "a share from 0 to 1")
        check("schedule", SCHEDULES.__contains__, ", ".join(map(repr, SCHEDULES)))
        check("optimizer", OPTIMIZERS.__contains__, ", ".join(map(repr, OPTIMIZERS)))
        check("precision", PRECISIONS.__contains__, ", ".join(map(repr, PRECISIONS)))
        if self.save_every and self.folder is None:
            raise ValueError(f"save_every is {self.save_every} but folder is None; name a folder")
        if self.resume and self.folder is None:
            raise ValueError("resume is True but folder is None; name the folder of the run to go on with")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of optimizer step `step` (from 0) of `steps`."""
        warm = round(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)              # 0 … below 1
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (1 - done) if self.schedule == "linear" else self.lr


@dataclass
class FitResult:
    """What a run did. `history` has one dict a step: step, loss, lr, grad_norm, tokens_per_s,
    memory (bytes), seconds, and eval_loss where it was evaluated."""

    steps: int
    history: list[dict] = field(repr=False)
    seconds: float
    peak_memory: int
    evaluation: dict | None = None
    stopped_early: bool = False


# ---------------------------------------------------------------------------------------------
# From text to passes
# ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    """One encoded example. Generative: targets are `ids[start:]`. Classification: `label`.
    For an encoder-decoder `ids` goes in and `answer` comes out."""

    ids: list[int]
    start: int = 0
    label: int | None = None
    answer: list[int] | None = None

    def __len__(self):
        return len(self.ids) + len(self.answer or ())


def encode(model: nn.Module, tokenizer, data: Sequence[dict]) -> list[Row]:
    """Token ids of every example. Raises `ValueError` naming the example that cannot be used."""
    if len(data) == 0:
        raise ValueError("data is empty; at least one example is needed")
    kinds = {"label" in e and "text" in e for e in data}
    bad = next((i for i, e in enumerate(data)
                if not ({"text", "label"} <= set(e) or {"prompt", "completion"} <= set(e))), None)
    if bad is not None or len(kinds) > 1:
        raise ValueError(f"example {bad or 0} has the fields {sorted(data[bad or 0])}; accepted are "
                         "prompt and completion, or text and label, the same in all examples")
    if kinds == {True}:
        texts = tokenizer([e["text"] for e in data])["input_ids"]
        labels = model.config.num_labels
        if not sockets.own_heads(model):
            raise ValueError(f"the data has labels, and {type(model).__name__} no head for classes; load it with num_labels")
        for i, e in enumerate(data):
            if not isinstance(e["label"], Integral) or not 0 <= e["label"] < labels:
                raise ValueError(f"example {i} has the label {e['label']}; this model has {labels}, from 0")
        rows = [Row(ids, label=int(e["label"])) for ids, e in zip(texts, data, strict=True)]
    else:
        if model.get_output_embeddings() is None:
            raise ValueError(f"the data has prompts and completions, and {type(model).__name__} no head that predicts tokens; "
                             "accepted there are text and label")
        prompts = tokenizer([e["prompt"] for e in data])["input_ids"]
        answers = tokenizer([e["completion"] for e in data], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        if model.config.is_encoder_decoder:
            rows = [Row(p, answer=a + end) for p, a in zip(prompts, answers, strict=True)]
        else:
            rows = [Row(p + a + end, start=len(p)) for p, a in zip(prompts, answers, strict=True)]
    limit = sockets.position_limit(model) - sockets.added_length(model)
    for i, row in enumerate(rows):
        if row.label is None and not (row.answer if row.answer is not None else 0 < row.start < len(row.ids)):
            raise ValueError(f"example {i} needs at least one token of prompt and one of completion: "
                             f"{ {k: data[i][k] for k in ('prompt', 'completion')} }")
        if len(row.ids) > limit:
            raise ValueError(f"example {i} has {len(row.ids)} tokens; this model takes {limit}. Shorten it.")
    return rows


def passes(rows: list[Row], max_tokens: int, lanes: int = 1, packed: bool = False) -> list[list[Row]]:
    """The rows in passes of at most `max_tokens` tokens, a row longer than that alone.

    Padded: sorted by length, longest first, and cut so that rows × longest ≤ max_tokens. Of all limits
    that give as few passes (or as few for each of `lanes` side by side), the smallest is taken: passes
    of equal size need the least memory and waste the least padding. Packed: any rows may go together,
    and each goes to the pass that has the fewest tokens yet.
    """
    rows = sorted(rows, key=len, reverse=True)
    if packed:
        count = lanes * math.ceil(sum(map(len, rows)) / max_tokens / lanes)
        while True:
            chunks, sizes = [[] for _ in range(count)], [0] * count
            for row in rows:
                emptiest = sizes.index(min(sizes))
                chunks[emptiest].append(row)
                sizes[emptiest] += len(row)
            if all(size <= max_tokens or len(c) == 1 for c, size in zip(chunks, sizes, strict=True)):
                return [c for c in chunks if c]
            count += lanes

    def cut(limit: int) -> list[list[Row]]:
        chunks = [[rows[0]]]
        for row in rows[1:]:
            if len(chunks[-1][0]) * (len(chunks[-1]) + 1) > limit:
                chunks.append([])
            chunks[-1].append(row)
        return chunks

    fewest = math.ceil(len(cut(max_tokens)) / lanes) * lanes
    limits = range(max_tokens // 32, max_tokens, max(1, max_tokens // 32))
    return next((c for c in map(cut, limits) if len(c) <= fewest), cut(max_tokens))


def batch_of(rows: Sequence[Row], batch_size: int, seed: int, step: int, shuffle: bool = True) -> list[Row]:
    """The rows of one optimizer step, a function of (seed, step). Each epoch holds every row once."""
    n = len(rows)
    wanted = range(step * batch_size, (step + 1) * batch_size)
    if not shuffle:
        return [rows[i % n] for i in wanted]
    return [rows[epoch_order(rows, batch_size, seed, i // n)[i % n]] for i in wanted]


def epoch_order(rows: Sequence[Row], batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The rows shuffled; then, among the rows of every eight batches, those of similar length put
    into the same batch, so that little is padded while each batch stays a random draw."""
    return _epoch_order(tuple(map(len, rows)), batch_size, seed, epoch)


@lru_cache(maxsize=2)
def _epoch_order(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    draw = random.Random(f"{seed} {epoch}")
    shuffled = draw.sample(range(len(lengths)), len(lengths))
    order: list[int] = []
    for start in range(0, len(shuffled), 8 * batch_size):
        window = sorted(shuffled[start:start + 8 * batch_size], key=lengths.__getitem__)
        batches = [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
        order += (i for batch in draw.sample(batches, len(batches)) for i in batch)
    return tuple(order)


def _pad(sequences: list[list[int]], value: int, device) -> Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([s + [value] * (longest - len(s)) for s in sequences], device=device)


class CrossEntropy(torch.autograd.Function):
    """-Σ_n log softmax(z_n)[target_n] of logits z (N, V), a sum. Its gradient, softmax(z) - onehot, is written over
    the kept log softmax: the largest tensor of a pass is not made twice more. So it goes backward only once."""

    @staticmethod
    def forward(ctx, logits, targets):
        logp = logits.log_softmax(-1)                            # (N, V)
        ctx.save_for_backward(logp, targets)
        return -logp.gather(1, targets[:, None]).sum()

    @staticmethod
    def backward(ctx, grad):
        gradient, targets = ctx.saved_tensors
        gradient.exp_()                                          # softmax(z)
        gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
        return gradient.mul_(grad), None


def loss_of(model: nn.Module, rows: list[Row], pad: int, packed: bool = False) -> tuple[Tensor, Tensor | None, int]:
    """One forward pass: (sum of the targets' cross-entropies, targets guessed right, targets). What is
    guessed right is counted outside training only: None where gradients are kept. `packed`: without
    padding, within `packing.one_sequence`; rows of equal length need none, and attend faster side by side."""
    if packed and len({len(row) for row in rows}) > 1:
        logits, targets = _packed(model, rows)
    else:
        logits, targets = _padded(model, rows, pad)
    loss = CrossEntropy.apply(logits.float() if logits.dtype.itemsize < 4 else logits, targets)
    right = None if torch.is_grad_enabled() else (logits.argmax(-1) == targets).sum()
    return loss, right, len(targets)


def _packed(model: nn.Module, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """The logits (N, V) that predict the targets (N,), from one sequence of all rows."""
    before = torch.tensor([[i + 1 >= r.start for r in rows for i in range(len(r.ids) - 1)]])  # (1, Σ T_row)
    with sockets.only_at(model.get_output_embeddings(), before):
        logits = model(**packing.inputs([r.ids[:-1] for r in rows])).logits                   # (N, V)
    return logits, torch.tensor([i for r in rows for i in r.ids[r.start:]])


def _padded(model: nn.Module, rows: list[Row], pad: int) -> tuple[Tensor, Tensor]:
    """The logits (N, V) that predict the targets (N,), from rows of equal length; of a classifier one each."""
    device = next(model.parameters()).device
    ids = _pad([r.ids for r in rows], pad, device)               # (B, T)
    lengths = torch.tensor([len(r.ids) for r in rows], device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]  # (B, T)
    head = model.get_output_embeddings()

    if rows[0].label is not None:
        logits = model(input_ids=ids, attention_mask=real.long()).logits          # (B, classes)
        targets = torch.tensor([r.label for r in rows], device=device)
    elif rows[0].answer is not None:
        answers = _pad([r.answer for r in rows], -100, device)   # (B, A)
        inputs = model.prepare_decoder_input_ids_from_labels(answers)
        targets = answers[answers != -100]
        with sockets.only_at(head, answers != -100):
            logits = model(input_ids=ids, attention_mask=real.long(), decoder_input_ids=inputs,
                           use_cache=False).logits               # (N, V)
    else:
        starts = torch.tensor([r.start for r in rows], device=device)
        target = real & (torch.arange(ids.shape[1], device=device) >= starts[:, None])
        targets = ids[target]                                    # (N,)
        before = target[:, 1:]                                   # (B, T-1), the position that predicts it
        with sockets.only_at(head, before):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (N, V)
    return logits, targets


class Lanes:
    """Passes side by side on a CPU, one core each: `for result in lanes.map(work, rows)`, in order.

    A matrix product of some hundred rows does not keep several cores busy to its end; two passes on
    two cores do. `max_tokens` is shared among the lanes, so memory stays what it was. With
    `one_at_a_time`, on a GPU and on one core there is a single lane, which is the calling thread.
    """

    FEWEST = 64  # tokens a lane: with fewer, reading the weights costs more than the products

    def __init__(self, model: nn.Module, max_tokens: int, one_at_a_time: bool = False, packed: bool = False):
        self.packed = packed
        self.cores, count = torch.get_num_threads(), 1
        if next(model.parameters()).device.type == "cpu" and not one_at_a_time:
            count = max(1, min(self.cores, max_tokens // self.FEWEST))
        self.count, self.tokens, each = count, max_tokens // count, self.cores // count
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(each,)) if count > 1 else None

    def map(self, work: Callable, rows: list[Row]) -> Iterator:
        chunks = passes(rows, self.tokens, self.count, self.packed)
        return map(work, chunks) if self.pool is None else self.pool.map(work, chunks)

    def prepare(self, model: nn.Module) -> None:
        """What live pieces compute of their own weights alone, once for all passes of a step, here side by side too."""
        pieces = [p for p in sockets.live_pieces(model) if hasattr(p, "prepare")]
        shares = [pieces[i::self.count] for i in range(self.count)]
        for _ in (map if self.pool is None else self.pool.map)(lambda share: [p.prepare() for p in share], shares):
            pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.cores)                    # what later threads start with


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------

def evaluate(model: nn.Module, tokenizer, data: Sequence[dict], *, max_tokens: int = 1024,
             precision: str = "auto") -> dict:
    """Mean loss over the targets and the share of them guessed right, dropout off.

    Generative: {"loss", "perplexity", "token_accuracy", "targets"}. Classification: {"loss",
    "accuracy", "targets"}, one target an example.
    """
    rows = encode(model, tokenizer, data)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}; accepted is a whole number from 1")
    _precision(model, precision)                 # an unknown one is refused before the first pass
    was_training = model.training
    model.eval()
    loss, right, targets = 0.0, 0, 0
    try:
        def forward(chunk):
            with torch.no_grad(), _autocast(model, precision):
                part, hits, n = loss_of(model, chunk, tokenizer.pad_token_id or 0, lanes.packed)
                return part.item(), hits.item(), n

        with packing.one_sequence(model, max(map(len, rows))) as packed, Lanes(model, max_tokens, packed=packed) as lanes:
            for part, hits, n in lanes.map(forward, rows):
                loss, right, targets = loss + part, right + hits, targets + n
    finally:
        model.train(was_training)
    if rows[0].label is not None:
        return {"loss": loss / targets, "accuracy": right / targets, "targets": targets}
    return {"loss": loss / targets, "perplexity": math.exp(min(loss / targets, 700)),
            "token_accuracy": right / targets, "targets": targets}


def _precision(model: nn.Module, wanted: str) -> str:
    base = next(iter(sockets.base_parameters(model).values()))
    if wanted not in PRECISIONS:
        raise ValueError(f"precision is {wanted!r}; accepted are {', '.join(map(repr, PRECISIONS))}")
    if base.dtype == torch.float64:
        return "fp32"  # float64 stays float64: no autocast
    return profiles.precision(base.device) if wanted == "auto" else wanted


def _autocast(model: nn.Module, precision: str):
    precision = _precision(model, precision)
    if precision == "fp32":
        return contextlib.nullcontext()
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16 if precision == "bf16" else torch.float16)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

class NonFiniteLoss(ArithmeticError):
    """The loss or its gradient became infinite or NaN; the message says where and the likely cause."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What `fit` trains, by name: every parameter that requires a gradient, but of adapters only
    those that are active."""
    home = sockets.HOME
    live = {f"{home}.{n}" for n in getattr(model, home).live()} if hasattr(model, home) else set()
    return {n: p for n, p in model.named_parameters() if p.requires_grad
            and (not n.startswith(home + ".") or ".".join(n.split(".")[:2]) in live)}


def fit(model: nn.Module, tokenizer, data: Sequence[dict], config: FitConfig = FitConfig(), *,
        eval_data: Sequence[dict] | None = None, watch: Callable[[dict], None] | None = None) -> FitResult:
    """Train what is trainable on `data`. The model is left in eval mode.

    watch is called with every history entry as it is made (a live curve, a logger). Ctrl-C ends the
    step that is running, writes a checkpoint if there is a folder, and then raises
    KeyboardInterrupt; a second Ctrl-C stops at once.
    """
    weights = trainable(model)
    if not weights:
        raise ValueError("nothing is trainable: no parameter requires a gradient and belongs to an "
                         "active adapter (a merged adapter must be unmerged before it is trained)")
    rows = encode(model, tokenizer, data)
    steps = config.steps or max(1, math.ceil(config.epochs * len(rows) / config.batch_size))
    if config.patience and not (config.eval_every and eval_data):
        raise ValueError(f"patience is {config.patience}, which needs eval_data and eval_every")
    precision = _precision(model, config.precision)
    device = next(model.parameters()).device
    optimizer = _optimizer(weights, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    run = Run(config, steps, _fingerprint(config, steps, rows, weights), model, weights, optimizer, scaler)
    run.check_formats()
    start = run.restore() if config.resume else run.begin()
    if config.gradient_checkpointing:
        _recompute_activations(model, True)

    from tqdm.auto import tqdm
    history, began = run.history, time.perf_counter()
    stopped_early = bool(config.patience) and run.worse >= config.patience     # a run that ended so, taken up again
    profiles.reset_peak_memory(device)
    bar = tqdm(total=steps, initial=start, desc="fit", unit="step", disable=not config.progress)
    devices = [device] if device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(devices), _interrupt_between_steps() as interrupted, bar, \
                _passes_of(model, rows, weights, config, precision) as lanes:
            for step in range(start, start if stopped_early else steps):
                entry = _step(model, rows, weights, optimizer, scaler, tokenizer, config, precision, step, steps, lanes)
                if step == start:
                    _refuse_idle(model, weights)
                done = step + 1
                if config.eval_every and eval_data and (done % config.eval_every == 0 or done == steps):
                    score = evaluate(model, tokenizer, eval_data, precision=config.precision)
                    entry["eval_loss"] = score["loss"]
                    run.judge(score["loss"])
                    stopped_early = bool(config.patience) and run.worse >= config.patience
                history.append(entry)
                run.log(entry)
                if watch is not None:
                    watch(entry)
                bar.set_postfix_str(f"loss {entry['loss']:.3f}  lr {entry['lr']:.1e}  "
                                    f"{entry['tokens_per_s']:.0f} tok/s  {entry['memory'] / 2**30:.2f} GiB")
                bar.update()
                last = stopped_early or done == steps or interrupted.is_set()
                if config.folder is not None and (last or (config.save_every and done % config.save_every == 0)):
                    run.save(done)
                if interrupted.is_set():
                    raise KeyboardInterrupt(f"stopped after step {done} of {steps}")
                if stopped_early:
                    break
        run.take_best()
    finally:
        optimizer.zero_grad(set_to_none=True)
        if config.gradient_checkpointing:
            _recompute_activations(model, False)
        model.eval()
    evaluation = None
    if eval_data:
        evaluation = evaluate(model, tokenizer, eval_data, precision=config.precision)
    return FitResult(len(history), history, time.perf_counter() - began, profiles.peak_memory(device),
                     evaluation, stopped_early)


def _recompute_activations(model: nn.Module, on: bool) -> None:
    """Gradient checkpointing, under the name that this version of transformers has for it."""
    new = hasattr(model, "activation_checkpointing_enable")
    verb = f"{'activation' if new else 'gradient'}_checkpointing_{'enable' if on else 'disable'}"
    options = {f"{'activation' if new else 'gradient'}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, verb)(**options if on else {})


def _optimizer(weights: dict[str, nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in weights.values() if p.dim() > 1]
    vectors = [p for p in weights.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    device = groups[0]["params"][0].device.type
    if device != "cuda":
        raise ValueError(f"optimizer is {config.optimizer!r}, which needs a GPU; on this device ({device}) "
                         "accepted is 'adamw'")
    try:
        from bitsandbytes import optim
    except ImportError:
        raise ImportError(f"optimizer is {config.optimizer!r}, which is bitsandbytes' and that is not installed: "
                          "pip install bitsandbytes") from None
    kind = optim.AdamW8bit if config.optimizer == "adamw8bit" else optim.PagedAdamW8bit
    return kind(groups, lr=config.lr)


@contextlib.contextmanager
def _passes_of(model, rows, weights, config, precision) -> Iterator[Lanes]:
    """What `_step` makes its passes with, and the model as they need it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with packing.one_sequence(model, max(map(len, rows))) as packed, \
            Lanes(model, config.max_tokens, _one_at_a_time(model, rows, weights, config), packed) as lanes, \
            sockets.cast_once(model, None if config.gradient_checkpointing else dtype):  # that keeps no copies
        yield lanes


def _one_at_a_time(model, rows, weights, config) -> bool:
    """Whether passes must follow one another: they draw random numbers (dropout), which would come in
    another order each time; or a second set of gradients beside the first would cost more than it gains."""
    if config.gradient_checkpointing or any(not n.startswith(sockets.HOME + ".") for n in weights):
        return True
    before, row = torch.get_rng_state(), min(rows, key=len)
    with torch.no_grad():
        loss_of(model, [replace(row, ids=row.ids[:2], start=min(row.start, 1))], 0)
    drawn = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return drawn


def _step(model, rows, weights, optimizer, scaler, tokenizer, config, precision, step, steps, lanes) -> dict:
    """One optimizer step: every pass of the batch forward and backward, clip, update."""
    began = time.perf_counter()
    device = next(iter(weights.values())).device
    torch.manual_seed(config.seed * 1_000_003 + step)            # dropout is a function of (seed, step)
    lr = config.rate(step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    batch = batch_of(rows, config.batch_size, config.seed, step, config.shuffle)
    N = sum(1 if r.label is not None else len(r.answer or r.ids) - r.start for r in batch)
    total = 0.0

    def forward_and_backward(chunk):
        with _autocast(model, precision):
            loss, _, _ = loss_of(model, chunk, tokenizer.pad_token_id or 0, lanes.packed)
        if not math.isfinite(value := loss.item()):
            raise NonFiniteLoss(_blame("loss", value, step, lr, precision, config))
        if lanes.pool is None:
            scaler.scale(loss / N).backward()
            return value, ()
        return value, torch.autograd.grad(scaler.scale(loss / N), list(weights.values()), allow_unused=True)

    lanes.prepare(model)
    try:
        for value, gradients in lanes.map(forward_and_backward, batch):
            total += value
            for p, g in zip(weights.values(), gradients, strict=False):  # in the order of the passes
                if g is not None:
                    p.grad = g.contiguous() if p.grad is None else p.grad.add_(g)
    except NonFiniteLoss:
        optimizer.zero_grad(set_to_none=True)
        raise
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(list(weights.values()), config.clip or math.inf).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLoss(_blame("gradient norm", norm, step, lr, precision, config))
    scaler.step(optimizer)                                       # with fp16, skips an overflowed step
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    return {"step": step + 1, "loss": total / N, "lr": lr, "grad_norm": norm, "seconds": seconds,
            "tokens_per_s": sum(map(len, batch)) / seconds, "memory": profiles.memory_in_use(device)}


def _blame(what, value, step, lr, precision, config) -> str:
    if step == 0:
        cause = "the model's weights or the data already give it before any training" + (
            "; fp16 overflows beyond 65504, so try precision='fp32'" if precision == "fp16" else "")
    else:
        cause = f"the learning rate is probably too high; try {config.lr / 10:g}" + (
            "" if config.clip else ", or clip=1.0")
    return f"the {what} is {value} at step {step + 1} (rate {lr:.2e}): {cause}. The weights are those after step {step}."


def _refuse_idle(model, weights) -> None:
    for name, adapter in sockets.adapters(model).items():
        idle = [p for p in adapter.idle() if any(n.startswith(f"{sockets.HOME}.{name}.{p}.") for n in weights)]
        if idle:
            raise RuntimeError(f"adapter {name!r}: {len(idle)} of {len(adapter.sites)} pieces did not run "
                               f"({', '.join(idle[:4])}); the model goes past these modules, so they "
                               "cannot learn. Leave them out of `targets`.")


@contextlib.contextmanager
def _interrupt_between_steps() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of tearing a step apart; the second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------
# Checkpoints of a run
# ---------------------------------------------------------------------------------------------

def _fingerprint(config: FitConfig, steps: int, rows: list[Row], weights: dict[str, nn.Parameter]) -> dict:
    """What must agree between a run and its continuation, each named so that an error can name it."""
    kept = {k: v for k, v in asdict(config).items()
            if k not in ("steps", "epochs", "folder", "resume", "progress", "save_every")}
    digest = hashlib.sha256(repr([(r.ids, r.start, r.label, r.answer) for r in rows]).encode()).hexdigest()
    shapes = hashlib.sha256(repr([(n, tuple(p.shape), str(p.dtype)) for n, p in weights.items()]).encode())
    return kept | {"total steps": steps, "data": digest, "trainable parameters": shapes.hexdigest()}


class Run:
    """The files of one run: `step-00000100/` folders, each written whole or not at all, and log.jsonl."""

    def __init__(self, config, steps, fingerprint, model, weights, optimizer, scaler):
        self.config, self.steps, self.fingerprint = config, steps, fingerprint
        self.model, self.weights, self.optimizer, self.scaler = model, weights, optimizer, scaler
        self.folder = Path(config.folder) if config.folder is not None else None
        self.history: list[dict] = []
        self.best, self.best_loss, self.worse = None, math.inf, 0

    def judge(self, loss: float) -> None:
        """Remember the weights with the lowest evaluation loss; count evaluations without a better one."""
        if not self.config.patience:
            return
        if loss < self.best_loss:
            self.best = {n: p.detach().clone() for n, p in self.weights.items()}
            self.best_loss, self.worse = loss, 0
        else:
            self.worse += 1

    @torch.no_grad()
    def take_best(self) -> None:
        for name, value in (self.best or {}).items():
            self.weights[name].copy_(value)

    def log(self, entry: dict) -> None:
        if self.folder is not None:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-" + "[0-9]" * 8)) if self.folder and self.folder.is_dir() else []

    def adapters(self) -> set[str]:
        return {n.split(".")[1] for n in self.weights if n.startswith(sockets.HOME + ".")}

    def check_formats(self) -> None:
        """`TypeError`, before any step, for an adapter that no checkpoint can hold."""
        from . import checkpoint
        for name in self.adapters() if self.folder is not None else ():
            checkpoint.format_of(sockets.the_adapter(self.model, name))

    def begin(self) -> int:
        if self.folder is not None:
            if self.checkpoints():
                raise ValueError(f"{self.folder} holds a run already (at {self.checkpoints()[-1].name}); "
                                 "resume=True goes on with it, or name another folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "log.jsonl").write_text("")
        return 0

    def save(self, done: int) -> None:
        """Weights, optimizer, best weights, state and history, atomically; the two newest are kept."""
        from safetensors.torch import save_file

        from . import checkpoint
        target = self.folder / f"step-{done:08d}"
        if target.exists():
            return
        making = self.folder / f".making-{target.name}-{os.getpid()}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        names = {p: n for n, p in self.weights.items()}
        moments = {f"{key} {names[p]}": torch.as_tensor(value).contiguous().clone()
                   for p, state in self.optimizer.state.items() for key, value in state.items()}
        save_file({n: p.detach().contiguous() for n, p in self.weights.items()}, making / "weights.safetensors")
        save_file(moments, making / "optimizer.safetensors")
        if self.best is not None:
            save_file(self.best, making / "best.safetensors")
        for name in self.adapters():
            checkpoint.save_adapter(self.model, making / "adapters" / name, name)
        state = {"step": done, "fingerprint": self.fingerprint, "best_loss": self.best_loss, "worse": self.worse,
                 "scaler": self.scaler.state_dict(), "history": self.history}
        (making / "state.json").write_text(json.dumps(state))
        for file in making.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        os.replace(making, target)                               # the checkpoint appears whole
        for old in self.checkpoints()[:-2]:
            shutil.rmtree(old)

    @torch.no_grad()
    def restore(self) -> int:
        """Load the newest checkpoint; 0 if there is none. `ValueError` names what does not agree."""
        from safetensors.torch import load_file
        if not self.checkpoints():
            return self.begin()
        newest = self.checkpoints()[-1]
        state = json.loads((newest / "state.json").read_text())
        for key, now in self.fingerprint.items():
            if state["fingerprint"].get(key) != json.loads(json.dumps(now)):
                raise ValueError(f"{newest} belongs to another run: its {key} was "
                                 f"{state['fingerprint'].get(key)!r}, now it is {now!r}")
        weights, moments = load_file(newest / "weights.safetensors"), load_file(newest / "optimizer.safetensors")
        for name, p in self.weights.items():
            p.copy_(weights[name])
            own = {key.partition(" ")[0]: value for key, value in moments.items() if key.partition(" ")[2] == name}
            step = own.pop("step")                             # bitsandbytes counts with a plain number
            self.optimizer.state[p] = {"step": step.to(p.device) if self.config.optimizer == "adamw" else step.item()} | {
                key: value.to(p.device) for key, value in own.items()}
        if (newest / "best.safetensors").exists():
            self.best = load_file(newest / "best.safetensors", device=str(next(iter(self.weights.values())).device))
        self.best_loss, self.worse, self.history = state["best_loss"], state["worse"], state["history"]
        self.scaler.load_state_dict(state["scaler"])
        for leftover in self.folder.glob(".making-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        log = self.folder / "log.jsonl"
        log.with_suffix(".tmp").write_text("".join(json.dumps(e) + "\n" for e in self.history))
        os.replace(log.with_suffix(".tmp"), log)
        return state["step"]
