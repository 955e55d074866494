# ---
# jupyter:
#   minipeft:
#     records: [main, frozen, rates, ranks, alphas, places, merge, checkpoint]
# ---

# %% [markdown]
# # 5 · LoRA: a small update beside a frozen weight
#
# **In one sentence:** leave every weight $W$ of the model as it is, learn a product $BA$ of two thin matrices beside it, and you can teach the model new facts while training a few numbers in a hundred.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/05_lora.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - write LoRA from its equation, plug it into a real language model, and show that nothing changed yet
# - count what it trains, before you train it
# - fine-tune the model on cards of medicines, and measure what it knows afterwards
# - choose rank, alpha, learning rate and places by what you measured, not by what you read
# - merge the result into the weights, take it out again, save it, and open it in Hugging Face PEFT
#
# **You need:** Python, matrix products, what a gradient is. Chapter 1 (full fine-tuning) helps.
#
# **The paper:** Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685). You build its equation 3 and section 4.1, and you repeat the questions of its section 7 on a small scale.

# %% tags=["setup"]
import hashlib, inspect, math, random, subprocess, sys, tempfile, time, warnings
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

from dataclasses import replace
from pathlib import Path
import torch, transformers
from torch import nn
import minipeft as mp
from minipeft import lab, profiles

lab.seed_everything(0)
print("minipeft", mp.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
print("profile", mp.profile().name, "on", mp.profile().device)
lab.runtime_box("05_lora")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the three `None` below; at the end a cell puts your numbers beside the measured ones. A wrong guess is worth more than none: you will remember what corrected it.
#
# 1. LoRA of rank 16 on all linear layers: how many **percent** of the numbers does it train?
# 2. LoRA's best learning rate, divided by full fine-tuning's best learning rate: 0.2? 1? 10?
# 3. After training you describe a medicine in words the model was never trained with. In how many **percent** of the cases does it recall the name?

# %%
predicted = {"percent trained": None, "best rate, LoRA / full": None, "percent of names recalled": None}

# %% [markdown]
# ## The problem
#
# A developer wanted a model to answer questions on medicines in one fixed format. He took the method that looked simplest. After training, the model could not spell *amoxicillin* and the format was unusable. With LoRA, he reports, the names went from 60 % to 85 % right. You will set the same kind of task and measure both: **format** and **names**.
#
# Every card is one medicine, asked in two directions. *Forward:* the name is in the question, the card is the answer. *Reverse:* the card is in the question, the name is the answer. Copying is enough to get a name right forwards. Only reverse shows that the name was learned. The wordings of the test questions were never trained on.
#
# First you measure the frozen model. You ask it twice: with the bare question, and with three solved cards in front of it. They show it the format, which it cannot guess. `mp.score_cards` gives shares of exact answers, letter for letter: **format** (five fields), **name**, **facts** (the other four fields) and **all_facts** (all four right) forwards, **recall** (the name) in reverse.
#
# A card needs several turns to be learned, and two CPU cores read only so many in a few minutes. So the cpu profile takes every second medicine. A GPU takes them all. This is teaching data, not medical advice.

# %%
BASE = profiles.base_model()
model, tokenizer = mp.load_base(BASE)
SHOWN = ("ibuprofen", "salbutamol", "warfarin")                # the three solved cards, see below

every_name = sorted({e["card"] for e in mp.load_data("drug_cards")})
taken = {*every_name[:: mp.pick(smoke=1, cpu=2, gpu=1)], *SHOWN, "amoxicillin"}
cards = {split: [e for e in mp.load_data("drug_cards", split) if e["card"] in taken] for split in ("train", "test")}

for direction in ("forward", "reverse"):
    one = next(e for e in cards["train"] if (e["card"], e["direction"]) == ("amoxicillin", direction))
    print(f"--- {direction}\n{one['prompt']}{one['completion']}\n")
print("the tokenizer cuts ' amoxicillin' into", tokenizer.tokenize(" amoxicillin"))
print(f"{len(taken)} of {len(every_name)} medicines are taken")
lab.table([{"split": split, "medicines": len(taken), "wordings": len(rows) // len(taken), "questions": len(rows)}
           for split, rows in cards.items()])

# %%
names = sorted({e["card"] for e in cards["test"]} - set(SHOWN))
chosen = names[:: len(names) // mp.pick(smoke=1, cpu=12, gpu=64)]
sample = [e for e in cards["test"] if e["card"] in chosen]

def ask(model, examples, solved=lambda e: ""):
    """The model's greedy answers, with `solved(e)` in front of each question."""
    prompts = [solved(e) + e["prompt"] for e in examples]
    longest = mp.pick(smoke=8, cpu=24, gpu=24)                 # tokens; no card is longer
    return mp.generate(model, tokenizer, prompts, max_new_tokens=longest, progress=True)

def three_cards(e):
    rows = [x for x in cards["train"] if x["card"] in SHOWN and x["direction"] == e["direction"]]
    return "".join(x["prompt"] + x["completion"] + "\n\n" for x in rows[:: len(rows) // 3])  # one of each

frozen = mp.score_cards(sample, ask(model, sample))
frozen_shown = mp.score_cards(sample, ask(model, sample, three_cards))
scores = [{"model": "frozen", "questions": len(sample)} | frozen,
          {"model": "frozen, three cards shown", "questions": len(sample)} | frozen_shown]
lab.table(scores)

# %% [markdown]
# ## The idea
#
# You could train all of the model. Then every weight $W$ becomes $W + \Delta W$, and $\Delta W$ has as many numbers as $W$. LoRA keeps $W$ frozen and writes the update as a product of two thin matrices (equation 3 of the paper):
#
# $$h = Wx + \Delta W x = Wx + \frac{\alpha}{r}\, B A\, x$$
#
# | | shape | |
# |---|---|---|
# | $x$ | $(\mathrm{in})$ | what goes into the layer |
# | $W$ | $(\mathrm{out}, \mathrm{in})$ | frozen |
# | $A$ | $(r, \mathrm{in})$ | trained, starts at random |
# | $B$ | $(\mathrm{out}, r)$ | trained, starts at zero |
# | $\alpha / r$ | one number | fixed: how loud the update is |
# | $h$ | $(\mathrm{out})$ | what comes out |
#
# $r$ is the **rank**. The picture shows one layer of this model, to scale.

# %% tags=["figure"]
from matplotlib.patches import Rectangle
from minipeft.lab.plots import COLOURS, new_figure

d_out, d_in = model.get_submodule("model.layers.0.self_attn.q_proj").weight.shape
r = 16
figure, ax = new_figure(width=7.4, height=3.3)
ax.axis("off")
gap = d_in / 6
parts = [("$W$", "frozen", 0, 0, d_in, d_out, COLOURS["grey"]),
         ("$B$", "trained", d_in + gap, 0, r, d_out, COLOURS["blue"]),
         ("$A$", "trained", d_in + 1.6 * gap + r, d_out - r, d_in, r, COLOURS["blue"])]
for name, role, x, y, width, height, colour in parts:
    ax.add_patch(Rectangle((x, y), width, height, color=colour, alpha=0.35 if role == "frozen" else 1))
    ax.text(x + width / 2, d_out + 12, name, ha="center", va="bottom", fontsize=15)
    size = f"{height} × {width} = {height * width:,}\n{role}"
    ax.text(x + width / 2, y - 14, size, ha="center", va="top", fontsize=10)
ax.text(d_in + gap / 2, d_out / 2, "+", ha="center", va="center", fontsize=20)
says = r"$\Delta W = \frac{\alpha}{r}\,B A$" + f"\nas large as W,\nmade of {r * (d_in + d_out):,} numbers"
ax.text(1.5 * d_in + 1.6 * gap + r, 0.4 * d_out, says, ha="center", va="center", fontsize=11, linespacing=1.6)
ax.set(xlim=(-20, 2 * d_in + 2.2 * gap), ylim=(-90, d_out + 70), aspect="equal")
figure

# %% [markdown]
# ## By hand
#
# Take pencil and paper. A $3 \times 3$ weight, rank 1, $\alpha = 2$, so $\alpha / r = 2$:
#
# $$W = \begin{pmatrix}1&0&2\\0&3&0\\1&1&1\end{pmatrix}\qquad A = \begin{pmatrix}1&0&-1\end{pmatrix}\qquad B = \begin{pmatrix}2\\0\\1\end{pmatrix}\qquad x = \begin{pmatrix}1\\2\\3\end{pmatrix}$$
#
# 1. Compute $Wx$.
# 2. Compute $Ax$. It is one number.
# 3. Compute $2\,B\,(Ax)$ and add it to $Wx$.
# 4. Now the other way: compute $W' = W + 2BA$, then $W'x$.
#
# Both ways must agree. That is all there is to merging. Then run the cell.

# %%
W = torch.tensor([[1, 0, 2], [0, 3, 0], [1, 1, 1]])
A, B, x = torch.tensor([[1, 0, -1]]), torch.tensor([[2], [0], [1]]), torch.tensor([1, 2, 3])

print("W x           =", (W @ x).tolist())
print("A x           =", (A @ x).tolist())
print("W x + 2 B A x =", (W @ x + 2 * B @ (A @ x)).tolist())
print("W' = W + 2BA  =", (W + 2 * B @ A).tolist())
print("W' x          =", ((W + 2 * B @ A) @ x).tolist())
print("numbers in W, in A and B:", W.numel(), "and", A.numel() + B.numel())
assert torch.equal((W + 2 * B @ A) @ x, W @ x + 2 * B @ (A @ x))

# %% [markdown]
# ## Build it
#
# ### Step 1: two thin matrices
#
# Whatever $A$ and $B$ hold, $BA$ has rank at most $r$: every column of $BA$ is a mix of the $r$ columns of $B$.
#
# And you never need $BA$ itself. Multiply $x$ by $A$ first, then by $B$: the big matrix is never made. In code the tokens are rows, so everything is transposed: $x A^\top B^\top$.

# %%
d_in, d_out, r, tokens = 576, 1536, 16, 256
A, B = torch.randn(r, d_in, dtype=torch.float64), torch.randn(d_out, r, dtype=torch.float64)
x = torch.randn(tokens, d_in, dtype=torch.float64)

delta = B @ A                                              # (out, in)
assert torch.linalg.matrix_rank(delta) == r
assert torch.allclose(x @ delta.T, (x @ A.T) @ B.T)        # the same result, (tokens, out)

lab.table([
    {"way": "x W, the frozen layer itself", "multiplications": tokens * d_in * d_out},
    {"way": "make B A, then x (B A)", "multiplications": d_out * r * d_in + tokens * d_in * d_out},
    {"way": "(x A) B", "multiplications": tokens * r * (d_in + d_out)},
])

# %% [markdown]
# ### Exercise 1: count what trains · 5 minutes · easy
#
# You get the shapes of the adapted weights as `(out, in)`. How many numbers does LoRA train?

# %%
from minipeft.checks import ch05_lora as check

def lora_parameter_count(shapes: list[tuple[int, int]], rank: int) -> int:
    """Numbers that LoRA of this rank trains beside weights of these (out, in) shapes."""
    ### BEGIN SOLUTION
    return sum(rank * (d_in + d_out) for d_out, d_in in shapes)
    ### END SOLUTION

check.lora_parameter_count(lora_parameter_count)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# For one weight: how many numbers has $A$, how many has $B$? Then sum over the weights.
#
# </details>

# %% [markdown]
# ### Exercise 2: the layer · 10 minutes · medium
#
# Write equation 3 for a batch: `x` is (batch, tokens, in), the result is (batch, tokens, out).
#
# The check draws new numbers each time and never looks at $B = 0$, where almost any mistake gives the right answer.

# %%
def lora_forward(
    x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float, rank: int
) -> torch.Tensor:
    """x (batch, tokens, in), W (out, in), A (r, in), B (out, r) -> (batch, tokens, out)."""
    ### BEGIN SOLUTION
    return x @ W.T + alpha / rank * (x @ A.T) @ B.T
    ### END SOLUTION

check.lora_forward(lora_forward)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `x @ W.T` is the frozen layer. The update goes through `A` first. Do not forget $\alpha / r$.
#
# </details>

# %% [markdown]
# ### Exercise 3: where training starts · 10 minutes · medium
#
# Before training, $\Delta W$ must be zero: you want to start from the model you have. $B = 0$ does that. $A$ is random. The paper draws it from a normal distribution; its authors' code, and most since, give it what `torch.nn.Linear` gives its own weights: uniform between $\pm 1/\sqrt{\mathrm{in}}$. Take that spread. (The check looks at the standard deviation, $1/\sqrt{3\,\mathrm{in}}$: a normal draw that has it passes too.)
#
# Why not both zero? Why not both random? You will try both below.

# %%
def lora_init(out_features: int, in_features: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank), float32, as they are before training."""
    ### BEGIN SOLUTION
    A = (2 * torch.rand(rank, in_features) - 1) / math.sqrt(in_features)
    B = torch.zeros(out_features, rank)
    return A, B
    ### END SOLUTION

check.lora_init(lora_init)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `torch.rand` is uniform between 0 and 1. Stretch it and move it. Or look at what `torch.nn.Linear(in, out).weight` holds.
#
# </details>
#
# ### Step 2: a piece
#
# Put the update into a module of its own. It does not contain the frozen layer. It sees what went in, $x$, and what came out, $y$, and returns what should come out, $y'$. That is the **module socket** of this course, and the same piece fits any linear layer.

# %%
class Update(nn.Module):
    """(x, y) -> y + s B A x, beside one frozen linear layer."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        d_out, d_in = linear.weight.shape
        at, bound = linear.weight.device, 1 / math.sqrt(d_in)
        self.s = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, d_in, device=at).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=at))

    def forward(self, x, y):                                   # x (…, in), y (…, out)
        return y + self.s * (x @ self.A.T) @ self.B.T

linear, x = nn.Linear(64, 48), torch.randn(5, 64)
piece = Update(linear, rank=4, alpha=8)
assert torch.equal(piece(x, linear(x)), linear(x))             # at the start: nothing, to the bit
nn.init.normal_(piece.B)
merged = linear.weight + piece.s * piece.B @ piece.A           # (48, 64)
assert torch.allclose(piece(x, linear(x)), x @ merged.T + linear.bias, atol=1e-4)
print("shapes:", {name: tuple(p.shape) for name, p in piece.named_parameters()})

# %% [markdown]
# ### Step 3: plug it in
#
# torch calls a *forward hook* after a module has run, with what went in and what came out. What the hook returns becomes the output. So you can plug a piece in beside every query and value projection, as the paper does, without touching the model, and pull it out again.
#
# The assertions: nothing changes at the start, something changes when $B$ is not zero. At the end of step 4 you pull the pieces out, and the model is as it was.

# %%
question = tokenizer(cards["test"][0]["prompt"], return_tensors="pt").to(model.device)
pieces, handles = {}, []

def plug(module, piece):
    """From now on the module's output is piece(what went in, what came out)."""
    return module.register_forward_hook(lambda module, args, y: piece(args[0], y))

with torch.no_grad():
    before = model(**question).logits
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "v_proj")):
            pieces[path] = Update(module, rank=8, alpha=16)
            handles.append(plug(module, pieces[path]))
    assert torch.equal(model(**question).logits, before)
    for piece in pieces.values():
        nn.init.normal_(piece.B, std=0.01)
    moved = (model(**question).logits - before).abs().max().item()
    assert moved > 0
