"""Statements about bottleneck adapters and BitFit. The oracle is written here, in float64: no other library has them."""

import copy
import math

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import anatomy, sockets
from minipeft.methods.adapters import Bottleneck, Entry

from .families import FAMILIES, inputs
from .test_lora import bytes_of, distance, logits_of, random_state, train
from .test_training import DATA, TOKENIZER, config, same, weights

PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]


# ---------------------------------------------------------------- the reference

class AfterLinear(nn.Module):
    """linear, then an adapter on what it returned."""

    def __init__(self, linear, f):
        super().__init__()
        self.linear, self.f, self.weight = linear, f, linear.weight  # T5 asks for the weight's dtype

    def forward(self, x):
        y = self.linear(x)
        return y + self.f(y)


class Beside(nn.Module):
    """A feed-forward with an adapter beside it."""

    def __init__(self, inner, f):
        super().__init__()
        self.inner, self.f = inner, f

    def forward(self, x):
        return self.inner(x) + self.f(x)


class BertOutput(nn.Module):
    """LayerNorm(dense(h) + f(input of the feed-forward) + residual); there, the two are the same."""

    def __init__(self, inner, f):
        super().__init__()
        self.inner, self.f = inner, f

    def forward(self, h, residual):
        return self.inner.LayerNorm(self.inner.dense(h) + self.f(residual) + residual)


# family -> (attention outputs, feed-forward outputs, feed-forwards and what stands beside them), by block
PLACES = {
    "llama": (["model.layers.{}.self_attn.o_proj"], ["model.layers.{}.mlp.down_proj"], "model.layers.{}.mlp", Beside),
    "gpt2": (["transformer.h.{}.attn.c_proj"], ["transformer.h.{}.mlp.c_proj"], "transformer.h.{}.mlp", Beside),
    "bert": (["bert.encoder.layer.{}.attention.output.dense"], ["bert.encoder.layer.{}.output.dense"],
             "bert.encoder.layer.{}.output", BertOutput),
    "t5": (["encoder.block.{}.layer.0.SelfAttention.o", "decoder.block.{}.layer.0.SelfAttention.o",
            "decoder.block.{}.layer.1.EncDecAttention.o"],
           ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"],
           "*.DenseReluDense", Beside),
}


