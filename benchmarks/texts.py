"""Texts of real English with facts hidden in them, and questions about them with exact answers.

The prose comes from the license texts of Debian's base-files and from the Python manual that is part of Python
(`pydoc_data.topics`): the same on every machine with the same versions of both. A text is a random choice of passages
in random order, with facts between their sentences: access codes of places, who holds the key to which place, a list of
prices, the crew of a ship, visitors. All are drawn from one random generator. Two halves of the prose, by file, and of
the words in the facts are kept apart, so that what was chosen on one can be reported on the other.

The models that these texts are for are weak. Most answers are therefore made to begin with words that name what is
asked for ("The access code of the red tower is"), and end where the sentence or the line ends.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.scenes import Question

DEVELOPMENT, HELD_OUT = "development", "held-out"
SPLITS = (DEVELOPMENT, HELD_OUT)
LENGTHS = (1000, 2000, 4000, 7000)
"""Tokens of a text, as SmolLM2 counts them."""

LICENSES = Path("/usr/share/common-licenses")
LICENSE_FILES = {
    # Versions of one license repeat each other, so that families stay together.
    DEVELOPMENT: ("GPL-3", "GPL-2", "GPL-1", "LGPL-2.1", "LGPL-2", "LGPL-3"),
    HELD_OUT: ("GFDL-1.3", "GFDL-1.2", "Apache-2.0", "MPL-2.0", "MPL-1.1", "CC0-1.0", "Artistic"),
}

NUM_CODES = 4
NUM_PRICES = 20
NUM_CREW = 8
MOST_VISITORS = 4
CLOZE_WORDS = (8, 12)
"""Least and most words that a question leaves to complete."""
CLOZE_SENTENCE = (22, 40)
"""Least and most words of the whole sentence."""

# The words of the facts; every second one belongs to the held-out half.
COLOURS = "blue green golden white amber scarlet violet bronze red silver black purple orange crimson ivory copper"
PLACES = "gate garden library mill castle chapel market station tower bridge harbour barn palace temple factory museum"
PEOPLE = (
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jacob Karen Lucas Maria Nathan Olivia Peter "
    "Quentin Rachel Simon Teresa Victor Wendy Xavier Yvonne Albert Bella Conrad Diana Edward Fiona George Helen"
)
GOODS = (
    "apple candle hammer ladder mirror pencil ribbon saddle teapot violin wallet anchor basket carpet drum engine "
    "feather guitar helmet iron jacket kettle lantern magnet needle oven pillow quilt rope shovel ticket umbrella "
    "bottle camera dagger easel funnel goblet hinge inkwell jar knife lemon mask napkin oar paddle quiver rocket scarf "
    "trumpet urn vase whistle yarn zipper blanket curtain doll envelope flute glove hook idol"
)
SHIPS = "Aurora Borealis Corsair Dolphin Endeavour Falcon Gallant Horizon"
FACT_WORDS = frozenset(" ".join((COLOURS, PLACES, PEOPLE, GOODS, SHIPS)).split())

KINDS = ("needle", "pair", "hop", "price", "crew", "cloze", "tally", "summary", "sequel")
FREE_KINDS = {
    "summary": "Summarize the text in three sentences.",
    "sequel": "Continue the text from where it ends, in the same style.",
}
"""Questions without a right answer: what is said is compared with what stock says."""
NUMBER_KINDS = ("needle", "pair", "hop", "price", "tally")
"""Questions whose answer is a number, of "pair" two."""


@dataclass(frozen=True)
class Facts:
    """What a text hides, and how it is said.

    Attributes
    ----------
    codes : place and its access code, four.
    holders : person and the place that their key opens, one for each place.
    prices : article and price, in the order of the list.
    crew : names in the order of the text.
    ship : whose crew it is.
    visitors : names of those that the text mentions as such.
    """

    codes: tuple[tuple[str, str], ...]
    holders: tuple[tuple[str, str], ...]
    prices: tuple[tuple[str, str], ...]
    crew: tuple[str, ...]
    ship: str
    visitors: tuple[str, ...]

    def said(self) -> tuple[list[str], list[str]]:
        """Sentences to be put between those of the prose, and blocks to stand as paragraphs of their own."""
        sentences = [f"The access code of the {place} is {code}." for place, code in self.codes]
        sentences += [f"{person} holds the key to the {place}." for person, place in self.holders]
        sentences += [f"Today's visitor is {person}." for person in self.visitors]
        prices = "\n".join(f"{article}: {price}" for article, price in self.prices)
        return sentences, [f"Price list:\n{prices}", f"The crew of the ship {self.ship}: {', '.join(self.crew)}."]


@dataclass(frozen=True)
class Text(Facts):
    """A text and what is hidden in it; `codes` are in the order of the text.

    Attributes
    ----------
    body : the whole text, with empty lines between paragraphs.
    sentences : sentences of the prose that are long enough to leave a part of them to complete.
    """

    body: str
    sentences: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Questions that can be asked: of prose without a sentence to complete, all others."""
        return KINDS if self.sentences else tuple(kind for kind in KINDS if kind != "cloze")


