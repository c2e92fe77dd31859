"""What stands between a discriminator's features and its verdict: logits, classes, minibatch discrimination, spectral norm."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from gandist.losses import evidence, uncast
from gandist.networks.starting import Measuring
from gandist.recipe import Section

Conditioning = Literal["projection", "classifier"]
SMALL = 0.1  # deviation of the initial embedding of a class, beside noise of 1


class Judged(NamedTuple):
    """Logits (B,), positive for real; the features (B, F) that they are read from; class logits (B, K), where it classifies."""

    logits: Tensor
    features: Tensor
    classes: Tensor | None = None


def classes_of(verdict: Judged) -> Tensor:
    """The class logits (B, K) of a discriminator that classifies."""
    assert verdict.classes is not None
    return verdict.classes


class Classifies(Section):
    """What makes a discriminator a classifier."""

    fake_class: bool = False  # an output for fakes beside those of the classes
    layer: Annotated[int, Field(ge=0, le=64)] = (
        0  # parts of the trunk between the features that it shows and the outputs
    )


class MinibatchOptions(Section):
    """Minibatch discrimination (Salimans et al. 2016, section 3.2): how many kernels, of how many dimensions."""

    kernels: Annotated[int, Field(ge=1, le=1024)] = 100
    dimensions: Annotated[int, Field(ge=1, le=64)] = 5


class _GatherOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        mine: Tensor = total.chunk(dist.get_world_size())[dist.get_rank()]
        return mine


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all processes, of which each holds equally many, in the order of ranks; collective, forward and backward.

    What another rank's loss owes to these rows is added to their gradient, so that the mean over the ranks of the gradients of
    the weights, which DDP takes, is that of the loss of the whole batch.
    """
    gathered: Tensor = _GatherOverRanks.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class MinibatchDiscrimination(Measuring):
    """(B, F) to (B, F + kernels): how close each row is to the others of its batch, by a learned distance.

    o_b = Σ_{j ≠ i} exp(−‖M_ib − M_jb‖₁) + bias with M = f T; j = i adds the same 1 to all and is left out, as in the released code.
    T = exp(s) θ / ‖θ‖ for each dimension of a kernel. Measured by a first batch, s makes half the mean distance of nearest rows 1 in
    each kernel, and the bias makes the mean of o_b zero. While training, the others are those of all processes.
    """

    sees_batch = True  # a row's output depends on the other rows

    def __init__(self, features: int, options: MinibatchOptions) -> None:
        super().__init__()
        self.options = options
        self.project = nn.Linear(features, options.kernels * options.dimensions, bias=False)
        nn.init.normal_(self.project.weight, 0.0, 0.05)
        self.log_scale = nn.Parameter(torch.zeros(options.kernels, options.dimensions))
        self.bias = nn.Parameter(torch.full((options.kernels,), -1.0))

    def forward(self, features: Tensor) -> Tensor:
        if self.measures:
            return self.measure(features)
        matrices = self._matrices(features)
        many = self.training and dist.is_initialized() and dist.get_world_size() > 1
        others = rows_of_all_ranks(matrices) if many else matrices
        near = torch.exp(-_distances(matrices, others)).sum(1) - 1
        return torch.cat([features, (near + self.bias).to(features.dtype)], dim=1)

    def measure(self, features: Tensor) -> Tensor:
        made = []
        for kernel, rows in enumerate(
            self._matrices(features).unbind(1)
        ):  # one by one, since all together are a gigabyte
            distances = _distances(rows[:, None], rows[:, None])[:, :, 0].fill_diagonal_(float("inf"))
            half = (0.5 * distances.amin(1).mean()).clamp_min(1e-8)
            self.log_scale[kernel].sub_(half.log())
            near = torch.exp(-distances / half).sum(1)
            self.bias[kernel] = -near.mean()
            made.append(near - near.mean())
        return torch.cat([features, torch.stack(made, 1).to(features.dtype)], dim=1)

    def _matrices(self, features: Tensor) -> Tensor:
        """M (B, kernels, dimensions)."""
        length = self.project.weight.square().sum(1).add(1e-12).sqrt()
        scaled = self.project(features).float() * (self.log_scale.exp().flatten() / length)
        matrices: Tensor = rearrange(scaled, "b (k d) -> b k d", k=self.options.kernels)
        return matrices


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """(B, all rows, kernels) of (B, kernels, dimensions) and all rows'. torch.cdist has no second derivative and no ONNX."""
    return (rows[:, None] - others[None]).abs().sum(3)


