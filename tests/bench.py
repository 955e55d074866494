"""Measured beside Hugging Face PEFT and bitsandbytes, in one run: `make bench`.

    python tests/bench.py [--repeats 3] [--steps 8] [--only finetune,dora]

Every figure is a ratio, ours / theirs, of medians over repeats that take turns, each repeat in a
process of its own, so that what else the machine does falls on both alike. The results go to
`data/results/bench.json`, each measurement with date, versions and machine; what is not measured
again stays there as it was.
"""

import argparse
import gc
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
}
BESIDE = {"lora": "our LoRA", "bnb": "bitsandbytes", "copy": "a copy", "peft_bf16": "peft, bf16"}   # names in the table
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

    from minipeft import training
    rows = training.encode(model, tokenizer, examples)
    model.train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for chunk in training.passes(rows, 256):
            training.loss_of(model, chunk, tokenizer.pad_token_id)[0].backward()
    kinds = {"matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
             "attention": ("scaled_dot_product",), "softmax and loss": ("log_softmax", "nll_loss", "argmax")}
    times = dict.fromkeys([*kinds, "the rest"], 0.0)
    for event in profiler.key_averages():
        kind = next((k for k, names in kinds.items() if any(
            event.key == n or (not n.startswith("aten::") and n in event.key) for n in names)), "the rest")
        times[kind] += event.self_cpu_time_total / 1e6
    return {k: round(v, 3) for k, v in times.items()}


def steps_of(model, parameters, steps: int, padded: bool = True) -> dict:
    """Plain optimizer steps on rows with labels, the same for both sides: median seconds of a step, peak memory.

    8 rows of up to 48 tokens, a prompt of 12 in each; or, not padded, 8×64 tokens, all learned.
    """
    import torch
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (8, 48 if padded else 64))
    mask = (torch.arange(48) < torch.arange(48, 16, -4)[:, None]).long() if padded else torch.ones_like(ids)
    labels = ids.masked_fill((mask == 0) | (torch.arange(48) < 12), -100) if padded else ids
    optimizer, times = torch.optim.AdamW(parameters, lr=1e-3, fused=True), []
    model.train()
    loaded, peak = watched()
    for _ in range(steps):
        began = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times[1:]), "peak": peak(), "above_loaded": peak() - loaded}


def learned_ours(method, steps: int) -> dict:
    import minipeft as mp
    model, _ = mp.load_base("smollm2-135m")
    return steps_of(model, list(mp.attach(model, method).parameters()), steps)


def learned_peft(config, steps: int) -> dict:
    from peft import get_peft_model

    import minipeft as mp
    model = get_peft_model(mp.load_base("smollm2-135m")[0], config)
    return steps_of(model, [p for p in model.parameters() if p.requires_grad], steps)


def prompt_ours(steps, seed) -> dict:
    import minipeft as mp
    return learned_ours(mp.PromptTuning(20), steps)


def prompt_peft(steps, seed) -> dict:
    from peft import PromptTuningConfig
    return learned_peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20), steps)


def prefix_ours(steps, seed) -> dict:
    import minipeft as mp
    return learned_ours(mp.PrefixTuning(20, hidden=192), steps)


def prefix_peft(steps, seed) -> dict:
    from peft import PrefixTuningConfig
    return learned_peft(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=True,
                                           encoder_hidden_size=192), steps)


def dora_ours(steps, seed) -> dict:
    import minipeft as mp
    return learned_ours(mp.DoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"), steps)


def dora_peft(steps, seed) -> dict:
    from peft import LoraConfig
    return learned_peft(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=True,
                                   task_type="CAUSAL_LM"), steps)


