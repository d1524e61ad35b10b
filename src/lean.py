"""torchmetrics without the metrics that nobody asked for.

Lightning needs two classes of torchmetrics, whose package imports all its metrics, scipy, matplotlib, torchvision and
whatever else it can find: more than a second and 100 MB for every process. Here an import of torchmetrics brings those
two classes, and anything else that is asked of it brings the rest, and with it what the package does for old packages
beside it. A version of torchmetrics that cannot be imported so is imported as ever.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from threading import RLock
from types import ModuleType
from typing import Any

NAME = "torchmetrics"
METRIC, PLOT = f"{NAME}.metric", f"{NAME}.utilities.plot"


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
    def __init__(self, name: str, path: str) -> None:
        super().__init__(name, path)
        self.lock = RLock()
        self.completing = False

    def exec_module(self, module: ModuleType) -> None:
        before = set(sys.modules)
        if METRIC in before:  # reloaded
            super().exec_module(module)
            return
        module.__dict__["_logger"] = logging.getLogger(NAME)  # which its utilities import
        sys.modules[PLOT] = _Plot(PLOT)
        try:
            import_module(f"{NAME}.utilities")  # before its metrics, which import each other
            about = import_module(f"{NAME}.__about__")
            module.__dict__.update({name: getattr(about, name) for name in about.__all__})
            module.__dict__["Metric"] = import_module(METRIC).Metric
            module.__dict__["MetricCollection"] = import_module(f"{NAME}.collections").MetricCollection
        except Exception:
            for name in set(sys.modules) - before:
                if name.startswith(f"{NAME}."):
                    del sys.modules[name]
            super().exec_module(module)
        else:
            del sys.modules[PLOT]
            module.__class__ = _Lean

    def complete(self, module: ModuleType) -> None:
        """Runs what the package itself runs when it is imported, unless that is on its way or done."""
        with self.lock:
            if self.completing or type(module) is not _Lean:
                return
            self.completing = True
            try:
                super().exec_module(module)
                module.__class__ = ModuleType  # type: ignore[assignment]
            finally:
                self.completing = False


class _Lean(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name == "__all__":
            self.__spec__.loader.complete(self)  # type: ignore[union-attr]
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}") from None

    def __dir__(self) -> list[str]:
        self.__spec__.loader.complete(self)  # type: ignore[union-attr]
        return sorted(self.__dict__)

    def __reduce__(self) -> Any:  # as cloudpickle does with modules
        return import_module, (NAME,)


class _Plot(ModuleType):
    """Stands in for what draws metrics while the two classes are imported, and asks it when it is called itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("_"):
            return _Type(name, (), {})
        return lambda *args, **kwargs: getattr(import_module(PLOT), name)(*args, **kwargs)


class _Type(type):
    """A type of matplotlib's, for annotations and isinstance."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, getattr(import_module(PLOT), cls.__name__))
