"""Proves that ``secura-eval`` scores the same at an endpoint and in this process, and both like an
oracle; that a report is whole; that what goes wrong is one clear message with status 2.

Needs the session's real server, the embedded base, matplotlib and lm_eval.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from secura_serve.evaluate import load_task
from secura_serve.evaluate.config import EvalConfig
from secura_serve.evaluate.main import main
from secura_serve.evaluate.models.endpoint import Endpoint
from secura_serve.evaluate.models.local import Local
from secura_serve.method import MagNorm
from tests.support import ROOT
from tests.support.engines import Served, free_port, random_adapter
from tests.support.oracle import adapted

TEXTS = [
    "The mill stood at the end of the village, where the river leaves the road and turns south.",
    "Nobody had asked him, but he explained it all the same, and then he explained it again.",
]


def _endpoint(served: Served, **more: object) -> EvalConfig:
    return EvalConfig(tasks=("iso-date",), out="-", endpoint=served.url, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def local() -> Local:
    adapters = tuple(str(ROOT / "adapters" / n) for n in ("iso-date", "iso-date-bounded"))
    return Local(
        EvalConfig(tasks=("x",), out="-", base="smollm2-135m", adapter=adapters, dtype="float32")
    )


@torch.no_grad()
def _oracle(base: Path, adapter: Path) -> tuple[float, float]:
    """KL(base ‖ adapted) and perplexity ratio, text by text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain, model = adapted(base, None), adapted(base, adapter)
    kl = moved = 0.0
    tokens = 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        p = plain(ids).logits[0, :-1].log_softmax(-1)
        q = model(ids).logits[0, :-1].log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        moved += float((p - q).gather(1, ids[0, 1:, None]).sum())
        tokens += len(p)
    return kl / tokens, float(torch.tensor(moved / tokens).exp())


def test_endpoint_and_process_agree(served: Served, local: Local) -> None:
    config = _endpoint(served, model=("iso-date",))
    remote = Endpoint(config)
    assert remote.names == ("smollm2-135m", "iso-date") and remote.base == "smollm2-135m"
    prompts = [prompt for prompt, _ in load_task("iso-date").rows("test")[:6]]
    said = {}
    for name in remote.names:
        said[name], there = (m.answers(name, prompts, 8) for m in (local, remote))
        # Greedy ties may break either way in another order of summation.
        assert sum(a == b for a, b in zip(said[name], there, strict=True)) >= 5
    assert said["iso-date"] != said["smollm2-135m"]

    kl, ratio = _oracle(served.base_path, ROOT / "adapters" / "iso-date")
    here, there = local.drift("iso-date", TEXTS), remote.drift("iso-date", TEXTS)
    assert here.kl == pytest.approx(kl, rel=1e-3)
    assert [here.perplexity_ratio, there.perplexity_ratio] == pytest.approx([ratio] * 2, rel=1e-4)
    assert here.tokens == there.tokens == here.kl_tokens
    assert there.kl is None and "--kl-texts" in str(there.kl_missing)
    # This server was started without --max-logprobs.
    refused = Endpoint(replace(config, kl_texts=1)).drift("iso-date", TEXTS)
    assert refused.kl is None and "--max-logprobs -1" in str(refused.kl_missing)


@pytest.mark.long
def test_a_normed_adapter_in_this_process(local: Local, smollm2: Path) -> None:
    kl, ratio = _oracle(smollm2, ROOT / "adapters" / "iso-date-bounded")
    prompt = [load_task("iso-date").rows("test")[0][0]]
    before = local.answers("smollm2-135m", prompt, 8)
    local.answers("iso-date-bounded", prompt, 8)
    found = local.drift("iso-date-bounded", TEXTS)
    assert (found.kl, found.perplexity_ratio) == pytest.approx((kl, ratio), rel=1e-3)
    assert local.answers("smollm2-135m", prompt, 8) == before


def test_a_report_is_whole(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    argv = f"--endpoint {served.url} --model iso-date --tasks iso-date,capitals --limit 3".split()
    argv += ["--no-retention", "--out", str(out)]
    assert main(argv) == 0
    facts = json.loads((out / "results.json").read_text())
    assert facts["models"] == ["smollm2-135m", "iso-date"]
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 3
    for task in ("iso-date", "capitals"):
        for model in facts["models"]:
            right = [x["right"] for x in lines if (x["task"], x["model"]) == (task, model)]
            assert facts["tasks"][task]["scores"][model]["right"] == sum(right)
            assert facts["tasks"][task]["scores"][model]["n"] == 3
    assert facts["tasks"]["iso-date"]["against_base"]["iso-date"]["p"] <= 1
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    assert "| iso-date (test, n = 3) |" in text and text in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert main(argv) == 2 and "--overwrite" in capsys.readouterr().err


def test_what_the_endpoint_refuses(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*flags: str, url: str = served.url, status: int = 1) -> str:
        argv = ["--endpoint", url, "--tasks", "iso-date", "--no-retention", "--limit", "2"]
        assert main([*argv, "--out", "never", *flags]) == status
        assert not Path("never").exists()
        return capsys.readouterr().err

    assert "cannot be reached" in said("--retries", "0", url=f"http://127.0.0.1:{free_port()}")
    assert "did you mean 'iso-date'" in said("--model", "iso-dat", status=2)
    admin = served.url.removesuffix("/v1") + "/admin"
    httpx.post(f"{admin}/fold", json={"name": "iso-date-bounded"}, timeout=60).raise_for_status()
    folded = said("--model", "iso-date")
    httpx.post(f"{admin}/unfold", timeout=60).raise_for_status()
    assert "iso-date-bounded" in folded and "409" in folded and "fold" in folded
    assert "within 0.001 s" in said("--timeout", "0.001", "--retries", "0")


@pytest.mark.long
def test_settings_are_checked_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "o")]
    assert main(["--tasks", "iso-date", *out]) == 2
    assert "--endpoint URL or --base NAME" in capsys.readouterr().err
    asked = ["--tasks", "capitol,sst2", "--base", "smollm2-135m", "--limit", "2"]
    assert main([*asked, *out, "--task-data", "sst2=nowhere"]) == 2
    told = capsys.readouterr().err
    assert "capitol" in told and "sst2" in told
    assert not (tmp_path / "o").exists()


