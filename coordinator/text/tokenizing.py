"""What turns text into tokens and back, and what a prompt is then.

All of it is used by text workers (text/worker.py); the coordinator itself uses the tokenizer to
turn single tokens into text, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from coordinator.config import CoordinatorConfig
from kvcache.prefix import block_salt, hash_blocks
from modeling.checkpoint.config import ModelConfig, SamplingDefaults, load_config
from modeling.facts import CheckpointFacts, describe_checkpoint, with_facts
from modeling.text.chat_template import ChatTemplate
from modeling.text.parsers.formats import OutputFormat, choose_format
from modeling.text.template_sources import load_chat_template
from modeling.text.tokenizer import Tokenizer, load_tokenizer
from protocol.token_ids import TokenIds


class TextIdentity(msgspec.Struct, frozen=True):
    """Digests of what decides which tokens a text, and a conversation, becomes."""

    tokenizer: str
    template: str


@dataclass(frozen=True, slots=True)
class TextTools:
    """Of the model; immutable."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    format: OutputFormat = field(default_factory=OutputFormat)  # of reasoning and calls of tools

    @property
    def identity(self) -> TextIdentity:
        """What it is: the same wherever the same files were read."""
        return TextIdentity(self.tokenizer.digest, self.chat_template.digest)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the pools know it: tokens, and the chained hash of each full block."""

    token_ids: TokenIds
    block_hashes: tuple[bytes, ...]


def load_tools(config: CoordinatorConfig) -> TextTools:
    """The tools of the model that is served.

    Raises:
        ConfigError: the tokenizer or the chat template cannot be read, or a parser is not known.
    """
    tokenizer = load_tokenizer(config.model)
    template = load_chat_template(config.model, tokenizer.special_tokens, file=config.chat_template)
    form = choose_format(
        template.source,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    return TextTools(tokenizer, template, form)


def read_model(config: CoordinatorConfig, tools: TextTools) -> tuple[ModelConfig, CheckpointFacts]:
    """The model as requests are to be served by it, and what was read of its checkpoint.

    Raises:
        ConfigError: the checkpoint cannot be read, or is not what its config.json says.
    """
    model = load_config(config.model, max_model_len=config.max_model_len)
    if config.generation_config == "none":
        model = msgspec.structs.replace(model, sampling=SamplingDefaults())
    facts = describe_checkpoint(config.model, model, tools.tokenizer, tools.chat_template)
    return with_facts(model, facts), facts


def as_prompt(token_ids: Sequence[int], block_size: int, fingerprint: str, salt: str) -> Prompt:
    """``token_ids`` with their hashes. Every process salts in this way: model, colon, tenant."""
    hashes = hash_blocks(token_ids, block_size, block_salt(fingerprint, salt))
    return Prompt(TokenIds.of(token_ids), tuple(hashes))
