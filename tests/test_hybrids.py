"""Statements about several methods on one model: what they compute, how they are trained, and their one folder.

Oracles: what a hybrid computes is compared with the base model called by hand, in float64: the prompt written in
front of the embeddings, the prefix put into the cache, LoRA added to the weights.
"""

import copy
import json
import os
import shutil
import warnings

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import anatomy, hybrids, sockets, training

from .families import FAMILIES, WIDTH, inputs
from .test_checkpoint import refused
from .test_lora import bytes_of, distance, logits_of, random_state
from .test_prompts import Words

SEVERAL = ["llama", "gpt2", "bert", "t5"]
LORA = mp.LoRA(rank=2, targets="all-linear")
HYBRIDS = {
    "prompt + LoRA": [LORA, mp.PromptTuning(3)],
    "prefix + LoRA": [mp.LoRA(rank=2, targets="attention"), mp.PrefixTuning(3, hidden=5)],
    "adapter + LoRA": [LORA, mp.BottleneckAdapter(4)],
    "prompt + prefix + (IA)³ + DoRA": [mp.IA3(), mp.DoRA(rank=2, targets="attention"), mp.PromptTuning(2),
                                       mp.PrefixTuning(3, reparameterize=False)],
}


def hybrid(family, methods, dtype=torch.float64):
    """A model with these methods at random states, under the names a, b, …"""
    model = FAMILIES[family]().to(dtype)
    for i, method in enumerate(methods):
        random_state(mp.attach(model, method, "abcd"[i]), seed=i)
    return model, list("abcd"[:len(methods)])


# ---------------------------------------------------------------- what a hybrid computes


def with_lora_in_its_weights(family, adapter):
    """A plain model, LoRA added to its weights by hand."""
    model = FAMILIES[family]().double()
    for path, piece in adapter.pieces().items():
        if not isinstance(piece, sockets.OwnHead):
            W = model.get_submodule(path).weight
            delta = piece.scale * piece.B @ piece.A
            W.data += delta.T if anatomy.is_transposed(model.get_submodule(path)) else delta
    return model.requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_prompt_and_lora_are_the_prompt_in_front_of_a_model_with_other_weights(family):
    model, _ = hybrid(family, HYBRIDS["prompt + LoRA"])
    lora, prompt = mp.adapters(model).values()
    x, plain = inputs(family), with_lora_in_its_weights(family, lora)
    P = next(iter(prompt.pieces().values())).P
    e = plain.get_input_embeddings()(x.pop("input_ids"))
    x["attention_mask"] = torch.cat([torch.ones(2, 3, dtype=torch.long), x["attention_mask"]], dim=1)
    with torch.no_grad():
        expected = plain(inputs_embeds=torch.cat([P.expand(2, -1, -1), e], dim=1), **x).logits
    assert distance(logits_of(model, family), expected) < 1e-12
    with mp.active(model, "a"):
        assert distance(logits_of(model, family)[:, -5:], expected[:, -5:]) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefix_and_lora_are_a_filled_cache_of_a_model_with_other_weights(family):
    from transformers import DynamicCache
    model, _ = hybrid(family, HYBRIDS["prefix + LoRA"])
    lora, prefix = mp.adapters(model).values()
    x, plain, cache = inputs(family), with_lora_in_its_weights(family, lora), DynamicCache()
    with torch.no_grad():
        for layer, piece in enumerate(prefix.pieces().values()):
            cache.update(*(t.expand(2, -1, -1, -1).clone() for t in piece.prefix()), layer)
        x["attention_mask"] = torch.cat([torch.ones(2, 3, dtype=torch.long), x["attention_mask"]], dim=1)
        expected = plain(**x, past_key_values=cache, position_ids=torch.arange(3, 10)[None].expand(2, -1)).logits
    assert distance(logits_of(model, family), expected) < 1e-12


