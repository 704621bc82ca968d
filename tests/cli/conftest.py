"""What the tests of commands share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image_files import change, history, make_image, require_clean


@pytest.fixture
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An image whose snapshots, the NAMES of the test's file, share data; clean afterwards."""
    image = make_image(tmp_path / "disk.img")
    change(image, *history(request.module.NAMES))
    yield image
    require_clean(image)
