"""python -m src.report on folders as they are found: what it writes, and how it refuses."""

import csv
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.reporting import report
from src.reporting.figures import LONGEST
from src.reporting.folders import find_runs, read_run, short_names
from src.reporting.pictures import grids
from tests.reporting import fabricate

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two settings with two seeds, scored; a run that diverged, one that was killed, one refused, one to come."""
    folder = tmp_path_factory.mktemp("reports") / "sweep"
    for i, (beta, seed, score) in enumerate([(0.01, 0, 4.0), (0.01, 1, 6.0), (0.02, 0, 1.0), (0.02, 1, 2.0)]):
        run = fabricate.run(folder / str(i), seed=seed, loss=0.5 + i, **{"schedule.beta_end": beta})
        fabricate.evaluation(run, "a", {"fd_pixels": score})
    diverged = fabricate.run(folder / "4", finished=False, **{"schedule.beta_end": 0.5})
    (diverged / "error.txt").write_text("training has diverged; lower optimizer.lr <&>\n")
    killed = fabricate.run(folder / "5", seed=1, finished=False, **{"schedule.beta_end": 0.5})
    text = (killed / "metrics.csv").read_text()
    (killed / "metrics.csv").write_text(text.replace("20,", "30,")[:-4])
    (folder / "failed").mkdir()
    refused = {"overrides": ["schedule.beta_end=2"], "error": "beta_end=2 must lie strictly between 0 and 1"}
    (folder / "failed" / "6.json").write_text(json.dumps(refused))
    task = ["schedule.beta_end=0.01,0.02,0.5,2", "seed=0,1"]
    hydra = {
        "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"},
        "sweep": {"subdir": "${hydra.job.num}"},
        "overrides": {"task": task},
    }
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
    Image.new("L", (30, 20), 100).save(folder / "2" / "evaluation" / "a" / "neighbours.png")
    report.make([folder], [], _made(folder / "report"))
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def text(page: Path) -> str:
    """What a reader reads."""
    body = re.sub(r"<(script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).replace("\u00a0", " ").split())


def test_the_table_of_settings_has_all_digits(sweep):
    found = rows(sweep / "report" / "report.csv")
    assert [row["setting"] for row in found] == ["beta_end = 0.01", "beta_end = 0.02", "beta_end = 0.5"]
    assert [row["schedule.beta_end"] for row in found] == ["0.01", "0.02", "0.5"]
    assert [(row["runs"], row["finished"]) for row in found] == [("2", "2"), ("2", "2"), ("2", "0")]
    assert [row["fd_pixels"] for row in found] == ["5.0", "1.5", ""]
    assert [row["fd_pixels: standard error"] for row in found] == ["1.0", "0.5", ""]
    assert [row["fd_pixels: error over"] for row in found] == ["training seeds", "training seeds", ""]
    assert [row["fd_pixels: runs"] for row in found] == ["2", "2", "0"]
    assert [row["fd_pixels: best"] for row in found] == ["no", "yes", "no"]
    assert [row["held-out loss"] for row in found] == ["1.05", "3.05", ""]
    assert {row["held-out loss: best"] for row in found} == {""}  # losses of other schedules are not ranked


def test_the_table_of_runs_has_each_with_its_command(sweep):
    found = rows(sweep / "report" / "runs.csv")
    assert [row["run"] for row in found] == [*"01234567"]
    states = ["finished"] * 4 + ["failed", "unfinished", "failed", "not begun"]
    assert [row["state"] for row in found] == states
    assert [row["fd_pixels"] for row in found] == ["4.0", "6.0", "1.0", "2.0", "", "", "", ""]
    assert found[0]["command"] == "python -m src.train experiment=smoke schedule.beta_end=0.01 seed=0"
    assert found[7]["command"] == "python -m src.train schedule.beta_end=2 seed=1"
    assert found[4]["reason"] == "training has diverged; lower optimizer.lr <&>"
    assert found[5]["reason"] == "ended without a word after step 15 of 20: killed, or the machine went down"
    assert (found[0]["images_per_second"], found[0]["peak_memory_bytes"]) == ("32.0", "2000000000")
    assert found[5]["wall_seconds"] == ""


def test_the_page_says_what_it_must(sweep):
    said = text(sweep / "report" / "report.html")
    assert "8 runs, 3 settings, 2 seeds: 4 finished, 2 failed, 1 unfinished and 1 not begun" in said
    assert "fd_pixels is lowest, of the 2 settings that have one, with beta_end = 0.02: 1.5 ± 0.5 (2 seeds)." in said
    assert "Next comes beta_end = 0.01 with 5.0 ± 1.0 (2 seeds). They differ by 3.5 ± 1.1, 3.1 standard errors." in said
    assert "schedule.beta_end 0.01, 0.02, 0.5" in said
    assert "5: the last line of metrics.csv is torn, and left out." in said
    assert "held-out loss and held-out loss (raw): the runs differ in schedule" in said
    assert "training has diverged; lower optimizer.lr <&>" in said
    assert "Samples (top) above the training images nearest to them 2: evaluation/a/neighbours.png" in said
    assert "python -m src.train experiment=smoke schedule.beta_end=0.02 seed=1" in said


def test_the_page_stands_alone(sweep):
    """Whatever an element could fetch is in the page; the libraries' own texts may name addresses."""
    page = (sweep / "report" / "report.html").read_text()
    assert "default-src 'none'" in page
    assert page.count("</script") == 3
    elements = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    sections = {f"#{name}" for name in re.findall(r'<section id="(\w+)"', elements)}
    links = re.findall(r'(?:src|href)="([^"]*)"', elements)
    assert {link for link in links if not link.startswith("data:")} == sections
    assert len(sections) == 10


