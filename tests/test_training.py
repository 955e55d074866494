"""What `fit` and `evaluate` promise: the loss, the order, the checkpoints, the errors."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.nn.functional as F

import minipeft as mp
from minipeft import sockets, training
from tests.families import FAMILIES


class Letters:
    """A tokenizer of single characters, so that these tests need no download."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, texts, add_special_tokens=True):
        many = [texts] if isinstance(texts, str) else texts
        ids = [[2 + (ord(c) % 90) for c in t] for t in many]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}


TOKENIZER = Letters()
DATA = [{"prompt": "what is " + c * (1 + i % 5) + "?", "completion": c * 3 + "!"} for i, c in enumerate("abcdefghijklm")]
LABELLED = [{"text": c * (2 + i % 4), "label": i % 3} for i, c in enumerate("abcdefghijkl")]


def llama(dtype=torch.float64):
    return FAMILIES["llama"]().to(dtype)


def with_lora(model=None, **settings):
    torch.manual_seed(7)
    model = llama() if model is None else model
    mp.attach(model, mp.LoRA(**{"rank": 2, "targets": "all-linear"} | settings))
    return model


def config(**settings):
    return mp.FitConfig(**{"steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, "precision": "fp32"} | settings)


def weights(model):
    return {n: p.detach().clone() for n, p in training.trainable(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- the loss ---------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "t5"])
def test_the_loss_is_the_cross_entropy_of_the_completion_alone(family):
    model = FAMILIES[family]().double()
    rows = training.encode(model, TOKENIZER, DATA)
    loss, _, n = training.loss_of(model, rows, 0)
    total = 0.0
    for r in rows:  # one row at a time, no padding, every position through the head, in float64
        ids = torch.tensor([r.ids])
        if r.answer is not None:
            logits, targets = model(input_ids=ids, labels=torch.tensor([r.answer])).logits[0], r.answer
        else:
            logits, targets = model(input_ids=ids).logits[0, r.start - 1:-1], r.ids[r.start:]
        total += F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    assert n == sum(len(e["completion"]) + 1 for e in DATA)
    # Gemma 2's norms and softmax compute in float32, also in a model in float64
    assert loss.item() == pytest.approx(total, rel=1e-7 if family == "gemma2" else 1e-10)


def test_the_gradient_of_the_loss_is_that_of_torchs_cross_entropy():
    z = (20 * torch.randn(7, 50, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 50, (7,))
    ours = training.CrossEntropy.apply(z, targets)
    theirs = F.cross_entropy(z, targets, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for seed in (1.0, -0.3):
        (a,), (b,) = (torch.autograd.grad(seed * loss, z, retain_graph=loss is theirs)
                      for loss in (training.CrossEntropy.apply(z, targets), theirs))
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_head_runs_only_where_the_next_token_is_a_target():
    model = llama()
    rows = training.encode(model, TOKENIZER, DATA)
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, y: seen.append(tuple(y.shape)))
    _, _, n = training.loss_of(model, rows, 0)
    assert seen == [(n, 100)]


def test_a_soft_prompt_moves_no_target():
    class Prompt(torch.nn.Module):
        length = 3

        def forward(self, e):
            return torch.cat([torch.zeros(e.shape[0], 3, e.shape[2], dtype=e.dtype), e], 1)

    class Method:
        def pieces(self, model):
            yield "embedding", "model.embed_tokens", Prompt()

    model = llama()
    mp.attach(model, Method())
    rows = training.encode(model, TOKENIZER, DATA[:3])
    loss, _, _ = training.loss_of(model, rows, 0)
    by_hand = 0.0
    for r in rows:
        logits = model(input_ids=torch.tensor([r.ids])).logits[0, 3 + r.start - 1:-1]
        by_hand += F.cross_entropy(logits, torch.tensor(r.ids[r.start:]), reduction="sum").item()
    assert loss.item() == pytest.approx(by_hand, rel=1e-10)


def test_classification_counts_and_loss_are_those_of_cross_entropy():
    model = FAMILIES["bert"]().double()
    result = mp.evaluate(model, TOKENIZER, LABELLED)
    loss, right = 0.0, 0
    for e in LABELLED:
        logits = model(input_ids=torch.tensor([TOKENIZER(e["text"])["input_ids"]])).logits
        loss += F.cross_entropy(logits, torch.tensor([e["label"]])).item()
        right += int(logits.argmax().item() == e["label"])
    assert result["loss"] == pytest.approx(loss / len(LABELLED), rel=1e-10)
    assert result["accuracy"] == right / len(LABELLED)


def test_evaluate_leaves_mode_and_weights_alone():
    model = with_lora().train()
    before = weights(model)
    result = mp.evaluate(model, TOKENIZER, DATA)
    assert model.training and same(before, weights(model))
    assert result["perplexity"] == pytest.approx(torch.tensor(result["loss"]).exp().item())


# --- batches ----------------------------------------------------------------------------------

def test_passes_hold_every_row_once_and_stay_under_the_token_limit():
    rows = training.encode(llama(), TOKENIZER, DATA)
    for limit in (1, 20, 50, 10_000):
        chunks = list(training.passes(rows, limit))
        assert sorted(map(id, (r for c in chunks for r in c))) == sorted(map(id, rows))
        assert all(len(c) == 1 or max(map(len, c)) * len(c) <= limit for c in chunks)


def test_an_epoch_holds_every_row_once_and_epochs_differ():
    rows = training.encode(llama(), TOKENIZER, DATA)
    seen = [r for s in range(13) for r in training.batch_of(rows, 2, 5, s)]  # 26 rows: two epochs
    first, second = seen[:13], seen[13:]
    assert {id(r) for r in first} == {id(r) for r in second} == {id(r) for r in rows}
    assert [r.ids for r in first] != [r.ids for r in second]
    assert [r.ids for r in training.batch_of(rows, 13, 6, 0)] != [r.ids for r in first]


def test_unshuffled_steps_take_the_data_as_they_are_given():
    rows = training.encode(llama(), TOKENIZER, DATA)               # 13
    taken = [r for s in range(4) for r in training.batch_of(rows, 4, 5, s, shuffle=False)]
    assert [id(r) for r in taken] == [id(rows[i % 13]) for i in range(16)]
    first, second, twin = with_lora(), with_lora(), with_lora()
    mp.fit(first, TOKENIZER, DATA[:4], config(steps=1, shuffle=False))
    mp.fit(second, TOKENIZER, DATA, config(steps=1, shuffle=False, seed=7))
    mp.fit(twin, TOKENIZER, DATA, config(steps=1, seed=7))
    assert all(torch.equal(weights(first)[n], weights(second)[n]) for n in weights(first))
    assert any(not torch.equal(weights(first)[n], weights(twin)[n]) for n in weights(first))


def test_how_a_batch_is_cut_into_passes_does_not_change_the_step():
    results = []
    for limit in (10_000, 30, 1):
        model = with_lora()
        mp.fit(model, TOKENIZER, DATA, config(max_tokens=limit))
        results.append(weights(model))
    for other in results[1:]:
        assert all(torch.allclose(results[0][n], other[n], rtol=1e-9, atol=1e-12) for n in other)


def test_rows_of_similar_length_share_a_batch():
    lengths = [10 + (7 * i) % 64 for i in range(640)]
    rows = [training.Row([2] * n, start=1) for n in lengths]
    def padded(batches):
        return sum(len(b) * max(map(len, b)) for b in batches)
    grouped = [training.batch_of(rows, 8, 0, s) for s in range(80)]
    shuffled = [rows[8 * s:8 * s + 8] for s in range(80)]
    assert padded(grouped) < 1.15 * sum(lengths) < padded(shuffled)
    firsts = [training.batch_of(rows, 8, 0, s)[0] for s in range(8)]
    assert sorted(map(len, firsts)) != list(map(len, firsts))      # short and long batches alternate


# --- training ---------------------------------------------------------------------------------

def test_one_step_is_adamw_on_the_mean_loss():
    model, twin = with_lora(), with_lora()
    settings = config(steps=1, weight_decay=0.1, clip=0.5, warmup=0.0, schedule="constant")
    mp.fit(model, TOKENIZER, DATA, settings)
    twin.train()
    batch = training.batch_of(training.encode(twin, TOKENIZER, DATA), 4, 0, 0)
    loss, _, n = training.loss_of(twin, batch, 0)
    (loss / n).backward()
    ps = list(training.trainable(twin).values())
    torch.nn.utils.clip_grad_norm_(ps, 0.5)
    torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=False, foreach=False).step()
    expected = weights(twin)
    assert all(torch.allclose(p, expected[n], rtol=1e-9, atol=1e-12) for n, p in weights(model).items())


def test_training_learns_and_leaves_the_base_to_the_bit():
    model = with_lora(llama(torch.float32))
    base = {k: v.clone() for k, v in model.state_dict().items()}
    result = mp.fit(model, TOKENIZER, DATA, config(steps=60, lr=2e-2), eval_data=DATA)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.evaluation["loss"] < 0.5 * result.history[0]["loss"]
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    assert not model.training and result.steps == 60 and result.peak_memory > 0
    assert all(p.grad is None for p in model.parameters())


def test_only_active_adapters_are_trained():
    model = with_lora()
    mp.attach(model, mp.LoRA(rank=1, targets=("q_proj",)), "second")
    mp.activate(model, "second")
    first = {n: p.detach().clone() for n, p in mp.adapters(model)["default"].named_parameters()}
    second = {n: p.detach().clone() for n, p in mp.adapters(model)["second"].named_parameters()}
    mp.fit(model, TOKENIZER, DATA, config(steps=2))
    assert same(first, dict(mp.adapters(model)["default"].named_parameters()))
    assert not same(second, dict(mp.adapters(model)["second"].named_parameters()))


def test_full_fine_tuning_is_fit_without_an_adapter():
    model = FAMILIES["bert"]()
    before = weights(model)
    result = mp.fit(model, TOKENIZER, LABELLED, config(steps=40, lr=3e-3, weight_decay=0.01), eval_data=LABELLED)
    assert not same(before, weights(model)) and result.evaluation["accuracy"] > 0.8


def test_a_classification_adapter_trains_its_own_head():
    model = FAMILIES["bert"]()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    mp.attach(model, mp.LoRA(targets=("query", "value")))
    result = mp.fit(model, TOKENIZER, LABELLED, config(steps=60, lr=2e-2), eval_data=LABELLED)
    assert result.evaluation["accuracy"] > 0.8
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())


def test_gradient_checkpointing_changes_memory_not_results():
    plain, saving = with_lora(), with_lora()
    mp.fit(plain, TOKENIZER, DATA, config())
    mp.fit(saving, TOKENIZER, DATA, config(gradient_checkpointing=True))
    assert all(torch.allclose(p, weights(plain)[n], rtol=1e-9) for n, p in weights(saving).items())


@pytest.mark.parametrize("schedule, middle, last", [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)])
def test_the_rate_climbs_in_the_warm_up_and_then_follows_its_schedule(schedule, middle, last):
    c = mp.FitConfig(lr=2.0, schedule=schedule, warmup=0.1)
    assert [c.rate(s, 100) for s in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert c.rate(55, 100) == pytest.approx(2.0 * middle)
    assert c.rate(99, 100) == pytest.approx(2.0 * last, abs=0.05)


def test_watch_and_the_log_see_every_step(tmp_path):
    seen = []
    result = mp.fit(with_lora(), TOKENIZER, DATA, config(folder=tmp_path), watch=seen.append)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert seen == result.history == logged and [e["step"] for e in seen] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "memory", "seconds"} <= set(seen[0])


