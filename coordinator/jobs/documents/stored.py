"""A document's blocks in the store: whether they are there, who keeps them, when they may go."""

import logging

import msgspec

from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.identity import DTYPE_CHANGED
from coordinator.jobs.documents.parts import DocumentParts
from coordinator.jobs.documents.states import DocumentEvent, DocumentState
from coordinator.jobs.engine.job import Notice
from protocol.errors import IllegalTransition, RequestError

_log = logging.getLogger(__name__)


async def check_blocks(parts: DocumentParts, document: Document) -> Document:
    """The document, evicted or damaged if blocks of it are gone.

    What was made otherwise than the model is served now is left as it is: its blocks cannot be
    seen, and may be there when it is served as before.
    """
    tokens, ingestor = parts.tokens, parts.ingestor
    reason = tokens.mismatch(document)
    if document.state is not DocumentState.READY or not ingestor.is_ready:
        return document
    if reason not in (None, DTYPE_CHANGED):
        return document
    hashes = (await tokens.prompt(document)).block_hashes
    num_stored = ingestor.num_stored_blocks(hashes)
    if num_stored < len(hashes):
        if reason is not None:
            return document
        missed = (len(hashes) - num_stored) * parts.block_size
        return await _evict(parts, document, missed, ingestor.has_damaged(hashes[num_stored:]))
    if reason is None:
        return document
    # All of it is stored in the dtype that is served, too: it was made in that one before.
    dtype = tokens.facts.kv_dtype
    return await parts.table.change(
        document.id, lambda found: msgspec.structs.replace(found, kv_dtype=dtype)
    )


async def _evict(
    parts: DocumentParts, document: Document, missed: int, is_damaged: bool
) -> Document:
    level = logging.ERROR if is_damaged else logging.INFO
    lost = "are damaged on the disk" if is_damaged else "were evicted"
    _log.log(level, "%s: %d tokens %s", document.id, missed, lost)
    reason = "expired" if document.pin.has_expired else "evicted"
    event = DocumentEvent.DAMAGE if is_damaged else DocumentEvent.EVICT
    warning = {
        "code": "damaged" if is_damaged else reason,
        "message": "its KV has gone",
        "missed_tokens": missed,
    }
    try:
        return await parts.table.change(
            document.id, lambda found: found.after(event), Notice("warning", warning)
        )
    except (IllegalTransition, RequestError) as error:  # it was faster, or is deleted
        _log.info("%s: %s", document.id, error)
        return document


async def tell_pin(parts: DocumentParts, document: Document) -> None:
    """Have the ingestor keep what the document's pin says, from now on."""
    if not document.pin.is_set or not parts.tokens.is_current(document):
        parts.ingestor.unpin(document.id)
        return
    prompt = await parts.tokens.prompt(document)
    parts.ingestor.pin(document.id, prompt.block_hashes, document.pin.mode)


async def forget_blocks(parts: DocumentParts, document: Document) -> None:
    """Drop the blocks of a deleted document that no other document shares."""
    tokens = parts.tokens
    if not document.first_hash or not tokens.has_tokens(document):
        return
    try:
        hashes = (await tokens.prompt(document)).block_hashes
    except RequestError as error:  # without its tokens nobody can name its blocks
        _log.warning("%s: %s", document.id, error)
        return
    num_shared = 0  # the hashes are chained: what two documents share is a common beginning
    for other in await parts.table.select("first_hash = ?", document.first_hash):
        if tokens.has_tokens(other):
            theirs = (await tokens.prompt(other)).block_hashes
            num_shared = max(num_shared, _num_common(hashes, theirs))
    await parts.ingestor.forget(hashes[num_shared:])


def _num_common(hashes: tuple[bytes, ...], others: tuple[bytes, ...]) -> int:
    for number, (own, other) in enumerate(zip(hashes, others, strict=False)):
        if own != other:
            return number
    return min(len(hashes), len(others))
