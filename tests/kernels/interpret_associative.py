"""Run the Triton associative scan in Triton's interpreter and print as JSON what is wrong.

A process of its own, because Triton decides at decoration whether to interpret. Run as
`TRITON_INTERPRET=1 python quick_interpreter.py interpret_associative.py CASE ...`, a CASE being a
key of CASES. The truth is the scan in plain torch in float64, which is tested against loops.
"""

import importlib.util
import json
import runpy
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from triton.runtime import interpreter

HERE = Path(__file__).resolve()
S6 = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SSD = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")

# bfloat16 is left to the GPU: the interpreter truncates where hardware rounds.
CASES = {
    # sizes: batch, seqlen, heads (or channels), headdim, d_state, ngroups
    "s6": {"sizes": (2, 37, 4, 1, 3, 2)},
    "s6-one-step": {"sizes": (1, 1, 2, 1, 16, 1)},
    "s6-bare": {"sizes": (1, 20, 2, 1, 4, 1), "without": ("D", "z", "delta_bias"), "softplus": 0},
    "s6-float16": {"sizes": (1, 33, 3, 1, 4, 1), "dtype": torch.float16, "rtol": 3e-3},
    "ssd": {"sizes": (2, 19, 4, 3, 5, 2)},
    "ssd-limits": {"sizes": (1, 18, 2, 3, 4, 1), "limit": (0.2, 1.0), "without": ("z",)},
    "ssd-wide-skip": {"sizes": (1, 17, 2, 2, 4, 1), "wide_skip": True},
    "ssd-bare": {"sizes": (1, 9, 2, 2, 4, 1), "without": ("D", "z", "dt_bias", "initial_states")},
}
FAULT = "        h += total * carry[:, None]\n"  # without it a block starts from no state
FAULTY = {
    "s6 without carry": {"sizes": (1, 37, 2, 1, 3, 1), "fault": True},
    "one step without carry": CASES["s6-one-step"] | {"fault": True},
}


def draw(case: dict, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Draw leaves of a case; parameters in fp32."""
    torch.manual_seed(sum(case["sizes"]))
    batch, seqlen, heads, headdim, d_state, groups = case["sizes"]
    dtype = case.get("dtype", torch.float32)
    if names is S6:
        over_time, shared = (batch, heads, seqlen), (batch, groups, d_state, seqlen)
        steps, decays, skip = over_time, (heads, d_state), (heads,)
    else:
        over_time, shared = (batch, seqlen, heads, headdim), (batch, seqlen, groups, d_state)
        steps, decays = (batch, seqlen, heads), (heads,)
        skip = (heads, headdim) if case.get("wide_skip") else (heads,)
    values = dict(
        zip(
            names,
            (
                torch.randn(over_time).to(dtype),
                torch.rand(steps).to(dtype),
                -torch.rand(decays) - 0.1,
                torch.randn(shared).to(dtype),
                torch.randn(shared).to(dtype),
                torch.randn(skip),
                torch.randn(over_time).to(dtype),
                torch.randn(heads),
                torch.randn(batch, heads, headdim, d_state),
            ),
            strict=False,
        )
    )
    return {k: v.requires_grad_() for k, v in values.items() if k not in case.get("without", ())}


def run(module, case: dict, inputs: dict, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return outputs and all gradients of one implementation by name."""
    softplus = bool(case.get("softplus", True))
    if names is S6:
        out, last = module.selective_scan(**inputs, delta_softplus=softplus, return_last_state=True)
    else:
        options = {"dt_softplus": softplus, "dt_limit": case.get("limit", (0.0, float("inf")))}
        out, last = module.state_space_dual(
            **inputs, chunk_size=64, **options, return_final_states=True
        )
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(v.shape, generator=generator).to(v) for v in (out, last)]
    leaves = list(inputs.values())
    found = torch.autograd.grad((out, last), leaves, grads)
    return {
        "out": out,
        "last": last,
        **{f"grad_{k}": g for k, g in zip(inputs, found, strict=True)},
    }


def judge(case: dict) -> dict[str, str]:
    """Return what is wrong with a case, by result; nothing when it is right."""
    from mambench.kernels import scan_torch, scan_triton

    scan_triton._TILE, scan_triton._PROGRAMS = 64, 4  # several blocks and splits at small sizes
    names = S6 if case["sizes"][3] == 1 else SSD
    right = scan_triton.kernels
    if case.get("fault"):
        scan_triton.kernels = faulty(Path(str(right.__file__)))
    inputs = draw(case, names)
    wide = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    got, wanted = (
        run(module, case, values, names)
        for module, values in ((scan_triton, inputs), (scan_torch, wide))
    )
    scan_triton.kernels = right
    rtol, wrong = case.get("rtol", 2e-5), {}
    for name, value in got.items():
        truth = wanted[name].detach()
        error = float((value.detach().double() - truth).norm() / (truth.norm() + 1e-30))
        if not error <= rtol or value.shape != wanted[name].shape:
            wrong[name] = f"relative error {error:.2e}"
    return wrong


def faulty(path: Path) -> ModuleType:
    """Load kernels without `FAULT`, from a file: Triton reads a kernel's source."""
    source = path.read_text()
    if source.count(FAULT) != 1:
        raise ValueError(f"expected once in {path}: {FAULT}")
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "faulty.py"
        changed.write_text(source.replace(FAULT, ""))
        spec = importlib.util.spec_from_file_location("faulty", changed)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for kernel in [*vars(module).values()]:  # to rewrite one adds names
            if isinstance(kernel, interpreter.InterpretedFunction):
                kernel.rewrite()  # while its source is there
    return module


if __name__ == "__main__":
    package = HERE.parents[2] / "mambench"
    runpy.run_path(str(package / "_start.py"))["load_package"](package)
    sys.path.insert(0, str(HERE.parent / "s6"))
    from interpret_scan import poison

    torch.empty, torch.empty_like = poison(torch.empty), poison(torch.empty_like)
    torch.set_num_threads(1)
    print(json.dumps({name: judge((CASES | FAULTY)[name]) for name in sys.argv[1:]}))