def test_early_stopping_goes_back_to_the_best_weights():
    model = with_lora(llama(torch.float32))
    strangers = [{"prompt": "zz", "completion": "q"}]  # gets worse while the rest gets better
    result = mp.fit(model, TOKENIZER, DATA, config(steps=80, lr=5e-2, warmup=0.0, eval_every=2, patience=3), eval_data=strangers)
    scores = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert result.stopped_early and len(scores) < 40
    assert len(scores) == scores.index(min(scores)) + 1 + 3
    assert result.evaluation["loss"] == pytest.approx(min(scores), rel=1e-5)


def test_bf16_autocast_and_fp16_loss_scaling_train_close_to_fp32():
    ends = {}
    for precision in ("fp32", "bf16", "fp16"):
        model = with_lora(llama(torch.float32))
        result = mp.fit(model, TOKENIZER, DATA, config(steps=30, lr=1e-2, precision=precision))
        ends[precision] = result.history[-1]["loss"]
        assert all(p.dtype == torch.float32 for p in weights(model).values())
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=0.2)
    assert ends["fp16"] == pytest.approx(ends["fp32"], rel=0.2)


# --- stop, kill, resume -----------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3}])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(tmp_path, settings):
    straight = with_lora(llama(torch.float32), **settings)
    mp.fit(straight, TOKENIZER, DATA, config(steps=8))

    class Stop(Exception):
        pass

    def stop_at_five(entry):
        if entry["step"] == 5:
            raise Stop

    broken = with_lora(llama(torch.float32), **settings)
    with pytest.raises(Stop):
        mp.fit(broken, TOKENIZER, DATA, config(steps=8, folder=tmp_path, save_every=2), watch=stop_at_five)
    resumed = with_lora(llama(torch.float32), **settings)
    result = mp.fit(resumed, TOKENIZER, DATA, config(steps=8, folder=tmp_path, save_every=2, resume=True))
    assert same(weights(straight), weights(resumed))
    logged = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged == [e["step"] for e in result.history] == list(range(1, 9))


