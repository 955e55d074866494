"""Statements about LoRA and about the module socket that it is plugged into."""

import copy
import hashlib
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minipeft as mp
from minipeft import anatomy, sockets
from minipeft.methods.lora import AddLowRank, LowRank

from .families import FAMILIES, inputs

SEVERAL = ["llama", "phi3", "gpt2", "gpt_neox", "roberta", "t5"]  # separate, fused, transposed, encoders


def random_state(adapter: nn.Module, seed: int = 1, size: float = 0.3) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * size)
    return adapter


def bytes_of(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, t in tensors.items():
        digest.update(name.encode() + t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def distance(a, b) -> float:
    assert b.abs().max() > 0
    return ((a - b).abs().max() / b.abs().max()).item()


def logits_of(model, family="llama"):
    with torch.no_grad():
        return model(**inputs(family)).logits


def train(model, family="llama", steps=3):
    x, optimizer = inputs(family), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**x).logits.log_softmax(-1)[..., 1].mean().backward()
        optimizer.step()


class Tiny(nn.Module):
    """Two linears; the second is used, or gone past."""

    def __init__(self, bypass=False):
        super().__init__()
        self.first, self.second, self.bypass = nn.Linear(5, 6), nn.Linear(6, 4), bypass

    def forward(self, x):
        h = self.first(x).tanh()
        return F.linear(h, self.second.weight, self.second.bias) if self.bypass else self.second(h)


# ---------------------------------------------------------------- before, while and after training


@pytest.mark.parametrize("family", SEVERAL)
def test_lora_is_the_identity_before_training(family):
    model = FAMILIES[family]()
    before = logits_of(model, family)
    mp.attach(model, mp.LoRA(targets="all-linear"))
    assert torch.equal(logits_of(model, family), before)


@pytest.mark.parametrize("family", SEVERAL)
def test_training_changes_the_adapter_and_no_byte_of_the_base(family):
    model = FAMILIES[family]()
    before, start = bytes_of(model.state_dict()), logits_of(model, family)
    adapter = mp.attach(model, mp.LoRA(rank=2, targets="all-linear"))
    first = bytes_of(dict(adapter.named_parameters()))
    train(model, family)
    assert bytes_of(sockets.base_parameters(model)) == bytes_of(dict(FAMILIES[family]().named_parameters()))
    assert bytes_of(dict(adapter.named_parameters())) != first
    assert distance(logits_of(model, family), start) > 1e-3
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before
    assert torch.equal(logits_of(model, family), start)


@pytest.mark.parametrize("family", SEVERAL)
def test_exactly_a_and_b_of_the_targets_train_and_on_a_classifier_its_head(family):
    model = FAMILIES[family]()
    paths = anatomy.match(model, "attention")
    mp.attach(model, mp.LoRA(targets="attention"), "mine")
    wanted = {f"minipeft.mine.{path}.{symbol}" for path in paths for symbol in "AB"}
    if family == "roberta":
        wanted |= {f"minipeft.mine.classifier.copy.{part}.{p}" for part in ("dense", "out_proj")
                   for p in ("weight", "bias")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5"])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_parameter_count_is_the_closed_formula(family, rank):
    model, lora = FAMILIES[family](), mp.LoRA(rank=rank, targets="all-linear")
    shapes = [anatomy.linear_shape(model.get_submodule(path)) for path in anatomy.match(model, "all-linear")]
    adapter = mp.attach(model, lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in adapter.parameters())
    assert trained == sum(lora.parameter_count(*shape) for shape in shapes) == sum(rank * sum(s) for s in shapes)


def test_the_scale_is_alpha_over_rank_and_with_rslora_over_its_root():
    assert mp.LoRA(rank=4, alpha=6).scale == 1.5
    assert mp.LoRA(rank=4, alpha=6, rslora=True).scale == 3
    W, x = torch.randn(6, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    for lora in (mp.LoRA(rank=4, alpha=6), mp.LoRA(rank=4, alpha=6, rslora=True)):
        piece = random_state(LowRank(lora, 6, 5, dtype=torch.float64))
        slow = x @ W.T + lora.scale * torch.einsum("or,ri,bti->bto", piece.B, piece.A, x)
        assert torch.allclose(piece(x, x @ W.T), slow, rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_change_of_a_weight_has_rank_r(family):
    model = FAMILIES[family]().double()
    adapter = random_state(mp.attach(model, mp.LoRA(rank=3, targets="all-linear")))
    before = {path: model.get_submodule(path).weight.detach().clone() for path in adapter.pieces()}
    mp.merge(model)
    for path, W in before.items():
        change = model.get_submodule(path).weight.detach() - W
        assert torch.linalg.matrix_rank(change, rtol=1e-10) == 3


def test_kaiming_is_uniform_in_one_over_root_in_and_gaussian_has_deviation_one_over_rank():
    torch.manual_seed(0)
    A = LowRank(mp.LoRA(rank=64, init="kaiming"), 3, 900).A
    assert A.abs().max() <= 1 / 30
    assert A.abs().max() > 0.99 / 30 and abs(A.std() * math.sqrt(3) * 30 - 1) < 0.02 and abs(A.mean()) < 1e-3
    piece = LowRank(mp.LoRA(rank=64, init="gaussian"), 3, 900)
    assert abs(piece.A.std() * 64 - 1) < 0.02 and piece.A.abs().max() * 64 > 3.5 and abs(piece.A.mean()) < 1e-3
    assert not piece.B.any()


def test_dropout_acts_on_x_in_training_only():
    torch.manual_seed(0)
    lora = mp.LoRA(rank=2, dropout=0.4)
    piece = random_state(LowRank(lora, 6, 50))
    x, y = torch.randn(8, 50), torch.randn(8, 6)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    torch.manual_seed(3)
    assert torch.allclose(piece(x, y.clone()), y + lora.scale * dropped @ piece.A.T @ piece.B.T, atol=1e-5)
    piece.eval()
    assert torch.allclose(piece(x, y.clone()), y + lora.scale * x @ piece.A.T @ piece.B.T, atol=1e-5)


def test_the_model_switches_the_dropout_of_its_adapters():
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, mp.LoRA(dropout=0.5)))
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    assert not torch.equal(logits_of(model), logits_of(model))
    mp.attach(model, mp.LoRA(dropout=0.5), "later")
    assert all(m.training for m in mp.adapters(model)["later"].modules())


# ---------------------------------------------------------------- the product, added in place


@pytest.mark.parametrize("trains", ["xAB", "yxAB", "yAB", "AB", "x"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "view"])
def test_the_product_in_place_has_the_gradients_of_the_formula(layout, trains):
    torch.manual_seed(0)
    shapes = {"y": (2, 3, 5), "x": (2, 3, 4), "A": (2, 4), "B": (5, 2)}
    y, x, A, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=name in trains)
                  for name, shape in shapes.items())

    def result_of(y, x, A, B):
        made = {"contiguous": y * 1, "transposed": (y * 1).transpose(0, 2).contiguous().transpose(0, 2),
                "view": (y * 1).view(6, 5).view(2, 3, 5)}[layout]
        assert made.is_contiguous() == (layout != "transposed")
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x
        out = AddLowRank.apply(made, x, A, B, 1.5)
        assert out.data_ptr() == made.data_ptr()  # in place
        return out

    assert torch.allclose(result_of(y, x, A, B), y + 1.5 * (x @ A.T) @ B.T, rtol=1e-12)
    assert torch.autograd.gradcheck(result_of, (y, x, A, B))


