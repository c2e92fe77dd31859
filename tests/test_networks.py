"""Networks take any size and channel count that fits, and say so where one does not."""

import pytest
import torch

from gandist.data.dataset import ImageSpec
from gandist.networks import dcgan, mlp

SHAPES = [(28, 28, 1), (32, 32, 3), (64, 64, 3), (8, 8, 1), (30, 45, 4), (96, 64, 3), (100, 31, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", [dcgan, mlp])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_generator_makes_the_images_that_a_discriminator_judges(family, norm: str, shape: tuple[int, ...]) -> None:
    height, width, channels = shape
    image = ImageSpec(height=height, width=width, channels=channels)
    options = {"kind": family.__name__.rpartition(".")[2], "width": 4} | ({"norm": norm} if family is dcgan else {})
    made = family.Generator(**options).build(10, image)(torch.randn(3, 10))
    assert made.shape == (3, channels, height, width)
    assert made.abs().max() <= 1
    assert family.Discriminator(**options).build(image)(made).shape == (3,)


def test_at_64_pixels_the_generator_is_the_published_one() -> None:
    generator = dcgan.Generator(kind="dcgan", width=64).build(100, ImageSpec(height=64, width=64, channels=3))
    convolutions = [m for m in generator.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(512, 256), (256, 128), (128, 64), (64, 3)]
    discriminator = dcgan.Discriminator(kind="dcgan", width=64).build(ImageSpec(height=64, width=64, channels=3))
    convolutions = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 1]


def test_every_weight_of_a_network_gets_a_gradient() -> None:
    image = ImageSpec(height=28, width=28, channels=1)
    for family in (dcgan, mlp):
        name = family.__name__.rpartition(".")[2]
        generator = family.Generator(kind=name, width=8).build(10, image)
        discriminator = family.Discriminator(kind=name, width=8).build(image)
        discriminator(generator(torch.randn(4, 10))).sum().backward()
        for module in (generator, discriminator):
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_images_that_are_too_small_are_refused_by_name() -> None:
    fault = next(dcgan.Generator(kind="dcgan").faults(ImageSpec(height=7, width=28, channels=1)))
    assert "`dcgan` needs images of 8 pixels a side or more, and the dataset has 28×7" in fault
    assert not list(mlp.Generator(kind="mlp").faults(ImageSpec(height=7, width=28, channels=1)))
