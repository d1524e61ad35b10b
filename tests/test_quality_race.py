"""The race for quality at equal time: its clock, its records, its page, and loops that stop where the clock says."""

import copy
import struct

import numpy as np
import pytest
import torch

from benchmarks.__main__ import write_section
from benchmarks.quality_race import __main__ as command
from benchmarks.quality_race import child, clock, contenders, page, records
from benchmarks.quality_race.entries import (
    DIFFUSERS,
    DIFFUSERS_SAME,
    LUCIDRAINS,
    LUCIDRAINS_SAME,
    OURS,
    TUNED,
    settings_of,
    with_options,
)
from src.errors import UserError

COMMON = {
    "minutes": 10.0,
    "samples": 1000,
    "evaluations": 50,
    "device": "cpu: two cores",
    "versions": {"python": "3.11", "torch": "2.0"},
    "judges": {"first": {"accuracy": 0.99, "sha256": "a"}, "second": {"accuracy": 0.985, "sha256": "b"}},
}
SETTINGS = {OURS: {"samplers": ["unipc"], "model": {"width": 64}}, DIFFUSERS: {"batch": 64, "lr": 1e-3}}


def record(first, second, seed=0, steps=2000, peak=2**30, sampler="ddim", planned=None):
    return {
        "planned_steps": planned or steps,
        "seed": seed,
        "parameters": 2_800_000,
        "batch": 64,
        "steps": steps,
        "images": 64 * steps,
        "seconds": 590.4,
        "peak_bytes": peak,
        "samplers": {sampler: {"seconds": 41.6, "first": first, "second": second}},
        "sampler": sampler,
        "date": f"2026-01-0{seed + 1}T00:00:00+00:00",
    }


def kept(**entries):
    found = records.empty() | {"settings": COMMON, "real": {"first": [1.0, 2.0, 3.0], "second": [2.0, 2.0, 2.0]}}
    for name, of_seeds in entries.items():
        for seed, made in of_seeds.items():
            records.keep(found, name, SETTINGS[name], seed, made)
    return found


# The clock.


