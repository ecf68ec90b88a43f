"""From a document's source to its tokens, on the disk and in the database.

An uploaded file is read in a process of its own. When that dies, once is taken to be bad luck; a
file that has killed it as often as is allowed is quarantined.
"""

import logging
from collections.abc import Callable, Sequence

import msgspec

from coordinator.config import JobLimits
from coordinator.jobs.documents.document import Change, Document, DocumentNotice
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.files import SOURCE, TEXT, DocumentFiles
from coordinator.jobs.documents.sizes import check_size
from coordinator.jobs.documents.table import DocumentTable
from coordinator.jobs.parsing.process import ParserCrashed, extract
from protocol.crash_points import CrashPoints
from protocol.errors import RequestError

_log = logging.getLogger(__name__)


class Preparing:
    """Makes tokens.

    Args:
        table: of the documents.
        files: of the documents.
        tokens: encodes.
        limits: of the process that reads files.
        max_tokens: of the largest document that can be asked about now.
        crash_points: told of what becomes durable.
    """

    def __init__(
        self,
        table: DocumentTable,
        files: DocumentFiles,
        tokens: DocumentTokens,
        limits: JobLimits,
        max_tokens: Callable[[], int],
        crash_points: CrashPoints,
    ) -> None:
        self.tokens = tokens
        self.crash_points = crash_points
        self._table = table
        self._files = files
        self._limits = limits
        self._max_tokens = max_tokens

    async def prepare(self, document: Document) -> Document:
        """The document with its tokens.

        Raises:
            RequestError: it has none that can be computed.
        """
        if self.tokens.is_current(document):
            check_size(document.num_tokens, self._max_tokens())
            return document
        if document.kind == "file" and not self._files.has(document.document_id, TEXT):
            await self._parse(document)
        if document.num_tokens and not self.tokens.has_tokens(document):
            # Whoever dies before the record says whose the tokens are that are written next must
            # not find them under the name of those before.
            document = await self._table.change(document.document_id, _without_tokens)
        encoding = await self.tokens.encode(document, self._max_tokens())
        prompt = encoding.prompt
        self._files.remove(document.document_id, SOURCE)
        facts = self.tokens.facts
        values = {
            "model": facts.name,
            "fingerprint": facts.fingerprint,
            "block_size": facts.block_size,
            "num_tokens": len(prompt.token_ids),
            "first_hash": prompt.block_hashes[0].hex() if prompt.block_hashes else "",
            "kv_dtype": facts.kv_dtype,
            "tokenizer": "" if document.kind == "token_ids" else facts.text.tokenizer,
            "template": facts.text.template if encoding.shown else "",
            "shown": encoding.shown,
        }
        events = tuple(_varies(what) for what in encoding.varies_with)
        return await self._table.change(
            document.document_id,
            lambda found: Change(msgspec.structs.replace(found, **values), events),
        )

    async def _parse(self, document: Document) -> None:
        document_id = document.document_id
        source = self._files.path(document_id, SOURCE)
        while True:
            try:
                text = self._files.path(document_id, TEXT)
                warnings = await extract(
                    *(source, text, document.media_type, self._limits, self.crash_points),
                    charset=document.charset,
                )
                if warnings:
                    await self._table.change(document_id, _doubted(warnings))
                return
            except ParserCrashed as error:
                _log.warning("%s: the parser crashed: %s", document_id, error)
                document = await self._table.change(document_id, _crashed(str(error)))
                if document.num_parse_crashes >= self._limits.parse_attempts:
                    raise RequestError(
                        f"reading this file has killed the parser "
                        f"{document.num_parse_crashes} times: {error}",
                        code="quarantined",
                        param="source",
                        status=422,
                    ) from error


def _without_tokens(document: Document) -> Change:
    if document.kind == "token_ids":
        return Change(document)
    return Change(msgspec.structs.replace(document, num_tokens=0, first_hash=""))


def _varies(what: str) -> DocumentNotice:
    message = (
        f"the model's chat template shows the text up to the document's end otherwise depending on "
        f"{what}: a question for which it differs from that of the ingestion is computed from the "
        f"document's text, and says prefix_changed"
    )
    return DocumentNotice("warning", {"code": "varying_prefix", "message": message})


def _doubted(warnings: Sequence[str]) -> Callable[[Document], Change]:
    events = tuple(
        DocumentNotice("warning", {"code": "doubtful_text", "message": m}) for m in warnings
    )
    return lambda document: Change(document, events)


def _crashed(how: str) -> Callable[[Document], Change]:
    warning = DocumentNotice(
        "warning", {"code": "parser_crashed", "message": f"the parser died: {how}"}
    )

    def work(document: Document) -> Change:
        number = document.num_parse_crashes + 1
        return Change(msgspec.structs.replace(document, num_parse_crashes=number), (warning,))

    return work
