# ---
# jupyter:
#   minipeft:
#     records: [main, sizes, rates, sentiment, cards, stages, order, checkpoint]
# ---

# %% [markdown]
# # 11 · Hybrids: several methods on one model
#
# **In one sentence:** methods sit in different sockets, so they combine without special code: attach twice, give each part a learning rate of its own, and compare at equal size.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/11_hybrids.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - combine a soft prompt, a prefix, an adapter, a LoRA and a 4-bit base, and count what trains
# - say in which order pieces act on one module, and when the order matters
# - train the parts together or one after the other, each at its own rate
# - tell whether a hybrid beats its parts, or is only larger
# - merge the parts that can be merged, save all as one folder, open each part elsewhere
#
# **You need:** soft prompts (chapter 2), adapters (chapter 4), LoRA (chapter 5). Prefixes (chapter 3) and 4 bits (chapters 7 and 9) come up.
#
# **The papers:** He et al. 2022, [arXiv:2110.04366](https://arxiv.org/abs/2110.04366), join a prefix and a parallel adapter (section 4, *mix-and-match*). Mao et al. 2022, *UniPELT*, [arXiv:2110.07577](https://arxiv.org/abs/2110.07577), join prefix, adapter and LoRA. You build on equation 3 of [LoRA](https://arxiv.org/abs/2106.09685) and figure 2 of [adapters](https://arxiv.org/abs/1902.00751).

# %% tags=["setup"]
import hashlib, inspect, math, random, re, statistics, subprocess, sys, tempfile, time, warnings
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

from pathlib import Path
import torch, transformers
from torch import nn
import minipeft as mp
from minipeft import lab, profiles, sockets, training
from minipeft.checks import ch11_hybrids as check

lab.seed_everything(0)
print(f"minipeft {mp.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; profile {mp.profile().name} on {mp.profile().device}")
lab.runtime_box("11_hybrids")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your answers beside the measured ones.
#
# 1. A hybrid has a LoRA of rank 8 on query and value, and a prompt of 16 tokens. How many **percent** of its trained numbers are the prompt's?
# 2. On the language model, the prompt and the LoRA of a hybrid get rates of their own, each the best of a few. What is the prompt's rate **divided by** the LoRA's?
# 3. Seven candidates of about the same size: prompt, prefix, adapter, LoRA, and three hybrids with LoRA. Is the best one a part or a hybrid: `"part"` or `"hybrid"`?
# 4. A LoRA knows some facts. It is frozen, and a 16-token prompt learns to ask it for one of them. How many **percent** of the test questions does the pair answer right?

# %%
predicted = {"percent that is the prompt's": None, "prompt's rate over LoRA's": None,
             "best at equal size": None, "percent right, prompt on LoRA": None}

# %% [markdown]
# ## The problem
#
# An article tells of a start-up: LoRA for the general knowledge, a soft prompt of 16 tokens on top for one task, *accuracy jumped 7 %*. Was it the combination, or only more training? You cannot tell from one number. In this chapter you build that pair, and ask both questions.
#
# Here is the frozen model on a few medicines. It is asked for a card in one fixed format; the wordings of the test questions are not trained on. *format* is kept, *name* copied, *facts* right (each of four on its own), *all_facts* right. This is teaching data, not medical advice.

