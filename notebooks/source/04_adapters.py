# ---
# jupyter:
#   minipeft:
#     records: [main, tasks, placements, forgetting, starts, combined, drop, counts]
# ---

# %% [markdown]
# # 4 · Bottleneck adapters: small modules inside every block
#
# **In one sentence:** squeeze a hidden state through a few numbers, bend it, widen it again and add it to what was there: a module so small that every task can have its own, inside one frozen model.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/04_adapters.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - draw an adapter, say what its skip is for, and show what happens without it
# - place adapters in a block, count them, and check a figure from an article
# - give four tasks to one frozen model, switch between them, and compare with four fine-tuned models
# - average adapters, stack them, and leave them out of the first blocks
#
# **You need:** Python, PyTorch modules. [Chapter 1](01_full_fine_tuning.ipynb) has the four tasks and the word forgetting.
#
# **The papers:** Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP*, [arXiv:1902.00751](https://arxiv.org/abs/1902.00751): you build section 2.1 and figure 2. Pfeiffer et al. 2021, [arXiv:2005.00247](https://arxiv.org/abs/2005.00247), and He et al. 2022, [arXiv:2110.04366](https://arxiv.org/abs/2110.04366): other places. Rücklé et al. 2021, *AdapterDrop*, [arXiv:2010.11918](https://arxiv.org/abs/2010.11918). Ben Zaken et al. 2022, *BitFit*, [arXiv:2106.10199](https://arxiv.org/abs/2106.10199).

# %% tags=["setup"]
import subprocess, sys
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

import hashlib, inspect, itertools, math, random, statistics, tempfile, time
from dataclasses import dataclass, replace
from pathlib import Path
import torch, torch.nn.functional as F, transformers
from torch import nn
import minipeft as mp
from minipeft import lab
from minipeft.checks import ch04_adapters as check

lab.seed_everything(0)
print(f"minipeft {mp.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; profile {mp.profile().name} on {mp.profile().device}")
lab.runtime_box("04_adapters")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the measured ones.
#
# 1. BERT-base has twelve blocks of width 768. Two adapters of 64 in each block: how many **percent** of the model's numbers is that?
# 2. You train the four tasks of chapter 1, with full fine-tuning and with adapters. By how many **points** of accuracy do the adapters lead, on average? (Negative: they trail.)
# 3. You take the skip out of every adapter and train again. How many **percent** of the film reviews does that model get right?
# 4. Four adapters, one a domain. You average the weights of three. How many **percent** right on the domain of the fourth? (The mean over the four ways to leave one out.)

# %%
predicted = {"percent of BERT-base": None, "lead of adapters, points": None,
             "percent right without the skip": None, "percent right, averaged": None}

# %% [markdown]
# ## The problem
#
# Four domains, four tasks: film reviews, product reviews, newspaper editorials, tweets, each text positive or negative. In chapter 1 every task needed a model of its own, or one model went from task to task, and you measured what it lost on the way. You want **one** model in memory, frozen, and four small things beside it.
#
# First the frozen model. It gets a new head of two classes, and only that is trained. The row above it in the table, *always the commoner label*, needs no model at all: keep it in mind for every score in this chapter.
#
# (Hutto & Gilbert 2014. The texts are opinions of people, and not facts.)

# %%
DOMAINS = ("movies", "products", "editorials", "tweets")
WORDS = mp.pick(smoke=16, cpu=16, gpu=20)                      # the longest text taken

def short(domain: str, split: str, most: int) -> list[dict]:
    """At most `most` texts of one domain, drawn with a fixed seed from those of at most WORDS words."""
    rows = [e for e in mp.load_data(f"sentiment/{domain}", split) if len(e["text"].split()) <= WORDS]
    return random.Random(0).sample(rows, min(most, len(rows)))

train = {d: short(d, "train", mp.pick(smoke=48, cpu=1200, gpu=1600)) for d in DOMAINS}
test = {d: short(d, "test", mp.pick(smoke=8, cpu=200, gpu=1000)) for d in DOMAINS}

def fresh(seed: int = 0):
    """MiniLM as published, under a new head for two classes, drawn with this seed."""
    torch.manual_seed(seed)
    return mp.load_base("minilm-l6", num_labels=2)

def score(model, domain: str) -> float:
    """Accuracy on the test texts of a domain."""
    return mp.evaluate(model, tokenizer, test[domain])["accuracy"]

# %%
STEPS, BATCH = mp.pick(smoke=2, cpu=50, gpu=120), mp.pick(smoke=4, cpu=16, gpu=16)
positive = {d: sum(e["label"] for e in test[d]) / len(test[d]) for d in DOMAINS}
rows = [{"model": "always the commoner label"} | {d: max(p, 1 - p) for d, p in positive.items()}]
model, tokenizer = fresh()
model.base_model.requires_grad_(False)                         # all but the head
mp.fit(model, tokenizer, train["movies"], mp.FitConfig(steps=STEPS, batch_size=BATCH, lr=1e-2, progress=False))
rows.append({"model": "head only, trained on movies"} | {d: score(model, d) for d in DOMAINS})
lab.table(rows)

# %% [markdown]
# ## The idea
#
# $$h' = h + W_\mathrm{up}\,\sigma(W_\mathrm{down}\,h + b_\mathrm{down}) + b_\mathrm{up}$$
#
# | | shape | |
# |---|---|---|
# | $h$ | $(d)$ | what a sub-layer of the frozen model returned: its attention or its feed-forward |
# | $W_\mathrm{down}$, $b_\mathrm{down}$ | $(m, d)$, $(m)$ | trained: squeeze to $m$ numbers |
# | $\sigma$ | | ReLU or GELU |
# | $W_\mathrm{up}$, $b_\mathrm{up}$ | $(d, m)$, $(d)$ | trained: widen to $d$ numbers |
# | $h'$ | $(d)$ | what goes on instead of $h$ |
#
# $d$ is the width of the model, $m$ is the **bottleneck**. What is added to $h$ is called $f(h)$ from here on. Both matrices start near zero, so $h' \approx h$: the model is nearly what it was. In the words of this course it is a piece in the **module socket**: $(x, y) \to y'$. A piece sees what went into a frozen module, $x$, and what came out, $y$, and returns what goes on, here $y' = y + f(y)$.
#
# The picture shows the adapter and three places for it in a block. Houlsby et al. put one after the attention and one after the feed-forward. Pfeiffer et al. keep the second alone. (Their own code also moves the addition and the norm; here it is Houlsby's second adapter, and nothing else.) He et al. put it beside the feed-forward: it reads the same input $x$, and what it makes of it is multiplied by a fixed scale, so $y' = y + \mathrm{scale} \cdot f(x)$. "After" is before the $+$ of the block's own residual.

# %% tags=["figure"]
from matplotlib.patches import FancyBboxPatch, Polygon

