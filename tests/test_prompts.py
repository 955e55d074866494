"""Statements about soft prompts and prefixes, and about the embedding and key/value sockets."""

import copy
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import minipeft as mp
from minipeft import base, sockets, training

from .families import FAMILIES, inputs
from .test_lora import bytes_of, distance, random_state

METHODS = {
    "prompt": mp.PromptTuning(3),
    "mlp": mp.PTuning(3, hidden=7),
    "lstm": mp.PTuning(3, encoder="lstm", hidden=5),
    "prefix": mp.PrefixTuning(3, hidden=7),
    "direct": mp.PrefixTuning(3, reparameterize=False),
}
SEVERAL = ["llama", "gemma3", "gpt2", "opt", "bert", "roberta", "t5"]


def attached(family, method, seed=1):
    model = FAMILIES[family]().double()
    random_state(mp.attach(model, METHODS[method] if isinstance(method, str) else method), seed)
    return model


def logits_of(model, family):
    with torch.no_grad():
        return model(**inputs(family)).logits


def alone(model, ids, adapter=None):
    """Logits of the last real token of one row without padding."""
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, -1]


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "opt", "roberta", "t5"])
def test_only_the_piece_trains_its_count_is_the_formula_and_the_base_keeps_its_bytes(family, method):
    model = FAMILIES[family]()
    before, start = bytes_of(model.state_dict()), logits_of(model, family)
    adapter = mp.attach(model, METHODS[method])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"minipeft.default.{n}" for n, _ in adapter.named_parameters()}
    own = sum(p.numel() for n, p in adapter.named_parameters() if ".copy." not in n)
    width = 16 if family == "llama" else 32                      # two key/value heads of 8, or four
    expected = METHODS[method].parameter_count(2, width) if method in ("prefix", "direct") \
        else METHODS[method].parameter_count(32)
    assert own == expected
    report = mp.parameter_report(model)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    model(**inputs(family)).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    assert not any(p.grad is not None for p in sockets.base_parameters(model).values())
    mp.detach(model)
    assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model, family), start)
    assert not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "minipeft_plug") for m in model.modules())


# ---------------------------------------------------------------- how it starts


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "bloom"])
def test_a_prompt_started_from_text_is_that_text_in_front(family):
    model, ids = FAMILIES[family]().double(), torch.tensor([[5, 9, 5, 30, 41, 77, 12]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        mp.attach(model, mp.PromptTuning(3, init="text", text=[5, 9, 5]))
        assert distance(model(input_ids=ids[:, 3:]).logits, whole) < 1e-12
        model.generation_config.eos_token_id = None
        mine = model.generate(input_ids=ids[:, 3:], max_new_tokens=6, do_sample=False)
        mp.detach(model)
        assert torch.equal(mine[:, 4:], model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[:, 7:])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "opt", "gpt_neox", "phi3"])
def test_a_prefix_started_from_text_is_that_text_in_front(family):
    model, ids = FAMILIES[family]().double(), torch.tensor([[5, 9, 5, 30, 41, 77, 12]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        mp.attach(model, mp.PrefixTuning(3, reparameterize=False, init="text", text=[5, 9, 5]))
        assert distance(model(input_ids=ids[:, 3:]).logits, whole[:, 3:]) < 1e-12
    mp.detach(model)
    assert not hasattr(model, "minipeft")


def test_a_prefix_from_text_is_read_off_the_bare_base_also_beside_another_adapter():
    method = mp.PrefixTuning(3, reparameterize=False, init="text", text=[5, 9, 5])
    plain = mp.attach(FAMILIES["llama"](), method)
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, mp.LoRA(), "lora"))
    beside = mp.attach(model, method, "prefix")
    assert model.minipeft.active == ("lora", "prefix") and list(mp.adapters(model)) == ["lora", "prefix"]
    for (name, p), q in zip(plain.named_parameters(), beside.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_vocabulary_start_takes_different_words_and_the_random_one_their_spread():
    model = FAMILIES["llama"]()
    words = model.get_input_embeddings().weight
    P = mp.attach(model, mp.PromptTuning(20, init="vocab")).get_parameter("model.embed_tokens.P")
    is_word = (P[:, None] == words).all(-1)                      # (20, 100)
    assert is_word.sum(1).tolist() == [1] * 20 and is_word.sum(0).max() == 1
    mp.detach(model)
    P = mp.attach(model, mp.PromptTuning(60)).get_parameter("model.embed_tokens.P")
    assert 0.9 < P.std() / words.std() < 1.1


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [*[1] * add_special_tokens, *(ord(c) - 90 for c in text)]}


