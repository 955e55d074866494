"""The oracle of LoRA is Hugging Face PEFT: the same numbers, forwards and backwards, in float64.

The adapter is at a random state, far from the initial one (B = 0 makes a broken LoRA look right). The weights
are carried over by checkpoint. Largest difference, relative to the largest value: below 1e-9, usually 1e-15.
"""

import warnings

import pytest
import torch

import minipeft as mp
from minipeft.methods.lora import LowRank

from .families import FAMILIES, inputs

peft = pytest.importorskip("peft")


def random_state(adapter: torch.nn.Module, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.3)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
    assert b.abs().max() > 0, "nothing to compare"
    return ((a - b).abs().max() / b.abs().max()).item()


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return (logits * torch.randn(logits.shape, generator=draw, dtype=logits.dtype)).sum()


@pytest.mark.parametrize(("targets", "rslora"), [("all-linear", False), ("attention", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_computes_what_peft_computes(family, targets, rslora, tmp_path):
    model, x = FAMILIES[family]().double(), inputs(family)
    base_logits = model(**x).logits
    adapter = mp.attach(model, mp.LoRA(rank=3, alpha=7, targets=targets, rslora=rslora))
    random_state(adapter)
    mp.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), tmp_path, is_trainable=True).eval()

    logits, expected = model(**x).logits, theirs(**x).logits
    assert distance(logits, expected) < 1e-9
    assert distance(base_logits, expected) > 1e-2  # the adapter does something

    loss_of(logits).backward()
    loss_of(expected).backward()
    gradients = {}
    for path, piece in adapter.pieces().items():
        for name, p in piece.named_parameters():
            key = {"A": ".lora_A.default.weight", "B": ".lora_B.default.weight"}.get(
                name, name.replace("copy.", ".modules_to_save.default."))
            gradients["base_model.model." + path + key] = p.grad
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert distance(gradients[name], gradient) < 1e-9, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "roberta", "t5"])
def test_merging_gives_the_weights_that_peft_merges_to(family, tmp_path):
    model = FAMILIES[family]().double()
    random_state(mp.attach(model, mp.LoRA(rank=3, alpha=7, targets="all-linear")))
    mp.save_adapter(model, tmp_path)
    mp.merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), tmp_path).merge_and_unload()
    wanted, untouched = theirs.state_dict(), FAMILIES[family]().double().state_dict()
    assert model.state_dict().keys() == wanted.keys()
    changed = 0
    for name, weight in model.state_dict().items():
        if "classifier" in name:  # PEFT writes the adapter's own head over the base's; ours stays in the adapter
            continue
        assert distance(weight, wanted[name]) < 1e-12, name
        changed += not torch.equal(weight, untouched[name])
    assert changed == sum(isinstance(piece, LowRank) for piece in mp.adapters(model)["default"]
                          .pieces().values())
