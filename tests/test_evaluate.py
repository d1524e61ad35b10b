"""python -m src.evaluate: what it writes, what its numbers depend on, and what it refuses."""

import hashlib
import json
import math
import shutil

import pytest
import torch
from torch import nn

from src.build import build
from src.data.loader import normalize
from src.data.sources import ImageSet
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.likelihood import dequantized
from src.diffusion.objectives import X0
from src.diffusion.oracle import Mixture
from src.diffusion.schedules import Linear
from src.diffusion.weightings import Constant
from src.evaluation.likelihood import Ode, Subject, Vlb, mean_and_error
from src.runs import Run

FAST = ["scores=[vlb,ode]", "num_images=8", "vlb.num_times=10", "ode.rtol=1e-2", "ode.atol=1e-2"]


@pytest.fixture
def score(command, smoke_run, tmp_path):
    """Scores the smoke run, or another, and returns metrics.json; arguments as on the command line."""

    def run(*arguments: str, of=smoke_run) -> dict:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        outcome = command("evaluate", f"run={of}", f"out={out}", *arguments)
        assert outcome.code == 0, outcome.err
        return json.loads((out / "metrics.json").read_text())

    return run


def trained(command, folder, *arguments: str):
    outcome = command("train", "experiment=smoke", "trainer.max_steps=1", f"hydra.run.dir={folder}", *arguments)
    assert outcome.code == 0, outcome.err
    return folder


def test_the_file_holds_the_scores_and_what_they_depend_on(command, smoke_run, tmp_path):
    outcome = command("evaluate", f"run={smoke_run}", f"out={tmp_path / 'out'}", *FAST, "seed=3", "weights=raw")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics.keys() == {"vlb", "ode", "stamp"}

    vlb, ode, stamp = metrics["vlb"], metrics["ode"], metrics["stamp"]
    assert len(vlb["terms"]) == len(vlb["times"]) == vlb["num_times"] == 10
    assert vlb["value"] == pytest.approx(vlb["prior"] + 100 * sum(vlb["terms"]))
    assert (vlb["variance"], vlb["clip"]) == ("posterior", True)
    assert (ode["rtol"], ode["atol"], ode["num_probes"]) == (0.01, 0.01, 1)
    assert len(ode["evaluations"]) == 1
    assert ode["evaluations"][0] > 6
    for part in (vlb, ode):
        assert part["standard_error"] > 0
        assert part["seconds"] > 0

    checkpoint = smoke_run / "checkpoints" / "last.ckpt"
    assert stamp["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert torch.__version__.startswith(stamp["versions"]["torch"])
    for part in (vlb, ode):
        protocol = part["protocol"]
        assert (protocol["weights"], protocol["seed"], protocol["precision"]) == ("raw", 3, "32-true")
        assert protocol["images"]["number"] == 8
        assert protocol["images"]["split"] == "validation"

    assert f"{'vlb':24} {vlb['value']:.4f} +- {vlb['standard_error']:.4f}" in outcome.out
    assert f"{'ode':24} {ode['value']:.4f} +- {ode['standard_error']:.4f}" in outcome.out
    assert str(tmp_path / "out" / "metrics.json") in outcome.out
    assert "vlb 100%" in outcome.err
    assert "8.0/8" in outcome.err


def test_all_terms_are_the_default(command, score, tmp_path):
    run = trained(command, tmp_path / "run", "schedule.num_timesteps=40")
    vlb = score("scores=[vlb]", "num_images=2", of=run)["vlb"]
    assert vlb["times"] == list(range(40))
    assert vlb["value"] == pytest.approx(vlb["prior"] + sum(vlb["terms"]))
    assert vlb["num_times"] is None


def test_a_score_depends_on_the_seed_and_not_on_the_batch(score):
    """The solver's steps do depend on the batch, within its tolerance."""
    fine = ["scores=[vlb,ode]", "num_images=5", "vlb.num_times=10", "ode.rtol=1e-4", "ode.atol=1e-4"]
    whole, parts, other = score(*fine), score(*fine, "batch_size=2"), score(*fine, "seed=1")
    assert same(parts["vlb"]) == same(whole["vlb"])
    assert parts["ode"]["value"] == pytest.approx(whole["ode"]["value"], rel=1e-3)
    assert len(parts["ode"]["evaluations"]) == 3
    for name in ("vlb", "ode"):
        assert other[name]["value"] != whole[name]["value"]


def same(part: dict) -> dict:
    """A score without what no two runs share."""
    return {key: value for key, value in part.items() if key != "seconds"}


def test_the_likelihood_of_a_gaussian_model_is_exact_from_end_to_end(command, score, tmp_path):
    """The oracle of one training image with a Gaussian around it, scored through files and command line."""
    oracle = ["model=oracle", "model.num_images=1", "model.std=0.7"]
    run = trained(command, tmp_path / "run", *oracle)
    bits = score("scores=[ode]", "num_images=16", of=run)["ode"]["value"]
    data = build(Run(run).config["data"], "data")
    data.setup()
    v, _ = Ode().draws(0, range(16), (1, 8, 8))
    density = Mixture(normalize(data.train.images[:1]).double(), 0.7)
    y = dequantized(data.val.images[:16], v)
    _, cleanest, _ = Linear().levels(2, "linspace")
    log_p = density.log_density(cleanest.alpha * y, cleanest).mean() / 64 + math.log(cleanest.alpha)
    assert bits == pytest.approx(-log_p.item() / math.log(2) + math.log2(127.5), abs=5e-3)


def test_a_model_with_a_learned_variance_is_bounded_with_it(command, score, tmp_path):
    run = trained(command, tmp_path / "run", "model.learned_variance=true", "loss=hybrid")
    metrics = score(*FAST, "scores=[vlb]", of=run)["vlb"]
    fixed = score(*FAST, "scores=[vlb]", "vlb.variance=beta", of=run)["vlb"]
    assert (metrics["variance"], fixed["variance"]) == ("learned", "beta")
    assert metrics["value"] != fixed["value"]


def test_a_continuous_schedule_has_an_ode_and_no_chain(command, score, tmp_path):
    run = trained(command, tmp_path / "run", "schedule=flow", "objective=flow")
    assert score(*FAST, "scores=[ode]", of=run).keys() == {"ode", "stamp"}
    outcome = command("evaluate", f"run={run}", f"out={tmp_path / 'refused'}", "scores=[ode,vlb]")
    assert outcome.code == 2
    assert "vlb: the variational bound is that of a chain of discrete steps, which Flow is not" in outcome.err
    assert "take scores=[ode]" in outcome.err
    assert not (tmp_path / "refused").exists()


class Spy(nn.Module):
    """Notes the labels, and the last guesses, that it is given."""

    num_classes = 10
    self_conditioning = True

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))
        self.labels: set[int] = set()
        self.last: list[float] = []

    def forward(self, x, t, y):
        self.labels |= set(y.tolist())
        self.last.append(float(x[:, 1:].detach().abs().max()))
        return 0.5 * x[:, :1] + 0.1 * y.view(-1, 1, 1, 1) + self.nothing


