"""Statements about 4-bit linear layers, models that are made of them, and what is plugged into those.

Oracle of QLoRA: Hugging Face PEFT on a base in bitsandbytes' own 4-bit layers, on the CPU. Both keep the same
codes (test_nf4.py), so what differs is the order in which float32 products are added up: 2e-5 of the largest
logit is allowed and about 1e-6 is seen. bitsandbytes has no float64.
"""

import copy
import io
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import anatomy, sockets
from minipeft.quant import nf4
from minipeft.quant.linear4bit import Linear4bit

from .families import FAMILIES, INNER, WIDTH, inputs
from .test_lora import Tiny, bytes_of, distance, logits_of, random_state, train

SEVERAL = ["llama", "gpt2", "phi3", "falcon", "bert", "distilbert", "t5"]


@pytest.fixture(autouse=True)
def readable(monkeypatch):
    """These are tests of the readable PyTorch; the compiled kernels have their own."""
    monkeypatch.setattr(nf4, "compiled", lambda t, kind: None)


def quantized(family, **settings):
    return mp.quantize(FAMILIES[family](), **settings)


def linears(model) -> dict[str, Linear4bit]:
    return {path: m for path, m in anatomy.base_modules(model).items() if isinstance(m, Linear4bit)}


def state_of(module) -> dict:
    return {name: t.clone() for name, t in module.state_dict().items()}


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_a_linear_layer_with_the_rounded_weight(bias, double_quant):
    torch.manual_seed(0)
    linear, x = nn.Linear(70, 33, bias), torch.randn(4, 5, 70, requires_grad=True)
    four = Linear4bit.of(linear, double_quant=double_quant)
    W = nf4.dequantize(nf4.quantize(linear.weight, double_quant=double_quant))
    assert torch.equal(four.weight, W) and 0.01 < (W - linear.weight).abs().max() < 0.05
    expected = nn.functional.linear(x, W, linear.bias)
    assert torch.allclose(four(x), expected, atol=1e-6)
    g = torch.randn_like(expected)
    ours, theirs = torch.autograd.grad(four(x), x, g)[0], torch.autograd.grad(expected, x, g)[0]
    assert torch.allclose(ours, theirs, atol=1e-6) and theirs.abs().max() > 0.1
    assert not list(p for p in four.parameters() if p.requires_grad)


def test_a_conv1d_is_turned_round():
    from transformers.pytorch_utils import Conv1D

    conv, x = Conv1D(12, 40), torch.randn(3, 40)
    four = Linear4bit.of(conv)
    assert (four.in_features, four.out_features, anatomy.is_transposed(four)) == (40, 12, False)
    assert torch.equal(four.weight, nf4.dequantize(nf4.quantize(conv.weight.T, double_quant=True)))
    assert (four(x) - conv(x)).abs().max() < 0.1 * conv(x).abs().max()


