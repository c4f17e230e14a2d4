"""SSD backward on a GPU: variants against float64, same bits, graph replay, kernels, memory.

Run from the repository's root; it ends after LIMIT seconds (57) and writes $OUT/ssd_bwd.json.
"""
import json, os, select, subprocess, sys, time, traceback
from pathlib import Path
ROOT = Path.cwd(); OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
T0 = float(os.environ.get("T0", time.time())); LIMIT = float(os.environ.get("LIMIT", 57))
VARIANTS = {  # in order of importance; h100-ssd-backward-whole.json has others, see docs/experiments.md
    "old": {"whole_heads": False, "grad_c_stages": 2},
    "main": {},
    "one stage": {"whole_stages": 1},
    "sum stages 2": {"whole_sum_stages": 2},
    "three in flight": {"whole_stages": 3, "grad_programs_per_sm": 1},
    "state stages 4": {"state_stages": 4},
}
ROWS = [(1, 32, 8192), (1, 32, 2048), (8, 32, 2048)]
CASES = [  # the first for all, the others for old and main
    {"seqlen": 155, "nheads": 3, "headdim": 64, "d_state": 128, "gated": False, "segments": 3},
    {"seqlen": 197, "nheads": 3, "headdim": 64, "d_state": 128, "gated": False, "segments": 4, "jolt": 60, "start": False, "final": False},
    {"seqlen": 140, "batch": 1, "nheads": 6, "ngroups": 2, "headdim": 64, "d_state": 128, "gated": False, "D": 2, "segments": 2, "long_memory": True},
    {"seqlen": 150, "nheads": 8, "headdim": 32, "d_state": 16, "gated": False, "D": 0, "long_memory": True, "segments": 2},
    {"seqlen": 190, "lengths": [[64, 63, 1, 62]], "nheads": 4, "headdim": 64, "d_state": 128, "gated": False, "segments": 2},
]


