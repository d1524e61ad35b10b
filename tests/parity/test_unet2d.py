"""Our networks against diffusers' own classes, weights made by theirs: read from their folder, the same function."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from src.interop import diffusers_dit, diffusers_unet
from src.models.dit import DiT
from src.models.unet import UNet
from src.runs import Run, build_diffusion

SIZE = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
HO = {**SIZE, **PLAIN, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
NETWORKS = {
    "ho": {**HO, "attention_head_dim": None, "in_channels": 1, "out_channels": 1},
    "defaults": {**SIZE, **PLAIN},
    "heads": {**SIZE, **PLAIN, "attention_head_dim": 16, "norm_num_groups": 32},
    "no attention": {**SIZE, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    | {"add_attention": False},
    "adm": {
        **SIZE,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 8,
        "out_channels": 6,
    },
    "scale and shift": {**SIZE, **PLAIN, "resnet_time_scale_shift": "scale_shift"},  # no norm before the middle attends
    "labels": {**SIZE, **PLAIN, "num_class_embeds": 5},
    "odd widths": {**SIZE, **PLAIN, "block_out_channels": (32, 48), "sample_size": (8, 24)},
}


def randomise(net):
    """Fills every parameter, for zeros and ones would hide whatever lies behind them."""
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        with torch.no_grad():
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(("norm" in name and "weight" in name) + 0.2 * noise)
    return net.eval()


def assert_same_function(ours, theirs, shape, y=None, contrast=1.0, atol=1e-5):
    g = torch.Generator().manual_seed(1)
    x, t = contrast * torch.randn(2, *shape, generator=g), torch.tensor([7, 998])
    labels = () if y is None else (torch.tensor(y),)
    with torch.no_grad():
        a, b = ours(x, t, *labels), theirs(x, t, *labels).sample
    assert 0.1 < b.std() < 20
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_unet_is_read_as_the_same_function(name, tmp_path):
    """Catches any difference in layout; with little contrast, in the group norms' eps, which large numbers hide."""
    theirs = randomise(UNet2DModel(**NETWORKS[name]))
    theirs.save_pretrained(tmp_path)
    run = Run(tmp_path)
    ours = run.load_net("ema")
    assert isinstance(ours, UNet)
    size = NETWORKS[name]["sample_size"]
    shape = (theirs.config.in_channels, *(size if isinstance(size, tuple) else (size, size)))
    y = [4, 0] if name == "labels" else None
    for contrast in (1.0, 1e-3):
        assert_same_function(ours, theirs, shape, y, contrast, atol=2e-5)  # of outputs around 1
    if y is not None:
        assert ours.num_classes == 5
        assert not ours.label_embedding.table.weight[5].any()  # they have no "none"


def test_a_unet_of_old_names_and_side_by_side_files_is_read(tmp_path):
    """As google/ddpm-cifar10-32 lies there: no folders for the parts, and attention as it was called before 0.16."""
    theirs = randomise(UNet2DModel(**NETWORKS["ho"]))
    theirs.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = tmp_path / "diffusion_pytorch_model.safetensors"

    def renamed(key):
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return key

    save_file({renamed(key): v for key, v in load_file(file).items()}, file)
    assert any("proj_attn" in key for key in load_file(file))
    scheduler = DDPMScheduler(variance_type="fixed_large", beta_end=0.03)
    scheduler.save_config(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    run = Run(tmp_path)
    assert_same_function(run.load_net("ema"), theirs, (1, 16, 16))
    assert run.config["sampler"]["variance"] == "beta"
    assert run.config["schedule"]["beta_end"] == 0.03


def test_the_cifar10_network_is_that_of_google_ddpm_cifar10_32():
    """Catches a network that cannot take the published weights: the same 35,746,307 numbers under their names."""
    published = {
        "sample_size": 32,
        "block_out_channels": [128, 256, 256, 256],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "dropout": 0.1,
    }
    node = diffusers_unet.read_config(published, "config.json")
    with torch.device("meta"):
        net, theirs = UNet(), UNet2DModel(**published)
    assert diffusers_unet.write_config(node, net) | {"attn_norm_num_groups": None} == diffusers_unet.DEFAULTS | {
        **published,
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.30.0",
    }
    settings = {k: v for k, v in node.items() if k != "_target_"}
    with torch.device("meta"):
        assert str(UNet(**settings)) == str(net)
    shapes = {key: tuple(v.shape) for key, v in theirs.state_dict().items()}
    written = {k: tuple(v.shape) for e in diffusers_unet.entries(net) for k, v in _pairs(e, net)}
    assert written == shapes
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def _pairs(entry, net):
    return zip(entry.theirs, entry.write(net.state_dict()[entry.ours]), strict=True)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_dit_is_read_as_the_same_function(channels, tmp_path):
    """Against DiTTransformer2DModel: positions, modulation, the order of a patch's numbers, labels and "none"."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    theirs = DiTTransformer2DModel(
        **settings, in_channels=channels, out_channels=2 * channels, num_embeds_ada_norm=5, norm_eps=1e-6
    )
    randomise(theirs)
    for block in theirs.transformer_blocks[1:]:  # every published DiT embeds time once
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path)
    ours = Run(tmp_path).load_net("ema")
    assert isinstance(ours, DiT)
    assert ours.learned_variance
    assert_same_function(ours, theirs, (channels, 8, 8), [4, 5], atol=2e-5)
    own = sum(p.numel() for p in ours.parameters())
    again = sum(theirs.state_dict()[key].numel() for key in diffusers_dit.repeated(ours))
    assert own + again == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "linear", "beta_end": 0.03},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_a_schedule_is_read_as_the_same_betas(settings, tmp_path):
    """Theirs are float32."""
    UNet2DModel(**NETWORKS["ho"]).save_pretrained(tmp_path / "unet")
    scheduler = DDPMScheduler(**settings)
    scheduler.save_pretrained(tmp_path / "scheduler")
    run = Run(tmp_path)
    ours = build_diffusion(run.config).schedule.alphas_cumprod
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=0, atol=2e-5)
    v = scheduler.config.prediction_type == "v_prediction"
    assert run.config["objective"]["_target_"].endswith(".V" if v else ".Eps")


def test_a_pipeline_is_not_needed_to_read(tmp_path):
    """The layout that DDPMPipeline itself writes."""
    unet = randomise(UNet2DModel(**NETWORKS["ho"]))
    DDPMPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    run = Run(tmp_path)
    assert run.config["sampler"]["clip"] is False
    assert_same_function(run.load_net("ema"), unet, (1, 16, 16))
