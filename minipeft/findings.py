"""What the claims in data/claims.yaml come to, computed: one function a figure.

    @finding
    def adapters_in_bert(claimed):          # what was printed, from the YAML
        found = 24 * …
        return Finding("holds" if near(found, claimed, 0.02) else "wrong", found=found)

A function returns a `Finding`: the verdict that the figure gives, and the figures, by names that the claim's
reason puts into its sentence. Three sources, and nothing typed that one of them has:

counts    the published architectures, built from their configs on the meta device: shapes, no memory
bills     mp.memory_bill for the same configs
results   data/results/*.json, which `make results` and `make bench` measure. `NotMeasured` where a figure
          is not there yet

What a structure does (which tensors train, what merging leaves) is tried on a Llama of two blocks in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, nn

from . import anatomy, sockets
from .bill import MemoryBill, memory_bill, parameter_report
from .data import data_folder
from .latency import count_operators
from .methods.adapters import PLACEMENTS, BottleneckAdapter
from .methods.dora import DoRA
from .methods.ia3 import IA3
from .methods.lora import LoRA
from .methods.p_tuning import PTuning
from .methods.prefix_tuning import PrefixTuning
from .methods.prompt_tuning import PromptTuning
from .quant.linear4bit import Linear4bit, quantize
from .quant.loftq import quantize_loftq

HOLDS, WRONG, DEPENDS, OPEN = "holds", "wrong", "depends on", "not measured yet"
GB = 10**9                                       # as on the label of a card


@dataclass(frozen=True)
class Finding:
    """A verdict and the figures it rests on, {name: number or text}."""

    verdict: str
    figures: dict

    def __init__(self, verdict: str, **figures):
        object.__setattr__(self, "verdict", verdict)
        object.__setattr__(self, "figures", figures)


class NotMeasured(Exception):
    """A figure that data/results does not have yet; the message names it."""


FINDINGS: dict[str, Callable[[object], Finding]] = {}


def finding(function):
    """Register a function as the figure of a claim, under its own name."""
    FINDINGS[function.__name__] = function
    return function


def judge(true: bool) -> str:
    return HOLDS if true else WRONG


def near(found: float, claimed: float, tolerance: float) -> bool:
    """Whether a figure is the printed one, give or take a share of it."""
    return abs(found - claimed) <= tolerance * abs(claimed)


def percent(part: float, of: float) -> float:
    return 100 * part / of


# ---------------------------------------------------------------------------- published architectures


def llama_config(hidden: int, inner: int, layers: int, heads: int, **more):
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                       **{"vocab_size": 32000, "max_position_embeddings": 2048} | more)


def config(name: str):
    """The config of a published model: LLaMA (Touvron et al. 2023), Llama 3 (2024), BERT-base (Devlin et al. 2019)."""
    from transformers import BertConfig

    three = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    known = {
        "Llama 7B": lambda: llama_config(4096, 11008, 32, 32),
        "Llama 33B": lambda: llama_config(6656, 17920, 60, 52),
        "Llama 65B": lambda: llama_config(8192, 22016, 80, 64),
        "Llama 3 8B": lambda: llama_config(4096, 14336, 32, 32, **three),
        "Llama 3 70B": lambda: llama_config(8192, 28672, 80, 64, **three),
        "BERT-base": BertConfig,
    }
    return known[name]()


@cache
def bare(name: str) -> nn.Module:
    """The model of a config, on the meta device."""
    from transformers import BertModel, LlamaForCausalLM

    made = config(name)
    with torch.device("meta"):
        return (BertModel if name.startswith("BERT") else LlamaForCausalLM)(made)


@cache
def total(name: str) -> int:
    """All numbers of a model."""
    return parameter_report(bare(name)).total


@cache
def trained(name: str, method) -> int:
    """The numbers that a method trains on a model."""
    model = bare(name)
    if isinstance(method, DoRA):                 # its start reads the weights, which are not there
        paths = anatomy.match(model, method.targets)
        return sum(method.parameter_count(*anatomy.linear_shape(model.get_submodule(path))) for path in paths)
    sockets.attach(model, method)
    count = parameter_report(model).trainable
    sockets.detach(model)
    return count


QV = LoRA(rank=8)                                # the default of the paper and of PEFT: query and value
SEVEN = LoRA(rank=16, alpha=32, targets="all-linear")


@cache
def bill(name: str, way: str) -> MemoryBill:
    """One step on 1 × 512 tokens: 16-bit base, gradient checkpointing, AdamW; LoRA of rank 16 on all linears."""
    method = {"full": None, "LoRA": SEVEN, "QLoRA": SEVEN}[way]
    return memory_bill(config(name), method, batch=1, seq=512, dtype="bfloat16", gradient_checkpointing=True,
                       quantized=way == "QLoRA")


# ---------------------------------------------------------------------------- measured figures


def measured(notebook: str, *keys):
    """A figure of data/results/<notebook>.json; `NotMeasured` where it is not there."""
    path = data_folder() / "results" / f"{notebook}.json"
    where = f"{notebook}: {'.'.join(map(str, keys))}"
    if not path.exists():
        raise NotMeasured(where)
    value = json.loads(path.read_text(encoding="utf-8"))
    for key in keys if notebook == "bench" else ("figures", *keys):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise NotMeasured(where) from None
    return value


def row_of(rows: list[dict], **wanted) -> dict:
    """The first of the rows with these values; a value may be a test."""
    for row in rows:
        if all(value(row.get(key)) if callable(value) else row.get(key) == value for key, value in wanted.items()):
            return row
    raise NotMeasured(f"no row with {wanted}")


def starts_with(text: str) -> Callable[[object], bool]:
    return lambda value: str(value).startswith(text)


# ---------------------------------------------------------------------------- a model to try things on


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random numbers from a seed, and the caller's own left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny(**more) -> nn.Module:
    """A Llama of two blocks in float64, its weights drawn at random."""
    from transformers import LlamaForCausalLM

    small = {"vocab_size": 29, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    return LlamaForCausalLM(llama_config(16, 24, 2, 4, **small | more)).double().eval().requires_grad_(False)


def plugged(method, model: nn.Module | None = None, name: str = "default") -> tuple[nn.Module, sockets.Adapter]:
    """A method on the tiny model, at a random state: at the start, several do nothing."""
    model = model or tiny()
    adapter = sockets.attach(model, method, name)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, adapter


def ids() -> Tensor:
    return torch.arange(14).view(2, 7)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=ids()).logits


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return ((a - b).abs().max() / b.abs().max()).item()


def base_state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in sockets.base_parameters(model).values()]


def places(method) -> list[str]:
    """The sockets that a method fills on the tiny model, one entry a piece."""
    with seeded():
        return [socket for socket, _ in plugged(method)[1].sites]


def products(model: nn.Module) -> int:
    """Matrix products of one forward pass."""
    with torch.no_grad():
        counts = count_operators(model, input_ids=ids())
    return sum(n for name, n in counts.items() if any(part in str(name) for part in ("mm", "linear")))


# ---------------------------------------------------------------------------- soft prompts


@finding
def prompt_trains_the_input_only(claimed) -> Finding:
    with seeded():
        model, adapter = plugged(PromptTuning(5))
    training = [p for p in model.parameters() if p.requires_grad]
    width = model.config.hidden_size
    return Finding(judge(len(training) == 1 and tuple(training[0].shape) == (5, width)),
                   tensors_trained=len(training), base_tensors_trained=sum(p.requires_grad for p in base_of(model)))


def base_of(model: nn.Module) -> list[nn.Parameter]:
    return list(sockets.base_parameters(model).values())


@finding
def prompt_needs_no_change(claimed) -> Finding:
    """The same logits from the untouched model, given the vectors as `inputs_embeds`."""
    with seeded():
        model, adapter = plugged(PromptTuning(5))
        with_socket = logits(model)
        names = list(tiny().state_dict())
        P = next(iter(adapter.parameters())).detach().clone()
        sockets.detach(model)
        e = torch.cat([P.expand(2, -1, -1), model.get_input_embeddings()(ids())], dim=1)   # (B, 5 + T, d)
        with torch.no_grad():
            by_hand = model(inputs_embeds=e).logits
        prefixed, _ = plugged(PrefixTuning(4, reparameterize=False), model)
    off = apart(by_hand[:, -7:], with_socket[:, -7:])
    renamed = len(set(prefixed.state_dict()) ^ set(names))
    return Finding(judge(not (off < 1e-9 and renamed == 0)), logits_differ_by=off, keys_renamed_by_a_prefix=renamed)


@finding
def prompt_share(claimed) -> Finding:
    """The share of a prompt of 20 and of 100 tokens, in three models."""

    small = llama_config(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        numbers = parameter_report(LlamaForCausalLM(small)).total
    shares = {"twenty_in_7b": percent(trained("Llama 7B", PromptTuning(20)), total("Llama 7B")),
              "hundred_in_7b": percent(trained("Llama 7B", PromptTuning(100)), total("Llama 7B")),
              "hundred_in_smollm2": percent(100 * small.hidden_size, numbers)}
    below = [share < claimed for share in shares.values()]
    return Finding(HOLDS if all(below) else DEPENDS if any(below) else WRONG, **shares)


@finding
def prompt_count(claimed) -> Finding:
    found = trained("Llama 7B", PromptTuning(20))
    return Finding(judge(found == claimed), trained=found)


@finding
def prompt_percent(claimed) -> Finding:
    found = percent(trained("Llama 7B", PromptTuning(20)), total("Llama 7B"))
    return Finding(judge(round(found, 3) == claimed), percent=found)


@finding
def prompt_against_lora(claimed) -> Finding:
    """How many times the numbers of a 20-token prompt LoRA trains; an order of magnitude: 3 to 30 times."""
    prompt = trained("Llama 7B", PromptTuning(20))
    times = {"rank_8_on_q_and_v": trained("Llama 7B", QV) / prompt, "rank_16_on_all": trained("Llama 7B", SEVEN) / prompt}
    return Finding(judge(all(claimed / 10**0.5 <= t <= claimed * 10**0.5 for t in times.values())), **times)


@finding
def prompt_in_70b(claimed) -> Finding:
    """A prompt of 100 tokens, the longest that is called typical, in Llama-3-70B."""
    found = trained("Llama 3 70B", PromptTuning(100))
    return Finding(judge(near(found, claimed, 0.5)), trained=found, percent=percent(found, total("Llama 3 70B")),
                   tokens_for_the_printed_number=round(claimed / config("Llama 3 70B").hidden_size),
                   context=config("Llama 3 70B").max_position_embeddings)


@finding
def prompt_percent_in_print(claimed) -> Finding:
    shares = {"in_7b": percent(trained("Llama 7B", PromptTuning(100)), total("Llama 7B")),
              "in_70b": percent(trained("Llama 3 70B", PromptTuning(100)), total("Llama 3 70B"))}
    return Finding(judge(any(near(s, claimed, 0.5) for s in shares.values())), **shares)


@finding
def prompt_is_the_smallest(claimed) -> Finding:
    """Prompt of 100 tokens against the other methods, in Llama-3-70B."""
    name = "Llama 3 70B"
    counts = {"prompt": trained(name, PromptTuning(100)), "lora": trained(name, QV), "adapters": trained(name, BottleneckAdapter(64)),
              "ia3": trained(name, IA3())}
    return Finding(judge(min(counts, key=counts.get) == "prompt"), **counts)


@finding
def p_tuning_at_the_input(claimed) -> Finding:
    where = places(PTuning(5))
    return Finding(judge(where == ["embedding"]), pieces=len(where), socket=where[0])


@finding
def p_tuning_v2_in_every_layer(claimed) -> Finding:
    where = places(PrefixTuning(5, reparameterize=False))
    layers = tiny().config.num_hidden_layers
    return Finding(judge(where == ["key/value"] * layers), pieces=len(where), layers=layers, socket=where[0])


@finding
def p_tuning_v2_is_a_prefix(claimed) -> Finding:
    """Prefix tuning, its network folded away, and P-tuning v2: the same places and the same numbers."""
    v2, prefix = PrefixTuning(5, reparameterize=False), PrefixTuning(5).folded()
    v1 = places(PTuning(5))
    same = places(v2) == places(prefix) and trained("Llama 7B", v2) == trained("Llama 7B", prefix)
    return Finding(DEPENDS if same and v1 != places(prefix) else judge(not same),
                   v2_trains=trained("Llama 7B", v2), folded_prefix_trains=trained("Llama 7B", prefix))


@finding
def prefix_is_not_in_the_embedding(claimed) -> Finding:
    where = {"prompt": set(places(PromptTuning(5))), "prefix": set(places(PrefixTuning(5)))}
    return Finding(judge(where["prompt"] == where["prefix"] == {"embedding"}),
                   **{name: ", ".join(sorted(found)) for name, found in where.items()})


@finding
def prefix_count(claimed) -> Finding:
    found = trained("BERT-base", PrefixTuning(10, reparameterize=False))
    return Finding(judge(found == claimed), trained=found)


@finding
def prefix_formula(claimed) -> Finding:
    """length × width × 2 × layers, beside what is trained, with and without shared key/value heads."""
    figures, equal = {}, []
    for label, name in (("7b", "Llama 7B"), ("8b", "Llama 3 8B")):
        made = config(name)
        figures[f"formula_{label}"] = 10 * made.hidden_size * 2 * made.num_hidden_layers
        figures[f"trained_{label}"] = trained(name, PrefixTuning(10, reparameterize=False))
        equal.append(figures[f"formula_{label}"] == figures[f"trained_{label}"])
    return Finding(HOLDS if all(equal) else DEPENDS if any(equal) else WRONG, **figures)


@finding
def prefix_percent(claimed) -> Finding:
    found = percent(trained("BERT-base", PrefixTuning(10, reparameterize=False)), total("BERT-base"))
    return Finding(judge(found < claimed), percent=found)


@finding
def prefix_against_prompt(claimed) -> Finding:
    """How many times the numbers of a prompt of the same length; "slightly more" would be less than twice."""
    times = {label: trained(name, PrefixTuning(10, reparameterize=False)) / trained(name, PromptTuning(10))
             for label, name in (("bert_base", "BERT-base"), ("llama_7b", "Llama 7B"), ("llama_3_8b", "Llama 3 8B"))}
    return Finding(judge(max(times.values()) < 2), **times)


@finding
def prompt_changes_a_small_model(claimed) -> Finding:
    """Whether a trained prompt makes a small model (135 million) do what it did not do: copy the name out of a question."""
    rows = measured("02_soft_prompts", "main", "rows")
    before, prompt = row_of(rows, way="frozen"), row_of(rows, way="soft prompt")
    fact = row_of(measured("03_prefixes", "capacity"), kind="prompt")
    return Finding(judge(prompt["name, new"] < before["name, new"] + 0.5), before=before["name, new"], after=prompt["name, new"],
                   numbers=prompt["trained"], facts_kept=fact["facts kept"], asked=fact["of"])


@finding
def facts_at_equal_size(claimed) -> Finding:
    """As many numbers in a prompt, in a prefix and in LoRA, the fewest that LoRA can have there; and with more of them.

    If LoRA led with as few, the number could not be the reason. If it does not, and more numbers keep more, it can.
    """
    rows = measured("03_prefixes", "capacity")
    fewest = min(row["trained"] for row in rows)
    kept = {row["kind"]: row["facts kept"] for row in rows if row["trained"] == fewest}
    if set(kept) != {"prompt", "prefix", "LoRA"}:
        raise NotMeasured("03_prefixes: capacity at one size for all three")
    soft = max(kept["prompt"], kept["prefix"])
    larger = max((row for row in rows if row["kind"] == "prefix"), key=lambda row: row["trained"])
    verdict = WRONG if kept["LoRA"] > soft else HOLDS if larger["facts kept"] > kept["prefix"] else DEPENDS
    return Finding(verdict, numbers=fewest, **{f"{kind.lower()}_keeps": n for kind, n in kept.items()}, asked=rows[0]["of"],
                   more=larger["trained"], prefix_with_more=larger["facts kept"])


@finding
def prompt_against_lora_on_cards(claimed) -> Finding:
    """Names recalled; "far better" is more than twice as many."""
    rows = measured("03_prefixes", "main", "rows")
    prompt, lora = (row_of(rows, model=starts_with(name))["recall"] for name in ("soft prompt", "LoRA"))
    return Finding(judge(lora > 2 * prompt), prompt=prompt, lora=lora)


@finding
def format_on_cards(claimed) -> Finding:
    """The share of answers in the right format; the prompt loses it where LoRA has more than twice as many."""
    rows = measured("03_prefixes", "main", "rows")
    prompt, lora = (row_of(rows, model=starts_with(name))["format"] for name in ("soft prompt", "LoRA"))
    return Finding(HOLDS if lora > 2 * prompt else DEPENDS, prompt=prompt, lora=lora)


@finding
def prefix_between_prompt_and_lora(claimed) -> Finding:
    """The order in the names recalled and, as these are few, in the facts of a card too."""
    rows = {label: row_of(measured("03_prefixes", "main", "rows"), model=starts_with(name))
            for label, name in (("prompt", "soft prompt"), ("prefix", "prefix"), ("lora", "LoRA"))}
    ordered = [rows["prompt"][score] < rows["prefix"][score] < rows["lora"][score] for score in ("recall", "facts")]
    return Finding(HOLDS if all(ordered) else DEPENDS if any(ordered) else WRONG,
                   **{label: row["recall"] for label, row in rows.items()}, **{f"{label}_facts": row["facts"] for label, row in rows.items()},
                   prefix_numbers=rows["prefix"]["trained"], lora_numbers=rows["lora"]["trained"])


@finding
def vectors_are_no_words(claimed) -> Finding:
    """The loss with the trained prompt, and with the word nearest to each of its vectors in its place."""
    found = measured("02_soft_prompts", "checkpoint", "nearest words")
    return Finding(judge(found["nearest words"] > found["as learned"] + 0.5), as_learned=found["as learned"], nearest_words=found["nearest words"])


@finding
def prompt_length(claimed) -> Finding:
    """Time and accuracy from about 32 tokens to the longest prompt measured. claimed: [percent of time, points]."""
    rows = [row for row in measured("02_soft_prompts", "lengths") if row["tokens"]]
    short = min(rows, key=lambda row: abs(row["tokens"] - 32))
    long = rows[-1]
    slower, gained = 100 * (long["ms"] / short["ms"] - 1), 100 * (long["accuracy"] - short["accuracy"])
    return Finding(judge(near(slower, claimed[0], 0.2) and near(gained, claimed[1], 0.5)) if near(slower, claimed[0], 0.2) else DEPENDS,
                   shorter=short["tokens"], longer=long["tokens"], slower=slower, points=gained)


@finding
def prompt_starts(claimed) -> Finding:
    """The range of accuracy over starts and seeds, in points. claimed: [lowest, highest]."""
    by_start = measured("02_soft_prompts", "starts")
    every = [100 * a for values in by_start.values() for a in values]
    gap = max(every) - min(every)
    ends = near(min(every), claimed[0], 0.03) and near(max(every), claimed[1], 0.03)
    return Finding(HOLDS if ends else DEPENDS, lowest=min(every), highest=max(every),
                   gap=gap, runs=len(every), majority=100 * measured("02_soft_prompts", "sentiment", "majority"))


@finding
def prompt_is_fast_to_train(claimed) -> Finding:
    """A training step of a 20-token prompt beside LoRA's, the same rows, both with minipeft."""
    rows = measured("bench", "rows")
    prompt = row_of(rows, what="prompt tuning: a training step")["ours"]
    lora = row_of(rows, what="DoRA: a training step", beside="our LoRA")["theirs"]
    return Finding(judge(prompt < lora), prompt_step=prompt, lora_step=lora, times=prompt / lora)


