"""The CUDA kernels in the emulator, every version and every order of the threads, against the readable PyTorch of
nf4.py; and the faults that the emulator must find. A pass here is a pass of the emulator, not of a GPU."""

import os
import re
import signal
import threading

import pytest
import torch

from minipeft.quant import double_quant, emulator, kernels, nf4
from minipeft.quant.emulator import EmulatorError, Program

CUDA = kernels.source_folder() / "cuda"
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
VERSIONS = {"quantize": 5, "dequantize": 5, "product": 4}
SIZES = (1, 63, 64, 65, 4095, 4096)
LARGE = 1_000_003


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        emulator._machine()
    except EmulatorError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {name: Program(CUDA / f"{name}.cu", [f"{name}_{v}<{t}>" for v in range(1, versions + 1) for t in TYPES.values()])
            for name, versions in VERSIONS.items()}


@pytest.fixture(autouse=True)
def readable(monkeypatch):
    """nf4.py without the compiled kernels."""
    monkeypatch.setattr(nf4, "compiled", lambda *_: None)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


# ---- every version of every kernel ----

# The earlier versions at the large size in float32, the last ones in every type.
def cases(name):
    small = [(v, t, n) for v in range(1, VERSIONS[name] + 1) for t in TYPES for n in SIZES]
    large = [(v, torch.float32, LARGE) for v in range(1, VERSIONS[name])] + [(VERSIONS[name], t, LARGE) for t in TYPES]
    return pytest.mark.parametrize("version,dtype,n", small + large, ids=lambda p: str(p).removeprefix("torch."))