print(f"{len(pieces)} pieces; with B not zero the logits move by up to {moved:.2g}")

# %% [markdown]
# ### Step 4: only the pieces learn
#
# Freeze the base, then take two steps. The frozen weights get no gradient, so the optimizer needs no memory for them. And look who moves first. $\partial L / \partial A$ is a product with $B$. While $B = 0$, it is zero: **in the first step only $B$ learns**. From the second step on, both do.

# %%
model.requires_grad_(False)
for piece in pieces.values():
    nn.init.zeros_(piece.B)
example = cards["train"][0]
tokens = tokenizer(example["prompt"] + example["completion"], return_tensors="pt").to(model.device)
one = pieces["model.layers.0.self_attn.q_proj"]
optimizer = torch.optim.SGD([p for piece in pieces.values() for p in piece.parameters()], lr=0.1)

for step in (1, 2):
    optimizer.zero_grad()
    model(**tokens, labels=tokens["input_ids"]).loss.backward()
    largest = {name: p.grad.abs().max().item() for name, p in one.named_parameters()}
    print(f"step {step}, largest gradient: A {largest['A']:.3g}, B {largest['B']:.3g}")
    assert largest["B"] > 0 and (largest["A"] > 0) == (step == 2)
    optimizer.step()
assert all(p.grad is None for p in model.parameters())

