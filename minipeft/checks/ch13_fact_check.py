"""The checks of chapter 13: five claims, each turned into arithmetic, and a count that goes wrong in four bits.

The oracle of the counts is the model itself, built on the meta device and added up tensor by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import nn

from minipeft.checks.frame import Case, Draw, exercise

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")


# ---------------------------------------------------------------------------- the share of LoRA


def _llama(config: dict) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config))


def _counts(config: dict) -> tuple[int, int, int]:
    """(rows and columns of the projections added up, all numbers, rows and columns of the head)."""
    model = _llama(config)
    linears = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = sum(linears.pop("lm_head"))
    return sum(sum(shape) for shape in linears.values()), sum(p.numel() for p in model.parameters()), head


@exercise("lora-percent", points=2)
def lora_percent(draw: Draw) -> Iterator[Case]:
    """`fn(config, rank) -> float`: percent of all numbers that LoRA trains on the seven projections of a Llama.

    config: a dict with hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
    vocab_size and tie_word_embeddings. All numbers are the base's and LoRA's.
    """
    for kv, tied, layers in ((1, False, 1), (2, True, 3), (4, False, draw.integer(2, 5)), (2, False, 2)):
        head_dim, heads = 2 * draw.integer(4, 9), 4
        config = dict(zip(KEYS, (heads * head_dim, draw.integer(90, 300), layers, heads, kv, draw.integer(40, 900), tied), strict=True))
        r = draw.integer(2, 9)
        sides, base, head = _counts(config)
        wide, wide_base, _ = _counts(config | {"num_key_value_heads": heads})
        d, norms = config["hidden_size"], (2 * layers + 1) * heads * head_dim
        table = config["vocab_size"] * d

        def share(part, of):
            return 100 * part / (of + part)

        yield Case(
            given={"config": config, "rank": r},
            want=share(r * sides, base),
            vacuous={"a hundred": 100.0},
            mistakes={
                "keys and values are taken as wide as queries": share(r * wide, wide_base),
                "LoRA's own numbers are missing below the line": 100 * r * sides / base,
                "that is a share of one, not percent": share(r * sides, base) / 100,
                "the rank is missing": share(sides, base),
                "the head is adapted too: it is not among the seven": share(r * (sides + head), base),
                "a tied table counts once: the head is the embedding": share(r * sides, base + table * tied),
                "the head has numbers of its own here": share(r * sides, base - table * (not tied)),
                "the norms are missing": share(r * sides, base - norms),
                "one layer only": share(r * sides / layers, base),
            },
        )


# ---------------------------------------------------------------------------- what fits


@exercise("largest-model")
def largest_model(draw: Draw) -> Iterator[Case]:
    """`fn(card, bits, share) -> float`: billions of weights of the largest model whose training fits a card of `card` GB.

    A frozen weight takes `bits` bits. A `share` of their number is trained beside them: float32 weights, with a
    gradient and two states each, also float32. Activations are left out. A GB is 10⁹ bytes.
    """
    for card, bits in ((24.0, 4.127), (80.0, 16.0), (draw.uniform(8, 60), draw.uniform(3, 9)), (48.0, 4.127)):
        share = draw.uniform(0.002, 0.02)
        each = Fraction(bits) / 8 + 16 * Fraction(share)

        def fits(bytes_each):
            return float(Fraction(card) / bytes_each)

        yield Case(
            given={"card": card, "bits": bits, "share": share},
            want=fits(each),
            mistakes={
                "bits are taken for bytes": fits(Fraction(bits) + 16 * Fraction(share)),
                "nothing but the frozen weights": fits(Fraction(bits) / 8),
                "the gradient and the states are missing": fits(Fraction(bits) / 8 + 4 * Fraction(share)),
                "the two states are missing": fits(Fraction(bits) / 8 + 8 * Fraction(share)),
                "one state only": fits(Fraction(bits) / 8 + 12 * Fraction(share)),
                "what is trained is kept in the base's bits": fits(Fraction(bits) / 8 * (1 + 4 * Fraction(share))),
                "the share is taken as percent": fits(Fraction(bits) / 8 + Fraction(share) * 4 / 25),
                "a GB is 10⁹ bytes here, not 2³⁰": fits(each) * 1.024**3,
                "that is a number of weights, not of billions": fits(each) * 1e9,
                "the trained numbers' bytes are taken off the card as if the share were of the card": fits(Fraction(bits) / 8) * (1 - 16 * share),
            },
        )


# ---------------------------------------------------------------------------- (IA)³ against a prompt


@exercise("tokens-above-ia3")
def tokens_above_ia3(draw: Draw) -> Iterator[Case]:
    """`fn(hidden, heads, kv_heads, inner, layers) -> int`: the shortest prompt that trains more numbers than (IA)³."""
    for hidden, heads, kv, inner, layers in ((4096, 32, 32, 11008, 32), (4096, 32, 8, 14336, 32),
                                             (draw.integer(5, 9) * 24, 6, 2, draw.integer(100, 900), draw.integer(3, 9)), (768, 12, 12, 3072, 12)):
        block = _llama(dict(zip(KEYS, (hidden, inner, 1, heads, kv, 8, False), strict=True))).model.layers[0]
        rescaled = (block.self_attn.k_proj.out_features, block.self_attn.v_proj.out_features, block.mlp.down_proj.in_features)
        ia3 = sum(torch.empty(n, device="meta").numel() for n in rescaled) * layers
        length = next(n for n in range(1, ia3 + 2) if n * hidden > ia3)

        def shortest(numbers):
            return numbers // hidden + 1

        yield Case(
            given={"hidden": hidden, "heads": heads, "kv_heads": kv, "inner": inner, "layers": layers},
            want=length,
            mistakes={
                "so many tokens train as many or fewer, not more": ia3 // hidden,
                "so many tokens may train just as many: that is not more": -(-ia3 // hidden),
                "keys and values are taken as wide as the model": shortest(layers * (2 * hidden + inner)),
                "the values are missing": shortest(layers * (hidden * kv // heads + inner)),
                "the feed-forward is missing": shortest(layers * 2 * hidden * kv // heads),
                "keys and values are missing": shortest(layers * inner),
                "one layer only": shortest(ia3 // layers),
                "those are (IA)³'s numbers, not tokens": ia3,
                "the prompt is put into every layer": ia3 // (hidden * layers) + 1,
            },
        )


# ---------------------------------------------------------------------------- what would make the claim true


@exercise("bottleneck-for")
def bottleneck_for(draw: Draw) -> Iterator[Case]:
    """`fn(percent, total, width, layers) -> int`: the smallest bottleneck with which adapters, two a layer, biases
    included, are at least `percent` percent of the base's `total` numbers."""
    drawn = []
    for percent in (1.0, draw.uniform(0.5, 4)):                  # a total for which a drawn bottleneck is just enough
        m, width, layers = draw.integer(25, 120), draw.integer(150, 900), draw.integer(3, 20)
        drawn.append((percent, int(100 * 2 * layers * (2 * m * width + m + width) / percent) - draw.integer(2, 999), width, layers))
    for percent, total, width, layers in ((3.0, 109_482_240, 768, 12), *drawn, (4.0, 109_482_240, 768, 12)):
        enough = Fraction(percent) * total / 100
        low, high = 1, total
        while low < high:                                        # of what is enough, the smallest
            middle = (low + high) // 2
            many = 2 * layers * (2 * middle * width + middle + width) >= enough
            low, high = (low, middle) if many else (middle + 1, high)
        exact = (enough / (2 * layers) - width) / (2 * width + 1)

        def least(per_layer=2, biases=True, share=enough):
            return math.ceil((share / (per_layer * layers) - width * biases) / (2 * width + biases))

        yield Case(
            given={"percent": percent, "total": total, "width": width, "layers": layers},
            want=low,
            mistakes={
                "so narrow, it is just below": math.floor(exact),
                "one more than is needed": low + 1,
                "one adapter a layer": least(per_layer=1),
                "percent is taken for a share of one": least(share=100 * enough),
                "the biases are missing": least(biases=False),
                "one adapter in all": math.ceil((enough - width) / (2 * width + 1)),
                "one matrix, not two": math.ceil((enough / (2 * layers) - width) / (width + 1)),
            },
        )


