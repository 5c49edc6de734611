"""Stories in five genres, from sentence frames and a lexicon; seeded and deterministic.

A story draws its own few words from the lexicon of its genre (three small objects, one prize, one
opponent ...), so that things come back, and takes each frame at most once. Genres share most frames.

A genre's two leading characters are the same in all of its stories: a model as small as the one trained
on them does not learn to carry a name that it has not seen before from paragraph to paragraph.

A story may **turn**: from some paragraph on it goes on in another genre. Turning stories teach the
demonstration model that the genre of a text is not settled by its first paragraph, which leaves a soft
prompt something to settle.
"""

import random
import re
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

from .frames import OWN, SHARED, TALK
from .lexicon import GENRES, LEXICON

OWN_SHARE = 0.25  # of the sentences, from the genre's own frames
TURNING_SHARE = 0.35  # of the stories in the unlabelled mix
LONG_SHARE = 0.12  # of the stories, with more than the usual number of scenes
SEPARATOR = "\n\n"  # between paragraphs

# How many phrases of a slot one story knows; the others: two.
_DRAWN = {
    "thing": 3, "sound": 4, "sight": 3, "smell": 3, "weather": 4, "time": 3, "saying": 3, "news": 3,
    "prize": 1, "foe": 1, "group": 1, "plan": 1, "ride": 1, "trade": 1, "address": 1, "goal": 1,
}  # fmt: skip

_SCENES = ("talk", "travel", "danger", "find", "rest")
_FILLERS = ("setting", "act", "act", "think")
_PRONOUNS = {
    "male": {"he": "he", "him": "him", "his": "his", "self": "himself"},
    "female": {"he": "she", "him": "her", "his": "her", "self": "herself"},
}
_SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\(([^()]*)\)")
_A = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|one|One)")
# After a question or an exclamation in quotes stands the tag: "Who is there?" asked Malone.
_SENTENCE_START = re.compile(r"((?:^|[.!?] |\.\" )\"?)([a-z])")
_SUBJECT_POSITION = re.compile(r"(^|, |[Tt]hen |For a (moment|while) |At last |After a while )$")


class Character(NamedTuple):
    """A leading character: how the first mention calls them, how later ones do, and the gender."""

    full: str
    short: str
    gender: str


class Story(NamedTuple):
    """A story: its paragraphs, and the genre of each of them."""

    paragraphs: List[str]
    genres: List[str]

    @property
    def text(self) -> str:
        """The paragraphs, joined."""
        return SEPARATOR.join(self.paragraphs)

    def part(self, genre: str) -> str:
        """The paragraphs of one genre, joined."""
        return SEPARATOR.join(p for p, g in zip(self.paragraphs, self.genres) if g == genre)


def story(genre: str, rng: random.Random, turns_to: Optional[str] = None) -> Story:
    """A story of ``genre``; with ``turns_to`` it goes on in that genre after one to three paragraphs."""
    return _Teller(genre, rng).tell(turns_to)


def stories(genre: str, count: int, seed: int) -> List[Story]:
    """``count`` stories of one genre, the same ones for the same seed."""
    rng = random.Random(f"{genre}:{seed}")
    return [story(genre, rng) for _ in range(count)]


def mix(count: int, seed: int) -> List[Story]:
    """``count`` stories of all genres in random order, some of them turning, for the base model."""
    rng = random.Random(f"mix:{seed}")
    result = []
    for _ in range(count):
        genre, other = rng.sample(GENRES, 2)
        result.append(story(genre, rng, other if rng.random() < TURNING_SHARE else None))
    return result


