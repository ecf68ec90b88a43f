"""Which parsers read a model's answers: by name, or by its chat template.

The names are vLLM's where it has the format.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modeling.text.parsers.deltas import Content, Delta, Tool, merged
from modeling.text.parsers.harmony import CHANNEL, MESSAGE, START, Harmony
from modeling.text.parsers.json_calls import (
    DeepSeek,
    DeepSeekFenced,
    Hermes,
    Llama3,
    Mistral,
    MistralList,
)
from modeling.text.parsers.pythonic import Pythonic
from modeling.text.parsers.reasoning import ReasoningMarkers, ReasoningParser
from modeling.text.parsers.structure import Structure, structure_of
from modeling.text.parsers.tool_parser import ToolParser
from modeling.text.parsers.xml_calls import Glm45, Qwen3Coder
from protocol.errors import ConfigError

AUTO, NONE = "auto", "none"

TOOL_CALL_PARSERS: Mapping[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekFenced,
    "deepseek_v31": DeepSeek,
    "glm45": Glm45,
    "hermes": Hermes,
    "llama3_json": Llama3,
    "mistral": Mistral,
    "mistral_list": MistralList,
    "openai": Harmony,
    "pythonic": Pythonic,
    "qwen3_coder": Qwen3Coder,
}

_THINK = ReasoningMarkers(("<think>",), ("</think>",))
REASONING_PARSERS: Mapping[str, ReasoningMarkers] = {
    "deepseek_r1": _THINK,
    "deepseek_v3": _THINK,
    "glm45": _THINK,
    "granite": ReasoningMarkers(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    "mistral": ReasoningMarkers(("[THINK]",), ("[/THINK]",)),
    "openai_gptoss": ReasoningMarkers(
        (f"{CHANNEL}analysis{MESSAGE}",), (f"<|end|>{START}assistant",)
    ),
    "qwen3": _THINK,
}

# What all of these occur in is a template of that format; the first row that fits.
_TOOL_MARKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai", (CHANNEL, START)),
    ("deepseek_v3", (DeepSeek.CALLS, "```json")),
    ("deepseek_v31", (DeepSeek.CALLS,)),
    ("mistral", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral_list", ("[TOOL_CALLS]",)),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("hermes", ("<tool_call>", "arguments")),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ("ipython", '"parameters": ')),
)
_REASONING_MARKERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("openai_gptoss", (CHANNEL, START)),
    ("mistral", ("[THINK]",)),
    ("granite", ("Here is my thought process:",)),
    ("glm45", ("</think>", "[gMASK]")),
    ("deepseek_r1", ("</think>", "Assistant\uff5c>")),
    ("qwen3", ("</think>",)),
)


class OutputParser:
    """Reads one answer: :meth:`push` its text as it comes, then :meth:`finish`.

    The deltas of an answer, joined, are the same however its text was cut.
    """

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._tools.num_calls if self._tools else 0

    def push(self, text: str) -> list[Delta]:
        """What became certain with a further piece of text; may be nothing."""
        return self._after_reasoning(
            self._reasoning.push(text) if self._reasoning else [Content(text)]
        )

    def finish(self) -> list[Delta]:
        """What still waited. The text has ended, by itself or at a limit."""
        last = self._after_reasoning(self._reasoning.finish() if self._reasoning else [])
        return merged([*last, *(self._tools.finish() if self._tools else [])])

    def _after_reasoning(self, deltas: Sequence[Delta]) -> list[Delta]:
        read: list[Delta] = []
        for delta in deltas:
            if self._tools and isinstance(delta, Content):
                read += self._tools.push(delta.text)
            else:
                read.append(delta)
        return merged(read)


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a model writes reasoning and tool calls: the names of two parsers."""

    tool_call_parser: str = NONE
    reasoning_parser: str = NONE

    def __post_init__(self) -> None:
        for option, name, known in (
            ("--tool-call-parser", self.tool_call_parser, TOOL_CALL_PARSERS),
            ("--reasoning-parser", self.reasoning_parser, REASONING_PARSERS),
        ):
            if name != NONE and name not in known:
                names = ", ".join([AUTO, NONE, *sorted(known)])
                raise ConfigError(f"{option} {name}: not known: use one of {names}")

    @property
    def is_harmony(self) -> bool:
        """One parser reads everything."""
        return "openai" in self.tool_call_parser or "openai" in self.reasoning_parser

    @property
    def reasoning_markers(self) -> ReasoningMarkers | None:
        """The markers of reasoning; None without it."""
        return REASONING_PARSERS.get(self.reasoning_parser)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the parsers need to see, so that special tokens of these texts are kept."""
        if self.is_harmony:
            return Harmony.special_tokens
        form, tools = self.reasoning_markers, TOOL_CALL_PARSERS.get(self.tool_call_parser)
        return (
            *(form.opens + form.closes if form else ()),
            *(tools.special_tokens if tools else ()),
        )

    def parser(
        self, *, prompt: str, tools: Sequence[Tool], id_seed: str, buffer_calls: bool = False
    ) -> OutputParser:
        """The parser of one answer.

        Args:
            prompt: its end tells whether the answer goes on with reasoning.
            tools: that the model may call; without any, calls are text.
            id_seed: makes the calls' ids; it should name the request and the choice.
            buffer_calls: as of :class:`ToolParser`; for an answer that is not streamed.
        """
        if self.is_harmony:
            return OutputParser(None, Harmony(tools, id_seed, buffer_calls=buffer_calls))
        kind = TOOL_CALL_PARSERS.get(self.tool_call_parser) if tools else None
        form = self.reasoning_markers
        return OutputParser(
            ReasoningParser(form, is_opened=form.is_opened_by(prompt)) if form else None,
            kind(tools, id_seed, buffer_calls=buffer_calls) if kind else None,
        )

    def structure(self, tools: Sequence[Tool]) -> Structure | None:
        """How calls of these tools are written, for a grammar; None without a format."""
        kind = TOOL_CALL_PARSERS.get(self.tool_call_parser)
        return structure_of(kind.syntax, tools) if kind else None


def choose_format(
    template: str, *, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO
) -> OutputFormat:
    """The format of a model, ``auto`` being read off the source of its chat template.

    Raises:
        ConfigError: a name is not known.
    """
    return OutputFormat(
        _fitting(_TOOL_MARKERS, template) if tool_call_parser == AUTO else tool_call_parser,
        _fitting(_REASONING_MARKERS, template) if reasoning_parser == AUTO else reasoning_parser,
    )


def _fitting(rows: Sequence[tuple[str, tuple[str, ...]]], template: str) -> str:
    fitting = (name for name, marks in rows if all(mark in template for mark in marks))
    return next(fitting, NONE)