def picture():
    figure, axes = lab.new_figure(4, width=10.4, height=4.6)
    grey, blue = lab.COLOURS["grey"], lab.COLOURS["blue"]

    def box(ax, x, y, text, trained=False, width=5.2, height=0.9):
        style = {"facecolor": blue if trained else "#eef1f4", "edgecolor": blue if trained else "#c4ccd4"}
        ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.15", zorder=2, **style))
        ax.text(x, y, text, ha="center", va="center", fontsize=10, color="white" if trained else "black", zorder=3)

    def wire(ax, *points, head=True):
        ax.plot(*zip(*points), color=grey, linewidth=1.3, zorder=1)
        if head:
            ax.annotate("", points[-1], points[-2], zorder=1, arrowprops={"arrowstyle": "-|>", "color": grey, "shrinkA": 0, "shrinkB": 0})

    def plus(ax, x, y):
        ax.text(x, y, "+", ha="center", va="center", fontsize=11, zorder=4, bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "edgecolor": grey})

    for ax, title in zip(axes, ("the adapter", "Houlsby", "Pfeiffer", "parallel")):
        ax.set_title(title, fontsize=11)
        ax.set(xlim=(-0.6, 8.6), ylim=(-0.4, 12))
        ax.axis("off")
    ax = axes[0]
    wire(ax, (4, 0), (4, 11.4))
    wire(ax, (4, 1), (0.4, 1), (0.4, 10), (3.6, 10))
    for y, wide, narrow in ((2.6, 0, 1), (7.2, 1, 0)):
        low, high = (3.2, 1.2) if wide == 0 else (1.2, 3.2)
        ax.add_patch(Polygon([(4 - low, y), (4 + low, y), (4 + high, y + 1.5), (4 - high, y + 1.5)], color=blue, zorder=2))
    for y, text, ink in ((3.3, r"$W_\mathrm{down}$", "white"), (5.6, r"$\sigma$", "black"), (7.95, r"$W_\mathrm{up}$", "white")):
        ax.text(4, y, text, ha="center", va="center", color=ink, fontsize=12, zorder=3, bbox=None if ink == "white" else {"facecolor": "white", "edgecolor": grey})
    for x, y, text in ((4.4, 0.1, "$h$: $d$ numbers"), (5.5, 5.5, "$m$"), (4.4, 11.2, "$h'$"), (-0.4, 8.2, "skip")):
        ax.text(x, y, text, fontsize=10, rotation=90 if text == "skip" else 0)
    plus(ax, 4, 10)
    for ax, first, second in zip(axes[1:], (True, False, False), ("after", "after", "beside")):
        wire(ax, (4, 0), (4, 6.55), head=False)
        wire(ax, (4, 6.3 if second == "after" else 9.9), (4, 11.9))
        for low, name, adapter in ((0.5, "attention", "after" if first else None), (6.3, "feed-forward", second)):
            if adapter == "beside":
                for x in (2.2, 6.6):
                    wire(ax, (4, low + 0.25), (x, low + 0.25), (x, low + 3.35), (4.35 if x > 4 else 3.65, low + 3.35))
                box(ax, 2.2, low + 1.4, name, width=4, height=0.9)
                box(ax, 6.6, low + 1.4, "adapter", True, width=3.2)
            else:
                box(ax, 4, low + 1.1, name)
            if adapter == "after":
                box(ax, 4, low + 2.4, "adapter", True)
            wire(ax, (4, low), (-0.3, low), (-0.3, low + 3.6), (3.65, low + 3.6))
            plus(ax, 4, low + 3.6)
            box(ax, 4, low + 4.65, "norm", height=0.7)
    return figure

picture()

# %% [markdown]
# ## Draw it
#
# A classic question: draw an adapter, in its place. Put the parts into the order in which a hidden state meets them, in a BERT block after its attention. Some parts do not belong. From here on, as in every block, $h$ is what the block got and $y$ what its attention made of it: the adapter computes $y + f(y)$. (Where no kernel runs, draw it on paper and unfold the answer.)

# %%
lab.ordering(
    "From the attention to the end of the first half of the block: what comes after what?",
    {"the attention's last linear gives $y$": "Frozen. What it returns is what the adapter works on.",
     "$W_\\mathrm{down}$ and its bias: $d \\to m$": "Trained. The bottleneck: few numbers get through.",
     "$\\sigma$: ReLU or GELU": "Without it, $W_\\mathrm{up} W_\\mathrm{down}$ is one matrix of rank $m$.",
     "$W_\\mathrm{up}$ and its bias: $m \\to d$": "Trained. As wide as before, so that it can be added.",
     "$+\\, y$: the adapter's skip": "With small matrices the adapter is nearly the identity.",
     "$+\\, h$: the block's residual": "The frozen block's own addition. The adapter stands before it.",
     "the block's norm": "Frozen here. In BERT it comes after the addition. (Houlsby et al. train it as well, a copy for each task: 2d numbers.)"},
    {"softmax": "Nothing is chosen among alternatives here.",
     "times $\\alpha / r$": "That is LoRA's scale.",
     "the trained prefix $P$": "That is the key/value socket."},
)

# %% [markdown]
# ## By hand
#
# Take pencil and paper. The adapter alone, as in the equation, with the ReLU. $d = 3$, $m = 2$, no biases:
#
# $$h = \begin{pmatrix}2\\-1\\1\end{pmatrix}\qquad W_\mathrm{down} = \begin{pmatrix}1&0&1\\0&2&1\end{pmatrix}\qquad W_\mathrm{up} = \begin{pmatrix}1&4\\0&1\\-1&2\end{pmatrix}$$
#
# 1. Compute $W_\mathrm{down} h$, then its ReLU. 2. Compute $f(h)$, then $h'$. 3. What would $h'$ be without the ReLU? 4. And without the skip? Then run the cell.

# %%
h = torch.tensor([2.0, -1.0, 1.0])
W_down, W_up = torch.tensor([[1.0, 0, 1], [0, 2, 1]]), torch.tensor([[1.0, 4], [0, 1], [-1, 2]])
z = W_down @ h                                                 # (m,)
f = W_up @ z.relu()                                            # (d,)
lab.table([{"": name, "value": value.int().tolist()} for name, value in (
    ("W_down h", z), ("ReLU", z.relu()), ("f(h)", f), ("h' = h + f(h)", h + f),
    ("h' without the ReLU", h + W_up @ z), ("h' without the skip", f))])

# %% [markdown]
# ## Build it
#
# ### Exercise 1: the adapter (10 minutes, ★★)
#
# Write the equation for a batch: `h` is (batch, tokens, d). Use ReLU. The check draws new numbers each time, none of them near the start, where almost any mistake gives nearly the right answer.
#
# <details>
# <summary>Hint</summary>
#
# Rows of `h` are hidden states, so $W h$ becomes `h @ W.T`. Four steps: down, bend, up, add. `z.relu()` is the ReLU.
#
# </details>

# %%
def adapter_forward(
    h: torch.Tensor, W_down: torch.Tensor, b_down: torch.Tensor, W_up: torch.Tensor, b_up: torch.Tensor
) -> torch.Tensor:
    """h (batch, tokens, d), W_down (m, d), b_down (m,), W_up (d, m), b_up (d,) -> (batch, tokens, d)."""
    ### BEGIN SOLUTION
    return h + (h @ W_down.T + b_down).relu() @ W_up.T + b_up
    ### END SOLUTION

check.adapter_forward(adapter_forward)

# %% [markdown]
# ### Step 1: a piece that starts near the identity
#
# Houlsby et al. draw both matrices from a normal distribution of deviation $s = 0.01$, cut off at two deviations, and set the biases to zero. How far is that from the identity? A row of $W_\mathrm{down}$ gives a number of deviation $s\,\|h\|$. The ReLU keeps half of its square. $W_\mathrm{up}$ adds $m$ of these for each of $d$ numbers:
#
# $$\frac{\|f(h)\|}{\|h\|} \approx s^2 \sqrt{\frac{m\,d}{2}}$$
#
# (A little less, since the cut takes the tails away.)