def dora_lora(steps, seed) -> dict:
    """Our LoRA of the same rank at the same places."""
    import minipeft as mp
    return learned_ours(mp.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"), steps)


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


def seconds_of(job, repeats: int = 9) -> float:
    """Median seconds, after two runs that warm up."""
    import torch
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            began = time.perf_counter()
            job()
            times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def quantize_ours(steps, seed) -> dict:
    kernels, W = kernels_built()
    return {"seconds": seconds_of(lambda: kernels.quantize(W))}


def quantize_bnb(steps, seed) -> dict:
    from bitsandbytes import functional
    _, W = kernels_built()
    return {"seconds": seconds_of(lambda: functional.quantize_4bit(W, quant_type="nf4"), 5)}


def dequantize_ours(steps, seed) -> dict:
    kernels, W = kernels_built()
    (packed, absmax), out, n = kernels.quantize(W), W.clone().view(-1), W.numel()
    return {"new": seconds_of(lambda: kernels.dequantize(packed, absmax, n)),
            "existing": seconds_of(lambda: kernels.dequantize(packed, absmax, n, out=out))}


def dequantize_bnb(steps, seed) -> dict:
    """Into an existing tensor it has no kernel on a CPU."""
    from bitsandbytes import functional
    _, W = kernels_built()
    packed, state = functional.quantize_4bit(W, quant_type="nf4")
    return {"new": seconds_of(lambda: functional.dequantize_4bit(packed, state))}


def dequantize_copy(steps, seed) -> dict:
    _, W = kernels_built()
    out = W.clone()
    return {"new": seconds_of(W.clone), "existing": seconds_of(lambda: out.copy_(W))}


def product_of(layer, bf16: bool = True) -> dict:
    """Seconds for each number of rows; of 512 also in bfloat16 where the processor multiplies in it."""
    import torch
    seconds = {f"rows {n}": seconds_of(lambda x=torch.randn(n, SIDE): layer(x), 25 if n < 512 else 9) for n in (1, 8, 32, 512)}
    if bf16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        x = torch.randn(512, SIDE, dtype=torch.bfloat16)
        seconds["rows 512, bf16"] = seconds_of(lambda: layer(x))
    return seconds


def product_ours(steps, seed) -> dict:
    import torch

    import minipeft as mp
    _, W = kernels_built()
    linear = torch.nn.Linear(SIDE, SIDE, bias=False)
    linear.weight.data = W
    return product_of(mp.Linear4bit.of(linear, double_quant=False).eval())


def product_bnb(steps, seed) -> dict:
    """In eval mode, which is when it uses its packed kernel; in the faster of its two compute types."""
    import torch
    _, W = kernels_built()
    found = [product_of(bnb_linear(W, None, dtype, False).eval()) for dtype in (torch.float32, torch.bfloat16)]
    return {rows: min(f[rows] for f in found) for rows in found[0]}


def product_float32(steps, seed) -> dict:
    import torch
    _, W = kernels_built()

    found = product_of(lambda x: torch.nn.functional.linear(x, W), bf16=False)
    return found | {"rows 512, bf16": found["rows 512"]}


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


def generate_of(kind: str) -> dict:
    """Seconds a token of one greedy answer of 48 tokens."""
    import minipeft as mp
    model, tokenizer = smollm(kind)
    prompt = "What is paracetamol used for?\n"

    def answer(tokens):
        if kind == "ours":
            mp.generate(model, tokenizer, [prompt], max_new_tokens=tokens, min_new_tokens=tokens)
        else:
            model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=tokens, min_new_tokens=tokens,
                           do_sample=False, pad_token_id=tokenizer.eos_token_id)

    answer(8)
    return {"seconds": seconds_of(lambda: answer(48), 3) / 48}


def generate_ours(steps, seed) -> dict:
    return generate_of("ours")


def generate_bnb(steps, seed) -> dict:
    """In the faster of its compute types."""
    return min((generate_of(kind) for kind in ("bnb", "bnb bf16")), key=lambda r: r["seconds"])


def generate_float32(steps, seed) -> dict:
    return generate_of("float32")


def qlora_ours(steps, seed) -> dict:
    import minipeft as mp
    model, _ = smollm("ours")
    adapter = mp.attach(model, mp.LoRA(rank=RANK, alpha=2 * RANK, targets="all-linear"))
    return steps_of(model, list(adapter.parameters()), steps, padded=False)


def qlora_of_peft(kind: str, steps: int) -> dict:
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(smollm(kind)[0], LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    return steps_of(model, [p for p in model.parameters() if p.requires_grad], steps, padded=False)


def qlora_peft(steps, seed) -> dict:
    return qlora_of_peft("bnb", steps)


def qlora_peft_bf16(steps, seed) -> dict:
    return qlora_of_peft("bnb bf16", steps)


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
    """The results of each side, in an order that turns round from repeat to repeat."""
    from tqdm import tqdm
    results = {side: [] for side in SIDES[what]}
    for repeat in tqdm(range(repeats), desc=what, unit="turn"):
        for side in SIDES[what] if repeat % 2 == 0 else SIDES[what][::-1]:
            results[side].append(measure(f"{what}_{side}", steps, repeat))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of the fine-tune; of the others, one more than timed")
    parser.add_argument("--only", default=",".join(SIDES), help="what to measure, with commas between")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        print(json.dumps(globals()[chosen.worker](chosen.steps, chosen.seed)))
        return

    chosen.only = chosen.only.split(",")
    for what in chosen.only:
        if what not in SIDES:
            parser.error(f"--only has {what!r}; accepted are {', '.join(SIDES)}")
    if chosen.steps < 2:
        parser.error(f"--steps is {chosen.steps}; accepted is a whole number from 2: the first step is not timed")
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
        ours, theirs = (statistics.median(r[key] for r in results[side]) / scale for side in ("ours", beside))
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
                for rows, asked in of.items() if rows in results["ours"][0]]
    if what == "generate":
        return [row("NF4 SmolLM2: greedy, a token", "seconds", 1 / 1.4, beside=beside) for beside in ("bnb", "float32")]
    if what == "qlora":
        faster = min(("peft", "peft_bf16"), key=lambda side: statistics.median(r["seconds"] for r in results[side]))
        return [row("QLoRA: a training step of 8×64", "seconds", 0.75, beside=faster),
                row("QLoRA: peak memory of the process", "peak", 1.0, "GiB", faster)]
    name = "DoRA" if what == "dora" else f"{what} tuning"
    limits = {"peft": 1.0, "lora": 1.25}
    return [row(f"{name}: {figure}", key, limits[beside], unit, beside) for beside in SIDES[what][1:]
            for figure, key, unit in (("a training step", "seconds", "s"),
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
