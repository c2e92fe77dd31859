"""The segment game: Luc et al. 2016. A segmenter labels pixels, and an adversary tells its label maps from true ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from gandist.constants import constant
from gandist.data.dataset import Spec
from gandist.data.stream import IGNORED, Batch
from gandist.game import Clock, Phase, Players, Segmenting, Side, always
from gandist.games.segmentation import Segmentation, SegmentationOptions
from gandist.health import Symptom
from gandist.losses import at_least_fp32
from gandist.maps import (
    CLASS_WEIGHTS,
    Encoding,
    at_grid,
    cross_entropy,
    dice,
    labelled,
    one_hot,
    over_cells,
    product,
    scaled,
)
from gandist.networks.patch import sampled
from gandist.networks.segmentation import AnyAdversary, AnySegmenter
from gandist.pairs import PairOptions, View, views
from gandist.palette import beside
from gandist.player import PlayerOptions
from gandist.recipe import MAX_SIDE, DataOptions, Failure, InputError, Section, harmless
from gandist.windows import to_size

Weight = Annotated[float, Field(gt=0, le=1e9)]
SHOWN = 16  # images of a sheet
WINS = 0.99


class SegmenterSide(PlayerOptions):
    """The segmenter; its average weights, where it keeps them, are scored and used."""

    network: AnySegmenter


class AdversarySide(PlayerOptions):
    """The adversary, which is dropped once training is over."""

    network: AnyAdversary


class AdversarialOptions(Section):
    """λ ℓ_bce(a(x, s(x)), 1) in the segmenter's loss (section 3.1), and what the adversary sees (section 3.3).

    `minimax` is −λ ℓ_bce(a(x, s(x)), 0), as the objective was written; `input` is `basic` (probabilities), `product` (times each channel of the image) or
    `scaling` (truth as soft as the answers, `threshold` τ). Until `from_images` the adversary learns, and the segmenter does not feel it. With
    `block` each of them moves for so many steps at a time (section 4), and not in every one.
    """

    weight: Weight = 1.0
    kind: Literal["non_saturating", "minimax"] = "non_saturating"
    input: Encoding = "basic"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.9
    from_images: Annotated[int, Field(ge=0)] = 0
    block: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> AdversarialOptions:
        if self.input != "scaling" and self.threshold != 0.9:
            raise ValueError("`threshold` has no effect unless `input` is `scaling`; leave it out")
        return self


class UnlabelledOptions(Section):
    """Images without masks (Hung et al. 2018, AdvSemiSeg): from `from_images` on, where an adversary that judges places is surer than
    `threshold` that an answer is a true one, that answer counts as the truth, with `weight`; `adversarial` is the weight of fooling it.
    """

    weight: Weight = 0.1
    adversarial: Annotated[float, Field(ge=0, le=1e9)] = 0.001
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2
    from_images: Annotated[int, Field(ge=0)] = 0


class Segment(Segmenting):
    """Each step: the segmenter on its pixels and the adversary's verdict, then the adversary on true label maps and on those just made.

    With `adversary: null` the segmenter learns alone, from the same weights, data and steps: what the adversary is compared with. All other keys may
    stay as they are then, without effect, but for `adversarial.block`, in whose other half the segmenter rests.
    """

    kind: Literal["segment"]
    segmenter: SegmenterSide
    adversary: AdversarySide | None = None
    adversarial: AdversarialOptions = AdversarialOptions()
    pixels: Literal["mean", "sum"] = (
        "mean"  # of an image, in the cross entropy: decides what `adversarial.weight` means
    )
    class_weights: Literal["median_frequency", "log_frequency"] | None = None
    dice: Weight | None = None  # weight of 1 − the Dice coefficient, beside the cross entropy
    unlabelled: UnlabelledOptions | None = None
    augmentation: PairOptions | None = None
    scores: Annotated[SegmentationOptions, Field(**harmless)] = SegmentationOptions()

    # ---- what it needs

    def parts(self, spec: Spec) -> tuple[str, ...]:
        return self.parts_named(spec) if self.adversary is not None else ("image", "mask")

    def parts_named(self, spec: Spec) -> tuple[str, ...]:
        return ("image", "mask", *(("unlabelled",) if self.unlabelled is not None else ()))

    def faults(self, spec: Spec) -> Iterator[tuple[tuple[str, ...], str]]:
        assert spec.image is not None
        assert spec.mask is not None
        if spec.image.height is None or spec.image.width is None:
            wanted = spec.canvas or ("HEIGHT", "WIDTH")
            smaller = (
                " and a `size` that they fit by" if spec.canvas is not None and max(spec.canvas) > MAX_SIDE else ""
            )
            yield (
                ("kind",),
                f"the images of `data.path` differ in size; set `data.transform.canvas: [{wanted[0]}, {wanted[1]}]`, as large as the largest{smaller}, or "
                "`data.transform.crop`",
            )
            return
        if spec.mask.classes < 2:
            yield ("kind",), f"segment tells classes apart, and the masks have {spec.mask.classes}"
        if self.augmentation is not None:
            for name, fault in self.augmentation.faults(spec.image.channels):
                yield ("augmentation", name), fault
        height, width = self._size(spec)
        for fault in self.segmenter.network.faults(spec.image.channels, height, width):
            yield ("segmenter", "network", "kind"), fault
        if spec.mask.ignore is not None and spec.mask.ignore < spec.mask.classes:
            yield (
                ("kind",),
                f"the masks ignore class {spec.mask.ignore}, one of the {spec.mask.classes} that the segmenter would learn; give ignored pixels "
                "another number, such as 255, and number the classes from 0",
            )
        if self.adversary is not None:
            grid = [-(-side // self.stride) for side in (height, width)]
            if min(grid) < self.adversary.network.smallest:
                yield (
                    ("adversary", "network", "kind"),
                    f"`{self.adversary.network.kind}` needs label maps of {self.adversary.network.smallest} places a side or more, and the "
                    f"segmenter gives {grid[1]}×{grid[0]}",
                )
            elif self.unlabelled is not None and self._judges_whole_maps(spec):
                yield (
                    ("unlabelled",),
                    f"needs an adversary that judges places, and `{self.adversary.network.kind}` judges whole maps; use `per_pixel` or `patch`",
                )
        counted = spec.mask_present if self.class_weights == "median_frequency" else spec.mask_pixels
        if self.class_weights is not None and not counted:
            yield (
                ("class_weights",),
                "nobody counted how often each class occurs, since `data.subset` takes a part of the split or the dataset is an old one; leave it "
                "out, or pack the dataset anew",
            )
        if not self.scores.average and self.segmenter.ema is None:
            yield (
                ("scores", "average"),
                "has no effect where the segmenter keeps no average (`ema: null`); leave it out",
            )
        for name, side in (("segmenter", self.segmenter), ("adversary", self.adversary)):
            if side is not None and side.ema is not None and side.ema.from_zero:
                yield (name, "ema", "from_zero"), "is for a classifier that is tested late; leave it out"
        if self.adversary is not None and self.adversary.ema is not None:
            yield ("adversary", "ema"), "has no effect: the adversary is dropped after training; leave it out"

    @property
    def held_out(self) -> str | None:
        return self.scores.split

    @property
    def stride(self) -> int:
        return self.segmenter.network.stride

    def refuse_unready(self) -> None:
        if (weights := self.segmenter.network.pretrained) is not None:
            weights.read()

    def _size(self, spec: Spec) -> tuple[int, int]:
        """(height, width) of what the segmenter learns from."""
        _, height, width = spec.shape
        return (height, width) if self.augmentation is None else self.augmentation.size(height, width)

    def _adversary_shapes(self, spec: Spec) -> tuple[tuple[int, ...], ...]:
        """Of two rows of what the adversary is called with."""
        assert spec.mask is not None
        height, width = (-(-side // self.stride) for side in self._size(spec))
        channels = spec.shape[0]
        maps = spec.mask.classes * (channels if self.adversarial.input == "product" else 1)
        assert self.adversary is not None
        images = ((2, channels, height, width),) if self.adversary.network.reads_image else ()
        return (2, maps, height, width), *images

    def _judges_whole_maps(self, spec: Spec) -> bool:
        assert self.adversary is not None
        shapes = self._adversary_shapes(spec)
        with torch.device("meta"):
            judge = self.adversary.network.build(shapes[0][1], spec.shape[0])
            verdict: Tensor = judge(*(torch.zeros(shape) for shape in shapes))
        return verdict.ndim == 1

    def sides(self, spec: Spec) -> dict[str, Side]:
        assert spec.mask is not None
        network = self.segmenter.network
        found = {"segmenter": Side(self.segmenter, partial(network.build, spec.shape[0], spec.mask.classes))}
        if self.adversary is not None:
            maps = self._adversary_shapes(spec)[0][1]
            found["adversary"] = Side(self.adversary, partial(self.adversary.network.build, maps, spec.shape[0]))
        return found

    def examples(self, spec: Spec) -> dict[str, tuple[Tensor, ...]]:
        found: dict[str, tuple[Tensor, ...]] = {"segmenter": (torch.zeros(2, spec.shape[0], *self._size(spec)),)}
        if self.adversary is not None:
            found["adversary"] = tuple(torch.zeros(shape) for shape in self._adversary_shapes(spec))
        return found

    @property
    def starts(self) -> bool:
        return self.segmenter.network.pretrained is not None

    def start(self, players: Players, spec: Spec, samples: Tensor) -> None:
        try:
            self.segmenter.network.start(players["segmenter"].module)
        except Failure as error:  # the file is the one that the recipe names
            raise InputError(f"`game.segmenter.network.weights`: {error}") from None

    def seen(self, batch: Batch) -> Mapping[str, Tensor]:
        view = self._view(batch)
        return {**batch.parts, "image": view.images, "mask": view.mask}

    def evaluator(self, data: DataOptions, spec: Spec, device: torch.device) -> Segmentation:
        return Segmentation(self.scores, self.inference, self.stride, data, spec, device)

    def samples(
        self, players: Players, spec: Spec, count: int, seed: int, some: Callable[[int], Batch]
    ) -> Iterator[Tensor]:
        """(B, 3, H, 3W): images of the training data as they are, their truth, and the answers."""
        batch, segmenter = some(min(count, SHOWN)), players["segmenter"]
        inside = batch.inside("image")
        with segmenter.evaluating() as module:
            for row in range(len(inside)):
                image = batch["image"][row : row + 1]
                found = to_size(module(image.to(segmenter.device)), self.stride, image.shape[2:], image.shape[2:])
                answer = found.argmax(1).cpu().masked_fill_(~inside[row : row + 1], IGNORED)
                yield beside(image, batch["mask"][row : row + 1], answer)

    # ---- how it is played

    def phases(self, spec: Spec) -> tuple[Phase, ...]:
        weights = None
        if self.class_weights is not None:
            weights = tuple(CLASS_WEIGHTS[self.class_weights](spec.mask_pixels, spec.mask_present))
        block = self.adversarial.block
        first, second = (always, always) if block is None else (partial(in_block, block, turn) for turn in (0, 1))
        learn = Phase("segmenter", partial(self.segmenter_loss, weights), when=first, regime=self._regime)
        return (learn,) if self.adversary is None else (learn, Phase("adversary", self.adversary_loss, when=second))

    def _regime(self, clock: Clock) -> tuple[bool, bool]:
        """Whether the adversary is to be fooled, and whether unlabelled images are read."""
        unlabelled = self.unlabelled is not None and clock.images >= self.unlabelled.from_images
        return self.adversary is not None and clock.images >= self.adversarial.from_images, unlabelled

    def segmenter_loss(
        self, weights: tuple[float, ...] | None, players: Players, batch: Batch, clock: Clock, /
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ℓ_mce(s(x), y) + λ ℓ_bce(a(x, s(x)), 1): section 3.1, with the swap that the paper trains."""
        view = self._view(batch)
        logits: Tensor = players["segmenter"](view.images)
        truth = at_grid(view.mask, self.stride)
        by_class = None if weights is None else constant(weights, logits.device)
        terms = {"cross_entropy": cross_entropy(logits, truth, by_class, self.pixels == "mean")}
        if self.dice is not None:
            answers = at_least_fp32(logits).softmax(1) * labelled(truth)
            terms["dice"] = self.dice * dice(answers, one_hot(truth, logits.shape[1]))
        if self.adversary is not None:
            batch.made["logits"] = logits.detach()
            fools, reads_unlabelled = self._regime(clock)
            if fools:
                answers = at_least_fp32(logits).softmax(1) * labelled(truth)
                verdict: Tensor = players["adversary"](*self._inputs(answers, view.images))
                terms["adversarial"] = self.adversarial.weight * self._fooling(verdict, labelled(truth))
            if self.unlabelled is not None and reads_unlabelled:
                terms |= self._unlabelled(players, batch, self.unlabelled)
        values = {f"loss/segmenter/{name}": term.detach() for name, term in terms.items()}
        with torch.no_grad():
            there = truth != IGNORED
            right = ((logits.argmax(1) == truth) & there).sum() / there.sum().clamp_min(1)
        return torch.stack([*terms.values()]).sum(), values | {"accuracy/pixels": right}

    def adversary_loss(self, players: Players, batch: Batch, clock: Clock, /) -> tuple[Tensor, dict[str, Tensor]]:
        """ℓ_bce(a(x, y), 1) + ℓ_bce(a(x, s(x)), 0): section 3.1. It judges the maps that the segmenter has just made, where it has."""
        view = self._view(batch)
        made: Tensor | None = batch.made.pop("logits", None)
        logits = players["segmenter"](view.images).detach() if made is None else made
        truth = at_grid(view.mask, self.stride)
        answers, there = at_least_fp32(logits).softmax(1), labelled(truth)
        right = one_hot(truth, logits.shape[1])
        if self.adversarial.input == "scaling":
            right = scaled(right, answers, self.adversarial.threshold)
        adversary = players["adversary"]
        pairs = [self._inputs(maps, view.images) for maps in (right, answers * there)]
        if adversary.sees_batch:  # its statistics would mix them
            real, fake = (adversary(*inputs) for inputs in pairs)
        else:
            real, fake = adversary(*map(torch.cat, zip(*pairs, strict=True))).chunk(2)
        terms = {
            "real": self._over_places(F.softplus(-at_least_fp32(real)), there),
            "fake": self._over_places(F.softplus(at_least_fp32(fake)), there),
        }
        values = {f"loss/adversary/{name}": term.detach() for name, term in terms.items()}
        values |= {
            "logits/real": real.detach().mean(),
            "logits/fake": fake.detach().mean(),
            "accuracy/real": (real > 0).float().mean(),
            "accuracy/fake": (fake < 0).float().mean(),
        }
        return terms["real"] + terms["fake"], values

    def _view(self, batch: Batch) -> View:
        """The images and masks of a step, as both players see them."""
        if self.augmentation is None:
            return View(batch["image"], batch.inside("image"), batch["mask"])
        if "view" not in batch.made:
            batch.made["view"] = views(self.augmentation, batch, "image", "mask")
        found: View = batch.made["view"]
        return found

    def _inputs(self, maps: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        """What the adversary is called with for label maps (B, K, h, w)."""
        assert self.adversary is not None
        reads = self.adversary.network.reads_image
        if not reads and self.adversarial.input != "product":
            return (maps,)
        small = over_cells(images, self.stride)
        return product(maps, small) if self.adversarial.input == "product" else maps, *((small,) if reads else ())

    def _fooling(self, verdict: Tensor, there: Tensor) -> Tensor:
        verdict = at_least_fp32(verdict)
        loss = F.softplus(-verdict) if self.adversarial.kind == "non_saturating" else -F.softplus(verdict)
        return self._over_places(loss, there)

    def _over_places(self, losses: Tensor, there: Tensor) -> Tensor:
        """The mean over maps (B,), or over places (B, h', w'): what is ignored in maps (B, 1, h, w) counts 0, and every map divides by all
        its places.
        """
        if losses.ndim == 1:
            return over_maps(losses, there)
        if there.shape[2:] == losses.shape[1:]:
            return (losses * there[:, 0]).mean()
        places = (
            first + step * torch.arange(count, device=there.device)
            for _, count, first, step in self._axes(there, losses)
        )
        return (losses * sampled(there[:, 0], *places)).mean()

    def _at_pixels(self, verdict: Tensor, maps: Tensor) -> Tensor:
        """A verdict (B, h', w') at every pixel of the maps (B, K, h, w) that it is of."""
        if maps.shape[2:] == verdict.shape[1:]:
            return verdict
        pixels = (
            (torch.arange(side, device=maps.device) - first) / step
            for side, _, first, step in self._axes(maps, verdict)
        )
        return sampled(verdict, *pixels)

    def _axes(self, maps: Tensor, verdict: Tensor) -> list[tuple[int, int, float, float]]:
        """Of both axes: the pixels of the maps, the places of the verdict, where the first of these lies, and how far apart they are."""
        assert self.adversary is not None
        sides = zip(maps.shape[2:], verdict.shape[1:], strict=True)
        return [(side, count, *self.adversary.network.places(side, count)) for side, count in sides]

    def _unlabelled(self, players: Players, batch: Batch, options: UnlabelledOptions) -> dict[str, Tensor]:
        """Section 3.2 of Hung et al. 2018: answers that the adversary takes for true ones teach the segmenter."""
        images, inside = batch["unlabelled"], batch.inside("unlabelled")
        if self.augmentation is not None:
            images, inside, _ = views(self.augmentation, batch, "unlabelled")
        logits: Tensor = players["segmenter"](images)
        there = labelled(at_grid(torch.where(inside, 0, IGNORED), self.stride))
        answers = at_least_fp32(logits).softmax(1) * there
        verdict = at_least_fp32(players["adversary"](*self._inputs(answers, images)))
        sure = self._at_pixels(verdict.detach(), logits).sigmoid() > options.threshold
        guessed = torch.where(sure & (there[:, 0] > 0), logits.detach().argmax(1), IGNORED)
        terms = {"unlabelled": options.weight * cross_entropy(logits, guessed, None, self.pixels == "mean")}
        if options.adversarial:
            terms["unlabelled_adversarial"] = options.adversarial * self._fooling(verdict, there)
        return terms

    def symptoms(self, row: Mapping[str, float]) -> Iterator[Symptom]:
        right = min(row.get("accuracy/real", 0.0), row.get("accuracy/fake", 0.0))
        if right > WINS:
            yield Symptom(
                "adversary_wins",
                f"the adversary is right about {right:.1%} of true and of made label maps, which teach it nothing then",
                "use `input: scaling`, a smaller adversary, or a lower learning rate of it",
            )


def in_block(length: int, turn: int, clock: Clock) -> bool:
    """Whether the clock is in a block of `length` steps that is `turn`'s, of two players that take turns."""
    return clock.step // length % 2 == turn


def over_maps(losses: Tensor, there: Tensor) -> Tensor:
    """The mean of the losses (B,) of maps, of which those without any place that has a class (B, 1, h, w) count 0."""
    return (losses * there.flatten(1).amax(1)).mean()
