"""What the command line accepts: option types whose errors name the nearest valid value.

Only click is imported here, and the vocabulary where a value is judged: `--help` answers at once.
ParamType stays without a type argument, because click 8.1 does not know it as generic.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

from mambench.harness.errors import UsageError, unknown_name

CALIBRATION = "calibration"  # a suite without cases: what `ceilings` measures
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str) -> float:
    """Return seconds from `90`, `90s`, `5m`, `1h30m`; raises UsageError for anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or not any(match.groups()):
        raise UsageError(f"'{text}' is not a duration; write 90, 90s, 5m or 1h30m.")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    total_s = 3600 * hours + 60 * minutes + seconds
    if total_s <= 0:
        raise UsageError(f"a duration must be above 0, got '{text}'.")
    return total_s


class Duration(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """Seconds, minutes and hours, as `parse_duration` reads them."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return seconds."""
        return value if isinstance(value, float) else parse_duration(str(value))


class Name(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """A name of a closed set, with completion; a wrong one is answered with the nearest."""

    def __init__(self, kind: str, valid: Callable[[], Iterable[str]]) -> None:
        self.name = kind
        self._valid = valid

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name if it is valid."""
        valid = list(self._valid())
        if value not in valid:
            raise UsageError(unknown_name(self.name, str(value), valid))
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the valid names."""
        return _completions(self._valid, incomplete)


class Completed(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]
    """Free text with completion, judged later."""

    def __init__(self, kind: str, offered: Callable[[], Iterable[str]]) -> None:
        self.name = kind
        self._offered = offered

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer what is known."""
        return _completions(self._offered, incomplete)


def _completions(offered: Callable[[], Iterable[str]], incomplete: str) -> list[CompletionItem]:
    try:
        return [CompletionItem(name) for name in offered() if name.startswith(incomplete)]
    except Exception:  # a shell that completes must not be shown a traceback
        return []


class NearestGroup(click.Group):
    """A group whose unknown commands are answered with the nearest; commands as written."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which they were defined."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; raises UsageError with the nearest name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UsageError(unknown_name("command", args[0], self.commands))
        return super().resolve_command(ctx, args)


def _suites() -> list[str]:
    from mambench.harness import suite

    return sorted([*suite.names(), CALIBRATION])


def _implementations() -> list[str]:
    from mambench.harness import registry

    return list(registry.load())


def _profilers() -> list[str]:
    from mambench.harness.profilers import catalog

    return [*catalog.load(), catalog.ALL]


def _axes() -> list[str]:
    from mambench.harness import axes

    return [f"{name}=" for name in axes.AXES]


def _dtypes() -> list[str]:
    from mambench.harness.spec import DType

    return list(DType)


def _passes() -> list[str]:
    from mambench.harness.spec import Pass

    return list(Pass)


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def all_of(*decorators: Decorator) -> Decorator:
    """Return one decorator that applies all of them, the first one outermost."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


plugin_option = click.option(
    *("--plugin", "plugins"),
    multiple=True,
    metavar="MODULE|FILE",
    help="Load further implementations and profilers from a module or a .py file. Repeatable.",
)
device_option = click.option(
    "--device",
    type=Completed("device", lambda: ("auto", "cpu", "cuda", "cuda:0")),
    metavar="DEVICE",
    help="auto (default: the first GPU, else the CPU), cpu, cuda or cuda:INDEX.",
)

filter_option = click.option(
    *("--filter", "filters"),
    multiple=True,
    metavar="EXPRESSION",
    help="Keep only cases with e.g. seqlen>=4096, family=ssd, variant=sdpa-*, or this text in "
    "their label. Repeatable; all must hold.",
)

question_options = all_of(
    click.option(
        *("-s", "--suite"),
        type=Completed("suite", _suites),
        metavar="NAME|FILE",
        help="The question: a suite's name, or the path of a .yaml file.  [default: quick]",
    ),
    click.option(
        *("-i", "--implementation", "implementations"),
        type=Completed("implementation", _implementations),
        multiple=True,
        metavar="NAME[:VARIANT]",
        help="Only these of the suite (globs work; `:*` is all variants). One that the suite does "
        "not name joins in. Repeatable.",
    ),
    click.option(
        *("-a", "--axis", "axes"),
        type=Completed("axis", _axes),
        multiple=True,
        metavar="NAME=VALUES",
        help="Replace an axis: seqlen=2^9..2^17, d_state=16,64, seqlen=512..4096:x2, "
        "d_state=16..256:+16. Repeatable.",
    ),
    device_option,
    click.option(
        "--dtype",
        type=Name("dtype", _dtypes),
        metavar="fp64|fp32|fp16|bf16",
        help="Replace the suite's element type.",
    ),
    click.option(
        *("--pass", "pass_"),
        type=Name("pass", _passes),
        metavar="forward|backward|training|prefill|decode",
        help="Replace the suite's passes.",
    ),
    filter_option,
    plugin_option,
)


class _Names(Completed):
    """Names separated by commas."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer what may follow the last comma."""
        before, comma, last = incomplete.rpartition(",")
        return [
            CompletionItem(before + comma + item.value)
            for item in _completions(self._offered, last)
        ]


settings_options = all_of(
    click.option(
        *("-m", "--measure"),
        type=_Names("measurement", _profilers),
        multiple=True,
        metavar="NAME,...",
        help="What to measure instead of the suite's choice, e.g. time,energy; all: whatever this "
        "device can give. `list` names them. Repeatable.",
    ),
    click.option(
        *("--target-time", "target_s"), type=Duration(), metavar="TIME", help="Sampling per case."
    ),
    click.option(
        *("--time-limit", "time_limit_s"),
        type=Duration(),
        metavar="TIME",
        help="A case that takes longer ends as a timeout.",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), metavar="N", help="Of the inputs.  [default: 0]"
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="CPU threads of a worker.  [default: all physical cores]",
    ),
    click.option(
        *("--set", "settings"),
        multiple=True,
        metavar="NAME=VALUE",
        help="Any other setting: min_samples, max_samples, relative_error, compile_limit_s.",
    ),
    click.option(
        "--time-budget",
        type=Duration(),
        metavar="TIME",
        help="Leave out what does not fit, e.g. 5m: longest lengths of the slowest first.",
    ),
)
