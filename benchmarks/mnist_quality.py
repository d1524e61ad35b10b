"""Are samples digits? A classifier trained on the real MNIST looks at them, and at the real test set beside them.

  confidence        the largest softmax probability of each image: mean, median, share above 0.9 and 0.99
  classes           how many images are taken for each digit
  Fréchet distance  over the classifier's 128 penultimate features, to 10,000 training images: of the samples, of two
                    disjoint sets of other training images, as many as the samples, and of as many images of noise.
                    It depends on the number of images and on this classifier: compare within one table only.

`--samples` is a samples.npz of src.sample: arr_0, (N, 28, 28, 1) uint8, or (N, 32, 32, 1) padded by 2.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.timing import arguments, write_report
from src.data.sources import MNIST, ImageSet
from src.evaluation.frechet import frechet_distance

REFERENCE = 10_000  # training images that all are compared with
BATCH = 128


class Classifier(nn.Module):
    """Three convolutions and 128 features, (B, 1, 28, 28) uint8 to (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 128), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        return self.features((images.float() / 255 - 0.1307) / 0.3081)  # MNIST's mean and standard deviation


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder that holds MNIST/raw")
    parser.add_argument("--samples", required=True, type=Path, metavar="FILE", help="samples.npz")
    parser.add_argument("--epochs", type=int, default=4, help="of the classifier")
    parser.add_argument("--train-images", type=int, default=60_000, help="of the classifier; fewer for a trial")
    args = parser.parse_args()
    samples = load_samples(args.samples)
    train, test = MNIST().load(Path(args.data))
    assert test is not None

    torch.manual_seed(0)
    order = torch.randperm(len(train))
    classifier = fit(train[order[: args.train_images]], args.epochs)
    accuracy = float((probabilities(classifier, test.images).argmax(1) == test.labels).float().mean())
    print(f"\nthe classifier's accuracy on the test set: {accuracy:.2%}\n")

    sets = {"real test set": test.images, "samples": samples}
    confidence = {name: confidence_of(probabilities(classifier, images)) for name, images in sets.items()}
    confident = [
        (name, f"{len(sets[name]):,}", *(f"{v:.4f}" for v in row.values())) for name, row in confidence.items()
    ]
    classes = {name: classes_of(probabilities(classifier, images)) for name, images in sets.items()}

    reference, others = order[:REFERENCE], order[REFERENCE:]
    n = min(len(samples), len(others) // 2)
    sets = {
        "samples": samples[:n],
        "real images": train.images[others[:n]],
        "other real images": train.images[others[n : 2 * n]],
        "noise": torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8),
    }
    features = embed(classifier, train.images[reference])
    distances = {name: frechet_distance(embed(classifier, images), features) for name, images in sets.items()}
    tables = [
        ("confidence of the classifier", ("", "images", *next(iter(confidence.values()))), confident),
        (
            "the classes that it sees",
            ("", *map(str, range(10))),
            [(name, *(f"{share:.1%}" for share in shares)) for name, shares in classes.items()],
        ),
        (f"{n:,} images", ("", "Fréchet distance"), [(name, f"{d:.3f}") for name, d in distances.items()]),
    ]
    write_report(args, tables, accuracy=accuracy, confidence=confidence, classes=classes, frechet_distance=distances)


def load_samples(path: Path) -> Tensor:
    """(N, 1, 28, 28) uint8."""
    images = np.load(path)["arr_0"]
    if images.dtype != np.uint8 or images.shape[1:] not in ((28, 28, 1), (32, 32, 1)):
        raise SystemExit(f"{path}: arr_0 is {images.dtype} {images.shape}, not uint8 (N, 28, 28, 1) or (N, 32, 32, 1)")
    border = (images.shape[1] - 28) // 2
    return torch.from_numpy(images)[:, border : border + 28, border : border + 28].permute(0, 3, 1, 2).contiguous()


def fit(data: ImageSet, epochs: int) -> Classifier:
    """Trains with Adam and one cycle of the learning rate (Smith & Topin 2018)."""
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters())
    batches = len(data) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=epochs * batches)
    with tqdm(total=epochs * batches, desc="classifier", unit="step", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(data)).split(BATCH)[:batches]:
                part = data[index]
                loss = F.cross_entropy(net(part.images), part.labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
    return net.eval()


@torch.no_grad()
def probabilities(net: Classifier, images: Tensor) -> Tensor:
    """(N, 10)."""
    return torch.cat([net(part).softmax(1) for part in images.split(1000)])


@torch.no_grad()
def embed(net: Classifier, images: Tensor) -> Tensor:
    """(N, 128)."""
    return torch.cat([net.embed(part) for part in images.split(1000)])


def confidence_of(probabilities: Tensor) -> dict[str, float]:
    top = probabilities.max(1).values
    above = {f"above {bound}": float((top > bound).float().mean()) for bound in (0.9, 0.99)}
    return {"mean": float(top.mean()), "median": float(top.median()), **above}


def classes_of(probabilities: Tensor) -> list[float]:
    """The share of images taken for each digit."""
    return (probabilities.argmax(1).bincount(minlength=10) / len(probabilities)).tolist()


if __name__ == "__main__":
    main()
