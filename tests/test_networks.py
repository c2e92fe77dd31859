"""Networks take any size and channel count that fits, compute what their papers say, and say so where one does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from gandist.networks import DiscriminatorOptions, GeneratorOptions, dcgan, mlp, r3gan, resnet, signal
from gandist.networks import convolution as convolutions
from gandist.networks.convolution import Conv2d, ConvTranspose2d, convolution, transposed_convolution
from gandist.networks.heads import Head, MinibatchDiscrimination, MinibatchOptions, normalise_spectra
from gandist.networks.resampling import Crop, DoubleSmoothly, by_axes, halve

FAMILIES: dict[str, Any] = {"dcgan": dcgan, "mlp": mlp, "r3gan": r3gan, "resnet": resnet, "signal": signal}
SMALL = {"dcgan": {"width": 4}, "mlp": {"width": 8}, "r3gan": {"width": 8, "group_size": 2}, "resnet": {"width": 4}, "signal": {"width": 4}}  # fmt: skip
IMAGES = [
    (1, 28, 28),
    (3, 32, 32),
    (3, 64, 64),
    (1, 8, 8),
    (1, 9, 11),
    (4, 30, 45),
    (3, 96, 64),
    (1, 100, 31),
    (2, 16, 17),
]
SIGNALS = [(1, 16), (3, 17), (2, 250), (1, 1001)]
CONDITIONS = [(None, None), (5, "projection"), (5, "classifier")]


def generator_of(kind: str, **options: Any) -> GeneratorOptions:
    return FAMILIES[kind].Generator(**{"kind": kind, **SMALL[kind], **options})


def discriminator_of(kind: str, **options: Any) -> DiscriminatorOptions:
    return FAMILIES[kind].Discriminator(**{"kind": kind, **SMALL[kind], **options})


def cases(shapes: list[tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, shape) for kind in FAMILIES for shape in shapes if not [*generator_of(kind).faults(shape)]]


EVERY = cases([*IMAGES, *SIGNALS])
FEW = cases([(1, 28, 28), (2, 100)])


def moved(module: nn.Module) -> nn.Module:
    """With weights away from those that begin at zero or alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def labels_of(classes: int | None, rows: int = 6) -> tuple[Tensor, ...]:
    return () if classes is None else (torch.arange(rows) % classes,)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("kind", "shape"), EVERY)
def test_a_generator_makes_the_samples_that_a_discriminator_judges(kind: str, shape: tuple[int, ...]) -> None:
    for (classes, conditioning), training in zip(CONDITIONS, (True, True, False), strict=True):
        generator = generator_of(kind).build(10, shape, classes).train(training)
        discriminator = discriminator_of(kind).build(shape, classes, conditioning).train(training)  # type: ignore[arg-type]
        made = generator(torch.randn(6, 10), *labels_of(classes))
        assert made.shape == (6, *shape)
        judged = discriminator(made, *labels_of(classes))
        assert judged.logits.shape == (6,)
        assert judged.features.shape == (6, discriminator.head.logit.in_features)
        assert (judged.classes is not None and judged.classes.shape == (6, 5)) == (conditioning == "classifier")


@pytest.mark.parametrize(("kind", "shape"), cases(IMAGES[:1]))
@pytest.mark.parametrize("classes", [None, 5])
def test_images_stay_within_their_range_whatever_the_weights(
    kind: str, shape: tuple[int, ...], classes: int | None
) -> None:
    for options in [{}, {"output": "sigmoid"}] if kind == "mlp" else [{}]:
        generator = moved(generator_of(kind, **options).build(10, shape, classes))
        for parameter in generator.parameters():
            parameter.data *= 4
        made = generator(torch.randn(6, 10), *labels_of(classes))
        assert made.abs().max() <= 1
        assert made.min() < -0.9 < 0.9 < made.max()


@pytest.mark.parametrize(("kind", "shape"), FEW)
@pytest.mark.parametrize(("classes", "conditioning"), CONDITIONS)
@pytest.mark.parametrize("more", [False, True])
def test_every_weight_gets_a_gradient(
    kind: str, shape: tuple[int, ...], classes: int | None, conditioning: Any, more: bool
) -> None:
    options: dict[str, Any] = {"attention": 14} if more and kind == "resnet" else {}
    generator = moved(generator_of(kind, **options).build(10, shape, classes)).double()
    if more:
        options |= {"minibatch": MinibatchOptions(kernels=6, dimensions=1), "spectral_norm": kind != "r3gan"}
    discriminator = moved(discriminator_of(kind, **options).build(shape, classes, conditioning)).double()
    noise = torch.randn(6, 10, dtype=torch.double)
    judged = discriminator(generator(noise, *labels_of(classes)), *labels_of(classes))
    loss = judged.logits.square().sum()
    if judged.classes is not None:
        loss = loss + judged.classes.square().sum()
    loss.backward()
    for module in (generator, discriminator):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 1e-12, name  # less is rounding