@finding
def prompt_tuning_needs_the_inside(claimed) -> Finding:
    """What prompt tuning asks of a model: vectors in, a gradient back. Neither is text."""
    with seeded():
        model, adapter = plugged(PromptTuning(5))
        loss = model(input_ids=ids(), labels=ids()).loss
        (gradient,) = torch.autograd.grad(loss, list(adapter.parameters()))
        words = model.get_input_embeddings().weight
        nearest = torch.cdist(next(iter(adapter.parameters())).detach(), words).min().item()
    return Finding(judge(not (gradient.norm() > 0 and nearest > 0)), gradient_needed=gradient.norm().item(), nearest_word_at=nearest)


# ---------------------------------------------------------------------------- adapters


@finding
def adapter_count(claimed) -> Finding:
    """2dm + m + d, and the printed 2dm, which is said to be about it."""
    found = BottleneckAdapter(64).parameter_count(768)
    return Finding(judge(near(found, claimed, 0.01)), exact=found, without_biases=2 * 64 * 768)


@finding
def adapters_in_bert(claimed) -> Finding:
    found = trained("BERT-base", BottleneckAdapter(64))
    return Finding(judge(near(found, claimed, 0.02)), trained=found)


@finding
def adapter_percent(claimed) -> Finding:
    found = percent(trained("BERT-base", BottleneckAdapter(64)), total("BERT-base"))
    return Finding(judge(claimed[0] <= found <= claimed[1]), percent=found, of=total("BERT-base"))


