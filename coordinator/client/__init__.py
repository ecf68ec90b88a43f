"""The Python client of a Baton server.

    from coordinator.client import Client

    with Client("http://127.0.0.1:8000") as client:
        document = client.documents.create(file="report.pdf", pin="soft", ttl="2h")
        client.documents.wait(document.id)
        answer = client.ask("What does it conclude?", document_id=document.id)
        for text in answer:
            print(text, end="")
        print(answer.outcome.usage, answer.outcome.path)

``AsyncClient`` is the same with ``await``. What a call sends is decided in requests.py, what comes
back is read by sse.py, reading.py and types.py, and when it is tried again is decided in budget.py:
both clients share all of these, and differ only in how they wait.
"""

from coordinator.client.async_client import AsyncClient
from coordinator.client.budget import Retry
from coordinator.client.errors import (
    BatonAPIError,
    BatonConnectionError,
    ClientError,
    JobFailed,
    WaitTimeout,
)
from coordinator.client.reading import Outcome
from coordinator.client.state import ClusterState, RequestTimeline
from coordinator.client.sync_client import Client
from coordinator.client.types import (
    Batch,
    ChatChunk,
    ChatCompletion,
    Completion,
    Document,
    DocumentEvent,
    File,
    Usage,
)

__all__ = [
    "AsyncClient",
    "Batch",
    "BatonAPIError",
    "BatonConnectionError",
    "ChatChunk",
    "ChatCompletion",
    "Client",
    "ClientError",
    "ClusterState",
    "Completion",
    "Document",
    "DocumentEvent",
    "File",
    "JobFailed",
    "Outcome",
    "RequestTimeline",
    "Retry",
    "Usage",
    "WaitTimeout",
]
