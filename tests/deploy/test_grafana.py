"""Proves that deploy/grafana.json is JSON whose queries parse and name only metrics that exist.

Ours are those of the server's table; vLLM's are looked up in the sources of the installed vLLM,
which is not imported. Needs promql-parser (dev extra) for the syntax, vLLM for its names.
Whether a Grafana shows it well is not proven.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from secura_serve.serve.app.metrics import METRICS, STATES
from tests.support import ROOT

BOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text("utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
# Metric -> its labels, beside those that Prometheus adds.
OURS = dict(metric.sample() for metric in METRICS)
_METRIC = re.compile(r"\b(?:secura_|vllm:)\w+")


def queries() -> list[str]:
    """Every query, with Grafana's own variables replaced by values."""
    texts = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
    return [text.replace("$__rate_interval", "5m").replace("$", "") for text in texts]


def named() -> set[str]:
    """Every metric that a query or a variable of the board names."""
    variables = json.dumps(BOARD["templating"])
    return {name for text in (*queries(), variables) for name in _METRIC.findall(text)}


def test_every_query_is_promql_and_uses_the_labels_of_its_metric() -> None:
    promql = pytest.importorskip("promql_parser", reason="pip install promql-parser")
    for query in queries():
        promql.parse(query)
        (metric, *others) = set(_METRIC.findall(query))
        if others or metric not in OURS:
            continue
        used = set(re.findall(r"(\w+)=~?\"", query))
        used |= {
            label for part in re.findall(r"by \(([^)]*)\)", query) for label in part.split(", ")
        }
        assert used <= OURS[metric] | {"instance"}, query


def test_all_of_our_metrics_are_shown_and_no_others() -> None:
    assert {name for name in named() if name.startswith("secura_")} == set(OURS)
    adapters = [text for text in queries() if "secura_adapters{" in text]
    states = set(re.findall(r'state="(\w+)"', " ".join(adapters)))
    assert states == set(STATES) == {"known", "resident", "pinned", "refused"}


def test_vllm_has_the_metrics_of_its_own_that_are_shown() -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed; its metrics stand in its sources")
    source = (Path(vllm.origin).parent / "v1" / "metrics" / "loggers.py").read_text("utf-8")
    there = set(re.findall(r'"(vllm:\w+)"', source))
    theirs = {name for name in named() if name.startswith("vllm:")}
    # A counter is scraped with _total at its end, a histogram's buckets with _bucket.
    assert {re.sub(r"_(total|bucket)$", "", name) for name in theirs} <= there


def test_panels_have_their_own_ids_and_places() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]
