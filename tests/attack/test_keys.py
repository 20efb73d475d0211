"""Proves that a key of ``--keys`` opens what its entry says and shows nothing else, and that the
file is followed.

Needs vLLM, but no engine: requests go through vLLM's own app with our guard and plugin in it; a
stub stands for the engine's workers. The oracle of the patterns is a matcher of a few lines.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secura_serve.errors import ConfigError
from secura_serve.method import MagNorm
from secura_serve.serve.app import main as server
from secura_serve.serve.app.adapters.attach_to_engine import attach_to_engine
from secura_serve.serve.app.adapters.content.snapshots import Snapshot
from secura_serve.serve.app.adapters.content.verifier import Entry, Verifier
from secura_serve.serve.app.adapters.library import Library, Version
from secura_serve.serve.app.adapters.updates import AdapterUpdates
from secura_serve.serve.app.answers import Answers
from secura_serve.serve.app.folding import Folding
from secura_serve.serve.app.http.access import ASKING_KEY, PageAccess, page_access
from secura_serve.serve.app.http.context import ServerContext
from secura_serve.serve.app.http.key_file import FileKey, KeyFile, parse_keys, read_keys
from secura_serve.serve.app.startup_messages import who_can_reach
from secura_serve.serve.app.vllm_flags import server_keys

pytest.importorskip("vllm")

NAMES = ("extract", "secret", "team-a-one", "team-a-two")
REACHED = {400, 500, 501}
"""What vLLM answers to a request without a prompt, or without an engine."""


def sha256(key):
    return hashlib.sha256(key.encode()).hexdigest()


def entry(name, key, *lines):
    return "\n".join(["[[keys]]", f'name = "{name}"', f'sha256 = "{sha256(key)}"', *lines, ""])


FILE = "\n".join(
    [
        entry("all", "key-all"),
        entry("team", "key-team", 'role = "user"', 'adapters = ["extract", "team-a-*"]'),
        entry("alias", "key-alias", 'adapters = ["prod"]'),
        entry("base", "key-base", 'adapters = ["base*"]'),
        entry("nothing", "key-nothing", "adapters = []"),
        entry("boss", "key-boss", 'role = "admin"'),
    ]
)


def version(name, number, digest="0123456789abcdef" * 2):
    path = Path("store", digest, name)
    lora = SimpleNamespace(r=4, modules=(), file_size=1)
    snapshot = Snapshot(path, path, digest, ())
    return Version(Entry(name, None, lora=lora, snapshot=snapshot), number, "folder", 0.0)


class Engine:
    """Workers that take every adapter."""

    model_config = SimpleNamespace(max_model_len=64)
    renderer = input_processor = None
    engine_core = SimpleNamespace(core_engines=(0,))

    async def collective_rpc(self, method, args=()):
        return [([], 0, 0)] if method == "secura_slots" else [[None]]


class App:
    """vLLM's app as secura-serve has it built, asked in one event loop."""

    def __init__(self, keys):
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.openai.models.protocol import BaseModelPath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels

        from secura_serve.serve import compat

        self.loop = asyncio.new_event_loop()
        library = Library(["base", "base-two"])
        for number, name in enumerate(NAMES, 1):
            library.add(version(name, number))
        library.set_alias("prod", "secret")
        library.set_alias("pinned", "extract@012345")
        library.refuse("broken", "it holds NaN")
        self.folding = Folding(Path("base"), Answers(["base", "base-two"], library))
        updates = AdapterUpdates(None, library, Verifier(lambda: None))
        self.context = ServerContext(self.folding, updates, keys)
        parser, _ = compat.make_arg_parser()
        middleware = "secura_serve.serve.app.http.guard.GuardMiddleware"
        flags = ["--api-key", *keys.user] if keys.user else []
        args = parser.parse_args([*flags, "--middleware", middleware])
        self.context.hand_over(args)
        self.app = build_app(args, ("generate",))
        bases = [BaseModelPath(name, "base") for name in self.folding.answers.names]
        models = self.app.state.openai_serving_models = OpenAIServingModels(Engine(), bases)
        self.loop.run_until_complete(self.serve(models))

    async def serve(self, models):
        await attach_to_engine(self.context, Engine(), models)
        await asyncio.gather(*self.context.tasks)

    def __call__(self, method, path, key=None, **request):
        headers = dict(request.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}".encode("latin-1")

        async def send():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.request(method, path, headers=headers, **request)

        answer = self.loop.run_until_complete(send())
        assert ASKING_KEY.get() is None
        return answer

    def models(self, key):
        return [card["id"] for card in self("GET", "/v1/models", key).json()["data"]]

    def adapters(self, key):
        return [card["id"] for card in self("GET", "/v1/adapters", key).json()["data"]]

    def generate(self, key, model=None):
        body = {} if model is None else {"model": model}
        return self("POST", "/v1/completions", key, json=body)