def test_a_string_is_read_by_the_models_own_tokenizer_without_special_tokens():
    model = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="no tokenizer is known for this LlamaForCausalLM.*give token ids"):
        mp.attach(model, mp.PromptTuning(3, init="text", text="abc"))
    base._TOKENIZERS[model] = Letters()
    P = mp.attach(model, mp.PromptTuning(3, init="text", text="abc")).get_parameter("model.embed_tokens.P")
    assert torch.equal(P, model.get_input_embeddings().weight[[7, 8, 9]])


@pytest.mark.parametrize("make", [lambda **s: mp.PromptTuning(**s),
                                  lambda **s: mp.PrefixTuning(reparameterize=False, **s)])
def test_what_cannot_start_is_refused_before_anything_changes(make):
    model = FAMILIES["gpt2"]()
    for length in (0, -1, True, 2.0, "3", None):
        with pytest.raises(ValueError, match="length is .*; accepted is a whole number from 1"):
            make(length=length)
    for settings, words in [
        ({"init": "words"}, "init is 'words'; accepted are"),
        ({"init": "text"}, "a text is needed with init='text'"),
        ({"text": "a"}, "has no meaning otherwise"),
        ({"init": "text", "text": ""}, "accepted is a text of 3 tokens"),
        ({"init": "text", "text": [1, "b"]}, "a list of token ids"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(length=3, **settings)
    for method, words in [
        (make(length=64), "length is 64; GPT2LMHeadModel has 64 positions, and at least one must be left"),
        (make(length=3, init="text", text=[5, 9]), "text has 2 tokens and length is 3"),
        (make(length=3, init="text", text=(5, 9, 5, 7)), "text has 4 tokens and length is 3"),
        (make(length=3, init="text", text=[5, 9, 100]), "token id 100; this model's are 0 to 99"),
    ]:
        with pytest.raises(ValueError, match=words):
            mp.attach(model, method)
        assert not hasattr(model, "minipeft") and all(p.requires_grad for p in model.parameters())


def test_settings_without_a_meaning_are_refused():
    for make, words in [
        (lambda: mp.PTuning(3, encoder="gru"), "encoder is 'gru'; accepted are 'mlp', 'lstm'"),
        (lambda: mp.PTuning(3, hidden=0), "hidden is 0"),
        (lambda: mp.PrefixTuning(3, reparameterize=1), "reparameterize is 1"),
        (lambda: mp.PrefixTuning(3, reparameterize=False, hidden=4), "no network to be wide"),
        (lambda: mp.PrefixTuning(3, init="text", text=[1, 2, 3]), "accepted is reparameterize=False"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()


def test_attention_that_is_not_looked_up_has_no_key_value_socket():
    model = FAMILIES["bloom"]()
    with pytest.raises(TypeError, match="BloomAttention.*has no key/value socket"):
        mp.attach(model, METHODS["prefix"])
    assert not hasattr(model, "minipeft") and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------- inputs of every kind


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "bloom", "t5"])
def test_padding_on_either_side_changes_nothing_in_generation(family, method):
    if (family, method) == ("bloom", "prefix"):
        pytest.skip("BLOOM has no key/value socket")
    model = attached(family, method)
    model.generation_config.eos_token_id = None
    rows = [torch.tensor([5, 9, 30, 41, 77]), torch.tensor([12, 60])]
    single = [model.generate(input_ids=r[None], max_new_tokens=6, do_sample=False)[0, 0 if family == "t5" else len(r):]
              for r in rows]
    for right in ([False] if family != "t5" else [False, True]):
        gap = [0, 0, 0]
        ids = torch.tensor([rows[0].tolist(), [12, 60, *gap] if right else [*gap, 12, 60]])
        mask = (ids != 0).long()
        for cache in (True, False):
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=cache)
            out = out if family == "t5" else out[:, 5:]
            assert torch.equal(out[0], single[0]) and torch.equal(out[1], single[1]), (right, cache)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "roberta"])