def test_a_hook_of_the_users_own_sees_what_the_frozen_module_returned():
    model, seen = FAMILIES["llama"](), []
    module = model.model.layers[0].self_attn.q_proj
    module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    random_state(mp.attach(model, mp.LoRA(targets="all-linear")))
    changed = logits_of(model)
    (x, y), = seen
    assert torch.equal(y, F.linear(x, module.weight, module.bias))
    module._forward_hooks.popitem(last=False)
    assert torch.equal(logits_of(model), changed)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = FAMILIES["llama"]().double().train()
        adapter = random_state(mp.attach(model, mp.LoRA(targets="all-linear")))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs("llama"), use_cache=False).logits.square().sum().backward()
        found.append({name: p.grad for name, p in adapter.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0 and torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_16_bit_base_gets_32_bit_adapter_weights_and_gradients(family):
    model = FAMILIES[family]().bfloat16()
    before = logits_of(model, family)
    adapter = mp.attach(model, mp.LoRA(targets="attention"))
    out = model(**inputs(family)).logits
    assert out.dtype == torch.bfloat16
    assert distance(out.float(), before.float()) < 0.02
    out.float().square().sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "falcon_new", "opt", "bert", "roberta", "t5"])
def test_merged_computes_the_same_and_unmerging_gives_the_bytes_back(family):
    model = FAMILIES[family]()
    before, base = bytes_of(model.state_dict()), logits_of(model, family)
    random_state(mp.attach(model, mp.LoRA(rank=2, targets="all-linear")), size=0.1)
    live = logits_of(model, family)
    assert distance(live, base) > 1e-2
    mp.merge(model)
    assert bytes_of(model.state_dict()) != before
    assert distance(logits_of(model, family), live) < 1e-5
    mp.unmerge(model)
    assert bytes_of(model.state_dict()) == before
    assert torch.equal(logits_of(model, family), live)
    with torch.no_grad():                               # nothing of the first merge is left for a second
        model.get_submodule(next(iter(mp.adapters(model)["default"].pieces()))).weight.mul_(2)
    before = bytes_of(model.state_dict())
    mp.merge(model)
    mp.unmerge(model)
    assert bytes_of(model.state_dict()) == before


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_several_adapters_merge_and_unmerge_in_any_order(order):
    model = FAMILIES["gpt2"]()
    before = bytes_of(model.state_dict())
    for seed, (name, targets) in enumerate({"a": "all-linear", "b": "attention", "c": ("c_fc",)}.items()):
        random_state(mp.attach(model, mp.LoRA(rank=2, targets=targets), name), seed, size=0.1)
    live = logits_of(model, "gpt2")
    merged = {}
    for name in order:
        mp.merge(model, name)
        merged[len(merged) + 1] = bytes_of(model.state_dict())
        assert distance(logits_of(model, "gpt2"), live) < 1e-5
    mp.unmerge(model, order[2])
    assert bytes_of(model.state_dict()) == merged[2]  # the two that are left, in their order
    mp.unmerge(model, order[0])
    assert distance(logits_of(model, "gpt2"), live) < 1e-5
    mp.detach(model, order[1])                          # detaching unmerges
    assert bytes_of(model.state_dict()) == before


