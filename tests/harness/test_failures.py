import pytest

from mambench.harness.failures import REASON_LENGTH, classify, describe
from mambench.harness.spec import Outcome


class ForeignOutOfMemoryError(RuntimeError):
    """Like torch.OutOfMemoryError, which needs a GPU to be raised."""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NotImplementedError("headdim 7"), Outcome.UNSUPPORTED),
        (MemoryError(), Outcome.OOM),
        (ForeignOutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Outcome.OOM),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            Outcome.OOM,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Outcome.ERROR),
        (ValueError("bad"), Outcome.ERROR),
        (SystemExit(3), Outcome.ERROR),
        (KeyboardInterrupt(), Outcome.ERROR),
    ],
)
def test_exceptions_mean_outcomes(error: BaseException, outcome: Outcome) -> None:
    assert classify(error) is outcome


def test_real_allocation_failure_of_torch_is_out_of_memory() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert classify(caught.value) is Outcome.OOM


def test_reasons_are_one_short_line() -> None:
    assert describe(ValueError("first\nsecond")) == "ValueError: first"
    assert describe(MemoryError()) == "MemoryError"
    assert len(describe(ValueError("x" * 10_000))) == REASON_LENGTH
