# ---
# jupyter:
#   minipeft:
#     records: [main, sizes, claim, stability, sentiment, capacity, share, checkpoint]
# ---

# %% [markdown]
# # 3 · Prefixes: keys and values that no token wrote
#
# **In one sentence:** prefix tuning leaves every weight of the model as it is and gives each attention layer a few more positions to look at, whose keys and values are trained.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/03_prefixes.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - say which tensors prefix tuning trains, in which layers, and count them from a model's shapes
# - write attention with a prefix, and show that in a causal model any prompt is a special prefix
# - read off how much a layer looks at its prefix
# - explain what the network of prefix tuning is for, train with and without it, and fold it away
# - tell what a prefix learns well and what it hardly learns, beside a prompt, a LoRA of equal size and full fine-tuning
#
# **You need:** Python, what keys, values and queries are. Chapter 2 (soft prompts) helps. LoRA, built in chapter 5, is only compared with: it adds a small trained update to the weights themselves.
#
# **The papers:** Li & Liang 2021, *Prefix-Tuning*, [arXiv:2101.00190](https://arxiv.org/abs/2101.00190): you build its section 4.2, and the network of section 4.3. Liu et al. 2021, *P-Tuning v2*, [arXiv:2110.07602](https://arxiv.org/abs/2110.07602): the same without the network, on classifiers too. He et al. 2022, [arXiv:2110.04366](https://arxiv.org/abs/2110.04366): the equation of its section 3.1 you show by hand.

# %% tags=["setup"]
import hashlib, inspect, json, math, random, statistics, subprocess, sys, tempfile, warnings
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

from dataclasses import replace
from pathlib import Path
import torch, transformers
import minipeft as mp
from minipeft import lab, profiles
from minipeft.checks import ch03_prefixes as check

lab.seed_everything(0)
print(f"minipeft {mp.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; profile {mp.profile().name} on {mp.profile().device}")
lab.runtime_box("03_prefixes")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the measured ones.
#
# 1. *Ten prefixes on a model of 12 layers and width 768 are 184,320 parameters, well under 0.1 % of it.* So says an article on the web, and means ten prefix positions. How many **percent** of BERT-base are they really?
# 2. In this chapter's language model, one prefix position trains as many numbers as **how many** vectors of a soft prompt?
# 3. You train a prefix until it does its task. How many **percent** of the attention goes to it, on average over layers and heads?
# 4. You give a prompt, a prefix and a LoRA equally many numbers and equally many steps, and let each learn a list of facts that nobody can know. Which one keeps most: `"prompt"`, `"prefix"` or `"LoRA"`?

# %%
predicted = {"percent of BERT-base": None, "prompt vectors to one position": None,
             "percent of attention on the prefix": None, "keeps most facts": None}

# %% [markdown]
# ## The problem
#
# A soft prompt is put in front of the text once, at the bottom. What the upper layers see there, the frozen model decides. Can you not speak to every layer directly?
#
# The task is the one of chapter 2, on a few medicines and in both directions: answer in one fixed format, and know the facts. *Forward:* the name is in the question, the card is the answer. *Reverse:* the card is in the question, the name is the answer. The wordings of the test questions are not trained on. The scores are shares of the answers. Forward: *format* kept, *name* copied, *facts* (each of the four on its own), *all_facts* (all four right). Reverse: *recall*, the name is right. First, the frozen model. This is teaching data, not medical advice.

