"""The kernels of the ceilings execute the instruction they are for and hardly any other.

Compiled for compute capability 9.0 without a GPU; the machine code is disassembled.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mambench.kernels import ceilings_triton as ceilings  # noqa: E402

# Of each thread, in one round: chains times unrolled operations.
OPERATIONS = ceilings.BLOCK // (32 * ceilings.WARPS) * ceilings.UNROLL


def disassembler() -> str | None:
    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(inside) if inside.is_file() else shutil.which("cuobjdump")


def instructions(kernel: Any, tmp_path: Path) -> Counter[str]:
    program = disassembler()
    if program is None:
        pytest.skip("there is no cuobjdump")
    names = {"out_ptr": "*fp32", "rounds": "i32", "BLOCK": "constexpr", "UNROLL": "constexpr"}
    constants = {"BLOCK": ceilings.BLOCK, "UNROLL": ceilings.UNROLL}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=names, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": ceilings.WARPS},
    )
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    done = subprocess.run([program, "-sass", str(path)], capture_output=True, text=True, check=True)
    found = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)", done.stdout)
    return Counter(found)


def test_exponentials_are_one_instruction_each(tmp_path: Path):
    found = instructions(ceilings._exponentials_kernel, tmp_path)
    assert found["MUFU.EX2"] == OPERATIONS
    # Plain exp2 would multiply before and after each, for the sake of denormal numbers.
    assert found["FMUL"] < OPERATIONS / 8


def test_multiply_adds_are_one_instruction_each(tmp_path: Path):
    found = instructions(ceilings._fused_multiply_add_kernel, tmp_path)
    assert found["FFMA"] == OPERATIONS
    assert found["FMUL"] + found["FADD"] < OPERATIONS / 4


@pytest.mark.gpu
def test_they_do_the_work_that_they_say():
    import torch

    out = torch.empty(ceilings.PROGRAMS_PER_SM * 4, device="cuda")
    assert ceilings.exponentials(out, 3) == out.numel() * ceilings.BLOCK * ceilings.UNROLL * 3
    assert torch.isfinite(out).all()
    assert ceilings.multiply_adds(out, 3) == 2 * out.numel() * ceilings.BLOCK * ceilings.UNROLL * 3
    assert torch.isfinite(out).all()
