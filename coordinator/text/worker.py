"""``python -P -m coordinator.text.worker SOCKET``: a text worker, which may die of what it reads.

It has a limit on memory, and each stage of a task has a time, after which the kernel ends the
process, whatever it is in: a template's loop, a tokenizer's, a parser's. What a task is refused for
is its answer; whatever else goes wrong with it is told in one line and is not the next task's.
"""

import ctypes
import logging
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from coordinator.errors import invalid_value
from coordinator.jobs.batches.input import LineReader, request_of
from coordinator.jobs.documents.document import Document, check_size
from coordinator.jobs.documents.document_files import read_text, read_tokens
from coordinator.jobs.questions.canonical import EncodedDocument, encode_document
from coordinator.jobs.questions.prompts import Contents, Opened
from coordinator.text.confinement import close_all_but, confine
from coordinator.text.frames import MEMORY_FILES, receive, send
from coordinator.text.tasks import (
    Call,
    Encoded,
    EncodeDocument,
    Fields,
    Json,
    Lines,
    LoadDocument,
    PackedPrompt,
    ReadChat,
    ReadCompletion,
    ReadDetokenize,
    ReadDocument,
    ReadFields,
    ReadLines,
    ReadTokenize,
    Ready,
    Refused,
    Result,
    Settings,
    Stage,
)
from coordinator.text.tokenizing import TextTools, load_tools
from coordinator.validation.chat_body import read_chat, read_messages, render_chat
from coordinator.validation.completion_body import read_completion
from coordinator.validation.document_bodies import read_document
from coordinator.validation.json_body import parse_json
from coordinator.validation.parameters import check_model, check_token_ids
from coordinator.validation.reading import Reading
from coordinator.validation.schemas import DetokenizeBody, TokenizeBody, UnknownFields, validate
from coordinator.validation.tools import read_offer
from protocol.errors import RequestError
from protocol.process.logs import configure_logging

MAX_FIELDS_VALUES = 10_000  # of a body whose fields the event loop itself looks at
LINES_PER_PIECE = 1000
LARGE_BYTES = 1 << 20  # of a task, after which memory is given back to the system
BYTES_PER_S = {Stage.READING: 4 << 20, Stage.RENDERING: 8 << 20, Stage.ENCODING: 128 << 10}
_DECODER = msgspec.msgpack.Decoder(Call)

_log = logging.getLogger(__name__)


