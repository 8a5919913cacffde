"""The names of Mask2Former's weights in the official checkpoints, in Hugging Face's and here."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hourglass.attention import bias_index

_SWIN = "model.pixel_level_module.encoder."

# Official -> ours, applied in this order to names below "sem_seg_head.". The backbone's names are ours already.
_OFFICIAL = [
    (r"^predictor\.static_query\.", r"predictor.query_feat."),  # of older checkpoints
    (r"^(?!predictor\.|pixel_decoder\.)", r"pixel_decoder."),  # likewise
    (r"^pixel_decoder\.input_proj\.", r"pixel_decoder.input_projections."),
    (r"^pixel_decoder\.mask_features\.", r"pixel_decoder.mask_projection."),
    (r"^pixel_decoder\.(adapter|layer)_(\d+)\.norm\.", r"pixel_decoder.\1_\2.1."),
    (r"^pixel_decoder\.(adapter|layer)_(\d+)\.(weight|bias)$", r"pixel_decoder.\1_\2.0.\3"),
    (r"^pixel_decoder\.transformer\.", r"pixel_decoder."),
    (r"^(pixel_decoder\.encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(pixel_decoder\.encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"^(pixel_decoder\.encoder\.layers\.\d+)\.linear", r"\1.fc"),
    (r"^predictor\.class_embed\.", r"class_predictor."),
    (r"^predictor\.", r"transformer_module."),
    (r"^transformer_module\.transformer_(self|cross)_attention_layers\.(\d+)\.norm\.",
     r"transformer_module.decoder.layers.\2.\1_attn_layer_norm."),
    (r"^transformer_module\.transformer_(self|cross)_attention_layers\.(\d+)\.(self|multihead)_attn\.",
     r"transformer_module.decoder.layers.\2.\1_attn."),
    (r"^transformer_module\.transformer_ffn_layers\.(\d+)\.norm\.",
     r"transformer_module.decoder.layers.\1.final_layer_norm."),
    (r"^transformer_module\.transformer_ffn_layers\.(\d+)\.linear", r"transformer_module.decoder.layers.\1.fc"),
    (r"^transformer_module\.decoder_norm\.", r"transformer_module.decoder.layernorm."),
    (r"^transformer_module\.query_feat\.", r"transformer_module.queries_features."),
    (r"^transformer_module\.query_embed\.", r"transformer_module.queries_embedder."),
    (r"^transformer_module\.input_proj\.", r"transformer_module.input_projections."),
    (r"^transformer_module\.mask_embed\.layers\.(\d+)\.",
     r"transformer_module.decoder.mask_predictor.mask_embedder.\1.0."),
]  # fmt: skip

# Hugging Face -> ours below _SWIN: as written to files (with "self" and "dense"), and as modules of transformers 5.
_HUGGING_FACE_SWIN = [
    (r"^swin\.", r""),
    (r"^embeddings\.patch_embeddings\.projection\.", r"patch_embed.proj."),
    (r"^embeddings\.norm\.", r"patch_embed.norm."),
    (r"^encoder\.layers\.", r"layers."),
    (r"\.layernorm_before\.", r".norm1."),
    (r"\.layernorm_after\.", r".norm2."),
    (r"\.attention\.(self|relative_position_bias)\.relative_position_(bias_table|index)$",
     r".attn.relative_position_\2"),
    (r"\.attention\.(self\.)?(?:q_proj|query)\.", r".attn.query."),
    (r"\.attention\.(self\.)?(?:k_proj|key)\.", r".attn.key."),
    (r"\.attention\.(self\.)?(?:v_proj|value)\.", r".attn.value."),
    (r"\.attention\.(o_proj|output\.dense)\.", r".attn.proj."),
    (r"\.intermediate\.dense\.", r".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]  # fmt: skip


def rename_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Bring the weights of a Mask2Former to the names that they have in :class:`~projects.mask2former.Mask2Former`: the
    backbone's as in the official code, the rest as in Hugging Face's without the leading ``model.``.

    Args:
        weights: with official names (also of checkpoints from before the pixel decoder had a name of its own), those of
            Hugging Face's ``Mask2FormerForUniversalSegmentation`` with a Swin, or ours. Names of none of these stay.

    Returns:
        the same tensors; joined or split where the implementations differ in that, and with the index of relative
        positions that Hugging Face's do not store.
    """
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("sem_seg_head."):
            renamed.update(_split_attention(_substitute(_OFFICIAL, name.removeprefix("sem_seg_head.")), tensor))
        elif name.startswith(_SWIN):
            renamed.update(_swin_weight(name.removeprefix(_SWIN), tensor))
        elif name.startswith("model.pixel_level_module.decoder."):
            renamed["pixel_decoder." + name.removeprefix("model.pixel_level_module.decoder.")] = tensor
        else:
            renamed[name.removeprefix("model.")] = tensor
    _join_attention(renamed)
    return renamed


def _substitute(rules: list[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _split_attention(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The official self-attention keeps the projections of query, key and value in one tensor."""
    stem, joined, kind = name.rpartition("self_attn.in_proj_")
    if not joined:
        return {name: tensor}
    return {f"{stem}self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", tensor.chunk(3))}


def _swin_weight(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if re.match(r"(swin\.)?layernorm\.", name):  # after the last stage, which segmentation does not use
        return {}
    stage = re.match(r"hidden_states_norms\.stage(\d+)\.", name)
    if stage:
        return {f"backbone.norm{int(stage[1]) - 1}.{name[stage.end() :]}": tensor}
    name = "backbone." + _substitute(_HUGGING_FACE_SWIN, name)
    if not name.endswith("relative_position_bias_table"):
        return {name: tensor}
    window = (round(len(tensor) ** 0.5) + 1) // 2
    return {name: tensor, name.replace("bias_table", "index"): bias_index((window, window))}


def _join_attention(weights: dict[str, Tensor]) -> None:
    for query in [name for name in weights if re.match(r"backbone\..*\.attn\.query\.", name)]:
        parts = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in weights for part in parts):
            weights[query.replace(".query.", ".qkv.")] = torch.cat([weights.pop(part) for part in parts])
