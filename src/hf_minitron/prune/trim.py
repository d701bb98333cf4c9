"""Tensor surgery: the kept rows and columns of every tensor, nothing else.

Pure slicing, as in the papers: ``method="minitron"`` rescales nothing, also not the norms whose divisor changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from hf_minitron.architectures import WHOLE_AXES, get_family, get_head_dim
from hf_minitron.checkpoint import TensorSource, check_finite
from hf_minitron.prune.plan import PrunePlan, build_empty, target_config


class Trimmer:
    """Gives the target's tensors one at a time from the source's; nothing is held in memory.

    ``config`` is the target's; ``shapes`` lists the tensors it needs, in its own order, without the duplicate of a
    tied head. ``dtype`` None leaves every tensor as it is stored.
    """

    def __init__(
        self,
        source: TensorSource,
        source_config: PreTrainedConfig,
        plan: PrunePlan,
        dtype: torch.dtype | None = None,
    ):
        config = target_config(source_config, plan.sizes)
        empty = build_empty(config)
        self.source, self.config, self.plan, self.dtype = source, config, plan, dtype
        self.family, self.head_dim = get_family(config), get_head_dim(source_config)
        self.tied = bool(config.tie_word_embeddings)
        self.source_shapes = {
            name: tuple(tensor.shape) for name, tensor in build_empty(source_config).state_dict().items()
        }
        self.shapes = {
            name: tuple(tensor.shape)
            for name, tensor in empty.state_dict().items()
            if not (self.tied and name == self.family.head)
        }
        config.architectures = [type(empty).__name__]
        config.dtype = dtype or source.dtype(self._stored_name(self.family.embedding))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.shapes:
            yield name, self.trim(name)

    def trim(self, name: str) -> torch.Tensor:
        """The target's tensor ``name``."""
        tensor = check_finite(name, self._read(name))
        if tuple(tensor.shape) != self.source_shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, config.json of the source says {self.source_shapes[name]}: "
                f"they do not belong together. Fetch the checkpoint again."
            )
        layer, _ = self.family.split_layer(name)
        for dim, axis in enumerate(self.family.axes(name)):
            tensor = select(tensor, dim, kept_indices(self.plan, axis, layer, self.head_dim))
        assert tuple(tensor.shape) == self.shapes[name], name
        return tensor if self.dtype is None else tensor.to(self.dtype)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by the dtype asked for or else the one it is stored in."""
        dtypes = {name: self.dtype or self.source.dtype(self._stored_name(name)) for name in self.shapes}
        return {name: math.prod(shape) * dtypes[name].itemsize for name, shape in self.shapes.items()}

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.source.read(self._stored_name(name))
        if self.tied and name == self.family.embedding and name in self.source and self.family.head in self.source:
            self._check_tied(tensor)
        return tensor

    def _check_tied(self, embedding: torch.Tensor) -> None:
        """Transformers loads a pair that differs as untied, whatever the config says; half of it would be lost here."""
        if not torch.equal(embedding, self.source.read(self.family.head)):
            raise ValueError(
                f"tie_word_embeddings=True, but {self.family.embedding} and {self.family.head} differ: config.json is "
                f"wrong. Set tie_word_embeddings to false in it."
            )

    def _stored_name(self, name: str) -> str:
        """Under which name the source holds a tensor: of a tied pair a checkpoint may store the head alone."""
        for candidate in (name, self.family.head) if self.tied and name == self.family.embedding else (name,):
            if candidate in self.source:
                return candidate
        raise ValueError(
            f"the source has no tensor {name!r}, which its config.json asks for: the checkpoint is incomplete. "
            "Fetch it again."
        )


def kept_indices(plan: PrunePlan, axis: str, layer: int | None, head_dim: int) -> torch.Tensor | None:
    """Source indices kept along one axis of a tensor, or None where all are kept (``vocab``, ``head_dim``).

    Along an axis of stacked projections (``q+kv+kv``) these are the indices of each, shifted to where it begins.
    """
    if axis in WHOLE_AXES:
        return None
    parts, begin = [], 0
    for part in axis.split("+"):
        kept, length = _kept_of_one(plan, part, layer, head_dim)
        parts.append(kept + begin)
        begin += length
    return torch.cat(parts)


def _kept_of_one(plan: PrunePlan, axis: str, layer: int | None, head_dim: int) -> tuple[torch.Tensor, int]:
    """Kept indices along one simple axis, and its length in the source."""
    if axis == "hidden":
        return torch.tensor(plan.kept_hidden), plan.source_sizes["hidden_size"]
    if axis == "ffn":
        return torch.tensor(plan.kept_neurons[layer]), plan.source_sizes["intermediate_size"]
    queries = axis == "q"
    heads = plan.kept_heads[layer] if queries else plan.kept_key_value_heads[layer]
    rows = (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()
    return rows, plan.source_sizes["num_attention_heads" if queries else "num_key_value_heads"] * head_dim


def select(tensor: torch.Tensor, dim: int, indices: torch.Tensor | None) -> torch.Tensor:
    """``tensor`` at ``indices`` along ``dim``; an index outside it is an error that names both."""
    if indices is None or (len(indices) == tensor.shape[dim] and torch.equal(indices, torch.arange(len(indices)))):
        return tensor
    if int(indices.max()) >= tensor.shape[dim]:
        raise ValueError(
            f"index {int(indices.max())} is outside a dimension of {tensor.shape[dim]}: the plan was made for "
            "another model."
        )
    return tensor.index_select(dim, indices.to(tensor.device))