@pytest.mark.parametrize(("kind", "shape"), FEW)
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_a_gradient_penalty_has_the_gradient_of_its_finite_differences(
    kind: str, shape: tuple[int, ...], spectral_norm: bool
) -> None:
    options = {"spectral_norm": spectral_norm and kind != "r3gan", **({"attention": 14} if kind == "resnet" else {})}
    discriminator = moved(discriminator_of(kind, **options).build(shape, 5, "projection")).double().eval()
    sample, labels = torch.randn(5, *shape, dtype=torch.double), torch.arange(5)
    weights = [*discriminator.parameters()]

    def penalty() -> Tensor:
        at = sample.clone().requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(at, labels).logits.sum(), at, create_graph=True)
        return slope.square().sum()

    slopes = torch.autograd.grad(penalty(), weights, allow_unused=True)  # a bias in a piecewise linear network has none
    direction = [torch.randn_like(weight) for weight in weights]
    exact = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True) if g is not None)
    values = []
    for step in (1e-8, -2e-8):  # so small that hardly a unit passes its kink
        with torch.no_grad():
            torch._foreach_add_(weights, direction, alpha=step)
        values.append(penalty().item())
    assert isinstance(exact, Tensor)
    assert exact.item() == pytest.approx((values[0] - values[1]) / 2e-8, rel=1e-4)


@pytest.mark.parametrize(("kind", "shape"), FEW)
@pytest.mark.parametrize(("classes", "conditioning"), CONDITIONS[:2])
def test_on_the_meta_device_there_are_the_same_weights_shapes_and_arithmetic(
    kind: str, shape: tuple[int, ...], classes: int | None, conditioning: Any
) -> None:
    normalised = kind != "r3gan" and classes is not None
    for make, inputs in (
        (lambda: generator_of(kind).build(10, shape, classes), (torch.randn(2, 10), *labels_of(classes, 2))),
        (
            lambda: discriminator_of(kind, spectral_norm=normalised).build(shape, classes, conditioning),
            (torch.randn(2, *shape), *labels_of(classes, 2)),
        ),
    ):
        found = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                module = make()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                made = module(*(value.to(device) for value in inputs))
            sizes = {name: value.shape for name, value in module.state_dict().items()}
            found.append((sizes, counter.get_total_flops(), (made if isinstance(made, Tensor) else made.logits).shape))
        assert found[0] == found[1]
        assert found[0][1] > 0


@pytest.mark.parametrize(("kind", "shape"), FEW)
def test_no_two_tensors_of_a_state_share_memory(kind: str, shape: tuple[int, ...]) -> None:
    for module in (generator_of(kind).build(10, shape, 5), discriminator_of(kind).build(shape, 5, "projection")):
        places = [value.untyped_storage().data_ptr() for value in module.state_dict().values()]
        assert len({*places}) == len(places)