def test_adapters_of_another_base(
    tiny_base: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--base", str(tiny_base("llama")), "--tasks", "iso-date"]
    argv += ["--out", str(tmp_path / "o"), "--adapter", str(ROOT / "adapters" / "extract")]
    assert main([*argv, "--no-retention"]) == 1
    assert "another base" in capsys.readouterr().err
    argv += ["--adapter", str(tmp_path / "none")]
    assert main([*argv, "--no-retention"]) == 2
    told = capsys.readouterr().err
    assert "another base" in told and "no such folder" in told
    # Together with a package that is not installed.
    monkeypatch.setattr("secura_serve.evaluate.neutral_text.FORTUNES", tmp_path)
    monkeypatch.setattr("secura_serve.evaluate.neutral_text.WORDNET", tmp_path)
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert all(part in told for part in ("fortunes", "another base", "no such folder"))


@pytest.mark.long
def test_retention_of_a_whole_run(
    tiny_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secura_serve.evaluate import run
    from secura_serve.evaluate.neutral_text import Prose

    # A base without meaning answers at random, which is enough to see that nothing is mixed up.
    monkeypatch.setattr(run, "neutral_texts", lambda: Prose("two sentences", TEXTS))
    monkeypatch.setattr(run, "KNOWLEDGE", ("capitals",))
    base = tiny_base("llama")
    nothing = random_adapter(base, tmp_path / "nothing", r=4, seed=1, size=0)
    normed = random_adapter(
        base, tmp_path / "normed", r=4, seed=2, size=4, magnorm=MagNorm("bounded", tau=0.5)
    )
    acts = random_adapter(
        base, tmp_path / "acts", r=4, seed=3, size=4, magnorm=MagNorm("reference")
    )
    folders = (str(nothing), str(normed), str(acts))
    config = EvalConfig(
        tasks=("capitals",), out="-", base=str(base), adapter=folders,
        limit=3, dtype="float32",
    )  # fmt: skip
    found = run.evaluate(config).retention["models"]
    assert found["nothing"]["kl"] == 0 and found["nothing"]["perplexity_ratio"] == 1
    assert found["nothing"]["answers_unchanged"]["accuracy"] == 1
    assert found["normed"]["kl"] > 0.01
    assert found["normed"]["answers_unchanged"]["accuracy"] < 1
    assert found["acts"]["kl"] > 0.01


def test_plain_lora_in_this_process(
    tiny_base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folders = tiny_base("llama"), [tmp_path / "a.1", tmp_path / "b"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        settings = LoraConfig(r=4, use_dora=bool(seed), init_lora_weights=False)
        get_peft_model(copy.deepcopy(model), settings).save_pretrained(folder)
    config = EvalConfig(
        tasks=("x",), out="-", base=str(base), adapter=tuple(map(str, folders)), dtype="float32"
    )
    local = Local(config)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        for name in (str(base), "b", "a.1", str(base)):
            local._become(name)
            alone = copy.deepcopy(model)
            if name != str(base):
                alone = PeftModel.from_pretrained(alone, tmp_path / name)
            torch.testing.assert_close(local._model(ids).logits, alone.eval()(ids).logits)
    assert local.drift("b", TEXTS).kl > 0
    argv = ["--base", str(base), "--tasks", "iso-date", "--no-retention"]
    argv += ["--out", str(tmp_path / "o")]
    for other, said in (
        (ROOT / "adapters" / "extract", "another base"),
        (base, "give it as --base"),
        (random_adapter(base, tmp_path / "cur", r=4, seed=1), "models of their own"),
    ):
        assert main([*argv, "--adapter", f"{folders[1]},{other}"]) == 1
        assert said in capsys.readouterr().err


def test_the_harness_on_local_data(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"sentence": "a wonderful film", "label": 1, "idx": 0},
        {"sentence": "dull and far too long", "label": 0, "idx": 1},
    ]
    data, other = tmp_path / "sst2.jsonl", tmp_path / "other.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text('{"question": "?"}\n')
    argv = f"--endpoint {served.url} --model sentiment --tasks sst2 --no-retention".split()
    argv += ["--out", str(tmp_path / "o"), "--task-data"]
    assert main([*argv, f"sst2={data}"]) == 0
    found = json.loads((tmp_path / "o" / "results.json").read_text())["harness"]["sst2"]
    assert {s["n"] for s in found["scores"].values()} == {2}
    assert all(s["metrics"]["acc"]["value"] in (0, 0.5, 1) for s in found["scores"].values())
    assert main([*argv, f"sst2={other}", "--overwrite"]) == 1
    assert "layout" in capsys.readouterr().err
