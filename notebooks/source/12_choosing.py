# ---
# jupyter:
#   minipeft:
#     records: [main, own, one_rate, scenarios]
# ---

# %% [markdown]
# # 12 · Choosing: one fair comparison, and which method for you
#
# **In one sentence:** the best method is a question about your model, your memory and your tasks, and you can only answer it from a comparison in which every method had a rate of its own, several seeds, and a test that chose nothing.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/12_choosing.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - compare methods so that the result means something: sweep, seeds, an error, an unseen test
# - find the place where a published loop lets the test choose
# - read a large table of methods: score, size, time, memory, latency, forgetting
# - count whether a fine-tune fits a card, and how to serve several tasks
# - say which method fits a situation, and why, and where well-known advice does not hold
#
# **You need:** chapters [1](01_full_fine_tuning.ipynb) to [6](06_dora_and_ia3.ipynb), [9](09_qlora.ipynb) and [10](10_merge_and_serve.ipynb) for the methods. Means and standard deviations.
#
# **The papers:** Dodge et al. 2019, *Show Your Work*, [arXiv:1909.03004](https://arxiv.org/abs/1909.03004): you build the idea of its section 3, that a score without its search is half a result. Schulman et al. 2025, *LoRA Without Regret*, on rates.

# %% tags=["setup"]
import inspect, math, random, statistics, subprocess, sys, time
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

from dataclasses import replace
import torch, transformers
import minipeft as mp
from minipeft import lab, sockets
from minipeft.lab import contest