def test_right_padding_with_and_without_labels(family, method):
    model, x = attached(family, method), inputs(family)
    out = logits_of(model, family)
    for row, length in enumerate(x["attention_mask"].sum(1).tolist()):
        ids = x["input_ids"][row:row + 1, :length]
        with torch.no_grad():
            one = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        mine = out[row] if out.dim() == 2 else out[row, :len(one)]
        assert distance(mine, one) < 1e-12
    if out.dim() == 3:
        labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
        P = out.shape[1] - labels.shape[1]
        assert P == (3 if method == "prompt" else 0)
        expected = torch.nn.functional.cross_entropy(out[:, P:-1].flatten(0, 1), labels[:, 1:].flatten())
        if P:  # the last vector of the prompt predicts the first token
            expected = torch.nn.functional.cross_entropy(out[:, P - 1:-1].flatten(0, 1), labels.flatten())
        assert abs(model(**x, labels=labels).loss.item() - expected.item()) < 1e-5  # it is computed in float32


def test_a_classifier_on_a_decoder_looks_at_the_last_real_token_behind_a_prompt():
    """PEFT hands over vectors instead of ids, and the classifier then takes the last position, padding or not."""
    import transformers
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(FAMILIES["llama"].config()).double().eval()
    random_state(mp.attach(model, METHODS["prompt"]))
    x = inputs("llama")
    with torch.no_grad():
        both, one = model(**x).logits, model(input_ids=x["input_ids"][1:, :5]).logits
    assert distance(both[1:], one) < 1e-12


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_beam_search_and_sampling_agree_with_and_without_cache(method):
    model, ids = attached("llama", method), torch.tensor([[5, 9, 30], [12, 60, 8]])
    model.generation_config.eos_token_id = None
    plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    for options in ({"num_beams": 4}, {"do_sample": True, "top_k": 5}):
        made = []
        for cache in (True, False):
            torch.manual_seed(3)
            made.append(model.generate(input_ids=ids, max_new_tokens=8, use_cache=cache, **options))
        assert torch.equal(*made) and not torch.equal(made[0], plain)


@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix", "direct"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_gradient_checkpointing_changes_no_gradient(family, method):
    made = []
    for recompute in (False, True):
        model = attached(family, method).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs(family), use_cache=False).logits.square().mean().backward() if family != "bert" else \
            model(**inputs(family)).logits.square().mean().backward()
        made.append({n: p.grad for n, p in model.minipeft.named_parameters()})
    assert all(distance(made[1][n], g) < 1e-12 for n, g in made[0].items())


