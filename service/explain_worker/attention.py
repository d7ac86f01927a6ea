"""Attention of a Vision Transformer as a map over the image. numpy only.

Attention rollout: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020 (arXiv:2005.00928), as in
figure 6 of "An Image is Worth 16x16 Words" (arXiv:2010.11929): attention is averaged over the heads, and half of each
token's own value is kept for the residual connection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitserve.model.arrays import Floats


class NotExplainableError(ValueError):
    """The method has no meaning for this network."""


def grid_of(height: int, width: int, tokens: int) -> tuple[int, int, int]:
    """Rows and columns of patches, and the number of other tokens, which come first.

    ``height`` and ``width``: of the image in pixels. The fewest other tokens are assumed, at most 16.

    Raises NotExplainableError if the tokens are no grid of square patches.
    """
    for others in range(17):
        for patch in range(1, min(height, width) + 1):
            if height % patch == width % patch == 0 and (height // patch) * (width // patch) == tokens - others:
                return height // patch, width // patch, others
    raise NotExplainableError(f"{tokens} tokens are no grid of patches of an image of {width} × {height} pixels")


def rollout(attentions: Sequence[Floats], others: int) -> Floats:
    """The rollout up to each layer, [layers, tokens].

    ``attentions``: [heads, queries, tokens] of each layer; the last one may have the query of the class token only.
    Of the class token, or the mean over all tokens if there are no ``others``.
    """
    tokens = attentions[0].shape[-1]
    joint = np.eye(tokens, dtype=np.float32)
    rows = []
    for attention in attentions:
        mean = attention.mean(axis=0)
        step = 0.5 * mean + 0.5 * np.eye(tokens, dtype=np.float32)[: len(mean)]
        joint = step @ joint
        rows.append(joint[0] if others or len(joint) == 1 else joint.mean(axis=0))
    return np.stack(rows)


def attention_of(attention: Floats, head: int | None, others: int) -> Floats:
    """The attention of one layer to each token, [tokens], of one head or the mean of all.

    Of the class token, or the mean over all tokens if there are no ``others``.
    """
    chosen = attention.mean(axis=0) if head is None else attention[head]
    row: Floats = chosen[0] if others or len(chosen) == 1 else chosen.mean(axis=0)
    return row


def on_grid(row: Floats, grid: tuple[int, int, int]) -> Floats:
    """The values of the patches, [rows, columns], so that the largest is 1."""
    rows, columns, others = grid
    values = row[others:].reshape(rows, columns)
    scaled: Floats = values / max(float(values.max()), 1e-12)
    return scaled