@finding
def adapters_against_lora(claimed) -> Finding:
    """The rank at which LoRA on all linears of BERT-base trains as many numbers as adapters of 64."""
    adapters = trained("BERT-base", BottleneckAdapter(64))
    one = trained("BERT-base", LoRA(rank=1, targets="all-linear"))
    rank = adapters / one
    usual = trained("BERT-base", LoRA(rank=8, targets=("query", "value")))
    return Finding(DEPENDS if 1 < rank < 64 and usual < adapters else judge(rank >= 64), adapters=adapters, lora_rank_8=usual, equal_at_rank=rank)


@finding
def adapter_parts(claimed) -> Finding:
    """h + W_up σ(W_down h + b) + b', written out, against the piece."""
    with seeded():
        _, adapter = plugged(BottleneckAdapter(3))
        piece = next(iter(adapter.pieces().values()))
        named = dict(piece.named_parameters())
        h = torch.randn(4, 16, dtype=torch.float64)
        down, up = (next(t for n, t in named.items() if t.dim() == 2 and t.shape[0] == rows) for rows in (3, 16))
        b_down, b_up = (next(t for n, t in named.items() if t.dim() == 1 and t.shape[0] == rows) for rows in (3, 16))
        by_hand = h + (h @ down.T + b_down).relu() @ up.T + b_up
        off = apart(piece(h, h.clone()).detach(), by_hand.detach())
    return Finding(judge(off < 1e-9), differs_by=off, parameter_tensors=len(named))