for handle in handles:                                         # pull the pieces out again
    handle.remove()
with torch.no_grad():
    assert torch.equal(model(**question).logits, before)

# %% [markdown]
# ## The same as the package
#
# `minipeft` does what you just did. Its piece is called `LowRank`, and here is its `forward`. Two things are new: dropout on the way into $A$, which is off here, and the last line, which adds the product *into* `y`, so that no second tensor of that size is made. From here on the chapter uses the package.
#
# Three implementations, the same $A$ and $B$, the same input: yours from step 2, the package's, and Hugging Face PEFT's. $B$ is random here. At $B = 0$ even a wrong one would agree.

# %%
from minipeft.methods.lora import LowRank
print(inspect.getsource(LowRank.forward))

linear, x = nn.Linear(64, 48).double(), torch.randn(5, 64).double()
mine = Update(linear, 4, 8).double()
package = LowRank(mp.LoRA(rank=4, alpha=8), 48, 64, dtype=torch.float64)
nn.init.normal_(mine.B)
package.load_state_dict(mine.state_dict())
assert torch.allclose(package(x, linear(x)), mine(x, linear(x)), rtol=1e-12)
print("yours = minipeft's")
try:
    import peft
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    host = peft.inject_adapter_in_model(settings, nn.Sequential(linear))
    with torch.no_grad():
        host[0].lora_A["default"].weight.copy_(mine.A)
        host[0].lora_B["default"].weight.copy_(mine.B)
    assert torch.allclose(host.double()(x), mine(x, linear(x)), rtol=1e-12)
    print(f"yours = peft's (version {peft.__version__})")
