"""Each precision: the loss falls, the weights that are kept are float32, and clipping works with fused optimisers."""

import pytest
import torch

from src.models.simple_unet import SimpleUNet
from src.runs import Run
from src.training.masters import MasterWeights
from tests.helpers import rows

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONGER = ["trainer.max_steps=60", "optimizer.lr=2e-3", "trainer.val_every_n_steps=60"]


@pytest.mark.parametrize(
    "precision",
    ["32-true", "bf16-mixed", "bf16-true", pytest.param("tf32", marks=GPU), pytest.param("16-mixed", marks=GPU)],
)
def test_the_loss_falls_and_what_is_kept_is_float32(command, tmp_path, precision):
    """Clipped at a norm that most steps exceed, with torch's fused Adam (16-mixed: not fused)."""
    device = ["trainer=gpu"] if precision in ("tf32", "16-mixed") else ["trainer=cpu"]
    clip = ["trainer.gradient_clip_norm=0.5"]
    arguments = ["experiment=smoke", *device, *LONGER, *clip, f"trainer.precision={precision}"]
    assert command("train", *arguments, f"hydra.run.dir={tmp_path}").code == 0
    table = rows(tmp_path)
    losses = [float(row["train/loss"]) for row in table]
    assert losses[-1] < 0.5 * losses[0]
    assert float(table[-1]["val/loss_raw"]) < 0.6
    assert float(table[0]["train/grad_norm"]) > 0.5
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    moments = [v for of in checkpoint["optimizer_states"][0]["state"].values() for v in of.values()]
    kept = [*checkpoint["state_dict"].values(), *checkpoint["ema"].values(), *moments]
    assert {value.dtype for value in kept} == {torch.float32}


def test_averages_follow_weights_that_move_to_another_device(command, tmp_path, monkeypatch):
    """A copy takes the place of the GPU: catches averages of the float32 weights as they lay before the move."""

    def to(self, device):
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()

    monkeypatch.setattr(MasterWeights, "to", to)
    arguments = ["experiment=smoke", "trainer=cpu", *LONGER, "trainer.precision=bf16-true", "callbacks.ema.decay=0.5"]
    assert command("train", *arguments, f"hydra.run.dir={tmp_path}").code == 0
    last = rows(tmp_path)[-1]
    assert float(last["val/loss_ema"]) == pytest.approx(float(last["val/loss_raw"]), rel=0.1)


def test_the_loss_in_bfloat16_follows_that_in_float32(command, tmp_path):
    """Same weights, images and noise at each step: the curves part by rounding, 2^-8, and what it grows to."""
    curves = {}
    for name in ("32-true", "bf16-mixed"):
        arguments = ["experiment=smoke", "trainer=cpu", *LONGER, "trainer.log_every_n_steps=1"]
        assert command("train", *arguments, f"trainer.precision={name}", f"hydra.run.dir={tmp_path / name}").code == 0
        curves[name] = torch.tensor([float(row["train/loss"]) for row in rows(tmp_path / name)])
    whole, rounded = curves["32-true"], curves["bf16-mixed"]
    assert len(whole) == 60
    assert not torch.equal(whole, rounded)  # or nothing was computed in bfloat16
    means = [curve.view(-1, 10).mean(1) for curve in (rounded, whole)]
    apart = (means[0] / means[1] - 1).abs()
    assert float(apart[:3].max()) < 0.01  # measured: 0.004
    assert float(apart.max()) < 0.06  # measured: 0.03; single steps are up to 0.09 apart
    assert abs(float(rounded[-20:].mean() / whole[-20:].mean()) - 1) < 0.02  # measured: 0.008


def test_a_bfloat16_run_is_continued_to_the_bit_and_in_another_precision(command, tmp_path):
    """Weights between bfloat16's values must come back, or the continued run rounds them away."""
    arguments = ["experiment=smoke", "trainer.precision=bf16-true"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("train", *arguments, f"hydra.run.dir={whole}").code == 0
    assert command("train", *arguments, "trainer.max_steps=13", f"hydra.run.dir={parts}").code == 0
    assert command("train", f"run={parts}", "trainer.max_steps=20").code == 0
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, parts))
    for part in ("state_dict", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    weight = a["state_dict"]["net.conv_in.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    assert Run(whole).load_net("raw").conv_in.weight.dtype == torch.float32
    assert command("train", f"run={parts}", "trainer.max_steps=25", "trainer.precision=32-true").code == 0


def test_updates_too_small_for_bfloat16_add_up():
    """A thousand steps of 1e-4 on a weight of 1: bfloat16 alone, whose next number below 1 is 0.996, never moves;
    each addition in float32 rounds by 2^-25 at most."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    masters = MasterWeights(net)
    optimizer = torch.optim.SGD(masters.parameters, lr=1e-4)
    for _ in range(1000):
        net(torch.ones(1, 1)).sum().backward()
        masters.take_gradients()
        optimizer.step()
        masters.give_weights()
    assert masters.parameters[0].item() == pytest.approx(0.9, abs=1000 * 2**-25)
    assert net.weight.dtype == torch.bfloat16
    assert net.weight.item() == pytest.approx(0.9, abs=2**-9)


def test_times_are_not_rounded():
    """bfloat16 cannot tell t = 998 from t = 1000; a network must be told the time in float32."""
    net = SimpleUNet(channels=1, image_size=8, hidden_dims=8, time_emb_dim=16).eval()
    MasterWeights(net)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(net(x, torch.tensor([998.0])), net(x, torch.tensor([1000.0])))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        ("16-mixed", "precision=16-mixed needs a GPU; use bf16-mixed or 32-true on the CPU"),
        ("tf32", "precision=tf32 needs an NVIDIA GPU from Ampere on; use 32-true"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(command, tmp_path, precision, sentence):
    outcome = command("train", "experiment=smoke", f"trainer.precision={precision}", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 2
    assert sentence in outcome.err
