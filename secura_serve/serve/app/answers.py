"""What the server answers to: which names, for whom, and why a request is refused.

The state belongs to the API server's process: it changes in :mod:`secura_serve.serve.app.folding`.
"""

from __future__ import annotations

from collections.abc import Sequence

from secura_serve.errors import MixError
from secura_serve.serve.app.adapters.library import Library, Version, split_version
from secura_serve.serve.app.adapters.mixes.canonical_mix import combine
from secura_serve.serve.app.adapters.mixes.grammar import is_expression, parse
from secura_serve.serve.app.adapters.mixes.refusals import SHOWN, refuse_sum
from secura_serve.serve.app.http.access import ASKING_KEY
from secura_serve.serve.app.http.admission import Refusal
from secura_serve.suggest import near_names

__all__ = ["Answers"]

# Names that an error lists; /v1/models has them all.
_LISTED = 20


class Answers:
    """The names that answer now, and the refusals of those that do not.

    Args:
        names: what the base is called in requests.
        library: the adapters.
        per_request: whether this engine takes adapters per request at all.
    """

    def __init__(self, names: Sequence[str], library: Library, *, per_request: bool = True) -> None:
        self.names, self.library, self.per_request = tuple(names), library, per_request
        self.folded: str | None = None
        """The model name that is folded into the weights, as it was asked for."""
        self.folded_version: Version | None = None
        self.broken: str | None = None
        """Why the weights are no longer known; the server is then on its way out."""

    def known(self, name: str) -> bool:
        """Return whether any model has this name, whether or not it answers now."""
        known = name in self.names or self.library.find(name) is not None
        return known or name == self.folded

    def may_ask(self, model: str | None) -> bool:
        """Return whether the key of the current request may ask for a model; None is the base.

        ``NAME@DIGEST`` goes by its name, and an alias by its own name or by what it stands for.
        """
        key = ASKING_KEY.get()
        if key is None:
            return True
        if model is None or model in self.names:
            return any(key.allows(name) for name in self.names)
        meant = (model, self.library.aliases.get(model, model))
        return any(key.allows(split_version(name)[0]) for name in meant)

    def answering(self) -> list[str]:
        """Return the names that answer now and may be asked, the base's first."""
        if self.folded is not None:
            names = [self.folded]
        else:
            names = [*self.names, *sorted(v.name for v in self.library if self._ready(v))]
        return [name for name in names if self.may_ask(name)]

    def _ready(self, version: Version) -> bool:
        """Return whether a version answers while nothing is folded."""
        return self.per_request and version.per_request

    def base_label(self) -> str:
        """Return whose answers the weights give where no adapter is chosen: the base's or those of
        the adapter that is folded."""
        return self.folded_version.name if self.folded_version else self.names[0]

    def status(self, model: str) -> str:
        """Return whether a model answers now, in one word.

        ``ready``: it does. ``folded``: it does, at the base's cost. ``unfolded``: only once it is
        folded. ``blocked``: not while another adapter is folded.
        """
        if self.folded is not None:
            return "folded" if model == self.folded else "blocked"
        version = self.library.find(model)
        return "ready" if version is None or self._ready(version) else "unfolded"

    def refusal(self, model: str | None) -> Refusal | None:
        """Return why a request for ``model`` cannot be answered now, or None if it can."""
        if self.broken is not None:
            return Refusal(503, f"the server is stopping: {self.broken}")
        if model is not None and is_expression(model) and not self.known(model):
            return self._refuse_mix(model)
        if not self.may_ask(model) or (model is not None and not self.known(model)):
            return Refusal(404, self.unknown(model))
        if self.folded is None:
            if model is None or self.status(model) == "ready":
                return None
            return Refusal(
                409,
                f"{model} answers only while it is folded into the weights ({self._why_folded()}): "
                f'the operator can POST {{"name": "{model}"}} to /admin/fold or start with --fold '
                f"{model}; or ask for another model",
            )
        return None if model == self.folded else self.blocked(model)

    def blocked(self, model: str | None) -> Refusal:
        """Return why a request for ``model`` is not answered while another one is folded."""
        assert self.folded is not None
        if not self.may_ask(self.folded):
            return Refusal(
                409,
                f"another adapter is folded into the weights, so no requests for "
                f"{model or 'the base'} are answered; the operator can POST to /admin/unfold",
            )
        return Refusal(
            409,
            f"{self.folded} is folded into the weights, so only requests for it are answered, not "
            f"for {model or 'the base'}: ask for {self.folded}, or the operator can POST to "
            "/admin/unfold",
        )

    def _why_folded(self) -> str:
        if not self.per_request:
            return "vLLM takes no adapters per request for this architecture"
        return (
            "S-MagNorm makes it full-rank, and the server was started without a place for it in "
            "every linear that it changes, see --resident"
        )

    def _refuse_mix(self, text: str) -> Refusal | None:
        """Return why a mix cannot be answered now, or None if it can.

        Whether the key of the request may ask every part comes before anything that the parts would
        tell about themselves.

        Args:
            text: an expression that is no model's name.
        """
        try:
            parts = parse(text)
            for part in parts:
                if (refusal := self._unknown_part(text, part.model)) is not None:
                    return refusal
            canonical = combine(parts, self.library)
        except MixError as error:
            return Refusal(error.status, str(error))
        if canonical.nothing and not self.may_ask(None):
            return Refusal(404, self.unknown(self.names[0]))
        if self.folded is not None:
            return self.blocked(text[:SHOWN])
        if not self.per_request:
            return Refusal(
                409,
                f"{text[:SHOWN]}: this engine takes no adapters per request, and so no mixes; "
                "merge them into a checkpoint with secura-merge",
            )
        if canonical.alone is not None:
            return self.refusal(str(canonical.alone))
        return refuse_sum(text, [version for version, _ in canonical.parts])

    def _unknown_part(self, text: str, model: str) -> Refusal | None:
        """Return the refusal of a part that does not exist for whoever asks."""
        if model in self.names and self.may_ask(model):
            return Refusal(
                400,
                f"{model} is the base, which every mix is added to with weight 1: leave it out of "
                f"{text[:SHOWN]}",
            )
        if self.may_ask(model) and self.library.find(model) is not None:
            return None
        return Refusal(404, f"The mix `{text[:SHOWN]}` cannot be answered: {self.unknown(model)}")

    def unknown(self, model: str | None) -> str:
        """Return what to tell somebody who asks for a name that no model has.

        Says the same of a model that the key of the request may not ask. None is the base.
        """
        if model is None:
            return f"The request names no model. {self._listed()}"
        name, digest = split_version(self.library.aliases.get(model, model))
        record = self.library.records.get(name) if self.may_ask(model) else None
        if record is not None and digest is not None and record.versions:
            kept = ", ".join(str(version) for version in record.versions)
            return (
                f"The model `{model[:100]}` does not exist: {name} has these versions: {kept} (six "
                "or more digits name one)"
            )
        if record is not None and record.refused is not None:
            return f"The adapter `{name}` is not served: {record.refused}"
        near = near_names(model, self.answering())
        return (
            f"The model `{model[:100]}` does not exist. "
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + self._listed()
        )

    def _listed(self) -> str:
        answering = self.answering()
        listed = ", ".join(answering[:_LISTED]) or "none that this key may ask"
        more = f" and {len(answering) - _LISTED} more" if len(answering) > _LISTED else ""
        return f"Models that answer now: {listed}{more} (GET /v1/models lists all)"
