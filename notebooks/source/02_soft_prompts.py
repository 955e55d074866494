# ---
# jupyter:
#   minipeft:
#     records: [main, hard, capacity, sentiment, starts, lengths, rates, loudness, sizes, checkpoint]
# ---

# %% [markdown]
# # 2 · Soft prompts: vectors in front of the text
#
# **In one sentence:** leave the whole model frozen and train a few vectors that stand in front of the text; they change how the model behaves; whether they can teach it facts, you will measure.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/02_soft_prompts.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - say what a hard prompt and a soft prompt have in common, and what exactly is trained and what is frozen
# - build prompt tuning and P-tuning, and show that they are Hugging Face PEFT's to the last digits
# - choose start, length and learning rate by what you measured, with the spread over seeds
# - tell apart, in figures, behaviour and facts: what a prompt teaches well, and what it does not
#
# **You need:** Python, embeddings, softmax attention, what a gradient is. Chapter 1 helps.
#
# **The papers:** Lester et al. 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*, [arXiv:2104.08691](https://arxiv.org/abs/2104.08691): you build its section 2 and repeat two questions of its section 3.2, on length and start. Liu et al. 2021, *GPT Understands, Too*, [arXiv:2103.10385](https://arxiv.org/abs/2103.10385): P-tuning, section 2.

# %% tags=["setup"]
import hashlib, inspect, math, random, statistics, subprocess, sys, tempfile, time
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

