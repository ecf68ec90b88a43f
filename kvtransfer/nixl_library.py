"""What everything that uses NIXL has to know of its Python binding."""

import logging

import nixl._bindings as nixl_errors

NIXL_ERRORS = (
    nixl_errors.nixlBackendError,
    nixl_errors.nixlCancelledError,
    nixl_errors.nixlInvalidParamError,
    nixl_errors.nixlMismatchError,
    nixl_errors.nixlNotAllowedError,
    nixl_errors.nixlNotFoundError,
    nixl_errors.nixlNotPostedError,
    nixl_errors.nixlNotSupportedError,
    nixl_errors.nixlRemoteDisconnectError,
    nixl_errors.nixlRepostActiveError,
    nixl_errors.nixlUnknownError,
)


def route_library_log() -> None:
    """Put NIXL's Python log under ours; it would print to standard output, from INFO on."""
    library = logging.getLogger("nixl")
    library.handlers.clear()
    library.propagate = True
    library.setLevel(logging.WARNING)
