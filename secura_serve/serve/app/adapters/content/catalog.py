"""What is in an adapters folder, and which of it this base can serve. Needs no vLLM."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from secura_serve import adapter as adapters
from secura_serve.adapter import Adapter
from secura_serve.checkpoint import Checkpoint
from secura_serve.errors import ConfigError, SecuraError, StorageError, UnservableError
from secura_serve.serve.app.adapters.content.fine_tune import FineTune
from secura_serve.serve.app.adapters.content.plain_lora import PlainLoRA
from secura_serve.serve.app.adapters.content.snapshots import SnapshotStore
from secura_serve.serve.app.adapters.content.verifier import Entry, Verifier
from secura_serve.serve.basis import NormBounds
from secura_serve.serve.logs import is_json

__all__ = ["Catalog", "adapter_folders", "check_folder_name", "refuse_quantised", "scan"]


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
    def full_rank(self) -> list[Adapter | FineTune]:
        """What changes whole matrices: adapters with S-MagNorm, and fine-tunes."""
        changes = (e.adapter or e.fine_tune for e in self.entries if not e.per_request)
        return [each for each in changes if each is not None]

    @property
    def plain_loras(self) -> list[PlainLoRA]:
        """The plain LoRAs, chosen per request as well; these are not folded."""
        return [e.lora for e in self.entries if e.lora is not None]

    @property
    def foldable(self) -> list[Adapter]:
        """The adapters that can be folded: those of :attr:`served`, and the S-MagNorm ones."""
        return [e.adapter for e in self.entries if e.adapter is not None]

    @property
    def refused(self) -> list[Entry]:
        """The folders that cannot."""
        return [e for e in self.entries if e.error is not None]

    def table(self) -> str:
        """Return the entries as aligned text, one line each; refused ones with the reason below."""
        rows = [("ADAPTER", "RANK", "LINEARS", "SIZE", "STATUS")]
        for entry in self.entries:
            adapter = entry.adapter or entry.lora or entry.fine_tune
            if adapter is None:
                rows.append((entry.shown, "-", "-", "-", entry.status))
                continue
            size = f"{adapter.file_size / 1e6:.2f} MB"
            rows.append(
                (entry.shown, str(adapter.r or "-"), str(len(adapter.modules)), size, entry.status)
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
    verifier: Verifier | None = None,
) -> Catalog:
    """Load every adapter in ``folder`` and compare it with ``base``.

    Every sub-folder counts as an adapter, except hidden ones; files are ignored. Adapters that
    share base and basis are compared with the checkpoint once. Their U are read and checked, but
    not kept: a folder may hold thousands.

    Args:
        taken: names that adapters may not have (those of the base).
        store: where each adapter is copied before it is checked; the adapters of the catalog are
            then those copies. None checks them where they are.
        verifier: what checks them; by default one that knows nothing yet.

    Raises:
        ConfigError: ``folder`` is not a folder.
        StorageError: the copies cannot be written.
        UnservableError: the base is quantised.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        fault = "is a file, not a folder" if root.exists() else "does not exist"
        raise ConfigError(
            f"--adapters {folder}: {fault}. Give a folder that holds one folder for each adapter, "
            "or leave the flag out to serve the base alone"
        )
    folders = adapter_folders(root)
    if not folders and (root / "adapter_config.json").is_file():
        raise ConfigError(
            f"--adapters {folder}: this is one adapter; give the folder that holds it "
            f"({root.absolute().parent})"
        )
    if folders:
        refuse_quantised(base)
    verifier = verifier or Verifier(lambda: base, store)
    entries = list[Entry]()
    for path in tqdm(
        folders, desc="checking adapters", unit="adapter", leave=False, disable=is_json()
    ):
        try:
            check_folder_name(path, set(taken))
            entries.append(verifier.examine(path))
        except StorageError:
            raise
        except SecuraError as error:
            entries.append(Entry(path.name, None, error))
    return Catalog(tuple(entries), verifier.norm_bounds)


def adapter_folders(root: Path) -> list[Path]:
    """Return the folders that count as adapters, by name; a link that leads nowhere is among them,
    to be reported like a folder without an adapter."""
    return sorted(
        p
        for p in root.iterdir()
        if (p.is_dir() or p.is_symlink() and not p.exists()) and not p.name.startswith(".")
    )


def check_folder_name(path: Path, taken: Collection[str]) -> None:
    """Raise ConfigError for a folder that an adapter may not be called after."""
    adapters.check_name(path.name)
    if path.name in taken:
        raise ConfigError(f"{path.name!r} is the base model's name; rename the folder")


def refuse_quantised(base: Checkpoint) -> None:
    """Raise UnservableError for a base whose weights on disk are not the dense ones."""
    settings = base.config.get("quantization_config")
    if settings:
        raise UnservableError(
            f"{base.path.name} is quantised ({settings.get('quant_method', 'unknown')}), "
            "and C and R are columns and rows of the dense weights, with which an adapter is "
            "compared before it is served. Serve the dense checkpoint; vLLM can quantise it while "
            "loading (--quantization, where this device has the kernels). Without --adapters the "
            "base alone is served"
        )
