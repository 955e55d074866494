"""Measured beside Hugging Face PEFT and bitsandbytes, in one run: `make bench`.

    python tests/bench.py [--repeats 3] [--steps 4] [--only finetune,dora]
    python tests/bench.py --table           the results as README shows them

Every figure is a ratio, ours / theirs, of medians over repeats that take turns, so that what else the
machine does falls on both alike: whole runs (import, attach, finetune) each in a process of its own;
single steps, products and answers one after the other in one process; memory in one process a side.
The results go to `data/results/bench.json`, each measurement with date, versions and machine; what
is not measured again stays there as it was.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
BATCH, RANK, RATE, EVALUATED = 32, 8, 1e-3, 64
SIDES = {  # what is measured -> the sides that take turns
    "import": ("ours", "peft"), "attach": ("ours", "peft"), "finetune": ("ours", "peft"),
    "prompt": ("ours", "peft"), "prefix": ("ours", "peft"), "dora": ("ours", "peft", "lora"),
    "quantize": ("ours", "bnb"), "dequantize": ("ours", "bnb", "copy"), "product": ("ours", "bnb", "float32"),
    "generate": ("ours", "bnb", "float32"), "qlora": ("ours", "peft", "peft_bf16"),
    "serve": ("ours", "peft", "shared", "first"),
}
WHOLE, TRAINED = ("import", "attach", "finetune"), ("prompt", "prefix", "dora", "qlora")
BESIDE = {"lora": "our LoRA", "bnb": "bitsandbytes", "copy": "a copy", "peft_bf16": "peft, bf16",
          "shared": "one shared", "first": "our first"}   # names in the table
SERVED, LOADED = 32, 100                    # rows of a batch, each with an adapter of its own; adapters on the shelf
SIDE = 4096         # of the matrix that is quantised, dequantised, multiplied with


# ---------------------------------------------------------------------------------------------
# The workers: one process, one side, one measurement, one line of JSON
# ---------------------------------------------------------------------------------------------

def cards(steps: int):
    """The same examples in the same order for both sides: steps × BATCH to train on, then some to score."""
    import random

    import minipeft as mp
    train = list(mp.load_data("drug_cards", "train"))
    random.Random(0).shuffle(train)
    held_out = list(mp.load_data("drug_cards", "validation"))
    random.Random(1).shuffle(held_out)
    return train[: steps * BATCH], held_out[:EVALUATED]


def watched():
    """(bytes in use now, function that gives the peak since)."""
    from minipeft import profiles
    profiles.reset_peak_memory("cpu")
    return profiles.memory_in_use("cpu"), lambda: profiles.peak_memory("cpu")


def finetune_ours(steps: int, seed: int) -> dict:
    import torch

    import minipeft as mp
    model, tokenizer = mp.load_base("smollm2-135m")
    train, held_out = cards(steps)
    torch.manual_seed(seed)
    mp.attach(model, mp.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"))
    loaded, peak = watched()
    began = time.perf_counter()
    result = mp.fit(model, tokenizer, train, mp.FitConfig(
        steps=steps, batch_size=BATCH, lr=RATE, warmup=0.0, shuffle=False, progress=False), eval_data=held_out)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak(), "above_loaded": peak() - loaded,
            "eval_loss": result.evaluation["loss"], "steps": sum(h["seconds"] for h in result.history),
            "where": where(model, tokenizer, train[:BATCH])}


def finetune_peft(steps: int, seed: int) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    import minipeft as mp
    from minipeft import profiles
    model, tokenizer = mp.load_base("smollm2-135m")
    train, held_out = cards(steps)

    def encoded(examples):
        rows = []
        for e in examples:
            prompt = tokenizer(e["prompt"])["input_ids"]
            answer = tokenizer(e["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append({"input_ids": prompt + answer, "attention_mask": [1] * len(prompt + answer),
                         "labels": [-100] * len(prompt) + answer})
        return rows

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
            learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0,
            max_grad_norm=1.0, optim="adamw_torch_fused", use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, bf16=profiles.precision("cpu") == "bf16", dataloader_pin_memory=False)
        trainer = InOrder(model, arguments, DataCollatorForSeq2Seq(tokenizer, padding=True),
                          train_dataset=encoded(train), eval_dataset=encoded(held_out))
        loaded, peak = watched()
        began = time.perf_counter()
        trainer.train()
        trained = time.perf_counter() - began
        loss = trainer.evaluate()["eval_loss"]
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak(), "above_loaded": peak() - loaded, "eval_loss": loss, "steps": trained}


def where(model, tokenizer, examples) -> dict:
    """Seconds of one of our steps by kind of operation, so that a ratio that falls short can be explained."""
    import torch

    from minipeft import packing, training
    rows = training.encode(model, tokenizer, examples)
    model.train()
    with packing.one_sequence(model, max(map(len, rows))) as packed, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for chunk in training.passes(rows, 512, 2, packed):
            training.loss_of(model, chunk, tokenizer.pad_token_id, packed)[0].backward()
    kinds = {"matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
             "attention": ("scaled_dot_product",), "softmax and loss": ("log_softmax", "nll_loss", "argmax")}
    times = dict.fromkeys([*kinds, "the rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, names in kinds.items() if any(
            event.key == n or (not n.startswith("aten::") and n in event.key) for n in names)), "the rest")
        times[kind] += event.self_cpu_time_total / 1e6
    return {k: round(v, 3) for k, v in times.items()}


# ---- one training step, side beside side in one process ----

def rows_for(what: str) -> list:
    """Encoded examples: 8 of 20 to 48 tokens, a prompt of 12 in each; for qlora 8 of 64, all learned."""
    import torch

    from minipeft.training import Row
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (8, 64)).tolist()
    return [Row(row, start=1) for row in ids] if what == "qlora" else [Row(row[: 48 - 4 * i], start=12) for i, row in enumerate(ids)]


def our_step(model, rows):
    """A step as `mp.fit` takes it."""
    import torch

    import minipeft as mp
    from minipeft import training
    config, steps, taken = mp.FitConfig(batch_size=len(rows), lr=1e-3, shuffle=False, progress=False), 10_000, itertools.count()
    weights = training.trainable(model)
    optimizer, scaler = training._optimizer(weights, config), torch.amp.GradScaler("cpu", enabled=False)
    precision = training._precision(model, config.precision)
    context = training._passes_of(model, rows, weights, config, precision)
    lanes = context.__enter__()                                  # and is left when the step is forgotten
    model.train()

    def step(context=context):
        training._step(model, rows, weights, optimizer, scaler, mp.base.tokenizer_of(model), config, precision,
                       next(taken), steps, lanes)
    return step


def peft_step(model, rows):
    """A step as transformers' Trainer takes it: one padded batch, the model's own loss, clipping, AdamW."""
    import torch

    from minipeft import profiles
    longest = max(map(len, rows))
    ids = torch.tensor([r.ids + [0] * (longest - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    labels = ids.masked_fill((mask == 0) | (torch.arange(longest) < torch.tensor([r.start for r in rows])[:, None]), -100)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    model.train()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=profiles.precision("cpu") == "bf16"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def ours(method, kind: str = "float32"):
    import minipeft as mp
    model, _ = smollm(kind)
    mp.attach(model, method)
    return model


def theirs(config, kind: str = "float32"):
    from peft import get_peft_model
    return get_peft_model(smollm(kind)[0], config)


def trained(what: str, side: str):
    """The model of one side, ready to be trained."""
    import minipeft as mp
    if side in ("ours", "lora"):
        low_rank = {"rank": RANK, "alpha": 2 * RANK, "targets": "all-linear"}
        if what == "qlora":
            return ours(mp.LoRA(**low_rank), "ours")
        return ours({"prompt": lambda: mp.PromptTuning(20), "prefix": lambda: mp.PrefixTuning(20, hidden=192),
                     "dora": lambda: (mp.LoRA if side == "lora" else mp.DoRA)(**low_rank)}[what]())
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
    low_rank = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if what == "qlora":
        return theirs(LoraConfig(**low_rank), "bnb bf16" if side == "peft_bf16" else "bnb")
    return theirs({"prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
                   "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=True,
                                                        encoder_hidden_size=192),
                   "dora": lambda: LoraConfig(**low_rank, use_dora=True)}[what]())


def stepper(what: str, side: str, model):
    return (our_step if side in ("ours", "lora") else peft_step)(model, rows_for(what))


def steps_turns(what: str, steps: int) -> dict:
    return in_turns({side: stepper(what, side, trained(what, side)) for side in SIDES[what]}, steps,
                    ("peft", "peft_bf16") if what == "qlora" else ())


def steps_memory(what: str, side: str, steps: int) -> dict:
    model = trained(what, side)
    step = stepper(what, side, model)
    loaded, peak = watched()
    for _ in range(min(steps, 3)):
        step()
    return {"peak": peak(), "above_loaded": peak() - loaded}


def attach_ours(steps, seed) -> dict:
    import minipeft as mp
    model, _ = mp.load_base("smollm2-135m")
    mp.attach(model, mp.LoRA(targets="all-linear"))
    mp.detach(model)
    gc.collect()                                                 # of what loading left behind
    began = time.perf_counter()
    mp.attach(model, mp.LoRA(targets="all-linear"))
    return {"seconds": time.perf_counter() - began}


def attach_peft(steps, seed) -> dict:
    from peft import LoraConfig, get_peft_model

    import minipeft as mp
    model, _ = mp.load_base("smollm2-135m")
    get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).unload()
    gc.collect()
    began = time.perf_counter()
    get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return {"seconds": time.perf_counter() - began}


def import_ours(steps, seed) -> dict:
    import torch  # noqa: F401
    began = time.perf_counter()
    import minipeft  # noqa: F401
    return {"seconds": time.perf_counter() - began}


def import_peft(steps, seed) -> dict:
    import torch  # noqa: F401
    began = time.perf_counter()
    import peft  # noqa: F401
    return {"seconds": time.perf_counter() - began}


# ---- four bits ----

def kernels_built():
    """The compiled kernels, and a matrix."""
    import torch

    from minipeft.quant import kernels
    if not kernels.build():
        raise SystemExit(f"the compiled kernels cannot be built here: {kernels._failed}")
    torch.manual_seed(0)
    return kernels, torch.randn(SIDE, SIDE)


def in_turns(jobs: dict, repeats: int, rivals: tuple[str, ...] = (), again: bool = False) -> dict[str, list[float]]:
    """Seconds of each job, `repeats` times, the jobs taking turns, after two rounds that warm up. Of `rivals`, of which
    only the fastest counts, one that takes half as long again as another in the first round is out. `again`: each turn
    is two runs, and the second counts. For jobs of milliseconds: the threads of the job before wait busily for
    more work, on the cores of this one, whose own threads have gone to sleep meanwhile."""
    jobs, seconds = dict(jobs), {name: [] for name in jobs}
    for repeat in range(repeats + 2):
        if repeat == 1 and rivals:
            limit = 1.5 * min(seconds[name][0] for name in rivals)
            for name in [name for name in rivals if seconds[name][0] > limit]:
                del jobs[name], seconds[name]
        names = list(jobs)
        for name in names[repeat % len(names):] + names[:repeat % len(names)]:
            if again:
                jobs[name]()
            began = time.perf_counter()
            jobs[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: taken[2:] for name, taken in seconds.items()}


def quantize_turns(repeats) -> dict:
    from bitsandbytes import functional
    kernels, W = kernels_built()
    return in_turns({"ours": lambda: kernels.quantize(W), "bnb": lambda: functional.quantize_4bit(W, quant_type="nf4")}, repeats)


def dequantize_turns(repeats) -> dict:
    """Into an existing tensor bitsandbytes has no kernel on a CPU."""
    import torch
    from bitsandbytes import functional
    kernels, W = kernels_built()
    (packed, absmax), (theirs, state), out, n = kernels.quantize(W), functional.quantize_4bit(W, quant_type="nf4"), W.clone(), W.numel()
    with torch.inference_mode():
        new = in_turns({"ours": lambda: kernels.dequantize(packed, absmax, n), "bnb": lambda: functional.dequantize_4bit(theirs, state),
                        "copy": W.clone}, repeats)
        existing = in_turns({"ours": lambda: kernels.dequantize(packed, absmax, n, out=out.view(-1)),
                             "copy": lambda: out.copy_(W)}, repeats)
    return {"new": new, "existing": existing}


def product_turns(repeats) -> dict:
    """bitsandbytes in eval mode, which is when it uses its packed kernel, and in both of its compute types."""
    import torch

    import minipeft as mp
    _, W = kernels_built()
    linear = torch.nn.Linear(SIDE, SIDE, bias=False)
    linear.weight.data = W
    ours = mp.Linear4bit.of(linear, double_quant=False).eval()
    theirs = {f"bnb {dtype}": bnb_linear(W, None, dtype, False).eval() for dtype in (torch.float32, torch.bfloat16)}
    shapes = [(f"rows {n}", torch.randn(n, SIDE)) for n in (1, 8, 32, 512)]
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        shapes.append(("rows 512, bf16", shapes[-1][1].bfloat16()))
    found = {}
    with torch.inference_mode():
        for name, x in shapes:
            full = shapes[3][1] if name.endswith("bf16") else x          # held against float32 in both cases
            jobs = {"ours": lambda: ours(x), "float32": lambda: torch.nn.functional.linear(full, W)}
            found[name] = in_turns(jobs | {kind: lambda layer=layer: layer(x) for kind, layer in theirs.items()}, repeats, again=True)
    return found


def bnb_linear(W, bias, compute_dtype, double_quant: bool):
    import bitsandbytes
    import torch
    new = bitsandbytes.nn.Linear4bit(W.shape[1], W.shape[0], bias is not None, compute_dtype,
                                     compress_statistics=double_quant, quant_type="nf4")
    new.weight = bitsandbytes.nn.Params4bit(W.detach(), requires_grad=False, compress_statistics=double_quant,
                                            quant_type="nf4", module=new)
    if bias is not None:
        new.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
    return new.to("cpu")


def smollm(kind: str):
    """SmolLM2: "ours", and the same linears in bitsandbytes' 4 bits, computing in float32 ("bnb") or in bfloat16
    ("bnb bf16"), or "float32", as it is."""
    import torch

    import minipeft as mp
    from minipeft import anatomy
    model, tokenizer = mp.load_base("smollm2-135m", quantized=kind == "ours")
    if kind.startswith("bnb"):
        for path in list(anatomy.match(model, "all-linear")):
            old, (parent, _, leaf) = model.get_submodule(path), path.rpartition(".")
            compute = torch.bfloat16 if "bf16" in kind else torch.float32
            setattr(model.get_submodule(parent), leaf, bnb_linear(old.weight, old.bias, compute, True))
        model.is_loaded_in_4bit = True
    return model.eval(), tokenizer


def generate_turns(repeats) -> dict:
    """Seconds a token of one greedy answer of 48 tokens; bitsandbytes in both of its compute types."""
    import minipeft as mp
    prompt = "What is paracetamol used for?\n"

    def answer(kind):
        model, tokenizer = smollm(kind)
        if kind == "ours":
            return lambda: mp.generate(model, tokenizer, [prompt], max_new_tokens=48, min_new_tokens=48)
        return lambda: model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=48, min_new_tokens=48,
                                      do_sample=False, pad_token_id=tokenizer.eos_token_id)

    kinds = ("ours", "bnb", "bnb bf16", "float32")
    found = in_turns({kind: answer(kind) for kind in kinds}, repeats, kinds[1:3])
    return {kind: [t / 48 for t in seconds] for kind, seconds in found.items()}


# ---- many adapters on one base ----

def serve_turns(repeats) -> dict:
    """SERVED rows with as many rank-8 adapters on all linears: a decoding step after 16 tokens, a forward pass of 16
    tokens (stacking the adapters included), choosing another adapter, loading one more.

    "shared" is one attached adapter for all rows, "first" are our first ten loads beside our last ten.
    """
    import torch
    from peft import PeftModel

    import minipeft as mp
    from minipeft import serve, sockets
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model, _ = smollm("float32")
        adapter = mp.attach(model, mp.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"), "shared")
        for i in range(SERVED):
            torch.manual_seed(i)
            for p in adapter.parameters():
                p.normal_(std=0.02)
            mp.save_adapter(model, f"{folder}/{i}", "shared")
        shelf, loads, peft_loads = mp.Serve(model), [], []
        for i in range(LOADED):
            loads.append(seconds_of(lambda: shelf.load(str(i), f"{folder}/{i % SERVED}")))
        theirs = PeftModel.from_pretrained(smollm("float32")[0], f"{folder}/0", "0").eval()
        for i in range(1, SERVED):
            peft_loads.append(seconds_of(lambda: theirs.load_adapter(f"{folder}/{i}", str(i))))

        names, ids = [str(i) for i in range(SERVED)], torch.randint(5, 1000, (SERVED, 17))
        gathered = serve.Rows(model, [shelf.loaded[name] for name in names])

        turns = itertools.count()

        def ours_forward():
            """Each turn with other adapters in the rows, so that all of them are stacked."""
            first = next(turns)
            with shelf.rows([str((first + i) % LOADED) for i in range(SERVED)]):
                return model(ids[:, :16]).logits

        def decoding(run):
            """One token after sixteen, which the cache keeps; the one is taken out again."""
            cache = run(ids[:, :16]).past_key_values

            def step():
                out = run(ids[:, 16:], past_key_values=cache)
                cache.crop(-1)
                return out
            return step

        def ours_run(ids, **more):
            with sockets.instead(model, gathered):
                return model(ids, use_cache=True, **more)

        def peft_run(ids, **more):
            return theirs(input_ids=ids, use_cache=True, adapter_names=names, **more)

        def shared_run(ids, **more):
            return model(ids, use_cache=True, **more)

        same = (ours_run(ids).logits - peft_run(ids).logits).abs().max() / peft_run(ids).logits.abs().max()
        if same > 1e-4:
            raise SystemExit(f"the answers differ from peft's by {same:.1e}")
        found = {"forward": in_turns({"ours": ours_forward, "peft": lambda: peft_run(ids[:, :16]),
                                      "shared": lambda: shared_run(ids[:, :16])}, repeats),
                 "decode": in_turns({"ours": decoding(ours_run), "peft": decoding(peft_run), "shared": decoding(shared_run)},
                                    3 * repeats)}
        turn, paths = itertools.count(), list(adapter.pieces())

        def ours_switch():
            with shelf.rows([str(next(turn) % LOADED)]) as rows:
                for path in paths:
                    rows.get(path)

        found["switch"] = in_turns({"ours": ours_switch, "peft": lambda: theirs.set_adapter(str(next(turn) % SERVED))}, repeats)
        found["load"] = {"ours": loads[-10:], "first": loads[:10], "peft": peft_loads[-3:]}
        return found


def seconds_of(job) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------
# Taking turns
# ---------------------------------------------------------------------------------------------

def measure(worker: str, steps: int, seed: int) -> dict:
    done = subprocess.run([sys.executable, __file__, "--worker", worker, "--steps", str(steps), "--seed", str(seed)],
                          capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    if done.returncode:
        raise SystemExit(f"{worker} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(what: str, steps: int, repeats: int) -> dict[str, list[dict]]:
    """The results of each side; a result is a dict of figures."""
    from tqdm import tqdm
    results = {side: [] for side in SIDES[what]}
    if what in WHOLE:
        for repeat in tqdm(range(repeats + repeats % 2), desc=what, unit="turn"):      # each side first equally often
            for side in SIDES[what] if repeat % 2 == 0 else SIDES[what][::-1]:
                results[side].append(measure(f"{what}_{side}", steps, repeat))
        return results
    print(f"{what}: the sides take turns", file=sys.stderr, flush=True)
    if what in TRAINED:
        found = {"seconds": measure(f"steps_turns:{what}", 3 * repeats, 0)}
        for side in found["seconds"]:
            results[side].append(measure(f"steps_memory:{what},{side}", steps, 0))
    else:
        found = measure(f"{what}_turns", {"generate": 2, "serve": 3}.get(what, 9) * repeats, 0)
    for figure, sides in (found if isinstance(next(iter(next(iter(found.values())))), str) else {"seconds": found}).items():
        for side in SIDES[what]:
            kinds = [taken for kind, taken in sides.items() if kind == side or side == "bnb" and kind.startswith("bnb ")]
            if kinds:                                            # bitsandbytes in its faster compute type
                results[side] += [{figure: t} for t in min(kinds, key=statistics.median)]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of the fine-tune")
    parser.add_argument("--only", default=",".join(SIDES), help="what to measure, with commas between")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the results as README shows them")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        name, _, more = chosen.worker.partition(":")
        arguments = [*more.split(","), chosen.steps] if more else [chosen.steps] if name.endswith("_turns") else [chosen.steps, chosen.seed]
        print(json.dumps(globals()[name](*arguments)))
        return

    if chosen.table:
        print(markdown(json.loads((REPOSITORY / "data" / "results" / "bench.json").read_text())["rows"]))
        return

    chosen.only = chosen.only.split(",")
    for what in chosen.only:
        if what not in SIDES:
            parser.error(f"--only has {what!r}; accepted are {', '.join(SIDES)}")
    if chosen.steps < 2:
        parser.error(f"--steps is {chosen.steps}; accepted is a whole number from 2")
    for what in chosen.only:
        results = take_turns(what, chosen.steps, chosen.repeats)
        rows, more = rows_of(what, results), {}
        show(rows)
        if what == "finetune":
            losses = {side: [r["eval_loss"] for r in results[side]] for side in ("ours", "peft")}
            ours, theirs = map(statistics.median, losses.values())
            noise = max(max(side) - min(side) for side in losses.values())
            more = {"eval loss": losses | {"difference of medians": ours - theirs, "spread over seeds": noise,
                                           "within noise": abs(ours - theirs) <= max(noise, 0.01)}}
            print(f"\nfinal evaluation loss: ours {ours:.4f}, peft {theirs:.4f}, spread over seeds {noise:.4f}: "
                  + ("within noise" if more["eval loss"]["within noise"] else "NOT within noise"))
            print("where one of our steps spends its time (s, profiled):", results["ours"][-1]["where"])
        write(what, rows, results | more, chosen)


def rows_of(what: str, results: dict[str, list[dict]]) -> list[dict]:
    """One row a figure: what, of which measurement, ours, theirs, ratio, what was asked, whether it was reached.

    `asked` is the largest ratio, or where the unit says so, the most seconds of ours.
    """
    def row(name, key, asked, unit="s", beside="peft"):
        scale = 2**30 if unit == "GiB" else 1.0
        ours, theirs = (statistics.median(r[key] for r in results[side] if key in r) / scale for side in ("ours", beside))
        reached = ours <= (asked if unit == "s, absolute" else asked * theirs)
        return {"what": name, "of": what, "ours": ours, "beside": BESIDE.get(beside, beside),
                "theirs": theirs, "ratio": ours / theirs, "asked": asked, "unit": unit, "reached": reached}

    if what == "import":
        return [row("import, beyond import torch", "seconds", 0.3, "s, absolute")]
    if what == "attach":
        return [row("attach LoRA to all linears of SmolLM2", "seconds", 0.1, "s, absolute")]
    if what == "finetune":
        return [row("fine-tune: wall-clock time", "seconds", 0.6),
                row("fine-tune: peak memory of the process", "peak", 0.6, "GiB"),
                row("fine-tune: peak memory above the loaded model", "above_loaded", 0.6, "GiB")]
    if what == "quantize":
        return [row(f"NF4, {SIDE}×{SIDE}: quantise", "seconds", 0.04, beside="bnb")]
    if what == "dequantize":
        return [row(f"NF4, {SIDE}×{SIDE}: dequantise, {into} tensor", into, asked, beside=beside)
                for beside, into, asked in (("bnb", "new", 1.0), ("copy", "new", 1.3), ("copy", "existing", 1.3))]
    if what == "product":
        limits = {"bnb": {"rows 1": 0.8, "rows 8": 0.5, "rows 32": 0.5},
                  "float32": {"rows 1": 0.5, "rows 512": 1.2, "rows 512, bf16": 0.3}}
        return [row(f"NF4, {SIDE}×{SIDE}: product, {rows}", rows, asked, beside=beside) for beside, of in limits.items()
                for rows, asked in of.items() if any(rows in r for r in results["ours"])]
    if what == "generate":
        return [row("NF4 SmolLM2: greedy, a token", "seconds", 1 / 1.4, beside=beside) for beside in ("bnb", "float32")]
    if what == "qlora":
        faster = min((side for side in ("peft", "peft_bf16") if results[side]),
                     key=lambda side: statistics.median(r["seconds"] for r in results[side] if "seconds" in r))
        return [row("QLoRA: a training step of 8×64", "seconds", 0.75, beside=faster),
                row("QLoRA: peak memory of the process", "peak", 1.0, "GiB", faster)]
    if what == "serve":
        passes = [row(f"{SERVED} rows, {SERVED} adapters: {of}", key, asked, beside=beside) for beside, limits in
                  (("peft", (1 / 4, 1 / 1.35)), ("shared", (1.25, 1.25)))
                  for (of, key), asked in zip((("a decoding step", "decode"), ("16 tokens", "forward")), limits, strict=True)]
        return [*passes[:2], row(f"{LOADED} adapters: choosing another", "switch", 1e-3, "s, absolute"),
                row(f"{LOADED} adapters: loading the last", "load", 0.1), *passes[2:],
                row(f"{LOADED} adapters: loading the last", "load", 1.1, beside="first")]
    name = "DoRA" if what == "dora" else f"{what} tuning"
    limits = {"peft": 1.0, "lora": 1.25}
    return [row(f"{name}: {figure}", key, limits[beside], unit, beside) for beside in SIDES[what][1:]
            for figure, key, unit in (("a training step", "seconds", "s"), ("peak memory of the process", "peak", "GiB"),
                                      ("peak memory above the loaded model", "above_loaded", "GiB"))]


def show(rows: list[dict]) -> None:
    """The rows as a table."""
    print(f"\n{'':48}{'ours':>9}{rows[0]['beside']:>13}{'ratio':>8}   asked")
    for r, before in zip(rows, [rows[0], *rows], strict=False):
        if r["beside"] != before["beside"]:
            print(f"{'':48}{'ours':>9}{r['beside']:>13}{'ratio':>8}   asked")
        asked = f"≤ {r['asked']} s" if r["unit"] == "s, absolute" else f"ratio ≤ {r['asked']:.3g}"
        print(f"{r['what']:48}{r['ours']:9.4f}{r['theirs']:13.4f}{r['ratio']:8.3f}   {asked}  "
              + ("reached" if r["reached"] else "NOT reached"))


def markdown(rows: list[dict]) -> str:
    """The rows as README shows them."""
    def told(value: float, unit: str) -> str:
        return f"{value:.3g} GiB" if unit == "GiB" else f"{value:.3g} s" if value >= 0.1 else f"{1000 * value:.3g} ms"

    lines = ["| | ours | beside | ratio | asked |", "|---|---|---|---|---|"]
    for r in rows:
        asked = f"at most {r['asked']:g} s" if r["unit"] == "s, absolute" else f"at most {r['asked']:.3g}"
        lines.append(f"| {r['what']} | {told(r['ours'], r['unit'])} | {r['beside']} {told(r['theirs'], r['unit'])} | {r['ratio']:.2g} | "
                     f"{asked}{'' if r['reached'] else ': **not reached**'} |")
    return "\n".join(lines)


def write(what: str, rows: list[dict], details: dict, chosen) -> None:
    """Put one measurement into the results, in the place of an older one of the same; the others stay."""
    from importlib.metadata import version

    path = REPOSITORY / "data" / "results" / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {"command": "make bench", "rows": [], "details": {}}
    date = time.strftime("%Y-%m-%d")
    known["rows"] = [r for r in known["rows"] if r["of"] != what] + [r | {"date": date} for r in rows]
    known["details"][what] = {
        "date": date, "repeats": chosen.repeats, "steps": chosen.steps, "machine": machine_words(),
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")}} | details
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(whole, path)


def machine_words() -> str:
    import platform

    import psutil
    return f"{platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


if __name__ == "__main__":
    main()
