"""What a caller may send to ``/v1/documents``; a text worker makes our own types of it."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from coordinator.config import JobLimits, Limits
from coordinator.errors import invalid_value
from coordinator.jobs.documents.document import CHAT, TEXT, Document, Pin, SystemMessage, new_id
from coordinator.jobs.documents.pins import read_duration, read_pin
from coordinator.jobs.engine.table import Idempotency
from coordinator.jobs.parsing.formats import HEAD_BYTES, identify, plain_name, unprocessable
from coordinator.text.tasks import Asked, NeedsFile, ReadDocument, Uploaded
from coordinator.validation.chat_body import read_messages
from coordinator.validation.json_body import parse_json
from coordinator.validation.parameters import check_model, check_token_ids
from coordinator.validation.reading import Reading
from coordinator.validation.schemas import TokenIdList, validate
from protocol.errors import RequestError

RING_SIZES = {"auto": 0, **{str(size): size for size in (1, 2, 4, 8, 16, 32, 64)}}
MAX_SYSTEM_CHARS = 1 << 18
MAX_METADATA_KEYS = 64
MAX_NAME_CHARS = 512
ONE_SOURCE = "source needs one of text, messages, token_ids and file_id"

# No other server has these routes, so no client sends fields for another: one that is not known is
# misspelt.
_OURS = ConfigDict(strict=True, extra="forbid")
_Ttl = Annotated[float, Field(gt=0)] | str


class SourceBody(BaseModel):
    model_config = _OURS

    type: str | None = None  # what it is, said once more: ignored
    text: str | None = None
    messages: Any = None
    token_ids: TokenIdList | None = None
    file_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class PinBody(BaseModel):
    model_config = _OURS

    mode: Literal["none", "soft", "hard"]
    ttl: _Ttl | None = None
    tier: str | None = None
    sliding: bool | None = None


class UpdateBody(BaseModel):
    model_config = _OURS

    pin: PinBody | None = None
    metadata: dict[str, Any] | None = None


class DocumentBody(UpdateBody):
    """Of a POST; a multipart upload has the same fields, but for the source."""

    model: str | None = None
    source: SourceBody | None = None
    form: Literal["chat", "text"] | None = None
    display_name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    priority: int | None = None
    deadline: _Ttl | None = None
    cp: str | int | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None


def read_document(
    reading: Reading, task: ReadDocument, fields: dict[str, Any]
) -> Asked | NeedsFile:
    """A document as it was asked for, checked; its file first, if that has not been found.

    Raises:
        RequestError: naming the field at fault.
    """
    body, uploaded, limits = validate(DocumentBody, fields), task.uploaded, reading.config.jobs
    check_model(reading.config, body.model)
    if body.source is not None and body.source.file_id is not None and uploaded is None:
        if len(body.source.model_dump(exclude={"type"}, exclude_none=True)) > 1:
            raise invalid_value("source", ONE_SOURCE)
        return NeedsFile(body.source.file_id)
    source = _source(reading, body, uploaded)
    form = body.form or CHAT
    if form == TEXT and source.kind == "messages":
        raise invalid_value("form", "form: a document made of messages is of form 'chat'")
    name = plain_name(uploaded.file_name) if uploaded is not None else ""
    charset = uploaded.charset if uploaded is not None else ""
    salt = task.tenant.cache_salt(None)
    document = Document(
        id=new_id(),
        tenant=task.tenant.name,
        cache_salt=salt,
        created_at=task.now,
        kind=source.kind,
        media_type="text/plain" if uploaded is None else _media_type(name, uploaded),
        charset=charset,
        file_name=name,
        form=form,
        system=source.system,
        display_name=body.display_name or name,
        metadata=check_metadata(body.metadata or {}, reading.limits.max_label_chars),
        priority=_priority(body.priority or 0, limits),
        deadline=_deadline(body.deadline, task.now),
        ring_size=_ring_size(body.cp),
        pin=Pin() if body.pin is None else as_pin(body.pin, limits, task.tiers),
        model=reading.config.model_name,
        fingerprint=reading.model.fingerprint,
    )
    idempotency = _idempotency(body, source, (name, charset), task.header_key)
    text = None if source.text is None else memoryview(source.text)
    prompt = reading.packed(source.token_ids, salt) if source.token_ids else None
    return Asked(document, idempotency, text, prompt)


def as_pin(body: PinBody, limits: JobLimits, tiers: tuple[str, ...]) -> Pin:
    """A pin as it was asked for."""
    return read_pin(body.mode, body.ttl, body.tier, body.sliding, limits, tiers)


def check_metadata(metadata: dict[str, Any], max_chars: int) -> dict[str, Any]:
    """Metadata of a size that can be kept.

    Raises:
        RequestError: it is too large.
    """
    is_large = any(len(k) + len(json.dumps(v)) > max_chars for k, v in metadata.items())
    if len(metadata) > MAX_METADATA_KEYS or is_large:
        raise invalid_value(
            "metadata",
            f"metadata has at most {MAX_METADATA_KEYS} keys of {max_chars} characters each",
        )
    return metadata


@dataclass(frozen=True, slots=True)
class _Source:
    """What a document is made of: UTF-8, token ids or a file."""

    kind: str
    text: bytes | None = None
    token_ids: Sequence[int] = ()
    path: Path | None = None
    system: tuple[SystemMessage, ...] = ()


def _source(reading: Reading, body: DocumentBody, uploaded: Uploaded | None) -> _Source:
    if uploaded is not None:
        return _Source("file", path=Path(uploaded.path))
    given = body.source or SourceBody()
    kinds = [name for name in ("text", "messages", "token_ids") if getattr(given, name) is not None]
    if len(kinds) != 1:
        raise invalid_value("source", ONE_SOURCE)
    if given.token_ids is not None:
        token_ids = check_token_ids("source", given.token_ids, reading.model.vocab_size)
        if not token_ids:
            raise unprocessable("the document is empty: it has no tokens")
        return _Source("token_ids", token_ids=token_ids)
    if given.messages is not None:
        text, system = _messages(reading, given.messages)
        return _Source("messages", _utf8(text), system=system)
    return _Source("text", _utf8(given.text or ""))


def _messages(reading: Reading, given: Any) -> tuple[str, tuple[SystemMessage, ...]]:  # noqa: ANN401 - a caller's JSON value
    try:
        *before, last = read_messages(reading, given)
    except RequestError as error:
        error.param = "source"
        raise
    is_document = last["role"] == "user" and set(last) == {"role", "content"}
    if not is_document or any(m["role"] not in ("system", "developer") for m in before):
        raise invalid_value(
            "source", "source.messages are system messages and one user message: the document"
        )
    if sum(len(message["content"]) for message in before) > MAX_SYSTEM_CHARS:
        raise invalid_value("source", f"system messages have at most {MAX_SYSTEM_CHARS} characters")
    return last["content"], tuple(SystemMessage(m["role"], m["content"]) for m in before)


def _utf8(text: str) -> bytes:
    if not text:
        raise unprocessable("the document is empty: 0 bytes")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "the text has half a surrogate pair", code="invalid_unicode", param="source"
        ) from error


def _media_type(name: str, uploaded: Uploaded) -> str:
    path = Path(uploaded.path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        return identify(name, head, path.stat().st_size, uploaded.media_type)
    except FileNotFoundError as error:  # deleted in this moment
        raise RequestError(
            "no such file", code="file_not_found", param="source", status=404
        ) from error


def _priority(priority: int, limits: JobLimits) -> int:
    if abs(priority) > limits.max_priority:
        raise invalid_value("priority", f"priority is from -{limits.max_priority} to its opposite")
    return priority


def _deadline(given: str | float | None, now: float) -> float | None:
    """Unix time, or a duration from now on."""
    if given is None:
        return None
    if isinstance(given, str):
        return now + read_duration(given, "deadline")
    if given <= now:
        raise invalid_value(
            "deadline", "deadline is Unix time, and has passed; or a text such as '2h'"
        )
    return float(given)


def _ring_size(given: str | int | None) -> int:
    size = RING_SIZES.get("auto" if given is None else str(given))
    if size is None or isinstance(given, bool):
        raise invalid_value("cp", f"cp is one of {', '.join(RING_SIZES)}")
    return size


def _idempotency(
    body: DocumentBody, source: _Source, named: tuple[str, str], header: str | None
) -> Idempotency | None:
    """Of a request that brings a key; ``named`` is its file's name, and the charset if it has."""
    if header is not None and body.idempotency_key not in (None, header):
        raise invalid_value("idempotency_key", "Idempotency-Key and idempotency_key differ")
    key = header or body.idempotency_key
    if key is None:
        return None
    check_idempotency_key(key)
    digest = hashlib.sha256()
    asked = body.model_dump(exclude={"source", "idempotency_key"}, exclude_none=True)
    asked["file_name"], charset = named
    if charset:
        asked["charset"] = charset
    asked["messages"] = None if body.source is None else body.source.messages
    digest.update(json.dumps(asked, sort_keys=True).encode("utf-8", "surrogatepass"))
    for piece in _contents(source):
        digest.update(piece)
    return Idempotency(key, digest.digest())


