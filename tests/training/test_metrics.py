"""metrics.csv: rows, columns and continuation; what a run logs does not depend on when it was stopped."""

import csv
import math
import resource
import shutil
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from src.training.by_level import BINS, LossByLevel
from src.training.hardware import memory_bytes, peak_flops
from src.training.metrics import TrainMetrics
from src.training.metrics_csv import MetricsCSV
from tests.helpers import rows
from tests.warm import finish


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_one_step_share_a_row(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"a": 1.0}, step=1)
    log.log_metrics({"a": 2.0, "b": 0.1}, step=2)
    log.log_metrics({"c": 3.0}, step=2)
    log.log_metrics({"b": 5.0}, step=3)
    assert table(log.path) == [
        {"step": "1", "a": "1.0", "b": "", "c": ""},
        {"step": "2", "a": "2.0", "b": "0.1", "c": "3.0"},
        {"step": "3", "a": "", "b": "5.0", "c": ""},
    ]


def test_values_keep_all_their_digits(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    log.log_metrics({"a": 1 / 3}, step=1)
    assert float(table(log.path)[0]["a"]) == 1 / 3


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 4):
        log.log_metrics({"a": step}, step=step)
        assert len(table(log.path)) == step


def test_a_continued_log_drops_what_is_done_again(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    for step in range(1, 6):
        log.log_metrics({"a": step}, step=step)
        if step == 3:
            table_then = log.table()
    continued = MetricsCSV(path, table_then)
    continued.log_metrics({"a": 40}, step=4)
    continued.log_metrics({"b": 41}, step=4)
    assert [(row["step"], row["a"], row.get("b")) for row in table(path)] == [
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", ""),
        ("4", "40.0", "41.0"),
    ]


def test_the_last_row_can_be_completed_after_a_continuation(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"a": 1, "b": 2}, step=1)
    MetricsCSV(path, log.table()).log_metrics({"b": 3}, step=1)
    assert table(path) == [{"step": "1", "a": "1.0", "b": "3.0"}]


@pytest.fixture
def four_rows(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv")
    values = [1 / 3, -math.inf, math.nan, 5e-324]
    for step, value in enumerate(values, 1):
        log.log_metrics({"a": value}, step=step)
        if step % 2 == 0:
            log.log_metrics({"b": -0.0}, step=step)
    return log


def test_the_table_keeps_every_value_and_every_empty_cell(four_rows, tmp_path):
    """NaN that was logged is no empty cell. Through a file, loaded as a checkpoint is."""
    torch.save(four_rows.table(), tmp_path / "table")
    again = MetricsCSV(tmp_path / "again.csv", table=torch.load(tmp_path / "table", weights_only=True))
    assert again.path.read_bytes() == four_rows.path.read_bytes()
    assert table(again.path)[2] == {"step": "3", "a": "nan", "b": ""}
    assert again.columns == ["step", "a", "b"]


def test_an_empty_table_goes_on(tmp_path):
    log = MetricsCSV(tmp_path / "metrics.csv", table=MetricsCSV(tmp_path / "metrics.csv").table())
    log.log_metrics({"a": 1.0}, step=1)
    assert table(log.path) == [{"step": "1", "a": "1.0"}]


def damages(whole: bytes, from_byte: int):
    """The file gone, cut at every byte from the given one on, and with one bit of each of these bytes turned."""
    yield None
    for i in range(from_byte, len(whole)):
        yield whole[:i]
        yield whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :]


def test_with_a_table_no_damage_to_the_file_is_seen(four_rows):
    kept, path = four_rows.table(), four_rows.path
    four_rows.log_metrics({"a": 5.0}, step=5)  # later than the table, to be done again
    whole = path.read_bytes()
    expected = whole.replace(b"5,5.0,\n", b"5,50.0,\n")
    for damaged in damages(whole, whole.index(b"\n4,")):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        MetricsCSV(path, kept).log_metrics({"a": 50.0}, step=5)
        assert path.read_bytes() == expected