def test_a_merged_adapter_may_not_be_merged_or_left_out_and_an_unmerged_one_not_unmerged():
    model = FAMILIES["llama"]()
    mp.attach(model, mp.LoRA(), "a")
    mp.attach(model, mp.LoRA(), "b")
    with pytest.raises(ValueError, match=r"'a' is not merged \(merged: none\)"):
        mp.unmerge(model, "a")
    mp.merge(model, "a")
    with pytest.raises(ValueError, match="'a' is merged already"):
        mp.merge(model, "a")
    with pytest.raises(ValueError, match="'a' is merged into the base; unmerge it first"):
        mp.activate(model, "b")
    mp.unmerge(model, "a")
    mp.activate(model, "b")
    with pytest.raises(ValueError, match="'a' is not active"):
        mp.merge(model, "a")


def test_a_head_tied_to_the_embedding_is_not_merged_into():
    model = FAMILIES["gpt2"]()
    before = bytes_of(model.state_dict())
    mp.attach(model, mp.LoRA(targets=("c_fc", "lm_head")))
    with pytest.raises(ValueError, match="'lm_head' shares its weight with 'transformer.wte'"):
        mp.merge(model)
    assert bytes_of(model.state_dict()) == before and not model.minipeft.merged


def test_a_weight_stored_as_codes_is_not_merged_into():
    class Codes(nn.Module):  # stands for a 4-bit linear
        in_features, out_features = 6, 4

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x @ torch.ones(6, 4)

    model = Tiny()
    model.second = Codes()
    before = bytes_of(model.state_dict())
    adapter = mp.attach(model, mp.LoRA(targets=("first", "second")))
    A = adapter.get_parameter("second.A")
    assert A.shape == (8, 6) and A.dtype == torch.float32
    with pytest.raises(TypeError, match="'second' holds torch.uint8 codes"):
        mp.merge(model)
    assert bytes_of(model.state_dict()) == before


