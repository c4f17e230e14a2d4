"""Cross-compile the state update as launched and read what the kernels take; needs no GPU.

As a script it prints a table for every configuration, or of those given as
family,dtype,d_state,elements,warps,sequences,architecture.
"""

import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HEADS, HEADDIM, CHANNELS = 80, 64, 4096
FP32 = ("A_ptr", "D_ptr", "bias_ptr")


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
    """Compile the kernel of a family for an architecture and return its Usage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mambench.kernels.state_update import triton_kernels
    from mambench.kernels.state_update.config import padded

    ssd = family == "ssd"
    kernel = triton_kernels.ssd_update_kernel if ssd else triton_kernels.s6_update_kernel
    available = HEADDIM if ssd else CHANNELS
    constants = {
        "HEADS": HEADS if ssd else CHANNELS, "P": HEADDIM if ssd else 1, "N": d_state, "GROUPS": 1,
        "ROWS": config.rows(d_state=d_state, available=available), "N_PADDED": padded(d_state),
        "SEQUENCES": config.sequences, "SOFTPLUS": True,
        "EVICTION": "evict_first" if config.stream else "",
    }  # fmt: skip
    if not gated:
        constants["z_ptr"] = None
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
            continue
        pointer = "*fp32" if name in FP32 else f"*{dtype}"
        signature[name] = pointer if name.endswith("_ptr") else "i32"
        attributes[(index,)] = [["tt.divisibility", 16]]
    result = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps},
    )
    resources, assembly = (dumped(result.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", resources).groups()
    return Usage(
        registers=int(registers),
        stack_bytes=int(stack),
        shared_bytes=result.metadata.shared,
        wide_loads=len(re.findall(r"LDG\.E\S*\.128", assembly)),
        wide_stores=len(re.findall(r"STG\.E\S*\.128", assembly)),
    )


def dumped(cubin, flag):
    """Ask cuobjdump, which comes with Triton, about a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