# %%
BASE = profiles.base_model()
model, tokenizer = mp.load_base(BASE)
names = sorted({e["card"] for e in mp.load_data("drug_cards")})
chosen, CARD_BATCH = mp.pick(smoke=2, cpu=6, gpu=32), mp.pick(smoke=2, cpu=4, gpu=8)
few = names[:: len(names) // chosen][:chosen]
cards = {split: [e for e in mp.load_data("drug_cards", split) if e["card"] in few and e["direction"] == "forward"]
         for split in ("train", "validation", "test")}

def exam(model) -> dict[str, float]:
    """Shares of the test questions answered right, letter for letter."""
    questions = cards["test"][:: mp.pick(smoke=3, cpu=1, gpu=1)]
    answers = mp.generate(model, tokenizer, [e["prompt"] for e in questions], max_new_tokens=mp.pick(smoke=2, cpu=24, gpu=24))
    return mp.score_cards(questions, answers)

frozen = exam(model)
print(f"{len(few)} medicines, {len(cards['train'])} questions to learn from, {len(cards['test'])} to be asked\n")
print(cards["train"][0]["prompt"] + cards["train"][0]["completion"])
lab.table([{"model": "frozen"} | frozen])

# %% [markdown]
# ## The idea
#
# A frozen model has three sockets. A method fills one of them, and leaves the others as they are:
#
# | socket | piece | methods |
# |---|---|---|
# | embedding | $e \to [P; e]$ | prompt tuning, P-tuning |
# | key/value | $(K, V) \to ([P_K; K], [P_V; V])$ | prefix tuning |
# | module | $(x, y) \to y'$ | adapters, LoRA, DoRA, (IA)³ |
#
# Where two pieces $f$ and $g$ sit on **one** module $W$, they act in the order in which they were attached:
#
# $$y = W x, \qquad y' = f(x, y), \qquad y'' = g(x, y')$$
#
# Both see the same $x$; $g$ sees what $f$ has made of $y$. The 4-bit base needs no socket: it is another way to store $W$.
#
# So a hybrid is no method of its own. You call `mp.attach` twice. The cell does that for four pairs on fresh copies of the model. It counts, takes one step of training, and compares the frozen bytes.

# %%
def fingerprint(model) -> str:
    """A hash of the base's bytes; the adapters are not in its `state_dict`."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

def numbers(adapter) -> int:
    """Numbers of an adapter, without its copy of a classifier's head."""
    pieces = [p for p in adapter.pieces().values() if not isinstance(p, sockets.OwnHead)]
    return sum(p.numel() for piece in pieces for p in piece.parameters())

lora = mp.LoRA(rank=8, targets=("q_proj", "v_proj"))
pairs = {"prompt + LoRA": (lora, mp.PromptTuning(16, init="vocab")),
         "prefix + LoRA": (lora, mp.PrefixTuning(4, reparameterize=False)),
         "adapter + LoRA": (lora, mp.BottleneckAdapter(8, placement="pfeiffer")),
         "QLoRA + adapter": (lora, mp.BottleneckAdapter(8, placement="pfeiffer"))}

# %%
rows, where = [], {}
for pair, methods in pairs.items():
    fresh, _ = mp.load_base(BASE)
    if pair.startswith("QLoRA"):
        mp.quantize(fresh)
    before = fingerprint(fresh)
    first, second = (mp.attach(fresh, method, name) for method, name in zip(methods, ("first", "second")))
    untrained = mp.evaluate(fresh, tokenizer, cards["train"][:2])["loss"]
    one_step = mp.fit(fresh, tokenizer, cards["train"][:2], mp.FitConfig(steps=1, batch_size=2, lr=1e-3, warmup=0, progress=False))
    assert fingerprint(fresh) == before                        # no frozen byte has moved
    where[pair] = [*first.sites, *second.sites, *([("4 bits", "")] if pair.startswith("QLoRA") else [])]
    rows.append({"hybrid": pair, "LoRA": numbers(first), "the other part": numbers(second),
                 "together": mp.parameter_report(fresh).trainable, "loss, untrained": untrained, "gradient of step 1": one_step.history[0]["grad_norm"]})
    assert rows[-1]["together"] == rows[-1]["LoRA"] + rows[-1]["the other part"]
    del fresh
width = model.get_input_embeddings().weight.shape[1]
assert rows[0]["the other part"] == mp.PromptTuning(16).parameter_count(width)
prompt_percent = 100 * rows[0]["the other part"] / rows[0]["together"]
print(f"the frozen model: loss {mp.evaluate(model, tokenizer, cards['train'][:2])['loss']:.4g}")
lab.table(rows)

# %% tags=["figure"]
from minipeft.lab.plots import COLOURS, SOCKET_COLOURS, new_figure

columns = ["embedding", "key/value", "module:\nattention", "module:\nfeed-forward", "weights\nin 4 bits"]

def column(socket: str, path: str) -> int:
    if socket == "module":
        return 2 if "attn" in path or "attention" in path else 3
    return {"embedding": 0, "key/value": 1, "4 bits": 4}[socket]

figure, ax = new_figure(width=8.6, height=2.9)
for line, (pair, sites) in enumerate(where.items()):
    used = {}
    for socket, path in sites:
        used.setdefault(column(socket, path), []).append(socket)
    ax.plot([min(used), max(used)], [line, line], color=COLOURS["grey"], linewidth=1, zorder=1)
    for place, found in used.items():
        ax.plot(place, line, "o", markersize=19, color=SOCKET_COLOURS.get(found[0], COLOURS["purple"]), zorder=2)
        if found[0] != "4 bits":
            ax.text(place, line, len(found), ha="center", va="center", color="white", fontsize=9, zorder=3)
ax.set_xticks(range(5), columns)
ax.set_yticks(range(len(where)), where)
ax.xaxis.tick_top()
ax.tick_params(length=0)
ax.set(xlim=(-0.6, 4.6), ylim=(len(where) - 0.5, -0.6))
ax.grid(visible=False)
for side in ax.spines.values():
    side.set_visible(False)
figure

# %% [markdown]
# The table: a LoRA starts from an unchanged model, a small adapter nearly so. A prompt, a prefix and 4 bits move the loss before any training, and a hybrid starts where its parts put it. The figure is read from the adapters themselves: which sockets each hybrid fills, and with how many pieces. No two of these parts want the same place, so nothing had to be decided. (The key/value socket is a place *inside* attention, beside the linears that LoRA changes.)
#
# ### Exercise 1: a hybrid for a budget · 10 minutes · easy
#
# You may train `budget` numbers. Choose the largest rank of LoRA that leaves room for a prompt of at least `least` vectors. Then give what is left to the prompt.
#
# <details>
# <summary>Hint</summary>
#
# One rank costs $\sum (\mathrm{out} + \mathrm{in})$ over all weights. One vector of the prompt costs `width`, once: it is not in every layer. Twice `//`.
#
# </details>

# %%
def hybrid_budget(
    budget: int, width: int, shapes: list[tuple[int, int]], least: int
) -> tuple[int, int]:
    """(rank, length); shapes are (out, in) of each weight that gets a LoRA."""
    ### BEGIN SOLUTION
    one_rank = sum(out + in_ for out, in_ in shapes)
    rank = (budget - least * width) // one_rank
    return rank, (budget - rank * one_rank) // width
    ### END SOLUTION

check.hybrid_budget(hybrid_budget)

# %% [markdown]
# ## By hand
#
# Take pencil and paper. Everything is one number: $W = 3$, $x = 2$. A LoRA with $sBA = -2$. An adapter $y \to y + 0.5 \max(0, y)$.
#
# 1. LoRA first, the adapter behind it: $y''$?
# 2. The adapter first: $y''$?
# 3. No adapter, but a second LoRA with $sBA = 1$. Does the order matter?
# 4. In which of 1 and 2 can you fold the LoRA into $W$, and get the same $y''$?

# %%
W, x, low, other = 3.0, 2.0, -2.0, 1.0

def adapter_on(y: float) -> float:
    return y + 0.5 * max(0.0, y)

lora_first, adapter_first = adapter_on(W * x + low * x), adapter_on(W * x) + low * x
folded = adapter_on((W + low) * x)
print(f"1. {lora_first:g}   2. {adapter_first:g}   3. {W * x + low * x + other * x:g} either way   4. folded: {folded:g}, so in case 1 only")
assert folded == lora_first != adapter_first and W * x + low * x + other * x == W * x + other * x + low * x

# %% [markdown]
# Two LoRAs add: $Wx + \Delta_1 x + \Delta_2 x$, in any order. An adapter bends what it gets, so it matters whether LoRA's update is in it already.
#
# ## Build it
#
# ### Step 1: two pieces on one module
#
# ### Exercise 2: a LoRA, and an adapter behind it · 10 minutes · medium
#
# Write it for one frozen linear, with ReLU and without biases. The adapter's skip carries everything that arrives.
#
# <details>
# <summary>Hint</summary>
#
# Two lines. First $y' = Wx + sBAx$. Then $y' + W_\mathrm{up}\,\mathrm{relu}(W_\mathrm{down}\, y')$. With rows as examples, $Wx$ is `x @ W.T`.
#
# </details>

# %%
def lora_then_adapter(
    x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float,
    W_down: torch.Tensor, W_up: torch.Tensor,
) -> torch.Tensor:
    """x (batch, in), W (out, in), A (r, in), B (out, r), W_down (m, out), W_up (out, m) -> (batch, out)."""
    ### BEGIN SOLUTION
    y = x @ W.T + s * x @ A.T @ B.T
    return y + (y @ W_down.T).relu() @ W_up.T
    ### END SOLUTION

check.lora_then_adapter(lora_then_adapter)

# %% [markdown]
# On the real model, with all weights of the parts drawn at random (at the start a LoRA does nothing, and any order would look right). `mp.activate(model, [first, second])` sets the order. How far do the logits move when the two are swapped? (A prefix has no order to the others: it is in every layer's attention, a prompt in front of the first.)

# %%
down = ("down_proj",)
on_one_module = {
    "two LoRAs": (mp.LoRA(rank=4, targets=down), mp.LoRA(rank=2, targets=down)),
    "LoRA, adapter: same modules": (mp.LoRA(rank=4, targets=down), mp.BottleneckAdapter(4, placement="pfeiffer")),
    "LoRA, adapter: other modules": (lora, mp.BottleneckAdapter(4, placement="pfeiffer")),
    "two soft prompts": (mp.PromptTuning(3, init="vocab"), mp.PromptTuning(2, init="vocab")),
    "prompt, prefix": (mp.PromptTuning(3, init="vocab"), mp.PrefixTuning(2, reparameterize=False)),
}
question = tokenizer(cards["test"][0]["prompt"], return_tensors="pt").to(model.device)

# %%
def randomise(adapter, scale: float = 0.03) -> None:
    """Far from the start, where some parts do nothing yet; prompts are random already."""
    for name, p in adapter.named_parameters():
        if name.split(".")[-1] not in ("P", "K", "V"):
            nn.init.normal_(p, std=scale)

def swapped(methods) -> float:
    """How far the logits move when two parts change places, of the largest logit."""
    for name, method in zip("ab", methods):
        randomise(mp.attach(model, method, name))
    with torch.no_grad():
        mp.activate(model, ["a", "b"]), (one := model(**question).logits)
        mp.activate(model, ["b", "a"]), (two := model(**question).logits)
    mp.detach(model, "a"), mp.detach(model, "b")
    return ((one - two).abs().max() / one.abs().max()).item()

# %%
lab.seed_everything(0)
at_first = fingerprint(model)
order = {pair: swapped(methods) for pair, methods in on_one_module.items()}
assert fingerprint(model) == at_first
assert max(order["two LoRAs"], order["LoRA, adapter: other modules"], order["prompt, prefix"]) < 1e-4
assert min(order["LoRA, adapter: same modules"], order["two soft prompts"]) > 1e-3
lab.table([{"parts": pair, "logits move by": moved, "order matters": moved > 1e-3} for pair, moved in order.items()])

# %% [markdown]
# ### Step 2: one part learns, the others act
#
# *Frozen* and *not active* are two different things. A frozen part still acts; it only gets no gradient. An inactive part is not there. `mp.adapters(model)[name].requires_grad_(False)` does the first, `mp.activate` the second.
#
# Libraries differ here. In Hugging Face PEFT, activating a list of adapters made the frozen ones train again: [issue 1374](https://github.com/huggingface/peft/issues/1374).
#
# ### Exercise 3: train one part · 15 minutes · medium
#
# Take one step of plain gradient descent, $p \leftarrow p - \eta\, \partial\mathrm{loss} / \partial p$, for the part called `name`. All parts act, and afterwards only this one requires gradients. The part called `name` may have been frozen before. The check compares every number of the model, base included.
#
# <details>
# <summary>Hint</summary>
#
# `mp.adapters(model)` is a dict of names and modules. Freeze or thaw each with `requires_grad_`. Then `torch.optim.SGD` over one adapter's `.parameters()`, `backward`, `step`.
#
# </details>

# %%
def train_one_part(model: nn.Module, name: str, ids: torch.Tensor, lr: float) -> None:
    """One step for the adapter `name`; the loss is model(input_ids=ids, labels=ids).loss. ids (B, T)."""
    ### BEGIN SOLUTION
    for other, adapter in mp.adapters(model).items():
        adapter.requires_grad_(other == name)
    optimizer = torch.optim.SGD(mp.adapters(model)[name].parameters(), lr=lr)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    ### END SOLUTION

check.train_one_part(train_one_part)

# %% [markdown]
# And a trap that raises no error. An optimizer knows the parameters that it was **built** with. Attach a part afterwards, and it gets gradients, but nobody applies them.

# %%
mp.attach(model, lora, "lora")
too_early = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
late = mp.attach(model, mp.PromptTuning(16, init="vocab"), "prompt")
P = next(late.parameters())
start = P.detach().clone()
model(**question, labels=question["input_ids"]).loss.backward()
too_early.step()
print(f"the prompt's gradient has a norm of {P.grad.norm():.3g}; the step moved it by {(P - start).abs().max():g}")
assert P.grad.norm() > 0 and torch.equal(P, start)
mp.detach(model, "prompt"), mp.detach(model, "lora")
assert fingerprint(model) == at_first

# %% [markdown]
# `mp.fit` builds its optimizer when you call it, so it knows what is attached by then.
#
# ### Step 3: a rate for each part
#
# `mp.fit` has one learning rate. That was enough for one method. Chapters 2 and 5 used rates far apart: can a prompt and a LoRA share one?
#
# In its first step, Adam moves every number by about the rate, however large or small the gradient. So this step, of rate $\eta$, lowers the loss by about
#
# $$\eta \sum_i \left| \frac{\partial\, \mathrm{loss}}{\partial p_i} \right|$$
#
# The sum says how much a rate *buys* in each part. Compute it for both parts of a hybrid, at the start, and check it with a small step along the signs. (A gradient of exactly zero moves nothing: a LoRA starts with $B = 0$, so $A$ has no gradient yet. Of its numbers only $B$ counts here.)

# %%
def leverage(model, data, eta: float = 1e-4) -> list[dict]:
    """For each adapter: numbers, Σ|∂loss/∂p|, and what a step of -eta sign(∂loss/∂p) gives, divided by eta."""
    rows = training.encode(model, tokenizer, data)
    def loss_now():
        loss, _, n = training.loss_of(model, rows, tokenizer.pad_token_id or 0)
        return loss / n
    first, found = loss_now(), []
    first.backward()
    for name, adapter in mp.adapters(model).items():
        moving = [p for p in adapter.parameters() if p.grad is not None]
        with torch.no_grad():
            for sign in (1, -1):                               # a step, measured, and back
                for p in moving:
                    p -= sign * eta * p.grad.sign()
                after = loss_now().item() if sign == 1 else after
        found.append({"part": name, "numbers": numbers(adapter), "Σ|gradient|": sum(p.grad.abs().sum().item() for p in moving),
                      "measured with a small step": (first.item() - after) / eta})
    model.zero_grad()
    return found

# %%
half = rf"model\.layers\.({'|'.join(str(i) for i in range(0, model.config.num_hidden_layers, 2))})\.self_attn\.v_proj"
one_rank = sum(sum(model.get_submodule(p).weight.shape) for p in mp.anatomy.match(model, half))
vectors = round(one_rank / width)                              # of a prompt as large as one rank
card = cards["train"][0]
solved = tuple((tokenizer((card["prompt"] + card["completion"] + "\n\n") * 9)["input_ids"] * 9)[: 2 * vectors])
mp.attach(model, mp.LoRA(rank=1, alpha=2, targets=half), "lora")
mp.attach(model, mp.PromptTuning(vectors, init="text", text=solved[:vectors]), "prompt")
buys = leverage(model, cards["train"][: mp.pick(smoke=2, cpu=8, gpu=16)])
mp.detach(model, "prompt"), mp.detach(model, "lora")
ratio_at_start = buys[0]["Σ|gradient|"] / buys[1]["Σ|gradient|"]
stronger, weaker = ("LoRA", "prompt") if ratio_at_start > 1 else ("prompt", "LoRA")
times = max(ratio_at_start, 1 / ratio_at_start)
print(f"at one rate, a first step lowers the loss {times:.3g} times as much in the {stronger} as in the {weaker}, which has as many numbers")
lab.table(buys)

# %% [markdown]
# That is the start only, and to first order. Later $A$ moves too, and a rate must last for all the steps. So the sum does not tell you the best rates. A sweep does, and for that each part needs a rate of its own. Torch's optimizers take *parameter groups* for that: a list of dicts, each with its own `"lr"`. A schedule then changes all of them in every step.
#
# ### Exercise 4: find the bug · 10 minutes · medium
#
# Published schedules lose the rates of the groups. In DeepSpeed, [pull request 8171](https://github.com/deepspeedai/DeepSpeed/pull/8171) mended one that took the first group's rate for all; [issue 14](https://github.com/katsura-jp/pytorch-cosine-annealing-with-warmup/issues/14) of a cosine schedule tells of one peak that replaces them all. The cell shows the bug once. No error, the loss may even fall: the prompt just moves far less than you asked for.
#
# Write `set_rates` so that every group keeps its own peak. It is called in each step, in the middle of training: `"lr"` holds the rate of the step before.
#
# <details>
# <summary>Hint</summary>
#
# `"initial_lr"` is the peak and stays. `group["lr"] *= factor` would multiply the factors of all steps.
#
# </details>

# %%
def set_rates_as_published(groups, factor):
    peak = groups[0]["initial_lr"]
    for group in groups:
        group["lr"] = factor * peak

demo = [{"part": "lora", "lr": 1e-3, "initial_lr": 4e-3}, {"part": "prompt", "lr": 5e-2, "initial_lr": 2e-1}]
set_rates_as_published(demo, 0.5)
print("wanted", [0.5 * group["initial_lr"] for group in demo], "got", [group["lr"] for group in demo])

def set_rates(groups: list[dict], factor: float) -> None:
    """Every group's "lr" becomes `factor` times its "initial_lr". Works in place."""
    ### BEGIN SOLUTION
    for group in groups:
        group["lr"] = factor * group["initial_lr"]
    ### END SOLUTION

check.set_rates(set_rates)

# %% [markdown]
# Now the loop of `mp.fit` again, with a group for each part. On a classifier the head is a third part.

# %%
SHAPE = mp.FitConfig(lr=1.0, warmup=0.1)                       # up a line, down a cosine; 1 at its peak

def fit_parts(model, tokenizer, data, rates: dict[str, float], steps: int, batch: int = 8, seed: int = 0) -> list[float]:
    """mp.fit's loop with one peak rate for each adapter, and one for the head; the losses of the steps."""
    rows, parts, losses = training.encode(model, tokenizer, data), {}, []
    for name, p in training.trainable(model).items():          # minipeft.<adapter>.<path>.<symbol>
        parts.setdefault("head" if ".copy." in name else name.split(".")[1], []).append(p)
    optimizer = torch.optim.AdamW([{"params": ps, "lr": 0.0, "initial_lr": rates[part]} for part, ps in parts.items()], weight_decay=0.0)
    model.train()
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)             # dropout, as in mp.fit
        for group in optimizer.param_groups:
            group["lr"] = SHAPE.rate(step, steps) * group["initial_lr"]
        loss, _, n = training.loss_of(model, training.batch_of(rows, batch, seed, step), tokenizer.pad_token_id or 0)
        (loss / n).backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item() / n)
    model.eval()
    return losses