def reference(family, settings, weights, blocks=(0, 1)):
    """The family's model in float64 with adapters built in by hand. weights: path -> (W_d, b_d, W_u, b_u, LN or None)."""
    model = FAMILIES[family]().double()
    attention, feed_forward, whole, beside = PLACES[family]
    places = (attention if settings.placement == "houlsby" else []) + feed_forward
    used = set()
    for i in blocks:
        for path in (place.format(i) for place in places):
            Wd, bd, Wu, bu, norm = weights[path]
            used.add(path)

            def f(h, Wd=Wd, bd=bd, Wu=Wu, bu=bu, norm=norm):
                if norm is not None:
                    spread = ((h - h.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
                    h = norm[0] * (h - h.mean(-1, keepdim=True)) / (spread + 1e-5) ** 0.5 + norm[1]
                z = torch.einsum("md,btd->btm", Wd, h) + bd
                z = z * (z > 0) if settings.activation == "relu" else z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
                return settings.scale * (torch.einsum("dm,btm->btd", Wu, z) + bu)

            if settings.placement != "parallel":
                where, kind = path, AfterLinear
            else:
                where, kind = (path.rpartition(".")[0] if family == "t5" else whole.format(i)), beside
            parent, _, leaf = where.rpartition(".")
            setattr(model.get_submodule(parent), leaf, kind(model.get_submodule(where), f))
    assert used == set(weights)
    return model


def weights_of(adapter):
    return {path: (p.down.weight, p.down.bias, p.up.weight, p.up.bias, p.norm and (p.norm.weight, p.norm.bias))
            for path, p in adapter.pieces().items() if isinstance(p, Bottleneck)}


def loss_of(logits):
    draw = torch.Generator().manual_seed(5)
    return (logits * torch.randn(logits.shape, generator=draw, dtype=logits.dtype)).sum()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", PLACES)
def test_an_adapter_computes_what_the_formula_says_and_has_its_gradients(family, placement):
    for settings in (mp.BottleneckAdapter(5, placement, "relu", scale=2.5, layer_norm=True),
                     mp.BottleneckAdapter(3, placement, "gelu", skip_layers=1)):
        model, x = FAMILIES[family]().double(), inputs(family)
        base = logits_of(model, family)
        adapter = random_state(mp.attach(model, settings), seed=3)
        oracle = reference(family, settings, weights_of(adapter), range(settings.skip_layers, 2))
        if family == "bert":
            oracle.classifier = adapter.get_submodule("classifier").copy
        logits, expected = model(**x).logits, oracle(**x).logits
        assert distance(logits, expected) < 1e-9 and distance(base, expected) > 1e-2
        own = list(adapter.parameters())
        for ours, theirs in zip(torch.autograd.grad(loss_of(logits), own),
                                torch.autograd.grad(loss_of(expected), own), strict=True):
            assert distance(ours, theirs) < 1e-9


# ---------------------------------------------------------------- before, while and after training

@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon", "opt", "bert", "t5"])
def test_an_adapter_starts_within_a_fiftieth_of_the_identity(family, placement):
    model = FAMILIES[family]()
    before = logits_of(model, family)
    torch.manual_seed(0)
    mp.attach(model, mp.BottleneckAdapter(16, placement))
    assert 0 < distance(logits_of(model, family), before) < 0.02
    mp.detach(model)
    mp.attach(model, mp.BottleneckAdapter(16, placement, init_std=0))
    assert torch.equal(logits_of(model, family), before)


@pytest.mark.parametrize(("family", "placement"), [("llama", "parallel"), ("gpt2", "houlsby"), ("bert", "parallel"),
                                                   ("t5", "houlsby")])
def test_training_changes_the_adapter_and_no_byte_of_the_base(family, placement):
    model = FAMILIES[family]()
    before, start = bytes_of(model.state_dict()), logits_of(model, family)
    torch.manual_seed(0)
    adapter = mp.attach(model, mp.BottleneckAdapter(4, placement, "gelu"))
    first = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    train(model, family)
    assert bytes_of(model.state_dict()) == before
    assert not any(torch.equal(p, first[n]) for n, p in adapter.named_parameters())
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model, family), start)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_exactly_the_adapters_train_and_their_number_is_the_closed_formula(placement):
    for layer_norm in (False, True):
        model, method = FAMILIES["gpt2"](), mp.BottleneckAdapter(5, placement, layer_norm=layer_norm)
        mp.attach(model, method, "mine")
        places = {"houlsby": ("attn.c_proj", "mlp.c_proj")}.get(placement, ("mlp.c_proj",))
        tensors = ["down.weight", "down.bias", "up.weight", "up.bias"] + ["norm.weight", "norm.bias"] * layer_norm
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        assert set(trained) == {f"minipeft.mine.transformer.h.{i}.{place}.{t}"
                                for i in (0, 1) for place in places for t in tensors}
        each = 2 * 5 * 32 + 5 + 32 + 64 * layer_norm                     # 2 m d + m + d (+ 2 d)
        assert sum(trained.values()) == 2 * len(places) * each and method.parameter_count(32) == each


def test_adapterdrop_leaves_the_first_blocks_of_each_side_alone():
    model = FAMILIES["t5_gated"]()
    adapter = mp.attach(model, mp.BottleneckAdapter(4, "pfeiffer", skip_layers=1))
    assert [path.split(".layer.")[0] for path in adapter.pieces()] == ["encoder.block.1", "decoder.block.1",
                                                                       "decoder.block.2"]
    with pytest.raises(ValueError, match="skip_layers is 2; accepted is a whole number below 2, .* encoder blocks"):
        mp.attach(model, mp.BottleneckAdapter(skip_layers=2), "none")


