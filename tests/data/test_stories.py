"""The built-in stories: reproducible, well-formed English, with content that only copying can predict."""

import hashlib
import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from lumiere.data.stories import GRAMMAR, STORIES_VERSION, Story, parse, stories, story
from lumiere.data.tokenizer import Tokenizer

NUM_STORIES = 2000
GOLDEN = {1: "75c0acf90f7e0f3760f2ce618ea1643ab499bbe9767c2811ef404f2495237069"}
"""The text of each version: when it changes, raise STORIES_VERSION, and put the new hash here."""


@pytest.fixture(scope="module")
def train() -> list[str]:
    return list(stories("train", NUM_STORIES))


def hero_of(text: str) -> str:
    """Return the name in the first sentence of a story."""
    match = re.search(r"^(\w+) was a |Everybody in \w+ knew (\w+),|(?:named|called|whose name was) (\w+)\.", text)
    assert match, text
    return next(name for name in match.groups() if name)


def quotations(text: str) -> list[str]:
    """Return the quoted sentences without their final punctuation."""
    spoken = re.findall(r'"([^"]*)"', text)
    return [sentence.strip(" .,!?") for quotation in spoken for sentence in re.split(r"[.:!?](?: |$)", quotation)]


def refrain_of(text: str) -> str:
    """Return the longest quoted sentence that occurs at least three times."""
    return max((said for said in quotations(text) if text.count(said) >= 3), key=len, default="")


# Reproducibility


def test_a_story_depends_on_seed_split_and_index_only(train: list[str]) -> None:
    assert list(islice(stories("train", 10**12), 20)) == train[:20]
    assert [story("train", index) for index in (19, 3, 7)] == [train[19], train[3], train[7]]
    assert len({*train, *stories("train", 20, seed=1), *stories("validation", 500)}) == NUM_STORIES + 520


def test_the_text_of_this_version_does_not_drift() -> None:
    text = "\n\n\n".join(stories("train", 300))
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN[STORIES_VERSION]


# The grammar


def test_parsing_the_notation() -> None:
    assert parse("pet = cat\n  | {Colour} dog\n\ncolour: [dark|light] red ¶ or\n  so | blue\n") == {
        "pet": (True, [("cat", []), ("%s dog", ["Colour"])]),
        "colour": (False, [("%s red\n\nor so", ["dark|light"]), ("blue", [])]),
        "dark|light": (False, [("dark", []), ("light", [])]),
    }


def test_every_rule_is_defined_and_reached_from_the_story() -> None:
    reached, waiting = {"story"}, ["story"]
    while waiting:
        _, alternatives = GRAMMAR[waiting.pop()]
        for symbol in {symbol for _, symbols in alternatives for symbol in symbols} - {"they", "them", "their"}:
            rule = symbol if symbol in GRAMMAR else symbol.split(".")[0].lower()
            if rule not in reached:
                reached.add(rule)
                waiting.append(rule)
    assert reached == set(GRAMMAR)


def test_a_rule_uses_all_alternatives_before_it_repeats_one() -> None:
    plain = {
        symbol: [text for text, _ in alternatives]
        for symbol, (once, alternatives) in GRAMMAR.items()
        if not once and not any(symbols for _, symbols in alternatives)
    }
    assert len(plain) > 50
    for symbol, texts in plain.items():
        story_ = Story(Random(symbol))
        for _ in range(2):
            assert sorted(story_.expand(symbol) for _ in texts) == sorted(texts)


def test_a_rule_drawn_once_keeps_its_meaning() -> None:
    story_ = Story(Random(0))
    for symbol in (symbol for symbol, (once, _) in GRAMMAR.items() if once):
        assert story_.expand(symbol) == story_.expand(symbol)


def test_pronouns_follow_the_name() -> None:
    for seed in range(50):
        story_ = Story(Random(seed))
        pronouns = [story_.expand(symbol) for symbol in ("hero.they", "hero.them", "Hero.their")]
        assert pronouns == (["she", "her", "Her"] if story_.expand("hero")[-1] == "a" else ["he", "him", "His"])


# The English


def test_stories_are_well_formed_english(train: list[str]) -> None:
    for text in train:
        # No trace of the notation, doubled words or misplaced spaces.
        assert re.fullmatch(r"[A-Za-z ,.!?:'\"\n]+", text)
        assert not re.search(r"  | \n|\n |\n\n\n| [,.!?:]|[,.!?]{2}|\b(\w+) \1\b|^\s|\s$", text)
        # Articles fit the next word.
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", text)
        assert set(re.findall(r"\b[Aa]n ([^aeiou]\w*)", text)) <= {"hour"}
        assert not re.search(r"\b[Aa]n (?:uni|use|eu|one)", text)
        # Paragraphs are whole sentences with capitals and closed quotes.
        paragraphs = text.split("\n\n")
        assert 3 < len(paragraphs) < 8
        for paragraph in paragraphs:
            assert re.match(r'"?[A-Z]', paragraph)
            assert re.search(r'[.!?]"?$', paragraph)
            assert paragraph.count('"') % 2 == 0
            assert all(re.match(r"[A-Z].*[.,!?]$", quotation) for quotation in paragraph.split('"')[1::2])
            assert not re.search(r'[.!?] "?[a-z]|\."? [a-z]', paragraph)


def test_stories_are_short(train: list[str]) -> None:
    num_words = sorted(len(text.split()) for text in train)
    assert num_words[0] >= 120
    assert num_words[NUM_STORIES * 97 // 100] <= 260
    assert num_words[-1] <= 300


def test_hero_keeps_one_pronoun(train: list[str]) -> None:
    found = Counter()
    for text in train:
        of_hero = re.sub(r"\w+ shook (his|her) head", "", text)  # a friend's
        pronouns = set(re.findall(r"\b(?:he|him|his|himself|she|her|herself)\b", of_hero.lower()))
        expected = {"she", "her", "herself"} if hero_of(text)[-1] == "a" else {"he", "him", "his", "himself"}
        assert pronouns <= expected, text
        found.update(pronouns)
    assert len(found) == 7  # each of them is used


# What only copying can predict


def test_names_recur_in_their_story_and_nowhere_else(train: list[str]) -> None:
    heroes = [hero_of(text) for text in train]
    assert min(text.count(hero) for text, hero in zip(train, heroes, strict=True)) >= 4
    stories_with = Counter(word for text in train for word in set(re.findall(r"\w+", text)))
    assert sum(stories_with[hero] > 1 for hero in heroes) <= NUM_STORIES // 100


def test_every_story_repeats_a_sentence_word_for_word_and_soon(train: list[str]) -> None:
    for text in train:
        refrain = refrain_of(text)
        assert len(refrain.split()) >= 2, text
        before_second = text.split(refrain)[1]
        assert len(before_second.split()) <= 20, text


def test_a_refrain_occurs_in_one_story_only(train: list[str]) -> None:
    everything = "\n".join(train)
    elsewhere = 0
    for text in train[:500]:
        refrain = refrain_of(text)
        elsewhere += everything.count(refrain) > text.count(refrain)
    assert elsewhere <= 5


def test_the_corpus_is_rich_enough_for_its_tokenizer(train: list[str]) -> None:
    tokenizer = Tokenizer.train(train, vocab_size=4096, min_frequency=2)
    assert len(tokenizer) == 4096
    num_tokens = [len(tokenizer.encode(f" {hero_of(text)}")) for text in stories("validation", 300)]
    assert sum(num_tokens) / len(num_tokens) > 2.5
    assert min(num_tokens) >= 2
