# ---
# jupyter:
#   minipeft:
#     records: [claims, verdicts, articles, open]
# ---

# %% [markdown]
# # 13 · Fact check: what the articles say, put to the test
#
# **In one sentence:** you take every factual claim of three articles about PEFT, guess its verdict, and let the course's own counts, bills and measurements, or a paper, decide.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/13_fact_check.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - tell a claim that arithmetic decides from one that needs a measurement, a paper, or cannot be checked
# - count what a method trains in a model that you cannot load, from its config
# - say on which card a training run fits, and what would have to be true for a claim to be true
# - judge a claim about learning rates from two sweeps, and say when the sweeps do not decide
# - examine yourself: the closing part covers the whole course
#
# **You need:** chapters 0 to 11, or the will to look things up there. Each section names its chapters.
#
# **The papers:** each claim cites its own. The counts use equation 3 of [LoRA](https://arxiv.org/abs/2106.09685), section 3.3 of [(IA)³](https://arxiv.org/abs/2205.05638), section 2.1 of [adapters](https://arxiv.org/abs/1902.00751) and section 3 of [QLoRA](https://arxiv.org/abs/2305.14314).

# %% tags=["setup"]
import inspect, math, subprocess, sys, tempfile, warnings
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

from collections import Counter
import torch, transformers
import minipeft as mp
from minipeft import claims, findings, lab
from minipeft.checks import ch13_fact_check as check

lab.seed_everything(0)
print(f"minipeft {mp.__version__}, torch {torch.__version__}, transformers {transformers.__version__}; profile {mp.profile().name} on {mp.profile().device}")
lab.runtime_box("13_fact_check")

# %% [markdown]
# ## Before you read on
#
# The course grew from three articles: a developer's story, a lesson, and an overview for companies. Write down what you expect. Replace the `None` below; near the end a cell puts your answers beside the computed ones.
#
# 1. How many **percent** of the claims hold as they are printed?
# 2. Of those with a printed number that can be computed, how many **percent** are wrong?
# 3. Which article has the largest share of wrong claims: 1 (the story), 2 (the lesson) or 3 (the overview)?
# 4. How many **percent** of the claims cannot be checked by anybody, because no source or no measure is given?

# %%
predicted = {"percent that hold": None, "percent wrong, of the computable numbers": None,
             "article with most wrong": None, "percent that nobody can check": None}

# %% [markdown]
# ## The problem
#
# A claim reads the same whether it is right or wrong. *83,886,080 trainable parameters*: eight digits, so somebody must have counted. *Accuracy varies by 12 points*: so somebody must have measured. You cannot tell by reading. You can tell by asking **what kind** of claim it is:
#
# | kind | what decides it | examples |
# |---|---|---|
# | arithmetic | a count, from the model's config | parameters, shares, bytes |
# | measurable here | a run of this course, on small models | what trains, what a merge costs, learning rates |
# | literature | a paper, with its table or section | scaling to 11 billion, latency on a GPU |
# | not checkable | nobody, as it stands | a study without a title, a forecast, "users report" |
#
# All claims lie in one file, `data/claims.yaml`, in our own words. The articles themselves are not in the repository: their texts are not ours to give away. A claim's name says where it stands: *2.34b* is article 2, line 34, the claim with the letter b. Here is how many there are.

# %%
book = claims.load_claims()
kinds = Counter((c.subject, c.kind) for c in book)
lab.table([{"subject": s} | {kind: kinds[s, kind] for kind in claims.KINDS} | {"all": sum(c.subject == s for c in book)}
           for s in claims.subjects()])

# %% [markdown]
# A verdict is one of four: **holds**, **wrong**, **depends on …** (then it says on what), or **not checkable here**.
#
# A verdict of the first two kinds comes from code. Each names a function in `findings.py`, which returns a verdict and the figures. The reason you will read has gaps, and these figures fill them. A test fails when the file and the code disagree. Where a measurement is missing, you read *not measured yet*. What counts as *about* or as *far better* is a choice; it stands in the function. A verdict from the literature is our reading of the place it cites: look it up if you doubt it. Look at one function.

# %%
one = next(c for c in book if c.id == "2.34b")
print(inspect.getsource(findings.FINDINGS[one.figure]))
print(one.claim, "→", one.finding().verdict)
print(one.finding().figures)
print(one.explained())

