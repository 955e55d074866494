# ---
# jupyter:
#   minipeft:
#     records: [bills, claims, frozen, main, kept, loftq, merge, checkpoint, published, predictions]
# ---

# %% [markdown]
# # 9 · QLoRA: LoRA beside a base in four bits
#
# **In one sentence:** keep the frozen weights in 4 bits, train a LoRA in full precision beside them, and a model whose weights alone need two 80 GB cards in 16 bits can be fine-tuned on one of 48 GB.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/09_qlora.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - write the memory bill of a model you cannot load, and say on which card it fits, with which method
# - check what is in print about QLoRA's memory, line by line
# - write the forward and the backward pass of a linear layer whose weight is kept in 4 bits
# - fine-tune with QLoRA and with LoRA, and compare score, memory and time
# - start QLoRA with LoftQ, and say what the start is worth
# - merge an adapter into a 4-bit base, and measure what rounding takes away
#
# **You need:** [chapter 5](05_lora.ipynb), LoRA. [Chapter 7](07_nf4.ipynb) builds NF4; here you use it.
#
# **The papers:** Dettmers et al. 2023, *QLoRA*, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314): you build its equation 5. Li et al. 2023, *LoftQ*, [arXiv:2310.08659](https://arxiv.org/abs/2310.08659): you build its algorithm 1.

# %% tags=["setup"]
import hashlib, inspect, math, statistics, subprocess, sys, tempfile, time, warnings
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
lab.runtime_box("09_qlora")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the computed and measured ones.
#
# 1. One step of QLoRA on a model of 65 billion parameters, with one row of 512 tokens: how many **GB**?
# 2. The same model's weights in 16 bits, divided by its weights as QLoRA keeps them: how many times smaller? (Not everything is in 4 bits.)
# 3. A step of QLoRA takes how many times as long as a step of LoRA, on this machine?
# 4. You merge a trained adapter into a 4-bit weight and round the result to 4 bits again. Rounding moves the weight by how many **percent** of what the adapter had moved it?

# %%
predicted = {"65B with QLoRA, GB": None, "weights, 16 bits / QLoRA": None,
             "QLoRA's step / LoRA's step": None, "rounding after a merge, percent of the update": None}

# %% [markdown]
# ## The problem
#
# A trained parameter costs more than its own bytes: a gradient, and two states of Adam. Full fine-tuning pays that for all parameters. LoRA pays it for few, and what is left is the frozen base, in 16 bits. QLoRA attacks that rest.
#
# `mp.memory_bill` writes the bill of one training step from a model's **configuration** alone. No weight is made: its tensors have a shape and no memory. The models below are Llamas; the rows of the table are the methods of this course. Base and activations in bfloat16, the adapter, its gradients and Adam's states in float32 (in full fine-tuning, gradients and states have the weights' 16 bits); one row of 512 tokens; gradient checkpointing, as in the QLoRA paper (a block's activations are computed again in the backward pass instead of being kept).

# %%
from transformers import LlamaConfig

def llama(hidden, inner, layers, heads, **more):
    return LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                       **{"vocab_size": 32000, "max_position_embeddings": 2048} | more)

sizes = {"7B": llama(4096, 11008, 32, 32), "13B": llama(5120, 13824, 40, 40), "65B": llama(8192, 22016, 80, 64),
         "70B": llama(8192, 28672, 80, 64, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)}
sizes = {name: sizes[name] for name in mp.pick(smoke=["65B"], cpu=list(sizes), gpu=list(sizes))}
lora = mp.LoRA(rank=16, alpha=32, targets="all-linear")
ways = {"full": None, "prefix of 20, with network": mp.PrefixTuning(20), "DoRA": mp.DoRA(rank=16, alpha=32, targets="all-linear"), "LoRA": lora,
        "adapters, m = 64": mp.BottleneckAdapter(64), "prefix of 20": mp.PrefixTuning(20, reparameterize=False), "(IA)³": mp.IA3(),
        "prompt of 20": mp.PromptTuning(20), "QLoRA": lora}
ways = {way: ways[way] for way in mp.pick(smoke=["full", "LoRA", "(IA)³", "QLoRA"], cpu=list(ways), gpu=list(ways))}
step = dict(batch=1, seq=512, dtype="bfloat16", gradient_checkpointing=True)

bills = {(size, way): mp.memory_bill(config, method, quantized=way == "QLoRA", **step)
         for size, config in sizes.items() for way, method in ways.items()}
bills["65B", "QLoRA"]

# %%
cards_gb = (24, 48, 80)

def largest(way: str, gb: int) -> str:
    """The largest of the models that this way can train on a card of so many GB."""
    return ([size for size in sizes if bills[size, way].fits(gb * 1e9)] or ["none"])[-1]

try:
    mp.memory_bill(sizes["65B"], mp.BitFit(), **step)
except ValueError as nothing:
    print("BitFit:", nothing)
rows = [{"way": way, "trained, of 65B": bills["65B", way].trainable} | {f"{size}, GB": bills[size, way].total / 1e9 for size in sizes}
        | {f"{gb} GB holds": largest(way, gb) for gb in cards_gb} for way in ways]
rows += [{"way": f"the weights alone, {kept}"} | {f"{size}, GB": bills[size, way].weights / 1e9 for size in sizes}
         for kept, way in (("16 bits", "LoRA"), ("as QLoRA keeps them", "QLoRA"))]
display(lab.table(rows, caption="One training step of 1 × 512 tokens, predicted. 1 GB is a billion bytes."))
shown = {f"{size}, {way}": bills[size, way] for size in sizes for way in ("LoRA", "QLoRA")}
lab.bill_figure(shown, marks={f"{gb} GB": gb * 1e9 for gb in cards_gb})

# %% [markdown]
# How to read it:
#
# - **Holds** names the largest of the models here that one card can train, method by method.
# - Compare the rows with *the weights alone*. The methods of this course that freeze the base stay close above its 16 bits, however little they train, so they mostly fit the same cards. (The network that makes a prefix in chapter 3 is the exception: where keys and values are as wide as the model, it is as large as a model of its own; see *trained*. After training it is dropped. BitFit has no row: these models have no biases.)
# - In the figure, nearly all of LoRA's bars is grey: the frozen weights. A method that leaves them in 16 bits cannot do better than the grey part. Full fine-tuning is not in it: its bars would be several times as long.
# - The comparison is with the number printed on the card. A card gives a little more bytes than that, and CUDA and the gaps between tensors take a few hundred megabytes to a few gigabytes. Where the difference is small, do not count on it.
# - Longer rows and larger batches come on top, and activations grow with both.
#
# ## What is in print, and what the bill says
#
# You will meet these claims. The last column is computed, not judged.

# %% tags=["figure"]
b65 = {way: bills["65B", way] for way in ways}
gb = {way: b.total / 1e9 for way, b in b65.items()}
ratios = {size: bills[size, "LoRA"].total / bills[size, "QLoRA"].total for size in sizes}
twelve = 12 * b65["full"].parameters / 1e9                     # 16-bit weight and gradient, two float32 states: 2 + 2 + 8
long = mp.memory_bill(sizes["65B"], lora, quantized=True, **step | {"gradient_checkpointing": False}).total / 1e9

def verdict(true) -> str:
    return "holds" if true else "does not hold"

