# ---
# jupyter:
#   minipeft:
#     records: [main, memory, accuracy, forgetting, old_skill, broken]
# ---

# %% [markdown]
# # 1 · Full fine-tuning: the baseline
#
# **In one sentence:** full fine-tuning moves every weight of a model; it learns well, it needs several times the model's own memory, and what it overwrites it cannot give back.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/01_full_fine_tuning.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - compute AdamW by hand, and build a training loop that ends with the same weights as `mp.fit`
# - say what is in memory while a model trains, predict its bytes, and check the prediction
# - fine-tune a real model, and tell a gain from noise
# - measure what a model forgets while it learns something new
# - recognise a learning rate that is too high, and a loop that averages wrongly
#
# **You need:** Python, PyTorch tensors, what a gradient is.
#
# **The papers:** Loshchilov & Hutter 2019, *Decoupled Weight Decay Regularization*, [arXiv:1711.05101](https://arxiv.org/abs/1711.05101): you build AdamW, its algorithm 2. Pascanu et al. 2013, [arXiv:1211.5063](https://arxiv.org/abs/1211.5063): clipping, algorithm 1. Chaudhry et al. 2018, [arXiv:1801.10112](https://arxiv.org/abs/1801.10112): forgetting, equation 3.

# %% tags=["setup"]
import subprocess, sys
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

import inspect, math, os, random, statistics, subprocess, tempfile
from dataclasses import replace
from pathlib import Path
import torch, torch.nn.functional as F, transformers
import minipeft as mp
from minipeft import lab, profiles, training
from minipeft.checks import ch01_full as check

lab.seed_everything(0)
print(f"minipeft {mp.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; profile {mp.profile().name} on {mp.profile().device}")
lab.runtime_box("01_full_fine_tuning")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the measured ones. You will fine-tune MiniLM, a small encoder, to tell positive from negative texts.
#
# 1. A training step on 32 short texts takes how many times the memory of the weights alone?
# 2. You train on film reviews. How many **percent** of unseen film reviews does the model then get right? (Guessing gets about half.)
# 3. You go on: product reviews, then editorials, then tweets. By how many **points** does the score on film reviews change?
# 4. MiniLM came as a search model. It could find a sentence by every third word of it. After the training on films alone, what **percent** of that skill is left?

# %%
predicted = {"memory, times the weights": None, "percent right on films": None,
             "change on films, points": None, "percent of the old skill left": None}

# %% [markdown]
# ## The problem
#
# Four collections of short English texts, each labelled positive (1) or negative (0) by human raters: film reviews, product reviews, newspaper editorials, tweets. One task, four domains. To save time you take texts of at most twenty words, and not all of them.
#
# (Hutto & Gilbert 2014. The texts are opinions of people, and not facts.)

# %%
DOMAINS = ("movies", "products", "editorials", "tweets")
WORDS = 20                                                     # the longest text taken

def short(domain: str, split: str, most: int) -> list[dict]:
    """At most `most` texts of one domain, drawn with a fixed seed from those of at most WORDS words."""
    rows = [e for e in mp.load_data(f"sentiment/{domain}", split) if len(e["text"].split()) <= WORDS]
    return random.Random(0).sample(rows, min(most, len(rows)))

train = {d: short(d, "train", mp.pick(smoke=48, cpu=1200, gpu=1600)) for d in DOMAINS}
test = {d: short(d, "test", mp.pick(smoke=16, cpu=300, gpu=1000)) for d in DOMAINS}
positive = {d: sum(e["label"] for e in test[d]) / len(test[d]) for d in DOMAINS}
majority = {d: max(share, 1 - share) for d, share in positive.items()}
lab.table([{"domain": d, "train": len(train[d]), "test": len(test[d]), "positive in test": positive[d],
            "label": e["label"], "an example": e["text"]} for d in DOMAINS for e in train[d][:1]])

# %% [markdown]
# ### The model, and what it knows so far
#
# MiniLM has six layers. It was trained to put texts of like meaning near each other. For two classes it gets a new **head**: one linear layer, with random weights. So before training, its answers are chance.
#
# Compare with two cheap answers. *Always the commoner label* needs no model. *Head only* trains the new layer and leaves the rest frozen. Whoever trains everything should beat both.

# %%
def fresh(seed: int = 0):
    """MiniLM as published, under a new head for two classes, drawn with this seed."""
    torch.manual_seed(seed)
    return mp.load_base("minilm-l6", num_labels=2)

def scores(model) -> dict[str, float]:
    """Accuracy on the test texts of each domain."""
    return {d: mp.evaluate(model, tokenizer, test[d])["accuracy"] for d in DOMAINS}

model, tokenizer = fresh()
rows = [{"model": "always the commoner label"} | majority, {"model": "not trained"} | scores(model)]
model.base_model.requires_grad_(False)                         # all but the head
mp.fit(model, tokenizer, train["movies"], mp.FitConfig(steps=mp.pick(smoke=2, cpu=75, gpu=100), lr=1e-2, progress=False))
rows.append({"model": "head only, trained on movies"} | scores(model))
lab.table(rows)