# %% [markdown]
# ## By hand
#
# Take pencil and paper. Llama-3-8B has 32 layers, width 4096, an inner width of 14336. Its 32 heads are 128 wide, and every four queries share one key and one value. A LoRA of rank $r$ on a weight of $m \times n$ trains $r(m + n)$ numbers.
#
# 1. What are the shapes of its seven projections: query, key, value, output, gate, up, down?
# 2. Add up $m + n$ over the seven. Times 32 layers, times rank 16?
# 3. An article prints 83,886,080. Which rank is that?

# %%
d, inner, layers, kv = 4096, 14336, 32, 4096 // 32 * 8
shapes = {"query": (d, d), "key": (kv, d), "value": (kv, d), "output": (d, d), "gate": (inner, d), "up": (inner, d), "down": (d, inner)}
sides = sum(m + n for m, n in shapes.values())
by_hand = 16 * layers * sides
printed = next(c for c in book if c.id == "2.70a").claimed
print(f"sides {sides:,}; rank 16: {by_hand:,}; the printed {printed:,} is rank {printed / (layers * sides):g}")
assert by_hand == findings.trained("Llama 3 8B", findings.SEVEN)

# %% [markdown]
# The last line compares with the model itself: built from its config on the *meta* device, where tensors have a shape and no memory, with LoRA attached, and counted.
#
# ### Exercise 1: the share of LoRA, from a config · 15 minutes · medium
#
# Write it for any Llama. Base and LoRA both count below the line, as in PEFT's `print_trainable_parameters`. A Llama has an embedding; a head of the same shape, unless `tie_word_embeddings`; in each layer seven projections without biases and two norms of one number a channel; and one norm at the end.
#
# <details>
# <summary>Hint</summary>
#
# Keys and values are `hidden_size // num_attention_heads * num_key_value_heads` wide. The base: `layers * (sum of m * n + 2 * hidden) + hidden + tables * vocab * hidden`, with one or two tables.
#
# </details>

# %%
def lora_percent(config: dict, rank: int) -> float:
    """Percent of all numbers that LoRA on the seven projections trains. Keys as in transformers' LlamaConfig."""
    ### BEGIN SOLUTION
    d, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (inner, d), (inner, d), (d, inner)]
    tables = 1 if config["tie_word_embeddings"] else 2
    base = layers * (sum(m * n for m, n in shapes) + 2 * d) + d + tables * config["vocab_size"] * d
    part = rank * layers * sum(m + n for m, n in shapes)
    return 100 * part / (base + part)
    ### END SOLUTION

check.lora_percent(lora_percent)

# %% [markdown]
# ### The same as PEFT
#
# Two libraries, written apart, should count alike. The cell gives both the same small Llama.

# %%
small = findings.llama_config(64, 160, 3, 4, num_key_value_heads=2, vocab_size=100)
model = transformers.LlamaForCausalLM(small)
mp.attach(model, mp.LoRA(rank=4, targets="all-linear"))
ours = mp.parameter_report(model)
mp.detach(model)
try:
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still uses old names of transformers
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).get_nb_trainable_parameters()
    print("minipeft", (ours.trainable, ours.total), "PEFT", theirs)
    assert theirs == (ours.trainable, ours.total)
except ImportError:
    print("peft is not installed here, so that comparison is skipped (pip install peft)")

# %% [markdown]
# ## Soft prompts
#
# Chapters 2 and 3. **Guess first**: the buttons are *holds*, *wrong*, *depends*, and *nobody can tell*. There are many claims; take as many as you like, for only those that you guess are scored. Your first guess counts and is kept in `minipeft_progress.json` beside this notebook, so you can go on tomorrow; delete the file to begin again. (Where no buttons appear, as on GitHub, the verdicts are folded.)

# %%
lab.guess("soft prompts")

# %% [markdown]
# A share depends on two things that such claims leave out: the model, and the length. Here are both. The line is the printed *less than 0.01 %*.

# %% tags=["figure"]
from minipeft.lab.plots import COLOURS, new_figure

lengths, limit = (1, 5, 20, 100), next(c for c in book if c.id == "1.18a").claimed
figure, ax = new_figure(width=7.2, height=3.4)
for name, colour in (("BERT-base", "vermilion"), ("Llama 7B", "blue"), ("Llama 3 70B", "green")):
    shares = [findings.percent(findings.trained(name, mp.PromptTuning(n)), findings.total(name)) for n in lengths]
    ax.plot(lengths, shares, "o-", color=COLOURS[colour], label=name)
