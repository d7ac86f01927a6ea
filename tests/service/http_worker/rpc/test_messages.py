"""open_inference.proto agrees with the messages of Triton's client, and messages.binpb with its source."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from tritonclient.grpc import model_config_pb2, service_pb2

from vitserve.service.http_worker.rpc.messages import COMPILED

Fields = set[tuple[str, int, int, int, str]]
OURS = FileDescriptorSet.FromString(COMPILED.read_bytes()).file
# Triton's client does not have it.
ONLY_KSERVE = {("properties", 6, 3, 11, ".inference.ModelMetadataResponse.PropertiesEntry")}


def messages(prefix: str, found: Iterable[DescriptorProto]) -> Iterator[tuple[str, Fields]]:
    """The fields of each message, by its name with the package: name, number, label, type, type of a message."""
    for message in found:
        name = f"{prefix}.{message.name}"
        fields = ((field.name, field.number, field.label, field.type, field.type_name) for field in message.field)
        yield name, set(fields)
        yield from messages(name, message.nested_type)


@pytest.fixture(scope="module")
def of_triton() -> dict[str, Fields]:
    found: dict[str, Fields] = {}
    for module in (service_pb2, model_config_pb2):
        file = FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        found |= dict(messages(file.package, file.message_type))
    return found


def test_fields_are_those_of_tritons_client(of_triton: dict[str, Fields]) -> None:
    ours = dict(messages(OURS[0].package, OURS[0].message_type))
    strange = {name: fields - of_triton.get(name, set()) - ONLY_KSERVE for name, fields in ours.items()}
    strange.pop("inference.ModelMetadataResponse.PropertiesEntry")
    assert {name: fields for name, fields in strange.items() if fields} == {}
    requests = [name for name in ours if name.endswith("Request") or ".ModelInfer" in name or "InferT" in name]
    assert {name for name in requests if ours[name] != of_triton[name]} == set()


def test_methods_are_those_of_tritons_client() -> None:
    theirs = FileDescriptorProto.FromString(service_pb2.DESCRIPTOR.serialized_pb).service[0].method
    (service,) = OURS[0].service
    ours = {(method.name, method.input_type, method.output_type) for method in service.method}
    assert ours <= {(method.name, method.input_type, method.output_type) for method in theirs}


def test_the_compiled_messages_are_those_of_the_source(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    source, output = importlib.resources.files("vitserve.service.http_worker.rpc"), tmp_path / "messages.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", f"--descriptor_set_out={output}"]
    subprocess.run([*command, "open_inference.proto", "health.proto"], check=True)
    assert list(FileDescriptorSet.FromString(output.read_bytes()).file) == list(OURS)
