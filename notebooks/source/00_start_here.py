# ---
# jupyter:
#   minipeft:
#     records: [tour, bills]
# ---

# %% [markdown]
# # Start here: the map of the course
#
# **In one sentence:** fine-tuning moves every weight of a model; parameter-efficient fine-tuning (PEFT) leaves them all as they are and plugs small trained pieces in at one of three places, and in this course you build each of these pieces yourself.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/00_start_here.ipynb)
#
# How long this page takes and how much memory it needs stands below the set-up cell, measured.

# %% [markdown]
# ## What you will be able to do
#
# - name the three places where a method can plug into a transformer, and sort the methods by them
# - say what your machine can do, and which of three profiles the course runs in on it
# - use the course: predictions, exercises, checks, hints, quizzes
# - teach a real language model one fact with LoRA, in ten lines, and take it out again
# - read a memory bill, and say why a model of 70 billion numbers is rarely fine-tuned whole
#
# **You need:** Python; from PyTorch: tensors, `nn.Module`, a training loop; roughly what a transformer does: embeddings, attention, feed-forward. No GPU.
#
# The methods come from papers. Each chapter names its own and the equations it builds. The survey behind the map: Ding et al. 2023, *Parameter-efficient fine-tuning of large-scale pre-trained language models*, [Nature Machine Intelligence 5](https://doi.org/10.1038/s42256-023-00626-4).

# %% [markdown]
# ## Set-up
#
# Every chapter begins with such a cell. On Colab it installs what Colab lacks; elsewhere you have it already. Run it, then go on cell by cell with **Shift + Enter**.

# %% tags=["setup"]
import subprocess, sys
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

import hashlib, math, os, time
import torch, transformers
from torch import nn
import minipeft as mp
from minipeft import lab, profiles
from minipeft.checks import ch00_start as check

lab.seed_everything(0)
print(f"minipeft {mp.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; profile {mp.profile().name} on {mp.profile().device}")
lab.runtime_box("00_start_here")

# %% [markdown]
# ## Before you read on
#
# Each chapter first asks for your guess. Write it down: replace the two `None`. At the end of this page a cell puts your numbers beside the computed ones. A wrong guess is worth more than none: you will remember what corrected it.
#
# A Llama with 70 billion weights, two bytes each. One training step on one text of 512 tokens, with AdamW. A large GPU has 80 GB of memory. How many GB does the step take
#
# 1. if all weights are trained?
# 2. with LoRA of rank 16 on all its linear layers?

# %%
predicted = {"all weights, GB": None, "LoRA, GB": None}

# %% [markdown]
# ## One idea, three sockets
#
# A pretrained transformer stays **frozen**: not one byte of it changes. Every method of this course is a small trained piece, plugged in at one of three places. Grey is frozen, colour is trained.

# %% tags=["figure"]
lab.three_sockets_figure()

# %% [markdown]
# | socket | what the piece sees and returns | in words |
# |---|---|---|
# | **embedding** | $e \to [P; e]$ | the text becomes longer: trained vectors stand before the words, as if somebody had said something first |
# | **key/value** | $(K, V) \to ([P_K; K], [P_V; V])$ | in every attention layer the tokens can also look at positions that no token wrote |
# | **module** | $(x, y) \to y'$ | the piece sees what went into a frozen layer, $x$, and what came out, $y$, and says what should come out |
#
# Two things do not plug in anywhere. *Full fine-tuning* needs no socket: it changes the grey itself. It is the baseline. *Quantising* makes the grey smaller: QLoRA is a LoRA beside weights of four bits.
#
# ## The chapters
#
# Some chapters may not be here yet. The table looks at the files.

# %%
lab.table(lab.chapters())

# %% [markdown]
# In a hurry? Read this page, then chapter 1, then chapter 5. Each chapter opens alone and says at its top what it needs; these two are what the others are compared with.
#
# ## What your machine can do

# %%
lab.machine()

