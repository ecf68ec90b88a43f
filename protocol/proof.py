"""What is derived from the cluster's token: the token itself never travels.

Every use has a label of its own, with the version of what it proves, so that a proof made for one
is of no use for another. Whoever holds the token is trusted with everything.
"""

import hashlib
import hmac

PROOF_BYTES = hashlib.sha256().digest_size


def prove(token: str, label: str, *parts: bytes) -> bytes:
    """HMAC-SHA256 under the token, ``PROOF_BYTES`` long, over the label and each part.

    Compare it with :func:`hmac.compare_digest`. Each part goes in with its length, so that bytes
    cannot move from one to the next.
    """
    message = b"".join(len(part).to_bytes(8, "little") + part for part in (label.encode(), *parts))
    return hmac.digest(token.encode(), message, hashlib.sha256)
