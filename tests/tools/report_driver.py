"""A headless Chromium for the report of cowdu: nothing of the user's in it, ended whatever happens.

`chromium` is a context manager, so a test that fails ends the browser as one that passes does. The
driver is told where everything is: selenium looks for nothing and fetches nothing.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from cowfs_tools.cowdu.report import page_of
from tests.sizes import HANG_SECONDS


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
    """The page of `report`, put together as `cowdu report` does it."""
    path.write_text(page_of(report), encoding="utf-8")
    return path


def emulate(browser: Chrome, **features: str) -> None:
    """Let the page see these media features, as `prefers_color_scheme="dark"`."""
    listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": listed})
