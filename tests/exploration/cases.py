"""The cases of an exploration: what each has, what may befall it, and what is left out of it."""

from dataclasses import dataclass, replace
from math import lcm

from tests.exploration.callers import Calls
from tests.exploration.clusters import Case, Gang
from tests.exploration.ranks import Setting

FAULTLESS = Setting(reads_fail=False)
SILENT = Setting(reads_fail=False, informs=False)


@dataclass(frozen=True, slots=True)
class Named:
    """A case and its name. ``is_quick``: it is in ``make test``."""

    name: str
    case: Case
    is_quick: bool = False


def cases(num_prefill: int, num_decode: int, num_requests: int) -> list[Named]:
    """All of them, smallest first.

    Args:
        num_prefill: ranks of the prefill pool in the cases of many ranks.
        num_decode: ranks of the decode pool there.
        num_requests: in the case of many requests.
    """
    return [*_faults(), *_deaths(), *_rings(), *_sizes(num_prefill, num_decode, num_requests)]


def _faults() -> list[Named]:
    """One rank on each side; everything that can happen to a message, a read and a caller."""
    one = Case(setting=Setting(checksum="always", reads_corrupt=True), num_repeats=3, num_layers=1)
    calm = replace(one, setting=FAULTLESS, calls=Calls(may_leave=False))
    tight = Case(
        prefill=Gang("prefill", num_blocks=1),
        decode=Gang("decode", num_blocks=4),
        calls=Calls(num_requests=2, num_tokens=2, max_tokens=1),
        setting=replace(SILENT, leases_end=True),
    )
    growing = Case(calls=Calls(num_requests=2, max_tokens=4), setting=SILENT)
    return [
        Named("repeats cost nobody anything", calm, True),
        Named("failed and wrong reads, three messages twice", one, True),
        Named("two segments, two messages twice", replace(one, num_layers=2, num_repeats=2)),
        Named("one read at a time", replace(one, num_layers=2, num_repeats=1,
                                            setting=replace(one.setting, max_reads=1)), True),
        Named("main and transfer threads in queues", replace(one, queues=True, num_repeats=1)),
        Named("leases end, two requests, one block", tight, True),
        Named("pre-emption: two requests grow", growing),
    ]  # fmt: skip


def _deaths() -> list[Named]:
    """A gang dies at any moment and is started again under a new epoch."""
    one = Case(num_deaths=1)
    again = replace(one, calls=Calls(max_attempts=2))
    resumed = Case(
        prefill=Gang("prefill", num_blocks=3),
        decode=Gang("decode", num_blocks=3),
        calls=Calls(num_tokens=4, max_tokens=2, max_attempts=2),
        num_deaths=1,
        may_die=("prefill",),
    )
    for_good = Calls(max_attempts=2, is_patient=False)
    company = Calls(2, max_tokens=1, may_leave=False, max_attempts=2, is_patient=False)
    twice = Calls(max_attempts=2, may_leave=False, is_patient=False)
    pairs = Case(
        prefill=Gang("prefill", tp_size=2),
        decode=Gang("decode", tp_size=2),
        calls=Calls(max_tokens=1, may_leave=False),
        setting=SILENT,
        num_heads=2,
        num_deaths=1,
    )
    return [
        Named("a gang dies, one token", replace(one, calls=Calls(max_tokens=1)), True),
        Named("a gang dies, a message twice", replace(one, num_repeats=1)),
        Named("a gang dies for good", replace(one, restarts=False, calls=for_good)),
        Named("a gang dies, a second attempt", again),
        Named("a gang dies, queues", replace(again, queues=True, setting=SILENT)),
        Named("a gang dies, two requests", replace(pairs, prefill=Gang("prefill", num_blocks=1),
                                                   decode=Gang("decode", num_blocks=1),
                                                   calls=company)),
        Named("a gang of 2 dies", pairs),
        Named("two deaths, a second attempt", replace(one, num_deaths=2, setting=SILENT,
                                                      calls=twice)),
        Named("resumed and fetched after a death", resumed),
    ]  # fmt: skip


def _rings() -> list[Named]:
    """Context parallelism, so that every rank of one side reads from every rank of the other."""
    two = Case(
        prefill=Gang("prefill", cp_size=2, num_blocks=2),
        decode=Gang("decode", num_blocks=3),
        calls=Calls(num_tokens=4, max_tokens=1),
        setting=SILENT,
    )
    three = replace(
        two,
        prefill=Gang("prefill", cp_size=3, num_blocks=2),
        decode=Gang("decode", num_blocks=4),
        calls=Calls(num_tokens=6, max_tokens=1),
    )
    crossed = replace(two, decode=Gang("decode", tp_size=2, num_blocks=3), num_heads=2)
    return [
        Named("a ring of 2 to 1", two, True),
        Named("a ring of 3 to 1", three),
        Named("a ring of 2 to 2, crossed", crossed),
    ]


def _sizes(num_prefill: int, num_decode: int, num_requests: int) -> list[Named]:
    ranks = Case(
        prefill=Gang("prefill", tp_size=num_prefill),
        decode=Gang("decode", tp_size=num_decode),
        num_heads=lcm(num_prefill, num_decode),
        setting=SILENT,
    )
    requests = Case(
        prefill=Gang("prefill", num_blocks=1),
        decode=Gang("decode", num_blocks=1),
        calls=Calls(num_requests=num_requests, max_tokens=1),
        setting=SILENT,
    )
    two = replace(
        ranks,
        prefill=Gang("prefill", tp_size=2, num_blocks=1),
        decode=Gang("decode", tp_size=2, num_blocks=1),
        num_heads=2,
    )
    calm = Calls(max_tokens=1, may_leave=False)
    two_twice = replace(two, calls=Calls(num_requests=2, max_tokens=1))
    three = Case(calls=Calls(num_requests=3, max_tokens=1), setting=SILENT)
    return [
        Named("2 ranks to 2", two, True),
        Named("2 ranks to 2, a message twice", replace(two, num_repeats=1, calls=calm), True),
        Named("2 ranks to 2, 2 requests, room for one", two_twice),
        Named("3 requests, room for two", three),
        Named(f"{num_requests} requests, room for one", requests),
        Named(f"{num_prefill} ranks to {num_decode}", ranks),
    ]