lab.seed_everything(0)
print("minipeft", mp.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
print("profile", mp.profile().name, "on", mp.profile().device)
lab.runtime_box("12_choosing")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the measured ones.
#
# 1. On the film reviews further down: LoRA's best rate, divided by full fine-tuning's best rate?
# 2. A model of 65 billion numbers, its base in 4 bits, LoRA of rank 8, one text of 512 tokens, activations recomputed: how many **GB** does a training step take?
# 3. A method is right in 75 % of the cases, **equally** at each of ten rates. You try all ten, ask 200 test texts each time, and report the best score. How many **points** above the true one is it, on average?

# %%
predicted = {"best rate, LoRA / full": None, "GB for a step at 65B": None, "points above the truth": None}

# %% [markdown]
# ## The problem
#
# Two tables from two articles. Read the third row of each.
#
# | situation | article A | | situation | article B |
# |---|---|---|---|---|
# | instruction tuning | LoRA | | general purpose | LoRA |
# | 30 to 70 billion on consumer hardware | QLoRA | | little memory | QLoRA |
# | **many tasks, one base** | **LoRA, unmerged** | | **five tasks and more** | **adapters** |
# | smallest budget | (IA)³ | | simple classification | prompt tuning |
# | no access to the weights | prompt tuning or a written prompt | | high stakes | LoRA with an adapter |
# | quality at any cost | full fine-tuning | | | |
#
# They disagree, and neither shows a measurement. So you measure. First the frozen model, on the task that you will use: film reviews, positive or negative. Its head of two classes is new, and is trained alone. That is the row which every method has to beat.
#
# (Hutto & Gilbert 2014. The texts are opinions of people, and not facts.)

# %%
def films(split: str, most: int) -> list[dict]:
    """At most `most` reviews of at most 16 words, drawn with a fixed seed."""
    rows = [e for e in mp.load_data("sentiment/movies", split) if len(e["text"].split()) <= 16]
    return random.Random(0).sample(rows, min(most, len(rows)))

train = films("train", mp.pick(smoke=32, cpu=1200, gpu=3000))
validation, test = (films(split, mp.pick(smoke=8, cpu=200, gpu=400)) for split in ("validation", "test"))
STEPS, BATCH = mp.pick(smoke=2, cpu=50, gpu=150), mp.pick(smoke=4, cpu=16, gpu=32)
plan = mp.FitConfig(steps=STEPS, batch_size=BATCH, warmup=0.1, progress=False)

def start(seed: int):
    """MiniLM under a head that was trained alone: here all methods begin."""
    torch.manual_seed(seed)
    model, tokenizer = mp.load_base("minilm-l6", num_labels=2)
    model.base_model.requires_grad_(False)
    mp.fit(model, tokenizer, train, replace(plan, lr=1e-2, seed=100 + seed))
    return model.requires_grad_(True), tokenizer

model, tokenizer = start(0)
frozen = mp.evaluate(model, tokenizer, test)
positive = statistics.mean(e["label"] for e in test)
print(f"always the commoner label: {max(positive, 1 - positive):.1%}; head alone: {frozen['accuracy']:.1%}; {len(test)} test reviews")

# %% [markdown]
# ## The idea
#
# A comparison is fair if the methods differ in nothing but the method: the same model, data, order and steps. And unfair if they share what has to be their own: the learning rate. So each gets a sweep that starts equally wide. The sweep is judged on **validation** texts. The **test** texts are asked once, at the end.
#
# $$\hat \eta = \arg\min_{\eta} \tfrac1n \textstyle\sum_{s} \mathrm{loss}_\mathrm{val}(\eta, s), \qquad \mathrm{score} = \tfrac1n \sum_{s} \mathrm{acc}_\mathrm{test}(\hat \eta, s) \;\pm\; \frac{\mathrm{sd}}{\sqrt n}$$
#
# | | what it is | who may look at it |
# |---|---|---|
# | $\eta$ | the rate | the sweep |
# | $s = 1 \dots n$ | seeds: the start, the order | everybody |
# | $\mathrm{loss}_\mathrm{val}$ | on validation texts | the sweep: it chooses |
# | $\mathrm{acc}_\mathrm{test}$ | on test texts | the reader, once |
# | $\mathrm{sd}$ | standard deviation over seeds | the reader, before believing a lead |
#
# Why may the test not choose? Because the best of several noisy scores is too high, even if all are equally good. The picture shows by how much, simulated: a method that is right in 75 % of the cases, tried at $k$ rates that all are equally good, the best test score kept. Each score is drawn on its own. Real runs share their test texts and make some mistakes in common, so there the gain from luck is smaller.

# %% tags=["figure"]
def luck(rates: int, texts: int, true: float = 0.75, draws: int = 4000) -> float:
    """Mean of the best of `rates` scores, each the share right of `texts` texts, minus the truth."""
    draw = torch.Generator().manual_seed(rates * 1000 + texts)
    right = torch.full((draws, rates), true)
    scores = right + torch.randn(draws, rates, generator=draw) * math.sqrt(true * (1 - true) / texts)
    return (scores.max(dim=1).values.mean() - true).item()

figure, ax = lab.new_figure(width=6.8, height=3.3)
tries = (1, 2, 3, 5, 10, 20, 50)
for texts, colour in ((50, "vermilion"), (200, "orange"), (1000, "blue")):
    ax.plot(tries, [100 * luck(k, texts) for k in tries], "o-", color=lab.COLOURS[colour], label=f"{texts} test texts")
ax.set(xscale="log", xlabel="rates tried, the best on the test kept", ylabel="points above the truth", ylim=(0, None))
ax.set_xticks(tries, [str(k) for k in tries])
ax.minorticks_off()
ax.legend()
inflation = 100 * luck(10, 200)
print(f"ten rates, 200 texts: {inflation:.1f} points too high")
figure

# %% [markdown]
# ## By hand
#
# Two methods, three seeds each: $0.70, 0.74, 0.72$ and $0.71, 0.77, 0.74$.
#
# 1. The two means, and the lead of the second.
# 2. The two variances, with $n - 1 = 2$ below.
# 3. The standard error of the lead: $\sqrt{s_1^2/3 + s_2^2/3}$.
# 4. Is the lead more than twice its error?
#
# Then run the cell.

# %%
first, second = [0.70, 0.74, 0.72], [0.71, 0.77, 0.74]
lead = statistics.mean(second) - statistics.mean(first)
error = math.sqrt(statistics.variance(first) / 3 + statistics.variance(second) / 3)
print(f"lead {lead:.3f}, error {error:.4f}, {lead / error:.1f} errors: {'a difference' if lead > 2 * error else 'no difference to speak of'}")
assert math.isclose(lead, 0.02) and math.isclose(error, math.sqrt((4e-4 + 9e-4) / 3))

# %% [markdown]
# ## Build it
#
# ### Step 1: the rate, and a bug to find
#
# This stands, in one form or another, in a great many public training scripts:
#
#     best_acc = max(best_acc, test(model))      # after each epoch, or each setting
#     print("accuracy:", best_acc)
#
# What is wrong with it? Run the cell: a "method" that guesses, tried at ten rates.

# %%
guess = random.Random(0)
best_acc = 0.0
for rate in range(10):
    answers = [guess.random() < 0.5 for _ in test]
    best_acc = max(best_acc, statistics.mean(a == bool(e["label"]) for a, e in zip(answers, test)))
print(f"a coin, reported as published: {best_acc:.1%} right")
assert best_acc > 0.5

# %% [markdown]
# ### Exercise 1: honest scores · 10 minutes · medium
#
# You get the trials of several methods: rates, seeds, the validation loss and the test score of each. Give every method the rate with the lowest **mean** validation loss over the seeds, and report its mean test score there.

# %%
from minipeft.checks import ch12_choosing as check

def honest_scores(trials: list[dict]) -> dict[str, float]:
    """{method: score}; a trial is {"method", "rate", "seed", "validation" (loss), "test" (share right)}."""
    ### BEGIN SOLUTION
    found = {}
    for method in {t["method"]: None for t in trials}:
        by_rate = {}
        for t in trials:
            if t["method"] == method:
                by_rate.setdefault(t["rate"], []).append(t)
        best = min(by_rate.values(), key=lambda own: statistics.mean(t["validation"] for t in own))
        found[method] = statistics.mean(t["test"] for t in best)
    return found
    ### END SOLUTION

check.honest_scores(honest_scores)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Group by method, then by rate. Every method has its own rates. `min` with `key=` on the mean validation loss; the test score is only read at the end.
#
# </details>

# %% [markdown]
# ### Step 2: is it a difference?
#
# A lead means nothing without its error. There are two: the seeds, and the number of test texts. All methods are asked the same texts, so a part of the second cancels in a lead, but not all of it. The first you can compute from the scores. Twice the error is a rule of thumb: with three seeds the error itself is only roughly known.
#
# ### Exercise 2: lead and error · 5 minutes · easy
#
# <details>
# <summary>Hint</summary>
#
# `statistics.variance` divides by $n - 1$. The squares of the errors add.
#
# </details>

# %%
def lead_and_error(a: list[float], b: list[float]) -> tuple[float, float]:
    """(mean of a - mean of b, standard error of that), from scores over seeds."""
    ### BEGIN SOLUTION
    lead = statistics.mean(a) - statistics.mean(b)
    return lead, math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    ### END SOLUTION

check.lead_and_error(lead_and_error)

# %% [markdown]
# ### Step 3: score against cost
#
# Many methods cannot be put in one order, because they differ in more than one thing. But some can be crossed out: those that another method beats in everything. What is left is called the *front*.
#
# ### Exercise 3: not beaten · 10 minutes · medium
#
# A row is (name, score, cost). One method beats another if it scores at least as high **and** costs at most as much, and is better in one of the two.
#
# <details>
# <summary>Hint</summary>
#
# For each row, ask whether `any` other row beats it. Two equal rows do not beat each other.
#
# </details>

# %%
def not_beaten(rows: list[tuple]) -> set[str]:
    """The names of the rows (name, score, cost) that no other row beats."""
    ### BEGIN SOLUTION
    def beaten(score, cost):
        return any(s >= score and c <= cost and (s > score or c < cost) for _, s, c in rows)

    return {name for name, score, cost in rows if not beaten(score, cost)}
    ### END SOLUTION

check.not_beaten(not_beaten)

# %% [markdown]
# ### Step 4: does it fit?
#
# What training holds all the time: the frozen numbers, in 32, 16 or about 4 bits each; and for every trained number itself, its gradient, and AdamW's two states. Activations come on top.
#
# ### Exercise 4: standing bytes · 5 minutes · easy
#
# <details>
# <summary>Hint</summary>
#
# Eight bits are a byte; a float32 has four bytes. How many float32 does one trained number need, itself included?
#
# </details>

# %%
def standing_bytes(frozen: int, trained: int, bits: float) -> float:
    """Bytes held all the time; trained numbers, gradients and both states of AdamW are float32."""
    ### BEGIN SOLUTION
    return frozen * bits / 8 + 16 * trained
    ### END SOLUTION

check.standing_bytes(standing_bytes)

# %% [markdown]
# ### Step 5: how to serve
#
# One task: merge, where the method can, and pay nothing. Several tasks, all to be ready: either a merged model for each, as fast as the base, or one base and an adapter for each.
#
# ### Exercise 5: how to serve · 5 minutes · easy
#
# <details>
# <summary>Hint</summary>
#
# Merged: `tasks` whole models. Unmerged: one model and `tasks` adapters. Take merged if it fits: it is faster.
#
# </details>

# %%
def how_to_serve(weights: float, adapter: float, tasks: int, memory: float) -> str:
    """"merged", "unmerged" or "neither": what fits `memory` (all in one unit), merged first."""
    ### BEGIN SOLUTION
    if tasks * weights <= memory:
        return "merged"
    return "unmerged" if weights + tasks * adapter <= memory else "neither"
    ### END SOLUTION

check.how_to_serve(how_to_serve)

# %% [markdown]
# ## The same as the package
#
# `mp.memory_bill` counts what you counted in exercise 4, and adds what it measures on shapes: activations, logits, what is held for a moment. Its four standing lines must be your formula. For a base that is partly in 4 bits the weights are a mixture, so compare at 32 bits. Then only a few buffers are left over, which are no parameters.

# %%
from minipeft.choosing import _config, _fit_base

tiny = mp.memory_bill(_config("minilm-l6"), mp.LoRA(rank=8, targets="all-linear"), batch=1, seq=32)
trained, base = tiny.trainable, tiny.parameters - tiny.trainable
mine = base * 32 / 8 + 16 * trained                            # exercise 4, with 32 bits
standing = tiny.weights + tiny.adapter + tiny.gradients + tiny.optimizer
assert tiny.adapter + tiny.gradients + tiny.optimizer == 16 * trained
assert mine <= standing < 1.001 * mine                         # the weights line holds a few buffers as well
print(f"by the formula {mine / 1e6:.3f} MB, in the bill {standing / 1e6:.3f} MB\n")
print(tiny)
print()
print(inspect.getsource(_fit_base).split('"""')[2].split("gb =")[0])

# %% [markdown]
# The second half of the output is how `mp.recommend` decides how the base is kept: 16 bits, then activations recomputed, then 4 bits. The first that fits is taken.
#
# ## Nothing changed yet
#
# The contestants of your own comparison. Each is plugged in once. LoRA and (IA)³ must leave the answers as they are; a soft prompt cannot. The prompt's count must be its formula plus the head, and no number of the base may have moved.

# %%
METHODS = {"head only": None, "prompt tuning": mp.PromptTuning(10, init="vocab"), "(IA)³": mp.IA3(),
           "LoRA": mp.LoRA(rank=8, alpha=16, targets="all-linear"), "full fine-tuning": None}
width, head = model.config.hidden_size, sum(p.numel() for p in model.classifier.parameters())
review, counts = tokenizer(test[0]["text"], return_tensors="pt").to(model.device), {}
frozen_bytes = [p.detach().clone() for p in sockets.base_parameters(model).values()]
with torch.no_grad():
    before = model(**review).logits
for name, method in METHODS.items():
    counts[name] = {"head only": head}.get(name, sum(p.numel() for p in model.parameters()))
    if method is not None:
        mp.attach(model, method)
        counts[name] = mp.parameter_report(model).trainable
        with torch.no_grad():
            same = torch.equal(model(**review).logits, before)
        assert same == (name != "prompt tuning")
        mp.detach(model)
        model.requires_grad_(True)
assert counts["prompt tuning"] == mp.PromptTuning(10).parameter_count(width) + head
assert all(torch.equal(a, b) for a, b in zip(frozen_bytes, sockets.base_parameters(model).values()))
lab.table([{"method": name, "trained": count, "%": 100 * count / counts["full fine-tuning"]} for name, count in counts.items()])

# %% [markdown]
# ## Your own comparison
#
# Five contestants, one domain. Each begins with the same number of rates, three in the cpu profile, a factor of about three apart, and all have the same steps from the same start. Where the best rate stands at an end of what was tried, the next one is tried as well, twice at most: otherwise you would compare the ends of two grids. The winner of each sweep is taken by its validation loss, then trained with further seeds. Only the winners are asked about the test. The curve is the last LoRA's.
#
# A sweep on one seed and seeds at one rate only: that saves time. Exercise 1 had all seeds at all rates. The course's large comparison below stands between: on the cards all seeds run at the two best rates.

# %%
GRID = {"head only": (3e-3, 1e-2, 3e-2), "prompt tuning": (1e-2, 3e-2, 1e-1), "(IA)³": (1e-2, 3e-2, 1e-1),
        "LoRA": (1e-3, 3e-3, 1e-2), "full fine-tuning": (1e-4, 3e-4, 1e-3)}
GRID = {name: rates[: mp.pick(smoke=1, cpu=3, gpu=3)] for name, rates in GRID.items()}
SEEDS = mp.pick(smoke=(1,), cpu=(1, 2), gpu=(1, 2, 3, 4))

# %%
starts = {seed: {k: v.clone() for k, v in start(seed)[0].classifier.state_dict().items()} for seed in (0, *SEEDS)}

def trial(name: str, rate: float, seed: int, watch=None) -> dict:
    """One run: its rate, validation loss and seconds; `model`, None if it diverged."""
    torch.manual_seed(seed)
    one, _ = mp.load_base("minilm-l6", num_labels=2)
    one.classifier.load_state_dict(starts[seed])
    if name == "head only":
        one.base_model.requires_grad_(False)
    elif METHODS[name] is not None:
        mp.attach(one, METHODS[name])
    row = {"method": name, "rate": rate, "seed": seed}
    try:
        done = mp.fit(one, tokenizer, train, replace(plan, lr=rate, seed=seed), watch=watch)
    except ArithmeticError:                                    # the loss was not finite any more
        return row | {"validation": math.inf, "seconds": math.nan, "model": None}
    return row | {"validation": mp.evaluate(one, tokenizer, validation)["loss"], "seconds": done.seconds, "model": one}

# %%
def tested(row: dict) -> dict:
    """The row with the share of the test right, in place of the model."""
    one, row = row["model"], {k: v for k, v in row.items() if k != "model"}
    return row | {"test": max(positive, 1 - positive) if one is None else mp.evaluate(one, tokenizer, test)["accuracy"]}

def next_rate(rates: list[float], best: float) -> float | None:
    """The rate beyond the end at which the best one stands, in … 1e-4, 3e-4, 1e-3, …; None if it stands at no end."""
    if len(rates) < 2 or min(rates) < best < max(rates):
        return None
    return float(f"{best * (3.2 if best == max(rates) else 0.32):.0e}")

# %%
sweep, best, runs = [], {}, {}
for name, rates in GRID.items():
    tried, winner, more = [], None, list(rates)
    while more:
        row = trial(name, more.pop(0), 0)
        tried.append(row["rate"])
        if winner is None or row["validation"] < winner["validation"]:
            winner = row                                       # of all models this one is kept, for the test
        sweep.append({k: v for k, v in row.items() if k != "model"})
        further = next_rate(tried, winner["rate"])
        if not more and further and len(tried) < len(rates) + 2:
            more = [further]
    best[name], runs[name] = winner["rate"], [tested(winner)]

curve = lab.live_curve()
for name in GRID:
    runs[name] += [tested(trial(name, best[name], seed, curve if (name, seed) == ("LoRA", SEEDS[-1]) else None)) for seed in SEEDS]
ends = {name: {edge([t["rate"] for t in sweep if t["method"] == name]) for edge in (min, max)} for name in GRID}
at_edge = [name for name, rate in best.items() if rate in ends[name]]
print("the best rate stands at an edge of the grid, so a better one may lie outside:", ", ".join(at_edge) or "nowhere")
lab.table([{"method": t["method"], "rate": t["rate"], "validation loss": t["validation"], "taken": best[t["method"]] == t["rate"]} for t in sweep])

# %% tags=["figure"]
def mean_of(name: str) -> float:
    return statistics.mean(t["test"] for t in runs[name])

def against(a: str, b: str) -> tuple[float, float]:
    """Lead of a over b and its standard error, from the seeds."""
    x, y = ([t["test"] for t in runs[name]] for name in (a, b))
    return mean_of(a) - mean_of(b), math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))

