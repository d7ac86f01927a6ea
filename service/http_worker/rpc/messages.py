"""The messages of open_inference.proto and health.proto, from messages.binpb, which `make proto` compiles.

They are in a pool of their own: in protobuf's default pool they would clash with those of a client in the same process,
which have the same names. And compiled descriptors load with every version of protobuf, unlike generated Python code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

__all__ = ["COMPILED", "HEALTH", "INFERENCE", "DecodeError", "Message", "message_class", "request_classes"]

COMPILED = Path(__file__).parent / "messages.binpb"
INFERENCE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"  # services


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(COMPILED.read_bytes()).file:
        pool.Add(file)
    return pool


_POOL = _pool()


def message_class(name: str) -> Any:
    """``name``: with the package, such as inference.ModelInferRequest."""
    return GetMessageClass(_POOL.FindMessageTypeByName(name))


def request_classes(service: str) -> dict[str, Any]:
    """The class of the request of each method."""
    methods = _POOL.FindServiceByName(service).methods
    return {method.name: GetMessageClass(method.input_type) for method in methods}