# %%
class Piece(nn.Module):
    """(x, y) -> y + f(y), after one frozen linear layer."""

    def __init__(self, d: int, m: int, s: float = 0.01):
        super().__init__()
        self.down, self.activation, self.up = nn.Linear(d, m), nn.ReLU(), nn.Linear(m, d)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=s, a=-2 * s, b=2 * s)
            nn.init.zeros_(linear.bias)

    def forward(self, x, y):                                   # x is not used; y (…, d)
        return y + self.up(self.activation(self.down(y)))

lines, h = [], torch.randn(1000, 384)
for s in (0.001, 0.01, 0.1):
    piece = Piece(384, 64, s)
    moved, formula = ((piece(None, h) - h).norm() / h.norm()).item(), s**2 * math.sqrt(64 * 384 / 2)
    assert 0.4 * formula < moved < formula
    lines.append({"s": s, "‖f(h)‖ / ‖h‖, measured": moved, "formula": formula})
lab.table(lines)

# %% [markdown]
# ### Step 2: in its place
#
# ### Exercise 2: a block with adapters (15 minutes, ★★★)
#
# A popular article draws the adapters like this: *attention → add and norm → adapter → feed-forward → add and norm → adapter*. Look at figure 2 of the paper, or at the picture above: that is not where they are. Each adapter acts on what its sub-layer returns, **before** the block's residual is added, and the norm comes last.
#
# Write a BERT block with both. A bare block is `g = norm_1(h + attention(h))`, then `norm_2(g + feed_forward(g))`. Each adapter has its own skip already.
#
# <details>
# <summary>Hint</summary>
#
# Two lines change, each in one place. What does `attention(h)` become?
#
# </details>

# %%
def adapted_block(h: torch.Tensor, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2) -> torch.Tensor:
    """h (batch, tokens, d); the others are modules of one argument. Returns (batch, tokens, d)."""
    ### BEGIN SOLUTION
    g = norm_1(h + adapter_1(attention(h)))
    return norm_2(g + adapter_2(feed_forward(g)))
    ### END SOLUTION

check.adapted_block(adapted_block)

# %% [markdown]
# ### Step 3: plug it in
#
# You do not rewrite BERT for that. torch calls a *forward hook* after a module has run, with what went in (a tuple) and what came out; what the hook returns becomes the module's output. `mp.anatomy` says which linear ends each attention and each feed-forward, whatever the model calls them: here their parts are `"o"` and `"down"`. Nearly nothing changes at the start, the base gets no gradient, and pulled out, the model is as it was.

# %%
from minipeft.anatomy import anatomy

model, _ = fresh()
model.requires_grad_(False)
batch = tokenizer([e["text"] for e in train["movies"][:8]], padding=True, return_tensors="pt").to(model.device)
labels = torch.tensor([e["label"] for e in train["movies"][:8]], device=model.device)
bare = model(**batch).logits
last = [part.path for block in anatomy(model).blocks for part in
        (block.attentions[0].part("o")[0], block.feed_forward.part("down")[0])]
pieces = {path: Piece(384, 16).to(model.device) for path in last}
handles = [model.get_submodule(path).register_forward_hook(lambda m, x, y, piece=piece: piece(x[0], y))
           for path, piece in pieces.items()]
near = ((model(**batch).logits - bare).norm() / bare.norm()).item()
model(**batch, labels=labels).loss.backward()
assert 0 < near < 0.1 and all(p.grad is None for p in model.parameters())
assert all(p.grad is not None for piece in pieces.values() for p in piece.parameters())
for handle in handles:                                         # pull the pieces out again
    handle.remove()
assert torch.equal(model(**batch).logits, bare)
print(f"{len(pieces)} pieces, at {last[0]}, {last[1]}, …; at the start the logits differ by {near:.2%} of their size")

# %% [markdown]
# ## The same as the package
#
# The package's piece is called `Bottleneck`. What it has more: a scale, a norm on the way in if you ask for one, GELU if you ask for it, and an entry that keeps $x$ for the parallel placement. From here on the chapter uses the package.
#
# Hugging Face PEFT has no bottleneck adapters, so there is nothing to compare with. The package's tests compare with a model in float64, written by hand for each of four architectures. Here you compare with yourself, at random weights.

# %%
from minipeft.methods.adapters import Bottleneck
print(inspect.getsource(Bottleneck.forward))

mine, settings = Piece(48, 5, s=0.5).double(), mp.BottleneckAdapter(5)
package = Bottleneck(settings, 48, dtype=torch.float64)
package.load_state_dict(mine.state_dict())
x, y = torch.randn(7, 30).double(), torch.randn(7, 48).double()
assert torch.allclose(package(x, y), mine(x, y), rtol=1e-12)
assert not torch.allclose(package(x, y), y, rtol=0.1)
print("yours = minipeft's, to", (package(x, y) - mine(x, y)).abs().max().item())

# %% [markdown]
# ## Nothing changed yet: what will train
#
# ### Exercise 3: count (5 minutes, ★)
#
# How many numbers do the adapters of an encoder train? All four tensors of each adapter count. `placement` is `"houlsby"` (two in each block) or `"pfeiffer"` (one).
#
# <details>
# <summary>Hint</summary>
#
# One adapter: two matrices of $m \times d$, a bias of $m$, a bias of $d$.
#
# </details>

# %%
def adapter_parameter_count(d: int, m: int, blocks: int, placement: str) -> int:
    """Numbers trained in `blocks` blocks of width d."""
    ### BEGIN SOLUTION
    return blocks * (2 if placement == "houlsby" else 1) * (2 * m * d + m + d)
    ### END SOLUTION

check.adapter_parameter_count(adapter_parameter_count)

# %% [markdown]
# ### A claim, checked
#
# The same article says: with $m = 64$ and two adapters a layer, BERT-base trains "around 3–4 %" of its parameters. You need no weights to check that, only the configuration: a model on the *meta* device has shapes and no numbers.
#
# Where may it come from? Houlsby et al. report 3.6 % a task, for BERT-large, with bottlenecks from 8 to 256 chosen for each task: another model, other sizes. Look in the table for the row that would make the claim right.
#
# The second cell counts on MiniLM. There each adapter also gets its own copy of the head, which no task can do without. And you take a fingerprint of every frozen byte.

# %%
with torch.device("meta"):
    bert = transformers.BertModel(transformers.BertConfig())   # the configuration of BERT-base
total = sum(p.numel() for p in bert.parameters())
c = bert.config
counts = {m: 2 * c.num_hidden_layers * mp.BottleneckAdapter(m).parameter_count(c.hidden_size) for m in (8, 16, 64, 96, 128, 256)}
claim = 100 * counts[64] / total
assert not 3 <= claim <= 4
print(f"BERT-base: {total:,} numbers. 24 adapters of 64: {counts[64]:,}, that is {claim:.2f} %, and not 3 to 4 %.")
lab.table([{"m": m, "trained": n, "% of BERT-base": 100 * n / total} for m, n in counts.items()])

# %%
from minipeft.sockets import base_parameters

def fingerprint(model) -> str:
    """SHA-256 over the bytes of every parameter of the base."""
    digest = hashlib.sha256()
    for parameter in base_parameters(model).values():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

