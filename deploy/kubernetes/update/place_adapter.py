"""Copy an adapter folder to its place in an adapters folder: whole, or not at all.

    python place_adapter.py /incoming/sentiment /adapters/sentiment

The files are read and checked as an adapter, copied under a hidden name beside the target, synced,
and renamed. A server that watches the folder sees the old adapter or the new one, never a mix.
Exit status: 0 done, 1 not an adapter or not written, 2 wrong use.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from secura_serve.adapter import is_plain_lora, load
from secura_serve.errors import SecuraError
from secura_serve.system.atomic import atomic_folder, only_writer


def place(source: Path, target: Path) -> None:
    """Put a copy of ``source`` at ``target``, in place of what is there.

    Raises:
        SecuraError: ``source`` is not an adapter; a plain LoRA is left for the server to judge.
        OSError: it cannot be written; ``target`` is as before.
    """
    if not is_plain_lora(source):
        load(source)
    with only_writer(target, wait=True), atomic_folder(target) as folder:
        for file in source.iterdir():
            # No dot files: a download leaves its own bookkeeping there.
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    if len(argv) != 2:
        print("usage: place_adapter.py SOURCE TARGET", file=sys.stderr)
        return 2
    try:
        place(Path(argv[0]), Path(argv[1]))
    except (SecuraError, OSError) as error:
        print(f"place_adapter: error: {error}", file=sys.stderr)
        return 1
    print(f"{argv[1]} is in place")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
