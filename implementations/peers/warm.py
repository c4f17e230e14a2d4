"""Fills Triton's cache for a peer before anything is timed: one short call of the case's pass."""

from dataclasses import replace

from mambench.harness.spec import Case, Device, DeviceKind
from mambench.implementations.base import Implementation

_TOKENS = 512  # two chunks of the longest chunk size


def call_once(implementation: Implementation, case: Case) -> None:
    """Run a case's pass at batch 1 and at most 512 tokens on the current GPU.

    What is compiled stays in Triton's cache on disk. What autotuning measures here is thrown away
    with the process: others compile beside it.
    """
    import torch

    from mambench.implementations.workload import build

    if not torch.cuda.is_available():
        return
    device = Device(
        kind=DeviceKind.CUDA, index=torch.cuda.current_device(), name="cuda", memory_bytes=0
    )
    length = case.problem.seqlen
    short = replace(case.problem, batch=1, seqlen=None if length is None else min(length, _TOKENS))
    workload = build(replace(case, problem=short), implementation, device, seed=0)
    workload.prepare(case.pass_)()
    torch.cuda.synchronize()
