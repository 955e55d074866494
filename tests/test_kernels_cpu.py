"""The compiled kernels on the CPU: every instruction set that this processor has, against bitsandbytes and float64."""

import os
import subprocess
import sys

import pytest
import torch

from minipeft.quant import double_quant, kernels, nf4

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def built():
    if not kernels.build():
        pytest.skip(f"the kernels cannot be built here: {kernels._failed or 'MINIPEFT_KERNELS=off'}")


@pytest.fixture(params=["plain", "avx2", "avx512"])
def path(request, built):
    before = kernels.paths()
    if request.param not in before:
        pytest.skip(f"this processor has no {request.param}; it has {', '.join(before)}")
    kernels.path(request.param)
    yield request.param
    kernels.path(before[0])


def awkward(dtype) -> list[torch.Tensor]:
    """Sizes around the block and its multiples; every magnitude that the dtype has; ties, zeros, constants."""
    torch.manual_seed(0)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    tensors = [torch.randn(n, dtype=F32).to(dtype) for n in (1, 2, 31, 32, 33, 63, 64, 65, 127, 4095, 4096, 4097)]
    tensors += [((torch.rand(515) * 2 - 1) * scale).to(dtype) for scale in (largest, smallest, smallest / 16, 1e-3)]
    tensors += [torch.full((130,), v, dtype=dtype) for v in (0.0, -0.0, 1.0, -largest, smallest / 4)]
    midpoints = (nf4.CODEBOOK[:-1] + nf4.CODEBOOK[1:]) / 2
    ties = torch.cat([midpoints, torch.nextafter(midpoints, torch.tensor(9.0)), -torch.ones(1), nf4.CODEBOOK, torch.zeros(17)])
    tensors += [ties.to(dtype), (ties * 3e-5).to(dtype), torch.cat([ties, ties[:37]]).to(dtype)]
    return tensors


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes_to_the_last_bit(path, dtype):
    from bitsandbytes import functional as bnb
    for t in awkward(dtype):
        for block_size in (32, 64, 128):
            theirs, state = bnb.quantize_4bit(t, blocksize=block_size, quant_type="nf4")
            packed, absmax = kernels.quantize(t, block_size)
            assert torch.equal(packed, theirs.view(-1)), (path, len(t), block_size)
            assert torch.equal(absmax, state.absmax.view(-1)), (path, len(t), block_size)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_dequantised_values_are_those_of_bitsandbytes_to_the_last_bit(path, dtype):
    from bitsandbytes import functional as bnb
    for t in awkward(dtype):
        if len(t) % 2:      # bitsandbytes compiles something else for an odd size; the next test has them
            continue
        theirs, state = bnb.quantize_4bit(t, quant_type="nf4")
        ours = kernels.dequantize(theirs.view(-1), state.absmax.view(-1), len(t), dtype=dtype)
        assert torch.equal(ours, bnb.dequantize_4bit(theirs, state).view(-1)), (path, len(t))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 4095, 4096, 64 * 256 + 7, 64 * 700 + 33])
def test_double_quantised_scales_are_computed_on_the_way(path, n, dtype):
    t = torch.randn(n)
    packed, absmax = kernels.quantize(t)
    scales = double_quant.quantize_scales(absmax)
    if n == 1:      # one scale is its own mean
        scales = double_quant.QuantizedScales(torch.tensor([200], dtype=torch.uint8), torch.tensor([0.3]), torch.tensor(0.7))
    levels = torch.stack([nf4.CODEBOOK[(packed >> 4).int()], nf4.CODEBOOK[(packed & 15).int()]], 1).view(-1)[:n]
    spread = double_quant.dequantize_scales(scales).repeat_interleave(64)[:n]
    assert torch.equal(kernels.dequantize(packed, scales, n, dtype=dtype), (levels * spread).to(dtype))


