"""What a case will take, before it runs: seconds and bytes, from the cost model and coarse rates.

Good to a factor of a few, which is what ordering cases, a time budget and the refusal of cases that
cannot fit need. The progress display corrects the seconds by what it sees.
"""

from dataclasses import dataclass

from mambench.harness import registry
from mambench.harness.spec import Case, Device, DeviceKind, DType, Outcome
from mambench.implementations.base import Implementation

# A case is left out only when its estimate exceeds the device's memory by this factor: the model
# cannot know how well an allocator or a kernel reuses buffers, and a run that fits is worth more
# than one `oom` saved.
MEMORY_FACTOR = 1.5
FIRST_EXECUTIONS = 3  # the first call, and two by the gate


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Sustained rates of an unknown device of a kind, on the low side."""

    flop_per_s: float  # matrix products in the dtype below
    wide_factor: float  # how much slower fp32 is than 16-bit (on the CPU: 16-bit than fp32)
    bytes_per_s: float
    launch_s: float  # one operation launched from Python
    case_s: float  # fixed: worker, inputs
    gate_flop_per_s: float  # the float64 reference of the correctness gate


RATES = {
    DeviceKind.CPU: Rates(
        flop_per_s=2e10,
        wide_factor=4,
        bytes_per_s=4e9,
        launch_s=8e-6,
        case_s=0.3,
        gate_flop_per_s=2e9,
    ),
    DeviceKind.CUDA: Rates(
        flop_per_s=1.5e14,
        wide_factor=8,
        bytes_per_s=1e12,
        launch_s=1e-5,
        case_s=0.4,
        gate_flop_per_s=5e11,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a case takes before it is measured, one execution of it, and modelled peak memory."""

    set_up_s: float  # worker, inputs, first call, gate
    execution_s: float
    launches: int  # operations launched by one execution
    memory_bytes: int


def estimate(case: Case, implementation: Implementation, device: Device) -> Estimate:
    """Estimate what a case takes on a device, its measurements aside: those know their own."""
    from mambench.implementations.cost import case_cost  # torch-free, but not needed to list

    cost, rates = case_cost(case), RATES[device.kind]
    narrow = case.dtype in (DType.FP16, DType.BF16)
    slow = narrow if device.kind is DeviceKind.CPU else not narrow
    arithmetic_s = cost.model_flop / rates.flop_per_s * (rates.wide_factor if slow else 1)
    memory_s = cost.compulsory_bytes / rates.bytes_per_s
    launches: int = registry.ask(implementation, "launches", case) * (
        3 if case.pass_.needs_grad else 1
    )
    workspace_bytes: int = registry.ask(implementation, "workspace_bytes", case)
    execution_s = max(arithmetic_s, memory_s) + launches * rates.launch_s
    return Estimate(
        set_up_s=rates.case_s
        + registry.ask(implementation, "tuning_s", case)
        + cost.model_flop / rates.gate_flop_per_s
        + FIRST_EXECUTIONS * execution_s,
        execution_s=execution_s,
        launches=launches,
        memory_bytes=cost.compulsory_bytes + workspace_bytes,
    )


def refusal(memory_bytes: int, device: Device) -> tuple[Outcome, str] | None:
    """Return why a case cannot fit on the device, or None."""
    if memory_bytes <= MEMORY_FACTOR * device.memory_bytes:
        return None
    gib = 1024**3
    return (
        Outcome.SKIPPED,
        f"needs about {memory_bytes / gib:,.1f} GiB by the memory model; the device has "
        f"{device.memory_bytes / gib:,.1f} GiB",
    )
