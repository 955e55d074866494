"""minipeft: parameter-efficient fine-tuning, built from scratch, small enough to read.

    import minipeft as mp

    model, tokenizer = mp.load_base("smollm2-135m")
    mp.attach(model, mp.LoRA(rank=8, targets="all-linear"))
    mp.fit(model, tokenizer, mp.load_data("drug_cards"), mp.FitConfig(steps=300))
    mp.save_adapter(model, "my-adapter")

Names are imported when they are first used, so that `import minipeft` costs next to nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "sockets": ("attach", "detach", "activate", "active", "merge", "unmerge", "fold", "adapters", "Adapter"),
    "methods.lora": ("LoRA",),
    "methods.prompt_tuning": ("PromptTuning",),
    "methods.p_tuning": ("PTuning",),
    "methods.prefix_tuning": ("PrefixTuning",),
    "methods.dora": ("DoRA",),
    "methods.ia3": ("IA3",),
    "methods.bitfit": ("BitFit",),
    "methods.adapters": ("BottleneckAdapter", "average_adapters"),
    "quant.linear4bit": ("quantize", "Linear4bit"),
    "quant.loftq": ("quantize_loftq",),
    "arithmetic": ("combine", "reduce_rank"),
    "base": ("load_base",),
    "data": ("load_data", "score_cards"),
    "training": ("fit", "evaluate", "FitConfig"),
    "generation": ("generate",),
    "serve": ("Serve",),
    "checkpoint": ("save_adapter", "load_adapter"),
    "latency": ("measure_latency", "count_operators"),
    "bill": ("parameter_report", "memory_bill"),
    "choosing": ("recommend",),
    "profiles": ("profile", "pick"),
}
# No file bears a public function's name: importing it would hide the function behind the module.
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
_SUBMODULES = {name: name for name in ("anatomy", "base", "bill", "checkpoint", "checks", "data", "fetch", "lab", "latency",
                                       "methods", "quant", "sockets")} | {"nf4": "quant.nf4"}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{_SUBMODULES[name]}")
    raise AttributeError(f"module 'minipeft' has no name {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *_SUBMODULES})
