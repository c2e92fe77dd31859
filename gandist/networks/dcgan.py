"""DCGAN (Radford, Metz and Chintala 2015) for any size of 8 pixels a side or more and any number of channels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from einops.layers.torch import Rearrange
from pydantic import Field
from torch import Tensor, nn

from gandist.data.dataset import ImageSpec
from gandist.networks import DiscriminatorOptions, GeneratorOptions

Width = Annotated[int, Field(ge=1, le=1024)]
Norm = Literal["batch", "none"]


def _stages(height: int, width: int) -> int:
    """How often the smaller side halves before it is under 4 pixels: 3 for 32 and 4 for 64, as published."""
    return (min(height, width) // 4).bit_length() - 1


def _normed(channels: int, norm: Norm) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels)] if norm == "batch" else []


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) weights, N(1, 0.02) gains and zero biases (section 3 of the paper; gains as in the released code)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


class _Crop(nn.Module):
    """The central height × width of an image; nothing to do where the size is a multiple of the stride."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, image: Tensor) -> Tensor:
        top, left = (image.shape[2] - self.height) // 2, (image.shape[3] - self.width) // 2
        return image[:, :, top : top + self.height, left : left + self.width]


class Generator(GeneratorOptions):
    """Transposed convolutions 4×4 with stride 2, ReLU, tanh."""

    kind: Literal["dcgan"]
    width: Width = 64  # channels before the image; doubled at each halving of the size
    norm: Norm = "batch"
    smallest: ClassVar[int] = 8

    def build(self, noise: int, image: ImageSpec) -> nn.Module:
        assert image.height is not None
        assert image.width is not None
        stages = _stages(image.height, image.width)
        height, width = -(-image.height // 2**stages), -(-image.width // 2**stages)
        bias = self.norm == "none"
        channels = self.width * 2 ** (stages - 1)
        layers: list[nn.Module] = [
            nn.Linear(noise, channels * height * width, bias=bias),
            Rearrange("b (c h w) -> b c h w", h=height, w=width),
            *_normed(channels, self.norm),
            nn.ReLU(),
        ]
        for _ in range(stages - 1):
            layers += [
                nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=bias),
                *_normed(channels // 2, self.norm),
                nn.ReLU(),
            ]
            channels //= 2
        layers += [nn.ConvTranspose2d(channels, image.channels, 4, 2, 1), _Crop(image.height, image.width), nn.Tanh()]
        return nn.Sequential(*layers).apply(_initialise)


class Discriminator(DiscriminatorOptions):
    """Convolutions 4×4 with stride 2, leaky ReLU, one logit; no normalisation at either end."""

    kind: Literal["dcgan"]
    width: Width = 64  # channels after the first convolution; doubled at each further one
    norm: Norm = "batch"
    smallest: ClassVar[int] = 8

    def build(self, image: ImageSpec) -> nn.Module:
        assert image.height is not None
        assert image.width is not None
        bias = self.norm == "none"
        height, width, channels = image.height // 2, image.width // 2, self.width
        layers: list[nn.Module] = [nn.Conv2d(image.channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(_stages(image.height, image.width) - 1):
            layers += [
                nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=bias),
                *_normed(2 * channels, self.norm),
                nn.LeakyReLU(0.2),
            ]
            height, width, channels = height // 2, width // 2, 2 * channels
        layers += [nn.Conv2d(channels, 1, (height, width)), nn.Flatten(0)]
        return nn.Sequential(*layers).apply(_initialise)
