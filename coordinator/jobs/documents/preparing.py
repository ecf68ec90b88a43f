"""From a document's source to its tokens, on the disk and in the database.

An uploaded file is read in a process of its own. When that dies, once is taken to be bad luck; a
file that has killed it as often as is allowed is quarantined.
"""

import asyncio
import logging

import msgspec

from coordinator.jobs.documents.document import Document, check_size
from coordinator.jobs.documents.document_files import file_names
from coordinator.jobs.documents.parts import DocumentParts
from coordinator.jobs.engine.job import Notice
from coordinator.jobs.files.folder import finished
from coordinator.jobs.parsing.process import ParserCrashed, extract
from protocol.errors import RequestError
from protocol.process.failpoints import PARSE

_log = logging.getLogger(__name__)


async def prepare(parts: DocumentParts, document: Document) -> Document:
    """The document with its tokens.

    Raises:
        RequestError: it has none that can be computed.
    """
    tokens, facts, table = parts.tokens, parts.tokens.facts, parts.table
    if tokens.is_current(document):
        check_size(document.num_tokens, parts.max_tokens())
        return document
    source, text, _ = file_names(document.id)
    if document.kind == "file" and not (parts.files / text).exists():
        await _parse(parts, document)
    if document.num_tokens and not tokens.has_tokens(document) and document.kind != "token_ids":
        # Whoever dies before the record says whose the tokens are that are written next must
        # not find them under the name of those before.
        document = await table.change(
            document.id, lambda found: msgspec.structs.replace(found, num_tokens=0, first_hash="")
        )
    encoding = await tokens.encode(document, parts.max_tokens())
    parts.files.remove(source)
    hashes = encoding.prompt.block_hashes
    values = {
        "model": facts.name,
        "fingerprint": facts.fingerprint,
        "block_size": facts.block_size,
        "num_tokens": len(encoding.prompt.token_ids),
        "first_hash": hashes[0].hex() if hashes else "",
        "kv_dtype": facts.kv_dtype,
        "tokenizer": "" if document.kind == "token_ids" else facts.text.tokenizer,
        "template": facts.text.template if encoding.shown else "",
        "shown": encoding.shown,
    }
    return await table.change(
        document.id,
        lambda found: msgspec.structs.replace(found, **values),
        *map(_varies, encoding.varies_with),
    )


async def _parse(parts: DocumentParts, document: Document) -> None:
    source, text, _ = file_names(document.id)
    new = parts.files.new(text)
    while True:
        await parts.crash_points.pass_by(PARSE)
        try:
            warnings = await extract(
                parts.files / source, new, document.media_type, parts.limits, document.charset
            )
        except ParserCrashed as error:
            document = await _crashed(parts, document.id, error)
            continue
        await finished(asyncio.to_thread(parts.files.adopt, new, text))
        if warnings:
            doubts = [_warning("doubtful_text", message) for message in warnings]
            await parts.table.change(document.id, lambda found: found, *doubts)
        return


async def _crashed(parts: DocumentParts, document_id: str, error: ParserCrashed) -> Document:
    """Count a death of the parser; the document if it may be tried again."""
    _log.warning("%s: the parser crashed: %s", document_id, error)
    document = await parts.table.change(
        document_id,
        lambda found: msgspec.structs.replace(found, num_parse_crashes=found.num_parse_crashes + 1),
        _warning("parser_crashed", f"the parser died: {error}"),
    )
    if document.num_parse_crashes >= parts.limits.parse_attempts:
        raise RequestError(
            f"reading this file has killed the parser {document.num_parse_crashes} times: {error}",
            code="quarantined",
            param="source",
            status=422,
        ) from error
    return document


def _varies(what: str) -> Notice:
    return _warning(
        "varying_prefix",
        f"the model's chat template shows the text up to the document's end otherwise depending on "
        f"{what}: a question for which it differs from that of the ingestion is computed from the "
        f"document's text, and says prefix_changed",
    )


def _warning(code: str, message: str) -> Notice:
    return Notice("warning", {"code": code, "message": message})
