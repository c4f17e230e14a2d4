"""What a family's problem module provides: inputs, how an operation is called, and its references.

The gate (`harness.gate`) works with any family through this interface alone. Judging everything is
too dear for long sequences, so a family may name a `Sample`: the channels, heads or query rows that
are judged. The gradient of the output is zero outside the sample, so that gradients of inputs that
all channels share depend on the sampled ones alone and the reference computes only those.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mambench.harness.spec import DType, Family, Problem

TORCH_DTYPES = {
    DType.FP64: torch.float64,
    DType.FP32: torch.float32,
    DType.FP16: torch.float16,
    DType.BF16: torch.bfloat16,
}

Inputs = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The part of a problem that the gate judges; None means all of it."""

    channels: tuple[int, ...] | None = None  # s6: indices of d_inner
    heads: tuple[int, ...] | None = None  # ssd, attention
    rows: tuple[int, ...] | None = None  # attention: query positions
    sequences: tuple[int, ...] | None = None  # decode: indices of the batch


class ProblemFamily(ABC):
    """Inputs, calling convention and references of one family. All methods are pure."""

    family: ClassVar[Family]
    outputs: ClassVar[tuple[str, ...]] = ("y", "final_state")  # names of what `call` returns

    @abstractmethod
    def make_inputs(
        self, problem: Problem, *, dtype: torch.dtype, device: str, seed: int
    ) -> dict[str, Tensor]:
        """Draw inputs as a trained or freshly initialised model would have them.

        Activations have `dtype`; parameters the reference interface keeps in fp32 stay fp32. Some
        channels or heads remember longer than the sequence. The same seed gives the same values.
        """

    @abstractmethod
    def differentiable(self, problem: Problem) -> tuple[str, ...]:
        """Name the inputs whose gradients a backward pass computes."""

    def updated(self, problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
        """Return by name the views of the inputs that the operation changes in place: none.

        Where there are any, `call` returns them after y.
        """
        return {}

    def reset(self, problem: Problem, inputs: Inputs, *, seed: int) -> None:
        """Put what the operation updates in place back to what `make_inputs` made with the seed."""
        return

    @abstractmethod
    def call(self, op: Callable[..., Any], problem: Problem, inputs: Inputs) -> Outputs:
        """Call an operation in the family's signature; returns y first, then final states."""

    def surroundings(self, inputs: Inputs) -> str | None:
        """Name what is executed around the operation on these inputs; None: nothing is."""
        return None

    @abstractmethod
    def sample(self, problem: Problem, *, seed: int) -> Sample:
        """Choose what is judged: everything up to 16,384 tokens, a sample above."""

    @abstractmethod
    def select_inputs(self, problem: Problem, inputs: Inputs, sample: Sample) -> dict[str, Tensor]:
        """Return the slices of the inputs (or of their gradients) that belong to the sample."""

    @abstractmethod
    def select_outputs(self, problem: Problem, outputs: Outputs, sample: Sample) -> Outputs:
        """Return the slices of the outputs (or of their gradients) that belong to the sample."""

    @abstractmethod
    def reference(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Compute the sample's outputs from selected inputs in the dtype given (float64: truth).

        Differentiable by autograd; independent of every implementation that is compared.
        """

    @abstractmethod
    def independent(self, problem: Problem, inputs: Inputs, sample: Sample) -> Outputs:
        """Compute the same in the case's own dtype, rounding where a good implementation may.

        Its error against the reference is the measure of the error an implementation may have.
        """