def test_a_number_that_is_not_finite_shows_in_its_scale(path):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for n, at in ((256, 70), (256, 64), (256, 127), (200, 199), (30, 3)):
            t = torch.randn(n)
            t[at] = bad
            absmax = kernels.quantize(t)[1]
            finite = torch.ones(len(absmax), dtype=torch.bool)
            finite[at // 64] = False
            assert torch.equal(absmax.isfinite(), finite), (bad, n, at)


def matrix(outputs, columns, nested=False, block_size=64):
    """Codes, scales, and in float64 the matrix that they stand for."""
    packed, scales = kernels.quantize(torch.randn(outputs, columns), block_size)
    if nested:
        scales = double_quant.quantize_scales(scales)
    return packed, scales, kernels.dequantize(packed, scales, outputs * columns, block_size).view(outputs, columns).double()


@pytest.mark.parametrize("columns,block_size", [(64, 64), (576, 64), (2048 + 64, 64), (256, 128), (96, 32), (77, 64), (130, 64), (1, 64)])
def test_products_have_the_accuracy_of_float32(path, columns, block_size):
    for nested in (False, True):
        packed, scales, W = matrix(37, columns, nested, block_size)
        for rows in (1, 2, 3, 4, 7, 8, 31, 32, 33, 64):
            x = torch.randn(rows, columns)
            exact, float32 = x.double() @ W.T, x @ W.float().T
            y = kernels.gemm(x, packed, scales, (37, columns), block_size)
            size = x.double().abs() @ W.T.abs() + 1e-30       # what rounding errors are relative to
            worst, theirs = ((t - exact).abs() / size for t in (y, float32))
            assert worst.max() <= max(2 * theirs.max().item(), 3e-7), (rows, nested)
            assert exact.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [F16, BF16, torch.float64], ids=str)
def test_products_keep_the_dtype_and_are_rounded_once(path, dtype):
    packed, scales, W = matrix(50, 192)
    for rows in (1, 5, 40):
        x = torch.randn(2, rows, 192).to(dtype)
        y, exact = kernels.gemm(x, packed, scales, (50, 192)), x.double() @ W.T
        assert y.dtype == dtype and y.shape == (2, rows, 50)
        error = ((y.double() - exact).abs().max() / exact.abs().max()).item()
        assert error <= max(torch.finfo(dtype).eps, 1e-7 if dtype != torch.float64 else 0) * 1.01, (rows, error)


