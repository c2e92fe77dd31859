"""Segmenters of other packages: segmentation_models_pytorch, and the backbones of timm under a feature pyramid (Lin et al. 2017)."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from gandist.networks.dilated import MEAN, Normalise
from gandist.networks.resampling import DoubleSmoothly, stretched
from gandist.networks.segmentation import Fitted, PretrainedOptions, SegmenterOptions
from gandist.recipe import Failure, suggestion
from gandist.tensors import fill

_MULTIPLE = 32  # the coarsest stage of almost every backbone
_SIDE = 224  # of images that almost every backbone takes
_REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)  # as the packages raise them


def _plain(name: str) -> str:
    if not re.fullmatch(r"[\w.-]{1,100}", name):  # timm fetches `hf-hub:...` and reads `local-dir:...`
        raise ValueError(f"must be a name of letters, digits, `_`, `-` and `.`, not {name[:80]!r}")
    return name


Name = Annotated[str, AfterValidator(_plain)]


def _whole(network: nn.Module, weights: PretrainedOptions | None) -> nn.Module:
    """With weights of a file, images are normalised as ImageNet's were; without, they are seen as they are."""
    return nn.Sequential(Normalise() if weights is not None else nn.Identity(), network)


def _inner(module: nn.Module) -> Any:
    """The package's network in what `build` gave."""
    assert isinstance(module, Fitted)
    assert isinstance(module.network, nn.Sequential)
    return module.network[1]


