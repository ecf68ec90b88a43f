"""Who is asking: API keys, each of which is a tenant with a cache of its own.

Everything needs a key but the few paths named here, and what is not recognised needs one too. Keys
are kept as SHA-256 and compared in constant time; an unknown key and a missing one are told apart
by their code, a known one is never shown again but by its last four characters.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import RequestError

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
ANYBODY = "default"  # the one tenant of a cluster without keys
SCOPE_TENANT = "baton.tenant"
_CLIENT_SALT = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """The holder of one key. ``salt`` is part of every block hash, so nobody else hits its KV."""

    name: str
    salt: str

    def cache_salt(self, client_salt: str | None) -> str:
        """The tenant's salt, with what the caller adds mixed in.

        Raises:
            RequestError: ``client_salt`` is not 1 to 64 letters, digits, ``_`` or ``-``.
        """
        if client_salt is None:
            return self.salt
        if not _CLIENT_SALT.fullmatch(client_salt):
            raise RequestError(
                "cache_salt must be 1 to 64 letters, digits, '_' or '-'",
                code="invalid_value",
                param="cache_salt",
            )
        return _keyed_hash(self.salt, client_salt)


def _keyed_hash(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()[:32]


class Tenants:
    """All keys of the cluster.

    Args:
        api_keys: the keys; without any, everybody is one tenant.
        secret: of this cluster, keeps the salts from being guessed.
    """

    def __init__(self, api_keys: Iterable[str], secret: str) -> None:
        self._secret = secret
        self._by_hash: dict[bytes, Tenant] = {}
        self.replace(api_keys)
        self._anybody = Tenant(ANYBODY, _keyed_hash(secret, ANYBODY))

    def replace(self, api_keys: Iterable[str]) -> tuple[int, int]:
        """Know these keys and no others from now on; (how many are new, how many are gone).

        Whose they are does not change: a tenant's name and salt come from its key alone.
        """
        by_hash = {}
        for key in api_keys:
            digest = hashlib.sha256(key.encode()).digest()
            name = f"key-{digest.hex()[:12]}"
            by_hash[digest] = Tenant(name, _keyed_hash(self._secret, name))
        num_new, num_gone = len(by_hash.keys() - self._by_hash), len(self._by_hash.keys() - by_hash)
        self._by_hash = by_hash
        return num_new, num_gone

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._by_hash)

    @property
    def has_keys(self) -> bool:
        return bool(self._by_hash)

    def named(self, name: str) -> Tenant | None:
        """The tenant of that name, while it has a key."""
        if not self._by_hash:
            return self._anybody if name == ANYBODY else None
        return next((tenant for tenant in self._by_hash.values() if tenant.name == name), None)

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Tenant:
        """The tenant that a request's headers show.

        Raises:
            RequestError: no key (401), an unknown one (401) or two (400).
        """
        if not self._by_hash:
            return self._anybody
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) > 1:
            raise RequestError("more than one Authorization header", code="duplicate_authorization")
        scheme, _, key = given[0].partition(b" ") if given else (b"", b"", b"")
        if scheme.lower() != b"bearer":
            raise RequestError(
                "an API key is needed: send 'Authorization: Bearer KEY'",
                code="missing_api_key",
                status=401,
            )
        digest = hashlib.sha256(key).digest()
        found = [t for h, t in self._by_hash.items() if hmac.compare_digest(h, digest)]
        if not found:
            raise RequestError("this API key is not known", code="invalid_api_key", status=401)
        return found[0]
