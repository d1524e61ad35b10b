"""Averages: closed forms, precision, warm-up, resuming, and that the network always gets its own weights back."""

import copy
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from src.training.averages import Average, Constant, HalfLife, Power
from src.training.ema import EMA
from tests.helpers import rows


def attached(net: nn.Module, **arguments) -> EMA:
    ema = EMA(**arguments)
    ema.attach(net)
    return ema


def test_constant_decay_is_the_closed_form():
    """After n steps with weights w_1 ... w_n: d^n w_0 + (1 - d) sum d^(n - k) w_k."""
    net = nn.Linear(3, 2)
    ema = attached(net, decay=0.9, warmup=False)
    history = [net.weight.detach().double().clone()]
    for step in range(1, 51):
        with torch.no_grad():
            net.weight.copy_(torch.randn(2, 3))
        ema.update(step)
        history.append(net.weight.detach().double().clone())
    expected = 0.9**50 * history[0] + sum(0.1 * 0.9 ** (50 - k) * w for k, w in enumerate(history) if k)
    torch.testing.assert_close(ema.state_dict_of_net()["weight"].double(), expected, atol=1e-6, rtol=0)


def test_warmup_forgets_the_initial_weights():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1000.0)
    ema = attached(net, decay=0.9999)
    nn.init.constant_(net.weight, 1.0)
    share = 1.0
    for step in range(1, 1001):
        ema.update(step)
        share *= min(0.9999, step / (9 + step))
    assert ema.state_dict_of_net()["weight"].item() == pytest.approx(1 + 999 * share, rel=1e-5)
    assert share < 1e-9


def test_the_warmup_is_that_of_the_papers_code():
    """min(decay, (1 + n) / (10 + n)) where n counts from 0 (tf.train.ExponentialMovingAverage)."""
    average = Constant(decay=0.9999)
    assert [average.decay_at(n + 1, 1) for n in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert average.decay_at(10**7, 1) == 0.9999


def test_a_bfloat16_network_has_a_float32_average_that_moves():
    """In bfloat16 an average at 0.9999 never leaves its start: the update is below half a unit in the last place."""
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(net.weight, 1.0)
    ema = attached(net, decay=0.9999, warmup=False)
    nn.init.constant_(net.weight, 2.0)
    for step in range(1, 1001):
        ema.update(step)
    averaged = ema.state_dict_of_net()["weight"]
    assert averaged.dtype == torch.float32
    assert averaged.item() == pytest.approx(2 - 0.9999**1000, abs=1e-4)


def test_buffers_are_copied_and_not_averaged():
    net = nn.BatchNorm1d(2)
    ema = attached(net, decay=0.5, warmup=False)
    net.running_mean.fill_(7.0)
    ema.update(1)
    assert ema.state_dict_of_net()["running_mean"].tolist() == [7.0, 7.0]


def test_the_average_is_no_part_of_the_network():
    net = nn.Linear(2, 2)
    before = copy.deepcopy(net.state_dict())
    ema = attached(net, decay=0.5, warmup=False)
    for step in range(1, 4):
        ema.update(step)
    assert net.state_dict().keys() == before.keys()
    assert torch.equal(net.weight, before["weight"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_gets_its_own_weights_back(fails):
    net = nn.Linear(2, 2)
    ema = attached(net, decay=0.5, warmup=False)
    nn.init.zeros_(net.weight)
    ema.update(1)
    own, average = net.weight.detach().clone(), ema.state_dict_of_net()["weight"].clone()
    with pytest.raises(RuntimeError) if fails else torch.no_grad(), ema.swapped():
        assert torch.equal(net.weight, average)
        if fails:
            raise RuntimeError
    assert torch.equal(net.weight, own)
    assert torch.equal(ema.state_dict_of_net()["weight"], average)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match="must lie in"):
        EMA(decay=decay)


def shares(average: Average, n: int, images_per_step: int = 1) -> list[float]:
    """What the weights of step 0 (the initial ones), 1, ..., n count in the average after step n; float64."""
    result = [1.0]
    for step in range(1, n + 1):
        decay = average.decay_at(step, images_per_step)
        result = [decay * share for share in result] + [1 - decay]
    return result


@pytest.mark.parametrize(
    ("half_life", "images_per_step", "steps"), [(1000, 40, 25), ("0.5Mimg", 512, 7), ("1kimg", 1, 1000)]
)
def test_after_its_half_life_the_past_counts_half(half_life, images_per_step, steps):
    """0.5^(images / half_life): exactly a half where they are equal. 1000 multiplications round to 1e-13."""
    average = HalfLife(half_life, ramp=None)
    past = shares(average, steps, images_per_step)[0]
    assert past == pytest.approx(0.5 ** (steps * images_per_step / average.images), rel=1e-12)
    if steps * images_per_step == average.images:
        assert past == pytest.approx(0.5, rel=1e-12)


def test_the_half_life_ramps_up_as_in_edms_training_loop():
    """There: min(half_life, cur_nimg * ratio), and cur_nimg counts the images before this step."""
    average = HalfLife("500kimg", ramp=0.05)
    assert average.decay_at(1, 512) == 0.0  # the initial weights do not count
    assert average.decay_at(101, 512) == 0.5 ** (512 / (0.05 * 100 * 512))
    full = 10**7 // 512 + 2  # 500k is 0.05 of 10M images
    assert average.decay_at(full - 2, 512) < average.decay_at(full, 512) == 0.5 ** (512 / 500_000)
    assert average.decay_at(10**6, 512) == average.decay_at(full, 512)


@pytest.mark.parametrize("length", [1e-3, 0.05, 0.1, 0.2, 0.2886])
def test_gamma_has_the_length(length):
    """sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2), and the root is the one with gamma > 0."""
    gamma = Power(length).gamma
    assert gamma > 0
    assert math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) == pytest.approx(length, rel=1e-13)


def test_gamma_is_the_papers():
    """Karras et al. 2024, Sec. 3.1: sigma_rel of 0.05 and 0.10 are gamma of about 16.97 and 6.94."""
    assert Power(0.05).gamma == pytest.approx(16.97, abs=5e-3)
    assert Power(0.10).gamma == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.28])
