"""What all code of documents works with, put together once."""

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.config import JobLimits
from coordinator.jobs.documents.admission import Admission
from coordinator.jobs.documents.document import Document, Live
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.ingestor import Ingestor
from coordinator.jobs.engine.gate import Gate
from coordinator.jobs.engine.table import JobTable
from coordinator.jobs.files.folder import DurableFolder
from protocol.process.crash_points import CrashPoints


@dataclass(frozen=True, slots=True)
class DocumentParts:
    """See the module's docstring."""

    table: JobTable[Document]
    files: DurableFolder  # see document_files.py
    tokens: DocumentTokens
    ingestor: Ingestor  # makes KV of tokens
    admission: Admission
    gate: Gate  # that all work goes through
    limits: JobLimits
    crash_points: CrashPoints
    max_tokens: Callable[[], int]  # of the largest document that can be asked about now
    min_free_bytes: int
    live: dict[str, Live] = field(default_factory=dict)  # how those that are computed stand

    @property
    def block_size(self) -> int:
        return self.tokens.facts.block_size

    @property
    def segment_tokens(self) -> int:
        """Of a segment: whole blocks."""
        return max(1, self.limits.segment_tokens // self.block_size) * self.block_size
