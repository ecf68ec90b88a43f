"""Reading a text that comes in pieces as if it were whole.

A format is written as a generator that reads from its beginning to its end; it yields where more
text is needed to decide. What it does depends on the text only, never on where the text was cut, if
each step follows three rules, which those here do: wait while more text could change the decision,
consume what is decided at once, and fail at a place that the text determines.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from io import StringIO
from typing import TypeVar

from modeling.text.parsers.deltas import Content, Delta, Reasoning, merged
from modeling.text.parsers.json_text import JsonText

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], object]

MAX_BLANK_CHARS = 64  # white space before markup that belongs to the markup
MAX_SPACE_CHARS = 1024  # inside markup

_SPACE = re.compile(r"\s*")


class Malformed(Exception):
    """The text is not what the format says."""


class Ended(Exception):
    """The text ended inside what was being read."""


class Marks:
    """Texts to be found in a stream.

    Args:
        texts: what to find, the first in the text wins.
        with_blank: the white space before a text belongs to it.
    """

    def __init__(self, *texts: str, with_blank: bool = False) -> None:
        blank = rf"\s{{0,{MAX_BLANK_CHARS}}}" if with_blank else ""
        starts = {text[:n] for text in texts for n in range(1, len(text))}
        first = "".join({re.escape(text[0]) for text in texts}) + (r"\s" if with_blank else "")
        self.pattern = re.compile(f"{blank}(?:{_one_of(texts)})")
        self._begun = re.compile(rf"(?=[{first}]){blank}(?:{_one_of(starts)})?\Z")
        self._longest = max(map(len, texts)) + MAX_BLANK_CHARS

    def held(self, text: str, start: int) -> int:
        """Where in ``text[start:]``, which contains none, one may have begun."""
        match = self._begun.search(text, max(start, len(text) - self._longest))
        return match.start() if match else len(text)


def _one_of(texts: Iterable[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


class Reader(ABC):
    """A parser of one answer: :meth:`push` its text as it comes, then :meth:`finish`."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what is before it was consumed
        self._is_whole = False
        self._raw: StringIO | None = None  # consumed text that may have to be given back
        self._deltas: list[Delta] = []
        self._steps = self._run()

    def push(self, text: str) -> list[Delta]:
        """What became certain with a further piece of the text; may be nothing."""
        if text:
            self._text = self._text[self._at :] + text
            self._at = 0
            next(self._steps)
        return self._drained()

    def finish(self) -> list[Delta]:
        """What still waited. The text has ended, by itself or at a limit."""
        self._is_whole = True
        next(self._steps, None)
        return self._drained()

    @abstractmethod
    def _run(self) -> Steps[None]:
        """Reads the whole text; returns when it has ended."""

    def _drained(self) -> list[Delta]:
        deltas, self._deltas = merged(self._deltas), []
        return deltas

    def _content(self, text: str) -> None:
        self._deltas.append(Content(text))

    def _reasoning(self, text: str) -> None:
        self._deltas.append(Reasoning(text))

    def _hold(self, text: str = "") -> None:
        """From now on, keep what is consumed, and this before it."""
        self._raw = StringIO()
        self._raw.write(text)

    def _held(self) -> str:
        """What was consumed since it is held, which ends here."""
        held, self._raw = self._raw.getvalue() if self._raw else "", None
        return held

    def _give_back(self) -> None:
        """What was held was no markup."""
        self._content(self._held())

    def _rest(self) -> str:
        """Consumes what is there."""
        return self._take(len(self._text))

    def _take(self, end: int) -> str:
        piece = self._text[self._at : end]
        self._at = end
        if self._raw is not None:
            self._raw.write(piece)
        return piece

    def _more(self) -> Steps[None]:
        if self._is_whole:
            raise Ended
        yield

    def _next(self) -> Steps[str]:
        """The next character, which stays where it is."""
        while self._at == len(self._text):
            yield from self._more()
        return self._text[self._at]

    def _literal(self, *options: str) -> Steps[str]:
        """Consumes the option that stands here; the empty text if none does."""
        longest = max(map(len, options))
        while True:
            here = self._text[self._at : self._at + longest]
            for option in options:
                if here.startswith(option):
                    return self._take(self._at + len(option))
            if not any(option.startswith(here) for option in options):
                return ""
            yield from self._more()

    def _expect(self, *options: str) -> Steps[str]:
        """Consumes the white space and the option that stand here."""
        yield from self._space()
        found = yield from self._literal(*options)
        if not found:
            raise Malformed
        return found

    def _space(self) -> Steps[None]:
        """Consumes white space; ``Malformed`` after more of it than anybody writes."""
        limit = MAX_SPACE_CHARS
        while (yield from self._next()).isspace():
            space = _SPACE.match(self._text, self._at, self._at + limit)
            assert space is not None
            limit -= space.end() - self._at
            self._take(space.end())
            if not limit:
                raise Malformed

    def _span(self, characters: re.Pattern[str], limit: int) -> Steps[str]:
        """Consumes a run of characters; ``Malformed`` after ``limit`` of them, or if there is none.

        Args:
            characters: such as ``[a-z]+``.
        """
        run = ""
        while True:
            match = characters.match(self._text, self._at, self._at + limit - len(run))
            run += self._take(match.end() if match else self._at)
            if len(run) == limit or (self._at < len(self._text) and not run):
                raise Malformed
            if self._at < len(self._text):
                return run
            yield from self._more()

    def _until(self, marks: Marks, sink: Sink, limit: int | None = None) -> Steps[str]:
        """Passes on the text before the next mark, as it comes, and consumes the mark.

        Raises:
            Ended: there is none; the whole text was passed on.
            Malformed: there is none after ``limit`` characters, which were passed on.
        """
        while True:
            found = marks.pattern.search(self._text, self._at)
            if found:
                end = found.start()
            else:
                end = len(self._text) if self._is_whole else marks.held(self._text, self._at)
            is_over = limit is not None and end - self._at > limit
            if limit is not None:
                end = min(end, self._at + limit)
                limit -= end - self._at
            if end > self._at:
                sink(self._take(end))
            if is_over:
                raise Malformed
            if found:
                self._take(found.end())
                return found[0]
            yield from self._more()

    def _json(self, sink: Sink, limit: int | None = None) -> Steps[None]:
        """Passes on the text of one JSON value, as it comes.

        Raises:
            Ended: the value is not whole; what came of it was passed on.
            Malformed: it is no JSON, or longer than ``limit``; what was before was passed on.
        """
        value = JsonText()
        while True:
            end = len(self._text) if limit is None else min(len(self._text), self._at + limit)
            is_over = end < len(self._text)
            start = self._at
            stop, text = value.feed(self._text, start, end)
            self._take(stop)
            sink(text)
            if value.is_done:
                return
            if value.is_broken or is_over:
                raise Malformed
            if limit is not None:
                limit -= stop - start
            if self._is_whole:
                sink(self._rest())
            yield from self._more()