@pytest.mark.parametrize("family", SEVERAL)
def test_adapter_and_lora_are_the_adapter_behind_modules_with_other_weights(family):
    model, _ = hybrid(family, HYBRIDS["adapter + LoRA"])
    lora, adapter = mp.adapters(model).values()
    plain = with_lora_in_its_weights(family, lora)

    def behind(piece):
        def hook(module, args, y):
            h = nn.functional.linear(y, piece.down.weight, piece.down.bias).relu()
            return y + nn.functional.linear(h, piece.up.weight, piece.up.bias)
        return hook

    for path, piece in adapter.pieces().items():
        if isinstance(piece, sockets.OwnHead):                   # of two heads the last answers
            plain.get_submodule(path).load_state_dict(piece.copy.state_dict())
        else:
            plain.get_submodule(path).register_forward_hook(behind(piece))
    assert distance(logits_of(model, family), logits_of(plain, family)) < 1e-12


def test_an_adapter_on_qlora_is_what_it_is_beside_the_same_weights_in_float():
    model = mp.quantize(FAMILIES["llama"]())
    plain = FAMILIES["llama"]()
    for path in anatomy.match(plain, "all-linear"):
        plain.get_submodule(path).weight.data.copy_(model.get_submodule(path).weight)
    for m in (model, plain):
        random_state(mp.attach(m, LORA, "lora"), 1, 0.1)
        random_state(mp.attach(m, mp.BottleneckAdapter(4), "adapter"), 2, 0.1)
    assert distance(logits_of(model), logits_of(plain)) < 1e-5
    model(**inputs("llama")).logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for a in mp.adapters(model).values() for p in a.parameters())


# ---------------------------------------------------------------- trained jointly, and in stages


def steps(model, family, n=3):
    """What `mp.fit` trains, trained a little."""
    optimizer = torch.optim.AdamW(list(training.trainable(model).values()), lr=0.05)
    for _ in range(n):
        optimizer.zero_grad()
        model(**inputs(family)).logits.log_softmax(-1)[..., 1].mean().backward()
        optimizer.step()


def bytes_by_adapter(model):
    return {name: bytes_of({n: p for n, p in adapter.named_parameters() if ".copy." not in n})
            for name, adapter in mp.adapters(model).items()}


@pytest.mark.parametrize("methods", HYBRIDS)
@pytest.mark.parametrize("family", SEVERAL)
def test_jointly_all_parts_learn_and_in_stages_only_the_last(family, methods):
    model, names = hybrid(family, HYBRIDS[methods], torch.float32)
    base, before = bytes_of(model.state_dict()), bytes_by_adapter(model)
    steps(model, family)
    jointly = bytes_by_adapter(model)
    assert not set(before.values()) & set(jointly.values())
    for name in names[:-1]:
        mp.adapters(model)[name].requires_grad_(False)
    frozen = {name: bytes_of(dict(mp.adapters(model)[name].named_parameters())) for name in names[:-1]}
    start = logits_of(model, family)
    steps(model, family)
    assert {name: bytes_of(dict(mp.adapters(model)[name].named_parameters())) for name in names[:-1]} == frozen
    assert bytes_by_adapter(model)[names[-1]] != jointly[names[-1]] and distance(logits_of(model, family), start) > 1e-3
    assert bytes_of(model.state_dict()) == base
    report = mp.parameter_report(model)
    assert report.trainable == sum(p.numel() for p in mp.adapters(model)[names[-1]].parameters())


def test_a_soft_prompt_of_16_learns_another_task_on_a_trained_lora(tmp_path):
    """Both with `mp.fit`; the LoRA alone still does its own task, to the bit."""
    first = [{"prompt": f"{a} ", "completion": a.upper()} for a in "abcdefgh"]
    second = [{"prompt": f"{a} ", "completion": "?" + a} for a in "abcdefgh"]
    torch.manual_seed(0)                                         # of the starts; this tiny random base is moody
    model, words = FAMILIES["llama"](), Words()
    config = mp.FitConfig(steps=30, batch_size=8, lr=0.05, progress=False)
    mp.attach(model, LORA, "lora")
    mp.fit(model, words, first, config)
    own = mp.evaluate(model, words, first)["loss"]
    mp.adapters(model)["lora"].requires_grad_(False)
    prompt = mp.attach(model, mp.PromptTuning(16), "prompt")
    lora = bytes_of(dict(mp.adapters(model)["lora"].named_parameters()))
    untrained = mp.evaluate(model, words, second)["loss"]
    mp.fit(model, words, second, config)
    assert mp.evaluate(model, words, second)["loss"] < 0.7 * untrained
    assert prompt.method.length == 16 and bytes_of(dict(mp.adapters(model)["lora"].named_parameters())) == lora
    with mp.active(model, "lora"):
        assert mp.evaluate(model, words, first)["loss"] == own

    mp.save_adapter(model, tmp_path, ["lora", "prompt"])
    again = FAMILIES["llama"]()
    mp.load_adapter(again, tmp_path)
    assert set(training.trainable(again)) == {f"minipeft.prompt.{n}" for n, _ in prompt.named_parameters()}
    assert mp.evaluate(again, words, second) == mp.evaluate(model, words, second)