# %%
BASE = profiles.base_model()
model, tokenizer = mp.load_base(BASE)
names = sorted({e["card"] for e in mp.load_data("drug_cards")})
chosen = mp.pick(smoke=2, cpu=6, gpu=48)
few = names[:: len(names) // chosen][:chosen]
cards = {split: [e for e in mp.load_data("drug_cards", split) if e["card"] in few] for split in ("train", "test")}

def exam(model) -> dict[str, float]:
    """The share of test questions answered right, letter for letter."""
    questions = cards["test"][:: mp.pick(smoke=8, cpu=1, gpu=1)]
    longest = mp.pick(smoke=4, cpu=24, gpu=24)                 # tokens; no card is longer
    answers = mp.generate(model, tokenizer, [e["prompt"] for e in questions], max_new_tokens=longest)
    return mp.score_cards(questions, answers)

frozen = exam(model)
one = cards["train"][0]
print(f"{len(few)} medicines, {len(cards['train'])} questions to learn from, {len(cards['test'])} to be asked\n")
print(one["prompt"] + one["completion"])
lab.table([{"model": "frozen"} | frozen])

# %% [markdown]
# ## The idea
#
# Attention compares a query $q$ with keys $K$ and mixes values $V$. Prefix tuning puts $n$ trained rows in front of both, in **every** layer $l$:
#
# $$\mathrm{attention}_l(q,\; [P_K^l;\, K],\; [P_V^l;\, V])$$
#
# | | shape | |
# |---|---|---|
# | $q$ | $(H, T, d)$ | $H$ query heads of width $d$ (in chapter 2, $d$ was the width of the model), $T$ tokens; frozen, no prefix |
# | $K$, $V$ | $(G, T, d)$ | what the frozen layer makes of the tokens; $G$ key/value heads |
# | $P_K^l$, $P_V^l$ | $(G, n, d)$ | **trained**, one pair in each of $L$ layers |
#
# No token stands at the new positions. They have no query, no feed-forward, no output. They are only looked at.
#
# Many models have fewer key/value heads than query heads: several query heads share one (*grouped-query attention*). Then keys and values are **narrower than the model**. The picture shows this model's first and last layers, from its own shapes.

# %% tags=["figure"]
from matplotlib.patches import Rectangle
from minipeft.lab.plots import COLOURS, new_figure
from minipeft.sockets import attention_sites

sites = attention_sites(model)                                 # path -> (G, d)
L, (G, d) = len(sites), next(iter(sites.values()))
H, width, n, T = model.config.num_attention_heads, model.config.hidden_size, 8, 12
figure, ax = new_figure(width=9, height=4.6)
ax.axis("off")
for row, layer in enumerate((L - 1, 1, 0)):
    y = -1.75 * row - 0.35 * (row > 0)
    ax.text(-0.6, y + 0.55, f"layer {layer}", ha="right", va="center", fontsize=11)
    for x, name, heads, prefix in ((0, "q", H, None), (11, "K", G, "P_K"), (27, "V", G, "P_V")):
        start = x
        if prefix:
            ax.add_patch(Rectangle((x, y), 0.5 * n, 1.2 * heads / H, color=COLOURS["green"]))
            ax.text(x + 0.25 * n, y + 1.2 * heads / H + 0.08, f"${prefix}^{{{layer}}}$", ha="center", va="bottom", fontsize=12)
            start = x + 0.5 * n
        ax.add_patch(Rectangle((start, y), 0.7 * T, 1.2 * heads / H, color=COLOURS["grey"], alpha=0.4))
        ax.text(start + 0.35 * T, y + 0.6 * heads / H, f"${name}$", ha="center", va="center", fontsize=12)
for x in (4.2, 17.2, 33.2):
    ax.text(x, -0.3, "⋮", ha="center", va="center", fontsize=15)
for x, says in ((4.2, f"queries: {H} × {d} = {H * d}"), (17.2, f"keys: {G} × {d} = {G * d}"), (33.2, f"values: {G} × {d} = {G * d}")):
    ax.text(x, 1.75, says, ha="center", fontsize=11)
ax.text(0, -4.75, f"green: trained, {n} positions   grey: made by the frozen model from {T} tokens   height: width of the tensor", fontsize=10)
ax.set(xlim=(-4, 41), ylim=(-5, 2.2))
print(f"{L} layers, width of the model {width}, of keys and of values {G * d}; first site: {next(iter(sites))}")
figure

# %% [markdown]
# ### Exercise 1: count what trains · 5 minutes · easy
#
# You get the number of layers, of query heads, of key/value heads, the width of a head, and the length of the prefix. How many numbers does a prefix train, without any network? The figure above has all you need.
#
# <details>
# <summary>Hint</summary>
#
# One layer has one $P_K$ and one $P_V$. Both have the shape in the table. Queries get no prefix.
#
# </details>

# %%
def prefix_parameter_count(layers: int, heads: int, kv_heads: int, head_dim: int, length: int) -> int:
    """Numbers in all P_K and P_V."""
    ### BEGIN SOLUTION
    return 2 * layers * kv_heads * head_dim * length
    ### END SOLUTION

check.prefix_parameter_count(prefix_parameter_count)

# %% [markdown]
# ### The article's figure
#
# Articles write $n \times d_\mathrm{model} \times 2 \times L$. That holds where keys are as wide as the model: BERT, GPT-2. With grouped-query attention it is too much. Compare *as articles count* with *ten positions*, and look at the percentages.

# %%
def shapes_of(name: str, config) -> dict:
    """Ten prefix positions on a model that is built without memory, from its configuration."""
    with torch.device("meta"):
        total = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv, wide = getattr(config, "num_key_value_heads", heads), config.hidden_size
    count = mp.PrefixTuning(10, reparameterize=False).parameter_count(layers, kv * wide // heads)
    return {"model": name, "layers": layers, "width": wide, "width of K": kv * wide // heads, "as articles count": 10 * wide * 2 * layers,
            "ten positions": count, "of": total, "percent": 100 * count / total}

llama = transformers.LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                 num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
claims = [shapes_of("BERT-base", transformers.BertConfig()), shapes_of("GPT-2", transformers.GPT2Config()),
          shapes_of("this chapter's model", model.config), shapes_of("Llama-3-8B, without head", llama)]
bert = claims[0]
assert bert["ten positions"] == 184_320 == bert["as articles count"]
print(f"BERT-base: {bert['percent']:.2f} %. 'Well under 0.1 %' would need {bert['ten positions'] * 1000:,} parameters; it has {bert['of']:,}")
lab.table(claims)

# %% [markdown]
# ## By hand
#
# Take pencil and paper. One head of width $d = 1$, so $\sqrt d = 1$. The query is $q = 1$. Two tokens: $K = (0,\; \ln 2)$, $V = (3,\; 6)$. The weight of a key is $e^{qk}$, divided by the sum of all.
#
# 1. Compute the attention over the two tokens.
# 2. A prefix position comes: $P_K = \ln 3$, $P_V = 1$. Compute the attention over all three.
# 3. Which share $\lambda$ of the weight goes to the prefix?
# 4. Compute $(1 - \lambda) \cdot$ (result of 1) $+\; \lambda \cdot P_V$. What do you notice?

# %%
weights, values = torch.tensor([0.0, math.log(2)]).exp(), torch.tensor([3.0, 6.0])
without = (weights @ values / weights.sum()).item()
more, more_values = torch.tensor([math.log(3), 0.0, math.log(2)]).exp(), torch.tensor([1.0, 3.0, 6.0])
with_prefix = (more @ more_values / more.sum()).item()
lam = (more[0] / more.sum()).item()
print(f"1. {without:.3f}   2. {with_prefix:.3f}   3. λ = {lam:.3f}   4. {(1 - lam) * without + lam * 1:.3f}")
assert math.isclose(with_prefix, (1 - lam) * without + lam * 1, rel_tol=1e-6)

# %% [markdown]
# A prefix **mixes in** something, and takes away from the rest (He et al. 2022, section 3.1):
#
# $$\mathrm{attention}(q, [P_K; K], [P_V; V]) = (1 - \lambda)\,\mathrm{attention}(q, K, V) + \lambda\,\mathrm{attention}(q, P_K, P_V)$$
#
# How the tokens of this layer are weighted *among themselves* it cannot change. What it adds depends on the query, and $\lambda$ is the gate. He et al. conclude that a prefix is close to an adapter, the method of chapter 4.
#
# ## Build it
#
# ### Step 1: attention with a prefix
#
# ### Exercise 2: attention with a prefix · 15 minutes · medium
#
# Write it for a causal model with grouped heads. Query head $h$ reads key/value head $h \,/\!/\, (H/G)$. Query $t$ sees the whole prefix and the tokens $0 \ldots t$. As always, $q \cdot k$ is divided by $\sqrt d$ before the softmax. $B$ is the number of texts in the batch.
#
# <details>
# <summary>Hint</summary>
#
# `P_K.expand(B, -1, -1, -1)` gives every row of the batch the same prefix. `repeat_interleave` makes $H$ heads out of $G$. In the mask of shape $(T, n + T)$ the triangle of the tokens starts in column $n$: see `torch.tril` and its second argument.
#
# </details>

# %%
def prefix_attention(
    q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, P_K: torch.Tensor, P_V: torch.Tensor
) -> torch.Tensor:
    """q (B, H, T, d), K and V (B, G, T, d), P_K and P_V (G, n, d) -> (B, H, T, d)."""
    ### BEGIN SOLUTION
    B, H, T, d = q.shape
    G, n, _ = P_K.shape
    K = torch.cat([P_K.expand(B, -1, -1, -1), K], dim=2).repeat_interleave(H // G, dim=1)
    V = torch.cat([P_V.expand(B, -1, -1, -1), V], dim=2).repeat_interleave(H // G, dim=1)
    see = torch.ones(T, n + T, dtype=torch.bool, device=q.device).tril(n)
    scores = (q @ K.mT / d**0.5).masked_fill(~see, -torch.inf)     # (B, H, T, n + T)
    return scores.softmax(-1) @ V
    ### END SOLUTION

check.prefix_attention(prefix_attention)

# %% [markdown]
# ### Step 2: into a real model
#
# Do you know a place where a model already keeps keys and values of earlier positions? Its **cache**. When it generates, it stores them so that it need not compute them again. So fill the cache with your prefix, and the model takes it for the past. That is what Hugging Face PEFT does.
#
# `minipeft` does not use the cache. It plugs the prefix into the attention function of each layer, the **key/value socket**. Then it also works where there is no cache: on encoders, and with gradient checkpointing. The logits are the same.

# %%
from transformers import DynamicCache

question = tokenizer(cards["test"][0]["prompt"], return_tensors="pt").to(model.device)
with torch.no_grad():
    before = model(**question).logits                          # (1, T, vocabulary)
    prefix = [[torch.randn(G, 5, d, device=model.device) for _ in "KV"] for _ in range(L)]
    past = DynamicCache()
    for layer, (P_K, P_V) in enumerate(prefix):
        past.update(P_K[None], P_V[None], layer)
    cached = model(input_ids=question["input_ids"], past_key_values=past).logits

    adapter = mp.attach(model, mp.PrefixTuning(5, reparameterize=False))
    for piece, (P_K, P_V) in zip(adapter.pieces().values(), prefix):
        piece.K.copy_(P_K), piece.V.copy_(P_V)
    plugged = model(**question).logits
mp.detach(model)
scale = cached.abs().max()
assert (plugged - cached).abs().max() < 1e-4 * scale and (plugged - before).abs().max() > 0.01 * scale
print(f"cache and socket differ by {(plugged - cached).abs().max() / scale:.1g} of the largest logit")

# %% [markdown]
# ### Step 3: every prompt is a prefix
#
# A layer computes keys and values of the prompt's positions, and the text looks at them. Compute them once, store them as $P_K$ and $P_V$, drop the prompt: the text cannot tell. This needs a causal model, where the prompt cannot look at the text behind it. In an encoder it can, and its keys and values change with each text.
#
# ### Exercise 3: the prefix of a prompt · 10 minutes · medium
#
# What goes into one layer's attention at $n$ prompt positions is $h$. Give the layer's $P_K$ and $P_V$, cut into heads. (Real models may add a bias or rotate the keys. Leave that out.)
#
# <details>
# <summary>Hint</summary>
#
# `h @ W_K.T` is $(n, G \cdot d)$. Cut the last axis into heads first, then swap two axes.
#
# </details>

# %%
def prefix_of_a_prompt(
    h: torch.Tensor, W_K: torch.Tensor, W_V: torch.Tensor, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """h (n, width), W_K and W_V (kv_heads · d, width) -> P_K and P_V, each (kv_heads, n, d)."""
    ### BEGIN SOLUTION
    n = len(h)
    P_K, P_V = ((h @ W.T).view(n, kv_heads, -1).transpose(0, 1) for W in (W_K, W_V))
    return P_K, P_V
    ### END SOLUTION

check.prefix_of_a_prompt(prefix_of_a_prompt)

# %%
# Now on the real model, all layers at once: init="text" does it. The model answers as if the text stood in front of the question.
text = "Answer in five fields, one line.\n"
words = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)["input_ids"]
adapter = mp.attach(model, mp.PrefixTuning(words.shape[1], reparameterize=False, init="text", text=text))
with torch.no_grad():
    as_prefix = model(**question).logits
    with mp.active(model, None):
        as_text = model(input_ids=torch.cat([words, question["input_ids"]], dim=1)).logits[:, words.shape[1]:]
mp.detach(model)
assert (as_prefix - as_text).abs().max() < 1e-4 * as_text.abs().max() < 1e-2 * (as_prefix - before).abs().max()
per_prompt = mp.PromptTuning(1).parameter_count(width)
per_prefix = mp.PrefixTuning(1, reparameterize=False).parameter_count(L, G * d)
print(f"one position: a soft prompt chooses {per_prompt:,} numbers, a prefix {per_prefix:,}, {per_prefix / per_prompt:g} times as many")

# %% [markdown]
# So in a causal model a prefix can do all that a prompt of the same length can. The other way round fails, and counting shows why. For each position a soft prompt chooses `width` numbers, and the frozen layers make all keys and values from them. A prefix chooses those keys and values freely.
#
# ### Exercise 4: how much does a query look at the prefix? · 10 minutes · medium
#
# Compute $\lambda$ for each query: the share of its attention weight that lies on the prefix. One head, no causal mask. You will apply the same measure to the trained model below.
#
# <details>
# <summary>Hint</summary>
#
# One softmax over all $n + S$ positions. Then add up the weights of the first $n$.
#
# </details>

# %%
def prefix_share(q: torch.Tensor, K: torch.Tensor, P_K: torch.Tensor) -> torch.Tensor:
    """q (T, d), K (S, d), P_K (n, d) -> λ (T,)."""
    ### BEGIN SOLUTION
    scores = q @ torch.cat([P_K, K]).T / q.shape[-1] ** 0.5         # (T, n + S)
    return scores.softmax(-1)[:, : len(P_K)].sum(-1)
    ### END SOLUTION

check.prefix_share(prefix_share)

# %% [markdown]
# ### Step 4: the network
#
# Li & Liang found that training $P_K$ and $P_V$ directly was unstable. They let a network make them during training, from one table $E$ that all layers share:
#
# $$[P_K^l; P_V^l] = W_l \tanh(W E + b) + b_l$$
#
# It acts on each row of $E$ by itself. $E$ is $(n, D)$ with $D = G \cdot d$, one row for each position; $W$ is $(\mathrm{hidden}, D)$ with a width that you choose, and each layer has its own $W_l$, $(2D, \mathrm{hidden})$.
#
# After training only its output is needed. Compute it once, keep it, throw the network away: that is **folding**. P-tuning v2 leaves the network out from the start.
#
# ### Exercise 5: fold the network away · 10 minutes · medium
#
# For one layer. The first half of the outputs is the keys, the second the values, each head by head.
#
# <details>
# <summary>Hint</summary>
#
# `x.view(n, 2, kv_heads, d)`: the axes are then position, key or value, head, width. `permute` puts them into the order that you need.
#
# </details>

# %%
def fold_prefix(
    E: torch.Tensor, W: torch.Tensor, b: torch.Tensor, W_l: torch.Tensor, b_l: torch.Tensor, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """E (n, D), W (hidden, D), W_l (2 G d, hidden) -> P_K and P_V, each (kv_heads, n, d)."""
    ### BEGIN SOLUTION
    x = torch.tanh(E @ W.T + b) @ W_l.T + b_l                       # (n, 2 G d)
    P_K, P_V = x.view(len(E), 2, kv_heads, -1).permute(1, 2, 0, 3)
    return P_K, P_V
    ### END SOLUTION

check.fold_prefix(fold_prefix)

# %%
# On the real model: `mp.fold` replaces the network by what it gives. The logits stay. While it is there, it has far
# more numbers than the prefix that it makes.
torch.manual_seed(0)
adapter = mp.attach(model, mp.PrefixTuning(10))
made, base_size = mp.parameter_report(model).trainable, sum(p.numel() for p in mp.sockets.base_parameters(model).values())
with torch.no_grad():
    by_network = model(**question).logits
    adapter = mp.fold(model)
    folded = model(**question).logits
kept = mp.parameter_report(model).trainable
mp.detach(model)
assert (folded - by_network).abs().max() < 1e-4 * folded.abs().max()
assert made == mp.PrefixTuning(10).parameter_count(L, G * d) and kept == 10 * per_prefix
lab.table([{"ten positions": "with the network, in training", "numbers": made, "of the model, %": 100 * made / base_size},
           {"ten positions": "folded, P-tuning v2", "numbers": kept, "of the model, %": 100 * kept / base_size}])

# %% [markdown]
# ## The same as the package
#
# Here is the package's piece, and the function through which every attention layer goes. Compare it with exercise 2. Mind the lines on the mask: in exercise 6 you mend a mask that is wrong.

# %%
from minipeft.methods.prefix_tuning import Prefix
from minipeft.sockets import attention_with_prefix
print(inspect.getsource(Prefix.forward), inspect.getsource(attention_with_prefix), sep="\n")

q, K, V = torch.randn(2, H, 6, d), torch.randn(2, G, 6, d), torch.randn(2, G, 6, d)
piece = Prefix(torch.randn(G, 4, d), torch.randn(G, 4, d))
K_longer, V_longer = piece(K, V)                               # (2, G, 10, d)
see = torch.ones(6, 10, dtype=torch.bool).tril(4)
package = torch.nn.functional.scaled_dot_product_attention(q, K_longer, V_longer, attn_mask=see, enable_gqa=True)
scores = (q @ K_longer.repeat_interleave(H // G, 1).mT / d**0.5).masked_fill(~see, -math.inf)
assert torch.allclose(package, scores.softmax(-1) @ V_longer.repeat_interleave(H // G, 1), atol=1e-5)
lam = scores.softmax(-1)[..., :4].sum(-1, keepdim=True)
parts = [scores[..., part].softmax(-1) @ V_longer[:, :, part].repeat_interleave(H // G, 1) for part in (slice(4), slice(4, None))]
assert torch.allclose(package, lam * parts[0] + (1 - lam) * parts[1], atol=1e-5)
print("the formula, the package, and (1 - λ) attention + λ attention over the prefix: all the same")

# %% [markdown]
# ## Exercise 6: find the bug · 10 minutes · medium
#
# `scaled_dot_product_attention(..., is_causal=True)` looks like the right call for a causal model. With a prefix it raises no error, and the result is wrong. PyTorch's documentation and [issue 108108](https://github.com/pytorch/pytorch/issues/108108) say what its mask is when there are more keys than queries. The cell draws that mask for four tokens behind a prefix of three.
#
# Write the right mask, for a batch with padding on either side.
#
# <details>
# <summary>Hint</summary>
#
# Two conditions, joined by `&`. Which keys are real? The prefix always, the tokens where `real` says so. Which keys are not in the future? In the drawn mask, where should the triangle begin?
#
# </details>

# %%
T_, n_ = 4, 3
as_published = torch.ones(T_, n_ + T_, dtype=torch.bool).tril()        # what is_causal=True means
print("is_causal=True: 1 where query (row) sees key (column); the first three columns are the prefix")
print(as_published.int())

def visible(real: torch.Tensor, n: int) -> torch.Tensor:
    """real (B, T), False at padding -> (B, T, n + T), True where query t may look."""
    ### BEGIN SOLUTION
    B, T = real.shape
    keys = torch.cat([real.new_ones(B, n), real], dim=1)               # the prefix is no padding
    triangle = torch.ones(T, n + T, dtype=torch.bool, device=real.device).tril(n)
    return triangle & keys[:, None]
    ### END SOLUTION

check.visible(visible)

# %% [markdown]
# ## Before training: something changed already
#
# LoRA starts from an unchanged model: its update is zero at first. A prefix cannot: softmax gives every position some weight, whatever its key. So measure how far each start moves the model: the loss on the training questions before any step. *Real keys and values* are those of a solved card, cut to length: the model starts as if it had just read an example.
#
# The length is chosen so that the prefix has about as many numbers as a LoRA of rank 1 on all linear layers: you will compare the two.

# %%
def fingerprint(model) -> str:
    """SHA-256 over the bytes of every parameter of the base."""
    digest = hashlib.sha256()
    for parameter in mp.sockets.base_parameters(model).values():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

lora = mp.LoRA(rank=1, alpha=2, targets="all-linear")
lora_size = sum(lora.parameter_count(*model.get_submodule(p).weight.shape) for p in mp.anatomy.match(model, "all-linear"))
length = lora_size // per_prefix
solved = tuple(tokenizer((one["prompt"] + one["completion"] + "\n\n") * 9)["input_ids"][:length])
starts = {"real keys and values": mp.PrefixTuning(length, reparameterize=False, init="text", text=solved),
          "random, small": mp.PrefixTuning(length, reparameterize=False), "the network": mp.PrefixTuning(length)}
some = cards["train"][:: max(1, len(cards["train"]) // mp.pick(smoke=2, cpu=24, gpu=64))]
at_first, rows = fingerprint(model), [{"start": "no prefix", "loss": mp.evaluate(model, tokenizer, some)["loss"]}]
for start, method in starts.items():
    mp.attach(model, method)
    rows.append({"start": start, "trained": mp.parameter_report(model).trainable, "loss": mp.evaluate(model, tokenizer, some)["loss"]})
    mp.detach(model)
assert fingerprint(model) == at_first
lab.table(rows, f"{length} positions; a LoRA of rank 1 has {lora_size:,}")

# %% [markdown]
# ## The fine-tune
#
# The prefix starts from the keys and values of a real card. The frozen bytes are compared at the end. Then three others get the same questions, in the same order, equally often:
#
# - **a soft prompt** of as many positions, started from the same card. It has far fewer numbers: at equal size it would be many times longer than the questions. (Equal sizes come further down.)
# - **a LoRA** of rank 1, of about the same size as the prefix
# - **full fine-tuning**, as in chapter 1
#
# Each has one rate of its own. None is swept here, so a row might gain from another.

# %%
plan = mp.FitConfig(steps=mp.pick(smoke=2, cpu=30, gpu=150), batch_size=mp.pick(smoke=2, cpu=6, gpu=16), lr=1e-2, warmup=0.1)
torch.manual_seed(0)
adapter = mp.attach(model, starts["real keys and values"])
assert mp.parameter_report(model).trainable == length * per_prefix
run = mp.fit(model, tokenizer, cards["train"], plan, watch=lab.live_curve())
assert fingerprint(model) == at_first
print(f"{run.steps} steps in {run.seconds / 60:.1f} minutes; every frozen byte is as it was")

# %%
beside = {f"soft prompt, {length} positions": (mp.PromptTuning(length, init="text", text=solved), 0.1),
          "LoRA, rank 1": (lora, 4e-3), "full fine-tuning": (None, 2e-4)}
trained = exam(model)
scores = [{"model": "frozen"} | frozen,
          {"model": f"prefix, {length} positions", "trained": length * per_prefix, "rate": plan.lr, "s a step": run.seconds / run.steps} | trained]
for way, (method, lr) in list(beside.items())[: mp.pick(smoke=2, cpu=3, gpu=3)]:
    rival, _ = mp.load_base(BASE)
    torch.manual_seed(0)
    if method is not None:
        mp.attach(rival, method)
    done = mp.fit(rival, tokenizer, cards["train"], replace(plan, lr=lr, progress=False))
    scores.append({"model": way, "trained": mp.parameter_report(rival).trainable, "rate": lr, "s a step": done.seconds / done.steps} | exam(rival))
    del rival
marks, longer = {row["model"]: row for row in scores}, mp.data.data_folder() / "results" / "05_lora.json"
if longer.exists():                                            # what chapter 5 measured, on all medicines
    there = json.loads(longer.read_text(encoding="utf-8"))["figures"]["main"]
    scores.append({"model": f"chapter 5: LoRA, rank {there['rank']}, {there['steps']} steps, all medicines"} | {k: there[k] for k in ("trained", "rate", *trained)})
lab.table(scores)

# %% tags=["figure"]
keys = [k for k in ("format", "name", "facts", "recall") if k in trained]
says = {"format": "format kept", "name": "name copied", "facts": "facts right", "recall": "name recalled"}
figure, ax = new_figure(width=9.2, height=3.4)
for shift, ((way, score), colour) in enumerate(zip(marks.items(), ("grey", "green", "orange", "blue", "vermilion"))):
    bars = ax.bar([i + 0.17 * (shift - 2) for i in range(len(keys))], [100 * score[k] for k in keys], width=0.16, color=COLOURS[colour], label=way)
    ax.bar_label(bars, [f"{100 * score[k]:.0f}" for k in keys], fontsize=9)
ax.set_xticks(range(len(keys)), [says[k] for k in keys])
ax.set(ylim=(0, 112), ylabel="% of the test questions")
ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, fontsize=9, frameon=False)
figure

# %% [markdown]
# Read the bars from left to right: from behaviour to knowledge. Format can be shown by one example, copying a name needs only attention, facts must be *stored* somewhere. Where is the prefix near LoRA, and where is it not? Both have about the same number of trained numbers and saw the same questions. What differs is the place, and with it the start and the rate. The soft prompt has as many positions as the prefix, but at the bottom only; full fine-tuning trains every weight and says what these steps can teach at all. After so few steps a low bar may also mean *not yet*.
#
# ## Where does the model look?
#
# Save the prefix, open it on a fresh copy of the model that keeps its attention weights, and measure. Left: the attention on each position of the prefix, in each layer, averaged over heads and over the tokens of some test questions. Right: the sum over positions, which is $\lambda$, before and after training.

# %%
shelf = tempfile.TemporaryDirectory()
mp.save_adapter(model, shelf.name)
viewer, _ = mp.load_base(BASE)
viewer.set_attn_implementation("eager")                        # the one that gives its weights out
mp.attach(viewer, starts["real keys and values"], "start")
mp.load_adapter(viewer, shelf.name, "trained")

def looked_at(name: str) -> torch.Tensor:
    """The mean attention weight on each prefix position, (layers, positions)."""
    seen = []
    with torch.no_grad(), mp.active(viewer, name):
        for e in cards["test"][:: max(1, len(cards["test"]) // 8)]:
            ids = tokenizer(e["prompt"], return_tensors="pt").to(viewer.device)
            weights = viewer(**ids, output_attentions=True).attentions              # L of (1, H, T, n + T)
            seen.append(torch.stack([w[0, :, :, :length].mean((0, 1)) for w in weights]).cpu())
    return torch.stack(seen).mean(0)

maps = {name: looked_at(name) for name in ("start", "trained")}
share = {name: m.sum(1).mean().item() for name, m in maps.items()}
sink = maps["trained"].mean(0).argmax().item()
print(f"share of all attention that goes to the prefix: {share['start']:.0%} at the start, {share['trained']:.0%} after training;",
      f"position {sink} alone gets {maps['trained'][:, sink].mean().item() / share['trained']:.0%} of that")

# %% tags=["figure"]
figure, (left, right) = new_figure(2, width=9.4, height=4.6)
shown = left.imshow(maps["trained"].clamp(min=1e-4).log10(), cmap="YlGn", vmin=-4, vmax=0, aspect="auto", origin="lower")
left.set(xlabel="position in the prefix", ylabel="layer", title="attention on each prefix position, trained")
left.grid(visible=False)
bar = figure.colorbar(shown, ax=left, ticks=[-4, -3, -2, -1, 0])
bar.ax.set_yticklabels(["0.0001", "0.001", "0.01", "0.1", "1"])
for name, colour in (("start", "grey"), ("trained", "green")):
    right.plot(maps[name].sum(1), range(L), "o-", markersize=3.5, color=COLOURS[colour], label=name)
right.set(xlabel="λ, share of the attention on the prefix", ylabel="layer", xlim=(0, 1), title="summed over positions")
right.legend(frameon=False)
figure

# %% [markdown]
# Is one column much darker than the others? Language models park attention that they do not need on the first position of a text (an *attention sink*), and a prefix made from real text inherits that. Before training, the start shows how much of $\lambda$ is such parking. A share $\lambda$ on a position whose value is near zero means "look at nothing", not "read the prefix". So a large $\lambda$ is no proof that the prefix is used: compare the two curves.
#
# ## How many facts fit?
#
# A cleaner question. Give each medicine a random three-digit number. Nobody can know it, so each right answer was **stored** in the trained numbers. A prompt, a prefix and a LoRA get equally many trained numbers: see *trained* in the table. (*prefix positions* is the size that all three match: the prompt then has many more vectors, by the factor that you computed in step 3.) Then all learn the same list, in the same number of steps. The rates differ, since a good rate belongs to a method: they stand in the next cell. Change one, and see what it does.

# %%
draw = random.Random(0)
facts = [{"prompt": f"{name}\n", "completion": f" {draw.randrange(1000):03d}"} for name in draw.sample(names, mp.pick(smoke=4, cpu=8, gpu=64))]
half = rf"model\.layers\.({'|'.join(str(i) for i in range(0, L, 2))})\.self_attn\.v_proj"

def filler(n: int) -> tuple[int, ...]:
    return tuple((tokenizer("medicine number:\n")["input_ids"] * n)[:n])

def contestants(n: int) -> dict:
    """Prompt, prefix and LoRA with as many numbers as n prefix positions."""
    ratio = per_prefix // per_prompt
    one_rank = sum(sum(model.get_submodule(p).weight.shape) for p in mp.anatomy.match(model, half))
    return {"prompt": mp.PromptTuning(n * ratio, init="text", text=filler(n * ratio)),
            "prefix": mp.PrefixTuning(n, reparameterize=False, init="text", text=filler(n)),
            "LoRA": mp.LoRA(rank=max(1, round(n * per_prefix / one_rank)), alpha=2 * max(1, round(n * per_prefix / one_rank)), targets=half)}

def facts_right(model) -> int:
    answers = mp.generate(model, tokenizer, [f["prompt"] for f in facts], max_new_tokens=4)
    return sum(a.split()[:1] == f["completion"].split() for a, f in zip(answers, facts))

# %%
RATES = {"prompt": 3e-2, "prefix": 3e-2, "LoRA": 1e-2}
memory_plan = mp.FitConfig(steps=mp.pick(smoke=1, cpu=24, gpu=150), batch_size=len(facts), warmup=0.1, progress=False)

def memorise(kind: str, n: int) -> dict:
    """Train one contestant on the facts; how many it then has, and how many bits that is."""
    torch.manual_seed(0)
    fresh, _ = mp.load_base(BASE)
    mp.attach(fresh, contestants(n)[kind])
    run = mp.fit(fresh, tokenizer, facts, replace(memory_plan, lr=RATES[kind]))
    kept = facts_right(fresh)
    return {"kind": kind, "prefix positions": n, "trained": mp.parameter_report(fresh).trainable, "facts kept": kept, "of": len(facts),
            "bits kept": kept * math.log2(1000), "loss": run.history[-1]["loss"], "s a step": run.seconds / run.steps}

contest = [("prompt", 1), ("prefix", 1), ("LoRA", 1)] + mp.pick(smoke=[], cpu=[("prefix", 4), ("LoRA", 4)],
          gpu=[("prompt", 4), ("prefix", 4), ("LoRA", 4), ("prefix", 16), ("LoRA", 16)])
capacity = [memorise(kind, n) for kind, n in contest]
sizes = [row["trained"] for row in capacity if row["prefix positions"] == 1]
assert max(sizes) < 1.02 * min(sizes)                          # equal
lab.table(capacity)

# %% tags=["figure"]
figure, ax = new_figure(width=7, height=3.4)
for kind, colour, mark, size in (("prompt", "orange", "s", 17), ("prefix", "green", "o", 12), ("LoRA", "blue", "D", 6)):
    points = [(row["trained"], row["facts kept"]) for row in capacity if row["kind"] == kind]
    ax.plot(*zip(*points), f"{mark}-", markersize=size, color=COLOURS[colour], label=kind)
ax.legend(loc="center right", frameon=False, labelspacing=1)
ax.axhline(len(facts), color=COLOURS["grey"], linestyle="--", linewidth=1.2)
ax.text(min(row["trained"] for row in capacity), len(facts), "all facts", va="bottom", color=COLOURS["grey"])
ax.set(xscale="log", xlabel="trained numbers", ylabel=f"facts kept after {memory_plan.steps} steps", ylim=(-0.6, 1.18 * len(facts)))
sizes = sorted({row["trained"] for row in capacity})
ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
ax.set_xlim(0.8 * sizes[0], 2.2 * sizes[-1])
ax.minorticks_off()
first = {row["kind"]: row["facts kept"] for row in capacity if row["prefix positions"] == 1}
most = max(first.values())
winner = [kind for kind, kept in first.items() if kept == most] if most else []
print("at the smallest size most facts are kept by:", ", ".join(winner) or "nobody")
figure

# %% [markdown]
# Say precisely what this measures: facts kept *after so many steps at this rate*, of one seed. It is not the most that would ever fit. But where the three differ, the number of parameters cannot be the reason: it is equal. What is left is the place, and how far each rate suits it. If you expected LoRA to lead: does it, at either size? If it does not at the smallest, there are three candidates that this table does not tell apart: its rate, which was not swept here and differs from the other two's; its place, at this size the values of some layers only; and the few steps.
#
# ## The network: is training steadier with it?
#
# Now the other half of the method: P-tuning v2, on an encoder with a head for two classes. MiniLM reads short film reviews, positive or negative. Here there is no cache to misuse: the socket is the same as before.
#
# The head is new, and its seed counts. So first train it alone in front of the frozen encoder, once for each seed. Every run below starts from that head and trains it further. What a run then wins over the head alone, the prefix has won.

# %%
films, most_words = {}, mp.pick(smoke=10, cpu=10, gpu=12)
for split, count in zip(("train", "validation", "test"), mp.pick(smoke=(32, 16, 16), cpu=(1000, 150, 200), gpu=(1600, 600, 600))):
    rows = [e for e in mp.load_data("sentiment/movies", split) if len(e["text"].split()) <= most_words]
    films[split] = random.Random(0).sample(rows, min(count, len(rows)))
commoner = {split: max(statistics.mean(e["label"] == label for e in rows) for label in (0, 1)) for split, rows in films.items()}
film_plan = mp.FitConfig(steps=mp.pick(smoke=1, cpu=50, gpu=100), batch_size=mp.pick(smoke=4, cpu=8, gpu=16), warmup=0.1, progress=False)
heads = {}                                                     # seed -> the head that was trained alone

def start(seed: int):
    """MiniLM and its tokenizer, under a head for two classes that was trained alone."""
    torch.manual_seed(seed)
    encoder, words = mp.load_base("minilm-l6", num_labels=2)
    if seed not in heads:
        encoder.base_model.requires_grad_(False)
        mp.fit(encoder, words, films["train"], replace(film_plan, lr=1e-2, seed=seed))
        heads[seed] = {name: p.clone() for name, p in encoder.classifier.state_dict().items()}
        encoder.requires_grad_(True)
    encoder.classifier.load_state_dict(heads[seed])
    torch.manual_seed(seed)                                    # a prefix starts alike in every run of a seed
    return encoder, words

# %% [markdown]
# Train the prefix directly and through the network, at several rates, with several seeds each. All runs have the same number of positions and the same steps.
#
# Which rates? Adam's first step moves every trained number by about the rate. Directly, that is how far the prefix moves. Through the network an entry of the prefix is a sum over `hidden` products, and all of them move. So measure how far the *prefix* moves, and give the network rates that are smaller by that factor: then both start with steps of about the same size.
#
# The rate is chosen on **validation** reviews; the test reviews are for the table after it.

# %%
ways = {"direct": mp.PrefixTuning(4, reparameterize=False), "network": mp.PrefixTuning(4)}

def one_step(method, lr: float = 1e-4) -> float:
    """How far Adam's first step moves an entry of the prefix, on average, in units of the rate."""
    encoder, words = start(0)
    pieces = [piece for piece in mp.attach(encoder, method).pieces().values() if hasattr(piece, "prefix")]
    was = [torch.cat(piece.prefix()).detach().clone() for piece in pieces]
    mp.fit(encoder, words, films["train"][:16], replace(film_plan, steps=1, lr=lr, warmup=0.0))
    return statistics.mean((torch.cat(piece.prefix()) - a).abs().mean().item() for piece, a in zip(pieces, was)) / lr

moves = {way: one_step(method) for way, method in ways.items()}
direct_rates = mp.pick(smoke=[1e-1], cpu=[3e-2, 1e-1, 3e-1], gpu=[1e-2, 3e-2, 1e-1, 3e-1, 1])
grid = {way: [float(f"{lr * moves['direct'] / moves[way]:.0e}") for lr in direct_rates] for way in ways}
for way in ways:
    print(f"{way:8} one step moves an entry of the prefix by {moves[way]:.1f} times the rate; rates {', '.join(f'{lr:g}' for lr in grid[way])}")

# %%
def judge(method, lr: float, seed: int) -> dict:
    """Train on film reviews, by a method, "head" alone or "full"; the share right of two other sets."""
    encoder, words = start(seed)
    if method == "head":
        encoder.base_model.requires_grad_(False)
    elif method != "full":
        mp.attach(encoder, method)
    row = {"trained": mp.parameter_report(encoder).trainable}
    try:                                                       # another order than the head was trained in
        run = mp.fit(encoder, words, films["train"], replace(film_plan, lr=lr, seed=100 + seed))
    except ArithmeticError:                                    # the loss was not finite any more
        return row | {split: 1 - share for split, share in commoner.items()}
    return row | {"s a step": run.seconds / run.steps} | {s: mp.evaluate(encoder, words, films[s])["accuracy"] for s in films if s != "train"}

seeds = mp.pick(smoke=[0, 1], cpu=[0, 1, 2], gpu=[0, 1, 2, 3, 4])
trials = {way: {lr: [judge(method, lr, seed) for seed in seeds] for lr in grid[way]} for way, method in ways.items()}
alone = [judge("head", 1e-2, seed) for seed in seeds]

# %% tags=["figure"]
def mean_and_spread(runs, split: str) -> tuple[float, float]:
    right = [run[split] for run in runs]
    return statistics.mean(right), statistics.stdev(right)

stability = {way: {lr: mean_and_spread(runs, "validation") for lr, runs in by_rate.items()} for way, by_rate in trials.items()}
best = {way: max(by_rate, key=lambda lr: by_rate[lr][0]) for way, by_rate in stability.items()}
head_alone = mean_and_spread(alone, "validation")[0]
for way in ways:
    middle, spread = stability[way][best[way]]
    print(f"{way:8} best rate {best[way]:g}: {middle:.1%} of the validation reviews right, {100 * spread:.1f} points of spread over {len(seeds)} seeds",
          f"(the head alone: {head_alone:.1%})")

figure, panels = new_figure(2, width=8.8, height=3.4)
for ax, way, colour in zip(panels, ways, ("green", "purple")):
    for lr, runs in trials[way].items():
        ax.plot([lr] * len(runs), [run["validation"] for run in runs], "o", color=COLOURS[colour], alpha=0.6)
    ax.plot(grid[way], [stability[way][lr][0] for lr in grid[way]], color=COLOURS[colour])
    for level, says in ((commoner["validation"], "always the commoner label"), (head_alone, "the head alone")):
        ax.axhline(level, color=COLOURS["grey"], linestyle="--", linewidth=1.2)
        ax.annotate(says, (0.02, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=9, color=COLOURS["grey"])
    ax.set(xscale="log", xlabel="learning rate", ylabel="right, validation reviews", ylim=(0.3, 1), title=f"{way}: {trials[way][grid[way][0]][0]['trained']:,} numbers")
    ax.set_xticks(grid[way], [f"{lr:g}" for lr in grid[way]])
    ax.minorticks_off()
figure

# %% [markdown]
# Each dot is one seed. Compare two things: how far the dots of one rate lie apart, and how wide the range of rates is that works. Look at the rates themselves, too. With one grid for both, one of them may fail for its rate alone, and you might call the other one steadier. With steps of about the same size, what still differs is the network's own doing: all layers share its table and its first half, so what one layer learns moves the prefix of the others too. The P-tuning v2 paper finds that the network helps on some tasks and harms on others.
#
# ## Equal size, one table
#
# The same reviews, head and steps for a soft prompt, a prefix, a LoRA of the same size, and full fine-tuning. Each trains the head further, so the first row to compare with is *the head alone*, in front of a frozen encoder. *s a step* is the price in time: a prompt makes every text longer, in all layers. The prefix has the best rate of the grid above, chosen on validation reviews; the other rows have one rate each, which was not swept, so they might gain from another. All are asked about the test reviews, which chose nothing.

# %%
c, swept = start(0)[0].config, {"prefix, direct": "direct", "prefix, through the network": "network"}
numbers_here = ways["direct"].parameter_count(c.num_hidden_layers, c.hidden_size)
rank = numbers_here // (2 * c.num_hidden_layers * 2 * c.hidden_size)           # A and B, at query and value
equal = {"the head alone": ("head", 1e-2),
         "prompt": (mp.PromptTuning(numbers_here // c.hidden_size, init="vocab"), 3e-2),
         **{name: (ways[way], best[way]) for name, way in swept.items()},
         "LoRA on query and value": (mp.LoRA(rank=rank, alpha=2 * rank, targets=("query", "value")), 1e-2),
         "full fine-tuning": ("full", 2e-4)}
judged = {"the head alone": alone[:2]} | {name: trials[way][best[way]][:2] for name, way in swept.items()}
judged |= {name: [judge(method, lr, seed) for seed in seeds[:2]] for name, (method, lr) in equal.items() if name not in judged}
assert len({judged[name][0]["trained"] for name in ("prompt", "prefix, direct", "LoRA on query and value")}) == 1
error = math.sqrt(0.8 * 0.2 / len(films["test"]))
rows = [{"method": "always the commoner label", "right": commoner["test"]}]
for name, (_, lr) in equal.items():
    middle, spread = mean_and_spread(judged[name], "test")
    rows.append({"method": name, "trained": judged[name][0]["trained"], "rate": lr, "right": middle, "spread": spread,
                 "s a step": judged[name][0].get("s a step")})
print(f"error from the number of test reviews: about ± {100 * error:.1f} points; a smaller difference says nothing")
lab.table(rows)

# %% [markdown]
# Chapter 1 trained the same encoder longer. Here all methods get the same few steps, so read the order, not the heights, and the order only where two rows differ by more than the error. The prefix that comes through the network trains more numbers than it keeps: *trained* counts the network. Folded, it is as small as the other one.
#
# ## Break it: a prefix too long
#
# A longer prefix takes attention away from the text, $1 - \lambda$ shrinks. Measure the loss before any training against the length.
#
# The other way to break a prefix is its rate: one step of Adam moves every entry by about the rate, and real keys are only so large. What that does to a score, the grid of rates on MiniLM showed above. The line above the table says how far the run on the cards could move an entry, in sizes of a real key.

# %%
lengths = mp.pick(smoke=[1, 20], cpu=[1, 5, 20, 80], gpu=[1, 5, 20, 80, 320])
rows = []
real_keys = torch.cat([K.flatten() for K, _ in mp.sockets.keys_and_values(model, question["input_ids"][0]).values()])
for n_ in lengths:
    torch.manual_seed(0)
    mp.attach(model, mp.PrefixTuning(n_, reparameterize=False), "long")
    with mp.active(model, "long"):
        rows.append({"random prefix of length": n_, "numbers": n_ * per_prefix, "loss, not trained": mp.evaluate(model, tokenizer, some[:8])["loss"]})
    mp.detach(model, "long")
step_share = plan.lr * plan.steps / real_keys.std().item()
print(f"a real key's entries have a standard deviation of {real_keys.std():.2f}; {plan.steps} steps at {plan.lr:g} can move an entry by up to {step_share:.1g} of that")
lab.table(rows)

# %% [markdown]
# ## Merge or not, save, open elsewhere
#
# A prefix cannot be merged into the weights: there is no weight that it changes. `mp.merge` says so. But it can be **cached**: for a given prefix nothing has to be computed at its positions, ever. Its price is attention over $n$ more keys.
#
# Then compare with Hugging Face PEFT, which opens the same files. Its format is one tensor, the prefix as it comes out of the network. So in PEFT a run through a network cannot be resumed from that file. `mp.save_adapter` writes the same file and, where there is a network, a second one with the network. (The prefix here was trained directly.)

# %%
try:
    mp.merge(model)
except TypeError as refusal:
    print("mp.merge:", refusal)
with torch.no_grad(), mp.active(viewer, "trained"):
    apart, again = model(**question).logits, viewer(**question).logits
files = {f.name: f.stat().st_size for f in sorted(Path(shelf.name).iterdir())}
print({name: f"{size / 1e3:,.0f} kB" for name, size in files.items()})
reload_error, peft_error = ((again - apart).abs().max() / apart.abs().max()).item(), None
warnings.filterwarnings("ignore", category=FutureWarning)      # peft still uses old names of transformers
try:
    from peft import PeftModel
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(mp.load_base(BASE)[0], shelf.name).eval()(**question).logits
    peft_error = ((theirs - apart).abs().max() / apart.abs().max()).item()
    print(f"opened by Hugging Face PEFT: the logits differ by {peft_error:.1g} of the largest")
except ImportError:
    print("peft is not installed here, so that comparison is skipped (pip install peft)")
assert reload_error < 1e-4 and (peft_error or 0) < 1e-4

# %% [markdown]
# ## What it cost, and what you predicted

# %%
measured = dict(zip(predicted, (bert["percent"], per_prefix / per_prompt, 100 * share["trained"], " and ".join(winner) or "nobody")))
row = {"method": "prefix tuning", "positions": length, "trained": length * per_prefix, "percent": 100 * length * per_prefix / base_size,
       "minutes": run.seconds / 60, "peak GiB": run.peak_memory / 2**30, "file MB": sum(files.values()) / 1e6} | trained
lab.record(
    main=row | {"steps": run.steps, "batch": plan.batch_size, "rate": plan.lr, "medicines": len(few), "rows": list(marks.values())},
    sizes={"prompt vector": per_prompt, "prefix position": per_prefix, "network, ten positions": made, "LoRA rank 1": lora_size},
    claim=bert, stability={way: {str(lr): list(values) for lr, values in by.items()} for way, by in stability.items()},
    sentiment={name: dict(zip(("trained", "right", "spread"), (runs[0]["trained"], *mean_and_spread(runs, "test")))) for name, runs in judged.items()},
    capacity=capacity, share=share,
    checkpoint={"bytes": sum(files.values()), "reload error": reload_error, "peft error": peft_error},
)
display(lab.table([{"": key, "you": "no prediction" if predicted[key] is None else str(predicted[key]),
                    "measured": value if isinstance(value, str) else f"{value:.3g}"} for key, value in measured.items()]))
lab.table([row])

# %% [markdown]
# ## Quiz
#
# Every choice says why it is right or wrong. The numbers are computed, not typed.

# %%
def numbers(n_: int, layers: int = 32, kv: int = 8 * 128) -> str:
    return f"{mp.PrefixTuning(n_, reparameterize=False).parameter_count(layers, kv):,}"

tokens = 30                                                    # a text
lab.quiz([
    {"question": "Which tensors does prefix tuning train, after folding?", "right": "keys and values of some extra positions, in every layer",
     "choices": {"keys and values of some extra positions, in every layer": "$P_K^l$ and $P_V^l$. (A classifier's new head trains as well, whatever the method.)",
                 "the projections $W_K$ and $W_V$ of every layer": "Those are frozen. They make the keys and values of the tokens only.",
                 "embeddings in front of the text": "That is a soft prompt: the layers then make keys and values from it.",
                 "queries, keys and values of some extra positions": "Nothing asks from these positions, so they need no query."}},
    {"question": "Llama-3-8B: 32 layers, 32 query heads, 8 key/value heads of width 128. Twenty prefix positions, no network. How many numbers?",
     "right": numbers(20),
     "choices": {numbers(20): "$2 \\cdot 32 \\cdot (8 \\cdot 128) \\cdot 20$.",
                 numbers(20, kv=4096): "Counted with the width of the model: four query heads share one key/value head here.",
                 numbers(20, layers=1): "That is one layer.",
                 f"{20 * 4096:,}": "That is a soft prompt of twenty vectors."}},
    {"question": "Why can a prefix express more than a soft prompt of the same length?", "right": "it sets each layer's keys and values freely",
     "choices": {"it sets each layer's keys and values freely": "A prompt sets the input, and the frozen layers make the keys and values from it.",
                 "it is trained with a higher rate": "That is a choice of training, not of what can be expressed.",
                 "it is in front of the prompt": "Both stand in front of the text.",
                 "it has its own feed-forward": "At a prefix position nothing is computed at all."}},
    {"question": f"A text of {tokens} tokens, 20 soft prompt vectors or 20 prefix positions. At how many positions does the feed-forward run?",
     "right": f"{tokens + 20} and {tokens}",
     "choices": {f"{tokens + 20} and {tokens}": "A soft prompt passes through all layers like text. A prefix is only looked at.",
                 f"{tokens + 20} and {tokens + 20}": "A prefix has no hidden state that could be fed forward.",
                 f"{tokens} and {tokens}": "The prompt's vectors pass through every layer.",
                 f"{tokens} and {tokens + 20}": "The other way round."}},
    {"question": "For one query $\\lambda = 0.9$. What happened to the tokens?", "right": "their mix counts a tenth, in the same proportions",
     "choices": {"their mix counts a tenth, in the same proportions": "$(1-\\lambda)\\,\\mathrm{attention}(q,K,V)$: within it nothing shifts.",
                 "the most important ones got even more weight": "A prefix cannot weigh the tokens against each other in this layer.",
                 "they are masked": "They still count, a tenth.",
                 "their keys were overwritten": "Keys of tokens are frozen products."}},
    {"question": "What is the network of prefix tuning for, and when is it gone?", "right": "to make training easier; gone when it is folded",
     "choices": {"to make training easier; gone when it is folded": "All layers' prefixes come from one table. Afterwards only its output is kept.",
                 "to make the prefix smaller; it stays": f"It is larger than what it makes: {made:,} against {kept:,} numbers above.",
                 "to read the input; it runs for each text": "It never sees the text: its output is the same for all.",
                 "to make the logits more precise": "Folded, the logits are the same."}},
    {"question": "A fresh LoRA leaves the logits as they are. A fresh random prefix?", "right": "changes them: softmax gives it some weight",
     "choices": {"changes them: softmax gives it some weight": "Even a key of zeros gets the weight $e^0$. Compare the losses before training.",
                 "leaves them, its values are small": "Small values still take weight away from the others.",
                 "leaves them, it starts at zero": "Even then the rest is scaled by $1-\\lambda$."}},
    {"question": f"An article: 184,320 numbers are *well under 0.1 %* of a 12-layer model. BERT-base has {bert['of']:,}. What is it?",
     "right": f"{bert['percent']:.2f} %",
     "choices": {f"{bert['percent']:.2f} %": "Divide. It takes one line.",
                 f"{bert['percent'] / 10:.3f} %": "A decimal place is lost.",
                 f"{bert['percent'] * 10:.1f} %": "A decimal place too many.",
                 f"{bert['percent'] / 2:.3f} %": "That counts keys or values, not both."}},
    {"question": "You call `scaled_dot_product_attention(q, [P; K], [P; V], is_causal=True)`. What can the first query see?",
     "right": "the first prefix position alone",
     "choices": {"the first prefix position alone": "The triangle starts in the top left corner. No error is raised.",
                 "the whole prefix and the first token": "That is what you wanted. You need a mask of your own.",
                 "everything": "The triangle does hide something: too much.",
                 "the first token alone": "The first column is a prefix position."}},
])

# %% [markdown]
# ## Recap
#
# - Prefix tuning trains $P_K$ and $P_V$ in the attention of every layer: $2 \cdot L \cdot G \cdot d \cdot n$ numbers. Count with key/value heads, not with the width of the model.
# - It is the **key/value socket**: $(K, V) \to ([P_K; K], [P_V; V])$. Nothing is computed at the new positions.
# - In a causal model every prompt is a prefix. Few prefixes are prompts.
# - What it does is mix: $(1-\lambda)$ of what was there, $\lambda$ of its own. It does not reweigh the tokens among themselves.
# - Whether the network helps training depends on the task and on the rates tried; it is folded away in any case. Without it the method is P-tuning v2.
# - Format, copying and facts are three different things to learn. Ask for each, and compare methods at equal size, as you did.
#
# ## Next
#
# [Chapter 4](04_adapters.ipynb) puts small trained modules into every block.
#
# ## Further reading
#
# - Li & Liang 2021, [Prefix-Tuning](https://arxiv.org/abs/2101.00190): sections 4.2 and 4.3; section 7 on initialisation and length
# - Liu et al. 2021, [P-Tuning v2](https://arxiv.org/abs/2110.07602): section 3.3 on the network and on classification heads
# - He et al. 2022, [Towards a Unified View](https://arxiv.org/abs/2110.04366): prefixes as adapters
# - Petrov, Torr & Bibi 2023, [When Do Prompting and Prefix-Tuning Work?](https://arxiv.org/abs/2310.19698): what a prefix cannot do
# - Xiao et al. 2023, [Efficient Streaming Language Models with Attention Sinks](https://arxiv.org/abs/2309.17453)
