"""What the server prints: our own lines, as text or as JSON, and how vLLM is told to log alike."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from secura_serve.errors import ConfigError

__all__ = ["LOGGING_FILE", "follow", "is_json", "say", "vllm_logging", "write_json"]

_LOGGER = "secura_serve"
LOGGING_FILE = "VLLM_LOGGING_CONFIG_PATH"
"""Environment variable of vLLM's: the file that says how its processes log."""


class _Output:
    """How this process prints our lines; None: as text."""

    json: logging.Formatter | None = None


def say(
    text: str,
    *,
    prefix: str = "secura-serve: ",
    level: int | None = None,
    logger: str = _LOGGER,
    to_stderr: bool = False,
) -> None:
    """Print one line of ours.

    Args:
        prefix: what stands before ``text``; JSON, which names the logger, leaves it out.
        level: of the ``logging`` module; shown in JSON only. By default that of a warning for a
            text that begins with ``warning:``.
        logger: shown in JSON only.
    """
    line = f"{prefix}{text}"
    if _Output.json is not None:
        if level is None:
            warns = text.lstrip().startswith("warning:")
            level = logging.WARNING if warns else logging.INFO
        record = logging.LogRecord(logger, level, "", 0, text.strip(), None, None)
        line = _Output.json.format(record)
    # A full disk or a closed pipe must not end what is being reported.
    with suppress(OSError, ValueError):
        line = line.encode(errors="backslashreplace").decode()
        print(line, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def write_json(folder: Path) -> None:
    """Have this process, and vLLM's processes that it starts, log as JSON from now on.

    To be called before vLLM is imported.

    Args:
        folder: where the file is kept that vLLM's processes read.

    Raises:
        ConfigError: vLLM's logging is configured otherwise already.
    """
    if os.environ.get(LOGGING_FILE) or os.environ.get("VLLM_CONFIGURE_LOGGING", "1") == "0":
        raise ConfigError(
            f"--log-format json configures vLLM's logging itself; unset {LOGGING_FILE} and "
            "VLLM_CONFIGURE_LOGGING, or leave the flag out"
        )
    try:
        from secura_serve.serve.json_lines import JsonLines
    except ImportError as error:
        raise ConfigError(
            f"--log-format json needs python-json-logger, which comes with vLLM ({error})"
        ) from error

    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    stream = os.environ.get("VLLM_LOGGING_STREAM", "ext://sys.stdout")
    settings = vllm_logging(level, stream)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"logging-{level.lower()}-{stream.rpartition('.')[2]}.json"
    text = json.dumps(settings, indent=1)
    if not file.is_file() or file.read_text("utf-8") != text:
        # In one step: another server may start meanwhile.
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(text, "utf-8")
        new.replace(file)
    os.environ[LOGGING_FILE] = str(file)
    logging.captureWarnings(True)
    _Output.json = JsonLines()


def vllm_logging(level: str, stream: str) -> dict[str, Any]:
    """Return the configuration of all loggers, as ``logging.config.dictConfig`` takes it.

    Args:
        level: of vLLM's own lines; other libraries only warn.
        stream: ``ext://sys.stdout`` or ``ext://sys.stderr``.
    """
    ours = {"handlers": ["json"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "secura_serve.serve.json_lines.JsonLines"}},
        "handlers": {
            "json": {"class": "logging.StreamHandler", "formatter": "json", "stream": stream}
        },
        "loggers": {
            "vllm": {**ours, "level": level},
            "uvicorn": {**ours, "level": "INFO"},
            "uvicorn.access": {**ours, "level": "INFO"},
        },
        "root": {"handlers": ["json"], "level": "WARNING"},
    }


def follow(output: IO[bytes], logger: str) -> None:
    """Say what another process of ours prints, line by line, until it ends."""

    def read() -> None:
        for line in output:
            if text := line.decode("utf-8", "replace").strip():
                say(text, prefix="", logger=logger)

    threading.Thread(target=read, name=f"follow-{logger}", daemon=True).start()


def is_json() -> bool:
    """Return whether :func:`write_json` was called."""
    return _Output.json is not None