class Watch:
    """time.perf_counter that a test sets."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def steps(self, counted, seconds):
        """Steps of so many seconds each, and what the clock said to each."""
        said = []
        for second in seconds:
            self.now += second
            said.append(counted.step())
        return said


@pytest.mark.parametrize(
    ("budget", "pace", "steps"), [(600, 0.3, 1960), (600, 0.25, 2352), (6, 0.7, 8), (6, 5.88, 1), (6, 7.0, 1)]
)
def test_steps_are_planned_for_98_percent_of_the_budget(budget, pace, steps):
    assert clock.planned_steps(budget, pace) == steps


def test_the_clock_starts_at_the_end_of_the_first_step_and_stops_at_the_budget(monkeypatch):
    counted = clock.Clock(budget=3.0)
    assert Watch(monkeypatch).steps(counted, [50, 1, 1, 0.5, 0.5]) == [False] * 4 + [True]
    assert (counted.done, counted.seconds) == (5, 3.0)


def test_the_pace_leaves_out_the_warm_steps_and_the_one_that_starts_it(monkeypatch):
    pace = clock.Pace(seconds=4.0, warm=2)
    assert Watch(monkeypatch).steps(pace, [9, 9, 9, 2, 1, 1]) == [False] * 5 + [True]
    assert pace.seconds_a_step == pytest.approx(4 / 3)


# Options.


def test_options_keep_their_types_and_the_table_stays_as_it_is():
    before = copy.deepcopy(TUNED)
    options = with_options(DIFFUSERS, ["lr=1e-4", "batch=32", "channels=[32,64]", "samplers=[ddim]"])
    assert options == before[DIFFUSERS] | {"lr": 1e-4, "batch": 32, "channels": [32, 64], "samplers": ["ddim"]}
    assert with_options(OURS, ["optimizer.lr=1e-3", "samplers=[ddim,heun]"]) == {
        "samplers": ["ddim", "heun"],
        "overrides": ["optimizer.lr=1e-3"],
    }
    assert before == TUNED


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        (DIFFUSERS, "dim=32", "'dim=32' sets no option of 'diffusers'; give one of batch, lr"),
        (DIFFUSERS, "lr", "'lr' sets no option"),
        (DIFFUSERS, "lr=fast", "'lr=fast' has no value of this option's type; write one such as 0.001"),
        (LUCIDRAINS, "batch=1.5", "'batch=1.5' has no value of this option's type; write one such as 64"),
        (LUCIDRAINS, "mults=2", "'mults=2' has no value of this option's type; write one such as [32,64]"),
        (LUCIDRAINS_SAME, "samplers=[unipc]", "samplers=unipc is none of 'lucidrains, same network'; it has ddim"),
        (OURS, "samplers=[dpmsolver++]", "samplers=dpmsolver++ is none of 'ours'; it has ddim, ddpm"),
    ],
)
def test_options_that_there_are_not_are_refused(name, given, sentence):
    with pytest.raises(UserError) as error:
        with_options(name, [given])
    assert str(error.value).startswith(sentence)


def test_settings_are_those_that_an_entry_depends_on():
    def of(name, *overrides):
        return settings_of(name, with_options(name, []), overrides)

    for override, changed in (
        ("model.base_channels=16", {OURS, DIFFUSERS_SAME, LUCIDRAINS_SAME}),
        ("optimizer.lr=1e-3", {OURS}),
        ("data.batch_size=32", {OURS}),
        ("callbacks.ema.decay=0.99", {OURS}),
    ):
        # what was written on the command line is in the settings of ours by its effect
        assert {name for name in TUNED if of(name) != of(name, override)} == changed
    assert of(DIFFUSERS_SAME)["model"] == of(OURS)["model"]


def test_a_setting_that_training_has_not_is_said_in_a_sentence(capsys, monkeypatch, tmp_path):
    arguments = ["--data", str(tmp_path), "--work", str(tmp_path), "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr("sys.argv", ["quality_race", *arguments, "--ours", "optimiser.lr=1"])
    with pytest.raises(SystemExit) as end:
        command.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: --ours and --try take settings of src.train, and it says:")
    assert "optimiser" in said
    assert said.count("\n") == 1


# Records.


def test_records_are_kept_and_what_is_missing_comes_seed_by_seed(tmp_path):
    path = tmp_path / "race.json"
    assert records.read(path) == records.empty()
    found = kept(ours={0: record(30, 20)})
    records.keep(found, DIFFUSERS, SETTINGS[DIFFUSERS], 1, record(60, 50, seed=1))
    records.write(found, path)
    assert records.read(path) == found
    assert records.missing(found, [OURS, DIFFUSERS], [0, 1]) == [(DIFFUSERS, 0), (OURS, 1)]


def test_records_come_in_the_order_of_their_seeds():
    found = kept(ours={10: record(3, 3, seed=1), 2: record(2, 2, seed=2)})
    assert [made["samplers"]["ddim"]["first"] for made in records.records(found, OURS)] == [2, 3]


def test_the_same_settings_are_no_difference_after_a_round_trip(tmp_path):
    found = kept(ours={0: record(30, 20)})
    records.write(found, tmp_path / "race.json")
    records.check(records.read(tmp_path / "race.json"), COMMON, {OURS: SETTINGS[OURS] | {"samplers": ("unipc",)}})


@pytest.mark.parametrize(
    ("common", "of_ours", "sentence"),
    [
        ({"minutes": 0.1}, {}, "all records were made with minutes=10.0, and now it is 0.1; "),
        (
            {"versions": {"python": "3.11", "torch": "2.1"}},
            {},
            "all records were made with versions.torch=2.0, and now",
        ),
        ({}, {"model": {"width": 32}}, "records of 'ours' were made with model.width=64, and now it is 32; "),
        ({}, {"lr": 1}, "records of 'ours' were made with lr=nothing, and now it is 1; "),
    ],
)
def test_records_of_other_settings_are_refused_by_name(common, of_ours, sentence):
    with pytest.raises(UserError) as error:
        records.check(kept(ours={0: record(30, 20)}), COMMON | common, {OURS: SETTINGS[OURS] | of_ours})
    assert str(error.value).startswith(sentence)


def test_nothing_is_refused_where_no_record_is():
    records.check(kept(), COMMON | {"minutes": 0.1}, {OURS: {}})


def test_redo_throws_away_what_differs_and_nothing_else():
    found = kept(ours={0: record(30, 20)}, diffusers={0: record(60, 50)})
    found["tried"].append({"entry": OURS})
    now = {OURS: SETTINGS[OURS] | {"model": {"width": 32}}, DIFFUSERS: SETTINGS[DIFFUSERS]}
    assert records.without_others(found, COMMON, now)["entries"].keys() == {DIFFUSERS}
    assert records.without_others(found, COMMON, {DIFFUSERS: SETTINGS[DIFFUSERS]})["entries"].keys() == {
        OURS,
        DIFFUSERS,
    }
    others = records.without_others(found, COMMON | {"minutes": 3.0}, {})
    assert others == records.empty() | {"tried": [{"entry": OURS}]}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    for text, sentence in (("{", "is no JSON"), ("[]", "holds no records"), ('{"training": 1}', "holds no records")):
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            records.read(path)


# The page.


def test_the_tables_say_what_is_missing_and_how_far_seeds_are_apart():
    found = kept(
        ours={
            0: record(30, 20, steps=2000),
            1: record(33, 23, seed=1, steps=2003),
            2: record(36, 20, seed=2, steps=2003),
        },
        diffusers={0: record(60.04, 50, peak=2**31, sampler="dpmsolver++", planned=2010)},
    )
    same, own = page.tables(found, [0, 1, 2])
    read = "the classifiers read 99.00% and 98.50% of the test set right"
    assert same[0] == f"same network, 10 minutes of training, 1,000 samples; {read}"
    assert own[0] == (
        "each its own network, 10 minutes of training, 1,000 samples; peak memory of diffusers above ours"
    )
    ours = ["ours", "33.0 (30.0 to 36.0)", "21.0 (20.0 to 23.0)", "2,800,000", "64", "2,002", "128,128", "590", "1.00"]
    assert same[2][0] == own[2][0] == [*ours, "ddim", "42"]
    assert same[2][1] == [DIFFUSERS_SAME, "not run yet", *[""] * 9]
    few = [
        "60.0, 1 of 3 seeds",
        "50.0, 1 of 3 seeds",
        "2,800,000",
        "64",
        "2,000 of 2,010 planned",
        "128,000",
        "590",
        "2.00",
    ]
    assert own[2][1] == ["diffusers", *few, "dpmsolver++", "42"]
    assert own[2][3] == ["real images", "2.00 (1.00 to 3.00)", "2.00 (2.00 to 2.00)", *[""] * 8]
    assert {len(row) for table in (same, own) for row in (table[1], *table[2])} == {11}


def test_trials_are_listed_by_sampler():
    found = kept()
    trial = {"entry": DIFFUSERS, "given": ["lr=1e-3", "batch=32"], "minutes": 3.0, "samples": 500, **record(60, 50)}
    trial["samplers"]["dpmsolver++"] = {"seconds": 1, "first": 59.0, "second": 51.0}
    found["tried"].append(trial)
    ((caption, header, rows),) = page.tables(found, [0])
    assert caption == "tried"
    assert rows == [
        ["diffusers", "lr=1e-3 batch=32", "3", "500", "ddim", "60.0", "50.0", "2,000", "128,000"],
        ["diffusers", "lr=1e-3 batch=32", "3", "500", "dpmsolver++", "59.0", "51.0", "2,000", "128,000"],
    ]
    assert len(header) == 9


def test_the_section_takes_its_place_and_nothing_else(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\n<!-- other -->\nkept\n<!-- /other -->\n")
    page.write(kept(ours={0: record(30, 20)}, diffusers={1: record(60, 50, seed=1)}), [0], path)
    made = path.read_text()
    assert made.startswith("before\n<!-- quality -->\nSame network, 10 minutes of training")
    stamp = "*2026-01-02, cpu: two cores; python 3.11, torch 2.0.*"
    assert made.endswith(f"{stamp}\n<!-- /quality -->\n<!-- other -->\nkept\n<!-- /other -->\n")
    assert "old" not in made
    write_section("quality", page.text(records.empty(), [0]), path)
    assert path.read_text().startswith("before\n<!-- quality -->\nNot measured yet.\n<!-- /quality -->\n<!-- other")


def test_the_picture_has_a_row_an_entry_and_one_of_real_digits(tmp_path):
    from PIL import Image

    found = kept(ours={0: record(30, 20)}, diffusers={1: record(60, 50, seed=1)})  # of which one has seed 0
    folder = tmp_path / "ours" / "seed=0"
    folder.mkdir(parents=True)
    np.savez(folder / "ddim.npz", arr_0=np.full((20, 28, 28, 1), 200, np.uint8))
    real = torch.full((20, 1, 28, 28), 100, dtype=torch.uint8)
    page.draw(found, 0, real, tmp_path, tmp_path / "images" / "race.png")
    picture = np.asarray(Image.open(tmp_path / "images" / "race.png").convert("L")).astype(int)
    middle = picture[:, picture.shape[1] // 2 - 200 : picture.shape[1] // 2 + 200]
    top, bottom = middle[: len(middle) // 2], middle[len(middle) // 2 :]
    assert (top == 200).mean() > 0.9
    assert (bottom == 100).mean() > 0.9


# The loops.


@pytest.fixture
def place(tmp_path):
    """256 images as MNIST's files, and as PNG files."""
    from PIL import Image

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    png = tmp_path / "png"
    png.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (256, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 256, 28, 28) + images.tobytes())
        labels = np.arange(256, dtype=np.uint8) % 10
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 256) + labels.tobytes())
    for i, image in enumerate(images):
        Image.fromarray(image).save(png / f"{i}.png")
    work = tmp_path / "work"
    work.mkdir()
    return contenders.Place(tmp_path, png, work, 0)


