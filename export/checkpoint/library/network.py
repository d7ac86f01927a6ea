"""A network of another library, whose graph is exported as the library computes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.model.config import LibraryConfig


class LibraryNetwork(nn.Module):
    """Images [n, channels, H, W] → logits [n, classes] and embedding [n, width].

    The embedding is the input of the last linear layer with one output for each class; the logits if there is none.
    A network without classifier has the embedding as logits.
    """

    def __init__(
        self, logits: nn.Module, library: str, architecture: str, size: tuple[int, int, int], classifies: bool = True
    ) -> None:
        """``size``: height, width and channels of the input. ``logits``: embeddings, if it does not classify."""
        super().__init__()
        self.logits: nn.Module = logits.eval().requires_grad_(False)
        self._inputs: list[Tensor] = []
        height, width, channels = size
        example = torch.zeros(1, channels, height, width)
        try:
            with torch.inference_mode():
                output = self.logits(example)
        except Exception as error:  # a network raises whatever its layers raise
            raise CheckpointError(
                f"{architecture} of {library} cannot compute an image of {width} × {height} pixels with {channels}"
                f" channels: {error}"
            ) from error
        if not isinstance(output, Tensor) or output.ndim != 2:
            wanted = "one logit for each class" if classifies else "one embedding"
            raise CheckpointError(f"{architecture} of {library} does not compute {wanted}")
        classes = output.shape[1]
        heads = [layer for layer in logits.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes]
        if heads and classifies:
            heads[-1].register_forward_pre_hook(self._keep)
        with torch.inference_mode():
            embedding = self(example)[1]
        self.config = LibraryConfig(library, architecture, height, width, channels, classes, int(embedding.shape[-1]))
        if not classifies:
            self.config = replace(self.config, classes=0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._inputs.clear()
        logits: Tensor = self.logits(images)
        embedding = self._inputs[-1] if self._inputs and self._inputs[-1].ndim == 2 else logits
        self._inputs.clear()
        return logits, embedding * 1.0  # an output of its own, even if the logits are the embedding

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inputs.append(inputs[0])


def unfuse(network: nn.Module) -> bool:
    """Switches the attention to its form without a fused operator. Returns whether anything was switched.

    The exporter has no form for some fused attention, such as timm's with five axes.
    """
    switched = False
    for module in network.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]  # timm's flag
            switched = True
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa" and hasattr(module, "set_attn_implementation"):
            switch: Any = module.set_attn_implementation
            switch("eager")
            switched = True
    return switched
