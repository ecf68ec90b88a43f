"""Documents that nobody has written before, with facts among filler, and questions about them.

Everything is drawn from one ``random.Random``: the same seed gives the same document. A fact is
stated once; around it stand sentences that mean nothing and *distractors* that share its words:
other facts about the same place or the same office, and remarks about either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from modeling.embedded.lexicon import (
    ADJECTIVES,
    ADVERBS,
    ALONE,
    DOMAINS,
    NOUNS,
    NUMBERS,
    OFFICES,
    ROLES,
    THINGS,
    VALUE_WORDS,
    VERBS,
    Role,
    made_up_names,
    place_names,
)

T = TypeVar("T")
UNKNOWN = "I do not know."
STATEMENTS = (  # {role} is "harbour master" or "motto"
    "The {role} of {place} is {value}{tail}.",
    "{place}'s {role} is {value}{tail}.",
    "In {place}, the {role} is {value}{tail}.",
    "For all of {place} the {role} is {value}{tail}.",
    "As everyone in {place} can tell, the {role} there is {value}{tail}.",
)
TAILS = ("", "", "", ", and has been for years", ", as one would expect", ", says the {noun}")
FILLERS = (
    "{adverb}, the {adjective} {noun} {verb} the {noun}.",
    "The {noun} {verb} a {adjective} {noun} behind the {noun}.",
    "A {adjective} {noun} and a {adjective} {noun} {verb} each other near the {noun}.",
    "It was a {adjective} day, and the {noun} {verb} nobody.",
    "Nobody {verb} the {noun} before the {adjective} winter.",
    "There is always a {adjective} {noun} beside the {noun}.",
    "Some say that the {noun} is {adjective}, others that it is {adjective}.",
    "When the {noun} {verb} the {noun}, everyone went home {adverb}.",
)
DISTRACTORS = (
    "The {domain} of {place} is {adjective} and {adjective}.",
    "The {noun} in {place} is {adjective}.",
    "The {domain} {office} of {place} {verb} the {adjective} {noun}.",
    "Nobody in {place} {verb} the {domain} {office} of {other}.",
    "People in {place} often speak of the {alone}.",
    "The {office} of the {adjective} {noun} {verb} {place}.",
    "{place} lies to the north of {other}.",
    "In {place} there is a {adjective} {domain}.",
    "Without the {alone} nobody goes from {place} to {other}.",
)
QUESTIONS_WITH_DOMAIN = (
    "Who is the {domain} {office} of {place}?",
    "What is the name of {place}'s {domain} {office}?",
    "In {place}, who is the {office} of the {domain}?",
    "Please tell me who the {domain} {office} of {place} is.",
)
PARAPHRASES = {  # of an office, about some domain
    "master": ("runs the {domain}", "is in charge of the {domain}", "manages the {domain}"),
    "clerk": ("does the accounts of the {domain}", "is the bookkeeper of the {domain}"),
    "inspector": ("inspects the {domain}", "examines the {domain}"),
    "warden": ("guards the {domain}", "protects the {domain}", "watches the {domain}"),
    "engineer": ("repairs the {domain}", "mends the {domain}", "maintains the {domain}"),
    "founder": ("founded the {domain}", "established the {domain}"),
    "deputy": ("is the understudy at the {domain}", "is second at the {domain}"),
    "painter": ("painted the {domain}", "decorates the {domain}"),
}
QUESTIONS_ALONE = (
    "What is the {office} of {place}?",
    "What is {place}'s {office}?",
    "Which {office} does {place} have?",
    "Do you know the {office} of {place}?",
    "I would like to hear the {office} of {place}.",
)
PARAPHRASES_ALONE = {
    "mayor": ("Who governs {place}?",),
    "poet": ("Who speaks verses in {place}?",),
    "champion": ("Who is unbeaten in {place}?",),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a document says, or one that it does not: then ``value`` is None."""

    role: Role
    place: str
    value: str | None

    @property
    def answer(self) -> str:
        return UNKNOWN if self.value is None else f"The answer is {self.value}."

    def question(self, random: Random, *, paraphrase: bool) -> str:
        """In the words of the document, or in others that mean the same."""
        role = self.role
        words = {"place": self.place}
        office_words = OFFICES if role.domain else ALONE
        if not paraphrase:
            plain = QUESTIONS_WITH_DOMAIN if role.domain else QUESTIONS_ALONE
            return plain[0].format(domain=role.domain, office=role.office, **words)
        if role.domain is None:
            own = PARAPHRASES_ALONE.get(role.office)
            if own and random.random() < 0.5:
                return _pick(random, own).format(**words)
            office = _pick(random, office_words[role.office][:2])
            return _pick(random, QUESTIONS_ALONE).format(office=office, **words)
        domain = _pick(random, DOMAINS[role.domain])
        if random.random() < 0.5:
            phrase = _pick(random, PARAPHRASES[role.office]).format(domain=domain)
            form = _pick(random, ("Who {phrase} of {place}?", "In {place}, who {phrase}?"))
            return form.format(phrase=phrase, **words)
        office = _pick(random, office_words[role.office][:2])
        form = _pick(random, QUESTIONS_WITH_DOMAIN)
        return form.format(domain=domain, office=office, **words)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, what it says, and what it does not.

    ``depths`` are where each fact is stated, from 0.0 at the start to 1.0 at the end.
    """

    text: str
    facts: tuple[Fact, ...]
    depths: tuple[float, ...]
    absent: tuple[Fact, ...]  # each shares its place and its role with facts that are stated
    num_tokens: int


def write_document(random: Random, num_tokens: int, count_tokens: Callable[[str], int]) -> Document:
    """A new document.

    Args:
        random: decides everything.
        num_tokens: about how long; it ends with the sentence that reaches this.
        count_tokens: of one sentence.
    """
    sentences: list[str] = []
    placed: list[tuple[Fact, int]] = []
    total = 0
    facts = _facts(random)
    while total < num_tokens:
        kind = random.random()
        if kind < 0.15:
            fact = next(facts)
            placed.append((fact, total))
            sentence = _statement(random, fact)
        else:
            sentence = _fill(random, _pick(random, DISTRACTORS if kind < 0.3 else FILLERS))
        total += count_tokens(f"{sentence} ")
        sentences.append(sentence)
    stated = tuple(fact for fact, _ in placed)
    depths = tuple(position / total for _, position in placed)
    return Document(_paragraphs(sentences), stated, depths, tuple(_absent(random, stated)), total)


def _facts(random: Random) -> Iterator[Fact]:
    """No two have the same keys, or the same value."""
    names = made_up_names(random)
    places = place_names()
    seen = set()
    values: set[str] = set()
    while True:
        role, place = _pick(random, ROLES), _pick(random, places)
        if random.random() < 0.3:
            role = _pick(random, ROLES[-len(ALONE) :])
        if (role, place) in seen:
            continue
        value = next(names)
        if role.office in THINGS:
            value = " ".join(_sample(random, VALUE_WORDS, 3))
        elif role.office in NUMBERS:
            value = "".join(_sample(random, "0123456789", 5))
        if value in values:
            continue
        seen.add((role, place))
        values.add(value)
        yield Fact(role, place, value)


def _absent(random: Random, stated: Sequence[Fact]) -> Iterator[Fact]:
    """As many as are stated: a place and a role that occur, but not together."""
    seen = {(fact.role, fact.place) for fact in stated}
    tries = 0
    while len(stated) > 1 and tries < 4 * len(stated):
        tries += 1
        role, place = _pick(random, stated).role, _pick(random, stated).place
        if (role, place) not in seen:
            seen.add((role, place))
            yield Fact(role, place, None)


def _statement(random: Random, fact: Fact) -> str:
    tail = _pick(random, TAILS).format(noun=_pick(random, NOUNS))
    form = _pick(random, STATEMENTS)
    return form.format(role=fact.role.text, place=fact.place, value=fact.value, tail=tail)


def _fill(random: Random, form: str) -> str:
    """Each slot is drawn anew, also when it stands there twice."""
    choices: dict[str, Sequence[str]] = {
        "{adverb}": ADVERBS,
        "{adjective}": ADJECTIVES,
        "{noun}": NOUNS,
        "{verb}": VERBS,
        "{domain}": tuple(DOMAINS),
        "{office}": tuple(OFFICES),
        "{alone}": tuple(ALONE),
        "{place}": place_names(),
        "{other}": place_names(),
    }
    for slot, words in choices.items():
        while slot in form:
            form = form.replace(slot, _pick(random, words), 1)
    return form[0].upper() + form[1:]


def _paragraphs(sentences: Sequence[str]) -> str:
    size = 12
    paragraphs = [sentences[i : i + size] for i in range(0, len(sentences), size)]
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def _sample(random: Random, choices: Sequence[str], count: int) -> list[str]:
    """``count`` different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_pick(random, choices)] = None
    return list(found)


def _pick(random: Random, choices: Sequence[T]) -> T:
    return choices[int(random.random() * len(choices))]
