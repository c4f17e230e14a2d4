"""Makes a plan from what was asked on the command line, with the code of one side of a check.

Which variants a side has, and which cases follow, only its own code knows. So it is asked in a
process of its own, that imports `implementations` and `kernels` from that side.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mambench
from mambench.harness.check.sides import Side
from mambench.harness.cli import begin
from mambench.harness.errors import MeasurementError, UsageError
from mambench.harness.plan import Plan
from mambench.harness.profilers import catalog
from mambench.harness.spec import METRICS, DeviceKind
from mambench.harness.verdict import EXACT, TIMES
from mambench.harness.workers.pool import environment

LIMIT_S = 300.0
KEYS = (
    *("suite", "device", "implementations", "axes", "dtype", "pass_", "filters", "settings"),
    *("target_s", "time_limit_s", "seed", "threads", "measure"),
)
# A round's value is a median of at least 30 executions; of slow ones fewer, but at least three. On
# a GPU executions differ little within a process, and more processes say more than longer ones.
SAMPLING: Mapping[str, float | int] = {
    "min_samples": 30,
    "max_samples": 300,
    "relative_error": 0.003,
}
TARGET_S = {DeviceKind.CPU: 0.2, DeviceKind.CUDA: 0.05}


def ask(side: Side, asked: Mapping[str, Any]) -> Plan:
    """Return the plan of a side; raises UsageError if its code has nothing of what is asked for."""
    start = Path(mambench.__file__).with_name("_start.py")
    request = {key: asked[key] for key in KEYS if key in asked} | {"plugins": side.plugins}
    command = [sys.executable, "-P", str(start), *side.code.arguments, "harness.check.side_plan"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            env=environment(1, side.code),
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"planning the {side.name} took over {LIMIT_S:.0f} s.") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UsageError(f"the {side.name}: {said[-1] if said else 'planning it failed.'}")
    return Plan.from_dict(json.loads(done.stdout.splitlines()[-1]))


def from_request(asked: Mapping[str, Any]) -> Plan:
    """Return the plan that the options of a check ask for, with this process's code."""
    return begin.plan_of(asked, sampling=lambda kind: {"target_s": TARGET_S[kind], **SAMPLING})


def times(plan: Plan) -> list[str]:
    """Return the metrics of time that a plan measures on its device."""
    found = catalog.load()
    return [
        metric
        for metric, measurement in TIMES.items()
        if measurement in plan.settings.measurements and not found[measurement].missing(plan.device)
    ]


def unjudged(plan: Plan) -> list[str]:
    """Return the measurements that were asked for and of which no value is judged."""
    judged = {m.measured_by for m in METRICS if m.tag in TIMES or m.tag in EXACT}
    return [name for name in plan.settings.measurements if name not in judged]


def main() -> None:
    """Answer the request on standard input with a plan on standard output."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a plugin prints when it is imported is not the answer
    try:
        made = from_request(json.load(sys.stdin))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    answer.write(json.dumps(made.to_dict()) + "\n")
    answer.close()


if __name__ == "__main__":
    main()