KILLED = """
    import sys, os, signal, torch
    import minipeft as mp
    from tests.test_training import TOKENIZER, DATA, config, with_lora, llama, weights
    folder, victim, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    def watch(entry):
        if entry["step"] == victim:
            os.kill(os.getpid(), signal.SIGKILL)
    model = with_lora(llama(torch.float32), dropout=0.2)
    mp.fit(model, TOKENIZER, DATA, config(steps=9, folder=folder, save_every=2, resume=True), watch=watch)
    torch.save(weights(model), out)
"""


def test_a_run_killed_at_three_steps_ends_with_the_weights_of_the_uninterrupted_run(tmp_path):
    def start(folder, victim, out):
        return subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / folder), str(victim),
                               str(tmp_path / out)], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)

    assert start("straight", 0, "straight.pt").returncode == 0
    for victim in (1, 4, 7):  # before the first checkpoint, on one's step, between two
        assert start("killed", victim, "killed.pt").returncode == -signal.SIGKILL
        assert not (tmp_path / "killed.pt").exists()
    assert start("killed", 0, "killed.pt").returncode == 0
    assert same(torch.load(tmp_path / "straight.pt"), torch.load(tmp_path / "killed.pt"))


def test_ctrl_c_leaves_a_checkpoint_that_loads(tmp_path):
    code = """
        import sys, torch
        import minipeft as mp
        from tests.test_training import TOKENIZER, DATA, config, with_lora, llama
        def watch(entry): print(entry["step"], flush=True)
        mp.fit(with_lora(llama(torch.float32)), TOKENIZER, DATA, config(steps=100_000, folder=sys.argv[1]), watch=watch)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.stdout.readline().strip() != "3":
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0 and "KeyboardInterrupt" in errors
    [step] = (tmp_path / "run").glob("step-*")
    model = llama(torch.float32)
    adapter = mp.load_adapter(model, step / "adapters" / "default")
    assert sum(p.abs().sum().item() for n, p in adapter.named_parameters() if n.endswith("B")) > 0


def test_a_checkpoint_cut_short_is_never_taken_for_one(tmp_path, monkeypatch):
    """The process dies while it writes: the older checkpoint stays the newest."""
    model = with_lora(llama(torch.float32))
    real = os.replace

    def die(source, target):
        if "step-00000004" in str(target):
            raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        mp.fit(model, TOKENIZER, DATA, config(steps=6, folder=tmp_path, save_every=2))
    monkeypatch.undo()
    assert [p.name for p in sorted(tmp_path.glob("step-*"))] == ["step-00000002"]
    mp.fit(with_lora(llama(torch.float32)), TOKENIZER, DATA, config(steps=6, folder=tmp_path, save_every=2, resume=True))
    assert not list(tmp_path.glob(".making*"))


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    mp.fit(with_lora(), TOKENIZER, DATA, config(folder=tmp_path))
    with pytest.raises(ValueError, match="holds a run already"):
        mp.fit(with_lora(), TOKENIZER, DATA, config(folder=tmp_path))


@pytest.mark.parametrize("change, named", [({"lr": 0.5}, "lr"), ({"steps": 7}, "total steps"), ({"seed": 3}, "seed")])
def test_a_run_is_not_resumed_with_other_settings(tmp_path, change, named):
    mp.fit(with_lora(), TOKENIZER, DATA, config(folder=tmp_path))
    with pytest.raises(ValueError, match=f"another run: its {named}"):
        mp.fit(with_lora(), TOKENIZER, DATA, config(folder=tmp_path, resume=True, **change))
    with pytest.raises(ValueError, match="another run: its data"):
        mp.fit(with_lora(), TOKENIZER, DATA[1:], config(folder=tmp_path, resume=True))


# --- errors -----------------------------------------------------------------------------------

def test_a_rate_far_too_high_is_blamed_on_the_rate():
    model = with_lora(llama(torch.float32))
    with pytest.raises(training.NonFiniteLoss, match=r"step \d+ \(rate .*learning rate is probably too high"):
        mp.fit(model, TOKENIZER, DATA, config(steps=50, lr=1e30, warmup=0.0, clip=0.0))


def test_a_loss_that_is_nan_before_training_is_blamed_on_weights_or_data():
    model = with_lora()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(training.NonFiniteLoss, match="step 1 .*before any training"):
        mp.fit(model, TOKENIZER, DATA, config())


def test_nothing_to_train_is_an_error():
    model = with_lora()
    mp.adapters(model)["default"].requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trainable"):
        mp.fit(model, TOKENIZER, DATA, config())


def test_a_piece_that_never_runs_is_refused():
    class Bypass(torch.nn.Module):
        def __init__(self, lin):
            super().__init__()
            self.lin = lin

        def forward(self, x):
            return F.linear(x, self.lin.weight)

    model = llama()
    model.model.layers[0].mlp.down_proj = Bypass(model.model.layers[0].mlp.down_proj)
    mp.attach(model, mp.LoRA(targets=("q_proj", "lin")))
    with pytest.warns(UserWarning, match="1 of 3 pieces did not run"), pytest.raises(RuntimeError, match="mlp.down_proj.lin"):
        mp.fit(model, TOKENIZER, DATA, config())


@pytest.mark.parametrize("data, message", [
    ([], "data is empty"),
    ([{"prompt": "a"}], r"example 0 has the fields \['prompt'\]"),
    ([*DATA, {"text": "a", "label": 0}], "the same in all examples"),
    ([*DATA, {"prompt": "", "completion": "a"}], "example 13 needs at least one token of prompt"),
    ([{"prompt": "a" * 5000, "completion": "a"}], "example 0 has 5002 tokens"),
])
def test_bad_data_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        mp.fit(with_lora(), TOKENIZER, data, config())


def test_a_label_that_the_model_does_not_have_is_named():
    with pytest.raises(ValueError, match="example 0 has the label 3; this model has 3"):
        mp.fit(FAMILIES["bert"](), TOKENIZER, [{"text": "a", "label": 3}], config())


@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("steps", 1.5), ("batch_size", 0), ("lr", -1), ("lr", float("nan")), ("warmup", 2), ("schedule", "step"),
    ("precision", "int8"), ("patience", -1), ("epochs", 0), ("save_every", 5), ("resume", True), ("clip", -0.1),
])
def test_bad_settings_are_named_with_what_is_accepted(field, value):
    with pytest.raises(ValueError, match=field):
        mp.FitConfig(**{field: value})


def test_training_works_from_another_thread():
    import threading
    results = []
    thread = threading.Thread(target=lambda: results.append(mp.fit(with_lora(), TOKENIZER, DATA, config(steps=2))))
    thread.start()
    thread.join(60)
    assert results[0].steps == 2


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = llama()
    torch.manual_seed(3)
    mp.fit(FAMILIES["bert"](), TOKENIZER, LABELLED, config(steps=1))
    assert torch.equal(torch.rand(3), expected)


# --- passes side by side ------------------------------------------------------------------------

@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def lanes_of(model, **settings):
    rows = training.encode(model, TOKENIZER, DATA)
    settings = config(**settings)
    model.train()
    return training.Lanes(model, settings.max_tokens, training._one_at_a_time(
        model, rows, training.trainable(model), settings))


def test_two_lanes_train_as_one_does_and_each_time_to_the_bit(two_cores):
    results = []
    for limit in (128, 128, 10):                                  # two lanes of 64 tokens; one of 10
        model = with_lora()
        assert lanes_of(model, max_tokens=limit).count == (2 if limit == 128 else 1)
        mp.fit(model, TOKENIZER, DATA, config(steps=4, batch_size=13, max_tokens=limit))
        results.append(weights(model))
    assert all(torch.equal(results[0][n], w) for n, w in results[1].items())
    assert all(torch.allclose(results[0][n], w, rtol=1e-9, atol=1e-12) for n, w in results[2].items())
    assert torch.get_num_threads() == 2


def test_two_lanes_score_as_one_does(two_cores):
    model = with_lora()
    many = DATA * 8
    one, two = (mp.evaluate(model, TOKENIZER, many, max_tokens=limit) for limit in (100, 128))
    assert one["targets"] == two["targets"] and one["token_accuracy"] == two["token_accuracy"]
    assert abs(one["loss"] - two["loss"]) < 1e-12


def test_adapters_beside_the_feed_forward_keep_two_passes_apart(two_cores):
    model = llama()
    mp.attach(model, mp.BottleneckAdapter(4, "parallel", init_std=0.3))
    for _ in range(3):
        one, two = (mp.evaluate(model, TOKENIZER, DATA * 8, max_tokens=limit)["loss"] for limit in (100, 128))
        assert abs(one - two) < 1e-12


def test_passes_that_draw_random_numbers_follow_one_another(two_cores):
    dropping = llama()
    mp.attach(dropping, mp.LoRA(dropout=0.1))
    whole = llama().requires_grad_(True)
    assert lanes_of(with_lora()).count == 2
    assert lanes_of(dropping).count == lanes_of(whole).count == lanes_of(with_lora(), gradient_checkpointing=True).count == 1


def test_an_error_in_one_lane_reaches_the_caller_and_leaves_no_gradient(two_cores):
    model = with_lora()
    with torch.no_grad():
        next(iter(training.trainable(model).values())).fill_(float("nan"))
    with pytest.raises(training.NonFiniteLoss, match="step 1"):
        mp.fit(model, TOKENIZER, DATA, config(batch_size=13, max_tokens=128))
    assert all(p.grad is None for p in model.parameters())


def test_passes_are_as_many_as_lanes_can_share():
    rows = [training.Row([2] * 10, start=1) for _ in range(13)]
    assert [len(c) for c in training.passes(rows, 50)] == [5, 5, 3]
    assert len(training.passes(rows, 50, lanes=2)) == 4


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_the_optimizers_of_bitsandbytes_are_refused_without_a_gpu(optimizer, tmp_path):
    model = with_lora()
    before = weights(model)
    with pytest.raises(ValueError, match=f"optimizer is '{optimizer}', which needs a GPU; on this device .cpu. accepted"):
        mp.fit(model, TOKENIZER, DATA, config(optimizer=optimizer, folder=tmp_path / "run"))
    assert same(before, weights(model)) and not (tmp_path / "run").exists()


def test_an_8_bit_optimizer_trains_and_its_run_is_resumed(tmp_path, monkeypatch):
    """bitsandbytes has CPU code for it as well, slow; the check for a GPU is set aside to use it here."""
    optim = pytest.importorskip("bitsandbytes.optim")
    made = []

    def eight_bits(weights, config):
        made.append(optim.AdamW8bit(list(weights.values()), lr=config.lr, weight_decay=0.0, min_8bit_size=64))
        return made[-1]

    monkeypatch.setattr(training, "_optimizer", eight_bits)
    settings = dict(steps=6, optimizer="adamw8bit", save_every=3)
    whole, half = with_lora(llama(torch.float32)), with_lora(llama(torch.float32))
    mp.fit(whole, TOKENIZER, DATA, config(folder=tmp_path / "whole", **settings))
    assert {t.dtype for state in made[0].state.values() for t in state.values() if torch.is_tensor(t)} == {
        torch.uint8, torch.float32}
    mp.fit(half, TOKENIZER, DATA, config(folder=tmp_path / "half", **settings))
    (tmp_path / "half" / "step-00000006").rename(tmp_path / "gone")
    again = with_lora(llama(torch.float32))
    mp.fit(again, TOKENIZER, DATA, config(folder=tmp_path / "half", resume=True, **settings))
    assert same(weights(whole), weights(again)) and not same(weights(whole), weights(with_lora(llama(torch.float32))))


# --- what does not fit together ----------------------------------------------------------------

@pytest.mark.parametrize("options,words", [
    ({"precision": "float32"}, "precision is 'float32'; accepted are 'auto', 'fp32'"), ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": True}, "max_tokens is True"), ({"max_tokens": 2.5}, "max_tokens is 2.5"),
])
def test_an_evaluation_with_unknown_settings_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        mp.evaluate(llama(torch.float32), TOKENIZER, DATA, **options)


def test_data_that_the_model_has_no_head_for_is_refused():
    with pytest.raises(ValueError, match="the data has labels, and LlamaForCausalLM no head for classes"):
        mp.fit(with_lora(), TOKENIZER, LABELLED, config())
    bert = FAMILIES["bert"]().double()
    mp.attach(bert, mp.LoRA(targets="attention"))
    with pytest.raises(ValueError, match="prompts and completions, and BertForSequenceClassification no head that predicts"):
        mp.fit(bert, TOKENIZER, DATA, config())
    for label in (0.5, "1", None, 3, -1):
        with pytest.raises(ValueError, match=f"example 0 has the label {label!s}"):
            mp.fit(bert, TOKENIZER, [{"text": "abc", "label": label}], config())
    with pytest.raises(ValueError, match="the data has labels, and BertModel no head"):
        mp.evaluate(bert.bert, TOKENIZER, LABELLED)


def test_a_run_that_stopped_early_is_over_when_it_is_taken_up_again(tmp_path):
    torch.manual_seed(1)
    strangers = [{"prompt": "what is " + c + "?", "completion": c * 9} for c in "zyx"]
    settings = dict(steps=80, lr=5e-2, warmup=0.0, eval_every=2, patience=3, folder=tmp_path, resume=True)
    first = with_lora()
    one = mp.fit(first, TOKENIZER, DATA, config(**settings), eval_data=strangers)
    again = with_lora()
    two = mp.fit(again, TOKENIZER, DATA, config(**settings), eval_data=strangers)
    assert one.stopped_early and two.stopped_early and two.steps == one.steps < 80
    assert same(weights(first), weights(again)) and two.evaluation == one.evaluation


def test_an_adapter_that_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path):
    class Unknown(mp.LoRA):
        pass

    model = llama()
    mp.attach(model, Unknown(rank=2))
    before = weights(model)
    with pytest.raises(TypeError, match="'default' is Unknown, which has no checkpoint format"):
        mp.fit(model, TOKENIZER, DATA, config(folder=tmp_path / "run"))
    assert same(before, weights(model)) and not (tmp_path / "run").exists()


def test_the_positions_that_roberta_keeps_for_padding_are_not_counted():
    assert sockets.position_limit(FAMILIES["bert"]()) == FAMILIES["bert"]().config.max_position_embeddings
    model = FAMILIES["roberta"]()
    limit = sockets.position_limit(model)
    assert limit == model.config.max_position_embeddings - model.config.pad_token_id - 1
    with torch.no_grad():
        model(torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(torch.full((1, limit + 1), 5))
