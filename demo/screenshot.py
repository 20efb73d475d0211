"""Drive a running page and save a picture of it, such as the one in the README.

python -m demo.screenshot --page http://127.0.0.1:7860 --models base,sql --prompt "..." --out a.png

Needs playwright, and Chromium on the path.
"""

from __future__ import annotations

import argparse
import shutil

from playwright.sync_api import sync_playwright

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page", default="http://127.0.0.1:7860", help="(%(default)s)")
    parser.add_argument("--models", required=True, help="names to tick, separated by commas")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--system", default="")
    parser.add_argument("--out", default="screenshot.png", help="(%(default)s)")
    parser.add_argument("--width", type=int, default=1440, help="pixels (%(default)s)")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        parser.error("chromium is not on the path: install it (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=FLAGS).new_page(
            viewport={"width": args.width, "height": 720},
            color_scheme="dark" if args.dark else "light",
            device_scale_factor=2,
        )
        page.goto(args.page)
        page.locator("#models .wrap input").first.wait_for()
        for box in page.locator("#models .wrap input").all():
            box.set_checked(box.get_attribute("name") in args.models.split(","))
        page.locator("#system textarea").fill(args.system)
        page.locator("#prompt textarea").fill(args.prompt)
        page.locator("#prompt textarea").press("Enter")
        page.locator("#answers article").first.wait_for()
        page.locator("#answers article[aria-busy=true]").first.wait_for(
            state="detached", timeout=180_000
        )
        page.screenshot(path=args.out, full_page=True)


if __name__ == "__main__":
    main()