claims = [
    ("65B with QLoRA on one card of 24 GB", f"the weights alone are {b65['QLoRA'].weights / 1e9:.1f} GB", verdict(b65["QLoRA"].fits(24e9))),
    ("65B with QLoRA on one card of 48 GB", f"{gb['QLoRA']:.1f} GB", verdict(b65["QLoRA"].fits(48e9))),
    ("… and without gradient checkpointing", f"{long:.1f} GB", verdict(long <= 48)),
    ("65B on one A100 of 80 GB", f"{gb['QLoRA']:.1f} GB", verdict(b65["QLoRA"].fits(80e9))),
    ("LoRA needs 48 GB for 65B", f"{gb['LoRA']:.1f} GB: 48 GB is QLoRA's", verdict(b65["LoRA"].fits(48e9))),
    ("full fine-tuning of 65B needs 780 GB", f"{twelve:.0f} GB at 12 bytes a parameter; {gb['full']:.0f} GB with all in 16 bits",
     verdict(abs(twelve / 780 - 1) < 0.01) + ", counted at 12 bytes"),
    ("QLoRA takes 2.35 times less memory than 16-bit LoRA", ", ".join(f"{size} {r:.2f}" for size, r in ratios.items()),
     verdict(min(ratios.values()) <= 2.35 <= max(ratios.values())) + ", at this length of row"),
    ("PEFT takes 10 to 50 times less memory", f"65B, full at 12 bytes a parameter: LoRA {twelve / gb['LoRA']:.1f} times, QLoRA {twelve / gb['QLoRA']:.1f} times",
     verdict(twelve / gb["LoRA"] >= 10) + f" for LoRA, {verdict(twelve / gb['QLoRA'] >= 10)} for QLoRA"),
]
assert b65["QLoRA"].weights > 24e9 and b65["QLoRA"].fits(48e9) and 80e9 < b65["LoRA"].weights < 160e9   # what this chapter says in words
lab.table([{"in print": c, "the bill": found, "so it": so} for c, found, so in claims])

# %% [markdown]
# Look at the first row: the claim of 24 GB is not a matter of settings. Half a byte for each of 65 billion weights is more than the card has, before anything is computed. A factor such as 2.35 does depend on them: what both ways share, the LoRA's training and the activations, pulls it towards 1.
#
# ### Exercise 1: bytes of a QLoRA run · 10 minutes · medium
#
# Count the bytes that a run holds from its first step to its last, activations aside. A 4-bit layer with $n$ weights keeps
#
# - two codes in a byte: $\lceil n / 2 \rceil$ bytes
# - for each block of 64 weights a scale in one byte, and for each 256 scales one float32 (double quantisation), and one float32 for the layer, the mean of the scales
#
# Beside every such layer stands a LoRA in float32, with its gradients and the two states of Adam. The `others` (embedding, head, norms) stay in 16 bits.

# %%
from minipeft.checks import ch09_qlora as check

def qlora_bytes(shapes: list[tuple[int, int]], others: int, rank: int) -> int:
    """Bytes of 4-bit layers of these (out, in) shapes, of `others` numbers in 16 bits, and of the LoRA's training."""
    ### BEGIN SOLUTION
    total = 2 * others
    for d_out, d_in in shapes:
        n = d_out * d_in
        blocks = math.ceil(n / 64)
        total += math.ceil(n / 2) + blocks + 4 * math.ceil(blocks / 256) + 4
        total += 4 * 4 * rank * (d_out + d_in)                 # weight, gradient, two states; 4 bytes each
    return total
    ### END SOLUTION

check.qlora_bytes(qlora_bytes)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Work layer by layer, because every layer rounds up for itself. For a LoRA, four float32 numbers stand for each of its $r\,(\mathrm{in} + \mathrm{out})$ parameters.
#
# </details>

# %% [markdown]
# ### The frozen model, in full and in 4 bits
#
# Now a model that you can load. `mp.load_base(…, quantized=True)` reads one weight after the other and quantises each at once, so the full model never has to fit. The loss on a held-out wording says how much that changes the model. The megabytes fall by less than the bits of a linear layer: the embedding and the head stay as they were, and the smaller a model is, the larger is their share. If you run the small embedded model: its weights had been through another 4-bit format before they were published, so you quantise for the second time.
#
# The task is that of chapter 5: cards of medicines, asked for in both directions. So are the scores: shares of cards with the right format, name and facts, and *recall*, the share of described medicines that are named. Training, held-out loss and test ask about the same medicines in different wordings: you measure what a model remembers. The table asks the frozen 4-bit model a few of the test questions; they are the floor that training has to leave. This is teaching data, not medical advice.

# %%
def big_enough() -> str:
    """The base of this profile; on a GPU one of 1.7 billion parameters, if the Hub can be reached."""
    if mp.profile().name == "gpu":
        try:
            transformers.AutoConfig.from_pretrained(large := "HuggingFaceTB/SmolLM2-1.7B-Instruct")
            return large
        except OSError as error:
            print(f"the Hub is out of reach ({type(error).__name__}): going on with a smaller model")
    return profiles.base_model()

BASE = big_enough()
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[profiles.precision()] if mp.profile().name == "gpu" else torch.float32

def load(quantized: bool):
    return mp.load_base(BASE, dtype=DTYPE, quantized=quantized)[0]