class Counted(clock.Clock):
    """Says to stop after so many steps."""

    def __init__(self, last):
        super().__init__(budget=1e9)
        self.last = last

    def step(self):
        super().step()
        return self.done >= self.last


SMALL = {
    OURS: [],
    DIFFUSERS_SAME: ["batch=16"],
    LUCIDRAINS_SAME: ["batch=16"],
    DIFFUSERS: ["batch=16", "channels=[32,32]"],
    LUCIDRAINS: ["batch=16", "dim=8", "mults=[1,2]"],
}
OVERRIDES = ["model.base_channels=32", "data.batch_size=16", "data.val_images=16", "callbacks.samples.num_samples=1"]


@pytest.mark.parametrize("name", TUNED)
def test_a_loop_ends_with_its_steps_or_with_the_clock_and_draws(name, place, monkeypatch):
    if name.startswith(LUCIDRAINS):
        pytest.importorskip("denoising_diffusion_pytorch")
    monkeypatch.setattr(contenders, "EVALUATIONS", 4)
    options = with_options(name, [*SMALL[name], *(OVERRIDES if name == OURS else [])])
    entry = contenders.contender(name, options, OVERRIDES, place)
    for steps, last, done in ((5, 2, 2), (3, 9, 3)):
        counted = Counted(last)
        entry.train(counted, steps)
        assert counted.done == done
    samples = entry.draw(options["samplers"][0], 3)
    assert (samples.shape, samples.dtype) == ((3, 1, 28, 28), torch.uint8)
    assert entry.batch == 16
    if name.endswith("same network") or name == OURS:
        assert entry.parameters == 703_076
    if name == OURS:
        assert [entry.steps(sampler) for sampler in ("ddim", "midpoint", "heun_churn")] == [4, 2, 2]


def test_a_process_that_fails_is_named(tmp_path):
    place = {"data": str(tmp_path / "none"), "png": "", "folder": str(tmp_path / "work"), "seed": 7}
    with pytest.raises(child.Failed, match=r"^diffusers, seed 7, has failed with exit code 2$"):
        child.run(DIFFUSERS, with_options(DIFFUSERS, []), [], place, 1.0, 2)


def test_pixels_are_rounded_and_clamped():
    x = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 1.2])
    assert contenders.as_pixels(x).tolist() == [0, 0, 0, 1, 255, 255, 255]
