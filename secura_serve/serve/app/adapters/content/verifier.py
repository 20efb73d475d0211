"""The check that every adapter passes before it is served, at the start and later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from secura_serve import adapter as adapters
from secura_serve.adapter import Adapter
from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import AdapterFormatError, SecuraError, UnservableError
from secura_serve.serve.app.adapters.content.fine_tune import FineTune, is_fine_tune
from secura_serve.serve.app.adapters.content.images import DeltaImages
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.content.snapshots import Snapshot, SnapshotStore, stamps_of
from secura_serve.serve.app.adapters.content.verified import Verified
from secura_serve.serve.basis import NormBounds, base_id
from secura_serve.system.os_errors import reason

__all__ = ["Comparison", "Entry", "Verifier", "printable"]


def printable(name: str) -> str:
    """Return a folder's name on one line, and as text that can be encoded."""
    return name if name.isprintable() else ascii(name)


@dataclass(frozen=True)
class Entry:
    """One folder: either an adapter that can be served, or the error that says why not."""

    name: str
    adapter: Adapter | None
    error: SecuraError | None = None
    lora: PlainLoRA | None = None
    fine_tune: FineTune | None = None
    snapshot: Snapshot | None = None
    """The copy that is served; None where nothing is served, or nothing was to be copied."""

    @property
    def shown(self) -> str:
        """The name, on one line whatever a folder may be called."""
        return printable(self.name)

    @property
    def per_request(self) -> bool:
        """Whether it is C·U·R and needs no more than a slot; if not, it needs a place for its whole
        update, or must be folded."""
        return self.adapter is not None and self.adapter.config.magnorm.additive

    @property
    def status(self) -> str:
        """How it can be served, in a word or two."""
        if self.fine_tune is not None:
            return "ok (whole fine-tune)"
        if self.adapter is None:
            return "SKIPPED" if self.lora is None else "ok (plain LoRA)"
        return "ok" if self.per_request else f"ok ({self.adapter.config.magnorm.mode})"


@dataclass(frozen=True)
class Comparison:
    """What holds for all adapters of one :func:`base_id`."""

    example: Adapter
    """The first of them, without its weights."""
    mismatches: list[str]
    norm_bounds: NormBounds


