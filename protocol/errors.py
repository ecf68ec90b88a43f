"""The exception tree, split by whose fault it is.

BatonError
|-- ConfigError         the operator's: a flag, a file, a checkpoint. One line, exit code 2.
|-- RequestError        the caller's: the only error that a request's content may cause.
|-- PeerError           another process's
|   |-- TransferError   bytes could not be moved
|   |-- StaleError      a message of an older attempt, epoch or generation
|   `-- VersionError    another protocol version, model or layout
`-- IllegalTransition   ours: a state machine was asked for what its table does not have
"""


class BatonError(Exception):
    """The root: catches everything that Baton raises on purpose."""


class ConfigError(BatonError, ValueError):
    """The cluster cannot run as configured. The message says what, where and what to do."""


class RequestError(BatonError):
    """One request is refused or has failed; everything else goes on.

    Args:
        message: what is wrong and the way out, for the caller to read.
        code: a stable string for programs, such as ``context_length_exceeded``.
        param: the field of the request at fault, if one is.
        status: the HTTP status that carries it.
        retry_after_s: when it may be tried again, if that is known; at least 1.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        param: str | None = None,
        status: int = 400,
        retry_after_s: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.status = status
        self.retry_after_s = retry_after_s


class PeerError(BatonError):
    """Another process failed us."""


class TransferError(PeerError):
    """A KV transfer did not complete; nothing of it may be used."""


class StaleError(PeerError):
    """A message of an older attempt, epoch or generation; it is dropped and counted."""


class VersionError(PeerError):
    """The peer speaks another protocol version, or serves another model or layout."""


class IllegalTransition(BatonError):
    """A state machine refused an event; its state is unchanged."""
