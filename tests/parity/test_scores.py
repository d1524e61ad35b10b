"""Features and scores against torch-fidelity and torchmetrics, on the same images and the same weights.

Inception's weights are torch-fidelity's own where torch.hub's folder has them, and random ones elsewhere: both are as
good for the comparison. Its network takes 30 ms an image, so the images are few.
"""

from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from src.evaluation import inception
from src.evaluation.extraction import extract
from src.evaluation.features import Module
from src.evaluation.frechet import frechet_distance
from src.evaluation.inception import FILE, Inception
from src.evaluation.neighbours import members
from src.evaluation.reference import reference
from src.evaluation.scores import Frechet, InceptionScore, Kernel, PrecisionRecall, Spatial

N = 16
REL = 1e-4


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The real file, or one in its format with weights that keep the variance, so that layers are told apart."""
    real = Path(torch.hub.get_dir(), "checkpoints", FILE)
    if real.exists():
        return real
    state = inception._network().state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if name.endswith("bn.weight"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.2, generator=generator)
        elif value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def images():
    """Noise, and noise of coarser grain that is brighter: (N, 3, 32, 32) uint8 both."""
    generator = torch.Generator().manual_seed(1)
    fine = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=generator)
    coarse = torch.randint(60, 256, (N, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return fine, coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture(scope="module")
def ours(weights, images, tmp_path_factory):
    """Their features, and the reference of the second."""
    features = Inception(str(weights))
    return extract(features, [images[0]], N), reference(features, images[1], tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def theirs(weights):
    """torch-fidelity's network, and what the layer of sFID held last."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    held = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: held.append(output))
    return net, held


def test_inceptions_layers_are_torch_fidelitys(theirs, images, ours):
    net, held = theirs
    features, logits = net(images[0][:8])
    for own, other in ((ours[0].features, features), (ours[0].logits, logits), (ours[0].spatial, held[-1][:, :7])):
        other = other.flatten(1)
        assert own[:8].shape == other.shape
        assert float(other.std()) > 0.01  # not all the same
        torch.testing.assert_close(own[:8], other, rtol=1e-4, atol=1e-4 * float(other.std()))


def test_a_grey_image_is_the_same_in_three_channels(theirs, weights, images):
    grey = images[0][:2, :1]
    own = Inception(str(weights), spatial=False)(grey)
    assert own.spatial is None
    expected = theirs[0](grey.repeat(1, 3, 1, 1))[0]
    torch.testing.assert_close(own.features, expected, rtol=1e-4, atol=1e-5)


