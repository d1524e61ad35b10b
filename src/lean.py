"""torchmetrics without the metrics that nobody asked for.

Lightning needs two classes of torchmetrics, whose package imports all its metrics, scipy, matplotlib, torchvision and
whatever else it can find: more than a second and 100 MB for every process. Here an import of torchmetrics brings those
two classes, and anything else that is asked of it brings the rest.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

NAME = "torchmetrics"
PLOT = f"{NAME}.utilities.plot"


def install() -> None:
    """Makes the next import of torchmetrics a lean one; it has no effect on one that was imported before."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        spec = PathFinder.find_spec(name)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_logger"] = logging.getLogger(NAME)  # which its utilities import
        sys.modules[PLOT] = _Plot(PLOT)
        try:
            import_module(f"{NAME}.utilities")  # before its metrics, which import each other
            module.__dict__.update(
                __version__=import_module(f"{NAME}.__about__").__version__,
                Metric=import_module(f"{NAME}.metric").Metric,
                MetricCollection=import_module(f"{NAME}.collections").MetricCollection,
            )
        finally:
            del sys.modules[PLOT]
        module.__class__ = _Lean

    def complete(self, module: ModuleType) -> None:
        """Runs what the package itself runs when it is imported."""
        module.__class__ = ModuleType
        super().exec_module(module)


class _Lean(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        self.__spec__.loader.complete(self)  # type: ignore[union-attr]
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        self.__spec__.loader.complete(self)  # type: ignore[union-attr]
        return dir(self)


class _Plot(ModuleType):
    """Stands in for what draws metrics while the two classes are imported; its functions import it when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("_"):  # a type, and object is what it is where there is no matplotlib
            return object
        return lambda *args, **kwargs: getattr(import_module(PLOT), name)(*args, **kwargs)