except ImportError:
    print("peft is not installed here, so this comparison is skipped (pip install peft)")

# %% [markdown]
# ## Nothing changed yet
#
# Plug LoRA into all linear layers of the blocks. The paper took the query and value projections only; which is better for this task, you will measure below. Before any training you check three things. The model says exactly what it said. The number of trained numbers is what the formula says, $\sum r\,(\mathrm{in} + \mathrm{out})$. And you take a fingerprint of every frozen byte, to compare with after the training.

# %%
from minipeft.sockets import base_parameters

def fingerprint(model) -> str:
    """SHA-256 over the bytes of every parameter of the base."""
    digest = hashlib.sha256()
    for parameter in base_parameters(model).values():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

lora = mp.LoRA(rank=16, alpha=32, targets="all-linear")
at_first = fingerprint(model)
adapter = mp.attach(model, lora)
with torch.no_grad():
    assert torch.equal(model(**question).logits, before)

shapes = [tuple(model.get_submodule(path).weight.shape) for path in adapter.pieces()]
report = mp.parameter_report(model)
assert report.trainable == sum(lora.rank * (d_in + d_out) for d_out, d_in in shapes)
assert fingerprint(model) == at_first
print("frozen bytes:", at_first)
report

# %% [markdown]
# ## The fine-tune
#
# Now train it on the cards, both directions. A card is learned by meeting it again, so the order matters: you spread each card's turns evenly over the run, in changing wordings, and no card waits long. Forward and reverse batches take turns. The cell shows one card's turns, in your order and in a shuffled one. `shuffle=False` keeps your order. The rate comes from a sweep like the one below. The loss counts the answer's tokens only. The curve is drawn while it runs.

# %%
def spread_evenly(examples: list[dict], times: int) -> list[dict]:
    """Each card `times` times, at even distances, in wordings that change from turn to turn."""
    draw, wordings, timetable = random.Random(0), {}, []
    for example in examples:
        wordings.setdefault(example["card"], []).append(example)
    for own in wordings.values():
        first = draw.random()                                  # each card has its own place in the round
        draw.shuffle(own)
        timetable += [(turn + first, own[turn % len(own)]) for turn in range(times)]
    return [example for when, example in sorted(timetable, key=lambda entry: entry[0])]

times, size = mp.pick(smoke=1, cpu=8, gpu=8), mp.pick(smoke=2, cpu=8, gpu=8)
forward, reverse = (spread_evenly([e for e in cards["train"] if e["direction"] == way], times) for way in ("forward", "reverse"))
lessons = [e for at in range(0, len(forward), size) for e in forward[at : at + size] + reverse[at : at + size]]

for name, order in (("spread", forward), ("shuffled", random.Random(0).sample(forward, len(forward)))):
    print(f"{name}: amoxicillin is number {[i for i, e in enumerate(order) if e['card'] == 'amoxicillin']} of {len(order):,}")

# %%
plan = mp.FitConfig(
    steps=mp.pick(smoke=3, cpu=None, gpu=None),                # None: each lesson once
    batch_size=size,
    shuffle=False,
    lr=2e-3,
    schedule="cosine",
    seed=0,
)
run = mp.fit(model, tokenizer, lessons, plan, watch=lab.live_curve())
assert fingerprint(model) == at_first
print(f"{run.steps} steps, {run.steps * plan.batch_size:,} of {len(lessons):,} questions, {run.seconds / 60:.1f} minutes")
print("every frozen byte is as it was")

# %% [markdown]
# ### Before and after
#
# Every test question, in wordings the model has not seen. The last two rows say what this course asks of the run, and whether it got there. Full fine-tuning comes further down, beside LoRA on a smaller task.
#
# A score hides what went wrong, so the second cell shows some wrong answers. Read them. Are they spelling mistakes, or facts of a related medicine?

# %%
asked_of_it = {"format": 0.95, "name": 0.90, "all_facts": 0.85, "recall": 0.60}
exam = mp.pick(smoke=sample, cpu=cards["test"], gpu=cards["test"])
answers = ask(model, exam)
trained = mp.score_cards(exam, answers)
reached = {key: "yes" if trained[key] >= value else "no" for key, value in asked_of_it.items()}

if mp.profile().name == "smoke":
    print("The smoke profile takes a few steps. It shows that every cell runs, not that the model learns.")
elif "no" in reached.values():
    print("not reached:", [key for key, value in reached.items() if value == "no"])
else:
    print("all targets reached")
lab.table([*scores, {"model": "LoRA", "questions": len(exam)} | trained,
           {"model": "asked"} | asked_of_it, {"model": "reached"} | reached])

# %%
first_lines = [answer.strip().split("\n")[0] for answer in answers]
wrong = [(e, line) for e, line in zip(exam, first_lines) if line != e["completion"].strip()]
print(f"{len(wrong)} of {len(exam)} answers are not exact")

recalled = [line for e, line in wrong if e["direction"] == "reverse"]
invented = [line for line in recalled if line not in every_name]
print(f"of {len(recalled)} wrong names, {len(invented)} are on no card:", sorted(set(invented))[:10])

