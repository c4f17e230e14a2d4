"""What the hardware's counters say binds each kernel of the tables' rows: python3 counters.py, from the root, with ncu.

One forward or backward of ours at each shape under Nsight Compute, caches and clocks left alone: how busy the issue slots, the
pipes and the memories are, and what warps wait for. Results: $OUT/counters.json and a table; about 60 s on an H100.
"""
import csv, io, json, os, re, runpy, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/out"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from first_call import S6, SSD, UPDATE, arguments

SCAN, DUAL, STEP = (f"{S6}.hopper_op", "selective_scan"), (f"{SSD}.hopper_op", "ssd"), (UPDATE, "selective_state_update")
ROWS = [  # label, operation, sizes, backward
    ("s6 forward 1 x 2,048", SCAN, dict(L=2048), False),
    ("s6 forward 1 x 8,192", SCAN, dict(L=8192), False),
    ("s6 forward 8 x 8,192", SCAN, dict(L=8192, B=8), False),
    ("s6 forward 1 x 8,192, N = 128", SCAN, dict(L=8192, N=128), False),
    ("ssd forward 1 x 2,048", DUAL, dict(L=2048), False),
    ("ssd forward 1 x 8,192", DUAL, dict(L=8192), False),
    ("ssd forward 1 x 32,768", DUAL, dict(L=32768), False),
    ("ssd forward 8 x 2,048", DUAL, dict(L=2048, B=8), False),
    ("state update, 128 x 80 heads", STEP, dict(B=128, heads=True), False),
    ("s6 backward 1 x 2,048", SCAN, dict(L=2048), True),
    ("s6 backward 1 x 8,192", SCAN, dict(L=8192), True),
    ("s6 backward 8 x 2,048", SCAN, dict(L=2048, B=8), True),
    ("s6 backward 1 x 8,192, N = 128", SCAN, dict(L=8192, N=128), True),
    ("ssd backward 1 x 2,048", DUAL, dict(L=2048), True),
    ("ssd backward 1 x 8,192", DUAL, dict(L=8192), True),
    ("ssd backward 8 x 2,048", DUAL, dict(L=2048, B=8), True),
]
ROWS = [row for row in ROWS if os.environ.get("ROWS", "") in row[0]]
MARK = "spin_kernel"  # torch's sleep, before each row
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats")
SHORT = {  # the first of these that a column's name begins with
    "time_us": ("gpu__time_duration.sum",),
    "issue": ("smsp__issue_active.avg.pct", "sm__inst_issued.avg.pct", "sm__instruction_throughput.avg.pct"),
    "xu": ("sm__inst_executed_pipe_xu.avg.pct", "sm__pipe_xu_cycles_active.avg.pct"),
    "fma": ("sm__pipe_fma_cycles_active.avg.pct", "sm__inst_executed_pipe_fma.avg.pct"),
    "alu": ("sm__pipe_alu_cycles_active.avg.pct", "sm__inst_executed_pipe_alu.avg.pct"),
    "tensor": ("sm__pipe_tensor_cycles_active.avg.pct", "sm__inst_executed_pipe_tensor", "sm__pipe_tensor_op"),
    "lsu": ("sm__inst_executed_pipe_lsu.avg.pct",),
    "l1": ("l1tex__throughput.avg.pct",),
    "l2": ("lts__throughput.avg.pct",),
    "dram": ("gpu__dram_throughput.avg.pct", "dram__throughput.avg.pct"),
    "warps": ("smsp__warps_active.avg.per_cycle_active", "sm__warps_active.avg.per_cycle_active"),
}


