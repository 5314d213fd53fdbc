"""Change a module when, and only if, it is imported.

vLLM loads general plug-ins while its own import is in progress, and in processes that never handle
a request. Waiting for each module avoids import cycles and does not slow down start-up.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Change = Callable[[ModuleType], None]


def when_imported(name: str, change: Change) -> None:
    """Call `change(module)` once: now if the module is loaded, else right after it is.

    Only an import triggers the change; looking for the module with `find_spec` does not. An
    exception in the change propagates to the code that imports the module.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        change(module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.changes.setdefault(name, []).append(change)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it delegates to the other finders, and wraps the loader they return."""

    def __init__(self) -> None:
        self.changes: dict[str, list[Change]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.changes:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            module_spec = None if find is None else find(fullname, path, target)
            if module_spec is None:
                continue
            if module_spec.loader is not None:
                module_spec.loader = _Loader(module_spec.loader, self.changes)
            return module_spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, then the changes."""

    def __init__(self, loader: Any, changes: dict[str, list[Change]]) -> None:
        self._loader = loader
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_code, get_source … for users of the spec.

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        for change in self._changes.pop(module.__name__, []):
            change(module)


_finder = _Finder()