def _license_texts() -> Iterator[tuple[str, str, str]]:
    """Yield half, name and text of the license files that are there."""
    for split, names in LICENSE_FILES.items():
        for name in names:
            path = LICENSES / name
            if path.exists():
                yield split, name, path.read_text(encoding="utf-8", errors="replace")


def _manual_texts() -> Iterator[tuple[str, str, str]]:
    """Yield half, name and text of the topics of Python's manual, the longest first."""
    from pydoc_data.topics import topics

    for number, name in enumerate(sorted(topics, key=lambda name: (-len(topics[name]), name))):
        # The first half takes topics 0, 3, 4, 7, ... of the longest first, so that both are of about the same size.
        yield SPLITS[number % 4 in (1, 2)], name, topics[name]


def _source_texts() -> Iterator[tuple[str, str, str]]:
    found = list(_license_texts())
    for split in SPLITS:
        if not any(half == split for half, _, _ in found):
            raise ValueError(
                f"texts: none of {', '.join(LICENSE_FILES[split])} is in {LICENSES}; they come with Debian's and "
                "Ubuntu's package base-files"
            )
    try:
        found += _manual_texts()
    except ImportError:
        raise ValueError("texts: this Python has no module pydoc_data.topics, the text of its manual") from None
    yield from found


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield number of the paragraph and sentence of everything that reads like prose."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        if re.search(r"::=|>>>|\||^\s*[-=*#]{4,}\s*$", paragraph, re.MULTILINE):
            continue
        whole_words = re.sub(r"(?<=\w-)\n\s*(?=\w)", "", paragraph)
        plain = re.sub(r"\s+", " ", re.sub(r"[*`]+", "", whole_words)).strip()
        for sentence in re.split(r"(?<=[.;:])\s+(?=[A-Z])", plain):
            letters = sum(character.isalpha() or character in " ,." for character in sentence)
            whole = re.fullmatch(r"[A-Z][^\n]*[.;:]", sentence)
            if whole and 40 <= len(sentence) <= 400 and letters >= 0.92 * len(sentence):
                yield number, sentence


@functools.cache
def passages(split: str) -> tuple[tuple[str, ...], ...]:
    """Return the passages of one half of the sources: runs of sentences of one paragraph, none of them twice.

    Raises
    ------
    ValueError
        A source is not there; the message says which.
    """
    runs: dict[tuple[str, str, int], list[str]] = {}
    seen: set[str] = set()
    # Both halves are read: a sentence that is in both belongs to the first that has it.
    for half, name, text in _source_texts():
        for paragraph, sentence in _sentences(text):
            folded = re.sub(r"\W+", " ", sentence).lower().strip()
            if folded not in seen:
                seen.add(folded)
                runs.setdefault((half, name, paragraph), []).append(sentence)
    return tuple(tuple(run) for (half, _, _), run in runs.items() if half == split)


def sources_digest() -> str:
    """Return a digest of all passages: answers about texts of other sources must not be compared."""
    return hashlib.sha256(repr([passages(split) for split in SPLITS]).encode()).hexdigest()[:12]


def count_tokens(text: str) -> int:
    """Estimate the tokens of a text as SmolLM2 counts them: measured within 5 % on these texts."""
    words = re.findall(r"[^\W\d_]+", text)
    # A long word is two tokens or three, and so are many words that begin a line. A digit is one token, and so is the
    # space before a number.
    pieces = sum(1.04 + 0.035 * max(0, len(word) - 4) for word in words)
    pieces += 0.8 * len(re.findall(r"\n[^\W\d_]", text))
    return round(pieces + len(re.findall(r"\d| (?=\d)|[^\w\s]+|_|\n+", text)))


def _words(split: str, words: str) -> list[str]:
    """Return one half's share of some words."""
    return words.split()[SPLITS.index(split) :: len(SPLITS)]


def _pick(rng: np.random.Generator, words: list[str], count: int) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))[:count]]