# %% [markdown]
# Each half alone, at the same few rates: a LoRA of rank 1, and a prompt with as many numbers. The score is the loss on a wording that is not trained on. Is there one rate that is good for both? The prompt starts from the text of a solved card, so it changes the loss before its first step. The print gives both starts: hold each column against its own. The medicine hybrids below take the best rate of each half. The sweep is short and coarse: a rate that is best for these few steps need not be best for more of them.

# %%
halves = {"lora": mp.LoRA(rank=1, alpha=2, targets=half), "prompt": mp.PromptTuning(vectors, init="text", text=solved[:vectors])}
few_rates = mp.pick(smoke=[1e-2], cpu=[1e-3, 1e-2, 1e-1], gpu=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])

def alone(part: str, rate: float) -> float:
    """The validation loss after training one half alone at this rate, a few steps."""
    torch.manual_seed(0)
    mp.attach(model, halves[part], part)
    fit_parts(model, tokenizer, cards["train"], {part: rate}, mp.pick(smoke=1, cpu=8, gpu=40), CARD_BATCH)
    loss = mp.evaluate(model, tokenizer, cards["validation"])["loss"]
    mp.detach(model, part)
    return loss if math.isfinite(loss) else math.inf

one_rate = {part: {rate: alone(part, rate) for rate in few_rates} for part in halves}
CARD_RATES = {part: min(by_rate, key=by_rate.get) for part, by_rate in one_rate.items()}
before_any = mp.evaluate(model, tokenizer, cards["validation"])["loss"]
mp.attach(model, halves["prompt"], "prompt")
before_steps = mp.evaluate(model, tokenizer, cards["validation"])["loss"]
mp.detach(model, "prompt")
print(f"untrained: LoRA {before_any:.4g}, as the frozen model; prompt {before_steps:.4g}. Best rates: LoRA {CARD_RATES['lora']:g}, prompt {CARD_RATES['prompt']:g}")
lab.table([{"one rate for both": rate} | {f"{part} alone, loss": by_rate[rate] for part, by_rate in one_rate.items()} for rate in few_rates])

