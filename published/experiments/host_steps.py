"""Training steps repeated as they were recorded: the bits and memory of the step as written, and host time beside mamba_ssm's.

python3 host_steps.py, from the repository's root; mamba_ssm is on the path or left out. Twelve processes check two cases each while this one compiles
what it times. Results: $OUT/host_steps.json, two profiles, a table last; 60 s on an H100.
"""
import cProfile, json, os, pstats, subprocess, sys, time, traceback
from pathlib import Path

from parts import load_package

started, LIMIT = time.perf_counter(), 42
CHILDREN, child = 12, os.environ.get("HOST_STEPS_CHILD")
children = [] if child else [subprocess.Popen([sys.executable, __file__], env=os.environ | {"HOST_STEPS_CHILD": str(i)}, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) for i in range(CHILDREN)]
load_package()
import torch
from mambench.kernels import prepared
from mambench.kernels.s6 import hopper_backward, hopper_scan
from mambench.kernels.s6.hopper_op import selective_scan
from mambench.kernels.ssd import hopper_op, triton_ssd
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True); found = {"checks": {}, "times": {}}
began = started
BF, F32 = torch.bfloat16, torch.float32
r = lambda *s, d=BF: torch.randn(s, device="cuda").to(d)
CALLS = {"s6": (hopper_scan._calls, hopper_backward._calls), "ssd": (hopper_op._calls, hopper_op._gradients._calls), "tri": (triton_ssd._calls, triton_ssd._gradients._calls)}
def forget():
    for each in CALLS.values():
        for c in each: c.clear()
def say(*a): print(*a, flush=True)
def save(): (OUT / "host_steps.json").write_text(json.dumps(found, indent=1, default=str))

def s6(B=1, L=2048, D=2048, N=16, z=False, last=False, dt=BF, g=1, bare=False):
    t = dict(u=r(B, D, L, d=dt), delta=r(B, D, L, d=dt) * .1, A=-torch.rand(D, N, device="cuda") - .1, B=r(B, g, N, L, d=dt), C=r(B, g, N, L, d=dt))
    if not bare: t |= dict(D=r(D, d=F32), delta_bias=r(D, d=F32) - 4)
    if z: t["z"] = r(B, D, L, d=dt)
    return "s6", t, lambda t: selective_scan(**t, delta_softplus=True, return_last_state=last)