def test_power_is_the_integral_against_its_profile(length):
    """The weights of step i are those of the times from i - 1 to i.

    Gauss-Legendre of 60 nodes a step, in s = tau^(1/8), which is smooth at 0 also for small gamma; float64.
    """
    n, gamma = 40, Power(length).gamma
    nodes, node_weights = np.polynomial.legendre.leggauss(60)
    s = np.arange(n + 1) ** (1 / 8)
    width = np.diff(s)[:, None]
    s = s[:-1, None] + width * (nodes + 1) / 2  # (n, 60)
    profile = (gamma + 1) * s ** (8 * gamma) / float(n) ** (gamma + 1)
    integrals = (profile * 8 * s**7 * node_weights * width / 2).sum(1)
    np.testing.assert_allclose(shares(Power(length), n)[1:], integrals, rtol=1e-11, atol=1e-15)
    assert shares(Power(length), n)[0] == 0.0


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_the_length_is_the_standard_deviation_of_what_counts(length):
    """As a share of the training; the steps are 1/2000 of it wide, which shifts a variance by 1/12 of their square."""
    n = 2000
    share = np.array(shares(Power(length), n)[1:])
    tau = np.arange(1, n + 1) - 0.5
    mean = (share * tau).sum()
    assert math.sqrt((share * (tau - mean) ** 2).sum()) / n == pytest.approx(length, rel=1e-5)


KINDS = {"constant": Constant(0.9, False), "half_life": HalfLife(100, 0.5), "power": Power(0.1), "warm": Constant(0.99)}


def test_each_of_several_averages_is_its_closed_form():
    """Against float64; float32 rounds 50 times by 6e-8 of numbers of about 1."""
    net = nn.Linear(3, 2)
    ema = attached(net, decay=0.8, warmup=False, also=KINDS)
    history = [net.weight.detach().double().clone()]
    for step in range(1, 51):
        nn.init.normal_(net.weight)
        ema.update(step, images_per_step=8)
        history.append(net.weight.detach().double().clone())
    for name, average in {"ema": Constant(0.8, False), **KINDS}.items():
        expected = sum(share * w for share, w in zip(shares(average, 50, 8), history, strict=True))
        torch.testing.assert_close(ema.state_dict_of_net(name)["weight"].double(), expected, atol=1e-6, rtol=0)


def test_averages_that_ramp_up_do_not_know_the_initial_weights():
    net = nn.Linear(3, 2)
    nn.init.constant_(net.weight, 1e30)
    ema = attached(net, half_life="500kimg", also={"power": Power(0.05)})
    nn.init.normal_(net.weight)
    ema.update(1, images_per_step=512)
    for name in ("ema", "power"):
        assert torch.equal(ema.state_dict_of_net(name)["weight"], net.weight)


