"""Statements about measuring latency. What a clock says is nowhere compared: operators are counted instead."""

import copy

import pytest
import torch

import minipeft as mp
from minipeft import lab, latency, sockets

from .families import FAMILIES, inputs
from .test_lora import bytes_of, random_state

MERGEABLE = {"LoRA": mp.LoRA(targets="all-linear"), "DoRA": mp.DoRA(targets="all-linear"), "IA3": mp.IA3(),
             "PiSSA": mp.LoRA(rank=2, targets="attention", init="pissa")}
OTHERS = {"prompt": mp.PromptTuning(3), "prefix": mp.PrefixTuning(3), "adapters": mp.BottleneckAdapter(4)}


def hooks_of(model):
    return {name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}


# ---------------------------------------------------------------- operators


def test_operators_are_counted_by_name():
    linear, x = torch.nn.Linear(3, 4), torch.randn(2, 3)
    assert mp.count_operators(linear, input=x) == {"aten.t.default": 1, "aten.addmm.default": 1}


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
def test_merged_runs_the_very_operators_of_the_base_without_a_hook_and_unmerged_more(family, method):
    model, x = FAMILIES[family](), inputs(family)
    base = mp.count_operators(model, **x)
    random_state(mp.attach(model, MERGEABLE[method]))
    model(**x)                                                   # DoRA makes its norm in the first pass
    live = mp.count_operators(model, **x)
    assert live.total() > base.total() and base["aten.mm.default"] + base["aten.addmm.default"] > 8
    mp.merge(model)
    assert mp.count_operators(model, **x) == base
    assert hooks_of(model) == {""}                               # the model itself, which asks whether anyone is live
    mp.unmerge(model)
    model(**x)
    assert mp.count_operators(model, **x) == live
    mp.detach(model)
    assert mp.count_operators(model, **x) == base and not hooks_of(model)


def test_merged_into_4_bits_runs_what_a_base_in_full_precision_runs():
    base = mp.count_operators(FAMILIES["llama"](), **inputs("llama"))
    model = mp.quantize(FAMILIES["llama"]())
    mp.attach(model, mp.LoRA(targets="all-linear"))
    mp.merge(model)
    assert mp.count_operators(model, **inputs("llama")) == base


