"""A plugin of profilers: a sound one, some with one fault each, one that measures a batch."""

import os
from collections.abc import Iterator

from mambench.harness.profilers.base import (
    Batch,
    BatchProfiler,
    CaseProfiler,
    Context,
    Failed,
    Measured,
    Work,
)
from mambench.harness.spec import Case, Device, DeviceKind, Metric, Outcome


def _metric(tag: str) -> Metric:
    return Metric(tag=tag, name=tag, unit="1", description="planted")


class _Planted(CaseProfiler):
    summary = "planted"

    def estimate_s(self, work: Work) -> float:
        return 0.5

    def measure(self, context: Context) -> Measured:
        result = context.execute()()
        return Measured(values={f"{self.name}_1": len(result)}, method="counted")


class Outputs(_Planted):
    name = "outputs"
    metrics = (_metric("outputs_1"), _metric("outputs_never_found_1"))


class Raises(_Planted):
    name = "raises"
    metrics = (_metric("raises_1"),)
    order = 10

    def measure(self, context: Context) -> Measured:
        raise ValueError("planted profiler\nsecond line")


class Dies(_Planted):
    name = "dies"
    metrics = (_metric("dies_1"),)
    order = 20

    def measure(self, context: Context) -> Measured:
        os._exit(9)


class Elsewhere(_Planted):
    name = "elsewhere"
    metrics = (_metric("elsewhere_1"),)
    devices = (DeviceKind.CUDA,)


class Batched(BatchProfiler):
    name = "batched"
    summary = "planted"
    metrics = (_metric("batched_1"),)
    start_s = 7.0

    def estimate_s(self, work: Work) -> float:
        return 0.25

    def measure_batch(self, batch: Batch) -> Iterator[tuple[Case, Measured | Failed]]:
        for case in batch.cases:
            batch.on_case(case)
            if case.problem.seqlen == 10:
                yield case, Failed(outcome=Outcome.TIMEOUT, reason="planted timeout")
            elif case.problem.seqlen == 11:
                raise RuntimeError("planted batch")
            else:
                assert batch.times_s[case.case_id] > 0
                yield case, Measured(values={"batched_1": len(batch.cases)})


def nothing(device: Device) -> None:
    """Be no profiler."""
