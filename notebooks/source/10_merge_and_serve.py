# ---
# jupyter:
#   minipeft:
#     records: [operators, latency, skills, merged, combined, loading, batch, checkpoint, predictions]
# ---

# %% [markdown]
# # 10 · After training: merge, combine, serve
#
# **In one sentence:** fold a LoRA into its weights and it costs nothing to run; keep it beside them and one base answers for many tasks at once; you cannot have both at the same moment, and here you measure what each costs.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/10_merge_and_serve.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - say why adapters make a model slower and a merged LoRA does not, and show it without a clock
# - measure latency so that the machine's own drift does not decide the result
# - merge, take out again, and know what rounding took, in 32, 16 and 4 bits
# - make one adapter of several, in five ways, and measure what is left of each skill
# - answer a batch in which every row asks for another adapter, computed together
# - hand an adapter over to Hugging Face PEFT and to vLLM
#
# **You need:** [chapter 5](05_lora.ipynb), LoRA. [Chapter 4](04_adapters.ipynb) builds the adapters that are timed here.
#
# **The papers:** Hu et al. 2021, *LoRA*, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685): you remake its Table 1. Yadav et al. 2023, *TIES-Merging*, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708): you build its section 4. Chen et al. 2023, *Punica*, [arXiv:2310.18547](https://arxiv.org/abs/2310.18547): the gathered product.

