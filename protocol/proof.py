"""Proofs that a process has the cluster's token, which itself is never sent.

Every use has a label of its own, with a version, so that a proof made for one use is of no use for
another. A process with the token is trusted with everything.
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