def test_beside_a_merged_adapter_another_is_live_at_the_same_module_and_an_own_head_stays():
    model = FAMILIES["bert"]()
    random_state(mp.attach(model, mp.LoRA(targets="attention"), "a"), 1)
    alone = model(**inputs("bert")).logits
    random_state(mp.attach(model, mp.LoRA(targets="attention"), "b"), 2)
    both = model(**inputs("bert")).logits
    mp.merge(model, "a")
    assert torch.allclose(model(**inputs("bert")).logits, both, atol=1e-5)
    mp.merge(model, "b")
    assert torch.allclose(model(**inputs("bert")).logits, both, atol=1e-5) and hooks_of(model) == {"", "classifier"}
    mp.detach(model, "b")
    assert torch.allclose(model(**inputs("bert")).logits, alone, atol=1e-5)
    twin = copy.deepcopy(model)
    mp.unmerge(twin, "a")
    assert torch.equal(twin(**inputs("bert")).logits, alone)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_every_contestant_has_its_row_and_the_model_comes_back_to_the_bit(family):
    model = FAMILIES[family]().train()
    before, flags = bytes_of(model.state_dict()), [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    rows = mp.measure_latency(model, MERGEABLE | OTHERS | {"LoRA + prompt": [mp.LoRA(targets="attention"), mp.PromptTuning(3)],
                                                           "twin": copy.deepcopy(model)},
                              batch_sizes=(1, 2), tokens=5, new_tokens=2, repeats=2, progress=False)
    names = ["base", *(n for m in MERGEABLE for n in (m, m + ", merged")), *OTHERS, "LoRA + prompt", "twin"]
    assert [(r["model"], r["batch"]) for r in rows] == [(n, b) for b in (1, 2) for n in names]
    generates = family != "bert"
    for row in rows:
        assert row["forward ms"] > 0 and row["forward ± ms"] >= 0 and ("generate ms" in row) == generates
        base = rows[0]
        assert (row["forward / base"] == 1) == (row["model"] == "base")
        if row["model"] in ("base", "twin") or (row["model"].endswith("merged") and generates):  # an own head runs on
            assert row["operators"] == base["operators"]
        else:
            assert row["operators"] > base["operators"]
    trained = {r["model"]: r["parameters"] for r in rows}
    assert trained["base"] == 0 and trained["LoRA + prompt"] > 3 * 32
    assert bytes_of(model.state_dict()) == before and [p.requires_grad for p in model.parameters()] == flags
    assert model.training and not hooks_of(model) and torch.equal(torch.get_rng_state(), state)
    assert "LoRA, merged" in str(lab.table(rows))


def test_times_are_of_the_same_turn_and_the_first_is_left_out(monkeypatch):
    """A machine that becomes slower from turn to turn: ratios do not see it."""
    work = []

    def seconds(device, do):
        do()
        turn = len(work) // 4                                    # four measurements make a turn
        work.append(bool(sockets.adapters(model)))
        return (1 + turn) * (3.0 if work[-1] else 2.0)

    monkeypatch.setattr(latency, "_seconds", seconds)
    model = FAMILIES["bert"]()
    rows = mp.measure_latency(model, {"prompt": mp.PromptTuning(2)}, batch_sizes=(1, 2), tokens=4, repeats=5, progress=False)
    turns = [work[i:i + 4] for i in range(0, 24, 4)]
    assert [False, False, True, True] in turns and [True, True, False, False] in turns  # the order is drawn anew
    for row in rows:
        plugged = row["model"] == "prompt"
        assert row["forward / base"] == (1.5 if plugged else 1)
        assert row["forward ms"] == pytest.approx(4 * (3000 if plugged else 2000)) and row["forward ± ms"] > 1000


def test_an_interrupted_measurement_leaves_the_model_as_it_was(monkeypatch):
    model = FAMILIES["llama"]()
    before = bytes_of(model.state_dict())

    def stop(device, work):
        if sockets.adapters(model) and model.minipeft.merged:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(latency, "_seconds", stop)
    with pytest.raises(KeyboardInterrupt):
        mp.measure_latency(model, MERGEABLE, tokens=4, progress=False)
    assert bytes_of(model.state_dict()) == before and not hooks_of(model) and not sockets.adapters(model)


@pytest.mark.parametrize(("methods", "settings", "error", "words"), [
    ({"LoRA": mp.LoRA}, {"tokens": 0}, ValueError, "tokens is 0; accepted is a whole number from 1"),
    ({}, {"repeats": 1}, ValueError, "repeats is 1; accepted is a whole number from 2"),
    ({}, {"batch_sizes": (1, 1)}, ValueError, "batch_sizes is"),
    ({}, {"batch_sizes": (0,)}, ValueError, "a batch size is 0"),
    ({"x": "LoRA"}, {}, TypeError, "'x' is 'LoRA'; accepted are a method's settings"),
    ({"x": []}, {}, TypeError, "accepted are a method's settings"),
    ({"base": mp.LoRA()}, {}, ValueError, "'base' names a contestant"),
    ({"x": mp.PromptTuning(30)}, {"tokens": 30}, ValueError, "a prompt of 30 are more than the 64 positions"),
    ({"x": mp.LoRA(targets="q_prj")}, {}, ValueError, "did you mean 'q_proj'"),
    ([mp.LoRA()], {}, ValueError, "methods is"),
])
def test_what_cannot_be_measured_is_refused(methods, settings, error, words):
    model = FAMILIES["llama"]()
    with pytest.raises(error, match=words):
        mp.measure_latency(model, methods, **({"tokens": 4, "progress": False} | settings))
    assert not sockets.adapters(model) and not hooks_of(model)


def test_a_model_with_adapters_is_refused():
    model = FAMILIES["llama"]()
    mp.attach(model, mp.LoRA(), "mine")
    with pytest.raises(ValueError, match=r"the model has adapters \(mine\)"):
        mp.measure_latency(model, {})