@pytest.mark.parametrize("method", ["prompt", "lstm", "prefix"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_beside_a_bf16_base_the_piece_stays_float32(family, method):
    model = FAMILIES[family]().bfloat16()
    adapter = random_state(mp.attach(model, METHODS[method]))
    out = model(**inputs(family)).logits
    assert out.dtype == torch.bfloat16
    exact = logits_of(attached(family, method), family)
    assert distance(out.double(), exact) < 0.1
    out.float().square().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_hybrids_act_together_and_alone_as_before(family):
    model, seen = FAMILIES[family]().double(), {}
    parts = {"lora": mp.LoRA(targets="attention"), "prompt": METHODS["prompt"], "prefix": METHODS["prefix"],
             "second": mp.PromptTuning(2)}
    for seed, (name, method) in enumerate(parts.items()):
        random_state(mp.attach(model, method, name), seed)
    for names in [["lora"], ["prompt"], ["prefix"], ["lora", "prompt"], ["lora", "prefix"], ["prompt", "prefix"],
                  ["prompt", "second"], ["lora", "prompt", "prefix"]]:
        with mp.active(model, names):
            seen[tuple(names)] = logits_of(model, family)
        only = FAMILIES[family]().double()
        for name in names:
            random_state(mp.attach(only, parts[name], name), list(parts).index(name))
        assert torch.equal(logits_of(only, family), seen[tuple(names)])
    assert len({bytes_of({"": t}) for t in seen.values()}) == len(seen)


def test_a_failed_pass_leaves_no_prompt_behind():
    model = attached("llama", "prompt")
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs("llama"))
    handle.remove()
    ids = inputs("llama")["input_ids"]
    assert torch.equal(model.get_input_embeddings()(ids), model.get_input_embeddings().weight[ids])


def test_a_copied_model_has_prompts_and_prefixes_of_its_own():
    for method in ("prompt", "prefix"):
        model = attached("t5", method)
        twin, changed = copy.deepcopy(model), logits_of(model, "t5")
        random_state(twin.minipeft, seed=9)
        assert torch.equal(logits_of(model, "t5"), changed) and not torch.equal(logits_of(twin, "t5"), changed)


def test_an_unpickled_prefix_works_in_a_process_in_which_none_was_ever_attached(monkeypatch):
    from transformers import AttentionInterface, AttentionMaskInterface

    model = attached("llama", "prefix")
    right, pickled = logits_of(model, "llama"), pickle.dumps(model)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, model.config._attn_implementation)
    with pytest.raises(KeyError):
        logits_of(model, "llama")
    assert torch.equal(logits_of(pickle.loads(pickled), "llama"), right)


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize("method", ["mlp", "lstm", "prefix"])
@pytest.mark.parametrize("family", ["llama", "roberta", "t5"])
def test_folded_gives_the_same_logits_with_fewer_parameters_and_trains_on(family, method):
    model = attached(family, method)
    mp.attach(model, mp.LoRA(targets="attention"), "lora")
    before, size = logits_of(model, family), sum(p.numel() for p in mp.adapters(model)["default"].parameters())
    folded = mp.fold(model)
    assert distance(logits_of(model, family), before) < 1e-12
    assert list(mp.adapters(model)) == ["default", "lora"] == list(model.minipeft.active)
    assert folded.method == METHODS[method].folded() and sum(p.numel() for p in folded.parameters()) < size
    assert all(p.requires_grad and p.is_leaf for p in folded.parameters())
    with pytest.raises(TypeError, match="'default' is .* no network to fold away"):
        mp.fold(model)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_saved_and_loaded_it_is_the_same_with_the_network_and_without(family, method, tmp_path):
    model = attached(family, method)
    before = logits_of(model, family)
    mp.save_adapter(model, tmp_path)
    again = FAMILIES[family]().double()
    adapter = mp.load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again, family), before)
    assert adapter.method == METHODS[method]
    assert bytes_of(dict(adapter.named_parameters())) == bytes_of(dict(mp.adapters(model)["default"].named_parameters()))
    (tmp_path / "adapter_encoder.safetensors").unlink(missing_ok=True)
    mp.load_adapter(again, tmp_path, "folded")
    assert distance(logits_of(again, family), before) < 1e-12
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_modules" not in config and "fan_in_fan_out" not in config