def begin(label):
    """Return a function of one execution of a row, everything before it done."""
    import torch
    (module, name), sizes, backward = next((o, s, b) for n, o, s, b in ROWS if n == label)
    a, k = arguments("scan" if name == "selective_scan" else name, backward, **sizes)
    operation = getattr(__import__(module, fromlist=[name]), name)
    if not backward:
        def forward():
            with torch.no_grad():
                return operation(*a, **k)
        return forward
    leaves = [t for t in (*a, *k.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    out = operation(*a, **k)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def child(labels):
    import torch
    runpy.run_path(str(ROOT / "mambench/_start.py"))["load_package"](ROOT / "mambench")
    for label in labels:
        execute = begin(label)
        for _ in range(2):
            execute()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)  # MARK: what follows is this row's
        held = execute()  # until the profiler has stopped
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del execute, held
        torch.cuda.empty_cache()


def counted(text):
    """Return ncu's rows, one a kernel, as {column: text}, and the columns' units."""
    cells = list(csv.reader(io.StringIO("\n".join(line for line in text.splitlines() if line.startswith('"')))))
    header, units, *rows = cells if len(cells) > 2 else ([], [])
    return [dict(zip(header, row)) for row in rows], dict(zip(header, units))


def figures(row, units):
    found = {"kernel": row.get("Kernel Name"), "grid": row.get("Grid Size"), "block": row.get("Block Size")}
    for name, starts in SHORT.items():
        for start in starts:
            column = next((c for c in row if c.startswith(start) and row[c]), None)
            if column is not None:
                value = float(row[column].replace(",", ""))
                scale = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3}.get(units.get(column, ""), 1) if name == "time_us" else 1
                found[name] = round(value * scale, 3)
                break
    stalls = {}
    for column, value in row.items():
        match = re.fullmatch(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio", column) or re.fullmatch(r"smsp__average_warp_latency_issue_stalled_(\w+)\.ratio", column)
        if match and value and "not_issued" not in column:
            stalls[match[1]] = round(float(value.replace(",", "")), 3)
    found["waits"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:6])
    found["registers"] = row.get("launch__registers_per_thread")
    return found


def profile(seconds):
    """Count all rows in one process under ncu; returns each with its kernels."""
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none", "--csv", "--page", "raw",
               *(word for name in SECTIONS for word in ("--section", name)), sys.executable, __file__, "child"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return [{"row": "all", "failed": f"timeout: {str(error.stdout)[-300:]}"}]
    (OUT / "counters.csv").write_text(done.stdout)
    found, units = counted(done.stdout)
    rows, names = [], iter(name for name, *_ in ROWS)
    for kernel in found:
        if MARK in kernel["Kernel Name"]:
            rows.append({"row": next(names), "kernels": []})
        elif rows:
            rows[-1]["kernels"].append(figures(kernel, units))
    return rows or [{"row": "all", "failed": (done.stdout + done.stderr)[-600:]}]


def main():
    import torch
    start = time.time()
    warm = lambda i: subprocess.run([sys.executable, __file__, "child", str(i)], capture_output=True, text=True).stderr[-200:]
    with ThreadPoolExecutor(12) as pool:
        said = [text for text in pool.map(warm, range(len(ROWS))) if text.strip()]
    print(f"compiled at {time.time() - start:.0f} s", said[:2], flush=True)
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": os.environ.get("MAMBENCH_COMMIT"), "rows": []}
    OUT.mkdir(parents=True, exist_ok=True)
    found["rows"] = profile(float(os.environ.get("LIMIT", "110")))
    (OUT / "counters.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'row':32} {'kernel':24} {'us':>7} " + " ".join(f"{name:>6}" for name in list(SHORT)[1:]) + "  waits, cycles an instruction")
    for row in found["rows"]:
        if "failed" in row:
            print(f"{row['row']:32} FAILED {row['failed']}")
        for kernel in row.get("kernels", ()):
            values = " ".join(f"{kernel[name]:6.1f}" if name in kernel else "     -" for name in list(SHORT)[1:])
            waits = ", ".join(f"{name} {value:.1f}" for name, value in list(kernel["waits"].items())[:4])
            print(f"{row['row']:32} {str(kernel['kernel'])[:24]:24} {kernel.get('time_us', 0):7.1f} {values}  {waits}")
    print(f"total {time.time() - start:.0f} s")


if __name__ == "__main__":
    names = [name for name, *_ in ROWS]
    child(names[int(sys.argv[2]) :][:1] if len(sys.argv) > 2 else names) if sys.argv[1:2] == ["child"] else main()