class Head(nn.Module):
    """Features (B, F) to a verdict.

    With `projection` the logit gains ⟨embedding of the class, features⟩ (Miyato and Koyama 2018, equation 3); with `classifier`
    there are class logits beside it (Odena et al. 2017).
    """

    def __init__(
        self, features: int, classes: int | None, conditioning: Conditioning | None, minibatch: MinibatchOptions | None
    ) -> None:
        super().__init__()
        assert (classes is None) == (conditioning is None), (classes, conditioning)
        self.minibatch = MinibatchDiscrimination(features, minibatch) if minibatch is not None else nn.Identity()
        features += minibatch.kernels if minibatch is not None else 0
        self.logit = nn.Linear(features, 1)
        if conditioning == "projection" and classes is not None:
            self.embedding = nn.Embedding(classes, features)
        if conditioning == "classifier" and classes is not None:
            self.classifier = nn.Linear(features, classes)
        self.conditioning = conditioning

    def forward(self, features: Tensor, labels: Tensor | None) -> Judged:
        features = self.minibatch(features)
        logits = self.logit(features).squeeze(1)
        if self.conditioning == "projection":
            assert labels is not None
            logits = logits + (self.embedding(labels) * features).sum(1)
        classes = self.classifier(features) if self.conditioning == "classifier" else None
        return Judged(logits, features, classes)


class Judge(nn.Module):
    """A discriminator: a trunk, (B, *shape) to features (B, F), and a head."""

    def __init__(self, trunk: nn.Module, head: Head) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, sample: Tensor, labels: Tensor | None = None) -> Judged:
        judged: Judged = self.head(self.trunk(sample), labels)
        return judged


class Recogniser(nn.Module):
    """A discriminator that is a classifier: a trunk, and `outputs` of its features, (B, F) to (B, K) or, with a fake class, (B, K + 1).

    Its verdict has the class logits (B, K), the logit of being real that they imply, and the features of the trunk's last part, or of
    the `layer`-th part before it.
    """

    def __init__(
        self, trunk: nn.Module, outputs: nn.Module, classes: int, minibatch: nn.Module | None, layer: int
    ) -> None:
        super().__init__()
        self.trunk, self.outputs, self.classes, self.layer = trunk, outputs, classes, layer
        self.minibatch = minibatch if minibatch is not None else nn.Identity()

    def forward(self, sample: Tensor) -> Judged:
        if self.layer == 0:
            features = seen = self.trunk(sample)
        else:
            assert isinstance(self.trunk, nn.Sequential)
            seen = self.trunk[: -self.layer](sample)
            features = self.trunk[-self.layer :](seen)
        logits = self.outputs(self.minibatch(features))
        return Judged(evidence(logits, self.classes), seen.flatten(1), logits[:, : self.classes].float())


class Conditioned(nn.Module):
    """A generator of noise alone, which gets a learned embedding of the class as further noise.

    The embedding begins small beside the noise. With torch's N(0, 1) it is as large, and a DCGAN of garments made one image a
    class, whatever the noise, in all of its first 50,000 images and, by the recall of 0, long after; now it tells its samples apart.
    """

    def __init__(self, classes: int, width: int, module: nn.Module) -> None:
        super().__init__()
        self.embedding, self.module = nn.Embedding(classes, width), module
        nn.init.normal_(self.embedding.weight, 0.0, SMALL)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = self.module(torch.cat([noise, self.embedding(labels).to(noise.dtype)], dim=1))
        return made


class SpectralNorm(parametrizations._SpectralNorm):
    """Computed in fp32 whatever the precision: CUDA's autocast rounds the iteration to bf16 otherwise, and a CPU's does not."""

    def forward(self, weight: Tensor) -> Tensor:
        with uncast(weight):
            return super().forward(weight)


def normalise_spectra(module: nn.Module) -> None:
    """Divides each weight by its largest singular value (Miyato et al. 2018), by one power iteration a forward."""
    for part in [*module.modules()]:
        if isinstance(part, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding):
            axis = 1 if isinstance(part, nn.modules.conv._ConvTransposeNd) else 0
            parametrize.register_parametrization(part, "weight", SpectralNorm(part.weight, 1, axis, 1e-12))