# ---------------------------------------------------------------- one folder


@pytest.mark.parametrize("methods", HYBRIDS)
@pytest.mark.parametrize("family", SEVERAL)
def test_saved_as_one_folder_it_comes_back_to_the_bit(family, methods, tmp_path):
    model, names = hybrid(family, HYBRIDS[methods], torch.float32)
    mp.adapters(model)["a"].requires_grad_(False)
    mp.save_adapter(model, tmp_path, names)
    assert sorted(os.listdir(tmp_path)) == [*names, "hybrid.json"]
    again = FAMILIES[family]()
    loaded = mp.load_adapter(again, tmp_path)
    assert list(loaded) == names and list(mp.adapters(again)) == names and again.minipeft.active == tuple(names)
    assert torch.equal(logits_of(again, family), logits_of(model, family))
    assert [any(p.requires_grad for p in a.parameters()) for a in loaded.values()] == [name != "a" for name in names]
    for name, adapter in loaded.items():
        if not isinstance(adapter.method, mp.IA3):               # PEFT's format has its vector whole: q's are 1
            assert bytes_of(adapter.state_dict()) == bytes_of(mp.adapters(model)[name].state_dict())
        alone = FAMILIES[family]()
        mp.load_adapter(alone, tmp_path / name)                  # each part is a checkpoint
        with mp.active(model, name):
            assert torch.equal(logits_of(alone, family), logits_of(model, family))


@pytest.mark.parametrize("family", SEVERAL)
def test_each_part_opens_in_peft_alone(family, tmp_path):
    peft = pytest.importorskip("peft")
    methods = {"lora": LORA, "dora": mp.DoRA(rank=2, targets="attention"), "ia3": mp.IA3(), "prompt": mp.PromptTuning(3)}
    if family != "t5":                                           # PEFT cannot compute ours there: test_parity.py
        methods["prefix"] = mp.PrefixTuning(3, hidden=5)
    model = FAMILIES[family]().double()
    for i, (name, method) in enumerate(methods.items()):
        random_state(mp.attach(model, method, name), i)
    mp.save_adapter(model, tmp_path, list(methods))
    for name in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), tmp_path / name).double().eval()
        with mp.active(model, name):
            assert distance(logits_of(model, family), logits_of(theirs, family)) < 1e-6, name


def test_a_hybrid_on_4_bits_comes_back_to_the_bit(tmp_path):
    model, again = mp.quantize(FAMILIES["llama"]()), mp.quantize(FAMILIES["llama"]())
    random_state(mp.attach(model, LORA, "lora"), 1)
    random_state(mp.attach(model, mp.BottleneckAdapter(4), "adapter"), 2)
    mp.save_adapter(model, tmp_path, ["lora", "adapter"])
    mp.load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_order_of_the_names_is_the_order_in_which_they_act(tmp_path):
    model, _ = hybrid("llama", [mp.PromptTuning(2), mp.PromptTuning(3)], torch.float32)
    mp.save_adapter(model, tmp_path, ["b", "a"])
    again = FAMILIES["llama"]()
    mp.load_adapter(again, tmp_path, ["first", "second"])
    assert list(mp.adapters(again)) == ["first", "second"]
    mp.activate(model, ["b", "a"])
    assert torch.equal(logits_of(again), logits_of(model))


