"""Proves that a server whose adapters change all the time gives no answer but the right one.

Twenty minutes (``SECURA_SOAK_MINUTES`` sets another time): clients ask at random while adapters are
added, replaced, removed, uploaded, pushed, rolled back and folded every few seconds. Each answer's
logprobs must be those of a content that its name stood for while the request ran, to 1e-3 in
float32, and each refusal must be the documented one of that moment. Memory must be flat after the
first minutes. Needs vLLM on a CPU and a tiny base.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from safetensors.torch import load_file, save

from secura_serve.method import MagNorm
from secura_serve.system.atomic import atomic_folder
from tests.support.engines import random_adapter, random_fine_tune, serving

MINUTES = float(os.environ.get("SECURA_SOAK_MINUTES", "20"))
FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-loras", "3")
FLAGS += ("--resident", "2", "--resident-dtype", "float32")
# More than there are places for.
FULL = ("bounded", "bounded-2", "tuned")
CONTENTS = ("c1", "c2", "c3", "c4")
CHANGING = ("x", "y", "z")
FILES = ("adapter_config.json", "adapter_model.safetensors")
TOLERANCE = 1e-3
# Longest that a change may take to be seen by the next request.
SEEN_S = 20.0
FOREVER = float("inf")


@dataclass
class History:
    """What each name stood for, and what was folded, at any time."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    spans: dict[str, list[tuple[float, float, str | None]]] = field(default_factory=dict)

    def begin(self, name: str, content: str | None) -> None:
        """Note that from now on ``name`` may stand for ``content``, and for what it stood for."""
        with self.lock:
            spans = self.spans.setdefault(name, [(0.0, FOREVER, None)])
            spans.append((time.monotonic(), FOREVER, content))

    def finish(self, name: str) -> None:
        """Note that ``name`` stands for the newest alone: the change was seen from outside."""
        with self.lock:
            spans, now = self.spans[name], time.monotonic()
            spans[:-1] = [(start, min(stop, now), what) for start, stop, what in spans[:-1]]

    def during(self, name: str, begin: float, end: float) -> set[str | None]:
        """Return all that ``name`` may have stood for between two times."""
        with self.lock:
            spans = self.spans.get(name, [(0.0, FOREVER, None)])
            return {what for start, stop, what in spans if start <= end and stop >= begin}


class Operator(threading.Thread):
    """Changes something every few seconds."""

    def __init__(self, url: str, folder: Path, contents: Path, history: History, end: float):
        super().__init__(daemon=True)
        self.http = httpx.Client(base_url=url, timeout=120)
        self.folder, self.contents, self.history, self.end = folder, contents, history, end
        self.now: dict[str, str | None] = dict.fromkeys(CHANGING)
        self.done: Counter[str] = Counter()
        self.error: BaseException | None = None
        self.steps: list[str] = []
        self.seen: list[float] = []

    def run(self) -> None:
        chance = random.Random(1)
        try:
            while time.monotonic() < self.end:
                self.step(chance)
                time.sleep(chance.uniform(0.5, 2.5))
        except BaseException as error:
            self.error = error

    def step(self, chance: random.Random) -> None:
        name = chance.choice(CHANGING)
        content = chance.choice([c for c in CONTENTS if c != self.now[name]])
        actions = ["replace", "replace", "upload", "remove", "push", "rollback", "fold"]
        action = chance.choice(actions)
        if self.now[name] is None and action in ("remove", "push", "rollback"):
            action = "replace"
        begin = time.monotonic()
        self.done[action] += 1
        self.steps.append(f"{begin:.2f} {action} {name} {content}, was {self.now[name]}")
        if action == "fold":
            self.fold(chance.choice(["c1", "bounded"]))
        elif action == "rollback":
            self.rollback(name)
        elif action == "remove":
            self.history.begin(name, None)
            shutil.rmtree(self.folder / name)
            self.until(name, None)
            self.now[name] = None
            self.history.finish(name)
        else:
            self.history.begin(name, content)
            self.give(action, name, content)
            self.now[name] = content
            self.history.finish(name)

    def give(self, action: str, name: str, content: str) -> None:
        if action == "replace":
            with atomic_folder(self.folder / name) as new:
                for file in FILES:
                    shutil.copy(self.contents / content / file, new / file)
            self.until(name, content)
        elif action == "upload":
            parts = [("f", (f, (self.contents / content / f).read_bytes())) for f in FILES]
            self.http.put(f"/v1/adapters/{name}", files=parts).raise_for_status()
        else:
            tensors = load_file(self.contents / content / FILES[1])
            body = save({k: v for k, v in tensors.items() if k.endswith("secura_U")})
            self.http.put(f"/v1/adapters/{name}/weights", content=body).raise_for_status()

    def rollback(self, name: str) -> None:
        """There and back again, so that the newest content is what the name stands for."""
        self.history.begin(name, "any")
        rolled = self.http.post(f"/v1/adapters/{name}/rollback")
        if rolled.status_code == 200:
            body = {"version": rolled.json()["versions"][0]["digest"]}
            self.http.post(f"/v1/adapters/{name}/rollback", json=body).raise_for_status()
        self.history.begin(name, self.now[name])
        self.history.finish(name)

    def until(self, name: str, content: str | None) -> None:
        wanted = None
        deadline = time.monotonic() + SEEN_S
        if content is not None:
            from secura_serve.serve.app.adapters.content.snapshots import digest_of

            wanted = digest_of(self.contents / content)
        while True:
            reply = self.http.get(f"/v1/adapters/{name}")
            seen = reply.json()["digest"] if reply.status_code == 200 else None
            if seen == wanted:
                self.seen.append(time.monotonic() - deadline + SEEN_S)
                return
            assert time.monotonic() < deadline, (name, content, reply.text)
            time.sleep(0.02)

    def fold(self, name: str) -> None:
        self.history.begin("weights", name)
        self.http.post("/admin/fold", json={"name": name}).raise_for_status()
        time.sleep(1)
        self.http.post("/admin/unfold").raise_for_status()
        self.history.begin("weights", None)
        self.history.finish("weights")


