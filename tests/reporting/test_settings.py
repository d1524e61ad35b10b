"""What varied among runs: asked for or unexplained, without seeds, folders and what merely follows."""

import copy

from src.reporting.folders import read_run
from src.reporting.settings import compare, flatten, shown
from tests.reporting import fabricate


def compared(tmp_path, *changes):
    return compare([read_run(fabricate.run(tmp_path / str(i), **c), str(i)) for i, c in enumerate(changes)])


def test_runs_that_differ_by_their_seed_alone_are_repeats(tmp_path):
    found = compared(tmp_path, *({"schedule.beta_end": b, "seed": s} for b in (0.04, 0.01) for s in (1, 0)))
    assert found.keys == ("schedule.beta_end",)
    assert found.short == ("beta_end",)
    assert found.seeds == 2
    assert [(s.label, s.values, [r.name for r in s.runs]) for s in found.settings] == [
        ("beta_end = 0.01", (0.01,), ["3", "2"]),
        ("beta_end = 0.04", (0.04,), ["1", "0"]),
    ]
    assert found.shared["schedule"] == "linear"
    assert "schedule.beta_end" not in found.shared


def test_a_seed_of_a_part_that_is_not_the_runs_is_a_difference(tmp_path):
    found = compared(tmp_path, {"data.seed": 0}, {"data.seed": 5})
    assert found.keys == ("data.seed",)


def test_what_follows_from_an_option_is_kept_apart(tmp_path):
    cosine = {"_target_": "src.diffusion.schedules.Cosine", "num_timesteps": 1000, "s": 0.008}
    found = compared(tmp_path, {}, {"schedule": cosine, "choices.schedule": "cosine"})
    assert found.keys == ("schedule",)
    assert [s.values for s in found.settings] == [("cosine",), ("linear",)]
    assert found.follows["schedule.s"] == [0.008, "\u2014"]
    assert {"schedule.beta_end", "schedule._target_"} <= found.follows.keys()


def test_what_was_asked_for_counts_though_it_follows(tmp_path):
    """Both runs differ in both settings, so that each explains the other: overrides name both."""
    found = compared(
        tmp_path,
        {"schedule.beta_end": 0.01, "optimizer.lr": 0.1},
        {"schedule.beta_end": 0.02, "optimizer.lr": 0.2},
    )
    assert set(found.keys) == {"schedule.beta_end", "optimizer.lr"}


def test_what_nothing_explains_counts_though_nobody_asked(tmp_path):
    """Such as a default that has changed between two repeats of a setting."""
    folders = [fabricate.run(tmp_path / str(i), **{"schedule.beta_end": b}) for i, b in enumerate((0.01, 0.01, 0.02))]
    text = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(text.replace("batch_size: 32", "batch_size: 16"))
    found = compare([read_run(folder, folder.name) for folder in folders])
    assert found.keys == ("schedule.beta_end", "data.batch_size")
    assert [len(s.runs) for s in found.settings] == [1, 1, 1]


def test_where_a_run_lies_and_how_often_it_is_looked_at_is_no_difference(tmp_path):
    found = compared(
        tmp_path, {"data.dir": "/a", "trainer.val_every_n_steps": 3, "seed": 0}, {"data.dir": "/b", "seed": 1}
    )
    assert found.keys == ()
    assert [s.label for s in found.settings] == ["all runs"]


def test_the_folder_of_images_that_no_name_says_is_a_difference():
    """Catches two folders of images that count as repeats of one."""
    named = fabricate.config()
    other = copy.deepcopy(named)
    other["data"]["source"] = {"_target_": "src.data.folder.Folder"}
    assert "data.dir" not in flatten(named)
    assert flatten(other)["data.dir"] == "data"


def test_one_and_one_point_zero_are_one_value_and_true_is_another(tmp_path):
    found = compared(tmp_path, *({"offset_noise": v} for v in (1, 1.0, True)))
    assert [[r.name for r in s.runs] for s in found.settings] == [["0", "1"], ["2"]]


def test_labels_that_are_too_long_are_numbers(tmp_path):
    changes = [
        {"schedule.beta_end": b, "schedule.beta_start": b / 10, "optimizer.lr": 0.001, "label_dropout": b}
        for b in (0.2, 0.1)
    ]
    found = compared(tmp_path, *changes)
    assert len(found.keys) == 3
    assert [(s.label, s.values[0]) for s in found.settings] == [("setting 1", 0.01), ("setting 2", 0.02)]


def test_a_single_run_is_called_by_its_name(tmp_path):
    assert [s.label for s in compared(tmp_path, {}).settings] == ["0"]


def test_values_are_shown_as_overrides_have_them():
    assert [shown(v) for v in (0.0001, 1e30, 1 / 3, True, None, [1, 2.0])] == [
        *("0.0001", "1e+30", "0.3333333333333333", "true", "null", "[1, 2]"),
    ]