def test_beside_other_adapters_the_parts_are_loaded_and_act_alone(tmp_path):
    model, names = hybrid("llama", HYBRIDS["prompt + LoRA"], torch.float32)
    mp.save_adapter(model, tmp_path, names)
    wanted = logits_of(model)
    mp.load_adapter(model, tmp_path, ["c", "d"])
    assert model.minipeft.active == ("c", "d") and torch.equal(logits_of(model), wanted)
    with refused(model, r"an adapter called 'a' is attached already"):
        mp.load_adapter(model, tmp_path)
    with refused(model, r"holds 2 adapters \(a, b\), each needs one"):
        mp.load_adapter(model, tmp_path, ["x"])
    with refused(model, "accepted is a name, or a list of different names"):
        mp.load_adapter(model, tmp_path, ["x", "x"])
    with refused(model, "holds a hybrid; accepted is a list of names"):
        mp.load_adapter(model, tmp_path, "x")
    mp.activate(model, None)
    mp.activate(model, "a")
    mp.merge(model, "a")
    with refused(model, "'a' is merged into the base; unmerge it first"):
        mp.load_adapter(model, tmp_path, ["x", "y"])


def test_names_that_are_no_file_names_and_a_folder_that_holds_something_else(tmp_path):
    model = FAMILIES["llama"]()
    for seed, name in enumerate(("a/b", "a b", "..")[:2]):
        random_state(mp.attach(model, mp.LoRA(), name), seed)
    (tmp_path / "a_b").mkdir()                                   # someone else's
    (tmp_path / "a_b" / "notes").write_text("keep")
    mp.save_adapter(model, tmp_path, ["a/b", "a b"])
    mp.save_adapter(model, tmp_path, ["a/b", "a b"])             # and once more, over the first
    assert (tmp_path / "a_b" / "notes").read_text() == "keep"
    assert len(os.listdir(tmp_path)) == 4
    again = FAMILIES["llama"]()
    assert list(mp.load_adapter(again, tmp_path)) == ["a/b", "a b"]
    assert torch.equal(logits_of(again), logits_of(model))

    with pytest.raises(FileExistsError, match="holds a hybrid"):
        mp.save_adapter(model, tmp_path, "a b")
    mp.save_adapter(model, tmp_path / "one", "a b")
    with pytest.raises(FileExistsError, match="holds the checkpoint of one adapter"):
        mp.save_adapter(model, tmp_path / "one", ["a b"])
    for names, words in [([], "accepted is a name"), (["a b", "a b"], "accepted is a name"), (["a b", 1], "accepted is a"),
                         (["a b", "c"], "no adapter is called 'c'")]:
        with pytest.raises(ValueError, match=words):
            mp.save_adapter(model, tmp_path / "x", names)
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- killed, damaged


@pytest.mark.parametrize("stop", range(6))
def test_wherever_a_save_is_cut_off_the_folder_holds_the_old_or_the_new(stop, tmp_path, monkeypatch):
    old, names = hybrid("llama", HYBRIDS["prompt + LoRA"], torch.float32)
    new, _ = hybrid("llama", [mp.LoRA(rank=3), mp.PromptTuning(2)], torch.float32)
    mp.save_adapter(old, tmp_path, names)
    real, calls = os.replace, []

    def replace(source, target):                                 # both files of both parts, both folders, hybrid.json
        calls.append(target)
        if len(calls) == (2, 4, 5, 6, 7, 8)[stop]:
            if stop == 4:
                real(source, target)                             # killed right after the last one
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if stop < 5:
            with pytest.raises(KeyboardInterrupt):
                mp.save_adapter(new, tmp_path, names)
        else:
            mp.save_adapter(new, tmp_path, names)
    again = FAMILIES["llama"]()
    mp.load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(new if stop >= 4 else old))
    if stop < 4:
        assert sorted(os.listdir(tmp_path)) == ["a", "b", "hybrid.json"]
    mp.save_adapter(new, tmp_path, names)
    again = FAMILIES["llama"]()
    mp.load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(new))