@finding
def adapter_places(claimed) -> Finding:
    """How many adapters each placement puts into a block."""
    made = tiny().config
    one = made.num_hidden_layers * BottleneckAdapter(3).parameter_count(made.hidden_size)
    counts = {}
    for placement in PLACEMENTS:
        _, adapter = plugged(BottleneckAdapter(3, placement=placement))
        counts[placement] = sum(p.numel() for p in adapter.parameters()) // one
    return Finding(DEPENDS if len(set(counts.values())) > 1 else HOLDS, **counts)


@finding
def adapters_run_beside(claimed) -> Finding:
    """Whether an adapter can read what its sub-layer reads, so that neither has to wait for the other."""
    with seeded():
        _, after = plugged(BottleneckAdapter(3))
        _, beside = plugged(BottleneckAdapter(3, placement="parallel"))
        x, y, other = (torch.randn(2, 16, dtype=torch.float64) for _ in range(3))

        def waits(adapter) -> bool:              # does its own part change with what the frozen module returns?
            piece = next(iter(adapter.pieces().values()))
            return not torch.allclose(piece(x, y.clone()) - y, piece(x, other.clone()) - other)

        found = {"houlsby": waits(after), "parallel": waits(beside)}
    return Finding(DEPENDS if found["houlsby"] and not found["parallel"] else judge(all(found.values())),
                   **{f"{name}_waits": "yes" if wait else "no" for name, wait in found.items()})


@finding
def adapters_add_products(claimed) -> Finding:
    """Matrix products of a pass: bare, with one and with two adapters a block, and with LoRA merged."""
    with seeded():
        bare_model = tiny()
        none = products(bare_model)
        two, one = (products(plugged(BottleneckAdapter(3, placement=p), tiny())[0]) for p in ("houlsby", "pfeiffer"))
        merged, _ = plugged(LoRA(rank=2), tiny())
        sockets.merge(merged)
        lora = products(merged)
    return Finding(judge(two > one > none == lora), bare=none, one_a_block=one, two_a_block=two, lora_merged=lora)


@finding
def adapters_can_be_off(claimed) -> Finding:
    with seeded():
        model, _ = plugged(BottleneckAdapter(3))
        on = products(model)
        sockets.activate(model, None)
        off, bare_model = products(model), products(tiny())
    return Finding(judge(off > bare_model), products_on=on, products_off=off, products_bare=bare_model)


@finding
def adapters_switch(claimed) -> Finding:
    """Two tasks on one base: each gives its own answers whenever it is chosen, and no frozen byte moves."""
    with seeded():
        model, _ = plugged(BottleneckAdapter(3), name="first")
        before, first = base_state(model), logits(model)
        plugged(BottleneckAdapter(4), model, "second")
        sockets.activate(model, "second")
        second = logits(model)
        sockets.activate(model, "first")
        again = logits(model)
    moved = sum(not torch.equal(a, b) for a, b in zip(before, base_state(model), strict=True))
    return Finding(judge(torch.equal(first, again) and apart(second, first) > 1e-3 and moved == 0),
                   first_differs_from_second_by=apart(second, first), first_again_differs_by=apart(again, first), frozen_tensors_moved=moved)


