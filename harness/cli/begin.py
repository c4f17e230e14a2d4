"""What `plan`, `run` and `show` begin with: a plan, and the folder of its run."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mambench.harness import axes, machine, machine_cache, plan, reproduce, suite
from mambench.harness.errors import UsageError
from mambench.harness.instruments import ceilings
from mambench.harness.plan import Plan
from mambench.harness.spec import SCHEMA_VERSION, DeviceKind
from mambench.harness.store import RunFolder, new_run
from mambench.harness.workers import limits


def plan_of(
    asked: Mapping[str, Any],
    *,
    sampling: Callable[[DeviceKind], Mapping[str, Any]] | None = None,
    time_budget_s: float | None = None,
) -> Plan:
    """Return the plan that the words of a command line ask for.

    Args:
        asked: the values of `options.question_options` and `settings_options`.
        sampling: settings on a kind of device in place of the suite's, where none were asked for.
        time_budget_s: leaves out what does not fit; None for all.

    Raises UsageError for what is not known or does not fit together.
    """
    overrides: dict[str, tuple[axes.AxisValue, ...]] = {}
    for text in asked["axes"]:
        name, values = axes.parse_axis(text)
        overrides[name] = overrides.get(name, ()) + values
    for name, value in (("dtype", asked["dtype"]), ("pass", asked["pass_"])):
        if value is not None:
            overrides[name] = (value,)
    own = {name: asked[name] for name in ("target_s", "time_limit_s", "seed", "threads")}
    given = {name: value for name, value in own.items() if value is not None}
    device = machine.detect(asked["device"])
    base: Mapping[str, Any] = {} if sampling is None else sampling(device.kind)
    return plan.make_plan(
        suite.find(asked["suite"] or "quick"),
        device,
        implementations=asked["implementations"],
        axes=overrides,
        filters=asked["filters"],
        settings={**base, **reproduce.parse_settings(asked["settings"]), **given},
        measure=reproduce.parse_names(asked.get("measure") or ()),
        plugins=asked["plugins"],
        time_budget_s=time_budget_s,
    )


def created(output: Path | None, asked: Mapping[str, Any]) -> tuple[Plan, RunFolder]:
    """Return the plan that was asked for, and a new folder for its run."""
    # The budget is the runner's: it knows what time is really left, and what it skips, a resumed
    # run takes up again.
    made = plan_of(asked)
    path, run_id, created_at = new_run(Path("runs"), made.suite)
    calibrated = ceilings.load(made.device, limits.thread_count(made.settings))
    manifest = {
        "schema": SCHEMA_VERSION,
        "run_id": run_id,
        "created_at": created_at,
        "command": [*program(), *sys.argv[1:]],
        **made.to_dict(),
        "environment": machine.environment(made.device),
        "code": machine.code_version(),
        # None: nobody has proven the instrument right on this machine.
        "selftest": machine_cache.kept("selftest", made.device),
        # None: not calibrated, or before something changed that the ceilings depend on.
        "ceilings": calibrated and calibrated.to_dict(),
    }
    return made, RunFolder.create(output or path, manifest)


def resumed(path: Path, output: Path | None, asked: Mapping[str, Any]) -> tuple[Plan, RunFolder]:
    """Return a run's own plan and folder; whatever would change the question is refused."""
    given = [
        name for name, value in asked.items() if value not in (None, ()) and name != "time_budget"
    ]
    if given or output:
        names = {"pass_": "pass", "axes": "axis", "settings": "set", "target_s": "target-time"}
        first = "output" if output else names.get(given[0], given[0].removesuffix("s"))
        raise UsageError(f"--resume goes on with that run's own plan: leave out --{first}.")
    folder = RunFolder.open(path, for_append=True)
    made = Plan.from_dict(folder.manifest)
    here = machine.detect(made.device.torch_name)
    if here.name != made.device.name:
        raise UsageError(
            f"the run was made on {made.device.name}, this machine has {here.name}: start a new "
            f"run; `report` takes both folders."
        )
    now, then = machine.code_version()["id"], folder.manifest["code"].get("id")
    if now != then:
        folder.warnings.append(f"the run was begun with code version {then}, this is {now}")
    gpus = [
        _gpu_uuid(environment)
        for environment in (machine.environment(here), folder.manifest["environment"])
    ]
    if now != then or gpus[0] != gpus[1]:
        folder.continued(now, gpus[0])
    return made, folder


def _gpu_uuid(environment: Mapping[str, Any]) -> str | None:
    gpu: Mapping[str, Any] = environment.get("gpu") or {}
    return gpu.get("uuid")


def remove_empty(folder: RunFolder) -> None:
    """Remove the folder of a run that never began, so that it is not taken for the newest."""
    if not folder.observations():
        folder.close()
        for path in folder.path.iterdir():
            path.unlink()
        folder.path.rmdir()


def newest_run() -> Path:
    """Return the folder of the newest run in runs/; raises UsageError if there is none."""
    runs = sorted(path.parent for path in Path("runs").glob("*/manifest.json"))
    if not runs:
        raise UsageError("there is no run in runs/: name one with --run RUN_DIR.")
    return runs[-1]


def program() -> list[str]:
    """Return the words that start this program, for commands shown to the person."""
    name = sys.argv[0]
    return ["python", name] if name.endswith(".py") else [Path(name).name]