# %% [markdown]
# The course runs in one of three **profiles**. The cells are the same in all of them. Only sizes differ: steps, questions, which model. One is chosen for you. To choose another, set `MINIPEFT_PROFILE` before you start, for example `MINIPEFT_PROFILE=cpu make lab`.

# %%
chosen = mp.profile().name
asked = os.environ.get("MINIPEFT_PROFILE")
why = "MINIPEFT_PROFILE asks for it" if asked else "torch finds a GPU" if chosen == "gpu" else "torch finds no GPU"
means = {"smoke": "the tests: the real models, a few steps; nothing is learned",
         "cpu": "a laptop: a chapter takes minutes, and the model really learns",
         "gpu": "a GPU with 16 GB or more: a larger model, 16-bit arithmetic"}
lab.table([{"profile": name, "for": text, "chosen": f"yes: {why}" if name == chosen else "no"} for name, text in means.items()])

# %% [markdown]
# ### Does 16-bit arithmetic pay here?
#
# Some processors multiply 16-bit numbers faster than 32-bit ones. Others imitate it, and are slower. Below, your machine multiplies two large matrices in both. `mp.fit` decides by the hardware's description. See whether its decision agrees with the clock.

# %%
def operations_per_second(dtype: torch.dtype, n: int = 512) -> float:
    """Multiplications and additions a second in the product of two (n, n) matrices; the best of three."""
    a = torch.randn(n, n, device=profiles.device(), dtype=dtype)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        (a @ a).sum().item()                               # .item() waits for a GPU
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)

speed = {"fp32": operations_per_second(torch.float32), "bf16": operations_per_second(torch.bfloat16)}
print(f"bf16 is {speed['bf16'] / speed['fp32']:.2g} times as fast as fp32 here; mp.fit computes in {profiles.precision()}")
lab.table([{"arithmetic": name, "billion operations a second": value / 1e9} for name, value in speed.items()])

# %% [markdown]
# ## How to use a chapter
#
# - **Run it from top to bottom.** It runs without your solutions: later cells never need your code. So you can read first and solve later.
# - **Predict.** Write the guess down before you run the cell that answers it.
# - **Exercises** have a stub with `...  # your code here`. Under it, in the same cell, stands its check. Replace the dots, run the cell. Minutes and stars (★ easy to ★★★ hard) are in the title.
# - **Hints and solutions** are folded. Open the hint first. Close the solution before you type.
# - **Quizzes** close each chapter. Every choice, right or wrong, has its reason.
#
# A check draws fresh random cases each time and compares with an independent computation. It says *passed*, *failed* and why, or *not attempted*. Where it knows your mistake, it names it. Here are three answers to the exercise below: none, a wrong one, and one with a typing error.

# %%
wrong = lambda model: sum(p.numel() for p in model.parameters())
typing_error = lambda model: sum(p.nummel() for p in model.parameters())
for answer in (None, wrong, typing_error):
    display(check.count_trainable(answer))

# %% [markdown]
# ### Exercise: count what trains (3 minutes, ★)
#
# A parameter of a PyTorch model trains if its `requires_grad` is true. How many **numbers** of a model train?
#
# <details>
# <summary>Hint</summary>
#
# `model.parameters()` gives every parameter tensor once, also one that is used in two places. `p.numel()` counts the numbers in a tensor.
#
# </details>

# %%
def count_trainable(model: nn.Module) -> int:
    """How many numbers of this model train, each counted once."""
    ### BEGIN SOLUTION
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
    ### END SOLUTION

check.count_trainable(count_trainable)

# %% [markdown]
# ## A tour in ten lines
#
# Now the whole course in small. SmolLM2-135M is a real language model, small enough for a laptop. You load it, take a fingerprint of all its bytes, and ask it about a medicine, in the words that the course's drug cards use. It has never seen a card. Read what it says: it sounds sure. Is it right?
#
# (The cards are teaching data, not medical advice.)

# %%
def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every byte of the model's own weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

