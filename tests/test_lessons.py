"""The lessons: what is computed, what is said of it, and one of them from its experiment to its page."""

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.lessons import facts, page, pictures, run
from benchmarks.lessons.compare import against, difference, estimate, threshold, verdict
from src.diffusion.schedules import Linear

LEVELS = [25, 525, 975]


def setting(values, fd, eps=(0.5, 0.02, 0.004), loss=0.1, **others):
    """Three seeds around what is given."""
    spread = (0.99, 1.0, 1.01)
    return {
        "values": values,
        "seeds": [0, 1, 2],
        "fd": [fd * s for s in spread],
        "loss": [loss * s for s in spread],
        "eps": [[e * s for e in eps] for s in (1.0, 1.01, 1.02)],
        **others,
    }


def results(name, settings, levels=LEVELS):
    return {
        "name": name,
        "folder": "outputs/multirun/lessons/x",
        "jobs": 3 * len(settings),
        "seconds": 90.0,
        "stamp": {
            "date": "2026-01-02T03:04:05+00:00",
            "device": "cpu: two cores",
            "versions": {"python": "3.11", "torch": "2.0", "lightning": "2.6"},
        },
        "levels": levels,
        "facts": {"floor": 0.0714, "guess": [2.0, 50.0, 146.0]},
        "settings": settings,
    }


def schedules(gentle=1.0, middle=0.3, right=0.2, aggressive=0.5):
    distances = {"0.0005": gentle, "0.005": middle, "0.02": right, "0.2": aggressive}
    known = {"alpha": 0.28, "wasted": 0.45, "missed": 0.386}
    return results("schedule", [setting({"schedule.beta_end": b}, d, facts=known) for b, d in distances.items()])


def test_means_errors_and_differences_are_those_of_the_textbook():
    assert estimate([1.0, 2.0, 4.0])[:2] == pytest.approx((7 / 3, math.sqrt(7 / 9)))
    assert estimate([3.0]) == (3.0, None, 1)
    d = difference([1.1, 2.3, 4.1], [1.0, 2.0, 4.0])
    assert d[:2] == pytest.approx((0.5 / 3, math.sqrt(0.02 * 2 / 3) / math.sqrt(3)))
    assert threshold(3) == pytest.approx(4.3027, abs=1e-4)
    assert threshold(5) == pytest.approx(2.7764, abs=1e-4)


@pytest.mark.parametrize(("a", "clear"), [((1.2, 1.3, 1.25), True), ((1.0, 1.5, 1.25), False)])
def test_a_difference_counts_when_it_is_4_3_standard_errors(a, clear):
    """0.25 both times; the errors are 0.0289 and 0.144, so 8.7 and 1.7 of them."""
    d = difference(a, (1.0, 1.0, 1.0))
    assert d.clear is clear
    said = against("x", "y", d)
    if clear:
        assert said == "x is 0.250 farther from the real digits than y (8.7 standard errors)"
    else:
        assert said == "between x and y there is no difference that three seeds can show (+0.250 ± 0.144)"
    assert verdict(d, "yes", "no") == ("As told: yes" if clear else "Not shown here: yes")
    assert verdict(difference((1.0, 1.0, 1.0), a), "yes", "no").endswith("no" if clear else "yes")


def test_one_seed_claims_nothing():
    d = difference((5.0,), (1.0,))
    assert not d.clear
    assert "one seed cannot tell" in against("x", "y", d)


def test_the_page_states_the_numbers_and_the_settings_of_a_lesson():
    text = page.page([schedules()])
    assert "| beta_end=0.005 | 0.300 ± 0.002 | +0.100 ± 0.001 | 0.28 | 45% | 38.6% |" in text
    assert "| beta_end=0.02 | 0.200 ± 0.001 |  | 0.28 | 45% | 38.6% |" in text
    assert "have 0.071" in text
    assert "(12 runs, 1.5 minutes with their scores)" in text
    assert "Measured on 2026-01-02 on cpu: two cores; python 3.11, torch 2.0, lightning 2.6. 2 minutes" in text
    assert "![The schedule: samples from the same noise](images/lessons/schedule.png)" in text


