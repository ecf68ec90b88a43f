"""Tokenizing off the event loop, in a few threads.

A long text takes seconds to tokenize; in the event loop every stream would stand still meanwhile.
The hashes of a prompt's blocks are made in the same place, for the same reason.
"""

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kvcache.prefix import block_salt, hash_blocks
from modeling.chat_template import ChatTemplate, load_chat_template
from modeling.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextTools:
    """What turns text into tokens and back; immutable, shared by the threads."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the pools know it: tokens, and the chained hash of each full block."""

    token_ids: tuple[int, ...]
    block_hashes: tuple[bytes, ...]


class Tokenization:
    """The threads.

    Args:
        model: a checkpoint folder or a built-in model's name.
        num_threads: prompts that are tokenized at one time.

    Raises:
        ConfigError: the tokenizer or the chat template cannot be read.
    """

    def __init__(self, model: str, num_threads: int) -> None:
        tokenizer = load_tokenizer(model)
        self.tools = TextTools(tokenizer, load_chat_template(model, tokenizer.special_tokens))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")

    def aside(self, num_threads: int) -> "Tokenization":
        """The same tools, in other threads: for work that others are not to wait for."""
        other = copy.copy(self)
        other._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer-aside")
        return other

    async def run(self, work: Callable[[TextTools], T]) -> T:
        """``work`` in one of the threads; what it raises is raised here."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, self.tools)

    def close(self) -> None:
        """End the threads without waiting for a text that is being tokenized."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def as_prompt(token_ids: tuple[int, ...], block_size: int, fingerprint: str, salt: str) -> Prompt:
    """``token_ids`` with their hashes. Every process salts in this way: model, colon, tenant."""
    hashes = hash_blocks(token_ids, block_size, block_salt(fingerprint, salt))
    return Prompt(token_ids, tuple(hashes))
