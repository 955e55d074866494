"""Rows behind one another in one sequence: the same numbers as padded rows, or not done at all."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import minipeft as mp
from minipeft import packing, sockets, training
from minipeft.training import Row
from tests.families import FAMILIES, inputs
from tests.test_training import TOKENIZER

PACKED = ("llama", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt2", "gpt_neox", "opt")
PADDED = tuple(f for f in FAMILIES if f not in PACKED)           # windows of 4, no attention function of this kind, …
ROWS = [Row([5, 6, 7, 8, 9, 2], start=2), Row([11, 12, 2], start=1), Row([21, 22, 23, 24, 2], start=4)]


def with_lora(family):
    model = FAMILIES[family]().double()
    mp.attach(model, mp.LoRA(rank=2, alpha=4, targets="all-linear"))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in mp.adapters(model)["default"].parameters():
            p.normal_(std=0.3, generator=draw)
    return model.train()


def loss_and_gradients(model, packed, rows=ROWS):
    loss, _, n = training.loss_of(model, rows, 0, packed)
    assert n == 4 + 2 + 1
    return loss, torch.autograd.grad(loss, list(training.trainable(model).values()))


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_rows(family):
    model = with_lora(family)
    expected, gradients = loss_and_gradients(model, packed=False)
    before = model.config._attn_implementation
    with packing.one_sequence(model, 6) as possible:
        assert possible
        loss, own = loss_and_gradients(model, packed=True)
    assert model.config._attn_implementation == before == "sdpa"
    assert torch.allclose(loss, expected, rtol=1e-12)
    for g, h in zip(own, gradients, strict=True):
        assert torch.allclose(g, h, rtol=1e-9, atol=1e-10 * h.abs().max().item())


@pytest.mark.parametrize("family", PADDED)
def test_other_models_keep_padding(family):
    model = FAMILIES[family]()
    before = model.config._attn_implementation
    with packing.one_sequence(model, 6) as possible:
        assert not possible
    assert model.config._attn_implementation == before


def test_rows_as_long_as_the_window_are_packed_and_longer_ones_are_not():
    config = FAMILIES["mistral"].config()
    config.sliding_window = 6
    model = transformers.MistralForCausalLM(config).eval()
    for longest in (6, 7):
        with packing.one_sequence(model, longest) as possible:
            assert possible == (longest == 6)


def test_a_model_whose_state_runs_on_keeps_padding():
    """A recurrence would carry the first row into the second, also where its attention is packed rightly."""
    class Running(nn.Module):
        def forward(self, x):
            return x + 0.01 * x.cumsum(1)

    model = FAMILIES["llama"]()
    model.model.norm = nn.Sequential(model.model.norm, Running())
    with packing.one_sequence(model, 6) as possible:
        assert not possible
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with packing.one_sequence(transformers.MambaForCausalLM(config), 6) as possible:
        assert not possible


@pytest.mark.parametrize("method", [mp.PromptTuning(length=2), mp.PrefixTuning(length=2)], ids=["prompt", "prefix"])
def test_positions_in_front_of_each_row_keep_padding(method):
    model = FAMILIES["llama"]()
    mp.attach(model, method)
    with packing.one_sequence(model, 6) as possible:
        assert not possible
    mp.detach(model)
    with packing.one_sequence(model, 6) as possible:
        assert possible


def test_a_model_that_loses_the_lengths_keeps_the_rows_apart_by_a_mask(monkeypatch):
    model = with_lora("llama")
    expected, _ = loss_and_gradients(model, packed=False)
    given = packing.inputs

    def without_lengths(sequences):
        return {k: v for k, v in given(sequences).items() if k != "row_lengths"}

    monkeypatch.setattr(packing, "inputs", without_lengths)
    with packing.one_sequence(model, 6) as possible:
        assert possible
        assert torch.allclose(loss_and_gradients(model, packed=True)[0], expected, rtol=1e-12)


def test_within_it_padded_batches_and_generation_go_on_as_before():
    model, x = FAMILIES["llama"](), inputs("llama")
    x["attention_mask"] = x["attention_mask"].flip(1)            # padded on the left, as for generation
    ask = dict(max_new_tokens=5, do_sample=False)
    logits, tokens = model(**x).logits, model.generate(**x, **ask)
    with packing.one_sequence(model, 6) as possible:
        assert possible and torch.equal(model(**x).logits, logits) and torch.equal(model.generate(**x, **ask), tokens)
        with packing.one_sequence(model, 6) as inner:            # an evaluation while training
            assert inner
        assert model.config._attn_implementation == packing.NAME
    assert model.config._attn_implementation == "sdpa"


def test_the_attention_function_is_put_back_after_an_error():
    model = FAMILIES["llama"]()
    with pytest.raises(ZeroDivisionError), packing.one_sequence(model, 6):
        1 / 0  # noqa: B018
    assert model.config._attn_implementation == "sdpa"


def test_gradient_checkpointing_recomputes_each_row_by_itself():
    model = with_lora("llama")
    with packing.one_sequence(model, 6):
        expected, gradients = loss_and_gradients(model, packed=True)
        training._recompute_activations(model, True)
        loss, again = loss_and_gradients(model, packed=True)
    assert torch.equal(loss, expected)
    assert all(torch.allclose(g, h, rtol=1e-10, atol=1e-14) for g, h in zip(again, gradients, strict=True))


def test_a_run_reads_no_padding_and_ends_where_a_padded_run_ends(monkeypatch):
    texts = [dict(prompt="a" * n, completion="b" * m) for n, m in ((3, 9), (8, 2), (1, 1), (5, 6), (2, 2))]

    def run():
        model, read = with_lora("llama"), []
        model.get_input_embeddings().register_forward_hook(lambda m, args, out: read.append(args[0].numel()))
        mp.fit(model, TOKENIZER, texts, mp.FitConfig(steps=3, batch_size=5, max_tokens=20, lr=1e-2, progress=False))
        score = mp.evaluate(model, TOKENIZER, texts, max_tokens=20)
        return {n: p.detach() for n, p in training.trainable(model).items()}, score, read

    packed, score, read = run()
    monkeypatch.setattr(packing, "_can", lambda model, longest: False)
    padded, padded_score, read_padded = run()
    tokens = sum(len(t["prompt"] + t["completion"]) for t in texts)                    # the end token is not read
    probes = 2 * 6 + 1                                                          # of fit, and of evaluate
    assert sum(read) - probes == 4 * tokens < sum(read_padded)
    assert score == pytest.approx(padded_score, rel=1e-9)
    assert all(torch.allclose(packed[n], padded[n], rtol=1e-8, atol=1e-10) for n in padded)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=12), st.integers(60, 200), st.integers(1, 3))
def test_packed_passes_hold_every_row_once_and_no_more_tokens_than_asked(lengths, limit, lanes):
    rows = [Row([1] * n, start=1) for n in lengths]
    chunks = training.passes(rows, limit, lanes, packed=True)
    assert sorted(id(r) for c in chunks for r in c) == sorted(map(id, rows))
    assert all(len(c) == 1 or sum(map(len, c)) <= limit for c in chunks)
    sizes = [sum(map(len, c)) for c in chunks]
    assert max(sizes) - min(sizes) <= max(lengths)


def test_frozen_weights_cast_once_give_the_same_bits_under_autocast_and_nothing_stays_behind():
    for family in ("llama", "gpt2"):                              # nn.Linear, Conv1D
        model = FAMILIES[family]().float().train()
        mp.attach(model, mp.LoRA(rank=4, targets="all-linear"))
        for p in (p for n, p in model.named_parameters() if n.endswith(".B")):
            nn.init.normal_(p, std=0.1)
        ids, before = torch.tensor([[5, 9, 3, 17, 21, 8, 40], [7, 4, 8, 33, 12, 29, 6]]), {n: p.clone() for n, p in model.named_parameters()}

        def losses(model=model, ids=ids):
            """How many 16-bit tensors two passes keep, and all that comes out of the second."""
            model.zero_grad(set_to_none=True)
            kept = {}

            def keep(t):
                if t.dtype == torch.bfloat16:
                    kept[t.untyped_storage().data_ptr()] = t
                return t

            with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                _, loss = [model(input_ids=ids, labels=ids).loss for _ in range(2)]
            loss.backward()
            plain = model(input_ids=ids, labels=ids).loss          # not under autocast: in float32 still
            return len(kept), [loss, plain, *(p.grad for p in model.parameters() if p.grad is not None)]

        kept, expected = losses()
        with pytest.raises(ZeroDivisionError), sockets.cast_once(model, torch.bfloat16):
            with sockets.cast_once(model, torch.bfloat16):        # an evaluation while training
                pass
            less, found = losses()
            assert all(map(torch.equal, found, expected)) and len(found) == len(expected) > 5
            assert less <= kept - 5                               # not a copy of each weight in each pass
            1 / 0
        assert all(map(torch.equal, losses()[1], expected))
        assert not any("forward" in vars(m) for m in model.modules())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", [None, mp.PrefixTuning(3, reparameterize=False)])
def test_under_autocast_attention_is_computed_in_float32(method, monkeypatch):
    seen, real = [], F.scaled_dot_product_attention

    def watched(q, k, v, **more):
        seen.append({torch.bfloat16} if torch.is_autocast_enabled("cpu") else {t.dtype for t in (q, k, v)})
        return real(q, k, v, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = FAMILIES["llama"]().float()
    if method is not None:
        mp.attach(model, method)
    ids = torch.tensor([[5, 9, 3, 17, 21, 8, 40], [7, 4, 8, 33, 12, 29, 6]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packing.one_sequence(model, 7):
        inside = model(input_ids=ids).logits
    assert seen and all(dtypes == {torch.float32} for dtypes in seen)
    seen.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outside = model(input_ids=ids).logits
    assert seen
    with torch.no_grad():
        exact = model(input_ids=ids).logits
    errors = [((logits - exact).norm() / exact.norm()).item() for logits in (inside, outside)]
    assert 0 < errors[0] < 1.3 * errors[1] < 0.05
