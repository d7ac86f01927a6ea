"""Verifies artifacts: a candidate becomes an artifact of the bundle, or is rejected with a reason."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from vitserve.model.arrays import Activation, Outputs, Pixels, Precision
from vitserve.model.bundle.bundle import Artifact, AttentionKernels, Golden, Quantization
from vitserve.model.bundle.evaluation import Images, evaluate
from vitserve.model.bundle.parity import compare
from vitserve.service.engines.engine import EngineUnavailableError


@dataclass(frozen=True)
class Candidate:
    """One form of the model for one engine, not yet verified."""

    engine: str
    precision: Precision
    path: str  # of its graph, relative to the bundle
    weights: str | None  # a second file that the graph needs
    run: Callable[[Pixels], Outputs]  # any number of images
    attention: AttentionKernels | None = None
    simulated: bool = False  # ``run`` simulates arithmetic that this machine does not have
    quantization: Quantization | None = None  # of a calibrated precision


@dataclass(frozen=True)
class Rejection:
    """Why there is no artifact."""

    reason: str
    cause: Literal["unavailable", "not_quantized", "parity", "accuracy"]
    loss: float | None = None  # percentage points, if they were measured

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class EvaluationSet:
    """Images for measuring accuracy, with the outputs of the float32 model."""

    images: Images
    float32_outputs: Outputs


@dataclass(frozen=True)
class AccuracyLimit:
    """The loss that is allowed, in percentage points of accuracy."""

    max_loss: float
    evaluation: EvaluationSet | None = None  # None: the loss is estimated on the golden images


# Yields candidates and receives the outcome of each, so that it can choose the next one.
Search = Generator[Candidate, Artifact | Rejection, None]


def verify(
    candidate: Candidate, golden: Golden, limit: AccuracyLimit | None, activation: Activation = "softmax"
) -> Artifact | Rejection:
    """Compares the candidate's outputs with the source network's, and its accuracy with the float32 model's.

    ``limit`` is None for float32, for which numerical parity is enough. A quantized candidate in which no layer is
    quantized is rejected: it would be float32 under another name.
    """
    name = f"{candidate.engine} in {candidate.precision}"
    if candidate.quantization is not None and not candidate.quantization.layers:
        reason = f"{name} has none of its {candidate.quantization.of} layers with weights quantized"
        return Rejection(f"{reason}; --max-loss allows a larger loss of accuracy", "not_quantized")
    parity = compare(candidate.run(golden.pixels), golden.reference, activation, golden.domain_images)
    failure = parity.failure(candidate.precision, golden.judged_by_median)
    if failure is not None:
        return Rejection(f"{name} does not match the source network: {failure}", "parity")
    evaluation = None
    if limit is not None and limit.evaluation is not None:
        evaluation = evaluate(candidate.run, limit.evaluation.float32_outputs, limit.evaluation.images, activation)
    artifact = Artifact(
        candidate.engine,
        candidate.precision,
        candidate.path,
        parity,
        candidate.weights,
        candidate.attention,
        evaluation,
        candidate.simulated,
        candidate.quantization,
    )
    loss = loss_of(artifact)
    if limit is not None and loss > limit.max_loss:
        reason = f"{name} loses {loss:.2f} percentage points; at most {limit.max_loss} are allowed (--max-loss)"
        return Rejection(reason, "accuracy", loss)
    return artifact


def loss_of(artifact: Artifact) -> float:
    """Percentage points of accuracy, on the evaluation images if there are any, otherwise on the golden images."""
    if artifact.evaluation is not None:
        return artifact.evaluation.loss
    return 50 * (1 - artifact.parity.top1_agreement)  # as Evaluation.loss counts images without labels


def best_artifact(
    search: Search,
    golden: Golden,
    limit: AccuracyLimit | None,
    progress: Callable[[str], None],
    activation: Activation = "softmax",
) -> Artifact | Rejection:
    """Verifies every candidate of the search. Returns the artifact with the smallest loss, or the closest rejection."""
    artifacts, rejections = list[Artifact](), list[Rejection]()
    try:
        with closing(search):
            candidate = next(search)
            while True:
                progress(f"verifying {candidate.engine} in {candidate.precision}")
                outcome = verify(candidate, golden, limit, activation)
                if isinstance(outcome, Artifact):
                    artifacts.append(outcome)
                else:
                    rejections.append(outcome)
                    progress(f"rejected: {outcome}")
                candidate = search.send(outcome)
    except StopIteration:
        pass
    except (EngineUnavailableError, ImportError) as error:
        rejections.append(Rejection(str(error), "unavailable"))
    if artifacts:
        return min(artifacts, key=loss_of)
    return min(rejections, key=lambda rejection: float("inf") if rejection.loss is None else rejection.loss)