own = [{"method": name, "trained": counts[name], "rate": best[name], "right": mean_of(name),
        "± (seeds)": statistics.stdev(t["test"] for t in runs[name]), "of full": mean_of(name) / mean_of("full fine-tuning"),
        "seconds": statistics.median(t["seconds"] for t in runs[name])} for name in GRID]
ratio = best["LoRA"] / best["full fine-tuning"]
for name in ("head only", "full fine-tuning"):
    lead, error = against("LoRA", name)
    says = "more than two errors" if abs(lead) > 2 * error else "no difference to speak of"
    print(f"LoRA before {name}: {100 * lead:+.1f} points, error of the seeds ± {100 * error:.1f}: {says}")
display(lab.table(own))

figure, (left, right) = lab.new_figure(2, width=9.4, height=3.6)
for name, colour in zip(GRID, ("grey", "orange", "green", "blue", "vermilion")):
    points = sorted((t["rate"], t["validation"]) for t in sweep if t["method"] == name)
    left.plot(*zip(*points), "o-", color=lab.COLOURS[colour], label=name)
    right.plot([counts[name]] * len(runs[name]), [t["test"] for t in runs[name]], "o", color=lab.COLOURS[colour], alpha=0.6)
    right.plot(counts[name], mean_of(name), "_", markersize=18, color=lab.COLOURS[colour])