@pytest.mark.parametrize(("kind", "shape"), FEW)
def test_the_memory_format_and_bf16_change_no_more_than_rounding(kind: str, shape: tuple[int, ...]) -> None:
    noise, labels = torch.randn(6, 10), torch.arange(6) % 5
    generator = moved(generator_of(kind).build(10, shape, 5)).eval()
    discriminator = moved(discriminator_of(kind).build(shape, 5, "projection")).eval()
    with torch.no_grad():
        made = generator(noise, labels)
        logits = discriminator(made, labels).logits
        for module in (generator, discriminator):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(generator(noise, labels), made, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(discriminator(made, labels).logits, logits, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            halved, judged = generator(noise, labels), discriminator(made, labels)
    assert (halved.float() - made).norm() < 0.05 * made.norm()
    assert (judged.logits.float() - logits).norm() < 0.05 * logits.norm()


@pytest.mark.parametrize(("kind", "shape"), FEW)
def test_another_class_makes_and_judges_otherwise(kind: str, shape: tuple[int, ...]) -> None:
    generator = moved(generator_of(kind).build(10, shape, 5)).eval()
    discriminator = moved(discriminator_of(kind).build(shape, 5, "projection")).eval()
    noise, sample = torch.randn(1, 10).repeat(5, 1), torch.randn(1, *shape).repeat(5, *[1] * len(shape))
    made, judged = generator(noise, torch.arange(5)), discriminator(sample, torch.arange(5))
    for one, other in itertools.combinations(range(5), 2):
        assert (made[one] - made[other]).abs().max() > 1e-4
        assert (judged.logits[one] - judged.logits[other]).abs() > 1e-4
        torch.testing.assert_close(judged.features[one], judged.features[other])  # the head alone knows the class


# Heads


@pytest.mark.parametrize(("kind", "shape"), FEW)
def test_a_conditional_generator_begins_with_more_of_its_noise_than_of_its_class(
    kind: str, shape: tuple[int, ...]
) -> None:
    """Where the class weighs as much, a class collapses into one sample before the discriminator has a say."""
    generator = (
        moved(generator_of(kind).build(64, shape, 5)).double()
        if kind == "r3gan"
        else generator_of(kind).build(64, shape, 5).double()
    )
    noise, classes = torch.randn(40, 1, 64, dtype=torch.float64).expand(-1, 5, -1), torch.arange(5).expand(40, -1)
    made = generator(noise.flatten(0, 1), classes.flatten()).view(40, 5, -1)
    of_noise, of_class = made.var(0).mean(), made.var(1).mean()
    assert of_noise > 4 * of_class


def test_projection_adds_the_product_of_the_class_and_the_features() -> None:
    head = Head(7, 3, "projection", MinibatchOptions(kernels=2, dimensions=2))
    labels = torch.tensor([2, 0, 1, 2])
    judged = head(torch.randn(4, 7), labels)
    for row, label in enumerate(labels):
        features = judged.features[row]
        expected = head.logit.weight[0] @ features + head.logit.bias[0] + head.embedding.weight[label] @ features
        torch.testing.assert_close(judged.logits[row], expected)


def test_minibatch_discrimination_is_its_sum_over_the_other_rows() -> None:
    layer = MinibatchDiscrimination(6, MinibatchOptions(kernels=3, dimensions=4))
    nn.init.normal_(layer.bias)
    features = torch.randn(5, 6)
    nn.init.normal_(layer.log_scale)
    made = layer(features)
    theta = layer.project.weight.view(3, 4, 6)
    t = theta / theta.norm(dim=2, keepdim=True) * layer.log_scale.exp()[:, :, None]
    matrices = torch.einsum("bf,kdf->bkd", features, t)
    for i, kernel in itertools.product(range(5), range(3)):
        near = sum(torch.exp(-(matrices[i, kernel] - matrices[j, kernel]).abs().sum()) for j in range(5) if j != i)
        torch.testing.assert_close(made[i, 6 + kernel], near + layer.bias[kernel])
    torch.testing.assert_close(made[:, :6], features)


def test_minibatch_discrimination_follows_a_permutation_of_the_rows() -> None:
    layer, features, order = MinibatchDiscrimination(6, MinibatchOptions()), torch.randn(5, 6), torch.randperm(5)
    torch.testing.assert_close(layer(features[order]), layer(features)[order])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(7, 5),
        nn.Embedding(4, 6),
        nn.Conv1d(3, 4, 5),
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ConvTranspose1d(3, 5, 5, 2),
        nn.ConvTranspose2d(3, 8, 4, 2),
    ],
    ids=repr,
)
def test_spectral_norm_divides_by_the_largest_singular_value(layer: Any) -> None:
    original = 3 * layer.weight.detach().clone()
    layer.weight.data.copy_(original)
    normalise_spectra(layer)
    for _ in range(500):
        weight = layer.weight  # one power iteration each
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)  # whose weights are (inputs, outputs, …)
    rows = [(value.transpose(0, 1) if transposed else value).flatten(1) for value in (original, weight.detach())]
    assert torch.linalg.svdvals(rows[1])[0].item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(rows[1], rows[0] / torch.linalg.svdvals(rows[0])[0], rtol=1e-3, atol=1e-4)


def test_the_residual_discriminator_is_normalised_unless_told_otherwise_and_the_generator_on_demand() -> None:
    def normalised(module: nn.Module) -> set[bool]:
        layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
        return {torch.nn.utils.parametrize.is_parametrized(layer, "weight") for layer in layers}

    shape = (3, 32, 32)
    assert normalised(discriminator_of("resnet").build(shape, 5, "projection")) == {True}
    assert normalised(discriminator_of("resnet", spectral_norm=False).build(shape, 5, "projection")) == {False}
    assert normalised(generator_of("resnet", spectral_norm=True).build(10, shape, 5)) == {True}
    assert normalised(generator_of("resnet").build(10, shape, 5)) == {False}