def ssd(B=1, L=2048, H=32, P=64, N=128, z=False, last=False, start=False, D=1, g=1, dt=BF, segments=None, op=None, seq=False):
    t = dict(x=r(B, L, H, P, d=dt), dt=r(B, L, H), A=-torch.rand(H, device="cuda") - .1, B=r(B, L, g, N, d=dt), C=r(B, L, g, N, d=dt), dt_bias=r(H, d=F32) - 4)
    if D: t["D"] = r(H, d=F32) if D == 1 else r(H, P, d=F32)
    if z: t["z"] = r(B, L, H, P, d=dt)
    if start: t["initial_states"] = r(B, H, P, N, d=F32)
    op_, more = (op or hopper_op.ssd), {}
    if seq: more["seq_idx"] = (torch.arange(L, device="cuda") // 100).int().expand(B, L).contiguous()
    return ("tri" if op else "ssd"), t, lambda t: op_(**t, chunk_size=256, dt_softplus=True, return_final_states=last, segments=segments, **more)
CASES = {
 "s6 2048": lambda: s6(), "s6 512": lambda: s6(L=512), "s6 8x512 (one segment)": lambda: s6(B=8, L=512), "s6 8x2048": lambda: s6(B=8),
 "s6 gated last 1000": lambda: s6(L=1000, z=True, last=True), "s6 odd 777 D=96 fp16": lambda: s6(L=777, D=96, dt=torch.float16, last=True),
 "s6 fp32 2x1024 groups bare": lambda: s6(B=2, L=1024, D=256, dt=F32, g=2, bare=True), "s6 one segment 300": lambda: s6(B=16, L=300),
 "s6 N=64": lambda: s6(N=64), "s6 N=128": lambda: s6(N=128, last=True), "s6 N=128 D=5120": lambda: s6(N=128, D=5120, L=1024), "s6 N=200 short": lambda: s6(N=200, L=300, D=64),
 "ssd 2048": lambda: ssd(), "ssd 512": lambda: ssd(L=512), "ssd 8x2048": lambda: ssd(B=8), "ssd 1000 last start D2 g2": lambda: ssd(L=1000, last=True, start=True, D=2, g=2),
 "ssd one segment": lambda: ssd(L=512, segments=1, last=True), "ssd one segment start": lambda: ssd(L=512, segments=1, last=True, start=True),
 "ssd gated": lambda: ssd(z=True, L=1024, D=0), "ssd fp16 P=40 N=24": lambda: ssd(P=40, N=24, H=9, L=200, dt=torch.float16),
 "portable ssd": lambda: ssd(op=triton_ssd.ssd, L=1024, last=True), "portable ssd seq": lambda: ssd(op=triton_ssd.ssd, L=1000, seq=True, B=2), "portable ssd gated fp32": lambda: ssd(op=triton_ssd.ssd, L=500, z=True, D=2, start=True, dt=F32, H=8),
}
def fresh(t): return {k: v.detach().clone().requires_grad_() for k, v in t.items()}
def grads_of(call, t, gs, wanted=None, retain=False):
    outs = call(t); outs = outs if isinstance(outs, tuple) else (outs,)
    ws = list(t.values()) if wanted is None else [t[k] for k in wanted]
    return [o.detach() for o in outs], torch.autograd.grad(outs, ws, gs[:len(outs)], retain_graph=retain)
same = lambda a, b: len(a) == len(b) and all(torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride() for x, y in zip(a, b))
def check(name, make):
    kind, t, call = make(); row = {}
    outs = call(t); outs = outs if isinstance(outs, tuple) else (outs,)
    gs = [torch.randn_like(o) for o in outs]
    hook, prepared.some_hook = prepared.some_hook, lambda: True   # as written, through Triton
    a = fresh(t); want, wgrads = grads_of(call, a, gs)
    prepared.some_hook = hook
    want, wgrads = [x.clone() for x in want], [x.clone() for x in wgrads]
    forget(); a = fresh(t); g0 = grads_of(call, a, gs)     # recorded
    row["recorded"] = same(g0[1], wgrads) and same(g0[0], want)
    row["known"] = all(len(c._known) == 1 for c in CALLS[kind])
    junk = []
    ok = True
    for i in range(4):                                      # other addresses, other memory around
        junk.append(torch.full((1 << (16 + i),), float("nan"), device="cuda"))
        a = fresh(t); g1 = grads_of(call, a, gs, retain=i == 2); ok &= same(g1[1], wgrads) and same(g1[0], want)
        if i == 1: junk.clear()
    row["repeated"] = ok; row["known after"] = all(len(c._known) == 1 for c in CALLS[kind])
    names = list(t); sub = [n for i, n in enumerate(names) if i % 2]
    a = {k: v.detach().clone().requires_grad_(k in sub) for k, v in t.items()}
    gsub = grads_of(call, a, gs, sub)[1]; row["subset"] = same(gsub, [w for n, w in zip(names, wgrads) if n in sub])
    a = fresh(t); gexp = torch.ones((), device="cuda", dtype=outs[0].dtype).expand(outs[0].shape)
    e1 = grads_of(call, a, [gexp, *gs[1:]])[1]; e2 = grads_of(call, fresh(t), [gexp.contiguous(), *gs[1:]])[1]; row["expanded grad"] = same(e1, e2)
    a = fresh(t); torch.cuda.synchronize()
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2): g2 = grads_of(call, a, gs)
    torch.cuda.current_stream().wait_stream(side); row["stream"] = same(g2[1], wgrads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): g3 = grads_of(call, a, gs)
    for x in g3[1]: x.fill_(3)
    graph.replay(); graph.replay(); torch.cuda.synchronize(); row["graph"] = same(g3[1], wgrads)
    def peak():
        a = fresh(t); torch.cuda.synchronize(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); b = torch.cuda.memory_allocated(); _ = grads_of(call, a, gs); torch.cuda.synchronize(); return torch.cuda.max_memory_allocated() - b
    del graph, g0, g1, g2, g3, gsub, e1, e2
    again = peak(); forget(); first = peak(); row["peak MiB first/again"] = (round(first / 2**20, 2), round(again / 2**20, 2)); row["peak"] = again <= first + (1 << 20)
    return row