ax.axhline(limit, color=COLOURS["grey"], linestyle="--")
ax.text(1, limit * 1.15, f"{limit} %, as printed", color=COLOURS["grey"])
ax.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="percent of the model's numbers")
ax.set_xticks(lengths, lengths)
ax.legend()
figure

# %% [markdown]
# ## Adapters and (IA)³
#
# Chapters 4, 6 and 10. Guess.

# %%
lab.guess("adapters and (IA)³")

# %% [markdown]
# One article says that (IA)³ trains *fewer numbers than prompt tuning*, another that a prompt has *the fewest of all*. Both cannot be true. It is a matter of length: somewhere a prompt overtakes.
#
# ### Exercise 2: where a prompt overtakes (IA)³ · 10 minutes · easy
#
# <details>
# <summary>Hint</summary>
#
# (IA)³ has, in each layer, one number for each channel of the keys, of the values, and of the feed-forward's inner activation. A prompt has `hidden` numbers a token, once. *More*, not *as many*.
#
# </details>

# %%
def tokens_above_ia3(hidden: int, heads: int, kv_heads: int, inner: int, layers: int) -> int:
    """The length of the shortest prompt that trains more numbers than (IA)³."""
    ### BEGIN SOLUTION
    ia3 = layers * (2 * hidden // heads * kv_heads + inner)
    return ia3 // hidden + 1
    ### END SOLUTION

check.tokens_above_ia3(tokens_above_ia3)

# %% [markdown]
# Another way to test a claim: ask **what would make it true**. Adapters of 64 in BERT-base are said to be 3 to 4 % of its numbers. They are not. How wide would they have to be?
#
# ### Exercise 3: the bottleneck that makes the claim true · 15 minutes · medium
#
# <details>
# <summary>Hint</summary>
#
# One adapter has $2md + m + d$ numbers; there are two a layer. You want the smallest $m$ with $2L(2md + m + d) \ge p\,N / 100$. Solve for $m$ and round up, or try $m = 1, 2, 3, \dots$
#
# </details>

# %%
def bottleneck_for(percent: float, total: int, width: int, layers: int) -> int:
    """The smallest bottleneck with which adapters, two a layer, are at least `percent` percent of `total` numbers."""
    ### BEGIN SOLUTION
    wanted = percent * total / 100
    return math.ceil((wanted / (2 * layers) - width) / (2 * width + 1))
    ### END SOLUTION

check.bottleneck_for(bottleneck_for)

# %% [markdown]
# The cell answers for BERT-base: it tries one width after the other with the package, until the printed share is reached.

# %%
low, high = next(c for c in book if c.id == "2.34b").claimed
def bert_share(m: int) -> float:
    return findings.percent(24 * mp.BottleneckAdapter(m).parameter_count(768), findings.total("BERT-base"))

needed = {p: next(m for m in range(1, 500) if bert_share(m) >= p) for p in (low, high)}
print(f"a bottleneck of 64 is {bert_share(64):.2f} %; for {low} % it takes {needed[low]}, for {high} % {needed[high]}")
assert bert_share(64) < low <= bert_share(needed[low]) and needed[high] > needed[low] > 64

# %% [markdown]
# ## LoRA
#
# Chapters 5 and 10. Guess.

# %%
lab.guess("LoRA")

# %% [markdown]
# Who follows a wrong sentence about the learning rate may train for hours and learn little. Here are the sweeps of chapter 5 again, each method with its own rates. The large dots are the best of each. The red strip is where the article would look for LoRA's best, the dashed line is where a study with many models would.

# %% tags=["figure"]
def sweep_of(way: str) -> dict[float, float]:
    """{rate: loss} of chapter 5, in rising order."""
    return dict(sorted((float(rate), loss) for rate, loss in findings.measured("05_lora", "rates", way).items()))

try:
    sweeps = {way: sweep_of(way) for way in ("full fine-tuning", "LoRA")}
    best = {way: min((loss, rate) for rate, loss in s.items() if loss is not None)[1] for way, s in sweeps.items()}
    figure, ax = new_figure(width=7.8, height=3.5)
    for way, colour in (("full fine-tuning", "orange"), ("LoRA", "blue")):
        ax.plot(*zip(*[(r, loss) for r, loss in sweeps[way].items() if loss is not None]), "o-", color=COLOURS[colour], label=way)
        ax.plot(best[way], sweeps[way][best[way]], "o", markersize=12, color=COLOURS[colour])
    ax.axvspan(best["full fine-tuning"] / 5, best["full fine-tuning"] / 3, color=COLOURS["vermilion"], alpha=0.2, label="the article: 3 to 5 times lower")
    ax.axvline(10 * best["full fine-tuning"], color=COLOURS["green"], linestyle="--", label="LoRA Without Regret: 10 times higher")
    ax.set(xscale="log", xlabel="learning rate", ylabel="loss after training")
    ax.legend(fontsize=8)
except findings.NotMeasured as missing:
    figure = f"not measured yet: {missing}"
figure

# %% [markdown]
# ### Exercise 4: a verdict from two sweeps · 15 minutes · medium
#
# Judge such a claim for any two sweeps. Beware of a trap: a best rate at the **end** of its sweep says only that the best lies there or further out. One side is known, the other is not. Here, call every such case *open*.
#
# <details>
# <summary>Hint</summary>
#
# Drop the diverged runs (None) to find the best rate, not to find the ends. `min(losses, key=losses.get)` is the rate with the lowest loss. *Lower* means full / LoRA.
#
# </details>

# %%
def verdict_on_rate(
    full: dict[float, float | None], lora: dict[float, float | None], low: float, high: float
) -> str:
    """Is LoRA's best rate `low` to `high` times lower than full fine-tuning's? "holds", "wrong", or "open".

    The sweeps are {rate: loss}, None where training diverged. "open" where a best rate is an end of its sweep.
    """
    ### BEGIN SOLUTION
    best = []
    for sweep in (full, lora):
        losses = {rate: loss for rate, loss in sweep.items() if loss is not None}
        best.append(min(losses, key=losses.get))
        if best[-1] in (min(sweep), max(sweep)):
            return "open"
    return "holds" if low <= best[0] / best[1] <= high else "wrong"
    ### END SOLUTION

check.verdict_on_rate(verdict_on_rate)

# %% [markdown]
# ## Memory and QLoRA
#
# Chapters 6, 7 and 9. Guess.

# %%
lab.guess("memory and QLoRA")

# %% [markdown]
# *65 billion on one card of 24 GB* is no matter of settings: the weights alone do not fit. The bars are computed from the config, with 16-bit activations, one row of 512 tokens and gradient checkpointing.

# %% tags=["figure"]
bills = {f"{size}, {way}": findings.bill(f"Llama {size}", way) for size, way in (("33B", "QLoRA"), ("65B", "QLoRA"), ("65B", "LoRA"))}
lab.bill_figure(bills, marks={f"{gb} GB": gb * 1e9 for gb in (24, 48, 80)})

# %% [markdown]
# ### Exercise 5: the largest model for a card · 10 minutes · easy
#
# Turn the question round: you have the card, which model? Leave activations out; they come on top.
#
# <details>
# <summary>Hint</summary>
#
# Bytes a weight: `bits / 8` for itself, and `share` times four float32 numbers: weight, gradient, two states.
#
# </details>

# %%
def largest_model(card: float, bits: float, share: float) -> float:
    """Billions of weights, each of `bits` bits, that fit a card of `card` GB (10⁹ bytes), with a `share` of their number trained in float32 by AdamW."""
    ### BEGIN SOLUTION
    return card / (bits / 8 + 16 * share)
    ### END SOLUTION

check.largest_model(largest_model)

# %% [markdown]
# ### Exercise 6: find the bug · 10 minutes · medium
#
# A model in 4 bits reports a share of trained numbers that is far too large, because each tensor was asked how many elements it has. Two 4-bit numbers lie in each element of a packed tensor. [QLoRA's own script](https://github.com/artidoro/qlora/blob/main/qlora.py) counts elements in this way, and for 4 bits halves the number that *trains*: the share is then about right, and neither count is. The first cell makes the mistake on the small Llama; then write the count that no packing fools.

# %%
counted = {}
for bits in (16, 4):
    model = transformers.LlamaForCausalLM(small)
    if bits == 4:
        mp.quantize(model)
    mp.attach(model, mp.LoRA(rank=4, targets="all-linear"))
    elements = sum(t.numel() for t in (*model.parameters(), *(b for n, b in model.named_buffers() if "packed" in n)))
    report = mp.parameter_report(model)
    counted[f"{bits} bits"] = {"elements counted, %": 100 * report.trainable / elements, "numbers counted, %": report.percent}
lab.table([{"base": base} | row for base, row in counted.items()])

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# A tensor holds `elements * bits of an element // bits of a number` numbers.
#
# </details>

# %%
def percent_trained(tensors: list[tuple[int, int, int, bool]]) -> float:
    """Percent of the numbers that train. Each tensor: (elements, bits of an element, bits of a number, whether it trains)."""
    ### BEGIN SOLUTION
    numbers = [elements * stored // bits for elements, stored, bits, _ in tensors]
    trained = [n for n, tensor in zip(numbers, tensors) if tensor[3]]
    return 100 * sum(trained) / sum(numbers)
    ### END SOLUTION

check.percent_trained(percent_trained)

# %% [markdown]
# ## Tools, hybrids, and the world outside
#
# Chapters 10 and 11, and what companies say. Guess.

# %%
lab.guess("tools and hybrids")

# %% [markdown]
# ## The count
#
# First your own: how often did you guess right? Then the articles: what became of their claims. *Not measured yet* stands where a run of the course has not been made on this machine's copy; `make results` makes them.

# %%
lab.guess_score()

# %% tags=["figure"]
def sort_of(claim) -> str:
    """The verdict in one of five words."""
    return claim.finding().verdict if claim.kind != "not checkable" else claims.NOT_CHECKABLE

sorts = (*claims.VERDICTS, findings.OPEN)
shade = dict(zip(sorts, ("green", "vermilion", "orange", "grey", "sky")))
articles = {n: [c for c in book if c.id.startswith(f"{n}.")] for n in "123"}
figure, ax = new_figure(width=8.2, height=2.9)
left = dict.fromkeys(articles, 0)
for sort in sorts:
    counts = {n: sum(sort_of(c) == sort for c in articles[n]) for n in articles}
    if any(counts.values()):
        bars = ax.barh([f"article {n}" for n in articles], counts.values(), left=list(left.values()), color=COLOURS.get(shade[sort], "#9ecae1"), label=sort)
        ax.bar_label(bars, [str(v or "") for v in counts.values()], label_type="center", color="white", fontsize=9)
        left = {n: left[n] + counts[n] for n in articles}
ax.invert_yaxis()
ax.set(xlabel="claims")
ax.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28))
figure