@finding
def adapter_forgetting(claimed) -> Finding:
    """Points forgotten of the earlier tasks: full fine-tuning, one adapter for all, one adapter a task."""
    found = measured("04_adapters", "forgetting", "forgotten")
    mean = {name: 100 * sum(by.values()) / len(by) for name, by in found.items()}
    full, shared, own = mean["full"], mean["one adapter"], mean["four adapters"]
    less = 100 * (1 - shared / full) if full > 0 else math.nan
    return Finding(DEPENDS if own == 0 and not near(less, claimed, 0.1) else judge(near(less, claimed, 0.1)),
                   full=full, one_adapter_for_all=shared, one_adapter_a_task=own)


@finding
def adapter_seeds(claimed) -> Finding:
    """Over seeds, in points: adapters' standard deviation, prompts' range within one kind of start. claimed: [adapters, prompts]."""
    adapters = 100 * measured("04_adapters", "main", "spread")
    ranges = [100 * (max(values) - min(values)) for values in measured("02_soft_prompts", "starts").values()]
    prompts = sum(ranges) / len(ranges)
    both = near(adapters, claimed[0], 0.5) and near(prompts, claimed[1], 0.5)
    return Finding(HOLDS if both else DEPENDS, adapters=adapters, prompts=prompts)


@finding
def adapter_latency(claimed) -> Finding:
    """Percent that a pass takes longer with two adapters a block, at each batch size measured."""
    rows = [row for row in measured("10_merge_and_serve", "latency") if row["model"] == "adapters, two a block"]
    more = {f"percent_with_{row['batch']}": 100 * (row["forward / base"] - 1) for row in rows}
    inside = [claimed[0] <= value <= claimed[1] for value in more.values()]
    return Finding(HOLDS if inside and all(inside) else DEPENDS, least=min(more.values()), most=max(more.values()))


@finding
def ia3_pieces(claimed) -> Finding:
    """Which modules (IA)³ rescales in each block."""
    with seeded():
        _, adapter = plugged(IA3())
    modules = sorted({path.rsplit(".", 1)[1] for path in adapter.pieces()})
    vectors = all(p.dim() == 1 for p in adapter.parameters())
    return Finding(judge(modules == ["down_proj", "k_proj", "v_proj"] and vectors), modules=", ".join(modules))


@finding
def ia3_percent(claimed) -> Finding:
    shares = {label: percent(trained(name, IA3()), total(name)) for label, name in (("in_7b", "Llama 7B"), ("in_8b", "Llama 3 8B"))}
    return Finding(judge(all(near(s, claimed, 0.5) for s in shares.values())), **shares)


@finding
def ia3_against_prompt(claimed) -> Finding:
    """(IA)³ beside the 20-token prompt of the same article, in a 7B Llama."""
    ia3, prompt = trained("Llama 7B", IA3()), trained("Llama 7B", PromptTuning(20))
    return Finding(judge(ia3 < prompt), ia3=ia3, prompt=prompt, equal_at_tokens=ia3 / config("Llama 7B").hidden_size)


@finding
def ia3_is_the_smallest(claimed) -> Finding:
    counts = {"ia3": trained("Llama 7B", IA3()), "prompt_of_20": trained("Llama 7B", PromptTuning(20)),
              "lora_rank_1": trained("Llama 7B", LoRA(rank=1))}
    return Finding(judge(min(counts, key=counts.get) == "ia3"), **counts)


@finding
def ia3_adds_numbers(claimed) -> Finding:
    found = trained("Llama 7B", IA3())
    return Finding(judge(found == 0), trained=found)


@finding
def ia3_merges(claimed) -> Finding:
    with seeded():
        model, _ = plugged(IA3())
        beside, before = logits(model), products(tiny())
        sockets.merge(model)
        off, after = apart(logits(model), beside), products(model)
    return Finding(judge(off < 1e-9 and after == before), logits_differ_by=off, products_more=after - before)


@finding
def ia3_against_lora(claimed) -> Finding:
    """Points of accuracy on film reviews, (IA)³ over LoRA."""
    films = measured("06_dora_and_ia3", "films")
    gap = 100 * (films["(IA)³"]["accuracy"] - films["LoRA"]["accuracy"])
    return Finding(HOLDS if near(gap, claimed, 0.1) else DEPENDS, points=gap)


# ---------------------------------------------------------------------------- LoRA


@finding
def lora_places(claimed) -> Finding:
    default = ", ".join(LoRA().targets)
    with seeded():
        everywhere = {path.rsplit(".", 1)[1] for path in plugged(LoRA(rank=2, targets="all-linear"))[1].pieces()}
    return Finding(DEPENDS if default == "q_proj, v_proj" and len(everywhere) > 2 else WRONG, default=default, all_linear=len(everywhere))


@finding
def lora_product(claimed) -> Finding:
    """A (r, d) and B (d, r): the shape of A B, and of B A."""
    A, B = torch.empty(8, 4096, device="meta"), torch.empty(4096, 8, device="meta")
    AB, BA = tuple((A @ B).shape), tuple((B @ A).shape)
    return Finding(judge(AB == (4096, 4096)), AB=f"{AB[0]:,} × {AB[1]:,}", BA=f"{BA[0]:,} × {BA[1]:,}")


@finding
def lora_scale(claimed) -> Finding:
    """Wx + BAx without α/r, against the piece with α = 2r."""
    with seeded():
        model, adapter = plugged(LoRA(rank=2, alpha=4))
        path, piece = next(iter(adapter.pieces().items()))
        W, x = model.get_submodule(path).weight, torch.randn(3, 16, dtype=torch.float64)
        A, B = piece.factors()
        y = x @ W.T
        right = piece(x, y.clone()).detach()     # a piece may work in place
        off = apart((y + x @ A.T @ B.T).detach(), right)
        scaled = apart((y + 2 * x @ A.T @ B.T).detach(), right)
    return Finding(judge(off < 1e-9), printed_is_off_by=off, with_the_scale_off_by=scaled)


@finding
def lora_trains_a_and_b(claimed) -> Finding:
    with seeded():
        model, adapter = plugged(LoRA(rank=2))
    names = sorted({name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad})
    start = sockets.attach(tiny(), LoRA(rank=2))
    zero = all((p == 0).all() for n, p in start.named_parameters() if n.endswith(".B"))
    return Finding(judge(names == ["A", "B"] and zero and not any(p.requires_grad for p in base_of(model))),
                   trained=" and ".join(names), B_at_the_start="zero" if zero else "not zero")