PEERS = {}
try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    PEERS["s6"] = selective_scan_fn
except Exception as e: say("no mamba_ssm scan:", repr(e)[:200])
try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    PEERS["ssd"] = mamba_chunk_scan_combined
except Exception as e: say("no mamba_ssm ssd:", repr(e)[:200])
try:
    from triton.runtime.autotuner import Autotuner      # no tuning: the time of a call does not depend on it
    Autotuner._bench = lambda self, *args, config, **meta: [float(config is not self.configs[-1])] * 3
except Exception as e: say(repr(e))
def peer_call(fam): return (lambda t: PEERS["s6"](**t, delta_softplus=True)) if fam == "s6" else (lambda t: PEERS["ssd"](**t, chunk_size=256, dt_softplus=True))
if child:
    rows, at = {}, time.perf_counter()
    for name in list(CASES)[int(child)::CHILDREN]:
        try: rows[name] = check(name, CASES[name])
        except Exception: rows[name] = {"error": traceback.format_exc()[-1500:]}
        rows[name]["s"] = round(time.perf_counter() - at, 1); at = time.perf_counter()
        (OUT / f"host_steps_child{child}.json").write_text(json.dumps(rows))
    os._exit(0)
def finish_children():
    for c in children:
        try: c.wait(max(0.1, LIMIT - (time.perf_counter() - started)))
        except subprocess.TimeoutExpired: c.kill(); c.wait(); say("a child was slow")
    rows = {}
    for i in range(CHILDREN):
        f = OUT / f"host_steps_child{i}.json"
        if f.exists(): rows |= json.loads(f.read_text())
    bad = []
    for name in CASES:
        row = rows.get(name, {"error": "not done in time"}); found["checks"][name] = row
        wrong = [k for k, v in row.items() if v is False or k == "error"]
        if wrong: bad.append((name, wrong))
        say("BAD" if wrong else "ok ", name, row if wrong else (row["peak MiB first/again"], row["s"]))
    save(); say("checks took", round(time.perf_counter() - started, 1), "s")
    return bad

# torch.func and checkpointing go round the same code
try:
    kind, t, call = s6(L=256, D=64)
    from torch.utils.checkpoint import checkpoint
    keys = list(t); gs = torch.randn(1, 64, 256, device="cuda", dtype=BF)
    w = grads_of(call, fresh(t), [gs])[1]
    a = fresh(t); c = torch.autograd.grad(checkpoint(lambda *v: call(dict(zip(keys, v))), *a.values(), use_reentrant=False), list(a.values()), gs)
    f = torch.func.vjp(lambda *v: call(dict(zip(keys, v))), *[v.detach() for v in t.values()])[1](gs)
    say("checkpoint, vjp the same:", same(c, w), [torch.equal(x, y) for x, y in zip(f, w)])
except Exception: say("torch.func:", traceback.format_exc()[-800:])

