"""The classifier that scores: trained by the same loop, read as features, and no diffusion model."""

import json

import pytest
import torch

from src.data.sources import Digits
from src.errors import UserError
from src.evaluation.classifier import Classifier
from src.evaluation.extraction import extract
from src.evaluation.reference import reference
from src.evaluation.scores import Frechet, InceptionScore
from src.evaluation.weights import digest
from src.models.classifier import Classifier as Network
from src.runs import Run
from tests.helpers import rows

SHORT = ("experiment=features_digits", "trainer=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=5")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished experiment=features_digits, of 150 steps in the place of 400."""
    import importlib
    import sys

    folder = tmp_path_factory.mktemp("classifier") / "run"
    argv, sys.argv = sys.argv, ["src.train", *SHORT, "trainer.max_steps=150", f"hydra.run.dir={folder}"]
    try:
        importlib.import_module("src.train").main()
    finally:
        sys.argv = argv
    return folder


@pytest.fixture(scope="module")
def digits():
    return Digits().load(None)[0]


def test_it_reads_digits_and_says_so(run):
    """In summary.json and metrics.csv; loss and accuracy are those of the weights in the checkpoint."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["val/accuracy_ema"] >= 0.97
    assert summary["name"] == "features_digits"
    assert summary["flops_per_image"] > 1e6
    validated = [row for row in rows(run) if row["val/accuracy_ema"]]
    assert len(validated) == 2
    assert float(validated[-1]["val/accuracy_ema"]) == summary["metrics"]["val/accuracy_ema"]
    assert not (run / "samples").exists()
    from src.build import build

    data = build(Run(run).config["data"], "data")
    data.setup()
    net = Run(run).load_net("ema")
    with torch.no_grad():
        logits = net(data.val.images.float() / 127.5 - 1)
    assert float((logits.argmax(1) == data.val.labels).float().mean()) == summary["metrics"]["val/accuracy_ema"]
    loss = torch.nn.functional.cross_entropy(logits, data.val.labels)
    assert float(loss) == pytest.approx(summary["metrics"]["val/loss_ema"], rel=1e-4)


def test_its_features_are_the_layer_before_the_logits(run, digits, tmp_path):
    features = Classifier(str(run))
    assert features.stamp()["weights_sha256"] is None
    x = digits.images[:600]
    found = extract(features, [x], 600)
    net = Run(run).load_net("ema")
    assert features.sizes((1, 8, 8)) == (128, 10, None)
    assert features.stamp()["weights_sha256"] == digest(net.state_dict())
    assert Classifier(str(run), weights="raw").stamp()["weights"] == "raw"
    torch.testing.assert_close(found.logits, net.head(found.features).detach(), rtol=1e-4, atol=1e-4)
    own = net(x[:16].float() / 127.5 - 1).detach()
    torch.testing.assert_close(found.logits[:16], own, rtol=1e-4, atol=1e-4)
    of = reference(features, digits.images, tmp_path)
    real, wrong = found, extract(features, [x.flip(2)], 600)  # upside down
    scores = [Frechet()(e, of)["fd_classifier"].value for e in (real, wrong)]
    assert scores[0] < scores[1] / 5
    assert 9 < InceptionScore()(real, of)["is_classifier"].value <= 10


def test_it_refuses_other_images_and_other_runs(run, smoke_run):
    with pytest.raises(ValueError, match="trained on images of 8x8 with 1 channel and these are 28x28 with 3 channels"):
        Classifier(str(run)).check((3, 28, 28))
    with pytest.raises(UserError, match="is no classifier but smoke; train one with"):
        Classifier(str(smoke_run)).load()
    with pytest.raises(UserError, match="weights=power_050 is not one of ema, raw"):
        Classifier(str(run), weights="power_050").load()


@pytest.mark.parametrize("name", ["sample", "edit", "evaluate", "preview"])
def test_it_makes_no_images(command, run, tmp_path, name):
    """One sentence, exit code 2, nothing written."""
    of = {
        "preview": ["experiment=features_digits", f"hydra.run.dir={tmp_path / 'out'}"],
        "edit": ["verb=interpolate", "seeds=[0,1]"],
    }
    given = of.get(name, [])
    if name != "preview":
        given = [f"run={run}", f"out={tmp_path / 'out'}", *given]
    outcome = command(name, *given)
    assert outcome.code == 2, outcome.err
    assert "features_digits trains a classifier, which makes no images" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["schedule=cosine"], "schedule=cosine is of diffusion models, and task=classify trains a classifier"),
        (["label_dropout=0.5"], "label_dropout=0.5 is of diffusion models"),
        (
            ["model=unet_tiny"],
            "task=classify trains model=classifier, and model is UNet; use experiment=features_mnist",
        ),
        (["model.num_classes=5"], "model.num_classes=5 is less than data.num_classes=10"),
        (["model.base_channels=12"], "base_channels=12 must be a multiple of 8"),
        (["model.num_classes=1"], "num_classes=1 leaves nothing to tell apart"),
        (["callbacks=scored"], "draws images, which a classifier does not make"),
    ],
)
def test_what_a_classifier_is_not(command, tmp_path, given, sentence):
    outcome = command("train", *SHORT, f"hydra.run.dir={tmp_path / 'run'}", *given)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_classifier_is_no_network_of_diffusion(command, tmp_path):
    outcome = command("train", "experiment=smoke", "model=classifier", f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "model=classifier tells labels and makes no images; use experiment=features_mnist" in outcome.err
    assert not (tmp_path / "run").exists()


def test_it_goes_on_to_the_bit(command, tmp_path):
    """Ten steps and ten more are twenty at once: weights, averages, metrics."""
    settings = (*SHORT, "lr_schedule=constant", "trainer.val_every_n_steps=10", "callbacks.checkpoint.every_n_steps=10")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("train", *settings, "trainer.max_steps=20", f"hydra.run.dir={whole}").code == 0
    assert command("train", *settings, "trainer.max_steps=10", f"hydra.run.dir={parts}").code == 0
    outcome = command("train", f"run={parts}", "trainer.max_steps=20")
    assert outcome.code == 0, outcome.err
    a, b = (Run(folder).load_checkpoint() for folder in (whole, parts))
    for part in ("state_dict", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    without = ("images_per_second", "system/", "wall")
    assert rows(whole, without) == rows(parts, without)


def test_the_network_takes_any_size_and_each_image_alone():
    """Catches a norm over the batch: an image's features are its own."""
    net = Network(3, 7, base_channels=16, num_levels=3, num_features=20).eval()
    for size in (5, 8, 28):
        x = torch.randn(4, 3, size, size + 1)
        assert net(x).shape == (4, 7)
        assert net.embed(x).shape == (4, 20)
        torch.testing.assert_close(net.train()(x)[1:2], net.eval()(x[1:2]), rtol=1e-4, atol=1e-5)
