"""The oracle of NF4 and of double quantisation is bitsandbytes on the CPU: codes, scales, values, to the bit.

bitsandbytes quantises block by block whatever tensor a block is part of, so many small tensors are quantised
by it in one call: end to end where their sizes are multiples of the block, one by one where they are not.
"""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minipeft as mp
from minipeft.quant import double_quant, nf4

bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WORD = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(autouse=True)
def readable(monkeypatch):
    """These are tests of the readable PyTorch; the compiled kernels have their own."""
    monkeypatch.setattr(nf4, "compiled", lambda t, kind: None)


@pytest.fixture(autouse=True)
def bitsandbytes_uncompiled():
    """It has torch compile some of its functions, once for every size."""
    with torch.compiler.set_stance("force_eager"):
        yield


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits: -0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.view(WORD.get(a.dtype, a.dtype)), b.view(WORD.get(b.dtype, b.dtype)))


def their_values(packed: torch.Tensor, state) -> torch.Tensor:
    """What bitsandbytes dequantises to. On AVX-512 it rounds to float16 in its own way (ties away from zero, denormals
    to zero), and to bfloat16 by instructions that make denormals zero: there its float32 is taken, rounded by numpy as
    IEEE 754 says."""
    dtype = state.dtype
    own_way = {torch.float16: torch.backends.cpu.get_cpu_capability() == "AVX512", torch.bfloat16: bnb.has_avx512bf16()}
    if not own_way.get(dtype):
        return bnb.dequantize_4bit(packed, state)
    state.dtype = torch.float32
    exact = bnb.dequantize_4bit(packed, state).numpy()
    state.dtype = dtype
    if dtype == torch.float16:
        return torch.from_numpy(exact.astype("float16"))
    bits = exact.view("uint32")
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16                      # the upper half, to nearest, ties to even
    return torch.from_numpy(bits.astype("uint16").view("int16")).view(torch.bfloat16)


def agrees(t: torch.Tensor, block_size: int = 64, kind: str = "nf4", nested: bool = False) -> bool:
    """Whether codes, scales (and theirs) and values are those of bitsandbytes."""
    packed, state = bnb.quantize_4bit(t, blocksize=block_size, quant_type=kind, compress_statistics=nested)
    q = nf4.quantize(t, block_size, kind, double_quant=nested)
    pairs = [(q.packed, packed.flatten())]
    if nested:
        pairs += [(q.scales.codes, state.absmax), (q.scales.absmax, state.state2.absmax), (q.scales.offset, state.offset)]
    else:
        pairs += [(q.scales, state.absmax)]
    ours, theirs = mp.nf4.dequantize(q), their_values(packed, state).view(t.shape)  # it makes rows of vectors
    # bitsandbytes gives FP4's second zero a sign or none, depending on the size
    values = torch.equal(ours, theirs) if kind == "fp4" else same_bits(ours, theirs)
    return values and all(same_bits(a, b) for a, b in pairs)


def several(seed: int, count: int, n: int) -> torch.Tensor:
    """(count, n) float32: random tensors of many sizes of number, and every fourth with something awkward in it."""
    draw = torch.Generator().manual_seed(seed)
    size = 10.0 ** (torch.rand(count, 1, generator=draw) * 12 - 8)
    x = torch.randn(count, n, generator=draw) * size
    halves = (nf4.CODEBOOK[:-1] + nf4.CODEBOOK[1:]) / 2
    x[0::12, 0::2] = 0.0
    x[1::12] = x[1::12, :1]                                               # constant
    x[2::12] = halves[torch.randint(15, x[2::12].shape, generator=draw)] * size[2::12]  # midpoints …
    x[2::12, 0] = size[2::12, 0]                                          # … of this scale
    x[3::12, 1::3] = -0.0
    x[4::12] *= 1e-38                                                     # denormal, or nothing at all
    return x


# ---------------------------------------------------------------- levels


def test_the_codebook_is_made_of_normal_quantiles_and_equals_bitsandbytes_table_to_the_bit():
    assert same_bits(mp.nf4.CODEBOOK, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.LEVELS["fp4"], bnb.get_4bit_type("fp4", device="cpu"))
    assert same_bits(double_quant.MAP, bnb.create_dynamic_map())
    # 8 levels above zero, 7 below; between two neighbours lies an equal share of the probability, on either side
    assert ((mp.nf4.CODEBOOK > 0).sum(), (mp.nf4.CODEBOOK < 0).sum()) == (8, 7)
    above = torch.special.ndtr(mp.nf4.CODEBOOK[7:].double() * torch.special.ndtri(torch.tensor(nf4.OFFSET).double()))
    assert torch.allclose(above.diff(), torch.full((8,), (nf4.OFFSET - 0.5) / 8, dtype=torch.float64), atol=1e-6)


