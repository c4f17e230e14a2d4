"""The times of one execution: on the GPU, of a call, of the host. See `harness.cuda_timing`."""

from typing import Any

from mambench.harness import telemetry, timing
from mambench.harness.profilers.base import CaseProfiler, Context, Measured, Work
from mambench.harness.spec import DeviceKind, metrics_of
from mambench.harness.timing import Timing

# Of the run's sampling time: they answer a second question, and must not double what a run takes.
SECOND_SHARE = 0.25


class Time(CaseProfiler):
    """The time the kernels take on a GPU, the time of a call on a CPU."""

    name = "time"
    summary = "time of one execution: on a GPU of its kernels, on a CPU by the host's clock"
    metrics = metrics_of("time")
    order = 100

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of warm-up and samples."""
        return sampling_s(work)

    def measure(self, context: Context) -> Measured:
        """Take samples until the median is known well enough."""
        execute, before = context.execute(), context.telemetry.snapshot()
        if context.device.kind is DeviceKind.CUDA:
            from mambench.harness import cuda_timing

            taken, reusable = cuda_timing.time_gpu(execute, context.rule())
            if not reusable:
                context.give_up_process("a capture failed")
        else:
            taken = timing.time_cpu(execute, context.rule())
        context.timings[self.name] = taken
        values = {
            "time_s": taken.median_s,
            "tokens_per_s": context.case.tokens / taken.median_s,
            **context.first_call,
        }
        return Measured(
            values=values,
            method=taken.method,
            samples_s=taken.samples_s,
            details=_details(context, taken, before),
        )


class CallTime(CaseProfiler):
    """Device time around one eager call, launch gaps included."""

    name = "call_time"
    summary = "time between two device events around one eager call, launch gaps included"
    metrics = metrics_of("call_time")
    devices = (DeviceKind.CUDA,)
    order = 50

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of warm-up and samples."""
        return sampling_s(work, SECOND_SHARE)

    def measure(self, context: Context) -> Measured:
        """Call eagerly on an idle device."""
        from mambench.harness import cuda_timing

        before = context.telemetry.snapshot()
        taken = cuda_timing.time_calls(context.execute(), context.rule(SECOND_SHARE))
        return Measured(
            values={"call_time_s": taken.median_s},
            method=taken.method,
            samples_s=taken.samples_s,
            details=_details(context, taken, before),
        )


def sampling_s(work: Work, share: float = 1.0) -> float:
    """Estimate the seconds of warm-up and samples for this share of the run's sampling time."""
    settings, execution_s = work.settings, work.execution_s
    samples_s = max(share * settings.target_s, settings.min_samples * execution_s)
    samples_s = min(samples_s, settings.max_samples * execution_s)
    warm_up_s = max(execution_s, min(timing.WARM_UP_S, share * settings.target_s))
    return min(warm_up_s + samples_s, settings.time_limit_s)


def _details(context: Context, taken: Timing, before: dict[str, Any]) -> dict[str, Any]:
    snapshots = {"before": before, "after": context.telemetry.snapshot()}
    return taken.details | {
        "threads": context.threads,
        "telemetry": snapshots,
        "throttled": telemetry.throttled(snapshots),
    }