def test_every_chart_is_a_picture_too(sweep):
    page = (sweep / "report" / "report.html").read_text()
    charts = set(re.findall(r'data-chart="([^"]+)"', page))
    figures = {path.stem for path in (sweep / "report" / "figures").iterdir()}
    assert charts == figures
    assert {"score_fd_pixels", "train_images", "train_time", "held_out_images", "loss_by_level"} <= charts
    assert {"schedule_alpha_bar", "schedule_log_snr"} <= charts
    for path in (sweep / "report" / "figures").iterdir():
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 3


def test_grids_are_the_samples_pixel_by_pixel(sweep):
    """Enlarged by training, they are the pixels themselves in the page."""
    (found,) = grids([read_run(sweep / "1", "1")], notes := [])
    assert notes == []
    assert list(found.frames) == [10, 20]
    assert found.frames[20].size == (37, 37)  # 4 images of 8, and 5 gaps of 1
    page = (sweep / "report" / "report.html").read_text()
    assert found.frames[20].uri in page


def test_grids_that_are_too_large_lose_times_and_rows_and_say_so(sweep, monkeypatch, tmp_path):
    run = fabricate.run(tmp_path / "run")
    generator = np.random.default_rng(0)
    for step in range(1, 41):
        pixels = generator.integers(0, 255, (37, 37), np.uint8)
        Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(run / "samples" / f"step={step}.png")
    monkeypatch.setattr("src.reporting.pictures.GRIDS", 7000)
    (found,) = grids([read_run(run, "run")], notes := [])
    assert found.frames[40].size == (37, 19)
    assert next(iter(found.frames)) == 1
    assert list(found.frames)[-1] == 40
    assert 6 <= len(found.frames) < 12
    assert notes[0] == f"Of 40 times of training the grids of {len(found.frames)} are in this page, evenly chosen"
    assert notes[1].startswith("Of each grid the upper rows alone")