left.set(xscale="log", xlabel="learning rate", ylabel="loss, validation reviews")
right.set(xscale="log", xlabel="numbers trained", ylabel="share of test reviews right")
figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=9)
figure

# %% [markdown]
# ## The whole comparison
#
# The same with every method of the course, on two tasks: the drug cards on SmolLM2 (does it keep the format, know the facts, recall the names?) and four domains of texts on MiniLM. It takes hours on two cores, so it is measured once, with `make results`; a part that is not there yet says so. How it is done stands in `notebooks/compare.py`, at the top. Each figure is kept with a hash of the code that it was measured with: when that code changes, a test says so until the first steps of a run have been repeated and give the same loss, or the whole run.
#
# A dot is the mean over the seeds, the pale bar goes from the lowest seed to the highest, the dashed line is full fine-tuning.

# %%
lab.comparison_figure("cards")

# %%
lab.comparison_figure("sentiment")

# %%
lab.comparison_table("cards")

# %%
lab.comparison_table("sentiment")

# %% [markdown]
# How to read the tables:
#
# - **±** is the standard deviation over seeds. Do not rely on a lead smaller than twice its error: exercise 2.
# - **of full** is the score divided by full fine-tuning's, which had a sweep of its own too.
# - **latency / base** is the time of a pass of 64 tokens at batch 1, 1 is the bare model. **merged** is the same after merging; an empty field means that it cannot be.
# - The last column is what was forgotten **while the adapter is on**. Switched off, a frozen base has forgotten nothing, and full fine-tuning cannot be switched off.
# - **peak GiB** is what a whole process needs beyond the libraries. On a GPU it is another number: see chapter 9, and `mp.memory_bill`.
#
# The next cell says in words what the tables say, whichever way they fall: which methods do not beat the frozen base, who comes within 5 % of full fine-tuning, and who is on the front of score against numbers trained.

