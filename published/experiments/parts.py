"""What several experiments of this folder do alike: draw inputs, time by graphs, run parts beside each other.

A script finds this file because Python looks first in the folder of the script that it runs. torch is imported where it is used:
a process that only starts others needs none.
"""
import gc, json, os, runpy, subprocess, sys, time, traceback
from pathlib import Path

S6_NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def load_package():
    """Make `mambench` importable, from the repository root."""
    runpy.run_path("mambench/_start.py")["load_package"](Path("mambench").resolve())


def s6_tensors(B, L, N, D=2048, dtype=None, G=1, z=False, skip=True, bias=True, softplus=True, seed=0):
    """Return a scan's arguments, the gradient of its output and that of its last state; a quarter of the channels forgets little."""
    import torch
    dtype = dtype or torch.bfloat16
    g = torch.Generator(device="cuda").manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, device="cuda")
    A = -torch.rand(D, N, generator=g, device="cuda") - 0.1; A[: D // 4] *= 1e-3
    delta = r(B, D, L) * 0.5
    t = dict(u=r(B, D, L).to(dtype), delta=(delta if softplus else delta.abs() * 0.2).to(dtype), A=A, B=r(B, G, N, L).to(dtype), C=r(B, G, N, L).to(dtype),
             D=r(D) if skip else None, z=r(B, D, L).to(dtype) if z else None, delta_bias=r(D).abs() * 0.1 if bias else None)
    return t, r(B, D, L).to(dtype), r(B, D, N)


def s6_prepared(t, every, softplus=True):
    """Return the inputs of a backward, and the states that the forward keeps for it."""
    from mambench.kernels.s6 import hopper_scan, triton_scan
    kept = hopper_scan.scan_forward(**t, delta_softplus=softplus, checkpoint_every=every)[2]
    return triton_scan._Inputs(*(t[k] for k in S6_NAMES), softplus), kept


def s6_reference(t, dout, dlast, softplus):
    """Return the gradients of the step-by-step recurrence in float64."""
    import torch, torch.nn.functional as F
    d = {k: None if v is None else v.detach().double().requires_grad_() for k, v in t.items()}
    dt = d["delta"] if d["delta_bias"] is None else d["delta"] + d["delta_bias"][:, None]
    dt = F.softplus(dt, threshold=1e9) if softplus else dt
    B, C = (d[k].repeat_interleave(dt.shape[1] // d["B"].shape[1], 1) for k in "BC")
    h = torch.zeros(*dt.shape[:2], B.shape[2], device="cuda", dtype=torch.float64)
    x, ys = dt * d["u"], []
    for i in range(dt.shape[2]):
        h = torch.exp(dt[:, :, i, None] * d["A"]) * h + x[:, :, i, None] * B[..., i]
        ys.append((h * C[..., i]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if d["D"] is None else y + d["u"] * d["D"][:, None]
    y = y if d["z"] is None else y * F.silu(d["z"])
    torch.autograd.backward([y, h] if dlast is not None else [y], [dout.double()] + ([dlast.double()] if dlast is not None else []))
    return {k: None if v is None else v.grad for k, v in d.items()}


def ssd_inputs(B, L, H, P=64, N=128, G=1, dtype=None, z=False, start=False, A=4.0):
    """Return the SSD's arguments; A is the most that a head forgets."""
    import torch
    dtype = dtype or torch.bfloat16
    g = torch.Generator(device="cuda").manual_seed(0)
    r = lambda *s, d=dtype: torch.randn(s, device="cuda", dtype=torch.float32, generator=g).to(d)
    return dict(x=r(B, L, H, P), dt=r(B, L, H), A=-torch.rand(H, device="cuda", generator=g) * A - 0.1, B=r(B, L, G, N), C=r(B, L, G, N),
                D=torch.rand(H, device="cuda", generator=g), z=r(B, L, H, P) if z else None, dt_bias=torch.rand(H, device="cuda", generator=g) - 4,
                initial_states=r(B, H, P, N, d=torch.float32) if start else None, dt_softplus=True)


def relative(got, want):
    """Return the relative error in the L2 norm, two digits."""
    return float("%.2g" % ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item())


def replay_us(call, total_s=0.03, per=None, least=5):
    """Return the median microseconds of a call: graphs of several calls, one replay behind the other, warm L2."""
    import torch
    call(); torch.cuda.synchronize()
    t = time.perf_counter(); call(); torch.cuda.synchronize(); once = time.perf_counter() - t
    per = per or max(1, min(20, int(0.004 / max(once, 1e-5))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(per): held = call()
    for _ in range(3): graph.replay()
    n = max(least, min(60, int(total_s / max(once * per, 1e-5))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize(); marks[0].record()
    for m in marks[1:]: graph.replay(); m.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))
    del graph, held
    return times[len(times) // 2] * 1e3 / per


def graph_ms(call, replays, between):
    """Return the median milliseconds of a graph's replay, warm L2; `between` replays between two events."""
    import torch
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(); call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); [graph.replay() for _ in range(between)]; b.record(); b.synchronize(); times.append(a.elapsed_time(b) / between)
    return round(sorted(times)[len(times) // 2], 4)


def kernels(call, letters=36):
    """Return microseconds and launches of each kernel of a call, by the profiler; so many letters of a kernel's name."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    call(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    return {e.key[:letters]: [round(e.device_time_total / 3, 1), e.count // 3] for e in p.key_averages() if e.device_time_total}


class Found:
    """Rows of a part, written as they are made."""

    def __init__(self, path):
        self.path, self.rows, self.began = path, [], time.time()

    def add(self, **row):
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows, indent=0, default=str))

    def guarded(self, label, function, *args, **kw):
        """Call, and add a failure as a row; raises what leaves the GPU unusable."""
        import torch
        try:
            return function(*args, **kw)
        except Exception as exc:
            traceback.print_exc()
            self.add(label=label, failed=f"{type(exc).__name__}: {str(exc)[-700:]}")
            if any(word in str(exc) for word in ("illegal", "unspecified", "misaligned", "assert")):
                raise
        finally:
            gc.collect(); torch.cuda.empty_cache()


def start(script, folder, stem, *argv):
    """Start a script's part as a process of one thread, its output in a log."""
    log = open(folder / f"{stem}_{'_'.join(argv)}.log".replace(",", "_"), "w")
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, script, *argv], stdout=log, stderr=subprocess.STDOUT, env=env)


def finish(process, seconds, label):
    """Wait so long, then end the process; say what did not end well."""
    try:
        process.wait(timeout=max(0.5, seconds))
    except subprocess.TimeoutExpired:
        process.kill(); process.wait()
        print(f"{label}: ended after its time", flush=True)
    if process.returncode:
        print(f"{label}: rc {process.returncode}", flush=True)
