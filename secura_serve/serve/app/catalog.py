"""What is in an adapters folder, and which of it this base can serve. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from secura_serve import adapter as adapters
from secura_serve.adapter import Adapter
from secura_serve.adapter.format import CONFIG_NAME, WEIGHTS_NAME
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import (
    AdapterFormatError,
    ConfigError,
    SecuraError,
    StorageError,
    UnservableError,
)
from secura_serve.serve.app.plain_lora import PlainLoRA
from secura_serve.serve.app.snapshots import Snapshot, SnapshotStore
from secura_serve.serve.basis import NormBounds, base_id

__all__ = ["Catalog", "Comparison", "Entry", "examine", "scan"]


@dataclass(frozen=True)
class Entry:
    """One folder: either an adapter that can be served, or the error that says why not."""

    name: str
    adapter: Adapter | None
    error: SecuraError | None = None
    lora: PlainLoRA | None = None
    snapshot: Snapshot | None = None
    """The copy that is served; None where nothing is served, or nothing was to be copied."""

    @property
    def shown(self) -> str:
        """The name, on one line whatever a folder may be called."""
        return self.name if self.name.isprintable() else ascii(self.name)

    @property
    def per_request(self) -> bool:
        """Whether it can be chosen per request, beside others; if not, it must be folded."""
        return self.adapter is not None and self.adapter.config.magnorm.additive

    @property
    def status(self) -> str:
        """How it can be served, in a word or two."""
        if self.adapter is None:
            return "SKIPPED" if self.lora is None else "ok (plain LoRA)"
        return "ok" if self.per_request else f"fold ({self.adapter.config.magnorm.mode})"


@dataclass(frozen=True)
class Catalog:
    """Everything found in one adapters folder, by name."""

    entries: tuple[Entry, ...]
    norm_bounds: Mapping[str, NormBounds] = field(default_factory=dict)
    """:func:`base_id` -> module -> :func:`~secura_serve.adapter.limits.update_norm_bound`."""

    @property
    def served(self) -> list[Adapter]:
        """The adapters that can be chosen per request."""
        return [e.adapter for e in self.entries if e.adapter is not None and e.per_request]

    @property
    def plain_loras(self) -> list[PlainLoRA]:
        """The plain LoRAs, chosen per request as well; these are not folded."""
        return [e.lora for e in self.entries if e.lora is not None]

    @property
    def foldable(self) -> list[Adapter]:
        """The adapters that can be folded: those of :attr:`served`, and the S-MagNorm ones."""
        return [e.adapter for e in self.entries if e.adapter is not None]

    @property
    def snapshots(self) -> dict[str, Snapshot]:
        """The copies that are served, by the adapter's name."""
        return {e.name: e.snapshot for e in self.entries if e.snapshot and e.error is None}

    @property
    def refused(self) -> list[Entry]:
        """The folders that cannot."""
        return [e for e in self.entries if e.error is not None]

    def table(self) -> str:
        """Return the entries as aligned text, one line each; refused ones with the reason below."""
        rows = [("ADAPTER", "RANK", "LINEARS", "SIZE", "STATUS")]
        for entry in self.entries:
            adapter = entry.adapter or entry.lora
            if adapter is None:
                rows.append((entry.shown, "-", "-", "-", entry.status))
                continue
            size = f"{adapter.file_size / 1e6:.2f} MB"
            rows.append(
                (entry.shown, str(adapter.r), str(len(adapter.modules)), size, entry.status)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for row in rows:
            cells = zip(row, widths, strict=True)
            lines.append("  ".join(text.ljust(width) for text, width in cells).rstrip())
        lines += [f"\n{e.shown} is not served: {e.error}" for e in self.refused]
        return "\n".join(lines)


def scan(
    folder: str | Path,
    base: Checkpoint,
    *,
    taken: Iterable[str] = (),
    store: SnapshotStore | None = None,
) -> Catalog:
    """Load every adapter in ``folder`` and compare it with ``base``.

    Every sub-folder counts as an adapter, except hidden ones; files are ignored. Adapters that
    share base and basis are compared with the checkpoint once. Their U are read and checked, but
    not kept: a folder may hold thousands.

    Args:
        taken: names that adapters may not have (those of the base).
        store: where each adapter is copied before it is checked; the adapters of the catalog are
            then those copies. None checks them where they are.

    Raises:
        ConfigError: ``folder`` is not a folder.
        StorageError: the copies cannot be written.
        UnservableError: the base is quantised.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        fault = "is a file, not a folder" if root.exists() else "does not exist"
        raise ConfigError(
            f"--adapters {folder}: {fault}. Give a folder that holds one folder for each adapter, "
            "or leave the flag out to serve the base alone"
        )
    folders = sorted(
        # A link that leads nowhere is reported like a folder without an adapter.
        p
        for p in root.iterdir()
        if (p.is_dir() or p.is_symlink() and not p.exists()) and not p.name.startswith(".")
    )
    if not folders and (root / "adapter_config.json").is_file():
        raise ConfigError(
            f"--adapters {folder}: this is one adapter; give the folder that holds it "
            f"({root.absolute().parent})"
        )
    if folders:
        _refuse_quantised(base)
    entries, seen = list[Entry](), dict[str, Comparison]()
    for path in tqdm(folders, desc="checking adapters", unit="adapter", leave=False):
        try:
            _check_name(path, set(taken))
            entries.append(examine(path, base, seen, store))
        except StorageError:
            raise
        except SecuraError as error:
            entries.append(Entry(path.name, None, error))
    return Catalog(tuple(entries), {key: like.norm_bounds for key, like in seen.items()})


def examine(
    path: Path,
    base: Checkpoint,
    seen: dict[str, Comparison],
    store: SnapshotStore | None = None,
) -> Entry:
    """Copy one adapter folder and check the copy; see :func:`scan` for ``store``.

    Args:
        seen: results for adapters that share base and indices; added to.

    Raises:
        SecuraError: why the adapter cannot be served.
        StorageError: the copy cannot be written.
    """
    snapshot = _snapshot(path, store)
    at = snapshot.path if snapshot else path
    adapter, lora = None, None
    if adapters.is_plain_lora(at):
        lora = PlainLoRA.load(at, base)
    else:
        adapter = _servable(at, base, seen)
    if store is not None and snapshot is None:
        raise AdapterFormatError(f"{path.name} was still being written; try again")
    return Entry(path.name, adapter, lora=lora, snapshot=snapshot)


def _snapshot(path: Path, store: SnapshotStore | None) -> Snapshot | None:
    """Copy the adapter; None without a store, and where a file is missing, which loading it
    explains better."""
    complete = all((path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))
    return store.take(path) if store is not None and complete else None


def _check_name(path: Path, taken: set[str]) -> None:
    adapters.check_name(path.name)
    if path.name in taken:
        raise ConfigError(f"{path.name!r} is the base model's name; rename the folder")


def _refuse_quantised(base: Checkpoint) -> None:
    settings = base.config.get("quantization_config")
    if settings:
        raise UnservableError(
            f"{base.path.name} is quantised ({settings.get('quant_method', 'unknown')}), "
            "and C and R are columns and rows of the dense weights, with which an adapter is "
            "compared before it is served. Serve the dense checkpoint; vLLM can quantise it while "
            "loading (--quantization, where this device has the kernels). Without --adapters the "
            "base alone is served"
        )


@dataclass(frozen=True)
class Comparison:
    """What holds for all adapters of one :func:`base_id`."""

    example: Adapter
    """The first of them, without its weights."""
    mismatches: list[str]
    norm_bounds: NormBounds

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint) -> Comparison:
        compared = adapters.compare_with_base(adapter, base)
        return cls(adapter.without_weights(), compared.mismatches, compared.norm_bounds)


def _servable(path: Path, base: Checkpoint, seen: dict[str, Comparison]) -> Adapter:
    adapter = adapters.load(path)
    if not adapter.config.magnorm.foldable:
        raise UnservableError(
            f"{adapter.name}: S-MagNorm {adapter.config.magnorm.mode!r} acts on activations and "
            "has no weights to serve; it is for reproduction only. Train it with 'bounded'"
        )
    identity = base_id(adapter)
    if identity not in seen:
        seen[identity] = Comparison.of(adapter, base)
    like = seen[identity]
    adapters.refuse_mismatches(adapter, like.mismatches)
    adapters.refuse_oversized(adapter, like.norm_bounds)
    return adapter.without_weights(like.example)