# %%
def verdicts(task: str) -> list[str]:
    found = contest.rows(task)
    if not {"frozen base", "full fine-tuning"} <= set(found):
        return [f"{task}: not measured yet; make results"]
    base, full = (found[name]["score"] for name in ("frozen base", "full fine-tuning"))
    trained = {name: r for name, r in found.items() if name not in ("frozen base", "hard prompt")}
    below = [name for name, r in trained.items() if r["score"] <= base]
    near = [name for name, r in trained.items() if r["score"] >= 0.95 * full and name != "full fine-tuning"]
    rows = [(name, r["score"], r["trained"]) for name, r in trained.items()]
    front = [n for n, s, c in rows if not any(t >= s and d <= c and (t, d) != (s, c) for _, t, d in rows)]
    return [f"{task}: do not beat the frozen base: {', '.join(below) or 'none'}",
            f"{task}: within 5 % of full fine-tuning: {', '.join(near) or 'none'}",
            f"{task}: not beaten in score and numbers together: {', '.join(front)}"]

for task in ("cards", "sentiment"):
    print("\n".join(verdicts(task)))
lab.sweep_figure("sentiment")

# %% [markdown]
# Is LoRA missing among those within 5 % on the cards? Then look at how its rate was chosen, before you blame the method. Below are the validation losses of the sweep, with one seed at each rate; then, for the two best rates, the mean over all seeds, which decides; and what the rate taken scored. rsLoRA stands beside it: the same two matrices, the same numbers trained, only the scale is $\alpha/\sqrt r$ in place of $\alpha/r$.

