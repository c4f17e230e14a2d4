"""Peak memory of one pass. See `harness.instruments.memory`."""

from mambench.harness.instruments import memory, tensor_sizes
from mambench.harness.profilers.base import CaseProfiler, Context, Measured, Process, Work
from mambench.harness.spec import Device, DeviceKind, metrics_of


class Memory(CaseProfiler):
    """The most memory held at once while the pass ran."""

    name = "memory"
    summary = "peak memory of one pass, and which tensors it consists of"
    metrics = metrics_of("memory")
    order = 0

    def process(self, device: Device) -> Process:
        """On the CPU it needs an allocator that returns freed memory at once."""
        return Process.TUNED_MALLOC if device.kind is DeviceKind.CPU else Process.TIMED

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of one pass and of drawing the inputs again."""
        return 0.05 + (3 if work.case.pass_.needs_grad else 2) * work.execution_s

    def measure(self, context: Context) -> Measured:
        """Run the pass once between a settled level before and a settled level after."""
        meter = _meter(context.device, tuned=context.tuned_malloc)
        if isinstance(meter, str):
            return Measured.missing(meter)
        census, why = tensor_sizes.Census(), dict[str, str]()
        context.release(inputs=False)
        census.add("input", tensor_sizes.named(context.workload().inputs))

        def inspect(outcome: object) -> None:
            census.add("output", tensor_sizes.numbered("output", outcome))
            if context.case.pass_.needs_grad:
                why.update(_count_saved(context, census))

        # Pages of the process blur what a level on the CPU says of an input's size.
        known = census.total("input") if context.device.kind is DeviceKind.CUDA else None
        reading = memory.measure(
            meter, context.execute, context.release, inspect=inspect, input_bytes=known
        )
        if reading.reserved_bytes is None:
            why["peak_reserved_bytes"] = "on the CPU a process reserves what it holds"
        if not context.case.pass_.needs_grad:
            why["saved_bytes"] = f"the pass {context.case.pass_} computes no gradients"
        details = {"largest": census.largest(reading.peak_bytes), **reading.details}
        return Measured(
            values={
                "peak_memory_bytes": reading.peak_bytes,
                "extra_memory_bytes": reading.extra_bytes,
                "peak_reserved_bytes": reading.reserved_bytes,
                "input_bytes": census.total("input"),
                "output_bytes": census.total("output"),
                "saved_bytes": census.total("saved"),
            },
            method=reading.method,
            details=details | ({"missing_values": why} if why else {}),
        )


def _count_saved(context: Context, census: tensor_sizes.Census) -> dict[str, str]:
    """Count what a further forward saves; returns the reason if that did not fit."""
    try:
        saved, result = tensor_sizes.saved_by(context.workload().forward)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {"saved_bytes": "the memory did not suffice for a second forward beside the first"}
    census.add("saved", tensor_sizes.numbered("saved", saved))
    del saved, result
    return {}


def _meter(device: Device, *, tuned: bool) -> memory.Meter | str:
    """Return what reads the device's memory, or the reason why nothing can."""
    if device.kind is DeviceKind.CUDA:
        return memory.CudaMeter(device.torch_name)
    missing = memory.cpu_missing()
    if missing is None and not tuned:
        missing = "the C library's allocator cannot be told to return freed memory (mallopt)"
    return missing or memory.ResidentMeter()
