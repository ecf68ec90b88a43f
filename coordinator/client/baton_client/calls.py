"""What each call sends: method, path, query and body. Pure, but for the file of an upload."""

import mimetypes
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypedDict
from urllib.parse import quote

import msgspec

from baton_client.errors import InvalidCall

Messages = Sequence[Mapping[str, Any]]
FileSource = str | Path | bytes | BinaryIO
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
OnPrefill = Callable[[int, int], None]
DEFAULT_FILE_NAME = "upload"


class UpdateOptions(TypedDict, total=False):
    """What can be changed of a document."""

    metadata: Mapping[str, Any]
    pin: str  # none, soft or hard
    ttl: str | float  # of the pin: seconds, or "90s", "15m", "2h", "7d"
    tier: str
    sliding: bool  # each question begins the time anew


class DocumentOptions(UpdateOptions, total=False):
    """What a document is made of (one of the first five), and how it is treated."""

    text: str
    file: FileSource
    messages: Messages
    token_ids: Sequence[int]
    file_id: str
    filename: str  # of a file that does not have a name itself
    name: str
    form: str  # chat or text
    model: str
    priority: int
    deadline: str | float  # a time from now such as "2h", or Unix time
    cp: str | int  # the ring's size
    idempotency_key: str


@dataclass(frozen=True, slots=True)
class Upload:
    """A file to send; opened anew for each attempt."""

    source: FileSource
    filename: str

    @property
    def media_type(self) -> str:
        return mimetypes.guess_type(self.filename)[0] or "application/octet-stream"

    @property
    def is_repeatable(self) -> bool:
        """It can be read from its beginning again."""
        return isinstance(self.source, str | Path | bytes)

    def open(self) -> AbstractContextManager[BinaryIO | bytes]:
        """
        Raises:
            OSError: it cannot be read.
        """
        if isinstance(self.source, str | Path):
            return Path(self.source).open("rb")
        return nullcontext(self.source)


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request. An upload's other fields are ``form``; else the body is ``body``."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    upload: Upload | None = None
    form: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def is_repeatable(self) -> bool:
        """Sending it twice has the effect of sending it once."""
        if self.method == "GET":
            return True
        can_be_read = self.upload is None or self.upload.is_repeatable
        return can_be_read and "idempotency-key" in self.headers


def get(path: str, **query: str | float | None) -> Call:
    """A read; a query field that is None is left out."""
    given = {name: str(value) for name, value in query.items() if value is not None}
    return Call("GET", path, given)


def path_of(collection: str, object_id: str, *rest: str) -> str:
    """The path of one object; an id never leaves its place in it.

    Raises:
        InvalidCall: no id.
    """
    if object_id in ("", ".", ".."):  # which would be another path
        raise InvalidCall(f"{object_id!r} is not an id")
    return "/".join((f"/v1/{collection}", quote(object_id, safe="", errors="replace"), *rest))


# -- documents -------------------------------------------------------------------------------------


def create_document(options: DocumentOptions) -> Call:
    """
    Raises:
        InvalidCall: not exactly one source, or half a pin.
    """
    sources = {
        name: value
        for name in ("text", "messages", "token_ids", "file_id")
        if (value := options.get(name)) is not None
    }
    file = options.get("file")
    if len(sources) + (file is not None) != 1:
        raise InvalidCall("a document is made of one of text, file, messages, token_ids, file_id")
    body: dict[str, Any] = {
        name: value
        for name in ("metadata", "form", "model", "priority", "deadline", "cp")
        if (value := options.get(name)) is not None
    }
    if options.get("name") is not None:
        body["display_name"] = options["name"]
    pin = _pin(options)
    if pin:
        body["pin"] = pin
    key = options.get("idempotency_key") or secrets.token_hex(16)
    headers = {"idempotency-key": key}
    if file is None:
        return Call("POST", "/v1/documents", body={"source": sources, **body}, headers=headers)
    upload = Upload(file, _file_name(file, options.get("filename")))
    return Call("POST", "/v1/documents", upload=upload, form=_as_form(body), headers=headers)


def update_document(document_id: str, options: UpdateOptions) -> Call:
    """Another pin (``pin="none"`` ends one), or other metadata.

    Raises:
        InvalidCall: half a pin.
    """
    body: dict[str, Any] = {}
    pin = _pin(options)
    if pin:
        body["pin"] = pin
    if options.get("metadata") is not None:
        body["metadata"] = options["metadata"]
    return Call("PATCH", path_of("documents", document_id), body=body)


def _pin(options: UpdateOptions) -> dict[str, Any]:
    pin = {
        "mode": options.get("pin"),
        "ttl": options.get("ttl"),
        "tier": options.get("tier"),
        "sliding": options.get("sliding"),
    }
    given = {name: value for name, value in pin.items() if value is not None}
    if given and "mode" not in given:
        raise InvalidCall("ttl, tier and sliding are a pin's: give pin='soft' or 'hard' too")
    return given


def _as_form(body: Mapping[str, Any]) -> dict[str, str]:
    """Form fields: a text is itself, everything else is JSON."""
    return {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in body.items()
    }


def _file_name(source: FileSource, given: str | None) -> str:
    if given:
        return given
    if isinstance(source, str | Path):
        return Path(source).name
    name = getattr(source, "name", None)
    return Path(name).name if isinstance(name, str) else DEFAULT_FILE_NAME


# -- answers ---------------------------------------------------------------------------------------


def question(text: str, document_id: str | None) -> Messages:
    """The messages of a question, about a document if one is named."""
    if document_id is None:
        return [{"role": "user", "content": text}]
    document = {"type": "document", "document_id": document_id}
    return [{"role": "user", "content": [document, {"type": "text", "text": text}]}]


def chat(
    messages: Messages,
    parameters: Mapping[str, object],
    *,
    stream: bool,
    request_id: str | None = None,
) -> Call:
    """A chat, with any of the parameters that the server takes."""
    body = {"messages": list(messages), **parameters}
    return _answer("/v1/chat/completions", body, stream=stream, request_id=request_id)


def complete(
    prompt: Prompt, parameters: Mapping[str, object], *, stream: bool, request_id: str | None = None
) -> Call:
    """A completion, with any of the parameters that the server takes."""
    body = {"prompt": prompt, **parameters}
    return _answer("/v1/completions", body, stream=stream, request_id=request_id)


def _answer(path: str, body: dict[str, Any], *, stream: bool, request_id: str | None) -> Call:
    given = {name: value for name, value in body.items() if value is not None}
    if stream:
        given.setdefault("stream_options", {"include_usage": True})
    headers = {} if request_id is None else {"x-request-id": request_id}
    return Call("POST", path, body={**given, "stream": stream}, headers=headers)


# -- files and batches -----------------------------------------------------------------------------


def create_file(source: FileSource, purpose: str, filename: str | None) -> Call:
    """An upload."""
    upload = Upload(source, _file_name(source, filename))
    return Call("POST", "/v1/files", upload=upload, form={"purpose": purpose})


def create_batch(
    input_file_id: str,
    endpoint: str,
    metadata: Mapping[str, str] | None,
    completion_window: str,
    idempotency_key: str | None,
) -> Call:
    """A batch; without a key it is sent once, since sending it twice would make two."""
    body: dict[str, Any] = {
        "input_file_id": input_file_id,
        "endpoint": endpoint,
        "completion_window": completion_window,
    }
    if metadata is not None:
        body["metadata"] = dict(metadata)
    headers = {} if idempotency_key is None else {"idempotency-key": idempotency_key}
    return Call("POST", "/v1/batches", body=body, headers=headers)
