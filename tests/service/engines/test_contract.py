"""One contract for every engine; the choice among them; the golden check."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vitserve.service.engines.selection as opening
from vitserve.model.arrays import Outputs, Precision, softmax
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.bundle.parity import TOLERANCE, Parity, compare
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.selection import NoEngineError, open_engine, open_one

ENGINES: list[tuple[str, Precision]] = [
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("torch", "fp32"),
    ("torch", "bf16"),
]


@pytest.fixture(params=ENGINES, ids=[f"{name}-{precision}" for name, precision in ENGINES])
def engine(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Engine]:
    name, precision = request.param
    try:
        opened = open_one(name, precision, bundle.path / "model.onnx", EngineOptions(streams=2, threads=1, max_batch=8))
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


def close(ours: Outputs, theirs: Outputs, precision: Precision) -> bool:
    return compare(ours, theirs).failure(precision) is None


def test_outputs_have_the_declared_types_and_shapes(engine: Engine) -> None:
    for count in range(1, 9):
        outputs = engine.run(0, pixels(count))
        assert (outputs.logits.shape, outputs.logits.dtype) == ((count, 7), np.float32)
        assert (outputs.embedding.shape, outputs.embedding.dtype) == ((count, 32), np.float32)


def test_a_batch_of_n_equals_n_batches_of_one(engine: Engine) -> None:
    batch = pixels(8)
    together = engine.run(0, batch)
    for index in range(8):
        alone = engine.run(0, batch[index : index + 1])
        assert close(
            alone, Outputs(together.logits[index : index + 1], together.embedding[index : index + 1]), engine.precision
        )


def test_the_order_of_images_does_not_matter(engine: Engine) -> None:
    order = np.random.default_rng(1).permutation(8)
    straight, permuted = engine.run(0, pixels(8)), engine.run(0, pixels(8)[order])
    assert close(permuted, Outputs(straight.logits[order], straight.embedding[order]), engine.precision)


def test_outputs_belong_to_the_caller(engine: Engine) -> None:
    first = engine.run(0, pixels(2))
    kept = first.logits.copy()
    engine.run(0, pixels(2, seed=9))
    assert np.array_equal(first.logits, kept)


def test_lanes_run_at_once_without_mixing(engine: Engine) -> None:
    expected = {seed: engine.run(0, pixels(3, seed)) for seed in range(20)}
    wrong: list[int] = []

    def work(stream: int) -> None:
        for seed in range(stream, 20, 2):
            if not close(engine.run(stream, pixels(3, seed)), expected[seed], engine.precision):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_it_reproduces_the_source_network(engine: Engine, bundle: Bundle) -> None:
    (artifact, *_) = opening.candidates(bundle, EngineOptions(engine=engine.name, precision=engine.precision))
    parity = opening.golden_check(engine, bundle, artifact)
    assert parity.logits <= TOLERANCE[engine.precision]


def test_float32_is_float32(bundle: Bundle) -> None:
    """A CPU with bf16 arithmetic would use it unasked; then the difference would be a thousand times this."""
    opened = open_engine(bundle, EngineOptions(engine="openvino", precision="fp32"))
    opened.engine.close()
    assert opened.parity.logits < 1e-5


def test_auto_takes_the_fastest_that_can_run_here(bundle: Bundle) -> None:
    opened = open_engine(bundle, EngineOptions())
    opened.engine.close()
    if opened.rejected:  # on a CPU without bf16
        assert (opened.engine.name, opened.engine.precision) == ("openvino", "fp32")
        assert [str(each) for each in opened.rejected] == ["openvino in bf16: this CPU has no bf16 arithmetic"]
    else:
        assert (opened.engine.name, opened.engine.precision) == ("openvino", "bf16")


def test_what_was_measured_to_be_fastest_comes_first(bundle: Bundle) -> None:
    opened = open_engine(bundle, EngineOptions(), first=("onnxruntime", "fp32"))
    opened.engine.close()
    assert (opened.engine.name, opened.engine.precision, opened.rejected) == ("onnxruntime", "fp32", ())


def test_int8_comes_first_only_where_the_cpu_multiplies_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = replace(bundle.manifest.artifacts[0], precision="int8")
    both = replace(bundle, manifest=replace(bundle.manifest, artifacts=(*bundle.manifest.artifacts, int8)))
    for able, place in ((True, 0), (False, -1)):
        monkeypatch.setattr(opening.machine, "multiplies_int8", lambda able=able: able)
        assert opening.candidates(both, EngineOptions(), None)[place].precision == "int8"


def test_an_artifact_whose_file_was_changed_is_refused_and_the_next_serves(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"?")
    opened = open_engine(open_bundle(copy), EngineOptions())
    opened.engine.close()
    assert (opened.engine.name, opened.engine.precision) == ("onnxruntime", "fp32")
    assert {(each.engine, each.cause) for each in opened.rejected} == {("openvino", "damaged")}
    assert "model.onnx has sha256" in opened.rejected[0].reason


def test_one_that_fails_the_golden_gate_is_refused_and_the_next_serves(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = open_one

    def one_is_broken(name: str, precision: Precision, graph: Path, options: EngineOptions) -> Engine:
        engine = genuine(name, precision, graph, options)
        if name == "openvino":
            run = engine.run
            monkeypatch.setattr(
                engine,
                "run",
                lambda stream, images: Outputs(run(stream, images).logits * 1.01, run(stream, images).embedding),
            )
        return engine

    monkeypatch.setattr(opening, "open_one", one_is_broken)
    opened = open_engine(bundle, EngineOptions(precision="fp32"))
    opened.engine.close()
    assert opened.engine.name == "onnxruntime"
    assert opened.rejected[0].cause == "golden_check"
    assert "openvino in fp32: golden images: logits differ by" in str(opened.rejected[0])
    with pytest.raises(NoEngineError, match="openvino in fp32: golden images"):
        open_engine(bundle, EngineOptions(engine="openvino", precision="fp32"))


def test_an_engine_that_the_bundle_lacks_is_named(bundle: Bundle) -> None:
    with pytest.raises(NoEngineError, match="no artifact for engine 'onnxruntime' in precision 'bf16'"):
        open_engine(bundle, EngineOptions(engine="onnxruntime", precision="bf16"))
    with pytest.raises(EngineUnavailableError, match="no engine called 'tpu'"):
        open_one("tpu", "fp32", bundle.path / "model.onnx", EngineOptions())


def test_softmax_neither_overflows_nor_loses_small_ones() -> None:
    probabilities = softmax(np.array([[1000, 0, -1000], [-60, 40, 40]], np.float32))
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(probabilities[1], [0, 0.5, 0.5], atol=1e-6)


def test_what_is_not_a_number_is_not_equal() -> None:
    parity = Parity(logits=float("nan"), embedding=0.0, probability=0.0, top1_agreement=1.0, typical=0.0)
    assert parity.failure("bf16") is not None


def test_calibrated_precisions_are_judged_by_the_image_in_the_middle() -> None:
    """What lies outside of the ranges that were calibrated is clipped, in three images of sixteen as in the model that comes along."""
    reference = Outputs(
        np.random.default_rng(0).normal(size=(16, 7)).astype(np.float32), np.zeros((16, 32), np.float32)
    )
    clipped = reference.logits.copy()
    clipped[13:] = -clipped[13:]
    off = compare(Outputs(clipped, reference.embedding), reference)
    assert off.typical == 0.0
    assert off.logits > 0.3
    assert off.failure("int8") is None
    assert off.failure("bf16") is not None
    assert compare(Outputs(-reference.logits, reference.embedding), reference).failure("int8") is not None
