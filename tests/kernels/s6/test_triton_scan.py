"""The Triton selective scan without a GPU: in the interpreter, and as compiled for GPUs."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambench.kernels.s6 import triton_backward, triton_config, triton_forward

HERE = Path(__file__).parent
CASES = ("segments", "columns", "float16", "bare", "no-softplus", "wide", "started", "started-once")


def interpret(*cases: str, script: Path = HERE / "interpret_scan.py") -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, str(script), *cases],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, str]]:
    return interpret(*CASES)


@pytest.mark.parametrize("case", CASES)
def test_interpreted(interpreted, case):
    assert interpreted[case] == {}


def test_interpreter_notices_a_wrong_kernel(tmp_path):
    # The forward's segments all start from zero, as if the states before had been forgotten.
    script = (HERE / "interpret_scan.py").read_text()
    fault = """
    from mambench.kernels.s6 import triton_scan
    combine = triton_scan._combine_segments
    def forget(inputs, cut, end, total, start, *, reverse):
        combine(inputs, cut, end, total, start, reverse=reverse)
        start.zero_()
    triton_scan._combine_segments = forget
    print(json.dumps"""
    here = f"HERE = Path({str(HERE / 'interpret_scan.py')!r})"
    planted = tmp_path / "interpret_scan.py"
    planted.write_text(
        script.replace("\n    print(json.dumps", fault).replace(
            "HERE = Path(__file__).resolve()", here
        )
    )
    (tmp_path / "literal.py").write_text((HERE / "literal.py").read_text())
    wrong = interpret("segments", script=planted)["segments"]
    assert {"out", "last", "du", "ddelta"} <= set(wrong)


POINTERS = {"u_ptr", "delta_ptr", "B_ptr", "C_ptr", "z_ptr", "dout_ptr", "out_ptr"}
POINTERS |= {"du_ptr", "ddelta_ptr", "dz_ptr"}


def compile_for(capability, kernel, dtype, warps, ones=(), **constants):
    """Compile as for tensors and strides aligned to 16; integer arguments in `ones` are 1."""
    signature, attributes = {}, {}
    constants |= dict.fromkeys(ones, 1)
    for index, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + (dtype if name in POINTERS else "fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride") or name in ("L", "D", "SEGMENT"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 1})


def all_features(d_state):
    states = {"N_TRUE": d_state, "N": triton_config.padded_states(d_state)}
    return states | {"HAS_BIAS": True, "SOFTPLUS": True, "ASSEMBLY": True}


def compile_forward(capability, d_state, dtype="bf16", ones=()):
    config = triton_config._FORWARD[triton_config.padded_states(d_state)]
    return compile_for(
        capability,
        triton_forward.scan_forward,
        dtype,
        config.warps,
        ones,
        **all_features(d_state),
        TILE=config.tile,
        BLOCK=config.block,
        CHUNK=triton_config.chunk_size(d_state),
        HAS_D=True,
        HAS_Z=True,
        SEGMENTED=True,
        HAS_FIRST=False,
        KEEP=True,
    )


def compile_backward(capability, d_state, dtype="bf16", ones=(), **changes):
    config = triton_config._BACKWARD[triton_config.padded_states(d_state)]
    constants = {
        "TILE": config.tile,
        "OUTER": config.outer,
        "INNER": config.block // config.outer,
        "CHUNK": triton_config.chunk_size(d_state),
        "AHEAD": triton_config.AHEAD,
        "HAS_D": True,
        "HAS_Z": True,
        "HAS_START": True,
        "HAS_FIRST": False,
    }
    constants |= all_features(d_state) | changes
    kernel = triton_backward.scan_backward
    return compile_for(capability, kernel, dtype, config.warps, ones, **constants)


def stack_bytes(compiled) -> int:
    """Return the bytes of stack that a thread of the kernel needs: where registers spill to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_forward_compiles_without_spills(capability):
    assert stack_bytes(compile_forward(capability, 16)) == 0


def test_backward_compiles_without_spills():
    assert stack_bytes(compile_backward(90, 16)) == 0


def test_spills_are_noticed():
    assert stack_bytes(compile_backward(90, 16, HAS_Z=False, OUTER=4, INNER=8)) > 0


def test_arguments_that_are_one_compile():
    # Triton makes an integer argument of 1 a compile-time constant.
    ones = ("L", "D", "G", "segments", "blocks")
    compile_forward(90, 1, "fp32", ones)
    compile_backward(90, 1, "fp32", (*ones, "batch", "partials"), HAS_Z=False)
