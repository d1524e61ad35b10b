"""One run from the command line: its folder, its exactness, its continuation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from src.runs import Run
from src.training.summary import versions
from tests.helpers import rows
from tests.warm import start, wait_for

ROOT = Path(__file__).resolve().parents[2]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    ema = {f"ema {name}": value for name, value in checkpoint["ema"].items()}
    moments = checkpoint["optimizer_states"][0]["state"]
    adam = {f"adam {i} {name}": v for i, state in moments.items() for name, v in state.items()}
    return {**checkpoint["state_dict"], **ema, **adam}


def assert_same_to_the_bit(a: Path, b: Path) -> None:
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    assert [name for name in wa if not torch.equal(wa[name], wb[name])] == []
    assert rows(a) == rows(b)
    assert sorted(p.name for p in (a / "samples").iterdir()) == sorted(p.name for p in (b / "samples").iterdir())
    for picture in (a / "samples").iterdir():
        assert picture.read_bytes() == (b / "samples" / picture.name).read_bytes()


def test_a_run_folder_holds_what_the_readme_promises(smoke_run):
    config = yaml.safe_load((smoke_run / "config.yaml").read_text())
    assert config["schedule"]["beta_end"] == 0.02
    assert "${" not in (smoke_run / "config.yaml").read_text()
    assert {"last.ckpt", "previous.ckpt", "best.ckpt"} == {p.name for p in (smoke_run / "checkpoints").iterdir()}
    assert {"step=10.png", "step=20.png"} == {p.name for p in (smoke_run / "samples").iterdir()}
    assert Image.open(smoke_run / "samples" / "step=20.png").size == (37 * 8, 37 * 8)  # 4 x 4 of 8x8, gaps of 1, by 8
    leftovers = [p for p in smoke_run.rglob("*") if p.name.startswith(".") or "tmp" in p.suffix]
    assert leftovers == []


def test_metrics_csv_has_one_row_a_logged_step(smoke_run):
    table = rows(smoke_run, without=())
    assert [int(row["step"]) for row in table] == [5, 10, 15, 20]
    assert [int(float(row["images"])) for row in table] == [160, 320, 480, 640]
    assert all(float(row["train/loss"]) > 0 and float(row["images_per_second"]) > 0 for row in table)
    assert all((row["val/loss_ema"] != "") == (int(row["step"]) % 10 == 0) for row in table)
    quarters = [float(table[-1][f"val/loss_ema_q{i}"]) for i in (1, 2, 3, 4)]
    assert sum(quarters) / 4 == pytest.approx(
        float(table[-1]["val/loss_ema"]), rel=0.02
    )  # 64 images, 15 to 17 a quarter


def test_the_summary_says_what_ran(smoke_run):
    summary = json.loads((smoke_run / "summary.json").read_text())
    assert summary["parameters"] == sum(p.numel() for p in Run(smoke_run).load_net("raw").parameters())
    assert (summary["steps"], summary["images_seen"], summary["seed"], summary["precision"]) == (20, 640, 0, "32-true")
    assert summary["flops_per_image"] > 1e6
    assert summary["peak_memory_bytes"] > 1e7
    assert summary["metrics"]["val/loss_ema"] == pytest.approx(float(rows(smoke_run)[-1]["val/loss_ema"]), rel=1e-7)
    assert {"torch", "lightning", "hydra-core"} <= summary["versions"].keys()
    assert {"images_per_second", "wall_seconds", "device", "git_commit"} <= summary.keys()


def test_a_package_that_is_missing_is_left_out_at_the_end(monkeypatch):
    """Where W&B was never installed: its absence must not cost a finished run its summary."""
    monkeypatch.setattr("src.training.summary.PACKAGES", ("torch", "no-such-package"))
    assert versions().keys() == {"python", "torch"}


def test_the_loss_falls(smoke_run):
    losses = [float(row["train/loss"]) for row in rows(smoke_run)]
    assert losses == sorted(losses, reverse=True)


def test_a_checkpoint_alone_rebuilds_the_model(smoke_run, tmp_path):
    alone = tmp_path / "somewhere.ckpt"
    alone.write_bytes((smoke_run / "checkpoints" / "last.ckpt").read_bytes())
    a, b = Run(alone).load_net("ema").state_dict(), Run(smoke_run).load_net("ema").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_ema_and_raw_weights_are_both_kept(smoke_run):
    ema, raw = Run(smoke_run).load_net("ema").state_dict(), Run(smoke_run).load_net("raw").state_dict()
    assert any(not torch.equal(ema[name], raw[name]) for name in ema)


def test_the_same_command_gives_the_same_run(command, smoke_run, tmp_path):
    assert command("train", "experiment=smoke", f"hydra.run.dir={tmp_path}").code == 0
    assert_same_to_the_bit(smoke_run, tmp_path)


def test_another_seed_gives_another_run(command, smoke_run, tmp_path):
    assert command("train", "experiment=smoke", "seed=1", f"hydra.run.dir={tmp_path}").code == 0
    assert rows(tmp_path)[0] != rows(smoke_run)[0]


def test_watching_does_not_change_the_weights(command, smoke_run, tmp_path):
    """Validation and sample grids must not consume the randomness of training (dropout is on here)."""
    watching = ["trainer.val_every_n_steps=3", "callbacks.samples.every_n_steps=4", "trainer.log_every_n_steps=1"]
    assert command("train", "experiment=smoke", *watching, f"hydra.run.dir={tmp_path}").code == 0
    wa, wb = weights(smoke_run), weights(tmp_path)
    assert all(torch.equal(wa[name], wb[name]) for name in wa)


def test_a_run_that_was_extended_equals_one_that_was_not_stopped(command, smoke_run, tmp_path):
    """Constant learning rate: more steps are the same run for longer. 13 is no multiple of any interval."""
    folder = tmp_path / "run"
    assert command("train", "experiment=smoke", "trainer.max_steps=13", f"hydra.run.dir={folder}").code == 0
    outcome = command("train", f"run={folder}", "trainer.max_steps=20")
    assert outcome.code == 0
    assert "continuing with trainer.max_steps=20 instead of 13" in outcome.out
    wa, wb = weights(smoke_run), weights(folder)
    assert all(torch.equal(wa[name], wb[name]) for name in wa)
    assert [int(row["step"]) for row in rows(folder)] == [5, 10, 13, 15, 20]
    assert rows(folder)[-1] == rows(smoke_run)[-1]


def test_a_killed_run_continues_to_the_bit(command, tmp_path):
    """kill -9 after the first checkpoint; steps done since then are done again, and their rows replaced."""
    arguments = ["experiment=smoke", "trainer.max_steps=60", "trainer.log_every_n_steps=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command("train", *arguments, f"hydra.run.dir={whole}").code == 0
    process = start(*arguments, f"hydra.run.dir={killed}", output=tmp_path / "log")
    wait_for((killed / "checkpoints" / "last.ckpt").exists, process)
    process.kill()
    process.join()
    assert not (killed / "summary.json").exists(), "it finished before it was killed"
    assert command("train", f"run={killed}").code == 0
    assert_same_to_the_bit(whole, killed)


def test_a_finished_run_has_nothing_to_continue(command, smoke_run):
    before = (smoke_run / "metrics.csv").read_bytes()
    outcome = command("train", f"run={smoke_run}")
    assert outcome.code == 0
    assert "has trained 20 steps already; to go on, raise trainer.max_steps" in outcome.out
    assert (smoke_run / "metrics.csv").read_bytes() == before


def test_accumulated_small_batches_take_the_same_steps_and_images(command, tmp_path):
    arguments = ["data.batch_size=8", "trainer.accumulate_grad_batches=4", "trainer.max_steps=10"]
    assert command("train", "experiment=smoke", *arguments, f"hydra.run.dir={tmp_path}").code == 0
    assert [int(float(row["images"])) for row in rows(tmp_path)] == [160, 320]
    assert [int(row["step"]) for row in rows(tmp_path)] == [5, 10]


def test_bf16_mixed_trains_like_float32_and_keeps_a_float32_average(command, smoke_run, tmp_path):
    assert command("train", "experiment=smoke", "trainer.precision=bf16-mixed", f"hydra.run.dir={tmp_path}").code == 0
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert {v.dtype for v in checkpoint["ema"].values()} == {torch.float32}
    half, full = (float(rows(run)[-1]["val/loss_ema"]) for run in (tmp_path, smoke_run))
    assert half == pytest.approx(full, rel=0.02)


def test_a_compiled_network_in_channels_last_keeps_its_parameters_names(tmp_path):
    from src.models.unet import UNet
    from src.training.trainer import TrainerSettings

    net = UNet(1, 8, base_channels=16, channel_mults=(1, 2), num_res_blocks=1)
    names = list(net.state_dict())
    TrainerSettings(accelerator="cpu", compile=True, channels_last=True).prepare(net)
    assert list(net.state_dict()) == names
    assert net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_it_prints_progress_and_where_things_lie(command, tmp_path):
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={tmp_path}")
    for part in ("training", "20/20", "loss", "images/s", "left"):
        assert part in outcome.err
    for path in ("samples/step=20.png", "checkpoints/last.ckpt", "summary.json"):
        assert f"{tmp_path / path}" in outcome.out


def test_settings_that_have_no_say_are_noted(command, tmp_path):
    """Flips beside an augmentation that mirrors and tells, and a weighting beside a loss with one of its own."""
    mirrored = ["augment=edm", "model.augment_dim=9", "data.flip=true"]
    bound = ["loss=vlb", "model.learned_variance=true", "weighting=min_snr"]
    short = ["trainer.max_steps=1", "callbacks.samples.num_samples=1", "callbacks.samples.sampler.steps=1"]
    outcome = command("train", "experiment=smoke", *mirrored, *bound, *short, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert "note: data.flip=true mirrors images without telling the network" in outcome.out
    assert "note: loss=vlb weighs the noise levels itself, and the weighting MinSNR changes nothing" in outcome.out


def test_ctrl_c_before_the_first_step_is_one_word(command, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("src.training.fit.build_net", interrupted)
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={tmp_path / 'run'}")
    assert (outcome.code, outcome.err.strip().splitlines()[-1]) == (130, "stopped")
    assert "Traceback" not in outcome.err


def test_a_snapshot_that_cannot_be_written_stops_nothing(command, monkeypatch, tmp_path):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left")

    monkeypatch.setattr("src.training.snapshots.save", full)
    averages = ["averages=edm2", "callbacks.ema.snapshot_every_n_steps=5", "callbacks.samples.num_samples=1"]
    outcome = command("train", "experiment=smoke", *averages, f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("could not be written (PytorchStreamWriter failed") == 1
    assert (tmp_path / "summary.json").is_file()


def test_help_and_cfg_answer_without_torch():
    """Heavy imports belong inside functions: --help and completion must not wait for them."""
    code = "import sys, src.train, src.sample; print([m for m in ('torch', 'lightning', 'wandb') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
