"""JSON that strangers wrote: what is wrong with it is said, and where."""

from pathlib import Path
from typing import Any

import pytest

from modeling.checkpoint.json_fields import read_json
from protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty: download it again"),
        (b"{", "line 1 column 2: the file ends too early"),
        (b'{"a": 1', "line 1 column 8: the file ends too early"),
        (b"[1]", "expected a JSON object, found list"),
        (b"\x00", "not valid JSON: line 1 column 1"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of thousands of digits"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16"),
        (b'{"a": "\xe9"}', "is not UTF-8 at byte 7"),
        (b'{\n  // the sizes\n  "a": 1}', "line 2 column 3: JSON has no comments"),
        (b'{"a": 1, # old\n "b": 2}', "column 10: JSON has no comments"),
        (b'{"a": /* old */ 1}', "column 7: JSON has no comments"),
        (b'{"a": 1,\n}', "a comma without anything behind it"),
        (b'{"a": [1, 2, ]}', "a comma without anything behind it"),
        (b"{'a': 1}", "line 1 column 2: Expecting property name"),
        (b'{"b": {"a": 1, "a": 2}}', "a is there twice, once as 1 and once as 2"),
        (b'{"eos_token": "\\ud83d"}', "has a text with half of a surrogate pair"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    ],
)
def test_what_is_wrong_is_said(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ('{"a": 1, "a": 1}', {"a": 1}),
        ('{"a": Infinity, "b": -Infinity}', {"a": float("inf"), "b": float("-inf")}),
        ('{"a": {"__float__": "Infinity"}}', {"a": float("inf")}),  # as transformers 5 writes it
        ('{"a": {"__float__": "Infinity", "b": 1}}', {"a": {"__float__": "Infinity", "b": 1}}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        ('{"a": {"__float__": "1"}}', {"a": {"__float__": "1"}}),
    ],
)
def test_what_transformers_takes_is_taken(content: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert read_json(tmp_path / "config.json") == value
