"""SSD forward on Hopper: the walk that looks back, as it is in the checkout, where one head in eight decays by a given power of two over a chunk.

python3 ssd_walk_decay.py, from the repository's root; about 30 s. Rows as they are made; $OUT/ssd_walk_decay.json.
"draws" as its argument: no GPU; by how much the heads decay that the suites draw, $OUT/ssd_walk_draws.json.
"""
import json, math, os, statistics, sys
from pathlib import Path

from parts import load_package, relative, replay_us, ssd_inputs as inputs

OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
load_package()
import torch

from mambench.harness.spec import Family, Problem
from mambench.implementations.problems.ssd import SsdProblem
from mambench.kernels import prepared
from mambench.kernels.ssd import hopper_ssd as S

sys.path.insert(0, "tests/kernels/ssd")
import ssd_cases as cases

torch.set_grad_enabled(False)


def forward(case, final=False, **config):
    config = S.Config(look_back=True, **config)
    plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config, keep=False)
    ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
    return lambda: S.run_forward(prepared.Recording(None), plan, ops, return_final_states=final, keep=False, config=config)


def one_in_eight(case, decay):
    """Have every eighth head decay by 2^-decay over a chunk, on average."""
    dt = torch.nn.functional.softplus(case["dt"].float() + case["dt_bias"]).mean((0, 1))
    chosen = torch.arange(len(dt), device="cuda") % 8 == 0
    return {**case, "A": torch.where(chosen, -decay / 64 / math.log2(math.e) / dt, case["A"])}


def drawn(heads, seed, tokens=8192):
    """Return the log2 decays of the chunks (tokens / 64, heads) of a suite's problem."""
    problem = Problem(family=Family.SSD, batch=1, seqlen=tokens, d_inner=4 * heads, d_state=4, headdim=4, ngroups=1)
    inputs = SsdProblem().make_inputs(problem, dtype=torch.float32, device="cpu", seed=seed)
    dt = torch.nn.functional.softplus(inputs["dt"][0] + inputs["dt_bias"])
    return (dt * inputs["A"]).view(-1, 64, heads).sum(1) * math.log2(math.e)


def draws(seeds=20):
    """Return what share of the chunks decays by more, in how many pairs of heads any does, and the most."""
    found = {}
    for heads in (32, 128):
        decays = [drawn(heads, seed) for seed in range(seeds)]
        for limit in (-64, -128):
            beyond = [t < limit for t in decays]
            pairs = [int(b.any(0).view(-1, 2).any(1).sum()) for b in beyond]
            share = statistics.mean(float(b.float().mean()) for b in beyond)
            found[f"{heads} heads, beyond 2^{limit}"] = {"share": round(share, 4), "pairs": [min(pairs), statistics.median(pairs), max(pairs)]}
        found[f"{heads} heads, the most"] = round(min(float(t.min()) for t in decays), 1)
    return found


if sys.argv[1:] == ["draws"]:
    print(text := json.dumps(draws(), indent=1)); (OUT / "ssd_walk_draws.json").write_text(text)
    sys.exit()

found = {"right": {}, "us": {}}
for decay in (60, 90, 120, 127, 128, 140, 500):
    case = one_in_eight(inputs(1, 1500, 16), decay)
    want = cases.loop(**{k: v.double().cpu() for k, v in case.items() if torch.is_tensor(v)}, dt_softplus=True)
    call = forward(case, final=True, segments=3); out, last, _ = call()
    same = all(torch.equal(o, out) and torch.equal(e, last) for o, e, _ in (call() for _ in range(20)))
    pairs = ((out, want[0]), (last, want[1]), (out[:, :, 0], want[0][:, :, 0]), (last[:, 0], want[1][:, 0]))
    found["right"][decay] = [relative(a.cpu(), b) for a, b in pairs] + [same]
    print(decay, found["right"][decay], flush=True)
for L, H, decay in ((8192, 32, None), (8192, 32, 50), (8192, 32, 100), (8192, 32, 200), (32768, 32, None), (32768, 32, 100), (131072, 32, None), (16384, 128, 100)):
    case = inputs(1, L, H); case = case if decay is None else one_in_eight(case, decay)
    label = f"{L}, {H} heads" + (f", one in eight by 2^-{decay}" if decay else "")
    found["us"][label] = round(replay_us(forward(case), 0.02), 2); print(label, found["us"][label], flush=True)
    (OUT / "ssd_walk_decay.json").write_text(json.dumps(found, indent=1))
