"""What the short names on a page mean, for people who see them for the first time."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mambench.harness.spec import Family, Level, Pass
from mambench.reports.rows import Slice

_FAMILIES: Mapping[str, str] = {
    Family.S6.value: "Mamba-1",
    Family.SSD.value: "Mamba-2",
    Family.ATTENTION.value: "causal attention",
}
_MAMBA = (Family.S6.value, Family.SSD.value)
_LEVELS: Mapping[str, str] = {
    Level.OP.value: "the mixing of the sequence alone, without the projections around it",
    Level.BLOCK.value: "whole blocks, with their projections",
}
_PASSES: Mapping[str, str] = {
    Pass.FORWARD.value: "once through the sequence",
    Pass.BACKWARD.value: "the gradients alone",
    Pass.TRAINING.value: "forward and backward",
    Pass.PREFILL.value: "forward, leaving the state that decoding goes on from",
    Pass.DECODE.value: "one more token after L",
}
_VARIANTS: Mapping[str, str] = {
    "fa4": "FlashAttention 4",
    "fa3": "FlashAttention 3",
    "fa2": "FlashAttention 2",
}


def brief(parts: Sequence[Slice]) -> str:
    """Return what the names in a report's answers stand for, where each stands for one thing."""
    measured = [s.key for part in parts for s in part.series if any(row.found for row in s.rows)]
    families = dict.fromkeys((key.implementation, key.family) for key in measured)
    often = Counter(name for name, _ in families)
    known = {name: _FAMILIES[f] for name, f in families if often[name] == 1 and f in _MAMBA}
    known |= {key.variant: _VARIANTS[key.variant] for key in measured if key.variant in _VARIANTS}
    meant: dict[str, list[str]] = defaultdict(list)
    for name, meaning in known.items():
        meant[meaning].append(name)
    said = "; ".join(f"{', '.join(all_of)}: {meaning}" for meaning, all_of in meant.items())
    return f"{said}." if said else ""


def explain(parts: Sequence[Slice]) -> str:
    """Return one line that says what stands against what in a report's selections."""
    levels = dict.fromkeys(part.key.level for part in parts)
    passes = dict.fromkeys(part.key.pass_ for part in parts)
    said = [f"{name}: {_LEVELS[name]}" for name in levels if name in _LEVELS]
    said += [f"{name}: {_PASSES[name]}" for name in passes if name in _PASSES]
    measured = [s for part in parts for s in part.series if any(row.found for row in s.rows)]
    for family, meaning in _FAMILIES.items():
        own = [series.key for series in measured if series.key.family == family]
        if own:
            names = ", ".join(dict.fromkeys(key.implementation for key in own))
            known = [v for v in dict.fromkeys(key.variant for key in own) if v in _VARIANTS]
            variants = ", ".join(f"{name} is {_VARIANTS[name]}" for name in known)
            said.append(f"{names}: {meaning}" + (f" ({variants})" if variants else ""))
    return "; ".join([*said, "L: tokens in the sequence", "N: state size (d_state)"]) + "."