def test_the_start_is_a_normal_cut_off_at_two_deviations():
    torch.manual_seed(0)
    W = Bottleneck(mp.BottleneckAdapter(300, init_std=0.1), 400).down.weight
    cut = torch.randn(10**6).mul(0.1)
    cut = cut[cut.abs() < 0.2]
    assert 0.199 < W.abs().max() < 0.2001 and abs(W.std() / cut.std() - 1) < 0.01 and abs(W.mean()) < 1e-3


def test_a_16_bit_base_keeps_32_bit_adapters_and_its_own_output_type():
    model = FAMILIES["llama"]().bfloat16()
    adapter = mp.attach(model, mp.BottleneckAdapter(4, "parallel", layer_norm=True))
    out = model(**inputs("llama")).logits
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", [mp.BottleneckAdapter(4, "parallel"), mp.DoRA(2, targets="all-linear"), mp.IA3()])
def test_recomputed_activations_give_the_same_gradients(method):
    found = []
    for recompute in (False, True):
        model = FAMILIES["opt"]().train()
        if recompute:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        adapter = random_state(mp.attach(model, method))
        loss_of(model(**inputs("opt"), use_cache=False).logits).backward()
        found.append({n: p.grad for n, p in adapter.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0 and distance(found[1][name], gradient) < 1e-6, name


# ---------------------------------------------------------------- several adapters on one base

def test_switching_stacking_and_averaging_adapters():
    model, alone = FAMILIES["bert"]().double(), {}
    for seed, name in enumerate("ab"):
        random_state(mp.attach(model, mp.BottleneckAdapter(4, "pfeiffer"), name), seed)
        mp.activate(model, name)
        alone[name] = logits_of(model, "bert")
    for name in "abab":
        mp.activate(model, name)
        assert torch.equal(logits_of(model, "bert"), alone[name])
    stacked = {}
    for order in ("ab", "ba"):                              # the second works on what the first returned
        mp.activate(model, list(order))
        y = torch.randn(2, 3, 32, dtype=torch.float64)
        first, second = (mp.adapters(model)[n].pieces()["bert.encoder.layer.0.output.dense"] for n in order)
        h = model.bert.encoder.layer[0].output.dense(torch.zeros(2, 3, 48, dtype=torch.float64))
        wanted = second(y, first(y, model.bert.encoder.layer[0].output.dense.bias.expand(2, 3, 32)))
        assert torch.allclose(h, wanted, rtol=1e-12)
        stacked[order] = logits_of(model, "bert")
    assert distance(stacked["ab"], stacked["ba"]) > 1e-3

    before = {n: bytes_of(dict(a.named_parameters())) for n, a in mp.adapters(model).items()}
    mean = mp.average_adapters(model, ["a", "b"], "mean")
    a, b = (dict(mp.adapters(model)[n].named_parameters()) for n in "ab")
    for name, p in mean.named_parameters():
        assert torch.allclose(p, (a[name] + b[name]) / 2, rtol=1e-12), name
    assert model.minipeft.active == ("mean",) and distance(logits_of(model, "bert"), alone["a"]) > 1e-3
    assert before == {n: bytes_of(dict(mp.adapters(model)[n].named_parameters())) for n in "ab"}


def test_what_cannot_be_averaged_is_refused():
    model = FAMILIES["llama"]()
    mp.attach(model, mp.BottleneckAdapter(4), "a")
    mp.attach(model, mp.BottleneckAdapter(5), "b")
    mp.attach(model, mp.LoRA(), "lora")
    for names, error, words in [("ab", ValueError, "at least two"), (["a", "a"], ValueError, "at least two"),
                                (["a", "c"], ValueError, "no adapter is called 'c'"),
                                (["a", "b"], ValueError, "same settings"),
                                (["a", "lora"], TypeError, "'lora' is LoRA; only bottleneck adapters")]:
        with pytest.raises(error, match=words):
            mp.average_adapters(model, names, "mean")
    assert set(mp.adapters(model)) == {"a", "b", "lora"} and model.minipeft.active == ("a", "b", "lora")


@pytest.mark.parametrize("order", [("ad", "lora"), ("lora", "ad"), ("dora", "lora"), ("lora", "dora"), ("ia3", "ad")])
def test_two_methods_at_one_place_have_the_gradients_of_their_composition(order):
    methods = {"ad": mp.BottleneckAdapter(3, "parallel"), "lora": mp.LoRA(2, targets="all-linear"),
               "dora": mp.DoRA(2, targets="all-linear"), "ia3": mp.IA3()}
    model = FAMILIES["falcon"]().double()                   # adds to what its linears return, in place
    for seed, name in enumerate(order):
        random_state(mp.attach(model, methods[name], name), seed)
    x = inputs("falcon")
    own = [p for adapter in mp.adapters(model).values() for n, p in adapter.named_parameters()
           if not isinstance(adapter.method, mp.DoRA) or n.endswith(".m")]  # DoRA's norm has no gradient
    draw = torch.Generator().manual_seed(2)
    step = [torch.randn(p.shape, generator=draw, dtype=p.dtype) * 1e-6 for p in own]
    gradients = torch.autograd.grad(loss_of(model(**x).logits), own)
    predicted, values = sum((g * d).sum() for g, d in zip(gradients, step, strict=True)), []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(own, step, strict=True):
                p += sign * d
            values.append(loss_of(model(**x).logits))
    assert math.isclose((values[0] - values[1]) / 2, predicted, rel_tol=1e-4)


# ---------------------------------------------------------------- saved and merged

@pytest.mark.parametrize(("family", "method"), [("llama", mp.BottleneckAdapter(4, "parallel", "gelu", 4.0, True)),
                                                ("bert", mp.BottleneckAdapter(4, skip_layers=1)), ("bert", mp.BitFit())])
def test_a_saved_adapter_comes_back_whole(family, method, tmp_path):
    model = FAMILIES[family]()
    random_state(mp.attach(model, method))
    mp.save_adapter(model, tmp_path)
    other = FAMILIES[family]()
    adapter = mp.load_adapter(other, tmp_path)
    assert adapter.method == method and torch.equal(logits_of(other, family), logits_of(model, family))


def test_a_bottleneck_that_the_file_does_not_have_is_refused_before_it_is_built(tmp_path):
    model = FAMILIES["llama"]()
    mp.attach(model, mp.BottleneckAdapter(4))
    mp.save_adapter(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"bottleneck": 4', '"bottleneck": 1000000000000'))
    with pytest.raises(ValueError, match="bottleneck is 1000000000000, but .* has 4 rows"):
        mp.load_adapter(FAMILIES["llama"](), tmp_path)


def test_a_bottleneck_adapter_cannot_be_merged():
    for placement in PLACEMENTS:
        model = FAMILIES["llama"]()
        before = bytes_of(model.state_dict())
        mp.attach(model, mp.BottleneckAdapter(4, placement))
        with pytest.raises(TypeError, match="BottleneckAdapter cannot be merged"):
            mp.merge(model)
        assert bytes_of(model.state_dict()) == before


@pytest.mark.parametrize(("setting", "words"), [
    ({"bottleneck": 0}, "bottleneck is 0; accepted is a whole number from 1"), ({"bottleneck": True}, "bottleneck is"),
    ({"placement": "houslby"}, "did you mean 'houlsby'"), ({"activation": "tanh"}, "accepted are 'relu', 'gelu'"),
    ({"scale": 0}, "scale is 0"), ({"scale": math.nan}, "scale is nan"), ({"init_std": -1}, "init_std is -1"),
    ({"skip_layers": -1}, "skip_layers is -1"), ({"layer_norm": 1}, "layer_norm is 1"),
])
def test_a_setting_that_is_none_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        mp.BottleneckAdapter(**setting)


# ---------------------------------------------------------------- BitFit

@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_bitfit_trains_every_bias_and_equals_the_base_with_those_biases(family):
    model, oracle = FAMILIES[family]().double(), FAMILIES[family]().double()
    before, base = bytes_of(model.state_dict()), logits_of(model, family)
    adapter = mp.attach(model, mp.BitFit())
    assert torch.equal(logits_of(model, family), base)
    heads = sockets.own_heads(model)
    biases = {n.removesuffix(".bias"): p for n, p in oracle.named_parameters()
              if n.endswith("bias") and n.split(".")[0] not in heads}
    changes = {path: piece for path, piece in adapter.pieces().items() if path not in heads}
    assert changes.keys() == biases.keys()
    assert sum(p.d.numel() for p in changes.values()) == sum(p.numel() for p in biases.values())
    random_state(adapter)
    with torch.no_grad():
        for path, p in biases.items():
            p += changes[path].d
    for head in heads:
        oracle.set_submodule(head, copy.deepcopy(adapter.get_submodule(head).copy))
    live = logits_of(model, family)
    assert distance(live, logits_of(oracle, family)) < 1e-12 and distance(live, base) > 1e-2
    mp.merge(model)
    assert distance(logits_of(model, family), live) < 1e-12
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before


def test_bitfit_says_where_there_is_no_bias():
    with pytest.raises(ValueError, match="no linear and no norm of this LlamaForCausalLM has a bias"):
        mp.attach(FAMILIES["llama"](), mp.BitFit())


def test_adapters_stand_in_every_family_where_the_anatomy_says():
    for family in FAMILIES:
        model = FAMILIES[family]()
        blocks = anatomy.anatomy(model).blocks
        for placement in PLACEMENTS:
            pieces = list(mp.BottleneckAdapter(4, placement).pieces(model))
            own = [path for _, path, piece in pieces if isinstance(piece, Bottleneck)]
            wanted = sum(1 + (len(b.attentions) if placement == "houlsby" else 0) for b in blocks)
            assert len(own) == wanted and len(pieces) - wanted == len(blocks) * (placement == "parallel")
            assert all(isinstance(piece, Bottleneck | Entry) for _, _, piece in pieces)


# ---------------------------------------------------------------- mp.fit

@pytest.mark.parametrize(("family", "method"), [
    ("t5", mp.BottleneckAdapter(4, "parallel", "gelu")), ("gpt2", mp.DoRA(2, targets="all-linear")), ("llama", mp.IA3())])
def test_fit_lowers_the_loss_and_a_run_that_broke_off_goes_on_to_the_same_bits(family, method, tmp_path):
    def run(folder, seed=0, stop=0):
        model = FAMILIES[family]()
        torch.manual_seed(seed)
        mp.attach(model, method)

        def watch(entry):
            if entry["step"] == stop:
                raise InterruptedError

        mp.fit(model, TOKENIZER, DATA, config(steps=7, lr=0.05, folder=tmp_path / folder, save_every=2, resume=True),
               watch=watch)
        return model

    whole = run("whole")
    assert mp.evaluate(whole, TOKENIZER, DATA)["loss"] < mp.evaluate(FAMILIES[family](), TOKENIZER, DATA)["loss"] - 0.1
    with pytest.raises(InterruptedError):
        run("cut", stop=5)
    resumed = run("cut", seed=1)                            # it starts elsewhere, and what was saved is put over it
    assert same(weights(whole), weights(resumed))
    exported = FAMILIES[family]()
    mp.load_adapter(exported, tmp_path / "cut" / "step-00000007" / "adapters" / "default")
    assert torch.equal(logits_of(exported, family), logits_of(resumed, family))