# %%
swept = [{"method": name, **{f"loss at {float(rate):g}": loss for rate, loss in sorted(r["rates"].items(), key=lambda pair: float(pair[0]))},
          **{f"mean at {float(rate):g}": mean for rate, mean in r.get("mean losses", {}).items()}, "rate taken": r["rate"], "score": r["score"], "±": r["spread"], "lowest": r["lowest"], "highest": r["highest"]}
         for name in ("LoRA", "rsLoRA", "full fine-tuning") if (r := contest.rows("cards").get(name)) and "score" in r]
for r in swept:
    display(lab.table([r]))
lab.sweep_figure("cards")

# %% [markdown]
# Look for three things. First, rates that lie close on one seed: do their means lie as close? Where they do not, one seed would have chosen the edge of what is stable, and the next seed would have fallen off. That is why all seeds decide here, as in exercise 1. Second, how near does LoRA come at its best rate, and how large is its ±? Third, does rsLoRA come nearer? Then the two matrices can do it, and it is not their rank that LoRA lacks. A likely reason, which these runs do not prove: at its smaller scale it needs larger steps for the same change, and steps that large are not stable. See what the next rate up costs it.
#
# Is a soft prompt among those that do not beat the base on the sentiment task? Here is a likely cause. A classifier like BERT reads its answer at the *first* position, and there the prompt stands now. In a few dozen steps it has to learn from nothing what the head reads there. Size may matter as well: Lester et al. find prompt tuning near full fine-tuning only at billions of numbers.
#
# And on the cards? There the frozen base scores nothing at all, and a soft prompt next to nothing. Its validation loss falls far all the same, as the sweep shows. But a few dozen steps end before the whole form is right, and only then an answer counts. The figure of lengths below shows how far more positions go in the same steps.
#
# ## Five more questions
#
# The same runs with one thing changed: the rate, LoRA's rank, the length of a soft prompt and what it costs, the draw of the start, the number of texts. Bars go from the lowest seed to the highest.

# %%
lab.question_figure("rates")

# %%
lab.question_figure("ranks")

# %%
lab.question_figure("lengths")

# %%
lab.question_figure("starts")

# %%
lab.question_figure("sizes")

# %% [markdown]
# ## Break it: one rate for all
#
# Many comparisons give every method the same rate "to be fair". Take your own sweep, and ask who wins at each single rate. Read the column *in the race* too: a method ran only at the rates of its own sweep, so not all meet at each rate.

