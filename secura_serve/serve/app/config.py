"""Settings of ``secura-serve`` itself; every other flag is vLLM's."""

from __future__ import annotations

import os
from dataclasses import dataclass

from secura_serve.addresses import port_problem
from secura_serve.config import POSITIVE, between, not_allowed, option
from secura_serve.errors import ConfigError

__all__ = ["FROM_ENVIRONMENT", "ServeConfig"]

FROM_ENVIRONMENT = {"admin_api_key": "SECURA_ADMIN_API_KEY", "ui_auth": "SECURA_UI_AUTH"}
"""Fields that an environment variable gives where no flag does: it shows in no process list."""


@dataclass(frozen=True)
class ServeConfig:
    """One run of ``secura-serve``.

    Raises:
        ConfigError: with every setting that is not allowed.
    """

    base: str = option("base model: an alias, a hub id or a local folder", "smollm2-135m")
    adapters: str | None = option(
        "folder of adapter folders (default: only the base)", None, metavar="DIR"
    )
    served_model_name: tuple[str, ...] = option(
        "what the base is called in requests (default: the alias or hub id given to --base, or the "
        "folder's name)",
        (),
        metavar="NAME",
    )
    strict: bool = option("refuse to start if any adapter is not servable", False)
    check: bool = option("check the adapters against the base and exit", False)
    watch: bool = option(
        "follow the adapters folder: serve what is added or changed, drop what is removed", True
    )
    reserve_rank: int | None = option(
        "make room in every linear for adapters of the default selection up to this rank that come "
        "while the server runs; 0 makes none (default: 32 if there is no adapter yet, else 0)",
        None,
        metavar="R",
        bound=between(0, 1024),
    )
    adapter_versions: int = option(
        "how many versions of an adapter stay for a rollback",
        3,
        metavar="N",
        bound=between(1, 1000),
    )
    state: str | None = option(
        "file that keeps versions, rollbacks, pins and aliases for the next start (default: below "
        "$SECURA_CACHE, one for each folder and port)",
        None,
        metavar="FILE",
    )
    resident: int | None = option(
        "places for full-rank adapters (S-MagNorm), which are asked per request from there; 0: "
        "they answer only while folded (default: one for each such adapter, as far as a tenth of "
        "the memory holds them)",
        None,
        metavar="K",
        bound=between(0, 1024),
    )
    resident_dtype: str = option(
        "how a place holds the change of a weight: int8 with a scale for each row, or exactly",
        "int8",
        choices=("int8", "float32"),
    )
    fold: str | None = option(
        "start with this adapter folded into the weights: it alone is served, at base cost. In the "
        "running server: POST /admin/fold, POST /admin/unfold, GET /admin/fold",
        None,
        metavar="NAME",
    )
    admin_api_key: str | None = option(
        "key of the routes that change the server: fold, unfold, and changes of adapters (/admin/, "
        "/v1/adapters); without it they answer direct requests on loopback only (default: "
        "$SECURA_ADMIN_API_KEY)",
        None,
        metavar="KEY",
    )
    keys: str | None = option(
        "TOML file of hashed keys, each with a role and the models that it may ask; followed while "
        "the server runs. Keys of --api-key and --admin-api-key may ask every model beside it",
        None,
        metavar="FILE",
    )
    ui: bool = option("open the chat page beside the server", True)
    ui_host: str | None = option(
        "address of the chat page; beyond this machine it needs --ui-auth or --ui-no-auth "
        "(default: 127.0.0.1)",
        None,
        metavar="HOST",
    )
    ui_port: int = option("port of the chat page", 7860, metavar="PORT")
    ui_auth: str | None = option(
        "login of the chat page (default: $SECURA_UI_AUTH, which shows in no process list)",
        None,
        metavar="USER:PASSWORD",
    )
    ui_no_auth: bool = option(
        "let whoever reaches --ui-host use the chat page, under any name; not together with "
        "--api-key",
        False,
    )
    write_timeout: float = option(
        "drop a client that has not read its answer for so many seconds",
        60.0,
        metavar="SECONDS",
        bound=POSITIVE,
    )

    log_format: str = option(
        "how our lines and vLLM's are printed; json: each line is an object with time, level, "
        "logger and message",
        "text",
        choices=("text", "json"),
    )

    def __post_init__(self) -> None:
        problems = not_allowed(self)
        if self.adapters == "":
            problems.append("adapters: is empty; name a folder, or leave it out")
        if self.keys == "":
            problems.append("keys: is empty; name a file, or leave it out")
        if self.state and os.path.isdir(os.path.expanduser(self.state)):
            problems.append(f"state: {self.state} is a folder; name a file, or a new one")
        if problem := port_problem(self.ui_port):
            problems.append(f"ui_port: {problem}")
        if problems:
            raise ConfigError("the settings are not valid:", problems)
