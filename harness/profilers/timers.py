"""The times of one execution: hot and cold, of a call, of the host.

How samples are taken says `harness.instruments.cuda_timing`, `harness.instruments.cuda_cold`,
`harness.instruments.timing` and `harness.instruments.cpu_cache`. On the CPU the load of the machine
is noted before and after.
"""

from dataclasses import replace
from typing import Any

from mambench.harness.instruments import cpu_cache, telemetry, timing
from mambench.harness.instruments.telemetry import ThrottleWatch
from mambench.harness.instruments.timing import Timing
from mambench.harness.profilers.base import CaseProfiler, Context, Measured, Work
from mambench.harness.spec import Device, DeviceKind, metrics_of

# Of the run's sampling time: they answer a second question, and must not double what a run takes.
SECOND_SHARE = 0.25
COLD_SHARE = 0.5
COLD_CPU_S = 0.03  # estimate of emptying the caches once
NOT_CAPTURED = "not_captured"
_NO_FIRST = {
    "first_call_s": "the case was first called elsewhere",
    "compile_s": "Triton compiled nothing in the first call, nor loaded it",
}


class Time(CaseProfiler):
    """The time the kernels take on a GPU, the time of a call on a CPU."""

    name = "time"
    summary = "time of one execution, caches warm: of its kernels on a GPU, of the call on a CPU"
    metrics = metrics_of("time")
    order = 100

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of warm-up and samples."""
        return sampling_s(work)

    def measure(self, context: Context) -> Measured:
        """Take samples until the median is known well enough."""
        execute, before = context.execute(), context.telemetry.snapshot()
        if context.device.kind is DeviceKind.CUDA:
            from mambench.harness.instruments import cuda_timing

            taken, reusable = cuda_timing.time_gpu(execute, context.rule(), _watch(context))
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
        measured = _measured(context, taken, before, values)
        why = {tag: reason for tag, reason in _NO_FIRST.items() if tag not in context.first_call}
        if not why:
            return measured
        return replace(measured, details={**measured.details, "missing_values": why})


class ColdTime(CaseProfiler):
    """Like the time, but each execution finds the last-level cache full of other data."""

    name = "cold_time"
    summary = "time of one execution that finds the last-level cache (L2 on a GPU) cold"
    metrics = metrics_of("cold_time")
    order = 110

    def missing(self, device: Device) -> str | None:
        """Return why the cache cannot be emptied."""
        return cpu_cache.missing() if device.kind is DeviceKind.CPU else None

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of warm-up, samples and emptying."""
        emptying_s = COLD_CPU_S if work.device.kind is DeviceKind.CPU else 0.0
        return sampling_s(work, COLD_SHARE) + work.settings.min_samples * emptying_s

    def measure(self, context: Context) -> Measured:
        """Empty the cache before each execution."""
        execute, before = context.execute(), context.telemetry.snapshot()
        rule = context.rule(COLD_SHARE)
        if context.device.kind is DeviceKind.CPU:
            taken = cpu_cache.time_cold(execute, cpu_cache.evictor(), rule)
        else:
            from mambench.harness.instruments import cuda_cold

            taken, reusable = cuda_cold.time_cold(
                execute, rule, _watch(context), not_capturable=not_capturable(context)
            )
            if not reusable:
                context.give_up_process("a capture failed")
        context.timings[self.name] = taken
        return _measured(context, taken, before, {"cold_time_s": taken.median_s})


class CallTime(CaseProfiler):
    """Device time around one eager call, launch gaps included."""

    name = "call_time"
    summary = "time between two device events around one eager call, launch gaps included"
    metrics = metrics_of("call_time")
    devices = (DeviceKind.CUDA,)

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of warm-up and samples."""
        return sampling_s(work, SECOND_SHARE)

    def measure(self, context: Context) -> Measured:
        """Call eagerly on an idle device."""
        from mambench.harness.instruments import cuda_timing

        before, rule = context.telemetry.snapshot(), context.rule(SECOND_SHARE)
        taken = cuda_timing.time_calls(context.execute(), rule, _watch(context))
        return _measured(context, taken, before, {"call_time_s": taken.median_s})


class HostTime(CaseProfiler):
    """How long the CPU is busy with one eager call."""

    name = "host_time"
    summary = "time of the CPU until one eager call returns"
    metrics = metrics_of("host_time")
    devices = (DeviceKind.CUDA,)

    def missing(self, device: Device) -> str | None:
        """Return that a CPU has but one time."""
        if device.kind is DeviceKind.CPU:
            return "on the CPU a call returns when its work is done: time_s is the host's time"
        return None

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of warm-up and samples."""
        return sampling_s(work, SECOND_SHARE)

    def measure(self, context: Context) -> Measured:
        """Call eagerly on an idle device, and do not wait for it."""
        from mambench.harness.instruments import cuda_timing

        before, rule = context.telemetry.snapshot(), context.rule(SECOND_SHARE)
        taken = cuda_timing.time_host(context.execute(), rule)
        return _measured(context, taken, before, {"host_time_s": taken.median_s})


def not_capturable(context: Context) -> str | None:
    """Return why an earlier profiler of the case could not capture it, None if none tried."""
    reasons = (taken.details.get(NOT_CAPTURED) for taken in context.timings.values())
    return next((reason for reason in reasons if reason), None)


def sampling_s(work: Work, share: float = 1.0) -> float:
    """Estimate the seconds of warm-up and samples for this share of the run's sampling time."""
    settings, execution_s = work.settings, work.execution_s
    slow = execution_s > timing.SLOW_EXECUTION_S
    floor = min(timing.SLOW_FLOOR, settings.min_samples) if slow else settings.min_samples
    samples_s = max(share * settings.target_s, floor * execution_s)
    samples_s = min(samples_s, settings.max_samples * execution_s)
    warm_up_s = max(execution_s, min(timing.WARM_UP_S, share * settings.target_s))
    return min(warm_up_s + samples_s, settings.time_limit_s)


def _watch(context: Context) -> ThrottleWatch:
    return ThrottleWatch(context.telemetry.sensors)


def _measured(
    context: Context, taken: Timing, before: dict[str, Any], values: dict[str, float]
) -> Measured:
    snapshots = {"before": before, "after": context.telemetry.snapshot()}
    kept = taken.details.get("throttling", {}).get("kept", ())
    slowed = {reason for batch in kept for reason in batch["reasons"]}
    details = {
        **taken.details,
        "threads": context.threads,
        "telemetry": snapshots,
        "throttled": sorted(slowed | set(telemetry.throttled(snapshots))),
    }
    return Measured(values=values, method=taken.method, samples_s=taken.samples_s, details=details)