model, tokenizer = mp.load_base("smollm2-135m")
at_first = fingerprint(model)
card = {split: [e for e in mp.load_data("drug_cards", split) if (e["card"], e["direction"]) == ("amoxicillin", "forward")]
        for split in ("train", "test")}
asked = [card["test"][0]["prompt"], card["test"][0]["prompt"].replace("amoxicillin", "ibuprofen")]
before = mp.generate(model, tokenizer, asked, max_new_tokens=24)
print(*(f"{question.strip()} → {answer.strip()}" for question, answer in zip(asked, before)), sep="\n")

# %% [markdown]
# **Attach.** One line plugs LoRA, a method of the module socket, into every linear layer. The report says how much of the model now trains. Chapter 5 takes this line apart.

# %%
adapter = mp.attach(model, mp.LoRA(rank=8, targets="all-linear"))
report = mp.parameter_report(model)
print(f"{report.trainable:,} of {report.total:,} numbers train: {report.percent:.1f} %, in {len(adapter.pieces())} pieces")
report

# %% [markdown]
# **Teach.** It learns the card of amoxicillin, asked in a handful of wordings. Then you ask again, in a wording that was not among them. And you ask about ibuprofen, which nobody taught it.

# %%
recipe = mp.FitConfig(steps=mp.pick(smoke=2, cpu=12, gpu=12), batch_size=len(card["train"]), lr=4e-3)
run = mp.fit(model, tokenizer, card["train"], recipe)
taught = mp.generate(model, tokenizer, asked, max_new_tokens=24)
learned = taught[0] == card["test"][0]["completion"]
print("loss, first and last step:", *(f"{run.history[i]['loss']:.3f}" for i in (0, -1)))
print("on the card:", card["test"][0]["completion"].strip())
print(*(f"{question.strip()} → {answer.strip() or '(nothing)'}" for question, answer in zip(asked, taught)), sep="\n")
print("learned, letter for letter" if learned else f"not learned in {run.steps} steps")

# %% [markdown]
# It may have paid for that: compare what it says on ibuprofen with what it said before. With the adapter in place, a model can forget, too.
#
# **Detach.** The pieces come out. What is left is the model as it was: the same bytes, the same answers.

# %%
mp.detach(model)
assert fingerprint(model) == at_first
assert mp.generate(model, tokenizer, asked, max_new_tokens=24) == before
print("fingerprint before:", at_first)
print("fingerprint now:   ", fingerprint(model))

# %% [markdown]
# That is the promise of PEFT. The base stays one file, shared by all. What you trained is a small thing beside it, which you can store, send, switch on and off, and stack.
#
# ## The bill of a large model
#
# A small model could be trained whole. When does that stop? `mp.memory_bill` predicts the memory of one training step, line by line. It needs the model's configuration only, so a laptop can compute it for a model that would never fit. This is the shape of Llama 3 with 70 billion weights.

# %%
llama = transformers.LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                                 intermediate_size=28672, vocab_size=128256, max_position_embeddings=8192)
lora = mp.LoRA(rank=16, targets="all-linear")
step = dict(batch=1, seq=512, optimizer="adamw", dtype="bfloat16")
bills = {"all weights": mp.memory_bill(llama, "full", **step),
         "LoRA": mp.memory_bill(llama, lora, **step),
         "LoRA, 4-bit base": mp.memory_bill(llama, lora, quantized=True, **step)}
print(f"{bills['all weights'].parameters:,} weights; LoRA trains {bills['LoRA'].trainable:,} numbers beside them")
bills["all weights"]

# %%
lab.bill_figure(bills, {"one GPU of 80 GB": 80e9})

# %% [markdown]
# Read it line by line.
#
# - **Weights** are there in any case. Only fewer bits make them smaller.
# - **Gradients** have one number for each *trained* number. **Optimizer**: AdamW keeps two more. Freeze the weights, and these two lines all but vanish.
# - **Activations** stay nearly the same: the error still has to travel through the frozen layers.
#
# This is the leanest way to train everything: all numbers in 16 bits. Often a second copy of the weights, and the optimizer's numbers, are kept in 32 bits; then the bill is far higher.