METHODS = {"adapters": mp.BottleneckAdapter(16), "BitFit": mp.BitFit()}
at_first = fingerprint(model)
torch.manual_seed(0)
adapter = mp.attach(model, METHODS["adapters"], DOMAINS[0])
report = mp.parameter_report(model)
d, blocks = model.config.hidden_size, model.config.num_hidden_layers
head = 2 * d + 2
assert report.trainable == 2 * blocks * METHODS["adapters"].parameter_count(d) + head
assert fingerprint(model) == at_first and ((model(**batch).logits - bare).norm() / bare.norm()).item() < 0.1
report

# %% [markdown]
# ## The fine-tune: four tasks on one model
#
# First a rate. Each method gets its own, the one of a few with the lowest loss on held-out film reviews. Full fine-tuning gets a sweep too, on the same texts, and not just any rate. The sweeps are short. If the rate taken is the first or the last that was tried, a better one may lie beyond.
#
# Such a score says what a method can do in these few steps, and not what it can do at all.
#
# Then you go on with the one model from above. It gets an adapter a domain, all from the same numbers, and each learns its task while the others rest: `mp.fit` trains what is active. In the curve, *run 1* to *run 4* are the domains in the order of `DOMAINS`. BitFit, in the sweep below, is explained after it.

# %%
held_out = short("movies", "validation", mp.pick(smoke=8, cpu=200, gpu=500))
plan = mp.FitConfig(steps=STEPS, batch_size=BATCH, warmup=0.1, progress=False)
tried = {"full": mp.pick(smoke=(2e-4,), cpu=(1e-4, 3e-4), gpu=(1e-4, 2e-4, 4e-4)),
         "adapters": mp.pick(smoke=(1e-3,), cpu=(1e-3, 2e-3, 5e-3), gpu=(5e-4, 1e-3, 2e-3)),
         "BitFit": mp.pick(smoke=(3e-3,), cpu=(1e-2, 3e-2), gpu=(1e-3, 3e-3, 1e-2))}
sweep = []
for name, rates in tried.items():
    for rate in rates:
        one, _ = fresh()
        if name != "full":
            mp.attach(one, METHODS[name])
        mp.fit(one, tokenizer, train["movies"], replace(plan, lr=rate))
        sweep.append({"method": name, "rate": rate} | mp.evaluate(one, tokenizer, held_out))
RATE = {name: min((t for t in sweep if t["method"] == name), key=lambda t: t["loss"])["rate"] for name in tried}
print("taken:", RATE)
lab.table(sweep)

# %%
plan = replace(plan, lr=RATE["adapters"])
mp.detach(model, DOMAINS[0])
curve, seconds = lab.live_curve(), {}
for domain in DOMAINS:
    torch.manual_seed(0)                                       # all four start from the same numbers
    mp.attach(model, METHODS["adapters"], domain)
    mp.activate(model, domain)
    seconds[domain] = mp.fit(model, tokenizer, train[domain], plan, watch=curve).seconds
assert fingerprint(model) == at_first
print(f"four adapters in {sum(seconds.values()):.0f} seconds; the frozen bytes are the same: {at_first}")

# %% [markdown]
# ### Beside full fine-tuning, and the smallest baseline
#
# **Full fine-tuning** needs a fresh model for every task. **BitFit** is the smallest baseline here: inside the model it changes the biases and nothing else. Every method trains the head as well. Each comes with its own rate, and with several seeds (on the cpu profile for the films only), which decide the head, the start and the order of the texts.
#
# After that, on the film reviews alone, the other two places of the picture, and what else the package's piece can have: GELU for ReLU, and a LayerNorm on the way in (add their names to `taken`). Pfeiffer's and the parallel adapter stand once in a block and not twice, so they get twice the bottleneck, and nearly the same count. All have the same steps, the rate found for Houlsby's, and the same seeds. The parallel one is scaled by 4, as its authors do.

# %%
SEEDS = {d: mp.pick(smoke=(1, 0), cpu=(2, 1, 0) if d == "movies" else (0,), gpu=(4, 3, 2, 1, 0)) for d in DOMAINS}
results = {name: {d: [] for d in DOMAINS} for name in ("full", "adapters", "BitFit")}
for domain in DOMAINS:
    with mp.active(model, domain):
        results["adapters"][domain].append(score(model, domain))       # seed 0, trained above

for domain, name, seed in ((d, name, seed) for d in DOMAINS for name in results for seed in SEEDS[d]):
    if (name, seed) == ("adapters", 0):
        continue                                               # trained above
    one, _ = fresh(seed)
    if name != "full":
        mp.attach(one, METHODS[name])
    done = mp.fit(one, tokenizer, train[domain], replace(plan, lr=RATE[name], seed=seed))
    results[name][domain].append(score(one, domain))
    if (name, domain, seed) == ("full", "movies", 0):
        full_model, full_seconds = one, done.seconds           # goes on below

# %% tags=["figure"]
mean = {name: {d: statistics.mean(v) for d, v in by.items()} for name, by in results.items()}
spread = {name: math.sqrt(statistics.mean(statistics.variance(v) for v in by.values() if len(v) > 1)) for name, by in results.items()}
overall = {name: statistics.mean(by.values()) for name, by in mean.items()}
lead = 100 * (overall["adapters"] - overall["full"])
error = 100 * math.sqrt((spread["adapters"]**2 + spread["full"]**2) * sum(1 / len(s) for s in SEEDS.values())) / len(DOMAINS)
bits, _ = fresh()
mp.attach(bits, mp.BitFit())
trained = {"full": sum(p.numel() for p in full_model.parameters()), "adapters": report.trainable,
           "BitFit": mp.parameter_report(bits).trainable}
print(f"adapters lead by {lead:+.1f} points on average; the seeds make that uncertain by ± {error:.1f}")
print(f"one test score is known to about ± {100 * math.sqrt(overall['adapters'] * (1 - overall['adapters']) / len(test['movies'])):.0f} points: {len(test['movies'])} texts")
display(lab.table([*rows, *({"model": name, "trained": trained[name]} | mean[name] | {"mean": overall[name], "spread over seeds": spread[name]}
                            for name in results)]))

figure, ax = lab.new_figure(width=7.4, height=3.2)
for place, (name, colour) in enumerate((("full", "grey"), ("adapters", "blue"), ("BitFit", "orange"))):
    at = [i + 0.26 * (place - 1) for i in range(len(DOMAINS))]
    ax.bar(at, mean[name].values(), width=0.24, color=lab.COLOURS[colour], label=f"{name}: {trained[name]:,}")
    for x, values in zip(at, results[name].values()):
        ax.plot([x] * len(values), values, "_", color=lab.COLOURS["black"], markersize=9)
ax.set_xticks(range(len(DOMAINS)), DOMAINS)
ax.set(ylabel="share of texts right", ylim=(0, 1.2))
ax.set_title("four tasks, numbers trained for each; a line for each seed", fontsize=10)
ax.legend(ncols=3, fontsize=9, loc="upper center")
figure

# %%
twice = 2 * METHODS["adapters"].bottleneck
kinds = {"Houlsby": {}, "Houlsby, GELU": {"activation": "gelu"}, "Houlsby, LayerNorm": {"layer_norm": True},
         "Pfeiffer": {"placement": "pfeiffer", "bottleneck": twice},
         "parallel, scale 4": {"placement": "parallel", "bottleneck": twice, "scale": 4.0}}
