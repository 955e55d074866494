"""What an adapter costs when it is used: time of a forward pass and of generation, and operators, side by side.

    rows = mp.measure_latency(model, {"LoRA": mp.LoRA(), "adapters": mp.BottleneckAdapter(64)}, batch_sizes=(1, 8))
    lab.table(rows)

This is Table 1 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685) on your machine. An unmerged LoRA, an adapter or
a prompt is more work in every pass, and at batch 1, where the machine waits for the next small operator, many small
operators cost more than their arithmetic. A merged LoRA is another weight in the same operators: it costs nothing,
which `count_operators` shows without a clock.

A clock shows it only if the machine's own drift falls on all alike. So everything takes turns: in each turn each
contestant is measured once, in an order drawn anew, and is compared with the base of the same turn.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import sockets

BASE, MERGED = "base", ", merged"


def measure_latency(model: nn.Module, methods: Mapping[str, object], *, batch_sizes: Sequence[int] = (1, 8),
                    tokens: int = 128, new_tokens: int = 16, repeats: int = 7, progress: bool = True) -> list[dict]:
    """Time and operators of the base, of each method on it and, where it can be merged, of the method merged.

    methods      {name: what}; what is a method's settings, several in a list (a hybrid), or another model as it is.
                 A network that makes a prompt or prefix is folded away first
    batch_sizes  how many rows of `tokens` random tokens go through at once
    new_tokens   how many tokens are generated behind them, greedily; 0: none. Classifiers generate none
    repeats      turns; a turn before them warms everything up and does not count

    Returns rows for `lab.table`, one for each contestant and batch size: `forward ms`, the median over the turns, and
    `generate ms`, the same for one new token of every row (the pass over the prompt is spread over them); beside
    each, `±` half the distance of the quartiles and `/ base` the median of its ratios to the base in the same turn;
    `parameters` that were trained, and `operators` of one forward pass.

    `model` must have no adapters, and is given back to the bit. Raises `ValueError` for one that has, for numbers
    out of range and more tokens than the model has positions; whatever a method says that does not fit the model.
    """
    _check(model, methods, batch_sizes, tokens, new_tokens, repeats)
    if not getattr(model, "can_generate", lambda: False)():
        new_tokens = 0
    device = next(model.parameters()).device
    passes = {batch: _inputs(model, batch, tokens, device) for batch in batch_sizes}
    seconds: dict[tuple, list[float]] = {}
    operators = {}
    from tqdm.auto import tqdm

    with _in_eval_mode(model), torch.no_grad():
        contestants = _contestants(model, methods)
        bar = tqdm(total=(repeats + 1) * len(contestants), desc="latency", unit="turn", disable=not progress)
        with bar:
            for turn in range(repeats + 1):
                for name in random.Random(turn).sample(list(contestants), len(contestants)):
                    bar.set_postfix_str(name)
                    with contestants[name][0]() as plugged:
                        plugged(**passes[batch_sizes[0]])        # what a turn begins with is not timed
                        if turn == 0:
                            operators[name] = count_operators(plugged, **passes[batch_sizes[0]]).total()
                        for batch, inputs in passes.items():
                            times = {"forward": _seconds(device, lambda: plugged(**inputs))}
                            if new_tokens:
                                times["generate"] = _seconds(device, lambda: _generate(plugged, inputs, new_tokens)) / new_tokens
                            for what, taken in times.items():
                                seconds.setdefault((name, batch, what), []).append(taken)
                    bar.update()
    return [{"model": name, "parameters": contestants[name][1], "batch": batch, "tokens": tokens,
             "operators": operators[name]}
            | _figures(seconds, name, batch, "forward") | _figures(seconds, name, batch, "generate")
            for batch in batch_sizes for name in contestants]


def count_operators(model: nn.Module, **inputs) -> Counter:
    """How often each of PyTorch's operators ran in `model(**inputs)`, by name: {"aten.mm.default": 14, …}."""
    counted = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            counted[str(operator)] += 1
            return operator(*args, **(kwargs or {}))

    with torch.no_grad(), Count():
        model(**inputs)
    return counted


