"""What only a GPU can show; `tests/training/test_precision.py` has its precisions."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._triton import has_triton

from src.data.images import ImageSet
from src.data.loader import TrainLoader
from src.evaluation.graphs import MOST, recorded
from src.models.kernel import c_compiler
from src.models.unet import UNet
from tests.helpers import rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = ["experiment=smoke", "trainer=gpu"]
TINY = {"channels": 1, "image_size": 16, "base_channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1}


def weights(run, part="state_dict"):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)[part]


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.precision=32-true"],
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=bf16-true", "trainer.channels_last=true"],
        ["trainer.precision=bf16-mixed", "optimizer=muon", "model.dropout=0.1"],
    ],
    ids=["fp32", "bf16", "bf16-true", "muon"],
)
def test_a_run_is_continued_to_the_bit(command, tmp_path, options):
    """With deterministic kernels, across a checkpoint: images, noise, dropout, moments and averages are the same."""
    arguments = [*ON_GPU, "trainer.deterministic=true", *options]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("train", *arguments, f"hydra.run.dir={whole}").code == 0
    assert command("train", *arguments, "trainer.max_steps=13", f"hydra.run.dir={parts}").code == 0
    assert command("train", f"run={parts}", "trainer.max_steps=20").code == 0
    for part in ("state_dict", "ema"):
        a, b = weights(whole, part), weights(parts, part)
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows(whole) == [row for row in rows(parts) if row["step"] != "13"]  # where it stopped


@pytest.mark.skipif(not has_triton() or c_compiler() is None, reason="needs Triton and a C compiler")
def test_a_compiled_run_follows_one_that_is_not(command, tmp_path):
    """The loss of each of 20 steps to 2%: the same images and noise, and kernels that round otherwise."""
    curves = []
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        arguments = [*ON_GPU, "trainer.log_every_n_steps=1", f"trainer.compile={compiled}", f"hydra.run.dir={run}"]
        assert command("train", *arguments).code == 0
        curves.append(np.array([float(row["train/loss"]) for row in rows(run)]))
    assert len(curves[0]) == 20
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.02)


def test_averages_follow_the_weights_of_a_bfloat16_network(command, tmp_path):
    arguments = [*ON_GPU, "trainer.precision=bf16-true", "callbacks.ema.decay=0.5", "trainer.max_steps=60"]
    assert command("train", *arguments, f"hydra.run.dir={tmp_path}").code == 0
    last = rows(tmp_path)[-1]
    assert float(last["val/loss_ema"]) == pytest.approx(float(last["val/loss_raw"]), rel=0.1)


def test_a_run_goes_on_in_another_precision_and_on_the_cpu(command, tmp_path):
    arguments = [*ON_GPU, "trainer.precision=16-mixed", f"hydra.run.dir={tmp_path}"]
    assert command("train", *arguments).code == 0
    for steps, options in ((25, ["trainer.precision=bf16-mixed"]), (30, ["trainer.accelerator=cpu"])):
        outcome = command("train", f"run={tmp_path}", f"trainer.max_steps={steps}", *options)
        assert outcome.code == 0, outcome.err
    assert all(v.isfinite().all() for v in weights(tmp_path).values())


def test_batches_are_those_of_the_cpu():
    """Images, flips and labels, wherever the images lie: on the GPU, or on the CPU and fetched ahead."""
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(100)
    batches = []
    for where, device in (("cpu", "cpu"), ("cuda", "cuda"), ("cpu", "cuda")):
        data = ImageSet(images.to(where), labels.to(where))
        loader = iter(TrainLoader(data, torch.device(device), 30, flip=True, seed=0))
        batches.append([next(loader) for _ in range(5)])  # over the end of an epoch
    for a, *others in zip(*batches, strict=True):
        for b in others:
            assert b.x0.is_cuda
            assert torch.equal(a.x0, b.x0.cpu())
            assert torch.equal(a.label, b.label.cpu())


def test_samples_are_those_of_the_cpu(command, smoke_run, tmp_path):
    """The same noise: pixels differ by rounding, of which TF32, torch's default of convolutions, is most."""
    for device in ("cpu", "cuda"):
        outcome = command("sample", f"run={smoke_run}", f"out={tmp_path / device}", f"device={device}", "num_samples=9")
        assert outcome.code == 0, outcome.err
    a, b = (np.load(tmp_path / device / "samples.npz")["arr_0"].astype(int) for device in ("cpu", "cuda"))
    assert abs(a - b).mean() < 1
    assert abs(a - b).max() < 30


def test_scores_are_those_of_the_cpu(command, smoke_run, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        outcome = command("evaluate", f"run={smoke_run}", f"out={out}", f"device={device}", "scores=[loss]")
        assert outcome.code == 0, outcome.err
        found.append(json.loads((out / "metrics.json").read_text()))
    a, b = (metrics["loss"]["value"] for metrics in found)
    assert b == pytest.approx(a, rel=1e-3)


# CUDA graphs.


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = UNet(**TINY, attention_resolutions=(8,), num_classes=3).cuda().eval()
    for p in made.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return made


def asked(rows, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, 1, 16, 16, device="cuda", generator=generator)
    return x, torch.full((rows,), 100.0 * seed, device="cuda"), torch.arange(rows, device="cuda") % 3


@pytest.mark.parametrize("bf16", [False, True])
def test_a_recording_says_what_the_network_says(net, bf16):
    """To the bit, of new inputs each time, in two shapes, with labels and without, and after weights have changed."""
    graphed = recorded(copy.deepcopy(net))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        kept = []
        for seed in range(1, 6):
            for count in (4, 7):
                x, t, y = asked(count, seed)
                for inputs in ((x, t), (x, t, y)):
                    kept.append((graphed(*inputs), net(*inputs)))
        assert all(torch.equal(a, b) for a, b in kept)  # none was written over by a later one
    known = graphed.forward.known
    assert len(known) == 4
    assert all(answer is not graphed.forward.forward for answer in known.values())  # all were recorded
    with torch.no_grad():
        for p, q in zip(net.parameters(), graphed.parameters(), strict=True):
            p.mul_(1.1)
            q.mul_(1.1)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        assert torch.equal(graphed(*asked(4, 9)), net(*asked(4, 9)))


def test_gradients_are_not_recorded(net):
    graphed = recorded(net)
    x, t, y = asked(4, 1)
    for _ in range(3):
        graphed(x.requires_grad_(), t, y).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert not graphed.forward.known


def test_what_cannot_be_recorded_is_computed():
    """A network that reads from the device, and more shapes than are kept."""

    class Reads(nn.Module):
        def forward(self, x, t):
            return x * float(x.sum())

    reads = recorded(Reads())
    x = torch.ones(2, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(reads(x, x), x * 2)
        assert torch.randn(2, device="cuda").isfinite().all()  # which a broken recording would make impossible
        identity = recorded(nn.Identity())
        for count in range(1, 2 * MOST):
            for _ in range(2):
                assert len(identity(torch.ones(count, device="cuda"))) == count
    assert len(identity.forward.known) == 2 * MOST - 1
