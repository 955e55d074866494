# ---
# jupyter:
#   minipeft:
#     records: [main, layers, sizes, kinds, origin, parts, broken, memory, checkpoint]
# ---

# %% [markdown]
# # 7 · NF4: four bits a weight
#
# **In one sentence:** a trained weight is close to normally distributed, so 16 levels at the quantiles of a normal distribution, with a scale for every 64 weights, hold it in little more than four bits.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/07_nf4.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - derive the 16 levels of NF4 yourself, equal to those of bitsandbytes to the bit
# - quantise a weight block by block, put two codes in a byte, and quantise the scales too
# - say what a weight costs in bits, for any block size
# - measure what four bits do to single layers, and to what the model says
# - decide from measurements what to leave in full precision
#
# **You need:** Python, tensors, what a normal distribution is. No training happens here: in [chapter 9](09_qlora.ipynb) you train beside such weights.
#
# **The paper:** Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314). You build block-wise quantisation (equations 1 and 2, with other levels), the levels (equation 4 and appendix E) and double quantisation (section 3).

# %% tags=["setup"]
import hashlib, inspect, math, subprocess, sys, tempfile
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()
from pathlib import Path
import torch, torch.nn.functional as F, transformers
from torch import nn
import minipeft as mp
from minipeft import lab, profiles
from minipeft.quant import double_quant, nf4
lab.seed_everything(0)
print("minipeft", mp.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
print("profile", mp.profile().name, "on", mp.profile().device)
lab.runtime_box("07_nf4")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the `None` below; near the end a cell puts your numbers beside the measured ones.
#
# 1. Four bits are 16 levels. With them, by how many **percent** is a weight matrix off, $\|W - \hat W\| / \|W\|$?
# 2. Four bits again, but levels in *equal* steps: by how many **percent** is it off then?
# 3. How many **bits** does a weight really cost, when everything that is stored is counted?
# 4. You quantise the whole model. How many **times** smaller than in float32 does it get?
# 5. The model's loss rises. With equal steps it rises how many **times** as much as with NF4?

# %%
predicted = {"error of NF4, percent": None, "error of equal steps, percent": None, "bits a weight": None,
             "times smaller": None, "rise of the loss, equal steps / NF4": None}

# %% [markdown]
# ## The problem
#
# LoRA trains few numbers, but the frozen ones must still be in memory, and they are nearly all. They are only read. So they need not be exact, only good enough.
#
# How good is good enough? Ask the model: its loss on ordinary text, here opinion pages of a newspaper, in rows of equal length. The loss is the mean over all next tokens, in nats. The rows are the same for everything that you will compare, so you can look at each row's *difference*, which varies less than the rows do. The *rise* of the loss is the mean of these differences, and *±* is its standard error.

# %%
BASE = profiles.base_model()
model, tokenizer = mp.load_base(BASE)
model.requires_grad_(False)
ROWS, LENGTH = mp.pick(smoke=(2, 32), cpu=(16, 96), gpu=(64, 128))
texts = [e["text"] for e in mp.load_data("sentiment/editorials", "test")][: 5 * ROWS * LENGTH // 16]
tokens = torch.tensor(tokenizer("\n".join(texts), verbose=False)["input_ids"][: ROWS * LENGTH]).view(ROWS, LENGTH)

@torch.no_grad()
def losses(model) -> torch.Tensor:
    """The mean loss of each row of text, (rows,)."""
    found = []
    for rows in tokens.to(model.device).split(4):
        logits, targets = model(rows).logits[:, :-1], rows[:, 1:]      # (4, length - 1, vocabulary)
        found.append(F.cross_entropy(logits.mT.float(), targets, reduction="none").mean(1))
    return torch.cat(found).cpu()

def bytes_of(model) -> int:
    """Bytes of all parameters and buffers, each once."""
    return sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())

# %%
exact, exact_bytes = losses(model), bytes_of(model)

def against_exact(found: torch.Tensor) -> dict:
    rise = found - exact
    return {"loss": found.mean().item(), "rise": rise.mean().item(), "±": (rise.std() / len(rise) ** 0.5).item()}

linears = {path: model.get_submodule(path) for path in mp.anatomy.match(model, "all-linear")}
in_linears = sum(layer.weight.numel() for layer in linears.values())
everything = sum(p.numel() for p in model.parameters())
print(f"the model as it is: loss {exact.mean():.3f} on {tokens.numel():,} tokens, {exact_bytes / 1e6:,.0f} MB")
print(f"{in_linears:,} of its {everything:,} numbers, {in_linears / everything:.0%}, are in {len(linears)} linear layers of its blocks")

# %% [markdown]
# ## The idea
#
# Cut a weight into blocks of consecutive numbers $x$. Divide each block by its largest absolute value $s$. Now everything lies between −1 and 1, and you keep, of 16 fixed levels, the number of the nearest one:
#
# $$s = \max |x| \qquad c = \arg\min_i \left| \frac{x}{s} - q_i \right| \qquad \hat x = s\, q_c$$
#
# | | shape | stored as |
# |---|---|---|
# | $x$ | $(n)$, the weight row by row | not at all |
# | $q$ | $(16)$, the same for every weight of every model | in the program |
# | $c$ | $(n)$ | 4 bits each, two in a byte |
# | $s$ | $(\lceil n / 64 \rceil)$ | float32, or a byte |
# | $\hat x$ | $(n)$ | made when it is needed |
#
# Where to put the levels? Where the weights are. Look at some: on the left all numbers of one layer, with the normal distribution of the same spread; on the right the same numbers after the division, with equal steps above, and NF4's 16 levels below. The two bars at the ends are the largest number of each block.

# %% tags=["figure"]
from minipeft.lab.plots import COLOURS, new_figure

PATH = f"model.layers.{model.config.num_hidden_layers // 2}.mlp.up_proj"
W = model.get_submodule(PATH).weight.detach().float().cpu()       # (out, in)
z = (W.view(-1, 64) / W.view(-1, 64).abs().amax(1, keepdim=True)).flatten()

figure, (left, right) = new_figure(2, width=9.2, height=3.4)
spread = W.std().item()
grid = torch.linspace(-4.5, 4.5, 181) * spread
left.hist(W.flatten().tolist(), bins=121, range=(-4.5 * spread, 4.5 * spread), density=True, color="#d0d7de", label=f"{W.numel():,} weights")
left.plot(grid, torch.exp(-((grid / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi)), color=COLOURS["vermilion"], label="normal")
left.set(xlabel="x", yticks=[], title=PATH.removeprefix("model."))
left.legend(loc="upper right", fontsize=9)
heights, *_ = right.hist(z.tolist(), bins=101, range=(-1, 1), density=True, color="#d0d7de")
top = max(heights)
for levels, y, colour, name in ((nf4.LEVELS["int4"][1:], 1.22, "orange", "equal steps"), (nf4.CODEBOOK, -0.16, "blue", "NF4")):
    right.plot(levels, [y * top] * len(levels), "|", markersize=13, markeredgewidth=2, color=COLOURS[colour])
    right.text(0, (y + (0.1 if y > 0 else -0.22)) * top, name, color=COLOURS[colour], ha="center", fontsize=10)
right.set(xlabel="x / s, blocks of 64", yticks=[], xticks=[-1, -0.5, 0, 0.5, 1], ylim=(-0.45 * top, 1.5 * top))
figure

# %% [markdown]
# ## By hand
#
# Take pencil and paper, and two bits instead of four: the levels $-1,\ 0,\ \tfrac13,\ 1$ with codes 0 to 3, and blocks of four.
#
# $$x = (3,\ {-6},\ 2,\ 0 \;|\; 0.3,\ 0.1,\ {-0.3},\ 0)$$
#
# 1. The scale of each block?
# 2. Divide, and write down the code of the nearest level for each number.
# 3. Four codes of two bits make a byte, the first in the highest bits. Which two bytes?
# 4. Decode. Which numbers came back exactly?
# 5. Now with one scale for all eight numbers. What becomes of the second block?

# %%
levels = torch.tensor([-1, 0, 1 / 3, 1])
x = torch.tensor([[3, -6, 2, 0], [0.3, 0.1, -0.3, 0]])

for name, scales in (("a scale a block", x.abs().amax(1, keepdim=True)), ("one scale", x.abs().max().expand(2, 1))):
    codes = (x[..., None] / scales[..., None] - levels).abs().argmin(-1)
    packed = (codes * torch.tensor([64, 16, 4, 1])).sum(1)
    print(f"{name}: s {[round(s, 3) for s in scales.flatten().tolist()]}, codes {codes.tolist()}, bytes {packed.tolist()}")
    print("   back:", [[round(value, 3) for value in row] for row in (scales * levels[codes]).tolist()])

# %% [markdown]
# ## Build it
#
# ### Step 1: the levels
#
# You want each code to be used equally often. Then each level stands for an equal share of the probability, and you find it with $\Phi^{-1}$, the inverse of the normal distribution function. (What comes of the wish, you measure in step 2.) Your first thought may be the middles of 16 equal shares, $\Phi^{-1}\!\left(\frac{i + 1/2}{16}\right)$, $i = 0 \ldots 15$. You find it in published code, too. Look at what it lacks: **no level is zero**. A weight that is exactly zero, padding for example, would come back as something else.
#
# So the paper does it one side at a time: 8 levels above zero, 7 below, and zero itself. Each side takes equal steps of probability from 0.5 to an outermost value, the same on both sides. That value cannot be 1, for $\Phi^{-1}(1) = \infty$. It is $1 - \frac12\left(\frac1{32} + \frac1{30}\right)$: the mean of the outermost middles of 16 and of 15 equal shares. Divide by the largest level, and the ends are −1 and 1. (Equation 4 of the paper is written a little differently. The levels printed in its appendix E, and those of bitsandbytes, come out of this.)
#
# Exercise 1 is to write it. First the other attempt.

# %%
def phi_inverse(p):
    """Φ⁻¹, computed in float64, kept in float32."""
    return torch.special.ndtri(p.double()).float()

first_thought = phi_inverse((torch.arange(16) + 0.5) / 16)
first_thought = first_thought / first_thought.max()
outermost = 1 - (1 / 32 + 1 / 30) / 2
print("the outermost probability:", outermost, "in the program:", nf4.OFFSET)
print("first thought:", [f"{level:.3f}" for level in first_thought.tolist()])
print("NF4:          ", [f"{level:.3f}" for level in nf4.CODEBOOK.tolist()])
assert 0 not in first_thought and 0 in nf4.CODEBOOK
assert ((nf4.CODEBOOK > 0).sum(), (nf4.CODEBOOK < 0).sum()) == (8, 7)

# %% [markdown]
# ### Exercise 1: the levels · 10 minutes · medium
#
# Write it for any number of levels above and below zero. `phi_inverse`, above, is $\Phi^{-1}$. `offset` is the outermost probability; from there one side goes to 0.5 in `above` equal steps, the other in `below`. Divide by the largest level at the end. With 8, 7 and `nf4.OFFSET` you get NF4.

# %%
from minipeft.checks import ch07_nf4 as check

def quantile_levels(above: int, below: int, offset: float) -> torch.Tensor:
    """(below + 1 + above,) float32, ascending from -1 to 1; `offset` is the outermost probability."""
    ### BEGIN SOLUTION
    up = phi_inverse(torch.linspace(offset, 0.5, above + 1)[:-1])      # falling
    down = -phi_inverse(torch.linspace(offset, 0.5, below + 1)[:-1])   # rising
    levels = torch.cat([down, torch.zeros(1), up.flip(0)])
    return levels / levels.max()
    ### END SOLUTION

check.quantile_levels(quantile_levels)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `torch.linspace(offset, 0.5, above + 1)` are the probabilities of one side. The last one is 0.5, and $\Phi^{-1}(0.5)$ is the zero that you need only once: `[:-1]` drops it. The other side has fewer, so its own steps, and a minus. `torch.cat`, then divide.
#
# </details>

# %% [markdown]
# ### Step 2: blocks
#
# One block is three lines: scale, codes, and back. How large should a block be? The scale is the largest of its numbers, and the more numbers, the larger the largest. Then the others crowd around zero, and the outer levels wait for numbers that rarely come. A small block fits its scale better, and needs more scales.
#
# The codes are not used equally often either. Step 1 puts the outermost level at $\Phi^{-1}$(`nf4.OFFSET`) standard deviations. The largest of 64 normal numbers is nearly always farther out, so the codes in the middle get more than their share, and those at the ends less. The cell prints how much. Which levels would be better for a block size? See Yoshida, under further reading.

# %%
block = W.flatten()[:64]
s = block.abs().max()
codes = (block[:, None] / s - nf4.CODEBOOK).abs().argmin(1)             # (64,)
back = s * nf4.CODEBOOK[codes]
worst = s * nf4.CODEBOOK.diff().max() / 2
assert (back - block).abs().max() <= worst * (1 + 1e-6)                 # half of the widest gap, at most
assert back[block.abs().argmax()].abs() == s                            # the largest comes back exactly
print("codes of the first weights:", codes[:12].tolist())
share = torch.bucketize(z, (nf4.CODEBOOK[1:] + nf4.CODEBOOK[:-1]) / 2).bincount(minlength=16) / len(z)
print(f"the rarest code has {share.min():.1%} of the layer's weights, the most frequent {share.max():.1%}; equal shares were {1 / 16:.1%}")

def error(W, back) -> float:
    """‖W - Ŵ‖ / ‖W‖."""
    return ((W - back).norm() / W.norm()).item()

whole = W.abs().max() * nf4.CODEBOOK[torch.bucketize(W / W.abs().max(), (nf4.CODEBOOK[1:] + nf4.CODEBOOK[:-1]) / 2)]
sizes = {B: error(W, nf4.dequantize(nf4.quantize(W, B))) for B in (4096, 256, 64, 32)}
assert sizes[32] < sizes[64] < sizes[256] < sizes[4096]
lab.table([{"a scale for": "the whole layer", "error": error(W, whole)}]
          + [{"a scale for": f"{B:,} weights", "error": e} for B, e in sizes.items()])

# %% [markdown]
# ### Exercise 2: quantise in blocks · 15 minutes · medium
#
# Codes and scales for a row of $n$ numbers. The last block may be short. A block may hold nothing but zeros: then its scale is zero, and its codes are those of the level zero.

# %%
def quantize_blocks(
    x: torch.Tensor, levels: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (n,), levels (16,) ascending -> codes (n,) whole numbers, scales (⌈n/block_size⌉,)."""
    ### BEGIN SOLUTION
    codes, scales = [], []
    middles = (levels[1:] + levels[:-1]) / 2
    for block in x.split(block_size):
        s = block.abs().max()
        codes.append(torch.bucketize(block / (s if s > 0 else 1), middles))
        scales.append(s)
    return torch.cat(codes), torch.stack(scales)
    ### END SOLUTION

check.quantize_blocks(quantize_blocks)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `x.split(block_size)` gives the blocks, a short last one included, so a loop will do. For the nearest level: `argmin` as above, or `torch.bucketize(z, middles)`, which counts how many of the 15 middles between the levels lie below. `0 / 0` is not a number, and has no nearest level.
#
# </details>

# %% [markdown]
# ### Step 3: bytes
#
# A code is a number from 0 to 15. The smallest thing that a computer stores is a byte, so two codes share one: the earlier in the high half, $16 c_1 + c_2$. In Python `c1 << 4 | c2`, and back `byte >> 4` and `byte & 15`. Half a byte is called a nibble.
#
# ### Exercise 3: pack · 5 minutes · easy
#
# All codes of a tensor at once. If their number is odd, the last low half is 0. (The package puts the code of the level zero there. Nobody reads it.) Above the stub stands one pair.

# %%
q = nf4.quantize(W)                                                     # the package's, blocks of 64
pair = int(codes[0]) << 4 | int(codes[1])
print(f"codes {codes[0]} and {codes[1]}: {codes[0]:04b} {codes[1]:04b} = byte {pair}")
assert q.packed[0] == pair and (pair >> 4, pair & 15) == (codes[0], codes[1])
assert len(q.packed) == W.numel() / 2 and q.absmax[0] == s

def pack(codes: torch.Tensor) -> torch.Tensor:
    """codes (n,) uint8 from 0 to 15 -> (⌈n/2⌉,) uint8, the earlier code in the high half."""
    ### BEGIN SOLUTION
    codes = F.pad(codes, (0, len(codes) % 2))
    return codes[::2] << 4 | codes[1::2]
    ### END SOLUTION

check.pack(pack)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `codes[::2]` are the first, third, fifth …, `codes[1::2]` the others. `F.pad(codes, (0, 1))` appends a zero.
#
# </details>

# %% [markdown]
# ### Step 4: the scales cost something, too
#
# A float32 scale for 64 weights is half a bit a weight. That is the price of the blocks, and an eighth on top of the four bits. But scales are numbers like others: quantise them. This is **double quantisation**.
#
# None is negative, so subtract their mean first: then the levels on both sides of zero have work. 256 of them share one float32, the largest absolute value, and each keeps one byte: the nearest of 256 levels. bitsandbytes takes levels that get denser towards zero, its *dynamic map*. The figure shows the scales of the layer, and that map.

# %% tags=["figure"]
scales = q.absmax
twice = double_quant.quantize_scales(scales)
again = double_quant.dequantize_scales(twice)
figure, (left, right) = new_figure(2, width=9.2, height=3.0)
left.hist(scales.tolist(), bins=80, color="#d0d7de")
left.axvline(twice.offset.item(), color=COLOURS["vermilion"], label="their mean")
left.set(xlabel="scale s", yticks=[], title=f"{len(scales):,} scales of {PATH.removeprefix('model.')}")
left.legend()
right.plot(double_quant.MAP, range(256), ".", markersize=3, color=COLOURS["blue"])
right.set(xlabel="level", ylabel="code", xticks=[-1, -0.5, 0, 0.5, 1], title="the dynamic map")
display(figure)

assert twice.codes.dtype == torch.uint8 and len(twice.absmax) == math.ceil(len(scales) / 256)
both = nf4.quantize(W, double_quant=True)
assert torch.equal(both.packed, q.packed)                               # only the scales differ
print(f"the scales are off by {error(scales, again):.2%}, measured as the weights are")
lab.table([{"scales": name, "bytes": kept.nbytes, "bits a weight": kept.bits, "error": error(W, nf4.dequantize(kept))}
           for name, kept in (("float32", q), ("double quantised", both))])

# %% [markdown]
# ### Exercise 4: bits a weight · 5 minutes · easy
#
# What does a weight cost, its share of everything included? Leave out the mean: it is one number for a whole layer.

# %%
def bits_per_weight(block_size: int, nested: int | None) -> float:
    """nested None: a float32 scale a block. Otherwise a byte a block, and a float32 for `nested` of these."""
    ### BEGIN SOLUTION
    if nested is None:
        return 4 + 32 / block_size
    return 4 + 8 / block_size + 32 / (block_size * nested)
    ### END SOLUTION

check.bits_per_weight(bits_per_weight)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# How many bits for one block's scale? Divide by the block's weights. One float32 is shared by `nested` blocks, so by how many weights?
#
# </details>

# %% [markdown]
# ### Exercise 5: double quantisation · 15 minutes · medium
#
# Write step 4 there and back in one function: what has become of the scales after they were kept in eight bits. Subtract the mean of all of them. In blocks of `nested`, divide by the largest absolute value, take the nearest of `levels`, and multiply again. Add the mean.

# %%
def double_quantize(scales: torch.Tensor, levels: torch.Tensor, nested: int) -> torch.Tensor:
    """scales (blocks,), levels (k,) ascending -> (blocks,): mean off, blocks of `nested`, levels, mean on."""
    ### BEGIN SOLUTION
    offset = scales.mean()
    middles = (levels[1:] + levels[:-1]) / 2
    kept = []
    for block in (scales - offset).split(nested):
        s = block.abs().max()
        kept.append(s * levels[torch.bucketize(block / s, middles)])
    return torch.cat(kept) + offset
    ### END SOLUTION

check.double_quantize(double_quantize)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# It is exercise 2 once more, on `scales - scales.mean()`, followed at once by decoding. Do not forget to add the mean again. The mean is that of *all* scales.
#
# </details>

# %% [markdown]
# ## The same as the package, and as bitsandbytes
#
# Here is how `minipeft` makes the levels and how it quantises; from here on the chapter uses the package. bitsandbytes, the library of the paper's authors, carries the 16 levels as a table of decimal numbers. Levels, codes, scales, second scales and decoded values must be equal to the bit. (bitsandbytes may say that it could not load a fast kernel of its own. The comparison does without.)

# %%
print(inspect.getsource(nf4._codebook))
print(inspect.getsource(nf4.quantize_blocks))
try:
    import bitsandbytes.functional as bnb
    assert torch.equal(nf4.CODEBOOK, bnb.get_4bit_type("nf4", device="cpu"))
    with torch.compiler.set_stance("force_eager"):                      # it would compile for every new size
        packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
        theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(packed.flatten(), both.packed)
    assert torch.equal(state.absmax, both.scales.codes) and torch.equal(state.state2.absmax, both.scales.absmax)
    assert torch.equal(theirs, nf4.dequantize(both))
    print("levels, codes, scales and values equal those of bitsandbytes, every bit")
except ImportError:
    print("bitsandbytes is not installed here, so that comparison is skipped (pip install bitsandbytes)")

# %% [markdown]
# ## The block size is yours
#
# Move the slider: on the left, how the numbers lie under the 16 levels; on the right, what you pay and what you get, with double quantisation. Without a running kernel you see four of the sizes.

# %%
lab.block_slider(W)

# %% [markdown]
# ## Nothing else changed
#
# `mp.quantize` puts a `Linear4bit` in the place of every linear layer of the blocks. Before you ask what that did to the model, check what it did not do. The embedding, which is also the head here, and the norms keep every byte. The stored bytes are what the formula says. And quantising twice is quantising once: the levels are their own nearest levels.
#
# The first `mp.quantize` on a machine compiles the kernels of [chapter 8](08_cuda_kernel.ipynb). That takes about a minute, once, and it says so. Without a compiler the chapter goes on without them, more slowly.

# %%
def fingerprint(tensors) -> str:
    """SHA-256 over the bytes of tensors."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

def bytes_in_4_bits(n: int, block_size: int = 64) -> int:
    """Codes, a byte a scale, a float32 for 256 scales, and the mean."""
    scales = math.ceil(n / block_size)
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / 256) + 4

assert torch.equal(nf4.quantize(nf4.dequantize(q)).packed, q.packed)
left_alone = [p for name, p in model.named_parameters() if name.removesuffix(".weight") not in linears]
four = mp.quantize(mp.load_base(BASE)[0])
small = sum(bytes_in_4_bits(layer.weight.numel()) for layer in linears.values())
assert fingerprint(four.parameters()) == fingerprint(left_alone)        # what is still a parameter is as it was
assert bytes_of(four) == exact_bytes - in_linears * W.element_size() + small
print("left alone:", fingerprint(left_alone), "·", sum(p.numel() for p in left_alone), "numbers")

# %%
kept = exact_bytes - in_linears * W.element_size()
memory = {"float32": exact_bytes, "mp.quantize": bytes_of(four), "mp.quantize, the rest in 16 bits": small + kept // 2}
times_smaller = exact_bytes / memory["mp.quantize"]
bits = 8 * small / in_linears
print(f"the linear layers shrink {32 / bits:.2f} times, to {bits:.4f} bits a weight; the whole model {times_smaller:.2f} times")
print(f"65 billion weights at {bits:.3f} bits: {65e9 * bits / 8 / 1e9:.1f} GB, before adapter, gradients and activations")
assert 65e9 * bits / 8 > 24e9                                           # so they do not fit a card of 24 GB
lab.table([{"": name, "MB": size / 1e6, "of it embedding, head, norms": kept / 1e6 / (2 if "16" in name else 1)}
           for name, size in memory.items()])

# %% [markdown]
# The second line tests a sentence that you find in print: *with QLoRA you fine-tune a 65B model on a single 24 GB card.* The paper says 48 GB. And a small model shrinks less than a large one: its vocabulary is as large, so its embedding is a larger part of it.
#
# ## On real layers
#
# NF4 against two other sets of levels, all in blocks of 64. **int4**: equal steps, the same on both sides of zero, so that one of the 16 codes is left over. **FP4**: a floating-point number in four bits, a sign, two bits of exponent, one of fraction. Every linear layer is one point (in the smoke profile every tenth).

# %% tags=["figure"]
KINDS = {"nf4": "blue", "fp4": "green", "int4": "orange"}
layers = {kind: {} for kind in KINDS}
for path in list(linears)[:: mp.pick(smoke=10, cpu=1, gpu=1)]:
    weight = linears[path].weight.detach().float()
    for kind in KINDS:
        layers[kind][path] = 100 * error(weight, nf4.dequantize(nf4.quantize(weight, 64, kind)))
names = sorted({path.rpartition(".")[2] for path in linears}, key=[path.rpartition(".")[2] for path in linears].index)
normal = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
ideal = {kind: 100 * error(normal, nf4.dequantize(nf4.quantize(normal, 64, kind))) for kind in KINDS}

figure, ax = new_figure(width=8.6, height=3.6)
for shift, (kind, colour) in zip((-0.2, 0, 0.2), KINDS.items()):
    for place, name in enumerate(names):
        values = [value for path, value in layers[kind].items() if path.endswith(name)]
        ax.plot([place + shift] * len(values), values, "o", markersize=4, alpha=0.5, color=COLOURS[colour], label=kind if place == 0 else None)
    ax.axhline(ideal[kind], color=COLOURS[colour], linestyle="--", linewidth=1, zorder=0)
ax.set_xticks(range(len(names)), names)
ax.set(ylabel="error, % of ‖W‖", ylim=(0, 1.25 * max(max(found.values()) for found in layers.values())))
ax.legend(ncols=3, loc="upper right", title="dashed: on normal numbers", title_fontsize=9)
display(figure)

mean = {kind: sum(found.values()) / len(found) for kind, found in layers.items()}
wins = {kind: sum(layers["nf4"][path] < value for path, value in layers[kind].items()) for kind in ("fp4", "int4")}
print(f"NF4 has the smaller error than int4 in {wins['int4']}, than FP4 in {wins['fp4']} of {len(layers['nf4'])} layers")
lab.table([{"": kind, "mean error, %": mean[kind], "worst layer, %": max(layers[kind].values()), "normal numbers, %": ideal[kind]} for kind in KINDS])

# %% [markdown]
# ## In the model's loss
#
# Errors of weights are not what you care about. Here is the loss, with all linear layers of the blocks quantised. The row *mp.quantize* is the quantised model itself, with double quantisation. For the others the weights go through four bits and back.

# %%
@torch.no_grad()
def losses_with(change, paths) -> torch.Tensor:
    """Each row's loss with change(W) for W at these paths; afterwards the model is as it was."""
    modules = [model.get_submodule(path) for path in paths]
    originals = [module.weight for module in modules]
    for module, W in zip(modules, originals):
        module.weight = nn.Parameter(change(W.detach()), requires_grad=False)
    found = losses(model)
    for module, W in zip(modules, originals):
        module.weight = W
    return found

def there_and_back(kind="nf4", block_size=64, **how):
    return lambda W: nf4.dequantize(nf4.quantize(W, block_size, kind, **how))

found = {kind: losses_with(there_and_back(kind), linears) for kind in KINDS} | {"mp.quantize": losses(four)}
kinds = {"exact": {"bits a weight": 32.0} | against_exact(exact)}
for name, rows in found.items():
    kinds[name] = {"bits a weight": bits if name == "mp.quantize" else 4 + 32 / 64} | against_exact(rows)
lab.table([{"": name} | row for name, row in kinds.items()])

# %%
def told(a: str, b: str) -> str:
    """Which of two ways costs the model more, by the differences of the rows of text."""
    gap = found[a] - found[b]
    mean, spread = gap.mean().item(), (gap.std() / len(gap) ** 0.5).item()
    word = "more than" if mean > 2 * spread else "less than" if mean < -2 * spread else "not clearly more or less than"
    return f"{a} costs {word} {b}: {mean:+.4f} ± {spread:.4f}"

rise_ratio = kinds["int4"]["rise"] / kinds["nf4"]["rise"]
print(told("int4", "nf4"), told("fp4", "nf4"), told("int4", "fp4"), told("mp.quantize", "nf4"), sep="\n")
print(f"the loss rises {rise_ratio:.2f} times as much with equal steps as with NF4; the weights' error is {mean['int4'] / mean['nf4']:.2f} times as large")

# %% [markdown]
# *More* and *less* mean by more than two standard errors. Put the three formats in order by the error of the weights, then by the rise of the loss: is it the same order, and do the printed lines bear out every step of it? Four bits are not free: look at the rise of NF4 itself. This is one small model, and tells you nothing of large ones. The paper compares such formats on models of 125 million to 13 billion parameters. With fine-tuning on top, in 4 bits, it finds the scores of 16 bits again.
#
# ## An honest note: these weights have been in four bits before
#
# The model that comes with this course was published as a file in **Q4_1**: blocks of 32, each with a minimum and a step of 16 bits, and 16 levels at equal distances. minipeft unpacks it. So, unless you are in the gpu profile, which takes a model from the Hub, you have been looking at weights that went through another quantisation before you saw them. Does it show? Compare with MiniLM, which was never quantised, and with normal numbers. In each run of 32, subtract the minimum and divide by the range.

# %% tags=["figure"]
fresh = mp.load_base("minilm-l6")[0].get_submodule("encoder.layer.3.intermediate.dense").weight.detach().float().cpu()
sources = {f"{BASE.rpartition('/')[2]}": W, "MiniLM": fresh, "normal numbers": normal.view(-1, 1024)}

def runs_of_32(W):
    rows = W.reshape(-1, 32)
    low = rows.amin(1, keepdim=True)
    return rows, low, (rows.amax(1, keepdim=True) - low).clamp(min=1e-12)

figure, axes = new_figure(3, width=9.4, height=2.7)
for ax, (name, weight), colour in zip(axes, sources.items(), ("blue", "green", "grey")):
    rows, low, width = runs_of_32(weight)
    inside = ((rows - low) / width).flatten()
    inside = inside[(inside > 0.01) & (inside < 0.99)]              # without the ends themselves
    ax.hist(inside.tolist(), bins=150, range=(0, 1), color=COLOURS[colour])
    ax.set(title=name, yticks=[], xlabel="(x − min) / (max − min)")
display(figure)

def q4_1(W):
    """To the nearest of 16 equally spaced levels, from the smallest to the largest of each 32, and back."""
    rows, low, width = runs_of_32(W)
    return (low + (15 * (rows - low) / width).round() / 15 * width).view_as(W)

def excess_kurtosis(x) -> float:
    return (((x - x.mean()) / x.std()) ** 4).mean().item() - 3

origin = {name: {"different numbers in 32": max(len(set(row)) for row in weight.reshape(-1, 32).tolist()),
                 "excess kurtosis": excess_kurtosis(weight),
                 "error, NF4, %": 100 * error(weight, there_and_back()(weight)),
                 "error, int4, %": 100 * error(weight, there_and_back("int4")(weight)),
                 "error, Q4_1's grid, %": 100 * error(weight, q4_1(weight))} for name, weight in sources.items()}
gridded = [name for name, row in origin.items() if row["different numbers in 32"] <= 16]
print(f"bits a weight: NF4 and int4 {4 + 32 / 64:g}, Q4_1 {4 + 2 * 16 / 32:g}")
print("on a grid of 16 levels already:", ", ".join(gridded) or "none of them")
lab.table([{"": name} | row for name, row in origin.items()])

# %% [markdown]
# A weight that never saw a grid has no two equal numbers in 32, or hardly any. A model named in the line above the table has at most 16, evenly spaced: a comb. Three lessons.
#
# - **The comb is not normal.** Whoever fits levels to such a histogram in detail fits another method's leftovers. Look at the excess kurtosis too, in all rows: 0 would be normal. It is another matter than the comb: is it larger or smaller in the weight that never saw a grid?
# - **A test on it can be rigged.** Its own grid gives such a model back with no error to speak of. Only the other rows tell you what that grid does to other weights. Its error there can still be the smallest: it has smaller blocks, a minimum beside the step, and more bits (the line above the table). To compare two methods, take equal bits, weights that saw neither, and the loss.
# - **For NF4 it matters little.** Its scales come from other blocks, so the combs do not line up. Compare its error on the three rows. (They are three different weights, so small differences say nothing of the comb.)
#
# With the embedded model, what you measured above is what NF4 adds on top of Q4_1. Its loss before Q4_1 is not known here.
#
# ## What to leave alone
#
# `mp.quantize` takes the linear layers of the blocks, and nothing else. Should it? Put the other parts through NF4 as well, one by one. The head and the embedding are one tensor in this model (tied), used twice, so you can ask about each use. (*MB saved* is with double quantisation, and counted as if that use had a tensor of its own. A tied tensor is saved only where both uses are in four bits.)

# %%
norms = [name for name, m in model.named_modules() if "norm" in type(m).__name__.lower()]
embedding, head = "model.embed_tokens", "lm_head"
cases = {"linear layers of the blocks": list(linears), "embedding, as embedding": [embedding], "embedding, as head": [head],
         "embedding, both uses": [embedding, head], "norms": norms}

parts = {}
for name, paths in cases.items():
    n = sum(W.numel() for W in {model.get_submodule(path).weight for path in paths})     # a tied one counts once
    rows = found["nf4"] if not parts else losses_with(there_and_back(), paths)
    saved = (n * W.element_size() - bytes_in_4_bits(n)) / 1e6
    parts[name] = {"numbers": n, "MB saved": saved} | against_exact(rows)
    parts[name]["rise per 100 MB saved"] = 100 * parts[name]["rise"] / saved
assert torch.equal(losses(model), exact)                                # all of it is as it was
order = sorted(parts, key=lambda name: parts[name]["rise per 100 MB saved"])
print("from the cheapest to the dearest, by rise of the loss per MB saved:", *order, sep="\n  ")
print("embedding and head are one tensor:", model.lm_head.weight is model.model.embed_tokens.weight)
print(f"the norms are {parts['norms']['numbers']:,} numbers, {parts['norms']['numbers'] / everything:.3%} of the model: little to gain")
lab.table([{"in NF4": name} | row for name, row in parts.items()])

# %% [markdown]
# How to read it:
#
# - **Norms.** Next to no memory, so any rise at all is a bad bargain. Each of these numbers multiplies a whole channel.
# - **Head or embedding.** The head's output is the answer: its rounding errors are in the logits, and no later layer can make up for them. The embedding only begins the work. Compare the two rows, and mind the ±: a rise below twice its ± may be none. Where they are one tensor, you cannot have the cheaper use alone: the row that counts is *both uses*.
# - **Linear layers of the blocks.** The largest rise, perhaps, but also the most memory. Compare their rise per MB saved with that of *both uses*: that is what decides.
#
# `mp.quantize` leaves head, embedding and norms. Other choices are `skip=(…)` and a table like this one.
#
# ## Break it
#
# **Wrong size.** Blocks of 4,096. **Wrong levels.** The first thought of step 1, without a zero. Compare the columns *error* and *rise*: do they tell the same story? *Error* is that of the one layer $W$; for *rise*, all linear layers of the blocks went that way, and not all are like $W$. **An outlier.** One weight in a block, made 30 times as large as the largest: the scale belongs to the outlier, and the other 63 share what levels are left.

# %%
def without_zero(W, levels=first_thought):
    """There and back with other levels, blocks of 64."""
    rows, levels = W.reshape(-1, 64), levels.to(W.device)
    s = rows.abs().amax(1, keepdim=True)                                # (blocks, 1)
    return (s * levels[torch.bucketize(rows / s.clamp(min=1e-38), (levels[1:] + levels[:-1]) / 2)]).view_as(W)

ways = {"NF4, blocks of 64": there_and_back(), "blocks of 4,096": there_and_back(block_size=4096), "levels without a zero": without_zero}
assert error(there_and_back()(W), without_zero(W, nf4.CODEBOOK)) < 1e-3
broken = {}
for name, change in ways.items():
    rows = found["nf4"] if not broken else losses_with(change, linears)
    broken[name] = {"a zero becomes": change(torch.tensor([1.0] + [0.0] * 4095))[1].item(), "error": error(W, change(W))} | against_exact(rows)
def compared(a, b, form) -> str:
    return f"{a:{form}} against {b:{form}}"

ours, theirs = broken["NF4, blocks of 64"], broken["levels without a zero"]
print("without a zero, beside NF4: error", compared(theirs["error"], ours["error"], ".3%"), "· rise", compared(theirs["rise"], ours["rise"], ".3f"))
lab.table([{"": name} | row for name, row in broken.items()])

# %%
calm = W.flatten()[:64].clone()
loud = calm.clone()
loud[5] = 30 * loud.abs().max()
others = torch.arange(64) != 5
for name, block in (("as it is", calm), ("with an outlier", loud)):
    codes = (block[:, None] / block.abs().max() - nf4.CODEBOOK).abs().argmin(1)[others]
    back = there_and_back()(block)
    print(f"{name}: the other 63 weights use {len(codes.unique())} of 16 codes, and are off by {error(block[others], back[others]):.0%}")

# %% [markdown]
# ## Exercise 6: find the bug · 10 minutes · medium
#
# A decoder for NF4 with a mistake from public code. The shapes are right, the values have the right size, and nearly all of the correlation with the true weight is there. The cell shows what it costs all the same; *shift* is the mean difference from the true weights, in standard deviations of these. These are of the one layer $W$; for the loss, all linear layers are decoded like that. What is wrong? Then write `decode` correctly.

# %%
def decode_as_published(packed, scales, levels, block_size, n):
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n]    # (n,)
    return (codes.float() - 8) / 8 * scales.repeat_interleave(block_size)[:n]

def published(W):
    q = nf4.quantize(W)
    return decode_as_published(q.packed, q.absmax, nf4.CODEBOOK.to(W.device), 64, W.numel()).view_as(W)

pair = torch.stack([W.flatten(), published(W).flatten()])
bug = {"correlation": torch.corrcoef(pair)[0, 1].item(), "error": error(*pair), "shift": ((pair[1] - pair[0]).mean() / W.std()).item()}
bug |= against_exact(losses_with(published, linears))
display(lab.table([bug]))

def decode(
    packed: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, block_size: int, n: int
) -> torch.Tensor:
    """packed (⌈n/2⌉,) uint8, scales (⌈n/block_size⌉,), levels (16,) -> (n,)."""
    ### BEGIN SOLUTION
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n].long()
    return levels[codes] * scales.repeat_interleave(block_size)[:n]
    ### END SOLUTION

check.decode(decode)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Is a code a number on a ruler, or the number of a level? One argument of the function is never used. To index a tensor you need whole numbers of type `long`.
#
# </details>

# %% [markdown]
# ## Save it, read it again
#
# A `Linear4bit` keeps codes and scales as buffers, so the model's `state_dict` holds them. The file is small, and what is read again answers the same to the bit. `mp.load_base(…, quantized=True)` makes the quantised model layer by layer while it reads, so that the full-precision model never has to fit.

# %%
with tempfile.TemporaryDirectory() as shelf:
    file = Path(shelf) / "four-bits.pt"
    torch.save(four.state_dict(), file)
    file_bytes = file.stat().st_size
    again = mp.load_base(BASE, quantized=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(four.state_dict().values(), again.state_dict().values(), strict=True))
    again.load_state_dict(torch.load(file, weights_only=True))
with torch.no_grad():
    assert torch.equal(again(tokens[:1].to(again.device)).logits, four(tokens[:1].to(four.device)).logits)
del again
print(f"the file has {file_bytes / 1e6:,.1f} MB; in float32 the model has {exact_bytes / 1e6:,.1f} MB")
print("read again: the same logits to the bit; quantised while reading: the same codes and scales")

# %% [markdown]
# ## The row for the cost table, your predictions, and a quiz
#
# The numbers in the quiz are computed, not typed. Every choice says why it is right or wrong.

# %%
row = {"base": "NF4, double quantised", "bits a weight": bits, "MB": memory["mp.quantize"] / 1e6, "times smaller": times_smaller,
       "file MB": file_bytes / 1e6, "loss": kinds["mp.quantize"]["loss"], "rise": kinds["mp.quantize"]["rise"]}
measured = dict(zip(predicted, (mean["nf4"], mean["int4"], bits, times_smaller, rise_ratio)))
lab.record(
    main=row | {"base model": BASE, "tokens": tokens.numel(), "exact": exact.mean()},
    layers={kind: {"mean": mean[kind], "worst": max(layers[kind].values()), "normal": ideal[kind]} for kind in KINDS} | {"nf4 better in": wins},
    sizes=sizes, kinds=kinds, origin=origin, parts=parts, broken=broken | {"nibble - 8": bug},
    memory=memory | {"linears": small}, checkpoint={"bytes": file_bytes, "base bytes": exact_bytes},
)
display(lab.table([{"": key, "predicted": predicted[key], "measured": value} for key, value in measured.items()]))
lab.table([row])

# %% tags=["figure"]
def cost(block, nested=None) -> str:
    return f"{4 + (32 / block if nested is None else (8 + 32 / nested) / block):.3f}"

def gigabytes(parameters, bits) -> str:
    return f"{parameters * bits / 8 / 1e9:.1f} GB"

saved, nested = (32 - 8 - 32 / 256) / 64, float(cost(64, 256))
lab.quiz([
    {"question": "NF4, blocks of 64, scales in float32. What does a weight cost in bits?", "right": cost(64),
     "choices": {cost(64): "Four for the code, and 32 for the scale, shared by 64.", "4.000": "The scales are stored as well.",
                 cost(64, 256): "That is with double quantisation.", cost(32): "That is for blocks of 32."}},
    {"question": "And what does double quantisation save, in bits a weight?", "right": f"{saved:.3f}",
     "choices": {f"{saved:.3f}": "A byte and 1/256 of a float32 in the place of a float32, for 64 weights.",
                 f"{24 / 64:.3f}": "That forgets the second scales.", f"{32 / 64:.3f}": "The scales do not become free.",
                 "24.000": "That is a scale's saving, not a weight's."}},
    {"question": "A 65B model in NF4 with double quantisation: how much for the weights alone?", "right": gigabytes(65e9, nested),
     "choices": {gigabytes(65e9, nested): "More than a card of 24 GB has, before anything is trained.",
                 gigabytes(65e9, 16): "That is 16 bits a weight.", gigabytes(65e9, 2): "That would be two bits a weight.",
                 gigabytes(65e9, 32): "That is float32."}},
    {"question": "Why does NF4 have 8 levels above zero and 7 below?", "right": "zero must be a level, and 15 others cannot be shared equally",
     "choices": {"zero must be a level, and 15 others cannot be shared equally": "16 levels, one of them zero. The one too many went up.",
                 "weights are more often positive": "Look at the histogram: both sides are alike.",
                 "one code is kept for errors": "All 16 codes stand for a number.",
                 "the sign takes a bit": "NF4 has no sign bit. FP4 has one."}},
    {"question": "In a block of 64 you make one weight very large. What happens?", "right": "the other 63 lose precision",
     "choices": {"the other 63 lose precision": "Their scale is the outlier's. You measured it.",
                 "that weight is cut to the old scale": "The scale follows the largest number, which comes back exactly.",
                 "the whole layer loses precision": "Every block has its own scale: that is what blocks are for.",
                 "nothing": "Compare the two lines printed at the end of *Break it*."}},
    {"question": "A colleague decodes NF4 by nibble − 8. All shapes fit. What shows the mistake?", "right": "comparing the values with the weight",
     "choices": {"comparing the values with the weight": "An oracle: the weight itself, or bitsandbytes.",
                 "an error message": "There is none.",
                 "a high correlation with the weight": "You saw it: that is high with the bug, too. It does not see a shift that all weights share, and in a product all of it adds up.",
                 "the size of the file": "The bytes are right. They are read wrongly."}},
    {"question": "On the embedded model an equal grid of its own (Q4_1) has almost no error. Is it better than NF4?",
     "right": "you cannot tell from this model", "choices": {
                 "you cannot tell from this model": "Its weights lie on that grid already. Ask one that was never quantised.",
                 "yes": "Its own grid is an unfair test. And it spends more bits: a minimum and a step for 32 weights.",
                 "no, equal steps are always worse": "int4 is worse, in the same blocks. Q4_1 has smaller blocks and a minimum: look at its error on normal numbers."}},
    {"question": f"The whole model became smaller, but by less than 32 / {nested} times. Why?", "right": "embedding, head and norms keep their precision",
     "choices": {"embedding, head and norms keep their precision": "In a small model with a large vocabulary that is a good part.",
                 "the codebook has to be stored": "16 numbers, for the whole model.",
                 "two codes do not quite fit a byte": "They do: 16 × 16 = 256.",
                 "the scales are in float32": f"They are in bytes, and in the {nested} already."}},
    {"question": "You may use 4.5 bits a weight and no more. Which of these has the smallest blocks that you can pay for?", "right": "double quantisation, blocks of 32",
     "choices": {"double quantisation, blocks of 32": f"{cost(32, 256)} bits: it even leaves some.",
                 "float32 scales, blocks of 64": f"{cost(64)} bits, and larger blocks.",
                 "float32 scales, blocks of 32": f"{cost(32)} bits: too many.",
                 "double quantisation, blocks of 128": f"{cost(128, 256)} bits: cheaper, and larger blocks."}},
])

# %% [markdown]
# ## Recap
#
# - A block of weights, divided by its largest, lies between −1 and 1. A code names the nearest of 16 levels.
# - The levels are quantiles of a normal distribution, one side at a time, with a zero between.
# - Small blocks fit better and need more scales. Double quantisation makes the scales cheap.
# - The error of the weights is one thing, the loss of the model another. Measure both, on the same text, by differences.
# - What to leave alone is a question for a table: rise of the loss per byte saved.
# - Know where your weights have been. A model that went through a grid flatters that grid.
#
# ## Further reading
#
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314): section 3, appendix E for the levels, section 4 for what four bits cost large models
# - Dettmers & Zettlemoyer 2023, [The case for 4-bit precision](https://arxiv.org/abs/2212.09720): bits, block sizes and model sizes, at equal memory
# - Yoshida 2023, [NF4 Isn't Information Theoretically Optimal](https://arxiv.org/abs/2306.06965): the distribution of x/s depends on the block size, so the best levels do, too
# - Dettmers et al. 2022, [8-bit optimizers](https://arxiv.org/abs/2110.02861): block-wise scales and the dynamic map
# - [Chapter 8](08_cuda_kernel.ipynb) makes it fast, [chapter 9](09_qlora.ipynb) trains beside it
