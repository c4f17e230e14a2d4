"""Reads a person's YAML file so that every error can name the file, the line and the field.

It works on PyYAML's nodes, because a node knows its line and a loaded dictionary does not, and
because benchmarking boxes run the checkout with nothing installed (so no pydantic).
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar, cast

import yaml

from mambench.harness.errors import SuiteError, unknown_name

E = TypeVar("E", bound=StrEnum)


def parse_yaml(text: str, path: Path, *, expected: str) -> "Reader":
    """Return the root of a YAML text; `path` names it in errors, `expected` says what was wanted.

    Raises SuiteError if it is not YAML, or empty.
    """
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise SuiteError(f"{path}{where}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SuiteError(f"{path}: not YAML: {error}") from error
    if node is None:
        raise SuiteError(f"{path}: empty; expected {expected}.")
    return Reader(path, node, "")


class Reader:
    """A YAML node with its file and field, so that an error can say where it is."""

    def __init__(self, path: Path, node: yaml.Node, where: str) -> None:
        self.path, self.node, self.where = path, node, where

    def fail(self, message: str) -> SuiteError:
        """Return the error that names file, line and field."""
        line = self.node.start_mark.line + 1
        return SuiteError(f"{self.path}:{line}: {self.where or 'the file'}: {message}")

    def mapping(self) -> dict[str, "Reader"]:
        """Return a mapping's values by key; a repeated key is an error."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.fail(f"expected a mapping, got {self._kind()}.")
        found: dict[str, Reader] = {}
        for key_node, value_node in self.node.value:
            key = str(key_node.value)
            reader = Reader(self.path, value_node, f"{self.where}.{key}" if self.where else key)
            if key in found:
                raise Reader(self.path, key_node, reader.where).fail("is given twice.")
            found[key] = reader
        return found

    def fields(self, allowed: Sequence[str], required: Sequence[str]) -> dict[str, "Reader"]:
        """Return a mapping whose keys are checked."""
        found = self.mapping()
        for key, reader in found.items():
            if key not in allowed:
                raise reader.fail(unknown_name("field", key, allowed))
        for key in required:
            if key not in found:
                raise self.fail(f"lacks the field '{key}'.")
        return found

    def items(self) -> list["Reader"]:
        """Return a list's items; a single value counts as a list of one."""
        if not isinstance(self.node, yaml.SequenceNode):
            return [self]
        return [
            Reader(self.path, node, f"{self.where}[{index}]")
            for index, node in enumerate(self.node.value)
        ]

    def value(self) -> object:
        """Return a scalar as YAML's core types."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.fail(f"expected a single value, got {self._kind()}.")
        loader = yaml.SafeLoader("")
        return loader.construct_object(self.node, deep=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def text(self) -> str:
        """Return a non-empty string."""
        value = self.value()
        if not isinstance(value, str) or not value.strip():
            raise self.fail(f"expected text, got {value!r}.")
        return value.strip()

    def enum(self, kind: str, members: type[E]) -> E:
        """Return a member of a closed set."""
        value = str(self.value())
        if value not in list(members):
            raise self.fail(unknown_name(kind, value, members))
        return members(value)

    def has_keys_of(self, *enums: type[StrEnum]) -> bool:
        """Whether this is a mapping (whose keys then must be members of one of the sets)."""
        if not isinstance(self.node, yaml.MappingNode):
            return False
        keys = set(self.mapping())
        if not keys:
            raise self.fail("is an empty mapping.")
        if not any(keys <= set(members) for members in enums):
            allowed = [" or ".join(members) for members in enums]
            bad = next((key for key in keys if not any(key in set(m) for m in enums)), None)
            if bad is None:
                raise self.fail(f"mixes devices and families; nest them ({'; '.join(allowed)}).")
            raise self.fail(unknown_name("key", bad, [name for m in enums for name in m]))
        return True

    def _kind(self) -> str:
        return {"MappingNode": "a mapping", "SequenceNode": "a list"}.get(
            type(self.node).__name__, f"'{self.node.value}'"
        )