# %% [markdown]
# ## The idea
#
# Move every weight $\theta$ a little downhill, again and again. The gradient $g$ says which way is downhill. AdamW does not follow $g$ itself. It keeps two running means for every weight: $m$, of the gradient, and $v$, of its square. Then it divides one by the root of the other (algorithm 2 of the paper, written as PyTorch computes it: $\eta$, the rate, stands before the decay as well):
#
# $$m \leftarrow \beta_1 m + (1-\beta_1)\, g \qquad v \leftarrow \beta_2 v + (1-\beta_2)\, g^2$$
#
# $$\hat m = \frac{m}{1-\beta_1^t} \qquad \hat v = \frac{v}{1-\beta_2^t} \qquad \theta \leftarrow \theta - \eta \left( \frac{\hat m}{\sqrt{\hat v} + \varepsilon} + \lambda\,\theta \right)$$
#
# | | shape | lives |
# |---|---|---|
# | $\theta$, the weights | as the model's | always |
# | $g$, the gradients | the same | from the backward pass to the step |
# | $m$ and $v$, AdamW's states | the same, twice | from the first step to the end |
# | activations: what the layers computed and the backward pass needs | batch × tokens × width, many times | from the forward pass until the backward pass has used them |
# | $\eta$, $\lambda$, $t$ | one number each | rate, weight decay, number of the step |
#
# So training holds **four numbers for every weight**, and the activations besides. The first four do not care how much text you feed. The activations grow with it. Here is what `mp.memory_bill` predicts for this model, from its configuration alone.

# %%
TOKENS = 24
bills = {f"{b} × {TOKENS} tokens": mp.memory_bill(model, "full", batch=b, seq=TOKENS) for b in (1, 8, 32, 128)}
lab.bill_figure(bills)

# %% [markdown]
# ## By hand
#
# Take pencil and paper. One weight, $\theta = 1$. To keep the numbers round: $\beta_1 = \beta_2 = \frac12$, rate $\eta = 0.1$, decay $\lambda = 0.1$, and forget $\varepsilon$. The first gradient is $0.5$, the second $0.1$.
#
# 1. Compute $m$, $v$, $\hat m$, $\hat v$ and the new $\theta$ after the first step.
# 2. Do the second.
# 3. What would the first step have been with a gradient of $500$?
#
# Then run the cell. It does the same, and asks PyTorch's AdamW.

# %%
theta, m, v, lines = 1.0, 0.0, 0.0, []
weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
adamw = torch.optim.AdamW([weight], lr=0.1, betas=(0.5, 0.5), weight_decay=0.1, eps=0)
for t, g in enumerate((0.5, 0.1), start=1):
    m, v = 0.5 * m + 0.5 * g, 0.5 * v + 0.5 * g**2
    m_hat, v_hat = m / (1 - 0.5**t), v / (1 - 0.5**t)
    theta -= 0.1 * (m_hat / math.sqrt(v_hat) + 0.1 * theta)
    weight.grad = torch.tensor([g], dtype=torch.float64)
    adamw.step()
    assert math.isclose(theta, weight.item(), rel_tol=1e-12)
    lines.append({"step": t, "g": g, "m": m, "v": v, "m̂": m_hat, "√v̂": math.sqrt(v_hat), "m̂ / √v̂": m_hat / math.sqrt(v_hat), "θ": theta})
lab.table(lines, "yours and PyTorch's agree")

# %% [markdown]
# The third question: in step 1, $\hat m = g$ and $\sqrt{\hat v} = |g|$, so the quotient is $\pm 1$ **whatever the gradient**. A gradient of $500$ moves the weight as far as one of $0.5$. The first step goes by the full rate in every weight at once, on the word of a single batch. Remember that when you come to warm-up.
#
# ## Build it
#
# ### Step 1: a batch and its loss
#
# Texts become rows of token numbers, padded to the longest, with a mask that hides the padding. The model returns one score (*logit*) per class. The loss is the mean of $-\log p$ of the right class.

# %%
model, _ = fresh()
some = train["movies"][:8]
labels = torch.tensor([e["label"] for e in some], device=model.device)
batch = tokenizer([e["text"] for e in some], padding=True, return_tensors="pt").to(model.device)   # (B, T)

logits = model(**batch).logits                                             # (B, classes)
log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
loss = -log_p[torch.arange(len(some)), labels].mean()
assert torch.isclose(loss, F.cross_entropy(logits, labels))                # it is the cross-entropy

alone = model(**tokenizer(some[0]["text"], return_tensors="pt").to(model.device)).logits
assert torch.allclose(alone[0], logits[0], atol=1e-4)                      # the padding changes nothing
print(f"token numbers {tuple(batch['input_ids'].shape)}, logits {tuple(logits.shape)}")
print(f"loss {loss.item():.4f}; knowing nothing gives log 2 = {math.log(2):.4f}")

# %% [markdown]
# ### Exercise 1: which tokens does a language model learn from? (5 minutes, ★)
#
# A classifier has one target per text. A language model has one per token: the next one. When it learns to *answer*, only the tokens of the answer may count. The question is given. If it counted, the model would spend its effort on learning to ask.
#
# By custom, a target of $-100$ means "do not look here". You get the token numbers of a prompt and of its completion. Give the list of targets, as long as both together. Nothing is shifted: the model does that.
#
# <details>
# <summary>Hint</summary>
#
# Do not decide by the token's value: the same token can stand in the prompt and in the completion. Decide by its place. `[0] * 3` is a list of three zeros.
#
# </details>

