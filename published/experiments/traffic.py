"""On an H100: counted bytes of known kernels, and the traffic table at L=8192.

Run from the repository root: `python3 traffic.py` (carry it, or copy it into the tree).
LIMIT_S (default 240) bounds the whole; what was counted by then is kept and printed. Everything goes
under $OUT (traffic.json after each child). Steps: all cases once in plain processes, four at a time,
so that every compiler's cache on disk is warm and slow ones are known; probes under ncu; cases under
ncu, fastest first, ten a child. No ceilings (WITH_CEILINGS=1 measures them first, 20 s).
"""

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path

BEGIN = time.monotonic()
LIMIT_S = float(os.environ.get("LIMIT_S", "240"))
WARM_LIMIT_S = float(os.environ.get("WARM_LIMIT_S", "100"))
WARMERS = 4
PER_CHILD = 10
ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/counters-out"))
OUT.mkdir(parents=True, exist_ok=True)
SEQLEN = int(os.environ.get("SEQLEN", "8192"))
# The winners of autotuning are kept on disk too: else ncu's child tunes anew.
os.environ["TRITON_CACHE_AUTOTUNING"] = "1"
runpy.run_path(str(ROOT / "mambench" / "_start.py"))["load_package"](ROOT / "mambench")

from mambench.harness import machine, plan, registry, suite  # noqa: E402
from mambench.harness.instruments import ceilings  # noqa: E402
from mambench.harness.counters import count as counters  # noqa: E402
from mambench.harness.spec import Outcome  # noqa: E402

MB = 1e6
KEPT = Path("/tmp/ncu-kept")


def say(*words):
    print(f"[{time.monotonic() - BEGIN:4.0f} s]", *words, flush=True)


def left_s():
    return LIMIT_S - (time.monotonic() - BEGIN)


def planned(device):
    made = plan.make_plan(
        suite.find("custom"),
        device,
        implementations=[f"{name}:*" for name in registry.load()],
        axes={"seqlen": (SEQLEN,), "pass": ("forward", "backward"), "d_inner": (2048,)},
        filters=["level==op"],
    )
    found = registry.load()
    few = []
    for p in made.runnable:
        launches = found[p.case.implementation].launches(p.case) * (3 if p.case.pass_.needs_grad else 1)
        if launches <= 2000:
            few.append(p.case)
    return few


def warm(number):
    """Execute every fourth case twice in this process; one line of JSON a case."""
    import torch

    from mambench.implementations.workload import build

    device = machine.detect("cuda")
    torch.cuda.set_device(0)
    with (OUT / f"warm-{number}.jsonl").open("w", buffering=1) as file:
        for case in planned(device)[number::WARMERS]:
            file.write(json.dumps({"id": case.case_id, "begin": True}) + "\n")
            begin, reason = time.monotonic(), None
            try:
                execute = build(case, registry.get(case.implementation, ()), device, seed=0).prepare(case.pass_)
                for _ in range(2):
                    execute()
                    torch.cuda.synchronize()
                del execute
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            took = time.monotonic() - begin
            file.write(json.dumps({"id": case.case_id, "took_s": took, "reason": reason}) + "\n")
            print(f"    warm {took:5.1f} s {case.label} {reason or ''}", flush=True)
            torch.cuda.empty_cache()


