"""The errors of reading a checkpoint.

CheckpointError    the checkpoint cannot be read, or its network is not supported
└── HubError       the model cannot be fetched from the Hugging Face hub
"""


class CheckpointError(ValueError):
    """The source is not a checkpoint that can be exported."""


class HubError(CheckpointError):
    """The model cannot be fetched from the hub."""
