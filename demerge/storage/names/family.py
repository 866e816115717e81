"""A table of names: a module of the original code, and those of diffusers that its rows are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

NUMBER = r"(\d{1,3})"
Names = tuple[str, ...]
Span = tuple[int, int]  # rows [start, stop)


@dataclass(frozen=True, eq=False)
class Family:
    """The names of a family of models.

    Attributes:
        table: original module -> diffusers' modules in the order of its rows; {} is a number. A
            name is of a module, whose `.weight` and `.bias` follow, or of a tensor.
        swapped: original modules whose first half of the rows (shift) is diffusers' second, if they
            have two rows for each column.
        widths: diffusers' modules, by how they end, with more rows than the others of an original
            module.
        has_kohya_original: whether kohya's names are the original ones.
    """

    name: str
    table: Mapping[str, str | Names]
    swapped: frozenset[str] = frozenset()
    widths: Mapping[str, int] = field(default_factory=dict)
    has_kohya_original: bool = True

    def to_diffusers(self, name: str) -> Names:
        """Return diffusers' modules for one of the original, () if it is not one."""
        heads, patterns = self._from_original
        for pattern, targets in patterns if name.startswith(heads) else ():
            if match := pattern.fullmatch(name):
                return tuple(target.format(*match.groups()) for target in targets)
        return ()

    def to_original(self, name: str) -> tuple[str, int]:
        """Return the original module that holds one of diffusers, and which of its parts that is.

        A name that the table does not have is the same in both.
        """
        heads, patterns = self._from_diffusers
        for pattern, target, part in patterns if name.startswith(heads) else ():
            if match := pattern.fullmatch(name):
                return target.format(*match.groups()), part
        return name, 0

    def is_original(self, name: str) -> bool:
        """Whether a module has a name of the original code that diffusers does not have."""
        return self.to_diffusers(name) not in ((), (name,))

    def dotted(self, name: str) -> str:
        """Return a module's name with dots, given the flat one, in the layout that it is of."""
        if parts := self.to_diffusers(name):
            return self.to_original(parts[0])[0]
        original, part = self.to_original(name)
        parts = self.to_diffusers(original)
        return parts[part] if parts else name

    def is_swapped(self, original: str, shape: Sequence[int]) -> bool:
        """Whether diffusers has the two halves of a weight's rows [m n] the other way round."""
        is_listed = any(pattern.fullmatch(original) for pattern in self._swapped)
        return is_listed and shape[0] == 2 * shape[1]

    def split_rows(self, parts: Names, rows: int) -> list[Span]:
        """Return which rows of an original matrix of `rows` rows each of diffusers' modules is.

        Raises:
            ValueError: if the matrix cannot be split so.
        """
        widths = [
            sum(w for end, w in self.widths.items() if part.endswith(end)) or 1 for part in parts
        ]
        unit, rest = divmod(rows, sum(widths))
        if rest or not unit:
            raise ValueError(f"{rows} rows cannot be those of {', '.join(parts)}")
        starts = [unit * sum(widths[:i]) for i in range(len(parts) + 1)]
        return list(pairwise(starts))

    @cached_property
    def _swapped(self) -> list[re.Pattern[str]]:
        return list(map(_pattern, self.swapped))

    @cached_property
    def _from_original(self) -> tuple[Names, list[tuple[re.Pattern[str], Names]]]:
        entries = [(_pattern(original), names) for original, names in self._entries()]
        return _heads(self.table), entries

    @cached_property
    def _from_diffusers(self) -> tuple[Names, list[tuple[re.Pattern[str], str, int]]]:
        entries = [
            (name, original, part)
            for original, names in self._entries()
            for part, name in enumerate(names)
        ]
        patterns = [(_pattern(name), original, part) for name, original, part in entries]
        return _heads(name for name, _, _ in entries), patterns

    def _entries(self) -> Iterator[tuple[str, Names]]:
        for original, names in self.table.items():
            yield original, (names,) if isinstance(names, str) else names


def flat(name: str) -> str:
    """Return a name with underscores for its dots, as kohya writes it."""
    return name.replace(".", "_")


def _heads(templates: Iterable[str]) -> Names:
    """Return what the names of some templates begin with, dotted and flat."""
    heads = {template.split("{}")[0] for template in templates}
    return tuple(heads | {flat(head) for head in heads})


def _pattern(template: str) -> re.Pattern[str]:
    """Return what matches a name of the table, dotted or flat."""
    parts = [re.escape(part).replace(r"\.", "[._]") for part in template.split("{}")]
    return re.compile(NUMBER.join(parts))