# %% [markdown]
# How wrong are the numbers? Each dot is a printed number divided by the computed one. On the line it is right. The axis is logarithmic.

# %% tags=["figure"]
pairs = {"2.14b": "trained", "2.14c": "percent", "3.9a": "gb", "3.21a": "gb", "2.34a": "trained", "2.32c": "exact", "2.22a": "trained",
         "3.17b": "one_projection", "3.58a": "in_all", "3.21b": "lora", "2.70a": "trained", "2.70c": "percent", "2.24b": "percent",
         "3.49a": "in_7b", "3.49b": "trained"}
points = []
for c in book:
    if c.id in pairs:
        points.append((c.claimed / c.finding().figures[pairs[c.id]], c))
points.sort(key=lambda point: point[0])
figure, ax = new_figure(width=8.6, height=0.9 + 0.3 * len(points))
for row, (ratio, c) in enumerate(points):
    ax.plot(ratio, row, "o", markersize=8, color=COLOURS["green" if c.guess == "holds" else "vermilion"])
ax.axvline(1, color=COLOURS["grey"], linewidth=1)
ax.set_yticks(range(len(points)), [c.claim if len(c.claim) < 62 else c.claim[:60] + "…" for _, c in points], fontsize=8)
ax.set(xscale="log", xlabel="printed / computed")
figure