@pytest.fixture
def make_app(monkeypatch, tmp_path):
    from secura_serve.serve import plugin

    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    plugin.choose_plugins()
    monkeypatch.setattr("vllm.envs.VLLM_PLUGINS", ["secura_admin"], raising=False)
    made = []

    def make(api_key=None, admin=None, text=FILE):
        path = tmp_path / "keys.toml"
        path.write_text(text)
        path.chmod(0o600)
        keys = server_keys(SimpleNamespace(api_key=api_key), admin=admin, file=str(path))
        made.append(App(keys))
        return made[-1]

    yield make
    for app in made:
        app.loop.close()


def test_each_key_opens_the_routes_of_its_role(make_app):
    app = make_app(["api-key"], "admin-key")
    everyone = ["key-all", "key-team", "key-boss", "api-key", "admin-key"]
    for key in everyone:
        assert app("GET", "/v1/models", key).status_code == 200, key
        assert app.generate(key, "extract").status_code in REACHED, key
        assert app("POST", "/tokenize", key, json={"model": "extract"}).status_code in REACHED
    for key in (None, "", "wrong", "KEY-ALL", "key-all ", sha256("key-all"), "\xe9"):
        answer = app("GET", "/v1/models", key)
        assert answer.status_code == 401, key
        assert "--keys" in answer.json()["error"]["message"]
    may_change = {"key-boss": True, "admin-key": True, "key-all": False, "api-key": False}
    for key, allowed in may_change.items():
        assert (app("GET", "/admin/fold", key).status_code == 200) is allowed, key
        pinned = app("DELETE", "/v1/aliases/nobody", key)
        assert pinned.status_code == (404 if allowed else 401), (key, pinned.text)
    assert app("GET", "/admin/fold").status_code == 401
    assert app("GET", "/health").status_code != 401


def test_with_a_file_the_admin_routes_need_a_key_on_loopback_too(make_app):
    app = make_app(text=entry("one", "key-one"))
    for key in (None, "key-one", "wrong"):
        answer = app("GET", "/admin/fold", key)
        assert answer.status_code == 401 and 'role = "admin"' in answer.json()["error"]["message"]
    assert app("GET", "/v1/models").status_code == 401
    assert app("GET", "/v1/models", "key-one").status_code == 200


def test_a_key_sees_what_it_may_ask_and_nothing_else(make_app):
    app = make_app()
    bases, known = ["base", "base-two"], [*NAMES, "broken"]
    assert app.models("key-all") == [*bases, *NAMES]
    assert app.adapters("key-all") == known
    team = ["extract", "team-a-one", "team-a-two"]
    assert app.models("key-team") == app.adapters("key-team") == team
    assert app.models("key-base") == bases and app.adapters("key-base") == []
    assert app.models("key-nothing") == app.adapters("key-nothing") == []
    for path in ("/v1/models/secret", "/v1/adapters/secret", "/v1/adapters/broken"):
        assert app("GET", path, "key-team").status_code == 404
    # The store of this test holds no files to be measured.
    for name, status in (("extract", 503), ("secret", 404), ("broken", 404)):
        assert app("GET", f"/v1/adapters/{name}/changes", "key-team").status_code == status
    assert app("GET", "/v1/adapters/broken/changes", "key-all").status_code == 409
    for name in team:
        assert app("GET", f"/v1/models/{name}", "key-team").json()["id"] == name
        assert app("GET", f"/v1/adapters/{name}", "key-team").json()["id"] == name


