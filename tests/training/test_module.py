"""The LightningModule: a golden step, clipping, and a validation that is the same every time."""

import pytest
import torch
from lightning import Trainer

from src.data.datamodule import ImageDataModule
from src.data.sources import Digits
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.objectives import Eps
from src.diffusion.schedules import Linear
from src.diffusion.weightings import Constant as ConstantWeight
from src.models.simple_unet import SimpleUNet
from src.training.ema import EMA
from src.training.guard import Guard
from src.training.lr import Constant
from src.training.module import DiffusionModule
from src.training.trainer import TrainerSettings
from src.training.writer import CheckpointWriter

GOLDEN_GRAD_NORM = 1.718039
GOLDEN_CHECKSUM = 2485.72709


def trained(
    tmp_path, max_steps: int, clip: float | None = 1.0, lr: float = 1e-3, **data
) -> tuple[DiffusionModule, Trainer]:
    torch.manual_seed(0)
    net = SimpleUNet(channels=1, image_size=8, hidden_dims=8, time_emb_dim=16)
    diffusion = GaussianDiffusion(Linear(), Eps(), ConstantWeight(), Uniform())
    ema = EMA(0.9)

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=lr)

    guard = Guard()
    module = DiffusionModule(net, diffusion, optimizer, Constant(), clip, ema, guard, seed=0)
    settings = {"batch_size": 16, "flip": False, "val_images": 64, **data}
    images = ImageDataModule(Digits(), "data", channels=1, image_size=8, num_classes=10, **settings)
    images.setup()
    trainer = TrainerSettings(
        accelerator="cpu", max_steps=max_steps, val_every_n_steps=max_steps, precision="32-true"
    ).make(tmp_path, CheckpointWriter(), [ema, guard])
    trainer.fit(module, images)
    return module, trainer


def test_one_golden_training_step(tmp_path):
    """Anything that changes seeds, order, noise, loss, clipping or update shows here; numbers of this code, float32."""
    module, _ = trained(tmp_path, max_steps=1, lr=0.1)
    checksum = sum(p.double().abs().sum() for p in module.net.parameters()).item()
    assert module.grad_norm.item() == pytest.approx(GOLDEN_GRAD_NORM, rel=1e-4)
    assert checksum == pytest.approx(GOLDEN_CHECKSUM, rel=1e-7)


def test_one_step_by_hand_is_the_same_step(tmp_path):
    """The step of Algorithm 1 (Ho et al. 2020) written out, from the module's own seeds, gives the module's weights."""
    from src.data.loader import TrainLoader
    from src.randomness import RowNoise, mix

    module, trainer = trained(tmp_path, max_steps=1, lr=0.1)
    torch.manual_seed(0)
    net = SimpleUNet(channels=1, image_size=8, hidden_dims=8, time_emb_dim=16)
    batch = next(iter(TrainLoader(trainer.datamodule.train, torch.device("cpu"), 16, flip=False, seed=0)))
    torch.manual_seed(mix(0, 1))
    t = (torch.rand(16) * 1000).long()
    noise = RowNoise(mix(0, 3), torch.device("cpu"))(0, range(16), 16, (1, 8, 8))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    x_t = (abar.sqrt() * batch.x0 + (1 - abar).sqrt() * noise).float()
    (noise - net(x_t, t)).square().mean().backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    for p, expected in zip(net.parameters(), module.net.parameters(), strict=True):
        p.data -= 0.1 * p.grad * min(1.0, 1.0 / norm.item())
        torch.testing.assert_close(p.data, expected.data, atol=1e-6, rtol=1e-5)


def test_the_whole_gradient_is_clipped(tmp_path):
    torch.manual_seed(0)
    start = torch.nn.utils.parameters_to_vector(SimpleUNet(1, 8, hidden_dims=8, time_emb_dim=16).parameters())
    unclipped, _ = trained(tmp_path, max_steps=1, clip=None, lr=1.0)
    norm = unclipped.grad_norm.item()
    clipped, _ = trained(tmp_path, max_steps=1, clip=norm / 10, lr=1.0)
    for module, length in ((unclipped, norm), (clipped, norm / 10)):
        moved = torch.nn.utils.parameters_to_vector(module.net.parameters()) - start
        assert module.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        assert moved.norm().item() == pytest.approx(length, rel=1e-4)


def test_validation_does_not_depend_on_the_batch_size(tmp_path):
    small, large = (trained(tmp_path, 1, batch_size=16)[1], trained(tmp_path, 1, batch_size=16)[1])
    for trainer, size in ((small, 7), (large, 64)):
        trainer.datamodule.batch_size = size
        trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)
    a, b = small.callback_metrics, large.callback_metrics
    assert float(a["val/loss_raw"]) == pytest.approx(float(b["val/loss_raw"]), rel=1e-5)
    assert float(a["val/loss_ema_q4"]) == pytest.approx(float(b["val/loss_ema_q4"]), rel=1e-5)


def test_validation_spreads_its_times_evenly():
    """Sixty-four images at frac((i + 1/2) phi): every sixteenth of the schedule is asked three to five times."""
    from src.training.module import GOLDEN_RATIO

    u = torch.tensor([(i + 0.5) * GOLDEN_RATIO % 1.0 for i in range(64)])
    counts = torch.histc(u, bins=16, min=0, max=1)
    assert counts.min() >= 3
    assert counts.max() <= 5