class _Teller:
    """The state of one story while it is told."""

    def __init__(self, genre: str, rng: random.Random) -> None:
        self.rng = rng
        self.used: Set[str] = set()  # frames
        self.named: Set[Character] = set()  # whose full name has been told
        self.subject: Optional[Character] = None  # of the sentence before
        self.filled: Dict[str, str] = {}  # slots of the sentence so far
        self._enter(genre)
        self.focus = self.cast[0]  # whom the paragraph is about

    def _enter(self, genre: str) -> None:
        """Take genre, vocabulary and leading characters from ``genre`` from here on."""
        self.genre = genre
        self.words: Dict[str, List[str]] = {}
        for slot, phrases in LEXICON[genre].items():
            drawn = min(_DRAWN.get(slot, 2), len(phrases))
            self.words[slot] = self.rng.sample(phrases, drawn)
        self.cast = self._cast()

    def _cast(self) -> Tuple[Character, Character]:
        cast = []
        for gender, forms in (("male", "men"), ("female", "women")):
            full, short = self.rng.choice(LEXICON[self.genre][forms]).split(" > ")
            cast.append(Character(full, short, gender))
        self.rng.shuffle(cast)
        return cast[0], cast[1]

    # Paragraphs

    def tell(self, turns_to: Optional[str]) -> Story:
        plan = self._plan()
        turn = self.rng.randint(1, 3) if turns_to else 0
        paragraphs: List[str] = []
        genres: List[str] = []
        for number, functions in enumerate(plan):
            if turns_to is not None and number == turn:
                self._enter(turns_to)
            told = self._talk() if functions == ["talk"] else [self._paragraph(functions)]
            paragraphs += told
            genres += [self.genre] * len(told)
        return Story(paragraphs, genres)

    def _plan(self) -> List[List[str]]:
        """What each paragraph consists of: sentence functions, or ``["talk"]``."""
        rng = self.rng
        plan = [["open", *self._fillers(2, 4)]]
        scenes = rng.randint(5, 9) if rng.random() < LONG_SHARE else rng.randint(2, 4)
        kind = ""
        for _ in range(scenes):
            kind = rng.choice([scene for scene in _SCENES if scene != kind])
            if kind == "talk":
                plan.append(["talk"])
            else:
                functions = [kind] * rng.randint(1, 3) + self._fillers(1, 2)
                if rng.random() < 0.3:
                    rng.shuffle(functions)
                plan.append(functions)
        plan.append(self._fillers(0, 2) + ["end"] * rng.randint(1, 2))
        return plan

    def _fillers(self, low: int, high: int) -> List[str]:
        return [self.rng.choice(_FILLERS) for _ in range(self.rng.randint(low, high))]

    def _paragraph(self, functions: List[str]) -> str:
        self.subject = None
        self.focus = self.cast[self.rng.random() < 0.3]
        return " ".join(self._sentence(self._frame(function)) for function in functions)

    def _talk(self) -> List[str]:
        """An exchange of two to six turns, each a paragraph of its own."""
        rng = self.rng
        topics = rng.sample(sorted(TALK), 3)
        speaker = rng.randrange(2)
        turns: List[str] = []
        for topic in topics[: rng.randint(1, 3)]:
            for lines in TALK[topic]:
                self.subject = None
                self.focus = self.cast[speaker]
                turn = self._sentence(self._unused(lines))
                if rng.random() < 0.35 or not turns:
                    turn += " " + self._sentence(self._frame("act"))
                turns.append(turn)
                speaker = 1 - speaker
        return turns

    # Sentences

    def _frame(self, function: str) -> str:
        own = OWN[self.genre][function]
        if self.rng.random() < OWN_SHARE and not self.used.issuperset(own):
            return self._unused(own)
        return self._unused(SHARED[function])

    def _unused(self, frames: List[str]) -> str:
        fresh = [frame for frame in frames if frame not in self.used]
        frame = self.rng.choice(fresh or frames)
        self.used.add(frame)
        return frame

    def _sentence(self, frame: str) -> str:
        if self.subject is None or self.rng.random() > 0.75:
            who = self.focus
        else:
            who = self.subject
        other = self.cast[0] if who is self.cast[1] else self.cast[1]
        while _CHOICE.search(frame):
            frame = _CHOICE.sub(lambda match: self.rng.choice(match.group(1).split("|")), frame)
        self.filled = {}
        text = _SLOT.sub(lambda match: self._fill(match, who, other), frame)
        self.subject = who if "{who}" in frame or "{says}" in frame or "{asks}" in frame else None
        text = _A.sub(r"\1n ", text.replace("s's ", "s' ").replace("  ", " "))
        text = text.replace(" .", ".").replace(" ,", ",")
        return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)

    def _fill(self, match: "re.Match[str]", who: Character, other: Character) -> str:
        slot = match.group(1)
        if slot in _PRONOUNS[who.gender]:
            return _PRONOUNS[who.gender][slot]
        if slot.startswith("o") and slot[1:] in _PRONOUNS[other.gender]:
            return _PRONOUNS[other.gender][slot[1:]]
        if slot == "who":
            before = match.string[: match.start()]
            if self.subject is who and _SUBJECT_POSITION.search(before) and self.rng.random() < 0.8:
                return _PRONOUNS[who.gender]["he"]
            return self._name(who)
        if slot == "whose":
            return self._name(who) + "'s"
        if slot == "other":
            return self._name(other)
        if slot in ("says", "asks"):
            verb = "asked" if slot == "asks" else "said"
            if who in self.named and self.rng.random() < 0.3:
                pronoun = _PRONOUNS[who.gender]["he"]
                return f"{pronoun} {verb}"
            return f"{verb} {self._name(who)}"
        return self._phrase(slot)

    def _name(self, character: Character) -> str:
        if character in self.named:
            return character.short
        self.named.add(character)
        return character.full

    def _phrase(self, slot: str) -> str:
        """A phrase for the slot, the same throughout a frame; the longest unused is the likeliest."""
        if slot in self.filled:
            return self.filled[slot]
        words = self.words[slot]
        phrase = words.pop(0 if self.rng.random() < 0.6 else self.rng.randrange(len(words)))
        words.append(phrase)
        self.filled[slot] = phrase
        return phrase