def test_a_key_asks_what_it_may_and_nothing_else(make_app):
    app = make_app()
    versions = {"secret@012345", "extract@012345"}
    allowed = {
        "key-all": {None, "base", "base-two", *NAMES, "prod", "pinned", *versions},
        "key-team": {*NAMES, "pinned", "extract@012345", "team-a-one@0123456789ab"} - {"secret"},
        "key-alias": {"prod"},
        "key-base": {None, "base", "base-two"},
        "key-nothing": set(),
        "key-boss": {None, "base", "secret", "prod"},
    }
    asked = set().union(*allowed.values()) - {"team-a-one@0123456789ab"}
    for key, names in allowed.items():
        for name in asked if key != "key-boss" else names:
            status = app.generate(key, name).status_code
            assert (status in REACHED) is (name in names), (key, name, status)
            assert status in REACHED or status == 404
    header = {"X-Amzn-SageMaker-Adapter-Identifier": "secret"}
    answer = app("POST", "/invocations", "key-team", headers=header, json={"prompt": "x"})
    assert answer.status_code == 404


def test_a_forbidden_name_is_answered_like_an_unknown_one(make_app):
    """Also a version of one, a refused one, an alias, and with a similar name that is allowed."""
    app = make_app()
    for forbidden, unknown in (
        ("secret", "sacret"),
        ("secret@012345", "sacret@012345"),
        ("secret@ffffff", "sacret@ffffff"),
        ("broken", "brokem"),
        ("prod", "proe"),
        ("base", "bare"),
    ):
        for ask in (
            lambda name: app.generate("key-team", name),
            lambda name: app("POST", "/tokenize", "key-team", json={"model": name}),
            lambda name: app("GET", f"/v1/models/{name}", "key-team"),
            lambda name: app("GET", f"/v1/adapters/{name}", "key-team"),
            lambda name: app("GET", f"/v1/adapters/{name}/changes", "key-team"),
        ):
            one, other = ask(forbidden), ask(unknown)
            assert one.status_code == other.status_code == 404
            assert one.text.replace(forbidden, "X") == other.text.replace(unknown, "X")
            assert one.headers.keys() == other.headers.keys()
    said = app.generate("key-team", "secret").json()["error"]["message"]
    assert "extract, team-a-one, team-a-two (" in said
    assert not any(name in said.replace("`secret`", "") for name in ("secret", "prod", "base"))
    assert "names no model" in app.generate("key-team").json()["error"]["message"]
    assert "none that this key may ask" in app.generate("key-nothing", "x").text


def test_a_mix_may_be_asked_by_a_key_that_may_ask_every_part(make_app):
    app = make_app()
    for record in app.context.answers.library.records.values():
        config = SimpleNamespace(magnorm=MagNorm())
        record.versions = [
            replace(v, entry=replace(v.entry, adapter=SimpleNamespace(config=config), lora=None))
            for v in record.versions
        ]
    allowed = {
        "key-all": {"extract*0.5+secret", "prod*2", "secret*0+extract*2", "extract*0"},
        "key-team": {"extract*0.5+team-a-one", "extract@012345*2", "pinned+team-a-one"},
        "key-alias": {"prod*2", "prod+prod"},
        "key-base": set(),
        "key-nothing": set(),
        "api-key": set(),
    }
    for key, texts in allowed.items():
        for text in set().union(*allowed.values()):
            answer = app.generate(key, text)
            if key == "api-key":
                assert answer.status_code == 401
            elif text in texts or key == "key-all":
                assert answer.status_code in REACHED, (key, text, answer.text)
                assert "is no mix" not in answer.text
            else:
                assert answer.status_code == 404, (key, text, answer.text)
    # What comes down to the base needs the base; weight 0 opens nothing.
    assert app.generate("key-team", "extract*0").status_code == 404
    for forbidden, unknown in (("secret", "sacret"), ("broken", "brokem"), ("base", "bare")):
        for text in ("extract*0.5+X", "X*0+extract", "X*0.5", "X@012345*2", "team-a-one+X+nothing"):
            one, other = (
                app.generate("key-team", text.replace("X", name)) for name in (forbidden, unknown)
            )
            assert one.status_code == other.status_code == 404, (text, one.text, other.text)
            assert one.text.replace(forbidden, "X") == other.text.replace(unknown, "X")
        for others in ([{"name": "extract"}], []):
            parts = [*others, {"name": forbidden, "weight": 1 - len(others) / 2}]
            answer = app("POST", "/v1/completions", "key-team", json={"adapters": parts})
            assert answer.status_code == 404, answer.text
    app.context.answers.folded = "secret"
    answer = app.generate("key-team", "extract*0.5+team-a-one")
    assert answer.status_code == 409 and "secret" not in answer.text