@finding
def lora_8b(claimed) -> Finding:
    found = trained("Llama 3 8B", SEVEN)
    return Finding(judge(found == claimed), trained=found, rank_of_the_printed_number=claimed / trained("Llama 3 8B", LoRA(rank=1, targets="all-linear")))


@finding
def lora_8b_all(claimed) -> Finding:
    base = total("Llama 3 8B")
    rank_32 = base + trained("Llama 3 8B", LoRA(rank=32, targets="all-linear"))
    return Finding(judge(claimed in (rank_32, base + trained("Llama 3 8B", SEVEN))), base=base,
                   with_rank_16=base + trained("Llama 3 8B", SEVEN), with_rank_32=rank_32, printed_is_over_by=claimed - rank_32)


@finding
def lora_8b_percent(claimed) -> Finding:
    part = trained("Llama 3 8B", SEVEN)
    found = percent(part, total("Llama 3 8B") + part)
    return Finding(judge(near(found, claimed, 0.02)), percent=found)


@finding
def lora_7b(claimed) -> Finding:
    """The fewest numbers of LoRA within the article's own ranks, 8 to 64: on one projection, and on two."""
    one, two = trained("Llama 7B", LoRA(rank=8, targets=("q_proj",))), trained("Llama 7B", QV)
    return Finding(judge(claimed >= one), one_projection=one, two_projections=two, all_seven=trained("Llama 7B", LoRA(rank=8, targets="all-linear")))


@finding
def reduction(claimed) -> Finding:
    """claimed: [trained, of, percent fewer]."""
    found = 100 * (1 - claimed[0] / claimed[1])
    return Finding(judge(abs(found - claimed[2]) < 0.005), percent_fewer=found)


@finding
def fewer_numbers(claimed) -> Finding:
    """Percent fewer trained numbers: six methods in a 7B Llama, adapters in BERT-base. claimed: [low, high]."""
    cases = [("Llama 7B", method) for method in (PromptTuning(20), PrefixTuning(20, reparameterize=False), PrefixTuning(20), IA3(), QV, SEVEN)]
    fewer = [100 - percent(trained(name, method), total(name)) for name, method in [*cases, ("BERT-base", BottleneckAdapter(64))]]
    inside = [claimed[0] <= f <= claimed[1] for f in fewer]
    return Finding(HOLDS if all(inside) else DEPENDS if any(inside) else WRONG, fewest=min(fewer), most=max(fewer), inside=sum(inside), of=len(inside))


@finding
def a_few_million(claimed) -> Finding:
    """Numbers that LoRA trains, from the smallest usual setting on 7B to the largest here. claimed: [low, high]."""
    counts = {"rank_8_in_7b": trained("Llama 7B", QV), "rank_16_in_8b": trained("Llama 3 8B", SEVEN), "rank_16_in_65b": trained("Llama 65B", SEVEN)}
    inside = [claimed[0] <= n <= claimed[1] for n in counts.values()]
    return Finding(HOLDS if all(inside) else DEPENDS if any(inside) else WRONG, **counts)


@finding
def lora_file(claimed) -> Finding:
    """Bytes of a checkpoint in 16 bits. claimed: [low, high] in MB."""
    sizes = {label: 2 * trained(name, method) / 1e6 for label, name, method in (
        ("rank_8_on_7b", "Llama 7B", QV), ("rank_16_on_8b", "Llama 3 8B", SEVEN), ("rank_16_on_65b", "Llama 65B", SEVEN))}
    inside = [claimed[0] <= size <= claimed[1] for size in sizes.values()]
    return Finding(HOLDS if all(inside) else DEPENDS if any(inside) else WRONG, **sizes)


@finding
def rank_and_memory(claimed) -> Finding:
    """What rank 128 adds to rank 64 on a 7B, in percent of the whole: weight, gradient and two states a number."""
    standing = 2 * total("Llama 7B")             # the 16-bit base alone; activations would make the share smaller
    grows = {}
    for label, targets in (("on_q_and_v", ("q_proj", "v_proj")), ("on_all", "all-linear")):
        low, high = (standing + 16 * trained("Llama 7B", LoRA(rank=r, targets=targets)) for r in (64, 128))
        grows[label] = 100 * (high / low - 1)
    return Finding(judge(max(grows.values()) >= 100), **grows)


@finding
def large_alpha(claimed) -> Finding:
    """The loss with a far larger α, beside the untrained model's."""
    losses = {float(alpha): loss for alpha, loss in measured("05_lora", "alphas").items()}
    untrained = measured("05_lora", "rates", "not trained")
    largest = max(losses)
    return Finding(judge(losses[largest] > untrained), alpha=f"{largest:g}", loss=losses[largest], untrained=untrained)


@finding
def where_lora_pays(claimed) -> Finding:
    """The loss with as many trained numbers on query and value, and on the feed-forward."""
    found = measured("05_lora", "places")
    qv, ff = found["q, v, as many numbers as the reference"], found["feed-forward, as many numbers"]
    return Finding(judge(qv < ff), on_q_and_v=qv, on_the_feed_forward=ff)


@finding
def facts_are_learnt(claimed) -> Finding:
    """Facts the frozen model does not give, and LoRA does: exact match, in percent."""
    before, after = 100 * measured("05_lora", "frozen", "bare", "all_facts"), 100 * measured("05_lora", "main", "all_facts")
    return Finding(judge(after - before < 10), frozen=before, with_lora=after)


@finding
def learning_rate(claimed) -> Finding:
    """LoRA's best rate over full fine-tuning's. claimed: [low, high], how many times lower.

    A best rate at the end of its sweep decides nothing: `NotMeasured`.
    """
    best, sweeps = measured("05_lora", "rates", "best"), measured("05_lora", "rates")
    lora, full = best["LoRA"]["rate"], best["full fine-tuning"]["rate"]
    for way, rate in (("LoRA", lora), ("full fine-tuning", full)):
        tried = [float(r) for r in sweeps.get(way, ())]
        if tried and rate in (min(tried), max(tried)):
            raise NotMeasured(f"05_lora: rates beyond {rate:g}, the best and last that was tried with {way}")
    return Finding(judge(1 / claimed[1] <= lora / full <= 1 / claimed[0]), lora=lora, full=full, times=lora / full)


