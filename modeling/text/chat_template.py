"""Chat messages to the text, and the token ids, that a model was trained to see.

The template is code of the checkpoint: it runs in jinja2's immutable sandbox with a bound on its
output and its time, and what it raises is the request's failure, never ours. A caller's message is
data: it is never rendered as a template, and text in it that spells a control token
(``<|im_end|>``) is encoded as text. A model without a template is asked nothing in a chat: what its
prompt should look like is not for us to invent.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from modeling.text.roles import as_known, check_shown
from modeling.text.tokenizer import Tokenizer
from protocol.errors import ConfigError, RequestError

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 32 << 20
MAX_RENDER_S = 2.0
MAX_PRODUCT = 1 << 20
WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")
PROBE = "probe"
GUARDS = range(0x10FF00, 0x10FFFE)  # private use: no tokenizer has merges for them
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
)


class _GenerationTag(Extension):
    """``{% generation %}``, by which training code finds the assistant's turns: no effect here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` without underscored names, which could pass for Python's own."""

    def __init__(*args: Any, **attributes: Any) -> None:  # noqa: ANN401 - a template stores anything
        own, *rest = args
        checked = dict(*rest, **attributes)
        if any(str(name).startswith("_") for name in checked):
            raise jinja2.exceptions.SecurityError("a namespace takes no underscored names")
        jinja2.utils.Namespace.__init__(own, checked)

    def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace takes no underscored names")
        super().__setitem__(name, value)


class _TickingRange(Sequence[int]):
    """A range that ends a render which takes too long: loops need not write anything."""

    def __init__(self, steps: range, deadline: float) -> None:
        self._steps = steps
        self._deadline = deadline

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - an index or a slice
        return self._steps[index]

    def __iter__(self) -> Iterator[int]:
        for step in self._steps:
            _check_time(self._deadline)
            yield step


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products bounded: ``'a' * 10**10`` would be one step."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(  # a template computes with anything
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Any,  # noqa: ANN401
        right: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and not (numbers and abs(left) < 2**32 and abs(right) < 64):
            raise jinja2.exceptions.SecurityError("power out of bounds")
        if operator == "*" and not numbers:
            count = next((side for side in (left, right) if isinstance(side, int)), 0)
            size = max(len(side) for side in (left, right) if hasattr(side, "__len__"))
            if count * size > MAX_PRODUCT:
                raise jinja2.exceptions.SecurityError("product out of bounds")
        if operator == "%" and isinstance(left, str) and WIDE_FORMAT.search(left):
            raise jinja2.exceptions.SecurityError("format width out of bounds")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template; may be shared by threads.

    ``variables`` are the names that a caller's choice may give a value (``enable_thinking``).

    Args:
        source: jinja2 text.
        where: what to name in an error.
        special_tokens: ``bos_token`` and so on, which templates refer to.

    Raises:
        ConfigError: it does not compile.
    """

    def __init__(self, source: str, where: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ConfigError(
                f"{where}: chat template is longer than {MAX_SOURCE_CHARS} characters"
            )
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["namespace"] = _Namespace
        environment.globals["dict"] = lambda *args, **items: dict(*args, **items)  # no attributes
        try:
            self._template = environment.from_string(source)
            parsed = environment.parse(source)
            constants = list(parsed.find_all(nodes.Const))  # before anything folds them
            self.variables = frozenset(meta.find_undeclared_variables(parsed))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{where}: chat template does not compile: line {error.lineno}: {error.message}"
            ) from error
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"{where}: chat template does not compile ({error})") from error
        self.where = where
        self.source = source
        named = json.dumps([source, sorted(special_tokens.items())])
        self.digest = hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
        # As a word by itself: in a sentence it is no role that the template looks for.
        self.names_developer = any(node.value == "developer" for node in constants)
        self._takes_parts: bool | None = None  # unknown until the first conversation
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt's text.

        Args:
            messages: ``{"role": ..., "content": ...}`` and what else a template may look at.
            add_generation_prompt: end where the assistant's answer begins.
            tools: function descriptions, for templates that take them.
            variables: further names that the server allows, such as ``enable_thinking``.
            now: the local time that ``strftime_now`` tells; None takes the clock's.

        Raises:
            RequestError: ``template_error``: the template refused the messages or overran a bound.
        """
        if self._takes_parts is None:
            # Found out here and not in __init__: a template's code runs in text workers only.
            shown = [self._shows_probe(content) for content in (PROBE, _parts(PROBE))]
            self._takes_parts = shown == [False, True]
        if self._takes_parts:
            messages = [
                {**message, "content": _parts(message["content"])}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        return self._render(messages, add_generation_prompt, tools, variables, now)

    def _shows_probe(self, content: Any) -> bool:  # noqa: ANN401 - text or parts
        """Whether a user's message is seen; multi-modal templates look for parts only."""
        try:
            probe = [{"role": "user", "content": content}]
            return PROBE in self._render(probe, True, None, None, None)
        except RequestError:
            return False

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        now: datetime | None,
    ) -> str:
        deadline = time.monotonic() + MAX_RENDER_S
        names = {
            **(variables or {}),
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": lambda form: (now or datetime.now()).strftime(form),
            "range": lambda *bounds: _TickingRange(safe_range(*bounds), deadline),
        }
        pieces = []
        size = 0
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                size += len(piece)
                _check_time(deadline)
                if size > MAX_OUTPUT_CHARS:
                    raise jinja2.TemplateError(f"output exceeds {MAX_OUTPUT_CHARS} characters")
        except RENDER_ERRORS as error:
            raise RequestError(
                f"the model's chat template cannot render these messages: {error}",
                code="template_error",
                param="messages",
            ) from error
        return "".join(pieces)