def _number(rng: np.random.Generator, count: int, digits: int) -> list[str]:
    """Draw different numbers."""
    low = 10 ** (digits - 1)
    return [str(low + i) for i in rng.permutation(9 * low)[:count]]


def _draw_facts(rng: np.random.Generator, split: str) -> Facts:
    colours, places = (_pick(rng, _words(split, words), NUM_CODES) for words in (COLOURS, PLACES))
    places = [f"{colour} {place}" for colour, place in zip(colours, places, strict=True)]
    people = _pick(rng, _words(split, PEOPLE), NUM_CODES + NUM_CREW + int(rng.integers(1, MOST_VISITORS + 1)))
    order = rng.permutation(NUM_CODES)
    return Facts(
        codes=tuple(zip(places, _number(rng, NUM_CODES, 4), strict=True)),
        holders=tuple((person, places[i]) for person, i in zip(people[:NUM_CODES], order, strict=True)),
        prices=tuple(zip(_pick(rng, _words(split, GOODS), NUM_PRICES), _number(rng, NUM_PRICES, 3), strict=True)),
        crew=tuple(people[NUM_CODES : NUM_CODES + NUM_CREW]),
        ship=_pick(rng, _words(split, SHIPS), 1)[0],
        visitors=tuple(people[NUM_CODES + NUM_CREW :]),
    )


def _choose_prose(rng: np.random.Generator, split: str, length: int) -> list[list[str]]:
    """Choose passages of about `length` tokens; the last one is cut to fit."""
    known = passages(split)
    chosen: list[list[str]] = []
    left = length
    for i in rng.permutation(len(known)):
        passage: list[str] = []
        for sentence in known[i]:
            size = count_tokens(sentence)
            if size <= left:
                passage.append(sentence)
                left -= size
        if passage:
            chosen.append(passage)
        if left < 8:
            break
    return chosen


def _insert(rng: np.random.Generator, prose: list[list[str]], sentences: list[str]) -> None:
    """Put each sentence somewhere into the prose, in place."""
    for sentence in sentences:
        passage = prose[int(rng.integers(1, max(2, len(prose) - 1)))]
        passage.insert(int(rng.integers(0, len(passage) + 1)), sentence)


def draw_text(rng: np.random.Generator, length: int, *, split: str = DEVELOPMENT) -> Text:
    """Draw a random text.

    Parameters
    ----------
    rng : source of every choice; the same state draws the same text.
    length : tokens, facts included, as SmolLM2 counts them; met within a few per cent.
    split : half of the prose and of the words, one of SPLITS.

    Raises
    ------
    ValueError
        A source of the prose is not there.
    """
    facts = _draw_facts(rng, split)
    hidden, blocks = facts.said()
    room = length - count_tokens("\n\n".join([*hidden, *blocks]))
    assert room > 0, f"the facts alone have more than {length} tokens"
    prose = _choose_prose(rng, split, room)
    sentences = tuple(sentence for passage in prose for sentence in passage if _is_cloze(sentence))
    _insert(rng, prose, hidden)
    paragraphs = [" ".join(passage) for passage in prose]
    for block in blocks:
        paragraphs.insert(int(rng.integers(1, len(paragraphs))), block)
    body = "\n\n".join(paragraphs)
    codes = tuple(sorted(facts.codes, key=lambda fact: body.index(f"of the {fact[0]} is")))
    return Text(**vars(facts) | {"codes": codes}, body=body, sentences=sentences)


def _is_cloze(sentence: str) -> bool:
    least, most = CLOZE_SENTENCE
    # Sentences with quotation marks or parentheses are left out, as an answer could leave these out or change them.
    return least <= len(sentence.split()) <= most and re.fullmatch(r"[A-Za-z ,.'-]+[.]", sentence) is not None


def _ask_needle(rng: np.random.Generator, text: Text) -> tuple[str, str, str, int]:
    place, code = text.codes[rng.integers(len(text.codes))]
    return f"What is the access code of the {place}?", f"The access code of the {place} is", code, 12


def _ask_pair(rng: np.random.Generator, text: Text) -> tuple[str, str, str, int]:
    (first, code), (second, other) = (text.codes[i] for i in rng.permutation(len(text.codes))[:2])
    places = f"the {first} and of the {second}"
    return f"What are the access codes of {places}?", f"The access codes of {places} are", f"{code} and {other}", 20


