"""Kernels of one execution: how many, their shares, and what Triton made of them.

See `harness.instruments.launches`.
"""

from typing import Any

from mambench.harness.instruments import launches
from mambench.harness.profilers.base import (
    CaseProfiler,
    Context,
    Measured,
    Process,
    Value,
    Work,
)
from mambench.harness.spec import Device, DeviceKind, metrics_of


class Launches(CaseProfiler):
    """What runs on the device, from torch's profiler and Triton's hooks."""

    name = "launches"
    summary = "kernels of one execution and their shares; Triton's registers, spills, configuration"
    metrics = metrics_of("launches")
    devices = (DeviceKind.CUDA,)

    def process(self, device: Device) -> Process:
        """The profiler leaves hooks behind that slow launches down."""
        return Process.TRACED

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of inputs, a first call, two executions and the trace."""
        return 0.1 + 3 * work.execution_s + 2e-5 * work.launches

    def measure(self, context: Context) -> Measured:
        """Execute once with Triton's hooks, once under the profiler."""
        execute = context.execute()
        compiled = launches.triton_kernels(execute, context.synchronize)
        ran = launches.trace(execute)
        if not ran:
            return Measured.missing(
                "torch's profiler saw nothing on the device: CUPTI is missing, not permitted, or "
                "held by another profiler"
            )
        rows = launches.by_kernel(ran)
        values: dict[str, Value] = {
            "kernel_count": len(ran),
            "largest_kernel_frac": rows[0]["share"],
            "busy_time_s": sum(launch.time_s for launch in ran),
            "max_registers": _largest(compiled, "registers"),
            "max_spills": _largest(compiled, "spills"),
            "max_shared_bytes": _largest(compiled, "shared_bytes"),
        }
        details: dict[str, Any] = {
            "kernels": rows[: launches.MAX_KERNELS],
            "triton_kernels": compiled,
        }
        if not compiled:
            why = "no Triton kernel was launched"
            tags = ("max_registers", "max_spills", "max_shared_bytes")
            details["missing_values"] = dict.fromkeys(tags, why)
        return Measured(values=values, method="torch.profiler", details=details)


def _largest(compiled: list[dict[str, Any]] | None, key: str) -> int | None:
    found = [facts[key] for facts in compiled or () if facts[key] is not None]
    return max(found, default=None)
