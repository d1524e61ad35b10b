"""trainer.compile: when auto takes it, that the run is the same, and what is left as it is."""

import math
from functools import partialmethod

import pytest
import torch
from torch import nn

from src.training import compiling
from src.training.compiling import ENOUGH_STEPS, not_compiled, worth_compiling
from src.training.trainer import TrainerSettings
from tests.helpers import rows

OPTIONS = ["experiment=smoke", "trainer.channels_last=false", "model.dropout=0.1", "trainer.log_every_n_steps=1"]


@pytest.fixture
def traced(monkeypatch):
    """Networks are compiled to torch's own kernels, in seconds; the images of the graphs that were traced."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(v.shape) for v in inputs if v.ndim == 4])
        return graph

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    yield graphs
    torch._dynamo.reset()


def test_a_compiled_run_is_the_same_run(command, tmp_path, traced):
    """The loss of each step to 1e-4, validation and all; traced once, for training: 32 images with dropout."""
    found = {}
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        outcome = command("train", *OPTIONS, f"trainer.compile={compiled}", f"hydra.run.dir={run}")
        assert outcome.code == 0, outcome.err
        assert (", compiled, " in outcome.out) == (compiled == "true")
        found[compiled] = rows(run)
        assert (run / "samples" / "step=20.png").is_file()
    assert len(found["true"]) == 20
    for name in ("train/loss", "val/loss_raw", "val/loss_ema"):
        a, b = ([float(row[name] or math.nan) for row in found[compiled]] for compiled in ("false", "true"))
        assert b == pytest.approx(a, rel=1e-4, nan_ok=True)
    images = [shape[0] for graph in traced for shape in graph if shape[1:] == (1, 8, 8)]
    assert images == [32]


def test_nothing_is_compiled_inside(traced):
    net = nn.Linear(2, 2)
    net.compile()
    with not_compiled():
        net(torch.ones(1, 2))
    assert not traced
    net(torch.ones(1, 2))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("device", "steps", "tools", "expected"),
    [
        ("cuda", ENOUGH_STEPS, True, True),
        ("cuda", ENOUGH_STEPS - 1, True, False),
        ("cuda", ENOUGH_STEPS, False, False),
        ("cpu", ENOUGH_STEPS, True, False),
    ],
)
def test_auto_compiles_long_runs_on_a_gpu(monkeypatch, device, steps, tools, expected):
    monkeypatch.setattr(compiling, "has_triton", lambda: tools)
    monkeypatch.setattr(compiling, "c_compiler", lambda: "cc")
    assert worth_compiling(device, steps) is expected


def test_what_was_asked_for_is_done(monkeypatch):
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    assert TrainerSettings(accelerator="cpu", compile=True).chosen_compile
    assert not TrainerSettings(accelerator="cpu", compile=False).chosen_compile
    assert not TrainerSettings(accelerator="cpu", max_steps=10**6).chosen_compile
