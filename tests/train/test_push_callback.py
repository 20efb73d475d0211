"""Proves that a training run updates a server as it goes: when it pushes, what it pushes, that a
failing server ends no run unless asked to, and that secura-train has it as flags.

Needs peft, transformers, trl, the tiny bases of conftest.py and loopback sockets: the server is a
real one, but only takes notes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_serve import ConfigError, PushError, SecuraConfig, adapter
from secura_serve.train import PushCallback, adapter_layers
from secura_serve.train.main import main, settings
from secura_serve.train.output.card import is_written
from tests.support.pushes import Receiver, error, parts, receiving
from tests.support.training import PAIRS, flags, tensors, write

TinyBase = Callable[[str], Path]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def server() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def trainer(base: Path, folder: Path, callback: PushCallback, **settings: Any) -> Any:
    rows = [{"prompt": row["prompt"], "completion": " " + row["completion"]} for row in PAIRS]
    peft = SecuraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base),
        args=trl.SFTConfig(
            str(folder),
            max_steps=5,
            learning_rate=0.01,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            **settings,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft,
        callbacks=[callback],
    )


def cores(body: bytes) -> dict[str, torch.Tensor]:
    return {key: value for key, value in load(body).items() if key.endswith("secura_U")}


@pytest.mark.long
def test_a_trl_run_pushes_every_few_steps_and_at_the_end(
    server: Receiver, tiny_base: TinyBase, tmp_path: Path
) -> None:
    callback = PushCallback(server.url, "live", 2)
    run = trainer(tiny_base("llama"), tmp_path / "run", callback)
    run.train()
    # Steps 2 and 4, and 5, the last; the server knows no basis, so each came whole.
    whole = [r for r in server.requests if not r[0].endswith("/weights")]
    assert (callback.pushed, callback.failed, len(whole)) == (3, 0, 3)
    sent = [cores(parts(headers, body)[WEIGHTS]) for _, headers, body in whole]
    assert all(not torch.equal(sent[0][key], sent[1][key]) for key in sent[0])
    run.save_model(tmp_path / "end")
    saved = {k: v for k, v in tensors(tmp_path / "end").items() if k.endswith("secura_U")}
    assert saved.keys() == sent[-1].keys()
    assert all(torch.equal(saved[key], sent[-1][key]) for key in saved)

    server.requests.clear()
    server.bases["live"] = adapter.base_id(adapter.load(tmp_path / "end"))
    for layer in adapter_layers(run.model, "default").values():
        layer.secura_U["default"].data.zero_()
    run.train()
    assert server.paths() == ["/v1/adapters/live/weights"] * 3
    assert callback.last is not None and not callback.last.whole


@pytest.mark.long
def test_a_push_at_the_last_step_is_not_repeated(
    server: Receiver, tiny_base: TinyBase, tmp_path: Path
) -> None:
    callback = PushCallback(server.url, "live", 5)
    trainer(tiny_base("llama"), tmp_path / "run", callback).train()
    assert callback.pushed == 1


@pytest.mark.long
def test_a_failing_server_is_a_warning(
    server: Receiver, tiny_base: TinyBase, tmp_path: Path
) -> None:
    server.refusals = [(503, error("full")), (500, error("broken"))]
    callback = PushCallback(server.url, "live", 2)
    run = trainer(tiny_base("llama"), tmp_path / "run", callback)
    with pytest.warns(UserWarning) as warned:
        run.train()
    said = [str(w.message) for w in warned if "push" in str(w.message)]
    assert "step 2" in said[0] and "full" in said[0]
    assert "step 4" in said[1] and "broken" in said[1]
    assert "2 of 3 pushes" in said[2] and callback.last and callback.last.digest in said[2]
    assert run.state.global_step == 5 and (callback.pushed, callback.failed) == (1, 2)


@pytest.mark.long
def test_a_failing_server_ends_the_run_where_that_is_asked_for(
    server: Receiver, tiny_base: TinyBase, tmp_path: Path
) -> None:
    server.refusals = [(503, error("full"))]
    callback = PushCallback(server.url, "live", 2, on_error="raise")
    run = trainer(tiny_base("llama"), tmp_path / "run", callback)
    with pytest.raises(PushError, match="full"):
        run.train()
    assert run.state.global_step == 2


@pytest.mark.long
def test_an_adapter_that_is_not_there_is_said_before_the_first_step(
    server: Receiver, tiny_base: TinyBase, tmp_path: Path
) -> None:
    callback = PushCallback(server.url, "live", 2, adapter="other")
    run = trainer(tiny_base("llama"), tmp_path / "run", callback)
    with pytest.raises(ConfigError, match="other"):
        run.train()
    assert run.state.global_step == 0 and server.requests == []


@pytest.mark.parametrize(
    "wrong",
    [{"every_steps": -1}, {"on_error": "ignore"}, {"name": "a@b"}, {"endpoint": "here"}],
)
def test_settings_that_are_not_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PushCallback(**{"endpoint": "http://127.0.0.1:9", "name": "live"} | wrong)


@pytest.mark.long
def test_secura_train_pushes(
    server: Receiver, tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECURA_ADMIN_API_KEY", "of-the-shell")
    data, out = write(tmp_path / "sums.jsonl", PAIRS), tmp_path / "sums"
    argv = flags(tiny_base("llama"), data, out, "--push-to", server.url, "--push-every", "4")
    assert main(argv) == 0
    # 6 steps: the fourth and the end.
    assert server.paths() == ["/v1/adapters/sums/weights", "/v1/adapters/sums"] * 2
    assert all(h["authorization"] == "Bearer of-the-shell" for _, h, _ in server.requests)
    _, headers, body = server.requests[-1]
    sent = cores(parts(headers, body)[WEIGHTS])
    saved = {k: v for k, v in tensors(out).items() if k.endswith("secura_U")}
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[key], saved[key]) for key in sent)
    # Where a run was pushed to is no part of its recipe, which an earlier version may have written.
    facts = json.loads((out / "train.json").read_text())
    assert server.url not in json.dumps(facts) and is_written(settings(argv))
    facts["config"] = {k: v for k, v in facts["config"].items() if not k.startswith("push_")}
    (out / "train.json").write_text(json.dumps(facts))
    assert is_written(settings(argv))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--push-name", "x"), "--push-name: needs --push-to"),
        (("--push-every", "3"), "--push-every: needs --push-to"),
        (("--push-to", "http://h", "--push-every", "-1"), "--push-every: got -1"),
        (("--push-to", "http://h", "--method", "lora"), "--push-to: not supported by method lora"),
        (("--push-to", "nowhere"), "--push-to: got 'nowhere'"),
    ],
)
def test_flags_that_are_not_allowed(
    given: tuple[str, ...],
    says: str,
    tiny_base: TinyBase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "sums.jsonl", PAIRS)
    argv = flags(tiny_base("llama"), data, tmp_path / "sums", *given)
    assert main([a for a in argv if a not in ("--rank", "8")]) != 0
    assert says in capsys.readouterr().err