@pytest.mark.parametrize("stop", range(1, 6))
def test_an_interrupted_save_leaves_a_network_with_its_own_tensors(stop, tmp_path, monkeypatch):
    def outputs(model):
        return {path: piece.folded().K.detach().clone() for path, piece in mp.adapters(model)["default"].pieces().items()}

    model, calls, real = attached("llama", "prefix"), [], os.replace
    mp.save_adapter(model, tmp_path)
    old = outputs(model)
    mp.detach(model)
    model = attached("llama", "prefix")                          # other numbers, and other settings in the config
    random_state(mp.adapters(model)["default"], seed=4)
    new = outputs(model)

    def replace(source, target):
        calls.append(target)
        if len(calls) == stop:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if stop <= 4:
            with pytest.raises(KeyboardInterrupt):
                mp.save_adapter(model, tmp_path)
        else:
            mp.save_adapter(model, tmp_path)
    fresh = FAMILIES["llama"]().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = mp.load_adapter(fresh, tmp_path)
    assert adapter.method == METHODS["prefix"]
    found, wanted = outputs(fresh), old if stop <= 2 else new
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)
    mp.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_encoder.safetensors", "adapter_model.safetensors"]


def test_folding_a_frozen_adapter_leaves_it_frozen():
    model = attached("llama", "prefix")
    mp.adapters(model)["default"].requires_grad_(False)
    assert not any(p.requires_grad for p in mp.fold(model).parameters())
    model = attached("llama", "prefix")
    assert all(p.requires_grad for p in mp.fold(model).parameters())


def test_attention_whose_mask_has_no_room_for_a_prefix_is_refused():
    for implementation in ("flash_attention_2", "flex_attention"):
        model = FAMILIES["llama"]()
        model.config._attn_implementation = implementation
        with pytest.raises(TypeError, match=f"'{implementation}', whose mask has no room.*'sdpa' and 'eager'"):
            mp.attach(model, mp.PrefixTuning(3, reparameterize=False))
        assert not hasattr(model, "minipeft")


