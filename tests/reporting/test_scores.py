"""The columns of scores: means and errors, the best, and what does not belong together."""

import hashlib
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch

from src.errors import UserError
from src.reporting.evaluations import gather
from src.reporting.folders import find_runs, read_runs
from src.reporting.scores import columns, mean_and_error
from src.reporting.settings import compare
from src.runs import weights_alone
from tests.reporting import fabricate


def table(folder, evaluations=()):
    runs, notes = read_runs(find_runs(folder))
    found, left_out = gather(runs, list(evaluations))
    comparison = compare(runs)
    return SimpleNamespace(columns=columns(comparison, found), notes=notes + left_out)


def named(found, title):
    return next(column for column in found.columns if column.title == title)


def test_the_error_of_a_mean():
    """Against the definition: the variance of 1, 2, 4 is 7/3, so that of their mean is 7/9."""
    assert mean_and_error([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3, rel=1e-15), pytest.approx(7**0.5 / 3, rel=1e-15))
    assert mean_and_error([5.0]) == (5.0, None)
    assert mean_and_error([0.1] * 3) == (pytest.approx(0.1, rel=1e-15), pytest.approx(0.0, abs=1e-16))


def test_several_seeds_give_mean_and_standard_error_and_never_the_minimum(tmp_path):
    """The setting with the single best seed is not the best."""
    for i, (beta, values) in enumerate({0.01: (0.5, 3.5), 0.02: (1.0, 1.2)}.items()):
        for seed, value in enumerate(values):
            run = fabricate.run(tmp_path / f"{2 * i + seed}", seed=seed, **{"schedule.beta_end": beta})
            fabricate.evaluation(run, "a", {"fd_pixels": value, "precision_pixels": value / 10})
    column = named(found := table(tmp_path), "fd_pixels")
    wide, narrow = column.cells["beta_end = 0.01"], column.cells["beta_end = 0.02"]
    assert wide == (2.0, 1.5, "training seeds", 2, 2)
    assert narrow == (pytest.approx(1.1, rel=1e-12), pytest.approx(0.1, rel=1e-12), "training seeds", 2, 2)
    assert column.best == ("beta_end = 0.02",)
    assert column.ranked
    assert column.note == ""
    assert named(found, "precision_pixels").best == ("beta_end = 0.01",)  # where higher is better


def test_equals_are_all_the_best(tmp_path):
    for i, value in enumerate((1.0, 1.0, 2.0)):
        fabricate.evaluation(
            fabricate.run(tmp_path / str(i), **{"schedule.beta_end": 0.01 + i / 100}), "a", {"fd": value}
        )
    assert named(table(tmp_path), "fd").best == ("beta_end = 0.01", "beta_end = 0.02")


def test_sampling_seeds_are_repeats_of_one_run(tmp_path):
    run = fabricate.run(tmp_path / "0", **{"schedule.beta_end": 0.01})
    for seed, value in enumerate((1.0, 2.0, 4.0)):
        fabricate.evaluation(run, f"seed{seed}", {"fd": value}, seed=seed, standard_error=9.0)
    other = fabricate.run(tmp_path / "1", **{"schedule.beta_end": 0.02})
    fabricate.evaluation(other, "a", {"fd": 5.0}, standard_error=0.25)
    cells = named(table(tmp_path), "fd").cells
    mean, error = pytest.approx(7 / 3, rel=1e-15), pytest.approx(7**0.5 / 3, rel=1e-15)
    assert cells["beta_end = 0.01"] == (mean, error, "sampling seeds", 1, 1)
    assert cells["beta_end = 0.02"] == (5.0, 0.25, "the score", 1, 1)


