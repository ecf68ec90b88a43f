"""What was promised: deadlines by kind of request, which may grow with the prompt's length.

A file is YAML::

    slo:
      chat:     {ttft_ms: {base: 400, per_1k_tokens: 25, per_1k2: 0.02}, tpot_ms: 40, target: 0.99}
      question: {ttft_ms: 600, e2e_ms: 8000, target: 0.95}
      default:  {preset: mlperf-llama2-70b}

``deadline(n) = base + per_1k_tokens * n/1000 + per_1k2 * (n/1000)**2`` for a prompt of n tokens.
Every ``_ms`` may be written ``_s``. ``default`` is for kinds that are not named.
"""

from pathlib import Path
from typing import Any

import msgspec
import yaml

from bench.load.record import OK, RequestRecord
from protocol.errors import ConfigError


class Deadline(msgspec.Struct, frozen=True):
    """Seconds, by the number of prompt tokens."""

    base_s: float
    per_1k_tokens_s: float = 0.0
    per_1k2_s: float = 0.0

    def at(self, num_prompt_tokens: int) -> float:
        thousands = num_prompt_tokens / 1000
        return self.base_s + thousands * (self.per_1k_tokens_s + thousands * self.per_1k2_s)

    def scaled(self, factor: float) -> "Deadline":
        return Deadline(
            self.base_s * factor, self.per_1k_tokens_s * factor, self.per_1k2_s * factor
        )


class Objective(msgspec.Struct, frozen=True):
    """The promise for one kind of request. What is None was not promised; success always is."""

    ttft: Deadline | None = None
    tpot_s: float | None = None
    e2e: Deadline | None = None
    target: float = 0.99
    """The share of requests that must meet all of it."""

    def ttft_met(self, record: RequestRecord) -> bool:
        """Whether its first token came in time, from the intended time, and it did not fail."""
        if record.outcome != OK:
            return False
        if self.ttft is None:
            return True
        if not record.token_times_s:
            return False
        ttft_s = record.token_times_s[0] - record.intended_s
        return ttft_s <= self.ttft.at(record.num_prompt_tokens)

    def tpot_met(self, record: RequestRecord) -> bool:
        """Whether its tokens followed fast enough. One token alone has no TPOT to miss."""
        if record.outcome != OK:
            return False
        tpot_s = tpot_of(record)
        return self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s

    def e2e_met(self, record: RequestRecord) -> bool:
        if record.outcome != OK or record.finished_s is None:
            return False
        e2e_s = record.finished_s - record.intended_s
        return self.e2e is None or e2e_s <= self.e2e.at(record.num_prompt_tokens)

    def met(self, record: RequestRecord) -> bool:
        """All of it at once."""
        return self.ttft_met(record) and self.tpot_met(record) and self.e2e_met(record)


class Slo(msgspec.Struct, frozen=True):
    """The promises of a service."""

    objectives: dict[str, Objective]

    def of(self, kind: str) -> Objective:
        """A kind that nothing was promised for must still succeed."""
        return self.objectives.get(kind) or self.objectives.get("default") or Objective()

    def scaled(self, factor: float) -> "Slo":
        """Every deadline times ``factor``, for attainment as a function of strictness."""
        return Slo({kind: _scaled(o, factor) for kind, o in self.objectives.items()})

    @property
    def tightest_s(self) -> float | None:
        """The shortest deadline that counts from the intended time: what late sending eats up."""
        ends = [d for o in self.objectives.values() for d in (o.ttft, o.e2e) if d is not None]
        return min((deadline.at(0) for deadline in ends), default=None)


def _scaled(objective: Objective, factor: float) -> Objective:
    return Objective(
        None if objective.ttft is None else objective.ttft.scaled(factor),
        None if objective.tpot_s is None else objective.tpot_s * factor,
        None if objective.e2e is None else objective.e2e.scaled(factor),
        objective.target,
    )


def tpot_of(record: RequestRecord) -> float | None:
    """Seconds per output token after the first; None for fewer than two."""
    if record.num_output_tokens < 2 or not record.token_times_s:
        return None
    times = record.token_times_s
    return (times[-1] - times[0]) / (record.num_output_tokens - 1)


