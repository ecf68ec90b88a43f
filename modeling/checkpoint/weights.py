"""Reading one rank's share of a checkpoint, tensor by tensor.

Files are memory-mapped and only the wanted rows and columns are copied out, so a rank never holds
more than its own weights and one layer's transient. Mapped pages count as resident until unmapped:
the loader calls :meth:`WeightReader.release` after each layer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modeling.checkpoint.folder import TensorEntry, read_checkpoint
from modeling.checkpoint.tensors import check_tensor
from modeling.sampling import is_finite
from protocol.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows and columns of one tensor; ``shape`` is what the whole tensor must have."""

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None
    columns: slice | None = None
    order: torch.Tensor | None = None  # of the chosen rows, applied to every run of its length

    def extent(self) -> tuple[int, ...]:
        """The shape of what is read."""
        chosen = (self.rows, self.columns)[: len(self.shape)]
        return tuple(
            size if cut is None else len(range(*cut.indices(size)))
            for size, cut in zip(self.shape, chosen, strict=True)
        )


class WeightReader:
    """The tensors of one checkpoint folder, read in ``dtype``.

    Raises:
        ConfigError: from every method: a tensor is missing, has another shape or an unusable
            dtype, or its file is damaged. The message names it.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder = folder
        self._entries = read_checkpoint(folder)
        self.dtype = dtype
        self._open: dict[Path, Any] = {}
        self._warned: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """The parts, one below the other, as one new tensor on the CPU."""
        extents = [part.extent() for part in parts]
        rows = sum(extent[0] for extent in extents)
        out = torch.empty((rows, *extents[0][1:]), dtype=self.dtype)
        start = 0
        for part, extent in zip(parts, extents, strict=True):
            self._copy(part, out[start : start + extent[0]])
            start += extent[0]
        if not is_finite(out):
            self._warn(parts, extents, out)
        return out

    def _warn(
        self, parts: Sequence[Part], extents: Sequence[tuple[int, ...]], out: torch.Tensor
    ) -> None:
        """Report tensors that are not finite. They are not refused: the row may never be used."""
        start = 0
        for part, extent in zip(parts, extents, strict=True):
            piece = out[start : start + extent[0]]
            start += extent[0]
            if part.name not in self._warned and not is_finite(piece):
                self._warned.add(part.name)
                _log.error(
                    "%s: %s holds NaN or infinity in %s: requests will end with non_finite_logits",
                    self._folder,
                    part.name,
                    str(self.dtype).removeprefix("torch."),
                )

    def release(self) -> None:
        """Unmap the files; the next read maps them again."""
        self._open.clear()

    def _copy(self, part: Part, out: torch.Tensor) -> None:
        entry = check_tensor(self._entries.get(part.name), part.name, part.shape, self._folder)
        try:
            stored = self._file(entry).get_slice(entry.stored_name)
            rows = part.rows or slice(None)
            if len(part.shape) == 1:
                source = stored[rows]
            else:
                source = stored[rows, part.columns or slice(None)]
        except SafetensorError as error:
            raise ConfigError(f"{entry.file}: {part.name} cannot be read ({error})") from error
        if part.order is not None:
            run = len(part.order)
            source = source.unflatten(0, (-1, run))[:, part.order].flatten(0, 1)
        out.copy_(source)

    def _file(self, entry: TensorEntry) -> Any:  # noqa: ANN401 - the library has no types
        if entry.file not in self._open:
            try:
                self._open[entry.file] = safe_open(str(entry.file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{entry.file}: truncated or not safetensors ({error}): download it again"
                ) from error
        return self._open[entry.file]
