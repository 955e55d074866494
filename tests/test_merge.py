"""Statements about merging that hold for every method that can, in float32, in bf16 and on a 4-bit base.

`unmerge` copies the weights that `merge` kept, so nothing drifts; a weight from which an update is subtracted again, as
PEFT does, is another one after 100 rounds. test_lora.py, test_dora.py, test_ia3.py and test_linear4bit.py merge in more
families and orders.
"""

import warnings

import pytest
import torch

import minipeft as mp
from minipeft import anatomy

from .families import FAMILIES, inputs
from .test_linear4bit import readable  # noqa: F401, the PyTorch version of 4 bits
from .test_lora import bytes_of, distance, logits_of, random_state

METHODS = {
    "LoRA": mp.LoRA(rank=2, targets="all-linear"),
    "rsLoRA": mp.LoRA(rank=3, targets="attention", rslora=True),
    "PiSSA": mp.LoRA(rank=2, targets="all-linear", init="pissa"),
    "DoRA": mp.DoRA(rank=2, targets="all-linear"),
    "(IA)³": mp.IA3(),
    "BitFit": mp.BitFit(),
}
BASES = {
    "float32": lambda family: FAMILIES[family](),
    "bf16": lambda family: FAMILIES[family]().bfloat16(),
    "4 bits": lambda family: mp.quantize(FAMILIES[family]()),
    "4 bits, bf16": lambda family: mp.quantize(FAMILIES[family]().bfloat16()),
}
PAIRS = [(family, method) for family in ("llama", "gpt2", "t5") for method in METHODS
         if method != "BitFit" or family == "gpt2"]            # Llama and T5 have no bias


TOGETHER = METHODS | {"adapter": mp.BottleneckAdapter(2, init_std=0.5), "beside": mp.BottleneckAdapter(2, "parallel", init_std=0.5)}


def quietly(merge, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return merge(*args, **options)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_after_100_rounds_of_merging_and_unmerging_the_base_is_the_base_to_the_bit(method, base):
    model = BASES[base]("gpt2")
    before, start = bytes_of(model.state_dict()), logits_of(model, "gpt2")
    adapter = random_state(mp.attach(model, METHODS[method]), size=0.1)
    live, trained = logits_of(model, "gpt2"), bytes_of(dict(adapter.named_parameters()))
    for again in (False, True) if base.startswith("4") else (False,):
        for _ in range(100 if method == "LoRA" else 5):
            quietly(mp.merge, model, requantize=again)
            merged = bytes_of(model.state_dict())
            mp.unmerge(model)
            assert bytes_of(model.state_dict()) == before != merged
        assert torch.equal(logits_of(model, "gpt2"), live) and bytes_of(dict(adapter.named_parameters())) == trained
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model, "gpt2"), start)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 1e-8, 1e-5), (torch.bfloat16, 1e-3, 1.0)])
def test_subtracting_the_update_again_as_peft_does_drifts(dtype, least, most):
    peft = pytest.importorskip("peft")
    theirs = FAMILIES["llama"]().to(dtype)
    before = theirs.model.layers[0].mlp.up_proj.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    draw = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    for _ in range(100):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    after = theirs.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    drift = ((after - before).float().norm() / before.float().norm()).item()
    assert least < drift < most


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_merged_equals_unmerged_to_1e_5_in_float32_and_as_told_in_fewer_bits(family, method):
    """Each beside the same adapter in float64 on the same base: merging adds no more than rounding the weight does."""
    for base, most in {"float32": 1e-5, "4 bits": 5e-5, "bf16": 0.3, "4 bits, bf16": 0.3}.items():
        model = BASES[base](family)
        plain = logits_of(model, family)
        random_state(mp.attach(model, METHODS[method]), size=0.1)
        live = logits_of(model, family)
        lost = quietly(mp.merge, model)
        error, effect = distance(logits_of(model, family).double(), live.double()), distance(live.double(), plain.double())
        assert error < most and error < effect, base
        folded = {p for p, piece in mp.adapters(model)["default"].pieces().items() if hasattr(piece, "merged")}
        assert set(lost) == (folded if "bf16" in base else set()), base
        assert all(0 < x < 0.3 for x in lost.values())