taken, chosen = mp.pick(smoke=kinds, cpu=("Houlsby", "Pfeiffer", "parallel, scale 4"), gpu=kinds), SEEDS["movies"][-2:]
count, right, paces = {}, {}, {}
for seed, (kind, changes) in itertools.product(chosen, [k for k in kinds.items() if k[0] in taken]):
    one, _ = fresh(seed)
    mp.attach(one, replace(METHODS["adapters"], **changes))
    count[kind] = mp.parameter_report(one).trainable
    paces.setdefault(kind, []).append(mp.fit(one, tokenizer, train["movies"], replace(plan, seed=seed)))
    right.setdefault(kind, []).append(score(one, "movies"))
placements = [{"placement": kind, "trained": count[kind], "films right": statistics.mean(scores), "lowest": min(scores), "highest": max(scores),
               "a step, ms": 1000 * statistics.median(h["seconds"] for run in paces[kind] for h in run.history)} for kind, scores in right.items()]
lab.table(placements, f"film reviews: {plan.steps} steps at rate {plan.lr:g}, {len(chosen)} seeds")

# %% [markdown]
# How to read it. Compare the lead with its ±, and with what one test score is known to. A lead smaller than these, up or down, shows nothing. Then hold each score against *always the commoner label*. A method that stays at that row has learned next to nothing there, in these steps and at this rate. Then look at the column *trained*: what does each point cost in numbers? *Spread over seeds* is a standard deviation, taken in each domain that has several seeds and then averaged. The ± of the lead takes it for all four domains. In the table of placements, hold a difference against what one test score is known to, and against *lowest* and *highest*. Mind that one rate for all is Houlsby's, and another place may want another.
#
# ## Switching
#
# The four adapters stand on one model. You switch by a name: the pieces in the blocks and the head change together. What does it cost, and what does each adapter know about the other domains? Read the map down a column, for the texts there are the same: whose adapter is best? Along a row you also see which texts are easy.

# %%
began = time.perf_counter()
for _ in range(250):
    for domain in DOMAINS:
        mp.activate(model, domain)
switch_us = 1e6 * (time.perf_counter() - began) / 1000
began = time.perf_counter()
fresh()
load_ms = 1000 * (time.perf_counter() - began)

across = []
for name in DOMAINS:
    with mp.active(model, name):
        across.append([score(model, d) for d in DOMAINS])
print(f"switching takes {switch_us:.1f} µs, loading a model {load_ms:.0f} ms")
lab.heat_map(across, DOMAINS, DOMAINS, row_label="adapter of", column_label="tested on", low=0.5)

# %% [markdown]
# ## Forgetting
#
# Three ways through four tasks, one after the other. **Full fine-tuning** goes on from task to task, as in chapter 1. **One adapter** does the same: it is small, but it too is overwritten. **Four adapters** never touch each other. After the last stage: how much worse is each domain than right after its own training?
#
# And the old skill of chapter 1: given every third word of a sentence, find it among the others. The model was made for search like that.