model, tokenizer = mp.load_base(BASE, dtype=DTYPE)
names = sorted({e["card"] for e in mp.load_data("drug_cards", "train")})
few = names[:: len(names) // mp.pick(smoke=2, cpu=10, gpu=64)]
cards = {split: [e for e in mp.load_data("drug_cards", split) if e["card"] in few] for split in ("train", "validation", "test")}
print(BASE, DTYPE, {split: len(rows) for split, rows in cards.items()}, "questions on", len(few), "medicines")

# %%
def tensor_bytes(model) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

def held_out(model) -> float:
    """The loss on wordings that are neither trained on nor asked later."""
    return mp.evaluate(model, tokenizer, cards["validation"])["loss"]

def ask(model, step: int = 1) -> dict:
    """Shares of exact answers to every `step`-th test question."""
    step = mp.pick(smoke=len(cards["test"]) - 1, cpu=step, gpu=step)   # in smoke one question of each direction
    asked = cards["test"][::step]
    answers = mp.generate(model, tokenizer, [e["prompt"] for e in asked], max_new_tokens=mp.pick(smoke=4, cpu=24, gpu=24))
    return {"questions": len(asked)} | mp.score_cards(asked, answers)

base4 = load(quantized=True)
question = tokenizer(cards["test"][0]["prompt"], return_tensors="pt").to(model.device)
frozen = {"in full": {"MB": tensor_bytes(model) / 1e6, "held-out loss": held_out(model)},
          "linears in NF4": {"MB": tensor_bytes(base4) / 1e6, "held-out loss": held_out(base4)} | ask(base4, 6)}
weights_now = sum(isinstance(m, mp.Linear4bit) for m in base4.modules())
print(f"{weights_now} linear layers are in 4 bits; embedding, head and norms are not")
lab.table([{"frozen": name} | row for name, row in frozen.items()])

# %% [markdown]
# ## The idea
#
# Equation 5 of the QLoRA paper, in this course's symbols: the frozen product is computed with the weight that the codes stand for, and LoRA adds its own. Here $s = \alpha / r$ is LoRA's factor, as in chapter 5. It has nothing to do with the scales of the blocks, which chapter 7 called $s$.
#
# $$y = x\,\tilde W^\top + s\,x A^\top B^\top \qquad \tilde W = \mathrm{dequantise}(\mathrm{codes}, \mathrm{scales})$$
#
# | | shape | kept in | trained |
# |---|---|---|---|
# | $x$ | $(\mathrm{tokens}, \mathrm{in})$ | 16 or 32 bits | |
# | codes | $(\mathrm{out}, \mathrm{in})$ | 4 bits | no |
# | scales | one for 64 weights | 8 bits, and a float32 for 256 of them | no |
# | $\tilde W$ | $(\mathrm{out}, \mathrm{in})$ | nowhere: made, used, dropped | no |
# | $A$, $B$ | $(r, \mathrm{in})$, $(\mathrm{out}, r)$ | float32 | yes |
#
# Write $\partial x$ for the gradient of the loss with respect to $x$, a tensor of $x$'s shape. The gradient goes the same two ways back. $\tilde W$ gets none, but the gradient **passes through it** to $x$, and so to all layers below. For that, $\tilde W$ is made a second time.

# %% tags=["figure"]
from minipeft.lab.plots import COLOURS, new_figure

figure, (left, right) = new_figure(2, width=9.6, height=3.9)
def box(ax, x, y, text, face="#eef1f4", edge="#8c959f", style="-"):
    ax.text(x, y, text, ha="center", va="center", fontsize=11, linespacing=1.4,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": face, "edgecolor": edge, "linestyle": style})
def arrow(ax, start, end, colour="grey", style="-"):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": COLOURS[colour], "linewidth": 1.6, "linestyle": style})

for ax, back in ((left, False), (right, True)):
    ax.axis("off")
    ax.set(xlim=(0, 100), ylim=(0, 100))
    ax.set_title("backward" if back else "forward", fontsize=12)
    for low, high in (((49, 17), (42, 38)), ((42, 62), (49, 83)), ((57, 17), (74, 27)), ((78, 42), (78, 54)), ((74, 70), (57, 83))):
        arrow(ax, *((high, low) if back else (low, high)), "vermilion" if back else "grey")
    arrow(ax, (17.5, 50), (24.5, 50))
    box(ax, 8, 50, "codes\nscales\n4 bits")
    box(ax, 40, 50, r"$\tilde W$" + ("\nmade again" if back else "\nfor a moment"), "white", style="--")
    box(ax, 78, 34, "$A$" + (r"   gets $\partial A$" if back else ""), "#cfe3f1", COLOURS["blue"])
    box(ax, 78, 62, "$B$" + (r"   gets $\partial B$" if back else ""), "#cfe3f1", COLOURS["blue"])
    box(ax, 53, 8, r"$\partial x$, the sum of both" if back else "$x$", "white")
    box(ax, 53, 92, r"$\partial y$" if back else "$y$, the sum of both", "white")
figure

# %% [markdown]
# ## By hand
#
# Take pencil and paper, and a made-up code of five levels, $-1, -\frac12, 0, \frac12, 1$. One block of four weights:
#
# $$W = \begin{pmatrix}1.8&0.3\\-1.2&2.0\end{pmatrix}\qquad A = \begin{pmatrix}1&-1\end{pmatrix}\qquad B = \begin{pmatrix}1\\0\end{pmatrix}\qquad s = 1\qquad x = \begin{pmatrix}1&2\end{pmatrix}\qquad \partial y = \begin{pmatrix}1&1\end{pmatrix}$$
#
# 1. The scale of the block is its largest absolute value. Divide by it, take the nearest levels, and multiply again: $\tilde W$.
# 2. Compute $x \tilde W^\top + s\,x A^\top B^\top$.
# 3. Compute $\partial x = \partial y\,\tilde W + s\,\partial y\,B A$. How much of it went through the frozen weight?
#
# Then run the cell.

# %%
W, A, B = torch.tensor([[1.8, 0.3], [-1.2, 2.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0], [0.0]])
x, grad_y, five = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([-1, -0.5, 0, 0.5, 1])

scale = W.abs().max()
codes_by_hand = (W[..., None] / scale - five).abs().argmin(-1)   # (2, 2)
tilde = five[codes_by_hand] * scale
print("the scale:", scale.item(), " codes:", codes_by_hand.tolist(), " W~ =", tilde.tolist())
print("y         =", (x @ tilde.T + x @ A.T @ B.T).tolist())
print("through the frozen weight:", (grad_y @ tilde).tolist(), " through A and B:", (grad_y @ B @ A).tolist())
print("grad x    =", (grad_y @ tilde + grad_y @ B @ A).tolist())
xs = x.clone().requires_grad_()
(xs @ tilde.T + xs @ A.T @ B.T).backward(grad_y)
assert torch.equal(xs.grad, grad_y @ tilde + grad_y @ B @ A)

# %% [markdown]
# ## Build it
#
# ### Step 1: a product with a weight in 4 bits
#
# `torch.autograd.Function` lets you say yourself what is kept between forward and backward. Here it is the codes. The weight is made twice and never kept. The claim: the same output and the same gradient as with the dequantised weight, to the bit.

# %%
class FourBitProduct(torch.autograd.Function):
    """x W~ᵀ, with W~ made from q twice: x (tokens, in), q the codes and scales of a weight (out, in)."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q                                              # 4 bits a weight
        return x @ mp.nf4.dequantize(q).T                      # (tokens, out)

    @staticmethod
    def backward(ctx, grad_y):                                 # (tokens, out)
        return grad_y @ mp.nf4.dequantize(ctx.q), None         # (tokens, in); the codes have no gradient

linear, x = nn.Linear(576, 1536, bias=False), torch.randn(8, 576, requires_grad=True)
q = mp.nf4.quantize(linear.weight.detach(), double_quant=True)
y, tilde = FourBitProduct.apply(x, q), mp.nf4.dequantize(q)
grad_y = torch.randn_like(y)
(mine,) = torch.autograd.grad(y, x, grad_y)
(reference,) = torch.autograd.grad(x @ tilde.T, x, grad_y)
assert torch.equal(y, x @ tilde.T) and torch.equal(mine, reference)
print(f"{q.bits:.3f} bits a weight; ‖W - W~‖ / ‖W‖ = {((linear.weight - tilde).norm() / linear.weight.norm()).item():.3f}")

# %% [markdown]
# ### Step 2: what is kept between forward and backward
#
# Why not simply write `x @ dequantize(q).T`? The result is the same. But autograd sees a product with a tensor, and keeps that tensor for the backward pass: every weight in full precision, all layers at once. Put eight layers one after the other, and count the bytes of all tensors that the forward pass has made and that are still alive at its end, whoever holds them. The codes were there before and do not count.

# %%
layers = [mp.nf4.quantize(torch.randn(512, 512), double_quant=True) for _ in range(8)]

def bytes_kept(product) -> int:
    """Bytes made by the forward pass of eight layers and alive at its end, input and codes aside."""
    h = torch.randn(4, 512, requires_grad=True)
    with bill.Live(nn.Module()) as live:                       # sees every tensor made, also those that ctx holds
        for q in layers:
            h = product(h, q)
        return live.now

kept = {"x @ dequantize(q).T": bytes_kept(lambda h, q: h @ mp.nf4.dequantize(q).T),
        "FourBitProduct": bytes_kept(FourBitProduct.apply),
        "mp.Linear4bit": bytes_kept(lambda h, q: mp.quant.linear4bit.matmul(h, q))}
codes = sum(q.nbytes for q in layers)
assert kept["x @ dequantize(q).T"] >= 8 * 512 * 512 * 4 and max(kept["FourBitProduct"], kept["mp.Linear4bit"]) < codes / 10
lab.table([{"way": way, "alive after the forward pass, kB": n / 1e3, "codes and scales, kB": codes / 1e3} for way, n in kept.items()])

# %% [markdown]
# ### Step 3: plug LoRA in
#
# Take the piece of chapter 5, $(x, y) \to y + s\,x A^\top B^\top$. It does not contain the frozen layer and does not ask how that layer keeps its weight. So there is nothing to write. The cell plugs the *same* object in beside a full and a 4-bit layer.

# %%
from minipeft.methods.lora import LowRank

four = mp.Linear4bit.of(linear)                                # the same codes as above
piece = LowRank(mp.LoRA(rank=4, alpha=8), 1536, 576)
nn.init.normal_(piece.B, std=0.05)
update = 2 * (x @ piece.A.T) @ piece.B.T
for layer, plain in ((linear, x @ linear.weight.T), (four, x @ tilde.T)):
    handle = layer.register_forward_hook(lambda layer, args, y: piece(args[0], y))
    assert torch.allclose(layer(x), plain + update, atol=1e-4)
    handle.remove()

source = inspect.getsource(mp.methods.lora)
print("chapter 5's file says '4bit'", source.count("4bit"), "times and 'quant'", source.count("quant"), "times")
print("kept in the layer:", {name: (tuple(t.shape), str(t.dtype)) for name, t in four.named_buffers()})

# %% [markdown]
# ### Exercise 2: the backward pass of QLoRA · 15 minutes · hard
#
# Write all three gradients of $y = x \tilde W^\top + s\,x A^\top B^\top$ by hand. `codes` holds one code an entry, from 0 to 15, in the weight's shape; `mp.nf4.CODEBOOK` has the 16 levels. `absmax` holds one scale for each 64 *consecutive* weights, row after row. So a block may run from one row into the next, and the last may not be full.

# %%
def qlora_backward(
    grad_y: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_y (tokens, out), x (tokens, in), codes (out, in) uint8, absmax (blocks,) -> grad_x, grad_A, grad_B."""
    ### BEGIN SOLUTION
    levels = mp.nf4.CODEBOOK[codes.long()]                     # (out, in), from -1 to 1
    W = (levels.flatten() * absmax.repeat_interleave(64)[:codes.numel()]).view(codes.shape)
    back = grad_y @ B                                          # (tokens, r)
    return grad_y @ W + s * back @ A, s * back.T @ x, s * grad_y.T @ (x @ A.T)
    ### END SOLUTION

check.qlora_backward(qlora_backward)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# The weight: look the levels up with `codes.long()`, flatten, multiply by `absmax.repeat_interleave(64)` cut to length, and put it back into shape. The gradients: each has the shape of its tensor. $\partial A = s\,(\partial y\,B)^\top x$; do $\partial B$ the same way.
#
# </details>

# %% [markdown]
# ### What if it did not pass through the frozen weight?
#
# It is in print that in QLoRA "backpropagation only goes through A and B". Test it. The cell computes the gradient of the first block's $A$ twice: once as it is, and once with every 4-bit product cut off from the gradient, so that only the LoRAs, the norms and the residual stream carry it back. If the claim held, the two would be equal.

# %%
mp.attach(base4, lora)
with torch.no_grad():
    for piece in mp.adapters(base4)["default"].pieces().values():
        nn.init.normal_(piece.B, std=0.01)                     # not at the start, where B is zero
row = tokenizer(cards["train"][0]["prompt"] + cards["train"][0]["completion"], return_tensors="pt").to(base4.device)
first = next(iter(mp.adapters(base4)["default"].pieces().values())).A
four_bit = {path: m for path, m in base4.named_modules() if isinstance(m, mp.Linear4bit)}

def gradient_of_first() -> torch.Tensor:
    return torch.autograd.grad(base4(**row, labels=row["input_ids"]).loss, first)[0].flatten().float()

as_it_is = gradient_of_first()
cut = [m.register_forward_hook(lambda m, args, y: y.detach(), prepend=True) for m in four_bit.values()]
only_lora = gradient_of_first()
for handle in cut:
    handle.remove()
direction = F.cosine_similarity(only_lora, as_it_is, dim=0).item()
assert F.cosine_similarity(gradient_of_first(), as_it_is, dim=0) > 0.99 > direction
print(f"cut off at the frozen weights: {only_lora.norm() / as_it_is.norm():.2g} times as long, cosine with the true gradient {direction:.2f}")
mp.detach(base4)

# %% [markdown]
# So the base is dequantised for the backward pass too. That the frozen weights have no gradient and no states, LoRA had saved already. What QLoRA adds: they are nowhere kept in full.
#
# ## The same as the package
#
# This is the package's own product. Where the compiled kernels of chapter 8 can be used, it takes them instead: the same result up to rounding. And the whole of QLoRA, a LoRA beside an NF4 layer, computes what Hugging Face PEFT computes on a layer of bitsandbytes. (bitsandbytes may print that it could not load a kernel of its own. The comparison does not need it.)

# %%
from minipeft.quant import kernels, linear4bit
print(inspect.getsource(linear4bit.Product))
print("compiled kernels in use:", kernels.available())

W, x = torch.randn(96, 128), torch.randn(5, 128)
(frozen_layer := nn.Linear(128, 96, bias=False)).weight.data = W
ours, piece = mp.Linear4bit.of(frozen_layer), LowRank(mp.LoRA(rank=4, alpha=8), 96, 128)
nn.init.normal_(piece.B)
assert torch.allclose(ours(x), FourBitProduct.apply(x, ours.q), atol=1e-4)
try:
    import bitsandbytes as bnb, peft
    theirs = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    theirs.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=True, module=theirs)
    host = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]), nn.Sequential(theirs.to("cpu")))
    with torch.no_grad():
        host[0].lora_A["default"].weight.copy_(piece.A)
        host[0].lora_B["default"].weight.copy_(piece.B)
    assert torch.allclose(host.train()(x), piece(x, ours(x)), rtol=1e-4, atol=1e-4)
    print(f"yours = peft's {peft.__version__} on bitsandbytes {bnb.__version__}")
