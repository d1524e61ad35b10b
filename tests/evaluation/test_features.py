"""Features: what they are of, what they refuse, and that nothing around them changes a bit."""

from math import floor
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from src.build import build, check
from src.cli import CONF
from src.errors import UserError
from src.evaluation import inception
from src.evaluation.dinov2 import DinoV2
from src.evaluation.extraction import extract
from src.evaluation.features import Module, Pixels, full_precision
from src.evaluation.inception import FILE
from src.evaluation.weights import digest, read_state
from src.files import sha256


def images(n, *shape, seed=0):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Convolutions and a product, whose bits depend on the number of rows and of threads."""

    def __init__(self, width: int = 32):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, width, 3)
        self.linear = nn.Linear(36 * width, 70)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 10
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(self.dropout(self.conv(x).relu().flatten(1)))


def option(file, /, **settings):
    node = {**OmegaConf.to_container(OmegaConf.load(CONF / "features" / f"{file}.yaml")), **settings}
    check(node, "features")
    return build(node, "features")


def test_pixels_are_in_the_unit_interval():
    pixels = option("pixels")
    x = images(3, 2, 4, 5)
    found = pixels(x)
    assert torch.equal(found.features, x.flatten(1).float() / 255)
    assert (found.logits, found.spatial, pixels.sizes((2, 4, 5)).features) == (None, None, 40)
    pixels.check((1, 16, 16))
    with pytest.raises(ValueError, match="up to 16x16 and these are 8x17; use features=inception"):
        pixels(images(2, 1, 8, 17))


@pytest.mark.parametrize("x", [images(2, 1, 8, 8).float(), images(1, 8, 8)])
def test_only_bytes_in_batches(x):
    with pytest.raises(ValueError, match=r"takes uint8 images \(B, C, H, W\)"):
        Pixels()(x)


def test_no_bit_depends_on_batches_or_threads():
    """Catches a batch that is handed on as it comes: a convolution of 3 images rounds otherwise than one of 16."""
    module = Module(Net())
    x = images(300, 3, 8, 8)
    whole = extract(module, [x], 300).features
    assert whole.dtype == torch.float32
    for sizes in (1, 7, 299):
        assert torch.equal(extract(module, x.split(sizes), 300).features, whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(extract(module, x.split(50), 300).features, whole)
    finally:
        torch.set_num_threads(threads)
    for first in (290, 298, 299):  # one image alone is another product: of a matrix and a vector
        assert torch.equal(extract(module, [x[first:]], 300 - first).features, whole[first:])
    torch.testing.assert_close(whole, module.module(x.float() / 255).detach(), rtol=1e-5, atol=1e-5)


def test_progress_counts_every_image_once():
    told = []
    extract(Pixels(), images(300, 1, 4, 4).split(33), 300, told.append)
    assert sum(told) == 300


@pytest.mark.parametrize("number", [9, 11])
def test_another_number_of_images_than_announced(number):
    with pytest.raises(ValueError, match="announced"):
        extract(Pixels(), [images(10, 1, 4, 4)], number)


def test_features_that_are_nan_are_refused():
    net = Net()
    net.linear.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite; the weights are broken"):
        extract(Module(net), [images(4, 3, 8, 8)], 4)


def test_autocast_and_random_state_stay_outside():
    class Random(Net):
        def forward(self, x):
            return super().forward(x) + 0 * torch.rand(1)

    module, x = Module(Random()), images(8, 3, 8, 8)
    expected = module(x).features
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x).features, expected)
        assert torch.equal(extract(module, [x], 8).features, module(torch.cat([x, x])).features[:8])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not expected.requires_grad
    assert not module.module.training  # dropout is off


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_tf32_is_off_inside_and_as_it_was_outside():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        with full_precision(torch.device("cuda")):
            assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_any_module_by_its_target(tmp_path):
    """With its arguments, its weights from a file, its range, and a name of its own."""
    net = Net(8)
    net.conv.weight.data += 1
    torch.save(net.state_dict(), tmp_path / "net.pt")
    target = {"_target_": f"{Net.__module__}.Net", "width": 8}
    features = option("module", module=target, name="mine", weights=str(tmp_path / "net.pt"), low=-1.0)
    x = images(4, 3, 8, 8)
    torch.testing.assert_close(features(x).features, net.eval()(x.float() / 127.5 - 1).detach(), rtol=1e-5, atol=1e-5)
    assert features.sizes((3, 8, 8)).features == 70
    stamp = features.stamp()
    assert (stamp["name"], stamp["weights_sha256"]) == ("mine", digest(net.state_dict()))
    assert Module(Net(8), name="mine", low=-1.0).stamp() != stamp
    assert Module(Net(16), name="mine").stamp()["architecture_sha256"] != stamp["architecture_sha256"]
    with pytest.raises(ValueError, match="Net does not take images of 8x8 with 1 channel: "):
        features(images(4, 1, 8, 8))


def test_modules_that_make_no_features():
    class Same(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"makes \(2, 3, 8, 8\) of 2 images; features are a tensor \(2, D\)"):
        Module(Same()).check((3, 8, 8))
    with pytest.raises(ValueError, match=r"give module\._target_ a class of torch modules"):
        Module(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low=1 and high=1 must differ"):
        Module(Same(), low=1, high=1)
    with pytest.raises(
        UserError, match=r"features.module._target_ has no value; set it with features.module._target_="
    ):
        option("module")
    with pytest.raises(UserError, match="name=My Net must be of small letters"):
        option("pixels", name="My Net")


class Trap:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def test_files_of_weights_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = Net(8).state_dict()
    torch.save(state, "good.pt")
    whole = Path("good.pt").read_bytes()
    Path("half.pt").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    Path("flipped.pt").write_bytes(flipped)
    torch.save({**state, "trap": Trap()}, "trap.pt")
    torch.save([1, 2], "list.pt")
    Path("half.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    torch.save({**{f"b.{k}": v for k, v in state.items() if "conv" in k}, "conv.bias": state["conv.bias"]}, "other.pt")
    torch.save({**state, "conv.weight": state["conv.weight"][:4]}, "shape.pt")
    torch.save(Net(8), "module.pt")
    for name in ("half.pt", "flipped.pt", "trap.pt", "half.safetensors", "module.pt"):
        with pytest.raises(UserError, match=f"{name} is damaged or holds more than weights"):
            read_state(name)
    assert not Path("trapped").exists()
    with pytest.raises(UserError, match="no state dict"):
        read_state("list.pt")
    with pytest.raises(UserError, match=r"there is no file missing\.pt"):
        read_state("missing.pt")
    lacks = r"it lacks conv.weight, linear.weight, linear.bias, and has b.conv.weight, b.conv.bias; use the right file"
    with pytest.raises(UserError, match=lacks):
        Module(Net(8), weights="other.pt")
    with pytest.raises(UserError, match=r"conv.weight is \[4, 3, 3, 3\] there and \[8, 3, 3, 3\] in Net"):
        Module(Net(8), weights="shape.pt")


def test_inception_that_is_nowhere(tmp_path, monkeypatch):
    """The sentence names the file, the folder and the other way; nothing half-made is left."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def fails(url, path, **_):
        assert url.endswith(FILE)
        assert _["hash_prefix"] == "6726825d"
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    features = option("inception")
    assert features.stamp()["weights_sha256"] is None
    assert features.sizes((3, 32, 32)) == (2048, 1008, 2023)
    folder = tmp_path / "home" / "hub" / "checkpoints"
    with pytest.raises(UserError) as refusal:
        extract(features, [images(2, 3, 8, 8)], 2)
    for part in (FILE, f"is not in {folder} and", "no network", "features.weights=<file>"):
        assert part in str(refusal.value)
    assert not (tmp_path / "home").exists()


