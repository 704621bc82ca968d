"""What the tests of cowdu share: each test gets a copy of the image that its file made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image_files import require_clean


@pytest.fixture
def image(tmp_path: Path, original: bytes) -> Iterator[Path]:
    """A copy of the `original` that the test's file made; clean afterwards."""
    path = tmp_path / "disk.img"
    path.write_bytes(original)
    yield path
    require_clean(path)