# ---------------------------------------------------------------------------- a claim about rates, put to the test


def _best(sweep: dict) -> float:
    return min((rate for rate in sweep if sweep[rate] is not None), key=lambda rate: sweep[rate])


def _judged(full: dict, lora: dict, low: float, high: float, *, ends: bool = True, flip: bool = False, highest: bool = False) -> str:
    best = [max((r for r in s if s[r] is not None), key=lambda r, s=s: s[r]) if highest else _best(s) for s in (full, lora)]
    if ends and any(b in (min(s), max(s)) for b, s in zip(best, (full, lora), strict=True)):
        return "open"
    lower = best[1] / best[0] if flip else best[0] / best[1]
    return "holds" if low <= lower <= high else "wrong"


@exercise("verdict-on-rate", points=2)
def verdict_on_rate(draw: Draw) -> Iterator[Case]:
    """`fn(full, lora, low, high) -> str`: is LoRA's best rate `low` to `high` times LOWER than full fine-tuning's?

    full, lora: {rate: loss}, None where training diverged; the lowest loss is best. "holds", "wrong", or "open" where
    a best rate is the smallest or the largest that was tried: then it may lie further out.
    """
    def sweep(best: int, rates: list[float], diverged: int = 0) -> dict:
        losses = {rate: 0.5 + 0.3 * abs(i - best) + 0.1 * draw.uniform(0, 1) for i, rate in enumerate(rates)}
        for rate in rates[len(rates) - diverged:]:
            losses[rate] = None
        return dict(sorted(losses.items(), key=lambda item: draw.uniform(0, 1)))

    grid = [draw.uniform(0.9, 1.1) * 1e-5 * 4**i for i in range(6)]
    for f, l, low, high, diverged in ((2, 4, 3.0, 5.0, 0), (3, 2, 3.0, 5.0, 1), (2, 1, 3.0, 5.0, 0), (1, 3, 3.0, 5.0, 2),
                                      (3, 0, 3.0, 100.0, 0), (5, 3, 3.0, 100.0, 0), (2, 2, 0.9, 1.1, 1), (3, 1, 3.0, 5.0, 1)):
        full, lora = sweep(f, grid, diverged if f < 4 else 0), sweep(l, grid, diverged)
        want = _judged(full, lora, low, high)
        yield Case(
            given={"full": full, "lora": lora, "low": low, "high": high},
            want=want,
            told=f"best of full fine-tuning at rate {f + 1} of 6, LoRA's at {l + 1} of 6, each 4 times the one before; claimed {low:g} to {high:g}",
            mistakes={
                "a best rate at the end of its sweep decides nothing: \"open\"": _judged(full, lora, low, high, ends=False),
                "the ratio is upside down: LOWER means full / LoRA": _judged(full, lora, low, high, flip=True),
                "the highest loss was taken for the best": _judged(full, lora, low, high, highest=True),
                "always \"wrong\"": "wrong",
                "always \"holds\"": "holds",
                "always \"open\"": "open",
            },
        )


