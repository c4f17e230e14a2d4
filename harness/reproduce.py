"""The command that asks one case again, alone, exactly as it was asked."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mambench.harness.axes import AXES
from mambench.harness.errors import UsageError
from mambench.harness.spec import Case, Settings

if TYPE_CHECKING:
    # Plans and suites are imported where they are needed: a report, which names what all cases of
    # a run share, needs neither, and they take as long to import as all else that it does.
    from mambench.harness.plan import Plan, PlannedCase

# Based on the suite that holds every implementation at every level, so that the command means the
# same whatever becomes of the suite that the case came from.
BASE_SUITE = "custom"

_OWN_OPTION = {
    "target_s": "--target-time",
    "time_limit_s": "--time-limit",
    "seed": "--seed",
    "threads": "--threads",
}


def command(case: Case, plan: "Plan", *, program: Sequence[str]) -> str:
    """Return a shell command that plans exactly this case with the plan's device and settings."""
    device, settings = plan.device.torch_name, plan.settings
    words = [*program, "run", *_case_words(case), *run_words(device, plan.plugins, settings)]
    return shlex.join(words)


def run_words(device: str, plugins: Sequence[str], settings: Settings) -> list[str]:
    """Return the options that all cases of a run share: device, plugins and settings."""
    words = ["--device", device]
    for plugin in plugins:
        words += ["--plugin", plugin]
    words += ["--measure", ",".join(settings.measurements)]
    return [*words, *_settings(settings)]


def _case_words(case: Case) -> list[str]:
    from mambench.harness.expand import APPLICABLE

    problem = case.problem
    words = ["--suite", BASE_SUITE]
    words += ["-i", f"{case.implementation}:{case.variant}"]
    for name in APPLICABLE[problem.level, problem.family]:
        value = getattr(problem, name)
        if value is None:  # a state update has no length, whatever lengths the suite has
            continue
        words += ["-a", f"{name}={str(value).lower()}"]
    words += ["--pass", case.pass_, "--dtype", case.dtype]
    return [*words, "--filter", f"family={problem.family}", "--filter", f"level={problem.level}"]


def _settings(settings: Settings) -> list[str]:
    from mambench.harness.suite import setting_names

    words: list[str] = []
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if field.name in _OWN_OPTION:
            words += [_OWN_OPTION[field.name], str(value)]
        elif field.name in setting_names():
            words += ["--set", f"{field.name}={value}"]
    return words


def find_case(plan: "Plan", text: str) -> tuple[int, "PlannedCase"]:
    """Return a planned case and its number, by number or the beginning of its case_id.

    A whole number up to the number of cases is a number (as `plan` prints it, from 1); anything
    else must begin exactly one case_id. Raises UsageError otherwise.
    """
    if text.isdigit() and text[0] != "0" and int(text) <= len(plan.cases):
        return int(text), plan.cases[int(text) - 1]
    numbered = list(enumerate(plan.cases, start=1))
    matched = [item for item in numbered if item[1].case.case_id.startswith(text.lower())]
    if len(matched) == 1:
        return matched[0]
    if not matched:
        raise UsageError(
            f"no case '{text}': give a number from 1 to {len(plan.cases)}, or the beginning of a "
            f"case_id."
        )
    ids = ", ".join(planned.case.case_id for _, planned in matched[:5])
    raise UsageError(f"'{text}' begins {len(matched)} case_ids ({ids} ...); give more digits.")


def parse_settings(texts: Sequence[str]) -> Mapping[str, Any]:
    """Return the settings that `--set NAME=VALUE` gives; raises UsageError for what is none."""
    from mambench.harness import suite

    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        found[name.strip()] = suite.parse_setting(name.strip(), value.strip())
    return found


def parse_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the names in `--measure`'s values, which commas separate."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def sizes(case: Case) -> dict[str, Any]:
    """Return the sizes that apply to a case, in the order of the axes."""
    from mambench.harness.expand import APPLICABLE

    names = APPLICABLE[case.problem.level, case.problem.family]
    return {name: getattr(case.problem, name) for name in AXES if name in names}