def test_scores_are_torch_fidelitys_from_images_on(weights, images, ours):
    """Inception Score, KID, precision and recall by `calculate_metrics`, of the same files."""
    from torch_fidelity import calculate_metrics

    generated, real = ours
    expected = calculate_metrics(
        input1=Images(images[0]),
        input2=Images(images[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cuda=False,
        isc=True,
        kid=True,
        prc=True,
        isc_splits=3,
        kid_subsets=2,
        kid_subset_size=N,
        samples_shuffle=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    score = InceptionScore(splits=3)(generated, real)["is_inception"]
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=REL)
    assert score.details["deviation_of_splits"] == pytest.approx(expected["inception_score_std"], rel=1e-3)
    score = Kernel(subsets=2, subset_size=N)(generated, real)["kd_inception"]
    assert score.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=REL)
    scores = PrecisionRecall()(generated, real)
    assert scores["precision_inception"].value == pytest.approx(expected["precision"], rel=REL)
    assert scores["recall_inception"].value == pytest.approx(expected["recall"], rel=REL)


def fidelitys_frechet(x, y):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = (fid_features_to_statistics(v) for v in (x, y))
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_the_frechet_distance_is_torch_fidelitys(images, ours):
    """Over some of Inception's features, as its root of a 2048x2048 matrix takes half a minute; pool and spatial."""
    generated, real = ours
    for x, y in ((generated.features, real.features), (generated.features[:, 100:], real.features[:, 100:])):
        x, y = x[:, :12].contiguous(), y[:, :12].contiguous()
        assert frechet_distance(x, y) == pytest.approx(fidelitys_frechet(x, y), rel=REL)
    spatial = generated.spatial[:, ::180].contiguous()
    other = spatial.flip(1) * 1.1 + 0.1
    assert frechet_distance(spatial, other) == pytest.approx(fidelitys_frechet(spatial, other), rel=REL)


def test_scores_over_all_of_inceptions_features_are_refused_for_so_few_images(ours):
    """And the means' part of what force=true makes of them is what it should be."""
    generated, real = ours
    with pytest.raises(ValueError, match="fd_inception has 2048 dimensions and there are 16 samples"):
        Frechet()(generated, real)
    with pytest.raises(ValueError, match="sfid_inception has 2023 dimensions and there are 16 samples"):
        Spatial()(generated, real)
    assert real.floor is None
    assert real.spatial.mean.shape == (2023,)
    expected = (generated.features.double().mean(0) - real.features.double().mean(0)).square().sum()
    from src.evaluation.frechet import moments

    assert float((moments(generated.features).mean - real.moments.mean).square().sum()) == pytest.approx(
        float(expected), rel=1e-10
    )


def sets(n, d):
    """Two correlated sets of features that are not far from each other, float32."""
    generator = torch.Generator().manual_seed(d)
    mix = torch.randn(d, d, generator=generator) / d**0.5
    x = torch.randn(n, d, generator=generator) @ mix
    return x, torch.randn(n, d, generator=generator) @ (mix + 0.1 * torch.randn(d, d, generator=generator) / d**0.5)


@pytest.mark.parametrize(("n", "d"), [(300, 64), (500, 192)])
def test_frechet_and_neighbours_of_larger_sets(n, d):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    x, y = sets(n, d)
    assert frechet_distance(x, y) == pytest.approx(fidelitys_frechet(x, y), rel=REL)
    found = members(x, y, 3, 5)
    expected = calculate_precision_recall_full(x, y, neighborhood=3)
    assert 0.05 < min(expected) < max(expected) < 0.95
    assert (float(found.precision.mean()), float(found.recall.mean())) == pytest.approx(expected, rel=REL)


def test_kid_agrees_within_its_error(tmp_path):
    """Subsets are drawn otherwise: the two values scatter about the same."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = sets(2000, 16)

    class Given(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)

    bytes_of = [(v * 20 + 128).clamp(0, 255).to(torch.uint8).view(-1, 1, 4, 4) for v in (x, y + 0.5)]
    features = Module(Given(), name="given")
    generated = extract(features, [bytes_of[0]], 2000)
    real = reference(features, bytes_of[1], tmp_path)
    score = Kernel(subsets=50, subset_size=200)(generated, real)["kd_given"]
    expected = kid_features_to_metric(
        generated.features, real.features, kid_subsets=50, kid_subset_size=200, verbose=False
    )
    assert score.standard_error < 0.2 * score.value
    assert score.value == pytest.approx(expected["kernel_inception_distance_mean"], abs=3 * score.standard_error)
    assert score.details["deviation_of_subsets"] == pytest.approx(expected["kernel_inception_distance_std"], rel=0.4)


def test_the_frechet_distance_is_torchmetrics(tmp_path):
    """With the same module as its feature, on bytes."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pooled(torch.nn.Module):
        num_features = 48

        def forward(self, images):
            return torch.nn.functional.avg_pool2d(images.float(), 2).flatten(1) / 255

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(low, 256, (200, 3, 8, 8), dtype=torch.uint8, generator=generator) for low in (0, 20))
    metric = FrechetInceptionDistance(feature=Pooled(), input_img_size=(3, 8, 8))
    metric.update(x, real=False)
    metric.update(y, real=True)
    features = Module(Pooled(), name="pooled", high=255.0)
    score = Frechet()(extract(features, [x], 200), reference(features, y, tmp_path))["fd_pooled"]
    assert score.value == pytest.approx(float(metric.compute()), rel=REL)
