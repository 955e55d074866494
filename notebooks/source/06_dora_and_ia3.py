# ---
# jupyter:
#   minipeft:
#     records: [main, films, cards, geometry, cost, counts, rates, pissa, rslora, merge, checkpoint]
# ---

# %% [markdown]
# # 6 · DoRA and (IA)³: which way, how long, how loud
#
# **In one sentence:** DoRA takes every row of a weight apart into a length and a direction and trains the two separately; (IA)³ trains no matrix at all, only how loud each key, each value and each inner activation is.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/06_dora_and_ia3.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - write DoRA and (IA)³ from their equations, and merge both into the weights
# - say what each of them trains, where it acts, and count it from a model's configuration
# - measure how training moves the lengths and the directions of weights, and what DoRA's step costs beside LoRA's
# - start LoRA from a weight's own singular vectors (PiSSA), and turn the result back into a plain LoRA
# - say what rsLoRA changes, and when it matters
#
# **You need:** [chapter 5](05_lora.ipynb), LoRA.
#
# **The papers:** Liu et al. 2024, *DoRA*, [arXiv:2402.09353](https://arxiv.org/abs/2402.09353): you build equation 5, you measure its equations 3 and 4. Liu et al. 2022, *(IA)³*, [arXiv:2205.05638](https://arxiv.org/abs/2205.05638), section 3.3. Meng et al. 2024, *PiSSA*, [arXiv:2404.02948](https://arxiv.org/abs/2404.02948), section 3. Kalajdzievski 2023, *rsLoRA*, [arXiv:2312.03732](https://arxiv.org/abs/2312.03732), theorem 3.2.

# %% tags=["setup"]
import hashlib, inspect, math, random, statistics, subprocess, sys, tempfile, warnings
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()
from dataclasses import replace
from pathlib import Path
import torch, torch.nn.functional as F, transformers
from torch import nn
import minipeft as mp
from minipeft import bill, lab, profiles, training
lab.seed_everything(0)
print("minipeft", mp.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
print("profile", mp.profile().name, "on", mp.profile().device)
lab.runtime_box("06_dora_and_ia3")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the computed and measured ones.
#
# 1. On a Llama of 7 billion parameters, a prompt of 20 trained tokens is 20 vectors of 4,096 numbers. (IA)³ trains how many times as many?
# 2. And LoRA of rank 8 on queries and values, how many times as many as (IA)³?
# 3. DoRA of rank 8 on the same places: how many **percent** more numbers than LoRA?
# 4. One training step of DoRA takes how many times as long as one of LoRA?
# 5. Film reviews told positive from negative: by how many **points** is LoRA better than (IA)³?

# %%
predicted = {"(IA)³ / prompt of 20": None, "LoRA / (IA)³": None, "DoRA's extra numbers, percent": None,
             "DoRA's step / LoRA's step": None, "LoRA minus (IA)³ on films, points": None}

# %% [markdown]
# ## The problem
#
# LoRA adds one matrix and asks it for everything. Two questions are left over from chapter 5.
#
# - A row of a weight is an arrow: it has a **length** and a **direction**. $W + \Delta W$ changes both at once. Does it help to train them apart?
# - How **few** numbers will do? Can you leave every arrow where it is and only change how loud it speaks?
#
# You try both on two tasks. **Films:** tell positive from negative reviews with MiniLM. A run takes seconds, so that you can repeat it with several seeds. **Cards:** facts on medicines with a language model, as in chapter 5, but only some of the cards.
#
# First the frozen models. MiniLM gets a new head for two classes. *Head only* trains that one layer: whoever trains something inside the model should beat it. The cards are scored as in chapter 5, by shares of exact answers: **format**, **name**, **facts** and **all_facts** where the name is asked about, **recall** where the name is the answer. *Loss* is on a wording that nobody trained on.

# %%
def short(split: str, most: int) -> list[dict]:
    """At most `most` film reviews of at most 20 words, drawn with a fixed seed."""
    rows = [e for e in mp.load_data("sentiment/movies", split) if len(e["text"].split()) <= 20]
    return random.Random(0).sample(rows, min(most, len(rows)))

films = {"train": short("train", mp.pick(smoke=32, cpu=1200, gpu=1600)), "test": short("test", mp.pick(smoke=16, cpu=300, gpu=1000))}
film_plan = mp.FitConfig(steps=mp.pick(smoke=2, cpu=60, gpu=100), batch_size=mp.pick(smoke=4, cpu=16, gpu=16), warmup=0.1, progress=False)

def film_run(method, lr: float, seed: int = 0, watch=None, **changes) -> dict:
    """Train MiniLM on films: `method`, or None for all of it, or "head" for the head alone."""
    torch.manual_seed(seed)
    model, words = mp.load_base("minilm-l6", num_labels=2)
    if method == "head":
        model.base_model.requires_grad_(False)
    elif method is not None:
        mp.attach(model, method)
    run = mp.fit(model, words, films["train"], replace(film_plan, lr=lr, seed=seed, **changes), watch=watch and watch(model))
    return {"model": model, "losses": [h["loss"] for h in run.history], "rate": lr, "words": words,
            "trained": mp.parameter_report(model).trainable, "s a step": statistics.median(h["seconds"] for h in run.history),
            } | mp.evaluate(model, words, films["test"])

# %%
BASE = profiles.base_model()
model, tokenizer = mp.load_base(BASE)
names = sorted({e["card"] for e in mp.load_data("drug_cards", "train")})
few = names[:: len(names) // mp.pick(smoke=2, cpu=12, gpu=48)]
cards = {split: [e for e in mp.load_data("drug_cards", split) if e["card"] in few] for split in ("train", "validation", "test")}

def card_scores(model) -> dict:
    """The loss on a held-out wording, and the shares of exact answers to the test questions."""
    step = mp.pick(smoke=len(cards["test"]) - 1, cpu=1, gpu=1)   # in smoke one question of each direction
    longest, asked = mp.pick(smoke=4, cpu=24, gpu=24), cards["test"][::step]
    answers = mp.generate(model, tokenizer, [e["prompt"] for e in asked], max_new_tokens=longest)
    return {"loss": mp.evaluate(model, tokenizer, cards["validation"])["loss"]} | mp.score_cards(asked, answers)

positive = sum(e["label"] for e in films["test"]) / len(films["test"])
head_only, frozen_cards = film_run("head", 1e-2), card_scores(model)
display(lab.table([{"films": "always the commoner label", "accuracy": max(positive, 1 - positive)},
                   {"films": "head only", "accuracy": head_only["accuracy"], "trained": head_only["trained"]}]))
lab.table([{"cards": "frozen", "medicines": len(few), "questions to learn from": len(cards["train"])} | frozen_cards])

# %% [markdown]
# ## The idea
#
# **DoRA**, *weight-decomposed low-rank adaptation* (equation 5). Let LoRA turn the rows, and give their lengths numbers of their own. $V$ is LoRA's weight, $\|V\|$ the lengths of its rows, $m$ the lengths you want. Row by row:
#
# $$W' = m \cdot \frac{V}{\|V\|} \qquad V = W + \frac{\alpha}{r} B A$$
#
# **(IA)³**, *infused adapter by inhibiting and amplifying inner activations* (section 3.3). Three vectors $l$ in a block, each multiplied entry by entry ($\circ$). $q$, $k$, $v$ are queries, keys and values, $d_k$ is the width of a key in one head. $W_{\mathrm{up}}$, $W_{\mathrm{down}}$ and $\sigma$ are the frozen feed-forward's own, not an adapter's as in chapter 4. What $\sigma$ returns is the **inner activation**:
#
# $$\mathrm{softmax}\!\left(\frac{q\,(l_k \circ k)^\top}{\sqrt{d_k}}\right)(l_v \circ v) \qquad\qquad W_{\mathrm{down}}\,\big(l_{\mathrm{ff}} \circ \sigma(W_{\mathrm{up}}\, x)\big)$$
#
# | | shape | starts at | |
# |---|---|---|---|
# | $W$ | $(\mathrm{out}, \mathrm{in})$ | | frozen |
# | $A$, $B$ | $(r, \mathrm{in})$, $(\mathrm{out}, r)$ | random, zero | DoRA trains them |
# | $m$ | $(\mathrm{out})$ | $\|W\|$ | DoRA trains it: one number an output |
# | $l_k$, $l_v$ | as wide as keys, as values | ones | (IA)³ trains them |
# | $l_{\mathrm{ff}}$ | as wide as the inner activation | ones | (IA)³ trains it |
#
# Started like that, none of them changes anything. The picture shows one row of a weight with two inputs, and where each method can move its tip. ($l_{\mathrm{ff}}$ is not in it: it scales the columns of $W_{\mathrm{down}}$.)

# %% tags=["figure"]
from minipeft.lab.plots import COLOURS, new_figure

row = torch.tensor([1.5, 0.9])                                 # one row of W
turned = row + torch.tensor([-0.75, 0.65])                     # what LoRA adds to it
figure, panels = new_figure(3, width=9.4, height=3.4)
ends = {"LoRA: W + sBA": turned, "DoRA: m V / ‖V‖": turned / turned.norm() * 1.15 * row.norm(), "(IA)³ on keys or values: l ∘ W": 1.45 * row}
for ax, (title, tip) in zip(panels, ends.items()):
    ax.annotate("", row, (0, 0), arrowprops={"arrowstyle": "-|>", "color": COLOURS["grey"], "lw": 2, "mutation_scale": 16})
    ax.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "-|>", "color": COLOURS["blue"], "lw": 2.5, "mutation_scale": 16})
    ax.text(row[0] + 0.05, row[1] - 0.16, "W", color="#57606a", fontsize=12)
    ax.set(xlim=(-0.15, 2.6), ylim=(-0.15, 2.35), aspect="equal", title=title, xticks=[], yticks=[])
