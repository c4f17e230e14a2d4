"""The numbers that a record can hold: tag, unit and meaning. Imports nothing of ours.

Elsewhere they are imported from `harness.spec`, with the rest of the vocabulary.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that a record can hold: tag, unit and what it means."""

    tag: str
    name: str
    unit: str  # "s", "bytes", "tokens/s", "FLOP", "J", "1" ...
    description: str
    better: str = "lower"  # "lower", "higher" or "neither"
    measured_by: str = ""  # the profiler's name; "" where modelled, and for plugins' own
    modelled: bool = False  # computed from shapes, not measured


METRICS: tuple[Metric, ...] = (
    Metric(
        tag="time_s",
        measured_by="time",
        name="time",
        unit="s",
        description="median time of one execution; the method is in the record",
    ),
    Metric(
        tag="tokens_per_s",
        measured_by="time",
        name="throughput",
        unit="tokens/s",
        better="higher",
        description="tokens computed (batch * seqlen, in decode batch) / time_s",
    ),
    Metric(
        tag="call_time_s",
        measured_by="call_time",
        name="call time",
        unit="s",
        description="median time by device events around one eager call, launch gaps included "
        "(GPU only)",
    ),
    Metric(
        tag="peak_memory_bytes",
        measured_by="memory",
        name="peak memory",
        unit="bytes",
        description="most memory allocated at once while the pass ran, inputs and outputs "
        "included; nothing of the correctness check",
    ),
    Metric(
        tag="extra_memory_bytes",
        measured_by="memory",
        name="extra memory",
        unit="bytes",
        description="peak memory less what was allocated before the pass began",
    ),
    Metric(
        tag="first_call_s",
        measured_by="time",
        name="first call",
        unit="s",
        description="time of the first call in the worker, compilation included where nothing was "
        "cached",
    ),
    Metric(
        tag="compile_s",
        measured_by="time",
        name="compile time",
        unit="s",
        description="part of the first call in which Triton compiled kernels that no cache held",
    ),
    Metric(
        tag="cold_time_s",
        measured_by="cold_time",
        name="cold time",
        unit="s",
        description="median time of one execution that finds none of its inputs in the last-level "
        "cache; the method is in the record",
    ),
    Metric(
        tag="host_time_s",
        measured_by="host_time",
        name="host time",
        unit="s",
        description="median time of the CPU until one eager call returns, the device idle when it "
        "begins (GPU only)",
    ),
    Metric(
        tag="peak_reserved_bytes",
        measured_by="memory",
        name="peak reserved",
        unit="bytes",
        description="most memory that torch's allocator held from the device while the pass ran "
        "(GPU only)",
    ),
    Metric(
        tag="input_bytes",
        measured_by="memory",
        name="inputs",
        unit="bytes",
        better="neither",
        description="inputs of the pass; part of peak memory",
    ),
    Metric(
        tag="output_bytes",
        measured_by="memory",
        name="outputs",
        unit="bytes",
        description="what the pass returns: outputs, or gradients",
    ),
    Metric(
        tag="saved_bytes",
        measured_by="memory",
        name="saved for backward",
        unit="bytes",
        description="what autograd keeps from forward to backward, inputs and parameters aside "
        "(passes with gradients)",
    ),
    Metric(
        tag="kernel_count",
        measured_by="launches",
        name="kernels",
        unit="1",
        description="kernels, copies and fills on the device per execution",
    ),
    Metric(
        tag="largest_kernel_frac",
        measured_by="launches",
        name="largest kernel",
        unit="1",
        better="neither",
        description="share of the device's busy time that the kernel with the largest total takes",
    ),
    Metric(
        tag="busy_time_s",
        measured_by="launches",
        name="busy time",
        unit="s",
        description="sum of the durations of an execution's kernels, as the profiler saw them",
    ),
    Metric(
        tag="max_registers",
        measured_by="launches",
        name="registers",
        unit="1",
        description="registers per thread of the Triton kernel that has most of them",
    ),
    Metric(
        tag="max_spills",
        measured_by="launches",
        name="spills",
        unit="1",
        description="registers spilled to local memory by the Triton kernel that spills most",
    ),
    Metric(
        tag="max_shared_bytes",
        measured_by="launches",
        name="shared memory",
        unit="bytes",
        description="shared memory per block of the Triton kernel that has most of it",
    ),
    Metric(
        tag="energy_j",
        measured_by="energy",
        name="energy",
        unit="J",
        description="energy of the device per execution while it repeats it without a pause; idle "
        "power is not subtracted",
    ),
    Metric(
        tag="tokens_per_j",
        measured_by="energy",
        name="tokens per joule",
        unit="tokens/J",
        better="higher",
        description="tokens computed by one execution / energy_j",
    ),
    Metric(
        tag="power_w",
        measured_by="energy",
        name="power",
        unit="W",
        better="neither",
        description="mean power over the region in which energy was counted",
    ),
    Metric(
        tag="dram_bytes",
        measured_by="traffic",
        name="HBM traffic",
        unit="bytes",
        description="bytes read from and written to the device's memory by one execution, by "
        "hardware counters",
    ),
    Metric(
        tag="dram_read_bytes",
        measured_by="traffic",
        name="HBM reads",
        unit="bytes",
        description="bytes read from the device's memory by one execution",
    ),
    Metric(
        tag="dram_write_bytes",
        measured_by="traffic",
        name="HBM writes",
        unit="bytes",
        description="bytes written to the device's memory by one execution, what it left dirty in "
        "L2 included",
    ),
    Metric(
        tag="traffic_ratio",
        measured_by="traffic",
        name="traffic ratio",
        unit="1",
        description="dram_bytes (measured) / compulsory_bytes (modelled): 1 if nothing moves twice",
    ),
    Metric(
        tag="sol_frac",
        measured_by="sol",
        name="share of ceiling",
        unit="1",
        better="higher",
        description="least time of the modelled work at this machine's measured ceilings / time_s; "
        "which ceiling binds is in the record",
    ),
    Metric(
        tag="model_flop",
        name="model FLOP",
        unit="FLOP",
        better="neither",
        modelled=True,
        description="arithmetic of the algorithm, the same for all implementations of a family",
    ),
    Metric(
        tag="compulsory_bytes",
        name="compulsory bytes",
        unit="bytes",
        better="neither",
        modelled=True,
        description="each input read once and each output written once",
    ),
    Metric(
        tag="state_bytes",
        name="decoding state",
        unit="bytes",
        modelled=True,
        description="what decoding keeps from token to token, of all sequences: an SSM's state, "
        "attention's keys and values of the context and the new token (prefill and decode only)",
    ),
    Metric(
        tag="weight_count",
        name="weights",
        unit="1",
        better="neither",
        modelled=True,
        description="parameters of the block (block level only)",
    ),
)


def metrics_of(profiler: str) -> tuple[Metric, ...]:
    """Return the metrics that a profiler of ours measures."""
    return tuple(metric for metric in METRICS if metric.measured_by == profiler)
