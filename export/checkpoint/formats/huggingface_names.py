"""Names that transformers uses: tensors of its older versions, and keys of config.json that classification ignores."""

from __future__ import annotations

import re
from typing import Any

from vitserve.export.checkpoint.errors import CheckpointError
from vitserve.export.checkpoint.state_dict import Tensors

_TEACHER = "DeiTForImageClassificationWithTeacher"

# Older names → names of transformers 5, as in transformers/conversion_mapping.py (ViTModel and Dinov2Model).
_ATTENTION = [
    (r"\.attention\.attention\.(q)uery\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(k)ey\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(v)alue\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", r".attention.o_proj."),
]
_RENAMED = {
    False: [
        *_ATTENTION,
        (r"\.encoder\.layer\.", r".layers."),
        (r"\.intermediate\.dense\.", r".mlp.fc1."),
        (r"\.output\.dense\.", r".mlp.fc2."),
    ],
    True: [*_ATTENTION, (r"\.mlp\.weights_out\.", r".mlp.down_proj.")],
}
# Names in a block, besides attention and MLP → our names. By whether it is a DINOv2.
PARTS = {
    False: {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.o_proj": "attn.proj"},
    True: {"norm1": "norm1", "norm2": "norm2", "attention.o_proj": "attn.proj"},
}

# Keys of config.json that have no effect on the logits of the classifiers that are supported.
WITHOUT_EFFECT = (
    # Where the configuration comes from, and which classes wrote it.
    {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures"},
    # The type in which the weights are stored. Served precisions are chosen at export.
    {"dtype", "torch_dtype"},
    # The library's way to compute attention, and its outputs besides logits.
    {"attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"},
    {"experts_implementation", "_experts_implementation_internal"},
    {"output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript"},
    {"tie_last_hidden_states", "chunk_size_feed_forward"},
    # Training: dropout, initialization, memory, and the loss.
    {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range", "layerscale_value"},
    {"gradient_checkpointing", "use_bfloat16", "fp16", "finetuning_task", "task_specific_params"},
    # Heads and outputs of other tasks: masked images, pooling, backbones.
    {"encoder_stride", "pooler_act", "pooler_output_size", "use_mask_token"},
    {"apply_layernorm", "reshape_hidden_states", "stage_names", "out_features", "out_indices"},
    {"_out_features", "_out_indices"},
    # Names that id2label already has.
    {"label2id", "num_labels", "_num_labels"},
    # Older configurations of DINOv2 with registers have these; transformers does not read them.
    {"interpolate_antialias", "interpolate_offset"},
    # Text: tokens, generation, and the relation of encoder and decoder, which every configuration of old versions has.
    {"bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class"},
    {"prefix", "tie_word_embeddings", "tie_encoder_decoder", "tf_legacy_loss", "cross_attention_hidden_size"},
    {"bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping", "max_length"},
    {"encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "exponential_decay_length_penalty"},
    {"epsilon_cutoff", "eta_cutoff", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "min_length"},
    {"no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "typical_p"},
    {"remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"},
    {"assistant_confidence_threshold", "assistant_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule"},
    {"target_lookbehind", "use_cache", "top_k", "top_p"},
)
# Keys that have no effect with this value.
ONLY: dict[str, Any] = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "is_causal": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}


def block(kind: str) -> str:
    """The prefix of a layer's tensors, with a place for its index."""
    return f"{kind}.encoder.layer.{{}}" if kind.startswith("dinov2") else f"{kind}.layers.{{}}"


def has_teacher(tensors: Tensors) -> bool:
    """Whether there is a second head, for DeiT's distillation token."""
    return "distillation_classifier.weight" in tensors


def is_gated(tensors: Tensors) -> bool:
    return any("weights_in." in name or "gate_proj." in name for name in tensors.names(""))


def check_architecture(architectures: Any, teacher: bool) -> None:
    """transformers takes the first class that it knows, and initializes the head again if it is another one.

    Raises CheckpointError.
    """
    if teacher and isinstance(architectures, list) and _TEACHER not in architectures:
        raise CheckpointError(f"unsupported architectures {architectures}: the weights are those of {_TEACHER}")


def modernize(tensors: Tensors, kind: str) -> None:
    """Renames the tensors as in transformers 5. A base model's, which lack its prefix, get it."""
    dino = kind.startswith("dinov2")
    bare = "embeddings.cls_token" in tensors

    def renamed(name: str) -> str:
        if bare and "classifier" not in name:
            name = f"{kind}.{name}"
        for pattern, replacement in _RENAMED[dino]:
            name = re.sub(pattern, replacement, name)
        return name

    tensors.rename(renamed)
