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
from random import Random

from lumiere.data.story_words import WORDS

STORIES_VERSION = 1
"""Raised whenever a story's text changes, so that caches of the old text are not used again."""

PLOTS = """
story: {lost} | {storm} | {newcomer} | {baking} | {mending} | {race} | {garden} | {door} | {healing} | {moving}
  | {skill} | {sharing} | {shy_creature} | {stars} | {bridge} | {quarrel}

lost:
  {opening} Of all {hero.their} things, {hero} loved a {hue} {thing} best, [a present from|found on a walk with|made
  by] {hero.their} [grandmother|grandfather|aunt|uncle].
  ¶ But {day} {hero} found that the {thing} was gone. {hero} looked {nook}, {nook}, and even {nook}. There was no
  {hue} {thing} anywhere. {sad}
  ¶ {meets} {hero} told {friend} about the {thing}. {speaks} {echo}
  ¶ [Together they|So {hero} and {friend}] searched [the whole of {place}|every corner of {place}|high and low].
  {recall} And there, [behind|beside|close to] {landmark}, {found} {joy}
  ¶ {farewell} {closing}
found:
  sat a {beast} with the {hue} {thing}. It had only borrowed it, and it gave it back with a [bow|blush|sigh].
  | lay something {hue} in the grass. The wind had carried the {thing} all that way.
  | hung the {thing}, high in a [birch|pine|maple] tree, where a {beast} had left it.
  | was the {hue} {thing}, right where {hero} had put it down the day before.

storm:
  {opening}
  ¶ But {day} the sky over {place} [turned black|went dark as ink]. The wind howled, thunder [rolled|boomed|growled],
  and [rain|hail] drummed on the roofs. "My {herd} are still [out on the hill|down by the water]!" cried {hero}.
  ¶ {meets} {friend} had a {hue} lantern and a [long rope|big coat]. {speaks} {echo}
  ¶ Hand in hand {hero} and {friend} went out into the storm. [The wind pushed|Branches cracked|The path was all mud],
  and {hero} was afraid. {recall} One by one, the {herd} followed the {hue} light [home|back to the barn|to
  {landmark}].
  ¶ By [morning|supper time] the storm was over, and not one of the {herd} was missing. {joy} {farewell} {closing}

newcomer:
  {opening} But {hero} had nobody to [play with|talk to|laugh with].
  ¶ Then, {day} a [cart|wagon|van] full of {trinkets} stopped [near|beside] {landmark}, and out climbed somebody new.
  "My name is {friend}," said the stranger, [hardly looking up|very quietly|blushing]. "I come from {new_place}, and I
  do not know anybody here."
  ¶ "I am {hero}," said {hero}. "[What do people say|What do they sing|What do they tell you] in {new_place}?"
  {friend} thought about it. "{words}," said {friend}. {echo}
  ¶ {hero} showed {friend} [all of {place}|the secret path|the best tree], and {friend} showed {hero} a {hue} {thing}
  from {new_place}. They shared {few} {snacks} and [talked until dark|laughed all afternoon]. {recall} {joy}
  ¶ {farewell} {closing}

baking:
  {opening}
  ¶ Then, {day} {hero} wanted to bake a {cake} for [the whole of {place}|the {beasts}' birthday|the {weekday} feast].
  But [{hero} took salt for sugar|{hero} forgot the eggs|the oven was far too hot], and the {cake} came out [as flat
  as a plate|as hard as a brick|as black as coal]. {sad}
  ¶ {meets} {friend} tasted the {cake} and [coughed|pulled a face|giggled]. {speaks} {echo}
  ¶ So they began again. {hero} stirred and {friend} poured. {recall} They added a pinch of [cinnamon|ginger|nutmeg]
  and {few} {snacks}, and soon the kitchen smelled [wonderful|of warm butter|sweet]. This time the {cake} was perfect.
  {joy}
  ¶ Everybody had a slice of the {cake}, even the {beasts}. {farewell} {closing}

mending:
  {opening} {Hero.their} dearest treasure was a {hue} {thing}.
  ¶ But {day} {hero} [tripped over a {beast}|slipped on the stairs|ran too fast], and the {hue} {thing} [broke in
  two|fell to pieces|cracked from end to end]. {sad}
  ¶ {meets} {friend} looked at the pieces of the {thing}. {speaks} {echo}
  ¶ {friend} brought [glue and string|a needle and thread|a tiny hammer], and {hero} held the pieces still. It took
  {few} [hours|tries]. {recall} At last the {thing} was whole again. There was a {colour} line where it had been
  broken, and {hero} thought that it looked [even better|like a river on a map|like a smile]. {joy}
  ¶ {farewell} {closing}

race:
  {opening}
  ¶ Every year there was a race from {landmark} to {landmark}, and the prize was a {hue} {thing}. {hero} wanted to win
  it, but {hero} [was not very fast|had the shortest legs of all|had lost {many} times before]. {sad}
  ¶ {meets} {speaks} {echo}
  ¶ The day came, and {hero} ran. "{words}," {hero} [panted|sang|whispered] at every turn of the road. Near the end,
  {hero.they} was in front. But then a [small|young|tired] {runner} fell in the mud, and {hero} stopped to help it up.
  The others ran past, and {race_end}
  ¶ {farewell} {closing}
race_end:
  {hero} came in last. Yet nobody in {place} cheered for the winner. They all cheered for {hero}, and {hero} got the
    {thing}.
  | somebody else won the {hue} {thing}. "You have won a friend," said {friend}, and the {runner} hugged {hero}.
  | {hero} thought that all was lost. But the {runner} knew a short cut, and they won the {hue} {thing} together.

garden:
  {opening} {Hero.they} had a little garden, and in it {hero.they} planted a single {crop} seed.
  ¶ {hero} watered it [every morning|every day|at dawn and at dusk]. A week went by, and then {few} days more, but
  there was nothing to see except [mud|stones|weeds]. {sad}
  ¶ {meets} {friend} looked at the bare earth. {speaks} {echo}
  ¶ So {hero} [waited|kept waiting] and sang to the seed. {recall} Then, early one {weekday}, a green tip stood in
  {hero}'s garden. It grew and grew, until the {crop} was as big as a [cart|cottage|barn|hill]. They needed {many}
  {beasts} to carry it.
  ¶ [There was enough for|They shared it with|It was the pride of] everybody in {place}. {farewell} {closing}

door:
  {opening}
  ¶ Then, {day} {hero} came upon a {hue} door behind {landmark}, where no door had been before. It had no handle and
  no lock. {hero} [knocked|pushed|pulled], but the door [stayed shut|did not move]. {sad}
  ¶ {meets} "A {hue} door?" said {friend}. "[Old people say|My grandmother told me] that it opens to these words:
  {password}." "{password}," {hero} repeated {softly}.
  ¶ They ran back to the {hue} door. {hero} took a deep breath. "{password}!" And the door swung open. Inside was
  {behind_door}
  ¶ {joy} When they [left|went home], the door closed behind them. "[Will it open again|Can we come back], {friend}?"
  asked {hero}. "{password}," said {friend}, and [winked|smiled|that was answer enough]. {closing}
behind_door:
  a room with {many} {trinkets}, and each of them was [glowing|humming a tune|a different colour].
  | a garden where {many} {colour} {beasts} were [dancing|singing|drinking tea|having a bath].
  | a table laid with {snacks}, {snacks}, and a {cake}.
  | a stair that led up and up, to a window over all of {place}.
  | a {mood} {beast}, asleep on a heap of {trinkets}. It opened one eye and gave {hero} a {thing}.

healing:
  {opening}
  ¶ But {day} {hero} found a {small_beast} lying [beside|behind|near] {landmark}. It [had hurt its leg|was cold and
  weak|was shivering], and it looked up at {hero} with big eyes. {hero} wrapped it in a {hue} {cloth} and called it
  {pet}.
  ¶ At home {pet} would not eat. {sad} So {hero} sent for {friend}, the {job}. {friend} looked at {pet} and [mixed
  some medicine|warmed some milk|made it a soft bed]. {speaks} {echo}
  ¶ All night {hero} sat beside {pet}. {recall} In the morning {pet} lifted its head, and then it ate {few} {snacks}.
  {joy} Before long {pet} could [play|run about|climb the stairs] again.
  ¶ {hero} let {pet} go, but {pet} [came back|returned] every {weekday}. {farewell} {closing}

moving:
  {opening} {Hero.their} best friend was {friend}, who lived next door.
  ¶ But {day} {hero} heard the news. {hero} had to leave {place} and move to {new_place}, far away [over the
  sea|behind the mountains|at the end of the railway]. {sad} {hero} packed {many} {trinkets} and a {hue} {thing}.
  ¶ At the gate {friend} held {hero} tight. "{promise}," said {friend}. "Is that a promise?" asked {hero}. "Yes,
  {hero}. {promise}."
  ¶ In {new_place} everything was [strange|too big|too quiet]. {hero} missed {friend}, and at night {hero.they} said
  the promise aloud: "{promise}." Then, {day} {promise_kept}
  ¶ [How they laughed|They hugged each other for a long time]. And {new_place} [felt like home at last|did not seem so
  strange any more]. {closing}
promise_kept:
  a letter came to {new_place}. "Dear {hero}," it began. "{promise}. I have not forgotten. Your friend, {friend}." And
    the next day {friend} stood at the door.
  | there was a knock, and there stood {friend}. "You remembered!" cried {hero}. "Of course," said {friend}.
    "{promise}. That was what I said."

skill:
  {opening} There was only one thing that {hero} could not do, and that was to {learn}.
  ¶ {Day} {hero} tried it once more, and [fell into a heap of {trinkets}|everybody laughed|landed in a puddle]. {sad}
  ¶ {meets} "I could not {learn} either, when I was young," said {friend}. {speaks} {echo}
  ¶ So {friend} showed {hero} how. {hero} tried {few} times on {weekday}, and {many} times on {weekday}. {recall} And
  all at once {hero} could {learn}! {joy}
  ¶ At the next fair in {place}, everybody [clapped|stood and stared|threw their {trinkets} in the air]. {farewell}
  {closing}

sharing:
  {opening}
  ¶ Then, {day} {hero} was given a whole {cake}. "It is all for me," said {hero}, and hid the {cake} {nook}. Along
  came {friend}, {hero.their} best friend. "I am so hungry," said {friend}. "Is there anything to eat?" "No," said
  {hero}.
  ¶ When {friend} had gone, {hero} cut the {cake}. But it tasted of [nothing at all|dust|old socks]. {sad} Then {hero}
  remembered what {friend} used to say: "{words}." {echo_alone}
  ¶ So {hero} took the {cake} and ran to find {friend}. "I am sorry," said {hero}. "I did have a {cake}. [Half|The
  bigger half|Most] of it is yours." {friend} smiled. "{words}," said {friend}. They ate it together with a pot of
  {drink}, and now the {cake} tasted [sweet|wonderful|better than anything]. {joy}
  ¶ {farewell} {closing}

shy_creature:
  {opening}
  ¶ Then, {day} {hero} saw two bright eyes [behind|beside|near] {landmark}. It was a {small_beast}, as shy as could
  be. When {hero} came closer, it [hid|ran off|slipped away].
  ¶ {meets} "You must not run after it," said {friend}. "Sit still and say what I always say: {words}." {echo}
  ¶ So every day {hero} put down {few} {snacks} and sat still. {recall} On the first day, nothing came. On the second
  day, a nose came. And on {weekday}, the {small_beast} [ate from {hero}'s lap|sat on {hero}'s foot|fell asleep in
  {hero}'s lap].
  ¶ {hero} called it {pet}. Soon {pet} followed {hero} all over {place}, and {friend} made {pet} a {hue}
  [hat|collar|bed]. {farewell} {closing}

stars:
  {opening} But {hero} was afraid of the dark.
  ¶ One [clear|cold|warm|still] night {hero} lay awake. The shadows looked like {beasts}, and something
  [creaked|rustled|tapped] {nook}.
  ¶ {hero}'s neighbour {friend}, the {job}, saw a candle in the window and knocked. "Come outside, {hero}," said
  {friend}. They climbed the hill behind {landmark}, and above them the whole sky was full of stars. {speaks} {echo}
  ¶ "Look, those {few} stars make a {beast}," said {friend}. "And those make a {treasure}." {hero} looked up for a
  long time. {recall} A falling star drew a {hue} line over {place}, and {hero} made a wish. {joy}
  ¶ {hero} never closed the curtains again. {farewell} {closing}

bridge:
  {opening}
  ¶ But {day} {hero} had to carry a {hue} {thing} to {new_place}. Halfway there, a {mood} {keeper} sat on a bridge.
  "Nobody may cross who cannot answer my riddle," it said. "{riddle}?" {hero} did not know. "{riddle}?" asked the
  {keeper} again.
  ¶ {hero} had to turn back. {sad} {meets} {hero} told {friend} the riddle: "{riddle}?" {friend} [laughed|thought
  hard|scratched an ear]. "{riddle}? That is easy, {hero}. It is a {answer}!"
  ¶ {hero} and {friend} ran back to the bridge. "A {answer}!" cried {hero}. "A {answer} it is," said the {keeper}, and
  [made way|bowed|stepped aside]. {joy}
  ¶ In {new_place} everybody [marvelled at|was glad of] the {hue} {thing}. {closing}

quarrel:
  {opening} {Hero.their} best friend was {friend}, and the two were always together.
  ¶ But {day} {hero} and {friend} quarrelled over a {hue} {thing}. "It is mine," said {hero}. "No, mine," said
  {friend}. They pulled and pulled, until the {thing} [flew into the river|broke in two|tore in half]. {hero} ran home
  and shut the door.
  ¶ For {few} days {hero} and {friend} did not speak. Then {hero} found a {colour} note under the door. There was only
  one line on it: "{words}." {echo_note}
  ¶ {hero} ran out, and there, halfway between their houses, stood {friend}. "I am sorry, {friend}," said {hero}. "I
  am sorry, {hero}," said {friend}. "{words}," they said at the same time. They made a new {thing}, and it belonged to
  both.
  ¶ {farewell} {closing}
"""

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


GRAMMAR = parse(PLOTS + WORDS)


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
