"""Make docs/images/report.png, the README's picture, from the report of `make demo`.

    make demo && .venv/bin/python runs/readme_picture.py

Needs a Chromium; the picture is the first screens of demo/report.html.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 1180, 1500


def main() -> int:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    report = ROOT / "demo" / "report.html"
    if browser is None or not report.exists():
        print("needs Chromium and demo/report.html (make demo)", file=sys.stderr)
        return 2
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=browser, args=arguments)
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(report.as_uri())
        page.wait_for_selector("svg")
        page.wait_for_timeout(500)
        page.screenshot(path=ROOT / "docs" / "images" / "report.png")
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
