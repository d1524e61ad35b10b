"""What a schedule does to real images, before any training: in numbers, in a picture and in words.

Taken for a Gaussian with the images' mean mu and the eigenvalues lambda_i of their covariance, x0 has closed forms. The
least mean squared error of x0 at the level (alpha, sigma) is

    mmse = mean_i lambda_i sigma^2 / V_i,    V_i = alpha^2 lambda_i + sigma^2

and the least loss w (d / sigma)^2 mmse (see weightings.py). Of all data with this covariance a Gaussian's is the
largest, and that of a finite set of images, which `Mixture` knows, is the least a network can reach on these images: a
network that learns more than the images and more than their covariance lies between the two.

A sampler that starts from s z, where x_t should be, and makes no error from there on, is linear in each
eigendirection: it maps N(alpha mu, V) to N(mu, lambda). It then ends with the variance lambda s^2 / V and misses the
mean by sqrt(lambda / V) alpha mu. Relative to the images' variance, the squared Frechet distance to them is

    miss = sum_i lambda_i ((1 - s / sqrt(V_i))^2 + alpha^2 mu_i^2 / V_i) / sum_i lambda_i
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.build import build, refusals
from src.data.loader import normalize
from src.diffusion.continuous import VarianceExploding
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.levels import TERMINAL_ALPHA, Level, Schedule
from src.diffusion.oracle import Mixture
from src.diffusion.schedules import BetaRange, DiscreteSchedule
from src.errors import UserError
from src.evaluation.cost import Cost, cost
from src.evaluation.pace import pace
from src.files import replacing
from src.pictures import to_uint8
from src.randomness import generator, mix
from src.reporting.text import duration
from src.runs import image_shape, refuse_classifier

COVARIANCE_IMAGES = 5000  # at most, of which the covariance is taken,
COVARIANCE_NUMBERS = 2**27  # and at most so many numbers of them
ORACLE_IMAGES = 2000  # at most, that the finite set consists of
ORACLE_DRAWS = 512  # noisy images a level, for the finite set's loss
ORACLE_LEVELS = 25
DRAWS = 2**20  # of training's noise levels: the share of a bin of 2% is known to 0.7% of itself
BINS = 50
ROWS = 101  # of the curves in preview.json
COLUMNS = 11  # of dissolving images
ORACLE = "src.evaluation.oracle.Oracle"

# What looks wrong.
#
# A step is wasted when sampling could as well have begun after it. MISS = 1% makes this the closed form of an
# experiment: Nichol & Dhariwal 2021 (Fig. 4) leave the first steps of the reverse process out, and on ImageNet 64x64
# can spare up to 20% of the linear schedule. By this measure it wastes 20% on CIFAR-10, 21% on MNIST and 45% on 8x8
# digits, and the cosine that they replaced it with 3%, 3% and 14%. A limit of 30% leaves alone what Ho et al. 2020
# trained CIFAR-10 with, and finds fault with twice its beta_end (44%).
MISS = 0.01
WASTED = 0.30
# At the other end an image is intact while less than 1% of its variance is in doubt; EDM's schedule, which spends most
# there, spends 20% on CIFAR-10, and the linear one 2%.
INTACT_DOUBT = 0.01
INTACT = 0.25
# Ancestral sampling evaluates the network as often as the chain has steps: 1000 times for Ho et al. 2020, 4000 for
# Nichol & Dhariwal 2021.
LONGEST_CHAIN = 4000
# ln alpha of a chain grows with its length: half of Ho et al.'s beta_end would need 1.5 times as many steps to destroy
# enough, a tenth of it 7 times.
GENTLE = 2.5


class Spectrum:
    """Mean and covariance of images, (N, C, H, W), in the covariance's eigendirections.

    Attributes:
        lambdas: (D,) float64, eigenvalues, smallest first. With fewer images than numbers in one, D = C H W, the
            directions that they do not span have 0: the mmse of clean levels is then too small.
        means: (D,) float64, the mean image in these directions; 0 where the eigenvalue is 0, where it does not matter.

    Raises:
        ValueError: when all images are the same.
    """

    def __init__(self, images: Tensor) -> None:
        x = images.double().flatten(1)
        n, D = x.shape
        mean = x.mean(0)
        x = x - mean
        if n > D:
            lambdas, directions = torch.linalg.eigh(x.T @ x / (n - 1))
            means = directions.T @ mean
        else:  # x x^T has the same eigenvalues, other than 0
            lambdas, left = torch.linalg.eigh(x @ x.T / max(1, n - 1))
            means = (left.T @ (x @ mean)) / (lambdas.clamp_min(1e-300) * max(1, n - 1)).sqrt()
        if lambdas[-1] < 1e-12:
            raise ValueError("the training images are all the same; there is nothing that noise could destroy")
        seen, missing = lambdas > 1e-12 * lambdas[-1], max(0, D - n)
        self.lambdas = torch.nn.functional.pad(torch.where(seen, lambdas, 0), (missing, 0))
        self.means = torch.nn.functional.pad(torch.where(seen, means, 0), (missing, 0))
        self.variance = float(self.lambdas.mean())

    def mmse(self, alpha: float, sigma: float) -> float:
        """The least mean squared error of x0 at a level with sigma > 0."""
        return float((self.lambdas * (sigma**2 / (alpha**2 * self.lambdas + sigma**2))).mean())

    def miss(self, alpha: float, sigma: float, noise: float) -> float:
        """How far a sampler ends that starts from noise of this standard deviation at a level, as a share."""
        V = alpha**2 * self.lambdas + sigma**2
        missed = self.lambdas * ((1 - noise / V.sqrt()) ** 2 + (alpha * self.means) ** 2 / V)
        return float(missed.mean()) / self.variance


@dataclass(frozen=True)
class Curves:
    """A schedule's levels, cleanest first, each (T,) float64, or (chain_length,) of a continuous schedule.

    Attributes:
        u: share of the schedule's length, from 0 to 1.
        t: the schedule's own time.
        log_snr: ln(alpha^2 / sigma^2); -inf where alpha is 0.
        mmse: of x0, for Gaussian images.
        known: share of the images' variance that a noisy image tells, 1 - mmse / variance.
        loss: the least loss, for Gaussian images; not finite where the weight is not.
        wasted, intact: bool, see above.
    """

    u: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    mmse: Tensor
    known: Tensor
    loss: Tensor
    wasted: Tensor
    intact: Tensor


@dataclass(frozen=True)
class Finite:
    """The least loss of the finite set, at some rows of the curves.

    Attributes:
        rows: their numbers.
        loss, standard_error: of its estimate.
    """

    rows: list[int]
    loss: list[float]
    standard_error: list[float]


@dataclass(frozen=True)
class Training:
    """Where training spends itself: shares in each of `BINS` equal parts of the schedule, each (BINS,), sum 1.

    Attributes:
        draws: of the images, as the density draws them.
        weighted: of w: draws that count as much as they weigh in the error of F, which has about unit variance.
        loss: of the least loss, w (d / sigma)^2 mmse: what is left to a trained network.
        wasted: shares of draws and of w at levels that are wasted.
        intact: the same at levels where an image is intact.
    """

    draws: Tensor
    weighted: Tensor
    loss: Tensor
    wasted: tuple[float, float]
    intact: tuple[float, float]


PARTS = ("schedule", "objective", "weighting", "density")


def look(config: dict[str, Any], out: Path) -> None:
    """Writes preview.png, preview.json and data.png into the folder `out`, and prints the sentences.

    Args:
        config: conf/preview.yaml, composed, resolved and checked.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    from src.evaluation import preview_data, preview_data_picture
    from src.evaluation.preview_picture import draw

    if not 1 <= config["num_images"] <= 32:
        raise UserError(f"num_images={config['num_images']} must lie between 1 and 32, the rows of a picture")
    refuse_classifier(config)
    network = config["model"] if config["model"].get("_target_") != ORACLE else None  # which costs what the data is
    batch, shape = config["data"].get("batch_size"), image_shape(config)
    if network is not None and {"channels", "image_size"} <= network.keys():
        sees, has = ("x".join(map(str, s)) for s in (image_shape({"data": network}), shape))
        if sees != has:
            raise UserError(
                f"the network is for images of {sees} (channels x height x width), data has {has}; choose data that fit"
            )
    price = None if network is None else cost(network, shape, batch or 1)
    trainer = build(config["trainer"], "trainer")
    parts = [build(config[part], part) for part in PARTS]
    with refusals("diffusion"):
        diffusion = GaussianDiffusion(*parts)
    data = build(config["data"], "data")
    data.setup("preview")
    if config["num_images"] > len(data.train):
        raise UserError(f"num_images={config['num_images']} is more than the {len(data.train)} training images")
    most = max(2, min(COVARIANCE_IMAGES, COVARIANCE_NUMBERS // math.prod(shape)))
    chosen = torch.randperm(len(data.train), generator=generator(mix(config["seed"], 0), 0))[:most]
    images = normalize(data.train.take(chosen))
    torch.manual_seed(mix(config["seed"], 1))
    with refusals("data"):
        spectrum = Spectrum(images)
    curves = measure(diffusion, spectrum)
    training = spend(diffusion, curves)
    finite = finite_loss(diffusion, images[:ORACLE_IMAGES], curves, generator(mix(config["seed"], 2), 0))
    sentences = words(diffusion, spectrum, curves, training)
    found = preview_data.look_at(data)
    on_images = preview_data.words_on(found, data)

    title = (
        " · ".join(type(part).__name__ for part in (*parts, getattr(data, "source", data)))
        + f" {_size(data.image_shape)}"
    )
    noise = torch.randn(config["num_images"], *data.image_shape, generator=generator(mix(config["seed"], 3), 0))
    strip = dissolve(images[: config["num_images"]], noise, curves)
    described = {
        "config": {key: config[key] for key in (*PARTS, "data", "seed", "num_images")},
        "images": {
            "number": len(data.train),
            "shape": list(data.image_shape),
            "mean": float(images.mean()),
            "rms": float(images.square().mean().sqrt()),
            "variance": spectrum.variance,
        },
        "sentences": sentences,
        "data": {**preview_data.described(found), "sentences": on_images},
        "network": None if price is None else {**price._asdict(), "batch_size": batch},
        **_described(curves, finite, training),
    }
    draw(title, sentences, strip, curves, finite, training, out / "preview.png")
    title = f"{config['choices'].get('data', 'data')} {_size(data.image_shape)}"
    preview_data_picture.draw(
        title, on_images, found, data, preview_data.chosen(data, config["seed"]), out / "data.png"
    )
    with replacing(out / "preview.json") as temporary:
        temporary.write_text(json.dumps(described, indent=2, allow_nan=False) + "\n")
    for sentence in (*sentences, *on_images):
        print(sentence["sentence"])
    if network is not None and price is not None:
        print(_priced(str(network["_target_"]).rpartition(".")[2], price, batch))
        rate = pace(network, shape, batch, trainer)
        if rate is not None:
            print(_paced(rate, batch * trainer.accumulate_grad_batches, trainer))
    for name in ("preview.png", "data.png", "preview.json"):
        print(f"  {out / name}")


def _priced(name: str, price: Cost, batch: int) -> str:
    """What the network costs, in a sentence."""
    return (
        f"Network: {name}, {price.parameters:,} parameters, {price.flops_per_image / 1e9:.3g} GFLOPs an image; a "
        f"training step of {batch} images keeps {price.activation_bytes / 2**30:.3g} GiB of activations in float32."
    )


def _paced(rate: float, batch: int, trainer: Any) -> str:
    """How long training would take, in a sentence."""
    device = f"{trainer.device_type}, {trainer.chosen}"
    return (
        f"At the {rate:,.3g} images/s that one device ({device}) has just made, {trainer.max_steps:,} steps of "
        f"{batch} images take {duration(trainer.max_steps * batch / rate)}."
    )


def measure(diffusion: GaussianDiffusion, spectrum: Spectrum) -> Curves:
    """The curves of a schedule and objective, for Gaussian images."""
    schedule = diffusion.schedule
    alpha, sigma = schedule.table()
    u = torch.linspace(0, 1, len(alpha), dtype=torch.float64)
    t = schedule.time(u)
    levels = list(zip(alpha.tolist(), sigma.tolist(), strict=True))
    mmse = torch.tensor([spectrum.mmse(a, s) for a, s in levels], dtype=torch.float64)
    return Curves(
        u=u,
        t=t.double(),
        alpha=alpha,
        sigma=sigma,
        log_snr=2 * (alpha / sigma).log(),
        mmse=mmse,
        known=(1 - mmse / spectrum.variance).clamp_min(0),
        loss=diffusion.weight(t, alpha, sigma) * on_F(diffusion, alpha, sigma) * mmse,
        wasted=torch.tensor([spectrum.miss(a, s, noise=s) < MISS for a, s in levels]),
        intact=mmse < INTACT_DOUBT * spectrum.variance,
    )


def on_F(diffusion: GaussianDiffusion, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(d / sigma)^2, (B,): squared errors of F for one of x0."""
    return (diffusion.objective.determinant(alpha, sigma) / sigma) ** 2


def spend(diffusion: GaussianDiffusion, curves: Curves) -> Training:
    """Draws noise levels as training does, from torch's global generator, and counts."""
    schedule = diffusion.schedule
    u = diffusion.draw_u(DRAWS, torch.device("cpu"))
    t = schedule.time(u)
    alpha, sigma = schedule.level(t)
    w = diffusion.weight(t, alpha, sigma).double()
    row = (u * len(curves.u)).long().clamp_(max=len(curves.u) - 1)
    loss = w * on_F(diffusion, alpha.double(), sigma.double()) * curves.mmse[row]
    bins = (u * BINS).long().clamp_(max=BINS - 1)

    def shares(values: Tensor) -> Tensor:
        return torch.bincount(bins, values, minlength=BINS) / values.sum().clamp_min(1e-300)

    def within(there: Tensor) -> tuple[float, float]:
        return float(there.double().mean()), float(w[there].sum() / w.sum().clamp_min(1e-300))

    return Training(
        draws=shares(torch.ones_like(w)),
        weighted=shares(w),
        loss=shares(loss),
        wasted=within(curves.wasted[row]),
        intact=within(curves.intact[row]),
    )


def finite_loss(diffusion: GaussianDiffusion, images: Tensor, curves: Curves, generator: torch.Generator) -> Finite:
    """The least loss on these images, (N, C, H, W), as the only ones there are, by Monte Carlo.

    Args:
        generator: of images and noise, which are the same at all levels.
    """
    oracle = Mixture(images.double())
    x0 = images[torch.randint(len(images), (ORACLE_DRAWS,), generator=generator)].double()
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    rows, losses, errors = _spread(len(curves.u), ORACLE_LEVELS), [], []
    for row in rows:
        alpha, sigma = float(curves.alpha[row]), float(curves.sigma[row])
        guess = oracle(alpha * x0 + sigma * noise, Level(0.0, alpha, sigma))
        squared = (guess - x0).square().flatten(1).mean(1)
        factor = float(curves.loss[row] / curves.mmse[row])  # w (d / sigma)^2
        losses.append(factor * float(squared.mean()))
        errors.append(abs(factor) * float(squared.std()) / math.sqrt(ORACLE_DRAWS))
    return Finite(rows, losses, errors)


def words(diffusion: GaussianDiffusion, spectrum: Spectrum, curves: Curves, training: Training) -> list[dict[str, Any]]:
    """What looks wrong, each with a name, a sentence and the numbers behind it; one sentence where nothing does."""
    alpha, sigma = float(curves.alpha[-1]), float(curves.sigma[-1])
    prior = diffusion.schedule.prior_std(Level(float(curves.t[-1]), alpha, sigma))
    ratio, miss = alpha / sigma, spectrum.miss(alpha, sigma, prior)
    wasted, intact = (float(part.double().mean()) for part in (curves.wasted, curves.intact))
    steps = diffusion.schedule.chain_length
    found: list[dict[str, Any]] = []
    if ratio > TERMINAL_ALPHA:
        sentence = (
            f"Terminal SNR too high: the schedule ends at alpha / sigma = {ratio:.3f} and should end below "
            f"{TERMINAL_ALPHA}; sampling will start from the wrong distribution, and even with a perfect network it "
            f"would miss {percent(min(miss, 1.0))} of the images' variance. {_mend_the_end(diffusion.schedule)}."
        )
        numbers = {"alpha_over_sigma": ratio, "limit": TERMINAL_ALPHA, "log_snr": 2 * math.log(ratio), "missed": miss}
        found.append({"name": "terminal_snr_too_high", "sentence": sentence, "numbers": numbers})
    if wasted > WASTED:
        first = int(curves.wasted.int().argmax())
        t, log_snr = float(curves.t[first]), float(curves.log_snr[first])
        draws, weighted = training.wasted
        sentence = (
            f"Destroyed too early: sampling that begins at t={time(t)} (ln SNR {log_snr:.1f}), from noise alone, "
            f"misses less than {percent(MISS)} of the images' variance. The last {percent(wasted)} of the steps are "
            f"wasted (more than {percent(WASTED)}), and with them {percent(draws)} of training's draws and "
            f"{percent(weighted)} of their weight. Lower beta_end or sigma_max, or take a schedule that destroys "
            "later, such as cosine."
        )
        numbers = {"share": wasted, "limit": WASTED, "from_t": t, "from_log_snr": log_snr}
        numbers |= {"share_of_draws": draws, "share_of_weight": weighted, "missed_at_most": MISS}
        found.append({"name": "destroyed_too_early", "sentence": sentence, "numbers": numbers})
    if intact > INTACT:
        last = int(curves.intact.sum()) - 1
        t, log_snr = float(curves.t[last]), float(curves.log_snr[last])
        draws, weighted = training.intact
        sentence = (
            f"Gentle: up to t={time(t)} (ln SNR {log_snr:.1f}) less than {percent(INTACT_DOUBT)} of the images' "
            f"variance is destroyed. Training and sampling will take long, as the first {percent(intact)} of the "
            f"steps do nearly nothing (more than {percent(INTACT)}), and with them {percent(draws)} of training's "
            f"draws and {percent(weighted)} of their weight. Raise beta_start or sigma_min, or take a schedule that "
            "destroys sooner, such as linear."
        )
        numbers = {"share": intact, "limit": INTACT, "to_t": t, "to_log_snr": log_snr}
        numbers |= {"share_of_draws": draws, "share_of_weight": weighted, "destroyed_at_most": INTACT_DOUBT}
        found.append({"name": "gentle", "sentence": sentence, "numbers": numbers})
    needed = math.ceil(steps * math.log(TERMINAL_ALPHA) / math.log(alpha)) if 0 < alpha < 1 else steps
    if needed > GENTLE * steps:
        sentence = (
            f"Gentle: {steps:,} steps of this size leave {alpha:.2f} of the image, and about {needed:,} would be "
            f"needed to leave {TERMINAL_ALPHA}; training and sampling will take long. Raise beta_end, or take a "
            "schedule that destroys sooner, such as cosine."
        )
        numbers = {"steps": steps, "steps_needed": needed, "limit": GENTLE, "alpha": alpha}
        found.append({"name": "gentle", "sentence": sentence, "numbers": numbers})
    if steps > LONGEST_CHAIN:
        sentence = (
            f"Gentle steps: there are {steps:,} of them (more than {LONGEST_CHAIN:,}), and ancestral sampling, which "
            "evaluates the network at each, will take long. Lower num_timesteps and raise the betas by the same "
            "factor, or sample with ddim in few steps."
        )
        numbers = {"steps": steps, "limit": LONGEST_CHAIN}
        found.append({"name": "gentle_steps", "sentence": sentence, "numbers": numbers})
    if found:
        return found
    sentence = (
        f"Nothing looks wrong: the schedule ends at alpha / sigma = {ratio:.2g} (at most {TERMINAL_ALPHA}); of its "
        f"{steps:,} steps (at most {LONGEST_CHAIN:,}) the last {percent(wasted)} are wasted (at most "
        f"{percent(WASTED)}), and the first {percent(intact)} do nearly nothing (at most {percent(INTACT)})."
    )
    numbers = {"alpha_over_sigma": ratio, "missed": miss, "wasted": wasted, "intact": intact, "steps": steps}
    return [{"name": "nothing_wrong", "sentence": sentence, "numbers": numbers}]


def _mend_the_end(schedule: Schedule) -> str:
    """What to do about a schedule that leaves too much of the image at its end."""
    if isinstance(schedule, DiscreteSchedule):
        first = "Raise beta_end or num_timesteps, or set" if isinstance(schedule, BetaRange) else "Set"
        return f"{first} zero_terminal_snr=true (with objective=v), or take schedule=cosine"
    return "Raise sigma_max" if isinstance(schedule, VarianceExploding) else "Take schedule=cosine or flow"


def dissolve(images: Tensor, noise: Tensor, curves: Curves) -> Tensor:
    """x_t of each image with one noise, (N, columns, C, H, W) uint8, at levels that are even in the schedule's length.

    Scaled to alpha^2 + sigma^2 = 1, so that images of the same SNR look the same under every schedule.

    Args:
        images: (N, C, H, W) in [-1, 1].
        noise: (N, C, H, W) standard normal.
    """
    rows = columns(curves)
    alpha, sigma = (v[rows].float().view(-1, 1, 1, 1) for v in (curves.alpha, curves.sigma))
    return to_uint8((alpha * images[:, None] + sigma * noise[:, None]) * (alpha**2 + sigma**2).rsqrt())


def _described(curves: Curves, finite: Finite, training: Training) -> dict[str, Any]:
    """The curves as plain lists; null for what is not finite."""
    rows = _spread(len(curves.u), ROWS)
    names = ("u", "t", "alpha", "sigma", "log_snr", "known", "loss")
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    return {
        "levels": {name: _plain(getattr(curves, name)[rows].tolist()) for name in names},
        "finite_set": {
            "u": curves.u[finite.rows].tolist(),
            "loss": _plain(finite.loss),
            "standard_error": _plain(finite.standard_error),
        },
        "training": {
            "edges": edges.tolist(),
            **{name: getattr(training, name).tolist() for name in ("draws", "weighted", "loss")},
        },
    }


def _plain(values: list[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]


def columns(curves: Curves) -> list[int]:
    """The row of each column of images; a short chain stays at a level for several columns."""
    return [int(v) for v in torch.linspace(0, len(curves.u) - 1, COLUMNS, dtype=torch.float64).round()]


def _spread(n: int, k: int) -> list[int]:
    """At most k of n row numbers, evenly, both ends included."""
    return [int(v) for v in torch.linspace(0, n - 1, min(n, k), dtype=torch.float64).round()]


def percent(share: float) -> str:
    """As a reader wants it: 45%, 0.3%, <0.01%."""
    if share >= 0.01 or share <= 0:
        return f"{share:.0%}"
    return f"{100 * share:.1g}%" if share >= 1e-4 else "<0.01%"


def time(t: float) -> str:
    """A schedule's time: 1,719 or 0.0621."""
    return f"{t:,.0f}" if t >= 100 else f"{t:.3g}"


def _size(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{height}x{width}" if channels == 1 else f"{height}x{width}x{channels}"
