"""The built-in chains: the same everywhere, and predictable from the text itself alone."""

import hashlib
from collections import Counter, defaultdict
from itertools import islice, pairwise

import pytest

from lumiere.data.chains import CHAINS_VERSION, FEWEST, LENGTH, LETTERS, MOST, chain, chains

GOLDEN = {1: "40e0fe383c669baa81d25c048d42e7f72b62fb06a5096c75265cc252c2d5e860"}
"""The text of each version: when it changes, raise CHAINS_VERSION, and put the new hash here."""


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(chains("train", 2000))


def test_the_text_of_a_version_never_changes(train: list[str]) -> None:
    assert hashlib.sha256("\n".join(train).encode()).hexdigest() == GOLDEN[CHAINS_VERSION]


def test_a_text_depends_on_seed_split_and_index_only(train: list[str]) -> None:
    assert [chain("train", index) for index in (19, 3)] == [train[19], train[3]]
    assert list(islice(chains("train", 10**12), 2)) == train[:2]
    others = [*chains("train", 20, seed=1), *chains("validation", 20), *chains("test", 20)]
    assert len({*train[:20], *others}) == 80


def test_length_and_letters(train: list[str]) -> None:
    assert {len(text) for text in train} == {LENGTH}
    assert set("".join(train)) == set(LETTERS)
    assert max(len(set(text)) for text in train) == MOST
    assert min(len(set(text)) for text in train) < FEWEST  # a rule may lead round a part of its letters


def test_the_letters_before_tell_what_follows_and_the_corpus_does_not(train: list[str]) -> None:
    """Counting pairs in the text so far finds the next letter four times in five; counting them in all texts, never."""
    of_all = defaultdict(Counter)
    for text in train:
        for before, after in pairwise(text):
            of_all[before][after] += after != before
    right, right_of_all, total = 0, 0, 0
    for text in train:
        followers: dict[str, Counter[str]] = defaultdict(Counter)
        for before, after in pairwise(text):
            if followers[before].total() >= 3:
                right += followers[before].most_common(1)[0][0] == after
                right_of_all += of_all[before].most_common(1)[0][0] == after
                total += 1
            followers[before][after] += 1
    assert 0.78 < right / total < 0.86  # 0.8, and a jump in 3 to 12 that lands there too, less what is counted wrong
    assert right_of_all / total < 0.1
