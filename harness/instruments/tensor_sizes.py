"""Which tensors hold the memory of a pass: inputs, results, what autograd keeps. Torch lazily."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 8  # named in a record


class Census:
    """Counts each storage once, under the first name that it was met by."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._rows: list[dict[str, Any]] = []
        self._totals: dict[str, int] = {}

    def add(self, kind: str, tensors: Iterable[tuple[str, "Tensor"]]) -> None:
        """Count tensors of one kind, those aside whose storage has been counted."""
        self._totals.setdefault(kind, 0)
        for name, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._seen or not storage.nbytes():
                continue
            self._seen.add(storage.data_ptr())
            self._totals[kind] += storage.nbytes()
            row = {
                "kind": kind,
                "name": name,
                "bytes": storage.nbytes(),
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
            self._rows.append(row)

    def total(self, kind: str) -> int | None:
        """Return the bytes of a kind, None if nothing of it was ever counted."""
        return self._totals.get(kind)

    def largest(self, peak_bytes: int | None) -> list[dict[str, Any]]:
        """Return the largest tensors, each with its share of the peak."""
        rows = sorted(self._rows, key=lambda row: -row["bytes"])[:LARGEST]
        return [{**row, "share": row["bytes"] / peak_bytes if peak_bytes else None} for row in rows]


def named(values: Mapping[str, object]) -> Iterator[tuple[str, "Tensor"]]:
    """Yield the tensors among named values."""
    from torch import Tensor

    yield from ((name, value) for name, value in values.items() if isinstance(value, Tensor))


def numbered(prefix: str, values: object) -> Iterator[tuple[str, "Tensor"]]:
    """Yield the tensors in what a pass returned: one, or a sequence of them."""
    from torch import Tensor

    several = isinstance(values, list | tuple)
    parts = cast("Sequence[object]", values) if several else (values,)
    for index, value in enumerate(parts):
        if isinstance(value, Tensor):
            yield f"{prefix}_{index}", value


def saved_by(forward: Callable[[], object]) -> tuple[list["Tensor"], object]:
    """Run a forward pass that records a graph; return what it saves for backward, and its result.

    Tensors that an autograd function keeps as plain attributes are not seen. The result is returned
    so that the caller keeps it, and with it the storages, while it counts.
    """
    import torch

    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.detach())
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = forward()
    return saved, result
