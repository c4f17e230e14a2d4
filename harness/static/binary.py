"""What a kernel's binary takes, read with the disassembler that Triton's wheel carries.

Imports triton lazily.
"""

# Triton has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from mambench.harness.errors import MeasurementError

# What each class of instructions begins with, in SASS from sm_80 to sm_120.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "global_loads": ("LDG", "LD.", "UBLKCP", "UTMALDG"),
    "global_stores": ("STG", "ST.", "RED", "ATOM", "UTMASTG", "UTMAREDG"),
    "shared_accesses": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "spill_accesses": ("LDL", "STL"),
    "barriers": ("BAR", "SYNCS", "MEMBAR", "UCGABAR", "WARPSYNC"),
}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Binary:
    """One kernel's machine code in figures."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread: where registers spill to
    shared_bytes: int  # of a block
    instructions: int  # without padding
    global_loads: int
    global_stores: int
    shared_accesses: int
    spill_accesses: int
    barriers: int
    digest: str  # of the machine code
    opcodes: Mapping[str, int] = field(default_factory=dict[str, int])  # full name: how many

    @classmethod
    def of(cls, compiled: Any) -> Self:
        """Read what `triton.compile` made; raises MeasurementError if it cannot be disassembled."""
        code: bytes = compiled.asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code)
            file.flush()
            usage = _dump(file.name, "-res-usage")
            sass = _dump(file.name, "-sass")
        return cls.parse(usage, sass, shared_bytes=compiled.metadata.shared)

    @classmethod
    def parse(cls, usage: str, sass: str, *, shared_bytes: int) -> Self:
        """Read cuobjdump's resource usage and disassembly of one kernel."""
        found = _USAGE.search(usage)
        names = [name for name in _INSTRUCTION.findall(sass) if not name.startswith("NOP")]
        if found is None or not names:
            raise MeasurementError(f"cuobjdump said nothing of a kernel: {usage.strip()[:200]}")
        counts = {
            kind: sum(name.startswith(begins) for name in names) for kind, begins in CLASSES.items()
        }
        # ATOMS and ATOM share a beginning; shared memory's are not global.
        counts["global_stores"] -= sum(name.startswith("ATOMS") for name in names)
        # Encoded instructions only: headers name files and may name folders.
        encoded = re.findall(r"/\*\s*(0x[0-9a-f]+)\s*\*/", sass)
        return cls(
            registers=int(found[1]),
            stack_bytes=int(found[2]),
            shared_bytes=shared_bytes,
            instructions=len(names),
            digest=hashlib.sha256(" ".join(encoded).encode()).hexdigest()[:16],
            opcodes=dict(sorted(Counter(names).items())),
            **counts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


def _dump(path: str, flag: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    try:
        done = subprocess.run([tool, flag, path], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MeasurementError(f"{tool.name}, which comes with Triton, failed: {error}") from error
    return done.stdout
