"""Registries: the seams at which a name in a study or site file chooses an implementation.

A family's entries live one to a module in the family's folder and are found by walking it; a foreign package
adds its own through the entry point group ``gapweave.plugins`` (each entry point names a module whose import
registers). Adding an entry touches no existing file. A registry only ever resolves names that are installed:
nothing that came over the wire is imported.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from gapweave.shared.errors import UsageError

Entry = TypeVar("Entry")


@cache
def _plugins() -> tuple[EntryPoint, ...]:
    """Of all that is installed; every registry asks, and looking through it takes 30 ms."""
    return tuple(entry_points(group="gapweave.plugins"))


class Registry(Generic[Entry]):
    """Named implementations of one family.

    Args:
        family: the singular noun of the family, used in messages ("fusion").
        package: import name of the folder that holds the built-in entries.
    """

    def __init__(self, family: str, package: str) -> None:
        self.family = family
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that stores its argument under ``name``.

        Raises:
            ValueError: when the name is taken by another object.
        """

        def store(entry: Entry) -> Entry:
            if self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"{self.family} {name!r} is registered twice")
            return entry

        return store

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for plugin in _plugins():
            plugin.load()

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._entries))

    def __getitem__(self, name: str) -> Entry:
        """The entry called ``name``.

        Raises:
            UsageError: for a name that is not installed; it says which names are.
        """
        self._discover()
        if name in self._entries:
            return self._entries[name]
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(
            f"no {self.family} is called {name!r}",
            remedy=f"{hint}Installed: {', '.join(sorted(self._entries))}",
        )
