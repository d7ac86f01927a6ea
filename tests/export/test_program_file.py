"""`vitserve export model.pt2`: the bundle computes what the program computes, and no code of the file is executed."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from tests.support.checkpoints import relative_difference
from tests.support.onnx_files import CLASSES, SIDE, Classifier
from vitserve.cli.main import app
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.overrides import Overrides
from vitserve.export.program_file.archive import read_program
from vitserve.export.program_file.load import load_program
from vitserve.model.arrays import to_probabilities
from vitserve.model.bundle.bundle import open_bundle
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

NORMALIZED: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


def write(path: Path, network: nn.Module | None = None, dynamic: bool = False, batch: int = 2) -> nn.Module:
    """As torch.export.save() writes it. Returns the network."""
    network = (network or Classifier()).eval()
    shape = (batch, SIDE, SIDE, 3) if getattr(network, "channels_last", False) else (batch, 3, SIDE, SIDE)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    torch.export.save(torch.export.export(network, (torch.zeros(shape),), dynamic_shapes=sizes), path)
    return network


def own_answer(network: nn.Module, pixels: np.ndarray) -> np.ndarray:
    images = torch.from_numpy(pixels) / 255
    images = (images - torch.tensor(NORMALIZED["mean"])) / torch.tensor(NORMALIZED["std"])
    if not getattr(network, "channels_last", False):
        images = images.permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits: np.ndarray = network(images).numpy()
    return logits


@pytest.mark.parametrize(
    "dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fixed batch", "any batch"]
)
def test_a_program_is_served_as_torch_runs_it(dynamic: bool, tmp_path: Path) -> None:
    network = write(tmp_path / "small.pt2", dynamic=dynamic)
    checkpoint = load_program(tmp_path / "small.pt2", Overrides(**NORMALIZED))
    bundle = build_bundle(checkpoint, tmp_path / "bundle", name="program", precisions=["fp32"])
    golden = bundle.golden()
    expected = own_answer(network, golden.pixels)
    assert relative_difference(golden.reference.logits, expected) < 1e-5
    assert golden.reference.embedding.shape == (len(golden.pixels), 24)
    assert bundle.manifest.reference == f"small.pt2 in torch {torch.__version__}"
    assert bundle.manifest.variant == "small"
    for artifact in bundle.manifest.artifacts:
        engine = construct_engine(artifact.engine, "fp32", bundle.path / artifact.path, EngineOptions(max_batch=16))
        assert relative_difference(engine.run(0, golden.pixels).logits, expected) < 1e-5
        engine.close()


@pytest.mark.slow
def test_the_command_takes_a_program(tmp_path: Path) -> None:
    write(tmp_path / "small.pt2")
    labels, preprocessor = tmp_path / "labels.txt", tmp_path / "preprocessor_config.json"
    labels.write_text("a\nb\nc\nd\ne\n")
    preprocessor.write_text(json.dumps({"image_processor_type": "ViTImageProcessor", "size": SIDE}))
    command = ["export", str(tmp_path / "small.pt2"), "-o", str(tmp_path / "bundle"), "--labels", str(labels)]
    result = CliRunner().invoke(app, [*command, "--preprocessor", str(preprocessor), "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    assert open_bundle(tmp_path / "bundle").labels == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    "network",
    [
        Classifier(nn.Softmax(-1), channels_last=True),
        pytest.param(Classifier(nn.Sigmoid()), marks=pytest.mark.slow),
        pytest.param(Classifier(), marks=pytest.mark.slow),
    ],
    ids=["softmax, NHWC", "sigmoid", "logits"],
)
def test_layout_and_outputs_are_found(network: Classifier, tmp_path: Path) -> None:
    write(tmp_path / "small.pt2", network, dynamic=True)
    checkpoint = load_program(tmp_path / "small.pt2", Overrides(**NORMALIZED))
    model = checkpoint.source_model(lambda step: None)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    logits, answer = model.run(pixels).logits, own_answer(network, pixels)
    computed = logits if isinstance(network.last, nn.Identity) else to_probabilities(logits, checkpoint.activation)
    assert relative_difference(computed, answer) < 1e-5


def test_a_graph_that_computes_something_else_is_rejected(tmp_path: Path) -> None:
    write(tmp_path / "small.pt2", dynamic=True)
    checkpoint = load_program(tmp_path / "small.pt2", Overrides(**NORMALIZED))
    assert checkpoint.program is not None
    with torch.no_grad():
        for parameter in checkpoint.program._module.parameters():
            parameter.mul_(1.01)
    with pytest.raises(
        CheckpointError, match=r"the ONNX graph that torch makes of .*small\.pt2 computes something else"
    ):
        checkpoint.source_model(lambda step: None)


def test_programs_that_cannot_be_served_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    write(path)
    with pytest.raises(CheckpointError, match=r"small\.pt2 does not say how images are prepared: give --preprocessor"):
        load_program(path, Overrides())
    with pytest.raises(CheckpointError, match=f"--labels has 1 labels; the model has {CLASSES} classes"):
        load_program(path, Overrides(**NORMALIZED, labels=["a"]))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="is truncated or not an archive of torch"):
        load_program(path, Overrides(**NORMALIZED))


@pytest.mark.slow
def test_a_fixed_batch_that_cannot_be_changed_is_rejected_with_the_reason(tmp_path: Path) -> None:
    class Mixing(Classifier):
        def forward(self, images: Any) -> Any:
            logits = super().forward(images)
            return logits - logits.mean(0, keepdim=True) * 0.5

    write(tmp_path / "small.pt2", Mixing())
    checkpoint = load_program(tmp_path / "small.pt2", Overrides(**NORMALIZED))
    with pytest.raises(
        CheckpointError, match=r"^\S*/small\.pt2 has a fixed batch of 2, and cannot be made to take any batch"
    ):
        build_bundle(checkpoint, tmp_path / "bundle", name="program", precisions=["fp32"])


class TouchOnLoad:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def changed_model(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, bytes], Path], None]:
    def changed(contents: dict[str, bytes], executed: Path) -> None:
        model = json.loads(contents["models/model.json"])
        change(model)
        text = json.dumps(model).replace("EXECUTED", str(executed))
        contents["models/model.json"] = text.encode()

    return changed


def first_node(model: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = model["graph_module"]["graph"]["nodes"][0]
    return node


def size(model: dict[str, Any], text: str) -> None:
    values = model["graph_module"]["graph"]["tensor_values"]
    values["images"]["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}


def pickled(name: str) -> Callable[[dict[str, bytes], Path], None]:
    def changed(contents: dict[str, bytes], executed: Path) -> None:
        file = f"data/{name}/model_{name}_config.json"
        config = json.loads(contents[file])
        prefix = "weight" if name == "weights" else "opaque_obj"
        config["config"]["head.bias"] = {
            "path_name": f"{prefix}_10",
            "use_pickle": True,
            "is_param": False,
            "tensor_meta": None,
        }
        contents[file] = json.dumps(config).encode()
        contents[f"data/{name}/{prefix}_10"] = pickle.dumps(TouchOnLoad(executed))

    return changed


def pickled_inputs(contents: dict[str, bytes], executed: Path) -> None:
    contents["data/sample_inputs/model.pt"] = pickle.dumps(TouchOnLoad(executed), protocol=2)


def structure(kind: str, context: Any) -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


STRUCTURE = structure(
    "collections.defaultdict",
    {"default_factory_module": "antigravity", "default_factory_name": "fly", "dict_context": []},
)
ENUM = structure("builtins.dict", json.dumps([{"__enum__": True, "fqn": "antigravity:fly"}]))
SIGNATURE: dict[str, Any] = {
    "inputs": [],
    "outputs": [],
    "out_spec": STRUCTURE,
    "in_spec": STRUCTURE,
    "forward_arg_names": None,
}
HOSTILE: dict[str, tuple[Callable[[dict[str, bytes], Path], None], str]] = {
    "pickled weight": (pickled("weights"), "the tensor head.bias is pickled"),
    "pickled constant": (pickled("constants"), "the tensor head.bias is pickled"),
    "pickled inputs": (pickled_inputs, "example inputs that are not tensors"),
    "function": (
        changed_model(lambda model: first_node(model).update(target="torch.os.system")),
        "the operator 'torch.os.system'",
    ),
    "operator of a file": (
        changed_model(lambda model: first_node(model).update(target="torch.ops.aten.from_file.default")),
        "the operator 'torch.ops.aten.from_file.default'",
    ),
    "size": (
        changed_model(lambda model: size(model, "__import__('pathlib').Path('EXECUTED').touch()")),
        "the symbolic size",
    ),
    "large number": (changed_model(lambda model: size(model, "9**9**9**9")), "the symbolic size"),
    "name": (
        changed_model(
            lambda model: model["graph_module"]["graph"]["inputs"][-1]["as_tensor"].update(
                name="x=__import__('pathlib').Path('EXECUTED').touch()"
            )
        ),
        r"the name \"x=__import__",
    ),
    "structure": (
        changed_model(lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(SIGNATURE)),
        "inputs or outputs of the type collections.defaultdict",
    ),
    "enumeration": (
        changed_model(lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=ENUM)),
        "a structure of inputs or outputs that is not",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_a_program_is_not_executed(kind: str, tmp_path: Path) -> None:
    change, message = HOSTILE[kind]
    executed, path = tmp_path / "executed", tmp_path / "small.pt2"
    write(path)
    with zipfile.ZipFile(path) as archive:
        contents = {entry.partition("/")[2]: archive.read(entry) for entry in archive.namelist()}
    change(contents, executed)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(f"small/{name}", data)
    with pytest.raises(CheckpointError, match=f"{message}.*which is not loaded"):
        read_program(path)
    assert not executed.exists()


def test_guards_are_not_compiled(tmp_path: Path) -> None:
    """They are Python that torch would run before the program."""
    path = tmp_path / "small.pt2"
    network = write(path)
    with zipfile.ZipFile(path) as archive:
        contents = {entry: archive.read(entry) for entry in archive.namelist()}
    name = next(entry for entry in contents if entry.endswith("models/model.json"))
    model = json.loads(contents[name])
    model["guards_code"] = [f"open({str(tmp_path / 'executed')!r}, 'w')"]
    contents[name] = json.dumps(model).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in contents.items():
            archive.writestr(entry, data)
    images = torch.randn(2, 3, SIDE, SIDE)
    output: Tensor = read_program(path).module()(images)
    torch.testing.assert_close(output, network(images))
    assert not (tmp_path / "executed").exists()