except ImportError:
    print("peft or bitsandbytes is not installed here, so this comparison is skipped (pip install peft bitsandbytes)")

# %% [markdown]
# ## Nothing changed yet
#
# Attach LoRA to both bases, the full one and the 4-bit one, by the same line. Each says exactly what it said before; both train the same number of numbers, $\sum r\,(\mathrm{in} + \mathrm{out})$; and you take a fingerprint of everything that is frozen, codes and scales included.

# %%
def fingerprint(model) -> str:
    """SHA-256 over the bytes of every parameter and buffer that is not the adapter's."""
    own = {id(p) for adapter in mp.adapters(model).values() for p in adapter.parameters()}
    digest = hashlib.sha256()
    for t in [*model.parameters(), *model.buffers()]:
        if id(t) not in own:
            digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

tuned, at_first = {"LoRA": model, "QLoRA": base4}, {}
with torch.no_grad():
    for name, base in tuned.items():
        before = base(**question).logits
        at_first[name] = fingerprint(base)
        torch.manual_seed(0)
        adapter = mp.attach(base, lora)
        assert torch.equal(base(**question).logits, before) and fingerprint(base) == at_first[name]
        print(f"{name:6} frozen bytes {at_first[name]}, pieces of type {({type(p).__name__ for p in adapter.pieces().values()})}")

shapes = [(p.B.shape[0], p.A.shape[1]) for p in adapter.pieces().values()]
assert {mp.parameter_report(base).trainable for base in tuned.values()} == {sum(lora.rank * (d_in + d_out) for d_out, d_in in shapes)}
mp.parameter_report(base4)

# %% [markdown]
# ## The fine-tune: QLoRA beside LoRA
#
# The same cards, the same order, the same start of $A$, the same number of steps; only the base differs. The rate is chapter 5's. You see QLoRA's curve while it runs. The memory above it is that of everything loaded, both models included; what each one needs is counted below.

# %%
plan = mp.FitConfig(steps=mp.pick(smoke=2, cpu=40, gpu=250), batch_size=mp.pick(smoke=2, cpu=8, gpu=8), lr=2e-3, seed=0, progress=False)
runs = {}
for name, base in tuned.items():
    runs[name] = mp.fit(base, tokenizer, cards["train"], plan, watch=lab.live_curve() if name == "QLoRA" else None)
    assert fingerprint(base) == at_first[name]                 # every frozen byte is as it was

