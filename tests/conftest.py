"""What several test files need: commands run in this process, and one small trained run."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import importlib

import torch

from tests.reliability import write_page


@dataclass
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs `python -m src.<name> <arguments>` in this process: command("train", "experiment=smoke")."""

    def run(name: str, *arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"src.{name}", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        capfd.readouterr()
        code = 0
        try:
            importlib.import_module(f"src.{name}").main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished `experiment=smoke`."""
    return _train(tmp_path_factory.mktemp("smoke") / "run")


AVERAGES = ("averages=[half_life,edm2]", "callbacks.ema.snapshot_every_n_steps=5")


@pytest.fixture(scope="session")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with all averages, and snapshots at steps 5, 10, 15 and 20."""
    return _train(tmp_path_factory.mktemp("averaged") / "run", *AVERAGES)


def _train(folder: Path, *overrides: str) -> Path:
    argv, sys.argv = sys.argv, ["src.train", "experiment=smoke", f"hydra.run.dir={folder}", *overrides]
    try:
        importlib.import_module("src.train").main()
    finally:
        sys.argv = argv
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, help="write what tests of faults measured into this page")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --reliability, only the tests of faults run."""
    if config.getoption("--reliability") is not None:
        faults = [item for item in items if "record" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in faults])
        items[:] = faults


@pytest.fixture(scope="session")
def _faults(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []
    yield found
    page = request.config.getoption("--reliability")
    if page is not None:
        write_page(page, found)


@pytest.fixture
def record(_faults: list[dict[str, Any]]) -> Callable[..., None]:
    """Notes a fault that was survived: record("kill -9", tried=20, lost=3, note="...")."""

    def note(fault: str, tried: int, lost: int, note: str) -> None:
        _faults.append({"fault": fault, "tried": tried, "lost": lost, "note": note})

    return note


@pytest.fixture(autouse=True)
def _own_random_state() -> None:
    torch.manual_seed(0)
