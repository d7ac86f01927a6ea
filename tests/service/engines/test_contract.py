"""The contract that every engine fulfills."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from vitserve.model.arrays import Outputs, Pixels, Precision
from vitserve.model.bundle.bundle import Bundle
from vitserve.model.bundle.parity import TOLERANCE, compare
from vitserve.service.engines.catalog import ENGINES
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import Engine, EngineOptions, EngineUnavailableError
from vitserve.service.engines.golden_check import golden_check
from vitserve.service.engines.selection import candidates

# int8 needs a graph of its own: tests/export/test_int8.py.
KINDS: list[tuple[str, Precision]] = [
    (name, precision) for name, kind in ENGINES.items() for precision in kind.cpu if precision != "int8"
]


@pytest.fixture(params=KINDS, ids=[f"{name}-{precision}" for name, precision in KINDS])
def engine(request: pytest.FixtureRequest, fp8_bundle: Bundle) -> Iterator[Engine]:
    name, precision = request.param
    options = EngineOptions(streams=2, threads=1, max_batch=8)
    graph = fp8_bundle.path / ("fp8.onnx" if precision == "fp8" else "model.onnx")
    try:
        opened = construct_engine(name, precision, graph, options)
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def pixels(count: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), np.uint8)


def equal(ours: Outputs, theirs: Outputs, precision: Precision) -> bool:
    return compare(ours, theirs).failure(precision) is None


def test_outputs_have_the_declared_types_and_shapes(engine: Engine) -> None:
    for count in range(1, 9):
        outputs = engine.run(0, pixels(count))
        assert [array.shape for array in outputs] == [(count, 7), (count, 32)]
        assert [array.dtype.name for array in outputs] == ["float32", "float32"]


def test_a_batch_of_n_equals_n_batches_of_one(engine: Engine) -> None:
    batch = pixels(8)
    together = engine.run(0, batch)
    for index in range(8):
        alone = engine.run(0, batch[index : index + 1])
        assert equal(alone, Outputs(*(array[index : index + 1] for array in together)), engine.precision)


def test_rows_select_images_of_the_shared_array(engine: Engine) -> None:
    slot_table, rows = pixels(8), [6, 0, 3]
    engine.share(slot_table)
    assert equal(engine.run(0, slot_table, rows), engine.run(0, slot_table[rows]), engine.precision)
    assert equal(engine.run(0, slot_table, [5]), engine.run(0, slot_table[5:6]), engine.precision)


def test_the_order_of_images_does_not_matter(engine: Engine) -> None:
    order = np.random.default_rng(1).permutation(8)
    straight, permuted = engine.run(0, pixels(8)), engine.run(0, pixels(8)[order])
    assert equal(permuted, Outputs(*(array[order] for array in straight)), engine.precision)


def test_a_later_run_does_not_overwrite_outputs(engine: Engine) -> None:
    first = engine.run(0, pixels(2))
    copy = first.logits.copy()
    engine.run(0, pixels(2, seed=9))
    assert np.array_equal(first.logits, copy)


def test_streams_run_at_once_without_mixing(engine: Engine) -> None:
    expected = {seed: engine.run(0, pixels(3, seed)) for seed in range(20)}
    wrong: list[int] = []

    def work(stream: int) -> None:
        for seed in range(stream, 20, 2):
            if not equal(engine.run(stream, pixels(3, seed)), expected[seed], engine.precision):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_engine_reproduces_the_source_network(engine: Engine, fp8_bundle: Bundle) -> None:
    options = EngineOptions(engine=engine.name, precision=engine.precision)
    artifact = next(
        (artifact for artifact in candidates(fp8_bundle, options)),
        fp8_bundle.manifest.artifacts[0],  # the bundle has no bf16 artifact; the check of bf16 does not read it
    )
    assert golden_check(engine, fp8_bundle, artifact).logits <= TOLERANCE[engine.precision]