def test_an_error_while_merging_leaves_the_model_as_it_was(monkeypatch):
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, mp.LoRA()))
    before, live = bytes_of(model.state_dict()), logits_of(model)
    calls = []

    def fails_at_the_third(self, W):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return W + self.delta()

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(LowRank, "merged", fails_at_the_third)
        mp.merge(model)
    assert bytes_of(model.state_dict()) == before
    assert torch.equal(logits_of(model), live)
    mp.merge(model)


# ---------------------------------------------------------------- several adapters on one model


def test_two_active_adapters_add_up():
    model = FAMILIES["llama"]().double()
    adapters = [random_state(mp.attach(model, mp.LoRA(rank=r, targets="all-linear"), name), r)
                for name, r in (("a", 2), ("b", 3))]
    oracle = FAMILIES["llama"]().double()
    with torch.no_grad():
        for adapter in adapters:
            for path, piece in adapter.pieces().items():
                oracle.get_submodule(path).weight += adapter.method.alpha / adapter.method.rank * piece.B @ piece.A
    assert distance(logits_of(model), logits_of(oracle)) < 1e-10
    mp.activate(model, ["b", "a"])
    assert distance(logits_of(model), logits_of(oracle)) < 1e-10


def test_activating_chooses_who_acts_and_a_context_puts_it_back():
    model = FAMILIES["llama"]()
    base, alone = logits_of(model), {}
    for seed, name in enumerate("ab"):
        random_state(mp.attach(model, mp.LoRA(), name), seed)
        mp.activate(model, name)
        alone[name] = logits_of(model)
    assert not torch.equal(alone["a"], alone["b"])
    mp.activate(model, None)
    assert torch.equal(logits_of(model), base)
    mp.activate(model, "a")
    with mp.active(model, ["b"]):
        assert torch.equal(logits_of(model), alone["b"])
        with pytest.raises(KeyError), mp.active(model, None):
            assert torch.equal(logits_of(model), base)
            raise KeyError
        assert torch.equal(logits_of(model), alone["b"])
    assert torch.equal(logits_of(model), alone["a"])
    with pytest.raises(ValueError, match=r"no adapter is called 'bb'; did you mean 'b'\? \(attached: a, b\)"):
        mp.activate(model, ["a", "bb"])
    with pytest.raises(ValueError, match="only once"):
        mp.activate(model, ["a", "a"])
    assert torch.equal(logits_of(model), alone["a"])


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_detaching_in_any_order_gives_the_model_back(order):
    model = FAMILIES["llama"]()
    model.lm_head.weight.requires_grad_(False)  # someone else's choice, to be kept
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    before, base = bytes_of(model.state_dict()), logits_of(model)
    for seed, (name, targets) in enumerate({"a": "all-linear", "b": "attention", "c": ("q_proj",)}.items()):
        random_state(mp.attach(model, mp.LoRA(targets=targets), name), seed)
    for i, name in enumerate(order):
        assert set(mp.adapters(model)) == set(order[i:])
        mp.detach(model, name)
    assert not hasattr(model, "minipeft") and mp.adapters(model) == {}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model), base)


def test_the_state_dict_stays_the_bases_own():
    model, plain = FAMILIES["gpt2"](), FAMILIES["gpt2"]()
    mp.attach(model, mp.LoRA(targets="all-linear"))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not model.load_state_dict(plain.state_dict()).missing_keys


