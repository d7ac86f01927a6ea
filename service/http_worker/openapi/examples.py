"""The examples of the OpenAPI document. A test compares them with its schemas."""

from __future__ import annotations

from typing import Any

from vitserve.service import errors
from vitserve.service.errors import ServiceError

CLASSIFY_RESPONSE: dict[str, Any] = {
    "model": "compact-hybrid-cifar10",
    "version": "bc4c12228f34",
    "results": [{"predictions": [{"label": "cat", "index": 3, "probability": 0.8494921922683716}]}],
}
EMBED_RESPONSE: dict[str, Any] = {
    "model": "compact-hybrid-cifar10",
    "version": "bc4c12228f34",
    "results": [{"embedding": [0.0721, -1.2034, 0.4463]}],
}
EXPLANATION = {
    "model": "compact-hybrid-cifar10",
    "version": "bc4c12228f34",
    "method": "rollout",
    "layer": 3,
    "layers": 3,
    "heads": 3,
    "grid": [[0.25, 0.5], [1.0, 0.75]],
}
MODEL_INFO: dict[str, Any] = {
    "name": "compact-hybrid-cifar10",
    "version": "bc4c12228f34",
    "labels": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "heads": [],
    "serving": {
        "engine": "openvino",
        "precision": "bf16",
        "parity": {
            "logits": 0.0114,
            "embedding": 0.0108,
            "probability": 0.0094,
            "top1_agreement": 1.0,
            "typical": 0.0056,
        },
        "rejected": [],
        "streams": 1,
        "threads": 1,
        "preferred_batch_size": 16,
        "seconds_per_batch_size": {"1": 0.0012, "16": 0.0061},
    },
    "limits": {"max_images": 64, "max_body_bytes": 33_554_432},
    "probability_calibration": None,
}
RELOADED = {"model": "compact-hybrid-cifar10", "version": "bc4c12228f34"}
LIVE = {"status": "live"}
READY: dict[str, Any] = {"status": "ready", "reasons": [], "rejected": []}
NOT_READY: dict[str, Any] = {
    "status": "not ready",
    "reasons": ["starting: loading, verifying and warming up the engine"],
    "rejected": [],
}
METRICS = "# TYPE vitserve_ready gauge\nvitserve_ready 1.0\n"

DETAILS: dict[type[ServiceError], str] = {
    ServiceError: "internal server error (request id 5f0c2f9d8a41b6e7-1a)",
    errors.BadRequestError: "top_k is 11; it must be from 1 to 10",
    errors.UnauthorizedError: "the bearer token is not the admin key",
    errors.ForbiddenError: "no admin_key is set, so this route is disabled; SIGHUP also reloads the bundle",
    errors.NotFoundError: "the path '/v1/unknown' does not exist; GET /docs lists all paths",
    errors.MethodNotAllowedError: "the path '/v1/classify' supports POST, not GET",
    errors.RequestTimeoutError: "the body did not arrive within 120 s",
    errors.ReloadRejectedError: "rejected: bundle.json is not a valid manifest",
    errors.BodyTooLargeError: "the body is 40,000,000 bytes; the limit is 33,554,432",
    errors.ImageTooLargeError: "the image is 12000 × 9000 pixels; the limit is 50,000,000",
    errors.UriTooLongError: "the request target is longer than the limit",
    errors.UnsupportedMediaTypeError: "the Content-Type is 'text/plain'; send an image, a form or JSON",
    errors.UnsupportedCodingError: "the Content-Encoding is 'br'; send gzip, deflate or no encoding, and only one",
    errors.NotAnImageError: "not an image in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF",
    errors.DamagedImageError: "the image data is truncated",
    errors.UnsupportedImageError: "the image is of a kind that is not read",
    errors.ImageTooComplexError: "the image has more frames than the limit",
    errors.OverloadedError: "the deadline in 100 ms cannot be met",
    errors.TooManyAttemptsError: "too many wrong admin keys; SIGHUP also reloads the bundle",
    errors.HeadersTooLargeError: "the request header has more than 65,536 bytes",
    errors.EngineFailedError: "the engine failed",
    errors.NotExplainableError: (
        "the layers of the network attend to different tokens, in windows or because tokens are merged"
    ),
    errors.NotReadyError: "starting: loading, verifying and warming up the engine",
    errors.TooManyConnectionsError: "there are too many connections",
    errors.DeadlineExceededError: "the image was not finished within its deadline",
}


def problem(kind: type[ServiceError]) -> dict[str, Any]:
    """The problem response of an error."""
    detail = DETAILS.get(kind, kind.title)
    error = kind(detail, "full", 0.25) if issubclass(kind, errors.OverloadedError) else kind(detail)
    return error.problem()
