"""SLO files: what they say, and what they may not say."""

from pathlib import Path

import pytest

from bench.load.analysis.slo import PRESETS, Deadline, Objective, Slo, load_slo, parse_slo
from protocol.errors import ConfigError

FILE = """
slo:
  chat:   {ttft_ms: {base: 400, per_1k_tokens: 25, per_1k2: 0.5}, tpot_ms: 40, target: 0.99}
  rag:    {ttft_s: 2, e2e_ms: 8000, target: 0.95}
  default: {preset: mlperf-llama2-70b, tpot_ms: 100}
"""


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(FILE)
    slo = load_slo(str(path))
    chat = slo.of("chat")
    assert chat.ttft is not None
    assert chat.ttft.at(0) == pytest.approx(0.4)
    assert chat.ttft.at(4000) == pytest.approx(0.4 + 4 * 0.025 + 16 * 0.0005)
    assert chat.tpot_s == pytest.approx(0.04)
    assert slo.of("rag") == Objective(Deadline(2.0), None, Deadline(8.0), 0.95)
    assert slo.of("anything") == Objective(Deadline(2.0), pytest.approx(0.1), None, 0.99)
    assert slo.tightest_s == pytest.approx(0.4)


def test_a_preset_by_name() -> None:
    slo = load_slo("mlperf-llama2-70b-interactive")
    assert slo.of("any") == Objective(Deadline(0.45), 0.04, None, 0.99)
    assert all(preset.target == 0.99 for preset in PRESETS.values())


def test_what_was_not_promised_must_still_succeed() -> None:
    assert Slo({}).of("any") == Objective()
    assert Slo({}).tightest_s is None


def test_scaled() -> None:
    twice = parse_slo({"a": {"ttft_s": {"base": 1, "per_1k_tokens": 2}, "tpot_s": 3}}, "f").scaled(
        2
    )
    assert twice.of("a") == Objective(Deadline(2.0, 4.0), 6.0, None, 0.99)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ttft_ms": -1}, "f: a: ttft_ms: must be a number"),
        ({"ttft_ms": True}, "must be a number"),
        ({"ttft_ms": {"per_1k_tokens": 3}}, "base is missing"),
        ({"ttft_ms": {"base": 3, "per_2k": 3}}, "per_1k_tokens"),
        ({"ttft": 3}, "'ttft' is not one of"),
        ({"ttft_ms": 3, "ttft_s": 3}, "is not one of"),
        ({"tpot_ms": {"base": 3, "per_1k_tokens": 1}}, "does not grow"),
        ({"preset": "fast"}, "no preset 'fast'"),
        ({"target": 99}, "between 0 and 1"),
        ([], "must be a mapping"),
    ],
)
def test_mistakes_are_named(fields: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_slo({"a": fields}, "f")


@pytest.mark.parametrize("text", ["chat: {}", "slo: 3", "slo: [", ""])
def test_a_file_that_is_no_slo(tmp_path: Path, text: str) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"slo\.yaml"):
        load_slo(str(path))


def test_neither_a_file_nor_a_preset() -> None:
    with pytest.raises(ConfigError, match="not one of the presets"):
        load_slo("nothing-like-it")
