"""python -m src.preview: its files, its words, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from src.diffusion.schedules import Cosine, Linear


@pytest.fixture(autouse=True)
def without_pace(monkeypatch):
    """Trains no network for the sentence about its pace, which tests/evaluation/test_cost.py reads."""
    monkeypatch.setattr("src.evaluation.preview.pace", lambda *_: None)


def strict(path):
    """JSON as any reader takes it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_one_png_and_one_json(command, tmp_path):
    outcome = command("preview", "schedule=cosine", f"out={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data.png", "preview.json", "preview.png"]
    assert outcome.out.startswith("Nothing looks wrong: the schedule ends at alpha / sigma = 4.9e-05")
    assert str(tmp_path / "out" / "preview.png") in outcome.out
    content = strict(tmp_path / "out" / "preview.json")
    assert [s["name"] for s in content["sentences"]] == ["nothing_wrong"]
    assert content["sentences"][0]["sentence"] in outcome.out
    levels, rows = content["levels"], np.linspace(0, 999, 101).round().astype(int)
    np.testing.assert_array_equal(levels["t"], rows)
    np.testing.assert_array_equal(levels["alpha"], Cosine().alpha[rows])
    np.testing.assert_array_equal(levels["sigma"], Cosine().sigma[rows])
    np.testing.assert_allclose(levels["log_snr"], 2 * np.log(np.divide(levels["alpha"], levels["sigma"])), atol=1e-12)
    assert content["images"] == {
        "number": 1669,
        "shape": [1, 8, 8],
        "mean": pytest.approx(-0.389, abs=0.002),
        "rms": pytest.approx(0.847, abs=0.002),
        "variance": pytest.approx(0.293, abs=0.002),
    }
    assert all(sum(content["training"][name]) == pytest.approx(1) for name in ("draws", "weighted", "loss"))
    assert len(content["training"]["edges"]) == len(content["training"]["draws"]) + 1
    assert len(content["finite_set"]["u"]) == len(content["finite_set"]["loss"]) == 25
    assert content["config"]["schedule"]["_target_"] == "src.diffusion.schedules.Cosine"


def test_the_picture_has_a_row_for_each_image(command, tmp_path):
    """Images are square, eleven on the 1314 pixels that are as wide as the curves; digits are mostly black."""
    heights, black = [], []
    for rows in (3, 1):
        command("preview", f"out={tmp_path}", f"num_images={rows}", "schedule=cosine")
        picture = np.asarray(Image.open(tmp_path / "preview.png").convert("L"))
        assert picture.shape[1] == 1440
        heights.append(picture.shape[0])
        black.append(((picture[:, 97:215] < 8).mean(1) > 0.3).sum())  # pixel rows, of the first column
    assert heights[0] - heights[1] == pytest.approx(2 * 1314 / 11, abs=8)
    assert black[0] > 2.5 * black[1] > 100


def test_the_default_is_the_default_of_training_and_says_what_is_wrong(command, tmp_path):
    outcome = command("preview", f"out={tmp_path / 'out'}")
    assert outcome.out.startswith("Destroyed too early: ")
    content = strict(tmp_path / "out" / "preview.json")
    assert content["config"]["schedule"]["beta_end"] == 0.02
    targets = [content["config"][part]["_target_"].rpartition(".")[2] for part in ("objective", "weighting", "density")]
    assert targets == ["V", "Constant", "Stratified"]  # of experiment=digits
    first = content["sentences"][0]["numbers"]
    alpha, sigma = (float(v[int(first["from_t"])]) for v in (Linear().alpha, Linear().sigma))
    assert first["from_log_snr"] == pytest.approx(2 * np.log(alpha / sigma), rel=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule=scaled_linear", "weighting=p2"],
        ["schedule=quadratic", "weighting=min_snr", "objective=x0"],
        ["schedule=sigmoid", "density=stratified"],
        ["schedule=laplace", "density=importance"],
        ["schedule=linear", "schedule.zero_terminal_snr=true", "objective=v"],
        ["schedule=karras", "objective=edm", "density=log_normal", "weighting=edm"],
        ["schedule=ve", "objective=eps"],
        ["schedule=flow", "objective=flow", "density=logit_normal"],
        ["schedule=flow", "objective=flow", "weighting=sigmoid"],
        ["schedule.num_timesteps=1"],
        ["schedule.num_timesteps=7"],
    ],
    ids=" ".join,
)
def test_every_schedule_can_be_looked_at(command, tmp_path, arguments):
    outcome = command("preview", f"out={tmp_path / 'out'}", *arguments)
    assert outcome.code == 0, outcome.err
    assert Image.open(tmp_path / "out" / "preview.png").width == 1440
    assert strict(tmp_path / "out" / "preview.json")["sentences"]


def test_the_same_seed_gives_the_same_files(command, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert command("preview", f"out={tmp_path / name}", f"seed={seed}").code == 0
    for file in ("preview.png", "data.png", "preview.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c


def test_a_sweep_makes_a_folder_a_job(command, tmp_path):
    arguments = ["schedule.beta_end=0.002,0.2", f"hydra.sweep.dir={tmp_path}"]
    assert command("preview", "-m", *arguments).code == 0
    names = [strict(tmp_path / job / "preview.json")["sentences"][0]["name"] for job in "01"]
    assert names == ["terminal_snr_too_high", "destroyed_too_early"]


def test_help_names_the_groups_and_three_examples(command):
    outcome = command("preview", "--help")
    assert outcome.code == 0
    assert all(f"{group}: " in outcome.out for group in ("schedule", "objective", "weighting", "density", "data"))
    assert outcome.out.partition("Examples:")[2].count("python -m src.preview") == 3


REFUSED = [
    (["schedule=cosin"], "schedule=cosin; did you mean schedule=cosine"),
    (["schedule.beta_end=1.5"], "schedule: beta_end=1.5 must lie strictly between 0 and 1"),
    (["schedule.beta_endd=0.1"], "did you mean schedule.beta_end"),
    (["schedule.zero_terminal_snr=true", "objective=eps"], "diffusion: Eps does not tell the image at t=999"),
    (["schedule=flow", "objective=eps"], "use objective=v, or a schedule that keeps some signal"),
    (
        ["schedule.zero_terminal_snr=true", "objective=v", "weighting=sigmoid"],
        "diffusion: Sigmoid has no finite weight",
    ),
    (["num_images=0"], "num_images=0 must lie between 1 and 32"),
    (["num_images=33"], "num_images=33 must lie between 1 and 32"),
    (["num_images=2", "data.val_images=1796", "data.batch_size=1"], "num_images=2 is more than the 1 training images"),
    (["num_images=1", "data.val_images=1796", "data.batch_size=1"], "data: the training images are all the same"),
    (["data=mnist", "data.dir={tmp}/nowhere"], "MNIST is not in {tmp}/nowhere"),
    (["data=webdataset"], "data.shards names no shards"),
    (["seed=-1"], "seed=-1 must lie between 0 and"),
    (["shedule=cosine"], "there is no setting shedule; did you mean schedule"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_preview_refuses(command, tmp_path, monkeypatch, arguments, sentence):
    import torchvision.datasets.utils as downloads

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(downloads, "_urlretrieve", no_network)
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    outcome = command("preview", f"out={tmp_path / 'out'}", *arguments)
    assert outcome.code == 2
    assert sentence.format(tmp=tmp_path) in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
