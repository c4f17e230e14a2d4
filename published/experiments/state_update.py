"""State update on a GPU: correctness of every configuration, then times. Run from the repository root:

    python3 state_update.py            # about 100 s; writes $OUT/decode.json, prints tables last
"""
import json, os, random, runpy, statistics, sys, time, traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path.cwd()
runpy.run_path(str(ROOT / "mambench" / "_start.py"))["load_package"](ROOT / "mambench")
sys.path.insert(0, str(ROOT / "tests/kernels/state_update"))
OUT = Path(os.environ.get("OUT", "/tmp/decode_out")); OUT.mkdir(parents=True, exist_ok=True)

FAMILIES = {  # name: entries, headdim, d_state
    "ssd": (80, 64, 128),
    "s6": (5120, None, 16),
    "s6n128": (5120, None, 128),
}
BATCHES = (1, 8, 32, 128, 512, 1024)
L2_BYTES = 50 << 20
ROUNDS = 7


def configs(family):
    from mambench.kernels.state_update.config import CONFIGS
    return [c for c in CONFIGS if family != "ssd" or c.sequences == 1]


def make(family, batch, states=1, seed=0):
    import torch
    e, p, n = FAMILIES[family]
    g = torch.Generator(device="cuda").manual_seed(seed)
    r = lambda *s: torch.randn(s, generator=g, device="cuda")
    rows = (batch, e) if p is None else (batch, e, p)
    b16 = torch.bfloat16
    xs = [torch.randn((*rows, n), generator=g, device="cuda", dtype=b16) * 0.1 for _ in range(states)]
    A = -torch.rand((e, n) if p is None else (e,), generator=g, device="cuda") * 8
    a = (r(*rows).to(b16), r(batch, e).to(b16), A, r(batch, 1, n).to(b16), r(batch, 1, n).to(b16))
    k = dict(D=r(e), z=None, dt_bias=r(e) - 4, dt_softplus=True)
    return xs, a, k


def precompile(job):
    family, batch, indices = job
    import torch
    torch.cuda.set_device(0)
    from mambench.kernels.state_update.triton_update import selective_state_update as op
    xs, a, k = make(family, batch)
    failed = []
    for i in indices:
        try:
            op(xs[0], *a, **k, config=configs(family)[i])
        except Exception as error:
            failed.append((family, batch, i, repr(error)[:300]))
    torch.cuda.synchronize()
    return failed


def graph_us(calls):
    """Median time of one call in us, from replays of a graph of all calls."""
    import torch
    s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for c in calls[:2]: c()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=s):
            for c in calls: c()
        graph.replay(); torch.cuda.synchronize()
        found = []
        for _ in range(ROUNDS):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000)
            a.record(); graph.replay(); b.record(); torch.cuda.synchronize()
            found.append(a.elapsed_time(b) * 1e3 / len(calls))
        graph.reset()
    return statistics.median(found)


def check():
    import torch, update_cases
    from mambench.kernels.state_update.config import CONFIGS
    from mambench.kernels.state_update.triton_update import selective_state_update as op
    draw, bad = random.Random(0), []
    for seed in range(60):
        shape = update_cases.draw_shape(draw, small=False)
        config = None if seed % 2 == 0 else draw.choice(CONFIGS)
        try:
            found = update_cases.wrong(op, shape, seed=seed, device="cuda", config=config)
        except torch.OutOfMemoryError:
            found = {}
        except Exception as error:
            found = {"raised": repr(error)[:200]}
        if found: bad.append((found, update_cases.describe(shape), str(config)))
        torch.cuda.empty_cache()
    return bad


