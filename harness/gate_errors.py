"""The errors the gate judges: of a whole tensor and of its worst block, each with its budget."""

# torch leaves what unflatten and apply return untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mambench.harness.spec import DType

FACTOR = 2.0  # how many times the independent solution's error is allowed
FLOORS = {DType.FP64: 1e-10, DType.FP32: 5e-5, DType.FP16: 2.5e-4, DType.BF16: 2e-3}
FEW_VALUES = 32  # an error over fewer values is noisy
SEGMENT = 64  # time steps of a block
VECTOR_SEGMENT = 32  # neighbouring elements of a one-dimensional tensor that make a block
TYPICAL_FRACTION = 0.1  # of a typical block's size, that a smaller block is taken to have
TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """One relative error and what it may be."""

    error: float
    independent_error: float
    floor: float

    @property
    def budget(self) -> float:
        """The largest error that passes."""
        return FACTOR * self.independent_error + self.floor

    @property
    def excess(self) -> float:
        """Error over budget: more than 1 fails, and NaN counts as infinite."""
        ratio = self.error / self.budget
        return math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True, kw_only=True)
class ErrorPair:
    """The errors of one tensor: as a whole, and in its worst block."""

    name: str
    whole: TensorError
    block: TensorError
    block_at: str  # where in the judged part the worst block is
    max_abs: float  # largest absolute difference from the reference

    @property
    def excess(self) -> float:
        """The larger of the two."""
        return max(self.whole.excess, self.block.excess)

    def as_dict(self) -> dict[str, float]:
        """Return plain JSON values; those of the worst block have a prefix."""
        values = {"max_abs": self.max_abs}
        for prefix, found in (("", self.whole), ("block_", self.block)):
            values[f"{prefix}error"] = found.error
            values[f"{prefix}budget"] = found.budget
            values[f"{prefix}independent_error"] = found.independent_error
        return values

    def sentence(self) -> str:
        """Return the reason of a failure: the tensor, its error and its budget."""
        where, found = self.name, self.whole
        if self.whole.excess <= 1:
            where, found = f"{self.name} in the block {self.block_at}", self.block
        return (
            f"{where}: relative error {found.error:.2e}, budget {found.budget:.2e} "
            f"({FACTOR:g} x {found.independent_error:.2e} independent + {found.floor:.2e})"
        )


@dataclass(frozen=True, kw_only=True)
class Energies:
    """Squares, by element, of the reference and of the two errors; they add up over draws."""

    size: Tensor  # fp64, as are the others
    wrong: Tensor  # candidate - reference
    allowed: Tensor  # independent - reference
    draws: int = 1

    def __add__(self, other: "Energies") -> "Energies":
        return Energies(
            size=self.size + other.size,
            wrong=self.wrong + other.wrong,
            allowed=self.allowed + other.allowed,
            draws=self.draws + other.draws,
        )


def measure(candidate: Tensor, *, reference: Tensor, independent: Tensor) -> Energies:
    """Compare a tensor with the float64 reference, all of one shape."""
    return Energies(
        size=reference.double().square(),
        wrong=(candidate.double() - reference).square(),
        allowed=(independent.double() - reference).square(),
    )


def judge(name: str, energies: Energies, *, dtype: DType, seqlen: int) -> ErrorPair:
    """Put a tensor's errors, as a whole and by block, beside their budgets."""
    size, wrong, allowed, draws = energies.size, energies.wrong, energies.allowed, energies.draws
    whole = TensorError(
        error=_ratio(wrong.sum(), size.sum()),
        independent_error=_ratio(allowed.sum(), size.sum()),
        floor=_floor(dtype, size.numel() * draws),
    )
    blocks = _Blocks(tuple(size.shape), seqlen)
    counts = blocks.fold(torch.ones_like(size))
    scale = _scales(blocks, blocks.fold(size), counts)
    errors = (blocks.fold(wrong) / scale).sqrt()
    worst = int(errors.argmax())
    return ErrorPair(
        name=name,
        whole=whole,
        block=TensorError(
            error=float(errors.flatten()[worst]),
            independent_error=float((blocks.fold(allowed) / scale).sqrt().max()),
            floor=_floor(dtype, int(counts.min()) * draws),
        ),
        block_at=blocks.describe(worst, tuple(errors.shape)),
        max_abs=float(wrong.max().sqrt()),
    )


class _Blocks:
    """How a tensor is cut: time into segments, a trailing feature axis whole, other axes singly."""

    def __init__(self, shape: tuple[int, ...], seqlen: int) -> None:
        self.shape = shape
        last = len(shape) - 1
        self.segments: list[int] = []  # elements of each axis in a block
        for axis, size in enumerate(shape):
            if size == seqlen:
                self.segments.append(min(size, SEGMENT))
            elif last == 0:
                self.segments.append(min(size, VECTOR_SEGMENT))
            else:
                self.segments.append(size if axis == last else 1)
        self.time_axes = [
            axis for axis, size in enumerate(shape) if size == seqlen and size >= 2 * SEGMENT
        ]

    def fold(self, values: Tensor) -> Tensor:
        """Sum values within each block; what is left over at an axis' end joins the last block."""
        for axis, segment in enumerate(self.segments):
            if segment == 1:
                continue
            count = values.shape[axis] // segment
            whole = values.narrow(axis, 0, count * segment).unflatten(axis, (count, segment))
            folded = whole.sum(axis + 1)
            left_over = values.narrow(axis, count * segment, values.shape[axis] - count * segment)
            folded.select(axis, count - 1).add_(left_over.sum(axis))
            values = folded
        return values

    def describe(self, flat: int, folded: tuple[int, ...]) -> str:
        """Name the block with this flat index as slices: [0, 5, 1984:2048]."""
        parts: list[str] = []
        for count, segment, size in reversed(
            list(zip(folded, self.segments, self.shape, strict=True))
        ):
            flat, at = divmod(flat, count)
            end = size if at == count - 1 else (at + 1) * segment
            parts.append(str(at) if segment == 1 else f"{at * segment}:{end}")
        return f"[{', '.join(reversed(parts))}]"


def _scales(blocks: _Blocks, sizes: Tensor, counts: Tensor) -> Tensor:
    """Return each block's energy, or a fraction of what is typical beside it if that is more."""
    mean = sizes / counts
    if blocks.time_axes:
        typical = mean.median(dim=blocks.time_axes[0], keepdim=True).values
    else:
        typical = mean.median()
    return torch.maximum(mean, TYPICAL_FRACTION**2 * typical).clamp(min=TINY) * counts


def _ratio(wrong: Tensor, size: Tensor) -> float:
    return float((wrong / size.clamp(min=TINY)).sqrt())


def _floor(dtype: DType, values: int) -> float:
    return FLOORS[dtype] * math.sqrt(max(1.0, FEW_VALUES / max(1, values)))
