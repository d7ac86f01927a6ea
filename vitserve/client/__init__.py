"""A client for vitserve, synchronous and asynchronous. Needs httpx: ``pip install "vitserve[client]"``.

with Client("http://127.0.0.1:8000") as client:
    print(client.classify(Path("cat.jpg")).predictions[0].label)
"""

from vitserve.client.clients import AsyncClient, Client
from vitserve.client.errors import (
    ConnectionFailedError,
    DeadlineExceededError,
    ImageError,
    InvalidResponseError,
    OverloadedError,
    ProblemError,
    RequestError,
    ServerError,
    UnavailableError,
    VitserveError,
)
from vitserve.client.results import Classification, Embedding, Model, Prediction

__all__ = [
    "AsyncClient",
    "Classification",
    "Client",
    "ConnectionFailedError",
    "DeadlineExceededError",
    "Embedding",
    "ImageError",
    "InvalidResponseError",
    "Model",
    "OverloadedError",
    "Prediction",
    "ProblemError",
    "RequestError",
    "ServerError",
    "UnavailableError",
    "VitserveError",
]
