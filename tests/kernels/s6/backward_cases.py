"""Problems of the Hopper scan's backward, their gradients in float64, and its PTX on the CPU.

What the tests of its two kernels share; `conftest` makes it importable.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mambench.kernels.s6 import hopper_backward, hopper_scan

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32",
}  # fmt: skip
LIMIT = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 2e-6}  # one rounding
SUM_LIMIT = 5e-6  # of what stays in fp32
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
TARGET = GPUTarget("cuda", 90, 32)


def load(path: Path, name: str) -> ModuleType:
    """Import a file as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


machine = load(Path(__file__).parents[1] / "ptx_machine.py", "ptx_machine")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and switches of a backward, and the segments that time is divided into."""

    batch: int = 1
    d_inner: int = 16
    seqlen: int = 40
    ngroups: int = 1
    d_state: int = 16
    dtype: torch.dtype = torch.bfloat16
    gated: bool = False
    has_D: bool = True
    has_bias: bool = True
    softplus: bool = True
    has_last: bool = True
    segments: int | None = 2


def tensors(p: Problem, device: str = "cpu") -> tuple[dict[str, Any], Any, Any]:
    """Draw the inputs and the gradients of out and of the last state."""
    gen = torch.Generator().manual_seed(p.seqlen + p.d_state)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    A = -torch.rand(p.d_inner, p.d_state, generator=gen) - 0.1
    A[: p.d_inner // 4] *= 1e-3  # channels that remember longer than the sequence
    shape = (p.batch, p.d_inner, p.seqlen)
    rows = (p.batch, p.ngroups, p.d_state, p.seqlen)
    delta = draw(*shape) * 0.5
    made = {
        "u": draw(*shape).to(p.dtype),
        "delta": (delta if p.softplus else delta.abs() * 0.2).to(p.dtype),
        "A": A,
        "B": draw(*rows).to(p.dtype),
        "C": draw(*rows).to(p.dtype),
        "D": draw(p.d_inner) if p.has_D else None,
        "z": draw(*shape).to(p.dtype) if p.gated else None,
        "delta_bias": draw(p.d_inner).abs() * 0.1 if p.has_bias else None,
    }
    dout = draw(*shape).to(p.dtype).to(device)
    dlast = draw(p.batch, p.d_inner, p.d_state).to(device) if p.has_last else None
    return {k: None if v is None else v.to(device) for k, v in made.items()}, dout, dlast


def reference(
    p: Problem, t: dict[str, Any], dout: torch.Tensor, dlast: Any, every: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Differentiate the recurrence in float64; returns gradients and the kept states."""
    d = {k: None if v is None else v.double().requires_grad_() for k, v in t.items()}
    dt = d["delta"] if d["delta_bias"] is None else d["delta"] + d["delta_bias"][:, None]
    dt = F.softplus(dt, threshold=1e9) if p.softplus else dt
    B, C = (d[k].repeat_interleave(p.d_inner // p.ngroups, 1) for k in "BC")
    h = torch.zeros(p.batch, p.d_inner, p.d_state, dtype=torch.float64, device=dt.device)
    ys, kept = [], []
    for i in range(p.seqlen):
        if i % every == 0:
            kept.append(h.detach())
        h = torch.exp(dt[..., i, None] * d["A"]) * h + (dt * d["u"])[..., i, None] * B[..., i]
        ys.append((h * C[..., i]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if d["D"] is None else y + d["u"] * d["D"][:, None]
    y = y if d["z"] is None else y * F.silu(d["z"])
    outputs, gradients = [y], [dout.double()]
    if dlast is not None:
        outputs, gradients = [y, h], [dout.double(), dlast.double()]
    torch.autograd.backward(outputs, gradients)
    return {k: None if v is None else v.grad for k, v in d.items()}, torch.stack(kept, 1)


class Emulated:
    """Stands for a kernel: compiles it for sm_90 and runs its PTX on the CPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(
            *values: Any, num_warps: int, maxnreg: int | None = None,
            launch_cooperative_grid: bool = False, **constants: Any,
        ):  # fmt: skip
            names = self.kernel.arg_names
            given = dict(zip(names, values, strict=False)) | constants
            compiled = compile_kernel(self.kernel, given, num_warps)
            signature = compiled.src.signature
            arguments = [given[name] for name in names if signature[name] != "constexpr"]
            ptx = compiled.asm["ptx"]
            missing = ptx[: ptx.index(".reqntid")].count(".param") - len(arguments)
            machine.launch(
                ptx, grid[0], [*arguments, *[0] * missing],
                threads=32 * num_warps, shared_bytes=compiled.metadata.shared,
            )  # fmt: skip

        return launch


def gradients(
    p: Problem, config: Any, t: dict[str, Any], dout: torch.Tensor, dlast: Any, kept: Any
) -> dict[str, Any]:
    """Return the kernels' gradients by input; kept as `hopper_backward.scan_backward` takes it."""
    got = hopper_backward.scan_backward(
        tuple(t[name] for name in NAMES), p.softplus, kept, dout, dlast, config=config,
        segments=p.segments,
    )  # fmt: skip
    return dict(zip(NAMES, got, strict=True))


def run(p: Problem, config: Any, *, give: bool = False) -> None:
    """Hold the gradients to float64's; give: the kept states may move into du."""
    t, dout, dlast = tensors(p)
    want, kept = reference(p, t, dout, dlast, config.chunk)
    kept = kept.float().contiguous()
    given: Any = [kept] if give else kept
    got = gradients(p, config, t, dout, dlast, given)
    assert given == [] or not give
    assert_right(got, want, p.dtype)


def run_on_the_gpu(p: Problem, config: Any) -> None:
    """Hold the gradients to float64's, and to the same bits once states are moved."""
    t, dout, dlast = tensors(p, "cuda")
    want, _ = reference(p, t, dout, dlast, config.chunk)
    every = {"delta_softplus": p.softplus, "checkpoint_every": config.chunk}
    kept = hopper_scan.scan_forward(**t, **every)[2]
    got = gradients(p, config, t, dout, dlast, kept)
    assert_right(got, want, p.dtype)
    again = gradients(p, config, t, dout, dlast, [kept])  # now in du's memory
    assert all(a is None or torch.equal(a, again[name]) for name, a in got.items())


def faulty(source: Any, tmp_path: Path, name: str, old: str, new: str) -> ModuleType:
    """Import a module with a fault planted in it."""
    text = Path(str(source.__file__)).read_text()
    assert text.count(old) == 1
    stem = re.sub(r"\W", "_", name)
    path = tmp_path / f"{stem}.py"
    path.write_text(text.replace(old, new))
    return load(path, stem)


def assert_compiles_well(
    kernel: Any, constants: dict[str, Any], config: Any, *, absent: tuple[str, ...]
) -> None:
    """Few registers are spilled, none in the loop with exchanges over lanes; one thread counts.

    absent: pointers that are not given. Shared memory suffices for the blocks of the configuration.
    """
    given: dict[str, Any] = dict.fromkeys(kernel.arg_names, 1) | constants
    narrow = ("u", "delta", "B", "C", "z", "dout", "du", "ddelta", "dz", "dBC")
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            dtype = torch.bfloat16 if name[:-4] in narrow else torch.float32
            given[name] = torch.empty(16, dtype=torch.int32 if name == "counter_ptr" else dtype)
    compiled = compile_kernel(kernel, given | dict.fromkeys(absent), config.warps)
    assert config.resident * (compiled.metadata.shared + 1024) <= 228 * 1024
    # by one thread for all, with a value that nobody uses: ptxas loses the thread's predicate
    assert "@p ld.acquire" not in compiled.asm["ptx"]
    lines = machine_code(compiled)
    assert counted_by_all(lines) == []
    everyone = compiled.asm["ptx"].replace("@p red.release", "red.release")
    assert counted_by_all(machine_code(compiled, everyone)) != []
    exchanges = [i for i, line in enumerate(lines) if "SHFL.BFLY" in line]
    inner = [i for i in exchanges if sum(abs(i - j) < 600 for j in exchanges) >= 64]
    between = lines[inner[0] : inner[-1]]
    assert len(between) > 400
    assert not [line for line in between if "LDL" in line or "STL" in line]


def is_constant(kernel: Any, name: str) -> bool:
    return kernel.params[kernel.arg_names.index(name)].is_constexpr


def compile_kernel(kernel: Any, given: dict[str, Any], num_warps: int) -> Any:
    """Compile for sm_90 with the types of the arguments given; absent pointers are constants."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        value = given[name]
        one = value == 1 if isinstance(value, int) else False  # which Triton makes a constant
        free = kernel.params[kernel.arg_names.index(name)].do_not_specialize
        if is_constant(kernel, name) or value is None or (one and not free):
            signature[name] = "constexpr"
        else:
            tensor = isinstance(value, torch.Tensor)
            signature[name] = "*" + TYPES[value.dtype] if tensor else "i32"
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    constants = {index[n]: given[n] for n in signature if signature[n] == "constexpr"}
    aligned = {
        index[n]: [["tt.divisibility", 16]]
        for n in signature
        if signature[n][0] == "*" and given[n].data_ptr() % 16 == 0
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    made = source(kernel, signature, constants, aligned)
    return triton.compile(made, target=TARGET, options={"num_warps": num_warps})


def machine_code(compiled: Any, ptx: str | None = None) -> list[str]:
    """Return the instructions of a compiled kernel, or of other PTX of it."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        if ptx is not None:
            source.write_text(ptx)
            command = [tools / "ptxas", "-arch=sm_90a", source, "-o", cubin]
            subprocess.run(command, capture_output=True, check=True)
        command = [tools / "cuobjdump", "-sass", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split("*/")[1] for line in sass.stdout.splitlines() if "*/  " in line]


def counted_by_all(code: list[str]) -> list[str]:
    """Return the additions to counters that are not left to one thread of a block.

    ptxas 12.8 has been seen to lose its predicate behind a load that nobody uses
    (`hopper_wide_kernel`). One lane then adds how many of its warp are there.
    """
    lines = [line.strip() for line in code]
    counts = [i for i, line in enumerate(lines) if re.search(r"\bREDG\.E\.ADD\b", line)]
    assert counts
    return [lines[i] for i in counts if "POPC" in _made(lines, i)]


def _made(lines: list[str], place: int) -> str:
    """Return the instruction that made what the one at a place adds."""
    found = re.search(r"\], (R\d+) ;", lines[place])
    assert found is not None
    made = re.compile(rf"(@\S+ )?\S+ {found[1]}(?:, | ;)")
    return next(line for line in reversed(lines[:place]) if made.match(line))


def assert_right(got: dict[str, Any], want: dict[str, Any], dtype: torch.dtype) -> None:
    for name in NAMES:
        if want[name] is None:
            assert got[name] is None
            continue
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        limit = SUM_LIMIT if name in ("A", "D", "delta_bias") else LIMIT[dtype]
        assert error < limit, f"{name}: {error:.1e}"
