"""`vitserve export --merge`: every artifact merges tokens as the network does, and states its loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.bundles import SMALL, confident_checkpoint, random_images
from tests.support.images import encoded, random_image
from vitserve.cli.main import app
from vitserve.export.artifacts import ExportError
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.export.torch_model import merging
from vitserve.model.bundle.bundle import Bundle, open_bundle
from vitserve.model.config import ViTConfig
from vitserve.model.network.vit import ViT
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions
from vitserve.service.explain_worker.main import Explainer

MERGE = 6


def merged_bundle(path: Path, max_loss: float = 100.0, count: int = 60) -> Bundle:
    source = confident_checkpoint(replace(SMALL, depth=3))
    assert isinstance(source.network, ViT)
    images = random_images(count) if count else None
    merged = replace(source, network=merging(source.network, MERGE))
    return build_bundle(merged, path, name="merged", precisions=["bf16"], evaluation_images=images, max_loss=max_loss)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return merged_bundle(tmp_path_factory.mktemp("merged") / "bundle")


def test_artifacts_match_the_merging_network(bundle: Bundle) -> None:
    config = bundle.manifest.config
    assert isinstance(config, ViTConfig)
    assert config.merge == MERGE
    assert {artifact.precision for artifact in bundle.manifest.artifacts} == {"fp32", "bf16"}
    golden = bundle.golden()
    for artifact in bundle.manifest.artifacts:
        if artifact.precision != "fp32":
            continue
        path = bundle.path / artifact.path
        engine = construct_engine(artifact.engine, "fp32", path, EngineOptions(max_batch=len(golden.pixels)))
        logits = engine.run(0, golden.pixels).logits
        engine.close()
        scale = np.abs(golden.reference.logits).max()
        assert np.abs(logits - golden.reference.logits).max() / scale < 1e-3, artifact.engine


def test_the_loss_is_that_compared_with_the_network_that_merges_nothing(bundle: Bundle) -> None:
    for artifact in bundle.manifest.artifacts:
        assert artifact.evaluation is not None
        assert artifact.evaluation.images == 60
        assert 0 < artifact.evaluation.probability < 1, "merging changes the probabilities"
    shown = CliRunner().invoke(app, ["inspect", str(bundle.path)], env={"COLUMNS": "300"}).output
    assert "tokens per block: 17, 11, 6" in shown


def test_a_merging_network_is_explained_by_occlusion(bundle: Bundle) -> None:
    """Its layers attend to different tokens."""
    explainer, image = Explainer(bundle), encoded(random_image(SMALL.image_size, SMALL.image_size))
    options = {"method": "auto", "layer": None, "head": None, "class": None}
    assert b'"occlusion"' in explainer.answer(options, image)[0]
    kind, reason = explainer.answer(options | {"method": "rollout"}, image)
    assert kind == b"NotExplainableError"
    assert b"because tokens are merged" in reason


def test_a_loss_above_the_limit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"in fp32 loses .* percentage points; at most -1 are allowed"):
        merged_bundle(tmp_path / "bundle", max_loss=-1)
    assert not (tmp_path / "bundle").exists()


def test_without_images_the_loss_is_not_measured(tmp_path: Path) -> None:
    built = merged_bundle(tmp_path / "bundle", count=0)
    assert all(artifact.evaluation is None for artifact in built.manifest.artifacts)


@pytest.mark.slow
def test_the_command_merges(tmp_path: Path) -> None:
    arguments = ["export", "random:compact/4", "-o", str(tmp_path / "bundle"), "--precision", "fp32", "--merge", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    config = open_bundle(tmp_path / "bundle").manifest.config
    assert isinstance(config, ViTConfig)
    assert config.tokens_of_blocks == [65, 57, 49, 41, 33, 25]
    assert open_bundle(tmp_path / "bundle").manifest.variant == "compact/4"


def test_networks_without_tokens_of_their_own_are_rejected() -> None:
    with pytest.raises(
        CheckpointError, match="--merge needs a ViT that vitserve has a network for; this is compact-re"
    ):
        load_checkpoint("random:compact-resnet", merge=8)
    with pytest.raises(ValueError, match="merge is 8; it must be 0 or more, and 0 with 'local' attention"):
        load_checkpoint("random:compact-local/4", merge=8)