@finding
def lora_at_the_full_rate(claimed) -> Finding:
    """LoRA's loss at full fine-tuning's best rate, at a quarter of it, and at its own best."""
    rates = measured("05_lora", "rates")
    full, losses = rates["best"]["full fine-tuning"]["rate"], {float(r): loss for r, loss in rates["LoRA"].items()}
    same, lower = losses[full], rates["quarter"]
    return Finding(judge(lower < same), at_the_same_rate=same, at_a_quarter=lower, at_its_best=rates["best"]["LoRA"]["loss"])


@finding
def merged_is_free(claimed) -> Finding:
    """A merged LoRA: the shapes of the weights, the products of a pass, and what the logits do."""
    with seeded():
        model, _ = plugged(LoRA(rank=2, targets="all-linear"))
        beside, shapes = logits(model), [p.shape for p in base_of(tiny())]
        sockets.merge(model)
        same = [p.shape for p in base_of(model)] == shapes
        off, more = apart(logits(model), beside), products(model) - products(tiny())
    return Finding(judge(same and more == 0 and off < 1e-9), products_more=more, logits_differ_by=off)


@finding
def merging_takes(claimed) -> Finding:
    """Merging rank 16 into Llama-3-70B: multiplications and additions, and bytes read and written.

    claimed: [low, high] in minutes. It depends where the times found reach into or across that range.
    """
    operations = 2 * 16 * total("Llama 3 70B")
    seconds = operations / 1e11                  # a laptop's processor: 100 billion operations a second
    files = 2 * 2 * total("Llama 3 70B")         # 16 bits, read once and written once
    minutes = {"computing": seconds / 60, "disk_of_3_gb_a_second": files / 3e9 / 60, "disk_of_150_mb_a_second": files / 1.5e8 / 60}
    within = all(claimed[0] <= m <= claimed[1] for m in minutes.values())
    apart_from_it = max(minutes.values()) < claimed[0] or min(minutes.values()) > claimed[1]
    return Finding(HOLDS if within else WRONG if apart_from_it else DEPENDS, **minutes)


@finding
def serving_mixed(claimed) -> Finding:
    """32 rows with 32 adapters, and 32 rows with one, unmerged, a decoding step on one base."""
    row = row_of(measured("bench", "rows"), what="32 rows, 32 adapters: a decoding step", beside="one shared")
    return Finding(judge(row["ratio"] < 1.25), mixed_over_shared=row["ratio"])


# ---------------------------------------------------------------------------- DoRA, LoftQ


@finding
def dora_parts(claimed) -> Finding:
    with seeded():
        model, adapter = plugged(DoRA(rank=2, targets=("k_proj",)))
    path, piece = next(iter(adapter.pieces().items()))
    names = sorted(dict(piece.named_parameters()))
    out = anatomy.linear_shape(model.get_submodule(path))[0]
    return Finding(judge(names == ["A", "B", "m"] and tuple(piece.m.shape) == (out,)), trained=", ".join(names), magnitudes=len(piece.m), outputs=out)


@finding
def dora_count(claimed) -> Finding:
    lora, dora = trained("Llama 7B", QV), trained("Llama 7B", DoRA(rank=8))
    return Finding(judge(lora == dora), lora=lora, dora=dora, more=percent(dora - lora, lora))


@finding
def dora_against_lora(claimed) -> Finding:
    """Accuracy on film reviews, at equal rank."""
    films = measured("06_dora_and_ia3", "films")
    lora, dora = 100 * films["LoRA"]["accuracy"], 100 * films["DoRA"]["accuracy"]
    chance = 100 * math.sqrt(2 * 0.25 / films["tested"])     # one standard error of a difference of two shares
    return Finding(HOLDS if dora - lora > 2 * chance else WRONG if lora - dora > 2 * chance else DEPENDS, lora=lora, dora=dora, chance=chance)


@finding
def loftq_residual(claimed) -> Finding:
    """What is left of a weight after NF4, and after LoftQ gave a part of it to LoRA."""
    with seeded():
        model = tiny().float()
        left = quantize_loftq(model, LoRA(rank=4), iterations=3)
    first = next(iter(left.values()))
    return Finding(judge(all(errors[-1] < errors[0] for errors in left.values())), without=100 * first[0], with_loftq=100 * first[-1])


@finding
def loftq_quality(claimed) -> Finding:
    """Held-out loss after training, from LoftQ's start and from the plain one, the mean over seeds."""
    plain, loftq = ([seed["after"] for seed in measured("09_qlora", "loftq", f"QLoRA, {start}")] for start in ("plain", "LoftQ"))
    means = [sum(losses) / len(losses) for losses in (plain, loftq)]
    spread = max(plain) - min(plain)
    gain = means[0] - means[1]
    return Finding(HOLDS if gain > 2 * spread else WRONG if gain < -2 * spread else DEPENDS, plain=means[0], loftq=means[1], spread=spread)


# ---------------------------------------------------------------------------- memory and 4 bits


@finding
def weights_70b(claimed) -> Finding:
    found = 2 * total("Llama 3 70B") / GB
    return Finding(judge(near(found, claimed, 0.03)), gb=found)


@finding
def full_65b(claimed) -> Finding:
    """12 bytes a number: a 16-bit weight, a 16-bit gradient, two float32 states."""
    found = 12 * total("Llama 65B") / GB
    return Finding(judge(near(found, claimed, 0.03)), gb=found)


@finding
def lora_65b(claimed) -> Finding:
    bills = {way: bill("Llama 65B", way).total / GB for way in ("LoRA", "QLoRA")}
    return Finding(judge(bills["LoRA"] <= claimed), lora=bills["LoRA"], qlora=bills["QLoRA"])


@finding
def qlora_65b(claimed) -> Finding:
    """Whether QLoRA on 65B fits a card of so many GB."""
    found = bill("Llama 65B", "QLoRA")
    return Finding(judge(found.fits(claimed * GB)), weights=found.weights / GB, in_all=found.total / GB)


@finding
def qlora_70b(claimed) -> Finding:
    """Whether QLoRA on Llama-3-70B fits one consumer card, of 24 or of 32 GB. claimed: the larger."""
    found = bill("Llama 3 70B", "QLoRA")
    return Finding(judge(found.fits(claimed * GB)), weights=found.weights / GB, in_all=found.total / GB)