# %%
rates = sorted({t["rate"] for t in sweep})
one_rate = []
for rate in rates:
    there = [t for t in sweep if t["rate"] == rate]
    if len(there) > 1:
        winner = min(there, key=lambda t: t["validation"])
        one_rate.append({"one rate for all": rate, "in the race": ", ".join(t["method"] for t in there), "winner": winner["method"], "its loss": winner["validation"]})
print("different winners:", ", ".join(sorted({row["winner"] for row in one_rate})) or "no rate was tried by two")
lab.table(one_rate)

# %% [markdown]
# Does a method win at one rate, and lose at another where it ran too? Then whoever picks the rate picks the winner, knowingly or not. And at any single rate some method stands far from its own best one. That is why the sweep is part of the result.
#
# ## Which one for you?
#
# `mp.recommend` takes a situation and answers with a method, its settings, a memory bill and the reasons. Every reason names a figure of this course, with its value where it has been measured, or a paper. Where well-known advice says something else, the answer says that too. Try it: in a notebook you can choose; elsewhere you see some answers.

# %%
lab.advisor()

# %% [markdown]
# Now the rows of the two articles from the beginning, each as a situation. *Agrees* compares the method alone.

# %%
ROWS = [
    ("general purpose", "LoRA", {"model": "7B"}),
    ("many tasks, one base", "LoRA", {"model": "7B", "tasks": 5}),
    ("instruction tuning", "LoRA", {"model": "7B", "goal": "format"}),
    ("little memory: 7B on 8 GB", "QLoRA", {"model": "7B", "memory": 8, "goal": "format"}),
    ("no access to the weights", "prompt tuning or hard prompt", {"model": "7B", "weights": False}),
    ("smallest budget, 0.01 %", "(IA)³", {"model": "7B", "budget": 0.01}),
    ("five tasks and more", "adapters", {"model": "7B", "tasks": 5, "goal": "format"}),
    ("simple classification, small model", "prompt tuning", {"model": "minilm-l6", "goal": "classification"}),
    ("high stakes", "LoRA + adapter", {"model": "7B", "goal": "high stakes"}),
    ("65B on one card of 24 GB", "QLoRA", {"model": "65B", "memory": 24}),
    ("65B on one card of 48 GB", "QLoRA", {"model": "65B", "memory": 48}),
    ("quality at any cost", "full fine-tuning", {"model": "7B", "any_cost": True}),
]
ROWS = ROWS[: mp.pick(smoke=8, cpu=None, gpu=None)]
answers = [mp.recommend(**situation) for _, _, situation in ROWS]
scenarios = [{"situation": what, "articles": said, "here": a.method, "agrees": a.method in said.split(" or "), "GB": a.bill.total / 1e9 if a.bill else None,
              "speaks against": a.against[0].text if a.against else ""} for (what, said, _), a in zip(ROWS, answers)]
lab.table(scenarios)

# %% [markdown]
# ## Merge or not, and your predictions
#
# The answer for one of the rows in full, as lines that you can run. Then your predictions beside the measured numbers.

# %%
bill_65 = mp.recommend("65B", memory=48).bill
at_65 = bill_65.total / 1e9
answers[0]

# %%
undecided = [name for name in ("LoRA", "full fine-tuning") if name in at_edge]
measured = dict(zip(predicted, (f"open: the best of {' and '.join(undecided)} stands at an end" if undecided else ratio, at_65, inflation)))
main = next(row for row in own if row["method"] == "LoRA")
lab.record(main=main | {"steps": STEPS, "batch": BATCH, "seeds": 1 + len(SEEDS), "frozen": frozen["accuracy"]}, own={"rows": own, "sweep": [
    {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in t.items()} for t in sweep], "ratio": ratio, "at an edge": at_edge},
    one_rate=one_rate, scenarios=scenarios)
display(lab.table([{"": key, "you": "no prediction" if predicted[key] is None else predicted[key], "measured": value} for key, value in measured.items()]))

