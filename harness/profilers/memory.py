"""Peak memory of one pass. See `harness.memory`."""

from mambench.harness import memory
from mambench.harness.profilers.base import CaseProfiler, Context, Measured, Process, Work
from mambench.harness.spec import Device, DeviceKind, metrics_of


class Memory(CaseProfiler):
    """The most memory held at once while the pass ran."""

    name = "memory"
    summary = "peak memory of one pass, and what the pass itself added"
    metrics = metrics_of("memory")
    order = 0

    def process(self, device: Device) -> Process:
        """On the CPU it needs an allocator that returns freed memory at once."""
        return Process.TUNED_MALLOC if device.kind is DeviceKind.CPU else Process.TIMED

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of one pass and of drawing the inputs again."""
        return 0.05 + 2 * work.execution_s

    def measure(self, context: Context) -> Measured:
        """Run the pass once between a settled level before and a settled level after."""
        meter = _meter(context.device, tuned=context.tuned_malloc)
        if isinstance(meter, str):
            return Measured.missing(meter)
        context.release(inputs=False)
        reading = memory.measure(meter, context.execute, context.release)
        return Measured(
            values={
                "peak_memory_bytes": reading.peak_bytes,
                "extra_memory_bytes": reading.extra_bytes,
            },
            method=reading.method,
            details=reading.details,
        )


def _meter(device: Device, *, tuned: bool) -> memory.Meter | str:
    """Return what reads the device's memory, or the reason why nothing can."""
    if device.kind is DeviceKind.CUDA:
        return memory.CudaMeter(device.torch_name)
    missing = memory.cpu_missing()
    if missing is None and not tuned:
        missing = "the C library's allocator cannot be told to return freed memory (mallopt)"
    return missing or memory.ResidentMeter()
