# ---
# jupyter:
#   minipeft:
#     records: [cpu, dequantize, product, emulator]
# ---

# %% [markdown]
# # 8 · A kernel of your own: from four bits back to numbers
#
# **In one sentence:** a kernel is the body of a loop, run by thousands of threads at once; one that decodes NF4 well moves every byte once, so that memory, not arithmetic, sets its pace.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/08_cuda_kernel.ipynb)
#
# How long it takes and how much memory it needs stands below the set-up cell, measured.
#
# ## What you will be able to do
#
# - say which thread works on which number, and what a block, a thread and a barrier are
# - write the body of a CUDA kernel: a loop in strides, a maximum in shared memory, the decoding of NF4
# - have it checked without a GPU, in every order of its threads
# - count the bytes that a kernel must move, and compare its speed with a plain copy
# - read five versions of one kernel, and say what each brings
#
# **You need:** Python, the bits of a byte, chapter 7 (NF4). No CUDA, no C++ beyond `for` and `if`, and no GPU.
#
# **The papers:** Dettmers et al. 2023, *QLoRA*, [arXiv:2305.14314](https://arxiv.org/abs/2305.14314): you build the dequantisation in its equations 5 and 6. Williams, Waterman and Patterson 2009, *Roofline: an insightful visual performance model*, [doi:10.1145/1498765.1498785](https://doi.org/10.1145/1498765.1498785): you draw its picture for this machine.
#
# **What has been run.** Here the kernels run in an *emulator*: a C++ compiler makes a program for the CPU of the same text, and watches each access to memory. A pass there is a pass of the emulator. It says that the text computes the right thing. It says nothing about speed, and a GPU may still differ. So the package's kernels have also run on a real GPU. A table further down has those times, with the GPU's name and the date. If you have a GPU, this chapter measures yours beside it.

# %% tags=["setup"]
import hashlib, inspect, json, math, random, re, statistics, subprocess, sys, tempfile, time
if "google.colab" in sys.modules:  # --no-deps: reinstalling torch or numpy under a live kernel breaks it
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "git+https://github.com/{{repository}}"], check=True)
    from minipeft import colab; colab.complete()

from types import SimpleNamespace
import torch
import minipeft as mp
from minipeft import lab, profiles
from minipeft.data import data_folder
from minipeft.quant import emulator, kernels, nf4

lab.seed_everything(0)
print("minipeft", mp.__version__, "torch", torch.__version__)
print("profile", mp.profile().name, "on", mp.profile().device)
lab.runtime_box("08_cuda_kernel")

# %% [markdown]
# ## Before you read on
#
# Write down what you expect. Replace the three `None`; at the end a cell puts your numbers beside the measured ones.
#
# 1. To turn one NF4 number into a float32, how many **bytes** must be read and written, at least?
# 2. A loop in Python over the numbers: how many **times slower** is it than a plain copy of the result?
# 3. The compiled kernel: what **percent** of the copy's bytes per second does it reach on your machine?

# %%
predicted = {"bytes a number, NF4 to float32": None, "Python's loop, times slower than a copy": None,
             "compiled kernel, percent of the copy's speed": None}

# %% [markdown]
# ## The problem
#
# In four bits a model's linear layers take little more than a quarter of their size in 16 bits, an eighth of their size in 32. But no processor multiplies NF4 codes. Each time a layer is used, its weights are decoded first: in QLoRA, in every layer, in every step, forwards and backwards.
#
# So measure it on the frozen model. Below is the plainest way to decode, a loop in Python: two codes share a byte, the earlier number in the high half; a code is the place of one of 16 levels; 64 numbers in a row share a scale. You run it on a few of the numbers and compute how long the whole model would take.

# %%
model, _ = mp.load_base(profiles.base_model())
linears = {path: m.weight for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and path != "lm_head"}
numbers = sum(weight.numel() for weight in linears.values())
W = linears["model.layers.0.mlp.down_proj"].detach().float().cpu()
q, LEVEL = mp.nf4.quantize(W), mp.nf4.CODEBOOK.tolist()
del model, linears

