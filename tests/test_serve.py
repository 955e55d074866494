"""Statements about many adapters on one base. The oracle is each adapter alone, attached to a model of its own."""

import copy
import cProfile
import os
import pickle
import pstats
import shutil
import threading
import time
import warnings

import pytest
import torch

import minipeft as mp
from minipeft import serve, sockets

from .families import FAMILIES, VOCAB
from .test_matrix import model_of

SECONDS = float(os.environ.get("MINIPEFT_SERVE_SECONDS", 60))  # of serving and swapping from several threads
METHODS = {
    "low": mp.LoRA(rank=1, alpha=2, targets="attention"), "high": mp.LoRA(rank=7, alpha=5, targets="all-linear"),
    "root": mp.LoRA(rank=4, targets="all-linear", rslora=True), "vectors": mp.IA3(),
    "short": mp.PromptTuning(3), "long": mp.PromptTuning(6),
}
ROWS = ["high", None, "low", "vectors", "short", "high", "long", "root", None, "vectors"]


class Numbers:
    """A tokenizer whose words are the ids."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(map(str, row.tolist())) for row in rows]


def base(family="llama"):
    model = FAMILIES[family]().double()
    model.generation_config.eos_token_id = None
    return model


def with_random(model, method, name, seed=0):
    adapter = mp.attach(model, method, name)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.3 + isinstance(method, mp.IA3))
    return adapter


def save(folder, method, name, family="llama", seed=0):
    model = base(family)
    with_random(model, method, name, seed)
    mp.save_adapter(model, folder / name, name)
    return folder / name


def shelf_with(model, folder, methods=METHODS, family="llama"):
    shelf = mp.Serve(model)
    for seed, (name, method) in enumerate(methods.items()):
        shelf.load(name, save(folder, method, name, family, seed))
    return shelf


def prompts_for(rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [" ".join(map(str, torch.randint(3, VOCAB, (2 + 3 * i % 8,), generator=draw).tolist())) for i in range(len(rows))]


def answers(model, prompts, tokens=20, **more):
    return mp.generate(model, Numbers(), prompts, max_new_tokens=tokens, min_new_tokens=tokens, **more)


def alone(family, name, folder):
    """A model with this one adapter."""
    model = base(family)
    if name is not None:
        mp.load_adapter(model, folder / name)
    return model


def padded(prompts):
    """ids, mask and positions of a batch padded on the left."""
    ids = [Numbers()(p)["input_ids"] for p in prompts]
    longest = max(map(len, ids))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    return torch.tensor([[0] * (longest - len(row)) + row for row in ids]), mask


def counted(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def logits_of(model, inputs, family, **more):
    if FAMILIES[family].kind == "encoder-decoder":
        more = {"decoder_input_ids": torch.tensor([[0, 5, 9]]).expand(len(inputs["attention_mask"]), 3)}
    else:
        more = {"position_ids": counted(inputs["attention_mask"])}
    with torch.no_grad():
        return model(**inputs, **more).logits


# ---------------------------------------------------------------------------------------------
# Each row as alone
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mistral", "t5"])
def test_each_row_of_a_mixed_batch_is_what_its_adapter_gives_alone(family, tmp_path):
    model, prompts = base(family), prompts_for(ROWS)
    shelf = shelf_with(model, tmp_path, family=family)
    got = answers(model, prompts, adapters=ROWS)
    ids, mask = padded(prompts)
    with shelf.rows(ROWS) as rows:
        logits = logits_of(model, rows.inputs(ids, mask), family)
    seen = set()
    for row, (name, prompt) in enumerate(zip(ROWS, prompts, strict=True)):
        single = alone(family, name, tmp_path)
        assert got[row] == answers(single, [prompt])[0], name
        own_ids, own_mask = padded([prompt])
        expected = logits_of(single, {"input_ids": own_ids, "attention_mask": own_mask}, family)[0]
        if FAMILIES[family].kind == "decoder":
            expected = expected[-own_ids.shape[1]:]                          # without the prompt's own
        close = (logits[row, -len(expected):] - expected).abs().max() / expected.abs().max()
        assert close < 1e-12, (name, close)
        without = logits_of(base(family), {"input_ids": own_ids, "attention_mask": own_mask}, family)[0]
        assert name is None or (without - expected).abs().max() > 1e-2 * expected.abs().max()
        seen.add(got[row])
    assert len(seen) > 6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_logits_are_those_of_peft_with_adapter_names(family, tmp_path):
    peft = pytest.importorskip("peft")
    methods = {name: METHODS[name] for name in ("low", "high", "root")}
    names, model = ["high", "root", None, "low", "high"], base(family)
    shelf = shelf_with(model, tmp_path, methods, family)
    ids, mask = padded(prompts_for(names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base(family), tmp_path / "low", "low")
        for name in ("high", "root"):
            theirs.load_adapter(tmp_path / name, name)
    theirs.double().eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, adapter_names=[n or "__base__" for n in names]).logits
        with shelf.rows(names) as rows:
            got = model(**rows.inputs(ids, mask)).logits
    assert (got - expected)[mask.bool()].abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("names", [["low"] * 5, ["high", "high", "root"], ["root", None, "high", "root", "root", "low"],
                                   ["vectors"] * 2, [None] * 3, ["high"]])
def test_rows_may_share_adapters_in_any_arrangement(names, tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {n: METHODS[n] for n in ("low", "high", "root", "vectors")})
    ids, mask = padded(prompts_for(names))
    with torch.no_grad(), shelf.rows(names) as rows:
        got = model(**rows.inputs(ids, mask)).logits
    for row, name in enumerate(names):
        with torch.no_grad(), shelf.rows([name]):
            expected = model(ids[row:row + 1], attention_mask=mask[row:row + 1]).logits[0]
        assert (got[row] - expected)[mask[row].bool()].abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
def test_the_next_batch_is_stacked_in_the_memory_of_the_last_one(way, tmp_path):
    model = base()
    low = {f"low{i}": METHODS["low"] for i in range(4)}
    shelf = shelf_with(model, tmp_path, low | {"high": METHODS["high"]})
    path, ids = next(iter(shelf.loaded["low0"].by_path)), torch.tensor([[5, 9, 3], [7, 4, 8]])
    places = []
    for names in (["low0", "low1"], ["low3", "low2"], ["high", "low0"], ["low1", "low0"]):
        with way(), shelf.rows(names) as rows:
            got = model(ids).logits
            places.append(rows.get(path).stack[0].data_ptr())
        for row, name in enumerate(names):
            with torch.no_grad(), shelf.rows([name]):
                expected = model(ids[row:row + 1]).logits[0]
            assert (got[row] - expected).abs().max() < 1e-12 * expected.abs().max()
    assert places[0] == places[1] and shelf.spare                # of another rank it is other memory


def test_of_the_next_batch_only_what_is_new_is_stacked(tmp_path, monkeypatch):
    model, copied, real = base(), [], torch.Tensor.copy_
    shelf = shelf_with(model, tmp_path, {f"low{i}": METHODS["low"] for i in range(4)})
    path, ids = next(iter(shelf.loaded["low0"].by_path)), torch.tensor([[5, 9, 3], [7, 4, 8], [6, 6, 3]])

    def batch(*names):
        with torch.no_grad(), shelf.rows(names) as rows:
            copied.clear()
            monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a, **k: copied.append(self.shape) or real(self, *a, **k))
            got = model(ids).logits
            monkeypatch.undo()
            stack = rows.get(path).stack
        for row, name in enumerate(names):
            piece = shelf.loaded[name].by_path[path]
            assert torch.equal(stack[0][row], piece.A) and torch.equal(stack[1][row], piece.B.T)
        return got, len(copied)

    first, _ = batch("low0", "low1", "low2")
    again, none = batch("low0", "low1", "low2")
    other, some = batch("low0", "low3", "low2")
    assert torch.equal(first, again) and torch.equal(other[[0, 2]], first[[0, 2]]) and not torch.equal(other[1], first[1])
    pieces = sum(isinstance(p, mp.methods.lora.LowRank) for p in shelf.loaded["low0"].by_path.values())
    assert none == 0 and some == 2 * pieces
    shelf.load("low0", tmp_path / "low1")                        # another version under the old name
    swapped, _ = batch("low0", "low3", "low2")
    assert not torch.equal(swapped[0], other[0]) and torch.equal(swapped[1:], other[1:])


def test_what_a_backward_pass_still_reads_is_not_stacked_over(tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {f"low{i}": METHODS["low"] for i in range(4)})
    e = model.get_input_embeddings()(torch.tensor([[5, 9, 3], [7, 4, 8]])).detach().requires_grad_()

    def loss(names):
        with shelf.rows(names):
            return model(inputs_embeds=e).logits.square().sum()
    expected, = torch.autograd.grad(loss(["low0", "low1"]), e)
    first = loss(["low0", "low1"])
    with torch.no_grad():
        loss(["low2", "low3"])
        loss(["low3", "low2"])
    assert torch.equal(torch.autograd.grad(first, e)[0], expected)


def test_memory_made_in_inference_mode_is_not_written_to_outside_of_it(tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {f"low{i}": METHODS["low"] for i in range(2)})
    ids, logits = torch.tensor([[5, 9, 3], [7, 4, 8]]), []
    for way in (torch.inference_mode, torch.no_grad):
        with way(), shelf.rows(["low0", "low1"]):
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_rows_that_share_one_adapter_go_through_it_without_a_copy(tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {"low": METHODS["low"]})
    path, piece = next(iter(shelf.loaded["low"].by_path.items()))
    with shelf.rows(["low", "low"]) as rows:
        assert rows.get(path) is piece
    with shelf.rows([None, None]) as rows:
        assert rows.get(path) is None


def test_beams_keep_the_adapter_of_their_row(tmp_path):
    model, names = base(), ["high", None, "short", "vectors"]
    shelf_with(model, tmp_path)
    prompts = prompts_for(names)
    got = answers(model, prompts, 8, adapters=names, num_beams=3)
    assert got == [answers(alone("llama", n, tmp_path), [p], 8, num_beams=3)[0] for n, p in zip(names, prompts, strict=True)]


def test_sixteen_bits_are_computed_as_alone(tmp_path):
    model = base().bfloat16()
    shelf = shelf_with(model, tmp_path)
    ids, mask = padded(prompts_for(ROWS[:4]))
    with torch.no_grad(), shelf.rows(ROWS[:4]) as rows:
        got = model(**rows.inputs(ids, mask)).logits
    for row, name in enumerate(ROWS[:4]):
        single = alone("llama", name, tmp_path).bfloat16()
        with torch.no_grad():
            expected = single(ids[row:row + 1], attention_mask=mask[row:row + 1]).logits[0]
        assert (got[row] - expected)[mask[row].bool()].abs().max() < 0.05 * expected.abs().max()


def test_attached_adapters_are_computed_together_too_and_other_methods_apart(monkeypatch):
    model, names = base(), ["a", "b", None, "house", "words", "a"]
    for seed, (name, method) in enumerate({"a": METHODS["high"], "b": METHODS["low"], "words": METHODS["short"],
                                           "house": mp.BottleneckAdapter(bottleneck=4)}.items()):
        with_random(model, method, name, seed)
    mp.activate(model, "b")
    prompts, expected = prompts_for(names), []
    for name, prompt in zip(names, prompts, strict=True):
        with mp.active(model, name):
            expected += answers(model, [prompt])
    passes, own = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: passes.append(1) or own(*a, **k))
    assert answers(model, prompts, adapters=names) == expected and len(set(expected)) == len(names)
    assert len(passes) == 2 and model.minipeft.active == ("b",)


# ---------------------------------------------------------------------------------------------
# The shelf
# ---------------------------------------------------------------------------------------------

def test_the_model_is_as_it_was_when_the_shelf_is_taken_out(tmp_path):
    model, hooks = base(), lambda m: [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules()]
    before, hooked, values = dict(vars(model)), hooks(model), copy.deepcopy(model.state_dict())
    shelf = shelf_with(model, tmp_path)
    answers(model, prompts_for(ROWS), 2, adapters=ROWS)
    assert list(model.state_dict()) == list(values) and mp.parameter_report(model) is not None
    mp.detach(model, "serve")
    assert vars(model).keys() == before.keys() and hooks(model) == hooked and serve.shelf_of(model) is None
    assert all(torch.equal(t, values[key]) for key, t in model.state_dict().items())
    with pytest.raises(ValueError, match="taken out"), shelf.rows(["low"]):
        pass


def test_without_a_batch_of_its_own_the_shelf_does_nothing(tmp_path):
    model, prompts = base(), prompts_for(ROWS)
    expected = answers(model, prompts)
    shelf_with(model, tmp_path)
    assert answers(model, prompts) == expected
    with_random(model, METHODS["high"], "mine", 9)
    assert answers(model, prompts) == answers(model, prompts, adapters=["mine"] * len(ROWS)) != expected
    assert answers(model, prompts, adapters=[None] * len(ROWS)) == expected


def test_the_least_recently_asked_for_goes_when_the_limit_is_reached(tmp_path):
    model = base()
    shelf = mp.Serve(model, limit=2)
    folders = {name: save(tmp_path, METHODS["low"], name, seed=i) for i, name in enumerate("abc")}
    shelf.load("a", folders["a"])
    shelf.load("b", folders["b"])
    answers(model, ["5 6"], 2, adapters=["a"])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), shelf.rows(["b"]):
        expected = model(ids).logits
        answers(model, ["5 6"], 2, adapters=["a"])
        shelf.load("c", folders["c"])
        assert shelf.names == ("a", "c")
        assert torch.equal(model(ids).logits, expected)                      # who holds it goes on with it
    with pytest.raises(ValueError, match="no adapter is called 'b'"):
        answers(model, ["5 6"], 2, adapters=["b"])
    shelf.load("a", folders["b"])                                            # in the place of one: none has to go
    assert set(shelf.names) == {"a", "c"}
    shelf.unload("a")
    assert shelf.names == ("c",)


def test_a_batch_keeps_the_version_that_it_began_with(tmp_path):
    model, ids = base(), torch.tensor([[5, 6, 7]])
    shelf = mp.Serve(model)
    shelf.load("x", save(tmp_path, METHODS["low"], "one", seed=1))
    with torch.no_grad():
        with shelf.rows(["x"]):
            shelf.load("x", save(tmp_path, METHODS["high"], "two", seed=2))  # before anything has been computed
            first = model(ids).logits
        with shelf.rows(["x"]):
            second = model(ids).logits
        for name, got in (("one", first), ("two", second)):
            assert (got - alone("llama", name, tmp_path)(ids).logits).abs().max() < 1e-12 * got.abs().max()


def test_loading_takes_the_same_steps_however_many_are_loaded(tmp_path):
    folder, shelf = save(tmp_path, METHODS["high"], "a"), mp.Serve(base())

    def calls(name):
        profile = cProfile.Profile()
        profile.runcall(shelf.load, name, folder)
        return pstats.Stats(profile).total_calls

    counts = [calls(f"number {i}") for i in range(40)]
    assert max(counts[20:]) <= 1.02 * counts[1] and len(shelf.names) == 40


def test_a_copy_of_the_model_has_a_shelf_of_its_own(tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {"low": METHODS["low"], "high": METHODS["high"]})
    twin = copy.deepcopy(model)
    expected = answers(model, ["5 6"], 4, adapters=["low"])
    shelf.unload("low")
    assert answers(twin, ["5 6"], 4, adapters=["low"]) == expected
    assert serve.shelf_of(twin).names == ("low", "high") and serve.shelf_of(twin).model is twin


# ---------------------------------------------------------------------------------------------
# Errors; the others keep running
# ---------------------------------------------------------------------------------------------

def cut(folder):
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.truncate(300)


def flip(folder):
    whole = bytearray((folder / "adapter_model.safetensors").read_bytes())
    whole[-5] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("damage, error, words", [
    (cut, ValueError, "truncated"), (flip, ValueError, "corrupted"), (shutil.rmtree, FileNotFoundError, "no folder"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, "adapter_model.safetensors"),
    (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "r"'), ValueError, "not valid JSON"),
])
def test_a_damaged_checkpoint_is_refused_and_the_old_version_stays(damage, error, words, tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {"a": METHODS["low"], "b": METHODS["high"]})
    expected = answers(model, ["5 6", "7 8 9"], 6, adapters=["a", "b"])
    damage(tmp_path / "a")                                                   # what is loaded does not look at the file
    assert answers(model, ["5 6", "7 8 9"], 6, adapters=["a", "b"]) == expected
    with pytest.raises(error, match=words) as told:
        shelf.load("a", tmp_path / "a")
    assert str(tmp_path / "a") in str(told.value) and shelf.names == ("a", "b")
    assert answers(model, ["5 6", "7 8 9"], 6, adapters=["a", "b"]) == expected


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    shelf, folder = shelf_with(base(), tmp_path, {"a": METHODS["low"]}), tmp_path / "a"
    own, copied = shutil.copyfile, []

    def while_written(source, target):
        copied.append(source)
        os.utime(source, ns=(0, len(copied)))
        return own(source, target)

    monkeypatch.setattr(shutil, "copyfile", while_written)
    with pytest.raises(ValueError, match="change while they are read"):
        shelf.load("b", folder)
    assert len(copied) == 6 and shelf.names == ("a",)
    monkeypatch.setattr(shutil, "copyfile", lambda s, t: while_written(s, t) if len(copied) < 8 else own(s, t))
    shelf.load("b", folder)                                                  # written once more, then left alone
    assert shelf.names == ("a", "b")


def test_errors_name_the_thing_and_what_is_accepted(tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {"french": METHODS["low"], "german": METHODS["high"]})
    expected = answers(model, ["5 6"], 4, adapters=["french"])
    with pytest.raises(ValueError, match=r"'frnch'; did you mean 'french'\? \(loaded or attached: french, german\)"):
        answers(model, ["5", "6"], adapters=["french", "frnch"])
    with pytest.raises(ValueError, match="no adapter is called 'serve'"):
        answers(model, ["5"], adapters=["serve"])
    with pytest.raises(ValueError, match="no adapter is called 'polish'"):
        shelf.unload("polish")
    other = save(tmp_path, METHODS["low"], "other", "gpt2")
    with pytest.raises(ValueError, match="made for GPT2LMHeadModel.*this is LlamaForCausalLM") as told:
        shelf.load("other", other)
    assert str(other) in str(told.value)
    for method in (mp.DoRA(rank=2), mp.BottleneckAdapter(bottleneck=4), mp.PrefixTuning(3, reparameterize=False)):
        with pytest.raises(TypeError, match=f"{type(method).__name__}.*accepted on a shelf are LoRA, IA3 and PromptTuning"):
            shelf.load("x", save(tmp_path, method, "x"))
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="name is"):
            shelf.load(name, tmp_path / "french")
    with_random(model, METHODS["low"], "mine")
    with pytest.raises(ValueError, match="'mine' is attached"):
        shelf.load("mine", tmp_path / "french")
    for limit in (0, True, 2.5):
        with pytest.raises(ValueError, match="limit is"):
            mp.Serve(base(), limit=limit)
    with pytest.raises(ValueError, match="has a shelf already"):
        mp.Serve(model)
    mp.merge(model, "mine")
    with pytest.raises(ValueError, match="'mine' is merged"):
        answers(model, ["5 6"], adapters=["french"])
    mp.unmerge(model, "mine")
    assert shelf.names == ("french", "german") and answers(model, ["5 6"], 4, adapters=["french"]) == expected


def test_an_adapter_that_is_called_serve_is_not_replaced(tmp_path):
    model = base()
    with_random(model, METHODS["low"], "serve")
    with pytest.raises(ValueError, match="called 'serve' is attached already"):
        mp.Serve(model)
    assert mp.adapters(model)["serve"].method == METHODS["low"]


def test_after_a_batch_the_model_can_be_pickled(tmp_path):
    model = base()
    shelf_with(model, tmp_path, {"low": METHODS["low"], "high": METHODS["high"]})
    wanted = answers(model, ["5 6", "7"], 4, adapters=["low", "high"])
    again = pickle.loads(pickle.dumps(model))
    assert answers(again, ["5 6", "7"], 4, adapters=["low", "high"]) == wanted


@pytest.mark.parametrize("name", ["high", "vectors", "short"])
def test_a_batch_of_another_size_is_refused(name, tmp_path):
    model = base()
    shelf = shelf_with(model, tmp_path, {name: METHODS[name], "low": METHODS["low"]})
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), pytest.raises(ValueError, match="the batch has 1 rows, and adapters are named for 2"), shelf.rows([name, "low"]) as rows:
        model(**rows.inputs(ids, torch.ones_like(ids)))
    if name != "short":
        with torch.no_grad(), pytest.raises(ValueError, match="the batch has 3 rows, and adapters are named for 2"), shelf.rows([name, "low"]):
            model(torch.tensor([[5, 6]] * 3))


def test_an_encoder_that_counts_its_positions_reads_every_row_as_alone(tmp_path):
    model = model_of("bart").double()
    model.generation_config.eos_token_id = None
    for seed, name in enumerate(["long", "short", "low"]):
        with_random(model, METHODS[name], name, seed)
    mp.activate(model, None)
    rows, prompts = ["low", "long", None, "short", None], ["5 6", "7 8 9 10 11 12", "13 14 15", "16", "17 18 19 20"]
    alone = [answers(model, [p], 6, adapters=[name])[0] for name, p in zip(rows, prompts, strict=True)]
    assert answers(model, prompts, 6, adapters=rows) == alone
    assert answers(model, prompts, 6) == [answers(model, [p], 6)[0] for p in prompts]


def test_a_prompt_that_was_not_put_in_is_told(tmp_path):
    shelf = shelf_with(base(), tmp_path, {"short": METHODS["short"]})
    with pytest.raises(RuntimeError, match=r"rows.inputs"), shelf.rows(["short"]):
        pass


# ---------------------------------------------------------------------------------------------
# Several threads
# ---------------------------------------------------------------------------------------------

def test_answers_of_several_threads_are_each_of_one_version_while_adapters_are_swapped(tmp_path):
    """Two threads serve, one asks for what is active, one writes new versions over the old and loads them, one
    tries to load broken files. Every answer is exactly that of one version, the same for all rows of a call."""
    writer, model = base(), base()
    versions = {"one": METHODS["high"], "two": METHODS["root"]}
    for seed, (name, method) in enumerate(versions.items()):
        with_random(writer, method, name, seed)
    with_random(model, METHODS["low"], "attached", 5)
    prompts = prompts_for(range(4))
    shelf = mp.Serve(model, limit=3)
    expected = {}
    for name in versions:
        mp.save_adapter(writer, tmp_path / "live", name)
        shelf.load("live", tmp_path / "live")
        expected[name] = answers(model, prompts, 6, adapters=["live"] * 4)
    broken = save(tmp_path, METHODS["low"], "broken")
    shelf.load("other", broken)
    cut(broken)
    own = {name: answers(model, prompts, 6, adapters=[name] * 4) for name in ("other", None)}
    active = answers(model, prompts, 6)
    assert all(len({*answer}) == 5 for answer in zip(*expected.values(), *own.values(), active, strict=True))

    until, seen, swaps, refused, wrong = time.monotonic() + SECONDS, [], [], [], []

    def serves(order):
        names = [("live", "other", None, "live")[i] for i in order]
        while time.monotonic() < until and not wrong:
            got = answers(model, [prompts[i] for i in order], 6, adapters=names)
            version = [v for v in versions if all(
                got[k] == (expected[v][i] if names[k] == "live" else own[names[k]][i]) for k, i in enumerate(order))]
            if len(version) != 1:
                wrong.append(got)
            seen.append(version)
            time.sleep(0.1)

    def asks():
        while time.monotonic() < until and not wrong:
            if answers(model, prompts, 6) != active:
                wrong.append("active")
            time.sleep(0.2)

    def swaps_them():
        while time.monotonic() < until and not wrong:
            for name in versions:
                mp.save_adapter(writer, tmp_path / "live", name)
                shelf.load("live", tmp_path / "live")
                swaps.append(name)
                time.sleep(0.07)

    def breaks():
        while time.monotonic() < until and not wrong:
            try:
                shelf.load("other", broken)
            except ValueError as error:
                refused.append(error)
            time.sleep(0.2)

    def kept(work, *arguments):
        try:
            work(*arguments)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=kept, args=work) for work in (
        (serves, [0, 1, 2, 3]), (serves, [3, 2, 0, 1]), (asks,), (swaps_them,), (breaks,))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and refused and len(swaps) > 2
    assert {v for version in seen for v in version} == set(versions)
    assert not model.minipeft.instead and shelf.names == ("live", "other")


def test_a_batch_is_its_threads_own(tmp_path):
    model, ids = base(), torch.tensor([[5, 6, 7]])
    shelf = shelf_with(model, tmp_path, {"low": METHODS["low"]})
    with torch.no_grad():
        bare, found = model(ids).logits, []
        with shelf.rows(["low"]):
            beside = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))
            beside.start()
            beside.join()
            with shelf.rows([None]):
                assert torch.equal(model(ids).logits, bare)
            assert not torch.equal(model(ids).logits, bare)                  # and the outer one acts again
        assert torch.equal(found[0], bare) and torch.equal(model(ids).logits, bare)
    assert not sockets.adapters(model)["serve"].has_run
