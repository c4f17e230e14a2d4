"""State updates of few sequences, in programs smaller than `CONFIGS` had: python3 state_update_small.py, from the root.

Every configuration is judged in float64 first. Ours and mamba_ssm's in one process, graph replay, the state in L2 (`warm`)
and one of many that do not fit into it (`cold`). Results: $OUT/state-update-small.json and a table; about 30 s on an H100.
"""
import json, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import state_update as base

base.FAMILIES = {"s6": (5120, None, 16), "ssd": (80, 64, 128)}
BATCHES = (1, 2, 4, 16)
ROUNDS = 5  # of all configurations in turn


def configs(family, batch):
    from mambench.kernels.state_update.config import Config, choose
    e, p, n = base.FAMILIES[family]
    size = batch * e * (p or 1) * n * 2
    stream = choose(batch=batch, entries=e, headdim=p, d_state=n, itemsize=2).stream
    tiles = [(128, 1), (128, 2), (256, 1), (256, 2), (256, 4), (512, 1), (512, 2), (512, 4), (512, 8), (1024, 1), (1024, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8)]
    found = [Config(elements=t, warps=w, stream=stream) for t, w in tiles]
    if family == "s6" and batch > 1:
        found += [Config(elements=t, warps=w, sequences=s, stream=stream) for t, w, s in ((256, 2, 2), (512, 4, 2), (256, 4, 4), (512, 4, 4), (1024, 4, 4))]
    return list(dict.fromkeys([*found, choose(batch=batch, entries=e, headdim=p, d_state=n, itemsize=2)]))


def compile_one(job):
    import torch
    from mambench.kernels.state_update.triton_update import selective_state_update as op
    family, batch, part, parts = job
    xs, a, k = base.make(family, batch)
    for config in configs(family, batch)[part::parts]:
        op(xs[0], *a, **k, config=config)
    torch.cuda.synchronize()


def wrong(family, batch, config):
    """Return the relative errors of y and of the state that are beyond bf16's rounding."""
    import torch
    from mambench.kernels.state_update.triton_update import selective_state_update as op
    xs, (x, dt, A, B, C), k = base.make(family, batch, seed=1)
    s, y = xs[0].clone(), None
    y = op(s, x, dt, A, B, C, **k, config=config).double()
    d = lambda t: t.double()
    tied = x.dim() == 3
    step = torch.nn.functional.softplus(d(dt) + d(k["dt_bias"]))[..., None]
    rate = d(A)[:, None] if tied else d(A)
    step_p = step if not tied else step[..., None]
    before, value = d(xs[0]), d(x)[..., None]
    after = before * torch.exp(step_p * (rate[..., None] if tied else rate)) + step_p * value * d(B)[:, :, None] if tied else before * torch.exp(step * rate) + step * value * d(B)
    out = (after * (d(C)[:, :, None] if tied else d(C))).sum(-1) + (d(k["D"])[:, None] if tied else d(k["D"])) * d(x)
    errors = {"y": float((y - out).norm() / out.norm()), "state": float((d(s) - after).norm() / after.norm())}
    return {name: error for name, error in errors.items() if not error < 4e-3}


def peer(family, xs, a, k):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as op
    x, dt, A, B, C = a
    if family == "s6":
        return lambda s: op(s, x, dt, A, B[:, 0], C[:, 0], **{**k, "z": None})
    H, P, N = base.FAMILIES["ssd"]
    args = (x, dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N), B, C)
    kw = dict(D=k["D"][:, None].expand(-1, P), dt_bias=k["dt_bias"][:, None].expand(-1, P), dt_softplus=True)
    return lambda s: op(s, *args, **kw)


def times(family, batch, found):
    import torch
    from mambench.kernels.state_update.config import choose
    from mambench.kernels.state_update.triton_update import selective_state_update as op
    e, p, n = base.FAMILIES[family]
    size = batch * e * (p or 1) * n * 2
    states = max(2, min(64, -(-3 * base.L2_BYTES // size)))
    xs, a, k = base.make(family, batch, states)
    chosen = choose(batch=batch, entries=e, headdim=p, d_state=n, itemsize=2)
    calls = {str(c): (lambda c: lambda s: op(s, *a, **k, config=c))(c) for c in configs(family, batch)}
    facts = {str(c): dict(elements=c.elements, warps=c.warps, sequences=c.sequences, stream=c.stream, chosen=c == chosen) for c in configs(family, batch)}
    try:
        calls["mamba_ssm"] = peer(family, xs, a, k); facts["mamba_ssm"] = {"peer": True}
        calls["mamba_ssm"](xs[0])
    except Exception as error:
        calls.pop("mamba_ssm", None); found["failed"].append(repr(error)[:200])
    taken = {name: ([], []) for name in calls}
    base.ROUNDS = 3
    for _ in range(ROUNDS):
        for name, call in calls.items():
            taken[name][0].append(base.graph_us([lambda: call(xs[0])] * 20))
            taken[name][1].append(base.graph_us([(lambda s: lambda: call(s))(s) for s in xs]))
    for name, (warm, cold) in taken.items():
        found["rows"].append(dict(family=family, batch=batch, **facts[name], warm_us=sorted(warm), cold_us=sorted(cold)))


def main():
    import torch
    begin, found = time.time(), {"rows": [], "failed": [], "wrong": [], "device": torch.cuda.get_device_name(), "commit": os.environ.get("MAMBENCH_COMMIT")}
    jobs = [(f, b, part, 2) for f in base.FAMILIES for b in BATCHES for part in range(2)]
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))
    print("compiled", round(time.time() - begin), "s", flush=True)
    for family in base.FAMILIES:
        for batch in BATCHES:
            found["wrong"] += [(family, batch, str(c), w) for c in configs(family, batch) if (w := wrong(family, batch, c))]
            try:
                times(family, batch, found)
            except Exception as error:
                found["failed"].append((family, batch, repr(error)[:300]))
            torch.cuda.empty_cache()
            (base.OUT / "state-update-small.json").write_text(json.dumps(found))
    print("wrong:", found["wrong"], "failed:", found["failed"])
    for family in base.FAMILIES:
        for batch in BATCHES:
            rows = [r for r in found["rows"] if (r["family"], r["batch"]) == (family, batch)]
            for key in ("warm_us", "cold_us"):
                text = lambda r: f"{r[key][len(r[key]) // 2]:7.3f} " + ("mamba_ssm" if r.get("peer") else f"[{r['elements']},{r['warps']},{r['sequences']}]" + "*" * r["chosen"])
                best = sorted(rows, key=lambda r: r[key][len(r[key]) // 2])
                also = [r for r in best[6:] if r.get("peer") or r.get("chosen")]
                print(f"{family:4} B={batch:3} {key[:4]}", " | ".join(map(text, best[:6] + also)))
    print("total", round(time.time() - begin), "s; * is chosen")


if __name__ == "__main__":
    main()
