"""Proves that our lines stay as they are in text, and are one JSON object each under
``--log-format json``, like vLLM's and uvicorn's.

Needs python-json-logger, which comes with vLLM; the last test starts an engine,
with one slot, so that the metrics of its slots are checked there too.
"""

from __future__ import annotations

import io
import json
import logging
import logging.config
import os
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from secura_serve.errors import ConfigError
from secura_serve.serve import logs
from secura_serve.serve.app.main import main

pytest.importorskip("pythonjsonlogger", reason="comes with vLLM")


@pytest.fixture
def as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Our lines as JSON for one test; gives the file that vLLM reads."""
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "")
    monkeypatch.setattr(logs._Output, "json", None)
    logs.write_json(tmp_path)
    yield Path(os.environ["VLLM_LOGGING_CONFIG_PATH"])
    logging.captureWarnings(False)


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    logs.say("x is served")
    logs.say("\nready", prefix="")
    logs.say("oh", to_stderr=True)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("secura-serve: x is served\n\nready\n", "secura-serve: oh\n")


@pytest.mark.usefixtures("as_json")
def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.say('two\nlines "quoted"')
    logs.say("\nwarning: wide", prefix="", level=logging.WARNING)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert datetime.fromisoformat(first.pop("time")).utcoffset() == timedelta(0)
    assert first == {"level": "INFO", "logger": "secura_serve", "message": 'two\nlines "quoted"'}
    assert (second["level"], second["message"]) == ("WARNING", "warning: wide")


def test_vllm_and_uvicorn_log_alike(as_json: Path) -> None:
    settings = json.loads(as_json.read_text("utf-8"))
    assert settings["loggers"]["vllm"]["level"] == os.environ["VLLM_LOGGING_LEVEL"]
    output = io.StringIO()
    formatter = logging.config.DictConfigurator(settings).configure_formatter(
        settings["formatters"]["json"]
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(formatter)
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        failed = (type(error), error, error.__traceback__)
    access = '%s - "%s %s HTTP/%s" %d'
    for record in (
        logging.LogRecord(
            "uvicorn.access", 20, "", 0, access, ("::1", "GET", "/health", "1.1", 200), None
        ),
        logging.LogRecord("vllm.x", 40, "", 0, "it %s", ("failed",), failed),
    ):
        record.color_message = "not shown"
        handler.emit(record)
    request, failure = map(json.loads, output.getvalue().splitlines())
    assert request["message"] == '::1 - "GET /health HTTP/1.1" 200'
    assert set(request) == {"time", "level", "logger", "message"}
    assert (failure["level"], failure["logger"], failure["message"]) == (
        "ERROR",
        "vllm.x",
        "it failed",
    )
    assert "ZeroDivisionError" in failure["exc_info"]


def test_two_configurations_of_vllms_logging_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "mine.json")
    with pytest.raises(ConfigError, match="VLLM_LOGGING_CONFIG_PATH"):
        logs.write_json(tmp_path)


def test_a_failed_start_is_told_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_CONFIG_PATH", "")
    monkeypatch.setenv("SECURA_CACHE", str(tmp_path))
    monkeypatch.setattr(logs._Output, "json", None)
    assert main(["--base", "./nowhere", "--log-format", "json", "--check"]) != 0
    line = json.loads(capsys.readouterr().err)
    assert line["level"] == "ERROR" and "nowhere" in line["message"]


@pytest.mark.engine
def test_every_line_of_a_running_server_is_json_and_its_slots_are_counted(
    tiny_base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    from tests.support.engines import random_adapter, serving

    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    base, folder = tiny_base("llama"), tmp_path / "adapters"
    random_adapter(base, folder / "x", r=4, seed=1)
    log = tmp_path / "log"
    flags = "--enforce-eager --dtype float32 --max-model-len 128 --log-format json --max-loras 1"
    with serving(base, folder, log, *flags.split()) as server:
        ready = len(log.read_text("utf-8").splitlines())
        random_adapter(base, folder / "y", r=4, seed=2)
        root = server.url.removesuffix("/v1")
        request = urllib.request.Request(f"{root}/v1/adapters/reload", method="POST")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        client = openai.OpenAI(base_url=server.url, api_key="none")
        for name in ("x", "x", "y", "x"):
            client.completions.create(model=name, prompt="a", max_tokens=1)
        with urllib.request.urlopen(f"{root}/metrics") as answer:
            metrics = answer.read().decode().splitlines()
    # One slot: y takes that of x, which takes it back.
    assert "secura_adapter_loads_total 3.0" in metrics
    assert "secura_adapter_evictions_total 2.0" in metrics
    assert 'secura_adapters{state="resident"} 1.0' in metrics
    assert 'secura_adapters{state="known"} 2.0' in metrics
    assert 'secura_watch_events_total{kind="added"} 0.0' not in metrics
    lines = log.read_text("utf-8").splitlines()
    written = [json.loads(line) for line in lines[ready:]]
    loggers = {line["logger"] for line in written}
    assert {"secura_serve", "uvicorn.access"} <= loggers, lines
    assert any("y is served as y@" in line["message"] for line in written)
    # Libraries print past the logging system during the start; we and vLLM do not.
    started = [json.loads(line) for line in lines[:ready] if line.startswith("{")]
    assert any(line["message"].startswith("ADAPTER") for line in started)
    assert any(line["logger"].startswith("vllm.") for line in started)