@pytest.mark.parametrize("size", [0.003, 0.03, 1.0])
def test_the_loss_of_merging_in_bf16_is_told_and_large_for_a_small_update(size):
    model = FAMILIES["llama"]().bfloat16()
    adapter = random_state(mp.attach(model, METHODS["LoRA"]), size=size)
    W = {path: model.get_submodule(path).weight.double() for path in adapter.pieces()}
    with pytest.warns(UserWarning, match=r"merged into 14 weights of 16 bits; rounding moved them by \d+ % of what"):
        lost = mp.merge(model)
    for path, piece in adapter.pieces().items():
        exact = W[path] + piece.delta().double()
        stored = model.get_submodule(path).weight
        assert torch.equal(stored, exact.bfloat16()) or distance(stored.double(), exact) < 2 ** -8
        wanted = (stored.double() - exact).norm() / (exact - W[path]).norm()
        assert lost[path] == pytest.approx(wanted.item(), rel=1e-3)
    mean = sum(lost.values()) / len(lost)
    assert {0.003: 0.5 < mean, 0.03: 0.01 < mean < 0.1, 1.0: mean < 0.005}[size]


def test_several_adapters_are_rounded_once_in_bf16():
    model = FAMILIES["llama"]().bfloat16()
    path = "model.layers.0.mlp.up_proj"
    W = model.get_submodule(path).weight.clone()
    exact = W.float()
    for seed, name in enumerate("abc"):
        piece = random_state(mp.attach(model, METHODS["LoRA"], name), seed).pieces()[path]
        exact = exact + piece.delta()
    one_by_one = W
    for name in "abc":
        quietly(mp.merge, model, name)
        one_by_one = mp.adapters(model)[name].pieces()[path].merged(one_by_one)
    assert torch.equal(model.get_submodule(path).weight, exact.bfloat16())
    assert not torch.equal(one_by_one, exact.bfloat16())


def test_a_merged_model_saves_and_computes_like_a_model_with_those_weights(tmp_path):
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, METHODS["DoRA"]), size=0.1)
    mp.merge(model)
    plain = FAMILIES["llama"]()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(plain), logits_of(model)) and not mp.adapters(plain)
    assert all(anatomy.is_linear(plain.get_submodule(p)) for p in mp.adapters(model)["default"].pieces())
    assert torch.equal(model.generate(**inputs("llama"), max_new_tokens=5), plain.generate(**inputs("llama"), max_new_tokens=5))


@pytest.mark.parametrize("second", TOGETHER)
@pytest.mark.parametrize("first", TOGETHER)
def test_what_two_adapters_do_together_is_the_same_after_a_merge_or_the_merge_is_refused(first, second):
    model = FAMILIES["gpt2"]().double()
    for name, method in (("one", TOGETHER[first]), ("two", TOGETHER[second])):
        random_state(mp.attach(model, method, name))
    mp.activate(model, ["one", "two"])
    expected, before = logits_of(model, "gpt2"), bytes_of(model.state_dict())
    for name, method in (("one", first), ("two", second)):
        if method not in METHODS:
            continue
        try:
            mp.merge(model, name)
        except ValueError as error:
            assert f"and {name!r} both act on" in str(error) and "merge or deactivate" in str(error)
            assert bytes_of(model.state_dict()) == before
            assert {first, second} & {"DoRA", "(IA)³", "adapter", "beside"}   # what only adds is never refused
        else:
            assert distance(logits_of(model, "gpt2"), expected) < 1e-10
            mp.unmerge(model, name)


def test_a_merge_is_refused_only_where_it_would_change_something():
    model = FAMILIES["gpt2"]().double()
    random_state(mp.attach(model, mp.BottleneckAdapter(2, init_std=0.5), "behind"))
    random_state(mp.attach(model, mp.LoRA(rank=2, targets="all-linear"), "low"))
    mp.activate(model, ["behind", "low"])
    with pytest.raises(ValueError, match="'behind' and 'low' both act on 'transformer.h.0.attn.c_proj'"):
        mp.merge(model, "low")
    mp.activate(model, ["low", "behind"])                          # now the adapter sees what LoRA has added
    expected = logits_of(model, "gpt2")
    mp.merge(model, "low")
    assert distance(logits_of(model, "gpt2"), expected) < 1e-10
