"""The features of the papers' FID: Inception V3 with the weights of 2015, as torch-fidelity has converted them."""

import io
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.errors import UserError, reason
from src.evaluation.features import Extracted, Features, Shape, Sizes, as_rgb, check_colours
from src.evaluation.weights import fit_state, read_state
from src.files import sha256

FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name; its end begins the file's SHA-256
OFFICIAL = "6726825d"
SIDE = 299  # that images are resized to
SPATIAL = 7  # channels of a layer of 17x17
TIMEOUT = 30  # seconds after which a download that stalls ends


class Inception(Features):
    """Pool features (FID, Heusel et al. 2017), logits without bias (Inception Score), and a spatial layer (sFID).

    Images are resized to 299x299 as TensorFlow 1 did it, bilinear without antialiasing, as in the papers' numbers
    (torch-fidelity's "inception-v3-compat"). The spatial features are the first 7 channels of mixed_6/conv, 17x17
    (Nash et al. 2021, "Generating images with sparse representations", Sec. 4.2; guided-diffusion's evaluator).

    Args:
        weights: the file; None to look for torch-fidelity's in torch.hub's folder, and to download it if it is not
            there.
        spatial: also the spatial features, 405 MB for 50,000 images.
        name: of the features.
    """

    def __init__(self, weights: str | None = None, spatial: bool = True, name: str = "inception") -> None:
        super().__init__(name)
        self.weights = weights
        self.spatial = spatial
        self._sha256: str | None = None

    @property
    def path(self) -> Path:
        """Where the weights are, or would be."""
        if self.weights is not None:
            return Path(self.weights)
        return Path(torch.hub.get_dir(), "checkpoints", FILE)

    def load(self) -> None:
        if self._net is not None:
            return
        if self.weights is None and not self.path.exists():
            _download(self.path)
        state = read_state(self.path)
        net = _network()
        fit_state(net, state, self.path, "torch-fidelity's Inception V3")
        self._sha256 = sha256(self.path)
        if not self._sha256.startswith(OFFICIAL):
            print(f"note: {self.path} is not torch-fidelity's {FILE}: its scores compare with no paper's", flush=True)
        self._net = net.to(self.device)

    def check(self, shape: Shape) -> None:
        check_colours(self.name, shape)

    def sizes(self, shape: Shape) -> Sizes:
        return Sizes(2048, 1008, SPATIAL * 17 * 17 if self.spatial else None)

    def stamp(self) -> dict[str, Any]:
        if self._sha256 is None and self.path.is_file():
            self._sha256 = sha256(self.path)
        return {
            "name": self.name,
            "kind": "Inception V3 of 2015, torch-fidelity's conversion",
            "weights_sha256": self._sha256,
            "official_weights": None if self._sha256 is None else self._sha256.startswith(OFFICIAL),
            "input": f"{SIDE}x{SIDE}, bilinear as TensorFlow 1, no antialiasing",
            "grey": "repeated to 3 channels",
            "features": "pool, 2048",
            "spatial": "mixed_6/conv, first 7 channels, 17x17" if self.spatial else None,
        }

    def _compute(self, images: Tensor) -> Extracted:
        assert self._net is not None
        features, logits, spatial = self._net(as_rgb(images))
        return Extracted(features, logits, spatial if self.spatial else None)


def _network() -> nn.Module:
    """torch-fidelity's network, freshly made, which returns features, logits without bias, and spatial features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict and len(state_dict) > 0, assign)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(SIDE, SIDE), align_corners=False)
            x = (x - 128) / 128
            x = self.MaxPool_1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
            x = self.MaxPool_2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
            x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
            spatial = x[:, :SPATIAL].flatten(1)  # the block's first branch is the layer that is wanted
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
            features = self.AvgPool(x).flatten(1)
            return features, features @ self.fc.weight.T, spatial

    # Its constructor insists on reading a file and would execute what that holds: it is given one that holds nothing.
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        return Network("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)


def _download(path: Path) -> None:
    """Fetches torch-fidelity's file, which appears whole or not at all.

    Raises:
        UserError: when it does not come.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    print(f"note: downloading {FILE} (95 MB) to {path.parent}", flush=True)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=OFFICIAL, progress=False)
    except (OSError, RuntimeError) as error:  # a URLError is an OSError, a wrong hash a RuntimeError
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise UserError(
            f"{FILE} is not in {path.parent} and could not be downloaded ({reason(error)}); put the file of that name "
            "from torch-fidelity's release v0.2.0 there, or give it with features.weights=<file>"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