# %% [markdown]
# Now look for what the dots on the line have in common. Most of them have their multiplication beside them in the article: 4096 × 20, or 10 × 768 × 2 × 12. You can do it again, and so could the author. Most of the others come without a model, a rank or a length, or with code whose output you are to believe. How many digits a number has tells you nothing.
#
# ## What you predicted

# %%
sorted_out = Counter(sort_of(c) for c in book)
decided = [c for c in book if c.kind == "arithmetic" and c.claimed is not None]
wrong_in = {int(n): sum(sort_of(c) == "wrong" for c in articles[n]) / len(articles[n]) for n in articles}
computed = dict(zip(predicted, (100 * sorted_out["holds"] / len(book), 100 * sum(sort_of(c) == "wrong" for c in decided) / len(decided),
                                max(wrong_in, key=wrong_in.get), 100 * sorted_out[claims.NOT_CHECKABLE] / len(book))))
disagree = [c.id for c in book if sort_of(c) not in (c.guess, findings.OPEN)]
lab.record(claims=len(book), verdicts=dict(sorted_out), articles={str(n): share for n, share in wrong_in.items()},
           open=sum(sort_of(c) == findings.OPEN for c in book))
print(f"{len(book)} claims; where code and file disagree: {', '.join(disagree) or 'nowhere'}")
lab.table([{"": key, "predicted": predicted[key], "computed": value} for key, value in computed.items()])