def test_a_full_disk_loses_no_row(tmp_path, capsys):
    """The limit on a file's size stands in for the disk's: writes stop in the middle of a line."""
    log = MetricsCSV(tmp_path / "metrics.csv")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        for step in range(1, 40):
            log.log_metrics({"a": step / 3}, step=step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.stat().st_size <= 100
    log.log_metrics({"a": 40 / 3}, step=40)
    assert [float(row["a"]) for row in table(log.path)] == [step / 3 for step in range(1, 41)]
    said = capsys.readouterr().out
    assert said.count("metrics.csv could not be written") == 1
    assert "training goes on" in said


def test_a_file_that_is_taken_away_or_cut_is_written_again(four_rows):
    whole = four_rows.path.read_bytes()
    for damaged in damages(whole, len(whole) - 3):
        if damaged is None:
            four_rows.path.unlink()
        elif len(damaged) < len(whole):
            four_rows.path.write_bytes(damaged)
        four_rows.log_metrics({"a": 5.0}, step=5)
        assert four_rows.path.read_bytes() == whole + b"5,5.0,\n"


def test_training_goes_on_where_neither_table_nor_picture_can_be_written(command, tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    (tmp_path / "samples").write_text("a file where the folder should be")
    outcome = command("train", "experiment=smoke", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("metrics.csv could not be written") == 1
    assert outcome.out.count("samples could not be written") == 1


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory):
    """A run of 13 steps: its last row is no regular one."""
    from src.train import main

    folder = tmp_path_factory.mktemp("thirteen") / "run"
    arguments = ["experiment=smoke", "trainer.max_steps=13", f"hydra.run.dir={folder}"]
    with mock.patch.object(sys, "argv", ["src.train", *arguments]):
        main()
    return folder


@pytest.mark.parametrize("damage", ["none", "garbage"])
def test_a_continued_run_logs_what_an_uninterrupted_one_does(command, smoke_run, thirteen, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(thirteen, run)
    path = run / "metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(whole if damage == "none" else bytes(b ^ 1 for b in whole))
    assert command("train", f"run={run}", "trainer.max_steps=20").code == 0
    assert [row["step"] for row in rows(run)] == ["5", "10", "13", "15", "20"]
    assert [row for row in rows(run) if row["step"] != "13"] == rows(smoke_run)
    assert rows(run)[2] == rows(thirteen)[2]


def test_a_loss_in_the_middle_of_an_interval_is_not_lost(command, smoke_run, thirteen, tmp_path):
    """The row at step 15 is the mean of steps 11 to 15, three of which were before the stop."""
    each = tmp_path / "each"
    assert command("train", "experiment=smoke", "trainer.log_every_n_steps=1", f"hydra.run.dir={each}").code == 0
    losses = [float(row["train/loss"]) for row in rows(each)]
    by_step = {row["step"]: float(row["train/loss"]) for row in rows(smoke_run)}
    assert by_step["15"] == pytest.approx(sum(losses[10:15]) / 5, rel=1e-6)
    assert float(rows(thirteen)[2]["train/loss"]) == pytest.approx(sum(losses[10:13]) / 3, rel=1e-6)


def test_losses_are_summed_by_level():
    levels = LossByLevel()
    u = torch.rand(1000)
    losses = torch.rand(1000)
    for part in torch.arange(1000).split(128):
        levels.add(u[part], losses[part], bad=torch.tensor(False))
        levels.add(u[part], losses[part] / 0, bad=torch.tensor(True))
    for i in range(BINS):
        inside = (u >= i / BINS) & (u < (i + 1) / BINS)
        assert levels.sums[1, i] == inside.sum()
        assert levels.sums[0, i] == pytest.approx(float(losses[inside].sum()), rel=1e-5)


def partial_sums(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["TrainMetrics"]["sums"]


def test_the_sums_of_an_unfinished_row_survive_a_stop(command, tmp_path):
    """No regular row before step 100: what a stop at 13 lost would be missing in the sums at 20."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["experiment=smoke", "trainer.log_every_n_steps=100"]
    assert command("train", *arguments, f"hydra.run.dir={whole}").code == 0
    assert command("train", *arguments, "trainer.max_steps=13", f"hydra.run.dir={stopped}").code == 0
    assert command("train", f"run={stopped}", "trainer.max_steps=20").code == 0
    assert torch.equal(partial_sums(whole), partial_sums(stopped))
    assert rows(whole)[-1] == rows(stopped)[-1]
    loss, steps, *by_level = partial_sums(whole)[0].tolist()
    assert (steps, sum(by_level[BINS:])) == (20, 20 * 32)
    assert sum(by_level[:BINS]) == pytest.approx(32 * loss, rel=1e-5)


def test_sums_of_two_devices_go_on_as_their_mean_on_one():
    def state(trainer):
        metrics = TrainMetrics(5, (1, 8, 8), "32-true")
        sums = torch.arange(2 * (2 + 2 * BINS), dtype=torch.float32).reshape(2, -1)
        saved = {"TrainMetrics": {"images_seen": 7, "sums": sums}}
        module = SimpleNamespace(loss_by_level=LossByLevel())
        metrics.on_load_checkpoint(trainer, module, {"callbacks": saved})
        assert metrics.images_seen == 7
        return metrics._sums(module), sums

    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    mine, sums = state(SimpleNamespace(world_size=2, global_rank=1, strategy=strategy))
    assert torch.equal(mine, sums[1])
    mine, sums = state(SimpleNamespace(world_size=1, global_rank=0, strategy=strategy))
    assert torch.equal(mine, sums.mean(0))


def test_two_processes_log_the_mean_of_both_and_resume_to_the_bit(tmp_path):
    def train(*arguments):
        assert finish(*arguments, output=tmp_path / "log") == 0, (tmp_path / "log").read_text()

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    arguments = ["experiment=smoke", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    train(*arguments, "trainer.max_steps=10", f"hydra.run.dir={whole}")
    train(*arguments, "trainer.max_steps=8", f"hydra.run.dir={stopped}")
    sums = partial_sums(stopped)
    assert sums.shape == (2, 2 + 2 * BINS)
    assert sums[0, 0] != sums[1, 0]
    assert float(rows(stopped)[-1]["train/loss"]) == pytest.approx(float(sums[:, 0].sum()) / 6, rel=1e-6)
    train(f"run={stopped}", "trainer.max_steps=10")
    assert [row["step"] for row in rows(stopped)] == ["5", "8", "10"]
    assert rows(stopped)[-1] == rows(whole)[-1]


def test_the_systems_columns_are_in_every_row(smoke_run):
    for row in rows(smoke_run, without=()):
        assert 0 < float(row["system/peak_share"]) < 3  # a tiny network on a busy machine; a share, not a percentage
        assert 1e7 < float(row["system/memory_bytes"]) < 1e12


def test_what_checkpoints_cost_is_logged(smoke_run):
    """From the first row after a save, which is made beside training."""
    table = rows(smoke_run, without=())
    assert [row["system/checkpoint_bytes"] for row in table[:2]] == ["", ""]
    assert float(table[3]["system/checkpoint_bytes"]) == pytest.approx(
        (smoke_run / "checkpoints" / "last.ckpt").stat().st_size, rel=0.01
    )
    assert float(table[3]["system/checkpoint_seconds"]) > 0
    assert [row["train/skipped"] for row in table] == ["0.0"] * 4


def test_the_peak_is_that_of_a_matrix_multiplication():
    cpu = torch.device("cpu")
    state = torch.get_rng_state()
    peak = peak_flops(cpu, "32-true")
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e9 < peak < 1e15
    assert peak_flops(cpu, "32-true") == peak  # measured once
    assert memory_bytes(cpu) > 1e7