def test_the_earlier_number_is_in_the_high_half_of_the_byte():
    q = mp.nf4.quantize(torch.tensor([1.0, -1.0, 0.0]))
    assert q.packed.tolist() == [0xF0, 0x77] and q.absmax.tolist() == [1.0]
    assert mp.nf4.dequantize(q).tolist() == [1.0, -1.0, 0.0]


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_thousand_tensors_have_the_codes_scales_and_values_of_bitsandbytes(dtype):
    tensors = 0
    for seed, (block_size, count) in enumerate([(64, 2800), (32, 400), (128, 400), (4096, 12)]):
        x = several(seed, count, block_size).clamp(-6e4, 6e4).to(DTYPES[dtype])  # each a tensor of its own
        assert agrees(x, block_size)
        together = nf4.quantize(x, block_size).packed.view(count, -1)
        for i in range(0, count, count // 7):                             # alone as in the crowd
            assert torch.equal(nf4.quantize(x[i], block_size).packed, together[i])
        tensors += count
    assert tensors * len(DTYPES) >= 10_000


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_are_no_multiple_of_the_block_agree_too(dtype, nested):
    for n in [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 129, 1000, 4095, 4097, 64 * 257 + 5]:
        for block_size in (64, 256):
            x = several(n, 1, n).add(1e-3).to(DTYPES[dtype])
            assert agrees(x.flatten(), block_size, nested=nested), (n, block_size)
    assert agrees(several(1, 7, 33).to(DTYPES[dtype]), nested=nested)      # rows that cut through blocks
    assert agrees(several(1, 8, 12).to(DTYPES[dtype]).T, nested=nested)    # not contiguous
    assert agrees(several(2, 3, 10).view(3, 2, 5).to(DTYPES[dtype]), nested=nested)


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_block_size_and_fp4_agree(kind, block_size):
    for seed, dtype in enumerate(DTYPES.values()):
        x = several(seed, 24, block_size + 6).clamp(-6e4, 6e4).to(dtype)
        assert agrees(x, block_size, kind) and agrees(x, block_size, kind, nested=True)


AWKWARD = {
    "zero": [0.0], "minus zero": [-0.0, 0.0], "zeros": [0.0] * 65, "one": [1.0], "equal scales": [2.0] * 192,
    "tiny": [1e-45, -1e-45, 3e-45], "below 1e-38": [9e-39, -4e-39, 1e-39] * 30, "huge": [3.4e38, -3.4e38, 1e38, 2.0],
    "huge and tiny": [3e38, 1e-45] * 32, "between": [1.17549435e-38, 5e-39] * 32,
}


@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_numbers_agree(case):
    x = torch.tensor(AWKWARD[case])
    assert agrees(x) and agrees(x, nested=True) and agrees(torch.cat([x, x[:1]]), 32)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=130), st.booleans())
@example([2.0**-127, -(2.0**-149)], False)
def test_any_finite_numbers_agree(numbers, nested):
    x = torch.tensor(numbers)
    if nested and math.isinf(nf4.quantize(x).scales.mean()):
        return
    assert agrees(x, nested=nested)


@pytest.mark.parametrize("seed", range(3))
def test_the_scales_are_quantised_as_bitsandbytes_does_near_every_edge_too(seed):
    edges = (double_quant._GRID[:-1] + double_quant._GRID[1:]) / 2         # where a value moves to the next point
    edges = edges[double_quant._CODE[1:] != double_quant._CODE[:-1]]       # and its code changes
    draw = torch.Generator().manual_seed(seed)
    for _ in range(100):
        largest = torch.rand(1, generator=draw) * 10 + 0.1
        x = edges * largest
        for _ in range(int(torch.randint(4, (1,), generator=draw))):
            x = x.nextafter(torch.tensor(99.0 if seed else -99.0))
        x = torch.cat([largest, x])
        ours = double_quant.quantize_scales(x)
        theirs, s = bnb.quantize_blockwise(x - x.mean(), blocksize=256)
        assert same_bits(ours.codes, theirs) and same_bits(ours.absmax, s.absmax)
        assert same_bits(double_quant.dequantize_scales(ours), bnb.dequantize_blockwise(theirs, s) + x.mean())