def dequantize_loop(packed: list, scales: list, n: int, block_size: int = 64) -> list:
    out = [0.0] * n
    for i in range(n):
        byte = packed[i // 2]
        code = byte & 15 if i % 2 else byte >> 4               # the earlier number is in the high half
        out[i] = LEVEL[code] * scales[i // block_size]
    return out

few, began = 2**14, time.perf_counter()
by_loop = dequantize_loop(q.packed.tolist(), q.absmax.tolist(), few)
loop_ns = (time.perf_counter() - began) / few * 1e9
assert torch.equal(torch.tensor(by_loop), mp.nf4.dequantize(q).view(-1)[:few])
print(f"Python's loop: {loop_ns:,.0f} ns a number")
lab.table([{"": "the linear layers of the blocks", "numbers": numbers, "MB in float32": 4 * numbers / 1e6, "bits a number in NF4": q.bits,
            "MB in NF4": q.bits / 8 * numbers / 1e6, "s to decode once, Python's loop": loop_ns * numbers / 1e9}])

# %% [markdown]
# ## The idea
#
# No number waits for another: each needs one byte and one scale. So give each to a worker of its own.
#
# $$\mathrm{out}[i] \;=\; \mathrm{level}\big[\mathrm{code}(i)\big]\cdot s\big[\lfloor i/64 \rfloor\big]$$
#
# A GPU calls the worker a **thread**. Threads come in **blocks**, and the blocks form a **grid**. All run the same text, the **kernel**. A thread knows four numbers: its own in its block, its block's, and how many there are of both. From these it works out its share. Threads of one block can share a little fast memory and wait for each other at a **barrier**. Threads of different blocks cannot.
#
# | | shape | |
# |---|---|---|
# | packed | $(\lceil n/2 \rceil)$ bytes | two codes each |
# | scales $s$ | $(\lceil n/64 \rceil)$ float32 | one for 64 numbers |
# | level | $(16)$ float32 | NF4's levels |
# | out | $(n)$ | float32, or 16 bits |
#
# **Two things are called block here**: a block of *numbers*, which share a scale, and a block of *threads*. They have nothing to do with each other. In the picture, drawn small, a scale serves 4 numbers and a block has 3 threads. Above it stand the 16 levels, which you need in a moment.

# %% tags=["figure"]
from matplotlib.patches import Rectangle
from minipeft.lab.plots import COLOURS, new_figure

figure, ax = new_figure(width=9.4, height=3.9)
ax.axis("off")
shown, per_scale, per_block = 12, 4, 3
inks = [COLOURS["blue"], COLOURS["orange"]]

def box(x, y, width, text, colour, alpha=0.25, size=10):
    ax.add_patch(Rectangle((x + 0.04, y), width - 0.08, 0.62, facecolor=colour, alpha=alpha, edgecolor="none"))
    ax.text(x + width / 2, y + 0.31, text, ha="center", va="center", fontsize=size)

for byte in range(shown // 2):
    ink = inks[byte // per_block]
    box(2 * byte, 3.9, 1, "high", COLOURS["grey"], size=9)
    box(2 * byte + 1, 3.9, 1, "low", COLOURS["grey"], size=9)
    ax.add_patch(Rectangle((2 * byte + 0.02, 3.86), 1.96, 0.7, fill=False, edgecolor=COLOURS["black"], linewidth=1))
    ax.text(2 * byte + 1, 4.75, f"byte {byte}", ha="center", fontsize=10)
    box(2 * byte + 0.3, 2.6, 1.4, f"thread {byte % per_block}", ink, 0.55)
    ax.plot([2 * byte + 1] * 2, [3.26, 3.84], color=ink, linewidth=1.5)
    for half in (0, 1):
        ax.plot([2 * byte + 1, 2 * byte + half + 0.5], [2.58, 1.97], color=ink, linewidth=1.5)
        box(2 * byte + half, 1.3, 1, f"{2 * byte + half}", ink)
for block in (0, 1):
    x0 = 2 * per_block * block
    ax.plot([x0 + 0.1, x0 + 2 * per_block - 0.1], [2.42] * 2, color=inks[block], linewidth=3, zorder=0)
    ax.text(x0 + 2 * per_block + 0.3 if block else -0.3, 2.9, f"block {block}\nof threads", va="center",
            ha="left" if block else "right", fontsize=10, color=inks[block])
for scale in range(shown // per_scale):
    box(per_scale * scale, 0.3, per_scale, f"scale {scale}", COLOURS["green"], 0.35)
ax.text(-0.3, 4.2, "packed", ha="right", va="center", fontsize=10)
ax.text(-0.3, 1.6, "out, number", ha="right", va="center", fontsize=10)
ax.text(-0.3, 0.6, "scales", ha="right", va="center", fontsize=10)
ax.set(xlim=(-2.4, 14.3), ylim=(0.1, 5.2))
print("levels:", {code: round(level, 3) for code, level in enumerate(LEVEL)})
figure

# %% [markdown]
# ## By hand
#
# Two bytes, `0xF0` and `0x7A`. In hexadecimal each digit is one code. Let two numbers share a scale, and let the scales be 2 and 10.
#
# 1. Which four codes are these, in the order of the numbers?
# 2. Which levels? The first level is number 0; they are printed above the picture.
# 3. Which scale belongs to each number? Write down the four results, then run the cell.

# %%
by_hand = dequantize_loop([0xF0, 0x7A], [2.0, 10.0], 4, block_size=2)
print("codes: ", [0xF0 >> 4, 0xF0 & 15, 0x7A >> 4, 0x7A & 15])
print("result:", [round(number, 3) for number in by_hand])
assert by_hand[:3] == [2.0, -2.0, 0.0] and by_hand[3] == LEVEL[10] * 10.0

# %% [markdown]
# ## Build it
#
# ### Step 1: threads, in Python
#
# Before any CUDA, build the machine itself, small. `launch` runs a kernel for every thread of every block. A thread is told who it is. Where the kernel says `yield`, it stands at a barrier: it goes on when all threads of its block are there. In which **order** the threads run, nobody promises. So `order` may be anything, and a right kernel gives the same result for all.

# %%
def launch(kernel, grid: int, block: int, *args, order=list) -> None:
    """Run kernel(me, *args) for each thread of each block. A `yield` in the kernel is a barrier."""
    for b in range(grid):
        shared = {}                                            # memory of this block of threads
        everyone = [SimpleNamespace(block=b, thread=t, block_dim=block, grid_dim=grid, shared=shared) for t in range(block)]
        threads = [kernel(me, *args) for me in order(everyone)]
        threads = [t for t in threads if inspect.isgenerator(t)]    # a kernel without a barrier has run already
        while threads:
            waiting = [t for t in threads if next(t, "left") != "left"]     # each runs to its next barrier
            if waiting and len(waiting) < len(threads):
                raise RuntimeError(f"{len(waiting)} threads wait at a barrier, {len(threads) - len(waiting)} have left")
            threads = waiting

def shuffled(things):
    return random.sample(list(things), len(things))

ORDERS = {"rising": list, "falling": lambda things: list(things)[::-1], "shuffled": shuffled}

# %%
def dequantize_thread(me, packed, scales, out, n, block_size):
    byte = me.block * me.block_dim + me.thread                 # this thread's byte,
    i = 2 * byte                                               # and the first of its two numbers
    if i >= n:
        return
    out[i] = LEVEL[packed[byte] >> 4] * scales[i // block_size]
    if i + 1 < n:                                              # an odd n leaves the last half unused
        out[i + 1] = LEVEL[packed[byte] & 15] * scales[i // block_size]

n, block = 1001, 32
packed, scales = q.packed[: (n + 1) // 2].tolist(), q.absmax.tolist()
grid = math.ceil(len(packed) / block)                          # enough threads for all bytes
for name, order in ORDERS.items():
    out = [math.nan] * n
    launch(dequantize_thread, grid, block, packed, scales, out, n, 64, order=order)
    assert out == by_loop[:n]
    print(f"{name:9} {grid} blocks of {block} threads for {len(packed)} bytes: {grid * block - len(packed)} threads had nothing to do")

# %% [markdown]
# ### Exercise 1: which numbers are mine? · 5 minutes · easy
#
# Above, each thread did one byte, so the grid had to fit the data. Usually you write it the other way: any grid, and each thread goes on in **strides** as long as the whole grid. A thread begins at its own number in the grid, counted over all blocks. Which elements below `n` does it work on?

# %%
from minipeft.checks import ch08_cuda_kernel as check

def elements_of_thread(block: int, thread: int, block_dim: int, grid_dim: int, n: int) -> list[int]:
    """The elements of one thread, in a grid of grid_dim blocks of block_dim threads each."""
    ### BEGIN SOLUTION
    return list(range(block * block_dim + thread, n, block_dim * grid_dim))
    ### END SOLUTION

check.elements_of_thread(elements_of_thread)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Before block `b` stand `b` whole blocks, of `block_dim` threads each. How many threads has the whole grid? `range(first, n, step)` does the rest.
#
# </details>

# %% [markdown]
# ### Step 2: a barrier, in Python
#
# Quantising needs the largest $|x|$ of a block of numbers: its scale. One number depends on all others, so threads must talk. Each puts its number into shared memory. Then half of the threads take the larger of two, then a quarter, and so on. After $\log_2$ of the block's size rounds, the maximum stands at place 0.
#
# The barrier makes it right: nobody may read what is not written yet. The same kernel without it is right in one order of the threads and wrong in another. That is a **race**. On a GPU you do not choose the order, and it may be right a thousand times.

# %%
def absmax_thread(me, x, scales):
    kept, t = me.shared, me.thread
    kept[t] = abs(x[me.block * me.block_dim + t])
    yield                                                      # the barrier
    half = me.block_dim // 2
    while half:
        if t < half:
            kept[t] = max(kept[t], kept.get(t + half, 0))      # a GPU would find there what was left from before
        yield
        half //= 2
    if t == 0:
        scales[me.block] = kept[0]

def without_barriers(me, *args):
    for _ in absmax_thread(me, *args):                         # goes straight through
        pass

x = W.view(-1)[: 64 * 8].tolist()
right = [max(map(abs, x[start : start + 64])) for start in range(0, len(x), 64)]

# %%
def wrong_scales(kernel, order) -> int:
    scales = [math.nan] * 8
    launch(kernel, 8, 64, x, scales, order=order)
    return sum(a != b for a, b in zip(scales, right))

found = [{"order of the threads": name, "wrong with barriers": wrong_scales(absmax_thread, order),
          "wrong without": wrong_scales(without_barriers, order)} for name, order in ORDERS.items()]
assert not any(row["wrong with barriers"] for row in found)
assert any(row["wrong without"] for row in found) and not all(row["wrong without"] for row in found)
lab.table(found, caption="of 8 scales")

# %% [markdown]
# ### Step 3: the same words in CUDA
#
# | here | CUDA | |
# |---|---|---|
# | `me.thread` | `threadIdx.x` | my number in my block |
# | `me.block` | `blockIdx.x` | my block's number |
# | `me.block_dim`, `me.grid_dim` | `blockDim.x`, `gridDim.x` | threads in a block, blocks in the grid |
# | `def kernel(me, …)` | `__global__ void kernel(…)` | the text that all threads run |
# | `me.shared` | `__shared__ float kept[64];` | memory of a block of threads |
# | `yield` | `__syncthreads();` | the barrier |
# | `launch(kernel, grid, block, …)` | `kernel<<<grid, block>>>(…)` | start it |
# | a list | `float*`, `const float*` | an address; nobody knows its length |
#
# A little C++: a variable is declared with its type, `int i = 3;`. Between whole numbers `/` cuts off, like Python's `//`. `a ? b : c` is Python's `b if a else c`. `i < n && j < n` means *and*. A `uint8_t` is a byte, from 0 to 255.
#
# The last line of the table is the one that hurts. Nothing stops a thread from writing behind the end of an array. So every kernel asks: is my number below `n`?
#
# The next two cells run CUDA. `emulate` takes the text, the name, the grid, the block and the arguments. The emulator runs all threads in several orders. It stops at a race, an access outside, a barrier that not all reach, or a result that depends on the order, and `emulate` returns what it says: an empty text if it found nothing. The first run compiles the emulator, which takes a while.

# %%
NO_EMULATOR = check.no_emulator()
if NO_EMULATOR:
    print(f"There is no emulator here ({NO_EMULATOR}). Cells that need it say so; your kernels are not checked.")

def emulate(source, kernel: str, grid: int, block: int, args: list) -> str:
    """Run a kernel in the emulator; what the emulator says against it, or ""."""
    if NO_EMULATOR:
        return "skipped: no emulator"
    try:
        program = source if isinstance(source, emulator.Program) else emulator.Program(source, [kernel])
        program.run(kernel, grid, block, args)
    except emulator.EmulatorError as error:
        return str(error)
    return ""

SQUARE = """
__global__ void square(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        y[i] = x[i] * x[i];
}
"""

# %%
x = torch.randn(1000)
y = torch.full_like(x, math.nan)
before = hashlib.sha256(x.numpy()).hexdigest()
says = emulate(SQUARE, "square", 4, 256, [x, y, 1000])         # square<<<4, 256>>>(x, y, 1000)

if not NO_EMULATOR:
    assert says == "" and torch.equal(y, x * x)
    assert hashlib.sha256(x.numpy()).hexdigest() == before
print(says or f"{4 * 256:,} threads, {len(emulator.ORDERS)} orders ({', '.join(emulator.ORDERS)}): y = x², to the bit")

# %% [markdown]
# ### Exercise 2: your first kernel · 10 minutes · easy
#
# Write a **body**, the text between the braces. The check puts it into this kernel and runs it:
#
# ```cpp
# __global__ void scale(const float* x, float* y, float a, int n)
# ```
#
# `y[i] = a * x[i]` for every `i` below `n`, whatever the grid is: too few threads for the data, or too many. So it needs the strides of exercise 1.

# %%
def scale_body() -> str:
    """The body of `scale`, in CUDA."""
    ### BEGIN SOLUTION
    return """
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        y[i] = a * x[i];
    """
    ### END SOLUTION

check.scale_body(scale_body)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Return a text: `return """ … """`. C++ writes a loop as `for (int i = first; i < n; i += step)`. The first and the step are those of exercise 1, with CUDA's words.
#
# </details>

# %% [markdown]
# ### Exercise 3: the largest of a block, with a barrier · 20 minutes · hard
#
# The kernel of step 2, now in CUDA:
#
# ```cpp
# __global__ void absmax(const float* x, float* scales, int n)
# ```
#
# Block `b` of threads looks at `blockDim.x` numbers in a row, a thread a number, and puts their largest absolute value into `scales[b]`. `blockDim.x` is a power of two, at most 256. The last block may have fewer numbers than threads. Every thread must come to every barrier. A barrier inside an `if` that is not the same for the whole block is undefined, and a GPU may answer by hanging. A `return` before one is no better a habit: newer GPUs (since Volta) do not wait for a thread that has left, but what it should have written is missing. The emulator refuses both.

# %%
def absmax_body() -> str:
    """The body of `absmax`, in CUDA."""
    ### BEGIN SOLUTION
    return """
    __shared__ float kept[256];
    int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    kept[t] = i < n ? fabsf(x[i]) : 0.0f;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (t < half) kept[t] = fmaxf(kept[t], kept[t + half]);
        __syncthreads();
    }
    if (t == 0) scales[blockIdx.x] = kept[0];
    """
    ### END SOLUTION

check.absmax_body(absmax_body)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# `__shared__ float kept[256];` is there for the whole block. `fabsf` and `fmaxf` are the absolute value and the larger of two. A thread without a number puts 0 into its place: the absolute value of no number is smaller. The barrier stands inside the loop, but outside the `if`.
#
# </details>

# %% [markdown]
# ### Exercise 4: decode NF4 · 15 minutes · medium
#
# ```cpp
# __global__ void dequantize(const uint8_t* packed, const float* scales, const float* level,
#                            float* out, int n, int block_size)
# ```
#
# `packed` has ⌈n/2⌉ bytes, `scales` one number for each `block_size` numbers, `level` the 16 levels. `block_size` is even. There is at least one thread for each byte, perhaps more. Mind an odd `n`: half of the last byte is unused.

# %%
def dequantize_body() -> str:
    """The body of `dequantize`, in CUDA."""
    ### BEGIN SOLUTION
    return """
    int byte = blockIdx.x * blockDim.x + threadIdx.x, i = 2 * byte;
    if (i >= n) return;
    float scale = scales[i / block_size];          // of both numbers: block_size is even
    out[i] = level[packed[byte] >> 4] * scale;
    if (i + 1 < n) out[i + 1] = level[packed[byte] & 15] * scale;
    """
    ### END SOLUTION

check.dequantize_body(dequantize_body)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# A thread's byte is not its number's place: byte `b` holds numbers `2b` and `2b + 1`. `byte >> 4` is the high half, `byte & 15` the low one. The scale goes by the *number's* place.
#
# </details>

# %% [markdown]
# ### Step 4: five versions
#
# This is how the package does it. One file, five versions, each with the idea that should make it faster on a GPU. The text below is cut out of that file as it stands. You need not be able to write all of it. These words help to read it:
#
# - `template <class T>`: the text is compiled once for each type `T` of the results. `put` rounds to `T`.
# - `LEVEL` are the 16 levels, in *constant memory*: small, read only, the same for all threads. `SCALES` stands for the arguments of the scales, float32 or double-quantised, and `THE_SCALES` passes them on; `scale_of` gives the scale of a block of numbers.
# - `int64_t` is a whole number of 64 bits. `Sixteen<T>` is 16 bytes that are read or written by one instruction. `reinterpret_cast` takes an address for that of another type.
# - `#pragma unroll` asks the compiler to write a loop out. `i >> bits` divides by a power of two.
# - `constexpr` is a number that the compiler knows. `continue` goes on with the loop's next round, as in Python.
#
# Then all five run in the emulator, at awkward sizes to float32, and at the last of these to float16. Every bit must be the package's.

# %%
FILE = kernels.source_folder() / "cuda" / "dequantize.cu"
text = FILE.read_text()

def version(name: str) -> str:
    """One kernel of the file, with the line above it."""
    return re.search(rf"((?://[^\n]*\n)?template <class T>\n__global__ void {name}\(.*?\n}}\n)", text, re.DOTALL)[1]

print(re.match(r"(//.*\n)+", text)[0])
for v in (1, 2, 3, 4, 5):
    print(version(f"dequantize_{v}"))

# %%
sizes = mp.pick(smoke=[1, 65, 1001], cpu=[1, 63, 64, 65, 4095, 4096, 30_001], gpu=[1, 63, 64, 65, 4095, 4096, 30_001])
EACH = {1: 1, 2: 2, 3: 2, 4: 32, 5: 32}                               # numbers a thread

NAMES = {(v, dtype): f"dequantize_{v}<{'float' if dtype == torch.float32 else '__half'}>"
         for v in EACH for dtype in (torch.float32, torch.float16)}
PROGRAM = None if NO_EMULATOR else emulator.Program(FILE, list(NAMES.values()))     # all of them, compiled at once

def try_version(v: int, n: int, dtype=torch.float32) -> str:
    """What the emulator, or the comparison with the package, says against version v; "" for nothing."""
    part = mp.nf4.quantize(W.view(-1)[:n].clone())
    out = torch.full((n,), math.nan, dtype=dtype)
    args = [part.packed, part.absmax, None, None, None, out, n, 64]
    says = emulate(PROGRAM, NAMES[v, dtype], math.ceil(n / (256 * EACH[v])), 256, args)
    same = torch.equal(out, mp.nf4.dequantize(part, dtype=dtype))
    return says or ("" if same else "other results than the package's")

emulated = {f"version {v}": {str(n): try_version(v, n) for n in sizes} for v in EACH}
halves = {f"version {v}, float16": {str(n): try_version(v, n, torch.float16) for n in sizes[-1:]} for v in EACH}
complaints = {says for row in [*emulated.values(), *halves.values()] for says in row.values()}
assert NO_EMULATOR or complaints == {""}
lab.table([{"n": name} | {n: says or "equal" for n, says in row.items()} for name, row in (emulated | halves).items()])

# %% [markdown]
# ## The same as the package
#
# `mp.nf4.dequantize` is the readable form, in PyTorch: one look-up gives both numbers of a byte. Where the compiled kernels are built, it calls them instead. Three ways, one result: the loop of the beginning, the package, and `bitsandbytes`, whose layout this is.

# %%
print(inspect.getsource(mp.nf4.dequantize))
print("loop = package:", torch.equal(torch.tensor(by_loop), mp.nf4.dequantize(q).view(-1)[:few]))
try:
    import bitsandbytes
    from bitsandbytes import functional as bnb
    with torch.compiler.set_stance("force_eager"):               # it would compile for every new size
        theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
        decoded = bnb.dequantize_4bit(theirs, state)
    assert torch.equal(theirs.view(-1), q.packed) and torch.equal(decoded, mp.nf4.dequantize(q))
    print(f"package = bitsandbytes {bitsandbytes.__version__}: codes and numbers, to the bit")
except ImportError:
    print("bitsandbytes is not installed here, so that comparison is skipped (pip install bitsandbytes)")

# %% [markdown]
# ## Nothing changed, and the bytes are counted
#
# A kernel may be fast; it may not touch the weights. In the emulator, above, the input kept its hash. At the end of this chapter you compare the hash of the codes and scales. Before you measure speed, count what must be moved. No kernel can do with less than this: read each code and each scale once, write each number once.
#
# ### Exercise 5: the least traffic · 5 minutes · easy
#
# For `n` numbers in blocks of `block_size`, each with a float32 scale. Mind an odd `n`, and a last block that is not full.

# %%
def least_bytes(n: int, block_size: int, out_bytes: int) -> int:
    """Bytes to read and write, at least, to dequantise n numbers of NF4 to numbers of out_bytes bytes."""
    ### BEGIN SOLUTION
    codes = (n + 1) // 2
    scales = 4 * ((n + block_size - 1) // block_size)
    return codes + scales + n * out_bytes
    ### END SOLUTION

check.least_bytes(least_bytes)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Two codes fill a byte, and a byte that is only half used is read all the same. Each block of numbers has a scale of four bytes, the last block too, even if it is not full. In whole numbers: `(a + b - 1) // b` rounds up.
#
# </details>

# %%
def traffic(n: int, out_bytes: int) -> int:
    """The same, for blocks of 64: packed and scales as they lie in memory, and the result."""
    return (n + 1) // 2 + 4 * -(-n // 64) + n * out_bytes

assert q.nbytes == traffic(W.numel(), 0)                       # codes and scales alone: what is stored
digest = hashlib.sha256(q.packed.numpy().tobytes() + q.absmax.numpy().tobytes()).hexdigest()[:16]
print("codes and scales:", digest)
lab.table([{"to": name, "bytes a number": traffic(64, size) / 64, "of it written": size / (traffic(64, size) / 64)}
           for name, size in (("float32", 4), ("16 bits", 2))])

# %% [markdown]
# ## The measurement
#
# Bytes alone do not tell you what is fast. A **copy** gives you a mark: it reads and writes, and computes nothing. So each way is told in GB/s of the least traffic, and as a share of the copy's. (At the same GB/s decoding takes *less* time than the copy: it reads fewer bytes.)
#
# The copy is a mark, not a limit. On a processor an ordinary store first fetches the line that it writes to, and nobody counts these bytes. If a result is larger than the caches, the AVX2 and AVX-512 forms write past them and save that fetch. The few bytes that they read may also lie in a cache. So more than 100 percent is possible. PyTorch's readable form asks for new memory each time; the compiled forms write into memory that is there.
#
# First the kernels are compiled, if they are not yet: about a minute, once. (In the smoke profile they are used only if they are there.) On a processor they come in up to three forms: plain C++, AVX2 and AVX-512. After each timing the result is compared once more: a fast wrong kernel is worth nothing.
#
# On a GPU, the five versions are then measured one by one. `nvcc`, CUDA's compiler, makes a library of the very text that you read above, and of a few lines that start a version. Without a GPU that cell says so.

# %%
device = mp.profile().device
side = mp.pick(smoke=512, cpu=4096, gpu=8192)
n, dtype = side * side, torch.float16 if device.type == "cuda" else torch.float32
size = torch.empty((), dtype=dtype).element_size()
big = mp.nf4.quantize(torch.randn(side, side, device=device))
out, result = torch.empty(2, n, dtype=dtype, device=device)    # one is written, one is copied from

def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()

def seconds(run, repeats: int = mp.pick(smoke=3, cpu=15, gpu=50)) -> list[float]:
    """Seconds of `run()`, sorted, after one run to warm up."""
    taken = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])

# %%
from unittest import mock

compiled = kernels.available() if mp.profile().name == "smoke" else kernels.build()
with mock.patch.object(nf4, "compiled", lambda *_: None):      # the readable form, kernels or not
    result.copy_(mp.nf4.dequantize(big, dtype=dtype).view(-1))
    timed = {"PyTorch, readable": seconds(lambda: mp.nf4.dequantize(big, dtype=dtype))}
copies = seconds(lambda: out.copy_(result))
forms = ([None] if device.type == "cuda" else kernels.paths()) if compiled else []
for form in forms[::-1]:                                       # the best one last, and it stays chosen
    if form:
        kernels.path(form)
    name = f"compiled, {form}" if form else "compiled, CUDA"
    def run():
        kernels.dequantize(big.packed, big.absmax, n, out=out)
    timed[name] = seconds(run)
    out.fill_(math.nan)                                        # and once more, to see that it still does it all
    run()
    assert torch.equal(out, result)
if not compiled:
    print("The compiled kernels are not here, so only PyTorch is measured.")

# %% tags=["figure"]
START = """
#include "dequantize.cu"
extern "C" int start(int version, const uint8_t* packed, const float* scales, __half* out, int64_t n) {
    int64_t each = version == 1 ? 1 : version < 4 ? 2 : 32;        // numbers a thread
    auto kernel = version == 1 ? dequantize_1<__half> : version == 2 ? dequantize_2<__half>
                : version == 3 ? dequantize_3<__half> : version == 4 ? dequantize_4<__half> : dequantize_5<__half>;
    kernel<<<(n + 256 * each - 1) / (256 * each), 256>>>(packed, scales, nullptr, nullptr, nullptr, out, n, 64);
    return cudaGetLastError();
}
"""

def compile_versions(folder: str):
    """The function `start`, compiled for this GPU."""
    import ctypes
    from pathlib import Path

    source, library = Path(folder) / "start.cu", Path(folder) / "start.so"
    source.write_text(START)
    major, minor = torch.cuda.get_device_capability()
    subprocess.run([kernels.cuda_home() / "bin" / "nvcc", "-O3", "-std=c++20", "--fmad=false", f"-arch=sm_{major}{minor}", "-shared",
                    "-Xcompiler", "-fPIC", "-I", FILE.parent, source, "-o", library], check=True)
    start = ctypes.CDLL(str(library)).start
    start.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int64]
    return start

if device.type != "cuda" or kernels.cuda_home() is None:
    print("no GPU here, or no nvcc: the versions have run in the emulator only, which says nothing about their speed")
else:
    with tempfile.TemporaryDirectory() as folder:
        start = compile_versions(folder)
        for v in EACH:
            def run():
                assert start(v, big.packed.data_ptr(), big.absmax.data_ptr(), out.data_ptr(), n) == 0
            timed[f"CUDA, version {v}"] = seconds(run)
            out.fill_(math.nan)
            run()
            assert torch.equal(out, result)

# %%
copy_speed = 2 * n * size / statistics.median(copies) / 1e9    # a copy reads and writes each number
loop_speed = traffic(n, size) / (loop_ns * n)                  # bytes a ns are GB a s

rows = [{"way": "a copy of the result", "ms": 1e3 * statistics.median(copies), "GB/s": copy_speed, "percent of the copy": 100.0}]
for way, taken in timed.items():
    speed = traffic(n, size) / statistics.median(taken) / 1e9
    rows.append({"way": way, "ms": 1e3 * statistics.median(taken), "GB/s": speed, "percent of the copy": 100 * speed / copy_speed,
                 "fastest to slowest, ms": f"{1e3 * taken[0]:.3g} to {1e3 * taken[-1]:.3g}"})
rows.append({"way": "Python's loop (computed from a few)", "ms": loop_ns * n / 1e6, "GB/s": loop_speed,
             "percent of the copy": 100 * loop_speed / copy_speed})
best = max((row for row in rows[1:] if "compiled" in row["way"]), key=lambda row: row["GB/s"], default=None)
loop_times_copy = loop_ns * n / 1e9 / statistics.median(copies)
print(f"{side} × {side} numbers to {dtype}, on {lab.machine().summary}")
display(lab.table(rows))

told = json.loads((data_folder() / "results" / "kernels_gpu.json").read_text())
copied = next(row for row in told["rows"] if row["what"] == "copy of the result")
print(f"{told['side']} × {told['side']} numbers of 16 bits, on {told['device']}, {told['date']}; a copy of the result: {copied['ms']} ms, {copied['GB/s']:,.0f} GB/s")
for what in ("dequantise", "quantise"):
    mine = [row for row in told["rows"] if row["what"] == what and row["way"].startswith("version")]
    display(lab.table([{what: row["way"], "ms": row["ms"], "GB/s": row["GB/s"], "times as fast as the one before": before["ms"] / row["ms"]}
                       for row, before in zip(mine, [mine[0], *mine])]))

# %% [markdown]
# ### What a GPU said
#
# Perhaps you have no GPU here. The last two tables are from one: the package's benchmark, `tests/bench_gpu.py`, version by version, with the cache overwritten before each run. Beside the decoding you read above stands quantising; its five versions are in `kernels/cuda/quantize.cu`. The line above these tables has the copy on that GPU, which is the mark for decoding. Two steps are worth a second look. They teach what the emulator cannot.
#
# - **Decoding, 4 to 5.** Version 4 *reads* best: 16 bytes a thread. But then each thread writes 32 numbers in a row. With 16-bit results that is four stores of 16 bytes, and in one such store the threads of a *warp* (32 that run together) write to 32 places, 64 bytes apart. In version 5 a thread reads 4 bytes at a time, 8 numbers, and writes them with one store of 16 bytes, right beside its neighbours': 512 bytes in a row for a warp. It does four such parts, and reads all four before it uses the first. Its two other changes: while one read is on its way the next has begun, and a shift takes the place of a division. The table does not tell the three apart.
# - **Quantising, 4 to 5.** The same text but for one thing: where the 15 thresholds between the levels come from. Each thread halves its way to a code in four steps, so in the last step the threads of a warp may ask for 8 different thresholds at once. In version 4 each is computed from two levels in constant memory, which hands out one address at a time. In version 5 the thresholds are computed once for each block of threads and kept in shared memory, which serves different addresses together.
#
# ### What bounds it
#
# Two things can hold a kernel up: moving bytes, or computing. Which one, its **intensity** tells, the operations for each byte that it must move:
#
# $$\text{operations a second} \;\le\; \min\,(\,\text{peak},\;\; \text{bytes a second} \times \text{operations a byte}\,)$$
#
# Drawn with both axes logarithmic, this is a slope that ends in a flat: the **roofline** (Williams et al. 2009). Both are measured here, so they are marks, and a point may lie above them. The slope is the copy's bandwidth; the flat is what this machine reaches in a large product of float32 (on a GPU, float16) matrices. Decoding does one multiplication for each number, so it stands far to the left, where the slope is what counts. A product of $r$ rows with the matrix does $2r$ operations for each weight. With $r$ it moves to the right: the same decoding, used more often.

# %%
def rate(run, operations: float, bytes_: int) -> dict:
    """Where a way stands on the roofline: operations a byte, and billions of them a second."""
    return {"operations a byte": operations / bytes_, "G/s": operations / statistics.median(seconds(run)) / 1e9}

edge = mp.pick(smoke=256, cpu=1024, gpu=8192)
square = torch.randn(edge, edge, dtype=dtype, device=device)
peak = rate(lambda: square @ square, 2 * edge**3, 3 * edge**2 * size)["G/s"]

points, direct = {}, kernels.gemm if compiled else None
full = result.view(side, side)
for r in mp.pick(smoke=[1, 8], cpu=[1, 2, 4, 8, 16, 32, 64, 256], gpu=[1, 2, 4, 8, 16, 32, 64, 256]):
    x = torch.randn(r, side, dtype=dtype, device=device)
    work, ends = 2 * r * n, 2 * r * side * size                # x is read, the result written
    points["not quantised", r] = rate(lambda: x @ full.T, work, n * size + ends)
    if direct:
        points["NF4", r] = rate(lambda: direct(x, big.packed, big.absmax, (side, side)), work, traffic(n, 0) + ends)
        error = (direct(x, big.packed, big.absmax, (side, side)).float() - x.float() @ full.float().T).abs().max()
        assert error < 0.01 * x.float().norm(dim=1).max() * full.float().norm(dim=1).max()

# %% tags=["figure"]
figure, (left, right) = new_figure(2, width=11.2, height=4.1)
ordered = sorted(rows, key=lambda row: row["GB/s"])
colour = {True: COLOURS["grey"], False: COLOURS["blue"]}
names = [row["way"].split(" (")[0] for row in ordered]
left.barh(names, [row["GB/s"] for row in ordered], color=[colour["copy" in row["way"]] for row in ordered], height=0.62)
for place, row in enumerate(ordered):
    left.annotate(f"{row['GB/s']:.3g}", (row["GB/s"], place), xytext=(5, 0), textcoords="offset points", va="center")
left.set(xscale="log", xlabel="GB/s of the bytes that must be moved", xlim=(ordered[0]["GB/s"] / 2, copy_speed * 8))
left.grid(axis="y", visible=False)

intensities = [point["operations a byte"] for point in points.values()] + [1 / (traffic(64, size) / 64)]
ends = [min(intensities) / 2, max(*intensities, 2 * peak / copy_speed) * 2]
knee = peak / copy_speed
right.plot([ends[0], knee, ends[1]], [ends[0] * copy_speed, peak, peak], color=COLOURS["black"], label="roof: copy, then peak")
for way, ink, mark in (("not quantised", "vermilion", "s"), ("NF4", "blue", "o")):
    mine = [(key[1], point) for key, point in points.items() if key[0] == way]
    if not mine:
        continue
    xs, ys = [point["operations a byte"] for _, point in mine], [point["G/s"] for _, point in mine]
    right.plot(xs, ys, mark + "-", color=COLOURS[ink], linewidth=1, label=f"{way}: product of r rows")
    for r, at, offset in ((mine[0][0], 0, (4, -13)), (mine[-1][0], -1, (-6, -15))):
        right.annotate(f"r = {r}", (xs[at], ys[at]), xytext=offset, textcoords="offset points", color=COLOURS[ink], fontsize=9)
if best:
    decode = 1 / (traffic(64, size) / 64)
    right.plot(decode, decode * best["GB/s"], "D", color=COLOURS["green"], label="decoding alone")
right.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="billion operations a second", xlim=ends)
for axis, (low, high) in ((right.xaxis, right.get_xlim()), (right.yaxis, right.get_ylim())):
    axis.set_ticks([tick for k in range(-3, 7) for tick in (10.0**k, 3 * 10.0**k) if low <= tick <= high])
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
right.legend(fontsize=9, loc="lower right")
above = [f"{way}, r = {r}" for (way, r), point in points.items() if point["G/s"] > 1.02 * copy_speed * point["operations a byte"]]
print(f"the slope: {copy_speed:.3g} GB/s; the flat: {peak:,.4g} billion operations a second; they meet at {knee:.3g} operations a byte")
above += ["decoding alone"] * bool(best and best["percent of the copy"] > 102)
print("above the slope (bytes from a cache, or fewer uncounted bytes than a copy moves):", ", ".join(above) or "none")
if direct:
    for r in sorted({r for _, r in points}):
        times = points["NF4", r]["G/s"] / points["not quantised", r]["G/s"]
        print(f"r = {r:3}: the product from four bits does {times:.2f} times as much a second as the one that is not quantised")
figure

# %% [markdown]
# ### Neighbours read neighbours
#
# Why five versions, if all move the same bytes? A GPU runs threads in **warps** of 32 that read together. Memory answers in sectors of 32 bytes, whole or not at all. So it matters which bytes a warp asks for in *one* instruction. The picture shows the first read of `packed` for three kernels: each row is a thread, dark the bytes that it wants, light the sectors that have to come. The titles count both. The last panel is the first version of the quantising kernel, in which each thread looks for the maximum of its own 64 numbers.

# %% tags=["figure"]
reads = {  # title -> where thread t reads, and how many bytes
    "version 1: a byte,\ntwice": (lambda t: t // 2, 1),
    "versions 2 and 3: a byte\na thread": (lambda t: t, 1),
    "version 4: 16 bytes\na thread": (lambda t: 16 * t, 16),
    "quantising, version 1:\n64 numbers a thread": (lambda t: 256 * t, 4),
}

def sectors(where, width: int) -> set[int]:
    """The sectors of 32 bytes that one instruction of a warp touches."""
    return {(where(t) + byte) // 32 for t in range(32) for byte in range(width)}

figure, panels = new_figure(len(reads), width=2.8 * len(reads), height=3.5)
for ax, (title, (where, width)) in zip(panels, reads.items()):
    touched = sectors(where, width)
    asked = len({where(t) + byte for t in range(32) for byte in range(width)})
    span = where(31) + width
    for sector in touched:
        ax.axvspan(32 * sector, 32 * sector + 32, color=COLOURS["sky"], alpha=0.3, linewidth=0)
    ax.barh(range(32), [max(width, span / 60)] * 32, left=[where(t) for t in range(32)], height=0.85, color=COLOURS["blue"])
    ax.set_title(f"{title}\n{asked} of {32 * len(touched):,} bytes wanted", fontsize=10)
    ax.set(xlabel="byte", ylim=(31.7, -0.7), xlim=(0, max(32, span) * 1.02))
    ax.grid(visible=False)
panels[0].set_ylabel("thread of the warp")
display(figure)

apart = {}
x = torch.randn(mp.pick(smoke=2**18, cpu=2**23, gpu=2**26), device=device)
gathered = torch.empty_like(x)
for step in (1, 16, 64, 1024):                                 # all of x, one read and the next `step` numbers apart
    order = torch.arange(len(x), device=device).view(-1, step).T.reshape(-1)
    apart[step] = statistics.median(seconds(lambda: torch.index_select(x, 0, order, out=gathered)))
print(f"on {device}, the same {len(x):,} numbers read in another order:")
lab.table([{"one read and the next are apart, numbers": step, "ms": 1e3 * taken, "times as long as for neighbours": taken / apart[1]}
           for step, taken in apart.items()])

# %% [markdown]
# A processor's memory answers in lines too, of 64 bytes on most, so you can feel the same here without a GPU: the table reads the same numbers in different orders. (It reads the order itself as well, always in a row; that share of the time stays.)
#
# In version 4 one instruction brings many times the bytes of version 1, and all of them are wanted. The pictures show reading only. For 16-bit results, draw one *store* in the same way: put `(lambda t: 64 * t, 16)` for version 4 and `(lambda t: 16 * t, 16)` for version 5 among the `reads`. Of the sectors that version 4 touches, one store fills half. What that costs, only a GPU can tell: see the tables from one above.
#
# ## Break it
#
# A small kernel with a barrier: each block of 64 threads turns its 64 numbers round. Then it is broken in four ways that all compile. Some may still give the right result on a GPU, on a good day. What does the emulator say?

# %%
TURN = """
__global__ void turn(const float* x, float* y, int n) {
    __shared__ float kept[64];
    int t = threadIdx.x, i = blockIdx.x * 64 + t;
    kept[t] = i < n ? x[i] : 0.0f;
    __syncthreads();
    if (i < n) y[i] = kept[63 - t];
}
"""
FAULTS = {
    "none": ("", ""), "the barrier is missing": ("    __syncthreads();\n", ""),
    "it writes without asking for n": ("if (i < n) y", "y"),
    "threads without work leave before the barrier": ("    kept[t] = i < n ? x[i] : 0.0f;", "    if (i >= n) return;\n    kept[t] = x[i];"),
    "all blocks write to the same place": ("y[i]", "y[t]"),
}
reports, full_blocks = ({fault: emulate(TURN.replace(*change), "turn", 2, 64, [torch.randn(k), torch.zeros(k), k])
                         for fault, change in FAULTS.items()} for k in (100, 128))
print("\n".join(f"{fault}:\n    {says or 'nothing'}\n" for fault, says in reports.items()))
print("nothing is said against these at 128 numbers:", [fault for fault, says in full_blocks.items() if not says])
assert NO_EMULATOR or [fault for fault, says in reports.items() if not says] == ["none"]

# %% [markdown]
# The sizes matter as much as the checks. At 100 numbers the last block is not full. At 128 it is, and the last line lists what then goes unnoticed (beside `none`, the kernel without a fault). That is why a kernel is tried at 1, 63, 64 and 65, and not only at the sizes that a model has.
#
# ## Exercise 6: find the bug · 10 minutes · medium
#
# Two real ones. In 2026 the kernels that `bitsandbytes` has in Triton, a language for GPU kernels inside Python, were found to [store the scales of a whole group of blocks](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2042), eight at a time, also where fewer were left; and to [read a full last block](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1884) where the tensor ends in the middle of it, so that its scale came from whatever lay behind. Below are both mistakes in our words. Eight threads are a group; each looks for the scale of one block of `block_size` numbers. `scales` has ⌈n/`block_size`⌉ entries. The cell shows what the emulator says. Write a body that is right for every `n`.

# %%
AS_FOUND = """
    int b = blockIdx.x * 8 + threadIdx.x;
    float largest = 0;
    for (int i = b * block_size; i < (b + 1) * block_size; ++i)
        largest = fmaxf(largest, fabsf(x[i]));
    scales[b] = largest;
"""
for length, blocks in ((512, 8), (640, 10), (453, 8)):
    args = [torch.randn(length), torch.zeros(blocks), length, 64]
    says = emulate(check.kernel_text("block_scales", AS_FOUND), "block_scales", math.ceil(blocks / 8), 8, args)
    print(f"{length} numbers, {blocks} scales: {says or 'no complaint'}")

def block_scales_body() -> str:
    """The body of  block_scales(const float* x, float* scales, int n, int block_size)  in CUDA."""
    ### BEGIN SOLUTION
    return """
    int b = blockIdx.x * 8 + threadIdx.x, first = b * block_size;
    if (first >= n) return;                        // no such block; there is no barrier to miss
    float largest = 0;
    for (int i = first; i < min(n, first + block_size); ++i)
        largest = fmaxf(largest, fabsf(x[i]));
    scales[b] = largest;
    """
    ### END SOLUTION

check.block_scales_body(block_scales_body)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Which thread has no block at all? Which one has a block that ends early? Ask both against `n`. A block that is only begun counts: it has a scale.
#
# </details>

# %% [markdown]
# ## Better than fast: not at all
#
# Decoding to memory writes every number, only for the product to read it again, and `mp.nf4.dequantize` asks for new memory each time. For one row, and a few, the compiled product does without that: it decodes into registers and multiplies there. (For many rows it decodes to memory after all, on a processor a panel at a time: then each decoded number is used often enough.) For one row, the least traffic falls to little more than codes and scales. So compare three ways to the same product of one row. And store the layer: its file holds what a kernel reads.

# %%
x = torch.randn(1, side, dtype=dtype, device=device)
ways = {"decode, then multiply": (lambda: x @ mp.nf4.dequantize(big, dtype=dtype).T, traffic(n, size) + n * size),
        "not quantised": (lambda: x @ full.T, n * size)}
if direct:
    ways["straight from the codes"] = (lambda: direct(x, big.packed, big.absmax, (side, side)), traffic(n, 0))
one_row = {name: {"ms": 1e3 * statistics.median(seconds(run)), "MB at least": bytes_ / 1e6} for name, (run, bytes_) in ways.items()}

with tempfile.TemporaryDirectory() as shelf:
    torch.save({"packed": q.packed, "absmax": q.absmax}, f"{shelf}/layer.pt")
    read = torch.load(f"{shelf}/layer.pt")
again = nf4.Quantized(read["packed"], read["absmax"], q.shape, q.dtype)
assert torch.equal(mp.nf4.dequantize(again), mp.nf4.dequantize(q))
assert hashlib.sha256(q.packed.numpy().tobytes() + q.absmax.numpy().tobytes()).hexdigest()[:16] == digest
print(f"stored and read again: the same numbers, to the bit; codes and scales are still {digest}")
lab.table([{"one row times a matrix": name} | row for name, row in one_row.items()])

# %% [markdown]
# ## What it cost, and what you predicted
#
# The first table is this chapter's row, the second has your predictions. Then comes the closing quiz, with a reason for every choice.

# %%
copy_ns = 1e9 * statistics.median(copies) / n
measured = dict(zip(predicted, (traffic(64, 4) / 64, loop_times_copy, best and best["percent of the copy"])))
lab.record(
    cpu=lab.machine().summary,
    dequantize={row["way"]: row["GB/s"] for row in rows} | {"numbers": n, "to": str(dtype)},
    product={"one row, ms": {name: row["ms"] for name, row in one_row.items()}, "peak": peak,
             "by rows": {f"{way}, {r}": point["G/s"] for (way, r), point in points.items()}},
    emulator={"missing": NO_EMULATOR, "versions": emulated, "faults": reports, "on a GPU": device.type == "cuda"},
)
fastest = best or max(rows[1:-1], key=lambda row: row["GB/s"])
display(lab.table([{"decoding": fastest["way"], "numbers": n, "ms": fastest["ms"], "GB/s": fastest["GB/s"],
                    "percent of the copy": fastest["percent of the copy"], "the copy, ns a number": copy_ns}]))
display(lab.table([{"": key, "predicted": predicted[key], "measured": value} for key, value in measured.items()]))
lab.quiz([
    {"question": "Block 3, thread 5, blocks of 64 threads. Which element does this thread begin with?", "right": str(3 * 64 + 5),
     "choices": {str(3 * 64 + 5): "Three whole blocks stand before it: `blockIdx.x * blockDim.x + threadIdx.x`.",
                 str(3 + 5): "The block's number counts blocks, not threads.",
                 str(5 * 64 + 3): "Block and thread are exchanged.",
                 str(4 * 64 + 6): "Both are counted from 0."}},
    {"question": "1000 numbers, a thread each, blocks of 256 threads. How many blocks do you start?", "right": str(math.ceil(1000 / 256)),
     "choices": {str(1000 // 256): f"Then the last {1000 % 256} numbers have no thread. Round up.",
                 str(math.ceil(1000 / 256)): f"Rounded up; {math.ceil(1000 / 256) * 256 - 1000} threads find nothing to do and must ask for n.",
                 "1000": "That many blocks would have 256 threads each.",
                 "256": "That is the number of threads in a block."}},
    {"question": "A kernel with a missing barrier gave the right result a thousand times on your GPU. What do you know?",
     "right": "nothing: another order of the threads may give another result",
     "choices": {"that the barrier is not needed": "The table of step 2 has an order in which the kernel without barriers is right.",
                 "nothing: another order of the threads may give another result": "Nobody promises the order. Another GPU, another load, another compiler may change it.",
                 "that it is right, but slow": "A barrier costs time; leaving it out does not."}},
    {"question": "`if (t < half) { …; __syncthreads(); }`: what is wrong?", "right": "not all threads of the block come to the barrier",
     "choices": {"nothing, the others have no work": "They have none, but a barrier waits for all of the block.",
                 "not all threads of the block come to the barrier": "What then happens is undefined: it may hang, it may go on too early. The barrier belongs behind the `if`.",
                 "a barrier must not stand in a loop": "It may, as long as all threads go round equally often."}},
    {"question": "Least bytes for one NF4 number to 16 bits, blocks of 64?", "right": f"{traffic(64, 2) / 64:g}",
     "choices": {f"{traffic(64, 2) / 64:g}": "Half a byte of code, a sixty-fourth of a scale, two bytes written.",
                 f"{0.5 + 2:g}": "The scales are missing: 4 bytes for 64 numbers.",
                 f"{traffic(64, 4) / 64:g}": "That is to float32.",
                 f"{1 + 4 / 64 + 2:g}": "Two codes share a byte."}},
    {"question": "Version 4 reads 16 bytes with one instruction. What does that save?", "right": "instructions; the bytes are the same",
     "choices": {"bytes: it reads fewer": "Each byte of codes is still read once.",
                 "instructions; the bytes are the same": "A warp gets 512 wanted bytes with one read, and a thread reads its scale once for 32 numbers.",
                 "multiplications": "There is one for each number, in all versions."}},
    {"question": "On a GPU your decoding kernel runs at nine tenths of the copy's speed. Where is the next large gain?", "right": "in not writing the decoded matrix at all",
     "choices": {"in faster arithmetic": "On the roofline it stands close to the slope, far from the flat. Arithmetic is not what it waits for.",
                 "in more threads": "The memory is nearly as busy as it can be.",
                 "in not writing the decoded matrix at all": "Decode inside the product: most of the bytes are the result, written and read again."}},
    {"question": "Your kernel passes the emulator. What does that tell you about the GPU?", "right": "the text computes the right thing in the orders tried; speed and the rest are open",
     "choices": {"that it is fast": "The emulator counts nothing that a GPU spends.",
                 "that it will pass there": "Likely, not certain: the emulator has its own arithmetic, and tries a few orders of very many.",
                 "the text computes the right thing in the orders tried; speed and the rest are open": "And that no access was outside and no race was seen. So say which pass it was.",
                 "nothing": "It ran the same text and watched every access."}},
])

# %% [markdown]
# ## Recap
#
# - A kernel is the body of a loop. A thread finds its share from four numbers, and asks for `n` before it touches memory.
# - Threads of a block talk through shared memory. Between writing and reading stands a barrier, and all threads come to it.
# - A block of threads is not a block of numbers.
# - Decoding does next to no arithmetic. Count the bytes that must move, measure a copy, and compare. The roofline shows which of the two holds you up.
# - Neighbours should read neighbours, many bytes at a time. The best traffic is the one that does not happen.
# - An emulated pass is not a GPU pass. Say which it was.
#
# ## Further reading
#
# - NVIDIA, [CUDA C++ Programming Guide](https://docs.nvidia.com/cuda/cuda-c-programming-guide/): the programming model, synchronisation, memory accesses
# - Harris 2007, [Optimizing Parallel Reduction in CUDA](https://developer.download.nvidia.com/assets/cuda/files/reduction.pdf): exercise 3, version after version. Its later ones leave out the barriers within a warp, which was right then and is wrong on GPUs since 2017
# - Williams et al. 2009, [Roofline](https://doi.org/10.1145/1498765.1498785)
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314): equations 5 and 6
# - Karpathy, [llm.c](https://github.com/karpathy/llm.c), `dev/cuda`: one operation a file, version after version
