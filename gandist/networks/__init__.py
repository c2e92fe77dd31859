"""Networks: one family a file. A family's options are a section of the recipe and build the module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar

from pydantic import SerializeAsAny, WrapValidator
from torch import Tensor, nn

from gandist.networks.heads import (
    Classifies,
    Conditioned,
    Conditioning,
    Head,
    Judge,
    Judged,
    MinibatchDiscrimination,
    MinibatchOptions,
    Recogniser,
    classes_of,
    normalise_spectra,
)
from gandist.networks.starting import MAX_VALUES, START, start_by
from gandist.recipe import Choice, Section, installed

__all__ = [
    "AnyDiscriminator", "AnyGenerator", "Classifies", "Conditioned", "Conditioning", "DiscriminatorOptions", "GeneratorOptions", "Judged",
    "Shape", "amount", "classes_of",
]  # fmt: skip

Shape = tuple[int, ...]  # of one sample: (C, H, W) of an image, (C, L) of a signal


class GeneratorOptions(Section):
    """A generator: noise (B, noise) and, where there are classes, labels (B,), to samples (B, *shape): images in −1 … 1."""

    kind: str
    axes: ClassVar[tuple[int, ...]] = (3,)  # how many axes a sample may have: 3 an image, 2 a signal
    smallest: ClassVar[int] = 1  # pixels of a side, or values of a signal

    def build(self, noise: int, shape: Shape, classes: int | None = None) -> nn.Module:
        """The module with its initial weights, drawn from torch's global generator."""
        if classes is None:
            return self.module(noise, shape)
        return Conditioned(classes, noise, self.module(2 * noise, shape))

    @abstractmethod
    def module(self, noise: int, shape: Shape) -> nn.Module:
        """Noise (B, noise) to samples (B, *shape)."""

    @property
    def sees_batch(self) -> str | None:
        """What makes its output for one row depend on the others, as a key with its value; None where nothing does."""
        return None

    @property
    def start_samples(self) -> int:
        """How many samples of the data its initial weights depend on."""
        return 0

    @property
    def starts(self) -> bool:
        """Whether its initial weights wait for `start`."""
        return self.start_samples > 0

    def start(self, module: nn.Module, samples: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Changes initial weights, on one process, by `start_samples` samples (N, *shape) of the data, or by `inputs` as the module takes
        them: noise (START, noise) and, where it is conditional, labels."""

    def faults(self, shape: Shape) -> Iterator[str]:
        """Why it cannot make such samples."""
        yield from _misfits(self, shape)


class DiscriminatorOptions(Section):
    """A discriminator: samples (B, *shape) and, where it is conditioned on them, labels (B,), to `Judged`."""

    kind: str
    spectral_norm: bool = False
    minibatch: MinibatchOptions | None = None
    axes: ClassVar[tuple[int, ...]] = (3,)
    smallest: ClassVar[int] = 1

    def build(self, shape: Shape, classes: int | None = None, conditioning: Conditioning | None = None) -> nn.Module:
        """The module with its initial weights, drawn from torch's global generator."""
        trunk, features = self.trunk(shape)
        head = Head(features, classes if conditioning else None, conditioning, self.minibatch)
        self.initialise(head)
        judge = Judge(trunk, head)
        if self.spectral_norm:
            normalise_spectra(judge)
        return judge

    def build_classifier(self, shape: Shape, classes: int, options: Classifies) -> nn.Module:
        """The module as a classifier of K classes, with its initial weights, likewise."""
        trunk, features = self.trunk(shape)
        minibatch = MinibatchDiscrimination(features, self.minibatch) if self.minibatch is not None else None
        features += self.minibatch.kernels if self.minibatch is not None else 0
        outputs = self.outputs(features, classes + options.fake_class)
        judge = Recogniser(trunk, outputs, classes, minibatch, options.layer)
        if self.spectral_norm:
            normalise_spectra(judge)
        return judge

    def outputs(self, features: int, count: int) -> nn.Module:
        """Features (B, F) to class logits (B, count)."""
        last = nn.Linear(features, count)
        self.initialise(last)
        return last

    @property
    def sees_batch(self) -> str | None:
        """What makes its output for one row depend on the others, as a key with its value; None where nothing does."""
        return "minibatch" if self.minibatch is not None else None

    @property
    def start_samples(self) -> int:
        """How many samples of the data its initial weights depend on."""
        return START if self.minibatch is not None else 0

    def start(self, module: nn.Module, samples: Tensor, labels: Tensor | None = None) -> None:
        """Changes initial weights, on one process, by samples (N, *shape) of the data; `labels` (N,) where it is called with some."""
        if self.start_samples:
            count = max(2, min(self.start_samples, MAX_VALUES // samples[0].numel()))
            start_by(module, samples[:count], *(() if labels is None else (labels[:count],)))

    @abstractmethod
    def trunk(self, shape: Shape) -> tuple[nn.Module, int]:
        """Samples (B, *shape) to features (B, F), and F."""

    def initialise(self, head: nn.Module) -> None:
        """Gives the head its initial weights, where torch's own are not the family's."""

    def faults(self, shape: Shape) -> Iterator[str]:
        """Why it cannot judge such samples."""
        yield from _misfits(self, shape)


def _choice(role: str, base: type[Section]) -> Choice:
    """Networks of a role by the name that an installed package gave them."""
    return Choice(f"a {role}", partial(installed, "gandist.networks", f"{role}.", base))


AnyGenerator = Annotated[SerializeAsAny[GeneratorOptions], WrapValidator(_choice("generator", GeneratorOptions))]
AnyDiscriminator = Annotated[
    SerializeAsAny[DiscriminatorOptions], WrapValidator(_choice("discriminator", DiscriminatorOptions))
]


def amount(shape: Shape) -> str:
    """A shape in the user's words: 28×28, or 1,024 values."""
    return f"{shape[2]}×{shape[1]}" if len(shape) == 3 else f"{shape[1]:,} values"


def _misfits(options: GeneratorOptions | DiscriminatorOptions, shape: Shape) -> Iterator[str]:
    if len(shape) not in options.axes:
        yield f"`{options.kind}` is for {'images' if options.axes == (3,) else 'signals'}, and the dataset has {'images' if len(shape) == 3 else 'signals'}; use `{'dcgan' if len(shape) == 3 else 'signal'}` or `mlp`"
    elif min(shape[1:]) < options.smallest:
        what = "images of {} pixels a side" if len(shape) == 3 else "signals of {} values"
        yield (
            f"`{options.kind}` needs {what.format(options.smallest)} or more, and the dataset has {amount(shape)}; "
            "use `mlp`, or pack with --size"
        )
