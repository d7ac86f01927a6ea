"""The device that a network is trained on."""

from __future__ import annotations

import os
import platform

import torch

CPU = torch.device("cpu")


def select_device(name: str) -> torch.device:
    """cpu, cuda, or auto: a GPU if torch can use one. Raises ValueError for another name, or for cuda without a GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: torch finds no GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the number of CPU cores and their architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
