"""The Python client of a Baton server.

    from baton_client import Client

    with Client("http://127.0.0.1:8000") as client:
        document = client.documents.create(file="report.pdf", pin="soft", ttl="2h")
        client.documents.wait(document.id)
        answer = client.ask("What does it conclude?", document_id=document.id)
        for text in answer:
            print(text, end="")
        print(answer.outcome.usage, answer.outcome.path)

``AsyncClient`` is the same with ``await``; ``Client`` is generated from it. What a call sends is
decided in calls.py, when it is tried again in exchange.py, and what comes back is read by sse.py,
reading.py and types.py: both clients share all of these, and differ only in how they wait.
"""

from baton_client.async_client import AsyncClient
from baton_client.async_connection import AsyncEvents, AsyncStream
from baton_client.calls import DocumentOptions
from baton_client.errors import (
    BatonAPIError,
    BatonConnectionError,
    ClientError,
    ErrorInfo,
    InvalidCall,
    JobFailed,
    ServerNotFound,
    WaitTimeout,
)
from baton_client.exchange import Retry
from baton_client.reading import Outcome
from baton_client.sse import Comment, EventParser, ServerEvent
from baton_client.sync_client import Client
from baton_client.sync_connection import Events, Stream
from baton_client.types import (
    Batch,
    BlockCounts,
    Choice,
    ClusterState,
    Completion,
    Document,
    DocumentEvent,
    File,
    PoolState,
    RequestTimeline,
    SequenceTimeline,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncEvents",
    "AsyncStream",
    "Batch",
    "BatonAPIError",
    "BatonConnectionError",
    "BlockCounts",
    "Choice",
    "Client",
    "ClientError",
    "ClusterState",
    "Comment",
    "Completion",
    "Document",
    "DocumentEvent",
    "DocumentOptions",
    "ErrorInfo",
    "EventParser",
    "Events",
    "File",
    "InvalidCall",
    "JobFailed",
    "Outcome",
    "PoolState",
    "RequestTimeline",
    "Retry",
    "SequenceTimeline",
    "ServerEvent",
    "ServerNotFound",
    "Stream",
    "Usage",
    "WaitTimeout",
]
