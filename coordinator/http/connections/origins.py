"""Which pages of a browser may use this server. Pure; CORS is Starlette's.

A server without keys trusts whoever reaches it, and a browser on this machine reaches it for every
page that it shows. So without keys

- the Host header must name this machine: a page whose own name was pointed at 127.0.0.1 (DNS
  rebinding) is told so with 403 ``host_not_allowed``;
- a request that may change something must come from no other page: 403 ``origin_not_allowed``. What
  another page only reads, the browser does not show it.

With keys neither is asked: a page has no key but what it was given. ``--cors-origin`` names pages
that may use the server from elsewhere, with and without keys; no cookies or other credentials that
a browser adds by itself are ever taken.
"""

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from coordinator.config import is_loopback
from protocol.errors import RequestError

CORS: dict[str, Any] = {
    "allow_methods": ("GET", "POST", "DELETE"),
    "allow_headers": ("*",),
    "expose_headers": ("x-request-id", "x-baton-path", "retry-after"),
    "allow_credentials": False,
}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES = ("same-origin", "none")  # of Sec-Fetch-Site: the page's own, and the address bar


def host_name(host: str) -> str:
    """The name in a Host header or a URL's authority, without its port; "" if it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:  # a bracket that is not closed
        return ""


class Origins:
    """What a server without keys accepts. Pure.

    Args:
        hosts: names that it has beside those of the loopback.
        origins: of pages elsewhere that may use it, ``https://NAME[:PORT]``.
    """

    def __init__(self, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._hosts = frozenset(host.lower().strip("[]").rstrip(".") for host in hosts)
        self._origins = frozenset(origins)

    def check(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Check one request.

        Raises:
            RequestError: 403, it is for another name, or comes from another page.
        """
        headers = list(headers)
        hosts = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
        for host in hosts:  # HTTP/1.0 need not have one; no browser speaks that
            name = host_name(host)
            if not (is_loopback(name) or (name and name in self._hosts)):
                raise RequestError(
                    f"this server does not answer to the name {host[:64]!r}: start it with "
                    f"--allowed-host NAME, or with --api-key",
                    code="host_not_allowed",
                    status=403,
                )
        if method not in _READING:
            self._check_origin(headers, hosts)

    def _check_origin(self, headers: list[tuple[bytes, bytes]], hosts: list[str]) -> None:
        given = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        sites = [value.decode("latin-1") for name, value in headers if name == b"sec-fetch-site"]
        if given and all(origin in self._origins for origin in given):
            return
        is_own = all(urlsplit(origin).netloc.lower() in hosts for origin in given)
        if not is_own or any(site not in _OWN_SITES for site in sites):
            raise RequestError(
                "another page may not use this server: start it with --cors-origin ORIGIN, or "
                "with --api-key",
                code="origin_not_allowed",
                status=403,
            )
