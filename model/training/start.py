"""Where a training starts: a network, its first weights, and its preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig, any_variant
from vitserve.model.network.build import Network, network_of

_HEADS = ("head.", "head_dist.")


@dataclass(frozen=True)
class Start:
    config: ViTConfig | ResNetConfig
    preprocessing: Preprocessing
    weights: Mapping[str, Tensor] | None = None  # of the network, maybe without those of the head; None: random
    source: str = ""  # of the weights

    def network(self) -> Network:
        """With the weights. Those that are missing are random, or zero in the head."""
        network = network_of(self.config)
        if self.weights is not None:
            network.load_state_dict(dict(network.state_dict()) | dict(self.weights))
        return network


def from_scratch(variant: str, classes: int, image_size: int | None = None) -> Start:
    """The named variant for any number of classes and any image size. Raises ValueError."""
    known = any_variant(variant)
    config = replace(known, classes=classes, image_size=image_size or known.image_size)
    return Start(config, Preprocessing(config.image_size))


def from_trained(
    network: Network, known: Sequence[str], labels: Sequence[str], preprocessing: Preprocessing, source: str
) -> Start:
    """``known``: the labels that the network was trained with. The head is replaced unless they are ``labels``."""
    config, weights = network.config, network.state_dict()
    if tuple(known) != tuple(labels):
        config = replace(config, classes=len(labels))
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_HEADS)}
        if isinstance(config, ViTConfig) and config.representation_width is not None:
            # The paper replaces the whole head, the hidden layer of the pre-training too (section 3.2).
            config = replace(config, representation_width=None)
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("pre_logits.")}
    return Start(config, preprocessing, weights, source)
