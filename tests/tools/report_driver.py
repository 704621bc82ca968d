"""A headless Chromium for the report of cowdu: it uses no user profile and always ends.

`chromium` is a context manager, so the browser ends after failed tests too. Selenium gets the paths
of all programs and fetches nothing.
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
    """The first of these programs that is installed; the test fails if none is."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.fail(f"{' or '.join(names)} is missing: scripts/setup.sh installs it")


@contextlib.contextmanager
def chromium(width: int = 1440, height: int = 1000) -> Iterator[Chrome]:
    """A browser with an empty profile and a window of this size; it keeps the console's log."""
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
    """Write the page of `report`, assembled as `cowdu report` does."""
    path.write_text(page_of(report), encoding="utf-8")
    return path


def emulate(browser: Chrome, **features: str) -> None:
    """Make the page see these media features, such as `prefers_color_scheme="dark"`."""
    listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": listed})