def test_a_network_of_other_tensors_is_left_out_and_a_damaged_one_refused(tmp_path):
    model = attached("llama", "prefix")
    mp.save_adapter(model, tmp_path)
    network = (tmp_path / "adapter_encoder.safetensors").read_bytes()
    random_state(mp.adapters(model)["default"], seed=4)
    mp.save_adapter(model, tmp_path)
    fresh = FAMILIES["llama"]().double()
    damaged = bytearray((tmp_path / "adapter_encoder.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "adapter_encoder.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="corrupted"):
        mp.load_adapter(fresh, tmp_path)
    assert not hasattr(fresh, "minipeft")
    (tmp_path / "adapter_encoder.safetensors").write_bytes(network)
    with pytest.warns(UserWarning, match="belongs to other tensors"):
        adapter = mp.load_adapter(fresh, tmp_path)
    assert adapter.method == mp.PrefixTuning(3, reparameterize=False)
    mp.fold(model)
    mp.save_adapter(model, tmp_path)
    assert not (tmp_path / "adapter_encoder.safetensors").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"num_virtual_tokens": 4}, r"num_virtual_tokens is 4, but prompt_embeddings is \(3, 64\)"),
    ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
    ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
    ({"peft_type": "PROMPT_TUNING"}, "encoder_hidden_size is 16, which minipeft cannot represent"),
    ({"peft_type": "CARTRIDGE"}, "peft_type is 'CARTRIDGE'"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(change, words, tmp_path):
    mp.save_adapter(attached("llama", "direct"), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = FAMILIES["llama"]()
    with pytest.raises(ValueError, match=words):
        mp.load_adapter(model, tmp_path)
    assert not hasattr(model, "minipeft")


# ---------------------------------------------------------------- training, and what it costs


CARDS = [{"prompt": f"question {i} ", "completion": f"answer {i % 3}"} for i in range(12)]


class Words:
    """A tokenizer of one token a letter, as mp.fit needs one."""

    eos_token_id, pad_token_id = 2, 0

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": [[3 + ord(c) % 90 for c in text] for text in texts]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_fit_lowers_the_loss_and_evaluates_what_it_trained(family, method):
    model = FAMILIES[family]()
    torch.manual_seed(0)
    mp.attach(model, METHODS[method])
    before = mp.evaluate(model, Words(), CARDS)["loss"]
    mp.fit(model, Words(), CARDS, mp.FitConfig(steps=12, batch_size=4, lr=0.05, progress=False))
    assert mp.evaluate(model, Words(), CARDS)["loss"] < before - 0.02
    with mp.active(model, None):
        assert mp.evaluate(model, Words(), CARDS) == mp.evaluate(FAMILIES[family](), Words(), CARDS)


def test_a_text_that_leaves_the_prompt_no_position_is_refused():
    model, long = FAMILIES["llama"](), [{"prompt": "p" * 58, "completion": "abc"}]  # 62 tokens of 64
    mp.evaluate(model, Words(), long)
    for method in ("prompt", "prefix"):
        mp.attach(model, METHODS[method])
        with pytest.raises(ValueError, match="example 0 has 62 tokens; this model takes 61"):
            mp.evaluate(model, Words(), long)
        mp.detach(model)


def train_a_prefix(folder, die_at=0):
    """Six steps of a reparameterised prefix with a checkpoint after every second; it goes on where it stopped."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = FAMILIES["llama"]()
    mp.attach(model, METHODS["prefix"])

    def watch(entry):
        if entry["step"] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    mp.fit(model, Words(), CARDS, mp.FitConfig(steps=6, batch_size=4, lr=0.05, folder=folder, save_every=2, resume=True,
                                               progress=False), watch=watch)
    torch.set_num_threads(threads)
    return model


def test_a_reparameterised_prefix_is_killed_resumes_to_the_bit_and_what_it_exports_opens_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    code = f"from tests.test_prompts import train_a_prefix; train_a_prefix({str(tmp_path / 'cut')!r}, die_at=5)"
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(f.name for f in (tmp_path / "cut").glob("step-*")) == ["step-00000002", "step-00000004"]
    whole, resumed = (training.trainable(train_a_prefix(tmp_path / name)) for name in ("whole", "cut"))
    assert whole.keys() == resumed.keys() and all(torch.equal(p, resumed[n]) for n, p in whole.items())

    export = tmp_path / "cut" / "step-00000006" / "adapters" / "default"
    model, x = FAMILIES["llama"](), inputs("llama")
    base, adapter = logits_of(model, "llama"), mp.load_adapter(model, export)
    assert adapter.method == METHODS["prefix"]                   # the network is there still, to train on
    assert all(torch.equal(p, resumed[f"minipeft.default.{n}"]) for n, p in adapter.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES["llama"](), export).eval()
    with torch.no_grad():
        expected = theirs(**x).logits
    assert distance(logits_of(model, "llama"), expected) < 1e-6 and distance(base, expected) > 1e-2


@pytest.mark.parametrize(("family", "method"), [*(("llama", m) for m in METHODS), ("bert", "prompt"), ("bert", "prefix")])
def test_the_memory_bill_counts_a_prompt_or_prefix(family, method):
    config, settings = FAMILIES[family].config(), METHODS[method]
    bill = mp.memory_bill(config, settings, batch=2, seq=7)
    numbers = sum(p.numel() for p in mp.attach(FAMILIES[family](), settings).parameters())
    assert bill.trainable == numbers and bill.adapter == bill.gradients == 4 * numbers
    longer = mp.memory_bill(config, dataclasses.replace(settings, length=9), batch=2, seq=7)
    assert longer.activations > bill.activations                 # 6 positions more, in every layer
    if method in ("prompt", "direct"):                           # a text costs no more, and there is no tokenizer
        text = dataclasses.replace(settings, init="text", text="three words here")
        assert mp.memory_bill(config, text, batch=2, seq=7).total == bill.total
    with pytest.raises(ValueError, match="seq is 62 and the method takes 3 more"):
        mp.memory_bill(config, settings, batch=2, seq=62)
