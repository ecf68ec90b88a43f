"""Which parsers a model gets: by name, or by what its chat template writes."""

import pytest

from modeling.text.parsers.deltas import collect
from modeling.text.parsers.formats import OutputFormat, choose_format
from protocol.errors import ConfigError
from tests.modeling.parsers.reading import deepseek, read

HERMES = (
    r"<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>"
)
THINK = "{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}"
SPLIT = "{%- set content = content.split('</think>')[-1] %}"

# What the published templates write, cut down to the lines that tell.
TEMPLATES = {
    "qwen2.5": (HERMES, "hermes", "none"),
    "qwen3": (HERMES + THINK, "hermes", "qwen3"),
    "qwen3-coder": (
        r"<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1",
        "qwen3_coder",
        "none",
    ),
    "llama 3.1": (
        "{{- '<|start_header_id|>' }}{{- '{\"name\": \"' + tool_call.name + '\", ' }}"
        '{{- \'"parameters": \' }}{%- elif message.role == "ipython" %}',
        "llama3_json",
        "none",
    ),
    "llama 3.2, pythonic": (
        "{%- elif message.role == 'ipython' %}"
        "in the format of [func_name1(params_name1=params_value1, params_name2=params_value2...)]",
        "pythonic",
        "none",
    ),
    "mistral small 3.1": ('{{- "[TOOL_CALLS] [" }}', "mistral_list", "none"),
    "magistral": ("[THINK]...[/THINK]{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "mistral", "mistral"),
    "deepseek v3": (
        deepseek("<|tool calls begin|><|tool call begin|>' + type + '<|tool sep|>") + "```json",
        "deepseek_v3",
        "none",
    ),
    "deepseek r1": (
        deepseek("<|tool calls begin|>")
        + "```json"
        + SPLIT
        + "{{'<\uff5cAssistant\uff5c><think>'}}",
        "deepseek_v3",
        "deepseek_r1",
    ),
    "deepseek v3.1": (
        deepseek("<|tool calls begin|>") + SPLIT + "<\uff5cAssistant\uff5c>",
        "deepseek_v31",
        "deepseek_r1",
    ),
    "glm 4.5": (
        "[gMASK]<sop><tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>" + THINK,
        "glm45",
        "glm45",
    ),
    "gpt-oss": (
        '{{- "<|start|>assistant<|channel|>analysis<|message|>" }}',
        "openai",
        "openai_gptoss",
    ),
    "granite 3.2": ("after 'Here is my thought process:' and", "none", "granite"),
    "a template without tools": ("{{ '<|im_start|>' + role + content }}", "none", "none"),
}


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_template_tells_the_parsers(model: str) -> None:
    template, tool_call_parser, reasoning_parser = TEMPLATES[model]
    assert choose_format(template) == OutputFormat(tool_call_parser, reasoning_parser)


def test_a_name_goes_before_the_template() -> None:
    chosen = choose_format(HERMES + THINK, tool_call_parser="mistral", reasoning_parser="none")
    assert chosen == OutputFormat("mistral", "none")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--tool-call-parser hermes2.*hermes, llama3_json"):
        choose_format("", tool_call_parser="hermes2")
    with pytest.raises(ConfigError, match=r"--reasoning-parser think.*qwen3"):
        choose_format("", reasoning_parser="think")


def test_the_parsers_say_which_special_tokens_they_need() -> None:
    assert OutputFormat().special_tokens == ()
    assert {"<think>", "</think>", "<tool_call>"} <= {
        *OutputFormat("hermes", "qwen3").special_tokens
    }
    assert {"[TOOL_CALLS]", "[ARGS]", "[THINK]"} <= {
        *OutputFormat("mistral", "mistral").special_tokens
    }
    assert {"<|channel|>", "<|call|>"} <= {*OutputFormat("none", "openai_gptoss").special_tokens}


def test_the_same_request_gives_its_calls_the_same_ids_and_mistral_nine_characters() -> None:
    def ids(parser: str, call: str) -> list[str]:
        message = collect(read(call * 2, parser))
        return [call.call_id for call in message.calls]

    first, second = ids("hermes", '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>')
    assert first != second
    assert first.startswith("call_")
    assert first == ids("glm45", "<tool_call>get_time</tool_call>")[0]
    for call_id in ids("mistral", "[TOOL_CALLS]get_time[ARGS]{}"):
        assert len(call_id) == 9
        assert call_id.isalnum()
    assert ids("mistral", "[TOOL_CALLS]get_time[CALL_ID]abcDEF123[ARGS]{}")[0] == "abcDEF123"