# %% [markdown]
# Be fair to the authors. They wrote for readers in a hurry, and much of what they recommend is sound. This course may have errors as well: `data/claims.yaml` is itself a list of claims. If you find one that is wrong, you know how to show it.
#
# ## Quiz
#
# Every choice says why it is right or wrong. The numbers are computed, not typed.

# %% tags=["figure"]
F = {c.figure: c.finding().figures for c in book if c.figure and c.finding().verdict != findings.OPEN}
b65, lora8, ia3 = findings.bill("Llama 65B", "QLoRA"), F["lora_8b"]["trained"], F["ia3_against_prompt"]
swept = f"{F['learning_rate']['times']:.0f} times in chapter 5's sweep" if "learning_rate" in F else "chapter 5's sweep has not decided it here"
holds, wrong, open_ = (sorted_out[s] for s in ("holds", "wrong", claims.NOT_CHECKABLE))

lab.quiz([
    {"question": "LoRA of rank 16 on the seven projections of Llama-3-8B. How many numbers train?", "right": f"{lora8:,}",
     "choices": {f"{lora8:,}": "Rank times the sides of seven matrices, times 32 layers: exercise 1.",
                 f"{printed:,}": "In print, and twice as many: that is rank 32.",
                 f"{findings.trained('Llama 3 8B', mp.LoRA(rank=16)):,}": "That is query and value only.",
                 f"{16 * layers * (sides + 2 * (d - kv)):,}": "That takes keys and values as wide as queries."}},
    {"question": "Which of these claims is arithmetic, decided from a config alone?", "right": "adapters of 64 are 3 to 4 % of BERT-base",
     "choices": {"adapters of 64 are 3 to 4 % of BERT-base": "Shapes decide it. It is wrong.",
                 "adapters make a pass 5 to 8 % slower": "A clock decides it, and it depends on the batch.",
                 "prompt tuning nears full fine-tuning at 10 billion": "A paper that trained such models decides it.",
                 "35 % of new installations are hybrids": "Nobody can decide it: there is no source."}},
    {"question": "65 billion weights with QLoRA. Which is the smallest card that holds one row of 512 tokens?", "right": "48 GB",
     "choices": {"24 GB": f"In print, and wrong: the weights alone take {b65.weights / 1e9:.1f} GB.", "48 GB": f"{b65.total / 1e9:.1f} GB in all. The paper's abstract, too, has one card of 48 GB.",
                 "80 GB": "It fits there too, but a smaller one does.", "none": f"{b65.total / 1e9:.1f} GB is not so much."}},
    {"question": "In a 7B Llama, (IA)³ against a prompt of 20 tokens: which trains fewer numbers?", "right": "the prompt",
     "choices": {"the prompt": f"{ia3['prompt']:,} against {ia3['ia3']:,}. They are equal at {ia3['equal_at_tokens']:.0f} tokens.",
                 "(IA)³": "In print, and wrong at this length. Exercise 2 says where it turns.",
                 "they are equal": f"At {ia3['equal_at_tokens']:.0f} tokens, not at 20.",
                 "it depends on the data": "A count does not."}},
    {"question": "How does LoRA's best learning rate compare with full fine-tuning's?", "right": "about ten times higher",
     "choices": {"three to five times lower": "In print. The literature says the opposite: see the figure above for chapter 5.", "the same": "In print as a common mistake, rightly. But the cure is a higher rate, not a lower one.",
                 "about ten times higher": f"In the literature; {swept}.",
                 "PEFT chooses it": "LoraConfig has no setting for it."}},
    {"question": "The best rate of a sweep is the largest that was tried. What do you know about the best rate?", "right": "that it is at least about so large",
     "choices": {"that it is this one": "It may lie beyond: nobody looked.", "that it is at least about so large": "Try larger ones before you judge.",
                 "that the sweep diverged": "It has not, or this would not be the best.", "that it is smaller": "The smaller ones that were tried are worse."}},
    {"question": "What do the letters of (IA)³ stand for?", "right": "infused adapter by inhibiting and amplifying inner activations",
     "choices": {"infused adapter by inhibiting and amplifying inner activations": "Three I's and three A's, hence the name.",
                 "input-aware adapter adjustment": "In print, and made up.", "iterated additive adapters": "Nothing is added.",
                 "inner attention alignment": "Attention is rescaled, not aligned."}},
    {"question": "DoRA has *the same parameter count* as LoRA of equal rank. True?", "right": "no: one more for each output",
     "choices": {"no: one more for each output": f"{F['dora_count']['more']:.1f} % more for rank 8 on query and value of a 7B Llama.",
                 "yes": "It is in print. It forgets the magnitudes.", "no: twice as many": "The direction has one A and one B, as in LoRA.",
                 "no: fewer": "It has all of LoRA's numbers, and the magnitudes."}},
    {"question": "What is P-tuning v2?", "right": "prefix tuning, the vectors trained directly",
     "choices": {"prefix tuning, the vectors trained directly": "Keys and values in every layer, without the network.",
                 "prompt tuning with an LSTM": "That is the first version.", "prompts in every layer's embeddings": "Layers have no embeddings. Keys and values it is.",
                 "a LoRA on the prompt": "No."}},
    {"question": "Adapters cost 20 to 30 % more time in one paper's table and 2 to 3 % in the same table. How?", "right": "one short row against many long ones",
     "choices": {"one short row against many long ones": "With one row the machine waits for small operators. With many, the arithmetic hides them.",
                 "a printing error": "It is one experiment at three settings.", "merged and unmerged": "Adapters cannot be merged.",
                 "training and inference": "Both are inference."}},
    {"question": "\"A 2025 study found that 67 % of critical errors …\", and no title. What do you write?", "right": "not checkable",
     "choices": {"not checkable": "It may be true. As it stands nobody can look.", "wrong": "You would have to show that. You cannot: there is nothing to look at.",
                 "holds, with reservations": "A reservation is no test.", "depends on the field": "You do not know on what it depends."}},
    {"question": f"Of {len(book)} claims, {wrong} were found wrong and {holds} hold. Is an article with fewer wrong claims the better one?", "right": "not by that alone",
     "choices": {"not by that alone": f"It may have fewer because it says less that can be checked: {open_} claims here cannot be.",
                 "yes": "An article without any checkable claim would win.", "no, the worse": "That does not follow either.",
                 "yes, if it is longer": "Length is not what was counted."}},
])