# %% tags=["figure"]
def pass_peak(model) -> int:
    """The most bytes of tensors alive at once in one pass over some cards, counted; weights left out."""
    rows = training.encode(model, tokenizer, cards["train"][:plan.batch_size])
    with bill.Live(model.train()) as live:
        training.loss_of(model, rows, 0)[0].backward()
    model.eval().zero_grad()
    return live.peak

after = {name: {"held-out loss": held_out(base)} | ask(base) for name, base in tuned.items()}
costs = {}
for name, base in tuned.items():
    standing = tensor_bytes(base) + 2 * 4 * mp.parameter_report(base).trainable   # two states; gradients are born in the pass
    costs[name] = {"s a step": statistics.median(h["seconds"] for h in runs[name].history),
                   "base and adapter, MB": tensor_bytes(base) / 1e6, "one pass, MB": pass_peak(base) / 1e6}
    costs[name]["all, MB"] = standing / 1e6 + costs[name]["one pass, MB"]
slower = costs["QLoRA"]["s a step"] / costs["LoRA"]["s a step"]
if mp.profile().name == "smoke":
    print("The smoke profile takes a few steps. It shows that every cell runs, not that the models learn.")
figure, ax = new_figure(width=6.6, height=3.2)
for (name, run), colour in zip(runs.items(), ("blue", "vermilion")):
    ax.plot(range(1, run.steps + 1), lab.smooth([h["loss"] for h in run.history], 0.6), color=COLOURS[colour], label=name)
ax.set(xlabel="step", ylabel="loss, smoothed", ylim=(0, None))
ax.legend()
display(figure)
display(lab.table([{"": "frozen, in full"} | {"held-out loss": frozen["in full"]["held-out loss"]}] + [{"": name} | costs[name] | after[name] for name in tuned]))
gap = after["QLoRA"]["held-out loss"] - after["LoRA"]["held-out loss"]
start_gap = frozen["linears in NF4"]["held-out loss"] - frozen["in full"]["held-out loss"]
saved = costs["LoRA"]["all, MB"] - costs["QLoRA"]["all, MB"]
print(f"held-out loss, QLoRA minus LoRA: {start_gap:+.3f} before training, {gap:+.3f} after it")
print(f"described medicines that are named: LoRA {after['LoRA']['recall']:.0%}, QLoRA {after['QLoRA']['recall']:.0%}")
print(f"a step takes {slower:.2f} times as long; in print: 1.25 times")
print(f"training computed in {profiles.precision()}, on a base in {str(DTYPE).removeprefix('torch.')}")
print(f"QLoRA needs {saved:,.0f} MB less of LoRA's {costs['LoRA']['all, MB']:,.0f} MB; a pass takes {costs['QLoRA']['one pass, MB']:,.0f} MB, LoRA's {costs['LoRA']['one pass, MB']:,.0f} MB")

# %% [markdown]
# How to read it:
#
# - **Did it learn?** Compare the scores with those of the frozen 4-bit model above. Half of the questions ask for a card; *format*, *name* and the facts count these. The other half describe a medicine; *recall* counts those.
# - **QLoRA beside LoRA.** The first line below the table compares the gap that quantisation had made with the one after training. Was it won back? One seed and a few cards: a small difference is no difference. Below you see how far seeds spread, in a shorter run. Where both score near the top, the scores cannot tell them apart, and you have shown only that this task is not too hard for either.
# - **Memory.** What QLoRA saves is the frozen weights' bytes. *One pass* is the most bytes of tensors alive at once in a forward and a backward pass, weights left out. It is counted in the base's own precision. There both keep the same activations. QLoRA also needs room for a weight that it has just dequantised; the compiled kernel takes a small piece of it at a time, which is not counted. The last line has both passes. Where training computed in bf16 on a float32 base, the printed line says so, and its own pass was another one: most activations take half the bytes, and training keeps a 16-bit copy of every linear layer's full weight, which QLoRA does not need. Compare the share of a pass here with the thin green part of the bars of 65 billion parameters: the larger the model, the more the weights decide.
# - **Time.** To dequantise is extra work in every product, forward and backward. How much it matters depends on the machine, the kernel, and on how many tokens share one dequantised weight. The two runs were timed one after the other, so part of a small difference may be the machine's. A percentage in print belongs to somebody's card.
#
# ### Optimizers in 8 bits, and paged ones
#
# Two more savings belong to QLoRA. Adam's two states can be kept in 8 bits (with a float32 scale for 256 of them), and *paged* optimizers let them move to the CPU's memory when the GPU's is full for a moment. Both are bitsandbytes', both need a GPU: `mp.FitConfig(optimizer="paged_adamw8bit")`. What they save, the bill knows.

# %%
t = b65["QLoRA"].trainable
assert b65["QLoRA"].optimizer == 8 * t                         # two float32 states
eight = 2 * (1 + 4 / 256) * t                                  # two bytes, and a float32 for 256 of each
saves = {"full fine-tuning": (4 * b65["full"].parameters - 2 * (1 + 4 / 256) * b65["full"].parameters) / 1e9, "QLoRA": (8 * t - eight) / 1e9}
display(lab.table([{"65B": way, "8-bit states save, GB": s, "of all, percent": 100 * s / gb[way.split()[0]]} for way, s in saves.items()]))
optimizers = mp.pick(smoke=[], cpu=[], gpu=["adamw", "adamw8bit", "paged_adamw8bit"])
rows = []
for name in optimizers:
    fresh = load(quantized=True)
    mp.attach(fresh, lora)
    run = mp.fit(fresh, tokenizer, cards["train"], replace(plan, steps=20, optimizer=name))
    rows.append({"optimizer": name, "loss": run.history[-1]["loss"], "s a step": run.seconds / run.steps, "peak GiB": run.peak_memory / 2**30})
    del fresh
print("" if rows else "there is no GPU in this profile, so the 8-bit optimizers are not run")
lab.table(rows or [{"optimizer": "adamw", "where": "any device"}, {"optimizer": "adamw8bit, paged_adamw8bit", "where": "GPU, with bitsandbytes"}])

# %% [markdown]
# The states in full fine-tuning belong to all parameters, so a smaller state is worth much there, even counted from 16 bits. In QLoRA they belong to the adapter alone; they start from float32, and still there is little to save.
#
# ## Break it: the start
#
# Plain QLoRA starts at $BA = 0$: the model starts as the quantised one, with its whole error. LoftQ starts with $s\,BA$ as a correction of that error. Take turns:
#
# $$Q = \mathrm{quantise}(W - s\,B A) \qquad s\,B A = \text{the best approximation of } W - Q \text{ of rank } r$$
#
# The second half is a singular value decomposition: the $r$ largest singular values with their vectors.
#
# ### Exercise 3: one alternation of LoftQ · 15 minutes · hard
#
# You get $W$, the present $A$ and $B$, the factor $s$, and `quantise`, which rounds a tensor to 4 bits and gives it back as numbers. Only the product $s\,BA$ is checked: how you share it out between $A$ and $B$ is yours.

