"""The common result of all formats: configuration, weights under our parameter names, preprocessing and labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError, UnsupportedError
from vitserve.export.checkpoint.library.owner import Owner
from vitserve.export.checkpoint.position_embeddings import TIMM, Interpolation
from vitserve.export.checkpoint.state_dict import Tensors
from vitserve.model.arrays import Activation
from vitserve.model.bundle.preprocess import Preprocessing
from vitserve.model.config import ResNetConfig, ViTConfig

# Width → heads of the published sizes Ti, S, B, L and H. Weights alone do not show the number of heads.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


@dataclass(frozen=True)
class Source:
    config: ViTConfig | ResNetConfig | None  # None: not one of our networks, so the owner's is exported
    weights: dict[str, Tensor]
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None  # None if the checkpoint has no labels
    activation: Activation | None = None  # None if the checkpoint does not state it
    interpolation: Interpolation = TIMM  # of position embeddings
    notes: tuple[str, ...] = ()  # the decisions of the reader, for the user
    owner: Owner | None = None  # None if there is none that could build the network
    architecture: str = ""  # the owner's name of the network
    classes: int = 0  # of the owner's network


def heads_of(width: int) -> int:
    """The number of heads. Raises CheckpointError for a width other than the published sizes'."""
    if width not in _HEADS:
        raise CheckpointError(
            f"cannot determine the number of heads for width {width} from weights alone; known widths: {_HEADS}"
        )
    return _HEADS[width]


def rename_head(tensors: Tensors, attribute: str, usual: str) -> None:
    """Gives a head that was replaced the ``usual`` name of the linear layer, such as heads.head.

    Before fine-tuning, ``attribute`` is often replaced by a linear layer, or by a sequence of dropout and a
    linear layer. Raises CheckpointError if its tensors are not those of one linear layer.
    """
    if f"{usual}.weight" in tensors:
        return
    tensors_of_head = tensors.names(f"{attribute}.")
    if not tensors_of_head:
        raise CheckpointError(
            f"the checkpoint has no classification head ({usual}.weight): it is a base model, which computes features."
            " Export a network that was fine-tuned for classification"
        )
    layers = {name.rpartition(".")[0] for name in tensors_of_head}
    (layer, *surplus) = sorted(layers)
    parts = {name.rpartition(".")[2] for name in tensors_of_head}
    if surplus or parts - {"weight", "bias"} or "weight" not in parts or len(tensors.shape(f"{layer}.weight")) != 2:
        raise UnsupportedError(f"unsupported head: {', '.join(tensors_of_head)}; supported is one linear layer")
    tensors.rename(lambda name: usual + name.removeprefix(layer) if name.startswith(f"{layer}.") else name)
    before = "; a layer before it has no weights and is taken for dropout" if layer != attribute else ""
    tensors.notes.append(f"the head is the linear layer {layer}{before}")