# %% [markdown]
# Read each column from its best loss downwards. Where does a half end above its own start? That rate is too large for it. The half that comes to such a row first limits what the two can share. Are both best in the same row? Then one rate would do here, as far as so coarse a table can tell. Is the part with the larger sum above also the one that wants the smaller rate? If not, you see how little the first step says about the rest.
#
# ## The same as the package
#
# With equal rates, `fit_parts` must do what `mp.fit` does. The cell trains the same hybrid both ways. Below it: how the package runs several pieces on one module. Compare with exercise 2.

# %%
ways, short = {}, mp.pick(smoke=2, cpu=3, gpu=5)
for way in ("mp.fit", "fit_parts"):
    torch.manual_seed(0)
    mp.attach(model, mp.LoRA(rank=1, alpha=2, targets=half), "lora")
    mp.attach(model, mp.PromptTuning(4, init="text", text=solved[:4]), "prompt")
    if way == "mp.fit":
        plan = mp.FitConfig(steps=short, batch_size=2, lr=1e-3, warmup=0.1, precision="fp32", progress=False)
        ways[way] = [entry["loss"] for entry in mp.fit(model, tokenizer, cards["train"], plan).history]
    else:
        ways[way] = fit_parts(model, tokenizer, cards["train"], {"lora": 1e-3, "prompt": 1e-3}, short, batch=2)
    mp.detach(model, "prompt"), mp.detach(model, "lora")
assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(*ways.values()))
print({way: [round(loss, 4) for loss in losses] for way, losses in ways.items()})
print(inspect.getsource(sockets.ModulePlug.__call__))

# %% [markdown]
# ## Break it: one rate for all
#
# Can two parts share a rate? The table of step 3 is one answer, with each half alone. Now train them together, with another model and another task: film reviews, positive or negative, on MiniLM, small enough for many runs. A LoRA of rank 1 and a prompt of 8 vectors, every pair of rates. The diagonal is *one rate for all*; it is also what you get with the bug above. The score is the loss on **validation** reviews, lower is better. The head is new, and its seed counts: as in chapter 3, it is first trained alone, once for each seed, and every run starts from it. Then it trains on, at a rate of its own, the same in all runs.

# %%
films = {}
for split, count in zip(("train", "validation", "test"), mp.pick(smoke=(32, 8, 8), cpu=(1000, 150, 250), gpu=(1600, 400, 600))):
    reviews = [e for e in mp.load_data("sentiment/movies", split) if len(e["text"].split()) <= 12]
    films[split] = random.Random(0).sample(reviews, min(count, len(reviews)))
FILM_STEPS, heads = mp.pick(smoke=1, cpu=30, gpu=100), {}       # heads: seed -> the head that was trained alone

def start(seed: int):
    """MiniLM and its tokenizer, under a head for two classes that was trained alone."""
    torch.manual_seed(seed)
    encoder, words = mp.load_base("minilm-l6", num_labels=2)
    if seed not in heads:
        encoder.base_model.requires_grad_(False)
        mp.fit(encoder, words, films["train"], mp.FitConfig(steps=mp.pick(smoke=1, cpu=50, gpu=100), batch_size=8, lr=1e-2, seed=100 + seed, progress=False))
        heads[seed] = {name: p.clone() for name, p in encoder.classifier.state_dict().items()}
        encoder.requires_grad_(True)
    encoder.classifier.load_state_dict(heads[seed])
    torch.manual_seed(seed)
    return encoder, words

