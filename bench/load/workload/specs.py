"""Workloads and arrivals as one writes them: ``documents:document=8192,questions=3``, or YAML."""

from pathlib import Path
from typing import Any, get_args

import msgspec
import yaml

from bench.load.workload.arrival import Arrival, Ramp, check_arrival
from bench.load.workload.sessions import Cancellations, Workload, check_workload
from protocol.errors import ConfigError


def workload_of(spec: str) -> Workload:
    """``KIND`` or ``KIND:NAME=VALUE,...``, or the path of a YAML file with the same names.

    Raises:
        ConfigError: it is not a workload.
    """
    fields = _file(spec) if spec.endswith((".yaml", ".yml")) else _fields(spec)
    try:
        workload: Workload = msgspec.convert(fields, Workload, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"workload {spec!r}: {error}; {_kinds(Workload)}") from error
    _refuse_unknown(fields, workload, spec)
    check_workload(workload)
    return workload


def arrival_of(spec: str, rate: float | None) -> Arrival:
    """``poisson``, ``gamma:cv=3``, ``constant``, ``on_off:peak=5``, ``ramp:1-9-60,9-9-120``.

    Args:
        rate: requests per second, of all but a ramp.

    Raises:
        ConfigError: it is not an arrival process, or it lacks its rate.
    """
    kind, _, rest = spec.partition(":")
    if kind == "ramp":
        return check_arrival(Ramp(tuple(_stage(stage) for stage in rest.split(","))))
    fields = _fields(spec)
    if rate is not None:
        fields.setdefault("rate", rate)
    try:
        arrival: Arrival = msgspec.convert(fields, Arrival, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"arrival {spec!r}: {error}; {_kinds(Arrival)}") from error
    _refuse_unknown(fields, arrival, spec)
    return check_arrival(arrival)


def cancellations_of(spec: str) -> Cancellations:
    """``SHARE`` or ``SHARE:SECONDS``, the seconds a length such as ``uniform/0/2``.

    Raises:
        ConfigError: it is neither.
    """
    share, _, after_s = spec.partition(":")
    try:
        return Cancellations(float(share), after_s or "uniform/0/2")
    except ValueError as error:
        raise ConfigError(f"{spec!r}: cancellations are written SHARE or SHARE:SECONDS") from error


def _fields(spec: str) -> dict[str, Any]:
    kind, _, rest = spec.partition(":")
    fields: dict[str, Any] = {"kind": kind}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name == "kind":
            raise ConfigError(f"{spec!r}: write NAME=VALUE, not {part!r}")
        fields[name] = value
    return fields


def _file(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with `kind:` and the workload's fields")
    return {str(name): _scalar(value) for name, value in content.items()}


def _scalar(value: object) -> object:
    """Lengths are strings, also those that YAML takes for numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _refuse_unknown(fields: dict[str, Any], found: Workload | Arrival, spec: str) -> None:
    unknown = set(fields) - {"kind", *found.__struct_fields__}
    if unknown:
        known = ", ".join(found.__struct_fields__)
        raise ConfigError(f"{spec!r}: no {sorted(unknown)[0]!r} here; there are {known}")


def _kinds(union: object) -> str:
    return f"kinds: {', '.join(kind.__struct_config__.tag for kind in get_args(union))}"


def _stage(text: str) -> tuple[float, float, float]:
    try:
        first, last, length_s = map(float, text.split("-"))
    except ValueError as error:
        raise ConfigError(f"{text!r}: a stage is START_RATE-END_RATE-SECONDS") from error
    return first, last, length_s