class Verifier:
    """Checks adapters against one base; what they have in common is compared once.

    Args:
        base: opens the base's checkpoint. Called when it must be read: what was read stays mapped
            as long as a checkpoint is open.
        store: where each adapter is copied before it is checked; None checks them where they are.
        verified: what earlier starts have verified, and what this one verifies.
        images: where the changes of whole fine-tunes are kept; None only compares them.
    """

    def __init__(
        self,
        base: Callable[[], Checkpoint],
        store: SnapshotStore | None = None,
        verified: Verified | None = None,
        images: DeltaImages | None = None,
    ) -> None:
        self._base, self.store, self.images = base, store, images
        self._verified = verified
        self._seen: dict[str, Comparison] = {}
        self._lora_sizes: dict[str, int] = {}

    @property
    def norm_bounds(self) -> Mapping[str, NormBounds]:
        """:func:`base_id` -> module -> bound of the update's norm, of all that was checked."""
        return {identity: like.norm_bounds for identity, like in self._seen.items()}

    def examine(self, path: Path) -> Entry:
        """Copy one adapter folder and check the copy.

        Raises:
            SecuraError: why the adapter cannot be served.
            StorageError: the copy cannot be written.
        """
        try:
            return self._examine(path)
        except OSError as error:
            raise AdapterFormatError(f"{path.name} cannot be read: {reason(error)}") from error

    def _examine(self, path: Path) -> Entry:
        if is_fine_tune(path):
            return self._fine_tune(path)
        complete = all((path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))
        # Where a file is missing, loading the folder explains it better.
        snapshot = self.store.take(path) if self.store is not None and complete else None
        if snapshot is not None:
            return self.examine_copy(snapshot)
        entry = self._check(path)
        if self.store is not None:
            raise AdapterFormatError(f"{path.name} was still being written; try again")
        return entry

    def examine_copy(self, snapshot: Snapshot) -> Entry:
        """Check an adapter that is in the store. Raises SecuraError."""
        return self._check(snapshot.path, snapshot)

    def lora_size(self, entry: Entry) -> int | None:
        """Return how many bytes a LoRA of the same rank would take on the same linears.

        Σ r·(out + in) numbers of 4 bytes, as PEFT saves them; None of what is no CUR adapter.
        """
        if entry.adapter is None:
            return None
        identity = base_id(entry.adapter)
        if identity not in self._lora_sizes:
            base = self._base()
            axes = sum(sum(base.shape(name)) for name in entry.adapter.modules)
            self._lora_sizes[identity] = 4 * entry.adapter.r * axes
        return self._lora_sizes[identity]

    def save(self) -> None:
        """Keep for the next start what was verified."""
        if self._verified is not None:
            self._verified.save()

    def _check(self, path: Path, snapshot: Snapshot | None = None) -> Entry:
        if adapters.is_plain_lora(path):
            lora = PlainLoRA.load(path, self._base())
            return Entry(path.name, None, lora=lora, snapshot=snapshot)
        adapter = (snapshot and self._known(snapshot)) or self._servable(path, snapshot)
        return Entry(path.name, adapter, snapshot=snapshot)

    def _fine_tune(self, path: Path) -> Entry:
        """Compare a checkpoint with the base, and keep what it changes."""
        try:
            # Before anything is opened: a pipe or a device would wait, or never end.
            stamps = stamps_of(path)
            if self.store is None or self.images is None:
                return Entry(path.name, None, fine_tune=FineTune.load(path, self._base()))
            stamps, digest = self.store.known(path)
            tuned = FineTune.load(path, self._base())
            folder = self.images.folder(path.name, digest)
            made = self.images.of_fine_tune(folder, tuned, path)
            if stamps_of(path) != stamps:
                if made:
                    self.images.remove(folder)
                raise UnservableError(f"{path.name} was still being written; try again")
        except OSError as error:
            raise UnservableError(f"{path.name} cannot be read: {error}") from error
        snapshot = Snapshot(folder, path, digest, stamps)
        return Entry(path.name, None, fine_tune=tuned, snapshot=snapshot)

    def _known(self, snapshot: Snapshot) -> Adapter | None:
        """Return an adapter whose content an earlier start has verified, without its tensors."""
        identity = self._verified.identities.get(snapshot.digest) if self._verified else None
        like = self._seen.get(identity) if identity else None
        if like is None:
            return None
        config = adapters.load_config(snapshot.path)
        return Adapter(snapshot.path, config, {}).without_weights(like.example)

    def _servable(self, path: Path, snapshot: Snapshot | None) -> Adapter:
        adapter = adapters.load(path)
        if not adapter.config.magnorm.foldable:
            raise UnservableError(
                f"{adapter.name}: S-MagNorm {adapter.config.magnorm.mode!r} acts on activations "
                "and has no weights to serve; it is for reproduction only. Train it with 'bounded'"
            )
        identity = base_id(adapter)
        if identity not in self._seen:
            self._seen[identity] = self._compare(adapter, identity)
        like = self._seen[identity]
        adapters.refuse_mismatches(adapter, like.mismatches)
        adapters.refuse_oversized(adapter, like.norm_bounds)
        if self._verified is not None and snapshot is not None:
            self._verified.remember(snapshot.digest, identity, like.norm_bounds)
        return adapter.without_weights(like.example)

    def _compare(self, adapter: Adapter, identity: str) -> Comparison:
        known = self._verified.norm_bounds.get(identity) if self._verified else None
        if known is not None:
            return Comparison(adapter.without_weights(), [], known)
        compared = adapters.compare_with_base(adapter, self._base())
        return Comparison(adapter.without_weights(), compared.mismatches, compared.norm_bounds)
