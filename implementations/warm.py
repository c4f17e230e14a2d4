"""Fills a compiler's cache on disk before anything is timed: one call of the case's pass."""

from dataclasses import replace

from mambench.harness.spec import Case, Device, DeviceKind
from mambench.implementations.base import Implementation

MOST_BYTES = 1 << 30  # on a small GPU: several processes compile side by side, each with a case
MOST_FRAC = 1 / 24  # of a large GPU's memory
LEAST_TOKENS = 512


def call_once(implementation: Implementation, case: Case) -> None:
    """Run a case's pass once on the current GPU; without one do nothing.

    What is compiled stays in the compiler's cache on disk. What autotuning measures here is thrown
    away with the process: others compile beside it.

    Args:
        implementation: whose operation is called.
        case: as it will be timed: kernels are often specialised on more of a shape than its widths.
            It is shortened only where it may need more than a process may take.
    """
    import torch

    from mambench.implementations.workload import build

    if not torch.cuda.is_available():
        return
    device = Device(
        kind=DeviceKind.CUDA, index=torch.cuda.current_device(), name="cuda", memory_bytes=0
    )
    most_bytes = max(MOST_BYTES, int(MOST_FRAC * torch.cuda.mem_get_info()[1]))
    short = shortened(implementation, case, most_bytes)
    workload = build(short, implementation, device, seed=0)
    workload.prepare(case.pass_)()
    torch.cuda.synchronize()


def shortened(implementation: Implementation, case: Case, most_bytes: int = MOST_BYTES) -> Case:
    """Return the case with its length halved until it needs at most so many bytes."""
    problem, short = case.problem, case
    while (problem.seqlen or 0) >= 2 * LEAST_TOKENS and _bytes(implementation, short) > most_bytes:
        problem = replace(problem, seqlen=(problem.seqlen or 0) // 2)
        short = replace(case, problem=problem)
    return short


def _bytes(implementation: Implementation, case: Case) -> int:
    """Estimate what a call holds: a few tensors as wide as the input, and the workspace."""
    wide = case.problem.tokens * case.problem.d_inner * case.dtype.itemsize
    tensors = 10 if case.pass_.needs_grad else 5
    return tensors * wide + implementation.workspace_bytes(case)
