"""Promises of the kernel's lookup counts, against a dictionary."""

import random

from cowfs.daemon.lookups import CHUNK, Lookups


def test_counts_are_those_of_a_dictionary_and_nothing_is_kept_of_what_was_forgotten() -> None:
    """Promise C7: an inode is known until the kernel has forgotten as many lookups as it made."""
    choice = random.Random(3)
    lookups, model = Lookups(), dict[int, int]()
    numbers = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, (1 << 40) - 1]
    for _ in range(3000):
        ino = choice.choice(numbers)
        if choice.random() < 0.6:
            lookups.add(ino)
            model[ino] = model.get(ino, 0) + 1
        else:
            # May exceed the count: lookups from before a rollback are forgotten too.
            count = choice.randint(1, 4)
            model[ino] = max(0, model.get(ino, 0) - count)
            assert lookups.drop(ino, count) == model[ino]
        for each in numbers:
            assert (each in lookups) == (model.get(each, 0) > 0)
    for ino in numbers:
        lookups.drop(ino, 5000)
    assert not lookups._chunks
