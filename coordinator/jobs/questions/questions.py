"""A request that names a document, which must be the caller's and usable.

How its prompt is made then, and what is told of a miss, is in prompts.py.
"""

from coordinator.jobs.documents.document import TEXT, Document
from coordinator.jobs.documents.document_tokens import model_changed
from coordinator.jobs.documents.documents import Documents
from coordinator.jobs.documents.identity import MODEL_CHANGED, OF_TOKENS
from coordinator.jobs.documents.states import USABLE, DocumentState
from coordinator.jobs.questions.prompts import Attached, Opened
from protocol.errors import RequestError

EVICTED, EXPIRED, DAMAGED = "evicted", "expired", "damaged"


async def open_document(
    documents: Documents, tenant: str, document_id: str, form: str, param: str
) -> Opened:
    """A document for a question in ``form``.

    Raises:
        RequestError: it is not the tenant's (404), not ready (409), or cannot be used so (400).
    """
    try:
        document = await documents.table.get(tenant, document_id)
    except RequestError as error:
        error.param = param
        raise
    _check_usable(document, param)
    if form == TEXT and document.kind == "messages":
        raise RequestError(
            "this document was made of messages: ask about it in /v1/chat/completions",
            code="document_form",
            param=param,
        )
    block_size = documents.tokens.facts.block_size  # of what can be found now
    document = await documents.checked(document)
    missing = documents.tokens.mismatch(document)
    if document.kind == "token_ids" and missing == MODEL_CHANGED:
        raise model_changed()
    attached = Attached(
        document_id=document.id,
        cache_salt=document.cache_salt,
        num_promised=document.num_tokens // block_size * block_size,
        likely=_likely(document),
        missing=missing,
    )
    await documents.touch(document)
    return Opened(str(documents.folder), document, attached, missing not in OF_TOKENS)


def _likely(document: Document) -> str:
    """Why blocks may be missing that should be there."""
    if document.state is DocumentState.DAMAGED:
        return DAMAGED
    return EXPIRED if document.pin.has_expired else EVICTED


def _check_usable(document: Document, param: str) -> None:
    if document.state in USABLE:
        return
    if document.is_pending:
        raise RequestError(
            f"the document is {document.state.value}: wait for it with "
            f"GET /v1/documents/{document.id}?wait=60",
            code="document_not_ready",
            param=param,
            status=409,
        )
    why = ""
    if document.state is DocumentState.FAILED and document.error is not None:
        why = f" ({document.error.message})"
    raise RequestError(
        f"the document is {document.state.value}{why}: resume it, or ingest it again",
        code="document_not_usable",
        param=param,
    )
