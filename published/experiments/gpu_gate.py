"""The gate on GPUs: A/A checks, planted slowdowns, and a check of sixty cases; see docs/ci.md.

    python3 published/experiments/gpu_gate.py [PART ...]      from the repository root, without git

Parts: `calibrate`, `aa` or `aa*N` (a check of equal code, N times), `pass` (SSD reads and writes
its input once more), `loop` (the selective scan's loop has one tile more in twenty), `tuning` (the
selective scan has two channels a warp, which take longer; up to commit 4e90950 a configuration that
is a fifth slower), `one` (its loop has one tile more in a
hundred), `sixty` (sixty cases of equal code). Without any: all, with ten A/A checks.

All GPUs that are visible work side by side: each calibrates, then takes the next part that is left.
GPUS limits their number, LIMIT_S when the last part may begin. $OUT/h100-gate.json (or $NAME.json),
written anew after each part, holds what is published; what the checks printed is in h100-gate.txt.
A table comes last. `merge FILE ...` joins records of runs that were started apart.
"""

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path.cwd()
NAME = os.environ.get("NAME", "h100-gate")
OUT = Path(os.environ.get("OUT", "/tmp/gate-out"))
LIMIT_S = float(os.environ.get("LIMIT_S", "430"))
BEGIN = time.monotonic()
PARTS = ("calibrate", "pass", "loop", "tuning", "one", "sixty", "aa*10")
SIXTY = """title: Sixty cases
question: How long does a check of sixty cases take?
sweeps:
  - implementations: [selective_scan, ssd, flash_attention]
    passes: [forward]
    dtype: bf16
    axes:
      seqlen: "2^10..2^14"
      batch: [1, 2]
      d_inner: [1024, 2048]
      d_state: {s6: 16, ssd: 128}
      headdim: {ssd: 64, attention: 128}
"""
WRAP = """

_op_of = {cls}.op


def _planted(self, family, variant):
    op = _op_of(self, family, variant)
{body}
    return slower


{cls}.op = _planted
"""
# part: file, text there, text instead (both None: appended), implementation that gets slower
PLANTS = {
    "pass": (
        "implementations/ops/ssd.py",
        None,
        WRAP.format(
            cls="Ssd",
            body="\n    def slower(x, *more, **options):\n"
            "        return op(x.clone(), *more, **options)\n",
        ),
        "ssd",
    ),
    "loop": (
        "kernels/s6/hopper_kernel.py",
        "range(0, seqlen, TILE)",
        "range(0, seqlen + (seqlen + 20 * TILE - 1) // (20 * TILE) * TILE, TILE)",
        "selective_scan",
    ),
    "tuning": (
        "kernels/s6/hopper_scan.py",
        "return Config(wide=checkpoint_every is None)",
        "return Config(channels=2, warps=8)",
        "selective_scan",
    ),
    "one": (
        "kernels/s6/hopper_kernel.py",
        "range(0, seqlen, TILE)",
        "range(0, seqlen + seqlen // (100 * TILE) * TILE, TILE)",  # of the longest segments only
        "selective_scan",
    ),
}
_lock = threading.Lock()
record = {
    "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    "commit": os.environ.get("MAMBENCH_COMMIT"),
    "parts": [],
}


def tree(folder, part):
    """Copy the repository, with a part's slowdown planted."""
    root = folder / part
    kept_out = shutil.ignore_patterns(
        ".git", "runs", "shared", "published", "tests", "__pycache__", ".venv", ".*"
    )
    shutil.copytree(ROOT, root, ignore=kept_out)
    if part in PLANTS:
        name, old, new, _ = PLANTS[part]
        path = root / name
        text = path.read_text()
        if old is not None and text.count(old) != 1:
            raise ValueError(f"{name} holds {text.count(old)} times {old!r}")
        path.write_text(text + new if old is None else text.replace(old, new))
    return root