# resnet


def test_class_norm_with_equal_rows_is_batch_norm() -> None:
    plain, norm = nn.BatchNorm2d(4), resnet.ClassNorm(4, 3)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    norm.gain.data[:], norm.bias.data[:] = plain.weight.data, plain.bias.data
    features, labels = 2 + 3 * torch.randn(6, 4, 5, 3), torch.arange(6) % 3
    torch.testing.assert_close(norm(features, labels), plain(features))
    torch.testing.assert_close(norm.eval()(features, labels), plain.eval()(features))


def test_class_norm_gives_each_row_the_gain_and_bias_of_its_class() -> None:
    norm, labels = moved(resnet.ClassNorm(4, 3)), torch.tensor([2, 0, 2, 1])
    features = torch.randn(4, 4, 5, 5)
    normal = F.batch_norm(features, None, None, training=True)
    for row, label in enumerate(labels):
        expected = normal[row] * norm.gain[label][:, None, None] + norm.bias[label][:, None, None]  # type: ignore[index]
        torch.testing.assert_close(norm(features, labels)[row], expected)


def test_the_class_norm_of_biggan_is_a_linear_function_of_the_condition() -> None:
    norm = resnet.SharedNorm(5, 7)
    features, condition = torch.randn(4, 5, 6, 6), torch.randn(4, 7)
    normed = (features - features.mean((0, 2, 3), keepdim=True)) / (
        features.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    gain, bias = 1 + condition @ norm.gain.weight.mT, condition @ norm.bias.weight.mT
    expected = gain[:, :, None, None] * normed + bias[:, :, None, None]
    torch.testing.assert_close(norm(features, condition), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [3, 10, 11])
def test_with_a_shared_embedding_every_number_of_the_noise_and_the_class_count(noise: int) -> None:
    options = resnet.Generator(kind="resnet", width=4, class_embedding=6)
    module = options.build(noise, (1, 28, 28), 5).double()
    latents = torch.randn(8, noise, dtype=torch.float64, requires_grad=True)
    made = module(latents, torch.arange(8) % 5)
    assert made.shape == (8, 1, 28, 28)
    made.square().sum().backward()
    assert latents.grad is not None
    assert bool((latents.grad != 0).any(0).all())
    assert all(weight.grad is not None and bool((weight.grad != 0).any()) for weight in module.parameters())
    assert not torch.equal(made, module(latents, (torch.arange(8) + 1) % 5))


def test_attention_starts_as_the_identity_and_becomes_its_formula() -> None:
    layer, features = resnet.SelfAttention(16), torch.randn(2, 16, 3, 2)
    torch.testing.assert_close(layer(features), features, rtol=0, atol=0)
    nn.init.constant_(layer.gamma, 0.7)
    made = layer(features).flatten(2)
    f, g, h, v = (part.weight[:, :, 0, 0] for part in (layer.f, layer.g, layer.h, layer.v))
    for row, j in itertools.product(range(2), range(6)):
        pixels = features[row].flatten(1).T  # (6, C)
        scores = torch.stack([(f @ pixels[i]) @ (g @ pixels[j]) for i in range(6)]).softmax(0)
        seen = sum(scores[i] * (h @ pixels[i]) for i in range(6))
        torch.testing.assert_close(made[row, :, j], pixels[j] + 0.7 * (v @ seen), rtol=1e-4, atol=1e-5)


def maps_of(module: nn.Module, inputs: Tensor, layers: tuple[type[nn.Module], ...]) -> list[tuple[int, ...]]:
    """The shapes that layers of these types make, of one row."""
    found: list[tuple[int, ...]] = []
    for layer in module.modules():
        if isinstance(layer, layers):
            layer.register_forward_hook(lambda _, __, made: found.append(tuple(made.shape[1:])))
    module(inputs)
    return found


def test_residual_networks_have_the_blocks_of_their_tables() -> None:
    tables = {
        32: ([(256, 8), (256, 16), (256, 32)], [(128, 16), (128, 8), (128, 8), (128, 8)]),
        128: (
            [(1024, 8), (512, 16), (256, 32), (128, 64), (64, 128)],
            [(64, 64), (128, 32), (256, 16), (512, 8), (1024, 4), (1024, 4)],
        ),
    }
    for size, (ups, downs) in tables.items():
        with torch.device("meta"):
            generator = resnet.Generator(kind="resnet").build(128, (3, size, size))
            discriminator, _ = resnet.Discriminator(kind="resnet").trunk((3, size, size))
            made = maps_of(generator, torch.zeros(2, 128), (resnet._Up,))
            judged = maps_of(discriminator, torch.zeros(2, 3, size, size), (resnet._Down,))
        assert generator.first[0].out_features == 4 * 4 * ups[0][0]  # type: ignore[index,union-attr]
        assert made == [(channels, side, side) for channels, side in ups]
        assert judged == [(channels, side, side) for channels, side in downs]


@pytest.mark.parametrize("options_of", [generator_of, discriminator_of])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 30, 45), (1, 48, 40)])
def test_attention_sits_on_the_map_of_its_size(options_of: Any, shape: tuple[int, ...]) -> None:
    for size in options_of("resnet").maps(shape):
        options = options_of("resnet", attention=size)
        assert not [*options.faults(shape)]
        generates = isinstance(options, GeneratorOptions)
        module = options.build(10, shape) if generates else options.build(shape)
        inputs = torch.randn(2, 10) if generates else torch.randn(2, *shape)
        (found,) = maps_of(module, inputs, (resnet.SelfAttention,))
        assert min(found[1:]) == size
    fault = "".join(options_of("resnet", attention=7).faults((3, 32, 32)))
    assert fault.startswith("`attention` 7: for 32×32 there are maps of ")
    assert "16" in fault