def check_idempotency_key(key: str) -> None:
    """Raises RequestError if a caller may not use such a key."""
    if not key.isprintable() or not 0 < len(key) <= 256:
        raise invalid_value(
            "idempotency_key", "an idempotency key is 1 to 256 printable characters"
        )


def _contents(source: _Source) -> Sequence[bytes]:
    if source.path is not None:
        with source.path.open("rb") as file:
            return (b"file", hashlib.file_digest(file, "sha256").digest())
    if source.text is not None:
        return (b"text", source.text)
    return (b"tokens", json.dumps(tuple(source.token_ids)).encode())


def fields_of_form(form: Mapping[str, str], limits: Limits) -> dict[str, Any]:
    """The fields of a multipart upload as the JSON body has them.

    Raises:
        RequestError: one that must be JSON is none, by the same rules as a body.
    """
    fields: dict[str, Any] = dict(form)
    for name in ("pin", "metadata"):
        if name in fields:
            fields[name] = _json_of(name, form[name], limits)
    for name in ("priority", "deadline"):
        text = fields.get(name, "")
        if re.fullmatch(r"-?[0-9]{1,15}", text):
            fields[name] = int(text)
        elif name == "deadline" and re.fullmatch(r"[0-9]{1,15}\.[0-9]{1,9}", text):
            fields[name] = float(text)
    return fields


def _json_of(name: str, text: str, limits: Limits) -> dict[str, Any]:
    try:
        return parse_json(text.encode("utf-8"), limits)
    except RequestError as error:
        why = str(error).replace("the body", "it")
        raise invalid_value(name, f"{name} must be a JSON object: {why}") from error
