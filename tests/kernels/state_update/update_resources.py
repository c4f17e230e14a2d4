"""Cross-compile the state update as launched and read what the kernels take; needs no GPU.

As a script it prints a table for every configuration, or of those given as
family,dtype,d_state,elements,warps,sequences,architecture.
"""

import functools
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

HEADS, HEADDIM, CHANNELS = 80, 64, 4096
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one compiled kernel takes, and how it moves the state."""

    registers: int  # per thread
    stack_bytes: int  # per thread: registers spilled to memory
    shared_bytes: int  # per program
    wide_loads: int  # instructions that load 16 bytes per thread
    wide_stores: int

    @property
    def text(self):
        return (
            f"{self.registers} regs, {self.stack_bytes} B spilled, {self.shared_bytes} B shared, "
            f"{self.wide_loads} wide loads, {self.wide_stores} wide stores"
        )


def usage(family, dtype, d_state, config, arch, *, gated=True):
    """Compile the kernel of a family for an architecture, as launched, and return its Usage."""
    from mambench.harness.static.binary import Binary
    from mambench.harness.static.record import record

    call = functools.partial(
        update, family=family, dtype=dtype, d_state=d_state, config=config, gated=gated
    )
    (launch,) = record(call, arch)
    found = Binary.of(launch.compile())
    return Usage(
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        shared_bytes=found.shared_bytes,
        wide_loads=wide(found, "LDG.E"),
        wide_stores=wide(found, "STG.E"),
    )


def update(draw, *, family, dtype, d_state, config, gated):
    """Update a state; `draw` makes tensors without memory."""
    import torch

    from mambench.kernels.state_update.triton_update import selective_state_update

    narrow = functools.partial(draw, dtype=getattr(torch, DTYPES[dtype]))
    fp32 = functools.partial(draw, dtype=torch.float32)
    batch = 128
    rows = (HEADS, HEADDIM) if family == "ssd" else (CHANNELS,)
    decay = (HEADS,) if family == "ssd" else (CHANNELS, d_state)
    selective_state_update(
        narrow(batch, *rows, d_state),
        narrow(batch, *rows),
        narrow(batch, rows[0]),
        fp32(*decay),
        *(narrow(batch, 1, d_state), narrow(batch, 1, d_state)),
        fp32(rows[0]),
        narrow(batch, *rows) if gated else None,
        fp32(rows[0]),
        True,
        config=config,
    )


def wide(binary, begin):
    """Count the instructions of a kind that move 16 bytes a thread."""
    return sum(
        count for name, count in binary.opcodes.items() if name.startswith(begin) and ".128" in name
    )


def main():
    """Print what every configuration takes."""
    package = Path(__file__).resolve().parents[3] / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    from mambench.kernels.state_update.config import CONFIGS, Config

    wanted = []
    for argument in sys.argv[1:]:
        family, dtype, *sizes = argument.split(",")
        d_state, elements, warps, sequences, arch = map(int, sizes)
        config = Config(elements=elements, warps=warps, sequences=sequences)
        wanted.append((family, dtype, d_state, config, arch))
    wanted = wanted or [
        (family, "bf16", d_state, config, 90)
        for family, d_state in (("ssd", 128), ("s6", 16))
        for config in CONFIGS
        if family == "s6" or config.sequences == 1
    ]
    for family, dtype, d_state, config, arch in wanted:
        found = usage(family, dtype, d_state, config, arch)
        print(f"{family} {dtype} N={d_state} sm_{arch} {config}: {found.text}", flush=True)


if __name__ == "__main__":
    main()