def quantised(program: Program, version: int, x: torch.Tensor, block_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    n, blocks = len(x), ceil(len(x), block_size)
    packed, absmax = torch.full((ceil(n, 2),), 170, dtype=torch.uint8), torch.full((blocks,), torch.nan)

    def launch(v, grid, threads, *args):
        program.run(f"quantize_{v}<{TYPES[x.dtype]}>", grid, threads, [x, packed, absmax, *args])

    if version == 1:
        launch(1, ceil(blocks, 64), 64, n, block_size)
    elif version == 2:
        launch(2, blocks, 64, n, block_size)
    elif version == 3:
        launch(3, ceil(blocks, 8), 256, n, block_size, 0)
    else:                                   # as quantize_launch does: full blocks, and 3 for what is left over
        whole = n // 64
        if whole:
            launch(version, ceil(whole, 32), 256, whole)
        if blocks > whole:
            launch(3, ceil(blocks - whole, 8), 256, n, 64, whole)
    return packed, absmax


@cases("quantize")
def test_quantising_gives_the_codes_and_scales_of_nf4_to_the_last_bit(programs, version, dtype, n):
    torch.manual_seed(n)
    x = (torch.randn(n) * torch.logspace(-3, 3, n)).to(dtype)
    x[n // 2: n // 2 + 70] = 0              # a block of zeros
    packed, absmax = quantised(programs["quantize"], version, x)
    theirs = nf4.quantize_blocks(x, 64)
    assert torch.equal(packed, theirs[0]) and torch.equal(absmax, theirs[1])


@pytest.mark.parametrize("version", [1, 2, 3])
def test_quantising_knows_other_block_sizes_and_shows_what_is_not_finite(programs, version):
    for block_size in (32, 256):
        x = torch.randn(600)
        ours, theirs = quantised(programs["quantize"], version, x, block_size), nf4.quantize_blocks(x, block_size)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    for bad in (torch.nan, torch.inf):
        x = torch.randn(256)
        x[100] = bad
        assert quantised(programs["quantize"], version, x)[1].isfinite().tolist() == [True, False, True, True]


def codes_of(n: int, double: bool) -> nf4.Quantized:
    torch.manual_seed(n)
    absmax = torch.rand(ceil(n, 64)) + 0.1
    scales = double_quant.quantize_scales(absmax) if double and len(absmax) > 1 else absmax
    return nf4.Quantized(torch.randint(256, (ceil(n, 2),), dtype=torch.uint8), scales, (n,), torch.float32)


def scales_of(q: nf4.Quantized) -> list:
    s = q.scales
    return [s, None, None, None] if isinstance(s, torch.Tensor) else [s.absmax, s.codes, double_quant.MAP, s.offset.view(1)]


PER_THREAD = {1: 1, 2: 2, 3: 2, 4: 32, 5: 32}      # elements


@cases("dequantize")
def test_dequantising_gives_the_numbers_of_nf4_to_the_last_bit(programs, version, dtype, n):
    for double in (False, True):
        q = codes_of(n, double)
        out = torch.full((n,), torch.nan, dtype=dtype)
        programs["dequantize"].run(f"dequantize_{version}<{TYPES[dtype]}>", ceil(n, 256 * PER_THREAD[version]), 256,
                                   [q.packed, *scales_of(q), out, n, 64])
        assert torch.equal(out, nf4.dequantize(q, dtype))


# rows of x; outputs, columns and block size of W. Version 3 wants multiples of 32, version 4 of 8.
SHAPES = [(1, 5, 77, 64), (2, 3, 1, 64), (4, 7, 130, 64), (9, 2, 33, 32), *((rows, 9, 192, 64) for rows in (1, 2, 3, 5, 31, 64)),
          (7, 5, 96, 32), (3, 6, 40, 64), (1, 3, 2080, 64), (5, 17, 256, 128)]


@pytest.mark.parametrize("double", [False, True], ids=["plain scales", "double-quantised"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_products_have_the_accuracy_of_their_type(programs, version, dtype, double):
    torch.manual_seed(0)
    for rows, outputs, columns, block_size in SHAPES:
        if columns % {3: 32, 4: 8}.get(version, 1):
            continue
        x = torch.randn(rows, columns).to(dtype)
        q = nf4.quantize(torch.randn(outputs, columns), block_size, double_quant=double and outputs * columns > block_size)
        y = torch.full((rows, outputs), torch.nan, dtype=dtype)
        grid = {1: ceil(rows * outputs, 128), 2: ceil(rows * outputs, 8), 3: (ceil(outputs, 8), ceil(rows, 4)),
                4: (ceil(outputs, 32), ceil(rows, 4))}[version]
        programs["product"].run(f"product_{version}<{TYPES[dtype]}>", grid, 128 if version == 1 else 256,
                                [x, q.packed, *scales_of(q), y, rows, outputs, columns, block_size])
        W = nf4.dequantize(q, torch.float32).double()
        exact, size = x.double() @ W.T, x.double().abs() @ W.abs().T
        limit = columns * 2**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
        assert ((y.double() - exact).abs() <= limit).all(), (rows, outputs, columns)
        assert exact.abs().max() > 0.1


def test_halves_and_bfloats_are_converted_as_pytorch_does():
    source = """
    template <class T> __global__ void widen(const T* x, float* y) { int i = blockIdx.x * blockDim.x + threadIdx.x; y[i] = to_float(x[i]); }
    template <class T> __global__ void narrow(const float* x, T* y) { int i = blockIdx.x * blockDim.x + threadIdx.x; put(y[i], x[i]); }
    """
    source = (CUDA / "nf4.cuh").read_text() + source
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        program = Program(source, [f"{k}<{TYPES[dtype]}>" for k in ("widen", "narrow")])
        x, wide = every.view(dtype), torch.empty(65536)
        program.run(program.kernels[0], 256, 256, [x, wide], orders=["rising"])
        assert torch.equal(wide.nan_to_num(nan=9e9), x.float().nan_to_num(nan=9e9))
        middles = torch.cat([wide[:32000], (wide[:16000] + wide[1:16001]) / 2, torch.randn(17536) * torch.logspace(-9, 9, 17536)])
        narrow = torch.empty(65536, dtype=dtype)
        program.run(program.kernels[1], 256, 256, [middles, narrow], orders=["rising"])
        assert torch.equal(narrow.nan_to_num(nan=9), middles.to(dtype).nan_to_num(nan=9))


# ---- faults ----

def fault(source: str, grid, block, args, at: str | None, says: str, orders=emulator.ORDERS) -> str:
    """Run the kernel `k` of `source`: an error that says `says` and names the line that holds `at`; nothing changed."""
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    kernel = "k<float>" if "template" in source.split("void k")[0][-40:] else "k"
    with pytest.raises(EmulatorError, match=says) as caught:
        emulator.run(source, kernel, grid, block, args, orders=orders)
    message = str(caught.value)
    if at is not None:
        lines = [i for i, line in enumerate(source.splitlines(), 1) if at in line]
        named = re.search(r"line (\d+)", message)
        assert named and int(named[1]) in lines and len(lines) == 1, (message, lines)
    for a, b in zip(args, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
    return message


def changed(file: str, version: str, old: str, new: str) -> str:
    """The text of a kernel file with one thing replaced in one version, which is then called k."""
    text = (CUDA / file).read_text()
    begin = text.index(f"__global__ void {version}(")
    end = text.find("__global__", begin + 1)
    body = text[begin:end].replace(version, "k")
    assert old in body
    return text[:begin] + body.replace(old, new, 1) + text[end:]


def dequantise_arguments(n):
    q = codes_of(n, False)
    return [q.packed, *scales_of(q), torch.zeros(n), n, 64]


def test_a_barrier_taken_out_of_a_kernel_is_missed():
    source = changed("dequantize.cu", "dequantize_3", "__syncthreads();", "")
    message = fault(source, 1, 64, dequantise_arguments(128), None, "the shared memory level")
    at = int(re.search(r"line (\d+)", message)[1])
    assert "level[byte" in source.splitlines()[at - 1] and at > source[:source.index("void k")].count("\n")
    source = changed("quantize.cu", "quantize_2", "        __syncthreads();\n", "")
    fault(source, 2, 64, [torch.randn(128), torch.zeros(64, dtype=torch.uint8), torch.zeros(2), 128, 64],
          "if (threadIdx.x < half) most", "the shared memory most")


def test_a_check_of_the_end_taken_out_of_a_kernel_is_missed():
    source = changed("dequantize.cu", "dequantize_2", "if (i + 1 < n) put", "/* planted */ put")
    message = fault(source, 1, 64, dequantise_arguments(63), "/* planted */", "outside argument 5")
    assert "writes 4 bytes just behind its end" in message
    source = changed("quantize.cu", "quantize_1", "if (first >= n) return;", "")
    fault(source, 1, 64, [torch.randn(64), torch.zeros(32, dtype=torch.uint8), torch.zeros(1), 64, 64], None, "outside argument 2")


RACE = """__global__ void k(const int* x, int* count, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        count[x[i]] = count[x[i]] + 1;
}"""


def test_a_race_within_a_block_or_between_blocks_is_told_with_both_lines():
    x, count = torch.zeros(64, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    message = fault(RACE, 1, 64, [x, count, 64], "count[x[i]]", "race on argument 1, element 0")
    assert "thread 1 of block 0 reads what thread 0 wrote" in message and "that was line 4" in message
    assert "another block" in fault(RACE, 64, 1, [x, count, 64], "count[x[i]]", "race on argument 1, element 0")
    emulator.run(RACE.replace("count[x[i]] = count[x[i]] + 1", "atomicAdd(&count[x[i]], 1)"), "k", 2, 32, [x, count, 64])
    assert count.tolist() == [64, 0, 0, 0]


def test_reversing_in_shared_memory_needs_its_barrier():
    source = """__global__ void k(float* x) {
    __shared__ float t[64];
    t[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = t[63 - threadIdx.x];
}"""
    x = torch.arange(64.0)
    emulator.run(source, "k", 1, 64, [x])
    assert torch.equal(x, torch.arange(64.0).flip(0))
    for order in emulator.ORDERS:
        fault(source.replace("__syncthreads();", ""), 1, 64, [x], "t[63 - threadIdx.x]", "the shared memory t", orders=[order])
    fault(source.replace("t[64]", "t[63]"), 1, 64, [x], "t[threadIdx.x] =", "outside the shared memory t.*just behind its end")


@pytest.mark.parametrize("guard", ["if (threadIdx.x < 40) { BARRIER; }", "if (threadIdx.x >= 40) return; BARRIER;"])
@pytest.mark.parametrize("barrier", ["__syncthreads()", "__shfl_xor_sync(0xffffffffu, 1.0f, 1)", "__syncwarp()"])
def test_a_barrier_or_shuffle_that_not_all_threads_reach_is_told(guard, barrier):
    source = "__global__ void k(float* x) {\n    " + guard.replace("BARRIER", barrier) + "\n    x[threadIdx.x] = 1;\n}"
    says = r"line 2: thread \d+ of block 0 waits at the (barrier|warp shuffle), thread \d+ has left the kernel"
    fault(source, 1, 64, [torch.zeros(64)], None, says)


def test_two_barriers_in_two_branches_are_two_barriers():
    source = """__global__ void k(float* x) {
    if (threadIdx.x % 2) __syncthreads();
    else
        __syncthreads();
}"""
    fault(source, 1, 64, [torch.zeros(64)], None, "divergence in line [24].*at the barrier of line [24]")


def test_a_shuffle_with_a_lane_outside_its_mask_is_told():
    source = "__global__ void k(float* x) {\n    if (threadIdx.x < 16)\n        x[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 16);\n}"
    fault(source, 1, 32, [torch.zeros(32)], "__shfl", "shuffles with lane 16, which is not in the mask")


def test_a_warp_barrier_orders_the_memory_of_its_warp_and_of_no_other():
    source = """__global__ void k(float* x) {
    __shared__ float t[64];
    t[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    x[threadIdx.x] = t[threadIdx.x ^ WITH];
}"""
    x = torch.arange(64.0)
    emulator.run(source.replace("WITH", "31"), "k", 1, 64, [x])
    assert torch.equal(x, (torch.arange(64) ^ 31).float())
    fault(source.replace("WITH", "32"), 1, 64, [x], "t[threadIdx.x ^", "the shared memory t")
    fault(source.replace("WITH", "31").replace("__syncwarp();", ""), 1, 64, [x], "t[threadIdx.x ^", "the shared memory t")


def test_a_result_that_depends_on_the_order_of_the_threads_is_told():
    ticket = "__global__ void k(int* next, int* out) {\n    int i = atomicAdd(next, 1);\n    out[i] = threadIdx.x;\n}"
    fault(ticket, 1, 64, [torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)], "out[i]", "argument 1, element 0, depends on the order")
    total = "__global__ void k(const float* x, float* sum) {\n    atomicAdd(sum, x[threadIdx.x]);\n}"
    fault(total, 1, 256, [torch.randn(256), torch.zeros(1)], "atomicAdd", "argument 1, element 0, depends on the order")


def test_a_kernel_without_end_is_stopped():
    wait = "__global__ void k(float* x) {\n    while (*(volatile float*)x == 0) {}\n    x[0] = 1;\n}"
    fault(wait, 1, 32, [torch.zeros(1)], "while", "endless: thread 0,0,0", orders=["rising"])
    barriers = "__global__ void k(float* x) {\n    while (true)\n        __syncthreads();\n}"
    fault(barriers, 1, 2, [torch.zeros(1)], "__syncthreads", "endless")


def test_a_crash_of_the_kernel_is_an_error_and_the_process_lives_on():
    division = "__global__ void k(int* x) {\n    x[0] = x[1] / x[2];\n}"
    fault(division, 1, 1, [torch.zeros(3, dtype=torch.int32)], "x[1] / x[2]", "crashed")
    stack = "__device__ __attribute__((noinline)) float f(float* x, int n) { volatile float v[64]; v[n % 64] = x[0]; return f(x, n + 1) + v[n % 64]; }\n"
    fault(stack.replace("__device__ ", "") + "__global__ void k(float* x) { x[0] = f(x, 0); }", 1, 1, [torch.zeros(1)], None, "crashed")
    pointer = "__global__ void k(float* x) {\n    *(float*)(x[0] == 0 ? 64 : 128) = 1;\n}"
    fault(pointer, 1, 1, [torch.zeros(1)], "float*)(", "outside all memory")


def test_ctrl_c_stops_the_kernel():
    source = "__global__ void k(float* x) {\n    while (*(volatile float*)x == 0) {}\n}"
    program = Program(source, ["k"])
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            program.run("k", 1, 1, [torch.zeros(1)])
    finally:
        signal.signal(signal.SIGINT, before)
    emulator.run(source.replace("while", "if"), "k", 1, 1, [torch.zeros(1)])


def test_wide_reads_want_aligned_addresses():
    source = "__global__ void k(const float* x, float* y) {\n    *(float4*)y = *(const float4*)(x + 1);\n}"
    fault(source, 1, 1, [torch.randn(8), torch.zeros(4)], "float4", "misaligned: thread 0 of block 0 reads 16 bytes")


def test_what_does_not_fit_is_told_before_anything_runs():
    source = "__global__ void k(const float* x, float* y, int n) {\n    y[0] = n;\n}"
    x, y = torch.zeros(4), torch.zeros(4)
    fault(source, 1, 1, [x, y], None, "k takes 3 arguments; 2 are given")
    fault(source, 1, 1, [x, y, x], None, "argument 2 is a number; a Tensor is given")
    fault(source, 1, 1, [x, 3, 3], None, "argument 1 is a pointer; a int is given")
    fault(source, 1, 1, [x, y.double(), 3], None, "argument 1 points at elements of 4 bytes")
    fault(source, 1, 1025, [x, y, 3], None, "a block has 1 to 1024 threads")
    fault(source, 0, 1, [x, y, 3], None, "a grid at least 1 block")
    fault(source.replace("y[0]", "z[0]"), 1, 1, [x, y, 3], "z[0]", "‘z’ was not declared")


def test_blocks_and_threads_in_three_directions():
    source = """__global__ void k(int* out) {
    int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[b * blockDim.x * blockDim.y * blockDim.z + t] = 100 * b + t;
}"""
    out = torch.zeros(24 * 30, dtype=torch.int32)
    emulator.run(source, "k", (2, 3, 4), (5, 3, 2), [out])
    assert torch.equal(out.view(24, 30), (100 * torch.arange(24)[:, None] + torch.arange(30)).int())


# ---------------------------------------------------------------------------- what CUDA has, and what it has not


def test_abs_of_a_real_number_is_real():
    x, y = torch.tensor([-0.5, 0.25]), torch.zeros(2)
    emulator.run("__global__ void k(const float* x, float* y) { y[threadIdx.x] = abs(x[threadIdx.x]); }", "k", 1, 2, [x, y])
    assert y.tolist() == [0.5, 0.25]


def test_atomic_max_is_for_whole_numbers_and_bits_of_real_ones():
    x, y = torch.tensor([0.5, 2.0, 1.0]), torch.zeros(1)
    with pytest.raises(emulator.EmulatorError, match="atomicMax for int"):
        emulator.run("__global__ void k(const float* x, float* y) { atomicMax(y, x[threadIdx.x]); }", "k", 1, 3, [x, y])
    emulator.run("__global__ void k(const float* x, float* y) { atomicMax((int*)y, __float_as_int(x[threadIdx.x])); }", "k", 1, 3, [x, y])
    assert y.item() == 2.0


def test_what_a_warp_read_before_its_own_barrier_is_settled():
    """A reduction in a warp: read, barrier of the warp, write, barrier."""
    text = """__global__ void k(const float* x, float* y) {
        __shared__ float kept[32];
        int t = threadIdx.x;
        kept[t] = x[t];
        __syncwarp();
        for (int by = 16; by; by /= 2) {
            float other = kept[t ^ by];
            __syncwarp();
            kept[t] = fmaxf(kept[t], other);
            __syncwarp();
        }
        y[t] = kept[t];
    }"""
    x, y = torch.randn(32), torch.zeros(32)
    emulator.run(text, "k", 1, 32, [x, y])
    assert torch.equal(y, x.max().expand(32))
    fault(text.replace("            __syncwarp();\n            kept[t] =", "            kept[t] ="), 1, 32, [x, y], None, "race on")


def test_two_barriers_in_one_line_are_two():
    fault("__global__ void k(float* y) { if (threadIdx.x < 32) __syncthreads(); else __syncthreads(); y[threadIdx.x] = 1; }", 1, 64, [torch.zeros(64)], None, "divergence")


def test_text_with_two_quotation_marks_compiles():
    emulator.run('__global__ void k(float* y) { asm volatile("" ::: "memory"); y[threadIdx.x] = 1; }', "k", 1, 2, [torch.zeros(2)])