def child(name):
    import threading
    from dataclasses import replace
    import runpy, torch
    sys.path.insert(0, str(ROOT / "tests/kernels/ssd"))
    runpy.run_path(str(ROOT / "mambench/_start.py"))["load_package"](ROOT / "mambench")
    torch.set_num_threads(1)
    import ssd_cases as cases
    import mambench.kernels.ssd.triton_launch as tlm
    from mambench.kernels.ssd.hopper_op import ssd
    from mambench.kernels.ssd.triton_ssd import ssd as portable
    orig = tlm.tiling
    tlm.tiling = lambda *a, **k: replace(orig(*a, **k), **VARIANTS[name])
    res = {"variant": name, "over": VARIANTS[name], "rows": {}, "cases": {}, "notes": []}
    path = OUT / ("v_" + "".join(c if c.isalnum() else "_" for c in name) + ".json")
    save = lambda: path.write_text(json.dumps(res))

    def check(index):
        case = {**CASES[index], "dtype": "bfloat16"}
        op = portable if "lengths" in case else ssd
        try:
            e = cases.errors(op, case, device="cuda", segments=case["segments"])
            res["cases"][index] = {"worst": max(e.values()), "errors": {k: v for k, v in e.items()}}
        except BaseException as error:
            res["cases"][index] = {"failed": repr(error)[-300:]}
        save()

    made = {}
    def make(row):
        B, H, L = row
        g = torch.Generator(device="cuda").manual_seed(0)
        rn = lambda *s, dt=torch.bfloat16: torch.randn(*s, generator=g, device="cuda", dtype=torch.float32).to(dt)
        x, Bm, C = rn(B, L, H, 64), rn(B, L, 1, 128), rn(B, L, 1, 128)
        dt = rn(B, L, H); A = -torch.rand(H, device="cuda", generator=g) * 8 - 0.5; D = rn(H, dt=torch.float32); bias = rn(H, dt=torch.float32) - 4
        ins = (x, dt, A, Bm, C, D, bias)
        for t in ins: t.requires_grad_()
        y = ssd(x, dt, A, Bm, C, 64, D=D, dt_bias=bias, dt_softplus=True)
        dy = rn(*y.shape)
        return ins, y, dy

    def first(row):
        ins, y, dy = make(row)
        f = lambda: torch.autograd.grad(y, ins, dy, retain_graph=True)
        a = f(); b = f(); torch.cuda.synchronize()
        same = all(torch.equal(p, q) for p, q in zip(a, b))
        finite = all(bool(p.isfinite().all()) for p in a)
        res["rows"].setdefault(str(row), {}).update(same_bits=same, finite=finite)
        made[row] = (ins, y, dy)
        ref = Path(os.environ["FLAGS"]) / f"old_{row}.pt"
        if row == ROWS[2]: return save()
        if name == "old":
            torch.save([t.float().cpu() for t in a], str(ref) + ".tmp"); os.replace(str(ref) + ".tmp", ref)
        made[row, "grads"] = [t.float().cpu() for t in a]
        save()

    torch.cuda.init(); torch.zeros(1, device="cuda").requires_grad_().sum().backward()
    torch.cuda.set_stream(stream := torch.cuda.Stream())
    def on(function, *args):
        def run():
            with torch.cuda.stream(torch.cuda.Stream()):
                try: function(*args)
                except BaseException: res["notes"].append(traceback.format_exc()[-600:])
        t = threading.Thread(target=run); t.start(); return t
    try:
        side = [on(check, 0)] if "chunk" not in VARIANTS[name] else []  # segments of whole chunks only
        if name in ("old", "main"): side += [on(check, i) for i in range(1, len(CASES))]
        first(ROWS[1])
        deadline = T0 + 0.55 * LIMIT
        for t in side[:1]: t.join(max(0.1, deadline - time.time()))
        if name in ("old", "main"):
            for t in side: t.join(max(0.1, deadline - time.time()))
        for row in (ROWS[0], ROWS[2]): first(row)
    except BaseException:
        res["notes"].append(traceback.format_exc()[-800:])
    save(); print("READY", flush=True)
    sys.stdin.readline()
    from torch.profiler import profile, ProfilerActivity
    try:
        for row in ROWS:
            if row not in made: continue
            ins, y, dy = made[row]
            f = lambda: torch.autograd.grad(y, ins, dy, retain_graph=True)
            r = res["rows"][str(row)]
            for _ in range(2): f()
            torch.cuda.synchronize(); held = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats(); f(); torch.cuda.synchronize()
            r["peak_MiB_backward"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream): f()
            ts = []
            for _ in range(15):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record(stream)
                for _ in range(6): graph.replay()
                b.record(stream); b.synchronize(); ts.append(a.elapsed_time(b) / 6 * 1e3)
            ts.sort(); r["us"] = ts[len(ts) // 2]; r["us_least"] = ts[0]
            del graph
            with profile(activities=[ProfilerActivity.CUDA]) as prof:
                for _ in range(3): f()
                torch.cuda.synchronize()
            ks = {}
            for e in prof.events():
                if e.device_type.name == "CUDA": ks.setdefault(e.name[:34], []).append(e.time_range.elapsed_us())
            r["kernels"] = {k: [round(sum(v) / 3, 2), len(v) // 3] for k, v in ks.items()}
            ref = Path(os.environ["FLAGS"]) / f"old_{row}.pt"
            if ref.exists() and (row, "grads") in made and time.time() < T0 + LIMIT - 4:
                want = torch.load(ref)
                r["off_old"] = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(made[row, "grads"], want))
            save()
    except BaseException:
        res["notes"].append(traceback.format_exc()[-800:])
    save(); print("DONE", flush=True); os._exit(0)


def main():
    import tempfile
    flags = tempfile.mkdtemp(); env = dict(os.environ, FLAGS=flags, OUT=str(OUT), T0=str(T0), OMP_NUM_THREADS="1", LIMIT=str(LIMIT))
    runs = {n: subprocess.Popen([sys.executable, os.path.abspath(__file__), n], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=open(f"{flags}/{i}.err", "w"), text=True) for i, n in enumerate(VARIANTS)}
    state = {n: "" for n in VARIANTS}
    def listen(wait):
        files = {p.stdout: n for n, p in runs.items() if state[n] not in ("DONE", "ENDED")}
        for s in select.select(list(files), [], [], wait)[0]:
            line = s.readline(); state[files[s]] = line.strip() if line else "ENDED"
    left = lambda: T0 + LIMIT - time.time()
    while time.time() < T0 + max(0.62 * LIMIT, LIMIT - 24) and any(s == "" for s in state.values()): listen(0.2)
    print("ready", {n: s for n, s in state.items()}, round(time.time() - T0, 1), flush=True)
    gone = set()
    while left() > 1.5 and len(gone) < len(runs):
        n = next((n for n in runs if n not in gone and state[n] in ("READY", "ENDED")), None)
        if n is None: listen(0.2); continue
        gone.add(n)
        if state[n] == "ENDED": continue
        try: runs[n].stdin.write("go\n"); runs[n].stdin.flush()
        except OSError: continue
        while state[n] not in ("DONE", "ENDED") and left() > 0.5: listen(0.1)
    for p in runs.values(): p.kill()
    found = []
    for i, n in enumerate(VARIANTS):
        path = OUT / ("v_" + "".join(c if c.isalnum() else "_" for c in n) + ".json")
        try: found.append(json.loads(path.read_text()))
        except Exception: found.append({"variant": n, "rows": {}, "cases": {}, "notes": [open(f"{flags}/{i}.err").read()[-500:]]})
    (OUT / "ssd_bwd.json").write_text(json.dumps(found, indent=1))
    for r in found:
        for note in r["notes"]: print("NOTE", r["variant"], note[-400:].replace("\n", " | "))
    for i, c in enumerate(CASES):
        print("case", i, {r["variant"]: (f"{r['cases'][str(i)]['worst']:.2e}" if "worst" in r["cases"][str(i)] else r["cases"][str(i)]["failed"][-100:]) for r in found if str(i) in r["cases"]})
    old, new = ({k: v for k, v in r["cases"].items() if "errors" in v} for r in found[:2])
    for i in sorted(set(old) & set(new)):
        print("  old:new", i, {k.removeprefix("grad_"): f"{v * 1e3:.2f}:{new[i]['errors'][k] * 1e3:.2f}" for k, v in old[i]["errors"].items()})
    for r in found:
        print(r["variant"])
        for row, x in r["rows"].items():
            print("   ", row, {k: (round(v, 4) if isinstance(v, float) else v) for k, v in x.items() if k != "kernels"})
            if "kernels" in x: print("       ", {k[:22]: v for k, v in sorted(x["kernels"].items(), key=lambda t: -t[1][0])[:10]})
    print("seconds", round(time.time() - T0, 1))


if __name__ == "__main__":
    child(sys.argv[1]) if len(sys.argv) > 1 else main()