def test_the_same_holds_while_something_is_folded(make_app):
    app = make_app()
    app.context.answers.folded = "secret"
    answer = app.generate("key-team", "extract")
    assert answer.status_code == 409 and "secret" not in answer.text
    assert "secret" in app.generate("key-all", "extract").text
    for name in ("secret", "unknown", "base"):
        answer = app.generate("key-team", name)
        assert answer.status_code == 404 and "secret" not in answer.text.replace("`secret`", "")
    assert app.models("key-team") == ["extract", "team-a-one", "team-a-two"]
    app.context.answers.folded = "team-a-one"
    assert app.generate("key-team", "team-a-one").status_code in REACHED
    assert "team-a-one is folded" in app.generate("key-team", "extract").text
    assert app.generate("key-base").status_code == 409
    assert "team-a-one" not in app.generate("key-base").text


def test_a_change_of_the_file_counts_within_a_second(make_app, tmp_path, capsys):
    app = make_app()
    clock = [100.0]
    path = tmp_path / "keys.toml"
    app.context.keys.file._clock, app.context.keys.file._looked = lambda: clock[0], clock[0]

    def write(text):
        path.write_text(text)

    def status(key):
        return app("GET", "/v1/models", key).status_code

    write(FILE.replace(sha256("key-team"), sha256("key-new")))
    assert (status("key-team"), status("key-new")) == (200, 401)
    clock[0] += 1
    assert (status("key-team"), status("key-new")) == (401, 200)
    assert "changed team" in capsys.readouterr().out
    for damaged in ("[[keys]", "", FILE + 'more = "x"', FILE + entry("all", "other")):
        write(damaged)
        for _ in range(3):
            clock[0] += 1
            assert (status("key-team"), status("key-new")) == (401, 200)
        said = capsys.readouterr().out
        assert said.count("the keys stay as they were") == 1 and said.count("\n") == 1
    path.unlink()
    clock[0] += 1
    assert status("key-new") == 200 and "cannot be read" in capsys.readouterr().out
    write(FILE)
    clock[0] += 1
    assert (status("key-team"), status("key-new")) == (200, 401)


def test_changes_of_the_server_are_logged_with_the_key_s_name(make_app, capsys):
    app = make_app()
    app("DELETE", "/v1/aliases/a%0Ab", "key-boss")
    app("GET", "/admin/fold", "key-boss")
    assert capsys.readouterr().out == "secura-serve: key boss: DELETE '/v1/aliases/a\\nb'\n"


def test_the_chat_page_gets_a_key_of_its_own(make_app):
    app = make_app()
    keys = app.context.keys
    assert keys.internal and len(keys.internal) > 40
    assert app.models(keys.internal) == ["base", "base-two", *NAMES]
    assert app("GET", "/admin/fold", keys.internal).status_code == 401
    assert make_app().context.keys.internal != keys.internal
    assert page_access(None, login=None, no_login=False, keys=keys) == PageAccess()
    with pytest.raises(ConfigError, match="lend it to whoever opens the page"):
        page_access("0.0.0.0", login=None, no_login=True, keys=keys)
    page_access("0.0.0.0", login="ann:secret", no_login=False, keys=keys)


def test_the_start_names_the_file_but_no_key(make_app):
    args = SimpleNamespace(host="0.0.0.0", port=8000, uds=None)
    told = who_can_reach(args, make_app().context.keys, None, 7860)
    assert "with a key of --keys" in told and "with an admin key of --keys" in told
    assert "warning" not in told and "key-" not in told
    keys = make_app(["k"], text=entry("one", "key-one")).context.keys
    told = who_can_reach(args, keys, None, 7860)
    assert "with a key of --api-key or --keys" in told and "nobody" in told


