"""Metrics of images by outcome."""

from __future__ import annotations

from collections.abc import Iterable

from vitserve.service import errors
from vitserve.service.http_worker.dispatch.dispatcher import Dispatcher
from vitserve.service.http_worker.inference.response import Outcome
from vitserve.service.http_worker.metric_buffer import MetricBuffer


def count_rejected(metrics: MetricBuffer, error: errors.OverloadedError, images: int) -> None:
    metrics.inc(metrics.all.images_overloaded, images)
    metrics.inc(metrics.all.images_shed_by_reason[error.reason], images)


def rejected_for_memory(
    metrics: MetricBuffer, dispatcher: Dispatcher, priority: int, images: int
) -> errors.OverloadedError:
    """The error for a request with so many images, which is counted here."""
    error = errors.OverloadedError("other request bodies take all of the memory for them", "memory", 1.0)
    dispatcher.admission.record_rejected(priority, images)
    count_rejected(metrics, error, images)
    return error


def count_images(metrics: MetricBuffer, outcomes: Iterable[Outcome]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, errors.OverloadedError):
            count_rejected(metrics, outcome, 1)
        elif isinstance(outcome, errors.ServiceError):
            metrics.inc(metrics.all.images.labels(outcome.code))
        else:
            metrics.inc(metrics.all.images_ok)
            metrics.observe(metrics.all.queue_seconds, outcome.queue_seconds)