@pytest.mark.parametrize("init", ["xavier", "orthogonal"])
def test_initial_weights_are_those_of_the_option(init: Any) -> None:
    for module in (
        generator_of("resnet", init=init, width=8).build(10, (3, 32, 32)),
        discriminator_of("resnet", init=init, width=8, spectral_norm=False).build((3, 32, 32), 5, "projection"),
    ):
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
                weight = layer.weight.detach().flatten(1)
                if init == "orthogonal":
                    values = torch.linalg.svdvals(weight)
                    torch.testing.assert_close(values, torch.ones_like(values))
                else:
                    inputs, outputs = torch.nn.init._calculate_fan_in_and_fan_out(layer.weight)
                    bound = (6 / (inputs + outputs)) ** 0.5 * (2**0.5 if "conv" in name else 1)
                    assert 0.8 * bound < weight.abs().max() <= bound
            if getattr(layer, "bias", None) is not None:
                assert not isinstance(layer, nn.Linear | nn.Conv2d) or layer.bias.abs().sum() == 0  # type: ignore[operator]


def test_a_residual_block_is_the_papers_whatever_the_order_that_saves_arithmetic() -> None:
    up, down = (
        moved(resnet._Up(3, 5, lambda channels: resnet.ClassNorm(channels, None), False)),
        resnet._Down(3, 5, first=False, halving=True, attention=False),
    )
    features = torch.randn(4, 3, 8, 6)
    doubled = F.interpolate(F.relu(up.norm1(features, None)), scale_factor=2)
    branch = up.conv2(F.relu(up.norm2(up.conv1(doubled), None)))
    torch.testing.assert_close(up(features, None), branch + up.skip(F.interpolate(features, scale_factor=2)))
    branch = down.conv2(F.relu(down.conv1(F.relu(features))))
    torch.testing.assert_close(down(features), F.avg_pool2d(branch, 2) + F.avg_pool2d(down.skip(features), 2))


# r3gan


def test_r3gan_begins_as_a_linear_function_of_noise_and_of_images() -> None:
    generator = generator_of("r3gan").build(10, (3, 64, 64))
    body = generator[:-1]  # type: ignore[index]
    one, other = torch.randn(2, 4, 10)
    torch.testing.assert_close(body(2 * one - 3 * other), 2 * body(one) - 3 * body(other), rtol=1e-4, atol=1e-5)
    trunk, _ = discriminator_of("r3gan").trunk((3, 30, 45))
    one, other = torch.randn(2, 4, 3, 30, 45)
    torch.testing.assert_close(trunk(2 * one - 3 * other), 2 * trunk(one) - 3 * trunk(other), rtol=1e-4, atol=1e-5)
    moved(trunk)
    assert not torch.allclose(trunk(2 * one), 2 * trunk(one), rtol=1e-2)


