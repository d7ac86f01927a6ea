"""Classifiers of CLIP and SigLIP without training: the embeddings of texts, one for each label, become the head.

The texts are prompts, such as "a photo of a {}", with the label in place of the braces. They are embedded at export, so
that the service runs the image tower alone. With several prompts for a label, the mean of their normalized embeddings
is normalized again (CLIP, arXiv:2103.00020, section 3.1.4). CLIP has a softmax, SigLIP (arXiv:2303.15343) a sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitserve.export.checkpoint.errors import CheckpointError, OptionNeededError
from vitserve.export.checkpoint.formats.source import Source
from vitserve.export.checkpoint.labels import checked_labels
from vitserve.export.checkpoint.library import transformers_network
from vitserve.export.checkpoint.library.image_processing import read_processor
from vitserve.export.checkpoint.library.owner import Owner, check_finite, check_repeats
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.checkpoint.selection import Groups, find_network
from vitserve.model.bundle.preprocess import Preprocessing

KINDS = {"clip": "softmax", "metaclip_2": "softmax", "siglip": "sigmoid"}  # model_type → activation
DEFAULT_PROMPT = "a photo of a {}."
_SIGLIP_TOKENS = 64  # SigLIP is trained with texts padded to this length
_AT_A_TIME = 64  # texts


def is_zero_shot(settings: Mapping[str, Any]) -> bool:
    """Whether config.json is that of image and text towers, not of a classifier that was trained."""
    architectures = settings.get("architectures") or []
    return settings.get("model_type") in KINDS and not any("ForImageClassification" in name for name in architectures)


def of_towers(
    groups: Groups, keys: Mapping[str, Any], overrides: Overrides, preprocessing: Preprocessing | None, path: Path
) -> Source:
    """``keys`` is config.json. Needs labels. Raises CheckpointError."""
    if overrides.labels is None:
        raise OptionNeededError(
            f"{path} has an image tower and a text tower, and no classes: give them with --labels FILE, and how a label"
            f" becomes a text with --prompt (default: {DEFAULT_PROMPT!r})"
        )
    prompts = overrides.prompts or (DEFAULT_PROMPT,)
    for prompt in prompts:
        if "{}" not in prompt:
            raise CheckpointError(f"--prompt {prompt!r} has no {{}}, the place of the label")
    labels = checked_labels(overrides.labels, len(overrides.labels), "--labels")
    settings = transformers_network.without_code(keys)
    check_repeats(settings, sum(len(named) for named in groups.values()), "config.json")
    kind = str(settings["model_type"])
    config = transformers_network.configuration(settings)
    towers_class = transformers_network.imported().MODEL_MAPPING[type(config)]
    if preprocessing is None:
        preprocessing = read_processor(path).preprocessing
    tensors = find_network(groups, ("logit_scale",), overrides.weights, path)
    named = tensors.copy()
    check_finite(named)
    towers = transformers_network.loaded(towers_class, config, named)
    tokens = tokenized(path, [prompt.replace("{}", label) for label in labels for prompt in prompts], kind, config)
    network = ZeroShot(towers, text_embeddings(towers, tokens, len(prompts)))
    notes = (*tensors.notes, f"{len(labels)} labels × {len(prompts)} prompts, such as {prompts[0]!r}, are the head")
    activation: Any = KINDS[kind]
    owner = Owner("transformers", lambda size: network)
    name = f"{towers_class.__name__}, zero-shot"
    return Source(
        None, {}, preprocessing, labels, activation, notes=notes, owner=owner, architecture=name, classes=len(labels)
    )


class ZeroShot(nn.Module):
    """Images [n, channels, H, W] → logits [n, classes]."""

    def __init__(self, towers: nn.Module, texts: Tensor) -> None:
        """``texts``: normalized embeddings, [classes, width]."""
        super().__init__()
        self.towers = towers
        scale, bias = (getattr(towers, name, None) for name in ("logit_scale", "logit_bias"))
        assert isinstance(scale, Tensor)
        self.head = nn.Linear(texts.shape[1], texts.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(texts * scale.exp())
            self.head.bias.copy_(bias if isinstance(bias, Tensor) else torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        features: Any = getattr(self.towers, "get_image_features")(images)  # noqa: B009  # unknown to nn.Module
        logits: Tensor = self.head(_normalized(_pooled(features)))
        return logits


def tokenized(path: Path, texts: Sequence[str], kind: str, config: Any) -> dict[str, Tensor]:
    """The texts as transformers' pipeline tokenizes them: SigLIP's padded to its full length."""
    transformers = transformers_network.imported()
    try:
        with transformers_network.quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            length = int(config.text_config.max_position_embeddings)
            padding: dict[str, Any] = {"padding": True}
            if kind == "siglip":
                padding, length = {"padding": "max_length"}, min(length, _SIGLIP_TOKENS)
            tokens = tokenizer(list(texts), return_tensors="pt", truncation=True, max_length=length, **padding)
    except Exception as error:  # tokenizers raise several kinds
        raise CheckpointError(f"transformers cannot load or use the tokenizer of {path}: {error}") from error
    return {name: tensor for name, tensor in tokens.items() if name in ("input_ids", "attention_mask")}


def text_embeddings(towers: nn.Module, tokens: Mapping[str, Tensor], prompts: int) -> Tensor:
    """Normalized embeddings, [labels, width]; of several prompts for a label, their normalized mean."""
    embed: Any = getattr(towers, "get_text_features")  # noqa: B009
    count = len(tokens["input_ids"])
    with torch.no_grad():
        parts = [
            _normalized(_pooled(embed(**{name: tensor[start : start + _AT_A_TIME] for name, tensor in tokens.items()})))
            for start in range(0, count, _AT_A_TIME)
        ]
        embeddings = torch.cat(parts).reshape(count // prompts, prompts, -1)
    return _normalized(embeddings.mean(1))


def _pooled(features: Any) -> Tensor:
    pooled: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return pooled


def _normalized(x: Tensor) -> Tensor:
    normalized: Tensor = x / x.norm(p=2, dim=-1, keepdim=True)
    return normalized
