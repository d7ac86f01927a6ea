"""Predicts the images of a directory or a bucket on all machines of a Ray cluster, with the engine of `vitserve serve`.

    pip install "vitserve" "ray[data]"
    python examples/ray_data.py s3://bucket/photos predictions --bundle my-bundle --cores 4

Each actor has an engine of its own. The rows are those of `vitserve predict`: path, label, probability, error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from vitserve.predict.items import Item
from vitserve.predict.opening import open_predictor


class Classifier:
    """An actor. It decodes and predicts one block of images at a time."""

    def __init__(self, bundle: Path | None, cores: int) -> None:
        self._predictor = open_predictor(bundle, cores=cores)

    def __call__(self, images: Mapping[str, Any]) -> dict[str, Any]:
        items = [
            Item(path, partial(bytes, content)) for path, content in zip(images["path"], images["bytes"], strict=True)
        ]
        rows = [result.row for results in self._predictor.results(items) for result in results]
        return {
            "path": np.array([row.path for row in rows]),
            "label": np.array([row.label for row in rows]),
            "probability": np.array([np.nan if row.probability is None else row.probability for row in rows]),
            "error": np.array([row.error for row in rows]),
        }


def predict(source: str, output: str, bundle: Path | None, cores: int, block: int) -> int:
    """Writes Parquet files to the directory ``output``, and returns the number of images."""
    waiting = {"num_cpus": 0}  # tasks that read and write files: the actors have all cores
    images = ray.data.read_binary_files(source, include_paths=True, ray_remote_args=waiting)
    actors = max(1, int(ray.cluster_resources()["CPU"]) // cores)
    rows = images.map_batches(
        Classifier,
        fn_constructor_kwargs={"bundle": bundle, "cores": cores},
        batch_size=block,
        num_cpus=cores,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    rows.write_parquet(output, ray_remote_args=waiting)
    return int(ray.data.read_parquet(output, ray_remote_args=waiting).count())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory, or address of a bucket, that all machines can read")
    parser.add_argument("output", help="directory, or address of a bucket, for Parquet files")
    parser.add_argument("--bundle", type=Path, help="directory of a bundle on every machine (default: bundled model)")
    parser.add_argument("--cores", type=int, default=2, help="of each actor")
    parser.add_argument("--block", type=int, default=256, help="images that an actor gets at a time")
    options = parser.parse_args(arguments)
    ray.init(log_to_driver=False)
    count = predict(options.source, options.output, options.bundle, options.cores, options.block)
    sys.stdout.write(f"{options.output}: images: {count}\n")


if __name__ == "__main__":
    main()
