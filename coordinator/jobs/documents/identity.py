"""What made a document's tokens and its KV, against what is served now. Pure.

Tokens are of a model's vocabulary, a tokenizer and, in a chat, a template; their KV is of the same
model, in blocks of a size, in a dtype. Each is recorded with the document, so that what is served
otherwise after a restart is told by its name, and what is served as before is as before.
"""

from dataclasses import dataclass

from coordinator.jobs.documents.document import CHAT, Document
from coordinator.text.tokenizing import TextIdentity

MODEL_CHANGED, VERSION_CHANGED = "model_changed", "version_changed"
TOKENIZER_CHANGED, TEMPLATE_CHANGED = "tokenizer_changed", "template_changed"
BLOCK_SIZE_CHANGED, DTYPE_CHANGED = "block_size_changed", "dtype_changed"
OF_TOKENS = frozenset({MODEL_CHANGED, VERSION_CHANGED, TOKENIZER_CHANGED, TEMPLATE_CHANGED})
MISMATCHED = "mismatched"  # shown as the status of a ready document that was made otherwise
_TOLD = {
    MODEL_CHANGED: "it was made for another model than is served now",
    VERSION_CHANGED: "it was made by an earlier version, which has not recorded with what",
    TOKENIZER_CHANGED: "it was made with another tokenizer than is used now",
    TEMPLATE_CHANGED: "it was made with another chat template than is used now",
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model that is served now, and how."""

    name: str
    fingerprint: str
    block_size: int
    kv_dtype: str
    text: TextIdentity


def mismatch(document: Document, facts: ModelFacts) -> str | None:
    """The first thing that is not as when the document was made; None when everything is."""
    is_text = document.kind != "token_ids"  # ids are the caller's own, whatever the tokenizer
    if document.fingerprint != facts.fingerprint:
        return MODEL_CHANGED
    if is_text and not document.tokenizer:
        return VERSION_CHANGED
    if is_text and document.tokenizer != facts.text.tokenizer:
        return TOKENIZER_CHANGED
    if is_text and document.form == CHAT and document.template != facts.text.template:
        return TEMPLATE_CHANGED
    if document.block_size != facts.block_size:
        return BLOCK_SIZE_CHANGED
    if document.kv_dtype not in ("", facts.kv_dtype):
        return DTYPE_CHANGED
    return None


def explain(document: Document, reason: str, facts: ModelFacts) -> str:
    """A mismatch in words."""
    told = _TOLD.get(reason)
    if reason == BLOCK_SIZE_CHANGED:
        told = f"its KV is in blocks of {document.block_size} tokens, not {facts.block_size}"
    elif reason == DTYPE_CHANGED:
        told = f"its KV is in {document.kv_dtype}, not {facts.kv_dtype}"
    return (
        f"{told}: not usable as configured, so questions compute it anew; rewarm it, or serve as "
        f"before"
    )
