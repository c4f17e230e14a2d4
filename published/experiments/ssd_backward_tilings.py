"""Sweep tilings of the SSD backward on a GPU; per-kernel times. Run from the repository root."""
import fcntl, json, os, subprocess, sys, time
from dataclasses import replace
OUT = os.environ.get("OUT", "/tmp/out"); os.makedirs(OUT, exist_ok=True)
ROWS = [(1, 32, 2048), (1, 32, 8192), (8, 32, 2048)]
BASE = {}
OVER = [{}] + [
    {"grad_c_warps": 8}, {"grad_b_warps": 8}, {"grad_c_stages": 2}, {"grad_b_stages": 2}, {"grad_c_stages": 2, "grad_c_warps": 8},
    {"grad_b_stages": 2, "grad_b_warps": 8},
    {"grad_block_p": 64}, {"grad_block_p": 64, "grad_c_warps": 8, "grad_b_warps": 8}, {"grad_block_p": 64, "grad_c_stages": 2, "grad_b_stages": 2},
    {"grad_block_p": 16}, {"grad_chunk": 32}, {"grad_chunk": 32, "grad_block_p": 64},
    {"grad_programs_per_sm": 1}, {"grad_programs_per_sm": 3}, {"grad_programs_per_sm": 4},
    {"state_warps": 8}, {"state_stages": 3}, {"state_stages": 4}, {"block_p": 32}, {"block_p": 32, "state_stages": 3}, {"block_p": 16, "state_stages": 3},
    {"grad_chunk": 128, "chunk": 128, "grad_c_warps": 8, "grad_b_warps": 8, "grad_block_p": 32},
    {"grad_chunk": 128, "chunk": 128, "grad_c_warps": 8, "grad_b_warps": 8, "grad_block_p": 64},
]
def child(i):
    import torch
    sys.path.insert(0, os.getcwd())
    import mambench
    import mambench.kernels.ssd.triton_launch as tlm
    orig = tlm.tiling
    over = OVER[i]
    tlm.tiling = lambda *a, **k: replace(orig(*a, **k), **over)
    from mambench.kernels.ssd.hopper_op import ssd
    from torch.profiler import profile, ProfilerActivity
    res = {"over": over, "rows": []}
    lock = open("/tmp/gpu.lock", "w")
    torch.cuda.set_stream(torch.cuda.Stream())
    for B, H, L in ROWS:
        g = torch.Generator(device="cuda").manual_seed(0)
        def rn(*s, dt=torch.bfloat16): return torch.randn(*s, generator=g, device="cuda", dtype=torch.float32).to(dt)
        x, Bm, C = rn(B, L, H, 64), rn(B, L, 1, 128), rn(B, L, 1, 128)
        dt = rn(B, L, H); A = -torch.rand(H, device="cuda") * 8 - 0.5; D = rn(H, dt=torch.float32); bias = rn(H, dt=torch.float32) - 4
        for t in (x, Bm, C, dt, A, D, bias): t.requires_grad_()
        y = ssd(x, dt, A, Bm, C, 64, D=D, dt_bias=bias, dt_softplus=True)
        dy = torch.randn_like(y)
        ins = (x, dt, A, Bm, C, D, bias)
        f = lambda: torch.autograd.grad(y, ins, dy, retain_graph=True)
        grads = f(); torch.cuda.synchronize()
        ref = f"/tmp/ssd_ref_{B}_{L}.pt"
        if i == 0: torch.save([t.float().cpu() for t in grads], ref + ".tmp"); os.replace(ref + ".tmp", ref)
        err = None
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            for _ in range(3): f()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph): f()
            ts = []
            for _ in range(12):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record(); [graph.replay() for _ in range(5)]; b.record(); b.synchronize(); ts.append(a.elapsed_time(b) / 5)
            ts.sort()
            with profile(activities=[ProfilerActivity.CUDA]) as prof:
                for _ in range(3): f()
                torch.cuda.synchronize()
            ks = {}
            for e in prof.events():
                if e.device_type.name == "CUDA":
                    ks.setdefault(e.name[:40], []).append(e.time_range.elapsed_us())
            kern = {k: round(sum(v) / 3, 2) for k, v in ks.items()}
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
        if os.path.exists(ref):
            want = torch.load(ref)
            err = max(float((a.float().cpu() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(grads, want))
        res["rows"].append({"row": (B, H, L), "ms": ts[len(ts) // 2], "kernels": kern, "err": err})
    json.dump(res, open(f"{OUT}/ssdb_{i}.json", "w"))
if __name__ == "__main__":
    if len(sys.argv) > 1: child(int(sys.argv[1])); sys.exit()
    t0 = time.time(); todo = list(range(len(OVER))); run = {}; limit = float(os.environ.get("LIMIT", 150))
    env = dict(os.environ, OMP_NUM_THREADS="1")
    while (todo or run) and time.time() - t0 < limit:
        while todo and len(run) < 8:
            i = todo.pop(0); run[i] = subprocess.Popen([sys.executable, __file__, str(i)], env=env, stderr=open(f"/tmp/ssdb_{i}.err", "w"))
        for i, p in list(run.items()):
            if p.poll() is not None: run.pop(i)
        time.sleep(0.2)
    for p in run.values(): p.kill()
    allr = {}
    for i, o in enumerate(OVER):
        try: r = json.load(open(f"{OUT}/ssdb_{i}.json"))
        except Exception:
            err = open(f"/tmp/ssdb_{i}.err").read().strip().splitlines()[-1:] if os.path.exists(f"/tmp/ssdb_{i}.err") else "-"
            print(o, "FAILED", str(err)[:160]); continue
        os.remove(f"{OUT}/ssdb_{i}.json"); allr[i] = r
        print(o, " | ".join(f"{x['ms']*1e3:.1f}us err {x['err'] if x['err'] is None else format(x['err'],'.1e')}" for x in r["rows"]))
        for x in r["rows"][1:2] if i else r["rows"]:
            print("     ", x["row"], {k[:24]: v for k, v in sorted(x["kernels"].items(), key=lambda t: -t[1])[:9]})
    json.dump(allr, open(f"{OUT}/ssd_backward_sweep.json", "w"))
    print("seconds", round(time.time() - t0))
