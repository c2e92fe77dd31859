"""What stands between a discriminator's features and its verdict: logits, classes, minibatch discrimination, spectral norm."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gandist.recipe import Section

Conditioning = Literal["projection", "classifier"]
SMALL = 0.1  # deviation of the initial embedding of a class, beside noise of 1


class Judged(NamedTuple):
    """Logits (B,), positive for real; the features (B, F) that they are read from; class logits (B, K) of an auxiliary classifier."""

    logits: Tensor
    features: Tensor
    classes: Tensor | None = None


class MinibatchOptions(Section):
    """Minibatch discrimination (Salimans et al. 2016, section 3.2): how many kernels, of how many dimensions."""

    kernels: Annotated[int, Field(ge=1, le=1024)] = 100
    dimensions: Annotated[int, Field(ge=1, le=64)] = 5


class MinibatchDiscrimination(nn.Module):
    """(B, F) to (B, F + kernels): how close each row is to the others of its batch, by a learned distance.

    o_b = Σ_{j ≠ i} exp(−‖M_ib − M_jb‖₁) with M = f T, of the rows of one forward on one process; j = i adds the same 1 to all
    and is left out, as in the released code.
    """

    sees_batch = True  # a row's output depends on the other rows

    def __init__(self, features: int, options: MinibatchOptions) -> None:
        super().__init__()
        self.options = options
        self.project = nn.Linear(features, options.kernels * options.dimensions, bias=False)
        self.bias = nn.Parameter(torch.full((options.kernels,), -1.0))

    def forward(self, features: Tensor) -> Tensor:
        matrices = rearrange(self.project(features), "b (k d) -> b k d", k=self.options.kernels).float()
        near = torch.exp(-(matrices[:, None] - matrices[None]).abs().sum(3))  # (B, B, kernels)
        others = near.sum(1) - 1
        return torch.cat([features, (others + self.bias).to(features.dtype)], dim=1)


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


def normalise_spectra(module: nn.Module) -> None:
    """Divides each weight by its largest singular value (Miyato et al. 2018), by one power iteration a forward."""
    for part in [*module.modules()]:
        if isinstance(part, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding):
            spectral_norm(part, dim=1 if isinstance(part, nn.modules.conv._ConvTransposeNd) else 0)
