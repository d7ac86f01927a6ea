"""The start of a training from a checkpoint: any that becomes a network of this project."""

from __future__ import annotations

from collections.abc import Sequence

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.library.network import LibraryNetwork
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.training.start import Start, from_trained


def start_from(source: str, labels: Sequence[str], image_size: int | None = None) -> Start:
    """Position embeddings are interpolated to ``image_size``. ``labels``: of the data. Raises CheckpointError."""
    checkpoint = load_checkpoint(source, image_size=image_size)
    network, preprocessing = checkpoint.network, checkpoint.preprocessing
    if isinstance(network, LibraryNetwork):
        raise CheckpointError(
            f"{source} is {network.config.architecture} of {network.config.library}, which can be exported but not"
            " trained here; plain ViTs and BiT's ResNets of timm, transformers, torchvision, Google and"
            " `vitserve train` can"
        )
    if preprocessing.channels != 3:
        raise CheckpointError(f"{source} takes gray images; only networks for RGB images can be trained")
    return from_trained(network, checkpoint.labels, labels, preprocessing, source)