HASH = sha256("x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no [[keys]] entry"),
        ("keys = 3", "no [[keys]] entry"),
        ("keys = [3]", "key 1 is not a table"),
        ("[[key]]\nname = 'a'", "'key' is not known"),
        ("[[keys]\n", "not TOML"),
        ("\xff", "not TOML"),
        ("x = " + "[" * 5000, "not TOML"),
        ("[[keys]]\nname = 'a'", "sha256 must be"),
        ("[[keys]]\nname = 'a'\nsha256 = 'abc'", "sha256 must be"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{'g' * 64}'", "sha256 must be"),
        (f"[[keys]]\nname = 'a'\nsha256 = '{sha256('')}'", "an empty key"),
        (f"[[keys]]\nsha256 = '{HASH}'", "name is missing"),
        (f"[[keys]]\nsha256 = '{HASH}'\nname = ' '", "name is missing"),
        (f'[[keys]]\nsha256 = "{HASH}"\nname = "a\\nb"', "printable"),
        (f"[[keys]]\nsha256 = '{HASH}'\nname = 'a'\nrole = 'root'", 'role must be "user"'),
        (f"[[keys]]\nsha256 = '{HASH}'\nname = 'a'\nrole = []", 'role must be "user"'),
        (f"[[keys]]\nsha256 = '{HASH}'\nname = 'a'\nadapters = 'x'", "must be a list"),
        (f"[[keys]]\nsha256 = '{HASH}'\nname = 'a'\nadapters = ['']", "must be a list"),
        (f"[[keys]]\nsha256 = '{HASH}'\nname = 'a'\nadapters = ['x@1']", "without @VERSION"),
        (f"[[keys]]\nsha256 = '{HASH}'\nname = 'a'\nkey = 'x'", "'key' is not a field"),
        (
            f"[[keys]]\nsha256 = '{HASH}'\nname = 'a'\nrole = 'admin'\nadapters = ['x']",
            "an admin may ask every model",
        ),
        (entry("a", "1") + entry("a", "2"), "another key has this name"),
        (entry("a", "1") + entry("b", "1"), "that of a as well"),
        (entry("a", "taken"), "a key of --api-key"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(text, said):
    with pytest.raises(ConfigError) as refused:
        parse_keys(text.encode("latin-1"), "keys.toml", ["taken"])
    assert said in str(refused.value) and "keys.toml" in str(refused.value)


def test_every_problem_is_named():
    text = "other = 1\n[[keys]]\nrole = 'x'\n" + entry("a", "taken") + "[[keys]]\nname = 'b'\n"
    with pytest.raises(ConfigError) as refused:
        parse_keys(text.encode(), "keys.toml", ["taken"])
    assert len(refused.value.problems) == 6, refused.value.problems
    assert "key 3 (b): sha256" in refused.value.problems[-1]


@pytest.mark.parametrize("flags", [[], ["--check"]])
@pytest.mark.parametrize("content", [None, "[[keys]"])
def test_a_start_with_a_missing_or_damaged_file_is_refused(
    flags, content, smollm2, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_text(content)
    assert server.main(["--base", str(smollm2), "--keys", str(path), *flags]) == 2
    shown = capsys.readouterr()
    assert f"--keys {path}" in shown.err and "Traceback" not in shown.err


def test_stored_responses_that_every_key_could_read_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "keys.toml"
    path.write_text(FILE)
    path.chmod(0o600)
    args = SimpleNamespace(api_key=None)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "0")
    assert server_keys(args, admin=None, file=str(path)).file is not None
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    with pytest.raises(ConfigError, match="apart by key"):
        server_keys(args, admin=None, file=str(path))


def test_a_file_that_others_may_read_is_a_warning(tmp_path):
    path, said = tmp_path / "keys.toml", []
    path.write_text(FILE)
    for mode, warned in ((0o600, False), (0o400, False), (0o640, True), (0o604, True)):
        os.chmod(path, mode)
        said.clear()
        KeyFile(path, say=said.append)
        assert bool(said) is warned and all("chmod 600" in line for line in said)


def test_the_file_is_read_at_most_once_a_second(tmp_path, monkeypatch):
    path, clock, reads = tmp_path / "keys.toml", [0.0], []
    path.write_text(FILE)
    path.chmod(0o600)
    file = KeyFile(path, clock=lambda: clock[0])
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self) or read(self))
    for _ in range(100):
        clock[0] += 0.05
        assert file.find(b"key-all").name == "all" and file.find(b"") is None
    assert 4 <= len(reads) <= 5
    assert read_keys(path) == file.keys


