"""A headless Chromium for the report of cowdu: nothing of the user's in it, ended whatever happens.

`chromium` is a context manager, so a test that fails ends the browser as one that passes does. The
driver is told where everything is: selenium looks for nothing and fetches nothing.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.sizes import HANG_SECONDS

EMPTY_DATA = '<script type="application/json" id="data">{}</script>'
TEMPLATE = Path(__file__).parents[2] / "tools" / "cowdu" / "page.html"


def program(*names: str) -> str:
    """The first of these programs that is installed; the test fails when none is."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.fail(f"{' or '.join(names)} is missing: scripts/setup.sh installs it")


@contextlib.contextmanager
def chromium(width: int = 1440, height: int = 1000) -> Iterator[Chrome]:
    """A browser with an empty profile and a window of this size; it keeps its log of the console."""
    with tempfile.TemporaryDirectory(
        prefix="cowdu-chromium-", ignore_cleanup_errors=True
    ) as profile:
        options = ChromeOptions()
        options.binary_location = program("chromium", "chromium-browser", "google-chrome")
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = Chrome(options=options, service=Service(program("chromedriver")))
        try:
            browser.set_page_load_timeout(HANG_SECONDS)
            yield browser
        finally:
            browser.quit()


def write_page(path: Path, report: dict[str, Any]) -> Path:
    """The page of `report`, filled in as `cowdu report` does it."""
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count(EMPTY_DATA) == 1
    data = json.dumps(report, separators=(",", ":")).replace("<", "\\u003c")
    path.write_text(text.replace(EMPTY_DATA, EMPTY_DATA.replace("{}", data)), encoding="utf-8")
    return path


def emulate(browser: Chrome, **features: str) -> None:
    """Let the page see these media features, as `prefers_color_scheme="dark"`."""
    listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": listed})
