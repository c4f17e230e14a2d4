"""The SSD backward on Hopper with and without the Gluon kernels that fetch each tile once. Run from the repository's root on a GPU.

Both ways at (B, H, L) of ROWS: median of graph replays, each kernel's time, memory, the same bits twice, how far the gradients are
apart; and every gradient against float64 autograd of the loop at CASES. Writes $OUT/h100-ssd-backward-fetched.json.
"""
import json, os, sys
from dataclasses import replace
from pathlib import Path

import parts

ROWS = [(1, 32, 2048), (1, 32, 8192), (8, 32, 2048), (1, 32, 131072)]
CASES = [
    {"seqlen": 155, "nheads": 3, "headdim": 64, "d_state": 128, "segments": 3},
    {"seqlen": 197, "nheads": 5, "headdim": 64, "d_state": 128, "segments": 4, "jolt": 60, "start": False, "final": False},
    {"seqlen": 140, "batch": 2, "nheads": 6, "ngroups": 2, "headdim": 40, "d_state": 24, "D": 2, "segments": 2, "long_memory": True},
    {"seqlen": 1000, "nheads": 8, "headdim": 32, "d_state": 16, "D": 0, "long_memory": True, "segments": 2, "dtype": "float16"},
]
OUT = Path(os.environ.get("OUT", "/tmp/out"))


def timed(row):
    """Return what one row takes, and its gradients."""
    import torch
    from mambench.kernels.ssd.hopper_op import ssd
    batch, nheads, seqlen = row
    given = {k: v for k, v in parts.ssd_inputs(batch, seqlen, nheads, A=8.0).items() if v is not None}
    inputs = [v.requires_grad_() for v in given.values() if isinstance(v, torch.Tensor)]
    out = ssd(**given, chunk_size=64)
    grad = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(out)
    call = lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
    first, second = call(), call()
    torch.cuda.synchronize(); held = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
    call(); torch.cuda.synchronize()
    found = {"row": row, "same_bits": all(map(torch.equal, first, second)), "peak_MiB": (torch.cuda.max_memory_allocated() - held) / 2**20,
             "us": parts.graph_ms(call, 15 if seqlen < 1e5 else 4, 6) * 1e3, "kernels": parts.kernels(call)}
    return found, first


def main():
    parts.load_package()
    sys.path.insert(0, "tests/kernels/ssd")
    import ssd_cases
    from mambench.kernels.ssd import hopper_op
    from mambench.kernels.ssd.hopper_op import ssd
    from mambench.kernels.ssd.triton_ssd_backward import Backward
    pinned, found, kept = hopper_op._plan, [], {}
    def planned(*given):
        plan = pinned(*given)
        return replace(plan, tiling=replace(plan.tiling, fetched=plan.tiling.fetched and fetched))
    for fetched in (False, True):
        hopper_op._gradients = Backward(planned)  # which has recorded no call
        for row in ROWS:
            what, gradients = timed(row)
            if fetched and row in kept:
                what["apart"] = max(parts.relative(a, b) for a, b in zip(gradients, kept[row]))
            elif not fetched and row != ROWS[-1]:
                kept[row] = gradients
            found.append({"fetched": fetched} | what)
            print(fetched, row, round(what["us"], 1), "us", what["same_bits"], what.get("apart"))
        for case in CASES:
            case = {"dtype": "bfloat16", "gated": False} | case
            errors = ssd_cases.errors(ssd, case, device="cuda", segments=case["segments"])
            found.append({"fetched": fetched, "case": case, "errors": errors})
            print(fetched, case, max(errors.values()))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "h100-ssd-backward-fetched.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