def test_the_backward_pass_keeps_codes_and_no_weight():
    four = Linear4bit.of(nn.Linear(256, 256))
    x, kept = torch.randn(2, 256, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = four(x)
    assert sum(kept) < 256 * 256 / 2
    y.sum().backward()
    assert torch.allclose(x.grad, four.weight.sum(0).expand(2, -1), atol=1e-4)


def test_a_trainable_bias_gets_its_gradient():
    four = Linear4bit.of(nn.Linear(8, 5))
    four.bias.requires_grad_(True)
    four(torch.randn(3, 4, 8)).sum().backward()
    assert torch.equal(four.bias.grad, torch.full((5,), 12.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_moving_to_a_dtype_changes_what_is_computed_in_and_no_code_or_scale(dtype):
    for double_quant in (False, True):
        four = Linear4bit.of(nn.Linear(70, 33), double_quant=double_quant)
        before, moved = four.q, copy.deepcopy(four).to(dtype)
        assert torch.equal(moved.packed, before.packed) and torch.equal(moved.q.absmax, before.absmax)
        assert moved.q.absmax.dtype == torch.float32
        assert moved.dtype == moved.weight.dtype == moved.bias.dtype == dtype
        assert moved(torch.randn(2, 70, dtype=dtype)).dtype == dtype
        assert torch.equal(moved.weight, nf4.dequantize(before, dtype))
        assert sockets.trainable_like(moved)["dtype"] == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_computes_in_its_dtype_forwards_and_backwards():
    four, x = Linear4bit.of(nn.Linear(64, 32)), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = four(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and distance(x.grad, four.weight.sum(0).expand(3, -1)) < 0.02


def test_the_layer_runs_on_the_meta_device_and_is_filled_from_a_state_dict():
    for double_quant in (False, True):
        four = Linear4bit.of(nn.Linear(70, 33), double_quant=double_quant)
        with torch.device("meta"):
            shape = Linear4bit.of(nn.Linear(70, 33), double_quant=double_quant)
        x = torch.empty(2, 70, device="meta", requires_grad=True)
        shape(x).sum().backward()
        assert shape(x).shape == (2, 33) and x.grad.shape == (2, 70) and shape.weight.is_meta
        shape.load_state_dict(four.state_dict(), assign=True)
        y = torch.randn(2, 70)
        assert torch.equal(shape(y), four(y))
        assert bytes_of(shape.to_empty(device="meta").to_empty(device="cpu").state_dict()) is not None


@pytest.mark.parametrize("double_quant", [True, False])
def test_whichever_tensor_of_the_codes_is_replaced_the_layer_computes_with_the_new_one(double_quant):
    torch.manual_seed(0)
    x, mine, other = torch.randn(3, 256), *(nn.Linear(256, 40) for _ in range(2))
    four, new = (mp.Linear4bit.of(linear, double_quant=double_quant) for linear in (mine, other))
    four(x)
    for name, tensor in new.named_buffers():
        setattr(four, name, tensor)
        assert torch.equal(four(x), torch.nn.functional.linear(x, nf4.dequantize(four.q), four.bias)), name
        assert any(getattr(part, field, None) is tensor for part in (four.q, four.q.scales)
                   for field in ("packed", "scales", "codes", "absmax", "offset")), name
    four.bias = new.bias
    assert torch.equal(four(x), new(x))
    four.double()
    assert four.q.dtype == torch.float64


def test_the_layer_compiles_whole():
    four, x = Linear4bit.of(nn.Linear(70, 33)), torch.randn(4, 70, requires_grad=True)
    compiled = torch.compile(four, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), four(x))
    ours, = torch.autograd.grad(compiled(x).square().sum(), x)
    theirs, = torch.autograd.grad(four(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_quantised_model_is_copied_and_stored_whole(way):
    model = quantized("gpt2")
    random_state(mp.attach(model, mp.LoRA(targets="all-linear")))
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(linears(model)["transformer.h.0.attn.c_attn"].requires_grad_(False)))
        x = torch.randn(2, 32)
        assert torch.equal(twin.weight, linears(model)["transformer.h.0.attn.c_attn"].weight) and twin(x).shape == (2, 96)
        return
    else:
        twin = mp.quantize(FAMILIES["gpt2"](seed=7))
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        twin.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        mp.attach(twin, mp.LoRA(targets="all-linear"))
        random_state(mp.adapters(twin)["default"])
    assert torch.equal(logits_of(twin, "gpt2"), logits_of(model, "gpt2"))


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("family", SEVERAL)
def test_quantising_replaces_the_linears_and_leaves_head_embeddings_and_norms(family):
    model = FAMILIES[family]()
    before, kinds = state_of(model), {path: type(m) for path, m in anatomy.base_modules(model).items()}
    wanted = set(anatomy.match(model, "all-linear")) - set(sockets.own_heads(model))
    expected = {path: nf4.dequantize(nf4.quantize(anatomy.weight_of(model.get_submodule(path)), double_quant=True))
                for path in wanted}
    assert mp.quantize(model) is model
    for path, module in anatomy.base_modules(model).items():
        assert type(module) is (Linear4bit if path in wanted else kinds[path])
    for path, W in expected.items():
        assert torch.equal(anatomy.weight_of(model.get_submodule(path)), W)
    after = model.state_dict()
    for name, t in before.items():
        assert name.rpartition(".")[0] in wanted or torch.equal(t, after[name]), name
    assert {p.path for b in anatomy.anatomy(model).blocks for p in b.projections} <= wanted
    assert torch.isfinite(logits_of(model, family)).all()


def test_names_in_skip_keep_their_precision_and_without_lm_head_the_head_is_quantised_too():
    model = quantized("llama", skip=("lm_head", "mlp", "layers.0.self_attn.q_proj"))
    kept = {path for path in anatomy.match(model, "all-linear") if path not in linears(model)}
    assert {p for p in kept if "mlp" in p} == kept - {"model.layers.0.self_attn.q_proj"} and len(kept) == 7
    assert isinstance(quantized("gpt_neox", skip=()).get_output_embeddings(), Linear4bit)
    assert type(quantized("gpt_neox").get_output_embeddings()) is nn.Linear


def test_a_tied_head_is_left_alone_whatever_skip_says():
    model = quantized("gpt2", skip=())
    assert model.lm_head.weight is model.transformer.wte.weight and type(model.lm_head) is nn.Linear


def test_a_layer_that_stands_at_two_places_is_one_layer_afterwards():
    tiny = Tiny()
    tiny.again = tiny.first
    mp.quantize(tiny)
    assert isinstance(tiny.first, Linear4bit) and tiny.again is tiny.first and isinstance(tiny.second, Linear4bit)


@pytest.mark.parametrize(("change", "settings", "error", "says"), [
    (None, {"skip": ("lm_haed",)}, ValueError, "'lm_haed'.*did you mean 'lm_head'"),
    (None, {"block_size": 48}, ValueError, "block_size is 48; accepted are 32"),
    (lambda m: mp.quantize(m), {}, ValueError, "q_proj' is in 4 bits already"),
    (lambda m: mp.attach(m, mp.LoRA()) and mp.merge(m), {}, ValueError, "'default' is merged into the base; unmerge"),
    (lambda m: m.double(), {}, TypeError, "q_proj holds torch.float64; accepted are float32"),
    (lambda m: m.model.layers[1].mlp.up_proj.weight.data[3].fill_(float("nan")), {}, ValueError,
     r"layers.1.mlp.up_proj: t\[3, 0\] is nan"),
])
def test_what_cannot_be_quantised_is_refused_and_nothing_has_changed(change, settings, error, says):
    model = FAMILIES["llama"]()
    if change is not None:
        change(model)
    before = bytes_of(model.state_dict())
    with pytest.raises(error, match=says):
        mp.quantize(model, **settings)
    assert bytes_of(model.state_dict()) == before
    with pytest.raises(TypeError, match="dict"):
        mp.quantize({})


def test_quantising_on_the_meta_device_gives_a_skeleton_that_a_state_dict_fills():
    with torch.device("meta"):
        skeleton = mp.quantize(FAMILIES["llama"]().to("meta"))
    model = quantized("llama")
    found = skeleton.load_state_dict(model.state_dict(), assign=True)
    assert not found.missing_keys and not found.unexpected_keys
    assert bytes_of(skeleton.state_dict()) == bytes_of(model.state_dict())


def test_the_report_counts_a_4_bit_weight_as_the_numbers_that_it_stands_for():
    plain, model = mp.parameter_report(FAMILIES["llama"]()), quantized("llama")
    assert mp.parameter_report(model).total == plain.total
    assert {m.name: m.total for m in mp.parameter_report(model).modules} == {m.name: m.total for m in plain.modules}
    mp.attach(model, mp.LoRA(rank=2))
    report = mp.parameter_report(model)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == plain.total + report.trainable


# ---------------------------------------------------------------- methods on it


METHODS = {"LoRA": mp.LoRA(targets="all-linear"), "DoRA": mp.DoRA(targets="all-linear"), "IA3": mp.IA3(),
           "PiSSA": mp.LoRA(targets="attention", init="pissa")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_methods_plug_in_unchanged_train_and_leave_no_trace(family, method):
    model = quantized(family)
    before, start = bytes_of(model.state_dict()), logits_of(model, family)
    adapter = mp.attach(model, METHODS[method])
    assert torch.allclose(logits_of(model, family), start, atol=1e-5)     # the identity at the start
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    train(model, family)
    assert distance(logits_of(model, family), start) > 1e-3
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model, family), start)


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_an_adapter_that_is_attached_stays_so_while_its_base_is_quantised(method):
    model, twin = FAMILIES["llama"](), quantized("llama")
    for m in (model, twin):
        random_state(mp.attach(m, METHODS[method]))
    mp.quantize(model)
    assert torch.equal(logits_of(model), logits_of(twin))
    mp.detach(model)
    assert torch.equal(logits_of(model), logits_of(quantized("llama")))


# ---------------------------------------------------------------- PEFT and bitsandbytes


def wide(family):
    """The family's model with whole blocks in each row of its weights: where processors have AVX-512, bitsandbytes 0.50
    gives other rows the scales of wrong blocks (an error of 0.24 in place of 0.09 on a 32 × 48 matrix)."""
    row = FAMILIES[family]
    return replace(row, settings=row.settings | {k: 64 for k, v in row.settings.items() if v in (WIDTH, INNER)})()


def in_bitsandbytes(model):
    """The model with bitsandbytes' 4-bit layers where ours would stand, made from the same weights. They compute in
    float32: its packed kernel for AVX512-BF16 computes in bfloat16, and refuses layers narrower than a block."""
    import bitsandbytes

    for path in [p for p in anatomy.match(model, "all-linear")]:
        old, (parent, _, leaf) = model.get_submodule(path), path.rpartition(".")
        W = anatomy.weight_of(old).detach().contiguous()
        new = bitsandbytes.nn.Linear4bit(W.shape[1], W.shape[0], old.bias is not None, torch.float32,
                                         compress_statistics=True, quant_type="nf4")
        new.weight = bitsandbytes.nn.Params4bit(W, requires_grad=False, compress_statistics=True, quant_type="nf4",
                                                module=new)
        new.support_avx512bf16_for_cpu = False
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model.eval()


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_qlora_computes_what_peft_computes_on_bitsandbytes_layers(family, method, tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    model, x = mp.quantize(wide(family)), inputs(family)
    base_logits = logits_of(model, family)
    adapter = random_state(mp.attach(model, type(METHODS[method])(rank=3, alpha=7, targets="all-linear")), size=0.1)
    mp.save_adapter(model, tmp_path)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(in_bitsandbytes(wide(family)), tmp_path, is_trainable=True).eval()
        expected = theirs(**x).logits
        draw = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
        (expected * draw).sum().backward()
    logits = model(**x).logits
    (logits * draw).sum().backward()
    assert distance(logits, expected) < 2e-5 and distance(base_logits, expected) > 1e-2
    named = dict(theirs.named_parameters())
    for path, piece in adapter.pieces().items():
        for symbol, key in {"A": "lora_A.default.weight", "B": "lora_B.default.weight",
                            "m": "lora_magnitude_vector.default.weight"}.items():
            if hasattr(piece, symbol):
                wanted = named[f"base_model.model.{path}.{key}"].grad
                assert distance(getattr(piece, symbol).grad, wanted) < 1e-4, (path, symbol)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("method", METHODS)
def test_merging_in_full_precision_changes_no_logit_and_unmerging_gives_the_codes_back(method):
    model = quantized("llama")
    before = bytes_of(model.state_dict())
    random_state(mp.attach(model, METHODS[method]))
    live = logits_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mp.merge(model) == {}
    assert distance(logits_of(model), live) < 5e-5
    assert all(m.merged is not None for path, m in linears(model).items() if path in mp.adapters(model)["default"].pieces())
    mp.unmerge(model)
    assert torch.equal(logits_of(model), live)
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before


@pytest.mark.parametrize("double_quant", [False, True])
def test_requantising_tells_what_it_lost_and_unmerging_gives_the_codes_back(double_quant):
    model = quantized("llama", double_quant=double_quant)
    before = bytes_of(model.state_dict())
    adapter = random_state(mp.attach(model, mp.LoRA(targets="all-linear")), size=0.05)
    live, shapes = logits_of(model), {name: t.shape for name, t in model.state_dict().items()}
    exact = {path: anatomy.weight_of(m) + adapter.pieces()[path].delta() for path, m in linears(model).items()}
    bases = {path: anatomy.weight_of(m) for path, m in linears(model).items()}
    with pytest.warns(UserWarning, match=r"merged into 14 weights of 4 bits; rounding moved them by \d+ %"):
        lost = mp.merge(model, requantize=True)
    assert lost.keys() == exact.keys()
    for path, module in linears(model).items():
        assert module.merged is None
        error = (module.weight - exact[path]).norm() / (exact[path] - bases[path]).norm()
        assert lost[path] == pytest.approx(error.item(), rel=1e-3) and lost[path] > 0.05
    assert {name: t.shape for name, t in model.state_dict().items()} == shapes
    assert 1e-4 < distance(logits_of(model), live) < 0.5
    mp.unmerge(model)
    assert torch.equal(logits_of(model), live)
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before


def test_two_adapters_are_merged_and_unmerged_in_any_order():
    model = quantized("llama")
    before = bytes_of(model.state_dict())
    random_state(mp.attach(model, mp.LoRA(), "a"), seed=1)
    random_state(mp.attach(model, mp.LoRA(targets="attention"), "b"), seed=2)
    both = logits_of(model)
    mp.merge(model, "a")
    mp.merge(model, "b")
    assert distance(logits_of(model), both) < 1e-5
    mp.unmerge(model, "a")
    assert distance(logits_of(model), both) < 1e-5
    mp.unmerge(model, "b")
    assert torch.equal(logits_of(model), both)
    mp.activate(model, None)
    assert bytes_of(model.state_dict()) == before


# ---------------------------------------------------------------- read layer by layer


def tokenizer_in(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(folder)


@pytest.mark.parametrize("settings", [{}, {"dtype": torch.bfloat16}, {"num_labels": 3}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "phi3"])
def test_a_base_read_in_4_bits_is_the_base_quantised_afterwards(family, settings, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path, max_shard_size="40KB")   # some shards
    tokenizer_in(tmp_path)
    torch.manual_seed(3)
    wanted = mp.quantize(mp.load_base(str(tmp_path), device="cpu", **settings)[0])
    torch.manual_seed(3)
    model, _ = mp.load_base(str(tmp_path), device="cpu", quantized=True, **settings)
    assert type(model) is type(wanted) and not model.training
    ours, theirs = state_of(model), state_of(wanted)
    heads = tuple(f"{head}." for head in sockets.own_heads(model)) if "num_labels" in settings else ()
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype and (torch.equal(ours[name], t) or name.startswith(heads or ("-",))), name
    assert {n for n, p in model.named_parameters()} == {n for n, p in wanted.named_parameters()}
    assert all(not t.is_meta for t in (*model.parameters(), *model.buffers()))
    if not heads:
        assert torch.equal(logits_of(model, family), logits_of(wanted, family))
        assert model.generation_config == wanted.generation_config if model.can_generate() else True
    assert all(t.isfinite().all() for t in model.parameters())


def test_buffers_that_a_checkpoint_holds_are_read_too(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    class WithScale(modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("scale", torch.ones(1))

    monkeypatch.setattr(modeling_llama, "LlamaMLP", WithScale)
    base = FAMILIES["llama"]()
    base.model.layers[1].mlp.scale.fill_(3)
    base.save_pretrained(tmp_path)
    tokenizer_in(tmp_path)
    model, _ = mp.load_base(str(tmp_path), device="cpu", quantized=True)
    assert [layer.mlp.scale.item() for layer in model.model.layers] == [1, 3]


def test_while_it_is_read_no_two_weights_are_in_memory_at_once(tmp_path, monkeypatch):
    import weakref

    import safetensors

    FAMILIES["llama"]().save_pretrained(tmp_path)
    tokenizer_in(tmp_path)
    alive, most, opened = [], [], safetensors.safe_open

    class Watched:
        def __init__(self, *args):
            self.file = opened(*args)

        def __enter__(self):
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, key):
            t = self.file.get_tensor(key).double().float()               # memory of its own
            linear = any(part in key for part in ("_proj",))
            alive[:] = [r for r in alive if r() is not None]
            if linear:
                alive.append(weakref.ref(t))
                most.append(len(alive))
            return t

    monkeypatch.setattr(safetensors, "safe_open", Watched)
    mp.load_base(str(tmp_path), device="cpu", quantized=True)
    assert len(most) == 14 and max(most) <= 2                             # this one, and the name of the one before


def test_a_base_without_safetensors_or_with_a_weight_too_few_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path)
    tokenizer_in(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: t for k, t in tensors.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"has no weight {name} of a LlamaForCausalLM"):
        mp.load_base(str(tmp_path), quantized=True)
    save_file({k: t[:5] if k == name else t for k, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight of .* is \(5, 32\), which does not fit"):
        mp.load_base(str(tmp_path), quantized=True)
    file.unlink()
    with pytest.raises(ValueError, match="no model.safetensors, which quantized=True reads"):
        mp.load_base(str(tmp_path), quantized=True)