# %%
lora_8b = 16 * 4 * (8 * (4096 + 4096))                         # 4 square matrices of width 4096, rank 8, a float32 with gradient and states
lab.quiz([
    {"question": "Method A has 0.74 over three seeds, B has 0.72. What do you need before you say that A is better?", "right": "the spread over the seeds",
     "choices": {"the spread over the seeds": "And how many test texts there were. Twice the error is a usual bar.",
                 "nothing: 0.74 > 0.72": "By hand you had a lead of 0.02 that was not twice its error.",
                 "the number of trained parameters": "That is another axis, not the error of this one."}},
    {"question": "You try ten rates and report the best test score. What have you reported?", "right": "a score that is too high",
     "choices": {"a score that is too high": f"At 200 texts and ten equally good rates by about {inflation:.1f} points: see the picture.",
                 "the score at the best rate": "The best rate and the luckiest draw look alike there.",
                 "a score that is too low": "A maximum is never below the mean of what it was taken from."}},
    {"question": "All methods are compared at the rate 1e-3. Is that fair?", "right": "no: each needs its own",
     "choices": {"yes: the same for all": "The same rate is a different step for each: a scale, a start, a place lie between rate and weight.",
                 "no: each needs its own": "In your sweep the best rates were " + ", ".join(f"{name} {rate:g}" for name, rate in best.items()) + ".",
                 "yes, if there are enough seeds": "Seeds average the noise away. They do not move the rate."}},
    {"question": f"65 billion numbers in 4 bits. Your card has 24 GB. LoRA of rank 8, {at_65:.0f} GB for a step. What now?", "right": "a smaller model, or a larger card",
     "choices": {"a smaller model, or a larger card": f"The weights alone are {bill_65.weights / 1e9:.0f} GB. The paper used a card of 48 GB.",
                 "it fits, that is what QLoRA is for": "So some articles say. Count: 65e9 numbers at half a byte.",
                 "a smaller rank": "The adapter is a small part of the bill."}},
    {"question": "Your access to a model is a web interface that takes text. Which method?", "right": "a written prompt",
     "choices": {"a written prompt": "Text is all that goes in.",
                 "prompt tuning": "Its vectors enter behind the embedding, and need gradients.",
                 "LoRA": "It needs the weights, or a provider who trains it for you."}},
    {"question": "Ten tasks, one base in memory, requests for all of them in one batch. Merged or not?", "right": "not merged",
     "choices": {"not merged": "One base, ten small adapters, each row with its own: chapter 10.",
                 "merged": "Then there are ten models."}},
    {"question": "A LoRA of rank 8 beside 4 weights of 4096 × 4096, in float32 with AdamW. How many bytes does what trains hold all the time?", "right": f"{lora_8b:,}",
     "choices": {f"{lora_8b:,}": "$4 \\cdot r(\\mathrm{in}+\\mathrm{out})$ numbers, 16 bytes each.",
                 f"{lora_8b // 4:,}": "That is the adapter alone: gradient and two states are missing.",
                 f"{16 * 4 * 4096 * 4096:,}": "That is full fine-tuning of the four.",
                 f"{lora_8b // 16:,}": "These are numbers, not bytes."}},
    {"question": "(IA)³ or a prompt of 20 tokens: which trains fewer numbers on a 7B Llama?", "right": "the prompt",
     "choices": {"the prompt": f"{mp.PromptTuning(20).parameter_count(4096):,} against {32 * (4096 + 4096 + 11008):,}.",
                 "(IA)³": "So it is in print. It has three vectors in each of 32 blocks."}},
    {"question": "A method lies below another in score and above it in every cost. When would you still take it?", "right": "when something matters that was not measured",
     "choices": {"when something matters that was not measured": "A front only speaks of its axes, and of this task and size.",
                 "never": "Never, if your situation has only these axes. Licences, tools and what your team knows are axes too.",
                 "when it is newer": "The date is no axis of its own."}},
    {"question": "Why does the large comparison keep a hash of the code beside each figure?", "right": "so that a figure cannot outlive the code it was measured with",
     "choices": {"so that a figure cannot outlive the code it was measured with": "A test flags it. Where the first steps still give the same loss, it stays.",
                 "to save disk space": "It takes space.",
                 "to make the runs reproducible": "Seeds and versions do that."}},
])

# %% [markdown]
# ## Recap
#
# - A fair comparison shares model, data, order and steps, and gives each method a rate of its own.
# - Validation chooses, the test is asked once, a lead comes with its error.
# - Cross out what is beaten in everything. What remains is a choice, and the choice is yours: memory, tasks, latency, access.
# - Count before you buy: `mp.memory_bill`. Ask for reasons: `mp.recommend`.
# - No reason for anything else? `mp.recommend` then starts with LoRA on all linear layers, merged for one task. Leave it for a reason that you can name, such as a row of the tables above.
#
# ## Next
#
# [Chapter 13](13_fact_check.ipynb) puts the claims of the articles to the test, one by one.
#
# ## Further reading
#
# - Dodge et al. 2019, [Show Your Work](https://arxiv.org/abs/1909.03004): expected validation performance against the budget of the search
# - Bouthillier et al. 2021, [Accounting for Variance in Machine Learning Benchmarks](https://arxiv.org/abs/2103.03098): which seeds matter
# - Hugging Face PEFT, [method comparison](https://github.com/huggingface/peft/tree/main/method_comparison): many methods on a larger model, one seed
# - He et al. 2022, [Towards a Unified View](https://arxiv.org/abs/2110.04366)