@finding
def qlora_on_consumer_cards(claimed) -> Finding:
    """33B, 65B and 70B with QLoRA, on one card of so many GB."""
    bills = {label: bill(name, "QLoRA") for label, name in (("b33", "Llama 33B"), ("b65", "Llama 65B"), ("b70", "Llama 3 70B"))}
    fits = [b.fits(claimed * GB) for b in bills.values()]
    return Finding(HOLDS if all(fits) else DEPENDS if any(fits) else WRONG, **{label: b.total / GB for label, b in bills.items()})


@finding
def times_less_memory(claimed) -> Finding:
    """How many times less than full fine-tuning of 65B (at 12 bytes a number). claimed: [low, high]."""
    full = 12 * total("Llama 65B")
    times = {way.lower(): full / bill("Llama 65B", way).total for way in ("LoRA", "QLoRA")}
    inside = [claimed[0] <= t <= claimed[1] for t in times.values()]
    return Finding(HOLDS if all(inside) else DEPENDS if any(inside) else WRONG, **times)


@finding
def qlora_against_lora(claimed) -> Finding:
    """16-bit LoRA over QLoRA on 65B, at this length; and the bytes for both that would make it the printed number."""
    lora, qlora = (bill("Llama 65B", way).total for way in ("LoRA", "QLoRA"))
    more = (lora - claimed * qlora) / (claimed - 1) / GB
    return Finding(HOLDS if near(lora / qlora, claimed, 0.05) else DEPENDS, times=lora / qlora, activations_more=more)


@finding
def gradient_through_4_bits(claimed) -> Finding:
    """The gradient of what goes into a frozen 4-bit layer that has no A and B: without it, nothing below would train."""
    with seeded():
        model = quantize(tiny().float())
        layer = next(m for m in model.modules() if isinstance(m, Linear4bit))
        x = torch.randn(2, layer.in_features, requires_grad=True)
        layer(x).square().sum().backward()
        own = sum(p.requires_grad for p in layer.parameters())
    return Finding(judge(x.grad.norm().item() == 0), gradient=x.grad.norm().item(), trained_in_the_layer=own)


@finding
def qlora_parts(claimed) -> Finding:
    with seeded():
        model = quantize(tiny().float())
        sockets.attach(model, LoRA(rank=2, targets="all-linear"))
    names = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    layers = sum(isinstance(m, Linear4bit) for m in model.modules())
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    return Finding(judge(names == {"A", "B"} and layers > 0 and kinds == {"float32"}), four_bit_layers=layers, trained=" and ".join(sorted(names)),
                   dtype=", ".join(kinds))


@finding
def qlora_time(claimed) -> Finding:
    """A training step of QLoRA over one of LoRA, in percent more."""
    more = 100 * (measured("09_qlora", "predictions", "QLoRA's step / LoRA's step") - 1)
    return Finding(HOLDS if abs(more - claimed) <= 5 else DEPENDS, more=more)


@finding
def pretraining_hours(claimed) -> Finding:
    """Dollars of GPU time for Llama 2 70B at one dollar an hour. claimed: [largest price, hours in the paper]."""
    dollars = claimed[1] * 1.0
    return Finding(judge(dollars <= claimed[0]), hours=claimed[1], dollars=dollars)


# ---------------------------------------------------------------------------- hybrids, and Hugging Face PEFT


@finding
def hybrids_combine(claimed) -> Finding:
    """The three pairs in print, on one tiny model each: both parts train, and act."""
    pairs = {"prompt_and_lora": (PromptTuning(3), False), "adapter_and_lora": (BottleneckAdapter(3), False),
             "qlora_and_adapter": (BottleneckAdapter(3), True)}
    works = {}
    with seeded():
        for pair, (second, four_bits) in pairs.items():
            model = tiny().float()
            if four_bits:
                quantize(model)
            _, first = plugged(LoRA(rank=2), model, "lora")
            _, other = plugged(second, model, "other")
            loss = model(input_ids=ids(), labels=ids()).loss
            gradients = torch.autograd.grad(loss, [*first.parameters(), *other.parameters()], allow_unused=True)
            works[pair] = sum(g is not None and bool(g.norm() > 0) for g in gradients) == len(gradients)
    return Finding(judge(all(works.values())), **{pair: "trains" if ok else "does not" for pair, ok in works.items()})


@finding
def hybrids_win(claimed) -> Finding:
    """At equal size, the best hybrid over the best single part, in points, beside the error of such a difference."""
    gap, spread, error = (100 * measured("11_hybrids", "sentiment", key) for key in ("gap", "spread", "error"))
    return Finding(HOLDS if gap > max(spread, error) else DEPENDS, gap=gap, error=error)     # as the chapter judges it


def _peft(part: str = ""):
    """Hugging Face PEFT, which the package does without."""
    try:
        return import_module(f"peft{part}")
    except ImportError:
        raise NotMeasured("Hugging Face PEFT is not installed here (pip install peft)") from None


@finding
def peft_sets_no_rate(claimed) -> Finding:
    from dataclasses import fields

    names = [field.name for field in fields(_peft().LoraConfig)]
    rates = [name for name in names if "rate" in name or name == "lr"]
    return Finding(judge(bool(rates)), settings=len(names), about_the_rate=len(rates))


@finding
def peft_has_all(claimed) -> Finding:
    kinds = sorted(kind.value for kind in _peft().PeftType)
    bottleneck = [kind for kind in kinds if kind in ("ADAPTER", "ADAPTERS", "BOTTLENECK", "HOULSBY", "PFEIFFER")]
    return Finding(judge(bool(bottleneck)), methods=len(kinds), bottleneck_adapters=len(bottleneck))


@finding
def peft_class_only(claimed) -> Finding:
    peft = _peft()
    own = {name: hasattr(peft, name) for name in ("IA3Config", "PrefixTuningConfig", "DoraConfig")}
    return Finding(HOLDS if all(own.values()) else DEPENDS if any(own.values()) else WRONG,
                   **{name: "there" if there else "not there" for name, there in own.items()})


@finding
def peft_has_dora(claimed) -> Finding:
    from dataclasses import fields

    found = "use_dora" in [field.name for field in fields(_peft().LoraConfig)]
    return Finding(judge(found), use_dora="a setting of LoraConfig" if found else "not found")


@finding
def peft_knows_targets(claimed) -> Finding:
    known = _peft(".utils.constants").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return Finding(judge("llama" in known and len(known) > 10), architectures=len(known), llama=", ".join(known["llama"]))


@finding
def scenarios_in_the_table(claimed) -> Finding:
    from .examination import scenarios           # the rows of that table, one question each

    return Finding(judge(len(scenarios()) == claimed), rows=len(scenarios()))
