"""Token merging: similar patch tokens become one, so that later blocks compute fewer.

Bolya et al., "Token Merging: Your ViT But Faster", 2023 (arXiv:2210.09461). No training is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merged_tokens(tokens: int, prefix: int, merge: int) -> int:
    """The number of tokens after a block that merges up to ``merge`` of them: at most half of the patches."""
    return tokens - min(merge, (tokens - prefix) // 2)


def merge_tokens(x: Tensor, sizes: Tensor, keys: Tensor, prefix: int, merge: int) -> tuple[Tensor, Tensor]:
    """Merges pairs of patch tokens with similar keys: bipartite soft matching (section 3, appendix D).

    ``x``: [n, tokens, width]. ``sizes``: [n, tokens, 1], the patches in each token. ``keys``: [n, tokens, head width],
    of the attention, averaged over its heads. The first ``prefix`` tokens are never merged.
    Returns tokens and sizes of merged_tokens() tokens. A merged token is the mean of its patches.
    """
    merge = x.shape[1] - merged_tokens(x.shape[1], prefix, merge)
    if not merge:
        return x, sizes
    # Every second patch is a source, and the others are targets.
    keys = keys[:, prefix:] / keys[:, prefix:].norm(dim=-1, keepdim=True)
    similarity, target = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=-1)  # each [n, sources]
    order = similarity.topk(similarity.shape[1], dim=-1).indices
    merged, kept = order[:, :merge], order[:, merge:]
    weighted = torch.cat([x[:, prefix:] * sizes[:, prefix:], sizes[:, prefix:]], dim=2)  # [n, patches, width + 1]
    sources, targets = weighted[:, ::2], weighted[:, 1::2]
    place = target.gather(1, merged)[:, :, None].expand(-1, -1, weighted.shape[2])
    targets = targets.scatter_add(1, place, _rows(sources, merged))
    sums = torch.cat([_rows(sources, kept), targets], dim=1)
    counts = sums[:, :, -1:]
    patches = sums[:, :, :-1] / counts
    return torch.cat([x[:, :prefix], patches], dim=1), torch.cat([sizes[:, :prefix], counts], dim=1)


def _rows(values: Tensor, indices: Tensor) -> Tensor:
    """[n, rows, width], [n, k] → [n, k, width]."""
    return values.gather(1, indices[:, :, None].expand(-1, -1, values.shape[2]))