@pytest.mark.parametrize(("size", "blocks", "count"), [(32, 2, 8), (64, 3, 15)])
def test_r3gan_scales_its_blocks_by_the_depth_of_the_network(size: int, blocks: int, count: int) -> None:
    trunk, features = r3gan.Discriminator(kind="r3gan", width=64, blocks=blocks).trunk((3, size, size))
    found = [block for block in trunk.modules() if isinstance(block, r3gan._Block)]
    assert (len(found), features) == (count, 64)
    for layers in zip(*[(block.expand, block.mix) for block in found], strict=True):
        scaled = torch.cat([layer.weight.flatten() * layer.weight[0].numel() ** 0.5 for layer in layers])  # type: ignore[union-attr]
        assert scaled.std().item() == pytest.approx((2 / 1.04) ** 0.5 * count**-0.25, rel=0.02)
    assert all(block.reduce.weight.abs().sum() == 0 for block in found)  # type: ignore[union-attr,operator]


def test_r3gan_has_the_channels_and_groups_of_the_paper() -> None:
    with torch.device("meta"):
        generator = r3gan.Generator(kind="r3gan").build(64, (3, 256, 256))
        discriminator = r3gan.Discriminator(kind="r3gan").build((3, 256, 256))
    for module, order in ((generator, 1), (discriminator, -1)):
        found = [(b.mix.in_channels // 2, b.mix.groups) for b in module.modules() if isinstance(b, r3gan._Block)]
        expected = [(768, 96)] * 8 + [(384, 48)] * 2 + [(192, 24)] * 2 + [(96, 12)] * 2
        assert found[::order] == expected


@pytest.mark.parametrize("double", [DoubleSmoothly(), by_axes], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_doubling_smoothly_is_bilinear_interpolation(
    double: Callable[[Tensor], Tensor], layout: torch.memory_format
) -> None:
    image = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    beside = torch.randn(2, 2, 10, 14, dtype=torch.float64)
    weights = torch.randn(2, 5, 10, 14, dtype=torch.float64)  # the gradient that comes back is a slice
    expected = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    found = double(image)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad((torch.cat([beside, values], 1) * weights).sum(), image)[0] for values in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


CONVOLUTIONS = [  # channels, kernel, stride, padding, and the padding of the output of the transposed one
    (3, 5, 4, 2, 1, 0), (4, 2, 3, 1, 1, 0), (2, 3, 5, 2, 2, 1), (3, 3, 1, 1, 0, 0), (2, 3, 3, 2, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "outputs", "kernel", "stride", "padding", "more"), CONVOLUTIONS)
def test_a_convolution_as_a_product_is_the_convolution_and_so_are_its_derivatives(
    inputs: int, outputs: int, kernel: int, stride: int, padding: int, more: int
) -> None:
    sizes, options = (kernel, stride, padding), {"stride": stride, "padding": padding}
    image = torch.randn(2, inputs, 6, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64, requires_grad=True)
    back = torch.randn(inputs, outputs, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outputs, dtype=torch.float64, requires_grad=True)
    found = convolution(image, weight, bias, sizes)
    torch.testing.assert_close(found, F.conv2d(image, weight, bias, **options))
    assert found.is_contiguous(memory_format=torch.channels_last)
    up = transposed_convolution(image, back, bias, sizes, more)
    torch.testing.assert_close(up, F.conv_transpose2d(image, back, bias, output_padding=more, **options))
    for forward, values in (
        (lambda *v: convolution(*v, sizes), (image, weight, bias)),
        (lambda *v: transposed_convolution(*v, sizes, more), (image, back, bias)),
    ):
        assert torch.autograd.gradcheck(forward, values)
        assert torch.autograd.gradgradcheck(forward, values)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "shape", "product"),
    [
        (Conv2d(256, 512, 4, 2, 1), (2, 256, 8, 8), True),
        (Conv2d(256, 512, 4, 2, 1), (2, 256, 32, 32), False),  # of many places
        (Conv2d(64, 128, 4, 2, 1), (2, 64, 8, 8), False),  # of few weights
        (Conv2d(512, 512, 3, 1, 1, groups=2), (2, 512, 4, 4), False),
        (ConvTranspose2d(512, 256, 4, 2, 1), (2, 512, 4, 4), True),
        (ConvTranspose2d(512, 256, 5, 2, 2, output_padding=1), (2, 512, 4, 4), True),
        (ConvTranspose2d(512, 256, 4, 2, 1), (2, 512, 16, 16), False),
    ],
)
def test_a_heavy_convolution_between_small_maps_is_a_product_and_gives_the_same(
    layer: nn.Conv2d | nn.ConvTranspose2d,
    shape: tuple[int, ...],
    product: bool,
    precision: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def counted(layer: nn.Module, images: Tensor, places: int, chosen: Any = convolutions._as_product) -> bool:
        nonlocal calls
        found: bool = chosen(layer, images, places)
        calls += found
        return found

    monkeypatch.setattr(convolutions, "_as_product", counted)
    layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    sides = []
    for heavy in (convolutions.HEAVY, 1 << 40):
        monkeypatch.setattr(convolutions, "HEAVY", heavy)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            answer = layer(image)
        sides.append((answer, *torch.autograd.grad(answer.float().square().mean(), [image, *layer.parameters()])))
    assert calls == product
    assert sides[0][0].dtype == precision
    for one, other in zip(*sides, strict=True):
        worst = float(((one - other).abs().max() / other.abs().max()).detach())
        assert worst < (1e-5 if precision == torch.float32 else 2e-2)


@pytest.mark.parametrize(("outputs", "side"), [(16, 8), (512, 4)])
def test_a_forward_has_one_power_iteration_whichever_way_it_is_computed(
    outputs: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def iterated(norm: nn.Module, *given: Any, method: Any = parametrizations._SpectralNorm._power_method) -> None:
        nonlocal count
        count += 1
        method(norm, *given)

    layer = Conv2d(512, outputs, 3, padding=1)
    normalise_spectra(layer)
    monkeypatch.setattr(parametrizations._SpectralNorm, "_power_method", iterated)
    layer(torch.randn(1, 512, side, side))
    assert count == 1


def test_halving_is_the_mean_of_the_pixels_that_are_there() -> None:
    image = torch.randn(1, 1, 5, 7)
    halved = halve(image)[0, 0]
    assert halved.shape == (3, 4)
    for row, column in itertools.product(range(3), range(4)):
        window = image[0, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        torch.testing.assert_close(halved[row, column], window.mean())


def test_a_crop_keeps_the_centre() -> None:
    sample = torch.arange(5 * 9).view(1, 1, 5, 9)
    assert torch.equal(Crop(3, 5)(sample), sample[:, :, 1:4, 2:7])
    assert torch.equal(Crop(5, 9)(sample), sample)
    assert torch.equal(Crop(3)(sample[0]), sample[0, :, :, 3:6])


# signal, dcgan, mlp


def test_the_signal_family_is_wavegan_at_its_length() -> None:
    with torch.device("meta"):
        generator = signal.Generator(kind="signal").build(100, (1, 16384))
        discriminator = signal.Discriminator(kind="signal").build((1, 16384))
        made = maps_of(generator, torch.zeros(2, 100), (nn.ConvTranspose1d,))
        judged = maps_of(discriminator, torch.zeros(2, 1, 16384), (nn.Conv1d,))
    assert made == [(512, 64), (256, 256), (128, 1024), (64, 4096), (1, 16384)]
    assert judged == [(64, 4096), (128, 1024), (256, 256), (512, 64), (1024, 16)]
    assert {m.kernel_size for m in generator.modules() if isinstance(m, nn.ConvTranspose1d)} == {(25,)}


@pytest.mark.parametrize("stride", [2, 3, 4, 7, 16])
def test_strides_and_kernels_keep_the_length_and_every_value_counts(stride: int) -> None:
    for kernel, length in itertools.product([stride, stride + 1, 25], [16, 61, 300]):
        generator = generator_of("signal", stride=stride, kernel=kernel).build(10, (2, length))
        trunk, _ = discriminator_of("signal", stride=stride, kernel=kernel).trunk((2, length))
        made = generator(torch.randn(8, 10)).detach().requires_grad_()
        assert made.shape == (8, 2, length)
        assert (made.std(0) > 0).all()
        (slope,) = torch.autograd.grad(trunk(made).sum(), made)
        assert (slope.abs().sum(0) > 0).all()


def test_initial_signals_have_the_variance_of_the_noise() -> None:
    for length in (100, 1000, 16384):
        made = generator_of("signal", width=16).build(32, (1, length))(torch.randn(64, 32))
        assert 0.3 < made.std() < 3


def test_a_signal_is_bounded_where_that_is_asked_for() -> None:
    noise = 100 * torch.randn(4, 10)
    for kind in ("signal", "mlp"):
        assert generator_of(kind, output="tanh").build(10, (2, 100))(noise).abs().max() <= 1
        assert generator_of(kind).build(10, (2, 100))(noise).abs().max() > 1


@pytest.mark.parametrize(("norm", "kinds"), [("batch", 3), ("none", 0)])
def test_at_64_pixels_dcgan_is_the_published_one(norm: Any, kinds: int) -> None:
    with torch.device("meta"):
        generator = dcgan.Generator(kind="dcgan", norm=norm).build(100, (3, 64, 64))
        discriminator = dcgan.Discriminator(kind="dcgan", norm=norm).build((3, 64, 64))
    convolutions = [m for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(512, 256), (256, 128), (128, 64), (64, 3)]
    assert [m.out_channels for m in discriminator.modules() if isinstance(m, nn.Conv2d)] == [64, 128, 256, 512]
    assert len([m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)]) == kinds


def test_maxout_is_the_largest_of_its_pieces() -> None:
    layer, values = mlp.Maxout(4, 3, 5), torch.randn(6, 4)
    pieces = layer.linear(values)
    for unit in range(3):
        torch.testing.assert_close(
            layer(values)[:, unit], torch.stack([pieces[:, unit + 3 * p] for p in range(5)]).amax(0)
        )


def test_weights_of_a_given_width_go_with_minibatch_discrimination() -> None:
    judge = mlp.Discriminator(kind="mlp", width=8, weights=0.05, minibatch=MinibatchOptions(kernels=4)).build((1, 8, 8))
    assert all(weight.abs().max() <= 0.05 for name, weight in judge.named_parameters() if weight.ndim == 2)


def test_a_marginal_bias_makes_the_mean_image_where_the_weights_say_nothing() -> None:
    options = mlp.Generator(kind="mlp", width=8, output="sigmoid", marginal_bias=True)
    module, samples = options.build(10, (1, 4, 4)), torch.rand(50, 1, 4, 4) * 2 - 1
    options.start(module, samples, ())
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    torch.testing.assert_close(module(torch.randn(2, 10))[1], samples.mean(0), rtol=1e-4, atol=1e-5)


# What does not fit


@pytest.mark.parametrize(("kind", "smallest"), [("dcgan", 8), ("r3gan", 8), ("resnet", 16)])
def test_images_that_are_too_small_are_refused_by_name(kind: str, smallest: int) -> None:
    for options in (generator_of(kind), discriminator_of(kind)):
        (fault,) = options.faults((1, smallest - 1, 28))
        assert (
            f"`{kind}` needs images of {smallest} pixels a side or more, and the dataset has 28×{smallest - 1}" in fault
        )
        assert not [*options.faults((1, smallest, 28))]


def test_signals_that_are_too_short_are_refused_by_name() -> None:
    for options in (generator_of("signal"), discriminator_of("signal")):
        (fault,) = options.faults((1, 15))
        assert "`signal` needs signals of 16 values or more, and the dataset has 15 values" in fault
        assert not [*options.faults((1, 16))]


@pytest.mark.parametrize("kind", ["dcgan", "r3gan", "resnet", "signal"])
def test_a_family_refuses_what_it_is_not_for(kind: str) -> None:
    wrong = (1, 28, 28) if kind == "signal" else (1, 1000)
    for options in (generator_of(kind), discriminator_of(kind)):
        (fault,) = options.faults(wrong)
        assert fault.startswith(f"`{kind}` is for {'signals' if kind == 'signal' else 'images'}, and the dataset has ")
    assert not [*mlp.Generator(kind="mlp").faults(wrong)]


@pytest.mark.parametrize(("width", "group_size", "size"), [(24, 16, 64), (12, 8, 128), (5, 3, 32), (15, 5, 64)])
def test_r3gan_says_which_widths_divide_into_its_groups(width: int, group_size: int, size: int) -> None:
    for options_of in (generator_of, discriminator_of):
        (fault,) = options_of("r3gan", width=width, group_size=group_size).faults((3, size, size))
        assert fault.startswith(
            f"`width` {width} cannot be divided into groups of `group_size` {group_size} for {size}×"
        )
        multiple = int(fault.rpartition(" ")[2])
        sound = options_of("r3gan", width=multiple, group_size=group_size)
        assert not [*sound.faults((3, size, size))]
        with torch.device("meta"):
            _ = sound.build(10, (3, size, size)) if options_of is generator_of else sound.build((3, size, size))


def test_r3gan_refuses_to_divide_by_the_norm_of_zeros() -> None:
    (fault,) = discriminator_of("r3gan", spectral_norm=True).faults((3, 32, 32))
    assert "`spectral_norm` divides weights by their norm" in fault


def test_a_kernel_that_would_skip_values_is_refused() -> None:
    for options_of, stride in itertools.product((generator_of, discriminator_of), (None, 8)):
        (fault,) = options_of("signal", kernel=3, stride=stride).faults((1, 1000))
        least = stride or 4
        assert fault == f"`kernel` 3 is less than the stride of {least}, which skips values; use {least} or more"
        assert not [*options_of("signal", kernel=least, stride=stride).faults((1, 1000))]