def command(folder, gpu, number, part):
    """Return the words of a part's command, and its folder."""
    made = folder / f"{part}-{number}-{gpu}"
    words = ["calibrate", "--rounds", "8"] if part == "calibrate" else ["check"]
    if part != "calibrate":
        head = tree(folder, part) if part in PLANTS else folder / "head"
        words += ["--base", str(folder / "base"), "--head", str(head), "--seed", str(number)]
    suite = "gate-gpu"
    if part == "sixty":
        suite = str(folder / "sixty.yaml")
        Path(suite).write_text(SIXTY)
    words += ["-s", suite, "--device", "cuda", "--store", str(folder / f"store-{gpu}")]
    return [*words, "-o", str(made)], made


def work(folder, gpu, number, part):
    """Run a part on a GPU; returns what the record keeps of it."""
    begin = time.monotonic()
    kept = {"part": part, "gpu": gpu, "number": number, "began_s": round(begin - BEGIN, 1)}
    words, made = command(folder, gpu, number, part)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["CUDA_VISIBLE_DEVICES"] = gpu
    done = subprocess.run(
        [sys.executable, "run_bench.py", *words], env=environment, capture_output=True, text=True
    )
    kept |= {"exit_code": done.returncode, "took_s": round(time.monotonic() - begin, 1)}
    with _lock, (OUT / f"{NAME}.txt").open("a") as file:
        print(f"==== {kept}\n{done.stdout}\n---- stderr\n{done.stderr}", file=file, flush=True)
    steps = re.findall(
        r"^(.+?), (.+?): (\d+) cases in (?:(\d+) min )?([\d.]+) s", done.stderr, re.M
    )
    kept["processes"] = [
        [arm, what, int(cases), round(60 * float(minutes or 0) + float(s), 1)]
        for arm, what, cases, minutes, s in steps
    ]
    if part == "calibrate":
        return {**kept, "said": done.stdout.strip().splitlines()}
    return {**kept, **told(made, part, done.stderr)}


