"""Checkpoints are Hugging Face PEFT's, both ways; what does not fit is refused and changes nothing."""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minipeft as mp
from minipeft import anatomy, checkpoint

from .families import FAMILIES, inputs

peft = pytest.importorskip("peft")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def random_state(adapter, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.3)
    return adapter


def saved(folder, family="llama", **settings):
    """A checkpoint of a random LoRA, written by us; the model it was on."""
    model = FAMILIES[family]()
    random_state(mp.attach(model, mp.LoRA(**({"rank": 2} | settings))))
    mp.save_adapter(model, folder)
    return model


def logits_of(model, family="llama"):
    with torch.no_grad():
        return model(**inputs(family)).logits


def distance(a, b) -> float:
    assert a.shape == b.shape and b.abs().max() > 0
    return ((a - b).abs().max() / b.abs().max()).item()


def in_peft(model, *args, **kwargs):
    """PEFT's model around ours: from a checkpoint's folder, or from a LoraConfig's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if args:
            return peft.PeftModel.from_pretrained(model, *args, **kwargs).eval()
        return peft.get_peft_model(model, peft.LoraConfig(**kwargs)).eval()


def peft_save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def modules_in(model) -> set[str]:
    """Paths of the modules on which PEFT has put LoRA."""
    from peft.tuners.lora import LoraLayer
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def train(model, family, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs(family)).logits.log_softmax(-1)[..., 1].mean().backward()
        optimizer.step()


def state_of(model) -> tuple:
    """Everything an attempt to load might change: values, flags, hooks, and what minipeft keeps."""
    tensors = {name: (hashlib.sha256(p.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest(),
                      p.requires_grad, id(p)) for name, p in model.named_parameters()}
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()]
    home = getattr(model, "minipeft", None)
    return tensors, hooks, list(model.state_dict()), home and (home.active, home.merged, list(home._modules),
                                                               {p: list(plug.pieces) for p, plug in home.plugs.items()})


@contextlib.contextmanager
def refused(model, words, error=ValueError):
    before = state_of(model)
    with pytest.raises(error, match=words) as told:
        yield told
    assert state_of(model) == before


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    for field, value in fields.items():
        config[field] = value
    (folder / CONFIG).write_text(json.dumps(config))


# ---------------------------------------------------------------- both ways, with the real PEFT


@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_trained_opens_here_and_goes_back(family, tmp_path):
    task = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}[FAMILIES[family].kind]
    # mostly PEFT's own choice for the family
    targets = {"distilbert": ["q_lin", "v_lin"], "phi3": ["qkv_proj"]}.get(family)
    theirs = in_peft(FAMILIES[family]().double(), task_type=task, r=3, lora_alpha=5, use_rslora=family == "phi",
                     target_modules=targets)
    train(theirs, family)
    peft_save(theirs, tmp_path / "theirs")

    model = FAMILIES[family]().double()
    adapter = mp.load_adapter(model, tmp_path / "theirs", "mine")
    assert distance(logits_of(model, family), logits_of(theirs, family)) < 1e-12
    assert distance(logits_of(theirs, family), logits_of(FAMILIES[family]().double(), family)) > 1e-3
    assert adapter.method.rank == 3 and adapter.method.alpha == 5 and adapter.method.rslora == (family == "phi")
    assert all(p.requires_grad for p in adapter.parameters())

    train(model, family)
    mp.save_adapter(model, tmp_path / "ours", "mine")
    back = in_peft(FAMILIES[family]().double(), tmp_path / "ours")
    assert distance(logits_of(model, family), logits_of(back, family)) < 1e-12
    assert distance(logits_of(model, family), logits_of(theirs, family)) > 1e-3
    peft_save(back, tmp_path / "again")
    assert load_file(tmp_path / "again" / TENSORS).keys() == load_file(tmp_path / "ours" / TENSORS).keys()


@pytest.mark.parametrize(("family", "targets"), [
    ("llama", r".*layers\.1\..*(q_proj|up_proj)"), ("gpt2", ("transformer.h.0.mlp.c_proj",)), ("bert", "attention"),
    ("gpt2", ("attn.c_proj", "c_fc")), ("t5", r"encoder\..*\.(q|v)"), ("phi3", "all-linear"), ("opt", ("fc1",)),
    ("roberta", ("dense",)), ("llama", ("lm_head", "q_proj"))])
def test_peft_finds_exactly_the_modules_that_were_adapted(family, targets, tmp_path):
    model = saved(tmp_path, family, targets=targets)
    config = json.loads((tmp_path / CONFIG).read_text())
    paths = set(anatomy.match(model, targets)) - {"classifier.dense"}
    assert len(config["target_modules"]) <= len(paths)
    theirs = in_peft(FAMILIES[family](), tmp_path)
    assert modules_in(theirs) == paths
    assert distance(logits_of(theirs, family), logits_of(model, family)) < 1e-5
    again = FAMILIES[family]()
    adapter = mp.load_adapter(again, tmp_path)
    assert adapter.pieces().keys() == mp.adapters(model)["default"].pieces().keys()
    assert torch.equal(logits_of(again, family), logits_of(model, family))


def test_where_no_suffix_is_exact_the_targets_are_an_expression(tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(3, 3)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.inner = torch.nn.Linear(3, 3), Inner()

        def forward(self, x):
            return self.inner.lin(self.lin(x))

    model = Outer()
    random_state(mp.attach(model, mp.LoRA(targets="(lin|nothing)")))
    mp.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "(lin)"
    other = Outer()
    assert list(mp.load_adapter(other, tmp_path).pieces()) == ["lin"]
    assert modules_in(in_peft(Outer(), tmp_path)) == {"lin"}


@pytest.mark.parametrize("fields", [
    {"target_modules": r".*\.layers\.0\.self_attn\.[qv]_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj", "query", "c_attn"]},
    {"target_modules": ["q_proj", "k_proj", "down_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 5, "v_proj": 7}, "alpha_pattern": {r".*proj": 3}},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "init_lora_weights": False},
    {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.25, "task_type": "CAUSAL_LM"},
    {"target_modules": ["lm_head", "v_proj"]},  # PEFT stores the base's own head beside it
], ids=lambda f: "-".join(f))
def test_every_way_in_which_peft_names_its_modules_is_read(fields, tmp_path):
    theirs = random_state(in_peft(FAMILIES["llama"]().double(), r=2, **fields))
    peft_save(theirs, tmp_path)
    for key in ("target_modules", "exclude_modules"):  # as the user wrote it, not as PEFT resolved it
        if key in fields:
            edit_config(tmp_path, **{key: fields[key]})
    model = FAMILIES["llama"]().double()
    adapter = mp.load_adapter(model, tmp_path)
    assert set(adapter.pieces()) == modules_in(theirs)
    assert distance(logits_of(model), logits_of(theirs)) < 1e-12
    assert adapter.method.dropout == fields.get("lora_dropout", 0)
    assert adapter.method.init == ("gaussian" if fields.get("init_lora_weights") == "gaussian" else "kaiming")


def test_a_classifier_without_a_head_in_the_checkpoint_keeps_the_bases(tmp_path):
    theirs = random_state(in_peft(FAMILIES["bert"]().double(), r=2, target_modules=["query"]))
    peft_save(theirs, tmp_path / "a")
    model = FAMILIES["bert"]().double()
    adapter = mp.load_adapter(model, tmp_path / "a")
    assert "classifier" not in adapter.pieces()
    mp.save_adapter(model, tmp_path / "b")
    assert distance(logits_of(in_peft(FAMILIES["bert"]().double(), tmp_path / "b"), "bert"),
                    logits_of(theirs, "bert")) < 1e-12


def test_a_model_without_any_head_travels_too(tmp_path):
    def bare():
        return FAMILIES["llama"]().double().model

    model, x = bare(), inputs("llama")
    random_state(mp.attach(model, mp.LoRA()))
    mp.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "FEATURE_EXTRACTION"
    assert distance(model(**x).last_hidden_state, in_peft(bare(), tmp_path)(**x).last_hidden_state) < 1e-12


def test_16_bit_files_and_16_bit_bases_give_32_bit_pieces(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({key: t.bfloat16() for key, t in tensors.items()}, tmp_path / TENSORS)
    model = FAMILIES["llama"]().half()
    adapter = mp.load_adapter(model, tmp_path)
    for path, piece in adapter.pieces().items():
        assert piece.A.dtype == piece.B.dtype == torch.float32
        assert torch.equal(piece.A, tensors[f"base_model.model.{path}.lora_A.weight"].bfloat16().float())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rank=st.integers(1, 5), alpha=st.one_of(st.integers(1, 64), st.floats(0.01, 1e3)), dropout=st.floats(0, 0.9),
       init=st.sampled_from(["kaiming", "gaussian"]), rslora=st.booleans(),
       targets=st.lists(st.sampled_from(["q_proj", "k_proj", "up_proj", "layers.0.mlp.down_proj"]),
                        min_size=1, unique=True))
def test_settings_come_back_as_they_were(tmp_path, rank, alpha, dropout, init, rslora, targets):
    lora = mp.LoRA(rank=rank, alpha=alpha, dropout=dropout, init=init, rslora=rslora, targets=targets)
    model = FAMILIES["llama"]()
    before = mp.attach(model, lora)
    mp.save_adapter(model, tmp_path)
    after = mp.load_adapter(model, tmp_path, "again")
    assert {**vars(after.method), "targets": 0} == {**vars(lora), "targets": 0}
    assert after.pieces().keys() == before.pieces().keys()
    assert set(after.method.targets) <= {"q_proj", "k_proj", "up_proj", "0.mlp.down_proj"}
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert (theirs.r, theirs.lora_alpha, theirs.lora_dropout, theirs.use_rslora) == (rank, alpha, dropout, rslora)


# ---------------------------------------------------------------- beside other adapters


def test_loading_activates_the_adapter_alone_and_leaves_the_others_be(tmp_path):
    alone = logits_of(saved(tmp_path))
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, mp.LoRA(targets="all-linear"), "first"), 7)
    mp.attach(model, mp.LoRA(), "second")
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = mp.load_adapter(model, tmp_path, "third")
    assert model.minipeft.active == ("third",) and mp.adapters(model)["third"] is adapter
    assert torch.equal(logits_of(model), alone)
    for name, p in before.items():
        assert torch.equal(model.get_parameter(name), p)
    with refused(model, "'third' is attached already"):
        mp.load_adapter(model, tmp_path, "third")
    mp.activate(model, "first")
    mp.merge(model, "first")
    with refused(model, "'first' is merged into the base; unmerge it first"):
        mp.load_adapter(model, tmp_path, "fourth")


def test_a_loaded_adapter_follows_the_mode_of_the_model_and_trains_on(tmp_path):
    saved(tmp_path, dropout=0.5)
    model = FAMILIES["llama"]().train()
    adapter = mp.load_adapter(model, tmp_path)
    assert all(m.training for m in adapter.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"minipeft.default.{name}" for name, _ in adapter.named_parameters()}


def test_the_thirtieth_adapter_takes_no_more_work_than_the_second(tmp_path):
    saved(tmp_path, targets="all-linear")
    model, work = FAMILIES["llama"](), []
    for i in range(30):
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        sys.setprofile(count)  # of every call of a function: the same number at every run
        try:
            mp.load_adapter(model, tmp_path, f"number{i}")
        finally:
            sys.setprofile(None)
        work.append(calls)
    assert 5000 < work[1] and work[-1] < 1.02 * work[1], work


# ---------------------------------------------------------------- what is refused: settings


@pytest.mark.parametrize(("fields", "words"), [
    ({"peft_type": "LORAA"}, r"peft_type is 'LORAA'; did you mean 'LORA'\? \(accepted: .*LORA"),
    ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
    ({"peft_type": None}, "peft_type is None"),
    ({"bias": "all"}, "bias is 'all'; accepted is \"none\""),
    ({"lora_bias": True}, "lora_bias is True, which minipeft cannot represent"),
    ({"use_dora": "yes"}, "use_dora is .yes.; accepted is false"),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters is"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    ({"a_field_of_next_year": 3}, "a_field_of_next_year is 3, which minipeft cannot represent"),
    ({"modules_to_save": ["embed_tokens"]}, r"so model.embed_tokens is trained whole; .* \(this model has none\)"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; accepted is a list"),
    ({"target_modules": None}, "target_modules is None; accepted is a list of names, or a regular expression"),
    ({"target_modules": []}, r"target_modules is \[\]"),
    ({"target_modules": ["q_proj", 3]}, r"target_modules is \['q_proj', 3\]"),
    ({"target_modules": ["query", "value"]}, r"means no module of this LlamaForCausalLM \(modules: q_proj, k_proj"),
    ({"target_modules": "q_proj"}, "means no module"),  # to PEFT a string is an expression for the whole path
    ({"target_modules": "(q_proj"}, "adapter_config.json: .*unterminated"),
    ({"target_modules": ["q_proj", "mlp"]}, "which means model.layers.0.mlp, a LlamaMLP; accepted are linear"),
    ({"target_modules": ["embed_tokens"]}, "which means model.embed_tokens, a Embedding"),
    ({"layers_to_transform": "first"}, "adapter_config.json"),
    ({"r": 4}, r"r is 4, but base_model.model.model.layers.\d.self_attn.._proj.lora_A.weight has 2 rows"),
    ({"r": 10**12}, "r is 1000000000000, but"),
    ({"r": "2"}, "r is '2', but"),
    ({"r": None}, "r is None, but"),
    ({"rank_pattern": {"v_proj": 4}}, r"r is 2 for model.layers.0.self_attn.q_proj and 4 for .*v_proj; accepted is o"),
    ({"alpha_pattern": {"layers.1.self_attn.v_proj": 4}}, "lora_alpha is 16 for .* and 4 for"),
    ({"rank_pattern": ["q_proj"]}, "accepted is a table"),
    ({"lora_alpha": 0}, "alpha is 0; accepted is a number above 0"),
    ({"lora_alpha": 10**400}, "adapter_config.json"),
    ({"lora_dropout": 1.5}, "dropout is 1.5; accepted"),
    ({"lora_dropout": None}, "dropout is None; accepted"),
    ({"use_rslora": "yes"}, "rslora is 'yes'; accepted"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes more than A and B"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_settings_that_mean_nothing_here_are_refused_by_name(fields, words, tmp_path):
    saved(tmp_path)
    edit_config(tmp_path, **fields)
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, mp.LoRA(), "other"))
    with refused(model, words) as told:
        mp.load_adapter(model, tmp_path)
    assert str(tmp_path) in str(told.value) and CONFIG in str(told.value)


# ---------------------------------------------------------------- what is refused: another base, other tensors


def other(family="llama", **changes):
    from dataclasses import replace
    row = FAMILIES[family]
    return replace(row, settings={**row.settings, **changes})()


@pytest.mark.parametrize(("made_on", "words"), [
    (lambda: other(num_hidden_layers=3),
     r"4 are surplus \(base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight; .*; …\)"),
    (lambda: other(num_hidden_layers=1), r"4 are missing \(base_model.model.model.layers.1.self_attn.q_proj.lora_A"),
    (lambda: other(hidden_size=64, head_dim=8),
     r"shape \(base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is \(2, 64\), expected \(2, 32\)"),
    (lambda: other(num_key_value_heads=4),
     r"2 are of another shape .*v_proj.lora_B.weight is \(32, 2\), expected \(16, 2\)"),
    (lambda: FAMILIES["gpt2"](), r"means no module .*It was made for GPT2LMHeadModel; this is LlamaForCausalLM"),
    (lambda: FAMILIES["llama"]().model, r"4 are missing|8 are missing"),
    (lambda: FAMILIES["bert"](), "It was made for BertForSequenceClassification"),
    (lambda: FAMILIES["opt"](), r"made for OPTForCausalLM; this is LlamaForCausalLM"),
])
def test_a_checkpoint_for_another_base_is_refused(made_on, words, tmp_path):
    source = made_on()
    targets = ("q_proj", "v_proj") if type(source).__name__[:2] in ("Ll", "OP") else "attention"
    mp.attach(source, mp.LoRA(rank=2, targets=targets))
    mp.save_adapter(source, tmp_path)
    model = FAMILIES["llama"]()
    with refused(model, words):
        mp.load_adapter(model, tmp_path)


def test_a_head_with_other_labels_and_a_head_where_there_is_none_are_refused(tmp_path):
    saved(tmp_path, "bert", targets=("query",))
    model = other("bert", num_labels=7)
    with refused(model, r"classifier.weight is \(3, 32\), expected \(7, 32\)"):
        mp.load_adapter(model, tmp_path)
    bare = FAMILIES["bert"]().bert
    with refused(bare, "made for BertForSequenceClassification; this is BertModel"):
        mp.load_adapter(bare, tmp_path)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(KEY), rf"1 is missing \({KEY}\)"),
    (lambda t: t.update(extra=torch.zeros(2)), r"1 is surplus \(extra\)"),
    (lambda t: t.update({KEY: t[KEY].T.contiguous()}), rf"another shape \({KEY} is \(2, 16\), expected \(16, 2\)\)"),
    (lambda t: t.update({KEY: torch.zeros(16, 2, dtype=torch.int8)}), rf"not floating-point \({KEY} is I8\)"),
    (lambda t: t.update({KEY.replace("B", "b"): t.pop(KEY)}), "1 is missing .*, 1 is surplus"),
    (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(100, 32)}), "1 is surplus .*lm_head.weight"),
    (lambda t: t.clear(), "no lora_A.weight"),
    (lambda t: t.update({k: torch.zeros(10**6, 0) for k in list(t) if "lora_A" in k}), "no lora_A.weight"),
])
def test_missing_surplus_and_misshapen_tensors_are_refused_by_name(change, words, tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / TENSORS)
    model = FAMILIES["llama"]()
    with refused(model, words):
        mp.load_adapter(model, tmp_path)


def test_the_bases_own_weights_may_lie_beside_if_they_are_this_bases(tmp_path):
    theirs = random_state(in_peft(FAMILIES["llama"](), r=2, target_modules=["lm_head"]))
    peft_save(theirs, tmp_path)
    stored = load_file(tmp_path / TENSORS)
    assert len(stored) > 2
    mp.load_adapter(FAMILIES["llama"](), tmp_path)
    other_base = FAMILIES["llama"](seed=3)
    with refused(other_base, "surplus .*lm_head.base_layer.weight"):
        mp.load_adapter(other_base, tmp_path)


# ---------------------------------------------------------------- what is refused: files


@pytest.mark.parametrize(("damage", "error", "words"), [
    (lambda d: shutil.rmtree(d), FileNotFoundError, "no folder .* accepted is a local folder with"),
    (lambda d: (d / CONFIG).unlink(), FileNotFoundError, "no file adapter_config.json in"),
    (lambda d: (d / TENSORS).unlink(), FileNotFoundError, r"no file adapter_model.safetensors in [^;]*$"),
    (lambda d: (d / TENSORS).rename(d / "adapter_model.bin"), FileNotFoundError,
     "no file adapter_model.safetensors .*; adapter_model.bin is there, but .* a pickle can run code"),
    (lambda d: (d / CONFIG).write_text("{'r': 8}"), ValueError, "adapter_config.json is not valid JSON: .*line 1"),
    (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe{}"), ValueError, "adapter_config.json is not valid JSON"),
    (lambda d: (d / CONFIG).write_text(""), ValueError, "adapter_config.json is not valid JSON"),
    (lambda d: (d / CONFIG).write_text("[" * 100_000), ValueError, "adapter_config.json is not valid JSON"),
    (lambda d: (d / CONFIG).write_text("[8]"), ValueError, "adapter_config.json holds a list; accepted is a table"),
    (lambda d: (d / TENSORS).write_bytes(b""), ValueError, r"adapter_model.safetensors \(0 bytes\) is empty, trunc"),
    (lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes()[:-1]), ValueError, "truncated, corrupted"),
    (lambda d: (d / TENSORS).write_bytes((d / TENSORS).read_bytes() + b"x"), ValueError, "truncated, corrupted"),
    (lambda d: (d / TENSORS).write_bytes(struct.pack("<Q", 2**62) + b"{}"), ValueError, "truncated, corrupted"),
    (lambda d: (d / TENSORS).write_bytes(os.urandom(4000)), ValueError, "truncated, corrupted"),
    (lambda d: torch.save({}, d / TENSORS), ValueError, "not a safetensors file"),
])
def test_missing_and_damaged_files_are_refused_by_name(damage, error, words, tmp_path):
    folder = tmp_path / "adapter"
    saved(folder)
    damage(folder)
    model = FAMILIES["llama"]()
    with refused(model, words, error):
        mp.load_adapter(model, folder)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "it ran"),))

    saved(tmp_path)
    for name in ("adapter_model.bin", TENSORS):
        (tmp_path / TENSORS).unlink(missing_ok=True)
        torch.save({"x": Bomb()}, tmp_path / name)
        with pytest.raises((ValueError, FileNotFoundError)):
            mp.load_adapter(FAMILIES["llama"](), tmp_path)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_file_that_leads_out_of_the_folder_is_refused(file, tmp_path):
    saved(tmp_path / "elsewhere")
    saved(tmp_path / "adapter")
    (tmp_path / "adapter" / file).unlink()
    (tmp_path / "adapter" / file).symlink_to(f"../elsewhere/{file}")
    model = FAMILIES["llama"]()
    with refused(model, f"{file} leads outside its folder, to .*elsewhere"):
        mp.load_adapter(model, tmp_path / "adapter")


def test_the_hubs_cache_and_a_link_to_the_folder_itself_are_fine(tmp_path):
    repo = tmp_path / "models--someone--adapter"
    saved(repo / "blobs")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for file in (CONFIG, TENSORS):
        (repo / "snapshots" / "abc" / file).symlink_to(f"../../blobs/{file}")
    mp.load_adapter(FAMILIES["llama"](), repo / "snapshots" / "abc")
    (tmp_path / "link").symlink_to(repo / "blobs")
    mp.load_adapter(FAMILIES["llama"](), tmp_path / "link")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = saved(folder)
    random_state(mp.attach(model, mp.LoRA(), "other"))
    mp.detach(model)
    return model, (folder / TENSORS).read_bytes(), load_file(folder / TENSORS)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_byte_half_changes_a_model_or_passes_for_the_adapter(good, tmp_path, data):
    model, whole, tensors = good
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([(0, 8), (8, header), (header, len(whole))]))
        damaged[data.draw(st.integers(part[0], part[1] - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        damaged = damaged[:data.draw(st.integers(0, len(damaged)))]
    if not (tmp_path / CONFIG).exists():
        saved(tmp_path)
    (tmp_path / TENSORS).write_bytes(damaged)
    before = state_of(model)
    try:
        adapter = mp.load_adapter(model, tmp_path, "damaged")
    except ValueError:
        assert state_of(model) == before
        return
    # what was damaged was not the tensors: the adapter is the one that was saved
    for path, piece in adapter.pieces().items():
        for symbol in "AB":
            assert torch.equal(getattr(piece, symbol), tensors[f"base_model.model.{path}.lora_{symbol}.weight"])
    mp.detach(model, "damaged")
    mp.activate(model, "other")
    assert state_of(model) == before


def test_a_changed_number_is_noticed(tmp_path):
    saved(tmp_path)
    whole = bytearray((tmp_path / TENSORS).read_bytes())
    whole[-3] ^= 1
    (tmp_path / TENSORS).write_bytes(whole)
    model = FAMILIES["llama"]()
    with refused(model, "adapter_model.safetensors is corrupted: its bytes are not those that were saved"):
        mp.load_adapter(model, tmp_path)


# ---------------------------------------------------------------- saving


def test_the_files_name_no_path_of_this_machine(tmp_path):
    for name, recorded in [("/home/someone/models/x", None), (r"C:\models\x", None), ("~/x", None), ("", None),
                           ("smollm2-135m", "smollm2-135m"), ("Someone/SmolLM2-135M", "Someone/SmolLM2-135M")]:
        model = FAMILIES["llama"]()
        model.config._name_or_path = name
        mp.attach(model, mp.LoRA())
        mp.save_adapter(model, tmp_path)
        text = (tmp_path / CONFIG).read_text()
        assert json.loads(text)["base_model_name_or_path"] == recorded
        assert "someone/models" not in text and str(tmp_path) not in text
        mp.load_adapter(model, tmp_path, "again")


def test_another_name_of_the_base_is_said_and_the_same_name_is_not(tmp_path):
    model = FAMILIES["llama"]()
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M"
    mp.attach(model, mp.LoRA())
    mp.save_adapter(model, tmp_path)
    model = FAMILIES["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.config._name_or_path = "smollm2-135m"
        mp.load_adapter(model, tmp_path, "a")
        model.config._name_or_path = ""
        mp.load_adapter(model, tmp_path, "b")
    model.config._name_or_path = "someone/else"
    with pytest.warns(UserWarning, match="trained on 'HuggingFaceTB/SmolLM2-135M' and is loaded into 'someone/else'"):
        mp.load_adapter(model, tmp_path, "c")


def test_saving_makes_the_folders_and_refuses_a_file(tmp_path):
    saved(tmp_path / "a" / "b" / "c")
    assert sorted(os.listdir(tmp_path / "a" / "b" / "c")) == [CONFIG, TENSORS]
    (tmp_path / "file").write_text("keep")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileExistsError, match="file is a file; a checkpoint is a folder"):
            saved(folder)
    assert (tmp_path / "file").read_text() == "keep"


def test_saving_touches_nothing_else_in_the_folder(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    saved(tmp_path)
    saved(tmp_path, rank=3)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, TENSORS]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_adapters_that_exist_and_have_a_format_are_saved(tmp_path):
    model = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="no adapter is attached"):
        mp.save_adapter(model, tmp_path / "x")
    mp.attach(model, mp.LoRA(), "french")
    with pytest.raises(ValueError, match=r"no adapter is called 'frnch'; did you mean 'french'\?"):
        mp.save_adapter(model, tmp_path / "x", "frnch")

    class Unknown(mp.LoRA):
        pass

    mp.attach(model, Unknown(), "odd")
    with pytest.raises(TypeError, match="adapter 'odd' is Unknown, which has no checkpoint format; .*LoRA"):
        mp.save_adapter(model, tmp_path / "x", "odd")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("rank", [2, 3], ids=["same settings", "other settings"])
@pytest.mark.parametrize("stop", ["writing", "first replace", "second replace"])
def test_an_interrupted_save_leaves_a_whole_checkpoint(stop, rank, tmp_path, monkeypatch):
    old = logits_of(saved(tmp_path))
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, mp.LoRA(rank=rank, alpha=5)), 9)
    new, calls = logits_of(model), []

    def write_half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    def replace(source, target):
        calls.append(target)
        if len(calls) == (1 if stop == "first replace" else 2):
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stop == "writing":
            patch.setattr(checkpoint, "save_file", write_half)
        else:
            patch.setattr(os, "replace", replace)
        mp.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
    loaded = FAMILIES["llama"]()
    mp.load_adapter(loaded, tmp_path)
    assert torch.equal(logits_of(loaded), new if stop == "second replace" else old)

    mp.save_adapter(model, tmp_path)  # the next one is as good as any
    loaded = FAMILIES["llama"]()
    mp.load_adapter(loaded, tmp_path)
    assert torch.equal(logits_of(loaded), new)
    assert distance(logits_of(in_peft(FAMILIES["llama"](), tmp_path)), new) < 1e-5


def test_settings_edited_by_hand_are_believed(tmp_path):
    saved(tmp_path)
    saved(tmp_path, alpha=3)  # replaced a checkpoint with other settings
    edit_config(tmp_path, lora_alpha=32)
    assert mp.load_adapter(FAMILIES["llama"](), tmp_path).method.alpha == 32
