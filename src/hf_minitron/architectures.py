"""The only file that names model families: which tensor has which axes, where importance is read, what configs demand.

A family is one row of ``FAMILIES``. Each tensor of a decoder layer is written as its axes, in the order of the tensor's
dimensions; everything that trims, counts or scores follows from these words:

    hidden   channels of the residual stream            ``hidden_size``
    ffn      neurons of the feed-forward block          ``intermediate_size``
    q        rows of the query heads                    ``num_attention_heads * head_dim``
    kv       rows of the key/value heads                ``num_key_value_heads * head_dim``
    vocab    tokens; never trimmed                      ``vocab_size``
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedConfig

AXES = ("hidden", "ffn", "q", "kv", "vocab")


@dataclass(frozen=True)
class Family:
    """One model family of the Hugging Face library, as far as pruning has to know it.

    ``*_site`` are module names inside a decoder layer: neuron and head importance are read from the *input* of
    ``neuron_site`` and ``head_site``, channel importance from the *outputs* of ``norm_sites``.
    """

    model_type: str
    layer_tensors: dict[str, str]
    outer_tensors: dict[str, str]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    neuron_site: str = "mlp.down_proj"
    head_site: str = "self_attn.o_proj"
    norm_sites: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")

    def axes(self, name: str) -> tuple[str, ...]:
        """The axes of a tensor by its name in the state dict, such as ``("q", "hidden")``."""
        _, inner = self.split_layer(name)
        axes = self.outer_tensors.get(name) if inner is None else self.layer_tensors.get(inner)
        if axes is None:
            raise ValueError(
                f"tensor {name!r} is unknown in family {self.model_type!r}: every tensor needs its axes before it can "
                f"be trimmed. Add it to the family's row in hf_minitron/architectures.py."
            )
        return tuple(axes.split())

    def split_layer(self, name: str) -> tuple[int | None, str | None]:
        """Layer index and name inside the layer, or ``(None, None)`` for a tensor outside the layers."""
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", name)
        return (int(match[1]), match[2]) if match else (None, None)

    def layer_name(self, index: int, inner: str) -> str:
        """The name in the state dict of tensor ``inner`` of layer ``index``."""
        return f"{self.layers}.{index}.{inner}"


_DECODER = {
    "self_attn.q_proj.weight": "q hidden",
    "self_attn.k_proj.weight": "kv hidden",
    "self_attn.v_proj.weight": "kv hidden",
    "self_attn.o_proj.weight": "hidden q",
    "mlp.gate_proj.weight": "ffn hidden",
    "mlp.up_proj.weight": "ffn hidden",
    "mlp.down_proj.weight": "hidden ffn",
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
}
_BIASES = {
    "self_attn.q_proj.bias": "q",
    "self_attn.k_proj.bias": "kv",
    "self_attn.v_proj.bias": "kv",
    "self_attn.o_proj.bias": "hidden",
    "mlp.gate_proj.bias": "ffn",
    "mlp.up_proj.bias": "ffn",
    "mlp.down_proj.bias": "hidden",
}
_OUTER = {
    "model.embed_tokens.weight": "vocab hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "vocab hidden",
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", _DECODER | _BIASES, _OUTER),
        Family("mistral", _DECODER, _OUTER),
    )
}


def get_family(config: PreTrainedConfig) -> Family:
    """The row for a model's config; a family that is not in the table is an error that says how to add it."""
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported: only families whose tensors are described in the table can "
            f"be pruned. Supported: {', '.join(sorted(FAMILIES))}. To add one, write its row in "
            f"hf_minitron/architectures.py and its line in tests/test_architectures.py (see CONTRIBUTING.md)."
        )
    return FAMILIES[model_type]


def get_head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head, also where the config leaves it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
