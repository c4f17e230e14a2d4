"""Repeats checks of equal code on a CPU and counts alarms; plants one slowdown. See docs/ci.md.

    python published/experiments/cpu_gate.py [REPEATS] [RECORD]      from the repository root

First the machine's noise is calibrated, then comes a check whose head computes everything twice in
one implementation, and then REPEATS (30) checks of equal code. RECORD (a JSON file) is written anew
after each, with the machine's load; a record that is there already is continued. LIMIT_S ends the
series early. Both sides are copies of the repository: no git is needed. On a machine with cores to
spare, several series can run side by side, each pinned to its own (`FIRST=11 taskset -c 8-15 ...`:
numbers from 11 on); `merge OUT RECORD ...` joins their records.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path.cwd()
MERGE = sys.argv[1:2] == ["merge"]
REPEATS = int(sys.argv[1]) if len(sys.argv) > 1 and not MERGE else 30
RECORD = Path(sys.argv[2] if len(sys.argv) > 2 else "cpu-gate.json")
FIRST = int(os.environ.get("FIRST", "1"))
LIMIT_S = float(os.environ.get("LIMIT_S", "1e9"))
SUITE = (
    *("-s", "gate-cpu", "-i", "ssd", "-i", "flash_attention", "--device", "cpu"),
    *("--filter", "seqlen<1024", "--measure", "time", "--target-time", "0.1"),
)
PROMISE = "10"
BEGIN = time.monotonic()


def run(*words):
    """Return the exit code, the output and the seconds of a command of run_bench.py."""
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "run_bench.py", *words], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


def check(folder, seed, head="head"):
    """Run one check; returns what the record keeps of it."""
    made = folder / f"check-{seed}"
    load = os.getloadavg()[0]
    words = ("check", "--base", f"{folder}/base", "--head", f"{folder}/{head}", *SUITE, "--wait")
    words += ("--store", str(folder), "--seed", str(seed), "--promise", PROMISE, "-q")
    code, said, took_s = run(*words, "-o", str(made))
    kept = {"seed": seed, "exit_code": code, "took_s": round(took_s, 1)}
    kept["load_average"] = [round(load, 2), round(os.getloadavg()[0], 2)]
    try:
        found = json.loads((made / "check.json").read_text())
    except OSError:
        return {**kept, "problem": said[-500:]}
    shutil.rmtree(made)
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


PLANTED = """

_op_of = Ssd.op


def _planted(self, family, variant):
    op = _op_of(self, family, variant)

    def slower(*args, **options):
        op(*args, **options)
        return op(*args, **options)

    return slower


Ssd.op = _planted
"""


def tree(root, *, planted=False):
    """Copy the repository, unless it is there; with a slowdown if it is asked for."""
    if root.exists():
        return
    kept_out = shutil.ignore_patterns("runs", "published", "tests", "__pycache__", ".*")
    shutil.copytree(ROOT, root, ignore=kept_out)
    if planted:
        path = root / "implementations/ops/ssd.py"
        path.write_text(path.read_text() + PLANTED)


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


def begun():
    """Return a new record."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "suite": " ".join(SUITE),
        "commit": os.environ.get("MAMBENCH_COMMIT")
        or subprocess.run(git, capture_output=True, text=True).stdout.strip()
        or None,
        "cores": len(os.sched_getaffinity(0)),
        "machine_cores": os.cpu_count(),
        "promise_percent": PROMISE,
        "asked": REPEATS,
        "checks": [],
    }


def merge(paths):
    """Join the records of series that ran side by side; the first one's calibration stands."""
    records = [json.loads(Path(path).read_text()) for path in paths]
    record = records[0]
    record["series"] = [[len(r["checks"]), r["cores"]] for r in records]
    record["checks"] = [found for r in records for found in r["checks"]]
    record["planted"] = [r["planted"] for r in records if "planted" in r]
    record["asked"] = sum(r["asked"] for r in records)
    summary(record)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


def main():
    """Calibrate, plant, repeat."""
    if MERGE:
        return merge(sys.argv[3:])
    record = json.loads(RECORD.read_text()) if RECORD.exists() else begun()
    folder = RECORD.with_suffix("").resolve()
    folder.mkdir(exist_ok=True)
    for side in ("base", "head", "planted"):
        tree(folder / side, planted=side == "planted")

    def keep():
        summary(record)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")

    if "calibration" not in record:
        made = folder / "calibration"
        words = ("--head", f"{folder}/base", "--store", str(folder), "--wait", "-q")
        code, said, took_s = run("calibrate", *SUITE, *words, "-o", str(made))
        record["calibration"] = {"exit_code": code, "took_s": round(took_s, 1), "said": said}
        keep()
        print(said, flush=True)
    if "planted" not in record:
        record["planted"] = check(folder, 0, head="planted")
        keep()
        print("planted", json.dumps(record["planted"]), flush=True)
    for seed in range(FIRST + len(record["checks"]), FIRST + REPEATS):
        if time.monotonic() - BEGIN > LIMIT_S:
            break
        found = check(folder, seed)
        record["checks"].append(found)
        keep()
        print(seed, found["exit_code"], found["took_s"], found.get("conclusion"), flush=True)
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
