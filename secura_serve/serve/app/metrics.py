"""The server's own metrics, which ``/metrics`` shows beside vLLM's.

They are made in the registry that vLLM serves. Where ``PROMETHEUS_MULTIPROC_DIR`` is set,
prometheus_client keeps them in files that it adds up over all processes; of a gauge it then shows
the value that was set last, as for vLLM's gauges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from secura_serve import errors
from secura_serve.errors import SecuraError
from secura_serve.serve.app.observer import Observer, WatchEvent

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["LIMIT", "METRICS", "MIXES", "OTHER", "STATES", "AdapterMetrics", "Metric", "Metrics"]

LIMIT = 200
"""How many adapters have a label of their own."""
OTHER = "other"
"""The label of all adapters that came later."""
MIXES = "(mixes)"
"""The label of all mixes together: whoever asks can make any number of them."""
STATES = ("known", "resident", "pinned", "refused")

_READ_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FOLD_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# vLLM has more of them; here each is multiplied by the number of adapters.
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


# A process that starts a server twice, as tests do, has the metrics of the second.
_REGISTERED: dict[Any, tuple[Any, ...]] = {}


@dataclass(frozen=True)
class Metric:
    """One metric, as it is scraped."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: upper bounds in seconds."""

    def sample(self) -> tuple[str, set[str]]:
        """Return what a query names: a histogram's buckets, and the labels of each sample."""
        if self.kind == "histogram":
            return f"{self.name}_bucket", {*self.labels, "le"}
        return self.name, set(self.labels)


METRICS = (
    Metric(
        "secura_adapters",
        "gauge",
        "Adapters that can be asked (known), are in a slot or a place, are pinned, or are refused",
        ("state",),
    ),
    Metric("secura_adapter_versions", "gauge", "Versions that are kept, of all adapters together"),
    Metric("secura_adapter_loads_total", "counter", "Adapters put into a slot"),
    Metric(
        "secura_adapter_evictions_total",
        "counter",
        "Adapters that left a slot to make room for one",
    ),
    Metric(
        "secura_adapter_load_seconds",
        "histogram",
        "Time in which all workers read an adapter, before its first request",
        buckets=_READ_S,
    ),
    Metric(
        "secura_place_fill_seconds",
        "histogram",
        "Time in which all workers copied the update of a full-rank adapter into a place",
        buckets=_READ_S,
    ),
    Metric(
        "secura_places",
        "gauge",
        "Places of full-rank adapters that are filled, or free",
        ("state",),
    ),
    Metric(
        "secura_place_requests_waiting",
        "gauge",
        "Requests that wait for a full-rank adapter's place",
    ),
    Metric(
        "secura_place_evictions_total",
        "counter",
        "Full-rank adapters that left a place to make room for one",
    ),
    Metric(
        "secura_fold_seconds",
        "histogram",
        "Time of a fold or an unfold, the wait for running requests included",
        buckets=_FOLD_S,
    ),
    Metric(
        "secura_adapter_requests_total", "counter", "Requests given to the engine", ("adapter",)
    ),
    Metric("secura_adapter_prompt_tokens_total", "counter", "Tokens of prompts", ("adapter",)),
    Metric("secura_adapter_generation_tokens_total", "counter", "Generated tokens", ("adapter",)),
    Metric(
        "secura_adapter_time_to_first_token_seconds",
        "histogram",
        "Time from a request's arrival at the engine to its first token",
        ("adapter",),
        _FIRST_TOKEN_S,
    ),
    Metric("secura_watch_events_total", "counter", "Changes in the adapters folder", ("kind",)),
    Metric(
        "secura_adapter_refusals_total",
        "counter",
        "Contents of adapters that are not served, by the class of the error",
        ("reason",),
    ),
)


@dataclass(frozen=True)
class AdapterMetrics:
    """What is counted for one value of the label ``adapter``."""

    requests: Any
    prompt_tokens: Any
    generation_tokens: Any
    time_to_first_token: Any


