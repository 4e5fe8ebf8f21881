"""The built-in corpus: small English stories, told by a grammar of our own; no network, any size, the same everywhere.

Names of people and places are invented for each story, and its quoted sentences are filled at random; both recur a
line or two later, word for word. Nothing but copying from the context predicts them, so a model that learns this
corpus has to learn induction; all the rest is plain enough for a tiny model to become fluent.

The notation of the grammar:
    symbol: this | that     a rule, drawn afresh wherever it stands; it repeats no alternative before it has used all
    symbol = this | that    the same, but drawn once: it means one thing throughout a story
    {symbol} {Symbol}       what the rule says; with a capital letter
    [this|that]             a choice on the spot
    {hero.they}             a pronoun; they, them, their, for whoever was named, in lower or (`{Hero.they}`) upper case
    ¶                       a new paragraph
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

STORIES_VERSION = 1
"""Raised whenever a story's text changes, so that caches of the old text are not used again."""


PRONOUNS = {"they": ("he", "she"), "them": ("him", "her"), "their": ("his", "her")}

REFERENCE = re.compile(r"\{([\w.]+)\}|\[([^]]+)\]")
"""`{symbol}` or `[choice|on the spot]`; the latter is a rule whose name is its own text."""

Rule = tuple[bool, list[tuple[str, list[str]]]]
"""Whether it is drawn once a story, and its alternatives: each a %-template and the symbols that fill it."""


def parse(grammar: str) -> dict[str, Rule]:
    """Returns the rules of a grammar in the notation above, by symbol."""
    rules = {}
    for symbol, kind, body in re.findall(r"^(\w+)( ?[:=])((?:.*\n)(?:^ .*\n)*)", grammar, re.MULTILINE):
        alternatives = " ".join(body.split()).replace(" ¶ ", "\n\n").removeprefix("| ").split(" | ")
        rules[symbol] = kind == " =", [_template(alternative) for alternative in alternatives]
        for choice in re.findall(r"\[([^]]+)\]", " ".join(alternatives)):
            rules[choice] = False, [_template(alternative) for alternative in choice.split("|")]
    return rules


def _template(alternative: str) -> tuple[str, list[str]]:
    return REFERENCE.sub("%s", alternative), [symbol or choice for symbol, choice in REFERENCE.findall(alternative)]


GRAMMAR = parse(Path(__file__).with_name("stories.txt").read_text(encoding="utf-8"))


class Teller:
    """Tells one story: draws from the rules, and keeps what has its meaning already and what was said before."""

    def __init__(self, random: Random) -> None:
        # Random.random() gives the same numbers in every version of Python; choice() and sample() do not promise it.
        self._random = random.random
        self._meanings: dict[str, str] = {}
        self._said: defaultdict[str, set[int]] = defaultdict(set)

    def say(self, symbol: str) -> str:
        """Returns what a symbol says at this point of the story."""
        if symbol in self._meanings:
            return self._meanings[symbol]
        if symbol not in GRAMMAR:
            return self._variant(symbol)
        drawn_once, alternatives = GRAMMAR[symbol]
        template, symbols = alternatives[self._draw(symbol, len(alternatives))]
        text = template % tuple(map(self.say, symbols)) if symbols else template
        if drawn_once:
            self._meanings[symbol] = text
        return text

    def _draw(self, symbol: str, count: int) -> int:
        said = self._said[symbol]
        if len(said) == count:
            said.clear()
        while (index := int(self._random() * count)) in said:
            pass
        said.add(index)
        return index

    def _variant(self, symbol: str) -> str:
        if symbol[0].isupper():
            text = self.say(symbol[0].lower() + symbol[1:])
            return text[0].upper() + text[1:]
        name, _, pronoun = symbol.partition(".")
        # A name tells its pronoun, so that a window starting in mid-story does too: Zorbunika is she, Velmirat he.
        return PRONOUNS[pronoun][self.say(name).endswith("a")]


def story(split: str, index: int, seed: int = 0) -> str:
    """Returns story `index` of a split: a pure function of its arguments, paragraphs parted by blank lines."""
    text = Teller(Random(f"{seed}/{split}/{index}")).say("story")
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def stories(split: str, num_documents: int, seed: int = 0) -> Iterator[str]:
    """Yields the first `num_documents` stories of a split, one by one; splits differ in their draws only."""
    return (story(split, index, seed) for index in range(num_documents))
