"""Cross-compile the SSD kernels as launched and read the registers they need; needs no GPU.

As a script it prints a table: `ssd_resources.py bf16,64,128,90 ...` (dtype, P, N, architecture).
"""

import functools
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NHEADS, NGROUPS = 32, 1
OPTIONAL = ("z_ptr", "grad_z_ptr")
FP32 = (
    "A_ptr", "D_ptr", "bias_ptr", "cum_ptr", "cumj_ptr", "entry_ptr", "end_ptr", "decay_ptr",
    "final_ptr", "v_ptr", "dt_ptr", "partial_C_ptr", "partial_heads_ptr", "partial_D_ptr",
    "grad_B_ptr", "grad_C_ptr", "passed_ptr", "read_kept_ptr", "diag_ptr", "partial_B_ptr",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one compiled kernel takes."""

    registers: int  # per thread
    stack_bytes: int  # per thread: registers spilled to memory
    shared_bytes: int  # per program

    @property
    def text(self):
        return f"{self.registers} regs, {self.stack_bytes} B spilled, {self.shared_bytes >> 10} KiB"


def usages(dtype, headdim, d_state, arch, *, gated):
    """Return {kernel: Usage} of everything that a forward and a backward pass launch."""
    from mambench.kernels.ssd import triton_parts, triton_ssd, triton_ssd_backward, triton_whole
    from mambench.kernels.ssd.triton_config import tiling

    tiles = tiling(4 if dtype == "fp32" else 2, headdim, d_state, wgmma=arch == 90)
    shared = {
        "P": headdim, "N": d_state, "BLOCK_N": tiles.block_n, "PRECISION": tiles.precision,
        "HAS_Z": gated, "nheads": NHEADS, "ngroups": NGROUPS, "D_DIMS": 1, "HAS_BIAS": True,
        "SOFTPLUS": True, "STORE_FINAL": True, "HAS_ENTRY": True, "STORE_END": True,
        "HAS_SEQ": False,
    }  # fmt: skip
    walk = {"BLOCK_P": tiles.block_p}
    block_p = tiles.grad_block_p
    grad = {"Q": tiles.grad_chunk, "BLOCK_P": block_p, "P_BLOCKS": -(-headdim // block_p)}
    block_c = block_p if gated else tiles.grad_c_block_p
    grad_c = {"BLOCK_P": block_c, "P_BLOCKS": -(-headdim // block_c)}
    grad_c["STAGES"] = 1 if gated else tiles.grad_c_stages
    scan = {**walk, "Q": tiles.chunk, "STAGES": tiles.scan_stages}
    states = {**walk, "STAGES": tiles.state_stages}
    build = functools.partial(compiled, dtype=dtype, arch=arch)
    found = {
        "scan": build(triton_ssd.scan_kernel, shared | scan, tiles.scan_warps),
        "grad_c": build(
            triton_ssd_backward.grad_c_kernel,
            shared | grad | grad_c,
            tiles.grad_c_warps,
        ),
        "grad_b": build(
            triton_ssd_backward.grad_b_kernel,
            shared | grad | {"STAGES": tiles.grad_b_stages, "PASSED": -(-headdim // tiles.block_p)},
            tiles.grad_b_warps,
        ),
    }
    if tiles.whole_heads and not gated:
        stages = {"STAGES": tiles.whole_stages, "STAGES_B": tiles.whole_sum_stages}
        whole = {**shared, **grad, **stages, "BLOCK_P": max(16, 1 << (headdim - 1).bit_length())}
        found["whole"] = build(triton_whole.whole_kernel, whole, tiles.grad_b_warps)
        finish = {**shared, "Q": tiles.grad_chunk, "HAS_SKIP": True, "SUMS": True}
        finish |= {"BLOCK_H": 8, "BLOCK": 1024, "PASSED": -(-headdim // tiles.block_p)}
        found["finish"] = build(triton_whole.finish_kernel, finish, 4)
    for name, reverse, chunks in (("ends", 0, 0), ("states", 0, 1), ("grad_states", 1, 1)):
        flags = {"REVERSE": bool(reverse), "CHUNK_STATES": bool(chunks), "HAS_ENTRY": bool(chunks)}
        size = {"Q": tiles.grad_chunk if chunks else tiles.chunk, "HAS_Z": gated and bool(reverse)}
        constants = {**shared, **states, **flags, **size}
        found[name] = build(triton_parts.state_kernel, constants, tiles.state_warps)
    return found


def compiled(kernel, constants, warps, *, dtype, arch):
    """Compile one kernel for an architecture and return its Usage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = constant(kernel, name, constants)
        if value is not NotImplemented:
            signature[name], constexprs[(index,)] = "constexpr", value
        elif name.endswith("_ptr"):
            wide = name in FP32 and not (name == "v_ptr" and kernel.fn.__name__ == "state_kernel")
            signature[name] = "*fp32" if wide else f"*{dtype}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("dt_m") else "i32"
            if name.startswith("stride") and not name.endswith("dt_head"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    result = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps},
    )
    return read_usage(result.asm["cubin"], result.metadata.shared)


def constant(kernel, name, constants):
    """Return the compile-time value of an argument, or NotImplemented if it is a run-time one."""
    parameter = next(p for p in kernel.params if p.name == name)
    if parameter.is_constexpr and name.endswith("_token"):
        group = name.split("_")[1] in ("B", "C", "m")
        return (NGROUPS * constants["N"]) if group else NHEADS * constants["P"]
    if parameter.is_constexpr:
        return constants[name]
    if name == "seq_ptr":
        return None
    return None if name in OPTIONAL and not constants["HAS_Z"] else NotImplemented


def read_usage(cubin, shared_bytes):
    """Ask cuobjdump, which comes with Triton, what a cubin's kernel takes."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return Usage(registers=int(registers), stack_bytes=int(stack), shared_bytes=shared_bytes)


def main():
    """Print what every kernel takes, for each dtype,headdim,d_state,arch given."""
    package = Path(__file__).resolve().parents[3] / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    for argument in sys.argv[1:]:
        dtype, *sizes = argument.split(",")
        for gated in (False, True):
            for name, usage in usages(dtype, *map(int, sizes), gated=gated).items():
                gate = "gated" if gated else "plain"
                print(f"{argument:20} {gate} {name:12} {usage.text}", flush=True)


if __name__ == "__main__":
    main()