def test_bits_are_those_of_the_levels_that_images_have():
    """The same images in 16 bits as in 8 have 8 more, as the density hardly bends over a bin; floats have no levels."""
    eight = torch.randint(1, 255, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    deep = (eight * 257).to(torch.uint16)
    diffusion = GaussianDiffusion(Linear(10, 0.01, 0.3), X0(), Constant(), Uniform())
    found = {}
    for images in (eight.to(torch.uint8), deep, normalize(deep)):
        subject = Subject(diffusion, Spy(), ImageSet(images, torch.zeros(6, dtype=torch.int64)), 3, 0)
        for name, part in {"vlb": Vlb(), "ode": Ode(1e-3, 1e-3, None)}.items():
            if images.dtype == torch.float32:
                with pytest.raises(ValueError, match="these images are floats; leave this score out"):
                    part.refuse(subject)
                continue
            part.refuse(subject)
            score = part(subject)[name]
            found[name, score.details["levels"]] = score.value
    assert set(found) == {(name, levels) for name in ("vlb", "ode") for levels in (256, 65536)}
    for name in ("vlb", "ode"):
        assert found[name, 65536] - found[name, 256] == pytest.approx(math.log2(65535 / 255), abs=0.05)


def test_images_bring_their_labels_and_a_self_conditioned_network_is_asked_afresh():
    """The bound and the density are those of a function of x_t alone."""
    net = Spy()
    images = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    diffusion = GaussianDiffusion(Linear(10, 0.01, 0.3), X0(), Constant(), Uniform())
    subject = Subject(diffusion, net, ImageSet(images, torch.tensor([3, 1, 4, 1, 5])), 2, 0)
    parts = {"vlb": Vlb(), "ode": Ode(1e-3, 1e-3, None)}
    both = [part(subject)[name].value for name, part in parts.items()]
    assert net.labels == {1, 3, 4, 5}
    assert set(net.last) == {0.0}
    other = Subject(diffusion, net, ImageSet(images, torch.tensor([3, 1, 4, 1, 9])), 2, 0)
    assert all(part(other)[name].value != b for (name, part), b in zip(parts.items(), both, strict=True))


def test_mean_and_standard_error():
    values = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    score = mean_and_error(values, {"terms": [1]})
    assert (score.value, score.better, score.details) == (3.0, "lower", {"terms": [1]})
    assert score.standard_error == pytest.approx(math.sqrt(10 / 3 / 4))
    assert mean_and_error(values[:1], {}).standard_error is None


REFUSED = [
    ([], "run has no value; set it with run=..."),
    (["run={tmp}/nowhere"], "neither a run folder nor a .ckpt file"),
    (["run={run}", "scores=[vlb,fid]"], "scores=['vlb', 'fid'] is not a list, each one of fd, kd,"),
    (["run={run}", "scores=[]"], "scores=[] names nothing to compute"),
    (["run={run}", "num_images=65"], "num_images=65 is not between 1 and the 64 images that this run validates on"),
    (["run={run}", "num_images=0"], "num_images=0 is not between 1 and"),
    (["run={run}", "batch_size=0"], "batch_size=0 must be at least 1"),
    (["run={run}", "precision=16-true"], "precision=16-true is not one of 32-true, bf16-mixed"),
    (["run={run}", "vlb.num_times=1001"], "vlb: num_times=1001 is not between 1 and num_timesteps=1000"),
    (["run={run}", "vlb.num_times=0"], "vlb: num_times=0 must be at least 1, or null for all"),
    (["run={run}", "vlb.variance=learned"], "vlb: variance=learned needs a network that learns it"),
    (["run={run}", "vlb.variance=small"], "vlb.variance=small is not one of auto, posterior, beta, learned"),
    (["run={run}", "ode.rtol=0"], "ode: rtol=0 and atol=1e-05 must be positive"),
    (["run={run}", "ode.num_probes=0"], "ode: num_probes=0 must be at least 1, or null for the exact trace"),
    (["run={run}", "ode.probes=2"], "there is no setting ode.probes; did you mean ode.num_probes?"),
    (["run={run}", "device=cuda"], "asks for a GPU and this machine has none"),
]


def test_few_images_are_enough_where_nobody_asks_for_more(command, score, tmp_path):
    run = trained(command, tmp_path / "run", "data.val_images=5", "callbacks.samples.num_samples=1")
    found = score("scores=[loss,colour]", "num_samples=2", "sampler.steps=2", of=run)
    assert found["loss"]["protocol"]["images"]["number"] == 5
    outcome = command("evaluate", f"run={run}", f"out={tmp_path}/more", "scores=[loss]", "num_images=6")
    assert outcome.code == 2
    assert "num_images=6 is not between 1 and the 5 images" in outcome.err


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_evaluate_refuses(command, tmp_path, monkeypatch, smoke_run, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out"
    outcome = command("evaluate", f"out={out}", *[a.format(tmp=tmp_path, run=smoke_run) for a in arguments])
    assert outcome.code == 2
    assert sentence in outcome.err
    assert outcome.err.count("error: ") == 1
    assert not out.exists()


@pytest.mark.parametrize(("name", "sentence"), [("vlb", "NaN or infinity"), ("ode", "NaN or infinity")])
def test_broken_weights_do_not_become_numbers(command, smoke_run, tmp_path, name, sentence):
    run = shutil.copytree(smoke_run, tmp_path / "copy")
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["ema"].values())).fill_(float("nan"))
    torch.save(checkpoint, path)
    outcome = command("evaluate", f"run={run}", f"out={tmp_path / 'out'}", *FAST, f"scores=[{name}]")
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_needs_no_run(command):
    outcome = command("evaluate", "--help")
    assert outcome.code == 0
    assert outcome.out.count("python -m src.evaluate run=") >= 3
