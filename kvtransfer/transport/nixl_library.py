"""What everything that uses NIXL has to know of its Python binding."""

import contextlib
import ctypes
import logging
import os
import socket
import struct

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

# A classic BPF program: pass a datagram unless its length is 0.
# (code, jump if true, jump if false, value) each: load the length; if it is 0 ...; drop; pass.
_PROGRAM = ((0x80, 0, 0, 0), (0x15, 0, 1, 0), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
_HAS_BYTES = b"".join(struct.pack("HBBI", *line) for line in _PROGRAM)
_SO_ATTACH_FILTER = 26


def guard_wakeups() -> None:
    """Have UCX's wake-up sockets of this process drop empty datagrams.

    In shared memory UCX wakes a reader by a byte to a datagram socket in the abstract namespace,
    where any user of the machine can send to it. Bytes do no harm; an empty datagram it takes for
    a broken connection, and ends the process ("failed to arm iface").
    """
    program = ctypes.create_string_buffer(_HAS_BYTES, len(_HAS_BYTES))
    attached = struct.pack("HP", len(_PROGRAM), ctypes.addressof(program))
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket, or closed meanwhile
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                is_waker = (copy.family, copy.type) == (socket.AF_UNIX, socket.SOCK_DGRAM)
                if is_waker and isinstance(copy.getsockname(), bytes):  # an abstract name
                    copy.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)


def route_library_log() -> None:
    """Put NIXL's Python log under ours; it would print to standard output, from INFO on."""
    library = logging.getLogger("nixl")
    library.handlers.clear()
    library.propagate = True
    library.setLevel(logging.WARNING)
