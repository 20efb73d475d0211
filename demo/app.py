"""A page that asks the base and any of its adapters the same, and shows the answers side by side.

A process of its own, which knows an endpoint's address and no more:

    python -m demo.app --endpoint http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

# Gradio reads this while it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from .cards import CSS, hint, status
from .endpoint import add_arguments, connect
from .page import ANY, Examples, Page

# Gradio's own bold face of this font lacks the letters; the 700 weight beside it has them.
FONT = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
START = "Tick models, write a prompt and press Enter: the answers stream here side by side."
EXAMPLES = {
    ANY: [
        {"prompt": "What is the capital of France?"},
        {"prompt": "Explain in two sentences why the sky is blue."},
        {"prompt": "Write a Python function that reverses a string."},
    ]
}


def build(page: Page) -> gr.Blocks:
    with gr.Blocks(title="secura-serve", analytics_enabled=False, fill_width=True) as blocks:
        bases, adapters = gr.State([]), gr.State([])
        with gr.Row(elem_id="head"):
            title = "<h1>secura-serve</h1><p>One base, many adapters: one prompt, side by side.</p>"
            gr.HTML(title, elem_id="title", min_width=280)
            line = gr.HTML(status("asking the endpoint…", up=True), elem_id="status", min_width=280)
            refresh = gr.Button("Refresh", elem_id="refresh", size="sm", scale=0, min_width=110)
        models = gr.CheckboxGroup(
            [], label="Models", elem_id="models", show_select_all=True, interactive=True
        )
        with gr.Row(elem_id="ask"):
            system = gr.Textbox(
                "", label="System prompt (optional)", elem_id="system", max_lines=10, scale=3
            )
            prompt = gr.Textbox(
                "", label="Prompt (Enter runs it)", elem_id="prompt", max_lines=10, scale=8
            )
            run = gr.Button("Run", elem_id="run", variant="primary", scale=0, min_width=110)
            stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=0, min_width=110)
        hidden = [gr.Textbox(visible=False) for _ in range(3)]
        chips = gr.Dataset(
            components=hidden,
            samples=[],
            sample_labels=[],
            label="Examples",
            elem_id="examples",
            samples_per_page=12,
        )
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            limit = gr.Slider(1, 2048, 256, step=1, label="Max tokens", elem_id="max-tokens")
            heat = gr.Slider(0, 2, 0, step=0.05, label="Temperature", elem_id="temperature")
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
        answers = gr.HTML(hint(START), elem_id="answers")

        gr.on(
            [blocks.load, refresh.click],
            page.refresh,
            [models],
            [line, models, bases, adapters, chips],
            show_progress="hidden",
            api_visibility="private",
        )
        chips.click(
            page.pick,
            [chips, bases, models],
            [system, prompt, models],
            show_progress="hidden",
            api_visibility="private",
        )
        gr.on(
            [run.click, prompt.submit],
            page.run,
            [models, prompt, system, limit, heat, seed, adapters],
            [answers, run, stop],
            show_progress="hidden",
            trigger_mode="once",
            concurrency_limit=None,
            api_visibility="private",
        )
        stop.click(page.stop, show_progress="hidden", api_visibility="private")
    return blocks


def read_examples(path: str | None) -> Examples:
    """Return `{adapter: [{"prompt": ..., "system": optional}]}`. Raises ValueError if malformed."""
    if path is None:
        return EXAMPLES
    try:
        examples_by_adapter = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} as JSON: {error}") from error
    shape = f'{path} should be {{"adapter": [{{"prompt": "...", "system": "optional"}}]}}'
    if not isinstance(examples_by_adapter, dict):
        raise ValueError(shape)
    for name, examples in examples_by_adapter.items():
        for example in examples if isinstance(examples, list) else [None]:
            texts = example.values() if isinstance(example, dict) else [None]
            if not all(isinstance(text, str) for text in texts) or "prompt" not in example:
                raise ValueError(f"{shape}; see adapter {name!r}")
    return examples_by_adapter


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="secura-serve demo", description=__doc__.split("\n")[0])
    add_arguments(made)
    made.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    made.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    made.add_argument("--examples", metavar="FILE", help='JSON: {adapter: [{"prompt": "..."}]}')
    made.add_argument(
        "--share",
        choices=["never", "public"],
        default="never",
        help="public: a gradio.live link, which whoever has it may open (%(default)s)",
    )
    made.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        default=os.environ.get("SECURA_UI_AUTH"),
        help="login of the page (default: $SECURA_UI_AUTH)",
    )
    made.add_argument(
        "--no-auth",
        action="store_true",
        help="let whoever reaches the page use the endpoint; beyond this machine not with a key",
    )
    made.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end when standard input does: whoever started this page is then gone",
    )
    return made


def login(args: argparse.Namespace) -> tuple[str, str] | None:
    """Return user and password of the page. Raises ValueError if it needs them and has none."""
    if args.auth is not None:
        user, _, password = args.auth.partition(":")
        if not (user and password):
            raise ValueError("--auth should be USER:PASSWORD, neither of them empty")
        if args.no_auth:
            raise ValueError("--auth and --no-auth contradict each other")
        return user, password
    if args.share == "never" and _is_local(args.host):
        return None
    if args.api_key:
        raise ValueError("whoever opens this page would ask with your key: give --auth")
    if not args.no_auth:
        raise ValueError("this page is open to others: give --auth USER:PASSWORD, or --no-auth")
    return None


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def end_with_stdin() -> None:
    """Wait for the end of standard input, then end this process whatever it is doing."""
    while sys.stdin.buffer.read(1024):
        pass
    os._exit(0)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.until_stdin_closes:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    try:
        examples, auth = read_examples(args.examples), login(args)
    except ValueError as error:
        arguments.error(str(error))
    blocks = build(Page(connect(args.endpoint, args.api_key), examples))
    try:
        blocks.launch(
            server_name=args.host,
            server_port=args.port,
            auth=auth,
            share=args.share == "public",
            css=CSS,
            theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT),
            footer_links=[],
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError:
        taken = f"cannot listen on {args.host}:{args.port}"
        arguments.error(f"{taken}: is the port taken? Choose another with --port")
    # Gradio's own lines advertise a public link; without its lock it would return at once.
    print(
        f"secura-serve demo: {blocks.share_url or blocks.local_url} asks {args.endpoint}",
        flush=True,
    )
    blocks.block_thread()


if __name__ == "__main__":
    main()