from pathlib import Path
import torch, torch.nn.functional as F, transformers
from torch import nn
import minipeft as mp
from minipeft import lab, profiles
from minipeft.checks import ch02_soft_prompts as check
lab.seed_everything(0)
print("minipeft", mp.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
print("profile", mp.profile().name, "on", mp.profile().device)
lab.runtime_box("02_soft_prompts")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace each `None`; at the end a cell puts your numbers beside the measured ones.
#
# 1. You start a soft prompt from the vectors of a written prompt, token for token, and do not train it. By how much do the model's answers (its logits) differ from those with the written prompt?
# 2. You train 20 soft tokens on a small set of medicines. Asked about medicines it was **never** trained on, in how many **percent** of the answers is the format right?
# 3. And about the medicines it **was** trained on, in how many **percent** are all four facts right?
# 4. The same question to a LoRA with exactly as many trained numbers, after as many steps. (LoRA adds a small trained update to the weights themselves; chapter 5 builds it. Here it is the one to compare with.)

# %%
predicted = {"start: logits differ by": None, "format right, unseen medicines, %": None,
             "all facts right, prompt, %": None, "all facts right, LoRA of equal size, %": None}

# %% [markdown]
# ## The problem
#
# A developer needed a model that answers questions on medicines in one fixed format. He trained a soft prompt, because it looked simplest. The model could not remember *amoxicillin*. You will see what a prompt gives him and what not, in figures.
#
# Each question asks for a card: name, class, what it treats, route, caution. Some medicines are **taught**, in eight wordings each. The test asks in a wording never trained on, about the taught medicines and about as many **new** ones. `mp.score_cards` says how often the **format** is right, the **name** (copied from the question), each of the four **facts**, and **all_facts** together. It is teaching data, not medical advice.

# %%
BASE = profiles.base_model()
model, tokenizer = mp.load_base(BASE)
cards = {s: [e for e in mp.load_data("drug_cards", s) if e["direction"] == "forward"] for s in ("train", "validation", "test")}
names = sorted({e["card"] for e in cards["test"]})
N = mp.pick(smoke=3, cpu=16, gpu=24)                           # medicines taught, and as many new ones
taught, new = names[:: len(names) // N][:N], names[3 :: len(names) // N][:N]
assert not set(taught) & set(new)

train = [e for e in cards["train"] if e["card"] in taught]
exam = {"taught": [e for e in cards["test"][::2] if e["card"] in taught],
        "new": [e for e in cards["test"][::2] if e["card"] in new]}
print(f"{len(taught)} medicines taught in {len(train)} questions; {len(exam['taught'])} + {len(exam['new'])} questions in the test")
print(train[0]["prompt"] + train[0]["completion"])

# %% [markdown]
# ### Hard prompts first
#
# Whoever has a model starts by *writing*: an instruction, a role, the format, a few solved examples. Such a **hard prompt** costs no training. It is the baseline to beat. So search: several prompts, written by hand, and solved cards of medicines that are not in the test. Two scores each: the mean loss per token of the right answer, and what greedy answers look like. Whoever searches also chooses, so the questions are not those of the test: each taught medicine has one more, kept for choices (*validation*).
#
# The last row is another kind of prompt: it holds **the very card that is asked for**. A cheat sheet.

# %%
written = {"the bare question": "",
           "a polite request": "Please answer the question about this medicine.\n",
           "a role": "You are a careful pharmacist who writes short, correct cards.\n",
           "the format": "Answer in one line: name | class | what it treats | route | caution.\n",
           "role and format": "You are a pharmacist. Reply with one line only: name | class | treats | route | caution\n"}
others = [e for e in cards["train"][::9] if e["card"] not in {*taught, *new}]

def solved(examples) -> str:
    return "".join(e["prompt"] + e["completion"] + "\n\n" for e in examples)

shown = {"1 solved card": solved(others[:1]), "3 solved cards": solved(others[5:8]),
         "the format and 3 solved cards": written["the format"] + solved(others[5:8])}
asked = [e for e in cards["validation"] if e["card"] in taught][:: mp.pick(smoke=3, cpu=2, gpu=1)]

# %%
def answers(model, examples, before=lambda e: "") -> list[str]:
    """Greedy answers, with the text before(e) in front of each question."""
    prompts = [before(e) + e["prompt"] for e in examples]
    return mp.generate(model, tokenizer, prompts, max_new_tokens=mp.pick(smoke=8, cpu=24, gpu=24))

def with_hard_prompt(name: str, before) -> dict:
    examples = [{"prompt": before(e) + e["prompt"], "completion": e["completion"]} for e in asked]
    tokens = sum(len(tokenizer(before(e))["input_ids"]) for e in asked) / len(asked)
    loss = mp.evaluate(model, tokenizer, examples)["loss"]
    return {"hard prompt": name, "tokens": round(tokens), "loss": loss} | mp.score_cards(asked, answers(model, asked, before))

fixed = dict(list((written | shown).items())[:: mp.pick(smoke=3, cpu=1, gpu=1)])
hard = [with_hard_prompt(name, lambda e, text=text: text) for name, text in fixed.items()]
hard.append(with_hard_prompt("3 cards, the one asked for among them",
                             lambda e: solved([*others[5:7], next(t for t in train if t["card"] == e["card"])])))
best_hard = min(hard[:-1], key=lambda row: row["loss"])
LENGTH = 20                                                    # tokens of the soft prompt to come
fits = min((row for row in hard[:-1] if 0 < row["tokens"] <= LENGTH), key=lambda row: row["loss"])
TEXT = fixed[fits["hard prompt"]]
print(f"the lowest loss has: {best_hard['hard prompt']} ({best_hard['tokens']} tokens); of those with at most {LENGTH} tokens: {fits['hard prompt']}")
lab.table(hard)

# %% [markdown]
# Read four things off the table.
#
# - **Showing or telling?** Compare the rows with solved cards with the ones that only describe the format, in loss and in *format*.
# - **Facts.** No instruction can tell the model what it does not know. Look at the column *facts* in every row but the last.
# - **The one to start from.** Below, a soft prompt of 20 tokens starts from a written one: the best that is not longer. The line above the table names it.
# - **The cheat sheet.** With the card in the prompt, the model can copy. A hard prompt *can* carry facts: as text. The column *tokens* has the price of three cards, and you must know which card will be asked for.
#
# ## The idea
#
# The model never sees letters. Each token picks a vector from a table, and from there on only the vectors count. A hard prompt is a choice among the table's vectors. Why only among these? **Let the vectors be anything, and train them.**

# %% tags=["figure"]
from matplotlib.patches import FancyBboxPatch
from minipeft.lab.plots import COLOURS, new_figure

def box(x, y, width, text, colour, ink="black"):
    ax.add_patch(FancyBboxPatch((x, y), width, 0.62, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor="none"))
    ax.text(x + width / 2, y + 0.31, text, ha="center", va="center", fontsize=9.5, color=ink)

figure, ax = new_figure(width=9.4, height=4.6)
ax.axis("off")
pale, orange, grey = "#e3e7eb", COLOURS["orange"], COLOURS["grey"]
table = model.get_input_embeddings().weight
V, d = table.shape
for x0, title, first in ((0, "hard prompt", ["Answer", "in", "one", "line", ":"]), (6.5, "soft prompt", None)):
    ax.text(x0, 5.35, title, fontsize=13, weight="bold")
    for i in range(8):
        x = x0 + 0.72 * i
        word = (first + ["What", "is", "…"])[i] if first else [None] * 5 + ["What", "is", "…"]
        word = word if first else word[i]
        if word:
            box(x, 4.3, 0.66, word, pale)
            ax.annotate("", (x + 0.33, 3.02), (x + 0.33, 4.25), arrowprops={"arrowstyle": "->", "color": grey})
        soft = not first and i < 5
        box(x, 2.35, 0.66, f"$p_{i + 1}$" if soft else f"$e_{i + 1 if first else i - 4}$", orange if soft else pale)
        ax.annotate("", (x + 0.33, 1.42), (x + 0.33, 2.3), arrowprops={"arrowstyle": "->", "color": grey})
    ax.add_patch(FancyBboxPatch((x0, 0.5), 5.7, 0.9, boxstyle="round,pad=0,rounding_size=0.1", facecolor=pale, edgecolor=grey))
    ax.text(x0 + 2.85, 0.95, "the frozen model", ha="center", va="center", fontsize=11)
ax.text(2.85, 3.62, f"each a row of the frozen table: one of {V:,}", ha="center", va="center", fontsize=9.5, backgroundcolor="white")
ax.text(8.28, 4.0, f"no word, no table:\nany point in {d} dimensions.\nOnly these 5 × {d} numbers train", ha="center", fontsize=9.5, color="#9a6700")
ax.text(2.85, 0.05, "searched: words, by you", ha="center", fontsize=10)
ax.text(9.35, 0.05, "searched: vectors, by gradient descent", ha="center", fontsize=10)
ax.set(xlim=(-0.2, 12.4), ylim=(-0.2, 5.8))
figure

# %% [markdown]
# $$e' = [P;\, e] \qquad\quad \min_{P} \; -\sum_t \log p\,(y_t \mid [P;\, e],\, y_{<t})$$
#
# $y_1, y_2, \ldots$ are the tokens of the right answer. $B$ texts stand in a batch, $T$ tokens in each; $d$ is the width of the model, $m$ the length of the prompt. In the cells below $V$ is the number of tokens in the vocabulary.
#
# | | shape | |
# |---|---|---|
# | $e$ | $(B, T, d)$ | the text's embeddings, rows of the frozen table |
# | $P$ | $(m, d)$ | the soft prompt: **trained**, the same for every text |
# | $e'$ | $(B, m + T, d)$ | what goes into the first layer |
# | attention mask | $(B, m + T)$ | ones in front: the text may read the prompt |
# | labels | $(B, m + T)$ | $-100$ in front: nothing is asked at these places |
#
# Precisely, then. **Trained:** the $m \times d$ numbers of $P$. (On a classifier also its last layer, which has random numbers to begin with.) **Frozen:** the table of embeddings, every layer, every norm, the output head. The gradient flows back *through* all the frozen layers to reach $P$, but no weight takes a step. The text can only *read* the prompt, by attention.
#
# In the words of this course, $P$ is a piece in the **embedding socket**: embeddings in, a longer sequence out.
#
# ## By hand
#
# A model so small that you can train it with a pencil. Its vocabulary has four words with vectors $a = (2, 0)$, $b = (0, 2)$, $c = (1, 1)$, $n = (-1, 0)$. It takes the mean of all vectors and multiplies it by $w = (1, -1)$: that is the answer $y$. The text is "a b". You want $y = 2$, and you may put **one** vector $p$ in front. The loss is $\frac12 (y - 2)^2$.
#
# 1. Compute $y$ without a prompt.
# 2. The best hard prompt: try all four words. How near to 2 do you get?
# 3. Soft: start from $p = a$. The gradient is $(y - 2)\,\frac13 w$. Take one step with learning rate 4.5. What is $p$ now, what is $y$, and which word is $p$?

# %%
words = {"a": (2, 0), "b": (0, 2), "c": (1, 1), "n": (-1, 0)}
w = torch.tensor([1.0, -1.0])

def y(*vectors) -> torch.Tensor:
    return torch.stack([torch.as_tensor(v, dtype=torch.float) for v in vectors]).mean(0) @ w

a, b = words["a"], words["b"]
print(f"no prompt: y = {y(a, b):.3f}")
for word, vector in words.items():
    print(f"hard prompt {word!r}: y = {y(vector, a, b):+.3f}")
p = torch.tensor(a, dtype=torch.float, requires_grad=True)
(gradient,) = torch.autograd.grad((y(p, a, b) - 2) ** 2 / 2, p)
assert torch.allclose(gradient, (y(p, a, b) - 2).detach() * w / 3)
p = p.detach() - 4.5 * gradient
print(f"soft, one step from 'a': p = {[round(v, 3) for v in p.tolist()]}, y = {y(p, a, b):.3f}")
assert torch.allclose(y(p, a, b), torch.tensor(2.0), atol=1e-5)

# %% [markdown]
# No word reaches 2. The point $(4, -2)$ does, and it is no word. That is the whole gain of going soft: more points to choose from, and a slope that says where to go. What is lost: you cannot read it, and it fits this model only.
#
# ## Build it
#
# ### Step 1: a prompt is its vectors
#
# Look the written prompt up in the table, put the vectors in front of the text's, and hand the model *vectors* instead of token ids. It answers the same: nothing in the model knows whether a vector came from the table.

# %%
def fingerprint(model) -> str:
    """SHA-256 over the bytes of every parameter of the base."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not name.startswith("minipeft."):                   # what the package plugs in stands below that name
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

at_first, device = fingerprint(model), model.device
hard_ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(device)            # (1, m)
text_ids = tokenizer(exam["new"][0]["prompt"], return_tensors="pt")["input_ids"].to(device)   # (1, T)
m, T = hard_ids.shape[1], text_ids.shape[1]

with torch.no_grad():
    by_ids = model(torch.cat([hard_ids, text_ids], dim=1)).logits[:, m:]           # (1, T, V), at the text's places
    table = model.get_input_embeddings()
    e, P = table(text_ids), table(hard_ids)[0].clone()                             # (1, T, d), (m, d)
    by_vectors = model(inputs_embeds=torch.cat([P[None], e], dim=1)).logits[:, m:]
    without = model(text_ids).logits
start_differs = (by_vectors - by_ids).abs().max().item()
assert start_differs <= 1e-4 * by_ids.abs().max()
print(f"ids or vectors: the logits differ by {start_differs:.1g}; with and without the prompt, by {(without - by_ids).abs().max():.3g}")

# %% [markdown]
# That answers the first prediction: **from hard to soft nothing changes**, up to rounding. A soft prompt can begin where your best written prompt ends.
#
# ### Exercise 1: make room · 5 minutes · easy
#
# The sequence is $m$ places longer now, so what goes with it must be longer, too: the attention mask (1 where a place may be read) and the labels ($-100$ where no token is asked for). Padding in the text stays padding.
#
# <details>
# <summary>Hint</summary>
#
# `mask.new_ones(rows, columns)` makes ones of the mask's dtype and device; `labels.new_full(shape, value)` anything else. `torch.cat([…], dim=1)` joins along the tokens.
#
# </details>

# %%
def lengthen(mask: torch.Tensor, labels: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """mask and labels (batch, tokens) -> both (batch, length + tokens), for a prompt in front."""
    ### BEGIN SOLUTION
    front = (len(mask), length)
    return torch.cat([mask.new_ones(front), mask], dim=1), torch.cat([labels.new_full(front, -100), labels], dim=1)
    ### END SOLUTION

check.lengthen(lengthen)

# %% [markdown]
# ### Exercise 2: start from a text · 10 minutes · medium
#
# You get the table, the ids of a text and the wanted length. Return the vectors to start from. A text that is too short is repeated from its beginning, one that is too long is cut at its end: PEFT does so. And mind whose memory it is: $P$ will be trained, the table must not move.
#
# <details>
# <summary>Hint</summary>
#
# `[1, 2] * 3` is `[1, 2, 1, 2, 1, 2]`. Indexing with a list copies; a slice such as `table[3:7]` is a window on the same memory.
#
# </details>

# %%
def prompt_from_text(table: torch.Tensor, ids: list[int], length: int) -> torch.Tensor:
    """table (V, d), ids of a text -> (length, d), with memory of its own."""
    ### BEGIN SOLUTION
    wanted = (ids * length)[:length]
    return table[wanted].clone()
    ### END SOLUTION

check.prompt_from_text(prompt_from_text)

# %% [markdown]
# ### Step 2: only P trains
#
# Freeze the model, make $P$ a parameter, and take steps on one question. Watch the loss. (This $P$ is only for show and is dropped afterwards.) The logits at one place are about the token *after* it, so those that count begin one place before the answer. Afterwards no weight of the model has a gradient, and its bytes are what they were. The optimizer holds $2 \times m \times d$ numbers, not two for each weight.

# %%
model.requires_grad_(False)
answer_ids = tokenizer(exam["new"][0]["completion"], return_tensors="pt")["input_ids"].to(device)
e = table(torch.cat([text_ids, answer_ids], dim=1))                                # (1, T + A, d)
P = nn.Parameter(table(hard_ids)[0].clone())
optimizer = torch.optim.Adam([P], lr=0.01)
for step in range(mp.pick(smoke=2, cpu=5, gpu=5)):
    logits = model(inputs_embeds=torch.cat([P[None], e], dim=1)).logits            # (1, m + T + A, V)
    loss = F.cross_entropy(logits[0, m + T - 1 : -1], answer_ids[0])               # what comes after the question
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.3f}, gradient of P {P.grad.norm():.3g}")

assert all(p.grad is None for p in model.parameters()) and fingerprint(model) == at_first
held = sum(s[k].numel() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
assert held == 2 * m * d
print(f"trained: {P.numel():,} of {sum(p.numel() for p in model.parameters()):,} numbers; Adam holds {held:,}; frozen bytes as before")

# %% [markdown]
# ### Exercise 3: one step, precisely · 20 minutes · hard
#
# The question of this chapter as code: *what is trained, what is frozen?* You get a small frozen model, a prompt, texts and the token wanted at each place of the text. Return the prompt after **one step of plain gradient descent**. `model.embed(ids)` gives embeddings, `model(e)` gives logits for embeddings; its attention is causal. Nothing in the model may move, and the `P` that you got stays as it was.
#
# <details>
# <summary>Hint</summary>
#
# 1. `P.clone().requires_grad_()` is a copy that collects a gradient. 2. `P.expand(B, -1, -1)` repeats it for each text. 3. Of the logits, keep the last $T$ places. 4. `F.cross_entropy` wants (places, vocabulary) and (places,); `targets` already has the token wanted *at* each place, so nothing is shifted. 5. `torch.autograd.grad(loss, P)` gives a tuple of one gradient and touches nothing else.
#
# </details>

# %%
def prompt_step(model: nn.Module, P: torch.Tensor, ids: torch.Tensor, targets: torch.Tensor, lr: float) -> torch.Tensor:
    """P (m, d), ids and targets (B, T) -> P - lr dL/dP (m, d); L is the mean cross-entropy at the text's places."""
    ### BEGIN SOLUTION
    P = P.clone().requires_grad_()
    e = torch.cat([P.expand(len(ids), -1, -1), model.embed(ids)], dim=1)           # (B, m + T, d)
    logits = model(e)[:, len(P):]                                                  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (gradient,) = torch.autograd.grad(loss, P)
    return (P - lr * gradient).detach()
    ### END SOLUTION

check.prompt_step(prompt_step)

# %% [markdown]
# ### Step 3: P-tuning's network
#
# Liu et al. argue that vectors of words are poor places to start from, and that the places of a prompt should depend on each other. Their remedy, here in the form that Hugging Face PEFT gives it, with all vectors in front and the model frozen (the paper also mixes them with words, and tunes the model): train *inputs* $E$ and let a small network make the vectors, $P = f(E)$. Then all places share the weights of $f$, and a step moves them together. When training is over, keep $f(E)$ and throw $f$ away. There are two kinds of $f$. `mp.PTuning(m, "lstm")` first lets an LSTM read the places in both directions, so that each vector depends on its neighbours; a small network follows. `mp.PTuning(m, "mlp")` is the small network alone, and you build that one.
#
# ### Exercise 4: the network · 5 minutes · easy
#
# PEFT's form of it: three linear layers with a relu after the first and the second. $h$ is the width inside.
#
# <details>
# <summary>Hint</summary>
#
# The places are rows, so a layer is `x @ W.T + b`. There is no relu after the last layer: vectors of words have negative entries, too.
#
# </details>

# %%
def p_tuning_mlp(E, W1, b1, W2, b2, W3, b3) -> torch.Tensor:
    """E (m, d), W1 (h, d), W2 (h, h), W3 (d, h) and biases -> P (m, d)."""
    ### BEGIN SOLUTION
    hidden = torch.relu(E @ W1.T + b1)                                             # (m, h)
    hidden = torch.relu(hidden @ W2.T + b2)
    return hidden @ W3.T + b3
    ### END SOLUTION

check.p_tuning_mlp(p_tuning_mlp)

# %% [markdown]
# ## The same as the package
#
# `minipeft` does what you did by hand, and makes room in mask, positions and labels by itself. Here is the whole piece. Then the comparison with Hugging Face PEFT: the same random $P$, the same question.

# %%
(piece,) = mp.attach(model, mp.PromptTuning(LENGTH)).pieces().values()
print(inspect.getsource(type(piece)))
with torch.no_grad():
    by_package = model(text_ids).logits                                            # (1, length + T, V)
    rows = torch.cat([piece.P[None], table(text_ids)], dim=1)                      # (1, length + T, d)
    with mp.active(model, None):
        mine = model(inputs_embeds=rows).logits
assert torch.allclose(by_package, mine, atol=1e-4 * mine.abs().max().item())
print("yours = minipeft's; logits", tuple(by_package.shape), "for", T, "tokens of text and", LENGTH, "of prompt")
peft_error = None
try:
    import peft
    theirs = peft.get_peft_model(mp.load_base(BASE)[0], peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    with torch.no_grad():
        theirs.eval().prompt_encoder["default"].embedding.weight.copy_(piece.P)
        peft_error = ((theirs(text_ids).logits - by_package).abs().max() / by_package.abs().max()).item()
    print(f"yours = peft's (version {peft.__version__}): the logits differ by {peft_error:.1g} of the largest")
except ImportError:
    print("peft is not installed here, so this comparison is skipped (pip install peft)")

# %% [markdown]
# ## Nothing changed yet?
#
# A LoRA changes nothing before its first step. A soft prompt does. It stands there from the first step, and the model reads it. So the **start** matters: random vectors are noise in front of the text, a text is what the text is. The model's own bytes are untouched in each case.
#
# And count. A prompt trains $m\,d$ numbers. P-tuning trains its network on top, $h(d + h + d) + 2h + d$ for the mlp, and with $h = d$, as in PEFT, that is much more than the prompt.

# %%
mp.detach(model)
assert fingerprint(model) == at_first
starts = {"random": mp.PromptTuning(m), "vocab": mp.PromptTuning(m, init="vocab"), "text": mp.PromptTuning(m, init="text", text=TEXT),
          "P-tuning, mlp": mp.PTuning(m), "P-tuning, lstm": mp.PTuning(m, "lstm")}
at_start = [{"start": "no prompt", "trained": 0, "loss before training": mp.evaluate(model, tokenizer, asked)["loss"]}]
for name, method in starts.items():
    torch.manual_seed(0)
    mp.attach(model, method)
    trained = mp.parameter_report(model).trainable
    assert trained == method.parameter_count(d)                # the formula
    at_start.append({"start": name, "trained": trained, "loss before training": mp.evaluate(model, tokenizer, asked)["loss"]})
    with torch.no_grad():
        if name == "text":                                     # exactly the written prompt
            assert (model(text_ids).logits[:, m:] - by_ids).abs().max() <= 1e-4 * by_ids.abs().max()
    mp.detach(model)
assert fingerprint(model) == at_first
lab.table(at_start)

# %% [markdown]
# ## The fine-tune
#
# Four ways, the same questions, the same number of steps, each with a rate of its own (chapter 5 sweeps those of LoRA and full fine-tuning; the prompt's is swept further down, on another task):
#
# - **a soft prompt** of 20 tokens, started from that written prompt
# - **a LoRA of exactly the same size**: rank 1 on queries and values of a few layers
# - **a LoRA as in chapter 5**: rank 16 on all linear layers
# - **full fine-tuning**, as in chapter 1
#
# The prompt's rate is many times the others'. Lester et al. used 0.3, with another optimizer (Adafactor).

# %%
ids = tokenizer(TEXT)["input_ids"]
start_ids = tuple((ids * LENGTH)[:LENGTH])                     # repeated or cut, as in exercise 2
prompt, PROMPT_RATE = mp.PromptTuning(LENGTH, init="text", text=start_ids), 0.1
blocks = mp.anatomy.anatomy(model).blocks
pair = [[b.attentions[0].part(name)[0].path for name in "qv"] for b in blocks]     # queries and values of each block
per_block = sum(sum(model.get_submodule(path).weight.shape) for path in pair[0])   # numbers of rank 1 in one block
count = prompt.parameter_count(d) // per_block
places = [path for i in range(count) for path in pair[int((i + 0.5) * len(blocks) / count)]]
equal = mp.LoRA(rank=1, alpha=2, targets=tuple(places))
ways = {"soft prompt": (prompt, PROMPT_RATE), "LoRA, equal size": (equal, 1e-2),
        "LoRA, rank 16": (mp.LoRA(rank=16, alpha=32, targets="all-linear"), 2e-3), "full fine-tuning": (None, 2e-4)}
STEPS = mp.pick(smoke=1, cpu=28, gpu=150)

# %%
def teach(method, lr: float, examples, curve=None, base: str = BASE):
    """A fresh model, taught; None trains all of it. (model, what the run did)"""
    torch.manual_seed(0)
    student, its_tokenizer = mp.load_base(base)
    if method is not None:
        mp.attach(student, method)
    plan = mp.FitConfig(steps=STEPS, batch_size=mp.pick(smoke=2, cpu=4, gpu=8), lr=lr, progress=curve is not None)
    return student, mp.fit(student, its_tokenizer, examples, plan, watch=curve)

def examine(student) -> dict[str, float]:
    """Every score on the taught and on the new medicines: {"format, taught": …}."""
    marks = {f"{key}, {group}": value for group, examples in exam.items()
             for key, value in mp.score_cards(examples, answers(student, examples)).items()}
    return marks | {"loss, new": mp.evaluate(student, tokenizer, exam["new"])["loss"]}

curve, table_rows, students = lab.live_curve(), [{"way": "frozen"} | examine(model)], {}
for way, (method, lr) in list(ways.items())[: mp.pick(smoke=3, cpu=4, gpu=4)]:
    student, run = teach(method, lr, train, curve=curve)
    trained = mp.parameter_report(student).trainable
    table_rows.append({"way": way, "trained": trained, "rate": lr, "seconds": run.seconds} | examine(student))
    if method in (prompt, equal):
        students[way] = student

# %% [markdown]
# ### Behaviour and facts
#
# Now the scores as a picture, and below it as a table. Left, what is **behaviour**: the format, and copying the name out of the question. It can be judged on medicines that were never taught. Right, what is **facts**: they can only be expected of the taught ones.

# %% tags=["figure"]
scores = {row["way"]: row for row in table_rows}
wanted = {"format\n(new medicines)": "format, new", "name copied\n(new medicines)": "name, new",
          "each fact\n(taught)": "facts, taught", "all four facts\n(taught)": "all_facts, taught"}
colours = dict(zip(scores, ("grey", "orange", "sky", "blue", "vermilion")))
figure, ax = new_figure(width=9.2, height=3.6)
for i, (way, row) in enumerate(scores.items()):
    for j, key in enumerate(wanted.values()):
        x = j + 0.16 * (i - 2)
        ax.bar(x, 100 * row[key], width=0.15, color=COLOURS[colours[way]], label=way if j == 0 else None)
        ax.text(x, 100 * row[key] + 1, f"{100 * row[key]:.0f}", ha="center", va="bottom", fontsize=8)
ax.axvline(1.5, color=COLOURS["grey"], linestyle=":", linewidth=1.2)
ax.text(1.45, 112, "behaviour", ha="right", fontsize=11)
ax.text(1.55, 112, "facts", ha="left", fontsize=11)
ax.set_xticks(range(len(wanted)), list(wanted))
ax.set(ylabel="% of the answers", ylim=(0, 122))
ax.legend(ncols=5, fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
display(figure)
display(lab.table(table_rows))
p, q = scores["soft prompt"], scores["LoRA, equal size"]
assert p["trained"] == q["trained"]                            # equal, to the number
print(f"soft prompt, on medicines it never saw: format right in {p['format, new']:.0%}, name copied in {p['name, new']:.0%} of the answers")
print(f"soft prompt, on medicines it was taught: {p['facts, taught']:.0%} of the facts right, {p['all_facts, taught']:.0%} of the cards without a fault")
print(f"LoRA with the same {q['trained']:,} numbers, there: {q['facts, taught']:.0%} of the facts, {q['all_facts, taught']:.0%} of the cards")
if mp.profile().name == "smoke":
    print("The smoke profile takes a few steps: it shows that every cell runs, not what is learned.")
said = answers(students["soft prompt"], exam["taught"][:5])
lab.table([{"question": e["prompt"].strip(), "right": e["completion"], "the soft prompt's answer": a.strip().split("\n")[0][:90]}
           for e, a in zip(exam["taught"], said)])

# %% [markdown]
# Read the answers, not only the scores. Are there five fields, in order, and is the name spelled as in the question? That is behaviour. Now compare the other fields with the right ones. Where they are wrong, are they at least plausible, a class of medicine, a way to take it? Then the prompt has taught the model **what kind of thing to say**, and the model filled in the rest from what it knew.
#
# Compare the two halves of the figure, for the prompt and for the LoRA of the same size. The developer of the story asked a prompt for facts: how far would he have come here?
#
# ### How many facts fit?
#
# Perhaps these are simply too many cards for so few numbers? Then fewer should fit. Teach one card, then four, to the soft prompt and to the LoRA of equal size, and put the run from above beside them. All take equally many steps, so fewer cards are each seen more often. The measure is the share of single facts right, asked in a wording never trained on. Each point is one draw: one seed, one choice of cards.

# %%
sizes = mp.pick(smoke=[1], cpu=[1, 4], gpu=[1, 4, 10])
held = {way: {} for way in ("soft prompt", "LoRA, equal size")}
for way, n_facts in held.items():
    method, lr = ways[way]
    for n in sizes:
        few = taught[:n]
        student, _ = teach(method, lr, [e for e in train if e["card"] in few])
        test = [e for e in cards["test"] if e["card"] in few]
        n_facts[n] = mp.score_cards(test, answers(student, test))["facts"]
    n_facts[len(taught)] = scores[way]["facts, taught"]        # the run from above

letters = sum(len(text) for text in {e["completion"] for e in train})
print(f"the prompt: {4 * scores['soft prompt']['trained']:,} bytes; all the cards it is taught: {letters:,} letters")
figure, ax = new_figure(width=6.4, height=3.2)
for way, n_facts in held.items():
    ax.plot(list(n_facts), [4 * n * share for n, share in n_facts.items()], "o-", color=COLOURS[colours[way]], label=way)
ax.plot([1, N], [4, 4 * N], "--", color=COLOURS["grey"], linewidth=1.2, label="all of them")
ax.set(xlabel="medicines taught", ylabel="facts right")
ax.legend(frameon=False)
display(figure)
lab.table([{"medicines taught": n, "facts taught": 4 * n} | {f"{way}, % right": 100 * held[way][n] for way in held} for n in held["soft prompt"]])

# %% [markdown]
# The line above the figure compares the bytes of the prompt with the letters of all the cards. Room is not what is missing. A fact is a link from one name to one answer. The prompt is **the same for every question**; it can only add the same vectors to what attention reads, and the frozen layers must turn them into a different answer for each name. For one card, one answer will do. With more cards the same vectors must serve them all. LoRA changes weights that every token passes, and the row *LoRA, rank 16* of the big table shows what that can hold, with many times the numbers. A LoRA of the prompt's size is a tight fit: it may stay below the prompt in your figure, at its one rate and in these steps. So the figure does not decide between the two. It shows how fast *this* prompt's share falls.
#
# Some of the facts a model gets right, it may have known, or guessed: *by mouth* is right for many. Compare with the row *frozen*, and with the facts on **new** medicines in the big table.
#
# ## Sentiment, on MiniLM
#
# Now a task that asks for no facts: is a film review positive or negative? MiniLM is an encoder with six layers. As in chapter 1 it gets a new last layer. That layer is trained first, by itself. Every method starts there and trains it on, so *last layer only* is the baseline here: what comes on top is the method's.

# %%
def short(split: str, most: int) -> list[dict]:
    rows = [e for e in mp.load_data("sentiment/movies", split) if len(e["text"].split()) <= 12]
    return random.Random(0).sample(rows, min(most, len(rows)))

films, held_out = short("train", mp.pick(smoke=48, cpu=1000, gpu=2000)), short("test", mp.pick(smoke=16, cpu=200, gpu=500))
positive = sum(e["label"] for e in held_out) / len(held_out)
majority = max(positive, 1 - positive)

heads: dict[int, dict] = {}                                    # seed -> a last layer, trained by itself
FEW = mp.pick(smoke=4, cpu=8, gpu=32)                          # texts in a batch

def with_trained_head(seed: int):
    torch.manual_seed(seed)
    mini, mini_tokenizer = mp.load_base("minilm-l6", num_labels=2)
    if seed not in heads:
        mini.base_model.requires_grad_(False)
        plan = mp.FitConfig(steps=mp.pick(smoke=1, cpu=60, gpu=300), batch_size=FEW, lr=1e-2, seed=seed, progress=False)
        mp.fit(mini, mini_tokenizer, films, plan)
        heads[seed] = {name: t.clone() for name, t in mini.classifier.state_dict().items()}
        mini.requires_grad_(True)
    mini.classifier.load_state_dict(heads[seed])
    return mini, mini_tokenizer

# %%
def classify(method, lr: float, seed: int = 0, steps: int = mp.pick(smoke=1, cpu=30, gpu=100)) -> dict:
    """MiniLM, trained by `method`; "head": only the last layer goes on, "full": everything is trained."""
    mini, mini_tokenizer = with_trained_head(seed)
    if method == "head":
        mini.base_model.requires_grad_(False)
    elif method != "full":
        mp.attach(mini, method)
    plan = mp.FitConfig(steps=steps, batch_size=FEW, lr=lr, seed=seed + 100, progress=False)
    run = mp.fit(mini, mini_tokenizer, films, plan)
    return {"trained": mp.parameter_report(mini).trainable, "rate": lr, "seconds": run.seconds} | mp.evaluate(mini, mini_tokenizer, held_out)

SHORT, MINI_RATE = 10, 0.01                                    # soft tokens, and their rate
mini_ways = {"last layer only": ("head", 1e-2), "soft prompt": (mp.PromptTuning(SHORT, init="vocab"), MINI_RATE),
             "P-tuning, mlp": (mp.PTuning(SHORT, "mlp"), 2e-3), "P-tuning, lstm": (mp.PTuning(SHORT, "lstm", hidden=192), 2e-3),
             "LoRA, rank 8": (mp.LoRA(rank=8, alpha=16, targets="all-linear"), 2e-3), "full fine-tuning": ("full", 2e-4)}
sentiment = {way: classify(method, lr, steps=mp.pick(smoke=1, cpu=60, gpu=300)) for way, (method, lr) in mini_ways.items()}
error = math.sqrt(majority * (1 - majority) / len(held_out))
print(f"always the commoner label: {majority:.1%}; with {len(held_out)} test texts an accuracy is known to about ± {100 * error:.1f} points")
lab.table([{"way": way} | {k: row.get(k) for k in ("trained", "rate", "accuracy", "loss", "seconds")} for way, row in sentiment.items()])

# %% [markdown]
# Compare the prompt with the row above it, and then with the last two. Keep the error of the test in mind. Compare P-tuning's *trained* with the prompt's: the network is most of it, and it is thrown away afterwards. That is exact, as the next cell shows first: `mp.fold` replaces network and inputs by the vectors that they make.
#
# ## Where to start, and the luck of the draw
#
# Three starts with several seeds each, in runs that are short because they are many. A seed decides the random vectors, or which words are drawn, and also the new last layer and the order of the texts. With the text as the start, only the last two are left to chance.

# %% tags=["figure"]
mini, mini_tokenizer = mp.load_base("minilm-l6", num_labels=2)
mp.attach(mini, mini_ways["P-tuning, lstm"][0])
review = mini_tokenizer(held_out[0]["text"], return_tensors="pt").to(mini.device)
with torch.no_grad():
    with_network, count = mini(**review).logits, mp.parameter_report(mini).trainable
    mp.fold(mini)
    assert torch.allclose(mini(**review).logits, with_network, atol=1e-5)
print(f"P-tuning folded: the same logits, {count:,} numbers before, {mp.parameter_report(mini).trainable:,} after")

about = "Is this film review positive or negative? It is"
about_ids = mini_tokenizer(about, add_special_tokens=False)["input_ids"]
kinds = {"random": mp.PromptTuning(SHORT), "vocab": mp.PromptTuning(SHORT, init="vocab"),
         "text": mp.PromptTuning(SHORT, init="text", text=tuple((about_ids * SHORT)[:SHORT]))}
seeds = mp.pick(smoke=(0, 1), cpu=(0, 1, 2, 3, 4), gpu=range(10))
bare = classify("head", 1e-2)                                  # the last layer only, in as few steps
by_start = {kind: [classify(method, MINI_RATE, seed) for seed in seeds] for kind, method in kinds.items()}

figure, ax = new_figure(width=6.6, height=2.6)
for i, (kind, runs) in enumerate(by_start.items()):
    points = [100 * r["accuracy"] for r in runs]
    ax.plot(points, [i] * len(points), "o", color=COLOURS["orange"], alpha=0.7)
    ax.plot(sum(points) / len(points), i, "|", color=COLOURS["black"], markersize=18, markeredgewidth=2)
ax.axvline(100 * bare["accuracy"], color=COLOURS["grey"], linestyle="--", linewidth=1.2)
ax.text(100 * bare["accuracy"], 2.55, " last layer only", fontsize=9, color=COLOURS["grey"])
ax.set_yticks(range(3), list(by_start))
ax.set(xlabel="% right; each point a seed, the bar their mean", ylim=(-0.5, 2.9))
display(figure)
spread = {kind: torch.tensor([r["accuracy"] for r in runs]) for kind, runs in by_start.items()}
lab.table([{"start": kind, "mean": v.mean().item(), "spread (standard deviation)": v.std().item(), "worst": v.min().item(),
            "best": v.max().item(),
            "loss on the test, mean": sum(r["loss"] for r in by_start[kind]) / len(v)} for kind, v in spread.items()])

# %% [markdown]
# Lester et al. (section 3.2) found that the start matters for small models and stops mattering for the largest. Look at the spread within a row before you believe a difference between rows. A method that depends on luck must be run more than once: that is part of its price. And look at the dashed line. A point to its left has lost what the last layer could do alone; one at the commoner label's share gives everybody the same answer. The head reads the *first* position of the text, and there the prompt stands now: these few steps may not be enough to get over that.
#
# ## How long?
#
# 5, 10, 20, 50, 100 tokens. Left the score on MiniLM, one seed for each length; right the price, which does not go away after training: each token is one more place that every layer computes. LoRA can be merged into the weights. A prompt cannot.

# %% tags=["figure"]
lengths = mp.pick(smoke=(5, 100), cpu=(5, 10, 20, 50, 100), gpu=(5, 10, 20, 50, 100))
for length in lengths:
    mp.attach(model, mp.PromptTuning(length), f"{length}")
ms = {length: [] for length in (0, *lengths)}
with torch.no_grad():
    for _ in range(mp.pick(smoke=3, cpu=15, gpu=30)):
        for length, times in ms.items():                       # in turns: what else the computer does falls on all alike
            mp.activate(model, f"{length}" if length else None)
            began = time.perf_counter()
            model(input_ids=text_ids, attention_mask=torch.ones_like(text_ids)).logits.sum().item()  # waits for a GPU
            times.append(1000 * (time.perf_counter() - began))
for length in lengths:
    mp.detach(model, f"{length}")
by_length = [{"tokens": 0, "accuracy": bare["accuracy"], "ms": statistics.median(ms[0])}]
for length in lengths:
    found = classify(mp.PromptTuning(length, init="vocab"), MINI_RATE)
    by_length.append({"tokens": length, "trained": mp.PromptTuning(length).parameter_count(384), "accuracy": found["accuracy"],
                      "training, s": found["seconds"], "ms": statistics.median(ms[length])})

figure, (left, right) = new_figure(2, width=8.8, height=3)
lengths_shown = [row["tokens"] for row in by_length]
left.errorbar(lengths_shown, [100 * row["accuracy"] for row in by_length], yerr=100 * error, fmt="o-", color=COLOURS["orange"], capsize=3)
left.set(xlabel="soft tokens (0: last layer only)", ylabel="% right, MiniLM")
right.plot(lengths_shown, [row["ms"] for row in by_length], "o-", color=COLOURS["vermilion"])
right.set(xlabel="soft tokens", ylabel="ms for one question, SmolLM2" if "mol" in BASE else "ms for one question", ylim=(0, None))
display(figure)
slower = by_length[-1]["ms"] / by_length[0]["ms"]
print(f"{by_length[-1]['tokens']} tokens in front of a question of {T} make it take {slower:.2f} times as long")
lab.table(by_length)

# %% [markdown]
# The bars on the left are the error from the number of test texts. The spread over seeds, which you have just seen, comes on top. Is the longest prompt better than the shortest by more than that? Lester et al. found only marginal gains beyond twenty. Here ask first whether a length works at all: a score near the commoner label's share, printed above, says that it does not in these steps, and then nothing can be said about lengths.
#
# ## What do the vectors say?
#
# A prompt that started from words: are its vectors still near to them? Near means a small **angle**; lengths differ a lot between frequent and rare words.
#
# ### Exercise 5: the nearest word · 10 minutes · medium
#
# For each vector of $P$, find the row of the table with the largest cosine. The cell after it does so with the trained prompt, and asks: can you read it? Each vector is replaced by its nearest word. If the words *were* the prompt, nothing would change.
#
# <details>
# <summary>Hint</summary>
#
# $\cos(p, w) = p \cdot w \,/\, (|p|\,|w|)$. `F.normalize(x, dim=1)` brings every row to length 1; then a product of matrices gives all cosines at once.
#
# </details>

# %%
def nearest_words(P: torch.Tensor, table: torch.Tensor) -> list[int]:
    """P (m, d), table (V, d) -> m row numbers."""
    ### BEGIN SOLUTION
    cosine = F.normalize(P, dim=1) @ F.normalize(table, dim=1).T                   # (m, V)
    return cosine.argmax(dim=1).tolist()
    ### END SOLUTION

check.nearest_words(nearest_words)

# %%
learner, (piece,) = students["soft prompt"], mp.adapters(students["soft prompt"])["default"].pieces().values()
def loss_with(vectors) -> float:
    """The loss on the validation questions with these vectors as the prompt."""
    with torch.no_grad():
        piece.P.copy_(vectors)
    return mp.evaluate(learner, tokenizer, asked)["loss"]

learned, begin = piece.P.detach().clone(), table(torch.tensor(start_ids, device=device)).detach()
directions = F.normalize(table.weight.detach().float(), dim=1)                     # (V, d)
near, which = (F.normalize(learned.float(), dim=1) @ directions.T).max(dim=1)      # (m,)
kept, longer = F.cosine_similarity(learned, begin), learned.norm(dim=1) / begin.norm(dim=1)
neighbours = (directions[::97] @ directions.T).topk(2, dim=1).values[:, 1].mean()  # the first is the word itself
still = sum(now == then for now, then in zip(which.tolist(), start_ids)) / LENGTH
losses = {"the words it started from": loss_with(begin), "nearest words": loss_with(table(which).detach()), "as learned": loss_with(learned)}
print(f"{still:.0%} of the vectors are still nearest to their first word; cosine to it {kept.mean():.2f}, length {longer.mean():.1f} times")
print(f"cosine to the nearest word {near.mean():.2f}; of a real word to its nearest neighbour {neighbours:.2f}")
print("the nearest words:", " ".join(tokenizer.decode([i]) for i in which.tolist()).replace("\n", "⏎"))
lab.table([{"prompt": name, "loss, validation questions": loss} for name, loss in losses.items()])

# %% [markdown]
# Compare the last two rows. As far as their losses differ, what was learned is *not* in the words: it is in the distance to them. Khashabi et al. 2022 found prompts that do a task well while their nearest words say something else altogether. Read nearest words as a curiosity, never as an explanation.
#
# ## Break it: the learning rate
#
# A public example notebook tunes a prompt of 10 tokens on a classifier with a rate of 0.001. A reader [reports](https://github.com/huggingface/peft/issues/2642) that accuracy and F1 stay at 0.6838 and 0.8122, epoch after epoch. The loss moves, no error is raised. What do these two figures have in common? If a share $p$ of the texts is positive and the model always says "positive", accuracy is $p$ and F1 is $2p/(1+p)$.

# %%
reported = 0.6838
print(f"always 'positive': accuracy {reported}, F1 {2 * reported / (1 + reported):.4f}")
rates = {lr: classify(mp.PromptTuning(SHORT, init="vocab"), lr) for lr in mp.pick(smoke=(1e-3, 1.0), cpu=(1e-3, 1e-1, 1.0), gpu=(1e-4, 1e-3, 1e-1, 1.0))}
rates = dict(sorted((rates | {MINI_RATE: by_start["vocab"][0]}).items()))
best_rate = max(rates, key=lambda lr: rates[lr]["accuracy"])
print(f"here, always the commoner label: {majority:.1%}; the best rate of these: {best_rate:g}")
lab.table([{"rate": lr, "accuracy": row["accuracy"], "loss on the test": row["loss"]} for lr, row in rates.items()])

# %% [markdown]
# The two reported figures are those of a model that always says the same. So compare with the commoner label first, always. Then look at the rate: compare the rows, and the loss, which is less rough than the accuracy.
#
# ## Does a small model listen?
#
# A weight that LoRA changes can be changed by any amount. A prompt can only be *read*, and between it and the text stand normalisation and softmax. Test it: take a random prompt and make it **louder**, ten times, a hundred times. How far do the logits of the question move, as the root of the mean square? (A random prompt starts at about the length of a word's vector: that is *1 times*.)

# %%
torch.manual_seed(0)
loud = []
(direction,) = mp.attach(model, mp.PromptTuning(LENGTH)).pieces().values()
unit = direction.P.detach().clone()
with torch.no_grad():
    for times in (0.1, 1, 10, 100, 1000, 10_000):
        direction.P.copy_(times * unit)
        shift = (model(text_ids).logits[:, LENGTH:] - without).square().mean().sqrt().item()
        loud.append({"prompt, times a word's length": times, "logits move by": shift})
mp.detach(model)
ends = [row["logits move by"] for row in loud]
print(f"from 1,000 to 10,000 times a word's length the effect changes by {100 * (ends[-1] / ends[-2] - 1):+.1f} %")
lab.table(loud)

# %% [markdown]
# Shouting does not help: past some loudness only the *direction* of the vectors counts, and attention shares out a total of 1. The prompt must find directions that the frozen layers **already react to**. One explanation, which this chapter does not test: a large model has many such directions, a small one has few. What Lester et al. measured is in the paper's title: the gap to full fine-tuning closes only at billions of parameters.
#
# Is there such a gap on the models at hand? How much of what a LoRA gains does a soft prompt gain, with the same data and steps? A share near 1 is no gap. Mind what is measured: the cards' loss is on *new* medicines, whose facts nobody can know. What can be gained there is the format and the copied name, behaviour, and that is what a prompt is good at. This LoRA is the larger one, not the one of equal size. The columns *frozen*, *prompt* and *LoRA* are losses on the test; *frozen* on MiniLM means the last layer only. In the gpu profile the table goes on with larger models from the Hub, and only those rows share one task: do not read the first two as small against large.

# %%
def listens(name: str) -> dict:
    """A larger model: frozen, with a soft prompt, with a LoRA; loss on the new medicines."""
    big, its = mp.load_base(name)
    words = its(TEXT, add_special_tokens=False)["input_ids"]
    start = mp.PromptTuning(LENGTH, init="text", text=tuple((words * LENGTH)[:LENGTH]))
    row = {"model": name, "numbers": mp.parameter_report(big).total, "frozen": mp.evaluate(big, its, exam["new"])["loss"]}
    for way, method, lr in (("prompt", start, PROMPT_RATE), ("LoRA", *ways["LoRA, rank 16"])):
        row[way] = mp.evaluate(teach(method, lr, train, base=name)[0], its, exam["new"])["loss"]
    return row

def known(name: str, numbers: int, losses) -> dict:
    return {"model": name, "numbers": numbers} | dict(zip(("frozen", "prompt", "LoRA"), losses))

listening = [known("MiniLM, sentiment", mp.parameter_report(mini).total, (sentiment[w]["loss"] for w in ("last layer only", "soft prompt", "LoRA, rank 8"))),
             known(f"{BASE}, cards", mp.parameter_report(model).total, (scores[w]["loss, new"] for w in ("frozen", "soft prompt", "LoRA, rank 16")))]
larger = mp.pick(smoke=[], cpu=[], gpu=["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"])
listening += [listens(name) for name in larger if profiles.base_model() == BASE != "smollm2-135m"]   # the Hub is within reach
for row in listening:
    gain = row["frozen"] - row["LoRA"]
    row["prompt's share of LoRA's gain"] = (row["frozen"] - row["prompt"]) / gain if gain > 0.01 else None
lab.table(listening)

# %% [markdown]
# ## Exercise 6: find the bug · 15 minutes · medium
#
# A widely used harness for testing language models compared answers by the log-probability that the model gives each token. For models with P-tuning its accuracies came out [wrong](https://github.com/EleutherAI/lm-evaluation-harness/pull/533), for LoRA right. The cell does what it did, first without a prompt, then with one. PyTorch's own loss says what is right. Why is the second one off?
#
# Write it so that it is right with and without a prompt. Remember: the logits at one place are about the token *after* it.
#
# <details>
# <summary>Hint</summary>
#
# How many rows do the logits have? How many tokens do question and answer have together? Where the prompt stands in front, counting from the *end* is safe.
#
# </details>

# %%
def as_published(logits, question_ids: list[int], answer_ids: list[int]) -> torch.Tensor:
    first = len(question_ids) - 1                              # the place before the answer
    rows = logits[first : first + len(answer_ids)].log_softmax(dim=-1)
    return rows[torch.arange(len(answer_ids)), torch.tensor(answer_ids)]

student, one = students["soft prompt"], exam["taught"][0]
q, a = (tokenizer(one[part])["input_ids"] for part in ("prompt", "completion"))
both = torch.tensor([q + a], device=student.device)
targets = torch.tensor([[-100] * len(q) + a], device=student.device)
for names_active in (None, "default"):
    with torch.no_grad(), mp.active(student, names_active):
        out = student(both, labels=targets)
        got = -as_published(out.logits[0].cpu(), q, a).mean().item()
    print(f"{'with' if names_active else 'without'} the prompt: the harness's loss {got:.3f}, the right one {out.loss.item():.3f}")

def answer_log_probs(logits: torch.Tensor, question_ids: list[int], answer_ids: list[int]) -> torch.Tensor:
    """logits (L, V) of one text, L >= tokens of question and answer -> (A,), one for each token of the answer."""
    ### BEGIN SOLUTION
    rows = logits[-len(answer_ids) - 1 : -1].log_softmax(dim=-1)                   # counted from the end
    return rows[torch.arange(len(answer_ids)), torch.tensor(answer_ids)]
    ### END SOLUTION

check.answer_log_probs(answer_log_probs)

# %% [markdown]
# ## Merge? Save, reload, compare
#
# A prompt is no change of a weight, so there is nothing to merge: `mp.merge` says so. But its file is small, and many prompts can share one frozen model. In principle they can even share a batch, where each row gets its own prompt (Lester et al., figure 2); this chapter does not show that.

# %%
try:
    mp.merge(learner)
except TypeError as refusal:
    print("mp.merge:", refusal)
shelf, file_error = tempfile.TemporaryDirectory(), None
mp.save_adapter(learner, shelf.name)
files = {file.name: file.stat().st_size for file in sorted(Path(shelf.name).iterdir())}
again, _ = mp.load_base(BASE)
mp.load_adapter(again, shelf.name)
with torch.no_grad():
    learned_logits = learner(text_ids).logits
    assert torch.equal(again(text_ids).logits, learned_logits)                     # to the bit
    if peft_error is not None:                                                     # peft is here
        theirs = peft.PeftModel.from_pretrained(mp.load_base(BASE)[0], shelf.name).eval()
        file_error = ((theirs(text_ids).logits - learned_logits).abs().max() / learned_logits.abs().max()).item()
        print(f"opened by Hugging Face PEFT: the logits differ by {file_error:.1g} of the largest")
mp.detach(again)
assert fingerprint(again) == fingerprint(model) == at_first
print("detached: every byte of the base as in the first cell")
lab.table([{"file": name, "kB": size / 1e3} for name, size in files.items()])

# %% [markdown]
# ## What it cost, what you predicted, and a quiz
#
# The first cell prints this method's row for the cost table of the course, and your predictions beside the measured numbers. The second is the closing quiz: every choice says why it is right or wrong, and the numbers in it are computed.

# %%
p, q = scores["soft prompt"], scores["LoRA, equal size"]
measured = dict(zip(predicted, (start_differs, 100 * p["format, new"], 100 * p["all_facts, taught"], 100 * q["all_facts, taught"])))
row = {"method": "prompt tuning", "length": LENGTH, "trained": p["trained"], "percent": 100 * p["trained"] / mp.parameter_report(model).total,
       "seconds": p["seconds"], "file kB": sum(files.values()) / 1e3} | {key: p[key] for key in wanted.values()}
lab.record(
    main={"rows": table_rows, "steps": STEPS, "taught": N, "start differs": start_differs}, hard=hard,
    capacity={way: {str(n): v for n, v in found.items()} for way, found in held.items()},
    sentiment=sentiment | {"majority": majority, "error": error},
    starts={kind: v.tolist() for kind, v in spread.items()}, lengths=by_length,
    rates={f"{lr:g}": r["accuracy"] for lr, r in rates.items()}, loudness=loud, sizes=listening,
    checkpoint={"bytes": sum(files.values()), "peft error": peft_error, "peft error, from file": file_error,
                "nearest words": losses, "still nearest to the start": still},
)
display(lab.table([{"": key, "you": "no prediction" if predicted[key] is None else predicted[key], "measured": value} for key, value in measured.items()]))
lab.table([row])

# %%
full_7b = 20 * 4096
lab.quiz([
    {"question": "Hard prompt, soft prompt: what is the difference to the model's first layer?", "right": "none: vectors come in, one for each place",
     "choices": {"none: vectors come in, one for each place": "Only where they come from differs: rows of the table, or anything.",
                 "a soft prompt enters in every layer": "That is prefix tuning, the next chapter.",
                 "a hard prompt is read more precisely": "Started from its words, a soft prompt gave the same logits above.",
                 "a soft prompt changes the first layer's weights": "No weight changes: the fingerprint above is the same from first to last."}},
    {"question": "Prompt tuning on a language model. Which of these trains?", "right": "only the m × d numbers of the prompt",
     "choices": {"only the m × d numbers of the prompt": "Everything else is frozen; the gradient only passes through it.",
                 "the embedding table": "It is where a text start is copied *from*. A copy trains, the table does not.",
                 "the output head": "On a language model it is frozen. Only a classifier's new last layer trains as well.",
                 "the first layer's attention": "It reads the prompt, with the weights it had."}},
    {"question": "A 7B model of width 4,096 and 20 soft tokens: how many numbers train?", "right": f"{full_7b:,}",
     "choices": {f"{full_7b:,}": "$20 \\times 4096$. The number of layers plays no part.",
                 f"{full_7b * 32:,}": "That would be vectors in each of 32 layers.",
                 f"{2 * full_7b:,}": "Adam *holds* twice that for its states; they are not trained numbers of the prompt.",
                 "4,096": "That is one token."}},
    {"question": "The labels at the prompt's places are…", "right": "$-100$",
     "choices": {"$-100$": "The loss skips these places. They are there to be read, not to be predicted.",
                 "the start text's tokens": "Then the model would be trained to say its own prompt.",
                 "0": "That is a token like any other.",
                 "missing: labels have the text's length": "Then every label would belong to the wrong place."}},
    {"question": f"Your soft prompt has the format right in {100 * p['format, new']:.0f} % of the answers on medicines it never saw, and whole cards in {100 * p['all_facts, taught']:.0f} % on those it was taught. You need the facts. What do you do?",
     "right": "a LoRA of an ordinary rank, or the facts in the text",
     "choices": {"a LoRA of an ordinary rank, or the facts in the text": "Both can hold facts. How far each came here: the row of rank 16, and the row of the cheat sheet.",
                 "take a longer prompt": "The same vectors for each question, only more of them. (The curve of lengths above is about sentiment, not about facts.)",
                 "make the prompt's vectors larger": "Past some loudness hardly anything changes: you measured it with a random prompt.",
                 "start from another text": "The start decides where you begin. It adds no way to look up a name."}},
    {"question": "Accuracy stands still at 68 % from the first epoch, the loss moves a little. What do you check first?", "right": "the share of the commoner label",
     "choices": {"the share of the commoner label": "If it is 68 % as well, the model always says the same. Then look at the rate.",
                 "the tokenizer": "Possible, but compare with the cheapest explanation first.",
                 "whether the base is frozen": "It should be: that is the method."}},
    {"question": "P-tuning's network is ten or more times the size of the prompt. What does it cost when the model is in use?", "right": "nothing more than prompt tuning",
     "choices": {"nothing more than prompt tuning": "Its output is kept and it is thrown away: `mp.fold`, the same logits.",
                 "one pass through the network for each token": "The vectors are the same for every text, so they are computed once.",
                 "its file must be shipped along": "Only to go on training. The folded prompt is enough for use."}},
    {"question": f"A prompt of 100 tokens in front of a question of {T}. What does it cost in use, and for how long?", "right": "places in every layer, for ever",
     "choices": {"places in every layer, for ever": f"Measured above: {slower:.2f} times the time for this question. It cannot be merged.",
                 "nothing: it is folded into the weights": "That is LoRA. A prompt is no change of a weight.",
                 "only memory for its file": "Its file is tiny. Its places are computed for each text anew, or kept in a cache."}},
    {"question": "The nearest words to a trained prompt read “route caution dog”. What does that tell you?", "right": "next to nothing",
     "choices": {"next to nothing": f"Above, the loss was {losses['as learned']:.2f} as learned and {losses['nearest words']:.2f} with the nearest words in their place.",
                 "the model was trained on dogs": "A nearest row exists for any vector. Near is not same.",
                 "the prompt can be replaced by these words": "That was tested above: compare the two losses."}},
    {"question": "Why can a soft prompt not simply be made louder?", "right": "normalisation and softmax: only its direction counts, and attention sums to 1",
     "choices": {"normalisation and softmax: only its direction counts, and attention sums to 1": "See the table: past some loudness hardly anything more happens.",
                 "the optimizer clips it": "Clipping bounds a step, not the vector.",
                 "float32 would overflow": "At 10,000 times it was finite, and the effect had levelled off."}},
])

# %% [markdown]
# ## Recap
#
# - A hard prompt is rows of a frozen table. A soft prompt is any vectors in their place, trained: $e' = [P; e]$, $m \times d$ numbers.
# - Trained: $P$. Frozen: everything else. Room must be made in mask and labels. Logits get longer, too.
# - It can start exactly as a written prompt, and its rate has to be looked for: Lester et al. took 0.3, your sweep on MiniLM may say otherwise. Run several seeds, and put the commoner label beside the score.
# - Behaviour (format, a copied name) and facts are different things to learn. Judge them apart, as in your figure. Facts that a prompt does not hold go into a LoRA of an ordinary rank, or into the text.
# - Each soft token costs time in use. It cannot be merged. Its file is tiny.
# - In Lester et al., the smaller the model, the worse it listens. Measure a LoRA beside it.
#
# ## Next
#
# [Chapter 3](03_prefixes.ipynb) puts the vectors into every layer.
#
# ## Further reading
#
# - Lester et al. 2021, [The Power of Scale](https://arxiv.org/abs/2104.08691): figure 1 is the gap that closes with size; section 3.2 length, start, and the objective of pre-training
# - Liu et al. 2021, [GPT Understands, Too](https://arxiv.org/abs/2103.10385): P-tuning
# - Shin et al. 2020, [AutoPrompt](https://arxiv.org/abs/2010.15980): hard prompts, found by gradients
# - Khashabi et al. 2022, [Prompt Waywardness](https://arxiv.org/abs/2112.08348): what nearest words are worth
# - Petrov et al. 2023, [When Do Prompting and Prefix-Tuning Work?](https://arxiv.org/abs/2310.19698): what a prompt cannot do
# - Vu et al. 2021, [SPoT](https://arxiv.org/abs/2110.07904): prompts from one task as the start of another
