"""What the tests of cowdu share: an image for each test, copied from one that its file made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image_files import require_clean


@pytest.fixture
def image(tmp_path: Path, original: bytes) -> Iterator[Path]:
    """A copy of the `original` of the test's file; clean afterwards."""
    path = tmp_path / "disk.img"
    path.write_bytes(original)
    yield path
    require_clean(path)