def warm_all(cases):
    """Return seconds by case of those that executed."""
    command = [sys.executable, __file__, "warm"]
    processes = [subprocess.Popen([*command, str(n)], start_new_session=True) for n in range(WARMERS)]
    ends = time.monotonic() + WARM_LIMIT_S
    for process in processes:
        try:
            process.wait(max(0.1, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    took, begun = {}, set()
    for n in range(WARMERS):
        path = OUT / f"warm-{n}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            told = json.loads(line)
            if "begin" in told:
                begun.add(told["id"])
            elif told["reason"] is None:
                took[told["id"]] = told["took_s"]
            begun.discard(told["id"] if "took_s" in told else None)
    for case in cases:
        if case.case_id in begun:
            say("did not end in time while warming up:", case.label)
        elif case.case_id not in took:
            say("failed or not reached while warming up:", case.label)
    return took


def probes(l2):
    size = lambda times: times * l2 // 4096 * 4096  # noqa: E731
    copies = [{"id": f"copy{n}x{i}", "copy_bytes": size(n)} for i, n in enumerate((5, 8, 16, 5, 2))]
    others = [{"id": f"{kind}8x", f"{kind}_bytes": size(8)} for kind in ("read", "write")]
    return [*copies, *others]


def check_probes(items, found):
    print("\nKnown bytes (expected, counted, error; left dirty in L2), in the order of execution")
    worst = 0.0
    for item in items:
        result = found.get(item["id"])
        size = next(v for k, v in item.items() if k.endswith("_bytes"))
        if result is None or result.outcome is not Outcome.OK:
            print(f"  {item['id']:<8} {result and result.outcome}: {result and result.reason}")
            worst = float("inf")
            continue
        reads = 0 if "write_bytes" in item else size
        writes = 0 if "read_bytes" in item else size
        got_r, got_w = result.values["dram_read_bytes"], result.values["dram_write_bytes"]
        error_r, error_w = (got_r - reads) / size, (got_w - writes) / size
        if not item["id"].startswith("copy2x"):
            worst = max(worst, abs(error_r), abs(error_w))
        left = result.details["left_dirty_in_l2_bytes"]
        print(
            f"  {item['id']:<8} read {reads / MB:7.1f} got {got_r / MB:7.1f} MB {100 * error_r:+6.2f} %   "
            f"write {writes / MB:7.1f} got {got_w / MB:7.1f} MB {100 * error_w:+6.2f} %   "
            f"left {left / MB:5.1f} MB  passes {result.details['passes']}"
        )
    print(f"  within 2 % from 5 x L2 on: {'PASS' if worst <= 0.02 else 'FAIL'} (worst {100 * worst:.2f} %)")


def table(cases, found):
    from mambench.implementations.cost import case_cost

    print(f"\nTraffic at L={SEQLEN} (MB; ratio = measured / compulsory; L2 cold and clean before)")
    print(f"  {'case':<58} {'read':>8} {'write':>8} {'dirty':>6} {'total':>8} {'compuls.':>8} {'ratio':>6} kernels")
    for case in cases:
        result = found.get(case.case_id)
        name = f"{case.implementation}:{case.variant} {case.problem.family} {case.pass_}"
        if result is None or result.outcome is not Outcome.OK:
            print(f"  {name:<58} {result and result.outcome}: {result and str(result.reason)[:90]}")
            continue
        v, d = result.values, result.details
        compulsory = case_cost(case).compulsory_bytes
        print(
            f"  {name:<58} {v['dram_read_bytes'] / MB:8.1f} {v['dram_write_bytes'] / MB:8.1f} "
            f"{d['left_dirty_in_l2_bytes'] / MB:6.1f} {v['dram_bytes'] / MB:8.1f} "
            f"{compulsory / MB:8.1f} {v['dram_bytes'] / compulsory:6.2f} {d['launches']}"
        )


def document(result, by_id):
    (OUT / "traffic.json").write_text(
        json.dumps(
            {
                name: {
                    "case": by_id[name].to_dict() if name in by_id else None,
                    "outcome": r.outcome,
                    "reason": r.reason,
                    "values": dict(r.values),
                    "details": dict(r.details),
                    "duration_s": r.duration_s,
                }
                for name, r in result.items()
            },
            indent=1,
            default=str,
        )
    )


def costs(result, begins):
    """Print what START_S, CASE_S and LAUNCH_S should be."""
    import numpy as np

    print("\nSeconds under ncu: START_S", ", ".join(f"{s:.1f}" for s in begins) or "unknown")
    points = [(r.details["launches"], r.duration_s) for r in result.values() if r.outcome is Outcome.OK]
    if len(points) > 3:
        x, y = np.array(points).T
        (slope, level), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
        print(
            f"  CASE_S {level:.2f}, LAUNCH_S {slope:.4f} (least squares of {len(points)}); "
            f"median {np.median(y):.2f} s, most {y.max():.2f} s, launches up to {x.max():.0f}"
        )


def main():
    device = machine.detect("cuda")
    say(device)
    if os.environ.get("WITH_CEILINGS") == "1":
        try:
            found = ceilings.measure(device, 8)
            ceilings.save(found, device)
            (OUT / "ceilings.json").write_text(json.dumps(found.to_dict(), indent=1))
            print(found.text())
        except Exception:
            traceback.print_exc()
    program = "import torch; print(torch.cuda.get_device_properties(0).L2_cache_size)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
    items, cases = probes(int(said or 50 * 2**20)), planned(device)
    by_id = {c.case_id: c for c in cases}
    result, begins, asked = {}, [], [0.0]

    def heard(what):
        if asked[0]:
            begins.append(time.monotonic() - asked[0])
            asked[0] = 0.0
        say("under ncu:", by_id[what].label if what in by_id else what)

    def request(**more):
        return counters.Request(
            device=device, threads=8, compile_limit_s=45, time_limit_s=25, total_limit_s=max(1, left_s() - 15), **more
        )

    asked[0] = time.monotonic()
    try:
        result |= counters.count_probes(items, request(keep=KEPT), on_begin=heard)
        document(result, by_id)
        check_probes(items, result)
    except Exception:
        traceback.print_exc()
    say(f"{len(items)} probes counted; warming up {len(cases)} cases")
    took = warm_all(cases)
    order = sorted((c for c in cases if c.case_id in took), key=lambda c: took[c.case_id])
    say(f"{len(order)} cases executed; counting them")
    asked[0] = time.monotonic()
    try:
        for case, counted in counters.count_cases(
            order, request(keep=KEPT, per_child=PER_CHILD), on_begin=lambda c: heard(c.case_id)
        ):
            result[case.case_id] = counted
            document(result, by_id)
            asked[0] = 0.0
    except Exception:
        traceback.print_exc()
    say("counted")
    for path in sorted(KEPT.glob("*ncu.log"))[:3] + sorted(KEPT.glob("*output.txt"))[:3]:
        text = path.read_text(errors="replace")
        (OUT / path.name).write_text(text[:2_000_000])
        print(f"-- head of {path.name}", *(line[:200] for line in text.splitlines()[:5]), sep="\n")
    for part in (
        lambda: costs(result, begins),
        lambda: check_probes(items, result),
        lambda: table(cases, result),
    ):
        try:
            part()
        except Exception:
            traceback.print_exc()
    say("done")


if sys.argv[1:2] == ["warm"]:
    warm(int(sys.argv[2]))
else:
    main()
