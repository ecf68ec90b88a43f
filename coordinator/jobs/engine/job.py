"""What a durable job is, and the one interface between the engine and a kind of work. Pure.

The engine keeps jobs and their events (table.py), has them worked on (runner.py), and answers
their owners (engine.py). A kind of work says what its jobs are, as a :class:`Job`, and how one is
done, as a :class:`Kind`. There are two: documents (documents/work.py), batches (batches/work.py).
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import msgspec

from protocol.errors import RequestError
from protocol.transitions import advance


class JobEvent(enum.Enum):
    """What happens to jobs of any kind. The table of a kind has these, and events of its own."""

    REQUEUE = "requeue"  # it cannot go on for now, or the process that worked on it has ended
    FAIL = "fail"
    SET_ASIDE = "set_aside"  # processes have died of it
    CANCEL = "cancel"
    EXPIRE = "expire"


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a job could not be done."""

    code: str
    message: str
    status: int = 500
    param: str | None = None

    @staticmethod
    def of(error: RequestError) -> "Failure":
        return Failure(error.code, error.message, error.status, error.param)

    def describe(self) -> dict[str, Any]:
        """The failure as callers see it."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "status": self.status,
        }


@dataclass(frozen=True, slots=True)
class Notice:
    """An event to tell the owner of a job; it is numbered when it is written."""

    kind: str  # "state", "progress", "warning" or "expired"
    data: dict[str, Any]


class Job(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A job as the database keeps it. Times are Unix seconds."""

    KIND: ClassVar[str]  # its name in the database, in marks, in error codes and in the log
    TABLE: ClassVar[Mapping[tuple[Any, Any], Any]]
    PENDING: ClassVar[frozenset[Any]]  # states in which something is to be done
    BEGUN: ClassVar[frozenset[Any]]  # of these, states from which each attempt begins anew
    CANCELLED: ClassVar[frozenset[Any]]  # states in which it was cancelled already
    CLEANED: ClassVar[frozenset[Any]]  # ends after which what it has used is put away

    id: str
    tenant: str
    created_at: float
    state: Any
    priority: int = 0
    times: dict[str, float] = {}  # when each state was entered last
    error: Failure | None = None

    def after(self, event: enum.Enum, **changes: Any) -> Self:  # noqa: ANN401 - fields of the class
        """The job after an event.

        Raises:
            IllegalTransition: the table does not have it.
        """
        state = advance(self.TABLE, self.state, event, of=self.id)
        return msgspec.structs.replace(self, state=state, **changes)

    @property
    def is_pending(self) -> bool:
        return self.state in self.PENDING

    @property
    def due_at(self) -> float | None:
        """The moment at which time itself changes the job."""
        return None

    def columns(self) -> dict[str, object]:
        """Columns of the table ``job`` that queries look for."""
        return {"state": self.state.value, "priority": self.priority, "due_at": self.due_at}

    def state_notice(self) -> Notice:
        """The event that tells of the state which the job has entered."""
        return Notice("state", {"status": self.state.value})


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, slots=True)
class WorkLimits:
    """How many jobs of a kind are worked on at one time, and how long to wait between attempts."""

    max_of_tenant: int
    max_tenants: int
    retry_s: float  # doubled with each attempt that comes to nothing
    max_retry_s: float


class Kind(ABC, Generic[J]):
    """One kind of work. The engine calls it; it changes its jobs through their ``JobTable``."""

    limits: WorkLimits

    @property
    def is_ready(self) -> bool:
        """Whether a job can be begun now. It is asked again and again while one waits."""
        return True

    @abstractmethod
    async def work(self, job: J, on_progress: Callable[[], None]) -> None:
        """Work on a job until nothing is to be done for it.

        It may be cancelled at any moment, and is called again while the job is pending: after a
        failure that passes, after a restart, and after an owner or time has changed the state.

        Args:
            job: as it was when its turn came.
            on_progress: to be called when part of the work is done: pauses begin short again.

        Raises:
            Exception: ``failure_of`` decides what it means.
            IllegalTransition: the job was ended meanwhile.
        """

    @abstractmethod
    def failure_of(self, error: Exception) -> Failure | None:
        """Why the job fails of an error; None if it is tried again."""

    @abstractmethod
    async def when_due(self, job: J, now: float) -> J:
        """Change a job whose ``due_at`` is over; the job as it is then."""

    @abstractmethod
    async def clean_up(self, job: J) -> None:
        """Put away what a deleted or ended job has left. It is done again after a crash."""

    @abstractmethod
    async def recover(self, known: Collection[str]) -> None:
        """After a start, remove the files of all ids but these, and take up what was kept.

        Raises:
            RequestError: the disk is full: to be called again.
        """

    async def look_after(self) -> None:
        """Do what is to be done once a second."""

    def let_go(self, job_id: str) -> None:
        """Keep nothing for a job that was ended or deleted."""
