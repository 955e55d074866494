"""Statements about PiSSA, a start of LoRA. The oracle is Hugging Face PEFT, which takes the start out of the base."""

import json
import math
import warnings

import pytest
import torch

import minipeft as mp

from .families import FAMILIES, inputs
from .test_adapters import loss_of
from .test_lora import bytes_of, distance, logits_of, random_state, train


def method(**settings):
    return mp.LoRA(**{"rank": 3, "alpha": 7, "targets": "all-linear", "init": "pissa"} | settings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert", "t5"])
def test_pissa_starts_as_the_identity_and_leaves_every_byte_of_the_base(family):
    model = FAMILIES[family]()
    before, start = bytes_of(model.state_dict()), logits_of(model, family)
    mp.attach(model, method())
    assert distance(logits_of(model, family), start) < 2e-5         # float32: two equal products are subtracted
    train(model, family)
    assert bytes_of(model.state_dict()) == before and distance(logits_of(model, family), start) > 1e-3
    mp.detach(model)
    assert torch.equal(logits_of(model, family), start)


def test_a_and_b_start_at_the_principal_part_of_the_weight_and_alone_train():
    model, lora = FAMILIES["gpt2"]().double(), method()
    adapter = mp.attach(model, lora)
    for path, piece in adapter.pieces().items():
        W = model.get_submodule(path).weight.T
        U, S, Vt = torch.linalg.svd(W)
        best = U[:, :3] @ torch.diag(S[:3]) @ Vt[:3]        # of rank 3, none is nearer to W
        assert torch.allclose(lora.scale * piece.B @ piece.A, best, atol=1e-10)
        assert torch.allclose(piece.A @ piece.A.T, torch.diag(S[:3] / lora.scale), atol=1e-10)
        assert {n for n, _ in piece.named_parameters()} == {"A", "B"}
        assert sum(p.numel() for p in piece.parameters()) == lora.parameter_count(*W.shape)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_after_the_same_steps_peft_is_in_the_same_place(family, rslora):
    peft = pytest.importorskip("peft")
    model, x = FAMILIES[family](), inputs(family)
    adapter = mp.attach(model, method(rslora=rslora))
    theirs = peft.get_peft_model(FAMILIES[family](), peft.LoraConfig(
        r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights="pissa", use_rslora=rslora))
    for one in (model, theirs):                             # float32 SVDs, as PEFT asks for; then float64
        one.double().eval()
    with torch.no_grad():                                   # a sign of U and V is free: take theirs
        for path, piece in adapter.pieces().items():
            at = theirs.base_model.model.get_submodule(path)
            A, B = at.lora_A["default"].weight, at.lora_B["default"].weight
            assert distance(piece.scale * piece.B0 @ piece.A0, piece.scale * B @ A) < 1e-5
            piece.A.copy_(A), piece.A0.copy_(A), piece.B.copy_(B), piece.B0.copy_(B)
            W = model.get_submodule(path).weight
            start = piece.scale * B @ A
            at.base_layer.weight.copy_(W - (start.T if W.shape != start.shape or family == "gpt2" else start))
    start = logits_of(model, family)
    assert distance(start, logits_of(theirs, family)) < 1e-9
    for one in (model, theirs):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(one(**x).logits).backward()
            optimizer.step()
    live = logits_of(model, family)
    assert distance(live, logits_of(theirs, family)) < 1e-9 and distance(live, start) > 1e-3


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_a_saved_pissa_is_a_lora_of_twice_the_rank_on_the_unchanged_base(family, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    model = FAMILIES[family]().double()
    random_state(mp.attach(model, method(rslora=rslora)))
    live = logits_of(model, family)
    mp.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["init_lora_weights"] is True
    assert math.isclose(config["lora_alpha"], 7 * (math.sqrt(2) if rslora else 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), tmp_path).eval()
    assert distance(logits_of(theirs, family), live) < 1e-9
    other = FAMILIES[family]().double()
    assert mp.load_adapter(other, tmp_path).method.rank == 6
    assert distance(logits_of(other, family), live) < 1e-12


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_converts_while_it_saves_opens_here(rslora, tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(
            r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights="pissa", use_rslora=rslora)).eval()
        theirs.save_pretrained(tmp_path / "start")
        draw = torch.Generator().manual_seed(2)
        for name, p in theirs.named_parameters():
            if ".lora_" in name:
                p.data += 0.1 * torch.randn(p.shape, generator=draw)
        live = logits_of(theirs)
        theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = FAMILIES["llama"]()
    start = logits_of(model)
    assert mp.load_adapter(model, tmp_path / "converted").method.rank == 6
    assert distance(logits_of(model), live) < 1e-4 and distance(start, live) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_pissa_and_taking_it_out_again(family):
    model = FAMILIES[family]().double()
    before = bytes_of(model.state_dict())
    random_state(mp.attach(model, method()))
    live = logits_of(model, family)
    mp.merge(model)
    assert distance(logits_of(model, family), live) < 1e-12
    mp.unmerge(model)
    assert bytes_of(model.state_dict()) == before


def test_dora_takes_the_same_start(tmp_path):
    model = FAMILIES["llama"]().double()
    start = logits_of(model)
    random_state(mp.attach(model, mp.DoRA(rank=2, init="pissa", targets="all-linear")))
    live = logits_of(model)
    mp.save_adapter(model, tmp_path)
    mp.detach(model)
    mp.attach(model, mp.DoRA(rank=2, init="pissa", targets="all-linear"))
    assert distance(logits_of(model), start) < 1e-9
    other = FAMILIES["llama"]().double()
    mp.load_adapter(other, tmp_path)
    assert distance(logits_of(other), live) < 1e-9


def test_a_rank_above_the_number_of_singular_values_is_refused():
    model = FAMILIES["llama"]()
    with pytest.raises(ValueError, match=r"rank is 17, but the weight of 'model.layers.0.self_attn.k_proj', \(16, 32\), has only 16 singular values"):
        mp.attach(model, method(rank=17))
    assert not hasattr(model, "minipeft")