def test_inception_takes_the_file_of_torch_hubs_folder(tmp_path, monkeypatch, capsys):
    """A file with other names in it is refused; what has torch-fidelity's name and not its content is told of."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / FILE
    path.parent.mkdir(parents=True)
    torch.save({"fc.weight": torch.zeros(3), "extra": torch.zeros(1)}, path)
    features = option("inception")
    assert features.stamp()["weights_sha256"] == sha256(path)
    assert features.stamp()["official_weights"] is False
    with pytest.raises(UserError, match=rf"{FILE} does not hold weights.*lacks Conv2d_1a_3x3.conv.weight.*has extra"):
        features.load()
    state = torch.random.get_rng_state()
    net = inception._network()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.save(net.state_dict(), path)
    features.load()
    assert "is not torch-fidelity's" in capsys.readouterr().out
    for shape in ((2, 8, 8), (4, 8, 8)):
        with pytest.raises(ValueError, match=f"inception sees images of 1 or 3 channels and these have {shape[0]}"):
            features(images(2, *shape))


def cubic_row(x: float, size: int) -> list[float]:
    """The weights of the four points around x in Keys' cubic convolution, a = -0.75; the borders repeat."""
    row, left = [0.0] * size, floor(x)
    for k in range(left - 1, left + 3):
        d = abs(x - k)
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        row[min(max(k, 0), size - 1)] += near if d <= 1 else far
    return row


