"""python -m src.export: what it writes is the model, in the hands of those that it is for."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDPMPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors import safe_open
from torch import nn

from src.interop import own
from src.runs import Run, build_diffusion
from tests.interop.made import TINY, made

LABELS = ("model.num_classes=10", "model.learned_variance=true", "loss=hybrid", "sampler=ddpm_learned")
RESIDUAL = ("model.resampling=residual", "model.scale_shift_norm=true", "model.attention_resolutions=[8]")
RESIDUAL += ("model.channels_per_head=16", "model.cosine_first=true", "model.endpoint=false")


class Stubborn(nn.Module):
    """A network that asks its input which way to go, which no graph can say."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        return x * self.scale if x.mean() > 0 else -x


@pytest.fixture
def exported(command, tmp_path):
    """Exports a run with random weights; its network, and the folder."""

    def run(kind, *overrides):
        folder = made(tmp_path / "run", *overrides)
        outcome = command("export", f"run={folder}", f"format={kind}", f"out={tmp_path}/out")
        assert outcome.code == 0, outcome.err
        assert "the largest difference of an output is " in outcome.out
        return Run(folder), tmp_path / "out"

    return run


def inputs(rows, labels=False):
    x, t = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(rows) * 190.0 + 7
    return (x, t, torch.arange(rows) + 6) if labels else (x, t)