# ---------------------------------------------------------------------------- find the bug


@exercise("percent-trained")
def percent_trained(draw: Draw) -> Iterator[Case]:
    """`fn(tensors) -> float`: percent of the numbers that train, where some tensors are packed.

    tensors: a list of (elements, bits of an element, bits of a number, whether it trains). A packed tensor holds
    several numbers in an element.
    """
    for count, eight in ((2, 8), (3, 8), (draw.integer(3, 6), 32)):
        packed = [(2 * draw.integer(500, 4000), eight, 4, False) for _ in range(count)]
        plain = [(draw.integer(50, 400), 16, 16, False) for _ in range(2)]
        tensors = packed + plain + [(draw.integer(20, 90), 32, 32, True) for _ in range(count)]
        numbers = [elements * stored // bits for elements, stored, bits, _ in tensors]
        trained = sum(n for n, (*_, trains) in zip(numbers, tensors, strict=True) if trains)
        elements = sum(e for e, *_ in tensors)
        size = sum(e * stored for e, stored, *_ in tensors)
        trained_size = sum(e * stored for e, stored, _, trains in tensors if trains)
        yield Case(
            given={"tensors": tensors},
            want=100 * trained / sum(numbers),
            vacuous={"a hundred": 100.0},
            mistakes={
                "elements are counted, not the numbers in them": 100 * trained / elements,
                "that is a share of the bytes": 100 * trained_size / size,
                "that is of the frozen numbers, not of all": 100 * trained / (sum(numbers) - trained),
                "that is a share of one, not percent": trained / sum(numbers),
                "all elements are taken to hold two numbers": 100 * 2 * trained / (2 * elements),
                "the numbers are divided where they should be multiplied": 100 * trained / sum(e * bits / stored for e, stored, bits, _ in tensors),
                "the packed tensors are left out": 100 * trained / sum(n for n, (_, stored, bits, _) in zip(numbers, tensors, strict=True) if stored == bits),
            },
        )
