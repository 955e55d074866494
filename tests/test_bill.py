"""Bills: counts against closed formulas, bytes against torch, bitsandbytes and the running process."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import psutil
import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

import minipeft as mp
from minipeft import bill as bills
from minipeft import packing, sockets
from minipeft.training import Row, loss_of
from tests.families import FAMILIES

LLAMA_3_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)
LLAMA_65B = dict(vocab_size=32000, hidden_size=8192, intermediate_size=22016, num_hidden_layers=80,
                 num_attention_heads=64, max_position_embeddings=2048)
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVERYWHERE = mp.LoRA(rank=4, targets="all-linear")


def small_llama(layers=2, **settings):
    """Width 64, grouped heads, 500 tokens, tied embeddings."""
    return LlamaConfig(**dict(dict(
        vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256), **settings))


def deep(family, layers):
    """The config of a family in families.py with more blocks."""
    config = FAMILIES[family].config()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    if hasattr(config, "num_decoder_layers"):
        config.num_decoder_layers = layers + 1
    return config


# ------------------------------------------------------------------------------------ parameters


def test_full_fine_tuning_is_reported_as_one_hundred_per_cent():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    report = mp.parameter_report(model)
    assert (report.trainable, report.total, report.percent) == (30, 30, 100.0)
    assert [(m.name, m.total) for m in report.modules] == [("0", 20), ("1", 10)]


def test_a_tied_weight_is_counted_once():
    tied = LlamaForCausalLM(small_llama())
    loose = LlamaForCausalLM(small_llama(tie_word_embeddings=False))
    assert mp.parameter_report(loose).total - mp.parameter_report(tied).total == 500 * 64


def test_a_lora_is_reported_by_its_closed_formula():
    model = LlamaForCausalLM(small_llama())
    base = mp.parameter_report(model).total
    mp.attach(model, mp.LoRA(rank=3, targets=("q_proj", "down_proj")))
    report = mp.parameter_report(model)
    q, down = 3 * (64 + 64), 3 * (160 + 64)
    assert report.trainable == 2 * (q + down)
    assert report.total == base + report.trainable
    assert report.percent == pytest.approx(100 * report.trainable / report.total)
    modules = {m.name: m for m in report.modules}
    assert modules["model.layers.1.self_attn.q_proj"] == bills.Count("model.layers.1.self_attn.q_proj", q, q + 64 * 64)
    assert modules["model.layers.1.mlp.up_proj"].trainable == 0


def test_every_adapter_is_reported_beside_the_base():
    model = LlamaForCausalLM(small_llama())
    base = mp.parameter_report(model).total
    mp.attach(model, mp.LoRA(rank=2, targets="q_proj"), "one")
    mp.attach(model, mp.LoRA(rank=5, targets="q_proj"), "two").requires_grad_(False)
    one, two = 2 * 2 * 128, 2 * 5 * 128
    assert mp.parameter_report(model).methods == (
        bills.Count("base", 0, base), bills.Count("LoRA 'one'", one, one), bills.Count("LoRA 'two'", 0, two))


def test_a_classifier_that_is_trained_too_is_counted_at_its_place():
    model = FAMILIES["bert"]()
    mp.attach(model, mp.LoRA(rank=2, targets="query"))
    report = mp.parameter_report(model)
    head = 32 * 3 + 3
    assert bills.Count("classifier", head, 2 * head) in report.modules
    assert report.trainable == 2 * 2 * (32 + 32) + head == sum(m.trainable for m in report.modules)


def test_the_report_is_a_table_with_equal_modules_in_one_row():
    model = LlamaForCausalLM(small_llama())
    mp.attach(model, mp.LoRA(rank=2, targets="q_proj"))
    report = mp.parameter_report(model)
    line = next(line for line in str(report).splitlines() if "q_proj" in line)
    assert line.split() == ["model.layers.*.self_attn.q_proj", "×2", "512", "8,704", "5.882"]
    assert report._repr_html_().count("<tr>") == len(report.rows()) == 5  # title, base, LoRA, all, q_proj


def test_a_report_is_refused_to_what_is_no_module():
    with pytest.raises(TypeError, match="model is a LlamaConfig; accepted is a torch.nn.Module"):
        mp.parameter_report(small_llama())


# ------------------------------------------------------------------------- known numbers, no memory


def test_llama_3_8b_with_rank_16_everywhere_trains_41_943_040():
    bill = mp.memory_bill(LlamaConfig(**LLAMA_3_8B), mp.LoRA(rank=16, targets=SEVEN), batch=1, seq=64, dtype="bfloat16")
    assert bill.trainable == 41_943_040
    assert bill.parameters == 8_030_261_248 + 41_943_040
    assert bill.weights == pytest.approx(2 * 8_030_261_248, rel=1e-6)  # and the rotary frequencies
    assert bill.adapter == bill.gradients == 4 * bill.trainable       # float32 beside a 16-bit base
    assert bill.optimizer == 8 * bill.trainable


def test_65b_in_nf4_takes_no_memory_to_say_that_it_needs_34_gb():
    """33.4 GB of codes and scales, and 1.05 GB of 16-bit embeddings."""
    before = psutil.Process().memory_info().rss
    bill = mp.memory_bill(LlamaConfig(**LLAMA_65B), mp.LoRA(rank=16, targets=SEVEN), batch=1, seq=512,
                          dtype="bfloat16", quantized=True, gradient_checkpointing=True)
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    codes = bill.weights - 2 * (bill.parameters - bill.trainable - linear)
    assert 8 * codes / linear == pytest.approx(4.127, abs=0.001)
    assert bill.weights == pytest.approx(33.5e9, rel=0.04)
    assert bill.fits(48e9) and not bill.fits(24e9)
    assert psutil.Process().memory_info().rss - before < 0.5e9


def test_nf4_bytes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    for shape in [(64, 256), (96, 1000), (576, 1536)]:
        packed, state = functional.quantize_4bit(torch.randn(shape), blocksize=64, compress_statistics=True,
                                                 quant_type="nf4")
        parts = [packed, state.absmax, state.state2.absmax, state.offset]
        four = mp.Linear4bit(shape[1], shape[0], bias=False)
        assert sum(t.nbytes for t in four.buffers()) == sum(t.nbytes for t in parts)


@pytest.mark.parametrize("name, make", [
    ("sgd", lambda p: torch.optim.SGD(p)),
    ("momentum", lambda p: torch.optim.SGD(p, momentum=0.9)),
    ("adam", lambda p: torch.optim.Adam(p)),
    ("adamw", lambda p: torch.optim.AdamW(p, fused=True)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_states_are_those_of_torch(name, make, dtype):
    weights = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in [(5, 7), (11,)]]
    optimizer = make(weights)
    sum(w.sum() for w in weights).backward()
    optimizer.step()
    states = [t for s in optimizer.state.values() for k, t in s.items() if torch.is_tensor(t) and k != "step"]
    assert sum(bills._state_bytes(name, w) for w in weights) == sum(t.nbytes for t in states)


def test_8_bit_states_are_those_of_bitsandbytes():
    optim = pytest.importorskip("bitsandbytes").optim
    for size in [(100,), (64, 64), (63, 97)]:
        p = nn.Parameter(torch.ones(size))
        optimizer = optim.AdamW8bit([p])
        optimizer.init_state({**optimizer.defaults, "params": [p]}, p, 0, 0)
        state = optimizer.state[p]
        sizes = [state[k].nbytes for k in ("state1", "state2", "absmax1", "absmax2") if k in state]
        assert bills._state_bytes("adamw8bit", p) == sum(sizes)


# ------------------------------------------------------------------------------ against real passes


def rows_for(model, batch, seq, targets):
    """What mp.fit would train on: a classifier's first row is one token shorter than the others; a decoder does
    not read the last token of a row, only predicts it."""
    if hasattr(model, "classifier"):
        return [Row([5] * (seq - (i == 0)), label=1) for i in range(batch)]
    return [Row([5] * (seq + 1), start=seq + 1 - targets) for _ in range(batch)]


def measured(model, batch, seq, targets, autocast=False):
    """(bytes kept after the forward pass, most at any time) of one real pass with mp.fit's loss."""
    with packing.one_sequence(model, seq) as packed, bills.Live(known=model) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, rows_for(model, batch, seq, targets), 0, packed)[0]
        kept = live.now
        loss.backward()
    return kept, live.peak