def test_a_pipe_in_place_of_the_file_holds_up_nobody(tmp_path):
    path, clock, said = tmp_path / "keys.toml", [0.0], []
    path.write_text(FILE)
    path.chmod(0o600)
    file = KeyFile(path, say=said.append, clock=lambda: clock[0])
    path.unlink()
    os.mkfifo(path)
    clock[0] += 5
    assert file.find(b"key-all").name == "all"
    assert "no regular file" in said[0]


# Hypothesis: the parser and the patterns.

PRINTABLE = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1)
WORDS = PRINTABLE.filter(lambda text: "@" not in text)


@st.composite
def valid_keys(draw):
    short = PRINTABLE.filter(lambda text: len(text) <= 64)
    names = draw(st.lists(short, unique=True, min_size=1, max_size=5))
    keys = []
    for number, name in enumerate(names):
        role = draw(st.sampled_from(["user", "admin"]))
        patterns = draw(st.lists(WORDS, max_size=4)) if role == "user" else ["*"]
        keys.append(FileKey(name, sha256(f"{number}"), role, tuple(patterns)))
    return tuple(keys)


def toml(value):
    """Write a value as TOML; JSON's strings, lists, numbers and booleans are TOML too."""
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(
                f"{json.dumps(k, ensure_ascii=False)} = {toml(v)}" for k, v in value.items()
            )
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@settings(deadline=None)
@given(valid_keys(), st.booleans())
def test_a_valid_file_is_read_as_it_was_meant(keys, upper):
    table = [
        {
            "name": key.name,
            "sha256": key.sha256.upper() if upper else key.sha256,
            "role": key.role,
            "adapters": key.adapters,
        }
        for key in keys
    ]
    assert parse_keys(f"keys = {toml(table)}".encode(), "keys.toml") == keys


VALUES = st.recursive(
    st.one_of(st.booleans(), st.integers(-5, 5), PRINTABLE, st.sampled_from(["user", HASH, "*"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(PRINTABLE, inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(["name", "sha256", "role", "adapters", "other"])


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(),
        st.text().map(lambda text: text.encode("utf-8", "replace")),
        st.lists(st.one_of(VALUES, st.dictionaries(FIELDS, VALUES))).map(
            lambda table: f"keys = {toml(table)}".encode()
        ),
    )
)
def test_any_content_is_keys_or_a_typed_error(content):
    try:
        keys = parse_keys(content, "keys.toml")
    except ConfigError:
        return
    for key in keys:
        assert key.name.isprintable() and len(key.sha256) == 64 and key.role in ("user", "admin")
        assert all(isinstance(pattern, str) for pattern in key.adapters)


def fits(pattern, name):
    if not pattern:
        return not name
    if pattern[0] == "*":
        return fits(pattern[1:], name) or bool(name) and fits(pattern, name[1:])
    return bool(name) and name[0] == pattern[0] and fits(pattern[1:], name[1:])


@given(st.lists(st.text("aB-.*", max_size=6), max_size=3), st.text("aAbB-.", max_size=6))
def test_a_pattern_allows_what_it_spells(patterns, name):
    expected = any(fits(pattern, name) for pattern in patterns)
    assert FileKey("k", HASH, "user", tuple(patterns)).allows(name) is expected


@given(PRINTABLE, PRINTABLE)
def test_no_pattern_breaks_the_server(pattern, name):
    FileKey("k", HASH, "user", (pattern,)).allows(name)