def _of_any_size(build: Callable[..., nn.Module]) -> nn.Module:
    """What `build` gives for images of any size: timm's transformers have one size, unless they are told."""
    try:
        return build(dynamic_img_size=True)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
    return build()


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` gives, on the meta device too where it computes with the values of tensors, as some do for their drop path."""
    try:
        return build()
    except RuntimeError:
        if torch.get_default_device().type != "meta":
            raise
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return build().to("meta")


def _working(network: nn.Module, channels: int) -> nn.Module:
    """The network, with buffers for the weights that its logits do not depend on: processes would wait for their gradients."""
    shapes = copy.deepcopy(network).to("meta").eval()
    try:
        with torch.enable_grad():
            shapes(torch.empty(1, channels, _SIDE, _SIDE, device="meta")).sum().backward()
    except _REFUSALS:  # of other sizes, or of shapes alone
        return network
    for name, parameter in shapes.named_parameters():
        if parameter.grad is None:
            path, _, last = name.rpartition(".")
            owner = network.get_submodule(path)
            idle = getattr(owner, last).detach()
            delattr(owner, last)
            owner.register_buffer(last, idle)
    return network


def _fill(
    state: dict[str, Tensor], found: dict[str, Tensor], prefixes: Sequence[str], weights: PretrainedOptions
) -> None:
    """Copies tensors of a file, whose names may lack a prefix, and may have `stages.0` for timm's `stages_0`; raises Failure.

    Counts of the batches that a batch norm saw need not be there; what else the file has is left out.
    """
    into, taken = {}, {}
    for name, tensor in state.items():
        shorter = [name.removeprefix(prefix) for prefix in ("", *prefixes)]
        candidates = [*shorter, *(re.sub(r"^(\w+)_(\w+)\.", r"\1.\2.", one) for one in shorter)]
        called = next((one for one in candidates if one in found), None)
        if called is None and name.endswith("num_batches_tracked"):
            continue
        into[called or name] = tensor
        if called is not None:
            taken[called] = found[called]
    fill(into, taken, Path(weights.path))


def _unusable(kind: str, package: str) -> Iterator[str]:
    """Why a package cannot be used here."""
    try:
        importlib.import_module(package)
    except ImportError:
        yield f"`{kind}` needs {package}: pip install 'gandist[zoo]'"
    except RuntimeError as error:  # torchvision beside a torch that it was not built for
        yield f"`{kind}` needs {package}, whose import fails: {error}"


def _unknown(key: str, word: str, known: list[str], where: str) -> str:
    """A fault, with the nearest name, or where a long list is."""
    hint = suggestion(word, known)
    return f"`{key}`: {word!r} is not there{hint if len(hint) < 300 else f'; {where} lists them'}"


def _misfits(options: Smp | Timm, channels: int, height: int, width: int) -> Iterator[str]:
    """Why a known network does not fit, found by what it does with shapes alone."""
    if options.weights is not None and channels != len(MEAN):
        yield f"`weights` are for images of {len(MEAN)} channels, and the dataset's have {channels}; leave them out"
        return
    try:
        with torch.device("meta"):
            fitted = cast(Fitted, options.build(channels, 2).eval())
            whole = tuple(-(-side // fitted.multiple) * fitted.multiple for side in (height, width))
            made = fitted.network(torch.empty(2, channels, *whole))
        assert made.shape[2:] == whole, f"of {whole[1]}×{whole[0]} it makes logits of {made.shape[3]}×{made.shape[2]}"
    except NotImplementedError:  # an operator that does not know its shapes
        return
    except _REFUSALS as error:
        yield f"does not fit images of {channels} channels and {width}×{height}: {str(error)[:300]}"


class Smp(SegmenterOptions):
    """A model of segmentation_models_pytorch with an encoder, by their names there, from its own initial weights or those of a file.

    The file has the names of the whole model, or of its encoder alone, with `encoder.` before them or without.
    """

    kind: Literal["smp"]
    model: Name
    encoder: Name = "resnet34"
    depth: Annotated[int, Field(ge=1, le=8)] | None = None  # stages of the encoder, where not the model's own number
    weights: PretrainedOptions | None = None

    @property
    def multiple(self) -> int:
        return _MULTIPLE

    def module(self, channels: int, classes: int) -> nn.Module:
        model = self._models()[self.model]
        options: dict[str, Any] = {}
        if self.depth is not None:
            options["encoder_depth"] = self.depth
            decoder = inspect.signature(model.__init__).parameters.get("decoder_channels")
            if decoder is not None and isinstance(decoder.default, tuple):  # one number a stage, finest last
                options["decoder_channels"] = decoder.default[-self.depth :]
        names = {"encoder_name": self.encoder, "encoder_weights": None}  # nothing is downloaded
        build = partial(model, **names, in_channels=channels, classes=classes, **options)
        network = _built(partial(_of_any_size, build) if self.encoder.startswith("tu-") else build)
        return _whole(_working(network, channels), self.weights)

    @staticmethod
    def _models() -> dict[str, Any]:
        import segmentation_models_pytorch as smp

        return {model.__name__: model for model in smp.MODEL_ARCHITECTURES_MAPPING.values()}

    @property
    def pretrained(self) -> PretrainedOptions | None:
        return self.weights

    def start(self, module: nn.Module) -> None:
        if self.weights is None:
            return
        state, found = _inner(module).state_dict(), self.weights.read()
        encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
        whole = any(name in state and name not in encoder for name in found)
        try:
            _fill(state if whole else encoder, found, ("encoder.", "encoder.model."), self.weights)
        except Failure as error:
            raise Failure(f"{error} (read as weights of {'the whole model' if whole else 'the encoder'})") from None

    def faults(self, channels: int, height: int, width: int) -> Iterator[str]:
        if unusable := [*_unusable(self.kind, "segmentation_models_pytorch")]:
            yield from unusable
            return
        import segmentation_models_pytorch as smp
        import timm

        models, encoders = [*self._models()], smp.encoders.get_encoder_names()
        unknown = []
        if self.model not in models:
            unknown.append(_unknown("model", self.model, models, ""))
        if self.encoder not in encoders and not (
            self.encoder.startswith("tu-") and timm.is_model(self.encoder.removeprefix("tu-"))
        ):
            known = [*encoders, *(f"tu-{name}" for name in timm.list_models())]
            where = "`segmentation_models_pytorch.encoders.get_encoder_names()`"
            unknown.append(_unknown("encoder", self.encoder, known, where))
        yield from unknown or _misfits(self, channels, height, width)


class _Pyramid(nn.Module):
    """A backbone's features of every stage, summed from the coarsest to the finest, to logits of the image's size."""

    def __init__(self, backbone: Any, classes: int, width: int) -> None:
        super().__init__()
        self.backbone, self.doubled = backbone, DoubleSmoothly()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in backbone.feature_info.channels())
        self.last = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, classes, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        seen = [self._by_channel(maps) for maps in self.backbone(images)]
        stages = [lateral(maps) for lateral, maps in zip(self.lateral, seen, strict=True)]
        features = stages.pop()
        for finer in reversed(stages):
            features = finer + self._enlarged(features, finer.shape[2:])
        return self._enlarged(self.last(features), images.shape[2:])

    def _by_channel(self, maps: Tensor) -> Tensor:
        """(B, C, h, w), as most backbones give their maps, and some (B, h, w, C)."""
        return maps.permute(0, 3, 1, 2) if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC" else maps

    def _enlarged(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        while 2 * maps.shape[2] <= size[0]:
            maps = self.doubled(maps)
        return maps if [*maps.shape[2:]] == [*size] else stretched(maps, size[0], size[1]).to(maps.dtype)


class Timm(SegmenterOptions):
    """A backbone of timm by its name there, and a feature pyramid of `width` channels; from its own initial weights or those of a file.

    The file has the names of the backbone.
    """

    kind: Literal["timm"]
    model: Name
    width: Annotated[int, Field(ge=1, le=1024)] = 128
    weights: PretrainedOptions | None = None

    @property
    def multiple(self) -> int:
        return _MULTIPLE

    def module(self, channels: int, classes: int) -> nn.Module:
        import timm

        build = partial(timm.create_model, self.model, pretrained=False, features_only=True, in_chans=channels)
        backbone = _built(partial(_of_any_size, build))
        return _whole(_working(_Pyramid(backbone, classes, self.width), channels), self.weights)

    def build(self, channels: int, classes: int) -> nn.Module:
        whole = self.module(channels, classes)
        assert isinstance(whole, nn.Sequential)
        backbone: Any = whole[1].backbone
        return Fitted(whole, math.lcm(*backbone.feature_info.reduction()), self.stride)

    @property
    def pretrained(self) -> PretrainedOptions | None:
        return self.weights

    def start(self, module: nn.Module) -> None:
        if self.weights is not None:
            _fill(_inner(module).backbone.state_dict(), self.weights.read(), ("model.",), self.weights)

    def faults(self, channels: int, height: int, width: int) -> Iterator[str]:
        if unusable := [*_unusable(self.kind, "timm")]:
            yield from unusable
            return
        import timm

        if not timm.is_model(self.model):
            yield _unknown("model", self.model, timm.list_models(), "`timm.list_models()`")
        else:
            yield from _misfits(self, channels, height, width)
