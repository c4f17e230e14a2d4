"""Seconds that the first call of an operation takes in a fresh process: python3 first_call.py, from the root.

Every operation in a process of its own with an empty cache of Triton's, then in another that finds what the first compiled,
some processes side by side. Nothing is tuned: what is not compiling or loading is one call. With `--peers` also mamba_ssm's
SSD, which times its configurations first. Results: $OUT/first-call.json and a table; about 45 s on an H100's host.
"""
import json, os, runpy, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/out"))
AT_ONCE = int(os.environ.get("AT_ONCE", "13"))
S6, SSD, UPDATE = "mambench.kernels.s6", "mambench.kernels.ssd", "mambench.kernels.state_update.triton_update"
JOBS = {  # name: module, function, sizes, whether with gradients
    "s6 forward, Hopper": (f"{S6}.hopper_op", "selective_scan", dict(L=8192), False),
    "s6 forward, Hopper, batch 8": (f"{S6}.hopper_op", "selective_scan", dict(L=8192, B=8), False),
    "s6 forward, Hopper, 128 states": (f"{S6}.hopper_op", "selective_scan", dict(L=8192, N=128), False),
    "s6 training, Hopper": (f"{S6}.hopper_op", "selective_scan", dict(L=8192), True),
    "s6 training, Hopper, 128 states": (f"{S6}.hopper_op", "selective_scan", dict(L=8192, N=128), True),
    "s6 training, portable": (f"{S6}.triton_scan", "selective_scan", dict(L=8192), True),
    "s6 training, associative": ("mambench.kernels.scan_triton", "selective_scan", dict(L=2048), True),
    "s6 state update": (UPDATE, "selective_state_update", dict(), False),
    "ssd forward, Hopper, one launch": (f"{SSD}.hopper_op", "ssd", dict(L=2048), False),
    "ssd forward, Hopper": (f"{SSD}.hopper_op", "ssd", dict(L=8192), False),
    "ssd training, Hopper": (f"{SSD}.hopper_op", "ssd", dict(L=8192), True),
    "ssd training, portable": (f"{SSD}.triton_ssd", "ssd", dict(L=8192), True),
    "ssd state update": (UPDATE, "selective_state_update", dict(heads=True), False),
}
PEERS = {
    "mamba_ssm SSD forward": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", dict(L=8192), False),
}


def arguments(name, grad, B=1, L=512, N=None, heads=None):
    """Return positional and keyword arguments of a call in bf16, at the sizes of the suite `peers`."""
    import torch
    torch.manual_seed(0)

    def draw(*shape, dtype=torch.bfloat16, scale=1.0, shift=0.0):
        value = scale * torch.randn(shape, device="cuda", dtype=torch.float32) + shift
        return value.to(dtype).requires_grad_(grad)

    def decay(*shape):
        return (-torch.rand(shape, device="cuda") - 0.1).requires_grad_(grad)

    wide = {"dtype": torch.float32}
    if "update" in name:
        entries, rows, N = (80, (B, 80, 64), 128) if heads else (5120, (B, 5120), 16)
        A = decay(entries) if heads else decay(entries, N)
        return (draw(*rows, N), draw(*rows), draw(B, entries), A, draw(B, 1, N), draw(B, 1, N)), {
            "D": draw(entries, **wide), "dt_bias": draw(entries, **wide, shift=-4), "dt_softplus": True}
    if name == "scan":
        D, N = 2048, N or 16
        return (draw(B, D, L), draw(B, D, L), decay(D, N), draw(B, 1, N, L), draw(B, 1, N, L)), {
            "D": draw(D, **wide), "delta_bias": draw(D, **wide, shift=-4), "delta_softplus": True}
    H, P, N = 32, 64, N or 128
    return (draw(B, L, H, P), draw(B, L, H), decay(H), draw(B, L, 1, N), draw(B, L, 1, N), 256), {
        "D": draw(H, **wide), "dt_bias": draw(H, **wide, shift=-4), "dt_softplus": True}


def child(label):
    """Print as JSON what the first calls in this process take."""
    import torch
    module, name, sizes, grad = (JOBS | PEERS)[label]
    runpy.run_path(str(ROOT / "mambench/_start.py"))["load_package"](ROOT / "mambench")
    a, k = arguments("scan" if name == "selective_scan" else name, grad, **sizes)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    operation = getattr(__import__(module, fromlist=[name]), name)
    found = {"import_s": time.perf_counter() - begin}
    from mambench.harness.instruments.launches import CompileTimes
    leaves = [t for t in (*a, *k.values()) if isinstance(t, torch.Tensor) and t.requires_grad]

    def call():
        begin = time.perf_counter()
        with torch.set_grad_enabled(grad):
            out = operation(*a, **k)
        if grad:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    times = CompileTimes()
    with times.watching():
        found["first_s"] = call()
    found |= {"compiled": len(times.compiled_s), "compile_s": times.total_s, "loaded": times.hits}
    found["next_s"] = statistics.median(call() for _ in range(5))
    print(json.dumps(found))


def measure(label, cache):
    """Run a child on a cache of its own; returns what it printed, or what it said instead."""
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "child", label], env=environment, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}


def both(label):
    with tempfile.TemporaryDirectory() as cache:
        return {"operation": label, "empty": measure(label, cache), "kept": measure(label, cache)}


def main():
    import torch, triton
    names = [*JOBS, *(PEERS if "--peers" in sys.argv else ())]
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
             "commit": os.environ.get("MAMBENCH_COMMIT"), "processors": os.cpu_count(), "at_once": AT_ONCE}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found["rows"] = list(pool.map(both, names))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "first-call.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'first call in a process, seconds':36} {'empty cache':>12} {'compiling':>10} {'kernels':>8} {'kept cache':>11} {'next, ms':>9}")
    for row in found["rows"]:
        empty, kept = row["empty"], row["kept"]
        if "failed" in empty or "failed" in kept:
            print(f"{row['operation']:36} FAILED {empty.get('failed')} {kept.get('failed')}")
            continue
        print(f"{row['operation']:36} {empty['first_s']:12.2f} {empty['compile_s']:10.2f} {empty['compiled']:8} {kept['first_s']:11.2f} {1e3 * kept['next_s']:9.3f}")


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["child"] else main()
