"""Which token may come next by a sequence's grammar: the part of it that a rank does.

A matcher's state is a function of the grammar and of the output tokens. So it is never sent: the
prefill rank that samples the first token, the decode rank after it, and another pool after a
fail-over each build it from the tokens that they have.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLMatcher

from modeling.checkpoint.config import ModelConfig
from modeling.sampling import SamplingRow
from modeling.text.grammar import LIMITS, Vocabulary
from modeling.text.tokenizer import load_tokenizer


class Matcher:
    """Where one sequence stands in its grammar.

    Args:
        vocabulary: of the model.
        grammar: that has been checked.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        self.grammar = grammar
        self._matcher = LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=LIMITS)
        self._consumed: list[int] = []

    def mask(self, output_token_ids: Sequence[int]) -> bytes | None:
        """Which tokens may follow an answer: bit ``i`` (of byte ``i // 8``, lowest first) is token
        ``i``. None when no mask can be had: the answer is none of the grammar's, or the grammar
        has passed its budget.

        Args:
            output_token_ids: the answer so far; one that continues what this matcher has seen
                costs only what is new.
        """
        matcher = self._matcher
        known = len(self._consumed)
        if self._consumed != list(output_token_ids[:known]):
            if matcher.is_error() or not matcher.reset():
                return None
            known = 0
            self._consumed = []
        new = list(output_token_ids[known:])
        if new and not matcher.consume_tokens(new):
            return None
        self._consumed += new
        found: bytes = matcher.compute_bitmask()
        return None if matcher.is_error() else found


class Matchers:
    """The matchers of the sequences that a rank samples for, at most so many.

    One that has been dropped is built anew from its tokens, about 1 ms for 40 of them.

    Args:
        load: makes the vocabulary; it is called at once, in a thread of its own, and the first
            mask waits for it.
        max_matchers: kept at most.
    """

    def __init__(self, load: Callable[[], Vocabulary], max_matchers: int = 1024) -> None:
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="vocabulary").submit(load)
        self._max = max_matchers
        self._matchers: dict[tuple[str, int], Matcher] = {}  # the one used last at the end

    def mask(
        self, key: tuple[str, int], grammar: str, output_token_ids: Sequence[int]
    ) -> bytes | None:
        """As :meth:`Matcher.mask`, for the sequence ``key``."""
        matcher = self._matchers.pop(key, None)
        if matcher is None or matcher.grammar != grammar:
            matcher = Matcher(self._loading.result(), grammar)
        mask = matcher.mask(output_token_ids)
        if mask is not None:
            self._matchers[key] = matcher
            if len(self._matchers) > self._max:
                del self._matchers[next(iter(self._matchers))]
        return mask

    def constrain(self, key: tuple[str, int], row: SamplingRow) -> SamplingRow:
        """A row with the mask of its grammar; a row without a grammar as it is."""
        if not row.params.grammar:
            return row
        mask = self.mask(key, row.params.grammar, row.output_token_ids)
        return dataclasses.replace(row, allowed=mask)

    def forget(self, key: tuple[str, int]) -> None:
        """A sequence has ended."""
        self._matchers.pop(key, None)

    def __len__(self) -> int:
        return len(self._matchers)


def load_matchers(path_or_name: str, model: ModelConfig) -> Matchers:
    """The matchers of a rank that samples.

    A model that has no end of sequence is never asked for one: the coordinator refuses the grammar.

    Args:
        path_or_name: of the model; its folder has the tokenizer.
        model: its configuration.
    """

    def load() -> Vocabulary:
        tokenizer = load_tokenizer(path_or_name)
        stops = dict.fromkeys((*model.eos_token_ids, *tokenizer.eos_token_ids))
        return Vocabulary(tokenizer, tuple(stops))

    return Matchers(load)
