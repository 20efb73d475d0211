"""Proves what the page's command refuses, and that no proxy is asked for this machine.

Needs openai; no page is started.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("openai")
from demo.app import ask_this_machine_directly, parser
from secura_serve.errors import ConfigError


@pytest.mark.parametrize(
    "flags", [["--port", "0"], ["--port", "99999"], ["--endpoint", ""], ["--endpoint", "h:1/v1"]]
)
def test_what_cannot_be_reached_is_refused_at_once(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        parser().parse_args(flags)


@pytest.mark.parametrize("kept", ["", "a.test", "*"])
def test_no_proxy_is_asked_for_this_machine(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", kept)
    ask_this_machine_directly()
    told = os.environ["no_proxy"]
    assert told == os.environ["NO_PROXY"] and told.startswith(kept)
    assert kept == "*" or told.split(",")[-3:] == ["localhost", "127.0.0.1", "::1"]
