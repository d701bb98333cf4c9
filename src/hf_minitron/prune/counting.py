"""What a model of given sizes costs, from the source's config alone: its parameters and its key/value cache."""

from __future__ import annotations

from collections import Counter

import torch
from transformers import PreTrainedConfig

from hf_minitron.architectures import get_family, get_head_dim
from hf_minitron.prune.target import build_empty, source_sizes


class SizeCounter:
    """Parameters as a function of the sizes, read off the source's tensors and their axes.

    Built once; each count is then some products. Equal to ``count_parameters`` of the target's config, which
    builds it.
    """

    def __init__(self, config: PreTrainedConfig):
        self._head_dim = get_head_dim(config)
        self._source = source_sizes(config)
        family, layers = get_family(config), [Counter() for _ in range(config.num_hidden_layers)]
        self._outer, self._embeddings = Counter(), Counter()
        for name, parameter in build_empty(config).named_parameters():
            layer, _ = family.split_layer(name)
            # An axis whose length no size decides has the source's length.
            axes = zip(family.axes(name), parameter.shape, strict=True)
            term = tuple(axis if self._length(axis, self._source) is not None else length for axis, length in axes)
            (self._outer if layer is None else layers[layer])[term] += 1
            if name in (family.embedding, family.head):
                self._embeddings[term] += 1
        assert all(layer == layers[0] for layer in layers), "layers with different tensors cannot be counted by number"
        self._layer = layers[0]

    def total(self, sizes: dict[str, int]) -> int:
        """All parameters; a tied head counts once."""
        return self._sum(self._outer, sizes) + sizes["num_hidden_layers"] * self._sum(self._layer, sizes)

    def non_embedding(self, sizes: dict[str, int]) -> int:
        """All but those of embedding and head."""
        return self.total(sizes) - self._sum(self._embeddings, sizes)

    def _sum(self, terms: Counter, sizes: dict[str, int]) -> int:
        total = 0
        for term, count in terms.items():
            for axis in term:
                count *= axis if isinstance(axis, int) else self._length(axis, sizes)
            total += count
        return total

    def _length(self, axis: str, sizes: dict[str, int]) -> int | None:
        lengths = {
            "hidden": sizes["hidden_size"],
            "ffn": sizes["intermediate_size"],
            "q": sizes["num_attention_heads"] * self._head_dim,
            "kv": sizes["num_key_value_heads"] * self._head_dim,
        }
        parts = [lengths.get(part) for part in axis.split("+")]
        return None if None in parts else sum(parts)


def cache_tokens(config: PreTrainedConfig, context_length: int) -> list[int]:
    """Tokens whose keys and values each layer keeps after reading ``context_length``, as transformers' DynamicCache.

    Layers with a sliding window keep one token less than the window: the token at hand brings its own.
    """
    window = getattr(config, "sliding_window", None)
    default = "full_attention" if window is None else "sliding_attention"
    types = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    slides = [window is not None and kind == "sliding_attention" for kind in types]
    return [min(context_length, window - 1) if sliding else context_length for sliding in slides]


def cache_bytes(sizes: dict[str, int], tokens: list[int], batch_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the key/value cache of a model with these sizes, from the source's ``cache_tokens``.

    Which layers a smaller depth drops is not known here, so those that keep the fewest tokens are taken to go: an upper
    bound where layers differ, exact where they do not.
    """
    kept = sorted(tokens, reverse=True)[: sizes["num_hidden_layers"]]
    return 2 * batch_size * sizes["num_key_value_heads"] * head_dim * sum(kept) * dtype.itemsize