def test_a_copy_of_the_model_has_adapters_of_its_own():
    model = FAMILIES["bert"]()
    random_state(mp.attach(model, mp.LoRA(targets="attention"), "a"))
    twin = copy.deepcopy(model)
    changed, base = logits_of(model, "bert"), logits_of(FAMILIES["bert"](), "bert")
    random_state(twin.minipeft, seed=9)
    assert torch.equal(logits_of(model, "bert"), changed) and not torch.equal(logits_of(twin, "bert"), changed)
    mp.detach(model, "a")
    assert torch.equal(logits_of(model, "bert"), base) and not torch.equal(logits_of(twin, "bert"), changed)
    mp.detach(twin, "a")
    assert torch.equal(logits_of(twin, "bert"), base)
    assert not any(m._forward_hooks for m in twin.modules())


# ---------------------------------------------------------------- the head of a classifier


@pytest.mark.parametrize(("family", "heads"), [("bert", ["classifier"]), ("roberta", ["classifier"]),
                                               ("distilbert", ["pre_classifier", "classifier"])])
def test_every_adapter_on_a_classifier_has_its_own_copy_of_the_head(family, heads):
    model = FAMILIES[family]()
    base = logits_of(model, family)
    sizes = []
    for seed, name in enumerate("ab"):
        adapter = mp.attach(model, mp.LoRA(rank=2, targets="all-linear"), name)
        sizes.append(sum(1 for _ in adapter.modules()))
        own = {path for path, piece in adapter.pieces().items() if isinstance(piece, sockets.OwnHead)}
        assert own == set(heads)
        mp.activate(model, name)
        assert torch.equal(logits_of(model, family), base)  # it starts as a copy
        random_state(adapter, seed)
    assert sizes[0] == sizes[1]  # the copy took no other adapter along
    x = inputs(family)
    model(**x).logits.sum().backward()
    assert all(p.grad is not None for p in mp.adapters(model)["b"].parameters())
    assert all(p.grad is None for p in mp.adapters(model)["a"].parameters())
    assert torch.equal(logits_of(FAMILIES[family](), family), base)


def test_targets_inside_the_head_are_left_out_since_it_is_trained_whole():
    model = FAMILIES["roberta"]()
    adapter = mp.attach(model, mp.LoRA(targets=("dense",)))
    assert "classifier.dense" not in adapter.pieces() and "classifier" in adapter.pieces()
    train(model, "roberta", steps=1)
    mp.detach(model)
    with pytest.raises(ValueError, match="means only the output head 'classifier'"):
        mp.attach(model, mp.LoRA(targets=("classifier.dense",)))
    assert not hasattr(model, "minipeft")


# ---------------------------------------------------------------- what goes wrong, and is said


def test_a_piece_that_never_runs_is_reported():
    model = Tiny(bypass=True)
    adapter = mp.attach(model, mp.LoRA(targets=("first", "second")))
    assert adapter.idle() == ["first", "second"]
    with pytest.warns(UserWarning, match=r"'default': 1 of 2 pieces did not run in this forward pass \(second\)"):
        model(torch.randn(3, 5))
    assert adapter.idle() == ["second"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 5))  # said once
        fine = Tiny()
        adapter = mp.attach(fine, mp.LoRA(targets=("first", "second")))
        fine(torch.randn(3, 5))
    assert adapter.idle() == []


def test_an_adapter_may_be_detached_while_another_choice_is_active():
    model = FAMILIES["llama"]()
    for name in "ab":
        mp.attach(model, mp.LoRA(), name)
    with mp.active(model, "b"):
        mp.detach(model, "a")
    assert model.minipeft.active == ("b",)
    with mp.active(model, None):
        mp.detach(model, "b")
    assert not hasattr(model, "minipeft")


