"""``baton doctor``: the machine, the transports that work on it, the health of a cluster."""

import sys

import msgspec

from baton_client import BatonConnectionError, Client, ClientError
from bench.environment import describe
from launcher.config import default_api_key, default_url
from launcher.doctor.cluster_health import Finding, judge, settled_state
from protocol.errors import BatonError


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


def _check_cluster(url: str | None) -> list[Finding]:
    """The findings about the cluster at ``url``; none if no server is at the default address."""
    address = url or default_url()
    try:
        with Client(address, api_key=default_api_key()) as client:
            return judge(settled_state(client))
    except BatonConnectionError as error:
        return [Finding("cluster", False, str(error), "set --url")] if url else []
    except ClientError as error:
        return [Finding("cluster", False, f"{address}: {error}", "set --url, or BATON_API_KEY")]


def doctor(*, as_json: bool, url: str | None = None) -> int:
    """Print the report.

    Args:
        as_json: for programs.
        url: of a cluster that must be there; without it one is looked for at the usual place.

    Returns:
        0 when a cluster can be served from here, and the one that was looked at is well; else 1.
    """
    environment = describe()
    transports = _check_transports()
    cluster = _check_cluster(url)
    findings = [*transports, *cluster]
    if as_json:
        report = {"environment": environment, "findings": findings}
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        for name, value in environment.items():
            sys.stdout.write(f"  {name:<14} {value}\n")
        for finding in findings:
            sys.stdout.write(finding.line() + "\n")
    can_serve = any(finding.is_well for finding in transports)
    return 0 if can_serve and all(finding.is_well for finding in cluster) else 1
