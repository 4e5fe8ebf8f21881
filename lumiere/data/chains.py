"""Built-in corpus of texts that only an induction head can predict.

Each text has its own rule: it picks 3 to 12 letters, and for each of them a successor, possibly itself. It then follows
that rule, and jumps to any of its letters one time in five. The successor of a letter can only be read from earlier
occurrences in the text: a Markov chain learned in context. The idea is that of Edelman et al. 2024, "The Evolution of
Statistical Induction Heads"; the sparse rule and the varying number of letters are ours.

Copying a repeated text would be too easy: there, letters recur at a constant distance within a text, so a head that
only counts positions can do well.
"""

import string
from collections.abc import Iterator
from random import Random

CHAINS_VERSION = 1
"""Raised whenever a text changes, so that caches of the old text are not reused."""
LETTERS = string.ascii_lowercase
FEWEST, MOST = 3, 12
"""Minimum and maximum number of letters of a text."""
FOLLOWING = 0.8
"""Probability of following the rule; a jump may lead to the same letter."""
LENGTH = 63
"""With the start and end tokens, a text fills one window of a context of 64."""


def chain(split: str, index: int, seed: int = 0) -> str:
    """Return text `index` of a split: a pure function of its arguments."""
    # Random.random() is the same in every version of Python; choice() and sample() do not promise it.
    draw = Random(f"{seed}/chains/{split}/{index}").random
    letters = list(LETTERS)
    count = FEWEST + int(draw() * (MOST - FEWEST + 1))
    for place in range(count):
        other = place + int(draw() * (len(letters) - place))
        letters[place], letters[other] = letters[other], letters[place]
    followers = {letter: letters[int(draw() * count)] for letter in letters[:count]}
    letter, text = letters[0], []
    for _ in range(LENGTH):
        text.append(letter)
        letter = followers[letter] if draw() < FOLLOWING else letters[int(draw() * count)]
    return "".join(text)


def chains(split: str, num_documents: int, seed: int = 0) -> Iterator[str]:
    """Yield the first `num_documents` texts of a split. Splits differ only in their random draws."""
    return (chain(split, index, seed) for index in range(num_documents))