def edit(folder, change):
    manifest = json.loads((folder / "hybrid.json").read_text())
    change(manifest["parts"])
    manifest["sha256"] = hybrids._digest(manifest["parts"])
    (folder / "hybrid.json").write_text(json.dumps(manifest))


def flip(file, at=-10):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(("damage", "error", "words"), [
    (lambda f: flip(f / "a" / "adapter_model.safetensors"), ValueError, "a: its files are not those that were saved"),
    (lambda f: flip(f / "b" / "adapter_model.safetensors", 20), ValueError, "b: its files are not those"),
    (lambda f: (f / "b" / "adapter_config.json").write_text("{}"), ValueError, "b: its files are not those"),
    (lambda f: shutil.rmtree(f / "b"), FileNotFoundError, "no folder .*b"),
    (lambda f: (f / "b" / "adapter_model.safetensors").unlink(), FileNotFoundError, "no file adapter_model.safetensors"),
    (lambda f: (f / "b" / "adapter_encoder.safetensors").write_bytes(b"x"), ValueError, "b: its files are not those"),
    (lambda f: (os.rename(f / "a", f / "c"), os.rename(f / "b", f / "a"), os.rename(f / "c", f / "b")), ValueError,
     "a: its files are not those"),
    (lambda f: (f / "hybrid.json").write_text(""), ValueError, "hybrid.json is damaged"),
    (lambda f: (f / "hybrid.json").write_text('{"parts": [], "sha256": 1}'), ValueError, "is damaged or was changed"),
    (lambda f: (f / "hybrid.json").write_text("[" * 100_000), ValueError, "hybrid.json is damaged"),
    (lambda f: flip(f / "hybrid.json", 40), ValueError, "hybrid.json is damaged"),
    *((lambda f, place=place: edit(f, lambda parts: parts[1].update(folder=place)), ValueError, "accepted is one beside it")
      for place in ("../b", "..", ".", "", 3)),
    (lambda f: edit(f, lambda parts: parts[1].pop("folder")), ValueError, "hybrid.json is damaged: KeyError"),
    (lambda f: edit(f, lambda parts: parts[1].update(name="no.good")), ValueError, "a non-empty string without a dot"),
    (lambda f: edit(f, lambda parts: parts.clear()), ValueError, "accepted is a name"),
])
def test_a_damaged_folder_is_refused_and_the_model_is_as_it_was(damage, error, words, tmp_path):
    model, names = hybrid("llama", HYBRIDS["prompt + LoRA"], torch.float32)
    folder = tmp_path / "h"
    mp.save_adapter(model, folder, names)
    damage(folder)
    again = FAMILIES["llama"]()
    with refused(again, words, error):
        mp.load_adapter(again, folder)
    mp.attach(again, mp.LoRA(), "mine")
    with refused(again, words, error):
        mp.load_adapter(again, folder)


def test_a_part_that_does_not_fit_leaves_no_other_part_behind(tmp_path):
    model, names = hybrid("llama", HYBRIDS["prompt + LoRA"], torch.float32)
    mp.save_adapter(model, tmp_path, ["b", "a"])
    other = FAMILIES["gpt2"]()                                   # a prompt of its width, a LoRA for other modules
    assert WIDTH == other.config.n_embd
    with refused(other, "a: .*target_modules"):
        mp.load_adapter(other, tmp_path)
    twin = copy.deepcopy(model)
    mp.detach(twin, "a")
    mp.detach(twin, "b")
    mp.load_adapter(twin, tmp_path, ["x", "y"])
    mp.activate(model, ["b", "a"])
    assert torch.equal(logits_of(twin), logits_of(model))


def test_a_snapshot_of_the_hub_is_read(tmp_path):
    """There every file is a link into a folder of blobs."""
    model, names = hybrid("llama", HYBRIDS["prompt + LoRA"], torch.float32)
    cache = tmp_path / "models--me--hybrid"
    folder = cache / "snapshots" / "1234"
    mp.save_adapter(model, folder, names)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        shutil.move(file, cache / "blobs" / str(i))
        file.symlink_to(cache / "blobs" / str(i))
    again = FAMILIES["llama"]()
    mp.load_adapter(again, folder)
    assert torch.equal(logits_of(again), logits_of(model))