def profiled(model, batch, seq, targets):
    """The same by torch's profiler, which sees every allocation, those inside kernels too."""
    from torch.autograd.profiler import record_function
    from torch.profiler import ProfilerActivity, profile

    rows = rows_for(model, batch, seq, targets)
    with packing.one_sequence(model, seq) as packed, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss = loss_of(model, rows, 0, packed)[0]
        with record_function("backward starts"):
            loss.backward()
    events = found.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == "backward starts")
    now = kept = most = 0
    for when, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        most = max(most, now)
        kept = now if when < start else kept
    return kept, most


def standing(bill):
    """What is there before a pass begins."""
    return bill.weights + bill.adapter + bill.optimizer


@pytest.mark.parametrize("base, method, shape, ruler", [
    ("smollm2-135m", mp.LoRA(rank=8, targets="all-linear"), (2, 48, 12), measured),
    ("minilm-l6", "full", (8, 32, 1), profiled),
    ("minilm-l6", mp.LoRA(rank=8, targets="attention"), (8, 32, 1), measured),
], ids=["smollm2", "minilm", "minilm-lora"])  # fmt: skip
def test_the_bill_of_a_real_model_is_what_a_real_pass_takes(base, method, shape, ruler):
    model, _ = mp.load_base(base, device="cpu", num_labels=3 if base == "minilm-l6" else None)
    bill = mp.memory_bill(model, method, **dict(zip(("batch", "seq", "logit_positions"), shape, strict=True)))
    if method != "full":
        mp.attach(model, method)
    kept, most = ruler(model.train(), *shape)
    assert bill.weights + bill.adapter == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=1e-4)
    assert bill.activations + bill.logits == pytest.approx(kept, rel=0.01)
    assert bill.peak - standing(bill) == pytest.approx(most, rel=0.01)
    assert bill.total >= bill.peak


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "checkpointing", "dropout", "full"])
def test_the_bill_of_a_small_llama_is_what_a_real_pass_takes(case):
    config = small_llama(layers=7)
    method = mp.LoRA(rank=4, dropout=0.1 if case == "dropout" else 0.0, targets=("q_proj", "v_proj", "down_proj"))
    dtype = case if case in ("bfloat16", "autocast") else "float32"
    again = case == "checkpointing"
    bill = mp.memory_bill(config, "full" if case == "full" else method, batch=4, seq=32, logit_positions=8,
                          dtype=dtype, gradient_checkpointing=again)
    model = LlamaForCausalLM(config).to(bills.DTYPES[dtype]).train()
    if again:
        bills._recompute_blocks(model)
    if case != "full":
        mp.attach(model, method)
    kept, most = measured(model, 4, 32, 8, autocast=dtype == "autocast")
    assert bill.activations + bill.logits == pytest.approx(kept, rel=0.02)
    assert bill.peak - standing(bill) == pytest.approx(most, rel=0.02)


