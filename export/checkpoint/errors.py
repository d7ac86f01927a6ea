"""The errors of reading a checkpoint.

CheckpointError         the checkpoint cannot be read, or its network is not supported
├── OptionNeededError   it lacks something that an option of `vitserve export` states
├── UnsupportedError    our networks or preprocessing do not have a part of it; its library's own network may
└── HubError            the model cannot be fetched from the Hugging Face hub
"""


class CheckpointError(ValueError):
    """The source is not a checkpoint that can be exported."""


class OptionNeededError(CheckpointError):
    """The checkpoint lacks something that an option of `vitserve export` states; the message names the option."""


class UnsupportedError(CheckpointError):
    """Our networks or our reading of the preprocessing lack a part. The library's own network may be exported."""


class HubError(CheckpointError):
    """The model cannot be fetched from the hub."""