# %%
def completion_only_labels(prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
    """-100 wherever the loss must not look, the token itself elsewhere."""
    ### BEGIN SOLUTION
    return [-100] * len(prompt_ids) + completion_ids
    ### END SOLUTION

check.completion_only_labels(completion_only_labels)

# %% [markdown]
# ### Step 2: backward
#
# One call fills in a gradient beside every weight, of the same shape. For the head's bias you can write it down yourself: the mean over the batch of $p - y$, where $y$ is 1 for the right class and 0 for the other.
#
# Look at the embedding, too. Only rows of words that occur get a gradient. It is stored in full all the same.

# %%
loss.backward()
p_minus_y = logits.softmax(dim=-1) - F.one_hot(labels, 2)                  # (B, classes)
assert torch.allclose(model.classifier.bias.grad, p_minus_y.mean(dim=0), atol=1e-6)
assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())

words = model.base_model.embeddings.word_embeddings.weight                 # (vocabulary, width)
touched = (words.grad != 0).any(dim=-1).sum().item()
assert touched <= batch["input_ids"].unique().numel()
print(f"{touched} of {len(words):,} rows of the embedding have a gradient; it takes {words.grad.nbytes / 1e6:.1f} MB")

# %% [markdown]
# ### Step 3: AdamW
#
# The formula from above, on whole tensors. `m` and `v` are made at the first step and stay. Compare three steps with PyTorch's.

# %%
@torch.no_grad()
def adamw_(weights, grads, states: dict, lr: float, t: int, betas=(0.9, 0.999), eps=1e-8, decay=0.0) -> None:
    """One step of AdamW, number t from 1. Changes the weights and the states in place."""
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        m, v = states.setdefault(i, (torch.zeros_like(w), torch.zeros_like(w)))
        m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w.sub_(lr * (m_hat / (v_hat.sqrt() + eps) + decay * w))

mine = [torch.randn(5, 3), torch.randn(4)]
theirs = [torch.nn.Parameter(w.clone()) for w in mine]
optimizer, states = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1), {}
for t in (1, 2, 3):
    grads = [torch.randn_like(w) for w in mine]
    adamw_(mine, grads, states, lr=0.01, t=t, decay=0.1)
    for w, g in zip(theirs, grads):
        w.grad = g
    optimizer.step()
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs))
print("three steps: the same weights as torch.optim.AdamW")

# %% [markdown]
# ### Exercise 2: the bytes of AdamW's states (5 minutes, ★★)
#
# How many bytes do $m$ and $v$ take for a given model, once AdamW has taken a step? Each has the shape and the dtype of its weight. Weights that do not train have none.
#
# <details>
# <summary>Hint</summary>
#
# `p.numel()` is how many numbers a tensor holds, `p.element_size()` how many bytes each takes.
#
# </details>

# %%
def adamw_state_bytes(model: torch.nn.Module) -> int:
    """Bytes of AdamW's two moments for this model."""
    ### BEGIN SOLUTION
    return sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    ### END SOLUTION

check.adamw_state_bytes(adamw_state_bytes)

# %% [markdown]
# ## What is in memory, measured
#
# Now count, tensor by tensor, at five moments of two training steps. Weights, gradients and states can be listed. The activations are what autograd *saves* for the backward pass: `saved_tensors_hooks` calls you for each tensor that it keeps. A storage that several of them share counts once, and the weights themselves do not count.

# %%
def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

subject, _ = fresh()
subject.train()
optimizer, moments, saved = torch.optim.AdamW(subject.parameters(), lr=1e-4), {}, {}
own = {p.untyped_storage().data_ptr() for p in [*subject.parameters(), *subject.buffers()]}
ids = torch.randint(1000, 30000, (32, TOKENS), device=subject.device)
targets = torch.zeros(32, dtype=torch.long, device=subject.device)

def keep(tensor):                                              # called for each tensor that autograd saves
    saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor

def note(moment: str, activations: int = 0) -> None:
    states = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    moments[moment] = {"weights": bytes_of([*subject.parameters(), *subject.buffers()]),
                       "gradients": bytes_of(p.grad for p in subject.parameters() if p.grad is not None),
                       "optimizer": bytes_of(states), "activations": activations}

# %%
def forward(moment: str):
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = subject(input_ids=ids, labels=targets).loss
    note(moment, sum(size for place, size in saved.items() if place not in own))
    return loss

note("loaded")
loss = forward("1st forward pass")
loss.backward()
note("1st backward pass")
optimizer.step()
optimizer.zero_grad()
note("1st step, gradients dropped")
loss = forward("2nd forward pass")
del loss
lab.bill_figure(moments)

# %% [markdown]
# The activations go while the gradients come. And the optimizer's states, the largest part, appear with the first step: a run that survives step 1 can still die in step 2.
#
# ### The prediction against the count
#
# The bill's lines are compared one by one. Its `peak` is the highest moment of a whole step. To measure that, you take the same step in a fresh process, because this one already holds other models, and ask how far its memory grew. (The setting at the end tells the C library to give freed memory back. Otherwise it keeps some, and you would measure its habits.)