def _ask_hop(rng: np.random.Generator, text: Text) -> tuple[str, str, str, int]:
    person, place = text.holders[rng.integers(len(text.holders))]
    asked = f"{person} holds the key to one place. What is the access code of that place?"
    return asked, f"The access code of the place that {person} holds the key to is", dict(text.codes)[place], 12


def _ask_price(rng: np.random.Generator, text: Text) -> tuple[str, str, str, int]:
    i = int(rng.integers(1, len(text.prices)))
    (before, its_price), (article, price) = text.prices[i - 1 : i + 1]
    asked = f"Copy the lines of the price list that begin with {before} and {article}."
    # The line before it shows what a line is. Without it, the models that these texts are for find one price in three.
    return asked, f"{before}: {its_price}\n{article}:", price, 8


def _ask_crew(rng: np.random.Generator, text: Text) -> tuple[str, str, str, int]:
    first, *others = text.crew
    asked = f"Copy the list of the crew of the ship {text.ship}."
    return asked, f"The crew of the ship {text.ship}: {first},", ", ".join(others), 40


def _ask_cloze(rng: np.random.Generator, text: Text) -> tuple[str, str, str, int]:
    words = text.sentences[rng.integers(len(text.sentences))].removesuffix(".").split()
    left = int(rng.integers(CLOZE_WORDS[0], CLOZE_WORDS[1] + 1))
    begun, rest = " ".join(words[:-left]), " ".join(words[-left:])
    return f'Copy the sentence of the text that begins with "{" ".join(words[:6])}".', begun, rest, 40


def _ask_tally(rng: np.random.Generator, text: Text) -> tuple[str, str, str, int]:
    asked = 'How many sentences of the text begin with "Today\'s visitor is"?'
    return asked, "The number of visitors is", str(len(text.visitors)), 8


_ASK: dict[str, Callable[[np.random.Generator, Text], tuple[str, str, str, int]]] = {
    "needle": _ask_needle,
    "pair": _ask_pair,
    "hop": _ask_hop,
    "price": _ask_price,
    "crew": _ask_crew,
    "cloze": _ask_cloze,
    "tally": _ask_tally,
}
"""For each kind, a function that makes the question, the beginning of the answer, the rest, and its most tokens."""


def ask_text(rng: np.random.Generator, text: Text, kind: str) -> Question:
    """Make a question about a text.

    Parameters
    ----------
    kind : one of `text.kinds`: "needle" (one access code of four), "pair" (two of them, in order), "hop" (the access
        code of the place whose key somebody holds), "price" (one line of a list of 20, after the line before it),
        "crew" (copy a list of eight names), "cloze" (the rest of a sentence of the prose, 8 to 12 words), "tally" (how
        often a sentence stands in the text, 1 to 4), "summary" and "sequel" (free text: the answer is empty, there is
        no right one).
    """
    if kind in FREE_KINDS:
        return Question(kind, FREE_KINDS[kind], "")
    asked, begun, answer, max_tokens = _ASK[kind](rng, text)
    return Question(kind, asked, answer, begun, max_tokens)


def every_fact(split: str) -> Iterator[str]:
    """Yield sentences and blocks of facts, in which every word of one half stands wherever a text can have it."""
    places = [f"{colour} {place}" for colour, place in zip(_words(split, COLOURS), _words(split, PLACES), strict=True)]
    people, digits = tuple(_words(split, PEOPLE)), "1234567890"
    for ship in _words(split, SHIPS):
        facts = Facts(
            codes=tuple((place, digits) for place in places),
            holders=tuple((person, place) for person in people for place in places),
            prices=tuple((article, digits) for article in _words(split, GOODS)),
            crew=people,
            ship=ship,
            visitors=people,
        )
        for part in facts.said():
            yield from part


def normalise(kind: str, said: str) -> str:
    """Return what is compared of an answer: its first sentence, which the question began.

    Of an answer that is a number, or two, the different numbers in their order: the number is the whole answer or the
    only one in it. Of words, everything but white space and quotation marks at the ends.
    """
    words = re.sub(r"[ \t]+", " ", re.split(r"\n|\.(?=\s|[\"”]|$)", said.strip())[0])
    if kind in NUMBER_KINDS:
        return ", ".join(dict.fromkeys(re.findall(r"\d+", words)))
    return words.strip(" ,\"“”'")


def is_right(question: Question, said: str) -> bool | None:
    """Whether what follows the beginning of an answer is right; None where there is no right answer."""
    if not question.answer:
        return None
    return normalise(question.kind, said) == normalise(question.kind, question.answer)
