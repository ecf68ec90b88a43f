"""The table of a campaign, for a terminal and for ``docs/faults.md``."""

import datetime

from bench.environment import headline
from tests.campaign.tally import FREE_WITHIN_S, Tally, percentile

_TITLE = "# Faults that are injected, and what happens"
_ABOUT = """\
Written by `python -m tests.campaign --save DIR`: real processes, the arithmetic model, whose every
token is known, KV over NIXL with `UCX_TLS=tcp`. A fault counts when it was seen to take effect: by
the counter of its failpoint, by the kernel's state of a process, by the link's packet counter.
*Lost*, *repeated* and *foreign* tokens are told apart by the oracle. Failures are left in sight.

How a request ends: *done*; *left*, its client went away; *error*, an event or a status said so;
*late*, its client had waited long enough; *cut*, its coordinator was gone; *refused*, nobody
listened, which counts as no request. What else but *done* and *left* a stage allows is in
`tests/campaign/`; anything else is a problem, and the command exits with 1."""


def lines(tally: Tally, asked: str) -> list[str]:
    """The table, one line each; ``asked`` is what the campaign was to reach."""
    found = [
        f"faults injected        {tally.faults.total()}",
        *(f"  {name:<44} {count}" for name, count in sorted(tally.faults.items())),
        f"requests               {tally.num_requests}",
        *(f"  {name:<44} {count}" for name, count in sorted(tally.ends.items())),
        f"tokens compared        {tally.num_tokens}",
        *(f"  {kind:<44} {tally.lies[kind]}" for kind in ("lost", "repeated", "foreign")),
        f"requests abandoned     {sum(tally.abort_phases.values())}",
        *(f"  {phase:<44} {count}" for phase, count in sorted(tally.abort_phases.items())),
        f"time to free           {_spread(tally.free_s)} (at most {FREE_WITHIN_S} s at p99)",
        f"blocks leaked          {tally.num_leaked_blocks}, in {tally.num_audits} audits",
        f"late-transfer rounds   {tally.num_late_rounds}, reads landed late "
        f"{tally.num_landed_late}",
        f"without checksums      {tally.num_planted_seen} foreign tokens seen: the fault is real",
    ]
    for what, times in (("time to detect", tally.detect_s), ("time to recover", tally.recover_s)):
        found += [f"{what:<22} {kind}: {_spread(times[kind])}" for kind in sorted(times)]
    found += [f"skipped                {reason}" for reason in tally.skipped]
    found.append(f"asked for              {asked}")
    found.append(f"problems               {len(tally.problems)}")
    found += [f"  {problem}" for problem in tally.problems[:20]]
    return found


def page(tally: Tally, asked: str, command: str, took_s: float) -> str:
    """The whole of ``docs/faults.md``."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    facts = f"{today}, {took_s:.0f} s on {headline()}"
    table = "\n".join(lines(tally, asked))
    return f"{_TITLE}\n\n{_ABOUT}\n\n```\n$ {command}\n# {facts}\n\n{table}\n```\n"


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured"
    parts = [f"p{int(100 * share)} {percentile(values, share):.3f} s" for share in (0.5, 0.99)]
    return f"{', '.join(parts)}, max {max(values):.3f} s, n {len(values)}"
