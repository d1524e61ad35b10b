"""python -m src.evaluate on samples: scores, protocols, sweeps, and samples that were drawn elsewhere."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from src.build import build
from src.evaluation.frechet import distance, moments
from src.evaluation.sweep import _cells
from src.evaluation.sweep_picture import pareto
from src.runs import Run

FEW = ["num_samples=70", "sampler=ddim", "sampler.steps=3"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run(smoke_run, tmp_path):
    """A copy, which nothing was scored of."""
    return shutil.copytree(smoke_run, tmp_path / "run")


@pytest.fixture
def score(command, run, tmp_path):
    def scored(*arguments: str) -> dict:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        outcome = command("evaluate", f"run={run}", f"out={out}", *arguments)
        assert outcome.code == 0, outcome.err
        return json.loads((out / "metrics.json").read_text())

    return scored


def value(entry: dict) -> dict:
    return {key: part for key, part in entry.items() if key != "seconds"}


def real(run):
    data = build(Run(run).config["data"], "data")
    data.setup()
    return data


def test_all_that_apply_is_the_default_and_lies_in_the_run(command, run):
    outcome = command("evaluate", f"run={run}", *FEW, "num_images=2", "vlb.num_times=2", "ode.rtol=0.1", "ode.atol=0.1")
    assert outcome.code == 0, outcome.err
    (path,) = (run / "evaluation").glob("*/metrics.json")
    metrics = json.loads(path.read_text())
    over = {f"{name}_pixels" for name in ("fd", "precision", "recall", "density", "coverage")}
    pictures = {"memorised_pixels", "nearest_ratio_pixels", "colour_drift_ema", "colour_drift_raw"}
    assert metrics.keys() == over | pictures | {"loss", "gap", "vlb", "ode", "stamp"}
    for name in ("kd", "inception_score", "sfid", "accuracy"):
        assert f"without {name}: " in outcome.out
    assert {"memorisation.png", "neighbours.png"} <= {file.name for file in path.parent.iterdir()}


def test_a_score_is_that_of_the_samples_and_brings_all_it_depends_on(command, score, run, tmp_path):
    metrics = score(*FEW, "scores=[fd]", "seed=3")
    outcome = command("sample", f"run={run}", *FEW, "seed=3", f"out={tmp_path / 'samples'}")
    assert outcome.code == 0, outcome.err
    images = torch.from_numpy(np.load(tmp_path / "samples" / "samples.npz")["arr_0"])
    data = real(run)
    expected = distance(*(moments(x.flatten(1).double() / 255) for x in (images, data.train.images)))
    assert metrics["fd_pixels"]["value"] == pytest.approx(expected.value, rel=1e-9)

    protocol = metrics["fd_pixels"]["protocol"]
    plain = {"num_samples": 70, "steps": 3, "evaluations": 3, "weights": "ema", "seed": 3, "precision": "32-true"}
    assert plain.items() <= protocol.items()
    assert protocol["sampler"]["_target_"] == "src.diffusion.samplers.DDIM"
    assert protocol["features"]["name"] == "pixels"
    assert protocol["reference"]["number"] == len(data.train)
    assert protocol["reference"]["split"] == "train"
    assert len(protocol["reference"]["sha256"]) == 64

    # the same samples in the place of drawn ones, and drawn ones that are there already
    elsewhere = score("scores=[fd]", f"samples={tmp_path / 'samples' / 'samples.npz'}")
    assert elsewhere["fd_pixels"]["value"] == metrics["fd_pixels"]["value"]
    assert len(elsewhere["fd_pixels"]["protocol"]["samples_sha256"]) == 64
    again = score(*FEW, "scores=[fd]", "seed=3", "batch_size=7")
    assert value(again["fd_pixels"]) == value(metrics["fd_pixels"])


def test_scores_do_not_depend_on_the_number_of_processes(score, run):
    """To the bit; the images whose steps of the ODE are chosen together are those of a batch, whoever computes it."""
    coarse = ["vlb.num_times=5", "ode.rtol=0.1", "ode.atol=0.1"]
    settings = [*FEW, "scores=[fd,colour,loss,vlb,ode]", "num_images=12", "batch_size=5", *coarse]
    one = score(*settings)
    shutil.rmtree(run / "evaluation")
    two = score(*settings, "devices=2")
    assert len(one["ode"]["evaluations"]) == 3
    assert {name: value(entry) for name, entry in one.items()} == {name: value(entry) for name, entry in two.items()}


def test_a_sweep_shares_noise_and_counts_evaluations(command, run, tmp_path):
    out = tmp_path / "sweep"
    sweep = ["sweep.samplers=[ddim,heun]", "sweep.steps=[2,3]", "scores=[fd,prdc]", "num_samples=70"]
    outcome = command("evaluate", f"run={run}", f"out={out}", *sweep)
    assert outcome.code == 0, outcome.err
    with (out / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    asked = [(row["sampler"], int(row["steps"]), int(row["evaluations"])) for row in rows]
    assert asked == [("ddim", 2, 2), ("ddim", 3, 3), ("heun", 2, 3), ("heun", 3, 5)]
    metrics = json.loads((out / "metrics.json").read_text())
    single = tmp_path / "single"
    outcome = command("evaluate", f"run={run}", f"out={single}", *FEW, "scores=[fd]")
    expected = json.loads((single / "metrics.json").read_text())["fd_pixels"]
    assert float(rows[1]["fd_pixels"]) == expected["value"]
    assert metrics["fd_pixels ddim 3"]["protocol"] == expected["protocol"]
    assert {path.name for path in out.iterdir()} == {"sweep.csv", "sweep.png", "metrics.json"}


def test_what_was_given_of_guidance_goes_with_its_scales():
    given = {"_target_": "a.Guidance", "scale": 1.5, "rescale": 0.7}
    sweep = {"samplers": None, "steps": [2, 3], "guidance": [1, 2]}
    cells = _cells({"sampler": {"steps": 10}, "guidance": given, "sweep": sweep})
    assert [cell["sampler"]["steps"] for cell in cells] == [2, 2, 3, 3]
    assert [cell["guidance"] for cell in cells] == [{**given, "scale": scale} for scale in (1, 2, 1, 2)]


def test_the_front_is_what_no_other_beats():
    rows = [{"evaluations": n, "fd": fd} for n, fd in [(10, 3.0), (5, 4.0), (5, 5.0), (20, 3.0), (20, 2.0), (40, 2.5)]]
    assert pareto(rows, "fd") == [rows[1], rows[0], rows[4]]
    assert pareto(rows, "fd", higher=True) == [rows[2]]


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


GOOD = np.zeros((70, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"arr_0": GOOD.astype(np.float32)}, "arr_0 is float32; arr_0 must be uint8 (N, 8, 8, 1)"),
        ({"arr_0": GOOD.astype(np.float32) * np.nan}, "arr_0 is float32, with NaN or infinity in it"),
        ({"arr_0": GOOD[..., 0]}, "arr_0 is (70, 8, 8)"),
        ({"arr_0": GOOD[:, :4]}, "arr_0 is (70, 4, 8, 1)"),
        ({"arr_0": GOOD[:0]}, "arr_0 is (0, 8, 8, 1)"),
        ({"images": GOOD}, "holds images and no arr_0"),
        ({"arr_0": GOOD, "arr_1": np.zeros(69, np.int64)}, "arr_1 is int64 (69,)"),
        ({"arr_0": np.array([{}], dtype=object)}, "is damaged or no .npz file"),
    ],
)
def test_samples_that_are_not_what_they_should_be(command, run, tmp_path, arrays, sentence):
    path = saved(tmp_path / "samples.npz", **arrays)
    outcome = command("evaluate", f"run={run}", f"out={tmp_path / 'out'}", "scores=[fd]", f"samples={path}")
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not (tmp_path / "out").exists()


def test_an_array_that_is_no_archive_is_refused(command, run, tmp_path):
    """Catches numpy's own error: an .npy file opens, and is no context."""
    np.save(tmp_path / "samples.npy", GOOD)
    path = tmp_path / "samples.npy"
    outcome = command("evaluate", f"run={run}", f"out={tmp_path / 'out'}", "scores=[fd]", f"samples={path}")
    assert outcome.code == 2
    assert "is damaged or no .npz file" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["samples=nowhere.npz"], "samples=nowhere.npz does not exist"),
        (["num_samples=64"], "fd_pixels has 64 dimensions and there are 64 samples"),
        (["scores=[accuracy]"], "the samples have no labels to find"),
        (["scores=[inception_score]"], "needs logits, which features=pixels do not have"),
        (["scores=[sfid]"], "needs spatial features"),
        (["scores=[kd]", "num_samples=70"], "lower subset_size, or draw more"),
        (["features=inception", "scores=[prdc]", "num_samples=70"], "weights-inception"),
        (["features=pixel"], "there is no option features=pixel; did you mean features=pixels"),
        (["sweep.samplers=[ddim,dim]"], "there is no option sampler=dim; did you mean sampler=ddim"),
        (["sweep.samplers=[ddim,heun]", "sampler.steps=9"], "sampler.steps=9 has no effect on sweep.samplers"),
        (["sweep.steps=[5]", "samples=theirs.npz"], "samples=theirs.npz are drawn already, and a sweep draws its own"),
        (["sweep.steps=5"], "sweep.steps=5 must be a list"),
        (["sweep.steps=[0]"], "sampler"),
        (["sweep.guidance=[2]"], "needs labels to guide towards"),
        (["sweep.steps=[5]", "scores=[fd,loss]"], "leave loss out of scores"),
        (["memorisation.share=2"], "share=2 must lie in (0, 1)"),
        (["loss.num_levels=0"], "num_levels=0 must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_evaluate_refuses(command, run, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    scores = [] if any(a.startswith(("scores", "memo", "loss")) for a in arguments) else ["scores=[fd]"]
    outcome = command("evaluate", f"run={run}", f"out={tmp_path / 'out'}", *scores, *arguments)
    assert outcome.code == 2, outcome.out
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
