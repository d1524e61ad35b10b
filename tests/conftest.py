"""What several test files need: commands run in this process, and one small trained run."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import importlib

import torch


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


@pytest.fixture(autouse=True)
def _own_random_state() -> None:
    torch.manual_seed(0)