def test_dinov2_from_a_local_file_is_timms_network(tmp_path):
    """But for its position embedding, which is resampled as DINOv2's code does it; grey is shown three times."""
    import timm
    from safetensors.torch import save_file

    model = "vit_small_patch14_dinov2.lvd142m"
    features = DinoV2(str(tmp_path / "weights.safetensors"), model)
    assert features.stamp()["weights_sha256"] is None
    net = timm.create_model(model, num_classes=0).eval()
    torch.nn.init.normal_(net.pos_embed)
    for name, parameter in net.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1.0)  # or else blocks hardly count, and the class token is the same for all images
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    x = images(2, 1, 16, 16)
    found = features(x).features
    assert features.stamp()["weights_sha256"] == sha256(tmp_path / "weights.safetensors")
    assert features.sizes((1, 16, 16)).features == found.shape[1] == 384
    # 37x37 positions to 16x16 where samples lie 37 / 16.1 apart, and nothing is averaged over
    first, grid = net.pos_embed[:, :1].detach(), net.pos_embed[:, 1:].detach().unflatten(1, (37, 37))
    places = torch.tensor([cubic_row((i + 0.5) * 37 / 16.1 - 0.5, 37) for i in range(16)])
    resampled = torch.einsum("ia,jb,nabd->nijd", places, places, grid).flatten(1, 2)
    net.set_input_size(224)
    net.pos_embed.data = torch.cat([first, resampled], 1)
    big = nn.functional.interpolate(x.float() / 255, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        expected = net((big.repeat(1, 3, 1, 1) - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not hold weights of timm's"):
        DinoV2(str(tmp_path / "other.pt"), model).load()
    with pytest.raises(ValueError, match="model=resnet18 is none of timm's DINOv2"):
        DinoV2(model="resnet18")
    with pytest.raises(ValueError, match="timm has no model=vit_tiny_dinov2"):
        DinoV2(str(tmp_path / "other.pt"), "vit_tiny_dinov2").sizes((3, 8, 8))


def test_a_classifier_needs_a_run():
    with pytest.raises(UserError, match=r"run=null names no classifier; train one with .*experiment=features_mnist"):
        option("classifier")
    with pytest.raises(UserError, match=r"features.run=nowhere is neither a run folder"):
        option("classifier", run="nowhere").load()


def test_all_options_build():
    names = {path.stem for path in (CONF / "features").glob("*.yaml")}
    given = {"module": {"module": {"_target_": "torch.nn.Flatten"}}, "classifier": {"run": "somewhere"}}
    for name in names:
        assert option(name, **given.get(name, {})).name == name
