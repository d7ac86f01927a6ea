"""A linear layer in a file, as a head of a bundle: of PyTorch, timm, Transformers, or scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitserve.model.arrays import Floats
from vitserve.model.bundle.head import HeadError

_WEIGHTS, _BIASES = ("weight", "coef_"), ("bias", "intercept_")


def read_layer(path: Path) -> tuple[Floats, Floats]:
    """Weight float32 [classes, width], and bias float32 [classes].

    ``path`` is a .safetensors or .npz file with the two tensors of one layer: PREFIX.weight and PREFIX.bias with any
    prefix, or scikit-learn's coef_ and intercept_. Other tensors are allowed if none is the weight of another layer.
    A layer without a bias has zeros. scikit-learn has one row for two classes, whose logit belongs to the second.

    Raises HeadError.
    """
    tensors = {name: tensor for name, tensor in _tensors(path).items() if tensor.ndim in (1, 2)}
    weights = [name for name, tensor in tensors.items() if tensor.ndim == 2 and name.split(".")[-1] in _WEIGHTS]
    if len(weights) != 1:
        names = ", ".join(sorted(weights)[:10]) or "none"
        raise HeadError(f"{path} must have the weight of one linear layer, [classes, width]; it has: {names}")
    (name,) = weights
    prefix = name[: len(name) - len(name.split(".")[-1])]
    weight = tensors[name].astype(np.float32)
    biases = [tensors[prefix + suffix] for suffix in _BIASES if prefix + suffix in tensors]
    bias = biases[0].astype(np.float32) if biases else np.zeros(len(weight), np.float32)
    if len(weight) == 1 and bias.shape == (1,):
        return np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])
    return weight, bias


def _tensors(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # numpy and safetensors raise many kinds
        raise HeadError(f"{path} cannot be read: {error}") from error
    raise HeadError(f"{path} must be a .safetensors or .npz file")
