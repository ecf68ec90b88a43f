"""What a text worker knows while it does one task, and the last step of making a request.

A reader (completion_body.py, chat_body.py) checks the fields of a body and says how each prompt is
encoded; ``prepare`` does it, checks the tokens, and hashes their blocks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from coordinator.auth import Tenant
from coordinator.config import CoordinatorConfig, Limits
from coordinator.errors import invalid_value, unsupported
from coordinator.jobs.questions.prompts import Attached, Contents, Opened
from coordinator.text.tasks import PackedPrompt, Prepared, Stage
from coordinator.text.tokenizing import TextTools, as_prompt
from coordinator.validation.parameters import (
    Options,
    check_model,
    check_token_ids,
    context_exceeded,
    for_prompt,
    read_options,
)
from coordinator.validation.schemas import GenerationBody, UnknownFields, validate
from modeling.checkpoint.config import ModelConfig
from modeling.text.grammar import Spell, after_reasoning, check, spell_with

MAX_BYTES_PER_TOKEN = 8  # a text longer than this for each token of the context is not tokenized

Encoder = Callable[[], Sequence[int]]
Named = tuple[Opened, Contents]  # the document that a request names
B = TypeVar("B", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class Reading:
    """One task. ``enter`` tells the worker's owner what it is at, and begins a stage's time."""

    config: CoordinatorConfig
    model: ModelConfig
    tools: TextTools
    max_model_len: int
    enter: Callable[[Stage, int], None]
    unknown_fields: UnknownFields

    @property
    def limits(self) -> Limits:
        return self.config.limits

    def begin(self, kind: type[B], fields: dict[str, Any]) -> B:
        """The body that ``fields`` are, each of them checked by itself.

        Raises:
            RequestError: naming the field at fault.
        """
        body = validate(kind, fields)
        self.unknown_fields.note(kind, fields)
        check_model(self.config, body.model)
        return body

    def options(
        self, body: GenerationBody, num_logprobs: int | None, default_max_tokens: int | None = None
    ) -> Options:
        """See :func:`read_options`."""
        return read_options(
            body,
            default_max_tokens=default_max_tokens,
            num_logprobs=num_logprobs,
            model=self.model,
            limits=self.limits,
        )

    @property
    def spell(self) -> Spell:
        """How the tokenizer has the texts that a grammar names."""
        return spell_with(self.tools.tokenizer)

    def with_grammar(self, options: Options, grammar: str, param: str) -> Options:
        """The options of an answer that is a text of ``grammar``.

        Raises:
            RequestError: it cannot be followed, or the model cannot end an answer.
        """
        if not self.model.eos_token_ids:
            message = f"{param} cannot be had from this model: it has no end-of-sequence token"
            raise unsupported(param, message)
        self.enter(Stage.RENDERING, len(grammar))
        check(grammar, param, num_tokens=self.tools.tokenizer.vocab_size)
        sampling = msgspec.structs.replace(options.sampling, grammar=grammar)
        return dataclasses.replace(options, sampling=sampling)

    def after_reasoning(self, grammar: str, prompt: str, param: str) -> str:
        """A grammar of which the model's reasoning is no part, in front of the answer."""
        form = self.tools.format
        markers = form.reasoning_markers
        if markers is None:
            return grammar
        if form.is_harmony and param != "tools":
            raise unsupported(
                param,
                f"{param} is not supported for this model's format (harmony): offer a tool with "
                f"this schema and force it by tool_choice",
            )
        is_opened = markers.is_opened_by(prompt)
        return after_reasoning(
            grammar, markers.opens, markers.closes, self.spell, is_opened=is_opened
        )

    def check_text(self, text: str, param: str) -> None:
        """Refuse by its length a text that cannot fit, before it costs seconds to tokenize."""
        size_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
        if size_bytes > MAX_BYTES_PER_TOKEN * self.max_model_len:
            at_least = size_bytes // MAX_BYTES_PER_TOKEN
            raise context_exceeded(at_least, self.max_model_len, param)

    def prepare(
        self,
        options: Options,
        tenant: Tenant,
        encoders: Sequence[Encoder],
        param: str,
        attached: Attached | None = None,
    ) -> Prepared:
        """The request, with every prompt of it.

        Args:
            param: the field that has the prompts.
            attached: the document that they begin with.

        Raises:
            RequestError: a prompt is empty, too long, or not of the model's tokens.
        """
        most = self.limits.max_sequences
        if len(encoders) * options.num_choices > most:
            raise invalid_value(
                "n",
                f"{len(encoders)} prompts with n {options.num_choices} each: at most {most} "
                f"sequences are served in one request",
            )
        salt = tenant.cache_salt(options.cache_salt)
        if attached is not None:
            salt, attached = attached.salted(salt, is_own=options.cache_salt is not None)
        prompts, samplings, num_tokens = [], [], 0
        for encode in encoders:
            token_ids = self._checked(encode(), param)
            num_tokens += len(token_ids)
            if num_tokens > max(self.limits.max_prompt_tokens, self.max_model_len):
                most = self.limits.max_prompt_tokens
                message = f"the prompts have more than {most} tokens together"
                raise invalid_value(param, message, "too_large")
            samplings.append(for_prompt(options, len(token_ids), self.max_model_len))
            prompts.append(self.packed(token_ids, salt, is_shown=options.return_token_ids))
        return Prepared(options, prompts, samplings, salt, attached=attached)

    def packed(
        self, token_ids: Sequence[int], salt: str, *, is_shown: bool = False
    ) -> PackedPrompt:
        """Tokens with the hashes of their blocks, as they travel."""
        prompt = as_prompt(token_ids, self.config.block_size, self.model.fingerprint, salt)
        hashes = b"".join(prompt.block_hashes)
        shown = msgspec.json.encode(token_ids) if is_shown else b"null"
        packed = memoryview(prompt.token_ids.packed)
        return PackedPrompt(packed, memoryview(hashes), memoryview(shown))

    def _checked(self, token_ids: Sequence[int], param: str) -> Sequence[int]:
        if not token_ids:
            raise invalid_value(param, "the prompt is empty", "empty_prompt")
        if len(token_ids) >= self.max_model_len:
            raise context_exceeded(len(token_ids), self.max_model_len, param)
        return check_token_ids(param, token_ids, self.model.vocab_size)