# %% tags=["setup"]
import hashlib, inspect, statistics, subprocess, sys, tempfile, time, warnings
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()
from pathlib import Path
from types import SimpleNamespace
import torch, transformers
from torch import nn
import minipeft as mp
from minipeft import lab, profiles, serve
lab.seed_everything(0)
print("minipeft", mp.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
print("profile", mp.profile().name, "on", mp.profile().device)
lab.runtime_box("10_merge_and_serve")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the measured ones.
#
# 1. Two bottleneck adapters in every block, one row at a time: a forward pass takes how many **percent** longer?
# 2. A LoRA merged into the weights: how many **operators** more than the base does a forward pass run?
# 3. You merge into weights of 16 bits (bfloat16). Rounding moves a weight by how many **percent** of what the adapter had moved it?
# 4. A batch in which every row has an adapter of its own, computed together: how many **times** as long as the same batch with one adapter for all?

# %%
predicted = {"adapters, percent longer": None, "merged LoRA, operators more": None,
             "rounding in 16 bits, percent of the update": None, "different adapters / one for all": None}

# %% [markdown]
# ## The problem
#
# Two sentences stand side by side in many articles: *LoRA has no latency, because it is merged into the weights.* And: *LoRA adapters can be swapped at runtime, so that one base serves many tasks.* Each is true. Not both at once: what is merged cannot be swapped with a look into a table, and what is swapped is not merged.
#
# So there is a choice, and it is about numbers. First the frozen model. You count what one forward pass does, operator by operator. `mp.count_operators` listens while PyTorch runs.

# %%
BASE = profiles.base_model()
model, tokenizer = mp.load_base(BASE)
question = tokenizer("Which class of medicines does ibuprofen belong to?\n", return_tensors="pt").to(model.device)

def matrix_products(counted) -> int:
    """How many of the counted operators multiply matrices: mm, bmm, addmm, …"""
    return sum(n for name, n in counted.items() if "mm" in name)

at_rest = mp.count_operators(model, **question)
base_bytes = sum(p.nbytes for p in model.parameters())
linears = mp.anatomy.match(model, "all-linear")
print(f"{BASE}: {base_bytes / 1e6:,.0f} MB, {len(linears)} linear layers in {model.config.num_hidden_layers} blocks")
print(f"one pass: {at_rest.total():,} operators, {matrix_products(at_rest)} of them matrix products")
lab.table([{"operator": name, "times": n} for name, n in at_rest.most_common(8)])

# %% [markdown]
# ## The idea
#
# Three ways to use the same $A$ and $B$. Beside the weight, folded into it, or, for a batch in which every row has its own adapter, gathered:
#
# $$y = xW^\top + s\,(xA^\top)B^\top \qquad y = xW'^\top,\;\; W' = W + sBA \qquad y_i = x_iW^\top + s_{k(i)}\,(x_iA_{k(i)}^\top)\,B_{k(i)}^\top$$
#
# | | shape | |
# |---|---|---|
# | $W$, $W'$ | $(\mathrm{out}, \mathrm{in})$ | the frozen weight; with the update in it |
# | $A_k$, $B_k$ | $(r, \mathrm{in})$, $(\mathrm{out}, r)$ | adapter $k$ |
# | $x_i$ | $(\mathrm{tokens}, \mathrm{in})$ | row $i$ of the batch |
# | $k(i)$ | one whole number | which adapter row $i$ asks for |
# | $A$, $B$ stacked | $(U, r, \mathrm{in})$, $(U, \mathrm{out}, r)$ | all adapters of the batch |

# %% tags=["figure"]
from minipeft.lab.plots import COLOURS, new_figure

figure, panels = new_figure(3, width=10.2, height=3.8)
def box(ax, x, y, text, face="#eef1f4", edge=COLOURS["grey"]):
    ax.text(x, y, text, ha="center", va="center", fontsize=11, linespacing=1.4, zorder=3,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": face, "edgecolor": edge})
def arrow(ax, *points):
    for start, end in zip(points, points[1:]):
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": COLOURS["grey"], "linewidth": 1.5}, zorder=1)

for ax, title in zip(panels, ("beside: two products more", "merged: nothing more", "a mixed batch: gathered")):
    ax.axis("off")
    ax.set(xlim=(0, 100), ylim=(0, 100))
    ax.set_title(title, fontsize=11.5)
left, middle, right = panels
for ax in (left, right):
    arrow(ax, (46, 14), (26, 40)); arrow(ax, (26, 60), (46, 86))
    arrow(ax, (54, 14), (74, 27)); arrow(ax, (74, 41), (74, 58)); arrow(ax, (74, 73), (54, 86))
box(left, 26, 50, "$W$\nfrozen"); box(left, 74, 34, "$A$", "#cfe3f1", COLOURS["blue"]); box(left, 74, 66, "$B$", "#cfe3f1", COLOURS["blue"])
box(left, 50, 8, "$x$", "white"); box(left, 50, 92, "$y$, the sum", "white")
arrow(middle, (50, 14), (50, 38)); arrow(middle, (50, 62), (50, 86))
box(middle, 50, 50, "$W' = W + sBA$\nthe shape of $W$", "#dfe9ef", COLOURS["blue"])
box(middle, 50, 8, "$x$", "white"); box(middle, 50, 92, "$y$", "white")
for shift, face, edge, k in ((6, "#d9efe6", "green", 3), (3, "#fdeccb", "orange", 2), (0, "#cfe3f1", "blue", 1)):
    box(right, 74 + shift, 34 + shift, f"$A_{k}$", face, COLOURS[edge]); box(right, 74 + shift, 66 + shift, f"$B_{k}$", face, COLOURS[edge])
box(right, 26, 50, "$W$, once\nfor all rows"); box(right, 50, 8, "$x_1,\\; x_2,\\; x_3$", "white"); box(right, 50, 92, "$y_1,\\; y_2,\\; y_3$", "white")
figure

# %% [markdown]
# ## By hand
#
# Take pencil and paper. One weight, two adapters of rank 1 with $s = 1$, and a batch of two rows. Row 1 asks for adapter 1, row 2 for adapter 2:
#
# $$W = \begin{pmatrix}1&0\\2&1\end{pmatrix}\quad A_1 = \begin{pmatrix}1&1\end{pmatrix}\quad B_1 = \begin{pmatrix}1\\0\end{pmatrix}\quad A_2 = \begin{pmatrix}0&2\end{pmatrix}\quad B_2 = \begin{pmatrix}0\\1\end{pmatrix}\quad x_1 = \begin{pmatrix}1\\2\end{pmatrix}\quad x_2 = \begin{pmatrix}3\\-1\end{pmatrix}$$
#
# 1. Compute $Wx_1$ and $Wx_2$. Then $A_1x_1$ and $A_2x_2$, one number each.
# 2. Add $B_1(A_1x_1)$ to the first and $B_2(A_2x_2)$ to the second: two rows, two adapters, one $W$.
# 3. Merge **both** adapters into $W$ and compute the answer to $x_1$. Is it what row 1 asked for?
#
# Then run the cell.

# %%
W = torch.tensor([[1, 0], [2, 1]])
A, B = torch.tensor([[[1, 1]], [[0, 2]]]), torch.tensor([[[1], [0]], [[0], [1]]])   # (2, 1, 2), (2, 2, 1)
x = torch.tensor([[1, 2], [3, -1]])                            # a row each

inner = [(A[k] @ x[k]).item() for k in (0, 1)]
y = torch.stack([W @ x[k] + B[k] @ (A[k] @ x[k]) for k in (0, 1)])
print("W x           =", (x @ W.T).tolist(), " A x =", inner)
print("row by row    =", y.tolist())
both = W + B[0] @ A[0] + B[1] @ A[1]
print("both merged   =", both.tolist(), " and to x_1 it says", (both @ x[0]).tolist())
gathered = x @ W.T + torch.bmm(B, torch.bmm(A, x[..., None]))[..., 0]
assert torch.equal(gathered, y) and not torch.equal(both @ x[0], y[0])

# %% [markdown]
# Merging two adapters into one weight gives every row both. That is *combining*, and you will do it on purpose below. Serving many is another thing: each row gets its own.
#
# ## Build it
#
# ### Step 1: who waits for whom
#
# Why does an adapter cost time? Not because of its arithmetic, which is small. A pass through a model is a sequence of products, and most must wait for the one before: the feed-forward for the attention, one block for the block below. Query, key and value do not wait for each other.
#
# - A **bottleneck adapter** stands *behind* a layer. Its first product waits for the layer, its second for its first, and all that follows waits for its second. The machine does little work in that time, but nothing else can be done.
# - **LoRA beside a layer**: $xA^\top$ can start together with $xW^\top$, but $(\cdot)B^\top$ waits for it. Two more products, and a chain that may be longer too.
# - **LoRA merged**: $A$ and $B$ do not exist any more. $W'$ has $W$'s shape. Same products, same chain.
#
# ### Exercise 1: products and chain · 10 minutes · medium
#
# Can you explain why adapters introduce latency and LoRA need not? Say it in numbers. A model is a list of stages; the layers of a stage can run at the same time, and the next stage waits for all of them. `adapted` names the layers that have a piece. Return how many matrix products a pass has, and how many there are in the **longest chain** in which each waits for the one before. Count those of layers and pieces only; attention's own products are the same in all ways.

# %%
from minipeft.checks import ch10_merge_and_serve as check

def products_and_chain(stages: list[list[str]], adapted: set[str], way: str) -> tuple[int, int]:
    """way: "LoRA" (beside the layer), "LoRA, merged", or "adapters" (a bottleneck behind the layer)."""
    ### BEGIN SOLUTION
    more = 0 if way == "LoRA, merged" else 2
    alone = {"LoRA": 2, "LoRA, merged": 1, "adapters": 3}[way] # the chain through one adapted layer
    products = sum(1 + more * (name in adapted) for stage in stages for name in stage)
    chain = sum(max(alone if name in adapted else 1 for name in stage) for stage in stages)
    return products, chain
    ### END SOLUTION

check.products_and_chain(products_and_chain)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# The chain of a stage is that of its slowest layer; stages add up. Through one adapted layer: beside it, $A$ then $B$ are two products in a row while $W$ is one; behind it, $W$, then down, then up.
#
# </details>
#
# ### Step 2: count them in the real model
#
# The same question, the same model, each way once. The claim of this chapter stands in the assertion: merged, the model runs **exactly** the operators of the base. No clock can show that so well.

# %%
ways = {"LoRA on q and v": mp.LoRA(rank=8), "adapters, two a block": mp.BottleneckAdapter(64),
        "LoRA on all linear layers": mp.LoRA(rank=8, targets="all-linear"),
        "adapters, one a block": mp.BottleneckAdapter(64, placement="pfeiffer"),
        "prompt of 20": mp.PromptTuning(20), "prefix of 20": mp.PrefixTuning(20, reparameterize=False)}
ways = dict(list(ways.items())[: mp.pick(smoke=2, cpu=6, gpu=6)])

def counted(method, merged: bool = False):
    """The operators of one pass with this method on the model, beside it or merged."""
    mp.attach(model, method)
    if merged:
        mp.merge(model)
    found = mp.count_operators(model, **question)
    mp.detach(model)                                           # takes it out of the weights too
    return found

counts = {"base": at_rest} | {way: counted(method) for way, method in ways.items()}
counts["LoRA on q and v, merged"] = counted(mp.LoRA(rank=8), merged=True)
assert counts["LoRA on q and v, merged"] == at_rest and counted(mp.LoRA(rank=8)) != at_rest
lab.table([{"": way, "matrix products": matrix_products(c), "operators": c.total(), "more than the base": c.total() - at_rest.total()}
           for way, c in counts.items()])

# %% [markdown]
# ### Step 3: a clock that can be trusted
#
# A prompt adds few operators: it makes the row longer instead, and that only a clock tells. But a machine's speed changes while you measure, often by more than what you look for. So everything takes turns: in each turn every contestant is measured once, in an order drawn anew, and is compared with the base **of the same turn**. Of the ratios you take the median: one turn that something disturbed hardly moves it.
#
# ### Exercise 2: how much slower · 5 minutes · easy

# %%
def slowdown(own: list[float], base: list[float]) -> float:
    """Seconds of a contestant and of the base, turn by turn -> how many times as long, by the median of the turns."""
    ### BEGIN SOLUTION
    return statistics.median(a / b for a, b in zip(own, base))
    ### END SOLUTION

check.slowdown(slowdown)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# First the ratios, then the median. The median of own times divided by the median of base times mixes two different turns.
#
# </details>
#
# ### Table 1 of the LoRA paper, on your machine
#
# `mp.measure_latency` does what the exercise asks for: random tokens, one row and several, a pass over them and tokens generated behind them. *± ms* is half the distance between the quartiles; with few turns, one disturbed turn can make it large. *Generate ms* is the time of one new token of every row, with its share of the pass over the prompt.
#
# One thing you know before you look: a **merged** row runs the base's operators, so its true ratio is 1. What the clock shows there is its error. The figure paints the largest such error grey.

# %%
latency = mp.measure_latency(
    model, ways,
    batch_sizes=mp.pick(smoke=(1,), cpu=(1, 8), gpu=(1, 32)),
    tokens=mp.pick(smoke=6, cpu=48, gpu=128),
    new_tokens=mp.pick(smoke=1, cpu=4, gpu=16),
    repeats=mp.pick(smoke=2, cpu=7, gpu=9),
)
columns = ("model", "batch", "operators", "forward ms", "forward ± ms", "forward / base", "generate ms", "generate / base")
lab.table([{name: row.get(name) for name in columns} for row in latency])

# %% tags=["figure"]
batches = sorted({row["batch"] for row in latency})
ratio = {(row["model"], row["batch"]): row["forward / base"] for row in latency}
contestants = [row["model"] for row in latency if row["batch"] == 1 and row["model"] != "base"]
figure, ax = new_figure(width=7.8, height=0.9 + 0.42 * len(contestants))
for number, (batch, colour) in enumerate(zip(batches, ("blue", "orange"))):
    at = [place + 0.38 * (number - (len(batches) - 1) / 2) for place in range(len(contestants))]
    ax.barh(at, [100 * (ratio[name, batch] - 1) for name in contestants], height=0.36, color=COLOURS[colour], label=f"{batch} row{'s' * (batch > 1)} at a time")
ax.axvline(0, color=COLOURS["black"], linewidth=1)
ax.set_yticks(range(len(contestants)), contestants)
ax.invert_yaxis()
ax.set(xlabel="forward pass: percent longer than the base")
ax.legend(fontsize=9)
noise = max(100 * abs(value - 1) for (name, _), value in ratio.items() if name.endswith(", merged"))
ax.axvspan(-noise, noise, color=COLOURS["grey"], alpha=0.2, linewidth=0, zorder=0)
print(f"a merged row belongs at 0; the clock puts one {noise:.1f} % away. A bar no longer than that, inside the grey, says nothing")
figure

# %%
weights = sum(model.get_submodule(path).weight.numel() for path in linears) + model.get_output_embeddings().weight.numel()
compared = [{"": row["model"], "arithmetic, percent more": 100 * row["parameters"] / weights,
             "operators, percent more": 100 * (row["operators"] / at_rest.total() - 1),
             "time, percent more": 100 * (ratio[row["model"], 1] - 1)}
            for row in latency if row["batch"] == 1 and row["model"] in ways and not row["model"].startswith("pr")]
alone, many = (100 * (ratio["adapters, two a block", batch] - 1) for batch in (batches[0], batches[-1]))
merged_off = 100 * (ratio["LoRA on q and v, merged", 1] - 1)
print(f"adapters, two a block: {alone:+.1f} % with one row, {many:+.1f} % with {batches[-1]}")
print(f"LoRA merged: {merged_off:+.1f} %, by the clock; by counting, nothing")
print("in print: 'rising with the batch size'. Here it", "was not asked: one batch size" if len(batches) == 1
      else "cannot be told: the two differ by no more than the clock's error" if abs(many - alone) <= noise else "rises" if many > alone else "falls")
lab.table(compared, caption="one row: what is added, and what it costs")

# %% [markdown]
# How to read it:
#
# - **The noise first.** Merged rows differ from the base by noise alone: the count says so. A second test: LoRA on all linear layers does all that LoRA on q and v does, and more. If the clock puts all linear layers below q and v, that is noise too. If the grey covers nearly all bars, something else ran on the machine: run the cells again when it is idle.
# - Compare the columns of the last table. If time followed arithmetic, the first and the last would agree. Where the time is nearer to the operators, you pay for starting small products and for waiting, whatever their size. A time inside the noise decides nothing.
# - **Generate.** Look at *generate / base* in the large table. Most passes there read one new token a row: that is the least work between two small products. Find the noise of this column in its merged rows. Are the unmerged ones beyond it?
# - **Batch.** In the paper's Table 1, on a GPU, adapters cost 20 to 30 % with one row of 128 tokens and a few percent with 32 rows of 512: the larger the work between two small products, the less they weigh. An article claims the opposite. The line above the table says what your machine says, if it can say anything.
# - **Prompts and prefixes** add no products to the chain, but length. A prompt is read through all layers: compare its bar with the tokens that it adds to a row. A prefix only lengthens the attention. It adds many operators, but the count has no matrix product among them.
# - LoRA that is **not** merged is not free: the count shows it, whatever the clock says. Only the merged one is.
#
# ## Three skills
#
# Now you need adapters that do something. Three small ones on the same base: `cards` answers a question on a medicine in the format of chapter 5, `names` says which medicine a card describes, `mood` says whether a snippet of a film review praises or blames. A few steps each: enough to hear the difference. Mind what *held out* means. For `cards` and `names` it is other wordings of questions on the same few medicines, which can be learnt by heart. For `mood` it is snippets that were never seen. This is teaching data, not medical advice.

# %%
every_name = sorted({e["card"] for e in mp.load_data("drug_cards")})
few = every_name[:: len(every_name) // mp.pick(smoke=1, cpu=12, gpu=48)]
most = mp.pick(smoke=2, cpu=16, gpu=64)                        # held-out questions a skill

def about_medicines(direction: str, split: str) -> list[dict]:
    return [e for e in mp.load_data("drug_cards", split) if e["direction"] == direction and e["card"] in few]

def about_films(split: str) -> list[dict]:
    short = [e for e in mp.load_data("sentiment/movies", split) if len(e["text"]) < 100]
    return [{"prompt": e["text"] + "\nMood:", "completion": " good" if e["label"] else " bad"} for e in short]

sources = {"cards": lambda split: about_medicines("forward", split), "names": lambda split: about_medicines("reverse", split),
           "mood": about_films}
train = {skill: of("train") for skill, of in sources.items()}
held_out = {skill: of("test")[:most] for skill, of in sources.items()}
for skill, rows in held_out.items():
    print(f"{skill:6} {len(train[skill]):5} to train on; for example {rows[0]['prompt']!r} -> {rows[0]['completion']!r}")

# %%
def fingerprint(model) -> str:
    """SHA-256 over the bytes of every parameter and buffer that is not an adapter's."""
    own = {id(p) for adapter in mp.adapters(model).values() for p in adapter.parameters()}
    digest = hashlib.sha256()
    for t in [*model.parameters(), *model.buffers()]:
        if id(t) not in own:
            digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

lora = mp.LoRA(rank=8, alpha=16, targets=mp.pick(smoke=r"model\.layers\.[01]\.self_attn\.[qv]_proj", cpu=("q_proj", "v_proj"), gpu=("q_proj", "v_proj")))
plan = mp.FitConfig(steps=mp.pick(smoke=1, cpu=40, gpu=150), batch_size=mp.pick(smoke=2, cpu=8, gpu=16), lr=4e-3, progress=False)
shelf_folder, curve, at_first, runs = tempfile.TemporaryDirectory(), lab.live_curve(), fingerprint(model), {}
folders = {skill: Path(shelf_folder.name) / skill for skill in train}
torch.manual_seed(0)                                           # each draws an A of its own
for skill, rows in train.items():
    mp.attach(model, lora, skill)
    runs[skill] = mp.fit(model, tokenizer, rows, plan, watch=curve)
    mp.save_adapter(model, folders[skill], skill)
    mp.detach(model, skill)
assert fingerprint(model) == at_first                          # the base is as it was, every bit

# %% [markdown]
# Each line is one skill's run: 1 is `cards`, 2 `names`, 3 `mood`. Now all three go onto the model at once, and you measure every skill with every adapter: the loss on held-out questions, where low is good.

# %%
def losses(model) -> dict[str, float]:
    """The held-out loss of each skill with what is active now."""
    return {skill: mp.evaluate(model, tokenizer, rows)["loss"] for skill, rows in held_out.items()}

bare = losses(model)
for skill, folder in folders.items():
    mp.load_adapter(model, folder, skill)                      # activates it alone
own = {}
for skill in folders:
    with mp.active(model, skill):
        own[skill] = losses(model)
mp.activate(model, None)
file_bytes = sum(file.stat().st_size for file in folders["cards"].iterdir())
trained = sum(p.numel() for p in mp.adapters(model)["cards"].parameters())
print(f"one adapter: {trained:,} numbers, {file_bytes / 1e6:.2f} MB on disk; the base: {base_bytes / 1e6:,.0f} MB")
lab.heat_map([list(row.values()) for row in [bare, *own.values()]], ["base", *own], list(held_out), row_label="adapter", column_label="questions for", form=".2f")

# %% [markdown]
# Read a row: what this adapter does to all three kinds of questions. Below the base's row, the diagonal has what each was trained for. Compare each number with the base's above it. Off the diagonal, an adapter may help with another's questions or do harm.
#
# Then ask what a loss is worth. It is the mean over the tokens of the answer, and much of what the base lacks is the **format**: one word, or five fields, and then the end. An answer of `mood` has two tokens, the word and the end. Who is sure of the end and tosses a coin for the word has a loss of $\frac12 \ln 2 \approx 0.35$. Is `mood` below it, and by how much? Format takes a few steps, judging a film takes more. Whether answers are also **right**, you see near the end of *Serve*.
#
# ## Merge
#
# ### Exercise 3: find the bug · 15 minutes · medium
#
# A loader proposed to a public project merges a LoRA into a linear layer with one line. The automatic review remarked: if it is called twice, the update is in the weight twice, and nothing says so ([minimind #598](https://github.com/jingyaogong/minimind/pull/598)). Another project's layer adds the update in its forward pass although it is in the weight already ([candle-lora #26](https://github.com/EricLBuehler/candle-lora/issues/26)). The cell shows the line, with a way back by subtracting. There is a second trouble, quieter: look at what a hundred rounds of merging and unmerging leave behind in the base. Then make it one round: is it less? And what would the next adapter leave?
#
# Write `switch` so that it can be called as often as you like. `layer` has `weight`, `A`, `B`, `s`, and `kept`: the weight as it was before the merge, a copy, while the layer is merged, and `None` otherwise. Add in float32, round once. Unmerged, the weight must be back **to the bit**.

# %%
def switch_as_published(layer, merge):
    delta = (layer.s * layer.B @ layer.A).to(layer.weight.dtype)
    layer.weight.data += delta if merge else -delta

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    layer = SimpleNamespace(weight=torch.randn(64, 48).to(dtype), A=torch.randn(4, 48) / 7, B=torch.randn(64, 4), s=0.5, kept=None)
    first, update = layer.weight.clone(), (layer.s * layer.B @ layer.A).norm()
    switch_as_published(layer, True), switch_as_published(layer, True)
    twice = ((layer.weight.float() - first.float()).norm() / update).item()
    layer.weight = first.clone()
    for merge in [True, False] * 100:
        switch_as_published(layer, merge)
    drift = ((layer.weight.float() - first.float()).norm() / update).item()
    print(f"{dtype}: called twice, the weight moved by {twice:.2f} updates; after 100 rounds {drift:.2g} of an update are left in it")

# %%
def switch(layer, merge: bool) -> None:
    """Afterwards layer.weight is W + s B A (merge) or W to the bit (not merge), and layer.kept fits. In place."""
    ### BEGIN SOLUTION
    if merge and layer.kept is None:
        layer.kept = layer.weight.detach().clone()
        folded = layer.kept.float() + layer.s * layer.B @ layer.A
        layer.weight.data = folded.detach().to(layer.weight.dtype)
    elif not merge and layer.kept is not None:
        layer.weight.data = layer.kept
        layer.kept = None
    ### END SOLUTION

check.merge_switch(switch)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Four cases: merged already or not, to be merged or not. In two of them there is nothing to do. `layer.kept is None` tells them apart. Do not subtract: put the kept weight back.
#
# </details>
#
# ### What a merge changes, in 32, 16 and 4 bits
#
# `mp.merge` keeps the originals, as you did. It returns, and warns of, what rounding took: the distance that rounding moved a weight, relative to the distance that the adapter had moved it. Merged and unmerged must agree; how well depends on what the weights are kept in. So the table also has the largest change of a logit, as a share of the largest logit, and at how many of the question's few places the best token stays the same. Each row below is a fresh base; after each, the fingerprint must be back.

# %%
def merge_in(kept: str, dtype=torch.float32, quantized: bool = False, requantize: bool = False) -> dict:
    """Merge `cards` into a base kept like this; what changed, beside the same base with the adapter beside it."""
    fresh, _ = mp.load_base(BASE, dtype=dtype, quantized=quantized)
    mp.load_adapter(fresh, folders["cards"])
    before = fingerprint(fresh)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")                        # the table says it
        beside = fresh(**question).logits.float()
        lost = mp.merge(fresh, requantize=requantize)          # path -> what rounding took, where it did
        folded = fresh(**question).logits.float()
        mp.unmerge(fresh)
    assert fingerprint(fresh) == before                        # every bit is back
    return {"weights in": kept, "rounding, percent of the update": 100 * statistics.mean(lost.values()) if lost else None,
            "largest change of a logit, of the largest": ((folded - beside).abs().max() / beside.abs().max()).item(),
            "same best token, percent": 100 * (folded.argmax(-1) == beside.argmax(-1)).float().mean().item()}

merged = [merge_in("32 bits"), merge_in("16 bits (bfloat16)", torch.bfloat16), merge_in("4 bits, merged in full", quantized=True),
          merge_in("4 bits, merged and rounded to 4 bits again", quantized=True, requantize=True)]
assert merged[0]["largest change of a logit, of the largest"] < 1e-4
lab.table(merged)

# %% [markdown]
# In 32 bits nothing is reported: rounding is less than a ten-millionth of the weight. In 16 bits it is one or two thousandths of the **weight**, and the update is small beside the weight too: the column says how they compare. The logits there differ for another reason too: every intermediate value is rounded to 16 bits, on one path as on the other. In 4 bits a weight that is rounded again may lose most of the update; [chapter 9](09_qlora.ipynb) looks at it weight by weight. So: merge in the precision that the adapter was trained beside, or a higher one, and compare the logits before you delete anything.
#
# ## Combine
#
# Can one adapter hold all three skills? What an adapter does is a matrix, $\Delta W_i = s_i B_i A_i$, and matrices can be added: *task arithmetic*. Five ways, each a line of `mp.combine(model, {name: weight, …}, new_name, how)`:
#
# | how | what it makes | rank |
# |---|---|---|
# | `cat` | $\sum_i w_i \Delta W_i$, exactly | the sum of the ranks |
# | `svd` | the nearest matrix to that sum, of a rank you choose | chosen |
# | `linear` | adds the $A_i$ and the $B_i$, as Hugging Face PEFT does | as before |
# | `ties` | trim, elect a sign, merge, then `svd` | chosen |
# | `dare` | drop entries by chance and scale the rest up, then `svd` | chosen |
#
# ### Exercise 4: one adapter of several, exactly · 10 minutes · medium
#
# Find $A$ and $B$ with $BA = \sum_i w_i s_i B_i A_i$. No decomposition is needed. The ranks may differ, weights may be negative.

# %%
def as_one(
    As: list[torch.Tensor], Bs: list[torch.Tensor], scales: list[float], weights: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As[i] (r_i, in), Bs[i] (out, r_i) -> A (R, in) and B (out, R), R = Σ r_i."""
    ### BEGIN SOLUTION
    A = torch.cat(As)
    B = torch.cat([w * s * B for w, s, B in zip(weights, scales, Bs)], dim=1)
    return A, B
    ### END SOLUTION

check.as_one(as_one)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# $BA$ is a sum over the $R$ columns of $B$ and rows of $A$. Put the rows of all $A_i$ under each other. Which side gets the factor $w_i s_i$ does not matter, as long as only one does.
#
# </details>

# %% [markdown]
# ### Exercise 5: TIES · 20 minutes · hard
#
# Where two skills want opposite changes of an entry, adding cancels both. TIES does three things instead:
#
# 1. **Trim.** Of each $\Delta W_i$ keep the $\lfloor \text{density} \cdot \mathrm{out} \cdot \mathrm{in} \rfloor$ entries of largest size, set the others to 0.
# 2. **Elect.** At each place, the sign of the sum of what is left.
# 3. **Merge.** At each place, the mean of those entries that have the elected sign; 0 where there are none.

# %%
def ties(deltas: torch.Tensor, density: float) -> torch.Tensor:
    """deltas (n, out, in) -> (out, in)."""
    ### BEGIN SOLUTION
    flat = deltas.flatten(1)                                   # (n, out · in)
    largest = flat.abs().topk(int(density * flat.shape[1])).indices
    trimmed = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest)).view_as(deltas)
    elected = trimmed.sum(0).sign()                            # (out, in)
    agree = (trimmed.sign() == elected) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)
    ### END SOLUTION

check.ties(ties)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `topk` on the absolute values of the flattened matrix gives the places to keep; `scatter` puts the entries there. An entry that was trimmed has no vote and does not count in the mean.
#
# </details>

# %%
def combined_by(label: str, weight: float, how: str, **more) -> dict:
    """Combine the three skills, measure, and take the result out again."""
    began = time.perf_counter()
    made = mp.combine(model, dict.fromkeys(folders, weight), "all", how, **more)
    row = {"combined by": label, "rank": made.method.rank, "seconds": time.perf_counter() - began} | losses(model)
    if how == "cat":                                           # the sum, exactly
        path = next(iter(made.pieces()))
        wanted = weight * sum(mp.adapters(model)[skill].pieces()[path].delta() for skill in folders)
        assert torch.allclose(made.pieces()[path].delta(), wanted, atol=1e-5)
    mp.detach(model, "all")
    return row

settings = [("cat, every weight 1", 1.0, "cat", {}), ("cat, every weight 1/3", 1 / 3, "cat", {}), ("linear", 1.0, "linear", {}), ("svd", 1.0, "svd", {}),
            ("ties", 1.0, "ties", {"density": 0.3}), ("dare", 1.0, "dare", {"density": 0.3}), ("svd, rank 2", 1.0, "svd", {"rank": 2})]
combined = [combined_by(label, weight, how, **more) for label, weight, how, more in settings]
mp.activate(model, None)
for row in combined:
    gains = [(bare[skill] - row[skill]) / (bare[skill] - own[skill][skill]) for skill in folders if bare[skill] > own[skill][skill]]
    row["gain kept, percent"] = 100 * statistics.mean(gains) if gains else None
lab.table([{"combined by": "base, no adapter", "rank": 0} | bare,
           {"combined by": "each skill with its own", "rank": lora.rank} | {skill: own[skill][skill] for skill in folders}, *combined])

# %% tags=["figure"]
figure, ax = new_figure(width=8.2, height=3.6)
places = range(len(combined))
for number, (skill, colour) in enumerate(zip(folders, ("blue", "orange", "green"))):
    ax.bar([p + 0.27 * (number - 1) for p in places], [row[skill] for row in combined], width=0.25, color=COLOURS[colour], label=skill)
    for p in places:
        for level, style in ((own[skill][skill], "-"), (bare[skill], ":")):
            ax.plot([p + 0.27 * (number - 1) - 0.13, p + 0.27 * (number - 1) + 0.13], [level, level], style, color=COLOURS["black"], linewidth=1.6)
ax.set_xticks(places, [row["combined by"].replace(", every weight", "\nweight").replace(", rank", "\nrank") for row in combined], fontsize=9)
ax.set(ylabel="held-out loss", ylim=(0, None))
ax.legend(fontsize=9, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
kept = {row["combined by"]: row["gain kept, percent"] for row in combined if row["gain kept, percent"] is not None}
if mp.profile().name == "smoke":
    print("The smoke profile takes one step. It shows that every cell runs, not what is left of a skill.")
elif kept:
    print(f"of what training had gained, {max(kept, key=kept.get)!r} keeps most: {max(kept.values()):.0f} % on average; "
          f"{min(kept, key=kept.get)!r} least: {min(kept.values()):.0f} %")
figure

# %% [markdown]
# A black line is the skill with its own adapter, a dotted one the bare base. How to read it:
#
# - *Gain kept*: of what each skill's own adapter wins over the base, the share that is left, averaged over the skills. Below 0, the combination is on average worse than no adapter.
# - The mean hides much. Look for bars above their dotted line: that skill is worse off than with no adapter, whatever the mean says. And a share of a loss is not a share of right answers. Most of the gain is format, so much of it may be kept where hardly an answer is right: compare the bars of `mood` with the coin of $\frac12 \ln 2$ from above.
# - `cat` with weight 1 holds all three updates whole. That does not make it as good as each alone: the updates disturb each other. With 1/3 it is the same sum at a third of the size. The difference between these two bars is the effect of size alone.
# - `svd` at rank 8 throws away two thirds of the directions, at rank 2 eleven of twelve. Compare both with `cat`, weight 1: the difference is what those directions were worth. `mp.reduce_rank` does the same to a single adapter.
# - `linear` is cheap and is what PEFT calls so. Its product also contains $B_1A_2$, which nobody has trained.
# - `ties` takes a mean, so its changes are smaller than those of a sum. Before you praise its three steps, compare it with `cat` at 1/3, which is smaller and nothing else. Weights above 1 are usual; a fair comparison sweeps them for every method. This table does not: it shows one setting each, and is no ranking.
#
# Three skills with three formats are a hard case. If the rows of a batch can say which skill they want, you need no combination at all.
#
# ## Serve
#
# ### Exercise 6: the gathered product · 15 minutes · hard
#
# A batch in which every row names its adapter, and some name none. The frozen product is the same for all. What is left is the update. Compute it for all rows **together**: no loop over rows, no loop over adapters.

# %%
def gathered_update(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: torch.Tensor, which: torch.Tensor
) -> torch.Tensor:
    """x (rows, tokens, in), A (U, r, in), B (U, out, r), s (U,), which (rows,), -1 for none -> (rows, tokens, out)."""
    ### BEGIN SOLUTION
    k = which.clamp(min=0)                                     # -1 would be the last adapter
    scale = torch.where(which < 0, 0, s[k])[:, None, None]     # (rows, 1, 1)
    h = torch.bmm(x, A[k].mT)                                  # (rows, tokens, r)
    return scale * torch.bmm(h, B[k].mT)                       # (rows, tokens, out)
    ### END SOLUTION

check.gathered_update(gathered_update)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `A[which]` stacks the right $A$ for every row: (rows, r, in). `torch.bmm` multiplies stack by stack. What does `A[-1]` mean in Python, and how do you make such rows zero?
#
# </details>
#
# ### The same as the package
#
# The package stacks each adapter once, however many rows share it, and fills smaller ranks up with zeros, which add nothing. Here is its product, and rows that went through it, beside rows that went through their own piece one by one.

# %%
from minipeft.methods.lora import LowRank
print(inspect.getsource(serve.Gathered._add_low_rank))

small, large = (LowRank(mp.LoRA(rank=r, alpha=2 * r), 48, 64) for r in (2, 7))
for piece in (small, large):
    nn.init.normal_(piece.B)
rows, x, y = [small, None, large, small], torch.randn(4, 5, 64), torch.randn(4, 5, 48)
with torch.no_grad():
    one_by_one = torch.stack([y[i] if piece is None else piece(x[i], y[i].clone()) for i, piece in enumerate(rows)])
    together = serve.Gathered(rows)(x, y.clone())
assert torch.allclose(together, one_by_one, rtol=1e-4, atol=1e-4) and not torch.allclose(together, y)
print("rows of ranks 2, none, 7 and 2, together: the same as one by one")

# %% [markdown]
# ### A shelf
#
# `mp.Serve(model)` opens a socket at every linear layer once, and keeps adapters beside the model as nothing but tensors. So loading the last should cost what loading the first did; the cell times both. Choosing another one is a look into a table. And several threads may ask at once.

# %%
server, _ = mp.load_base(BASE)
shelf = mp.Serve(server)                                       # limit=200 would put the longest unused one out
loading = []
for i in range(mp.pick(smoke=4, cpu=60, gpu=200)):
    began = time.perf_counter()
    shelf.load(f"user {i}", list(folders.values())[i % 3])
    loading.append(1000 * (time.perf_counter() - began))
for skill, folder in folders.items():
    shelf.load(skill, folder)

tenth = max(1, len(loading) // 10)
first_ms, last_ms = statistics.median(loading[:tenth]), statistics.median(loading[-tenth:])
print(f"{shelf}: {len(shelf.names) * 4 * trained / 1e6:,.0f} MB of adapters beside {base_bytes / 1e6:,.0f} MB of base")
print(f"loading: {first_ms:.0f} ms at first, {last_ms:.0f} ms with {len(loading)} on the shelf")

# %% [markdown]
# The same question four times, with three skills and without any, in one batch. As the oracle you take the model from above, which has the adapters attached, one at a time.

# %%
asked = held_out["cards"][0]["prompt"]
ask_for = ["cards", "names", "mood", None]
ids = tokenizer([asked] * len(ask_for), return_tensors="pt").to(server.device)
with torch.no_grad():
    with shelf.rows(ask_for) as rows:
        together = server(**rows.inputs(**ids)).logits         # (4, tokens, vocabulary)
    for i, name in enumerate(ask_for):
        with mp.active(model, name):
            single = model(input_ids=ids.input_ids[i:i + 1]).logits[0]
        off = ((together[i] - single).abs().max() / single.abs().max()).item()
        assert off < 1e-4, (name, off)
        print(f"row {i}, {name or 'no adapter':10}: the logits differ from its adapter alone by {off:.1g} of the largest")
    assert not torch.allclose(together[0], together[1], rtol=1e-3)

try:
    mp.generate(server, tokenizer, [asked], adapters=["card"])
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ### What it costs
#
# A batch with one adapter for all rows, the same batch with a different one in each row, together, and the same rows one after the other. Again in turns. And four ways to come from one skill to another.

# %%
def clock(work) -> float:
    """Seconds until the device has finished."""
    done = getattr(torch, server.device.type).synchronize
    done()
    began = time.perf_counter()
    work(), done()
    return time.perf_counter() - began

users = [f"user {i}" for i in range(mp.pick(smoke=3, cpu=16, gpu=64))]
tokens = torch.randint(1000, (len(users), 16), generator=torch.Generator().manual_seed(0)).to(server.device)

def forward(names, rows):
    with torch.no_grad(), shelf.rows(names):
        server(input_ids=rows)

jobs = {"one adapter for all rows": lambda: forward(users[:1] * len(users), tokens),
        "a different adapter in each row, together": lambda: forward(users, tokens),
        "a different adapter in each row, one after the other": lambda: [forward([u], tokens[i:i + 1]) for i, u in enumerate(users)]}
seconds = {name: [] for name in jobs}
for turn in range(mp.pick(smoke=2, cpu=8, gpu=16)):
    for name in jobs:
        seconds[name].append(clock(jobs[name]))
shared, mixed, after = ([t[1:] for t in seconds.values()])     # the first turn warms up

# %%
mixed_ratio = statistics.median(a / b for a, b in zip(mixed, shared))
after_ratio = statistics.median(a / b for a, b in zip(after, mixed))
print(f"{len(users)} rows, as many adapters: {mixed_ratio:.2f} times one adapter for all; one after the other {after_ratio:.1f} times that")
display(lab.table([{f"{len(users)} rows of {tokens.shape[1]} tokens": name, "ms": 1000 * statistics.median(t[1:])} for name, t in seconds.items()]))

def look_up(name):
    with shelf.rows([name]) as rows:
        for path in mp.adapters(model)["cards"].pieces():
            rows.get(path)

def remerge():
    mp.merge(model, "cards")
    mp.unmerge(model, "cards")

mp.activate(model, "cards")
switching = {"ask the shelf for another": lambda: look_up("mood"), "load it from disk": lambda: shelf.load("mood", folders["mood"]),
             "take one out of the weights, merge one in": remerge, "load a merged copy of the base": lambda: mp.load_base(BASE)}
switch_ms = {name: 1000 * statistics.median(clock(work) for _ in range(mp.pick(smoke=1, cpu=3, gpu=3))) for name, work in switching.items()}
mp.activate(model, None)
lab.table([{"to another skill": name, "ms": ms} for name, ms in switch_ms.items()])

# %% [markdown]
# How to read it: the two products of LoRA are in all three rows. What *together* adds is the stacking of the factors, and products that are batched instead of large. What it saves is that $W$ is read once for all rows instead of once for each. A few percent may be noise, as above: run the cell again and see whether they stay.
#
# In the second table the first line only chooses: the stacking comes with the next pass. The second reads a small file. The third writes the weights that the adapter touches, twice, and serves one skill at a time. The last reads a whole base, here a small one that the machine most likely still has in memory. And a merged copy has to be kept for every skill.
#
# ### A new version while answers are made
#
# An adapter on the shelf is never changed, only replaced. Whoever has asked for the old one keeps it to the end of the answer. So no answer mixes two versions. The cell replaces `cards` in the middle of one.

# %%
with torch.no_grad():
    with shelf.rows(["cards"]) as rows:
        before = server(input_ids=ids.input_ids[:1]).logits
        shelf.load("cards", folders["mood"])                   # somebody puts another version there
        assert torch.equal(server(input_ids=ids.input_ids[:1]).logits, before)
        print("this answer goes on with the version that it began with")
    with shelf.rows(["cards"]) as rows:
        assert not torch.equal(server(input_ids=ids.input_ids[:1]).logits, before)
        print("the next one has the new version")
shelf.load("cards", folders["cards"])

# %% [markdown]
# ### The same question, another skill
#
# In a live notebook, choose an adapter and type a question; the answer comes from the same base. Elsewhere you see the table: all its answers were made in one mixed batch. Read it along the diagonal: has each skill its format? Then compare with the right answers, which stand under *Three skills*: is it also right? Where a cell is empty, the adapter answered without a word.

# %% tags=["figure"]
class SwitchSkill:
    """One question, any adapter: buttons where a kernel runs, a table of answers elsewhere."""

    def __init__(self, questions: list[str]):
        self.questions, self.names = questions, ["base", *folders]
        asked = [(q, name) for q in questions for name in self.names]
        answers = dict(zip(asked, self.answer([q for q, _ in asked], [name for _, name in asked])))
        self.first = answers[asked[0]]
        self.table = lab.table([{"question": q.strip()[:70]} | {name: answers[q, name] for name in self.names} for q in questions])

    def answer(self, questions, names):
        made = mp.generate(server, tokenizer, questions, adapters=[None if name == "base" else name for name in names],
                           max_new_tokens=mp.pick(smoke=2, cpu=20, gpu=24))
        return [(text.strip().splitlines() or [""])[0][:90] for text in made]

    def widget(self):
        from ipywidgets import Label, Layout, Text, ToggleButtons, VBox
        question = Text(value=self.questions[0].strip(), description="question", continuous_update=False, layout=Layout(width="46em"))
        skill, said = ToggleButtons(options=self.names, description="adapter"), Label(value=self.first)

        def ask(change):
            said.value = self.answer([question.value + ("" if "Mood:" in question.value else "\n")], [skill.value])[0]

        question.observe(ask, names="value")
        skill.observe(ask, names="value")
        return VBox([question, skill, said])

    def _repr_mimebundle_(self, include=None, exclude=None):
        from minipeft.lab.quizzes import with_widget
        return with_widget({"text/plain": repr(self.table), "text/html": self.table._repr_html_()}, self.widget)

SwitchSkill([rows[0]["prompt"] for rows in held_out.values()])

# %% [markdown]
# ## Save, open elsewhere
#
# The folders on disk are PEFT's format. So PEFT opens them, and so does whatever reads PEFT's. If you see a line on a kernel that failed to load: it comes from bitsandbytes, which PEFT imports, and is about 4-bit products, which nothing is using here.

# %%
peft_error = None
warnings.filterwarnings("ignore", category=FutureWarning)      # peft still uses old names of transformers
try:
    from peft import PeftModel
    theirs = PeftModel.from_pretrained(mp.load_base(BASE)[0], folders["cards"]).eval()
    with torch.no_grad(), mp.active(model, "cards"):
        ours, opened = model(**question).logits, theirs(**question).logits
    peft_error = ((ours - opened).abs().max() / ours.abs().max()).item()
    assert peft_error < 1e-4
    print(f"opened by Hugging Face PEFT: the logits differ by {peft_error:.1g} of the largest")
    del theirs
except ImportError:
    print("peft is not installed here, so that comparison is skipped (pip install peft)")
for file in sorted(folders["cards"].iterdir()):
    print(f"{file.name:28} {file.stat().st_size / 1e3:10,.1f} kB")

# %% [markdown]
# [vLLM](https://docs.vllm.ai/en/latest/features/lora.html) serves such folders for many users on a GPU. This is **not run here**, and the folders above are temporary: save yours under `skills/` first, with `mp.save_adapter`.
#
# ```bash
# vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 8 \
#     --lora-modules cards=skills/cards names=skills/names mood=skills/mood
#
# curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \
#     -d '{"model": "mood", "prompt": "A film to forget.\nMood:", "max_tokens": 2, "temperature": 0}'
# ```
#
# `"model"` names the adapter; the base's own name means none. Train beside the base that you will serve. The small model embedded in this course went through a 4-bit format, so its weights are not quite those on the Hub, and an adapter trained beside the one is only nearly right beside the other.
#
# ## What it cost, and what you predicted
#
# The second number is counted, the third computed from weights. The first and the fourth are times and carry the clock's error; so do both percentages in the last table. *Merged, percent slower* is nothing but error.

# %%
rounding16 = merged[1]["rounding, percent of the update"]
measured = dict(zip(predicted, (alone, counts["LoRA on q and v, merged"].total() - at_rest.total(), rounding16, mixed_ratio)))
row = {"method": "LoRA, served", "rank": lora.rank, "trained": trained, "minutes": runs["cards"].seconds / 60, "file MB": file_bytes / 1e6,
       "beside, percent slower": 100 * (ratio["LoRA on q and v", 1] - 1), "merged, percent slower": merged_off, "loading ms": last_ms}
lab.record(
    operators={way: {"products": matrix_products(c), "operators": c.total()} for way, c in counts.items()},
    latency=latency, skills={"base": bare} | own | {"steps": plan.steps, "rate": plan.lr, "seconds": {s: r.seconds for s, r in runs.items()}},
    merged=merged, combined=combined, loading={"first ms": first_ms, "last ms": last_ms, "loaded": len(loading), "switch ms": switch_ms},
    batch={"rows": len(users), "mixed / shared": mixed_ratio, "one after the other / mixed": after_ratio,
           "ms": {name: 1000 * statistics.median(t[1:]) for name, t in seconds.items()}},
    checkpoint={"bytes": file_bytes, "base bytes": base_bytes, "peft error": peft_error}, predictions=measured,
)
display(lab.table([{"": key, "predicted": predicted[key], "measured": value} for key, value in measured.items()]))
lab.table([row])

# %% tags=["figure"]
stages, blocks = 4, 32                                         # q k v, o, gate up, down; a Llama of 32 blocks
chain = {"bare": stages * blocks, "adapters": (stages + 2 * 2) * blocks, "one": (stages + 2) * blocks, "all": 2 * stages * blocks}
eight, of_one = 8_030_261_248, 41_943_040                      # Llama-3-8B; LoRA of rank 16 on its seven projections
copies, together_gb = 100 * 2 * eight / 1e9, (2 * eight + 100 * 2 * of_one) / 1e9

lab.quiz([
    {"question": "Why do bottleneck adapters slow a model down?", "right": "each stands behind a layer, and what follows must wait for its two small products",
     "choices": {"each stands behind a layer, and what follows must wait for its two small products": "They lengthen the chain. With little work at a time the machine idles while it waits.",
                 "they train more numbers than LoRA": "What is trained does not matter when nobody trains, and sizes can be chosen alike.",
                 "their arithmetic is as large as the model's": "It is a few percent: see the first column of the last latency table.",
                 "they have to be loaded from disk in each pass": "They are in memory, like the rest."}},
    {"question": "By which mechanism does LoRA reach no overhead after deployment?", "right": "$W + sBA$ is computed once and stored in $W$'s place",
     "choices": {"$W + sBA$ is computed once and stored in $W$'s place": "Same shape, same operators: you counted them.",
                 "$A$ and $B$ are too small to be noticed": "Unmerged they are more operators in every pass: you counted them.",
                 "$A$ and $B$ run at the same time as $W$": "$A$ can, $B$ waits for $A$. And both are work.",
                 "the adapter is skipped where it is not needed": "Nothing is skipped."}},
    {"question": "A Llama of 32 blocks, a block with the stages (q, k, v), o, (gate, up), down. Two adapters in a block: how long is the chain of products?",
     "right": str(chain["adapters"]),
     "choices": {str(chain["bare"]): "That is the bare model, or a merged LoRA.",
                 str(chain["one"]): "That is one adapter a block.",
                 str(chain["adapters"]): "Four stages and two products behind two of them: eight for each block.",
                 str(chain["adapters"] + blocks): "Two products for each adapter, and nothing else."}},
    {"question": "100 customers, each with a LoRA of rank 16 on Llama-3-8B, everything in 16 bits. How much memory do the weights take if one base serves all?",
     "right": f"{together_gb:.1f} GB",
     "choices": {f"{together_gb:.1f} GB": "One base and a hundred small files.",
                 f"{copies:,.0f} GB": "That is a merged copy for each.",
                 f"{2 * eight / 1e9:.1f} GB": "That is the base without any adapter.",
                 f"{100 * 2 * of_one / 1e9:.1f} GB": "That is the adapters without a base."}},
    {"question": "You merged, and then you unmerge by subtracting. In bfloat16, is the base back?", "right": "nearly: rounding leaves an error in some weights",
     "choices": {"nearly: rounding leaves an error in some weights": "You saw what is left after a hundred rounds. Keep the original.",
                 "yes, addition and subtraction cancel": "On paper. In floating point the sum is rounded, and the difference again.",
                 "no, the update stays in it": "Nearly all of it goes.",
                 "only if the rank is small": "Rounding does not ask for the rank."}},
    {"question": "At one place three trimmed updates say +3, -1 and -1, a fourth was trimmed to 0. What does TIES take?", "right": "3",
     "choices": {"3": "The sum is +1, so plus is elected; one entry has that sign, and the mean of one is itself.",
                 "-1": "Two against one, but sizes decide, not heads.",
                 "0.25": "That is the plain mean.",
                 "1": "That is the sum: it would be left if nobody were elected."}},
    {"question": "What does `linear`, adding $A$ to $A$ and $B$ to $B$, contain that nobody trained?", "right": "$B_1A_2$ and $B_2A_1$",
     "choices": {"$B_1A_2$ and $B_2A_1$": "$(B_1+B_2)(A_1+A_2)$ has four terms.",
                 "nothing": "Multiply it out.",
                 "a new base": "The base is not touched.",
                 "noise from rounding": "There is some, but that is not it."}},
    {"question": "In a mixed batch, a row that wants no adapter has the number -1, and the code takes `A[which]`. What happens?",
     "right": "it silently gets the last adapter",
     "choices": {"it silently gets the last adapter": "That is what -1 means to an index. Make the update of such rows zero.",
                 "an error": "-1 is a valid index.",
                 "its update is zero": "Only if somebody makes it so.",
                 "it gets the mean of all": "An index takes one."}},
    {"question": "One task, one model, as fast as can be; or two hundred tasks, each used now and then. What do you do?", "right": "merge for the first, one base with a shelf for the second",
     "choices": {"merge for the first, one base with a shelf for the second": "The first saves every operator, the second two hundred copies of the base.",
                 "merge in both cases": "Two hundred merged copies, or a merge at each change: look at the table of switching.",
                 "never merge": "Then the single task pays for products it need not have.",
                 "combine two hundred adapters into one": "Three already disturbed each other."}},
])

# %% [markdown]
# ## Recap
#
# - An adapter behind a layer lengthens the chain of products. A merged LoRA is another number in the same places: the same operators, counted.
# - Measure in turns, compare within a turn, take the median. Time something whose answer you know, such as a merged LoRA: what it shows is the clock's error.
# - Merge in full precision where you can, say what rounding took, keep the original: then the way back is exact.
# - Adding updates is easy; they disturb each other. TIES and DARE thin them out first. Measure every skill afterwards, one by one.
# - One base can serve many adapters in one batch: the frozen product once for all rows, the small ones gathered.
# - Files in PEFT's format open in PEFT and are served by vLLM.
#
# ## Further reading
#
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685): section 3 (why adapters and prompts cost), Table 1, section 4.2 (switching)
# - Rücklé et al. 2021, [AdapterDrop](https://arxiv.org/abs/2010.11918): what adapters cost, and dropping some
# - Ilharco et al. 2022, [Editing Models with Task Arithmetic](https://arxiv.org/abs/2212.04089)
# - Yadav et al. 2023, [TIES-Merging](https://arxiv.org/abs/2306.01708); Yu et al. 2023, [DARE](https://arxiv.org/abs/2311.03099)
# - Chen et al. 2023, [Punica](https://arxiv.org/abs/2310.18547); Sheng et al. 2023, [S-LoRA](https://arxiv.org/abs/2311.03285): thousands of adapters on one GPU
