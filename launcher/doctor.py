"""``baton doctor``: what this machine has, and whether KV can move on it, measured."""

import sys
from dataclasses import dataclass

import msgspec

from bench.environment import describe
from protocol.errors import BatonError


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice`` says what to do when it is not well."""

    name: str
    is_well: bool
    found: str
    advice: str = ""


def _check_transports() -> list[Finding]:
    from bench.transfer import measure_transport

    findings = []
    for name in ("nixl", "tcp"):
        try:
            speed = measure_transport(name)
        except (BatonError, OSError, EOFError) as error:
            advice = "install nixl, or serve with --transport tcp" if name == "nixl" else ""
            findings.append(Finding(f"transport {name}", False, str(error), advice))
        else:
            findings.append(Finding(f"transport {name}", True, f"{speed / 1e9:.1f} GB/s read"))
    return findings


def doctor(*, as_json: bool) -> int:
    """Print the report; returns 0 when a cluster can be served from here, else 1."""
    environment = describe()
    findings = _check_transports()
    if as_json:
        report = {"environment": environment, "findings": findings}
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        for name, value in environment.items():
            sys.stdout.write(f"  {name:<14} {value}\n")
        for finding in findings:
            mark = "ok" if finding.is_well else "NO"
            advice = f" ({finding.advice})" if finding.advice else ""
            sys.stdout.write(f"  {mark} {finding.name:<14} {finding.found}{advice}\n")
    return 0 if any(finding.is_well for finding in findings) else 1
