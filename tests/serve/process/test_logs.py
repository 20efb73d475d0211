"""Proves that our lines stay as they are in text, and are one JSON object each under
``--log-format json``, like vLLM's and uvicorn's.

Needs python-json-logger, which comes with vLLM. The log of a running server is read in
``tests/attack/test_open_server.py``.
"""

from __future__ import annotations

import io
import json
import logging
import logging.config
import os
from collections.abc import Iterator
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