# %%
def find_again(model) -> float:
    """The old skill: of some hundred sentences, the share found again by every third word."""
    texts = [e["text"].split() for e in mp.load_data("sentiment/editorials", "test")]
    texts = [t for t in texts if 12 <= len(t) <= 20][: mp.pick(smoke=24, cpu=180, gpu=180)]
    places = []
    for lines in ([" ".join(t[::3]) for t in texts], [" ".join(t) for t in texts]):
        tokens = tokenizer(lines, padding=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            hidden = model.base_model(**tokens).last_hidden_state          # (B, T, d)
        mask = tokens["attention_mask"][..., None]                         # (B, T, 1)
        places.append(F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
    return ((places[0] @ places[1].T).argmax(dim=1).cpu() == torch.arange(len(texts))).float().mean().item()

mp.activate(model, None)
skill = {"as published": find_again(model)}
with mp.active(model, "movies"):
    skill["adapter on, movies"] = find_again(model)
skill["adapter off again"] = find_again(model)
skill["full, movies"] = find_again(full_model)
assert skill["adapter off again"] == skill["as published"]

# %%
chain, _ = fresh()
torch.manual_seed(0)
mp.attach(chain, METHODS["adapters"])
just, end = {}, {}
for name, walker in (("full", full_model), ("one adapter", chain)):
    just[name] = {}
    for domain in DOMAINS:
        if (name, domain) != ("full", "movies"):                       # that stage is done
            rate = RATE["full" if name == "full" else "adapters"]
            mp.fit(walker, tokenizer, train[domain], replace(plan, lr=rate))
        just[name][domain] = score(walker, domain)
    end[name] = {d: score(walker, d) for d in DOMAINS}
just["four adapters"] = {d: results["adapters"][d][0] for d in DOMAINS}
end["four adapters"] = {d: across[i][i] for i, d in enumerate(DOMAINS)}
forgotten = {name: {d: just[name][d] - end[name][d] for d in DOMAINS[:-1]} for name in just}
assert not any(forgotten["four adapters"].values())                    # to the last text
skill["full, then three more"], skill["one adapter, four stages"] = find_again(full_model), find_again(chain)
display(lab.table([{"forgotten, points": name} | {d: 100 * x for d, x in by.items()} for name, by in forgotten.items()]))
lab.table([{"the old skill": name, "found again": share} for name, share in skill.items()])

# %% [markdown]
# Four adapters forget nothing: the zeros are exact, and the assertion says so. Is that because adapters are small? Look at *one adapter*: it is as small, and nothing protects what it learned first. How much it lost beside *full*, the table says, as far as so many test texts can tell. (A negative number: a later task helped.) The exact zeros come from something else: each task has numbers of its own.
#
# The old skill is there as soon as the adapter is off. With it on, the model is another one: see the table.
#
# ## Break it: the skip and the start
#
# Now take apart what the paper put in with care. `Variant` is the package's method, with two changes that you can ask for: no skip, so that $y' = f(y)$, and another start. *Large* is the start that `nn.Linear` gives itself. Any dataclass with a method `pieces` is a method to `mp.attach`.

# %%
class NoSkip(nn.Sequential):
    """y' = f(y): the adapter in it, without its skip."""

    def forward(self, x, y):
        return self[0](x, y) - y

@dataclass(frozen=True)
class Variant(mp.BottleneckAdapter):
    skip: bool = True
    start: str = "paper"

    def pieces(self, model):
        for socket, path, piece in super().pieces(model):
            if self.start != "paper":
                for linear in (piece.down, piece.up):
                    linear.reset_parameters()                  # nn.Linear's own start: far larger
            if self.start == "up zero":
                nn.init.zeros_(piece.up.weight), nn.init.zeros_(piece.up.bias)
            yield socket, path, piece if self.skip else NoSkip(piece)

# %% tags=["figure"]
def gradient_below(one) -> float:
    """The norm of the loss's gradient at what the embedding returns."""
    seen = []
    handle = one.get_input_embeddings().register_forward_hook(lambda m, x, y: seen.append(y.requires_grad_()) or y)
    size = torch.autograd.grad(one(**batch, labels=labels).loss, seen)[0].norm().item()
    handle.remove()
    return size

variants = {"the paper's: skip, small": Variant(16), "skip, large start": Variant(16, start="large"),
            "skip, W_up zero": Variant(16, start="up zero"),
            "no skip, small": Variant(16, skip=False), "no skip, large start": Variant(16, skip=False, start="large")}
untouched = gradient_below(fresh()[0])
starts, losses = [], {}
for name, method in variants.items():
    one, _ = fresh()
    torch.manual_seed(0)
    mp.attach(one, method)
    with torch.no_grad():
        moved = ((one(**batch).logits - bare).norm() / bare.norm()).item()
    at_start = {"logits moved": moved, "gradient below": gradient_below(one) / untouched}
    losses[name] = [entry["loss"] for entry in mp.fit(one, tokenizer, train["movies"], plan).history]
    starts.append({"variant": name} | {f"before: {what}": x for what, x in at_start.items()}
                  | {"after: loss": statistics.mean(losses[name][-10:]), "after: right": score(one, "movies")})
without = next(r for r in starts if r["variant"] == "no skip, small")
display(lab.table(starts))

figure, ax = lab.new_figure(width=7.4, height=3.3)
for (name, values), colour in zip(losses.items(), ("blue", "sky", "green", "vermilion", "orange")):
    ax.plot(lab.smooth(values, 0.85), label=name, color=lab.COLOURS[colour])
ax.axhline(math.log(2), color=lab.COLOURS["grey"], linestyle="--", linewidth=1.2, label="knowing nothing")
ax.set(xlabel="step", ylabel="loss, smoothed", ylim=(0, 1.8 * math.log(2)))
ax.legend(fontsize=8.5, ncols=2)
figure

# %% [markdown]
# Read the columns *before* first: they say what is left of the model before any training. With the skip and a small start it is nearly the model that you had. Without the skip, a small adapter returns nearly nothing: it deletes the attention and the feed-forward of every block, and only the block's own residual is left. The head reads the first position, and without attention hardly anything gets there from the other words. A large start without the skip sends noise on instead.
#
# *Gradient below* is how long the gradient of the loss is at the embedding, as a multiple of the bare model's. With the skip, $\partial y' / \partial y = I + f'(y)$, with $I$ the identity: however small $f'$ is, the gradient comes through. Without it, $f'(y)$ alone is left, with a small start a product of two small matrices, and what still arrives came past the sub-layers, through the block's own residual.
#
# Then look at *after*, and at the curves. *After: loss* is the mean over the last ten training steps. Does a wrong start cost steps? Can training repair it in the steps you gave it? All variants see the same batches in the same order, so compare curves at the same step. Where several rise together, it is probably the batches that were hard. Each variant ran once, so trust large differences only, and mind what one test score is known to.
#
# ### Both matrices zero?
#
# Then the start is the identity to the bit. Write down which of the four tensors of an adapter get a gradient that is not zero. Then run the cell.

# %%
table = []
for name, which in (("small, the paper's", ()), ("W_up zero", ("up",)), ("both zero", ("down", "up"))):
    one, _ = fresh()
    torch.manual_seed(0)
    piece = next(iter(mp.attach(one, mp.BottleneckAdapter(16)).pieces().values()))
    for linear in which:
        nn.init.zeros_(piece.get_submodule(linear).weight)
    one(**batch, labels=labels).loss.backward()
    table.append({"start": name} | {n: bool(p.grad.any()) for n, p in piece.named_parameters()})
assert [table[2][n] for n in ("down.weight", "down.bias", "up.weight", "up.bias")] == [False, False, False, True]
lab.table(table, "a gradient that is not zero, in the first step")

# %% [markdown]
# Both zero: only the last bias learns, for ever. The adapter has become BitFit on two layers of each block, with two idle matrices beside it. Nothing raises an error, and the loss may even fall, for that bias and the head still learn. With $W_\mathrm{up}$ alone at zero the start is exact as well, and everything wakes up in the second step. LoRA, in chapter 5, starts like that.
#
# ## Exercise 4: find the bug (15 minutes, ★★)
#
# A mistake from public code, there with `.to("cuda")`. The cell below does the same with a dtype, so that you can see it without a GPU. The module computes (its `forward` is left out here), its tensors even have `requires_grad`, and an optimizer gets nothing of it. Why?
#
# Then write `trainable_adapter`: a module that computes $h + W_\mathrm{up}\,\mathrm{ReLU}(W_\mathrm{down} h + b_\mathrm{down}) + b_\mathrm{up}$, of the dtype asked for, with exactly four parameters that train. How they start is up to you.
#
# <details>
# <summary>Hint</summary>
#
# A module knows as parameters what you assign to it as `nn.Parameter`. What is `nn.Parameter(t).to(other)`? Ask for its `type`. Make the tensor first, with its dtype, and the parameter last. Or let `nn.Linear(…, dtype=…)` do it.
#
# </details>

# %%
class AsPublished(nn.Module):
    def __init__(self, d, m, dtype):
        super().__init__()
        self.W_down = nn.Parameter(0.01 * torch.randn(m, d)).to(dtype)
        self.W_up = nn.Parameter(0.01 * torch.randn(d, m)).to(dtype)

for dtype in (torch.float32, torch.float64):
    print(dtype, "- an optimizer gets:", [name for name, _ in AsPublished(8, 2, dtype).named_parameters()] or "nothing")

def trainable_adapter(d: int, m: int, dtype: torch.dtype) -> nn.Module:
    """A module h (…, d) -> (…, d) with W_down (m, d), b_down (m,), W_up (d, m), b_up (d,), all trained."""
    ### BEGIN SOLUTION
    class Skip(nn.Sequential):
        def forward(self, h):
            return h + super().forward(h)

    return Skip(nn.Linear(d, m, dtype=dtype), nn.ReLU(), nn.Linear(m, d, dtype=dtype))
    ### END SOLUTION

check.trainable_adapter(trainable_adapter)

# %% [markdown]
# ## Averaging and stacking
#
# A text comes from a domain that you have no adapter for. You have three others. You can **average** their weights into one adapter (Chronopoulou et al. 2023): it costs as much as one. That makes sense for adapters that started from the same numbers, as yours did. From different starts, unit 3 of one has nothing to do with unit 3 of another. Or you can **stack** them, one behind the other: `mp.activate` takes a list. Each costs its time, and of the heads, the last one decides.
#
# ### Exercise 5: average (5 minutes, ★)
#
# You get the weights of several adapters, one dict for each: a name, and a tensor. Return a new dict of the same names that holds the mean of each tensor.
#
# <details>
# <summary>Hint</summary>
#
# All states have the same names. Divide by how many *adapters* there are. Do not change the states you are given: `+=` on a tensor would.
#
# </details>

# %%
def average_weights(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of several adapters, weight by weight: dicts name -> tensor, all with the same names."""
    ### BEGIN SOLUTION
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    ### END SOLUTION

check.average_weights(average_weights)

# %%
from minipeft.methods.adapters import average_adapters

combined = {}
for i, left_out in enumerate(DOMAINS):
    others = [d for d in DOMAINS if d != left_out]
    each = [across[DOMAINS.index(d)][i] for d in others]
    average_adapters(model, others, "mean")
    combined[left_out] = {"one other, mean": statistics.mean(each), "one other, best": max(each), "averaged": score(model, left_out)}
    mp.detach(model, "mean")
    with mp.active(model, others):
        combined[left_out]["stacked"] = score(model, left_out)
    combined[left_out]["its own adapter"] = across[i][i]
averaged = statistics.mean(by["averaged"] for by in combined.values())
stacked = statistics.mean(by["stacked"] for by in combined.values())
print(f"on a domain that none of the three has seen: averaged {averaged:.1%}, stacked {stacked:.1%} right, mean of four")
lab.table([{"left out": d} | by for d, by in combined.items()])

# %% [markdown]
# How to read it. *One other, mean* is what you get if you pick one of the three blindly; *best* is picked after the test, so nobody could have known it. Is averaging better than picking blindly? It need not be: compare row by row, and the mean of that column with the printed line. Is it worth less than an adapter of its own? Mind the ± from above: these are the same test texts.
#
# ## AdapterDrop: leave the first blocks alone
#
# Rücklé et al. leave out the adapters of the first $k$ blocks. Three things get cheaper: there are fewer numbers, training does not go back into blocks that have nothing to learn, and several tasks on one text can **share** what the first blocks compute.
#
# ### Exercise 6: what is shared (5 minutes, ★)
#
# You want the answers of several tasks for one text. The first `dropped` of the `blocks` have no adapters. How many blocks must be computed in all?
#
# <details>
# <summary>Hint</summary>
#
# Up to the first adapter all tasks see the same numbers: compute them once.
#
# </details>

# %%
def block_passes(blocks: int, dropped: int, tasks: int) -> int:
    """Blocks computed to get the answers of all tasks for one input."""
    ### BEGIN SOLUTION
    return dropped + tasks * (blocks - dropped)
    ### END SOLUTION

check.block_passes(block_passes)

# %% [markdown]
# Now measure it: numbers, score, the time of a training step, and the time of four tasks on one batch, with the first $k$ blocks run once. The times are the shortest of several tries, in turn, so that little else on the machine decides. Of the score, ask whether it moves by more than its bars. Each was trained once, so a rise within them does not make a method better.

# %%
@torch.no_grad()
def four_tasks(one, k: int) -> list[torch.Tensor]:
    """The logits of every adapter on `wide`; what lies below block k is computed once."""
    encoder, kept = one.base_model.encoder.layer, {}
    keep = encoder[k].register_forward_pre_hook(lambda m, args, named: kept.update(args=args, named=named), with_kwargs=True)
    mp.activate(one, "0")
    answers = [one(**wide).logits]
    keep.remove()
    for name in "123":
        mp.activate(one, name)
        h, *others = kept["args"]                              # h (B, T, d), the same for all
        for block in encoder[k:]:
            h = block(h, *others, **kept["named"])
            h = h[0] if isinstance(h, tuple) else h
        answers.append(one.classifier(one.base_model.pooler(h)))
    return answers

# %% tags=["figure"]
wide = tokenizer([e["text"] for e in (train["movies"] * 2)[:mp.pick(smoke=8, cpu=64, gpu=256)]], padding=True, return_tensors="pt").to(model.device)
K = (0, 2, 4)
dropped = {k: fresh()[0] for k in K}
for k, one in dropped.items():
    for name in "0123":
        mp.attach(one, replace(METHODS["adapters"], skip_layers=k, init_std=0.1), name)
    for name, answer in zip("0123", four_tasks(one, k)):
        with mp.active(one, name), torch.no_grad():
            assert torch.allclose(one(**wide).logits, answer, atol=1e-4)   # sharing changes nothing

def milliseconds(act) -> float:
    began = time.perf_counter()
    act()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)

def train_step(one):
    mp.activate(one, "0")
    one(**wide, labels=torch.zeros(len(wide["input_ids"]), dtype=torch.long, device=one.device)).loss.backward()

tries = mp.pick(smoke=1, cpu=3, gpu=20)
times = {k: {"step": [], "tasks": []} for k in K}
for _ in range(1 + tries):                                     # the first round warms up
    for k, one in dropped.items():
        times[k]["step"].append(milliseconds(lambda: train_step(one)))
        times[k]["tasks"].append(milliseconds(lambda: four_tasks(one, k)))
ms = {"bare": [], "adapters": []}
with torch.no_grad():
    for _ in range(1 + 2 * tries):
        for name, which in (("bare", None), ("adapters", "movies")):
            with mp.active(model, which):
                ms[name].append(milliseconds(lambda: model(**wide)))
slower = min(ms["adapters"][1:]) / min(ms["bare"][1:]) - 1

drop = []
for k in K:
    method = replace(METHODS["adapters"], skip_layers=k)
    one, _ = fresh()
    torch.manual_seed(0)
    numbers = sum(p.numel() for p in mp.attach(one, method).parameters())
    assert numbers == 2 * (blocks - k) * method.parameter_count(d) + head
    right = across[0][0] if k == 0 else (mp.fit(one, tokenizer, train["movies"], plan), score(one, "movies"))[1]
    drop.append({"dropped": k, "trained": numbers, "films right": right, "training step, ms": min(times[k]["step"][1:]),
                 "four tasks, ms": min(times[k]["tasks"][1:]), "blocks computed": k + 4 * (blocks - k)})
display(lab.table(drop))

figure, (left, right) = lab.new_figure(2, width=9, height=3.1)
for column, colour in (("training step, ms", "blue"), ("four tasks, ms", "green"), ("blocks computed", "grey")):
    left.plot(K, [row[column] / drop[0][column] for row in drop], "o-", color=lab.COLOURS[colour], label=column.split(",")[0])
left.set(xlabel="blocks without adapters", ylabel="cost, 1 = adapters everywhere", ylim=(0, 1.35))
left.legend(fontsize=9, ncols=3)
noise = math.sqrt(drop[0]["films right"] * (1 - drop[0]["films right"]) / len(test["movies"]))
right.errorbar(K, [row["films right"] for row in drop], yerr=noise, fmt="o-", color=lab.COLOURS["blue"], capsize=3)
right.set(xlabel="blocks without adapters", ylabel="share of films right", ylim=(0.4, 1))
right.set_title("bars: the error from the number of test texts", fontsize=10)
saved = {"four tasks": 1 - drop[2]["four tasks, ms"] / drop[0]["four tasks, ms"], "step": 1 - drop[2]["training step, ms"] / drop[0]["training step, ms"]}
print(f"with {K[2]} of {blocks} blocks left alone: {1 - drop[2]['trained'] / drop[0]['trained']:.0%} fewer numbers, "
      f"{saved['four tasks']:.0%} less time for four tasks, {saved['step']:.0%} for a training step")
figure

# %% [markdown]
# ## Merge, save, reload
#
# An adapter cannot be folded into the weights: with the ReLU inside, no matrix does what it does. So it costs time at every use. LoRA has no ReLU, and that is why it can be merged. You measured that time above, and the cell prints how much longer a pass with adapters takes. On a busy machine a few percent are noise.

# %%
try:
    mp.activate(model, "movies")
    mp.merge(model, "movies")
except TypeError as refusal:
    print("TypeError:", refusal)

folder = tempfile.TemporaryDirectory()
for domain in DOMAINS:
    mp.save_adapter(model, Path(folder.name) / domain, domain)
bytes_of = {d: sum(f.stat().st_size for f in (Path(folder.name) / d).iterdir()) for d in DOMAINS}
again, _ = fresh()
mp.load_adapter(again, Path(folder.name) / "movies", "films")
with torch.no_grad(), mp.active(model, "movies"):
    assert torch.equal(again(**batch).logits, model(**batch).logits)       # the same, to the bit
model_mb = sum(p.numel() * p.element_size() for p in base_parameters(model).values()) / 1e6
four = model_mb + sum(bytes_of.values()) / 1e6
print(f"a pass with adapters takes {slower:+.0%}; one adapter is {bytes_of['movies'] / 1e3:,.0f} kB")
print(f"four tasks: one model and four adapters {four:.0f} MB, four models {4 * model_mb:.0f} MB")

# %% [markdown]
# ## The row for the cost table, your predictions, and a quiz
#
# First your predictions beside the measured numbers, and the row. In the quiz every choice says why it is right or wrong. The numbers are computed, not typed.

# %%
measured = dict(zip(predicted, (claim, lead, 100 * without["after: right"], 100 * averaged)))
row = {"method": "bottleneck adapters", "trained": report.trainable, "percent": report.percent, "seconds": seconds["movies"],
       "file MB": bytes_of["movies"] / 1e6, "slower": slower, "movies": mean["adapters"]["movies"], "mean of four": overall["adapters"]}
lab.record(
    main=row | {"m": METHODS["adapters"].bottleneck, "steps": plan.steps, "batch": plan.batch_size, "rate": plan.lr,
                "seeds": len(SEEDS["movies"]), "spread": spread["adapters"], "full seconds": full_seconds},
    tasks={name: {"trained": trained[name], "rate": RATE[name], "mean": overall[name], "spread": spread[name]} | mean[name] for name in results}
    | {"lead, points": lead, "error, points": error, "switch, µs": switch_us},
    placements=placements, forgetting={"forgotten": forgotten, "old skill": skill}, starts=starts,
    combined=combined | {"sweep": sweep}, drop=drop, counts={"BERT-base": total, "64": counts[64], "percent": claim},
)
display(lab.table([{"": key, "you": "no prediction" if predicted[key] is None else predicted[key], "measured": value} for key, value in measured.items()]))
display(lab.table([row]))

one = mp.BottleneckAdapter(64).parameter_count(768)
lab.quiz([
    {"question": "How many numbers has one adapter with $m = 64$ in a model of width 768?", "right": f"{one:,}",
     "choices": {f"{one:,}": "$2md + m + d$.", f"{2 * 64 * 768:,}": "That is $2md$: the biases are missing.",
                 f"{64 * 768 + 64:,}": "That is the way down alone.", f"{768 * 768:,}": "That is a matrix without a bottleneck."}},
    {"question": f"24 of them in BERT-base, of {total / 1e6:.0f} million numbers. What share is that?", "right": f"{claim:.1f} %",
     "choices": {f"{claim:.1f} %": "Counted above, from the configuration.",
                 "3 to 4 %": "That is in print, but the count says otherwise.",
                 f"{claim / 2:.1f} %": "That is one adapter a block: Pfeiffer's placement.",
                 f"{2 * claim:.1f} %": "That would take four in each block."}},
    {"question": "What is the adapter's own skip for?", "right": "with small matrices the adapter starts near the identity",
     "choices": {"with small matrices the adapter starts near the identity": "So training starts from the model you have, and the gradient comes through.",
                 "it saves parameters": "An addition has none, with or without.",
                 "it makes the adapter nonlinear": "That is $\\sigma$.",
                 "it replaces the block's residual": "That one is still there. Without the adapter's skip, it is all that is left at the start."}},
    {"question": "You take away $\\sigma$. What is left?", "right": "a linear map of rank $m$ at most, which could be merged",
     "choices": {"a linear map of rank $m$ at most, which could be merged": "$W_\\mathrm{up} W_\\mathrm{down}$ is one matrix: close to a LoRA on the sub-layer's last linear.",
                 "the identity": "Only if a matrix is zero as well.",
                 "the same thing": "Two matrices in a row are one. Nothing is bent."}},
    {"question": "Both matrices start at zero. What does the adapter learn?", "right": "its last bias and nothing else",
     "choices": {"its last bias and nothing else": "Each matrix's gradient is a product with the other, or with $\\sigma(0)$. See the table.",
                 "everything, from the second step on": "That holds with one of them zero, not with both.",
                 "nothing at all": "Nearly: the last bias gets a gradient whatever the matrices are."}},
    {"question": "Where does Houlsby's first adapter stand?", "right": "after the attention's last linear, before the residual is added",
     "choices": {"after the attention's last linear, before the residual is added": "Figure 2 of the paper.",
                 "after the addition and the norm": "So some articles draw it. Then it also changes what the residual carries.",
                 "beside the attention": "Beside is He et al., and there it is the feed-forward."}},
    {"question": "Four adapters on one model forget nothing. Why?", "right": "each task has numbers of its own",
     "choices": {"each task has numbers of its own": "And the frozen ones move for nobody.",
                 "adapters are small": "One small adapter that goes through all tasks is overwritten too. How much it lost, the table says.",
                 "the learning rate is low": f"It is {RATE['adapters']:g} here, full fine-tuning's {RATE['full']:g}. Frozen is frozen at any rate."}},
    {"question": f"{blocks} blocks, {K[2]} of them without adapters, four tasks on one text. How many blocks are computed?", "right": f"{K[2] + 4 * (blocks - K[2])}",
     "choices": {f"{K[2] + 4 * (blocks - K[2])}": "The first ones once, the others for each task.", f"{4 * blocks}": "Nothing shared.",
                 f"{4 * (blocks - K[2])}": "The shared ones must run once.", f"{blocks}": "The upper blocks differ from task to task."}},
    {"question": "Why can LoRA be merged and an adapter not?", "right": "there is a nonlinearity inside the adapter",
     "choices": {"there is a nonlinearity inside the adapter": "No single matrix does what it does.",
                 "an adapter is larger": "Size does not matter for that.",
                 "an adapter has biases": "A bias could be merged into a bias."}},
])

# %% [markdown]
# ## Recap
#
# - An adapter squeezes, bends, widens and adds. It trains $2md + m + d$ numbers.
# - The skip and the small start belong together: the model begins nearly as it was, and the gradient comes through.
# - It stands on what a sub-layer returns, before the block's residual.
# - One frozen model, an adapter a task: nothing is forgotten, and switching is a name.
# - It cannot be merged, so it costs time. Leaving it out of the first blocks saves some of that.
# - Count before you believe a percentage.
#
# ## Next
#
# [Chapter 5](05_lora.ipynb) leaves out $\sigma$, and gains merging. [Chapter 6](06_dora_and_ia3.ipynb) stays in the same socket.
#
# ## Further reading
#
# - Houlsby et al. 2019, [Parameter-Efficient Transfer Learning](https://arxiv.org/abs/1902.00751): section 3.6 looks at the start, too
# - Pfeiffer et al. 2021, [AdapterFusion](https://arxiv.org/abs/2005.00247), and Pfeiffer et al. 2020, [MAD-X](https://arxiv.org/abs/2005.00052): stacking a task on a language
# - He et al. 2022, [Towards a Unified View](https://arxiv.org/abs/2110.04366): adapters, prefixes and LoRA as one thing
# - Rücklé et al. 2021, [AdapterDrop](https://arxiv.org/abs/2010.11918); Chronopoulou et al. 2023, [AdapterSoup](https://arxiv.org/abs/2302.07027)