# %% [markdown]
# ## Examine yourself
#
# The second article closes with six questions: *do you understand this?* Here they are, with questions to each. The sixth asks for *the five scenarios* of a table that has six rows. All six are here, and where the article's own answer is wrong, you are asked for the right one.
#
# Your first answers are kept, as your guesses are: you may stop and go on another day.

# %%
examination = lab.exam()
print(f"{examination.count} questions in {len(examination.sections)} parts")
examination

# %% [markdown]
# **For teachers.** The same questions on paper: one page with boxes to tick, and one with the answers and a reason for each choice. Give a folder's name, and open the two files in a browser to print them. `lab.exam(sample=2, seed=…)` draws two questions of each part: another seed, another paper. At a command line: `python -m minipeft.lab.exams FOLDER`.

# %%
folder = None                                                  # for example "exam"; None writes to a place that is thrown away

with tempfile.TemporaryDirectory() as thrown_away:
    for page in examination.write(folder or thrown_away):
        print(page.name, f"{page.stat().st_size / 1e3:.0f} kB")

# %% [markdown]
# ## Recap
#
# - Ask first what kind of claim it is. That tells you whether to count, to run, to read, or to stop.
# - A model need not be loaded to be counted or billed: its config is enough.
# - A share without a model and a length, a latency without a batch, a rate without a sweep: each *depends on …*.
# - Ask what would make a claim true. If that is absurd, so is the claim.
# - A best value at the end of a sweep is known on one side only. Sweep on before you judge.
# - Without a source there is no verdict, not even *wrong*.
#
# ## Further reading
#
# - Schulman and others 2025, [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/): many claims about LoRA, measured with care
# - Hugging Face PEFT, [method comparison](https://github.com/huggingface/peft/tree/main/method_comparison): one task, many methods, all settings given
# - Biderman et al. 2024, [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673): where full fine-tuning is ahead
# - `data/claims.yaml`: all claims, with their papers
