"""What a text worker is asked to do, and what it answers: plain data, over a socket of its own.

Only what the event loop knows at that moment is in a task; the model, the limits and the tokenizer
are the worker's own since its start. A task comes with a caller's bytes (bodies.py) if it is about
some. Long answers are packed: whoever gets one copies or maps it, and never walks through it.
"""

import enum
import struct
from typing import Protocol

import msgspec

from coordinator.auth import Tenant
from coordinator.config import CoordinatorConfig
from coordinator.jobs.batches.batch import LineEdit, LineError
from coordinator.jobs.documents.document import Document
from coordinator.jobs.engine.table import Idempotency
from coordinator.jobs.questions.prompts import Attached, Opened
from coordinator.text.tokenizing import Prompt, TextIdentity
from coordinator.validation.bodies import Body
from coordinator.validation.parameters import Options
from kvcache.prefix import HASH_BYTES
from modeling.checkpoint.config import ModelConfig
from modeling.text.parsers.deltas import Tool
from protocol.request import SamplingParams
from protocol.token_ids import TokenIds

_HASH = struct.Struct(f"{HASH_BYTES}s")


class Stage(enum.IntEnum):
    """What a worker is at: it says so where its owner sees it after its death, too."""

    IDLE = 0
    READING = 1  # a body is parsed and checked
    RENDERING = 2  # the chat template runs
    ENCODING = 3  # text becomes tokens, or tokens text


class Settings(msgspec.Struct, frozen=True):
    """What a worker is started with."""

    config: CoordinatorConfig  # without what is secret
    model: ModelConfig
    parent_pid: int
    text: TextIdentity | None = None  # of the coordinator's own tools; None is not compared


class _Message(msgspec.Struct, frozen=True, tag=True):
    """Tagged by class name."""


class ReadCompletion(_Message, frozen=True):
    """A body of ``/v1/completions``; answered by Prepared, or NeedsDocument."""

    max_model_len: int
    tenant: Tenant
    opened: Opened | None = None  # the document that it names


class ReadChat(_Message, frozen=True):
    """A body of ``/v1/chat/completions``; answered by Prepared, or NeedsDocument."""

    max_model_len: int
    tenant: Tenant
    opened: Opened | None = None


class ReadTokenize(_Message, frozen=True):
    """A body of ``/tokenize``; answered by Json."""

    max_model_len: int


class ReadDetokenize(_Message, frozen=True):
    """A body of ``/detokenize``; answered by Json."""


class ReadFields(_Message, frozen=True):
    """Any other body; answered by Fields."""


class EncodeDocument(_Message, frozen=True):
    """A document's text to tokens; answered by Encoded."""

    folder: str
    document: Document
    max_tokens: int


class LoadDocument(_Message, frozen=True):
    """Tokens that lie on the disk; answered by PackedPrompt."""

    folder: str
    document: Document


class PackedPrompt(_Message, frozen=True):
    """Token ids as ``protocol.token_ids`` packs them; the hashes of full blocks in a row."""

    token_ids: memoryview
    block_hashes: memoryview
    json: memoryview = memoryview(b"null")  # the ids as an answer shows them, if it is to

    def unpacked(self) -> Prompt:
        """The prompt; its token ids stay in the memory that the worker has filled."""
        hashes = tuple(digest for (digest,) in _HASH.iter_unpack(self.block_hashes))
        return Prompt(TokenIds(self.token_ids), hashes)


class Encoded(_Message, frozen=True):
    """A document's tokens; see ``canonical.EncodedDocument``."""

    prompt: PackedPrompt
    shown: str
    varies_with: tuple[str, ...]


class Parsing(msgspec.Struct, frozen=True):
    """How an answer's text becomes reasoning, content and calls."""

    tools: tuple[Tool, ...] = ()  # that may be called
    prompt_end: str = ""  # which may be inside the reasoning
    shows_reasoning: bool = True


class Prepared(_Message, frozen=True):
    """A request that can be submitted. ``echoed`` has the text of each prompt, or nothing."""

    options: Options
    prompts: list[PackedPrompt]
    samplings: list[SamplingParams]
    salt: str
    echoed: list[str] = []
    parsing: Parsing | None = None  # None: an answer is its text
    attached: Attached | None = None


class NeedsDocument(_Message, frozen=True):
    """The request names a document: open it, and ask again."""

    document_id: str


class Uploaded(msgspec.Struct, frozen=True):
    """A file that came with a request, or that was uploaded before and ``is_ours`` not."""

    path: str
    file_name: str
    is_ours: bool
    media_type: str = ""  # these two as they were declared with it
    charset: str = ""


class ReadDocument(_Message, frozen=True):
    """A body of ``/v1/documents``, or the fields of a form; answered by Asked, or NeedsFile."""

    tenant: Tenant
    now: float
    max_model_len: int
    tiers: tuple[str, ...]
    uploaded: Uploaded | None = None
    header_key: str | None = None


class ReadLines(_Message, frozen=True):
    """The input of a batch, whose file is the body; answered by Lines."""

    endpoint: str


class Asked(_Message, frozen=True):
    """A document to be made, of ``text`` in UTF-8, of tokens, or of the file."""

    document: Document
    idempotency: Idempotency | None
    text: memoryview | None = None
    prompt: PackedPrompt | None = None


class NeedsFile(_Message, frozen=True):
    """The source is a file that was uploaded before: find it, and ask again."""

    file_id: str


class Lines(_Message, frozen=True):
    """``pieces`` are lists of ``Line``, each small enough to be taken in one step."""

    pieces: list[msgspec.Raw]
    errors: list[LineError]


class Json(_Message, frozen=True):
    """A whole body of an answer."""

    body: memoryview


class Fields(_Message, frozen=True):
    """A body's fields, checked as JSON is, as msgpack."""

    fields: msgspec.Raw


class Ready(_Message, frozen=True):
    """The first thing that a worker says."""


class Refused(_Message, frozen=True):
    """A RequestError. ``is_worn`` is a worker that had better be replaced."""

    message: str
    code: str
    param: str | None
    status: int
    is_worn: bool = False


Task = (
    ReadCompletion
    | ReadChat
    | ReadTokenize
    | ReadDetokenize
    | ReadFields
    | EncodeDocument
    | LoadDocument
    | ReadDocument
    | ReadLines
)
Result = (
    Prepared
    | NeedsDocument
    | PackedPrompt
    | Json
    | Fields
    | Encoded
    | Asked
    | NeedsFile
    | Lines
    | Refused
    | Ready
)


class Workers(Protocol):
    """Who does tasks."""

    async def run(self, tenant: str, task: Task, body: Body = ...) -> Result:
        """The answer to a task, which is not :class:`Refused`.

        Args:
            tenant: whose turn it takes.
            task: what is to be done.
            body: what it is about; stays the caller's.

        Raises:
            RequestError: it was refused, cannot be done, or too much waits.
        """
        ...


class Call(msgspec.Struct, frozen=True):
    """One task on the wire; its bytes are inline, or ``size`` of the file that comes along."""

    task: Task
    inline: memoryview
    offset: int = 0
    size: int = 0
    line: LineEdit | None = None  # the bytes are a line of a batch, whose body is meant