class Metrics(Observer):
    """Every metric of :data:`METRICS`.

    Args:
        registry: where they are registered; by default the one that ``/metrics`` serves.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._metrics: Mapping[str, Any] = _registered(registry)
        self._adapters: dict[str, AdapterMetrics] = {}
        self._slot_changes = (0, 0)
        for event in get_args(WatchEvent):
            self._metrics["secura_watch_events_total"].labels(kind=event)

    def of_adapter(self, name: str) -> AdapterMetrics:
        """Return what is counted for an adapter, or for the base by its name.

        The first :data:`LIMIT` names have a label of their own; later ones share :data:`OTHER`.
        """
        if name not in self._adapters and len(self._adapters) >= LIMIT:
            name = OTHER
        if name not in self._adapters:
            self._adapters[name] = AdapterMetrics(
                *(
                    self._metrics[f"secura_adapter_{what}"].labels(adapter=name)
                    for what in (
                        "requests_total",
                        "prompt_tokens_total",
                        "generation_tokens_total",
                        "time_to_first_token_seconds",
                    )
                )
            )
        return self._adapters[name]

    def set_versions(self, number: int) -> None:
        """Show how many versions are kept."""
        self._metrics["secura_adapter_versions"].set(number)

    def set_adapters(self, **states: int) -> None:
        """Show how many adapters there are in each of those :data:`STATES` that are given."""
        for state, number in states.items():
            self._metrics["secura_adapters"].labels(state=state).set(number)

    def set_places(self, *, filled: int, free: int, waiting: int) -> None:
        """Show how many places there are, and how many requests wait for one."""
        self._metrics["secura_places"].labels(state="filled").set(filled)
        self._metrics["secura_places"].labels(state="free").set(free)
        self._metrics["secura_place_requests_waiting"].set(waiting)

    def count_slot_changes(self, loads: int, evictions: int) -> None:
        """Add what the engine has loaded and evicted since the last call.

        Args:
            loads: all since the engine's start; likewise ``evictions``.
        """
        before = self._slot_changes
        self._slot_changes = (loads, evictions)
        self._metrics["secura_adapter_loads_total"].inc(max(0, loads - before[0]))
        self._metrics["secura_adapter_evictions_total"].inc(max(0, evictions - before[1]))

    def adapter_read(self, seconds: float) -> None:
        self._metrics["secura_adapter_load_seconds"].observe(seconds)

    def place_filled(self, seconds: float) -> None:
        self._metrics["secura_place_fill_seconds"].observe(seconds)

    def place_taken(self) -> None:
        self._metrics["secura_place_evictions_total"].inc()

    def adapter_refused(self, error: SecuraError) -> None:
        reason = type(error).__name__
        known = reason in errors.__all__
        self._metrics["secura_adapter_refusals_total"].labels(
            reason=reason if known else "SecuraError"
        ).inc()

    def folder_changed(self, event: WatchEvent) -> None:
        self._metrics["secura_watch_events_total"].labels(kind=event).inc()

    def weights_folded(self, seconds: float) -> None:
        self._metrics["secura_fold_seconds"].observe(seconds)


def _registered(registry: CollectorRegistry | None) -> dict[str, Any]:
    """Return the metrics by name, registered."""
    # Comes with vLLM, without which the adapters can be checked but not served.
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    registry, made = registry or REGISTRY, dict[str, Any]()
    for earlier in _REGISTERED.pop(registry, ()):
        registry.unregister(earlier)
    for metric in METRICS:
        common: dict[str, Any] = {
            "name": metric.name,
            "documentation": metric.help,
            "labelnames": metric.labels,
            "registry": registry,
        }
        if metric.kind == "gauge":
            made[metric.name] = Gauge(**common, multiprocess_mode="mostrecent")
        elif metric.kind == "histogram":
            made[metric.name] = Histogram(**common, buckets=metric.buckets)
        else:
            made[metric.name] = Counter(**common)
    _REGISTERED[registry] = tuple(made.values())
    return made
