"""The gpu profile is tested where there is no GPU: stand-ins answer for torch.cuda and the Hub."""

import sys

import pytest
import torch

import minipeft as mp
from minipeft import profiles
from tests.fake_cuda import fake_cuda

MEGABYTE = 2**20


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU. `gpu(7, 5)` sets its compute capability."""
    monkeypatch.delenv("MINIPEFT_PROFILE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)

    def of(*capability):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)

    return of


def hub(monkeypatch, answer):
    """`answer(repository, file)` is what the Hub does; the list says what it was asked."""
    asked = []

    def download(repository, file, **settings):
        asked.append((repository, file))
        return answer(repository, file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_the_profile_follows_what_is_there(monkeypatch, gpu):
    assert mp.profile().name == "gpu" and mp.profile().device == torch.device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert mp.profile().name == "cpu" and mp.profile().device == torch.device("cpu")


@pytest.mark.parametrize("name, device", [("smoke", "cpu"), ("cpu", "cpu"), ("gpu", "cuda")])
def test_the_environment_overrides_the_profile(monkeypatch, gpu, name, device):
    monkeypatch.setenv("MINIPEFT_PROFILE", name)
    assert mp.profile().name == name and profiles.device().type == device
    assert mp.pick(smoke="smoke", cpu="cpu", gpu="gpu") == name


def test_an_empty_variable_is_no_choice(monkeypatch, gpu):
    monkeypatch.setenv("MINIPEFT_PROFILE", "")
    assert mp.profile().name == "gpu"


def test_an_unknown_profile_is_refused_with_the_names(monkeypatch):
    monkeypatch.setenv("MINIPEFT_PROFILE", "gppu")
    with pytest.raises(ValueError, match="'gppu', not one of 'smoke', 'cpu', 'gpu'; did you mean 'gpu'"):
        mp.pick(smoke=1, cpu=2, gpu=3)


def test_the_gpu_profile_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("MINIPEFT_PROFILE", "gpu")
    with pytest.raises(ValueError, match="finds no GPU"):
        mp.profile()


def test_a_gpu_gets_the_larger_model_of_the_hub(monkeypatch, gpu, capsys):
    asked = hub(monkeypatch, lambda repository, file: "somewhere")
    assert profiles.base_model() == profiles.HUB_BASE == mp.profile().base_model
    assert asked == [(profiles.HUB_BASE, "config.json")] and capsys.readouterr().err == ""


@pytest.mark.parametrize("problem", [OSError("no route"), ValueError("gone"), RuntimeError("proxy")])
def test_a_gpu_without_the_hub_gets_the_embedded_model_and_says_so(monkeypatch, gpu, capsys, problem):
    def unreachable(repository, file):
        raise problem

    hub(monkeypatch, unreachable)
    assert profiles.base_model() == "smollm2-135m"
    said = capsys.readouterr().err
    assert profiles.HUB_BASE in said and type(problem).__name__ in said and "smollm2-135m" in said


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_the_other_profiles_never_ask_the_hub(monkeypatch, name):
    asked = hub(monkeypatch, lambda repository, file: pytest.fail("asked the Hub"))
    monkeypatch.setenv("MINIPEFT_PROFILE", name)
    assert profiles.base_model() == "smollm2-135m" and asked == []


@pytest.mark.parametrize(
    "capability, expected",
    [((6, 1), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
    ids=["P40", "T4", "A100", "RTX 40", "RTX 50"],
)
def test_a_gpu_computes_in_bf16_where_it_can_and_in_fp16_elsewhere(gpu, capability, expected):
    gpu(*capability)
    assert profiles.precision() == profiles.precision("cuda") == profiles.precision("cuda:0") == expected


@pytest.mark.parametrize(
    "instructions, expected",
    [({"avx2": True}, "fp32"), ({"avx512_f": True}, "fp32"), ({"amx_tile": True, "amx_bf16": False}, "fp32"),
     ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({}, "fp32")],
)  # fmt: skip
def test_a_cpu_computes_in_bf16_only_with_instructions_for_it(monkeypatch, instructions, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: instructions, raising=False)
    assert profiles.precision("cpu") == expected


@pytest.mark.parametrize("amx, avx, expected", [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")])
def test_an_older_torch_is_asked_in_its_own_way(monkeypatch, amx, avx, expected):
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx, raising=False)
    assert profiles.precision("cpu") == expected
    monkeypatch.delattr("torch.cpu._is_amx_tile_supported")
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")
    assert profiles.precision("cpu") == "fp32"


def test_other_devices_stay_in_fp32():
    assert profiles.precision("mps") == "fp32"


def test_gpu_memory_is_read_from_torch(monkeypatch, gpu):
    told = []
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 111)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 222)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", told.append)
    assert profiles.memory_in_use() == profiles.memory_in_use("cuda") == 111
    assert profiles.peak_memory() == profiles.peak_memory("cuda") == 222
    assert profiles.reset_peak_memory() and told == [torch.device("cuda")]


def test_cpu_memory_is_that_of_the_process_in_bytes():
    before = profiles.memory_in_use("cpu")
    block = torch.ones(64 * MEGABYTE // 4)
    assert abs(profiles.memory_in_use("cpu") - before - 64 * MEGABYTE) < 8 * MEGABYTE
    del block


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_the_cpu_peak_starts_again_when_told_to():
    block = torch.ones(256 * MEGABYTE // 4)
    high = profiles.peak_memory("cpu")
    if not profiles.reset_peak_memory("cpu"):
        pytest.skip("this system does not let a process reset its peak")
    assert abs(profiles.peak_memory("cpu") - profiles.memory_in_use("cpu")) < 8 * MEGABYTE
    del block
    assert profiles.reset_peak_memory("cpu")
    low = profiles.peak_memory("cpu")
    assert high - low > 240 * MEGABYTE
    torch.ones(256 * MEGABYTE // 4)          # large: a system short of memory may take some of ours meanwhile
    assert 192 * MEGABYTE < profiles.peak_memory("cpu") - low < 264 * MEGABYTE


def test_the_peak_is_read_where_there_is_no_proc(monkeypatch):
    from pathlib import Path

    real = profiles.peak_memory("cpu")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert 0.5 * real < profiles.peak_memory("cpu") < 4 * max(real, 2**30)
    monkeypatch.setattr(sys, "platform", "darwin")  # there getrusage counts bytes
    assert profiles.peak_memory("cpu") < real / 64


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_forward_pass_runs_on_fake_cuda_tensors(monkeypatch, capability, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.delenv("MINIPEFT_PROFILE", raising=False)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with fake_cuda(capability):
        device = profiles.device()
        assert mp.profile().name == "gpu" and device.type == "cuda"
        with device:
            model = LlamaForCausalLM(config)
            ids = torch.zeros(2, 7, dtype=torch.long)
        kinds = {"fp16": torch.float16, "bf16": torch.bfloat16}
        with torch.autocast(device.type, kinds[profiles.precision(device)]):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert logits.shape == (2, 7, 50) and logits.dtype == dtype
        assert logits.device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="(?i)device"):
            model.lm_head(torch.zeros(1, 32))  # forgotten on the CPU
