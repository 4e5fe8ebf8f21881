"""A built-in corpus for one purpose: texts that nothing but an induction head can predict.

Each text has a rule of its own: it takes 3 to 12 letters, and for each of them another one (or itself) that follows.
It then walks along that rule, and at one letter in five it jumps to any of its letters instead. What follows which
letter can only be read from the text itself, where the same letter stood before: a Markov chain that is to be learned
in context, as in Edelman et al. 2024, "The Evolution of Statistical Induction Heads"; of them is the idea, ours are the
sparse rule and the number of letters that varies.

Copying a repeated text is not enough for that. There, letters come back at a distance that is the same throughout a
text, and a head that only counts positions can do well; here it cannot.
"""

import string
from collections.abc import Iterator
from random import Random

CHAINS_VERSION = 1
"""Raised whenever a text changes, so that caches of the old text are not used again."""
LETTERS = string.ascii_lowercase
FEWEST, MOST = 3, 12
"""Letters of a text."""
FOLLOWING = 0.8
"""How often the rule is followed; a jump may come to the same letter."""
LENGTH = 63
"""With the start and the end token, a window of a context of 64: a text is one window."""


def chain(split: str, index: int, seed: int = 0) -> str:
    """Text `index` of a split: a pure function of its arguments."""
    # Random.random() gives the same numbers in every version of Python; choice() and sample() do not promise it.
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
    """The first `num_documents` texts of a split, one by one; splits differ in their draws only."""
    return (chain(split, index, seed) for index in range(num_documents))