def _contestants(model: nn.Module, methods: Mapping) -> dict[str, tuple[Callable, int]]:
    """Name -> (a context in which the model is that contestant, how many numbers are trained)."""
    found = {BASE: (lambda: contextlib.nullcontext(model), 0)}
    for name, what in methods.items():
        if isinstance(what, nn.Module):
            found[name] = (lambda what=what: _in_eval_mode(what)), sum(p.numel() for p in what.parameters() if p.requires_grad)
            continue
        adapters = []
        devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices):
            try:
                for i, method in enumerate(what if isinstance(what, list | tuple) else [what]):
                    adapters.append(sockets.attach(model, method, f"part {i}"))
            finally:
                for adapter in adapters:
                    sockets.detach(model, adapter.name)
        trained = sum(p.numel() for adapter in adapters for p in adapter.parameters())
        adapters = [sockets.folded_adapter(adapter) for adapter in adapters]  # as they would be used
        found[name] = (lambda adapters=adapters: _plugged(model, adapters)), trained
        with contextlib.suppress(TypeError), _plugged(model, adapters, merged=True):  # a method that cannot: no row
            found[name + MERGED] = (lambda adapters=adapters: _plugged(model, adapters, merged=True)), trained
    return found


@contextlib.contextmanager
def _plugged(model: nn.Module, adapters: list[sockets.Adapter], merged: bool = False) -> Iterator[nn.Module]:
    """The model with these adapters alone: whoever is not measured has no hook on it."""
    plugged = []
    try:
        for adapter in adapters:
            sockets.plug(model, adapter)
            plugged.append(adapter.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # what rounding takes does not matter here
            for name in plugged if merged else ():
                sockets.merge(model, name)
        yield model
    finally:
        for name in reversed(plugged):
            sockets.detach(model, name)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def _inputs(model: nn.Module, batch: int, tokens: int, device) -> dict[str, Tensor]:
    """Random tokens (batch, tokens), the same at every call; an encoder-decoder reads them on both sides."""
    words, draw = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(batch)
    ids = torch.randint(words, (batch, tokens), generator=draw).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {})


def _generate(model: nn.Module, inputs: Mapping, new_tokens: int) -> None:
    model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                   max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0)


def _seconds(device: torch.device, work: Callable) -> float:
    """Wall-clock time until the device has finished."""
    synchronize = getattr(torch, device.type).synchronize        # of a GPU, which runs behind; of a CPU it does nothing
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def _figures(seconds: Mapping, name: str, batch: int, what: str) -> dict[str, float]:
    """Of one contestant: median, spread and ratio to the base, without the first turn."""
    if (name, batch, what) not in seconds:
        return {}
    own, base = (seconds[of, batch, what][1:] for of in (name, BASE))
    low, _, high = statistics.quantiles(own, n=4)
    ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
    return {f"{what} ms": 1000 * statistics.median(own), f"{what} ± ms": 500 * (high - low), f"{what} / base": ratio}


def _check(model, methods, batch_sizes, tokens, new_tokens, repeats) -> None:
    if sockets.adapters(model):
        raise ValueError(f"the model has adapters ({', '.join(sockets.adapters(model))}), whose hooks would slow the base "
                         "down; detach them, or load the base again")
    if not isinstance(methods, Mapping):
        raise ValueError(f"methods is {methods!r}; accepted is {{name: a method's settings}}")
    for name, what in methods.items():
        if not isinstance(name, str) or name == BASE or name.removesuffix(MERGED) != name:
            raise ValueError(f"{name!r} names a contestant; accepted is a string, but not {BASE!r}, and without {MERGED!r}")
        for method in what if isinstance(what, list | tuple) and what else [what]:
            if not hasattr(method, "pieces") and not (method is what and isinstance(what, nn.Module)):
                raise TypeError(f"{name!r} is {what!r}; accepted are a method's settings, such as mp.LoRA(), a list of "
                                "them, or a model")
    if not isinstance(batch_sizes, Sequence) or not batch_sizes or len(set(batch_sizes)) < len(batch_sizes):
        raise ValueError(f"batch_sizes is {batch_sizes!r}; accepted are different whole numbers from 1")
    for what, value, low in (*(("a batch size", b, 1) for b in batch_sizes), ("tokens", tokens, 1),
                             ("new_tokens", new_tokens, 0), ("repeats", repeats, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{what} is {value!r}; accepted is a whole number from {low}")
    longest = max((getattr(m, "length", 0) for what in methods.values()
                   for m in (what if isinstance(what, list | tuple) else [what])), default=0)
    if tokens + new_tokens + longest > sockets.position_limit(model):
        raise ValueError(f"tokens {tokens}, new_tokens {new_tokens} and a prompt of {longest} are more than the "
                         f"{sockets.position_limit(model)} positions of this model")