def ask(client: openai.OpenAI, model: str) -> list[float]:
    answer = client.completions.create(
        model=model, prompt="One two three", max_tokens=4, temperature=0, logprobs=1
    )
    return answer.choices[0].logprobs.token_logprobs


def near(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        abs(a - b) <= TOLERANCE for a, b in zip(left, right, strict=True)
    )


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_every_answer_is_that_of_its_version_while_everything_changes(tiny_base, tmp_path):
    base, contents, folder = tiny_base("llama"), tmp_path / "contents", tmp_path / "adapters"
    for seed, name in enumerate(CONTENTS, start=1):
        random_adapter(base, contents / name, r=4, seed=seed)
        shutil.copytree(contents / name, folder / name)
    for seed, name in enumerate(FULL[:2], start=9):
        random_adapter(base, folder / name, r=4, seed=seed, magnorm=MagNorm("bounded"))
    random_fine_tune(base, folder / FULL[2], seed=11, only=("q_proj", "up_proj"))
    with serving(base, folder, tmp_path / "log", *FLAGS) as server:
        url = server.url.removesuffix("/v1")
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        right = {name: ask(client, name) for name in CONTENTS}
        httpx.post(f"{url}/admin/fold", json={"name": "bounded"}, timeout=120).raise_for_status()
        right["bounded"] = ask(client, "bounded")
        httpx.post(f"{url}/admin/unfold", timeout=120).raise_for_status()
        right |= {name: ask(client, name) for name in FULL[1:]}
        history = History()
        for name in (*CONTENTS, *FULL):
            history.begin(name, name)
            history.finish(name)
        end = time.monotonic() + MINUTES * 60
        operator = Operator(url, folder, contents, history, end)
        faults: list[str] = []
        outcomes: Counter[str] = Counter()

        def asking(seed: int) -> None:
            chance = random.Random(seed)
            while time.monotonic() < end and len(faults) < 20:
                model = chance.choice([*CONTENTS, *CHANGING, *CHANGING, *FULL])
                begin, given, status = time.monotonic(), None, 200
                try:
                    given = ask(client, model)
                except openai.APIStatusError as error:
                    status = error.status_code
                stopped = time.monotonic()
                stood_for = history.during(model, begin, stopped)
                weights = history.during("weights", begin, stopped)
                outcomes[f"{status}"] += 1
                if status == 200:
                    allowed = set(CONTENTS) if "any" in stood_for else stood_for - {None}
                    fine = any(near(given, right[content]) for content in allowed)
                elif status == 404:
                    fine = None in stood_for
                else:
                    fine = status == 409 and weights != {None}
                if not fine:
                    was = [c for c in right if given and near(given, right[c])] or given
                    faults.append(
                        f"{begin:.2f}-{stopped:.2f} {model}: {status} {was}, stood for "
                        f"{stood_for}, weights {weights}"
                    )

        process = psutil.Process(server.pid)

        def memory() -> float:
            family = [process, *process.children(recursive=True)]
            return sum(p.memory_full_info().uss for p in family) / 2**20

        threads = [operator, *(threading.Thread(target=asking, args=(i,)) for i in range(4))]
        for thread in threads:
            thread.start()
        sizes = []
        while time.monotonic() < end:
            time.sleep(min(30.0, max(0.1, end - time.monotonic())))
            sizes.append(memory())
        for thread in threads:
            thread.join(180)
        print(f"{dict(operator.done)} {dict(outcomes)} MiB {[round(s) for s in sizes]}")
        print(f"seconds until seen: {sorted(round(s, 2) for s in operator.seen)}")
        assert operator.error is None, repr(operator.error)
        assert not faults, "\n".join([*faults, *operator.steps])
        settled = sizes[len(sizes) // 4 :]
        assert max(settled) <= 1.05 * settled[0] + 20, sizes