# ---------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.sampled_from(nf4.BLOCK_SIZES), st.integers(0, 10**6))
def test_the_error_is_at_most_half_the_widest_gap_times_the_scale(n, block_size, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    q = nf4.quantize(x, block_size)
    error = (nf4.dequantize(q) - x).abs()
    bound = q.absmax.repeat_interleave(block_size)[:n] * mp.nf4.CODEBOOK.diff().max() / 2
    assert (error <= bound * (1 + 1e-6)).all()
    assert torch.equal(nf4.quantize(nf4.dequantize(q), block_size).packed[:n // 2], q.packed[:n // 2])  # twice is once


@pytest.mark.parametrize("kind", nf4.LEVELS)
def test_every_number_goes_to_the_nearest_level_in_float64(kind):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).double().float()
    q = nf4.quantize(x, kind=kind)
    z = x.double() / x.double().abs().amax(1, keepdim=True)
    distance = (z[..., None] - nf4.LEVELS[kind].double()).abs()            # (50, 64, 16)
    got = (nf4.dequantize(q, torch.float64) / q.absmax.double()[:, None] - z).abs()
    assert (got <= distance.amin(-1) + 1e-6).all() and distance.amin(-1).max() > 0.01


def test_on_normal_numbers_nf4_errs_less_than_fp4_and_int4():
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    error = {kind: (nf4.dequantize(nf4.quantize(x, kind=kind)) - x).square().mean().item() for kind in nf4.LEVELS}
    assert error["nf4"] < 0.9 * error["int4"] and error["nf4"] < 0.8 * error["fp4"]


def test_bits_a_number_are_what_is_stored():
    x = torch.randn(1024, 256)
    assert nf4.quantize(x).bits == 4.5 and nf4.quantize(x, 128).bits == 4.25
    double = nf4.quantize(x, double_quant=True)
    assert double.bits == 4 + 8 / 64 + 32 / (64 * 256) + 32 / x.numel() and 4.126 < double.bits < 4.128
    assert torch.allclose(double.absmax, nf4.quantize(x).absmax, rtol=0.02)


# ---------------------------------------------------------------- what is refused


def test_a_number_that_is_not_finite_is_refused_with_its_position():
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in DTYPES.values():
            x = torch.ones(3, 70, dtype=dtype)
            x[2, 65] = bad
            with pytest.raises(ValueError, match=r"t\[2, 65\] is -?(nan|inf); only finite"):
                mp.nf4.quantize(x)


@pytest.mark.parametrize(("t", "settings", "error", "says"), [
    (torch.ones(0, 5), {}, ValueError, r"empty, \(0, 5\)"),
    (torch.ones(5).double(), {}, TypeError, "float64; accepted"),
    (torch.ones(5).int(), {}, TypeError, "int32; accepted"),
    ([1.0], {}, TypeError, "list; accepted"),
    (torch.ones(5), {"block_size": 65}, ValueError, "block_size is 65; accepted are 32, 64"),
    (torch.ones(5), {"kind": "nf5"}, ValueError, "kind is 'nf5'; accepted are 'nf4'"),
    (torch.full((6400,), 3e38), {"double_quant": True}, ValueError, "mean of the scales"),
])
def test_what_cannot_be_quantised_is_refused_by_name(t, settings, error, says):
    with pytest.raises(error, match=says):
        mp.nf4.quantize(t, **settings)


def test_where_the_compiled_kernels_are_built_they_are_used_and_change_no_bit(monkeypatch):
    monkeypatch.undo()
    kernels = pytest.importorskip("minipeft.quant.kernels")
    x = several(0, 40, 70)
    if kernels.available():
        assert nf4.compiled(x, "nf4") is kernels and agrees(x) and agrees(x.half(), nested=True)
    calls = []
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "quantize", lambda t, b: calls.append("quantize") or nf4.quantize_blocks(t, b))
    monkeypatch.setattr(kernels, "dequantize", lambda *a, **k: calls.append("dequantize") or torch.zeros(2800))
    nf4.dequantize(nf4.quantize(x))
    assert calls == ["quantize", "dequantize"]
    assert nf4.compiled(x, "fp4") is None and nf4.compiled(x.to("meta"), "nf4") is None