def test_verdicts_on_schedules_flip_with_the_numbers():
    as_told = page.page([schedules()])
    assert "**As told:** `beta_end=0.0005` is too gentle." in as_told
    assert "**As told:** `beta_end=0.2` is too aggressive." in as_told
    assert "**As told:** nothing that was tried is better than `beta_end=0.02`." in as_told

    otherwise = page.page([schedules(gentle=0.1, middle=0.05, aggressive=0.2005)])
    assert "**Otherwise than told:** `beta_end=0.0005` is better than `beta_end=0.02`." in otherwise
    assert "**Otherwise than told:** `beta_end=0.02`, chosen for larger images in colour, is not" in otherwise

    noisy = schedules()
    noisy["settings"][0]["fd"] = [0.1, 0.2, 2.0]
    assert "**Not shown here:** `beta_end=0.0005` is too gentle." in page.page([noisy])


def skips(low, high):
    """low, high: how many times as large the error without skips is at the first and at the last level."""
    whole = setting({"model.skip_connections": "True", "optimizer.lr": "0.001"}, 0.2)
    slow = setting({"model.skip_connections": "True", "optimizer.lr": "0.0003"}, 0.4)
    cut = setting({"model.skip_connections": "False", "optimizer.lr": "0.0003"}, 9.0, (0.5 * low, 0.8, 0.004 * high))
    cut["eps"] = [[e * s for e, s in zip(errors, (1.0, 1.0, 1.01), strict=True)] for errors in cut["eps"]]
    cut["eps"][0][0] *= 1.001
    dead = setting({"model.skip_connections": "False", "optimizer.lr": "0.001"}, 12.0, (1.0, 1.0, 1.0), loss=1.0)
    return results("skips", [whole, slow, dead, cut])


def test_verdicts_on_skips_flip_with_the_numbers():
    told, otherwise = page.page([skips(8, 2)]), page.page([skips(2, 200)])
    assert "**As told:** each at its better learning rate, `no skips, lr 0.0003` is 8.800 farther" in told
    assert "`no skips, lr 0.001` learned nothing: its loss is 1.00" in told
    assert "The learning rate alone: `skips, lr 0.0003` is 0.200 farther" in told
    assert "**As told:** without skips the error in the noise is 8.0 times as large at t=25, and 2.0 times" in told
    assert "**Otherwise than told:** without skips the error in the noise is 2.0 times" in otherwise
    assert "202.0 times at t=975. Where nearly all is noise" in otherwise


def test_what_is_said_of_the_time_embedding():
    told = setting({"model.time_conditioning": "True"}, 0.2)
    deaf = setting({"model.time_conditioning": "False"}, 1.2, (0.55, 0.03, 0.016), loss=0.11)
    text = page.page([results("time", [told, deaf])])
    assert "**As told:** `not told t` is 1.000 farther" in text
    assert "`not told t` has 1.10 times the loss of `told t`, and 6.0 times its distance: what is little" in text
    assert "It loses most at t=975, where its error in the noise is 4.0 times that of `told t`." in text
    assert "so many steps: 2 at t=25, 2 at t=25, 50 at t=525 (root" in text
    better = page.page([results("time", [told, {**deaf, "fd": [0.1, 0.101, 0.102]}])])
    assert "**Otherwise than told:** `not told t` is 0.099 nearer" in better


def steps(ddim_10=0.3):
    distances = {("ddpm", 10): 0.5, ("ddpm", 1000): 0.2, ("ddim", 10): ddim_10, ("ddim", 50): 0.199}
    distances |= {("dpmpp_2m", 10): 0.25, ("dpmpp_2m", 50): 0.21}
    return results("steps", [setting({"sampler": s, "steps": n}, d) for (s, n), d in distances.items()], [])


def test_what_is_said_of_samplers():
    text = page.page([steps()])
    assert "**As told:** `ddim, 10 steps` is 0.200 nearer to the real digits than `ddpm, 10 steps`" in text
    assert "50 steps are enough for `ddim`" in text
    assert "`ddpm` is farther than `ddpm, 1000 steps` with every number of steps tried" in text
    assert "| ddim | 0.300 ± 0.002 | 0.199 ± 0.001 |  |" in text
    assert "**Otherwise than told:** `ddim, 10 steps` is 0.400 farther" in page.page([steps(0.9)])