class NoChatTemplate(ChatTemplate):
    """Of a model that has none: every conversation is refused."""

    def __init__(self) -> None:
        super().__init__("", "none", {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],  # noqa: ARG002
        **_: Any,  # noqa: ANN401
    ) -> str:
        raise RequestError(
            "this model has no chat template, so it is not known how it wants to be asked: start "
            "the server with --chat-template FILE, or use /v1/completions",
            code="no_chat_template",
            param="messages",
        )


class RenderedChat:
    """A conversation as the template shows it. Control tokens come from the template only.

    Where a message spells a control token, a guard character is put inside before rendering, and
    its tokens are dropped afterwards. Messages that spell none are encoded as transformers would.

    Args:
        template: of the model.
        tokenizer: of the model.
        messages: ``{"role": ..., "content": ...}``.
        continues_last: the text ends where the last message's content does: the answer goes on.
        options: as of :meth:`ChatTemplate.render`.

    Raises:
        RequestError: as :meth:`ChatTemplate.render`, and ``role_not_supported``.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        continues_last: bool = False,
        **options: Any,  # noqa: ANN401 - see render
    ) -> None:
        everything = json.dumps([messages, options], ensure_ascii=False, default=str)
        unused = (chr(point) for point in GUARDS if chr(point) not in everything)
        self._guard, mark = next(unused), next(unused)
        self._tokenizer = tokenizer
        specials = [text for text in tokenizer.special_texts() if text]
        for name in ("tools", "variables"):
            if options.get(name) is not None:
                options[name] = _guard(options[name], specials, self._guard)
        known = as_known(messages, names_developer=template.names_developer)
        guarded = _guard(known, specials, self._guard)
        if continues_last:
            self.text = _until_last(guarded, partial(template.render, **options), mark)
        else:
            self.text = template.render(guarded, **options)
        check_shown(guarded, partial(template.render, **options), mark)

    def digest(self, text: str) -> str:
        """Of a piece of ``self.text``: the same whichever guard was free."""
        pieces = json.dumps(text.split(self._guard))
        return hashlib.blake2b(pieces.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of ``self.text``.

        Raises:
            RequestError: ``invalid_unicode``, and a guard that the tokenizer cannot keep apart.
        """
        if self._guard in text:
            return self._tokenizer.encode_guarded(text, self._guard)
        return self._tokenizer.encode(text, add_special_tokens=False)


def _until_last(
    messages: Sequence[Mapping[str, Any]], render: Callable[[Any], str], mark: str
) -> str:
    """The text of a conversation up to where its last message's content ends."""
    *before, last = messages
    # Templates strip white space, so the mark stands behind what is left of the content.
    marked = {**last, "content": f"{last['content'].rstrip()}{mark}"}
    text = render([*before, marked])
    if mark not in text:
        raise RequestError(
            "the model's chat template does not show the last message as it is: it cannot be "
            "continued",
            code="template_error",
            param="continue_final_message",
        )
    return text[: text.rindex(mark)]


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt's token ids.

    Raises:
        RequestError: as :class:`RenderedChat` and its ``encode``.
    """
    rendered = RenderedChat(
        template,
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        variables=variables,
    )
    return rendered.encode(rendered.text)


def _guard(value: Any, specials: Sequence[str], guard: str) -> Any:  # noqa: ANN401 - any JSON
    """``value`` with the guard after the first character of each special text in its strings."""
    if isinstance(value, str):
        for text in specials:
            if text in value:
                value = value.replace(text, f"{text[0]}{guard}{text[1:]}")
        return value
    if isinstance(value, Mapping):
        return {key: _guard(item, specials, guard) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_guard(item, specials, guard) for item in value]
    return value


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise jinja2.TemplateError(f"rendering took longer than {MAX_RENDER_S} s")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, *rest: Any, **options: Any) -> str:  # noqa: ANN401 - any JSON
    """As transformers has it: no HTML escapes, not only ASCII, and options in its order."""
    named = dict(zip(("indent", "separators", "sort_keys"), rest, strict=False))
    return json.dumps(value, ensure_ascii=ensure_ascii, **named, **options)