arrow = {"arrowstyle": "->", "color": COLOURS["vermilion"], "lw": 1.8}
panels[0].annotate("", turned, row, arrowprops=arrow)
panels[0].text(1.28, 1.35, "anywhere,\nin one go", color=COLOURS["vermilion"], fontsize=10)
angles = torch.linspace(math.atan2(row[1], row[0]), math.atan2(turned[1], turned[0]), 30)
panels[1].plot(row.norm() * angles.cos(), row.norm() * angles.sin(), color=COLOURS["vermilion"], lw=1.8)
panels[1].annotate("", ends["DoRA: m V / ‖V‖"], turned / turned.norm() * row.norm(), arrowprops=arrow)
panels[1].text(1.5, 1.45, "turn by A, B", color=COLOURS["vermilion"], fontsize=10)
panels[1].text(0.1, 2.05, "stretch by m", color=COLOURS["vermilion"], fontsize=10)
panels[2].annotate("", 1.45 * row, row, arrowprops=arrow)
panels[2].text(1.1, 1.5, "stretch only", color=COLOURS["vermilion"], fontsize=10)
for ax in panels:
    ax.spines[["left", "bottom"]].set_visible(True)
figure

# %% [markdown]
# ## By hand
#
# Take pencil and paper. Two rows, rank 1, $\alpha / r = 1$. The numbers are chosen so that the lengths come out whole:
#
# $$W = \begin{pmatrix}3&4\\0&2\end{pmatrix} \qquad B = \begin{pmatrix}2\\0\end{pmatrix} \qquad A = \begin{pmatrix}1&4\end{pmatrix} \qquad x = \begin{pmatrix}1\\1\end{pmatrix}$$
#
# 1. The lengths of the rows of $W$: this is where $m$ starts.
# 2. $V = W + BA$, and the lengths of its rows.
# 3. $W'$ with $m$ as it started. Which rows changed? Did their lengths?
# 4. Now $m = (13, 1)$. Compute $W'$ and $W'x$.
# 5. (IA)³ on the same layer: $l = (2, \tfrac12)$. Compute $l \circ (Wx)$, and the $W'$ that does the same.

# %%
W, x = torch.tensor([[3.0, 4], [0, 2]]), torch.tensor([1.0, 1])
A, B, l = torch.tensor([[1.0, 4]]), torch.tensor([[2.0], [0]]), torch.tensor([2, 0.5])
V = W + B @ A
m_start = W.norm(dim=1)
print("1. lengths of W:", m_start.tolist())
print("2. V =", V.tolist(), "with lengths", V.norm(dim=1).tolist())
same_length = m_start[:, None] * V / V.norm(dim=1, keepdim=True)
print("3. W' =", [[round(n, 3) for n in line] for line in same_length.tolist()], "with lengths", same_length.norm(dim=1).tolist())
m = torch.tensor([13.0, 1])
print("4. W' =", (m[:, None] * V / V.norm(dim=1, keepdim=True)).tolist(), " W'x =", (m / V.norm(dim=1) * (V @ x)).tolist())
print("5. l ∘ (W x) =", (l * (W @ x)).tolist(), " W' =", (l[:, None] * W).tolist())
assert torch.allclose(same_length.norm(dim=1), m_start)               # a turn alone changes no length
assert torch.equal(l * (W @ x), (l[:, None] * W) @ x)

# %% [markdown]
# ## Build DoRA
#
# ### Step 1: lengths and directions of real weights
#
# Any weight is the lengths of its rows times their directions, so taking it apart loses nothing. PyTorch stores a weight as (out, in): **one row an output**, so the lengths are `norm(dim=1)`, and there are *out* of them.
#
# The paper writes *columns*, for its weights are (in, out). That has misled many: a widely copied "DoRA from scratch" takes `norm(dim=0)`, and people asked [one of its authors](https://github.com/nbasyl/DoRA/issues/1), who answered: one length an output. With `dim=0` the model still starts unchanged and still learns, so no test at the start will tell you.
#
# ### Exercise 1: DoRA's weight · 5 minutes · easy
#
# Write equation 5. You get lengths $m$ that training has moved already, so they are not $\|W\|$ and not $\|V\|$.
#
# <details>
# <summary>Hint</summary>
#
# First $V$, as in LoRA. `V.norm(dim=1, keepdim=True)` has the shape (out, 1), so it divides each row by its own length. `m[:, None]` has that shape, too.
#
# </details>

# %%
from minipeft.checks import ch06_dora_ia3 as check

def dora_weight(
    W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, alpha: float, rank: int
) -> torch.Tensor:
    """W (out, in), A (r, in), B (out, r), m (out,) -> W' (out, in)."""
    ### BEGIN SOLUTION
    V = W + alpha / rank * B @ A
    return m[:, None] * V / V.norm(dim=1, keepdim=True)
    ### END SOLUTION

check.dora_weight(dora_weight)

# %% [markdown]
# ### Step 2: what the backward pass must keep
#
# A piece in the module socket sees what went into a frozen layer, $x$, and what came out, $y = Wx + b$. DoRA can be written with these two, so that the big product with $V$ is never made. With $s = \alpha / r$ and $c = m / \|V\|$, one number an output, and the bias not scaled,
#
# $$y' = c \circ (V x) + b = c \circ (y + s\,B A x) + (1 - c) \circ b$$
#
# One thing is left that is as large as $W$. $\|V\|$ depends on $A$ and $B$, so a gradient would flow through it, and for that the backward pass needs $V$, in every layer. Section 4.3 of the paper cuts this path: the length is computed with the current numbers, and the backward pass takes it for a constant. Results barely change, says the paper. Memory does. Count what autograd keeps for one layer and 64 tokens. (`torch.no_grad()` around the length says the same as `.detach()` after it: no way back.)

# %%
def kept_bytes(formula) -> int:
    """Bytes that autograd saves for the backward pass, beside the layer's own W, A, B, m and x."""
    saved = {}
    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = formula()                                     # alive while we count
    own = {t.untyped_storage().data_ptr() for t in (W, A, B, m, x)}
    return sum(size for where, size in saved.items() if where not in own)

W = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach()          # (out, in)
(d_out, d_in), r, s = W.shape, 8, 2.0
A, B, m = (nn.Parameter(t.to(W.device)) for t in (torch.randn(r, d_in) / 24, torch.randn(d_out, r) / 24, W.norm(dim=1)))
x = torch.randn(64, d_in, device=W.device, requires_grad=True)
lora, V = lambda: x @ W.T + s * (x @ A.T) @ B.T, lambda: W + s * B @ A
length = torch.no_grad()(lambda: V().norm(dim=1))              # (out,), a constant to autograd
kept = {"LoRA": kept_bytes(lora), "DoRA, ‖V‖ held fixed": kept_bytes(lambda: m / length() * lora()),
        "DoRA, gradient through ‖V‖": kept_bytes(lambda: m / V().norm(dim=1) * lora())}