def test_what_is_said_of_objectives():
    distances = {"eps": 0.2, "x0": 0.3, "v": 0.25, "flow": 0.22}
    made = results("objective", [setting({"objective": o}, d) for o, d in distances.items()])
    x0 = made["settings"][1]
    x0["eps"] = [[2 * a * s, b, c / 2 * s] for (a, b, c), s in zip(x0["eps"], (1.0, 1.001, 1.002), strict=True)]
    text = page.page([made])
    assert "**As told:** at little noise, t=25, `x0` makes 2.00 times the error of `eps`." in text
    assert "**As told:** at much noise, t=975, `x0` makes 0.50 times the error of `eps`." in text
    assert "**As told:** the choice matters: `x0` is 0.100 farther from the real digits than `eps`" in text
    same = deepcopy(made)
    same["settings"][1]["eps"] = [[a / 4, b, 8 * c] for a, b, c in x0["eps"]]
    text = page.page([same])
    assert "**Otherwise than told:** at little noise, t=25, `x0` makes 0.50" in text
    assert "**Otherwise than told:** at much noise, t=975, `x0` makes 4.00" in text


def test_t_is_told_by_the_noise_and_the_better_the_more_pixels_there_are():
    """From D pixels of noise alone sigma is known to 1 / sqrt(2 D) of itself, and t as it follows from sigma."""
    schedule, t = Linear(1000, 1e-4, 0.02), 100
    slope = float(schedule.sigma[t + 50] - schedule.sigma[t - 50]) / 100
    for side in (8, 32):
        blank = torch.zeros(1, 1, side, side)
        expected = float(schedule.sigma[t]) / math.sqrt(2 * side**2) / slope
        assert facts.guess_of_time(schedule, blank, [t])[0] == pytest.approx(expected, rel=0.25)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Lessons in seconds: a tiny network, few samples."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(facts, "CANDIDATES", 20)
    monkeypatch.setattr(facts, "IMAGES", 4)
    monkeypatch.setattr(run, "SAMPLES", 66)
    monkeypatch.setattr(run, "STEPS", (2, 3))
    monkeypatch.setattr(run, "LONG", ("ddpm", 4))
    monkeypatch.setattr(run, "SHOWN_STEPS", (3,))
    network = ["model.hidden_dims=8", "model.time_emb_dim=8", "sampler.steps=2", "callbacks.samples.num_samples=4"]
    return [
        *network,
        "callbacks.samples.sampler.steps=2",
        "callbacks.score.num_samples=65",
        "callbacks.score.sampler.steps=2",
        "trainer.max_steps=2",
        "hydra/launcher=basic",
    ]


def test_a_lesson_from_its_experiment_to_its_page(small, monkeypatch, tmp_path, capfd):
    overrides = [*small, "seed=3"]
    made = run.learn("time", overrides, root=tmp_path / "runs")
    assert [s["values"] for s in made["settings"]] == [{"model.time_conditioning": v} for v in ("True", "False")]
    assert [s["seeds"] for s in made["settings"]] == [[3], [3]]
    assert made["jobs"] == 2
    folder = Path(made["folder"])
    for job, of_job in zip("01", made["settings"], strict=True):
        scores = json.loads((folder / job / "lesson" / "metrics.json").read_text())
        assert of_job["fd"] == [scores["fd_pixels"]["value"]]
        assert of_job["eps"] == [[level["eps"] for level in scores["loss"]["levels"]]]
        assert len(of_job["eps"][0]) == 20
        assert scores["fd_pixels"]["protocol"]["seed"] == 3

    pictures.draw(made, tmp_path / "time.png")
    assert Image.open(tmp_path / "time.png").width == 810
    page.write(tmp_path / "lessons.md", [made])
    assert "over one seed" in (tmp_path / "lessons.md").read_text()

    capfd.readouterr()
    state = json.loads((folder / "lesson.json").read_text())
    (folder / "lesson.json").write_text(json.dumps({**state, "results": None}))
    assert run.learn("time", overrides, root=tmp_path / "runs")["settings"] == made["settings"]
    again = capfd.readouterr().out
    assert again.count("has trained 2 steps already") == 2
    assert "src.evaluate" not in again
    monkeypatch.setattr(run, "call", None)
    assert run.learn("time", overrides, root=tmp_path / "runs")["settings"] == made["settings"]


def test_the_lesson_on_steps(small, tmp_path):
    made = run.learn("steps", [*small, "seed=0"], root=tmp_path)
    asked = [(s, n) for s in run.SAMPLERS for n in (2, 3)] + [("ddpm", 4)]
    assert [(s["values"]["sampler"], s["values"]["steps"]) for s in made["settings"]] == asked
    assert [s["values"] for s in made["settings"] if "samples" in s] == [
        *({"sampler": s, "steps": 3} for s in run.SAMPLERS),
        {"sampler": "ddpm", "steps": 4},
    ]
    pictures.draw(made, tmp_path / "steps.png")
    assert made["facts"]["floor"] == pytest.approx(0.0748, abs=1e-3)