# host time
def median_us(f, n=100, before=None):
    times = []
    for _ in range(n):
        x = before() if before else None
        torch.cuda.synchronize(); a = time.perf_counter(); y = f(x) if before else f(); times.append(time.perf_counter() - a); del x, y
    torch.cuda.synchronize()
    times.sort()
    return round(times[len(times) // 2] * 1e6, 1), round(times[len(times) // 10] * 1e6, 1)
def timed(call, t):
    g = torch.randn_like(call(t)); vs = list(t.values())
    step = lambda: torch.autograd.grad(call(t), vs, g)
    for _ in range(4): step()
    row = {"step": median_us(step), "forward": median_us(lambda: call(t)), "backward": median_us(lambda out: torch.autograd.grad(out, vs, g), before=lambda: call(t))}
    with torch.no_grad(): row["no grad"] = median_us(lambda: call(t))
    torch.cuda.synchronize(); a = time.perf_counter()
    for _ in range(50): step()
    row["in a row, host"] = round((time.perf_counter() - a) / 50 * 1e6, 1); torch.cuda.synchronize(); row["in a row"] = round((time.perf_counter() - a) / 50 * 1e6, 1)
    return row
for fam in ("s6", "ssd"):
    for L in (512, 2048):
        try:
            kind, t, call = (s6 if fam == "s6" else ssd)(L=L); t = fresh(t); g = torch.randn_like(call(t))
            torch.autograd.grad(call(t), list(t.values()), g)
            if fam in PEERS: torch.autograd.grad(peer_call(fam)(t), list(t.values()), g)
        except Exception: say(traceback.format_exc()[-800:])
torch.cuda.synchronize(); say("warm after", round(time.perf_counter() - started, 1))
bad = finish_children()
for fam in ("s6", "ssd"):
    for L in (512, 2048):
        kind, t, call = (s6 if fam == "s6" else ssd)(L=L); t = fresh(t)
        ways = {"ours": call}
        if fam in PEERS:
            ways["mamba_ssm"] = peer_call(fam)
        for way, f in ways.items():
            if time.perf_counter() - started > 58: continue
            try:
                found["times"][f"{fam} {L} {way}"] = timed(f, t)
            except Exception: found["times"][f"{fam} {L} {way}"] = {"error": traceback.format_exc()[-600:]}; say(found["times"][f"{fam} {L} {way}"]["error"])
            save()
# parts of the host time
try:
    torch.autograd.set_multithreading_enabled(False)
    for fam in ("s6", "ssd"):
        kind, t, call = (s6 if fam == "s6" else ssd)(L=512); t = fresh(t); g = torch.randn_like(call(t)); vs = list(t.values())
        for _ in range(3): torch.autograd.grad(call(t), vs, g)
        torch.cuda.synchronize(); found["times"][f"{fam} 512 ours, one thread"] = timed(call, t)
        if fam in PEERS: found["times"][f"{fam} 512 mamba_ssm, one thread"] = timed(peer_call(fam), t)
        p = cProfile.Profile(); p.enable()
        for _ in range(100): torch.autograd.grad(call(t), vs, g)
        p.disable(); torch.cuda.synchronize()
        with open(OUT / f"host_steps_profile_{fam}.txt", "w") as f: pstats.Stats(p, stream=f).sort_stats("tottime").print_stats(40)
    x = r(1, 2048, 512); e = torch.empty((), dtype=BF, device="cuda").expand(1, 2048, 512)
    micro = {"empty": lambda: torch.empty((1, 2048, 512), dtype=BF, device="cuda"), "empty_like": lambda: torch.empty_like(e, memory_format=torch.contiguous_format), "as_strided": lambda: x.as_strided((2048,), (1,), 5), "current_device": torch.cuda.current_device, "_cuda_getDevice": torch._C._cuda_getDevice, "stream": lambda: torch._C._cuda_getCurrentRawStream(0), "kind of 11": lambda: prepared._kind((x,) * 11, (1,))}
    for n, f in micro.items():
        for _ in range(20): f()
        a = time.perf_counter()
        for _ in range(500): f()
        found["times"]["micro " + n] = {"us": round((time.perf_counter() - a) / 500 * 1e6, 2)}
except Exception: say(traceback.format_exc()[-800:])
save()
say(f"{'us (median, 10%)':32} {'step':>16} {'forward':>16} {'backward':>16} {'no grad':>16} {'row/host':>16} {'row':>16}")
for name, row in found["times"].items():
    say(f"{name:32}", *(f"{str(row[k]):>16}" for k in ("step", "forward", "backward", "no grad", "in a row, host", "in a row", "us", "error") if k in row))
say("bad:", bad or "nothing", "|", torch.cuda.get_device_name(), "|", round(time.perf_counter() - began, 1), "s")