def told(made, part, errors):
    """Return what a check's report says."""
    try:
        found = json.loads((made / "check.json").read_text())
    except OSError:
        return {"problem": errors[-800:]}
    points = found["points"]
    regressed = [point_of(p) for p in points if p["verdict"] == "regressed"]
    slower = PLANTS[part][3] if part in PLANTS else None
    cases = [p for p in points if p["kind"] == "case" and p["metric"] == "time_s"]
    noise = sorted(p["noise_frac"] for p in cases if p["noise_frac"] is not None)
    return {
        "conclusion": found["conclusion"],
        "facts": found["facts"],
        "notes": found["notes"],
        "counts": {k: v for k, v in found["counts"].items() if v},
        "smallest_seen_frac": found["smallest_seen_frac"],
        "noise_frac": [noise[0], noise[len(noise) // 2], noise[-1]] if noise else None,
        "alarm_rate": found["alarm_rate"],
        "regressed": regressed,
        "planted_in": slower,
        "planted_cases": [point_of(p) for p in cases if slower and slower in p["name"].split(":")],
        # None: nothing is planted, or nothing was found.
        "named_right": all(slower in p["name"] for p in regressed)
        if slower and regressed
        else None,
    }


def point_of(point):
    """Return what is kept of a point."""
    names = ("kind", "name", "metric", "verdict", "change_frac", "low_frac", "high_frac")
    return {n: point[n] for n in (*names, "smallest_seen_frac", "notes")}


def keep():
    """Write what is known."""
    parts = record["parts"]
    aa = [p for p in parts if p["part"] == "aa" and "regressed" in p]
    record["summary"] = {
        "aa_checks": len(aa),
        "aa_alarms": sum(bool(p["regressed"]) for p in aa),
        "aa_exit_codes": {str(n): sum(p["exit_code"] == n for p in aa) for n in range(5)},
        "aa_took_s": [p["took_s"] for p in aa],
        "aa_smallest_seen_frac": [p["smallest_seen_frac"] for p in aa],
    }
    (OUT / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")


def serve(folder, gpu, tasks, calibrated):
    """Calibrate, then take part after part until none is left or it is late."""
    if calibrated:
        do(folder, gpu, 0, "calibrate")
    while time.monotonic() - BEGIN < LIMIT_S:
        try:
            number, part = tasks.get_nowait()
        except queue.Empty:
            return
        do(folder, gpu, number, part)


def do(folder, gpu, number, part):
    """Run a part; whatever happens to it is its own."""
    try:
        found = work(folder, gpu, number, part)
    except Exception as error:
        found = {"part": part, "gpu": gpu, "number": number, "problem": repr(error)}
    with _lock:
        record["parts"].append(found)
        keep()
        said = found.get("conclusion") or found.get("problem") or (found.get("said") or ["?"])[-2:]
        print(
            f"[{time.monotonic() - BEGIN:4.0f} s] GPU {gpu} {part}: exit {found.get('exit_code')} "
            f"in {found.get('took_s')} s: {said}",
            flush=True,
        )


def table():
    """Print what was found."""
    print()
    for p in sorted(record["parts"], key=lambda p: p["part"]):
        seen = p.get("smallest_seen_frac")
        print(
            f"{p['part']:10} GPU {p['gpu']} exit {p.get('exit_code')} {p.get('took_s')} s  "
            f"could see {f'{seen:.1%}' if seen else '-'}  {p.get('counts')}  "
            f"right case: {p.get('named_right')}"
        )
        for point in p.get("regressed") or ():
            print(f"    REGRESSED {point['name']} [{point['metric']}] {point['change_frac']:+.1%}")
            for note in point["notes"][:4]:
                print(f"        {note}")
    for p in record["parts"]:
        print(p["part"], "processes:", *(f"{s:g}" for *_, s in p.get("processes", ())[:40]))
    print(json.dumps(record["summary"]))


def merge(paths):
    """Join records into one; a run that was cut short has only the parts that it ended."""
    for path in paths:
        other = json.loads(Path(path).read_text())
        gpus = sorted({part["gpu"] for part in other["parts"]})
        record["made_at"] = min(record["made_at"], other["made_at"])
        for name in ("parts", "listed"):
            record[name] = [*record.get(name, []), *other[name]]
        told = {name: other.get(name) for name in ("made_at", "commit", "took_s")}
        record["series"] = [*record.get("series", []), told | {"gpus": len(gpus)}]
    record["listed"] = list(dict.fromkeys(record["listed"]))
    del record["commit"]  # each run has its own
    keep()
    table()


def main():
    """Share the parts out among the GPUs."""
    OUT.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:2] == ["merge"]:
        return merge(sys.argv[2:])
    asked = sys.argv[1:] or PARTS
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    gpus = visible.split(",") if visible else [str(i) for i in range(listed.count("GPU "))]
    gpus = gpus[: int(os.environ.get("GPUS", "99"))] or ["0"]
    tasks, count = queue.Queue(), 0
    for part in asked:
        name, _, times = part.partition("*")
        for _ in range(int(times or 1)) if name != "calibrate" else ():
            count += 1
            tasks.put((count, name))
    record["gpus"], record["listed"] = gpus, re.sub(r" \(UUID.*?\)", "", listed).splitlines()
    with tempfile.TemporaryDirectory(prefix="gpu-gate-") as name:
        folder = Path(name)
        for side in ("base", "head"):
            tree(folder, side)
        threads = [
            threading.Thread(target=serve, args=(folder, gpu, tasks, "calibrate" in asked))
            for gpu in gpus
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    record["took_s"] = round(time.monotonic() - BEGIN, 1)
    record["not_begun"] = [part for _, part in tasks.queue]
    keep()
    table()


if __name__ == "__main__":
    main()