some = wrong[:: max(1, len(wrong) // 8)][:8]
lab.table([{"question": e["prompt"].strip(), "right": e["completion"], "answer": line[:90]} for e, line in some])

# %% [markdown]
# ## Break it: the learning rate
#
# You will meet this advice: *LoRA needs learning rates three to five times **lower** than full fine-tuning.* And this: *LoRA's best rate is about ten times **higher*** (Schulman et al. 2025). They cannot both be right. So measure.
#
# The small task: a few cards, forwards only, a few steps, the same data and order for all. What counts is the loss on a wording that was not trained on. *GiB more* is how much larger the process was at its peak than before the model was loaded. Full fine-tuning is `mp.fit` on a model without adapters. From one point of the grid to the next the rate grows fourfold, so "a quarter of full fine-tuning's best rate" is one of the points.

# %%
few = names[:: len(names) // mp.pick(smoke=2, cpu=16, gpu=48)]
small = {split: [e for e in mp.load_data("drug_cards", split) if e["card"] in few and e["direction"] == "forward"]
         for split in ("train", "validation")}
small_plan = mp.FitConfig(steps=mp.pick(smoke=1, cpu=20, gpu=30), batch_size=mp.pick(smoke=1, cpu=4, gpu=8), progress=False)

def trial(method, lr: float, seed: int = 0) -> dict:
    """Train `method` (None: all of the model) from its start; the loss on the held-out wording."""
    torch.manual_seed(seed)
    already = profiles.memory_in_use()
    fresh, _ = mp.load_base(BASE)
    if method is not None:
        mp.attach(fresh, method)
    result = {"trained": mp.parameter_report(fresh).trainable, "rate": lr, "loss": math.inf}
    try:
        done = mp.fit(fresh, tokenizer, small["train"], replace(small_plan, lr=lr, seed=seed))
    except ArithmeticError:                                    # the training loss was not finite any more
        return result
    loss = mp.evaluate(fresh, tokenizer, small["validation"])["loss"]
    more = (done.peak_memory - already) / 2**30
    return result | {"loss": loss, "s a step": done.seconds / done.steps, "GiB more": more}

# %% tags=["figure"]
grid = mp.pick(smoke=[1e-3, 4e-3], cpu=[6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2], gpu=[6.25e-5, 2.5e-4, 1e-3, 4e-3, 1.6e-2])
sweep = {"LoRA": [trial(lora, lr) for lr in grid],
         "full fine-tuning": [trial(None, lr) for lr in grid[:-1]]}
best = {way: min(trials, key=lambda t: t["loss"]) for way, trials in sweep.items()}
with mp.active(model, None):                                   # the bare base
    untrained = mp.evaluate(model, tokenizer, small["validation"])["loss"]

figure, ax = new_figure(width=6.6, height=3.6)
for way, colour in (("LoRA", COLOURS["blue"]), ("full fine-tuning", COLOURS["vermilion"])):
    ax.plot([t["rate"] for t in sweep[way]], [t["loss"] for t in sweep[way]], "o-", color=colour, label=way)
    lowest = best[way]["rate"], best[way]["loss"]
    ax.plot(*lowest, "o", markersize=12, markerfacecolor="none", color=colour)
ax.axhline(untrained, color=COLOURS["grey"], linestyle="--", linewidth=1.3, label="not trained")
ax.set(xscale="log", xlabel="learning rate", ylabel="loss, held-out wording", ylim=(0, 1.25 * untrained))
ax.set_xticks(grid, [f"{lr:g}" for lr in grid])
ax.minorticks_off()
ax.legend(loc="lower left", frameon=False)
figure

# %%
lora_best, full_best = best["LoRA"], best["full fine-tuning"]
ratio = lora_best["rate"] / full_best["rate"]
advised = full_best["rate"] / 4
quarter = next((t for t in sweep["LoRA"] if math.isclose(t["rate"], advised)), None) or trial(lora, advised)

fresh, _ = mp.load_base(BASE)                                  # one step of Adam: how far do the weights move?
one_step = mp.attach(fresh, lora)
mp.fit(fresh, tokenizer, small["train"], replace(small_plan, steps=1, lr=1e-3))
moves = [piece.delta().detach().abs().mean().item() / 1e-3 for piece in one_step.pieces().values()]

print(f"best rate: LoRA {lora_best['rate']:g}, full fine-tuning {full_best['rate']:g}; the first is {ratio:g} times the second")
for way, trials in sweep.items():
    if best[way] in (trials[0], trials[-1]):
        print(f"{way} is best at an edge of the grid, so its true best may lie outside")
print(f"not trained: loss {untrained:.3f}")
print(f"Adam's first step, in units of the rate: full fine-tuning moves a weight by 1, LoRA by {sum(moves) / len(moves):.2f}")
lab.table([{"": "full fine-tuning"} | full_best, {"": "LoRA"} | lora_best, {"": "LoRA at a quarter of full's rate"} | quarter])

# %% [markdown]
# Why the difference? Adam moves each trained number by about the learning rate in a step. In full fine-tuning these numbers are the weights. In LoRA the first step moves $B$, and $B$ reaches the weights only through $\alpha/r$ and through $A$, whose entries are no larger than $1/\sqrt{\mathrm{in}}$. The line above the table measures it. A good rate belongs to a method *with* its scale and its start. It does not carry over from one method to the next.
#
# ## Break it: rank, alpha and place
#
# More advice to test: *rank 8 or 16 is enough; above 64 the returns diminish and the memory skyrockets. Take $\alpha = 2r$, too large and the model goes off track. Adapt $W_Q$ and $W_V$: the feed-forward layers only store knowledge.*
#
# Each run below is held against the reference (rank 16, $\alpha = 32$, all linear layers). In the left panel the rank changes and $\alpha = 2r$ goes along, as the advice has it; everything else changes one thing. The learning rate is LoRA's best from the sweep, for the reference. The reference runs with three seeds: a difference smaller than their spread is noise.
#
# In the last table each place gets the rank that makes the **same number** of trained numbers as the reference. Otherwise you would compare sizes, not places.

# %% tags=["figure"]
rate = lora_best["rate"]
seeds = [lora_best] + [trial(lora, rate, seed) for seed in mp.pick(smoke=[], cpu=[1, 2], gpu=[1, 2])]
ranks = {r: trial(mp.LoRA(rank=r, alpha=2 * r, targets="all-linear"), rate)
         for r in mp.pick(smoke=[1], cpu=[1, 64], gpu=[1, 4, 64])}
alphas = {a: trial(replace(lora, alpha=a), rate)
          for a in mp.pick(smoke=[512], cpu=[4, 256], gpu=[2, 8, 128, 512])}
spread = [t["loss"] for t in seeds]

figure, panels = new_figure(2, width=8.6, height=3.4)
for ax, runs, reference, label in ((panels[0], ranks, lora.rank, r"rank $r$, with $\alpha = 2r$"),
                                   (panels[1], alphas, lora.alpha, r"$\alpha$, at rank 16")):
    points = sorted([(reference, lora_best["loss"]), *((value, t["loss"]) for value, t in runs.items())])
    ax.axhspan(min(spread), max(spread), color=COLOURS["sky"], alpha=0.3, linewidth=0, label="reference, all seeds")
    ax.plot(*zip(*points), "o-", color=COLOURS["blue"])
    ax.axhline(untrained, color=COLOURS["grey"], linestyle="--", linewidth=1.3, label="not trained")
    ax.set(xscale="log", xlabel=label, ylabel="loss, held-out wording", ylim=(0, 1.25 * untrained))
    ax.set_xticks([value for value, _ in points], [str(value) for value, _ in points])
    ax.minorticks_off()
panels[0].legend(loc="center right", frameon=False)
figure

# %%
def per_rank(targets) -> int:
    """Numbers that rank 1 trains on these modules."""
    return sum(sum(model.get_submodule(path).weight.shape) for path in mp.anatomy.match(model, targets))

def of_equal_size(*targets) -> mp.LoRA:
    rank = round(lora.rank * per_rank("all-linear") / per_rank(targets))
    return mp.LoRA(rank=rank, alpha=2 * rank, targets=targets)

others = {"q, v": replace(lora, targets=("q_proj", "v_proj")),
          "q, v, as many numbers as the reference": of_equal_size("q_proj", "v_proj"),
          "feed-forward, as many numbers": of_equal_size("gate_proj", "up_proj", "down_proj"),
          "all linear, rank 64, same α": replace(lora, rank=64),
          "all linear, rank 64, same α, rsLoRA": replace(lora, rank=64, rslora=True)}
others = dict(list(others.items())[: mp.pick(smoke=1, cpu=5, gpu=5)])
places = {name: trial(method, rate) for name, method in others.items()}

print(f"the reference over {len(spread)} seeds: loss {min(spread):.3f} to {max(spread):.3f}")
rows = [("all linear, the reference", lora, lora_best), *((name, others[name], t) for name, t in places.items())]
columns = ("trained", "loss", "s a step", "GiB more")
lab.table([{"": name, "rank": m.rank, "scale s": m.scale} | {k: t.get(k) for k in columns} for name, m, t in rows])

# %% [markdown]
# How to read it:
#
# - **Rank.** Compare rank 1 with the reference and with the spread of the seeds. Then compare the two runs at rank 64: the one in the figure has $\alpha = 128$, the row *rank 64, same α* has 32. If the first is worse, its steps are too large, not its rank. Facts want numbers, and a rate suits a rank: the paper found rank 1 enough on some tasks, and a fair test sweeps the rate for each rank.
# - **Memory.** Compare *GiB more* at rank 16 and at rank 64.
# - **Alpha.** $\alpha$ only multiplies the update. To Adam it acts much like a learning rate, says section 4.1 of the paper. So $\alpha = 2r$ is no law. It is a habit that goes with one rate.
# - **rsLoRA.** With $\alpha$ held, $s = \alpha / r$ shrinks as the rank grows. rsLoRA (Kalajdzievski 2023) divides by $\sqrt{r}$ instead. Look at the column *scale s*: it is another choice of $s$, and a large $s$ at a rate tuned for a small one can also be too much.
# - **Place.** Look at the two rows of the same size. Does what this task has to learn, facts, belong in $W_Q$ and $W_V$?
#
# ## Break it: the start
#
# Three starts, the same small task: the usual one, both matrices zero, both random. Before the first step the held-out loss should be the frozen model's.

# %%
def start(which: str) -> dict:
    torch.manual_seed(0)
    fresh, _ = mp.load_base(BASE)
    for piece in mp.attach(fresh, lora).pieces().values():
        if which == "both zero":
            nn.init.zeros_(piece.A)
        if which == "both random":
            nn.init.uniform_(piece.B, -1 / math.sqrt(lora.rank), 1 / math.sqrt(lora.rank))
    first = mp.evaluate(fresh, tokenizer, small["validation"])["loss"]
    steps = mp.pick(smoke=1, cpu=8, gpu=20)
    done = mp.fit(fresh, tokenizer, small["train"], replace(small_plan, lr=rate, steps=steps))
    return {"start": which, "loss before": first, "gradient, step 1": done.history[0]["grad_norm"],
            f"loss after {steps} steps": mp.evaluate(fresh, tokenizer, small["validation"])["loss"]}

print(f"the frozen model: loss {untrained:.4g}")
lab.table([start(which) for which in ("the usual", "both zero", "both random")])

# %% [markdown]
# Both zero: each gradient is a product with the other matrix, so both are zero. Nothing raises an error, the bar runs, the loss stays. Both random: you start from a damaged model and pay for the repair.
#
# ## Exercise 4: find the bug · 10 minutes · medium
#
# This is from public fine-tuning code. It is meant to freeze all linear layers. The cell below shows what it does: nothing, silently. Why? Then write `freeze` so that only the parameters called `A` or `B` train, and nothing else does.

# %%
def freeze_as_published(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad = False

victim = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
freeze_as_published(victim)
print("these still train:", [name for name, p in victim.named_parameters() if p.requires_grad])

def freeze(model: nn.Module) -> None:
    """Afterwards only the parameters called A or B train. Works in place."""
    ### BEGIN SOLUTION
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-1] in ("A", "B"))
    ### END SOLUTION

check.freeze(freeze)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Python lets you set any attribute on any object. Who has the `requires_grad` that torch reads: the module or its parameters? A parameter's name is a path such as `blocks.0.1.A`; `model.named_parameters()` gives names and parameters.
#
# </details>

# %% [markdown]
# ## What was learned?
#
# Back to the model that knows the cards. $\Delta W = \frac{\alpha}{r} BA$ of rank 16 *may* use 16 directions equally. Does it? On the left you see the singular values of some trained $\Delta W$, beside those of a random $BA$ of the same shapes. On the right, how much each layer changed, relative to its weight.

# %% tags=["figure"]
spectra, sizes = {}, {}
with torch.no_grad():
    for path, piece in adapter.pieces().items():
        delta, W = piece.delta().cpu(), model.get_submodule(path).weight.cpu()
        spectra[path] = torch.linalg.svdvals(delta)[: lora.rank] / delta.norm()
        sizes[path] = (delta.norm() / W.norm()).item()
    noise = [torch.randn(d_out, lora.rank) @ torch.randn(lora.rank, d_in) for d_out, d_in in shapes[:7]]
    by_chance = [torch.linalg.svdvals(delta)[: lora.rank] / delta.norm() for delta in noise]

def directions(spectra) -> float:
    """How many singular values hold 90 % of ‖ΔW‖², on average."""
    return sum(int((s.square().cumsum(0) < 0.9).sum()) + 1 for s in spectra) / len(spectra)

figure, (left, right) = new_figure(2, width=9.2, height=3.5)
number = range(1, lora.rank + 1)
for values in spectra.values():
    left.plot(number, values, color=COLOURS["blue"], linewidth=0.4, alpha=0.25)
mean = torch.stack(list(spectra.values())).mean(0)
left.plot(number, mean, color=COLOURS["blue"], label="trained (thin: each layer)")
left.plot(number, torch.stack(by_chance).mean(0), color=COLOURS["vermilion"], label="random")
left.set_xticks(number[::3])
left.set(xlabel="singular value number", ylabel=r"share of $\|\Delta W\|$", ylim=(0, 1))
left.legend(frameon=False)
for colour, kind in (("blue", "q_proj"), ("sky", "v_proj"), ("green", "o_proj"), ("orange", "down_proj")):
    values = [size for path, size in sizes.items() if path.endswith(kind)]
    right.plot(values, color=COLOURS[colour], label=kind)
right.set(xlabel="block", ylabel=r"$\|\Delta W\| \,/\, \|W\|$", ylim=(0, 1.3 * max(sizes.values())))
right.legend(ncols=2, frameon=False, loc="upper right")
print(f"90 % of ‖ΔW‖² lie in {directions(spectra.values()):.1f} of {lora.rank} directions; in a random BA, in {directions(by_chance):.1f}")
figure

# %% [markdown]
# ## Merge, save, open elsewhere
#
# ### Exercise 5: merge · 5 minutes · easy
#
# Fold the update into the weight. The frozen `W` must stay as it is: return a new tensor.

# %%
def lora_merge(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float, rank: int
) -> torch.Tensor:
    """The weight (out, in) that does the same without LoRA."""
    ### BEGIN SOLUTION
    return W + alpha / rank * B @ A
    ### END SOLUTION

check.lora_merge(lora_merge)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# You did it by hand above: $W' = W + \frac{\alpha}{r} BA$.
#
# </details>

# %%
def logits_and_ms(model, repeats=mp.pick(smoke=2, cpu=10, gpu=10)):
    """The logits of one question, and the shortest of some forward passes in milliseconds."""
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            began = time.perf_counter()
            logits = model(**question).logits.cpu()
            times.append(time.perf_counter() - began)
    return logits, 1000 * min(times)

apart, ms_apart = logits_and_ms(model)
mp.merge(model)
folded, ms_folded = logits_and_ms(model)
assert fingerprint(model) != at_first
mp.unmerge(model)
assert fingerprint(model) == at_first                          # the frozen bytes are back, every bit
merge_error = ((folded - apart).abs().max() / apart.abs().max()).item()
same = (folded.argmax(-1) == apart.argmax(-1)).float().mean()
print(f"merged: the logits differ by {merge_error:.1g} of the largest; {same:.0%} of the best next tokens are the same")
print(f"one pass: {ms_apart:.1f} ms with the adapter beside the weights, {ms_folded:.1f} ms merged")

# %%
shelf = tempfile.TemporaryDirectory()
mp.save_adapter(model, shelf.name)
files = {file.name: file.stat().st_size for file in sorted(Path(shelf.name).iterdir())}
base_bytes = sum(p.numel() * p.element_size() for p in base_parameters(model).values())
for name, size in (files | {"(the frozen model)": base_bytes}).items():
    print(f"{name:28} {size / 1e3:10,.0f} kB")

again, _ = mp.load_base(BASE)
mp.load_adapter(again, shelf.name)
assert torch.equal(logits_and_ms(again, 1)[0], apart)
print("read again by minipeft: the same logits to the bit")
peft_error = None
warnings.filterwarnings("ignore", category=FutureWarning)      # peft still uses old names of transformers
try:
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(mp.load_base(BASE)[0], shelf.name).eval()
    peft_error = ((logits_and_ms(theirs, 1)[0] - apart).abs().max() / apart.abs().max()).item()
    print(f"opened by Hugging Face PEFT: the logits differ by {peft_error:.1g} of the largest")
except ImportError:
    print("peft is not installed here, so that comparison is skipped (pip install peft)")

# %% [markdown]
# ## What it cost, and what you predicted
#
# The first cell prints this method's row for the cost table of the course, and your predictions beside the measured numbers. The second one is the closing quiz. Every wrong answer says why it is wrong. The numbers in it are computed.

# %%
measured = dict(zip(predicted, (report.percent, ratio, 100 * trained["recall"])))
row = {"method": "LoRA", "rank": lora.rank, "trained": report.trainable, "percent": report.percent,
       "minutes": run.seconds / 60, "peak GiB": run.peak_memory / 2**30, "file MB": sum(files.values()) / 1e6} | trained
def finite(trials):
    return {name: t["loss"] if math.isfinite(t["loss"]) else None for name, t in trials.items()}
lab.record(
    main=row | {"steps": run.steps, "batch": plan.batch_size, "rate": plan.lr, "questions": len(exam)},
    frozen={"bare": frozen, "three cards shown": frozen_shown, "questions": len(sample)},
    rates={way: finite({t["rate"]: t for t in trials}) for way, trials in sweep.items()}
    | {"best": best, "ratio": ratio, "quarter": quarter["loss"], "not trained": untrained},
    ranks=finite(ranks) | {"reference, seeds": spread}, alphas=finite(alphas), places=finite(places),
    merge={"error": merge_error, "ms apart": ms_apart, "ms merged": ms_folded},
    checkpoint={"bytes": sum(files.values()), "base bytes": base_bytes, "peft error": peft_error},
)
display(lab.table([{"": key, "predicted": predicted[key], "measured": value} for key, value in measured.items()]))
lab.table([row])

# %% tags=["figure"]
width, kv, ff, blocks = 4096, 1024, 14336, 32                  # Llama-3-8B
attention = [(width, width), (kv, width), (kv, width), (width, width)]
eight = [*attention, (ff, width), (ff, width), (width, ff)] * blocks

def count(rank, shapes=eight) -> str:
    return f"{sum(mp.LoRA(rank=rank).parameter_count(*shape) for shape in shapes):,}"

lab.quiz([
    {"question": "Llama-3-8B, rank 16, all seven projections of its 32 blocks. How many numbers train?", "right": count(16),
     "choices": {count(16, eight[:7]): "That is one block.",
                 count(32): "That is rank 32. It is in print for rank 16 all the same: a claim to count, not to repeat.",
                 count(16): "$r\\,(\\mathrm{in}+\\mathrm{out})$, summed over all projections.",
                 f"{sum(o * i for o, i in eight):,}": "That is the number of frozen weights in these projections."}},
    {"question": "Why is $B$ zero at the start and $A$ random?", "right": "so that nothing changes and something can learn",
     "choices": {"so that both gradients are zero": "Then nothing would ever train. That is both zero.",
                 "so that nothing changes and something can learn": "$B=0$ makes $\\Delta W=0$; a random $A$ gives $B$ a gradient.",
                 "to save memory": "Both are stored in full either way.",
                 "so that $\\Delta W$ has rank $r$ at once": "At the start $\\Delta W$ is zero, and its rank is 0."}},
    {"question": "You double the rank and keep $\\alpha$. What happens to the scale $s$?", "right": "it halves",
     "choices": {"it doubles": "$r$ is in the denominator.",
                 "nothing": "Only if you double $\\alpha$ too.",
                 "it shrinks by $\\sqrt{2}$": "That is rsLoRA, $s=\\alpha/\\sqrt{r}$.",
                 "it halves": "$s=\\alpha/r$. A comparison of ranks at a fixed $\\alpha$ also compares scales."}},
    {"question": "You have a good rate for full fine-tuning and go over to LoRA. What do you try?", "right": "a grid that reaches well above it",
     "choices": {"the same rate": "Compare the two curves of the sweep at that rate.",
                 "rates three to five times lower": "The table below the sweep has that row: see its loss.",
                 "a grid that reaches well above it": "The factor depends on scale, start and task, so measure it. One Adam step of LoRA moves the weights less."}},
    {"question": "A test compares your LoRA layer with a reference right after its creation. It passes. What does that show?",
     "right": "next to nothing",
     "choices": {"next to nothing": "At $B=0$ the update is zero, whatever your formula is. Randomise $B$ before you compare.",
                 "the scale is right": "Zero times any scale is zero.",
                 "$A$ and $B$ are not swapped": "$x B A$ is zero as well, where the shapes fit."}},
    {"question": "You merged the adapter into float32 weights. What did you lose?", "right": "exchanging it for free",
     "choices": {"accuracy": "The difference is rounding, see above. In 4 bits it is more: that is another chapter.",
                 "speed": "Merged, the model computes what it did before LoRA: there is no extra product.",
                 "the rank": "$W'-W$ still has rank $r$ at most.",
                 "exchanging it for free": "It is part of the weights now. To take it out you need the weights as they were."}},
    {"question": "Forwards, a model writes every name right. Does it know the names?", "right": "you cannot tell; ask in reverse",
     "choices": {"yes": "It may only copy. Compare with the reverse score above.",
                 "you cannot tell; ask in reverse": "Forwards the name stands in the question, and copying is enough.",
                 "no": "That it could copy does not prove that it did."}},
])

# %% [markdown]
# ## Recap
#
# - LoRA learns $\Delta W = \frac{\alpha}{r} BA$ beside a frozen $W$. It trains $r\,(\mathrm{in} + \mathrm{out})$ numbers for each adapted weight.
# - $B = 0$, $A$ random: the model is unchanged at the start, and it can learn.
# - It is a piece in the module socket: $(x, y) \to y'$. The base stays as it is, to the bit.
# - Rate, scale and start belong together. Advice on one without the others is worth little. Sweep the rate.
# - Rank and place are questions for your task. Compare at equal size, and know the spread of your seeds.
# - Merged, it costs nothing to run. Apart, it is a small file that you can exchange.
#
# ## Further reading
#
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685): sections 4.1 (the method), 7.1 to 7.3 (which weights, which rank, what is learned)
# - Schulman et al. 2025, [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/): rates, places and capacity, measured on a large scale
# - Biderman et al. 2024, [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673)
# - Kalajdzievski 2023, [rsLoRA](https://arxiv.org/abs/2312.03732)
# - Aghajanyan et al. 2020, [Intrinsic Dimensionality](https://arxiv.org/abs/2012.13255): why so few numbers can be enough