def test_the_network_computes_with_the_primary_average():
    net = nn.Linear(2, 2)
    alone, among = attached(net, decay=0.5, warmup=False), attached(net, decay=0.5, warmup=False, also=KINDS)
    nn.init.zeros_(net.weight)
    alone.update(1)
    among.update(1)
    assert torch.equal(alone.state_dict_of_net()["weight"], among.state_dict_of_net()["weight"])
    with among.swapped():
        assert torch.equal(net.weight, alone.state_dict_of_net()["weight"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"half_life": 0}, "half_life=0 must be at least 1 image"),
        ({"half_life": "5kim"}, "'5kim' is not a number of images"),
        ({"half_life": 1, "ramp": 0.0}, "ramp=0.0 must be positive"),
        ({"also": {"raw": Power(0.1)}}, "also.raw: the name is taken"),
        ({"also": {"ema": Power(0.1)}}, "also.ema: the name is taken"),
        ({"also": {"mine": {"length": 0.1}}}, "also.mine is no average; give it _target_="),
        ({"snapshot_every_n_steps": 5, "run_dir": Path()}, "there are none; add averages=edm2"),
        (
            {"snapshot_every_n_steps": 0, "also": {"power": Power(0.1)}, "run_dir": Path()},
            "must be at least 1, or null",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EMA(**arguments)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.2887, 1.0])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(ValueError, match=r"must be at least 1e-06 and less than 1 / sqrt\(12\) = 0.2887"):
        Power(length)


# In a run.


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_other_averages_change_nothing_else(averaged_run, smoke_run):
    with_all, without = last(averaged_run), last(smoke_run)
    assert rows(averaged_run) == rows(smoke_run)
    for part in ("state_dict", "ema"):
        assert_equal(with_all[part], without[part])
    assert list(with_all["averages"]) == ["half_life_500k", "power_050", "power_100"]
    assert without["averages"] == {}


def test_half_lives_count_the_images_of_all_accumulated_batches(command, tmp_path):
    """smoke's batches are 32, twice accumulated: half of the past is forgotten every 320 / 64 = 5 steps."""
    common = ["experiment=smoke", "trainer.accumulate_grad_batches=2", "~callbacks.samples"]
    settings = {
        "half_life": ["callbacks.ema.half_life=320", "callbacks.ema.ramp=null"],
        "decay": [f"callbacks.ema.decay={0.5 ** (64 / 320)}", "callbacks.ema.warmup=false"],
    }
    for name, overrides in settings.items():
        assert command("train", *common, *overrides, f"hydra.run.dir={tmp_path / name}").code == 0
    assert_equal(last(tmp_path / "half_life")["ema"], last(tmp_path / "decay")["ema"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_was_extended_has_the_same_averages_and_snapshots(command, averaged_run, tmp_path, accumulate):
    from tests.conftest import AVERAGES

    common = ["experiment=smoke", *AVERAGES, f"trainer.accumulate_grad_batches={accumulate}"]
    whole, stopped = averaged_run, tmp_path / "stopped"
    if accumulate > 1:
        whole = tmp_path / "whole"
        assert command("train", *common, f"hydra.run.dir={whole}").code == 0
    assert command("train", *common, "trainer.max_steps=13", f"hydra.run.dir={stopped}").code == 0
    (stopped / "ema" / "step=10.pt").unlink()  # and what is written before the stop is not needed for what comes after
    assert command("train", f"run={stopped}", "trainer.max_steps=20").code == 0
    assert_equal(last(whole)["ema"], last(stopped)["ema"])
    for name, state in last(whole)["averages"].items():
        assert_equal(state, last(stopped)["averages"][name])
    assert {p.name for p in (whole / "ema").iterdir()} == {f"step={n}.pt" for n in (5, 10, 15, 20)}
    assert {p.name for p in (stopped / "ema").iterdir()} == {f"step={n}.pt" for n in (5, 13, 15, 20)}
    for n in (5, 15, 20):
        a, b = (torch.load(run / "ema" / f"step={n}.pt", weights_only=True) for run in (whole, stopped))
        assert a["step"] == b["step"] == n
        assert a["lengths"] == b["lengths"] == {"power_050": 0.05, "power_100": 0.1}
        for name in a["lengths"]:
            assert_equal(a["weights"][name], b["weights"][name])
    assert_equal(a["weights"]["power_100"], last(whole)["averages"]["power_100"])


def test_a_checkpoint_from_before_there_were_others_goes_on(command, averaged_run, tmp_path):
    run = Path(shutil.copytree(averaged_run, tmp_path / "run"))
    checkpoint = last(run)
    del checkpoint["averages"]
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    outcome = command("train", f"run={run}", "trainer.max_steps=21")
    assert outcome.code == 0
    names = "half_life_500k, power_050, power_100"
    assert f"note: the checkpoint has no average {names}: started from the raw weights of step 20" in outcome.out
    decay = Power(0.05).decay_at(21, 32)
    w20, w21 = (c["state_dict"]["net.conv_in.weight"] for c in (checkpoint, last(run)))
    averaged = last(run)["averages"]["power_050"]["conv_in.weight"]
    torch.testing.assert_close(averaged, decay * w20 + (1 - decay) * w21, atol=1e-6, rtol=0)
