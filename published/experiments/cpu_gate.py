"""Repeats checks of equal code on a CPU and counts alarms; plants one slowdown. See docs/ci.md.

    python published/experiments/cpu_gate.py [REPEATS] [RECORD]      from the repository root

Needs git: both sides are HEAD. First the machine's noise is calibrated; REPEATS (30) checks
follow; before them goes one whose head does everything twice in one implementation. RECORD (a JSON
file) is written anew after each. LIMIT_S ends the series early; what was done by then stays.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path.cwd()
REPEATS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
RECORD = Path(sys.argv[2] if len(sys.argv) > 2 else "cpu-gate.json")
LIMIT_S = float(os.environ.get("LIMIT_S", "1e9"))
SUITE = (
    *("-s", "gate-cpu", "-i", "ssd", "-i", "flash_attention", "--device", "cpu"),
    *("--measure", "time", "--target-time", "0.1"),
)
PROMISE = "10"
BEGIN = time.monotonic()


def run(*words):
    """Return the exit code, the output and the seconds of a command of run_bench.py."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "run_bench.py", *words], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


def check(folder, store, seed, base="HEAD", head="HEAD"):
    """Run one check; returns what the record keeps of it."""
    load = os.getloadavg()[0]
    words = ("check", "--base", base, "--head", head, *SUITE, "--store", str(store), "--wait", "-q")
    code, said, took_s = run(*words, "--seed", str(seed), "--promise", PROMISE, "-o", str(folder))
    kept = {"seed": seed, "exit_code": code, "took_s": round(took_s, 1)}
    kept["load_average"] = [round(load, 2), round(os.getloadavg()[0], 2)]
    try:
        found = json.loads((folder / "check.json").read_text())
    except OSError:
        return {**kept, "problem": said[-500:]}
    regressed = [p["name"] for p in found["points"] if p["verdict"] == "regressed"]
    return {
        **kept,
        "conclusion": found["conclusion"],
        "counts": {k: v for k, v in found["counts"].items() if v},
        "regressed": regressed,
        "rounds": found["facts"].get("rounds"),
        "smallest_seen_frac": found["smallest_seen_frac"],
        "case_noise_frac": {
            p["name"]: p["noise_frac"] for p in found["points"] if p["kind"] == "case"
        },
    }


def planted_tree(folder):
    """Check HEAD out and let SSD's forward compute everything twice."""
    command = ["git", "worktree", "add", "--detach", "--force", str(folder), "HEAD"]
    subprocess.run(command, check=True, capture_output=True)
    path = folder / "implementations/ops/ssd.py"
    path.write_text(
        path.read_text()
        + """

_op_of = Ssd.op


def _planted(self, family, variant):
    op = _op_of(self, family, variant)

    def slower(*args, **options):
        op(*args, **options)
        return op(*args, **options)

    return slower


Ssd.op = _planted
"""
    )
    return folder


def summary(record):
    """Add what the series says as a whole."""
    checks = record["checks"]
    seen = sorted(c["smallest_seen_frac"] for c in checks if c.get("smallest_seen_frac"))
    record["summary"] = {
        "checks": len(checks),
        "alarms": sum(bool(c.get("regressed")) for c in checks),
        "exit_codes": {str(n): sum(c["exit_code"] == n for c in checks) for n in range(5)},
        "smallest_seen_frac": [seen[0], seen[len(seen) // 2], seen[-1]] if seen else None,
        "took_s": sorted(c["took_s"] for c in checks)[len(checks) // 2] if checks else None,
    }


def main():
    """Calibrate, plant, repeat."""
    record = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "suite": " ".join(SUITE)}
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    record |= {"commit": commit.strip(), "cores": os.cpu_count(), "promise_percent": PROMISE}
    record |= {"asked": REPEATS, "checks": []}
    with tempfile.TemporaryDirectory(prefix="cpu-gate-") as name:
        folder, tree = Path(name), Path(name) / "planted"

        def keep():
            summary(record)
            RECORD.write_text(json.dumps(record, indent=1) + "\n")

        store = ("--store", name, "--wait", "-q", "-o", f"{name}/c")
        code, said, took_s = run("calibrate", *SUITE, *store)
        record["calibration"] = {"exit_code": code, "took_s": round(took_s, 1), "said": said}
        print(said, flush=True)
        try:
            record["planted"] = check(folder / "p", folder, 99, head=str(planted_tree(tree)))
            print("planted", json.dumps(record["planted"]), flush=True)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], capture_output=True)
        keep()
        for seed in range(1, REPEATS + 1):
            if time.monotonic() - BEGIN > LIMIT_S:
                break
            found = check(folder / str(seed), folder, seed)
            shutil.rmtree(folder / str(seed), ignore_errors=True)
            record["checks"].append(found)
            keep()
            print(seed, found["exit_code"], found["took_s"], found.get("conclusion"), flush=True)
    print(json.dumps(record.get("summary"), indent=1))


if __name__ == "__main__":
    main()