def test_a_damaged_grid_is_left_out_and_said(tmp_path):
    run = fabricate.run(tmp_path / "run")
    whole = (run / "samples" / "step=10.png").read_bytes()
    (run / "samples" / "step=10.png").write_bytes(whole[: len(whole) // 2])
    (found,) = grids([read_run(run, "run")], notes := [])
    assert list(found.frames) == [20]
    assert notes[0].startswith("run: samples/step=10.png cannot be read")


def test_a_second_report_replaces_the_first(command, sweep, tmp_path):
    """Figures that it does not have go; of one run there is no score against anything."""
    shutil.copytree(sweep / "0", tmp_path / "run")
    out = tmp_path / "run" / "report"
    (out / "figures").mkdir(parents=True)
    for name in ("score_old.png", "mine.png"):
        (out / "figures" / name).write_bytes(b"")
    (out / ".figures").write_text("score_old")
    outcome = command("report", f"run={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert "1 run: 1 finished" in outcome.out
    assert str(out / "report.html") in outcome.out
    assert not (out / "figures" / "score_old.png").exists()
    assert (out / "figures" / "mine.png").exists()  # of somebody else
    assert rows(out / "report.csv")[0]["fd_pixels"] == "4.0"
    assert "Next comes" not in text(out / "report.html")


def test_a_run_as_training_leaves_it(smoke_run, tmp_path):
    """The numbers are those of summary.json, and the loss by level, wall time and schedule are found."""
    report.make([smoke_run], [], tmp_path)
    summary = json.loads((smoke_run / "summary.json").read_text())
    (row,) = rows(tmp_path / "report.csv")
    assert float(row["held-out loss"]) == summary["metrics"]["val/loss_ema"]
    (run,) = rows(tmp_path / "runs.csv")
    assert float(run["wall_seconds"]) == summary["wall_seconds"]
    assert run["state"] == "finished"
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"train_time", "held_out_time", "loss_by_level", "held_out_by_quarter", "schedule_log_snr"} <= figures
    assert "estimated" not in text(tmp_path / "report.html")


def test_columns_whose_titles_begin_alike_have_a_chart_each(tmp_path):
    long = {"sampler": "a sampler with many settings", "eta": 0.0, "spacing": "trailing", "clip": True}
    for i in range(2):
        run = fabricate.run(tmp_path / "sweep" / str(i), **{"schedule.beta_end": 0.01 + i / 100})
        for weights, steps in (("ema", 10), ("raw", 20)):
            changed = {**long, "steps": steps, "weights": weights}
            fabricate.evaluation(run, weights, {"fd_pixels": 1.0 + i}, **changed)
    report.make([tmp_path / "sweep"], [], _made(tmp_path / "out"))
    charts = [path.stem for path in (tmp_path / "out" / "figures").glob("score_fd_pixels*")]
    assert len(charts) == 2
    assert all(len(name) <= len("score_") + LONGEST for name in charts)


def test_thirty_runs_make_a_small_page(tmp_path):
    """With 64 images of noise in each of 3 grids, which no compression makes small: 20 MB of pixels."""
    source = fabricate.run(tmp_path / "source", **{"data.image_size": 32, "data.channels": 3})
    generator = np.random.default_rng(0)
    for step in (10, 15, 20):
        pixels = generator.integers(0, 255, (274, 274, 3), np.uint8)
        Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(
            source / "samples" / f"step={step}.png", compress_level=1
        )
    sweep = tmp_path / "sweep"
    for i in range(30):
        (sweep / str(i)).mkdir(parents=True)
        for path in source.iterdir():
            (sweep / str(i) / path.name).symlink_to(path)
        (sweep / str(i) / "config.yaml").unlink()
        config = (source / "config.yaml").read_text().replace("beta_end: 0.02", f"beta_end: {0.01 + i // 3 * 0.005}")
        config = re.sub(r"(?m)^( *)seed: 0$", rf"\g<1>seed: {i % 3}", config)
        (sweep / str(i) / "config.yaml").write_text(config)
    report.make([sweep], [], _made(tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").stat().st_size < 25 * MEGABYTE
    found = rows(tmp_path / "out" / "report.csv")
    assert len(found) == 10
    assert {row["runs"] for row in found} == {"3"}
    assert "Of each grid the upper rows alone" in text(tmp_path / "out" / "report.html")


def test_other_images_versions_and_devices_are_said(tmp_path):
    fabricate.run(tmp_path / "a")
    other = fabricate.run(tmp_path / "b", **{"data.image_size": 16})
    fabricate.summary(other, 0, 0.5, device="a GPU", git_commit="b" * 40, versions={"torch": "2.14"})
    report.make([tmp_path], [], _made(tmp_path / "out"))
    said = text(tmp_path / "out" / "report.html")
    assert "The runs were trained with different code: aaaaaaaa (a); bbbbbbbb (b)." in said
    assert "different versions of torch: 2.15.0 (a); 2.14 (b)." in said
    assert "Speeds and times do not compare" in said
    assert "The runs are of different images: Digits, 1 x 8 (a); Digits, 1 x 16 (b)." in said
    assert "starts from the same noise" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name what to report on: sweep=<multirun folder> or run=<run folder>"),
        (["sweep={tmp}/nowhere"], "nowhere is not a folder"),
        (["run={tmp}/file"], "file is not a folder"),
        (["sweep={tmp}/empty"], "empty holds no run; runs lie in outputs/<experiment>/"),
        (["sweep={tmp}/refused"], "none of the 1 job in {tmp}/refused has a run: beta_end=2"),
        (["run={tmp}/unreadable"], "no run can be read: unreadable is left out: {tmp}/unreadable/config.yaml cannot"),
        (["run=[{tmp}/run,{tmp}/nowhere]"], "nowhere is not a folder"),
        (["run={tmp}/run", "evaluations={tmp}/file"], "file cannot be read"),
        (["run={tmp}/run", "evaluations={tmp}/other.json"], "is no metrics.json of src.evaluate"),
        (["runs={tmp}/run"], "did you mean run?"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_a_sentence(command, tmp_path, arguments, said):
    fabricate.run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "unreadable" / "config.yaml").write_text("a: [")
    (tmp_path / "refused" / "failed").mkdir(parents=True)
    (tmp_path / "refused" / "failed" / "0.json").write_text(json.dumps({"overrides": [], "error": "beta_end=2 is bad"}))
    before = sorted(tmp_path.rglob("*"))
    outcome = command("report", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert outcome.code == 2
    assert said.format(tmp=tmp_path) in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_are_found_below_a_folder_and_named_shortly(tmp_path):
    for name in ("sweep/10", "sweep/9", "sweep/deep/1", "other/9"):
        fabricate.run(tmp_path / name)
    found = find_runs(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["other/9", "sweep/9", "sweep/10", "sweep/deep/1"]
    assert short_names(found) == ["other/9", "sweep/9", "sweep/10", "deep/1"]
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_how_a_run_ended_is_told(tmp_path):
    ends = {
        "finished": lambda run: None,
        "unfinished": lambda run: (run / "summary.json").unlink(),
        "stopped": lambda run: (run / "error.txt").write_text("stopped by SIGTERM after step 7\n"),
        "failed": lambda run: (run / "error.txt").write_text("RuntimeError: out of memory\n"),
        "pruned": lambda run: (run / "pruned.txt").write_text("pruned at step 10: too far behind\n"),
    }
    for state, end in ends.items():
        run = fabricate.run(
            tmp_path / state, **{"trainer.max_steps": 20 if state in ("finished", "unfinished") else 40}
        )
        end(run)
        found = read_run(run, state)
        assert found.state == state
        assert (found.summary == {}) == (state != "finished")
    torn = fabricate.run(tmp_path / "torn")
    (torn / "summary.json").write_text('{"steps": 2')
    assert read_run(torn, "torn").state == "unfinished"
    assert read_run(torn, "torn").notes == ("summary.json cannot be read, and the run counts as unfinished",)


def test_a_run_that_goes_on_is_running(tmp_path):
    from src.lock import Lock

    run = fabricate.run(tmp_path / "run", finished=False)
    lock = Lock(run)
    assert read_run(run, "run").state == "running"
    assert read_run(run, "run").reason == "still training, after step 20 of 20"
    lock.release()
    (run / ".lock").write_text("process 1 on elsewhere\n")  # as a killed process leaves it
    assert read_run(run, "run").state == "unfinished"
    Lock(run).release()  # looking has left nothing locked
