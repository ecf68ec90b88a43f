"""generation_config.json gives the defaults of requests that name none, as in vLLM."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.config import Limits
from coordinator.validation.parameters import Options, read_options
from coordinator.validation.schemas import ChatBody, validate
from modeling.checkpoint.config import ModelConfig, load_config
from modeling.checkpoint.generation_config import (
    SamplingDefaults,
    parse_sampling,
    read_generation_config,
)
from protocol.errors import ConfigError, RequestError

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
ARITHMETIC = load_config("arithmetic")


def _parse(folder: Path, **fields: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return parse_sampling(read_generation_config(folder))


def _options(defaults: SamplingDefaults, **body: Any) -> Options:
    model: ModelConfig = msgspec.structs.replace(ARITHMETIC, sampling=defaults)
    return read_options(
        validate(ChatBody, body),
        num_logprobs=None,
        model=model,
        limits=Limits(),
    )


def test_they_are_the_defaults_of_a_request_that_names_none(tmp_path: Path) -> None:
    defaults = _parse(tmp_path, **QWEN3, repetition_penalty=1.05, max_new_tokens=99)
    for body in ({}, {name: None for name in (*QWEN3, "repetition_penalty") if name[0] != "d"}):
        sampling = _options(defaults, **body).sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.01, 1.05)
    options = _options(defaults, temperature=0, top_k=-1, top_p=1.0, min_p=0, repetition_penalty=1)
    assert (options.sampling.temperature, options.sampling.top_k) == (0.0, 0)
    assert (options.sampling.top_p, options.sampling.min_p) == (1.0, 0.0)
    assert options.sampling.repetition_penalty == 1.0
    assert (options.max_tokens, options.default_max_tokens) == (None, 99)
    assert _options(defaults, max_tokens=500).max_tokens == 500


def test_without_them_they_are_openais(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    defaults = parse_sampling(read_generation_config(tmp_path))
    assert defaults == SamplingDefaults()
    sampling = _options(defaults).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.0, 1.0)


def test_config_json_has_them_where_there_is_no_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"temperature": 0.3, "typical_p": 0.9}))
    before = parse_sampling(read_generation_config(tmp_path))
    assert before == SamplingDefaults(temperature=0.3, not_followed=("typical_p",))
    assert _parse(tmp_path, top_k=7) == SamplingDefaults(top_k=7)


def test_null_is_not_given_and_what_is_not_followed_is_named(tmp_path: Path) -> None:
    defaults = _parse(tmp_path, temperature=None, top_k=50, do_sample=False, num_beams=4)
    assert defaults.named() == {"top_k": 50}
    assert defaults.not_followed == ("do_sample", "num_beams")
    more = _parse(tmp_path, presence_penalty=1.5, frequency_penalty=0, top_n_sigma=1.0)
    assert more.not_followed == ("presence_penalty", "top_n_sigma")
    plain = {"num_beams": 1, "bos_token_id": 1, "transformers_version": "5", "max_length": 20}
    assert _parse(tmp_path, **plain) == SamplingDefaults()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, 2.1)),
        ("top_p", (0, -1, 1.1)),
        ("top_k", (-2, 2**31 + 1)),
        ("min_p", (-0.1, 1.1)),
        ("repetition_penalty", (0, -1, 100.1)),
    ],
)
def test_what_no_request_could_say_is_refused_by_name(
    name: str, values: tuple[float, ...], tmp_path: Path
) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} must"):
            _parse(tmp_path, **{name: value})
        with pytest.raises(RequestError, match=name):
            validate(ChatBody, {name: value})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": float("nan")}, "top_p must be above"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must lie in 1"),
    ],
)
def test_what_is_no_value_at_all(fields: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        _parse(tmp_path, **fields)