def test_gradients_are_right_and_have_gradients():
    packed, scales, W = matrix(10, 66, nested=True)
    x = torch.randn(3, 66, dtype=torch.float64, requires_grad=True)

    def product(x):
        return kernels.gemm(x, packed, scales, (10, 66))

    assert torch.autograd.gradcheck(product, x) and torch.autograd.gradgradcheck(product, x)
    x = torch.randn(40, 66, requires_grad=True)
    weights = torch.randn(40, 10)
    (product(x) * weights).sum().backward()
    exact = weights.double() @ W
    assert (x.grad - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_matrix_of_several_panels_gives_the_sum_of_all_and_nothing_of_what_lay_there_before():
    outputs, columns = 2500, 2000                                # 5,000,000 numbers: decoded in two panels
    packed, scales = torch.ops.minipeft.nf4_quantize(torch.randn(outputs * columns), 64)
    W = torch.ops.minipeft.nf4_dequantize(packed, scales, outputs * columns, 64, F32).view(outputs, columns)
    for transposed, x, expected in ((False, torch.randn(40, columns), lambda x: x @ W.double().T),
                                    (True, torch.randn(40, outputs), lambda x: x @ W.double())):
        for _ in range(2):                                       # the second one where the first one's memory is free again
            y = torch.ops.minipeft.nf4_product(x, packed, scales, outputs, columns, 64, transposed)
            assert (y - expected(x.double())).norm() < 1e-6 * y.norm()
            y.fill_(1e6)


def test_the_gradient_keeps_the_codes_and_not_the_matrix():
    packed, scales, _ = matrix(64, 64)
    kept = []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.gemm(x, packed, scales, (64, 64)).sum()
    assert {t.data_ptr() for t in kept if t.numel()} <= {packed.data_ptr(), scales.data_ptr()}


def test_compiled_and_shape_only_tensors_work():
    packed, scales, W = matrix(10, 64, nested=True)
    compiled = torch.compile(lambda x: kernels.gemm(x, packed, scales, (10, 64)).relu(), fullgraph=True, backend="aot_eager")
    for rows in (2, 50):
        x = torch.randn(rows, 64, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        exact = (x.double() @ W.T).relu()
        assert torch.allclose(y.double(), exact, atol=1e-5)
        assert torch.allclose(x.grad.double(), (exact > 0).double() @ W, atol=1e-5)
    t = torch.empty(7, 11, device="meta", dtype=BF16)
    packed, absmax = kernels.quantize(t)
    assert packed.shape == (39,) and packed.dtype == torch.uint8 and absmax.shape == (2,) and absmax.dtype == F32
    assert kernels.dequantize(packed, absmax, 77, dtype=F16).shape == (77,)
    assert kernels.gemm(torch.empty(2, 3, 11, device="meta"), packed, absmax, (7, 11)).shape == (2, 3, 7)


def test_the_operators_pass_pytorchs_own_checks():
    packed, scales, _ = matrix(10, 64)
    x = torch.randn(3, 64, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.minipeft.nf4_product.default, (x, packed, scales, 10, 64, 64), test_utils=checks)
    torch.library.opcheck(torch.ops.minipeft.nf4_quantize.default, (x.detach(), 64), test_utils=checks)
    torch.library.opcheck(torch.ops.minipeft.nf4_dequantize.default, (packed, scales, 640, 64, BF16), test_utils=checks)
    torch.library.opcheck(torch.ops.minipeft.nf4_dequantize_out.default, (packed, scales, 64),
                          {"out": torch.empty(640)}, test_utils=checks)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_result_larger_than_the_caches_goes_anywhere_in_memory(path, dtype):
    """Stores past the caches want aligned addresses; `out` need not have one. Two threads share the work."""
    n = (1 << 24) // dtype.itemsize + 64 * 5 + 13
    packed = torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8)
    absmax = torch.rand((n + 63) // 64)
    wanted = nf4.dequantize(nf4.Quantized(packed, absmax, (n,), dtype))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for shift in (0, 1, 8):
                room = torch.full((n + shift + 1,), torch.nan, dtype=dtype)
                kernels.dequantize(packed, absmax, n, out=room[shift:n + shift])
                assert torch.equal(room[shift:n + shift], wanted) and room[n + shift].isnan() and room[:shift].isnan().all()
    finally:
        torch.set_num_threads(threads)


def test_a_wrong_size_or_dtype_is_refused_by_name():
    packed, scales, _ = matrix(10, 64)
    x = torch.randn(3, 64)
    for wrong, call in {
        "last dimension of x must be 64": lambda: kernels.gemm(x[:, :63], packed, scales, (10, 64)),
        "packed must be 320": lambda: kernels.gemm(x, packed[:-1], scales, (10, 64)),
        "absmax must be 10": lambda: kernels.gemm(x, packed, scales[:-1], (10, 64)),
        "absmax must be 20": lambda: kernels.gemm(x, packed, scales, (10, 64), 32),
        "block_size must be even and positive; it is 0": lambda: kernels.quantize(x, 0),
        "block_size must be even and positive; it is 33": lambda: kernels.quantize(x, 33),
        "out has 3 elements; 640": lambda: kernels.dequantize(packed, scales, 640, out=torch.empty(3)),
        "out must be contiguous": lambda: kernels.dequantize(packed, scales, 640, out=torch.empty(1280)[::2]),
        "no path 'avx3'": lambda: kernels.path("avx3"),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            call()
    for wrong, call in {
        "this is Double": lambda: kernels.quantize(x.double()),
        "this is Int": lambda: kernels.dequantize(packed, scales, 640, dtype=torch.int32),
        "packed must be uint8": lambda: kernels.gemm(x, packed.int(), scales, (10, 64)),
        "absmax must be float32": lambda: kernels.gemm(x, packed, scales.double(), (10, 64)),
        "x must be floating point": lambda: kernels.gemm(x.int(), packed, scales, (10, 64)),
    }.items():
        with pytest.raises(TypeError, match=wrong):
            call()


def test_empty_inputs_give_empty_results():
    packed, scales, _ = matrix(10, 64)
    assert kernels.gemm(torch.empty(0, 64), packed, scales, (10, 64)).shape == (0, 10)
    assert [t.numel() for t in kernels.quantize(torch.empty(0))] == [0, 0]


BUILD = """
from minipeft.quant import kernels, nf4
import torch
print(kernels.build(), kernels.build(), kernels.available())
print(nf4.dequantize(nf4.quantize(torch.ones(64))).sum().item())
"""


def alone(tmp_path, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BUILD], text=True, capture_output=True, timeout=300,
                          env=os.environ | {"MINIPEFT_CACHE": str(tmp_path)} | settings)


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path):
    answer = alone(tmp_path, CXX="no-such-compiler")
    assert answer.stdout.split() == ["False", "False", "False", "64.0"], answer.stderr
    assert answer.stderr.count("cannot be built here") == 1
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.part-*"))


def test_the_environment_can_switch_them_off(tmp_path):
    answer = alone(tmp_path, MINIPEFT_KERNELS="off")
    assert answer.stdout.split() == ["False", "False", "False", "64.0"] and not answer.stderr