def _preset(ttft_s: float, tpot_s: float) -> Objective:
    return Objective(ttft=Deadline(ttft_s), tpot_s=tpot_s, target=0.99)


PRESETS = {  # MLPerf Inference: server and interactive scenarios, p99 (loadgen's mlperf.conf)
    "mlperf-llama2-70b": _preset(2.0, 0.2),
    "mlperf-llama2-70b-interactive": _preset(0.45, 0.04),
    "mlperf-mixtral-8x7b": _preset(2.0, 0.2),
    "mlperf-llama3.1-8b": _preset(2.0, 0.1),
    "mlperf-llama3.1-8b-interactive": _preset(0.5, 0.03),
    "mlperf-llama3.1-405b": _preset(6.0, 0.175),
    "mlperf-llama3.1-405b-interactive": _preset(4.5, 0.08),
    "mlperf-deepseek-r1": _preset(2.0, 0.08),
    "mlperf-deepseek-r1-interactive": _preset(1.5, 0.015),
    "mlperf-gpt-oss-120b": _preset(3.0, 0.08),
    "mlperf-gpt-oss-120b-interactive": _preset(2.0, 0.015),
    "guidellm-chat": _preset(0.2, 0.05),  # its documentation's example, ITL read as TPOT
}
_FIELDS = {"ttft", "tpot", "e2e"}
_TERMS = {"base": "base_s", "per_1k_tokens": "per_1k_tokens_s", "per_1k2": "per_1k2_s"}


def load_slo(path_or_preset: str) -> Slo:
    """A file, or the name of a preset.

    Raises:
        ConfigError: neither, or the file says something that is not an SLO.
    """
    if path_or_preset in PRESETS:
        return Slo({"default": PRESETS[path_or_preset]})
    path = Path(path_or_preset)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}, and not one of the presets {', '.join(PRESETS)}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("slo"), dict):
        raise ConfigError(f"{path}: the top level must be `slo:` with one entry per kind")
    return parse_slo(content["slo"], str(path))


def parse_slo(kinds: dict[str, Any], where: str) -> Slo:
    """The entries below ``slo:``.

    Raises:
        ConfigError: naming the entry at fault.
    """
    return Slo(
        {str(kind): _objective(fields, f"{where}: {kind}") for kind, fields in kinds.items()}
    )


def _objective(fields: object, where: str) -> Objective:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: must be a mapping, like {{ttft_ms: 400, tpot_ms: 40}}")
    rest = dict(fields)
    preset = rest.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"{where}: no preset {preset!r}; there are {', '.join(PRESETS)}")
    base = PRESETS[preset] if preset is not None else Objective()
    target = rest.pop("target", base.target)
    if not isinstance(target, float | int) or not 0 < target < 1:
        raise ConfigError(f"{where}: target must lie between 0 and 1, not {target!r}")
    found: dict[str, Deadline] = {}
    for name, value in rest.items():
        metric, _, unit = str(name).rpartition("_")
        if metric not in _FIELDS or unit not in ("ms", "s") or metric in found:
            raise ConfigError(f"{where}: {name!r} is not one of ttft_ms, tpot_ms, e2e_ms, target")
        found[metric] = _deadline(value, 1e-3 if unit == "ms" else 1.0, f"{where}: {name}")
    tpot = found.get("tpot")
    if tpot is not None and (tpot.per_1k_tokens_s or tpot.per_1k2_s):
        raise ConfigError(f"{where}: tpot does not grow with the prompt")
    return Objective(
        found.get("ttft", base.ttft),
        base.tpot_s if tpot is None else tpot.base_s,
        found.get("e2e", base.e2e),
        float(target),
    )


def _deadline(value: object, unit_s: float, where: str) -> Deadline:
    terms: dict[str, Any] = value if isinstance(value, dict) else {"base": value}
    numbers: dict[str, float] = {}
    for name, number in terms.items():
        is_number = isinstance(number, float | int) and not isinstance(number, bool)
        if name not in _TERMS or not is_number or not 0 <= float(number) < float("inf"):
            raise ConfigError(f"{where}: must be a number, or of {', '.join(_TERMS)}: {value!r}")
        numbers[_TERMS[name]] = float(number) * unit_s
    if "base_s" not in numbers:
        raise ConfigError(f"{where}: base is missing")
    return Deadline(**numbers)