# %%
computed = dict(zip(predicted, (bill.total / 1e9 for bill in bills.values())))
lab.record(
    tour={"trainable": report.trainable, "percent": report.percent, "seconds": run.seconds, "learned": learned,
          "loss": [run.history[0]["loss"], run.history[-1]["loss"]]},
    bills={name: bill.total for name, bill in bills.items()},
)
lab.table([{"": name, "you": "no prediction" if predicted[name] is None else predicted[name], "computed": value,
            "GPUs of 80 GB": math.ceil(value / 80)} for name, value in computed.items()])

# %% [markdown]
# ## Quiz

# %%
share = {name: f"{100 * getattr(bills['all weights'], name) / bills['all weights'].total:.0f} %" for name in ("weights", "optimizer", "activations")}
lab.quiz([
    {"question": "A method adds trained keys and values to every attention layer. Which socket?", "right": "key/value",
     "choices": {"key/value": "$(K, V) \\to ([P_K; K], [P_V; V])$: prefix tuning.",
                 "embedding": "That makes the text longer once, before the first block.",
                 "module": "There a piece changes what one layer returns; here the attention gets more to look at."}},
    {"question": "You train a 70B model whole, in 16 bits. Which line of the bill is the largest?", "right": f"the optimizer, {share['optimizer']}",
     "choices": {f"the optimizer, {share['optimizer']}": "AdamW keeps two numbers for each weight.",
                 f"the weights, {share['weights']}": "They are one number each; AdamW keeps two more.",
                 f"the activations, {share['activations']}": "At one text of 512 tokens they are small. They grow with batch and length."}},
    {"question": "LoRA freezes the weights. Which line stays about as large as before?", "right": "activations",
     "choices": {"activations": "The error must still travel back through the frozen layers. That is why LoRA does not save as much as its few trained numbers suggest.",
                 "gradients": "Only what trains has a gradient: see the second bar.",
                 "optimizer": "It keeps numbers for what trains, and that is little."}},
    {"question": "After `mp.detach` the fingerprint was the old one. What does that show?", "right": "not one byte of the base changed",
     "choices": {"not one byte of the base changed": "Equal hashes of all bytes: the training went into the pieces only.",
                 "LoRA's update is small": "Its size does not matter. The smallest change of one byte would give another hash.",
                 "the model has learned": "Compare the answers for that. The hash says nothing about them."}},
    {"question": "A check says: not attempted. What happened?", "right": "the stub is still there",
     "choices": {"the stub is still there": "Nothing was returned, so there is nothing to judge. It never counts as passed.",
                 "your answer is wrong": "Then it would say: failed, and why.",
                 "the chapter cannot go on": "It can: later cells do not need your code."}},
])

# %% [markdown]
# ## Recap
#
# - PEFT freezes the model and trains small pieces in one of three sockets: embedding, key/value, module.
# - What is frozen needs no gradient and no optimizer numbers. That is where the memory goes when you train everything.
# - Attach, train, detach: the base is the same afterwards, to the byte.
# - Your profile sets the sizes. The cells are the same for everyone.
#
# ## Next
#
# [Chapter 1](01_full_fine_tuning.ipynb) trains everything, measures what it costs and what is forgotten. That is the baseline for all that follows. [Chapter 5](05_lora.ipynb) builds LoRA.
#
# ## Further reading
#
# - Ding et al. 2023, [Parameter-efficient fine-tuning of large-scale pre-trained language models](https://doi.org/10.1038/s42256-023-00626-4)
# - Lialin et al. 2023, [Scaling Down to Scale Up: A Guide to Parameter-Efficient Fine-Tuning](https://arxiv.org/abs/2303.15647): the methods side by side
# - He et al. 2021, [Towards a Unified View of Parameter-Efficient Transfer Learning](https://arxiv.org/abs/2110.04366): adapters, prefixes and LoRA as one formula
# - Allal et al. 2025, [SmolLM2](https://arxiv.org/abs/2502.02737): the base model of this course
