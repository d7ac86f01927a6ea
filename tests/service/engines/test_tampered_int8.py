"""The golden check rejects an int8 artifact with one wrong scale, and another engine serves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import openvino
import pytest

from tests.support.bundles import SMALL, artifact_in
from tests.support.images import encoded, random_image
from tests.support.server import start_server
from vitserve.model.bundle.bundle import MANIFEST, Bundle, open_bundle, save_golden, sha256
from vitserve.service import machine
from vitserve.service.engine_worker.tuning_cache import TuningResult, save_tuning_result
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.engines.golden_check import golden_check
from vitserve.service.engines.openvino_engine import OpenVinoEngine
from vitserve.service.engines.selection import NoEngineError, open_engine
from vitserve.service.settings import DEFAULT_BUNDLE


def tampered(int8_bundle: Bundle, path: Path, layer: int, factor: float = 2.0) -> Path:
    """A copy of the bundle in which one layer's scales are doubled, with matching checksums."""
    directory = Path(shutil.copytree(int8_bundle.path, path))
    artifact = artifact_in(int8_bundle, "int8")
    model = openvino.Core().read_model(directory / artifact.path)
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    layers = [node for node in products if len(node.input_value(1).get_shape()) == 2]
    node = layers[layer].input_value(1).get_node()
    while node.get_type_name() != "Multiply":
        node = node.input_value(0).get_node()
    scale = node.input_value(1).get_node()
    node.input(1).replace_source_output(openvino.op.Constant(scale.get_data() * np.float32(factor)).output(0))
    for name in artifact.files:
        (directory / name).unlink()
    openvino.save_model(model, directory / artifact.path, compress_to_fp16=False)
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in artifact.files:
        manifest["files"][name] = sha256(directory / name)
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return directory


def test_layer_with_doubled_scales_is_rejected(int8_bundle: Bundle, tmp_path: Path) -> None:
    """First and last layers, attention and MLP.

    Not the last block's query: it serves one token, so that doubling it changes less than int8 itself does.
    """
    opened = open_engine(int8_bundle, EngineOptions(precision="int8"))
    opened.engine.close()
    for layer in (0, 3, 5, 4 * SMALL.depth - 3, 4 * SMALL.depth - 1):
        broken = open_bundle(tampered(int8_bundle, tmp_path / str(layer), layer))
        opened = open_engine(broken, EngineOptions(), first=("openvino", "int8"))
        opened.engine.close()
        assert opened.engine.precision != "int8", f"layer {layer}"
        assert opened.rejected[0].cause == "golden_check"


@pytest.mark.parametrize("layer", [5, 4 * SMALL.depth - 1])
def test_a_change_that_the_tolerance_of_int8_hides_is_found_in_the_recorded_outputs(
    int8_bundle: Bundle, tmp_path: Path, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs whose int8 products are exact. Others, and bundles without recorded outputs, have the wide tolerance."""
    broken = open_bundle(tampered(int8_bundle, tmp_path / "broken", layer, factor=1.25))

    def opened() -> str:
        engine = open_engine(broken, EngineOptions(precision="int8", threads=1)).engine
        engine.close()
        return engine.precision

    for exact in (True, False):
        monkeypatch.setattr(machine, "multiplies_int8_exactly", lambda exact=exact: exact)
        if exact:
            with pytest.raises(NoEngineError, match=r"outputs differ by .* of their range from those at export"):
                opened()
        else:
            assert opened() == "int8"
    monkeypatch.setattr(machine, "multiplies_int8_exactly", lambda: True)
    golden = broken.golden()
    save_golden(broken.path / "golden.npz", dataclasses.replace(golden, recorded={}))
    assert opened() == "int8"


@pytest.mark.skipif(not machine.multiplies_int8_exactly(), reason="int8 products are not exact on this CPU")
def test_the_default_model_has_its_recorded_outputs_on_a_cpu_without_bf16() -> None:
    """CPUs that have bf16 run the layers that are not quantized in it. Its outputs were recorded on one."""
    bundle = open_bundle(DEFAULT_BUNDLE)
    artifact = artifact_in(bundle, "int8")
    assert bundle.golden().recorded.keys() == {("openvino", "int8")}
    engine = construct_engine("openvino", "int8", bundle.path / artifact.path, EngineOptions(threads=1))
    assert isinstance(engine, OpenVinoEngine)
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(bundle.path / artifact.path, "CPU", config)
    engine._requests = [compiled.create_infer_request()]
    golden_check(engine, bundle, artifact)


def test_service_starts_with_the_next_engine_and_reports_why(
    int8_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tampered(int8_bundle, tmp_path / "broken", 5)
    save_tuning_result(sha256(broken / MANIFEST), TuningResult("openvino", "int8", 1, 1, 1.0))
    running = start_server("--bundle", str(broken))
    with httpx.Client(base_url=running.url) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 200
        rejection = ready.json()["rejected"][0]
        assert (rejection["engine"], rejection["precision"]) == ("openvino", "int8")
        assert rejection["cause"] == "golden_check"
        assert "golden images" in rejection["reason"]
        metric = 'vitserve_engine_rejected{cause="golden_check",engine="openvino",precision="int8"} 1.0'
        assert metric in client.get("/metrics").text
        assert client.post("/v1/classify", content=encoded(random_image())).status_code == 200
        assert client.get("/v1/model").json()["serving"]["precision"] == "fp32"
    assert running.stop() == 0