class Front(nn.Module):
    """Two positions in front, of the keys and values (1, 2, 2, 16) or of the embeddings (2, 64)."""

    length = 2

    def __init__(self, *shape):
        super().__init__()
        self.P = nn.Parameter(torch.zeros(*shape))

    def forward(self, *given):  # (B, H, T, d) twice, or (B, T, d) once
        longer = tuple(torch.cat([self.P.expand(len(t), *self.P.shape[-t.dim() + 1:]), t], dim=-2) for t in given)
        return longer if len(longer) > 1 else longer[0]


@dataclass(frozen=True)
class Fronts:
    """A method for the other two sockets."""

    socket: str

    def pieces(self, model):
        if self.socket == "embedding":
            yield "embedding", "model.embed_tokens", Front(2, 64)
        else:
            for i in range(len(model.model.layers)):
                yield "key/value", f"model.layers.{i}.self_attn", Front(1, 2, 2, 16)


@pytest.mark.parametrize("socket", ["embedding", "key/value"])
def test_pieces_in_the_other_sockets_are_billed_as_well(socket):
    model = LlamaForCausalLM(small_llama(layers=6)).train()
    attention = model.config._attn_implementation
    bill = mp.memory_bill(model, Fronts(socket), batch=4, seq=32, logit_positions=8)
    assert model.config._attn_implementation == attention
    mp.attach(model, Fronts(socket))
    kept, most = measured(model, 4, 32, 8)
    assert bill.trainable == (2 * 64 if socket == "embedding" else 6 * 2 * 2 * 16)
    assert bill.activations + bill.logits == pytest.approx(kept, rel=0.02)
    assert bill.peak - standing(bill) == pytest.approx(most, rel=0.02)


def test_gradients_that_add_up_over_passes_bring_the_step_up_to_the_total():
    config = small_llama(layers=7)
    bill = mp.memory_bill(config, "full", batch=8, seq=64, logit_positions=8)
    model = LlamaForCausalLM(config).train()
    measured(model, 8, 64, 8)  # leaves its gradients
    most = measured(model, 8, 64, 8)[1] + bill.gradients
    single = bill.peak - standing(bill)
    assert single * 1.05 < most <= bill.total - standing(bill)
    assert bill.total - standing(bill) == pytest.approx(most, rel=0.15)


