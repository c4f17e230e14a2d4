"""What the short names on a page mean, for people who see them for the first time."""

from collections.abc import Mapping

from mambench.harness.spec import Family, Level, Pass
from mambench.reports.rows import Slice

_FAMILIES: Mapping[str, str] = {
    Family.S6.value: "Mamba-1",
    Family.SSD.value: "Mamba-2",
    Family.ATTENTION.value: "causal attention",
}
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


def explain(part: Slice) -> str:
    """Return one line that says what stands against what in a selection."""
    said = [f"{part.key.level}: {text}" for text in [_LEVELS.get(part.key.level)] if text]
    said += [f"{part.key.pass_}: {text}" for text in [_PASSES.get(part.key.pass_)] if text]
    for family, meaning in _FAMILIES.items():
        measured = [series for series in part.series if any(row.ok for row in series.rows)]
        own = [series for series in measured if series.key.family == family]
        if own:
            names = ", ".join(dict.fromkeys(series.key.implementation for series in own))
            variants = dict.fromkeys(series.key.variant for series in own)
            known = [f"{v} is {_VARIANTS[v]}" for v in variants if v in _VARIANTS]
            said.append(f"{names}: {meaning}" + (f" ({', '.join(known)})" if known else ""))
    return "; ".join([*said, "L: tokens in the sequence", "N: state size (d_state)"]) + "."
