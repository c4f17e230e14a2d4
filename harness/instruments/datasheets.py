"""What the makers of GPUs state about them, each with the document. No torch.

Dense rates (without structured sparsity), in FLOP/s and bytes/s. Nothing is listed that its
document does not state; what is not known here is None, never the number of a similar GPU.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

T, G = 1e12, 1e9


@dataclass(frozen=True, kw_only=True)
class Datasheet:
    """One GPU as its maker describes it."""

    source: str
    memory_bytes_per_s: float | None = None
    matrix_flop_per_s: Mapping[str, float] = field(default_factory=dict[str, float])  # by dtype


def _tensor(bf16: float, tf32: float, fp32: float, fp64: float | None = None) -> dict[str, float]:
    """Return rates in FLOP/s from TFLOP/s; fp32 is that of the vector units."""
    rates = {"bf16": bf16 * T, "fp16": bf16 * T, "tf32": tf32 * T, "fp32": fp32 * T}
    return rates if fp64 is None else rates | {"fp64": fp64 * T}


_H100 = "NVIDIA H100 Tensor Core GPU datasheet (tensor rates halved: stated with sparsity)"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_A100_RATES = _tensor(312, 156, 19.5, 19.5)

# The first pattern found in the name that NVML gives. More special ones come first.
_TABLE: tuple[tuple[str, Datasheet], ...] = (
    (
        r"H100 80GB HBM3$",
        Datasheet(
            source=f"{_H100}, H100 SXM",
            memory_bytes_per_s=3.35 * T,
            matrix_flop_per_s=_tensor(989.5, 494.5, 67, 67),
        ),
    ),
    (
        r"H100 PCIe$",
        Datasheet(
            source=f"{_H100}, H100 PCIe",
            memory_bytes_per_s=2.0 * T,
            matrix_flop_per_s=_tensor(756.5, 378, 51, 51),
        ),
    ),
    (
        r"H100 NVL$",
        Datasheet(
            source=f"{_H100}, H100 NVL",
            memory_bytes_per_s=3.9 * T,
            matrix_flop_per_s=_tensor(835.5, 417.5, 60, 60),
        ),
    ),
    (
        r"H200$",
        Datasheet(
            source="NVIDIA H200 Tensor Core GPU datasheet, H200 SXM (tensor rates halved: stated "
            "with sparsity)",
            memory_bytes_per_s=4.8 * T,
            matrix_flop_per_s=_tensor(989.5, 494.5, 67, 67),
        ),
    ),
    (
        r"A100-SXM4-80GB$",
        Datasheet(source=_A100, memory_bytes_per_s=2039 * G, matrix_flop_per_s=_A100_RATES),
    ),
    (
        r"A100 80GB PCIe$",
        Datasheet(source=_A100, memory_bytes_per_s=1935 * G, matrix_flop_per_s=_A100_RATES),
    ),
    (
        r"A100-(SXM4|PCIE)-40GB$",
        Datasheet(source=_A100, memory_bytes_per_s=1555 * G, matrix_flop_per_s=_A100_RATES),
    ),
    (
        r"L40S$",
        Datasheet(
            source="NVIDIA L40S datasheet",
            memory_bytes_per_s=864 * G,
            matrix_flop_per_s=_tensor(362.05, 183, 91.6),
        ),
    ),
    (
        r"GeForce RTX 4090$",
        Datasheet(
            source="NVIDIA Ada GPU architecture whitepaper, appendix A (fp32 accumulation)",
            memory_bytes_per_s=1008 * G,
            matrix_flop_per_s=_tensor(165.2, 82.6, 82.6),
        ),
    ),
    (
        r"B200$",
        Datasheet(
            source="NVIDIA Blackwell architecture technical brief, HGX B200 (per GPU, dense)",
            memory_bytes_per_s=8.0 * T,
            matrix_flop_per_s={"bf16": 2250 * T, "fp16": 2250 * T},
        ),
    ),
)
# CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": results per clock
# cycle and multiprocessor of the special functions, of which ex2 is one.
_EXP_PER_CLOCK = {(8, 0): 16, (8, 6): 16, (8, 9): 16, (9, 0): 16}
EXP_SOURCE = "CUDA C++ Programming Guide, Throughput of Native Arithmetic Instructions"


def find(name: str) -> Datasheet | None:
    """Return what is stated about a GPU of this name, or None if it is not in the table."""
    return next((sheet for pattern, sheet in _TABLE if re.search(pattern, name)), None)


def exp_per_clock(capability: tuple[int, int] | None) -> int | None:
    """Return how many exponentials a multiprocessor computes per clock cycle, or None."""
    return None if capability is None else _EXP_PER_CLOCK.get(capability)
