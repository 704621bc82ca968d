"""Promises about images that lie: an answer or a CowfsError, in bounded time and memory.

Each run makes images from fixed seeds and replays the kept ones; `--times` makes tens of thousands,
`--seed` begins with another seed. A failure prints its recipe, which can be added to kept.json.
"""

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowfs.care.check import check_image
from cowfs.files.acl import ACCESS_NAME, DEFAULT_NAME
from tests.damage.exercise import ACL, exercise
from tests.damage.hostile import KINDS, Mutation, build, build_braid, recipe_of
from tests.sizes import chosen_seed, machine_settings, sized

KEPT = json.loads((Path(__file__).parent / "kept.json").read_text())
IMAGES = sized(40, 160)
FIRST_SEED = chosen_seed(0)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence the log: these images are damaged, and every warning tells of that."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def recipe_of_seed(seed: int) -> list[Mutation]:
    """One to three lies of any kind."""
    choice = random.Random(seed)
    return [
        Mutation(
            choice.choice(KINDS),
            choice.randrange(128),
            choice.randrange(64),
            choice.randrange(1000),
            choice.randrange(1000),
        )
        for _ in range(choice.choice((1, 1, 1, 2, 3)))
    ]


def test_image_without_lies_is_clean() -> None:
    """Promise: the image without mutations is sound, so each mutation is the only fault."""
    assert check_image(build([])).findings == ()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lie_changes_images(kind: str) -> None:
    """Promise: every kind of mutation changes the image."""
    sound = build([]).blocks
    changed = 0
    for seed in range(60):
        choice = random.Random(seed)
        numbers = [choice.randrange(1000) for _ in range(4)]
        changed += build([Mutation(kind, *numbers)]).blocks != sound
    assert changed > 3


@pytest.mark.parametrize("name", sorted(KEPT))
def test_kept_image_is_answered(name: str, tmp_path: Path) -> None:
    """Promise: an image that once showed a fault of cowfs shows it no more."""
    exercise(build(recipe_of(KEPT[name])), tmp_path)


def test_leaf_that_is_reached_in_a_million_ways_is_read_once(tmp_path: Path) -> None:
    """Promise: no walk takes longer because many pointers lead to one node."""
    exercise(build_braid(), tmp_path)


def test_acls_that_lie_are_answered(tmp_path: Path) -> None:
    """Promise: an invalid ACL on any file type makes at most that file unreadable."""
    for seed in range(12):
        choice = random.Random(seed)
        xattrs = []
        for ino in (1, 2, 4, 20, 21):  # root, a file, a symlink, a directory, a file
            for name in (ACCESS_NAME, DEFAULT_NAME):
                value = bytearray(ACL)
                value[choice.randrange(len(ACL))] ^= 1 << choice.randrange(8)
                cut = choice.choice([len(ACL), len(ACL), 4, 0, choice.randrange(len(ACL))])
                xattrs.append((ino, name, bytes(value[:cut]) * choice.choice([1, 1, 2, 300])))
        folder = tmp_path / str(seed)
        folder.mkdir()
        device = build([], xattrs=xattrs)
        assert not check_image(device).clean
        exercise(device, folder)


@pytest.mark.parametrize("part", range(8))
def test_images_of_seeds_are_answered(
    part: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Promise: lying images cause no uncaught exception, slow step, large memory or way out."""
    numbers = range(FIRST_SEED + part, FIRST_SEED + IMAGES, 8)
    for number in numbers:
        recipe = recipe_of_seed(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            exercise(build(recipe), folder)
        except BaseException as error:
            words = json.dumps([mutation.to_list() for mutation in recipe])
            error.add_note(f"seed {number}: {words}")
            raise
    record_property("count", ("images that lie", len(numbers)))


MUTATIONS = st.builds(
    Mutation,
    st.sampled_from(KINDS),
    st.integers(0, 127),
    st.integers(0, 63),
    st.integers(0, 999),
    st.integers(0, 999),
)


@given(recipe=st.lists(MUTATIONS, min_size=1, max_size=4))
@settings(machine_settings(short=12, long=40, steps=1), database=None)
def test_images_that_hypothesis_makes_are_answered(
    recipe: list[Mutation], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Promise: the same for random recipes, and a failure shrinks to the lie that matters."""
    exercise(build(recipe), tmp_path_factory.mktemp("hostile"))