def test_a_gradient_of_the_gradient_is_refused_and_not_wrong():
    model = FAMILIES["llama"]().double()
    for method in (mp.LoRA(2), mp.DoRA(2)):
        adapter = random_state(mp.attach(model, method))
        loss = model(**inputs("llama")).logits.square().mean()
        gradients = torch.autograd.grad(loss, list(adapter.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(g.square().sum() for g in gradients).backward()
        mp.detach(model)


def test_a_model_with_adapters_loads_its_weights_as_a_part_of_another_too():
    model = FAMILIES["llama"]()
    mp.attach(model, mp.LoRA())
    whole = torch.nn.ModuleDict({"model": model, "other": nn.Linear(2, 2)})
    weights = whole.state_dict()
    assert not any("minipeft" in key for key in weights)
    assert whole.load_state_dict(weights).missing_keys == []
    del weights["other.bias"]
    with pytest.raises(RuntimeError, match="other.bias"):
        whole.load_state_dict(weights)


def test_what_cannot_be_attached_is_refused_before_anything_changes():
    model = FAMILIES["llama"]()
    for wrong, error, words in [
        (lambda: mp.attach(model, mp.LoRA(targets=("query_proj",))), ValueError, r"did you mean 'q_proj'\?"),
        (lambda: mp.attach(model, "LoRA"), TypeError, "accepted is a method's settings"),
        (lambda: mp.attach(model, mp.LoRA(), "a.b"), ValueError, "without a dot"),
        (lambda: mp.attach(model, mp.LoRA(), ""), ValueError, "non-empty"),
        (lambda: mp.attach(model, mp.LoRA(), "forward"), ValueError, "a module uses for itself"),
        *((lambda name=name: mp.attach(model, mp.LoRA(), name), ValueError, f"name is '{name}', which a module uses")
          for name in ("active", "merged", "plugs", "originals", "training")),
        (lambda: mp.attach(model, mp.LoRA), TypeError, "accepted is a method's settings"),
        (lambda: mp.detach(model), ValueError, "no adapter is attached"),
    ]:
        with pytest.raises(error, match=words):
            wrong()
        assert not hasattr(model, "minipeft") and all(p.requires_grad for p in model.parameters())
    mp.attach(model, mp.LoRA())
    with pytest.raises(ValueError, match="'default' is attached already"):
        mp.attach(model, mp.LoRA())


@settings(max_examples=60, deadline=None)
@given(rank=st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.text(), st.none()))
def test_a_rank_that_is_no_positive_whole_number_is_refused(rank):
    with pytest.raises(ValueError, match=r"rank is .*; accepted is a whole number from 1"):
        mp.LoRA(rank=rank)


@settings(max_examples=60, deadline=None)
@given(alpha=st.one_of(st.floats(max_value=0), st.sampled_from([math.inf, math.nan]), st.booleans(), st.text()))
def test_an_alpha_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*; accepted is a number above 0"):
        mp.LoRA(alpha=alpha)


@settings(max_examples=60, deadline=None)
@given(dropout=st.one_of(st.floats(min_value=1), st.floats(max_value=0, exclude_max=True), st.just(math.nan),
                         st.text()))
def test_a_dropout_that_is_no_probability_below_one_is_refused(dropout):
    with pytest.raises(ValueError, match=r"dropout is .*; accepted is a number from 0 to below 1"):
        mp.LoRA(dropout=dropout)


@pytest.mark.parametrize("setting", [{"init": "xavier"}, {"init": None}, {"rslora": 1}, {"rslora": "yes"}])
def test_an_unknown_initialisation_or_switch_is_refused(setting):
    (name, value), = setting.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; accepted are"):
        mp.LoRA(**setting)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 9), alpha=st.floats(0.1, 100), dropout=st.floats(0, 0.99), rslora=st.booleans(),
       init=st.sampled_from(["kaiming", "gaussian"]), sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_any_accepted_settings_build_a_piece_that_starts_as_the_identity(rank, alpha, dropout, rslora, init, sizes):
    lora = mp.LoRA(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, init=init)
    piece = LowRank(lora, *sizes)
    x, y = torch.randn(2, sizes[1]), torch.randn(2, sizes[0])
    assert torch.equal(piece(x, y.clone()), y)
    random_state(piece)
    assert torch.linalg.matrix_rank(piece.delta()) <= rank
    assert sum(p.numel() for p in piece.parameters()) == lora.parameter_count(*sizes)
