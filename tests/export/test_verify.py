"""A candidate becomes an artifact only if it matches the source network and keeps its accuracy."""

from __future__ import annotations

import numpy as np
import pytest

from vitserve.export.verify import (
    AccuracyLimit,
    Candidate,
    EvaluationSet,
    Rejection,
    Search,
    best_artifact,
    loss_of,
    verify,
)
from vitserve.model.arrays import Outputs, Pixels
from vitserve.model.bundle.bundle import Artifact, Golden
from vitserve.model.bundle.evaluation import Images
from vitserve.service.engines.engine import EngineUnavailableError

# The image of class k is filled with the value k. The network answers with the one-hot vector of k.
GOLDEN_PIXELS = np.repeat(np.arange(4, dtype=np.uint8), 4 * 4 * 3).reshape(4, 4, 4, 3)
IMAGES = Images(np.concatenate([GOLDEN_PIXELS] * 25), np.tile(np.arange(4), 25))


def source(pixels: Pixels) -> Outputs:
    logits = np.eye(4, dtype=np.float32)[pixels[:, 0, 0, 0]]
    return Outputs(logits, logits)


def wrong_for_last(count: int, pixels: Pixels) -> Outputs:
    """Like the source for at most 16 images; of more images, the last ``count`` have another class."""
    outputs = source(pixels)
    if len(pixels) > 16:
        outputs.logits[-count:] = np.roll(outputs.logits[-count:], 1, axis=1)
    return outputs


GOLDEN = Golden(GOLDEN_PIXELS, source(GOLDEN_PIXELS))
LIMIT = AccuracyLimit(2.0, EvaluationSet(IMAGES, source(IMAGES.pixels)))


def candidate(wrong: int = 0, path: str = "model.xml") -> Candidate:
    """An int8 candidate that is wrong for ``wrong`` of the 100 evaluation images."""
    return Candidate(
        "openvino", "int8", path, None, (lambda pixels: wrong_for_last(wrong, pixels)) if wrong else source
    )


def test_matching_candidate_becomes_an_artifact() -> None:
    artifact = verify(candidate(wrong=1), GOLDEN, LIMIT)
    assert isinstance(artifact, Artifact)
    assert (artifact.engine, artifact.precision, artifact.path) == ("openvino", "int8", "model.xml")
    assert artifact.evaluation is not None
    assert (artifact.evaluation.images, artifact.evaluation.accuracy) == (100, 0.99)
    assert loss_of(artifact) == pytest.approx(1)


def test_candidate_that_differs_is_rejected_for_parity() -> None:
    inverted = Candidate("openvino", "fp32", "model.onnx", None, lambda pixels: Outputs(*(-a for a in source(pixels))))
    rejection = verify(inverted, GOLDEN, None)
    assert isinstance(rejection, Rejection)
    assert (rejection.cause, rejection.loss) == ("parity", None)
    assert rejection.reason.startswith("openvino in fp32 does not match the source network: logits differ by")


def test_candidate_over_the_limit_is_rejected_for_accuracy() -> None:
    rejection = verify(candidate(wrong=3), GOLDEN, LIMIT)
    assert isinstance(rejection, Rejection)
    assert rejection.cause == "accuracy"
    assert rejection.loss == pytest.approx(3)
    assert "loses 3.00 percentage points; at most 2.0 are allowed" in str(rejection)


def test_float32_has_no_accuracy_limit() -> None:
    artifact = verify(Candidate("openvino", "fp32", "model.onnx", None, source), GOLDEN, None)
    assert isinstance(artifact, Artifact)
    assert artifact.evaluation is None


def test_without_images_the_loss_is_that_of_golden_images() -> None:
    artifact = verify(candidate(), GOLDEN, AccuracyLimit(0.0))
    assert isinstance(artifact, Artifact)
    assert artifact.evaluation is None
    assert loss_of(artifact) == 0
    assert isinstance(verify(candidate(), GOLDEN, AccuracyLimit(-1.0)), Rejection)


def searched(*candidates: Candidate) -> Search:
    for candidate in candidates:  # noqa: UP028  # a tuple's iterator cannot receive the outcomes
        yield candidate


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_smallest_loss_is_chosen(order: tuple[int, int]) -> None:
    search = searched(*(candidate(wrong, f"{wrong}.xml") for wrong in order))
    artifact = best_artifact(search, GOLDEN, LIMIT, lambda step: None)
    assert isinstance(artifact, Artifact)
    assert artifact.path == "0.xml"


def test_smallest_loss_is_reported_if_all_are_rejected() -> None:
    steps: list[str] = []
    search = searched(candidate(5), candidate(3), candidate(4))
    rejection = best_artifact(search, GOLDEN, LIMIT, steps.append)
    assert isinstance(rejection, Rejection)
    assert rejection.loss == pytest.approx(3)
    assert sum(step.startswith("rejected: openvino in int8 loses") for step in steps) == 3


def test_search_receives_the_outcome_of_each_candidate() -> None:
    outcomes: list[Artifact | Rejection] = []

    def search() -> Search:
        outcomes.append((yield candidate(3)))
        outcomes.append((yield candidate(1)))

    best_artifact(search(), GOLDEN, LIMIT, lambda step: None)
    assert [type(outcome) for outcome in outcomes] == [Rejection, Artifact]


@pytest.mark.parametrize("error", [EngineUnavailableError("no device"), ImportError("no device")])
def test_search_that_cannot_run_here_is_a_rejection(error: Exception) -> None:
    def candidate_here() -> Candidate:
        raise error

    def search() -> Search:
        yield candidate_here()

    rejection = best_artifact(search(), GOLDEN, LIMIT, lambda step: None)
    assert rejection == Rejection("no device", "unavailable")


def test_search_is_closed_when_a_candidate_fails_to_run() -> None:
    events: list[str] = []

    def fail(pixels: Pixels) -> Outputs:
        raise ValueError("out of memory")

    def search() -> Search:
        try:
            yield Candidate("openvino", "int8", "model.xml", None, fail)
        finally:
            events.append("closed")

    running = search()
    with pytest.raises(ValueError, match="out of memory"):
        best_artifact(running, GOLDEN, LIMIT, lambda step: None)
    assert events == ["closed"]