# %%
def loftq_step(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float, quantise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (out, in), A (r, in), B (out, r) -> Q (out, in) on the grid, and the new A and B."""
    ### BEGIN SOLUTION
    Q = quantise(W - s * B @ A)
    U, S, Vt = torch.linalg.svd(W - Q, full_matrices=False)
    r = len(A)
    root = (S[:r] / s).sqrt()                                  # half of each singular value to each side
    return Q, root[:, None] * Vt[:r], U[:, :r] * root
    ### END SOLUTION

check.loftq_step(loftq_step)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `U, S, Vt = torch.linalg.svd(M, full_matrices=False)` gives $M = U\,\mathrm{diag}(S)\,V^\top$. Keep the first $r$. Share the singular values out between $A$ and $B$, and remember that the layer multiplies by $s$ once more.
#
# </details>

# %% tags=["figure"]
from minipeft.quant import loftq

tuned.pop("LoRA", None)
model = None                                                   # one large model at a time
fresh = load(quantized=False)
kinds = {"q_proj": "blue", "v_proj": "sky", "gate_proj": "green", "down_proj": "orange"}
iterations, residuals = mp.pick(smoke=2, cpu=5, gpu=5), {}
for kind in dict(list(kinds.items())[: mp.pick(smoke=1, cpu=4, gpu=4)]):
    path = next(p for p in mp.anatomy.match(fresh, "all-linear") if p.endswith(kind))
    residuals[kind] = loftq.alternate(fresh.get_submodule(path).weight.detach(), lora, iterations)[3]
    used = residuals[kind][:-1] + [r for r in residuals[kind][-1:] if r < residuals[kind][-2]]
    drops = [earlier - later for earlier, later in zip(used, used[1:])]
    assert drops and min(drops) > 0 and drops[0] == max(drops) and used[-1] > used[0] / 2   # it falls, most at first, and most is left

figure, ax = new_figure(width=6.6, height=3.4)
for kind, values in residuals.items():
    ax.plot(range(len(values)), [v / values[0] for v in values], "o-", color=COLOURS[kinds[kind]], label=f"{kind}, first block")
ax.set(xlabel="iterations of LoftQ (0: plain QLoRA)", ylabel=r"$\|W - Q - sBA\|$, plain = 1", xticks=range(iterations + 1))
ax.legend()
display(figure)
lab.table([{"weight": kind, "‖W - Q‖ / ‖W‖, plain": v[0], "after 1": v[1], f"after {len(v) - 1}": v[-1]} for kind, v in residuals.items()])

# %% [markdown]
# Mind the axis: it need not start at zero. The error falls most at the first iteration. An iteration that did not make it smaller would not be used, and would be the last; its point would stay in the figure. And more than half of the error is left: it is spread over all directions like noise, and a rank of 16 holds few of them. Is it worth anything to training?
#
# Three starts, equal steps, equal rows: LoRA on the full base, plain QLoRA, QLoRA started by LoftQ with one iteration. With one, the base is exactly that of plain QLoRA, so only $A$ and $B$ differ. Each start runs with a few seeds (in the smoke profile with one). A seed is an order of the rows, the same for all starts; plain starts also draw $A$ anew. In the figure each line is one seed.

# %%
where = replace(lora, targets=mp.pick(smoke=("k_proj",), cpu="all-linear", gpu="all-linear"))
began = time.perf_counter()
gained = mp.quantize_loftq(fresh, where)                       # path -> residual without LoRA, and after one iteration
loftq_seconds = time.perf_counter() - began
start = {name: p.detach().clone() for name, p in mp.adapters(fresh)["default"].named_parameters()}
del fresh
short = replace(plan, steps=mp.pick(smoke=1, cpu=12, gpu=60), batch_size=mp.pick(smoke=1, cpu=4, gpu=8), warmup=0.1)

def from_start(name: str, seed: int) -> dict:
    torch.manual_seed(seed)
    base = load(quantized=name != "LoRA, full base")
    adapter = mp.attach(base, where)
    if name == "QLoRA, LoftQ":
        adapter.load_state_dict(start)
    at_start = held_out(base)
    run = mp.fit(base, tokenizer, cards["train"], replace(short, seed=seed))
    return {"before": at_start, "after": held_out(base), "losses": [h["loss"] for h in run.history]}

starts = {name: [from_start(name, seed) for seed in mp.pick(smoke=[0], cpu=[0, 1], gpu=[0, 1, 2])]
          for name in ("LoRA, full base", "QLoRA, plain", "QLoRA, LoftQ")}
print(f"LoftQ's decompositions took {loftq_seconds:.0f} s; mean residual {statistics.mean(r[-1] / r[0] for r in gained.values()):.3f} of the plain one")

# %% tags=["figure"]
figure, ax = new_figure(width=6.6, height=3.3)
for (name, seeds), colour in zip(starts.items(), ("grey", "vermilion", "blue")):
    for number, one in enumerate(seeds):
        losses = lab.smooth(one["losses"], 0.5)
        ax.plot(range(1, len(losses) + 1), losses, "o-", markersize=3, color=COLOURS[colour], alpha=0.9, linewidth=1.4, label=None if number else name)
ax.set(xlabel="step", ylabel="training loss, smoothed", ylim=(0, None))
ax.legend()
display(figure)
mean = {name: statistics.mean(one["after"] for one in seeds) for name, seeds in starts.items()}
spread = max(max(one["after"] for one in seeds) - min(one["after"] for one in seeds) for seeds in starts.values())
better = mean["QLoRA, plain"] - mean["QLoRA, LoftQ"]
print(f"held-out loss after {short.steps} steps: LoftQ's start is {abs(better):.3f} {'better' if better > 0 else 'worse'} than the plain one; seeds spread by up to {spread:.3f}")
print("with one seed there is no spread to compare that with" if len(starts["QLoRA, plain"]) == 1
      else "that is " + ("more" if abs(better) > spread else "not more") + " than the seeds' spread")
print("the same seed with both starts, plain minus LoftQ:", ", ".join(f"{p['after'] - q['after']:+.3f}" for p, q in zip(starts["QLoRA, plain"], starts["QLoRA, LoftQ"])))
lab.table([{"start": name, "loss before": statistics.mean(o["before"] for o in seeds), f"after {short.steps} steps": mean[name],
            "lowest": min(o["after"] for o in seeds), "highest": max(o["after"] for o in seeds)} for name, seeds in starts.items()])

# %% [markdown]
# How to read it: *loss before* is what LoftQ promises, a start nearer to the full model. Compare its gain with the distance between the first two rows, which is all that quantisation costs here before training. *After* is what you get. Read the lines above the table. The second says whether the difference is larger than the seeds' spread. That is a strict test: a part of the spread comes from the order of the rows, and the starts share that order. So the third compares start with start at the same seed. If its signs differ, you have seen nothing. If they agree, it is a hint; so few seeds are no proof.
#
# These runs are short, and a start counts most at the beginning. Go back to the line *QLoRA minus LoRA* of the longer fine-tune: where training has closed the gap by itself, a better start has nothing left to win. The paper's largest gains are at 2 bits, where much more is lost.
#
# ## Exercise 4: find the bug · 10 minutes · medium
#
# Before training a quantised model, published code calls a function that makes it ready. Norms are better computed in float32, so it casts parameters. People then reported that memory ran out at the cast ([peft #1149](https://github.com/huggingface/peft/issues/1149)), and that QLoRA took *more* than LoRA in 16 bits ([bitsandbytes #1569](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1569)). The cell shows it in short, and counts what it does to Llama-3-8B. Why? Write `prepare` so that parameters of **one dimension** become float32, and nothing else does.

# %%
def prepare_as_published(model):
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)

eight_b = llama(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
with torch.device("meta"):
    victim = transformers.AutoModelForCausalLM.from_config(eight_b, dtype=torch.bfloat16)
mp.quantize(victim)
ready = [tensor_bytes(victim)]
prepare_as_published(victim)
ready.append(tensor_bytes(victim))
print(f"Llama-3-8B in NF4: {ready[0] / 1e9:.2f} GB, made ready: {ready[1] / 1e9:.2f} GB")

def prepare(model: nn.Module) -> None:
    """Afterwards parameters of one dimension are float32; matrices and buffers are as they were. Works in place."""
    ### BEGIN SOLUTION
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    ### END SOLUTION

check.prepare(prepare)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Which parameters are left when the linear layers are in 4 bits? Print their names and sizes. Set `parameter.data`, as above: a new `nn.Parameter` would untie a head from its embedding.
#
# </details>

# %% [markdown]
# ## Merge, save, open elsewhere
#
# An adapter that was trained beside $\tilde W$ belongs to $\tilde W$. There are three things to merge it into:
#
# - $\tilde W$ **in full precision**: dequantise, add, keep. Nothing is lost but the memory.
# - $\tilde W$, **rounded to 4 bits again**. Every weight falls back onto one of 16 levels. Where the update is small beside the distance of two levels, most weights fall back to where they were.
# - $W$, the base **before** quantisation. It may be the better base (compare the frozen models above), but it never was what the adapter saw. So this is no merge in the strict sense, and how well it does must be measured: the last row of the table below.
#
# ### Exercise 5: merge and measure · 10 minutes · medium
#
# `W` is the dequantised weight. Return the merged weight rounded by `quantise`, and what rounding took: its error, relative to the size of the **update** (Frobenius norms).

# %%
def merge_4bit(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, s: float, quantise) -> tuple[torch.Tensor, float]:
    """W (out, in), A (r, in), B (out, r) -> the rounded weight (out, in), and ‖rounded - merged‖ / ‖s B A‖."""
    ### BEGIN SOLUTION
    delta = s * B @ A
    stored = quantise(W + delta)
    return stored, ((stored - (W + delta)).norm() / delta.norm()).item()
    ### END SOLUTION

check.merge_4bit(merge_4bit)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Two tensors: the exact sum, and what `quantise` makes of it. Their difference is what rounding did. Divide its norm by that of the update, not of the weight.
#
# </details>

# %%
def state(model) -> dict:
    """Held-out loss, megabytes of these weights, and the logits of one question."""
    kept = sum(m.q.nbytes if m.merged is None else m.merged.nbytes for m in model.modules() if isinstance(m, mp.Linear4bit))
    return {"held-out loss": held_out(model), "linear weights, MB": kept / 1e6, "logits": model(**question).logits.float().cpu()}

shelf = tempfile.TemporaryDirectory()
mp.save_adapter(base4, shelf.name)
pieces, kept_codes = mp.adapters(base4)["default"].pieces(), fingerprint(base4)
with torch.no_grad():
    sizes_of_update = {path: (piece.delta().norm() / base4.get_submodule(path).weight.norm()).item() for path, piece in pieces.items()}
    ways_out = {"beside the 4-bit base": state(base4)}
    mp.merge(base4)
    ways_out["merged, in full precision"] = state(base4)
    mp.unmerge(base4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lost = mp.merge(base4, requantize=True)                # path -> what rounding took, relative to the update
    ways_out["merged, in 4 bits again"] = state(base4) | ask(base4)
    mp.unmerge(base4)
print(said[0].message)
assert fingerprint(base4) == kept_codes                        # both merges are taken back, to the bit

# %% tags=["figure"]
other = load(quantized=False)                                  # the base that the adapter never saw
mp.load_adapter(other, shelf.name)
with torch.no_grad():
    ways_out["beside the base before quantisation"] = {"held-out loss": held_out(other), "logits": other(**question).logits.float().cpu()}
del other
beside = ways_out["beside the 4-bit base"]["logits"]
rows = []
for name, found in ways_out.items():
    off = ((found["logits"] - beside).abs().max() / beside.abs().max()).item()
    same = (found["logits"].argmax(-1) == beside.argmax(-1)).float().mean().item()
    rows.append({"": name, "held-out loss": found["held-out loss"], "linear weights, MB": found.get("linear weights, MB"),
                 "largest change of a logit, of the largest": off, "same best token, percent": 100 * same, "recall": found.get("recall")})
rows[0]["recall"] = after["QLoRA"]["recall"]
assert DTYPE != torch.float32 or rows[1]["largest change of a logit, of the largest"] < 1e-3
mean_lost = statistics.mean(lost.values())
display(lab.table(rows))
figure, ax = new_figure(width=6.6, height=3.6)
for kind, colour in (("q_proj", "blue"), ("v_proj", "sky"), ("o_proj", "green"), ("gate_proj", "orange"), ("down_proj", "vermilion")):
    at = [path for path in lost if path.endswith(kind)]
    if at:
        ax.scatter([100 * sizes_of_update[p] for p in at], [lost[p] for p in at], s=22, color=COLOURS[colour], label=kind)
ax.axhline(1, color=COLOURS["black"], linestyle="--", linewidth=1.2, label="as if the update had been dropped")
ax.set(xlabel=r"size of the update, percent of $\|\tilde W\|$", ylabel="rounding error / update", xlim=(0, None), ylim=(0, 1.15 * max(1, *lost.values())))
ax.legend(fontsize=9, ncols=2)
untrained, left = frozen["linears in NF4"]["held-out loss"], [ways_out[w]["held-out loss"] for w in ("merged, in 4 bits again", "beside the 4-bit base")]
print(f"held-out loss: {untrained:.3f} before training, {left[1]:.3f} after it, {left[0]:.3f} after the rounded merge: {(untrained - left[0]) / (untrained - left[1]):.0%} of the gain is left")
print(f"rounding moved the weights by {mean_lost:.0%} of what the adapter had moved them (mean over {len(lost)} weights)")
figure

# %% [markdown]
# First the table. The two columns on logits and tokens look at the tokens of one question. Training asked for answers only, so most of these positions were never trained: the columns say whether two models are the same, not which is better. For that, read the loss and the recall. In full precision the merge is the same model. Beside the base before quantisation the adapter makes another one; its loss says how well it does, beside the first row and beside the loss before training.
#
# Now the figure. Each point is a linear layer of one of the kinds named. A point on the line: the rounded weight is as far from the merged one as if you had thrown the update away. Above it, even farther. The reason: the base's weights lie exactly on levels. An entry of the update that is smaller than half the distance to the next level falls back to where it was. Only larger ones survive, rounded. And where the update moves the largest weight of a block, the block gets a new scale: all its levels move, and all its weights are rounded anew. So a gentle fine-tune can vanish almost whole. (Where `mp.fit` computes in bf16, the held-out losses do too: there, a small difference between the first two rows of the table is rounding.) What that means for the model only the losses can tell: the first line above the figure says how much of the gain of training is left. The recall is stricter: a name must be right to the letter.
#
# Now the file. It holds $A$ and $B$ only, so it is the same size as LoRA's. Whoever loads it must load the same base **and quantise it the same way**.

# %%
files = {file.name: file.stat().st_size for file in sorted(Path(shelf.name).iterdir())}
again = load(quantized=True)
mp.load_adapter(again, shelf.name)
with torch.no_grad():
    assert torch.equal(again(**question).logits.float().cpu(), beside)
print("read again beside a freshly quantised base: the same logits to the bit")
lab.table([{"file": name, "kB": size / 1e3} for name, size in files.items()]
          + [{"file": "(the base, linears in NF4)", "kB": frozen["linears in NF4"]["MB"] * 1e3}, {"file": "(the base in full)", "kB": frozen["in full"]["MB"] * 1e3}])

# %% [markdown]
# With LoftQ and one iteration this still holds: its codes are those of plain quantisation. With more iterations the codes depend on the adapter, and both must be kept.
#
# ## What it cost, and what you predicted

# %%
smaller = 2 * b65["full"].parameters / b65["QLoRA"].weights
measured = dict(zip(predicted, (gb["QLoRA"], smaller, slower, 100 * mean_lost)))
row = {"method": "QLoRA", "rank": lora.rank, "trained": mp.parameter_report(base4).trainable, "percent": mp.parameter_report(base4).percent,
       "minutes": runs["QLoRA"].seconds / 60, "file MB": sum(files.values()) / 1e6} | costs["QLoRA"] | after["QLoRA"]
lab.record(
    bills={f"{size}, {way}": {"GB": b.total / 1e9, "weights, GB": b.weights / 1e9, "trained": b.trainable} for (size, way), b in bills.items()},
    claims=[{"in print": c, "the bill": found, "so it": so} for c, found, so in claims], frozen=frozen,
    main={"LoRA": costs["LoRA"] | after["LoRA"], "QLoRA": row, "steps": plan.steps, "batch": plan.batch_size, "rate": plan.lr, "medicines": len(few)},
    kept=kept, loftq={"residuals": residuals, "seconds": loftq_seconds} | {name: [{"before": o["before"], "after": o["after"]} for o in seeds] for name, seeds in starts.items()},
    merge={"lost": mean_lost} | {r[""]: {k: v for k, v in r.items() if k} for r in rows}, checkpoint={"bytes": sum(files.values())},
    published={"before": ready[0], "after": ready[1]}, predictions=measured)
display(lab.table([{"": key, "predicted": predicted[key], "measured": value} for key, value in measured.items()]))
lab.table([row])

# %% tags=["figure"]
weights65 = b65["full"].parameters
right_gb, half_gb, plain_gb = (f"{b / 1e9:.1f} GB" for b in (b65["QLoRA"].weights, weights65 / 2, 4.5 / 8 * weights65))
in16, eight_more = f"{2 * weights65 / 1e9:.1f} GB", ready[1] - ready[0]

lab.quiz([
    {"question": "65 billion parameters, linear layers in NF4 with double quantisation, the rest in 16 bits. How much do the frozen weights take?", "right": right_gb,
     "choices": {half_gb: "Half a byte each, without the scales, and as if the embedding and the head were in 4 bits too.",
                 plain_gb: "That is 4.5 bits each: a float32 scale for 64 weights, without double quantisation.",
                 right_gb: "Codes, scales, and what stays in 16 bits, as in the bill. It does not fit a card of 24 GB.",
                 in16: "That is 16 bits each: what LoRA without quantisation starts from."}},
    {"question": "What has to be written anew in LoRA, so that it works beside a 4-bit layer?", "right": "nothing",
     "choices": {"nothing": "The piece sees what went into the layer and what came out. How the layer keeps its weight is not its business.",
                 "a product of A and B with the codes": "$A$ and $B$ never meet the codes. Their result is added to the layer's.",
                 "a gradient for the codes": "The codes are frozen, and whole numbers have no gradient.",
                 "A and B in 4 bits": "They are trained in float32. Small steps would be lost in 4 bits."}},
    {"question": "Where does the gradient pass in QLoRA's backward pass?", "right": "through A and B, and through the dequantised weight",
     "choices": {"only through A and B": "You cut the other way off above, and got another gradient.",
                 "through A and B, and through the dequantised weight": "$\\partial x = \\partial y\\,\\tilde W + s\\,\\partial y\\,BA$. The weight gets none, what lies below it does.",
                 "through the codes": "Rounding has no useful gradient. Nobody needs one: the codes are frozen.",
                 "only through the dequantised weight": "Then $A$ and $B$ would not train."}},
    {"question": "You write `x @ dequantize(q).T` in a forward pass under autograd. What goes wrong?", "right": "every layer's full weight is kept until the backward pass",
     "choices": {"every layer's full weight is kept until the backward pass": f"You counted {kept['x @ dequantize(q).T'] / 1e6:.1f} MB beside codes of {codes / 1e6:.1f} MB. The result is right, the memory is not.",
                 "the gradient of x is wrong": "It is the same, to the bit.",
                 "the codes are trained": "They are integers without a gradient.",
                 "nothing": "Count what autograd keeps."}},
    {"question": "Published code casts everything that is in 16 bits to float32 before training. What does that cost Llama-3-8B?", "right": f"{eight_more / 1e9:.1f} GB",
     "choices": {f"{eight_more / 1e9:.1f} GB": "Embedding and head, 128,256 rows of 4,096 each, get two bytes more a number.",
                 f"{eight_more / 2e9:.1f} GB": "That is one of them; here embedding and head are not tied.",
                 "a few MB": "Norms would cost that. Embedding and head are no norms.",
                 f"{2 * 8.03:.0f} GB": "The linear layers are codes, uint8. They are not cast."}},
    {"question": "Why does LoftQ start B A at something else than zero?", "right": "to correct a part of the error of quantisation",
     "choices": {"to correct a part of the error of quantisation": "The best correction of rank $r$; you saw how small a part that is at 4 bits.",
                 "so that A gets a gradient in the first step": "It does get one, but that is not the aim: plain LoRA loses one step by it.",
                 "to make the codes smaller": "A code has 4 bits, whatever it says.",
                 "so that the adapter can be merged": "Any LoRA can be merged."}},
    {"question": "An adapter was trained beside a 4-bit base. You merge it into the original 16-bit weights. What do you have?", "right": "a model that was never trained as such: measure it",
     "choices": {"a model that was never trained as such: measure it": "The table above has that row. It may well be good; with LoftQ's start it would also hold a correction of an error that is not there.",
                 "exactly the trained model": "That is the merge into the dequantised weights.",
                 "an error message": "The shapes fit, so nothing complains.",
                 "the trained model, in 4 bits": "It is in 16 bits, and was not trained beside them."}},
    {"question": "After merging into 4 bits, rounding is 200 % of the update. What does that mean?", "right": "rounding moved the weight twice as far as training had",
     "choices": {"rounding moved the weight twice as far as training had": "The update is small beside the distance of the levels. Keep the adapter beside the base, or merge in full precision.",
                 "twice the accuracy is lost": "It is a distance between weights. What it does to the loss you measure.",
                 "the update was doubled": "The error has its own direction, mostly another one.",
                 "the weight has lost all information": "It is as near to the merged weight as any NF4 weight is to its own."}},
])

# %% [markdown]
# ## Recap
#
# - QLoRA is a LoRA beside a 4-bit linear layer. The piece is the same; the layer dequantises its weight for a moment, forward and backward, and keeps only codes.
# - A bill can be written from a configuration alone. 65 billion parameters fit a card of 48 GB, with short rows and gradient checkpointing. They do not fit 24 GB.
# - How few numbers a method trains hardly matters there: a base frozen in 16 bits is nearly the whole bill, whatever stands beside it.
# - The gradient passes through the frozen weight. What is saved is the weight's own bytes, and nothing of the activations.
# - What quantisation costs before training, what is left of that after it, and how much longer a step takes: your own tables say it, for this model and this task.
# - LoftQ starts nearer to the full model. What is left of that after training is a question for your seeds.
# - Merge into what the adapter was trained beside, in full precision. Rounding again costs; say how much.
# - After quantising, look at what is *not* in 4 bits. That is where memory comes back.
#
# ## Further reading
#
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314): section 3 (the method), section 4 (which parts matter), appendix G (memory)
# - Li et al. 2023, [LoftQ](https://arxiv.org/abs/2310.08659): section 3 (the method), section 4 (down to 2 bits)
# - Dettmers et al. 2021, [8-bit Optimizers](https://arxiv.org/abs/2110.02861)
# - Guo et al. 2023, [LQ-LoRA](https://arxiv.org/abs/2311.12023): the same decomposition with a mixed number of bits
# - Xu et al. 2023, [QA-LoRA](https://arxiv.org/abs/2309.14717): adapters that can be merged into 4 bits without rounding again