def sweep(result):
    import torch
    from mambench.kernels.state_update.config import choose
    from mambench.kernels.state_update.triton_update import selective_state_update as op
    for family, (e, p, n) in FAMILIES.items():
        for batch in BATCHES:
            size = batch * e * (p or 1) * n * 2
            states = max(1, min(64, -(-3 * L2_BYTES // size)))
            xs, a, k = make(family, batch, states)
            repeat = max(1, min(20, int(2e9 / size)))
            chosen = choose(batch=batch, entries=e, headdim=p, d_state=n, itemsize=2)
            for config in dict.fromkeys([*configs(family), chosen]):
                try:
                    warm = [lambda: op(xs[0], *a, **k, config=config)] * max(2, repeat)
                    cold = [(lambda s: lambda: op(s, *a, **k, config=config))(s) for s in xs]
                    cold = cold * max(1, repeat // len(cold))
                    w = graph_us(warm); c = w if states == 1 else graph_us(cold)
                except Exception as error:
                    result["failed"].append((family, batch, str(config), repr(error)[:200])); continue
                result["rows"].append(dict(family=family, batch=batch, elements=config.elements, warps=config.warps,
                    sequences=config.sequences, stream=config.stream, warm_us=w, cold_us=c, bytes=2 * size, chosen=config == chosen))
            del xs; torch.cuda.empty_cache()
        (OUT / "decode.json").write_text(json.dumps(result))


def extras(result):
    import torch
    x = torch.empty(84 << 20, dtype=torch.bfloat16, device="cuda"); y = torch.empty_like(x)
    us = graph_us([lambda: y.copy_(x)] * 8)
    result["copy_TB_s"] = 2 * x.numel() * 2 / us / 1e6
    from mambench.kernels.state_update.triton_update import selective_state_update as op
    for family in ("ssd", "s6"):
        xs, a, k = make(family, 1)
        for _ in range(20): op(xs[0], *a, **k)
        torch.cuda.synchronize(); t = []
        for _ in range(300):
            b = time.perf_counter(); op(xs[0], *a, **k); t.append(time.perf_counter() - b)
            torch.cuda.synchronize()
        result["host_us_" + family] = statistics.median(t) * 1e6
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update as peer
        for batch in BATCHES:
            xs, (x, dt, A, B, C), k = make("ssd", batch, 1)
            H, P, N = FAMILIES["ssd"]
            args = (xs[0], x, dt[..., None].expand(-1, -1, P), A[:, None, None].expand(-1, P, N), B, C)
            kw = dict(D=k["D"][:, None].expand(-1, P), dt_bias=k["dt_bias"][:, None].expand(-1, P), dt_softplus=True)
            result[f"mamba_ssm_us_B{batch}"] = graph_us([lambda: peer(*args, **kw)] * 4)
    except Exception as error:
        result["mamba_ssm"] = repr(error)[:200]


def main():
    begin = time.time()
    result = {"rows": [], "failed": [], "bad": None}
    jobs = []
    for family in FAMILIES:
        count = len(configs(family))
        for batch in (1, 8, 32):
            for part in range(2):
                jobs.append((family, batch, list(range(part, count, 2))))
    try:
        with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
            for failed in pool.map(precompile, jobs): result["failed"] += failed
    except Exception: traceback.print_exc()
    print("compiled", round(time.time() - begin), "s", flush=True)
    for name, part in (("bad", check), ("sweep", lambda: sweep(result)), ("extras", lambda: extras(result))):
        try:
            found = part()
            if name == "bad": result["bad"] = found
        except Exception: traceback.print_exc(); result["failed"].append((name, traceback.format_exc()[-400:]))
        print(name, round(time.time() - begin), "s", flush=True)
    (OUT / "decode.json").write_text(json.dumps(result))
    for item in result["failed"]: print("FAILED", item)
    print("wrong of 60 random shapes:", len(result["bad"] or []) if result["bad"] is not None else "not run")
    for item in (result["bad"] or [])[:10]: print("  ", item)
    print({k: v for k, v in result.items() if k not in ("rows", "failed", "bad")})
    for family in FAMILIES:
        for batch in BATCHES:
            rows = [r for r in result["rows"] if r["family"] == family and r["batch"] == batch]
            if not rows: continue
            text = lambda r, key: f"{r[key]:8.2f} us {r['bytes'] / r[key] / 1e6:5.2f} TB/s [{r['elements']},{r['warps']},{r['sequences']},{'s' if r['stream'] else '-'}]"
            mine = next((r for r in rows if r["chosen"]), None)
            print(f"{family:7} B={batch:5} warm", " | ".join(text(r, "warm_us") for r in sorted(rows, key=lambda r: r["warm_us"])[:3]), "| chosen", text(mine, "warm_us") if mine else None)
            print(f"{'':15} cold", " | ".join(text(r, "cold_us") for r in sorted(rows, key=lambda r: r["cold_us"])[:3]), "| chosen", text(mine, "cold_us") if mine else None)
    print("total", round(time.time() - begin), "s")


if __name__ == "__main__":
    main()