assert kept["DoRA, ‖V‖ held fixed"] < W.nbytes < kept["DoRA, gradient through ‖V‖"]
lab.table([{"": name, "kB kept": size / 1e3} for name, size in (kept | {"(W itself)": W.nbytes}).items()])

# %% [markdown]
# With the gradient through $\|V\|$, more is kept than $W$ itself has. Held fixed, only what grows with the tokens is left, mainly LoRA's output, which the gradient of $m$ needs.
#
# ### Step 3: the piece
#
# Again a module of its own beside the frozen layer.

# %%
class Turned(nn.Module):
    """(x, y) -> c (y + s B A x) + (1 - c) b with c = m / ‖W + s B A‖, beside one frozen linear layer."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        (d_out, d_in), at = linear.weight.shape, {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.frozen, self.s = (linear,), alpha / rank          # in a tuple: no part of this piece
        self.A = nn.Parameter(torch.empty(rank, d_in, **at).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.B = nn.Parameter(torch.zeros(d_out, rank, **at))
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))              # (out,)

    def forward(self, x, y):                                   # x (…, in), y (…, out)
        W, b = self.frozen[0].weight, self.frozen[0].bias
        with torch.no_grad():
            length = (W + self.s * self.B @ self.A).norm(dim=1)                # (out,), a constant
        c = self.m / length
        y = c * (y + self.s * (x @ self.A.T) @ self.B.T)
        return y if b is None else y + (1 - c) * b

# %%
linear, x = nn.Linear(64, 48).double(), torch.randn(5, 64).double()
piece = Turned(linear, rank=4, alpha=8)
assert torch.equal(piece(x, linear(x)), linear(x))             # at the start: nothing, to the bit
with torch.no_grad():
    piece.B.normal_(std=0.3)
    piece.m.mul_(torch.rand(48).double() + 0.5)
    V = linear.weight + piece.s * piece.B @ piece.A
    merged = piece.m[:, None] * V / V.norm(dim=1, keepdim=True)                # (48, 64)
assert torch.allclose(piece(x, linear(x)), x @ merged.T + linear.bias)
assert torch.allclose(merged.norm(dim=1), piece.m)             # the lengths are m, whatever A and B are
print("shapes:", {name: tuple(p.shape) for name, p in piece.named_parameters()})

# %% [markdown]
# ### Exercise 2: the layer, with its gradients · 15 minutes · hard
#
# Now as a function of everything, with any formula you like. The check compares $y$, and it sends a random gradient backwards and compares the gradients of $A$, $B$ and $m$. A norm that is not held fixed gives the right $y$ and the wrong gradients.
#
# <details>
# <summary>Hint</summary>
#
# `.detach()` gives the same numbers without a way back. Which part of $m V / \|V\|$ must have none? $m$ learns, and so do the $A$ and $B$ inside the upper $V$. The bias is added at the end, unscaled.
#
# </details>

# %%
def dora_forward(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor,
    alpha: float, rank: int,
) -> torch.Tensor:
    """x (batch, tokens, in), W (out, in), b (out,), A (r, in), B (out, r), m (out,) -> y (batch, tokens, out)."""
    ### BEGIN SOLUTION
    V = W + alpha / rank * B @ A
    c = m / V.norm(dim=1).detach()
    return c * (x @ V.T) + b
    ### END SOLUTION

check.dora_forward(dora_forward)

# %% [markdown]
# ### Step 4: the length without the matrix
#
# The piece above still builds $V$ for a moment, to measure its rows. That is what makes DoRA slow in many implementations. The length of a sum can be had from its parts, as in $(a + b)^2 = a^2 + 2ab + b^2$. For each row, with the sums over the $r$ columns of $B$:
#
# $$\|V\|^2 = \|W\|^2 + 2 s \sum_r B \circ (W A^\top) + s^2 \sum_r B \circ (B A A^\top)$$
#
# $\|W\|^2$ never changes, $A A^\top$ is $r \times r$, and $W A^\top$ is a thin product, $(\mathrm{out}, r)$. So no second matrix of $W$'s size is ever made.

# %%
W64, A64, B64 = W.double(), A.detach().double(), B.detach().double()
square = (W64.square().sum(1) + 2 * s * (B64 * (W64 @ A64.T)).sum(1) + s**2 * (B64 * (B64 @ (A64 @ A64.T))).sum(1))
assert torch.allclose(square.sqrt(), (W64 + s * B64 @ A64).norm(dim=1))
full, thin = d_out * r * d_in, d_out * d_in * r + r * r * d_in + d_out * r * r
lab.table([{"way": "build V", "multiplications": full + d_out * d_in, "numbers made on the way": 2 * d_out * d_in},
           {"way": "from the parts", "multiplications": thin, "numbers made on the way": 3 * d_out * r + r * r}])

# %% [markdown]
# The multiplications are about the same. What is spared is memory traffic: two matrices of $W$'s size, in every layer and every step.
#
# ## Build (IA)³
#
# ### Step 5: three vectors a block
#
# $l_k$ and $l_v$ multiply what comes **out** of the key and value projections. $l_{\mathrm{ff}}$ multiplies the inner activation, which is what goes **in** to the feed-forward's last linear. So two hooks see an output, and one sees an input. Plug them into every block of the language model by hand, and pull them out again.

# %%
@torch.no_grad()
def logits(model, text=cards["test"][0]["prompt"]) -> torch.Tensor:
    return model(**tokenizer(text, return_tensors="pt").to(model.device)).logits

before, vectors, handles = logits(model), {}, []
for i, block in enumerate(model.model.layers):
    attention, down = block.self_attn, block.mlp.down_proj
    for kind, width in (("k", attention.k_proj.out_features), ("v", attention.v_proj.out_features), ("ff", down.in_features)):
        vectors[i, kind] = torch.ones(width, device=model.device)
    handles += [attention.k_proj.register_forward_hook(lambda module, args, y, l=vectors[i, "k"]: l * y),
                attention.v_proj.register_forward_hook(lambda module, args, y, l=vectors[i, "v"]: l * y),
                down.register_forward_pre_hook(lambda module, args, l=vectors[i, "ff"]: (l * args[0],))]
assert torch.equal(logits(model), before)                      # ones change nothing, to the bit
for l in vectors.values():
    l.add_(0.1 * torch.randn_like(l))
mine = logits(model)
for handle in handles:                                         # pull them out
    handle.remove()
assert torch.equal(logits(model), before) and not torch.equal(mine, before)
print(f"{len(vectors)} vectors in {len(model.model.layers)} blocks: {sum(map(len, vectors.values())):,} numbers")

# %% [markdown]
# ### Exercise 3: (IA)³ in a block · 10 minutes · medium
#
# One attention head and one feed-forward, here both fed with the same $x$. No mask, no biases. Write the two formulas from above, with $\sigma$ the ReLU. The vectors in the check are far from 1, and some entries are negative. Why does that matter for the question whether $l_{\mathrm{ff}}$ stands before or after the ReLU?
#
# <details>
# <summary>Hint</summary>
#
# Tokens are rows here: `x @ W["k"].T` is (batch, tokens, d_k), and a vector of d_k numbers multiplies each row of it. The last two axes of a stack of matrices are swapped by `.mT`. For a positive $l$, $\mathrm{relu}(l\,u) = l\,\mathrm{relu}(u)$. For a negative one it is not.
#
# </details>

# %%
def ia3_block(
    x: torch.Tensor, W: dict[str, torch.Tensor], l: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (batch, tokens, d); W["q"], W["k"] (d_k, d), W["v"] (d_v, d), W["up"] (inner, d), W["down"] (d, inner);
    l["k"] (d_k,), l["v"] (d_v,), l["ff"] (inner,) -> attended (batch, tokens, d_v), fed (batch, tokens, d)."""
    ### BEGIN SOLUTION
    q, k, v = x @ W["q"].T, l["k"] * (x @ W["k"].T), l["v"] * (x @ W["v"].T)
    attended = (q @ k.mT / math.sqrt(k.shape[-1])).softmax(dim=-1) @ v
    fed = (l["ff"] * torch.relu(x @ W["up"].T)) @ W["down"].T
    return attended, fed
    ### END SOLUTION

