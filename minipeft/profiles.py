"""What this machine can do, and which of three profiles the course runs in.

    smoke   the tests: the real small models, a few steps
    cpu     a laptop: a chapter takes minutes, and the model really learns
    gpu     a T4 and up: a larger model from the Hub, 16-bit arithmetic

The profile is `gpu` where torch finds a GPU and `cpu` elsewhere. `MINIPEFT_PROFILE` overrides it.
The same cells run in all three; `pick` gives each its own size.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

EMBEDDED_BASE = "smollm2-135m"
HUB_BASE = "HuggingFaceTB/SmolLM2-360M-Instruct"  # 0.7 GB to download; full fine-tuning fits a T4


@dataclass(frozen=True)
class Profile:
    name: str  # "smoke", "cpu" or "gpu"
    device: torch.device  # where models go
    base_model: str  # the language model it wants; `base_model()` asks whether it can be had


def profile() -> Profile:
    """The profile of this machine. Raises `ValueError` for an unknown `MINIPEFT_PROFILE`."""
    names = ("smoke", "cpu", "gpu")
    name = os.environ.get("MINIPEFT_PROFILE") or ("gpu" if torch.cuda.is_available() else "cpu")
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"MINIPEFT_PROFILE is {name!r}, not one of 'smoke', 'cpu', 'gpu'{hint}")
    if name == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            "MINIPEFT_PROFILE is 'gpu', but torch finds no GPU here: unset it, or choose 'cpu'"
        )
    return Profile(
        name,
        torch.device("cuda" if name == "gpu" else "cpu"),
        HUB_BASE if name == "gpu" else EMBEDDED_BASE,
    )


def pick(*, smoke, cpu, gpu):
    """The value for the current profile: `steps = pick(smoke=3, cpu=300, gpu=1000)`."""
    return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[profile().name]


def device() -> torch.device:
    """Where models go in the current profile."""
    return profile().device


def base_model() -> str:
    """The language model of the current profile, as a name for `load_base`.

    In the gpu profile that is a larger one from the Hub. Where the Hub is out of reach and the
    model was not downloaded before, it says so and gives the embedded one.
    """
    wanted = profile().base_model
    if wanted == EMBEDDED_BASE:
        return wanted
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(wanted, "config.json")  # 1 kB, or nothing if it is here already
    except Exception as error:  # whatever the reason, the chapter can go on
        print(
            f"{wanted} cannot be had from the Hub ({type(error).__name__}): "
            f"going on with {EMBEDDED_BASE}, which is smaller",
            file=sys.stderr,
        )
        return EMBEDDED_BASE
    return wanted


def precision(device: torch.device | str | None = None) -> str:
    """The arithmetic that pays on a device: "fp32", "bf16" or "fp16".

    GPU: bf16 from compute capability 8.0 (A100, RTX 30), below it fp16 (T4), which needs loss
    scaling. CPU: bf16 only where there are instructions for it (AMX-BF16 or AVX512-BF16);
    elsewhere torch imitates it and is slower than in fp32.
    """
    device = torch.device(device) if device is not None else profile().device
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11
        has = torch.cpu.get_capabilities()
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    questions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, question, bool)() for question in questions)


def memory_in_use(device: torch.device | str | None = None) -> int:
    """Bytes in use now: tensors on a GPU, the whole process (resident set) on a CPU."""
    device = torch.device(device) if device is not None else profile().device
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device | str | None = None) -> int:
    """The most bytes in use at any time since `reset_peak_memory`, or since the process began."""
    device = torch.device(device) if device is not None else profile().device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there starts from what the parent process used
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device | str | None = None) -> bool:
    """Let `peak_memory` start again from what is in use now. False where the system cannot."""
    device = torch.device(device) if device is not None else profile().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM to VmRSS
    except OSError:
        return False
    return True