# %%
def growth(batch: int, tokens: int) -> int:
    """By how many bytes the process grows over the loaded model while it takes two training steps."""
    import torch, minipeft as mp
    from minipeft import profiles
    model, _ = mp.load_base("minilm-l6", num_labels=2)
    ids = torch.randint(1000, 30000, (batch, tokens), device=model.device)
    labels = torch.zeros(batch, dtype=torch.long, device=model.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
    with torch.no_grad():
        model(input_ids=ids[:1])                               # now all code and weights are really loaded
    before = profiles.memory_in_use()
    profiles.reset_peak_memory()
    for _ in range(2):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return profiles.peak_memory() - before

done = subprocess.run([sys.executable, "-c", inspect.getsource(growth) + f"print(growth(32, {TOKENS}))"],
                      capture_output=True, text=True, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000"})

# %%
bill = bills[f"32 × {TOKENS} tokens"]
counted = {"weights": moments["loaded"]["weights"], "gradients": moments["1st backward pass"]["gradients"],
           "optimizer": moments["2nd forward pass"]["optimizer"], "activations": moments["2nd forward pass"]["activations"],
           "peak": moments["loaded"]["weights"] + int(done.stdout.split()[-1])}
memory = [{"line": line, "predicted, MB": getattr(bill, line) / 1e6, "measured, MB": size / 1e6,
           "error, %": 100 * (getattr(bill, line) - size) / size} for line, size in counted.items()]
times = counted["peak"] / counted["weights"]
assert all(line["error, %"] == 0 for line in memory[:3])       # weights, gradients, states: to the byte
print(f"measured peak: {times:.1f} times the weights")
lab.table(memory)

# %% [markdown]
# Weights, gradients and states agree to the byte. The peak need not: the process also holds buffers of the matrix library, and some memory that was freed but not given back. Where memory is tight, leave a margin.
#
# ### Step 4: the rate, with warm-up and decay
#
# The first steps go by the full rate on little evidence, you saw it above. So the rate starts small and climbs: the **warm-up**. At the end it falls, here along half a cosine, so that the last steps settle.

# %%
def rate(step: int, steps: int, peak: float, warm: int) -> float:
    """The rate of step `step` (from 0): climbs for `warm` steps, then falls along half a cosine."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

plan = mp.FitConfig(steps=mp.pick(smoke=2, cpu=75, gpu=100), batch_size=16, lr=2e-4, warmup=0.1)
steps = 75
mine = [rate(s, steps, plan.lr, round(plan.warmup * steps)) for s in range(steps)]
assert all(math.isclose(r, plan.rate(s, steps)) for s, r in enumerate(mine))   # as mp.FitConfig computes it

figure, ax = lab.new_figure(width=5.4, height=2.4)
ax.plot(range(1, steps + 1), mine)
ax.set(xlabel="step", ylabel="rate", ylim=(0, None))
figure

# %% [markdown]
# ### Step 5: clipping, and the whole loop
#
# Now and then a batch gives a huge gradient. Clipping takes all gradients as one long vector. If it is longer than allowed, it is shortened. Its direction stays.
#
# Then everything together. Two things make your loop comparable with `mp.fit`. `training.encode` and `training.batch_of` choose the texts of each step, the same for both. And dropout, which in training sets some activations to zero at random, draws from a seed that depends on the step alone.

# %%
def clip_(grads, longest: float = 1.0) -> float:
    """Shorten all gradients together to the length `longest`, in place; returns the length before."""
    length = math.sqrt(sum(g.square().sum().item() for g in grads))
    if length > longest:
        for g in grads:
            g.mul_(longest / length)
    return length

def my_fit(model, examples, plan) -> list[float]:
    weights, states, losses = list(model.train().parameters()), {}, []
    encoded = training.encode(model, tokenizer, examples)
    for step in range(plan.steps):
        torch.manual_seed(plan.seed * 1_000_003 + step)
        rows = sorted(training.batch_of(encoded, plan.batch_size, plan.seed, step), key=len, reverse=True)
        batch = tokenizer.pad({"input_ids": [r.ids for r in rows]}, return_tensors="pt").to(model.device)
        loss = F.cross_entropy(model(**batch).logits, torch.tensor([r.label for r in rows], device=model.device))
        grads = torch.autograd.grad(loss, weights)
        clip_(grads, plan.clip)
        adamw_(weights, grads, states, rate(step, plan.steps, plan.lr, round(plan.warmup * plan.steps)), step + 1)
        losses.append(loss.item())
    return losses

# %% [markdown]
# ## The same as the package
#
# One run with your loop, one with `mp.fit`, from the same start. Then the losses and the answers must agree up to rounding. Below the comparison you see the package's step. What it has more: it cuts a batch into passes, and it can compute in 16 bits.

# %%
small = replace(plan, steps=3, batch_size=4, precision="fp32", progress=False)
one, two = fresh()[0], fresh()[0]
mine = my_fit(one, train["movies"], small)
package = [entry["loss"] for entry in mp.fit(two, tokenizer, train["movies"], small).history]
with torch.no_grad():
    apart = (one.eval()(**batch).logits - two.eval()(**batch).logits).abs().max().item()
moved = (two(**batch).logits - logits).abs().max().item()
assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(mine, package)) and apart < 0.02 * moved
print("losses, yours:    ", *(f"{x:.5f}" for x in mine))
print("losses, mp.fit's: ", *(f"{x:.5f}" for x in package))
print(f"after {small.steps} steps the logits moved by up to {moved:.3f}; yours and mp.fit's differ by {apart:.1e}\n")
print(inspect.getsource(training._step))

# %% [markdown]
# ## Nothing changed yet: what will train
#
# All of it. You can count a BERT's numbers from its shapes: $V$ words, $T$ positions, width $d$, feed-forward width $f$, $L$ layers. A linear layer has a bias, a layer norm has two vectors. The *pooler* is one more linear layer, between the last layer and the head.
#
# $$(V + T + 2 + 2)\,d + L\,\big(\underbrace{4(d^2 + d)}_{\text{attention}} + \underbrace{2df + f + d}_{\text{feed-forward}} + \underbrace{4d}_{\text{two norms}}\big) + \underbrace{d^2 + d}_{\text{pooler}} + \underbrace{2d + 2}_{\text{head}}$$

# %%
model, _ = fresh()
c = model.config
V, T, d, f, L = c.vocab_size, c.max_position_embeddings, c.hidden_size, c.intermediate_size, c.num_hidden_layers
formula = (V + T + 4) * d + L * (4 * (d * d + d) + 2 * d * f + f + d + 4 * d) + d * d + d + 2 * d + 2
report = mp.parameter_report(model)
assert report.total == report.trainable == formula
published = {name: p.detach().clone() for name, p in model.named_parameters()}
print(f"{report.trainable:,} numbers, all of them trained; {V * d / report.total:.0%} are the embedding of words")

# %% [markdown]
# ## The fine-tune
#
# Train on film reviews, from several seeds. A seed decides the new head and the order of the texts. Each run draws its own line.
#
# Then test, before and after. Two sources of noise. **Seeds**: the spread in the table is the standard deviation over the runs. **Test texts**: with $n$ of them, an accuracy $p$ is known to about $\pm\sqrt{p(1-p)/n}$. A difference smaller than these says nothing.

# %%
runs, by_seed, curve = [], [], lab.live_curve()
for seed in mp.pick(smoke=(1, 0), cpu=(2, 1, 0), gpu=(4, 3, 2, 1, 0)):
    model, _ = fresh(seed)
    runs.append(mp.fit(model, tokenizer, train["movies"], replace(plan, seed=seed), watch=curve))
    by_seed.append(scores(model))

mean = {d: statistics.mean(s[d] for s in by_seed) for d in DOMAINS}
spread = {d: statistics.stdev(s[d] for s in by_seed) for d in DOMAINS}
test_error = {d: math.sqrt(mean[d] * (1 - mean[d]) / len(test[d])) for d in DOMAINS}
gain = mean["movies"] - rows[2]["movies"]
print(f"{runs[-1].steps} steps of {plan.batch_size} texts take {runs[-1].seconds:.0f} seconds")
print(f"movies: {mean['movies']:.1%} right, {100 * gain:+.1f} points over the head alone")
print(f"noise: {100 * spread['movies']:.1f} points from seeds, {100 * test_error['movies']:.1f} from the number of test texts")
lab.table([*rows, {"model": "everything trained, mean over seeds"} | mean, {"model": "  spread over seeds"} | spread,
           {"model": "  error from the number of test texts"} | test_error])

# %% [markdown]
# It never saw a product, an editorial or a tweet. What it learned about films helps there, too, or not: see the row.
#
# ### What moved?
#
# Compare the weights with the published ones. Some numbers did not move at all: the embeddings of words that never occurred, of positions behind the longest text, and of the second of two texts, since here there is only one.

# %%
kinds = {"words": "word_embeddings", "positions": "position_embeddings", "first/second": "token_type", **{f"layer {i}": f"layer.{i}." for i in range(L)}, "pooler": "pooler", "head": "classifier"}
moved_by, stayed = {}, {}
with torch.no_grad():
    for kind, part in kinds.items():
        pairs = [(p, published[name]) for name, p in model.named_parameters() if part in name]
        moved_by[kind] = math.sqrt(sum((p - w).square().sum() for p, w in pairs) / sum(w.square().sum() for _, w in pairs))
        stayed[kind] = sum((p == w).sum().item() for p, w in pairs) / sum(w.numel() for _, w in pairs)
in_layers = statistics.mean(stayed[f"layer {i}"] for i in range(L))
print(f"not moved at all: {stayed['words']:.0%} of the embedding of words, {stayed['positions']:.0%} of that of positions, "
      f"{stayed['first/second']:.0%} of that of first and second text, {in_layers:.2%} of the layers")

figure, ax = lab.new_figure(width=6.8, height=2.8)
ax.bar(moved_by.keys(), moved_by.values())
ax.tick_params(axis="x", rotation=30)
ax.set_ylabel(r"$\|\Delta W\| \,/\, \|W\|$")
ax.set_title("how far each part moved, relative to its size", loc="left")
figure

# %% [markdown]
# Every layer moved, and only a little in relation to its size. That is why a *small* update may be enough, and why one may hope to write it with few numbers. Chapter 5 does.
#
# ## Forgetting
#
# The model now knows films. Train it on products, then on editorials, then on tweets, each time from where it stands. After each stage, test all four. Nobody asks it to keep what it knows about films. Does it?
#
# And test something that no stage trains. The model was made for search: it turns a text into a vector, the mean over its tokens, and texts of like meaning lie near each other. So given every third word of a sentence, it can find the sentence among all others. Call that the **old skill**.

# %%
def find_again(model) -> float:
    """The old skill: of some hundred sentences, the share found again by every third word."""
    texts = [e["text"].split() for e in mp.load_data("sentiment/editorials", "test")]
    texts = [t for t in texts if 12 <= len(t) <= WORDS][: mp.pick(smoke=24, cpu=180, gpu=180)]
    places = []
    for lines in ([" ".join(t[::3]) for t in texts], [" ".join(t) for t in texts]):
        batch = tokenizer(lines, padding=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            hidden = model.base_model(**batch).last_hidden_state           # (B, T, d)
        mask = batch["attention_mask"][..., None]                          # (B, T, 1)
        places.append(F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
    nearest = (places[0] @ places[1].T).argmax(dim=1).cpu()                # cosine similarity
    return (nearest == torch.arange(len(texts))).float().mean().item()

skill = {"as published": find_again(fresh()[0])}
accuracy = [by_seed[-1]]                                       # the run with seed 0 goes on
skill["movies"] = find_again(model)
for domain in DOMAINS[1:]:
    mp.fit(model, tokenizer, train[domain], replace(plan, progress=False))
    accuracy.append(scores(model))
    skill[f"then {domain}"] = find_again(model)

# %%
stages = [DOMAINS[0], *(f"then {d}" for d in DOMAINS[1:])]
a = [[row[d] for d in DOMAINS] for row in accuracy]            # a[i][j]: stage i, tested on domain j
lab.heat_map(a, stages, DOMAINS, row_label="trained on", column_label="tested on", low=0.5)

# %% [markdown]
# Read down a column. On the diagonal a domain has just been trained. Below it, its training is over, and the number can only hold, fall, or rise because the later domains helped.
#
# ### Exercise 3: forgetting as a number (10 minutes, ★★)
#
# Chaudhry et al. 2018, equation 3. For each task $j$ but the last, with $T$ stages counted from 0:
#
# $$f_j = \max_{l \in \{0, \ldots, T-2\}} a_{l,j} - a_{T-1,j}$$
#
# In words: the best score that the task ever had before the last stage, minus the one it has at the end. It is negative if the last stage helped.
#
# <details>
# <summary>Hint</summary>
#
# The maximum goes down a column, over all rows but the last. `zip(*accuracy)` gives the columns.
#
# </details>

# %%
def forgetting(accuracy: list[list[float]]) -> list[float]:
    """accuracy[i][j] after stage i on task j, T rows of T numbers -> T - 1 numbers."""
    ### BEGIN SOLUTION
    *before, end = accuracy
    return [max(row[j] for row in before) - end[j] for j in range(len(end) - 1)]
    ### END SOLUTION

check.forgetting(forgetting)

# %% [markdown]
# ### What was forgotten here?
#
# For comparison, a model that sees all four domains **mixed**, in as many steps as the four stages together. It is what you would do if you had all texts from the start. Often you do not.

# %%
mixed = [e for d in DOMAINS for e in train[d]]
joint, _ = fresh()
joint_run = mp.fit(joint, tokenizer, mixed, replace(plan, steps=len(DOMAINS) * plan.steps), watch=lab.live_curve())
together = scores(joint)
skill["all four mixed"] = find_again(joint)

table = torch.tensor(a)
lost = dict(zip(DOMAINS, (table[:-1, :-1].amax(dim=0) - table[-1, :-1]).tolist()))
noise = {d: math.sqrt(2 * table[-1, j].item() * (1 - table[-1, j].item()) / len(test[d])) for j, d in enumerate(DOMAINS)}
beyond = {d: "more than noise" if abs(x) > 2 * noise[d] else "within noise" for d, x in lost.items()}
for d, x in lost.items():
    print(f"{d:11} forgetting {100 * x:+5.1f} points, error ± {100 * noise[d]:.1f}: {beyond[d]}")
lab.table([{"model": stage} | row for stage, row in zip(stages, accuracy)] + [{"model": "all four mixed"} | together])

# %% [markdown]
# The error is that of a difference of two accuracies, and twice the error is the usual line. Compare the last two rows: what one model can reach on all four, and what is left after the stages.
#
# The four domains are one task. What helps on one often helps on the next, so do not expect a catastrophe. But look at the old skill, which no stage trained.

# %%
left = skill["movies"] / skill["as published"]
figure, ax = lab.new_figure(width=7.4, height=3)
ax.bar(skill.keys(), skill.values(), color=[lab.COLOURS["grey"], *[lab.COLOURS["vermilion"]] * 4, lab.COLOURS["sky"]])
for place, value in enumerate(skill.values()):
    ax.text(place, value, f"{value:.0%}", ha="center", va="bottom")
ax.set(ylabel="sentences found again", ylim=(0, 1.1))
ax.set_title("the skill that the model came with", loc="left")
ax.tick_params(axis="x", labelsize=9)
print(f"after the films alone {left:.0%} of the old skill is left, after all four stages {skill[stages[-1]] / skill['as published']:.0%}")
figure

# %% [markdown]
# This is what forgetting is about. The score on the new task says nothing of it: you only see it if you test what you did not train. And there is no way back, unless you kept a copy of all the weights.
#
# A frozen base cannot forget. Detach the adapter, and every byte of the old skill is there: you saw that in chapter 0. With the adapter attached the skill may be gone all the same. That has to be measured, too.
#
# ## Break it: the learning rate
#
# Four short runs on the same texts: the rate from above and ten times that, each with and without warm-up.

# %% tags=["figure"]
broken, kept = [], {}
for factor in (1, 10):
    for warmup in (0.25, 0.0):
        name = f"{factor * plan.lr:g}, {'with' if warmup else 'no'} warm-up"
        trial, _ = fresh()
        recipe = replace(plan, steps=mp.pick(smoke=2, cpu=30, gpu=40), lr=factor * plan.lr, warmup=warmup, progress=False)
        try:
            kept[name] = mp.fit(trial, tokenizer, train["movies"], recipe).history
            row = {"largest gradient": max(h["grad_norm"] for h in kept[name])} | mp.evaluate(trial, tokenizer, test["movies"])
        except ArithmeticError as error:                       # mp.fit stops at a loss that is not finite
            row = {"stopped": str(error)}
        broken.append({"rate": name} | row)

figure, ax = lab.new_figure(width=7, height=3.3)
for (name, history), colour in zip(kept.items(), ("blue", "sky", "vermilion", "orange")):
    ax.plot(lab.smooth([h["loss"] for h in history], 0.5), label=name, color=lab.COLOURS[colour])
ax.axhline(math.log(2), color=lab.COLOURS["grey"], linestyle="--", linewidth=1.2, label="knowing nothing")
ax.set(xlabel="step", ylabel="loss, smoothed", ylim=(0, None))
ax.legend(fontsize=9, ncols=2)
display(figure)
lab.table(broken)

# %% [markdown]
# A loss that sits at $\log 2$, the grey line, is a model that gives both classes the same chance. Ten times the rate can push it there within a few steps, and it does not come back: what the model came with is overwritten, and a few hundred texts cannot replace it. Nothing raises an error. Look at the curve, and compare the accuracy with the share of the commoner label.
#
# Warm-up spares the first steps: compare the two high rates at the left. It does not make a wrong rate right.
#
# ## Exercise 4: find the bug (10 minutes, ★★)
#
# A batch is too large for the memory, so it comes in several passes, and their gradients add up. For years, widely used trainers did it as below, and in 2024 it was [found](https://huggingface.co/blog/gradient_accumulation) and mended. The cell compares with the batch in one pass. With equal passes all is well. With unequal ones it is not. Why?
#
# Mend it: the mean loss of each pass gets a weight, so that the sum is the mean over the whole batch. Which weights? You get how many targets each pass has.
#
# <details>
# <summary>Hint</summary>
#
# Write the mean over the batch as one sum over all targets. How much does a target of pass $i$ count in the mean of its pass, and how much should it?
#
# </details>

# %%
def accumulate_as_published(model, passes) -> torch.Tensor:
    """The gradient of the head, from a batch that comes in several passes."""
    model.zero_grad()
    for examples in passes:
        batch = tokenizer([e["text"] for e in examples], padding=True, return_tensors="pt").to(model.device)
        labels = torch.tensor([e["label"] for e in examples], device=model.device)
        loss = F.cross_entropy(model(**batch).logits, labels)              # the mean over this pass
        (loss / len(passes)).backward()
    return model.classifier.weight.grad.clone()

probe, _ = fresh()
right = accumulate_as_published(probe, [some])
for cut in (4, 7):
    got = accumulate_as_published(probe, [some[:cut], some[cut:]])
    print(f"passes of {cut} and {len(some) - cut}: the gradient is off by {((got - right).norm() / right.norm()).item():.1e} of its length")

def pass_weights(targets: list[int]) -> list[float]:
    """targets[i]: how many targets pass i has -> by what its mean loss is multiplied."""
    ### BEGIN SOLUTION
    return [n / sum(targets) for n in targets]
    ### END SOLUTION

check.pass_weights(pass_weights)

# %% [markdown]
# `mp.fit` sidesteps it: its passes give *sums*, and each is divided by the targets of the whole batch.
#
# ## Save, reload, compare
#
# What you trained is all of the model, so all of it must be stored, once for each task. For comparison, the last line: a LoRA on the same model. Ten tasks then need the base once, and ten small files. How it works is the matter of chapter 5. Here only its size counts.

# %%
shelf = Path((folder := tempfile.TemporaryDirectory()).name)
joint.save_pretrained(shelf / "full")
tokenizer.save_pretrained(shelf / "full")
again, _ = mp.load_base(str(shelf / "full"))
with torch.no_grad():
    assert torch.equal(again(**batch).logits, joint(**batch).logits)       # the same, to the bit

mp.attach(fresh_one := fresh()[0], mp.LoRA(rank=8, targets="attention"))
mp.save_adapter(fresh_one, shelf / "adapter")
file_bytes = {kind: sum(f.stat().st_size for f in (shelf / kind).glob("*.safetensors")) for kind in ("full", "adapter")}
ten = {kind: 10 * size + (file_bytes["full"] if kind == "adapter" else 0) for kind, size in file_bytes.items()}
words = {"full": "the whole model", "adapter": "a LoRA of rank 8"}
lab.table([{"": words[kind], "one task, MB": file_bytes[kind] / 1e6, "ten tasks, MB": ten[kind] / 1e6} for kind in words])

# %% [markdown]
# ## The row for the cost table, and your predictions

# %%
measured = dict(zip(predicted, (times, 100 * mean["movies"], 100 * (a[-1][0] - a[0][0]), 100 * left)))
row = {"method": "full fine-tuning", "trained": report.trainable, "percent": report.percent, "seconds": runs[-1].seconds,
       "peak MB": counted["peak"] / 1e6, "file MB": file_bytes["full"] / 1e6, "movies": mean["movies"],
       "forgotten, mean": statistics.mean(lost.values())}
lab.record(
    main=row | {"steps": plan.steps, "batch": plan.batch_size, "rate": plan.lr, "seeds": len(runs), "spread": spread["movies"]},
    memory=memory, forgetting=lost, old_skill=skill,
    accuracy={"commoner label": majority, "not trained": rows[1], "head only": rows[2], "mean": mean, "spread": spread,
              "stages": a, "mixed": together},
    broken=[{k: v for k, v in r.items()} for r in broken],
)
display(lab.table([{"": key, "you": "no prediction" if predicted[key] is None else predicted[key], "measured": value} for key, value in measured.items()]))
lab.table([row])

# %% [markdown]
# ## Quiz
#
# Every choice says why it is right or wrong. The numbers are computed, not typed.

# %%
w = counted["weights"] / 1e6
lab.quiz([
    {"question": f"The weights of a model take {w:.0f} MB in float32. Weights, gradients and AdamW's states together, before any activation?",
     "right": f"{4 * w:.0f} MB",
     "choices": {f"{4 * w:.0f} MB": "Four numbers a weight: itself, its gradient, $m$ and $v$.",
                 f"{2 * w:.0f} MB": "That is weights and gradients: plain SGD.",
                 f"{3 * w:.0f} MB": "One state is missing: AdamW keeps $m$ and $v$.",
                 f"{w:.0f} MB": "That is enough to run it, not to train it."}},
    {"question": "You double the batch. Which line of the memory doubles?", "right": "the activations",
     "choices": {"the activations": "They are kept for every token of the pass.",
                 "the gradients": "One number a weight, however many texts they sum over.",
                 "the optimizer's states": "They have the shape of the weights.",
                 "all of them": "Compare the bars above: only one part grows."}},
    {"question": "Step 1 went through, step 2 dies for lack of memory. What came in between?", "right": "$m$ and $v$ were made",
     "choices": {"$m$ and $v$ were made": "The first `step()` makes them. In step 2 the activations come on top.",
                 "a leak": "Possible, but the states explain it: look at the five moments.",
                 "the gradients of step 1 stayed": "`zero_grad` drops them, and in step 1 they were there as well."}},
    {"question": "In AdamW's first step one weight has gradient 0.001, another 10. How far do they move (no decay)?", "right": "equally far",
     "choices": {"equally far": "$\\hat m / \\sqrt{\\hat v} = \\pm 1$ for both: each moves by the rate.",
                 "the second 10,000 times as far": "That is plain gradient descent.",
                 "the first farther": "The quotient has the size 1 for both."}},
    {"question": "You train a chat model on questions and answers. What is the target at the question's tokens?", "right": "$-100$",
     "choices": {"$-100$": "By custom it means: do not look here.",
                 "the question's own tokens": "Then it learns to ask, and the answer is drowned by long questions.",
                 "0": "That is a token like any other; it would learn to predict it."}},
    {"question": "Pass A has 3 targets, pass B has 1. You average the two passes' mean losses. What is wrong?", "right": "B's target counts three times as much as each of A's",
     "choices": {"B's target counts three times as much as each of A's": "It has weight ½; each of A's has a sixth. All should have a quarter.",
                 "nothing": "Only if the passes have equally many targets.",
                 "the rate is doubled": "The sum of the weights is still 1."}},
    {"question": "After fine-tuning, the new task's score is excellent. What do you know about the old skills?", "right": "nothing",
     "choices": {"nothing": "You must test them. Above, the films went well while the old skill went away.",
                 "they are still there": "Nobody trained them, so nothing kept them.",
                 "they are gone": "That depends on rate, steps and how near the tasks are. Test."}},
    {"question": f"Two methods differ by 2 points on {len(test['products'])} test texts. What do you conclude?", "right": "too little to tell",
     "choices": {"too little to tell": f"An accuracy of 80 % on so many texts is known to about ± {100 * math.sqrt(0.16 / len(test['products'])):.1f} points, and seeds add to that.",
                 "the better one is better": "Compare the difference with its error first.",
                 "they are equally good": "Not shown either: the test is too small to see a difference of this size."}},
])

# %% [markdown]
# ## Recap
#
# - Full fine-tuning moves every weight. It holds four numbers for each of them, and the activations besides.
# - `mp.memory_bill` predicts that before you allocate anything. Check a prediction; then trust it.
# - AdamW's first steps go by the full rate on little evidence. Warm up, clip, decay.
# - A gain is a gain when it is larger than the spread over seeds and the error of the test.
# - What no stage trains, nothing keeps. Test the old skills, or freeze them.
# - A copy of the whole model for each task: that is the cost that the rest of this course avoids.
#
# ## Next
#
# [Chapter 5](05_lora.ipynb) freezes all of this and learns a small update beside it.
#
# ## Further reading
#
# - Loshchilov & Hutter 2019, [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101): AdamW
# - Devlin et al. 2018, [BERT](https://arxiv.org/abs/1810.04805), appendix A.3: how to fine-tune it
# - Mosbach et al. 2020, [On the Stability of Fine-tuning BERT](https://arxiv.org/abs/2006.04884): seeds, warm-up, vanishing gradients
# - Chaudhry et al. 2018, [Riemannian Walk for Incremental Learning](https://arxiv.org/abs/1801.10112): forgetting, measured
# - McCloskey & Cohen 1989, *Catastrophic Interference in Connectionist Networks*: where the name comes from
# - Hutto & Gilbert 2014, [VADER](https://doi.org/10.1609/icwsm.v8i1.14550): the texts and their ratings
