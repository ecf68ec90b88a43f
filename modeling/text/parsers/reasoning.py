"""Reasoning that stands before an answer, between two markers."""

from dataclasses import dataclass

from modeling.text.parsers.reader import Ended, Malformed, Marks, Reader, Steps


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The texts around reasoning, each in the ways that models write it."""

    opens: tuple[str, ...]
    closes: tuple[str, ...]

    def is_opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside the reasoning, so that the answer goes on with it."""
        return prompt.rstrip().endswith(self.opens)


class ReasoningParser(Reader):
    """Reads reasoning and, after it, content: everything, if the answer begins with something else.

    White space beside the markers belongs to them.

    Args:
        markers: of the model.
        is_opened: the prompt has the opening one already. The answer may repeat it.
    """

    def __init__(self, markers: ReasoningMarkers, *, is_opened: bool) -> None:
        super().__init__()
        self._markers = markers
        self._is_opened = is_opened

    def _run(self) -> Steps[None]:
        self._hold()
        try:
            is_thinking = yield from self._opening()
            if is_thinking:
                self._raw = None
                yield from self._until(
                    Marks(*self._markers.closes, with_blank=True), self._reasoning
                )
                yield from self._skip_space()
            else:
                self._give_back()
            while True:
                self._content(self._rest())
                yield from self._more()
        except Ended:
            return

    def _opening(self) -> Steps[bool]:
        try:
            yield from self._skip_space()
            found = yield from self._literal(*self._markers.opens)
            if found:
                self._raw = None
                yield from self._skip_space()
        except Ended:
            self._rest()
            (self._reasoning if self._is_opened else self._content)(self._held())
            raise
        return bool(found) or self._is_opened

    def _skip_space(self) -> Steps[None]:
        try:
            yield from self._space()
        except Malformed:
            return