class TextWorker:
    """Does tasks, one after the other.

    Args:
        settings: of the coordinator that has started it.
        enter: told of each stage of a task, and the bytes that it works on.
    """

    def __init__(self, settings: Settings, enter: Callable[[Stage, int], None]) -> None:
        self._config = settings.config
        self._model = settings.model
        self._tools: TextTools = load_tools(settings.config)
        self._is_edited = settings.text not in (None, self._tools.identity)
        self._enter = enter
        self._unknown_fields = UnknownFields()

    def do(self, call: Call, file: int | None) -> Result:
        """The answer to one task. Raises nothing: a bug of ours is one task's failure."""
        if self._is_edited:
            return _edited()
        try:
            self._enter(Stage.READING, call.size + len(call.inline))
            return self._result(call, file)
        except RequestError as error:
            return Refused(error.message, error.code, error.param, error.status)
        except MemoryError:
            limit = self._config.text_memory_bytes
            return Refused(
                f"this request's text takes more than {limit} bytes of memory "
                f"(coordinator.text_memory_bytes)",
                "text_too_large",
                None,
                400,
                is_worn=True,
            )
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            if isinstance(error, Exception):
                _log.exception("a task failed by a bug")
                return Refused("internal error", "internal_error", None, 500)
            _log.error("the tokenizer panicked: %s", str(error)[:200])
            return Refused(
                "the tokenizer cannot encode this text", "tokenizer_error", None, 400, is_worn=True
            )
        finally:
            self._enter(Stage.IDLE, 0)

    def _fields(self, call: Call, file: int | None) -> dict[str, Any]:
        limits = self._config.limits
        body = bytes(call.inline) if file is None else _read(file, call.offset, call.size)
        if call.line is not None:
            return request_of(body, call.line, limits)
        if isinstance(call.task, ReadFields):
            limits = msgspec.structs.replace(limits, max_json_values=MAX_FIELDS_VALUES)
        return parse_json(body, limits)

    def _result(self, call: Call, file: int | None) -> Result:
        match call.task:
            case EncodeDocument(folder, document, max_tokens):
                return self._encoded(Path(folder), document, max_tokens)
            case LoadDocument(folder, document):
                return self._packed(document, self._loaded(Path(folder), document))
            case ReadLines(endpoint):
                assert file is not None, "a batch's input is a file"
                return self._lines(endpoint, file)
        fields = self._fields(call, file)
        match call.task:
            case ReadCompletion() | ReadChat() as task:
                read = read_completion if isinstance(task, ReadCompletion) else read_chat
                opened = task.opened
                named = None if opened is None else (opened, self._contents(opened))
                return read(self._reading(task.max_model_len), task.tenant, fields, named)
            case ReadTokenize(max_model_len):
                return self._tokenize(self._reading(max_model_len), fields)
            case ReadDetokenize():
                return self._detokenize(self._reading(0), fields)
            case ReadDocument() as task:
                if task.uploaded is not None:
                    self._enter(Stage.READING, Path(task.uploaded.path).stat().st_size)
                return read_document(self._reading(task.max_model_len), task, fields)
            case _:
                return Fields(msgspec.Raw(msgspec.msgpack.encode(fields)))

    def _reading(self, max_model_len: int) -> Reading:
        return Reading(
            config=self._config,
            model=self._model,
            tools=self._tools,
            max_model_len=max_model_len,
            enter=self._enter,
            unknown_fields=self._unknown_fields,
        )

    # -- text and tokens by themselves -------------------------------------------------------------

    def _tokenize(self, reading: Reading, fields: dict[str, Any]) -> Json:
        body = validate(TokenizeBody, fields)
        check_model(self._config, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid_value("prompt", "give either prompt or messages")
        tokenizer = self._tools.tokenizer
        if body.prompt is not None:
            reading.check_text(body.prompt, "prompt")
            self._enter(Stage.ENCODING, len(body.prompt))
            adds = body.add_special_tokens is not False
            token_ids = tokenizer.encode(body.prompt, add_special_tokens=adds)
        else:
            messages = read_messages(reading, body.messages)
            offer = read_offer(self._tools, body.tools, None, None)
            _, token_ids = render_chat(reading, messages, body, offer)
        strings = [tokenizer.token(t) for t in token_ids] if body.return_token_strs else None
        return _json(
            {
                "count": len(token_ids),
                "max_model_len": reading.max_model_len,
                "tokens": token_ids,
                "token_strs": strings,
            }
        )

    def _detokenize(self, reading: Reading, fields: dict[str, Any]) -> Json:
        body = validate(DetokenizeBody, fields)
        check_model(self._config, body.model)
        token_ids = check_token_ids("tokens", body.tokens, reading.model.vocab_size)
        self._enter(Stage.ENCODING, len(token_ids))
        return _json({"prompt": self._tools.tokenizer.decode(token_ids, skip_special_tokens=False)})

    def _lines(self, endpoint: str, file: int) -> Lines:
        config = self._config
        reader = LineReader(endpoint, config.batches, config.limits)
        with os.fdopen(os.dup(file), "rb") as input_:
            reader.read(input_)
        if reader.errors:
            return Lines([], reader.errors)
        starts = range(0, len(reader.lines), LINES_PER_PIECE)
        pieces = [reader.lines[start : start + LINES_PER_PIECE] for start in starts]
        return Lines([msgspec.Raw(msgspec.msgpack.encode(piece)) for piece in pieces], [])

    # -- documents ---------------------------------------------------------------------------------

    def _contents(self, opened: Opened) -> Contents:
        folder, document = Path(opened.folder), opened.document

        def text() -> str:
            found = read_text(folder, document.id)
            self._enter(Stage.ENCODING, len(found))
            return found

        return Contents(lambda: self._loaded(folder, document), text)

    def _encoded(self, folder: Path, document: Document, max_tokens: int) -> Encoded:
        encoded = self._encode(folder, document)
        check_size(len(encoded.token_ids), max_tokens)
        packed = self._packed(document, encoded.token_ids)
        return Encoded(packed, encoded.shown, encoded.varies_with)

    def _encode(self, folder: Path, document: Document) -> EncodedDocument:
        text = read_text(folder, document.id)
        self._enter(Stage.ENCODING, len(text))
        system = [{"role": m.role, "content": m.content} for m in document.system]
        return encode_document(self._tools, text, document.form, system, datetime.now())

    def _loaded(self, folder: Path, document: Document) -> list[int]:
        try:
            return list(read_tokens(folder, document.id))
        except RequestError:
            if document.kind == "token_ids":
                raise
            encoded = self._encode(folder, document)  # its text is there still
            if encoded.shown != document.shown:  # of another day: the hashes would be others
                raise
            return encoded.token_ids

    def _packed(self, document: Document, token_ids: list[int]) -> PackedPrompt:
        return self._reading(0).packed(token_ids, document.cache_salt)


def _edited() -> Refused:
    """This worker was started later than others, which have read other files than it has."""
    return Refused(
        "the model's tokenizer or chat template was edited after the server's start: start it anew",
        "model_files_changed",
        None,
        503,
        is_worn=True,  # the next one may find the files as they were
    )


def _read(file: int, offset: int, size: int) -> bytes:
    """All of it: one call gives at most 2 GiB, and a caller's bytes are fewer."""
    body = os.pread(file, size, offset)
    if len(body) < size:
        raise RequestError("the body is not all there", code="invalid_json")
    return body


def _json(value: dict[str, Any]) -> Json:
    return Json(memoryview(msgspec.json.encode(value)))


class Clock:
    """Gives each stage its time, and tells the coordinator which one it is.

    Args:
        timeout_s: of a stage, but for what its size adds.
        stage: one byte, which the coordinator sees.
    """

    def __init__(self, timeout_s: float, stage: mmap.mmap) -> None:
        self._timeout_s = timeout_s
        self._stage = stage
        self._largest = 0  # bytes of the task in work

    def enter(self, stage: Stage, size_bytes: int) -> None:
        """A stage begins: one that takes longer than it may is ended, with the process."""
        self._stage[0] = stage
        if stage is not Stage.IDLE:
            self._largest = max(self._largest, size_bytes)
            left_s = self._timeout_s + size_bytes / BYTES_PER_S[stage]
            signal.setitimer(signal.ITIMER_REAL, left_s)
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._largest > LARGE_BYTES and sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was large goes back to the system
        self._largest = 0


def main() -> int:
    """Serve until the coordinator closes its side of the socket."""
    close_all_but(int(sys.argv[1]))
    connection = socket.socket(fileno=int(sys.argv[1]))
    frame, file = receive(connection)
    if not frame:  # the coordinator has died meanwhile
        return 0
    assert file is not None, "the stage's byte comes with the settings"
    settings = msgspec.msgpack.decode(frame, type=Settings)
    configure_logging("text", settings.config.log_level)
    confine(settings.config.text_memory_bytes, may_write=not MEMORY_FILES)
    if os.getppid() != settings.parent_pid:  # it died before the kernel was asked to tell us
        return 0
    clock = Clock(settings.config.text_timeout_s, mmap.mmap(file, 1))
    worker = TextWorker(settings, clock.enter)
    os.close(file)
    send(connection, Ready())
    while True:
        frame, file = receive(connection)
        if not frame:
            return 0
        result = worker.do(_DECODER.decode(frame), file)
        if file is not None:
            os.close(file)
        send(connection, result)


if __name__ == "__main__":
    sys.exit(main())