# %%
def sentiment(methods: dict, rates: dict, seed: int = 0, judged_on: str = "test") -> dict:
    """Train these methods together on film reviews; the size, the time, and how good it is on others."""
    encoder, words = start(seed)
    for name, method in methods.items():
        mp.attach(encoder, method, name)
    began = time.perf_counter()
    if methods:                                                # else it stays as it started, the head alone
        fit_parts(encoder, words, films["train"], {"head": 1e-2} | rates, FILM_STEPS, seed=seed)
    row = {"trained": sum(map(numbers, mp.adapters(encoder).values())), "s a step": (time.perf_counter() - began) / FILM_STEPS}
    judged = mp.evaluate(encoder, words, films[judged_on])
    return row | {"loss": judged["loss"], "right": judged["accuracy"]}

on_qv, grid = {"targets": ("query", "value")}, mp.pick(smoke=[1e-3, 1e-2], cpu=[1e-3, 1e-2, 1e-1], gpu=[1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
trial = {"lora": mp.LoRA(rank=1, alpha=2, **on_qv), "prompt": mp.PromptTuning(8, init="vocab")}
pairs_of_rates = {(a, b): sentiment(trial, {"lora": a, "prompt": b}, judged_on="validation")["loss"] for a in grid for b in grid}
finite = {pair: loss for pair, loss in pairs_of_rates.items() if math.isfinite(loss)}
best_pair, best_shared = min(finite, key=finite.get), min((p for p in finite if p[0] == p[1]), key=finite.get)
print(f"the head alone: loss {sentiment({}, {}, judged_on='validation')['loss']:.3f}; best pair: LoRA {best_pair[0]:g}, prompt {best_pair[1]:g}, loss {finite[best_pair]:.3f}; best single rate {best_shared[0]:g}, loss {finite[best_shared]:.3f}")
lab.heat_map([[finite.get((a, b)) for b in grid] for a in grid], [f"{a:g}" for a in grid], [f"{b:g}" for b in grid],
             row_label="LoRA's rate", column_label="the prompt's rate", form=".3f")

# %% [markdown]
# First find the cells that have learned something. The print says what the head alone has reached, and a cell close to that has added nothing; one above it has lost something on the way. Then read the map in two ways. Down a column: how much LoRA's rate matters. Along a row: how much the prompt's does. A row without learning looks alike because nothing learned there. Where a row has learned and looks alike, the prompt contributes little, and its rate is a small question. Then the one rate to choose is LoRA's.
#
# Is the best cell on the diagonal? If not, how far is it from the best cell that is? It is one seed, so a difference in the third decimal says nothing: then a shared rate did as well here. That does not make it safe elsewhere. Compare with the table of step 3: do the best rates lie the same way? And does the best cell stand at an edge of the map? Then a better pair may lie outside. If that edge is the smallest rate of the prompt, the prompt was best left nearly as it was.
#
# ## Is a hybrid better than its parts?
#
# A hybrid of two parts has their numbers *together*. If it beats each part alone, it may simply be larger. So give all candidates the same size, the same steps and the same reviews, with more than one seed. Halve the parts: a prompt of 24 with a LoRA of rank 1, against a prompt of 48, and a LoRA of rank 2. Adapters come in steps, so their rows are within a tenth. The rates of prompt and LoRA are those of the grid. The other two have one rate each, of the size that chapters 3 and 4 used, and not swept here. A part keeps its rate in a hybrid. So the rates are not equally well chosen. Those of *prompt + LoRA* were chosen together, at just this size of LoRA, but with a shorter prompt. The prompt alone has a rate that was best *beside* a LoRA, which may have done the work there.

# %%
RATES = {"lora": best_pair[0], "prompt": best_pair[1], "prefix": 1e-1, "adapter": 5e-3}
rank_1 = mp.LoRA(rank=1, alpha=2, **on_qv)

def bottleneck(m: int) -> mp.BottleneckAdapter:
    return mp.BottleneckAdapter(m, placement="pfeiffer", skip_layers=1)

contest = {"prompt": {"prompt": mp.PromptTuning(48, init="vocab")},
           "prefix": {"prefix": mp.PrefixTuning(4, reparameterize=False)},
           "adapter": {"adapter": bottleneck(4)},
           "LoRA": {"lora": mp.LoRA(rank=2, alpha=4, **on_qv)},
           "prompt + LoRA": {"lora": rank_1, "prompt": mp.PromptTuning(24, init="vocab")},
           "prefix + LoRA": {"lora": rank_1, "prefix": mp.PrefixTuning(2, reparameterize=False)},
           "adapter + LoRA": {"lora": rank_1, "adapter": bottleneck(2)}}
seeds = mp.pick(smoke=[0, 1], cpu=[0, 1], gpu=[0, 1, 2, 3, 4])
runs = {name: [sentiment(methods, RATES, seed) for seed in seeds] for name, methods in contest.items()}
sizes = {name: found[0]["trained"] for name, found in runs.items()}
assert max(sizes.values()) < 1.1 * min(sizes.values())
means = {name: statistics.mean(r["right"] for r in found) for name, found in runs.items()}
lab.table([{"candidate": name, "trained": sizes[name], "right, test": means[name], "spread over seeds": statistics.stdev(r["right"] for r in found),
            "s a step": statistics.median(r["s a step"] for r in found)} for name, found in runs.items()])

# %% tags=["figure"]
commoner = max(statistics.mean(e["label"] == label for e in films["test"]) for label in (0, 1))
error = 2 * math.sqrt((top := max(means.values())) * (1 - top) / len(films["test"]))
figure, ax = new_figure(width=8.6, height=3.4)
for place, (name, found) in enumerate(runs.items()):
    colour = COLOURS["vermilion" if "+" in name else "blue"]
    ax.plot([r["right"] for r in found], [place] * len(found), "o", color=colour, alpha=0.5, markersize=6)
    ax.plot(means[name], place, "|", color=colour, markersize=22, markeredgewidth=3)
ax.axvline(commoner, color=COLOURS["grey"], linestyle="--", linewidth=1.2)
head_alone = statistics.mean(sentiment({}, {}, seed)["right"] for seed in seeds)
ax.axvline(head_alone, color=COLOURS["grey"], linestyle=":", linewidth=1.2)
ax.text(commoner, -0.75, "always the commoner label ", fontsize=9, color=COLOURS["grey"], va="center", ha="right")
ax.text(head_alone, -0.75, " the head alone", fontsize=9, color=COLOURS["grey"], va="center")
ax.set_yticks(range(len(runs)), runs)
ax.set(xlabel="right, test reviews (dots: seeds; bars: mean)", ylim=(len(runs) - 0.4, -1.1))
ax.grid(axis="y", visible=False)
best_part = max((n for n in means if "+" not in n), key=means.get)
best_hybrid = max((n for n in means if "+" in n), key=means.get)
gap = means[best_hybrid] - means[best_part]
best_kind = "hybrid" if gap > 0 else "part"
spread = max(statistics.stdev(r["right"] for r in found) for found in runs.values())
print(f"the head alone: {head_alone:.1%}; best part: {best_part}, {means[best_part]:.1%}; best hybrid: {best_hybrid}, {means[best_hybrid]:.1%}: {100 * gap:+.1f} points for the hybrid")
print(f"largest spread over seeds: {100 * spread:.1f} points; error from {len(films['test'])} reviews: about ± {100 * error:.1f}. So the gap is",
      "larger than both" if abs(gap) > max(spread, error) else "no larger than chance would make it")
figure

# %% [markdown]
# Look at the dotted line first: what the head had reached before any method came. A candidate that stands on it has added nothing yet, and two of that kind cannot be compared. Does the prompt alone stand there? That is no verdict on prompts, with a rate that was not chosen for it. Does *prompt + LoRA* stand there, although its rates were the best of the grid? Then what was best for a shorter prompt did not carry over to this one. And one below the dotted line, at the dashed one, where everybody gets the commoner label, is worse than idle: training destroyed what the head could do.
#
# Then say only what the last line of the print allows. It is about the best part and the best hybrid. (Both *best* ones were picked by their test score, which flatters them: chapter 12 shows by how much.) If the gap is within chance, the honest sentence is: *at this size, on this task, in so few steps, we saw no difference between these two.* That is not proof that they are equal. A hybrid also costs: two rates to choose, and where a prompt is part of it, longer texts in every layer (see *s a step*).
#
# ## The fine-tune: medicines, at equal size
#
# Now the language model, and the question of stages. Four candidates of equal size, with the same questions and the same number of steps:
#
# - a **prompt** alone, and a **LoRA** alone (rank 2 on the values of every second layer)
# - the **hybrid**, half of each, trained *jointly*
# - the same hybrid *in stages*: the LoRA for half of the steps, then frozen, and the prompt for the rest. Each stage has a warm-up of its own and begins at the first batch again
#
# The rates are the two that step 3 found on validation questions, for the halves. The parts alone have twice the numbers, and no sweep of their own. And all prompts start from the text of a solved card. A LoRA has no such start.

# %%
CARD_STEPS = mp.pick(smoke=2, cpu=24, gpu=120)
sets = {"prompt": {"prompt": mp.PromptTuning(2 * vectors, init="text", text=solved)},
        "LoRA": {"lora": mp.LoRA(rank=2, alpha=4, targets=half)}, "hybrid, jointly": halves, "hybrid, in stages": halves}

def learn_cards(way: str, methods: dict) -> dict:
    """Train one candidate on the medicines, jointly or part after part; its size, time and marks."""
    fresh, _ = mp.load_base(BASE)
    torch.manual_seed(0)
    began, losses = time.perf_counter(), []
    stages = [{part: method} for part, method in methods.items()] if "stages" in way else [methods]
    for stage in stages:
        for adapter in mp.adapters(fresh).values():
            adapter.requires_grad_(False)                      # what is there stays as it is, and acts
        for part, method in stage.items():
            mp.attach(fresh, method, part)
        losses += fit_parts(fresh, tokenizer, cards["train"], CARD_RATES, CARD_STEPS // len(stages), CARD_BATCH)
    return {"candidate": way, "trained": sum(map(numbers, mp.adapters(fresh).values())), "steps": len(losses),
            "s a step": (time.perf_counter() - began) / len(losses), "loss, last steps": statistics.mean(losses[-4:])} | exam(fresh)

# %% tags=["figure"]
contestants = [learn_cards(way, methods) for way, methods in sets.items()]
counts = [row["trained"] for row in contestants]
assert max(counts) < 1.03 * min(counts) and len({row["steps"] for row in contestants}) == 1
display(lab.table([{"candidate": "frozen"} | frozen, *contestants]))

keys = [k for k in ("format", "name", "facts", "all_facts") if k in frozen]
says = {"format": "format kept", "name": "name copied", "facts": "facts right", "all_facts": "all facts right"}
figure, ax = new_figure(width=9, height=3.4)
for shift, (row, colour) in enumerate(zip([{"candidate": "frozen"} | frozen, *contestants], ("grey", "orange", "blue", "vermilion", "purple"))):
    bars = ax.bar([i + 0.17 * (shift - 2) for i in range(len(keys))], [100 * row[k] for k in keys], width=0.16, color=COLOURS[colour], label=row["candidate"])
    ax.bar_label(bars, [f"{100 * row[k]:.0f}" for k in keys], fontsize=9)
ax.set_xticks(range(len(keys)), [says[k] for k in keys])
ax.set(ylim=(0, 112), ylabel="% of the test questions")
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, fontsize=9, frameon=False)
print(f"one seed, {len(cards['test'])} questions: one question is {100 / len(cards['test']):.1f} points")
figure

# %% [markdown]
# Compare the joint hybrid with the **better** of its parts, not with the worse one. Is the gap chance? Put the better part's share $p$ and the number $n$ of questions into $2\sqrt{p(1-p)/n}$, the error of the section before. (Four facts of one question are learned together, so count questions, not facts.) It is one seed on top. A gap within that error is a hint, and no more, even where it is the largest in the plot.
#
# Is one part alone far behind? Then half of the hybrid's numbers went to the weaker place. If the hybrid is ahead all the same, that half did something there which more of the better part did not, at these rates. If it is not, you know where the numbers are missing. Then hold this plot against the reviews. Do the two tasks agree on part or hybrid? If not, there is no answer for all tasks, and you have to measure on your own.
#
# In stages, each part has only half of the steps; what the first one got wrong, the second one can only work around. With few steps, *behind* may also mean *not yet*.
#
# ## The start-up's pair: a frozen LoRA, a prompt on top
#
# Stage one: a LoRA learns the cards of these medicines. It is then **frozen**. Stage two is another task: the same questions, but the answer is one field alone, what the medicine treats. A prompt of 16 vectors learns it, on the frozen LoRA, at the rate of step 3. Two others get the same steps:
#
# - the same prompt on the **bare** model: was the LoRA's knowledge needed?
# - the LoRA itself, trained on for the new task at half its first rate: then what happens to the old one?

# %%
def treats(split: str) -> list[dict]:
    """The second task: only the third field of the card."""
    return [{"prompt": e["prompt"], "completion": " " + e["completion"].split(" | ")[2]} for e in cards[split]]

def field_right(model) -> float:
    """Share of the test questions answered with exactly that field."""
    asked = treats("test")[:: mp.pick(smoke=3, cpu=1, gpu=1)]
    answers = mp.generate(model, tokenizer, [e["prompt"] for e in asked], max_new_tokens=mp.pick(smoke=2, cpu=12, gpu=12))
    return statistics.mean((a.strip().splitlines() or [""])[0].strip() == e["completion"].strip() for a, e in zip(answers, asked))

first_plan = mp.FitConfig(steps=mp.pick(smoke=2, cpu=48, gpu=200), batch_size=mp.pick(smoke=2, cpu=8, gpu=16), lr=4e-3, warmup=0.1)
torch.manual_seed(0)
mp.attach(model, mp.LoRA(rank=4, alpha=8, targets="all-linear"), "lora")
run = mp.fit(model, tokenizer, cards["train"], first_plan, watch=lab.live_curve())
knows = exam(model)
print(f"the LoRA after {run.steps} steps:", {k: f"{v:.0%}" for k, v in knows.items()})

# %%
SECOND_STEPS = mp.pick(smoke=1, cpu=20, gpu=100)
shelf = tempfile.TemporaryDirectory()
mp.save_adapter(model, Path(shelf.name, "lora-alone"), "lora")

def second_task(target, part: str, method=None) -> float:
    """Train `part` of `target` on the second task for the same steps, everything else frozen; the share right."""
    for adapter in mp.adapters(target).values():
        adapter.requires_grad_(False)
    torch.manual_seed(0)
    chosen = mp.attach(target, method, part) if method else mp.adapters(target)[part].requires_grad_(True)
    fit_parts(target, tokenizer, treats("train"), {part: CARD_RATES["prompt"] if method else first_plan.lr / 2}, SECOND_STEPS, CARD_BATCH)
    chosen.requires_grad_(False)
    return field_right(target)

# %%
sixteen = mp.PromptTuning(16, init="text", text=(solved * 16)[:16])
lora_bytes = [p.detach().clone() for p in mp.adapters(model)["lora"].parameters()]
bare, _ = mp.load_base(BASE)
retrained, _ = mp.load_base(BASE)
mp.load_adapter(retrained, Path(shelf.name, "lora-alone"), "lora")
second = {"16-token prompt on the frozen LoRA": second_task(model, "prompt", sixteen),
          "16-token prompt on the bare model": second_task(bare, "prompt", sixteen),
          "the LoRA itself, trained on": second_task(retrained, "lora")}
assert all(torch.equal(a, b) for a, b in zip(lora_bytes, mp.adapters(model)["lora"].parameters()))

# %%
with mp.active(model, "lora"):                                 # the prompt is put aside
    back = exam(model)
assert back == knows                                           # the first task is as it was
first_task = [back["facts"], frozen["facts"], exam(retrained)["facts"]]
pair_right = second["16-token prompt on the frozen LoRA"]
del bare, retrained
of_prompt, of_lora = (numbers(mp.adapters(model)[part]) for part in ("prompt", "lora"))
stages_table = [{"way": way, "trained for it": count, "second task, right": right, "first task, facts right": facts}
                for (way, right), count, facts in zip(second.items(), (of_prompt, of_prompt, of_lora), first_task)]
print(f"{SECOND_STEPS} steps each; the first task is asked with the prompt put aside")
lab.table([*stages_table, {"way": "the LoRA, before the second task", "first task, facts right": knows["facts"]}])

# %% [markdown]
# Is the first row better than the second? Then it looks as if the prompt *used* what the LoRA knows. Both have the same numbers, start and steps, and the rate was found without a LoRA. So neither size nor rate explains it. But turn the gap into questions: one or two are chance. And one answer for all questions would be right for every question about one medicine. A first row no better than that has not asked the LoRA. (Are both near zero? Then these steps were too few for the prompt, and the rows say nothing about the LoRA.)
#
# The third row is the article's other question: *only more training?* If it is better still on the new task, the combination was not what brings the score. It has many more numbers, so this is no contest at equal size. What the pair has instead stands in the last column. The frozen LoRA kept the first task to the bit. That is asserted, not measured: no byte of the LoRA moved.
#
# Read that column of the third row with care. Both tasks ask in the same words, so one set of weights cannot answer both. And an answer of one field has nothing where the card has its facts. A low share means that the LoRA now does the other task. It does not mean that the facts are gone. With the pair, you switch tasks by switching the prompt.
#
# ## Merge what can be merged
#
# Folding a part into the weights makes it free to run (chapter 10). A prompt and a prefix change no weight; a bottleneck adapter bends, and no weight does that. And the order counts: a LoRA *behind* an adapter on the same module adds to what comes out of the adapter. Folded into $W$ it would act before it. That was case 2 of the example by hand.
#
# ### Exercise 5: fold what can be folded · 15 minutes · medium
#
# One frozen weight, and a list of parts in the order in which they act. Fold as many as possible into the weight. Return the new weight and the parts that stay, so that together they compute what all of them did.
#
# <details>
# <summary>Hint</summary>
#
# Go through the parts in order. As long as no adapter has come, a LoRA may be folded: `W = W + s * B @ A`. From the first adapter on, everything stays.
#
# </details>

# %%
def fold_what_can(W: torch.Tensor, parts: list[tuple]) -> tuple[torch.Tensor, list[tuple]]:
    """W (out, in). A part is ("lora", A, B, s) or ("adapter", W_down, W_up). -> (W', the parts that stay, in order)."""
    ### BEGIN SOLUTION
    stay = []
    for part in parts:
        if part[0] == "lora" and not stay:
            _, A, B, s = part
            W = W + s * B @ A
        else:
            stay.append(part)
    return W, stay
    ### END SOLUTION

check.fold_what_can(fold_what_can)

# %% [markdown]
# On the pair that you trained: the LoRA goes into the weights, the prompt stays in front. The logits are the same up to rounding, and `mp.unmerge` gives back every frozen byte. Then an adapter joins them, once before the LoRA and once behind it. `mp.merge` refuses where your exercise lets a part stay.

# %%
def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**question).logits.cpu()

apart = logits_of(model)                                       # (1, 16 + T, vocabulary)
mp.merge(model, "lora")
merge_error = ((logits_of(model) - apart).abs().max() / apart.abs().max()).item()
mp.unmerge(model, "lora")
assert fingerprint(model) == at_first and merge_error < 1e-4
print(f"the LoRA: merged, the logits differ by {merge_error:.1g} of the largest; unmerged, every frozen byte is back")

mp.attach(model, mp.BottleneckAdapter(4, placement="pfeiffer"), "adapter")
for ordered, part in ((["lora", "prompt", "adapter"], "prompt"), (["lora", "prompt", "adapter"], "lora"), (["adapter", "lora", "prompt"], "lora")):
    mp.activate(model, ordered)
    try:
        mp.merge(model, part)
        print(f"\n{', '.join(ordered)}: {part} is merged")
        mp.unmerge(model, part)
    except (TypeError, ValueError) as refusal:
        print(f"\n{', '.join(ordered)}: {part} is not merged.", refusal)
mp.detach(model, "adapter")
assert fingerprint(model) == at_first and torch.equal(logits_of(model), apart)

# %% [markdown]
# ## One folder, and each part alone
#
# `mp.save_adapter` takes a list of names. Each part becomes a checkpoint of its own in that folder; `hybrid.json` says which parts, in which order, and which are frozen. Hugging Face PEFT's class for mixed methods takes no prompts ([issue 2307](https://github.com/huggingface/peft/issues/2307)) and does not save ([issue 1590](https://github.com/huggingface/peft/issues/1590)), but PEFT opens each part.

# %%
folder = Path(shelf.name, "pair")
mp.save_adapter(model, folder, ["lora", "prompt"])
files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
for name, size in files.items():
    print(f"{name:36} {size / 1e3:10,.0f} kB")

again, _ = mp.load_base(BASE)
mp.load_adapter(again, folder)
assert torch.equal(logits_of(again), apart)
print("both parts read again from one folder: the same logits to the bit; active:", list(mp.sockets.active_names(again)))
del again

# %%
peft_errors = {}
warnings.filterwarnings("ignore", category=FutureWarning)      # peft still uses old names of transformers
try:
    from peft import PeftModel
    for part in ("lora", "prompt"):
        theirs = PeftModel.from_pretrained(mp.load_base(BASE)[0], folder / part).eval()
        with mp.active(model, part):
            ours = logits_of(model)
        peft_errors[part] = ((logits_of(theirs) - ours).abs().max() / ours.abs().max()).item()
        assert peft_errors[part] < 1e-4
        del theirs
    print("opened by Hugging Face PEFT, each part alone; the logits differ by", {k: f"{v:.1g}" for k, v in peft_errors.items()}, "of the largest")
except ImportError:
    print("peft is not installed here, so that comparison is skipped (pip install peft)")

# %% [markdown]
# ## What it cost, and what you predicted
#
# The first cell prints this chapter's rows for the cost table of the course, and your predictions beside the measured answers. The second one is the closing quiz. Every wrong answer says why it is wrong. The numbers in it are computed.

# %%
verdict = best_kind if abs(gap) > max(spread, error) else f"{best_kind}, within chance"
measured = dict(zip(predicted, (prompt_percent, CARD_RATES["prompt"] / CARD_RATES["lora"], verdict, 100 * pair_right)))
pair_row = {"method": "LoRA, frozen, + 16-token prompt", "trained in stage 1": numbers(mp.adapters(model)["lora"]),
            "trained in stage 2": numbers(mp.adapters(model)["prompt"]), "minutes of stage 1": run.seconds / 60,
            "file MB": sum(files.values()) / 1e6, "second task, right": pair_right} | {f"first task, {k}": v for k, v in knows.items()}
lab.record(
    main=pair_row | {"steps": [run.steps, SECOND_STEPS], "medicines": len(few), "questions": len(cards["test"]), "frozen": frozen},
    sizes={row["hybrid"]: row["together"] for row in rows}, order=order,
    rates={"halves alone": {part: {f"{r:g}": loss if math.isfinite(loss) else None for r, loss in by_rate.items()} for part, by_rate in one_rate.items()},
           "best of halves": CARD_RATES, "grid": [[a, b, finite.get((a, b))] for a, b in pairs_of_rates], "best on reviews": best_pair, "best shared": best_shared, "leverage": buys, "ratio at the start": ratio_at_start},
    sentiment={"candidates": {name: {"trained": sizes[name], "test": [r["right"] for r in found], "s a step": [r["s a step"] for r in found]}
                              for name, found in runs.items()}, "gap": gap, "spread": spread, "error": error, "commoner": commoner},
    cards=contestants, stages=stages_table,
    checkpoint={"bytes": sum(files.values()), "files": len(files), "merge error": merge_error, "peft errors": peft_errors})
display(lab.table([{"": key, "predicted": predicted[key], "measured": value} for key, value in measured.items()]))
lab.table([pair_row])

# %% tags=["figure"]
eight = [(4096, 4096), (1024, 4096)] * 32                      # query and value of Llama-3-8B
lora_8, prompt_16 = sum(mp.LoRA(rank=8).parameter_count(*s) for s in eight), mp.PromptTuning(16).parameter_count(4096)

lab.quiz([
    {"question": "Llama-3-8B, a LoRA of rank 8 on query and value, a prompt of 16 tokens (width 4096). How many numbers train?", "right": f"{lora_8 + prompt_16:,}",
     "choices": {f"{lora_8 + prompt_16:,}": "The parts add up: they share nothing.",
                 f"{lora_8 + 32 * prompt_16:,}": "That puts a prompt into each of 32 layers. It stands once, at the bottom.",
                 f"{lora_8:,}": "That is the LoRA alone.",
                 f"{sum(mp.LoRA(rank=8).parameter_count(4096, 4096) for _ in eight) + prompt_16:,}": "That takes values as wide as queries. Llama-3 has fewer key/value heads: see chapter 3."}},
    {"question": "A LoRA and a bottleneck adapter sit on the same module. You swap their order. What changes?", "right": "what the adapter reads",
     "choices": {"nothing, both only add": "Two LoRAs only add. An adapter's ReLU makes the order matter: see the table in step 1.",
                 "what the adapter reads": "Behind the LoRA it reads $Wx + sBAx$, before it only $Wx$.",
                 "what the LoRA reads": "A LoRA reads $x$, the module's input, wherever it stands.",
                 "how many numbers train": "The pieces are the same in both orders."}},
    {"question": "You trained a hybrid of LoRA and prompt. It beats the LoRA alone, which has half as many numbers. What have you shown?",
     "right": "that it beats something smaller",
     "choices": {"that hybrids are better": "One of the two is larger. Give the LoRA as many numbers first.",
                 "that it beats something smaller": "At equal size and equal steps the question is open. The chapter asks it on two tasks.",
                 "that the prompt learnt something": "Perhaps, but even a prompt that does nothing would leave the LoRA to explain the score. Put the prompt aside, and measure."}},
    {"question": "Adam adapts its steps to each number. Why can one rate for a prompt and a LoRA be wrong all the same?", "right": "equal steps buy different amounts",
     "choices": {"it cannot: Adam evens that out": "It evens out the *size of the gradient*, so that every number moves by about the rate. What such a move does to the loss is another matter.",
                 "equal steps buy different amounts": f"At the start of step 3, a step of the same rate bought {times:.3g} times as much in the {stronger} as in the {weaker}, with as many numbers. Of the rates tried there, {CARD_RATES['lora']:g} was best for the LoRA and {CARD_RATES['prompt']:g} for the prompt. One rate *can* be wrong; whether it is, a sweep has to say.",
                 "the larger part takes the smaller one's gradient": "Gradients are not shared out. Clipping is joint, but it scales both parts alike, and Adam divides by that scale again.",
                 "the optimizer can hold only one adapter": "It can hold any parameters, in groups, each with a rate of its own."}},
    {"question": "You built the optimizer, and attached the prompt afterwards. What happens in training?", "right": "the prompt gets gradients and never moves",
     "choices": {"an error": "None: the cell above ran without one.",
                 "the prompt gets gradients and never moves": "An optimizer moves the parameters it was built with.",
                 "the prompt gets no gradients": "It does: it acts, and requires them. Only the step passes it by."}},
    {"question": "A LoRA is frozen, a prompt learns on top. You put the prompt aside. What does the LoRA do on its own task?", "right": "exactly what it did before",
     "choices": {"exactly what it did before": "No byte of it moved, and the base neither. It was asserted above.",
                 "a little less well": "Only if it had been trained on. See the last column of that table for what this costs.",
                 "nothing, it needs the prompt now": "It never saw the prompt's gradients."}},
    {"question": "Prompt, prefix, bottleneck adapter, LoRA, on different modules. How many of the four can be merged into the weights?", "right": "1",
     "choices": {"4": "A prompt and a prefix add positions; an adapter bends.", "2": "A bottleneck adapter looks like two matrices, but the activation stands between them.",
                 "1": "LoRA alone is a change of a weight.", "0": "LoRA is: $W' = W + sBA$."}},
    {"question": "When can a LoRA not be merged, although it is a LoRA?", "right": "behind an adapter on the same module",
     "choices": {"behind an adapter on the same module": "Merged, its update would go through the adapter first. `mp.merge` refuses.",
                 "beside a soft prompt": "The prompt only makes the text longer; the weight may change as before.",
                 "when it is frozen": "Frozen means that it is not trained. It can be folded all the same.",
                 "on a 4-bit base": "It can: the weight is then kept in full precision, or rounded again and loses a part. `mp.merge` says how much."}},
])

# %% [markdown]
# ## Recap
#
# - Methods in different sockets combine by attaching twice. On one module they act in order.
# - Two LoRAs add. With an adapter, the order matters, and decides what can be merged.
# - Frozen is not inactive. Freeze with `requires_grad_(False)`, put aside with `mp.activate`.
# - Build the optimizer last. Sweep the parts' rates before you let them share one. If they differ, see that the schedule keeps them.
# - Compare a hybrid with its best part, at equal size and equal steps, over seeds. Believe a gap only if it is larger than chance.
# - A frozen part is safe: the first task stays what it was, to the bit.
#
# ## Further reading
#
# - He et al. 2022, [Towards a Unified View of Parameter-Efficient Transfer Learning](https://arxiv.org/abs/2110.04366): which combinations, and why
# - Mao et al. 2022, [UniPELT](https://arxiv.org/abs/2110.07577): the parts get gates that are trained
# - Hugging Face PEFT, [mixed adapter types](https://huggingface.co/docs/peft/developer_guides/mixed_models), and what it says about saving them
# - AdapterHub, [method combinations](https://docs.adapterhub.ml/method_combinations.html)