check.ia3_block(ia3_block)

# %% [markdown]
# ### Exercise 4: count it from the configuration · 5 minutes · easy
#
# Newer models have fewer key and value heads than query heads, and each is as wide as a query head: hidden / heads.
#
# <details>
# <summary>Hint</summary>
#
# Three vectors a block. How wide is a key? How wide is a value? How wide is what goes into the last linear of the feed-forward?
#
# </details>

# %%
def ia3_parameter_count(layers: int, hidden: int, heads: int, kv_heads: int, inner: int) -> int:
    """Numbers that (IA)³ trains in a decoder of this configuration."""
    ### BEGIN SOLUTION
    return layers * (2 * kv_heads * (hidden // heads) + inner)
    ### END SOLUTION

check.ia3_parameter_count(ia3_parameter_count)

# %% [markdown]
# ### How few is few?
#
# You will read that (IA)³ trains "only about 0.01 % of the parameters, even fewer than prompt tuning". Test it on a Llama of 7 billion parameters. Its configuration is all you need: the model is made on the *meta* device, with shapes and without numbers, and the package counts what it would train.

# %%
def on_paper(config) -> dict[str, int]:
    """What methods would train on a model of this configuration."""
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
        numbers = {"the whole model": sum(p.numel() for p in empty.parameters())}
        for name, method in (("prompt of 20 tokens", mp.PromptTuning(length=20)), ("(IA)³", mp.IA3()), ("LoRA r = 8 on q, v", mp.LoRA(rank=8))):
            mp.attach(empty, method)
            numbers[name] = mp.parameter_report(empty).trainable
            mp.detach(empty)
    places = [mp.anatomy.linear_shape(empty.get_submodule(path)) for path in mp.anatomy.match(empty, ("q_proj", "v_proj"))]
    return numbers | {"DoRA r = 8 on q, v": sum(mp.DoRA(rank=8).parameter_count(*shape) for shape in places)}

seven = transformers.LlamaConfig()                             # the first Llama, 7B
eight = transformers.LlamaConfig(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256)
counts = {"Llama 7B": on_paper(seven), "Llama 3 8B": on_paper(eight)}
whole, prompt_7b, ia3_7b, lora_7b, dora_7b = counts["Llama 7B"].values()
assert ia3_7b == seven.num_hidden_layers * (2 * seven.hidden_size + seven.intermediate_size)
print(f"(IA)³ on Llama 7B: {100 * ia3_7b / whole:.4f} %, {ia3_7b / prompt_7b:g} prompts of 20 tokens, or one of {ia3_7b / seven.hidden_size:g}")
lab.table([{"": name} | {of: numbers[name] for of, numbers in counts.items()} for name in counts["Llama 7B"]])

# %% [markdown]
# About a hundredth of a percent is right. "Fewer than prompt tuning" is not, unless the prompt is long. And DoRA's count is LoRA's **plus one number an output**: little, but not "the same parameter count", as is often written.
#
# ## The same as the package
#
# `mp.DoRA` and `mp.IA3` do what you just did. Below are the heart of DoRA's piece, which uses the thin product of step 4, and both pieces of (IA)³. (Some models, GPT-2 among them, make $q$, $k$ and $v$ with one matrix. There the package rescales the rows of $k$ and $v$ alone: that is what `whole` is for.) Then three implementations of DoRA at a random state, and your (IA)³ hooks from above against the package's, on the whole model.

# %%
from minipeft.methods.dora import Decomposed
from minipeft.methods.ia3 import RescaleInput, RescaleOutput
print(inspect.getsource(Decomposed.norm), inspect.getsource(RescaleOutput.forward), inspect.getsource(RescaleInput.before), sep="\n")

package = Decomposed(mp.DoRA(rank=4, alpha=8), linear)
package.load_state_dict(piece.state_dict())
assert torch.allclose(package(x, linear(x)), piece(x, linear(x)), rtol=1e-12)
print("DoRA: yours = minipeft's")
try:
    import peft
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True)
    host = peft.inject_adapter_in_model(settings, nn.Sequential(linear))
    with torch.no_grad():
        host[0].lora_A["default"].weight.copy_(piece.A)
        host[0].lora_B["default"].weight.copy_(piece.B)
        host[0].lora_magnitude_vector["default"].weight.copy_(piece.m)
    assert torch.allclose(host.double()(x), piece(x, linear(x)), rtol=1e-12)
    print(f"DoRA: yours = peft's (version {peft.__version__})")
except ImportError:
    print("peft is not installed here, so this comparison is skipped (pip install peft)")

# %%
ia3 = mp.attach(model, mp.IA3())
kinds = {"k_proj": "k", "v_proj": "v", "down_proj": "ff"}
assert torch.equal(logits(model), before)                      # the package's also starts at ones
with torch.no_grad():
    for path, one in ia3.pieces().items():                     # model.layers.0.self_attn.k_proj, …
        one.l.copy_(vectors[int(path.split(".")[2]), kinds[path.split(".")[-1]]])
assert torch.equal(logits(model), mine)
mp.detach(model)
print("(IA)³: your hooks = minipeft's, to the bit, on the whole model")

# %% [markdown]
# ## Nothing changed yet
#
# All three methods on the language model, one after the other: the same logits at the start, the count of the formula, and a fingerprint of every frozen byte for later.

# %%
from minipeft.sockets import base_parameters
def fingerprint(model) -> str:
    """SHA-256 over the bytes of every parameter of the base."""
    digest = hashlib.sha256()
    for parameter in base_parameters(model).values():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

size = {"rank": 8, "alpha": 16, "targets": "all-linear"}
methods = {"LoRA": mp.LoRA(**size), "DoRA": mp.DoRA(**size), "(IA)³": mp.IA3()}
shapes = [mp.anatomy.linear_shape(model.get_submodule(path)) for path in mp.anatomy.match(model, "all-linear")]
expected = {"LoRA": sum(8 * (i + o) for o, i in shapes), "DoRA": sum(8 * (i + o) + o for o, i in shapes), "(IA)³": sum(map(len, vectors.values()))}
at_first, reports = fingerprint(model), {}
for name, method in methods.items():
    mp.attach(model, method)
    reports[name] = mp.parameter_report(model)
    assert torch.equal(logits(model), before) and reports[name].trainable == expected[name]
    mp.detach(model)
assert fingerprint(model) == at_first
lab.table([{"": name, "trained": r.trainable, "percent": r.percent, "times LoRA's": r.trainable / expected["LoRA"]} for name, r in reports.items()])

# %% [markdown]
# ## The fine-tune, with cards
#
# The same cards, the same order, the same number of steps, from the same frozen model: LoRA, DoRA, (IA)³. (IA)³ gets a rate of its own, more than ten times LoRA's. Why, you will measure below.
#
# Each run is also asked for its **cost**: the numbers trained, the time of a step, and the memory of one pass. For the memory you count every tensor that is born and dies in a pass forward and backward, and take the highest sum. The time is not taken from the three runs, which lie minutes apart: the second cell trains the three models again **in turn**, a few steps each on the same cards, takes the median, and puts back what was learned. Of each two steps the second is timed. The first may have to allocate.

# %%
card_plan = mp.FitConfig(steps=mp.pick(smoke=2, cpu=45, gpu=150), batch_size=mp.pick(smoke=2, cpu=6, gpu=8))
card_rates = {"LoRA": 2e-3, "DoRA": 2e-3, "(IA)³": 3e-2}
card_runs, tuned = {}, {}
for name, method in methods.items():
    torch.manual_seed(0)
    tuned[name], _ = mp.load_base(BASE)
    mp.attach(tuned[name], method)
    card_runs[name] = mp.fit(tuned[name], tokenizer, cards["train"], replace(card_plan, lr=card_rates[name], progress=name == "DoRA"),
                             watch=lab.live_curve() if name == "DoRA" else None)
    assert fingerprint(tuned[name]) == at_first                # every frozen byte is as it was

# %%
learned = {name: {n: p.clone() for n, p in mp.adapters(m)["default"].state_dict().items()} for name, m in tuned.items()}
turns = {name: [] for name in methods}
for _ in range(mp.pick(smoke=1, cpu=5, gpu=21)):               # LoRA, DoRA, (IA)³, LoRA, DoRA, …
    for name, m in tuned.items():
        two = mp.fit(m, tokenizer, cards["train"], replace(card_plan, steps=2, lr=card_rates[name], progress=False))
        turns[name].append(two.history[-1]["seconds"])
for name, m in tuned.items():
    mp.adapters(m)["default"].load_state_dict(learned[name])
pace = {name: statistics.median(seconds) for name, seconds in turns.items()}
step_ratio = pace["DoRA"] / pace["LoRA"]
pairs = sorted(dora / lora for dora, lora in zip(turns["DoRA"], turns["LoRA"]))
print(f"DoRA's step takes {step_ratio:.2f} times as long as LoRA's; {len(pairs)} turns, one by one from {pairs[0]:.2f} to {pairs[-1]:.2f}")

# %% tags=["figure"]
def pass_peak(model) -> int:
    """The most bytes of tensors alive at once in one pass forward and backward over some cards, counted; weights left out."""
    rows = training.encode(model, tokenizer, cards["train"][:card_plan.batch_size])
    with bill.Live(model.train()) as live:
        training.loss_of(model, rows, 0)[0].backward()
    model.eval().zero_grad()
    return live.peak

on_cards = {name: card_scores(m) for name, m in tuned.items()}
costs = {name: {"trained": reports[name].trainable, "rate": card_rates[name], "s a step": pace[name],
                "times LoRA's": pace[name] / pace["LoRA"], "MB a pass": pass_peak(m) / 1e6} for name, m in tuned.items()}
if mp.profile().name == "smoke":
    print("The smoke profile takes a few steps. It shows that every cell runs, not that the models learn.")
figure, ax = new_figure(width=6.6, height=3.3)
for (name, run), colour in zip(card_runs.items(), ("blue", "vermilion", "green")):
    ax.plot(range(1, run.steps + 1), lab.smooth([h["loss"] for h in run.history], 0.6), color=COLOURS[colour], label=name)
ax.set(xlabel="step", ylabel="loss, smoothed", ylim=(0, None))
ax.legend()
display(figure)
lab.table([{"": "frozen"} | frozen_cards] + [{"": name} | costs[name] | on_cards[name] for name in methods])

# %% [markdown]
# How to read it. *Times LoRA's* is your fourth prediction, for DoRA. Where the line above shows turns far apart, something else was running, and only the median counts. DoRA does everything that LoRA does, and measures the rows of $V$ in every layer besides. With small batches that part weighs more: it does not depend on how many tokens you feed. (IA)³ has no product at all beside the frozen layers. Its loss tells you whether so few numbers are enough for a task that consists of new facts.
#
# One seed, a few cards: differences between DoRA and LoRA in this table are not to be trusted. That is what the films are for.
#
# ## The fine-tune, with seeds
#
# Five ways to train on films, each with several seeds: the draw of the new head, of $A$, and of the order. All of them train the head as well. Each has one rate, in the column *rate*. Only (IA)³'s is tried against others, below, so a small lead may be the rate's. While they run, full fine-tuning, LoRA and DoRA are watched from inside: at some steps you note, for each query and value weight, how far its **lengths** and its **directions** have moved, as means over all rows (the paper's equations 3 and 4):
#
# $$\Delta M = \mathrm{mean}\,\big|\,\|W'\| - \|W\|\,\big| \qquad \Delta D = \mathrm{mean}\,\big(1 - \cos(W', W)\big)$$

# %%
NOTED = [round(share * film_plan.steps) for share in (0.25, 0.5, 0.75, 1)]

class Watch:
    """For mp.fit(watch=…): ΔM and ΔD of every query and value weight at the steps in NOTED."""

    def __init__(self, model):
        self.model, self.points = model, []
        self.paths = mp.anatomy.match(model, ("query", "value"))
        self.at_first = {path: model.get_submodule(path).weight.detach().clone() for path in self.paths}

    @torch.no_grad()
    def __call__(self, entry: dict) -> None:
        own = mp.adapters(self.model)
        pieces = own["default"].pieces() if own else {}
        for path in self.paths if entry["step"] in NOTED else ():
            W0, W = self.at_first[path], self.model.get_submodule(path).weight
            W = pieces[path].merged(W) if path in pieces else W
            dM = (W.norm(dim=1) - W0.norm(dim=1)).abs().mean().item()
            dD = (1 - F.cosine_similarity(W, W0, dim=1)).mean().item()
            self.points.append({"path": path, "step": entry["step"], "ΔM": dM, "ΔD": dD})

# %%
ways = {"full fine-tuning": (None, 2e-4), "LoRA": (mp.LoRA(**size), 2e-3), "DoRA": (mp.DoRA(**size), 2e-3),
        "(IA)³": (mp.IA3(), 2e-2), "PiSSA": (mp.LoRA(init="pissa", **size), 1e-3)}
seeds = mp.pick(smoke=[0], cpu=[0, 1, 2], gpu=[0, 1, 2, 3, 4])
watches, film_runs = {name: [] for name in ways}, {}

def watcher(name):
    def begin(model):
        watches[name].append(Watch(model))
        return watches[name][-1]
    return begin

for name, (method, lr) in ways.items():
    film_runs[name] = [film_run(method, lr, seed, watcher(name)) for seed in seeds]
    for run in film_runs[name][1:]:
        del run["model"]                                       # one of each is enough
    for watch in watches[name]:
        del watch.model, watch.at_first

# %%
def summary(name: str) -> dict:
    runs = film_runs[name]
    right = [run["accuracy"] for run in runs]
    return {"trained": runs[0]["trained"], "rate": runs[0]["rate"], "accuracy": statistics.mean(right), "lowest": min(right),
            "highest": max(right), "s a step": statistics.median(run["s a step"] for run in runs)}

on_films = {name: summary(name) for name in ways}
error = math.sqrt(on_films["LoRA"]["accuracy"] * (1 - on_films["LoRA"]["accuracy"]) / len(films["test"]))
gap = 100 * (on_films["LoRA"]["accuracy"] - on_films["(IA)³"]["accuracy"])
lead = 100 * (on_films["DoRA"]["accuracy"] - on_films["LoRA"]["accuracy"])
print(f"{len(seeds)} seeds; one accuracy on {len(films['test'])} reviews is known to about ± {100 * error:.1f} points")
for what, points in (("LoRA minus (IA)³", gap), ("DoRA minus LoRA", lead)):
    print(f"{what}: {points:+.1f} points, {'more' if abs(points) > 200 * error else 'not more'} than twice that error")
lab.table([{"": "head only", "trained": head_only["trained"], "rate": head_only["rate"], "accuracy": head_only["accuracy"]}]
          + [{"": name} | on_films[name] for name in ways])

# %% [markdown]
# Look at the column *trained* beside the column *accuracy*, the mean of the seeds. And compare the lead of DoRA with the distance from *lowest* to *highest*. The paper reports leads of one to four points over LoRA on larger models and harder tasks; [Hugging Face PEFT's benchmark](https://github.com/huggingface/peft/tree/main/method_comparison) saw none at rank 32. A lead is a lead when it is larger than your seeds' spread.
#
# ### Which way, and how long?
#
# The paper's figure 2, on this task. Each dot is one query or value weight at one of four moments, pale to dark. Do weights that turn much also change their lengths much? $\rho$ in the titles is the correlation over all dots. The authors, with another model and task, found a positive one for LoRA and negative ones for full fine-tuning and DoRA, and took it as the reason for DoRA: it can turn a row without stretching it, LoRA cannot so easily.

# %% tags=["figure"]
geometry = {}
figure, panels = new_figure(3, width=9.6, height=3.6)
for ax, name in zip(panels, ("full fine-tuning", "LoRA", "DoRA")):
    points = [p for watch in watches[name] for p in watch.points]
    for number, step in enumerate(dict.fromkeys(NOTED)):
        for kind, marker in (("query", "o"), ("value", "^")):
            some = [p for p in points if p["step"] == step and p["path"].endswith(kind)]
            ax.scatter([p["ΔD"] for p in some], [p["ΔM"] for p in some], marker=marker, s=22, color=COLOURS["blue"], linewidth=0,
                       alpha=min(1, 0.25 + 0.25 * number), label=kind if step == NOTED[-1] else None)
    D, M = (torch.tensor([p[key] for p in points], dtype=torch.float64) for key in ("ΔD", "ΔM"))
    last = [p for p in points if p["step"] == NOTED[-1]]
    varies = D.std() > 0 and M.std() > 0
    geometry[name] = {"rho": torch.corrcoef(torch.stack([D, M]))[0, 1].item() if varies else 0.0,
                      "ΔD at the end": statistics.mean(p["ΔD"] for p in last), "ΔM at the end": statistics.mean(p["ΔM"] for p in last)}
    ax.set(title=f"{name}: ρ = {geometry[name]['rho']:.2f}", xlabel="ΔD, turned", xlim=(0, 1.1 * D.max()), ylim=(0, 1.1 * M.max()))
    ax.ticklabel_format(style="sci", scilimits=(-2, 3))
panels[0].set_ylabel("ΔM, stretched")
panels[2].legend(loc="lower right")
display(figure)
signs = {name: "positive" if g["rho"] > 0 else "negative" for name, g in geometry.items()}
paper = {"full fine-tuning": "negative", "LoRA": "positive", "DoRA": "negative"}
for name in geometry:
    print(f"{name}: ρ is {signs[name]} here, {paper[name]} in the paper")
lab.table([{"": name} | g | {"stretch for a turn": g["ΔM at the end"] / math.sqrt(2 * max(g["ΔD at the end"], 1e-12))} for name, g in geometry.items()])

# %% [markdown]
# The scales of the panels differ: read the table for how far each method went. All dots begin at (0, 0) and move away from it with the steps, which alone pushes $\rho$ up. So do not read the sign as a law. For a small angle $\theta$, $1 - \cos\theta \approx \theta^2 / 2$: $\Delta D$ grows with the square of the turn, $\Delta M$ does not. *Stretch for a turn* is therefore $\Delta M / \sqrt{2\,\Delta D}$, the change of length for each radian, so that methods can be compared that went different distances. Mind that $m$ has the same rate as $A$ and $B$ here, and that Adam moves it by about that much in each step.
#
# ## Break it: (IA)³'s rate
#
# An entry of $l$ starts at 1 and has to move by a noticeable share of 1. Adam moves it by about the rate in each step. How far can it get in these steps at LoRA's rate? Whoever compares methods at one rate for all risks the conclusion that (IA)³ does not work. (You compare rates on the test reviews here. That is good for looking; for choosing, take others.)

# %% tags=["figure"]
grid = mp.pick(smoke=[2e-2], cpu=[2e-3, 2e-2, 1e-1], gpu=[5e-4, 2e-3, 5e-3, 2e-2, 1e-1, 3e-1])
rates = {lr: film_runs["(IA)³"][0] if lr == ways["(IA)³"][1] else film_run(mp.IA3(), lr) for lr in grid}

def moved(run) -> float:
    """How far the vectors have moved from 1, on average."""
    vectors = [p for name, p in mp.adapters(run["model"])["default"].named_parameters() if name.endswith(".l")]
    return torch.cat([(l - 1).abs().flatten() for l in vectors]).mean().item()

figure, ax = new_figure(width=6.4, height=3.3)
ax.plot(list(rates), [run["loss"] for run in rates.values()], "o-", color=COLOURS["green"])
ax.axhline(head_only["loss"], color=COLOURS["grey"], linestyle="--", linewidth=1.3, label="head only")
ax.set(xscale="log", xlabel="learning rate of (IA)³", ylabel="loss on the test reviews")
ax.set_xticks(grid, [f"{lr:g}" for lr in grid])
ax.minorticks_off()
ax.legend()
display(figure)
lab.table([{"rate": lr, "loss": run["loss"], "accuracy": run["accuracy"], "|l - 1|, mean": moved(run)} for lr, run in rates.items()])

# %% [markdown]
# The last column says how far the vectors got, as a share of where they began. Compare it with the loss, and with *head only*, where they stayed at 1. Now look back: the comparison ran (IA)³ at 0.02. If another row has a clearly lower loss, that was not its best rate, and a part of *LoRA minus (IA)³* is owed to that.
#
# ## Another start: PiSSA
#
# LoRA starts at $B = 0$: nothing to learn from but a random $A$. PiSSA starts from the weight itself, $W = U S V^\top$, and takes its $r$ largest singular values, $S_r$, with the columns of $U$ and $V$ that belong to them, $U_r$ and $V_r$. (This $V$ has nothing to do with DoRA's.)
#
# $$A_0 = \sqrt{S_r / s}\; V_r^\top \qquad B_0 = U_r \sqrt{S_r / s} \qquad \Delta W = s\,(B A - B_0 A_0)$$
#
# So $\Delta W$ is zero at first, as it must be, and yet neither $A$ nor $B$ is. They point where the weight is strongest, and both have a gradient from the first step.

# %% tags=["figure"]
encoder = film_runs["PiSSA"][0]["model"]
start = mp.attach(mp.load_base("minilm-l6", num_labels=2)[0], replace(ways["PiSSA"][0], targets=("query",)))
path = mp.anatomy.match(encoder, ("query",))[0]
W, piece = encoder.get_submodule(path).weight.detach().double(), start.pieces()[path]
with torch.no_grad():
    s_B0_A0 = piece.scale * (piece.B @ piece.A).double()
    U, S, Vt = torch.linalg.svd(W)
    assert torch.allclose(s_B0_A0, (U[:, :8] * S[:8]) @ Vt[:8], atol=1e-5)     # the best W of rank 8
    assert piece.delta().norm() < 1e-5 * W.norm()                                  # nothing has changed, but rounding
print(f"the 8 largest of {len(S)} singular values hold {S[:8].square().sum() / S.square().sum():.0%} of ‖W‖²")

first = mp.pick(smoke=2, cpu=30, gpu=40)
rivals = {("LoRA", ways["LoRA"][1]): film_runs["LoRA"], ("PiSSA", ways["PiSSA"][1]): film_runs["PiSSA"],
          ("PiSSA", ways["LoRA"][1]): [film_run(ways["PiSSA"][0], ways["LoRA"][1], seed) for seed in seeds]}
figure, ax = new_figure(width=6.6, height=3.4)
pissa = {}
for ((name, lr), runs), colour in zip(rivals.items(), ("blue", "vermilion", "orange")):
    curve = [statistics.mean(run["losses"][i] for run in runs) for i in range(min(first, film_plan.steps))]
    ax.plot(range(1, len(curve) + 1), lab.smooth(curve, 0.5), color=COLOURS[colour], label=f"{name}, rate {lr:g}")
    pissa[f"{name}, rate {lr:g}"] = {"loss over these steps": statistics.mean(curve), "accuracy at the end": statistics.mean(run["accuracy"] for run in runs)}
ax.set(xlabel="step", ylabel="loss, mean of the seeds", ylim=(0, None))
ax.legend(loc="lower left")
display(figure)
lab.table([{"": name} | values for name, values in pissa.items()], f"the first {len(curve)} steps")

# %% [markdown]
# $A_0$ and $B_0$ are both far from zero, so that a step of the same rate moves $BA$ through both, where LoRA's first step moves it through $B$ alone. So a rate means something else here. If PiSSA is ahead, compare its two curves before you credit the start alone. And look at *accuracy at the end*: an early lead in loss need not last, and at LoRA's rate a start with both factors far from zero can miss altogether.
#
# ### Exercise 5: back to a plain LoRA · 10 minutes · medium
#
# PiSSA's authors take $s B_0 A_0$ out of $W$ and freeze the rest. Then the adapter only fits that changed base. If you leave $W$ as it is, what was trained is a plain LoRA of rank $2r$, which any program can load: $s\,(BA - B_0 A_0)$ is one product of two thin matrices. Find them. And which $\alpha'$ belongs to them, if a LoRA of rank $2r$ is scaled by $\alpha' / 2r$?
#
# <details>
# <summary>Hint</summary>
#
# A row of $A$ and a column of $B$ make one term of the product. Stack the rows, put the columns side by side: `torch.cat(…)` and `torch.cat(…, dim=1)`. One of the four gets a minus sign. The scale must stay $\alpha / r$.
#
# </details>

# %%
def pissa_as_lora(
    A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor, B0: torch.Tensor, alpha: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, A0 (r, in) and B, B0 (out, r), trained and at the start -> A' (2r, in), B' (out, 2r), alpha'."""
    ### BEGIN SOLUTION
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1), 2 * alpha
    ### END SOLUTION

check.pissa_as_lora(pissa_as_lora)

# %%
shelf = Path((folder := tempfile.TemporaryDirectory()).name)
some = film_runs["PiSSA"][0]["words"]([e["text"] for e in films["test"][:8]], padding=True, return_tensors="pt").to(encoder.device)
mp.save_adapter(encoder, shelf / "pissa")                      # saved as a plain LoRA of rank 2r
again, _ = mp.load_base("minilm-l6", num_labels=2)
plain = mp.load_adapter(again, shelf / "pissa")
with torch.no_grad():
    off = ((again(**some).logits - encoder(**some).logits).abs().max() / encoder(**some).logits.abs().max()).item()
print("trained as:", ways["PiSSA"][0])
print("opened as: ", plain.method)
print(f"on an unchanged MiniLM, the logits differ by {off:.1g} of the largest")

# %% [markdown]
# ## A high rank: what rsLoRA changes
#
# With $\alpha$ held, LoRA's scale $\alpha / r$ shrinks as the rank grows. $BA$ is a sum of $r$ terms. While training is young these terms are like random ones, and such a sum grows with $\sqrt r$, not with $r$. So $\frac{\alpha}{r} BA$ gets **smaller** with the rank, and, says the paper, the additional rank is wasted. rsLoRA takes $\alpha / \sqrt r$ instead (theorem 3.2). Measure it: the same few steps at several ranks, both scales, $\alpha = 16$, at one rate, with one seed.

# %% tags=["figure"]
high = mp.pick(smoke=[4, 64], cpu=[4, 32, 256], gpu=[4, 32, 256])
rslora = {}
figure, panels = new_figure(2, width=8.8, height=3.4)
for ax, stabilised in zip(panels, (False, True)):
    for r, colour in zip(high, ("sky", "blue", "black")):
        run = film_run(mp.LoRA(rank=r, alpha=16, targets="all-linear", rslora=stabilised), 5e-4, steps=mp.pick(smoke=1, cpu=25, gpu=40), schedule="constant")
        with torch.no_grad():
            pieces = {p: piece for p, piece in mp.adapters(run["model"])["default"].pieces().items() if hasattr(piece, "delta")}
            grown = statistics.mean((q.delta().norm() / run["model"].get_submodule(p).weight.norm()).item() for p, q in pieces.items())
        method = mp.adapters(run["model"])["default"].method
        rslora[f"{'α / √r' if stabilised else 'α / r'}, r = {r}"] = {
            "scale": method.scale, "‖ΔW‖ / ‖W‖": grown, "last losses": statistics.mean(run["losses"][-5:])}
        ax.plot(range(1, len(run["losses"]) + 1), lab.smooth(run["losses"], 0.7), color=COLOURS[colour], label=f"r = {r}")
    ax.set(title="rsLoRA, s = α / √r" if stabilised else "LoRA, s = α / r", xlabel="step", ylabel="loss, smoothed", ylim=(0, 0.9))
    ax.legend(loc="lower left")
display(figure)
lab.table([{"": name} | values for name, values in rslora.items()])

# %% [markdown]
# Follow $\|\Delta W\| / \|W\|$ down the ranks, once for each scale. That is what these few steps can show. Whether rank is *wasted* is a matter of the loss: compare *last losses* only where they have left the place where they began, about 0.69 for two classes. If you raise the rank and see no gain, ask first whether you lowered the scale. rsLoRA is no other method. It is another $s$, and raising $\alpha$ with the rank does the same: at one rank you can always reach one with the other.
#
# ## Merge both
#
# DoRA's $W'$ is a weight like any other, so it can take $W$'s place. (IA)³'s vectors can, too: $l$ on the outputs multiplies the **rows** of $W$, $l$ on the inputs its **columns**.
#
# ### Exercise 6: find the bug · 10 minutes · medium
#
# This is how a widely used library merged (IA)³ in 2023, [until someone noticed](https://github.com/huggingface/peft/pull/972). The cell tries it on the values of both of your models. On one it is right, up to rounding. Why not on the other? Mend it.
#
# You get a layer's weight, its bias, its vector, and whether it is the feed-forward's last linear.
#
# <details>
# <summary>Hint</summary>
#
# Write out $l \circ (Wx + b)$ and $W(l \circ x) + b$. What has one model's value projection that the other's has not?
#
# </details>

# %%
def merge_as_published(W, b, l, feed_forward: bool):
    return (W * l if feed_forward else l[:, None] * W), b

for name, layer in (("SmolLM2's values", model.get_submodule("model.layers.0.self_attn.v_proj")),
                    ("MiniLM's values", encoder.get_submodule(path.replace("query", "value")))):
    W, b = layer.weight.detach(), layer.bias if layer.bias is None else layer.bias.detach()
    l, x = 1 + 0.3 * torch.randn(len(W), device=W.device), torch.randn(5, W.shape[1], device=W.device)
    wanted, got = l * F.linear(x, W, b), F.linear(x, *merge_as_published(W, b, l, False))
    print(f"{name}: merged, off by {((got - wanted).abs().max() / wanted.abs().max()).item():.1g} of the largest output")

def ia3_merge(
    W: torch.Tensor, b: torch.Tensor, l: torch.Tensor, feed_forward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """W (out, in), b (out,), l (out,), or (in,) where feed_forward -> W', b' that do the same without l."""
    ### BEGIN SOLUTION
    return (W * l, b) if feed_forward else (l[:, None] * W, l * b)
    ### END SOLUTION

check.ia3_merge(ia3_merge)

# %%
merges, files, peft_error = {}, {}, {}
warnings.filterwarnings("ignore", category=FutureWarning)      # peft still uses old names of transformers
for name, trained in tuned.items():
    apart, largest = logits(trained), logits(trained).abs().max()
    mp.merge(trained)
    folded = logits(trained)
    mp.unmerge(trained)
    assert fingerprint(trained) == at_first                    # every frozen bit is back
    merges[name] = ((folded - apart).abs().max() / largest).item()
    assert merges[name] < 1e-3 and not torch.equal(apart, before)
    mp.save_adapter(trained, shelf / name)
    files[name] = sum(file.stat().st_size for file in (shelf / name).iterdir())
    again, _ = mp.load_base(BASE)
    mp.load_adapter(again, shelf / name)
    assert torch.equal(logits(again), apart)                   # read again by minipeft: the same to the bit
    if "peft" in globals():
        mp.detach(again)
        theirs = peft.PeftModel.from_pretrained(again, str(shelf / name)).eval()
        peft_error[name] = ((logits(theirs) - apart).abs().max() / largest).item()
lab.table([{"": name, "merged, off by": merges[name], "kB on disk": files[name] / 1e3, "opened by peft, off by": peft_error.get(name)} for name in tuned])

# %% [markdown]
# You merged the trained models, took the merge back, saved them, and opened them again, with Hugging Face PEFT too where it is installed. *Off by* is a share of the largest logit: what is left is rounding in float32. As for the bug: the models that the method was first made for have no bias on keys and values, so nobody saw it there.
#
# Merged, all three cost nothing to run: same layers, same shapes. Apart, (IA)³ has a charm of its own. A batch can hold rows for different tasks, and each row brings its own vectors.
#
# ## The rows for the cost table, your predictions, and a quiz
#
# The cell prints your predictions beside the measured numbers, this chapter's rows for the cost table of the course, and then the quiz. Every choice says why it is right or wrong. The numbers are computed, not typed.

# %%
rows = [{"method": name, "trained": reports[name].trainable, "percent": reports[name].percent, "s a step": costs[name]["s a step"],
         "MB a pass": costs[name]["MB a pass"], "file kB": files[name] / 1e3, "loss, cards": on_cards[name]["loss"],
         "recall, cards": on_cards[name]["recall"], "films": on_films[name]["accuracy"]} for name in methods]
extra = 100 * (dora_7b / lora_7b - 1)
measured = dict(zip(predicted, (ia3_7b / prompt_7b, lora_7b / ia3_7b, extra, step_ratio, gap)))
lab.record(
    main=rows, films=on_films | {"head only": head_only["accuracy"], "seeds": len(seeds), "tested": len(films["test"])},
    cards=on_cards | {"frozen": frozen_cards, "medicines": len(few), "steps": card_plan.steps, "batch": card_plan.batch_size},
    geometry=geometry, cost=costs | {"turns, s": turns} | {"kB kept": {name: size / 1e3 for name, size in kept.items()}},
    counts=counts, rates={f"{lr:g}": run["loss"] for lr, run in rates.items()}, pissa=pissa, rslora=rslora, merge=merges,
    checkpoint={"bytes": files, "peft error": peft_error, "pissa as lora": off},
)
display(lab.table([{"": key, "predicted": predicted[key], "measured": value} for key, value in measured.items()]))
display(lab.table(rows))

def ia3_of(hidden, kv, inner, layers) -> str:
    return f"{layers * (2 * kv + inner):,}"

block_8b = (eight.hidden_size, eight.hidden_size // eight.num_attention_heads * eight.num_key_value_heads, eight.intermediate_size)
d8, kv8, ff8 = block_8b
L8 = eight.num_hidden_layers
lora8 = counts["Llama 3 8B"]["LoRA r = 8 on q, v"] / counts["Llama 3 8B"]["(IA)³"]

lab.quiz([
    {"question": f"Llama 3 8B: width {d8:,}, keys and values {kv8:,} wide, inner activation {ff8:,}, {L8} blocks. What does (IA)³ train?",
     "right": ia3_of(*block_8b, L8),
     "choices": {ia3_of(*block_8b, L8): "$l_k$, $l_v$ and $l_{\\mathrm{ff}}$ in each block.",
                 ia3_of(d8, d8, ff8, L8): "Keys and values have fewer heads than queries here, so their vectors are shorter than the model is wide.",
                 ia3_of(*block_8b, 1): "That is one block.",
                 f"{L8 * (2 * kv8 * d8 + ff8 * d8):,}": "Those are the matrices that the vectors rescale. They stay frozen."}},
    {"question": "Where do the three vectors act?", "right": "on what comes out of keys and values, and on what goes into the last linear of the feed-forward",
     "choices": {"on what comes out of keys and values, and on what goes into the last linear of the feed-forward": "So two multiply rows of a weight when merged, and one multiplies columns.",
                 "on what comes out of queries, keys and values": "Queries get none, and the feed-forward has one.",
                 "on the embedding, like a soft prompt": "That is another socket. (IA)³ prepends nothing.",
                 "on the attention weights": "They act on $k$ and $v$, before and after the softmax, and not on its result."}},
    {"question": "LoRA of rank 8 on q and v trains, on Llama 3 8B, how many times as many numbers as (IA)³?", "right": f"{lora8:.1f}",
     "choices": {f"{lora8:.1f}": "Both counts are in the table above.",
                 f"{8 * lora8:.1f}": "The rank is in LoRA's count already.",
                 f"{1 / lora8:.2f}": "That is the inverse: LoRA trains more.",
                 "1.0": "A vector is not a pair of matrices."}},
    {"question": f"(IA)³ on Llama 7B trains {ia3_7b:,} numbers. As many as a prompt of how many tokens?", "right": f"{ia3_7b / seven.hidden_size:g}",
     "choices": {f"{ia3_7b / seven.hidden_size:g}": "A token is one vector as wide as the model. Below that length the prompt is the smaller one.",
                 "20": f"That is {prompt_7b:,} numbers. That (IA)³ is below it is in print, and wrong.",
                 f"{ia3_7b / seven.intermediate_size:.0f}": "A token's vector has the model's width, not that of the inner activation."}},
    {"question": "DoRA starts with $B = 0$. What must $m$ be, so that nothing changes?", "right": "$\\|W\\|$, row by row",
     "choices": {"$\\|W\\|$, row by row": "Then $m\\,W / \\|W\\| = W$.",
                 "ones": "Then every row would be cut or stretched to length 1.",
                 "zeros": "Then $W'$ would be zero, and $V$ would get no gradient.",
                 "anything: $B = 0$ is enough": "$B = 0$ only says that $V = W$."}},
    {"question": "Your DoRA takes `norm(dim=0)` of a weight (out, in). What shows it first?", "right": "a comparison with a reference at a random state",
     "choices": {"a comparison with a reference at a random state": "At the start all is well, whichever way you cut.",
                 "the logits before training": "They are unchanged: $m V / \\|V\\| = W$ for columns, too.",
                 "the loss does not fall": "It falls. It is a method, only not this one.",
                 "an error, for the shapes do not fit": "With `keepdim` they broadcast without a word."}},
    {"question": "At rank $r$ on a square weight of width $d$, DoRA trains how many percent more than LoRA?", "right": "$100 / (2r)$",
     "choices": {"$100 / (2r)$": "$d$ more than $2 r d$. Little, and least at a high rank.",
                 "none": "It is often written so. But $m$ is trained, and it has $d$ numbers.",
                 "$100 / d$": "$d$ more numbers, compared with $2rd$.",
                 "100": "That would be another pair of matrices."}},
    {"question": "$\\|V\\|$ is computed in every forward pass. Why does it get no gradient?", "right": "it saves memory, and the paper finds the results nearly the same",
     "choices": {"it saves memory, and the paper finds the results nearly the same": "Section 4.3. See the bytes kept, in step 2.",
                 "it does not depend on $A$ and $B$": "It does: $V = W + sBA$.",
                 "$m$ could not learn otherwise": "$m$ learns either way.",
                 "a norm has no derivative": "It has one wherever it is not zero."}},
    {"question": "A model without rotary positions. You multiply the queries by $l_k$ instead of the keys. What changes?", "right": "nothing",
     "choices": {"nothing": "$q\\,(l \\circ k)^\\top = (l \\circ q)\\,k^\\top$. The score is a sum of products, and $l$ may stand with either. Rotary positions turn $q$ and $k$ between the projection and the score; there it does matter.",
                 "the scores get the inverse scale": "No: the same factor is in the same product.",
                 "the values are rescaled too": "They have a vector of their own."}},
    {"question": "You double the rank again and again with $\\alpha$ held, and the results stay the same. What do you check first?", "right": "the scale $s$",
     "choices": {"the scale $s$": "$\\alpha / r$ halves each time. rsLoRA's $\\alpha / \\sqrt r$ falls more slowly.",
                 "whether rank 1 is enough for every task": "You cannot tell, while rank and scale change together.",
                 "the seed": "The seeds' spread matters, but here is a known cause."}},
    {"question": "You trained with PiSSA and hand out only $A$ and $B$, as a LoRA. What goes wrong?", "right": "it fits a base without $s B_0 A_0$, which others do not have",
     "choices": {"it fits a base without $s B_0 A_0$, which others do not have": "Subtract the start: a plain LoRA of rank $2r$ fits the published base.",
                 "nothing": "On the published base, $s B_0 A_0$ would be counted twice.",
                 "the rank is too high": "The rank is $r$. It is the start that is missing."}},
])

# %% [markdown]
# ## Recap
#
# - DoRA: $W' = m\,V / \|V\|$. LoRA turns the rows, $m$ sets their lengths. One number an output more than LoRA, and more work in each step.
# - The norm is held fixed in the backward pass, and measured by one thin product: that is where a slow DoRA loses its time.
# - (IA)³: three vectors a block, on keys, on values, on what goes into the feed-forward's last linear. On a Llama of 7 billion, a hundredth of a percent, and more than a short prompt.
# - A vector that starts at 1 needs a rate that suits it. Sweep the rate before you judge a small method.
# - PiSSA is another start for LoRA, rsLoRA another scale. Both can be written as a plain LoRA.
# - All of them merge. Rows for what goes out, columns for what goes in, and do not forget the bias.
#
# ## Further reading
#
# - Liu et al. 2024, [DoRA](https://arxiv.org/abs/2402.09353): section 3 (what moves in full fine-tuning and in LoRA), 4.3 (the norm held fixed)
# - Liu et al. 2022, [T-Few and (IA)³](https://arxiv.org/abs/2205.05638): the recipe around the three vectors
# - Salimans & Kingma 2016, [Weight Normalization](https://arxiv.org/abs/1602.07868): lengths and directions, long before
# - Meng et al. 2024, [PiSSA](https://arxiv.org/abs/2404.02948), and Kalajdzievski 2023, [rsLoRA](https://arxiv.org/abs/2312.03732)