def test_a_training_seed_counts_once_however_often_it_was_sampled(tmp_path):
    """Catches a mean over all numbers, in which the run that was scored thrice outweighs the other."""
    runs = [fabricate.run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    for seed, value in enumerate((1.0, 2.0, 3.0)):
        fabricate.evaluation(runs[0], f"seed{seed}", {"fd": value}, seed=seed)
    fabricate.evaluation(runs[1], "a", {"fd": 4.0})
    assert named(table(tmp_path), "fd").cells["all runs"] == (3.0, 1.0, "training seeds", 2, 2)


def test_numbers_of_two_protocols_stand_in_two_columns(tmp_path):
    runs = [fabricate.run(tmp_path / str(i), **{"schedule.beta_end": 0.01 * (1 + i)}) for i in (0, 1, 2)]
    fabricate.evaluation(runs[0], "a", {"fd": 1.0})
    fabricate.evaluation(runs[1], "a", {"fd": 2.0}, num_samples=50_000, reference={"sha256": "cd" * 32})
    fabricate.evaluation(runs[2], "a", {"fd": 3.0}, stamp={"versions": {"torch": "9.9"}})
    found = table(tmp_path)
    few = named(found, "fd (num_samples = 1000, reference.sha256 = abababab)")
    many = named(found, "fd (num_samples = 50000, reference.sha256 = cdcdcdcd)")
    assert [few.cells[f"beta_end = 0.0{i}"].mean for i in (1, 2, 3)] == [1.0, None, 3.0]  # versions divide nothing
    assert [many.cells[f"beta_end = 0.0{i}"].mean for i in (1, 2, 3)] == [None, 2.0, None]
    assert few.best == ("beta_end = 0.01",)
    assert many.best == ()  # of one there is no best


def test_two_checkpoints_stand_in_two_columns(tmp_path):
    run = fabricate.run(tmp_path / "0")
    fabricate.evaluation(run, "a", {"fd": 1.0})
    fabricate.evaluation(run, "b", {"fd": 2.0}, stamp={"checkpoint": str(run / "checkpoints" / "best.ckpt")})
    found = table(tmp_path)
    assert named(found, "fd (checkpoint = last.ckpt)").cells["0"].mean == 1.0
    assert named(found, "fd (checkpoint = best.ckpt)").cells["0"].mean == 2.0


def test_scores_of_a_checkpoint_that_training_has_replaced_are_left_out(tmp_path):
    run = fabricate.run(tmp_path / "0")
    new = fabricate.evaluation(run, "a", {"fd": 1.0}, stamp={"checkpoint_sha256": "d" * 64}, seed=1)
    old = fabricate.evaluation(run, "b", {"fd": 9.0})
    os.utime(old, (1, 1))
    os.utime(new, (2, 2))
    found = table(tmp_path)
    assert named(found, "fd").cells["0"] == (1.0, None, "", 1, 1)
    assert found.notes == ["0: scores of an earlier last.ckpt, which training has replaced, are left out"]


def test_a_score_of_what_the_checkpoint_was_before_is_left_out(tmp_path):
    """Trained on after the only evaluation: the number is not of what lies there now."""
    run = fabricate.run(tmp_path / "0")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    fabricate.evaluation(run, "a", {"kd": 2.0}, stamp={"checkpoint_sha256": digest})
    fabricate.evaluation(run, "b", {"fd": 9.0})
    for path in (run / "evaluation").glob("*/metrics.json"):
        os.utime(path, (1, 1))
    found = table(tmp_path)
    assert named(found, "kd").cells["0"].mean == 2.0
    assert not any(column.title == "fd" for column in found.columns)
    assert found.notes == ["0: scores of an earlier last.ckpt, which training has replaced, are left out"]


def test_runs_of_one_seed_are_no_two_seeds(tmp_path):
    for i, (seed, value) in enumerate([(0, 1.0), (0, 3.0), (1, 4.0)]):
        fabricate.evaluation(fabricate.run(tmp_path / str(i), seed=seed), "a", {"fd": value})
    assert named(table(tmp_path), "fd").cells["all runs"] == (3.0, 1.0, "training seeds", 2, 2)


def test_weights_of_others_are_counted(tmp_path):
    """A folder of src.convert: a checkpoint, and no training."""
    fabricate.evaluation(fabricate.run(tmp_path / "0", **{"schedule.beta_end": 0.01}), "a", {"fd": 1.0})
    theirs = fabricate.run(tmp_path / "1", finished=False, **{"schedule.beta_end": 0.02})
    (theirs / "metrics.csv").unlink()
    (theirs / "checkpoints").mkdir()
    torch.save(weights_alone({}, {}), theirs / "checkpoints" / "last.ckpt")
    os.utime(theirs / "checkpoints" / "last.ckpt", (1, 1))
    fabricate.evaluation(theirs, "a", {"fd": 2.0})
    column = named(table(tmp_path), "fd")
    assert [cell.mean for cell in column.cells.values()] == [1.0, 2.0]
    assert column.best == ("beta_end = 0.01",)


def test_the_same_again_counts_once(tmp_path):
    run = fabricate.run(tmp_path / "0")
    for i, value in enumerate((1.0, 2.0)):
        os.utime(fabricate.evaluation(run, str(i), {"fd": value}), (i, i))
    assert named(table(tmp_path), "fd").cells["0"] == (2.0, None, "", 1, 1)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_number_that_is_none_is_not_in_a_mean_and_costs_the_title_of_the_best(tmp_path, value):
    for i, (beta, number) in enumerate([(0.01, 1.0), (0.01, value), (0.02, 2.0), (0.02, 2.5)]):
        run = fabricate.run(tmp_path / str(i), seed=i % 2, **{"schedule.beta_end": beta})
        fabricate.evaluation(run, "a", {"fd": number})
    column = named(table(tmp_path), "fd")
    assert column.cells["beta_end = 0.01"] == (1.0, None, "", 1, 2)
    assert column.best == ("beta_end = 0.02",)
    assert column.note == "beta_end = 0.01 would be better, but not all of its runs have a number"


def test_a_run_that_is_not_finished_is_not_counted(tmp_path):
    for i, (beta, finished) in enumerate([(0.01, False), (0.01, True), (0.02, True)]):
        run = fabricate.run(tmp_path / str(i), seed=i, finished=finished, **{"schedule.beta_end": beta})
        fabricate.evaluation(run, "a", {"fd": float(i)})
    column = named(table(tmp_path), "fd")
    assert column.cells["beta_end = 0.01"] == (1.0, None, "", 1, 2)
    assert column.note.startswith("0, not trained to the end, not counted")
    assert column.by_run["0"] == (0.0, None)


def test_losses_of_two_schedules_are_shown_and_not_ranked(tmp_path):
    for i, beta in enumerate((0.01, 0.02)):
        run = fabricate.run(tmp_path / str(i), loss=i + 0.5, **{"schedule.beta_end": beta})
        fabricate.evaluation(run, "a", {"loss": i + 0.55, "fd_pixels": i + 1.0})
    for title in ("held-out loss", "loss"):
        column = named(table(tmp_path), title)
        assert [cell.mean for cell in column.cells.values()] == pytest.approx([0.55, 1.55], rel=1e-12)
        assert not column.ranked
        assert column.best == ()
        assert column.note == "the runs differ in schedule, so that their losses are of different things"
    assert named(table(tmp_path), "fd_pixels").best == ("beta_end = 0.01",)


def test_losses_of_one_experiment_are_ranked(tmp_path):
    for i, lr in enumerate((0.1, 0.2)):
        fabricate.run(tmp_path / str(i), loss=i + 0.5, **{"optimizer.lr": lr})
    column = named(table(tmp_path), "held-out loss")
    assert column.ranked
    assert column.best == ("lr = 0.1",)
    assert named(table(tmp_path), "held-out loss (raw)").cells["lr = 0.2"].mean == 2.55


def test_losses_of_two_data_sets_are_not_ranked(tmp_path):
    fabricate.run(tmp_path / "0", **{"optimizer.lr": 0.1})
    fabricate.run(tmp_path / "1", **{"optimizer.lr": 0.2, "data.val_images": 32})
    assert not named(table(tmp_path), "held-out loss").ranked


def test_scores_against_the_images_of_two_trainings_stand_apart(tmp_path):
    """data.limit leaves the images to validate on as they are, and changes what samples are compared with."""
    for i, limit in enumerate((100, 200)):
        run = fabricate.run(tmp_path / str(i), **{"data.limit": limit})
        lines = (run / "metrics.csv").read_text().split("\n")
        rows = [f"{line},{cell}" for line, cell in zip(lines[:-1], ["score/fd_pixels", "", "", "", "1.0"], strict=True)]
        (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = table(tmp_path)
    assert sum(column.name == "fd_pixels" for column in found.columns) == 2
    assert named(found, "held-out loss").ranked


def test_scores_that_training_computed_have_a_column_each_protocol(tmp_path):
    """Their protocol is the callback's configuration: numbers of other settings of it stand apart."""
    for i, samples in enumerate((100, 100, 500)):
        scorer = {"_target_": "src.training.scores.Scores", "num_samples": samples}
        run = fabricate.run(tmp_path / str(i), **{"optimizer.lr": 0.1 * (1 + i), "callbacks.scores": scorer})
        text = (run / "metrics.csv").read_text().split("\n")
        cells = ["score/fd_pixels", "", "", "", str(float(i))]
        rows = [f"{line},{cell}" for line, cell in zip(text[:-1], cells, strict=True)]
        (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = table(tmp_path)
    few = named(found, "fd_pixels, in training (callbacks.scores.num_samples = 100)")
    assert [cell.mean for cell in few.cells.values()] == [0.0, 1.0, None]
    assert few.better == "lower"
    assert len(few.best) == 1
    assert named(found, "fd_pixels, in training (callbacks.scores.num_samples = 500)").best == ()


def test_an_evaluation_elsewhere_is_given_to_its_run(tmp_path):
    """By the path in its stamp; of a folder that was moved since, by the checkpoint's sha256."""
    import hashlib

    sweep = tmp_path / "sweep"
    runs = [fabricate.run(sweep / str(i), seed=i) for i in (0, 1)]
    for i, run in enumerate(runs):
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "last.ckpt").write_bytes(bytes([i]))
    by_path = fabricate.evaluation(tmp_path, "path", {"fd": 1.0}, stamp={"checkpoint": f"{runs[0]}/checkpoints/x.ckpt"})
    digest = hashlib.sha256(b"\x01").hexdigest()
    moved = {"checkpoint": "/gone/checkpoints/last.ckpt", "checkpoint_sha256": digest}
    by_digest = fabricate.evaluation(tmp_path, "digest", {"kd": 2.0}, stamp=moved)
    found = table(sweep, [by_path, by_digest])
    assert named(found, "fd").by_run == {"0": (1.0, None)}
    assert named(found, "kd").by_run == {"1": (2.0, None)}
    foreign = fabricate.evaluation(tmp_path, "foreign", {"fd": 1.0}, stamp={**moved, "checkpoint_sha256": "e" * 64})
    with pytest.raises(UserError, match="which is of none of the runs of this report"):
        table(sweep, [foreign])


def test_files_that_are_no_evaluation_are_left_out_and_said(tmp_path):
    run = fabricate.run(tmp_path / "0")
    fabricate.evaluation(run, "a", {"fd": 1.0})
    for name, text in (("torn", '{"fd": {"val'), ("other", "[1, 2]")):
        (run / name).mkdir()
        (run / name / "metrics.json").write_text(text)
    found = table(tmp_path)
    assert named(found, "fd").cells["0"].mean == 1.0
    assert len(found.notes) == 2
    assert all("cannot be read" in note or "no metrics.json of src.evaluate" in note for note in found.notes)


def test_samplers_against_steps_have_their_picture_and_no_column(tmp_path):
    run = fabricate.run(tmp_path / "0")
    path = fabricate.evaluation(run, "a", {"fd ddim 10": 1.0})
    (path.parent / "sweep.csv").write_text("sampler,steps,fd\n")
    assert not any("fd" in column.title for column in table(tmp_path).columns)
    assert json.loads(path.read_text())["fd ddim 10"]["value"] == 1.0
