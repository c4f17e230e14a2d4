"""Joules of one execution. See `harness.instruments.energy`."""

import time

from mambench.harness.instruments import energy
from mambench.harness.profilers.base import CaseProfiler, Context, Measured, Work
from mambench.harness.profilers.timers import not_capturable
from mambench.harness.spec import Device, DeviceKind, metrics_of

CPU_CHUNK_S = 0.002
TICK_S = 0.1  # of NVML's counter


class Energy(CaseProfiler):
    """Energy and mean power while the execution is repeated."""

    name = "energy"
    summary = "joules of one execution and mean power, from NVML's or RAPL's energy counter"
    metrics = metrics_of("energy")
    order = 120

    def missing(self, device: Device) -> str | None:
        """Return why a CPU's energy cannot be read; a GPU says so when it is tried."""
        return energy.Rapl().missing() if device.kind is DeviceKind.CPU else None

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of the ramp, the region and, in the mean, what two ticks add."""
        return energy.RAMP_S + max(energy.REGION_S, work.settings.target_s) + TICK_S

    def measure(self, context: Context) -> Measured:
        """Repeat the execution until its energy is known."""
        rule = context.rule()
        region_s = max(energy.REGION_S, rule.target_s)
        ceiling_s = min(energy.CEILING_S, rule.limit_s)
        if context.device.kind is DeviceKind.CPU:
            counter = energy.Rapl()
            meter = energy.Meter(
                counter.energy_j, context.telemetry.snapshot, tick_s=counter.tick_s
            )
            reading = energy.measure(
                _cpu_burst(context), meter, region_s=region_s, ceiling_s=ceiling_s
            )
            return _measured(context, reading, "rapl")
        sensors = context.telemetry.sensors
        if sensors is None:
            return Measured.missing(context.telemetry.missing or "NVML does not answer")
        if sensors.energy_j() is None:
            return Measured.missing("this GPU's driver does not count its energy (NVML)")
        return self._on_gpu(context, region_s, ceiling_s)

    def _on_gpu(self, context: Context, region_s: float, ceiling_s: float) -> Measured:
        from mambench.harness.instruments.cuda_load import Load

        known = context.timings.get("time")
        once_s = known.median_s if known else _once_s(context)
        tried = not_capturable(context)
        load = Load(context.execute(), once_s, not_capturable=tried)
        if load.not_captured and not tried:
            context.give_up_process("a capture failed")
        sensors = context.telemetry.sensors
        assert sensors is not None
        try:
            meter = energy.Meter(sensors.energy_j, sensors.snapshot)
            reading = energy.measure(load.burst, meter, region_s=region_s, ceiling_s=ceiling_s)
        finally:
            load.close()
        measured = _measured(context, reading, f"nvml-total-energy, {load.method}")
        if load.not_captured:
            return Measured(
                values=measured.values,
                method=measured.method,
                details={**measured.details, "not_captured": load.not_captured},
            )
        return measured


def _once_s(context: Context) -> float:
    begin = time.perf_counter()
    context.execute()()
    context.synchronize()
    return time.perf_counter() - begin


def _cpu_burst(context: Context) -> energy.Burst:
    execute = context.execute()

    def burst(poll: energy.Poll) -> int:
        begin, ended = time.perf_counter(), 0
        while time.perf_counter() - begin < CPU_CHUNK_S:
            execute()
            ended += 1
        poll()
        return ended

    return burst


def _measured(context: Context, reading: energy.EnergyReading, method: str) -> Measured:
    if reading.energy_j is None or reading.missing:
        return Measured.missing(reading.missing or "no energy was counted", **reading.details)
    values = {
        "energy_j": reading.energy_j,
        "tokens_per_j": context.case.tokens / reading.energy_j if reading.energy_j else None,
        "power_w": reading.power_w,
    }
    return Measured(values=values, method=method, details=reading.details)
