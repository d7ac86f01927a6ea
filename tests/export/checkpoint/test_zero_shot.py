"""CLIP and SigLIP with labels: the probabilities are those of transformers' own network and processor."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tests.support.checkpoints import randomized
from tests.support.images import encoded, random_image
from tests.support.library_networks import TEXT, TOWER
from vitserve.export.build_bundle import build_bundle
from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.load import load_checkpoint
from vitserve.model.arrays import to_probabilities
from vitserve.model.bundle.preprocess import Decoder
from vitserve.service.engines.construct import construct_engine
from vitserve.service.engines.engine import EngineOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

LABELS = [f"label {letter}" for letter in "abcdefghijklmnopqrst"]
PROMPTS = ("a photo of a {}.", "a drawing of a {}.")


def save_towers(kind: str, transformers: ModuleType, directory: Path) -> Any:
    """Random weights, and a tokenizer of bytes."""
    special = {"<pad>": 0, "<s>": 1, "<unk>": 2, "</s>": 3}  # an eos_token_id of 2 means another one to CLIP
    vocabulary = special | {chr(code): len(special) + code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=32
    )
    fast.save_pretrained(directory)
    text = TEXT | {"max_position_embeddings": 32, "eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}
    config = {"vision_config": TOWER, "text_config": text | {"projection_size": 24}}
    name, processor = ("CLIP", "CLIPImageProcessor") if kind == "clip" else ("Siglip", "SiglipImageProcessor")
    if kind == "clip":
        config["projection_dim"] = 16  # type: ignore[assignment]
    towers = randomized(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)))
    with torch.no_grad():
        towers.get_parameter("logit_scale").fill_(3.0)
    save: Any = towers.save_pretrained
    save(directory)
    square = {"height": 32, "width": 32}
    size = {"size": {"shortest_edge": 32}, "crop_size": square} if kind == "clip" else {"size": square}
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor} | size))
    return towers


def probabilities_of_library(
    kind: str, towers: Any, transformers: ModuleType, directory: Path, images: list[Image.Image], prompt: str
) -> np.ndarray:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    padding = {"padding": "max_length"} if kind == "siglip" else {"padding": True}
    texts = tokenizer(
        [prompt.replace("{}", label) for label in LABELS],
        return_tensors="pt",
        truncation=True,
        max_length=32,
        **padding,
    )
    texts.pop("token_type_ids", None)
    with torch.inference_mode():
        logits = towers(pixel_values=processor(images=images, return_tensors="pt")["pixel_values"], **texts)
    scores = logits.logits_per_image
    result: np.ndarray = (scores.sigmoid() if kind == "siglip" else scores.softmax(-1)).numpy()
    return result


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_probabilities_are_those_of_transformers(
    kind: str, transformers: ModuleType, photos: list[Path], tmp_path: Path
) -> None:
    towers = save_towers(kind, transformers, tmp_path / "towers")
    checkpoint = load_checkpoint(tmp_path / "towers", labels=LABELS, prompts=PROMPTS[:1])
    bundle = build_bundle(checkpoint, tmp_path / "bundle", name="zero-shot", precisions=["fp32"])
    assert bundle.manifest.activation == ("sigmoid" if kind == "siglip" else "softmax")
    assert bundle.labels == tuple(LABELS)
    decoder = Decoder(bundle.manifest.preprocessing, mode="exact")
    pixels = np.stack([decoder.decode(photo.read_bytes()) for photo in photos])
    images = [Image.open(photo).convert("RGB") for photo in photos]
    expected = probabilities_of_library(kind, towers, transformers, tmp_path / "towers", images, PROMPTS[0])
    assert np.ptp(expected, axis=0).max() > 1e-2
    engine = construct_engine("openvino", "fp32", bundle.path / "model.onnx", EngineOptions(max_batch=len(pixels)))
    actual = to_probabilities(engine.run(0, pixels).logits, bundle.manifest.activation)
    engine.close()
    assert np.abs(actual - expected).max() < 1e-4


def test_several_prompts_are_averaged(transformers: ModuleType, tmp_path: Path) -> None:
    towers = save_towers("clip", transformers, tmp_path)
    checkpoint = load_checkpoint(tmp_path, labels=LABELS, prompts=PROMPTS)
    images = torch.from_numpy(Decoder(checkpoint.preprocessing).decode(encoded(random_image()))[None] / np.float32(255))
    with torch.inference_mode():
        actual = checkpoint.network(images.permute(0, 3, 1, 2))[0]
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        every = []
        for prompt in PROMPTS:
            texts = tokenizer([prompt.replace("{}", each) for each in LABELS], return_tensors="pt", padding=True)
            embedded = towers.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
            every.append(torch.nn.functional.normalize(embedded))
        head = torch.nn.functional.normalize(torch.stack(every).mean(0))
        image = torch.nn.functional.normalize(towers.get_image_features(images.permute(0, 3, 1, 2)).pooler_output)
        expected = image @ head.T * towers.logit_scale.exp()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_labels_and_prompts_are_checked(transformers: ModuleType, tmp_path: Path) -> None:
    save_towers("siglip", transformers, tmp_path)
    with pytest.raises(CheckpointError, match="and no classes: give them with --labels FILE"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"--prompt 'a photo' has no \{\}, the place of the label"):
        load_checkpoint(tmp_path, labels=LABELS, prompts=("a photo",))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="cannot load or use the tokenizer"):
        load_checkpoint(tmp_path, labels=LABELS)