@torch.no_grad()
def test_a_diffusers_folder_is_a_pipeline_that_samples(exported):
    """DDPMPipeline.from_pretrained loads network and schedule, and draws images."""
    run, out = exported("diffusers", *TINY, "schedule.beta_end=0.03", "objective=v", "sampler=ddpm_beta")
    pipe = DDPMPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    x, t = inputs(3)
    expected = run.load_net("ema")(x, t)
    torch.testing.assert_close(pipe.unet(x, t).sample, expected, rtol=0, atol=1e-5)
    schedule = build_diffusion(run.config).schedule
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=0, atol=2e-5)
    assert (pipe.scheduler.config.prediction_type, pipe.scheduler.config.variance_type) == (
        "v_prediction",
        "fixed_large",
    )
    images = pipe(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert images.std() > 0.01


@torch.no_grad()
def test_labels_residual_blocks_and_variances_are_taken_along(exported, tmp_path):
    """The parts of UNet2DModel that DDPMPipeline itself does not use; read back, the configuration is the run's own."""
    cosine = ("schedule=cosine", "schedule.zero_terminal_snr=true", "objective=v")
    run, out = exported("diffusers", *TINY, *LABELS, *RESIDUAL, *cosine)
    theirs = UNet2DModel.from_pretrained(out, subfolder="unet")
    assert DDPMPipeline.from_pretrained(out).unet.config.num_class_embeds == 11
    x, t, y = inputs(5, labels=True)
    torch.testing.assert_close(theirs(x, t, y).sample, run.load_net("ema")(x, t, y), rtol=0, atol=1e-5)
    back = Run(out)
    assert back.config == run.config
    assert back.load_net("ema").num_classes == 10
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "learned_range"
    assert scheduler["trained_betas"][-1] == 1.0


@torch.no_grad()
def test_a_dit_is_diffusers_own(exported):
    tiny = ("experiment=smoke", "model=dit_tiny", "model.depth=2", "model.endpoint=true", "model.num_classes=10")
    run, out = exported("diffusers", *tiny)
    theirs = DiTTransformer2DModel.from_pretrained(out / "transformer").eval()
    x, t, y = inputs(5, labels=True)
    torch.testing.assert_close(theirs(x, t, y).sample, run.load_net("ema")(x, t, y), rtol=0, atol=1e-5)


def test_safetensors_hold_weights_and_configuration(exported, command, tmp_path):
    """One file, from which src.sample draws the very samples of the run; whose optimiser it was does not matter."""
    run, out = exported("safetensors", *TINY, "optimizer._target_=bitsandbytes.optim.AdamW8bit")
    file = out / "model.safetensors"
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["config"]) == run.config
        state = run.load_net("ema").state_dict()
        assert set(opened.keys()) == set(state)
        assert all(torch.equal(opened.get_tensor(key), value) for key, value in state.items())
    for name, source in (("a", run.folder), ("b", file)):
        outcome = command("sample", f"run={source}", "num_samples=3", "sampler.steps=3", f"out={tmp_path}/{name}")
        assert outcome.code == 0, outcome.err
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("a", "b"))
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv_in.bias"), "the checkpoint has no conv_in.bias"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(3)}), "conv_in.bias is [3] there and [16] in the"),
    ],
)
def test_safetensors_that_are_not_what_they_say_are_refused(change, message, command, tmp_path):
    run = Run(made(tmp_path / "run", *TINY))
    state = run.load_net("ema").state_dict()
    change(state)
    own.write(state, run.config, tmp_path / "model.safetensors")
    outcome = command("sample", f"run={tmp_path}/model.safetensors", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_onnx_runs_in_onnxruntime_for_any_batch(exported):
    run, out = exported("onnx", *TINY, "model.num_res_blocks=1", "model.attention_resolutions=[4]")
    assert [p.name for p in out.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["config"]) == run.config
    for rows in (1, 5):
        x, t = inputs(rows)
        (found,) = session.run(None, {"x": x.numpy(), "t": t.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), run.load_net("ema")(x, t), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_torch_program_takes_labels_and_any_batch(exported):
    tiny = ("experiment=smoke", "model=dit_tiny", "model.depth=1", "model.num_classes=10")
    run, out = exported("torch_export", *tiny)
    program = torch.export.load(out / "model.pt2").module()
    for rows in (1, 5):
        batch = inputs(rows, labels=True)
        torch.testing.assert_close(program(*batch), run.load_net("ema")(*batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("diffusers", ["objective=flow", "schedule=flow"], "objective Flow has no place in diffusers' DDPMScheduler"),
        ("diffusers", ["schedule=karras", "objective=eps"], "schedule Karras has no place"),
        ("diffusers", ["model.patch_size=2"], "model.patch_size=2 has no place in diffusers' UNet2DModel"),
        ("diffusers", ["model.augment_dim=9"], "model.augment_dim=9 has no place"),
        ("safetensors", ["model._target_=torch.nn.Identity"], "calls 'torch.nn.Identity'"),
        ("diffusers", ["model.skip_scale=0.5"], "model.skip_scale=0.5 has no place"),
        ("diffusers", ["model.norm_groups=32"], "whose group norms have 8 or 16 or 24 or 32 groups"),
        ("diffusers", ["model.up_attention=last", "model.attention_resolutions=[8]"], "model.up_attention=last"),
        ("diffusers", ["model.num_heads=2", "model.attention_resolutions=[8]"], "model.num_heads=2 at levels"),
        ("diffusers", ["model=simple_unet"], "a SimpleUNet has no place in diffusers"),
        ("diffusers", ["model.middle_norm=false"], "model.middle_norm=false without model.scale_shift_norm=true"),
        ("diffusers", ["model=dit_tiny"], "model.endpoint=False has no place in diffusers' DiTTransformer2DModel"),
        ("onnx", ["model=oracle"], "is an oracle, which has no weights"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(kind, overrides, message, command, tmp_path):
    folder = made(tmp_path / "run", "experiment=smoke", *overrides)
    outcome = command("export", f"run={folder}", f"format={kind}", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "name"), [("onnx", "ONNX"), ("torch_export", "torch.export")])
def test_a_network_that_no_graph_can_say_is_refused(kind, name, command, tmp_path):
    folder = made(tmp_path / "run", *TINY)
    config = (folder / "config.yaml").read_text().replace("src.models.unet.UNet", "tests.interop.test_export.Stubborn")
    start = config.index("model:")
    end = config.index("\n", config.index("gradient_checkpointing"))
    stubborn = f"model:\n  _target_: {__name__}.Stubborn\n  channels: 1\n  image_size: 8"
    (folder / "config.yaml").write_text(config[:start] + stubborn + config[end:])
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = Stubborn(1, 8).state_dict()
    torch.save({**checkpoint, "ema": state, "state_dict": {}}, folder / "checkpoints" / "last.ckpt")
    outcome = command("export", f"run={folder}", f"format={kind}", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{name} cannot express Stubborn" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_export_that_is_not_the_model_is_not_kept(command, tmp_path, monkeypatch):
    """Catches a comparison that looks at nothing: one weight of the written file is off."""
    folder = made(tmp_path / "run", *TINY)
    write = own.write

    def wrong(state, config, path):
        write({key: v + 0.1 if key == "conv_in.bias" else v for key, v in state.items()}, config, path)

    monkeypatch.setattr(own, "write", wrong)
    outcome = command("export", f"run={folder}", "format=safetensors", f"out={tmp_path}/out")
    assert (outcome.code, outcome.out) == (2, "")
    assert "is not the network: outputs differ by" in outcome.err
    assert not (tmp_path / "out").exists()