PROCESS = """
import psutil, sys, torch
import minipeft as mp
from minipeft import packing
from minipeft.training import Row, loss_of

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key + ":"))

model, _ = mp.load_base("smollm2-135m", device="cpu")
mp.attach(model.train(), mp.LoRA(rank=8, targets="all-linear"))
weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(weights.values(), fused=True)
model(torch.ones(1, 2, dtype=torch.long))                     # what the libraries load on first use
before = status("VmRSS")
with packing.one_sequence(model, 64) as packed:
    for _ in range(2):
        loss_of(model, [Row([5] * 65, start=49) for _ in range(8)], 0, packed)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_grows_by_what_the_bill_says():
    # freed tensors go back to the system at once, so that the process is as large as what it holds
    plain = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, env=plain)
    assert run.returncode == 0, run.stderr
    model, _ = mp.load_base("smollm2-135m", device="cpu")
    bill = mp.memory_bill(model, mp.LoRA(rank=8, targets="all-linear"), batch=8, seq=64, logit_positions=16)
    assert bill.total - bill.weights - bill.adapter == pytest.approx(int(run.stdout), rel=0.15)


# ------------------------------------------------------------------------------- three and four blocks


@pytest.mark.parametrize("family, method", [
    ("llama", EVERYWHERE), ("gemma2", EVERYWHERE), ("gpt2", None), ("bert", None), ("t5_gated", EVERYWHERE),
])  # fmt: skip
def test_three_and_four_blocks_tell_what_six_cost(family, method, monkeypatch):
    ask = dict(batch=3, seq=16, logit_positions=5)
    short = mp.memory_bill(deep(family, 6), method, **ask)
    monkeypatch.setattr(bills, "_alike", lambda model, path: False)  # now every block runs
    assert short == mp.memory_bill(deep(family, 6), method, **ask)


def test_blocks_that_differ_are_all_run():
    """Only the last two of eight blocks are adapted: nothing is kept of the six before them."""
    late = mp.LoRA(rank=4, targets=r".*\.[67]\.self_attn\.q_proj")
    bill = mp.memory_bill(small_llama(layers=8), late, batch=4, seq=32, logit_positions=8)
    everywhere = mp.memory_bill(small_llama(layers=8), replace(late, targets="q_proj"), batch=4, seq=32, logit_positions=8)
    assert bill.trainable == everywhere.trainable / 4 == 2 * 4 * 128
    assert bill.activations < 0.4 * everywhere.activations
    model = LlamaForCausalLM(small_llama(layers=8)).train()
    mp.attach(model, late)
    assert bill.activations + bill.logits == pytest.approx(measured(model, 4, 32, 8)[0], rel=0.02)


# --------------------------------------------------------------------------------- lines that must move


def test_a_batch_and_a_sequence_cost_activations_only():
    one = mp.memory_bill(small_llama(7), EVERYWHERE, batch=2, seq=16)
    two = mp.memory_bill(small_llama(7), EVERYWHERE, batch=4, seq=16)
    assert (two.weights, two.adapter, two.gradients, two.optimizer) == (
        one.weights, one.adapter, one.gradients, one.optimizer)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.05)
    assert two.logits == pytest.approx(2 * one.logits, rel=0.05)


def test_fewer_targets_cost_fewer_logits():
    all_of_them = mp.memory_bill(small_llama(), EVERYWHERE, batch=4, seq=64)
    few = mp.memory_bill(small_llama(), EVERYWHERE, batch=4, seq=64, logit_positions=8)
    assert few.activations == all_of_them.activations
    assert few.logits == pytest.approx(all_of_them.logits / 8, rel=0.05)
    assert few.temporary < all_of_them.temporary


def test_checkpointing_keeps_little_of_the_activations():
    plain = mp.memory_bill(small_llama(12), EVERYWHERE, batch=4, seq=64)
    again = mp.memory_bill(small_llama(12), EVERYWHERE, batch=4, seq=64, gradient_checkpointing=True)
    assert again.activations < 0.15 * plain.activations


def test_a_quantized_base_is_an_eighth_and_unpacks_one_weight_at_a_time(monkeypatch):
    monkeypatch.setattr(mp.nf4, "compiled", lambda t, kind: None)  # the compiled kernels unpack less
    plain = mp.memory_bill(small_llama(), EVERYWHERE, batch=2, seq=8)
    packed = mp.memory_bill(small_llama(), EVERYWHERE, batch=2, seq=8, quantized=True)
    linear = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 160)
    saved = plain.weights - packed.weights
    assert saved == pytest.approx(linear * (4 - 4.127 / 8), rel=0.01)
    one = 4 * 64 * 160                                # and at most half of it for the codes on their way
    assert plain.temporary + 0.9 * one <= packed.temporary <= plain.temporary + 1.8 * one
    assert packed.activations == plain.activations
    model = mp.quantize(LlamaForCausalLM(small_llama()))
    assert mp.memory_bill(model, EVERYWHERE, batch=2, seq=8) == packed
    assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) == packed.weights


def test_autocast_keeps_no_copy_of_a_4_bit_weight():
    plain, packed = (mp.memory_bill(small_llama(), EVERYWHERE, batch=2, seq=8, dtype="autocast", quantized=q)
                     for q in (False, True))
    linear = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 160)
    assert packed.activations < plain.activations - 1.5 * linear


# -------------------------------------------------------------------------------------------- the object


def test_the_lines_add_up_and_decide_what_fits():
    bill = mp.memory_bill(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=300), "full", batch=2, seq=8)
    assert bill.total == sum(getattr(bill, line) for line in bills.LINES)
    assert bill.fits(bill.total) and not bill.fits(bill.total - 1)
    assert bill.gradients == 4 * bill.trainable == 4 * bill.parameters and bill.adapter == 0
    with pytest.raises(ValueError, match="available is 0; accepted is a number of bytes above 0"):
        bill.fits(0)


def test_the_bill_is_a_table_in_the_unit_of_its_size():
    bill = bills.MemoryBill(15_000_000_000, 2_000_000, 0, 0, 1_000_000_000, 0, 0, 16_000_000_000, 1, 1, "a <case>")
    lines = str(bill).splitlines()
    assert lines[0].split() == ["GB", "%"] and lines[-1] == "a <case>"
    assert [line.split() for line in lines if line.startswith("weights")] == [["weights", "15.000", "93.7"]]
    assert "<th" in bill._repr_html_() and "a &lt;case&gt;" in bill._repr_html_()
    assert str(replace(bill, weights=1, activations=0)).splitlines()[0].split() == ["MB", "%"]


def test_asking_leaves_the_model_its_config_and_the_random_numbers_alone():
    model = LlamaForCausalLM(small_llama()).eval()
    adapter = mp.attach(model, mp.LoRA(rank=2))
    before, config, state = [p.clone() for p in model.parameters()], model.config.to_dict(), torch.get_rng_state()
    first = mp.memory_bill(model, EVERYWHERE, batch=2, seq=8, dtype="bfloat16")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config and not model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sockets.adapters(model) == {"default": adapter}
    assert torch.get_default_dtype() == torch.float32
    assert first == mp.memory_bill(model.config, EVERYWHERE, batch=2, seq=8, dtype="bfloat16")  # its own adapter does not count


def test_an_encoder_config_is_billed_as_a_classifier():
    config = BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    bill = mp.memory_bill(config, "full", batch=2, seq=8)
    assert bill.assumed.startswith("BertForSequenceClassification, full fine-tuning: one pass of 2 × 8 tokens; adamw")


@pytest.mark.parametrize("change, error, says", [
    (dict(batch=0), ValueError, "batch is 0; accepted is a whole number from 1"),
    (dict(seq=2.5), ValueError, "seq is 2.5; accepted is a whole number from 1"),
    (dict(seq=300), ValueError, "seq is 300; LlamaConfig says max_position_embeddings 256"),
    (dict(logit_positions=9), ValueError, "logit_positions is 9; accepted is a whole number from 1 to seq, 8"),
    (dict(optimizer="adamW8bits"), ValueError, "optimizer is 'adamW8bits'; did you mean 'adamw8bit'"),
    (dict(dtype="float23"), ValueError, "dtype is 'float23'; did you mean 'float32'"),
    (dict(dtype=torch.int8), ValueError, "dtype is 'int8'; .*accepted are 'float64', 'float32'"),
    (dict(method="lora"), TypeError, "method is 'lora'; accepted are a method's settings"),
    (dict(method=mp.LoRA), TypeError, "accepted are a method's settings, such as mp.LoRA()"),
    (dict(method="full", quantized=True), ValueError, "4-bit codes have no gradient"),
    (dict(method=mp.LoRA(targets="query_proj")), ValueError, "did you mean 'q_proj'"),
    (dict(model_or_config={"hidden_size": 8}), TypeError, "model_or_config is a dict; accepted is a transformers model"),
])  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_accepted(change, error, says):
    asked = dict(model_or_config=small_llama(), method=EVERYWHERE, batch=1, seq=8) | change
    with pytest.raises(error, match=says):
        mp.memory_bill(asked.pop("model_or_config"), asked.pop("method"), **asked)


def test_a_body_without_a_head_is_refused():
    from transformers import BertModel

    config = BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    with pytest.raises(TypeError, match="BertModel, a body without a head"):
        mp.memory_bill(BertModel(config), "full", batch=1, seq=8)
