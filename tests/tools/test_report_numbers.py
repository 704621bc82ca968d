"""Promises that the page of cowdu report shows the numbers of cowdu for a real image."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from cowfs.history.edits import HoldSnapshots, Rollback
from tests.conftest import require_success
from tests.image_files import change, history, make_image, require_clean, tree_bytes
from tests.sizes import HANG_SECONDS
from tests.tools.report_driver import chromium
from tests.tools.running import cowdu, cowdu_answer

NAMES = [f"day <{number}> & 'more'" for number in range(8)]


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = make_image(tmp_path / "disk.img")
    change(path, *history(NAMES))
    change(path, lambda filesystem: filesystem.apply(Rollback(NAMES[2])))
    change(path, lambda filesystem: filesystem.apply(HoldSnapshots((NAMES[5],), True)))
    return path


def test_page_of_an_image_tells_what_cowdu_tells(image: Path, tmp_path: Path) -> None:
    """Promise C11: whatever mouse or keys choose, the page shows the bytes that the CLI tells."""
    page = tmp_path / "page.html"
    require_success(cowdu("report", image, "--html", page))
    report = cowdu_answer(image)
    names = [row["name"] for row in report["snapshots"]]
    assert len(names) == len(NAMES) + 1  # the rollback kept one more
    free = [name for name in names if name != NAMES[5]]
    chance = random.Random(3)
    with chromium() as browser:
        browser.get(page.as_uri())

        def number(selector: str) -> int:
            found = browser.find_element(By.CSS_SELECTOR, selector).get_attribute("data-bytes")
            assert found is not None
            return int(found)

        def box(name: str) -> WebElement:
            boxes = browser.find_elements(By.CSS_SELECTOR, "#snapshots input[data-name]")
            found = next(each for each in boxes if each.get_attribute("data-name") == name)
            browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
            return found

        assert number("#total-allocated") == report["totals"]["allocated_bytes"]
        for row in report["snapshots"]:
            line = next(
                each
                for each in browser.find_elements(By.CSS_SELECTOR, "#snapshots tr[data-name]")
                if each.get_attribute("data-name") == row["name"]
            )
            for key in ("referenced", "exclusive", "shared", "written", "cumulative"):
                cell = line.find_element(By.CSS_SELECTOR, f"td[data-key={key}]")
                assert cell.get_attribute("data-bytes") == str(row[f"{key}_bytes"]), (row, key)
        assert not box(NAMES[5]).is_enabled()
        for _ in range(4):
            browser.find_element(By.ID, "choose-none").click()
            chosen = chance.sample(free, chance.randint(1, len(free)))
            for name in chosen:
                box(name).click()
            told = cowdu_answer(image, *chosen)["reclaim"]["reclaim_bytes"]
            assert number("#reclaim-bytes") == told == number("#treemap-bytes")
        browser.find_element(By.ID, "choose-none").click()
        timeline = browser.find_element(By.CSS_SELECTOR, "[role=listbox]")
        timeline.send_keys(Keys.HOME, Keys.SPACE, Keys.ARROW_RIGHT, Keys.SPACE)
        oldest = cowdu_answer(image, *names[:2])["reclaim"]["reclaim_bytes"]
        assert number("#reclaim-bytes") == oldest
        command = browser.find_element(By.ID, "command").text
    before = tree_bytes(image)
    shell = f"cowfs() {{ {sys.executable} -c 'from cowfs.cli.main import main; main()' \"$@\"; }}; "
    subprocess.run(["bash", "-c", shell + command], check=True, timeout=HANG_SECONDS)
    assert before - tree_bytes(image) == oldest, "the command of the page frees what it said"
    require_clean(image)
