"""python -m src.edit: its files, what an edit depends on, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src.edit import inherit
from src.errors import UserError
from src.evaluation.editing import read_image, read_mask


def write(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("given", "inherited"),
    [
        (["verb=inpaint"], ["sampler=ddim", "sampler.eta=1.0"]),
        (["verb=inpaint", "sampler=ddim"], ["sampler.eta=1.0"]),
        (["verb=inpaint", "sampler=ddim", "sampler.eta=0.5"], []),
        (["verb=inpaint", "sampler=ddpm"], []),
    ],
)
def test_inpainting_has_the_noise_of_ddpm_unless_it_is_told_otherwise(given, inherited):
    run = {"sampler": {"_target_": "src.diffusion.samplers.DDPM", "steps": 20}, "choices": {"sampler": "ddpm"}}
    assert inherit(run, ["run=somewhere", *given]) == inherited


@pytest.fixture
def pictures(tmp_path):
    """Two digits, and a mask whose right half is to be painted."""
    from sklearn.datasets import load_digits

    digits = (load_digits().images[:2] * (255 / 16)).round()
    mask = np.zeros((8, 8))
    mask[:, 4:] = 255
    named = {"a": digits[0], "b": digits[1], "mask": mask}
    return {name: write(tmp_path / f"{name}.png", pixels) for name, pixels in named.items()}


@pytest.fixture
def edit(command, smoke_run, tmp_path):
    """Edits with the smoke run; returns the folder and what was printed."""

    def run(*arguments: object, run: Path = smoke_run) -> tuple[Path, str]:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        fast = [] if any(str(a).startswith("sampler") for a in arguments) else ["sampler.steps=4"]
        outcome = command("edit", f"run={run}", f"out={out}", *fast, *map(str, arguments))
        assert outcome.code == 0, outcome.err
        return out, outcome.out

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def cells(out: Path, rows: int, columns: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """The images of grid.png, (rows, columns, H, W), which enlarges images of 8 rows 8 times and frames them."""
    height, width = size
    picture = pixels(out / "grid.png")[::8, ::8]
    assert picture.shape == (rows * (height + 2), columns * (width + 2))
    return picture.reshape(rows, height + 2, columns, width + 2).transpose(0, 2, 1, 3)[:, :, 1:-1, 1:-1]


def test_inpainting_shows_before_mask_and_after_and_keeps_what_is_black(edit, pictures):
    arguments = ("verb=inpaint", f"image={pictures['a']}", f"mask={pictures['mask']}", "num_samples=3")
    out, printed = edit(*arguments)
    assert sorted(p.name for p in out.iterdir()) == [
        "edit-0.png",
        "edit-1.png",
        "edit-2.png",
        "grid.png",
        "samples.npz",
    ]
    assert str(out / "grid.png") in printed
    samples = np.load(out / "samples.npz")["arr_0"]
    assert (samples.shape, samples.dtype) == ((3, 8, 8, 1), np.uint8)
    before = pixels(pictures["a"])
    np.testing.assert_array_equal(samples[:, :, :4, 0], np.broadcast_to(before[:, :4], (3, 8, 4)))
    assert len(np.unique(samples[:, :, 4:].reshape(3, -1), axis=0)) == 3
    picture = cells(out, rows=3, columns=3)
    for i in range(3):
        np.testing.assert_array_equal(pixels(out / f"edit-{i}.png"), samples[i, :, :, 0])
        np.testing.assert_array_equal(picture[i, 0], before)
        np.testing.assert_array_equal(picture[i, 1], pixels(pictures["mask"]))
        np.testing.assert_array_equal(picture[i, 2], samples[i, :, :, 0])


@pytest.mark.parametrize("verb", ["inpaint", "translate"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_edit_i_depends_on_the_seed_and_i_alone(edit, pictures, verb, sampler):
    mask = [f"mask={pictures['mask']}"] if verb == "inpaint" else []
    arguments = (f"verb={verb}", f"image={pictures['a']}", *mask, f"sampler={sampler}", "sampler.steps=4")
    whole, parts, fewer, other = (
        np.load(edit(*arguments, *more)[0] / "samples.npz")["arr_0"]
        for more in (["num_samples=7"], ["num_samples=7", "batch_size=3"], ["num_samples=2"], ["seed=1"])
    )
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole[:2], fewer)
    assert (whole[:4] != other).any()


def test_a_mask_is_white_from_128_on(edit, pictures, tmp_path):
    grey = np.zeros((8, 8))
    grey[0], grey[1] = 127, 128
    mask = write(tmp_path / "grey.png", grey)
    out, _ = edit("verb=inpaint", f"image={pictures['a']}", f"mask={mask}", "num_samples=8")
    changed = (np.load(out / "samples.npz")["arr_0"][..., 0] != pixels(pictures["a"])).any(axis=(0, 2))
    assert changed.tolist() == [False, True, *[False] * 6]


def test_translation_keeps_more_with_less_strength(edit, pictures):
    before = pixels(pictures["a"]).astype(int)

    def change(strength):
        arguments = ("verb=translate", f"image={pictures['a']}", f"strength={strength}", "sampler.steps=50")
        out, _ = edit(*arguments, "num_samples=2")
        picture = cells(out, rows=2, columns=3)
        np.testing.assert_array_equal(picture[:, 0], np.stack([before, before]))
        after = np.load(out / "samples.npz")["arr_0"][..., 0]
        np.testing.assert_array_equal(picture[:, 2], after)
        return np.abs(after - before).mean(), np.abs(picture[:, 1] - before).mean()

    little, much = change(0.02), change(1.0)
    assert little[0] < 10 < much[0]
    assert little[1] < 10 < much[1]  # of the noised state


def test_the_ends_between_two_seeds_are_the_samples_of_these_seeds(edit, command, smoke_run, tmp_path):
    out, _ = edit("verb=interpolate", "seeds=[5,9]", "num_frames=5", "batch_size=2")
    frames = np.load(out / "samples.npz")["arr_0"]
    assert frames.shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(cells(out, rows=1, columns=5)[0], frames[..., 0])
    for seed, frame in ((5, frames[0]), (9, frames[4])):
        drawn = tmp_path / f"seed{seed}"
        command("sample", f"run={smoke_run}", f"out={drawn}", f"seed={seed}", "num_samples=3", "sampler.steps=4")
        np.testing.assert_array_equal(np.load(drawn / "samples.npz")["arr_0"][0], frame)


def test_between_two_seeds_any_sampler_without_noise_will_do(edit):
    _, printed = edit("verb=interpolate", "seeds=[0,1]", "num_frames=2", "sampler=heun", "sampler.steps=4")
    assert "Heun, 4 steps" in printed


def test_the_ends_between_two_images_are_these_images(edit, pictures):
    arguments = ("verb=interpolate", f"images=[{pictures['a']},{pictures['b']}]", "num_frames=3", "sampler.steps=50")
    out, _ = edit(*arguments, "inversion_iterations=4")
    picture = cells(out, rows=1, columns=5)[0].astype(int)
    np.testing.assert_array_equal(picture[0], pixels(pictures["a"]))
    np.testing.assert_array_equal(picture[4], pixels(pictures["b"]))
    error = max(np.abs(picture[1] - picture[0]).max(), np.abs(picture[3] - picture[4]).max())
    assert json.loads((out / "metrics.json").read_text())["max_of_255"] == error < 40
    assert np.abs(picture[2] - picture[0]).max() > 50 < np.abs(picture[2] - picture[4]).max()


def test_inversion_tells_its_error_which_falls_with_iterations(edit, pictures):
    def error(iterations):
        arguments = ("verb=invert", f"image={pictures['a']}", "sampler.steps=50")
        out, printed = edit(*arguments, f"inversion_iterations={iterations}")
        assert sorted(p.name for p in out.iterdir()) == ["edit.png", "grid.png", "metrics.json", "samples.npz"]
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics.keys() == {"rmse_of_255", "max_of_255", "latent_std"}
        assert f"rmse_of_255 {metrics['rmse_of_255']:.4g}" in printed
        before, latent, after = cells(out, rows=1, columns=3)[0]
        np.testing.assert_array_equal(before, pixels(pictures["a"]))
        np.testing.assert_array_equal(after, pixels(out / "edit.png"))
        assert len(np.unique(latent)) > 20
        rmse = np.sqrt(((after.astype(float) - before) ** 2).mean())
        assert metrics["rmse_of_255"] == pytest.approx(rmse)
        return rmse

    once, often = error(1), error(5)
    assert often < once < 30


@pytest.mark.parametrize(
    ("own", "verb", "used"),
    [
        ("ddpm", "inpaint", "DDIM"),
        ("ddpm", "translate", "DDPM"),
        ("ddpm", "invert", "DDIM"),
        ("heun", "inpaint", "DDIM"),
        ("heun", "translate", "Heun"),
    ],
)
def test_a_runs_own_sampler_is_used_where_it_can_do_the_verb(edit, smoke_run, pictures, tmp_path, own, verb, used):
    from omegaconf import OmegaConf

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").symlink_to(smoke_run / "checkpoints" / "last.ckpt")
    config = OmegaConf.load(smoke_run / "config.yaml")
    config.sampler = OmegaConf.load(f"conf/sampler/{own}.yaml")
    config.choices.sampler = own
    OmegaConf.save(config, run / "config.yaml")
    mask = [f"mask={pictures['mask']}"] if verb == "inpaint" else []
    _, printed = edit(f"verb={verb}", f"image={pictures['a']}", *mask, run=run)
    assert f"{used}, 4 steps" in printed


def test_an_image_of_another_size_that_the_network_can_take(edit, tmp_path):
    image = write(tmp_path / "wide.png", np.arange(8 * 12).reshape(8, 12))
    out, _ = edit("verb=translate", f"image={image}", "num_samples=1")
    assert pixels(out / "edit.png").shape == (8, 12)
    assert cells(out, rows=1, columns=3, size=(8, 12)).shape == (1, 3, 8, 12)


def test_labels_go_along(command, tmp_path, pictures):
    run, out = tmp_path / "run", tmp_path / "out"
    short = ["experiment=smoke", "model.num_classes=10", "trainer.max_steps=2"]
    assert command("train", *short, f"hydra.run.dir={run}").code == 0
    guided = ["guidance=cfg", "guidance.scale=2", "labels=[3,7]", "sampler.steps=4", "num_samples=3"]
    outcome = command("edit", f"run={run}", f"out={out}", "verb=translate", f"image={pictures['a']}", *guided)
    assert outcome.code == 0, outcome.err
    assert np.load(out / "samples.npz")["arr_1"].tolist() == [3, 7, 3]
    outcome = command("edit", f"run={run}", f"out={tmp_path / 'no'}", "verb=interpolate", "seeds=[0,1]", "labels=[3,7]")
    assert (outcome.code, "all frames of an interpolation have one label" in outcome.err) == (2, True)
    assert not (tmp_path / "no").exists()


def test_reading_gives_the_channels_of_the_model(tmp_path):
    red = np.zeros((2, 3, 3))
    red[..., 0] = 200
    path = str(write(tmp_path / "red.png", red))
    assert read_image("image", path, 3).tolist() == torch.tensor(red).permute(2, 0, 1).byte().tolist()
    assert read_image("image", path, 1).tolist() == np.full((1, 2, 3), 60).tolist()  # ITU-R 601: 0.299 of red
    with pytest.raises(UserError, match="pictures have 1 or 3 channels, and the model's images 2"):
        read_image("image", path, 2)


def test_a_picture_with_more_than_8_bits_is_not_cut_off(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    with pytest.raises(UserError, match="more than 8 bits"):
        read_image("image", str(path), 1)


def test_photographs_are_turned_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(np.zeros((8, 16), np.uint8)).save(path, exif=exif)
    assert read_image("image", str(path), 1).shape == (1, 16, 8)


def test_an_all_white_mask_paints_everything(tmp_path):
    assert read_mask(str(write(tmp_path / "white.png", np.full((4, 4), 255))), (4, 4)).all()


REFUSED = [
    (
        ["verb=inpaint", "image={a}", "mask={black}"],
        "keeps every pixel, so there is nothing to paint: white is painted",
    ),
    (["verb=inpaint", "image={a}", "mask={small}"], "small.png is 6x4 and the image 8x8, height x width; white is"),
    (
        ["verb=inpaint", "image={a}"],
        "needs image=<file> and mask=<file> (white is painted anew, black is kept); given: image",
    ),
    (["verb=inpaint", "image={a}", "mask={tmp}/no.png"], "mask={tmp}/no.png cannot be read: No such file"),
    (["verb=inpaint", "image={a}", "mask={mask}", "resample=0"], "inpaint: resample=0 and jump=5 must be at least 1"),
    (["verb=inpaint", "image={a}", "mask={mask}", "sampler=heun"], "goes step by step, which Heun does not; choose"),
    (["verb=translate", "image={a}", "strength=0"], "translate: strength=0 must lie in (0, 1]"),
    (["verb=translate", "image={a}", "strength=1.5"], "translate: strength=1.5 must lie in (0, 1]"),
    (["verb=translate", "image={odd}"], "odd.png is 9x8, height x width, and the run's network, made for 8x8, cannot"),
    (["verb=translate", "image={text}"], "text.png is not a picture that Pillow can read"),
    (["verb=translate", "image={cut}"], "cut.png cannot be read: "),
    (["verb=translate", "image={tmp}"], "cannot be read: Is a directory"),
    (["verb=translate", "image={a}", "mask={mask}"], "verb=translate needs image=<file>; given: image, mask"),
    (["verb=translate", "image={a}", "num_samples=0"], "num_samples and batch_size must be at least 1"),
    (["verb=interpolate"], "verb=interpolate needs images=[a.png,b.png] or seeds=[0,1]; given: nothing"),
    (["verb=interpolate", "seeds=[0,1]", "images=[{a},{b}]"], "or seeds=[0,1]; given: images, seeds"),
    (["verb=interpolate", "seeds=[0,1,2]"], "seeds=[0, 1, 2] must be two, to interpolate between"),
    (["verb=interpolate", "seeds=[0,1]", "num_frames=1"], "num_frames=1 must be at least 2"),
    (["verb=interpolate", "seeds=[0,-1]"], "seeds=-1 must lie between 0 and 2^63 - 1"),
    (["verb=interpolate", "seeds=[0,1]", "sampler=ddpm"], "this DDPM adds noise; choose sampler=ddim sampler.eta=0"),
    (["verb=interpolate", "images=[{a},{wide}]"], "are 8x8 and 8x12, height x width: give one size"),
    (["verb=interpolate", "images=[{a},{b}]", "sampler=dpmpp_2m"], "which DPMSolverPP does not"),
    (["verb=invert", "image={a}", "sampler.eta=0.5"], "this DDIM adds noise; choose"),
    (["verb=invert", "image={a}", "inversion_iterations=0"], "invert: iterations=0 must be at least 1"),
    (["verb=invert", "image={a}", "sampler.steps=1"], "invert: a single step"),
    (["verb=invert", "images=[{a},{b}]"], "verb=invert needs image=<file>; given: images"),
    (["verb=paint", "image={a}"], "verb=paint is not one of inpaint, translate, interpolate, invert"),
    ([], "verb has no value; set it with verb=..."),
    (["verb=translate", "image={a}", "labels=[3]"], "was trained without labels"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_edit_refuses(command, smoke_run, pictures, tmp_path, arguments, sentence):
    write(tmp_path / "black.png", np.full((8, 8), 127))
    write(tmp_path / "small.png", np.full((6, 4), 255))
    write(tmp_path / "odd.png", np.zeros((9, 8)))
    write(tmp_path / "wide.png", np.zeros((8, 12)))
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(pictures["a"].read_bytes()[:-30])
    names = {path.stem: path for path in tmp_path.glob("*.png")}
    before = sorted(tmp_path.iterdir())
    filled = [argument.format(tmp=tmp_path, **names) for argument in arguments]
    outcome = command("edit", f"run={smoke_run}", f"out={tmp_path / 'out'}", *filled)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert sentence.format(tmp=tmp_path) in outcome.err
    assert sorted(tmp_path.iterdir()) == before


def test_broken_weights_do_not_become_pictures(command, smoke_run, pictures, tmp_path):
    import shutil

    run = Path(shutil.copytree(smoke_run, tmp_path / "run"))
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["ema"].values())).fill_(float("nan"))
    torch.save(checkpoint, path)
    outcome = command("edit", f"run={run}", f"out={tmp_path / 'out'}", "verb=invert", f"image={pictures['a']}")
    assert outcome.code == 2
    assert "hold NaN or infinity" in outcome.err
    assert not (tmp_path / "out").exists()
