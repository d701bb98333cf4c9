"""Tensor surgery: the kept layers, and the kept rows and columns of their tensors, nothing else.

Pure slicing, as in the papers: ``method="minitron"`` rescales nothing, also not the norms whose divisor changes. The
one exception is the papers' own: the head residual (P1 2.3), when the plan has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from hf_minitron.architectures import WHOLE_AXES, get_family, get_head_dim
from hf_minitron.checkpoint import TensorSource, check_finite
from hf_minitron.prune.plan import PrunePlan
from hf_minitron.prune.target import build_empty, target_config


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
        if plan.is_refit:
            raise ValueError(
                "the plan is that of a refit model: its weights were solved on calibration rows, and slicing by the "
                "kept indices does not give them. Prune with method='refit' again."
            )
        config = target_config(source_config, plan.sizes, plan.kept_layers)
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
        origin = self.origin(name)
        tensor = check_finite(origin, self._read(origin))
        if tuple(tensor.shape) != self.source_shapes[origin]:
            raise ValueError(
                f"{origin} has shape {tuple(tensor.shape)}, config.json of the source says "
                f"{self.source_shapes[origin]}: they do not belong together. Fetch the checkpoint again."
            )
        layer, _ = self.family.split_layer(name)
        axes = self.family.axes(name)
        if layer is not None and self.plan.head_residuals:
            tensor = add_head_residuals(tensor, axes[0], self.plan, layer, self.head_dim)
        for dim, axis in enumerate(axes):
            tensor = select(tensor, dim, kept_indices(self.plan, axis, layer, self.head_dim))
        assert tuple(tensor.shape) == self.shapes[name], name
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def origin(self, name: str) -> str:
        """The source's name of the target's tensor ``name``: kept layers are numbered anew."""
        layer, inner = self.family.split_layer(name)
        return name if layer is None else self.family.layer_name(self.plan.kept_layers[layer], inner)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, by the dtype asked for or else the one it is stored in."""
        dtypes = {name: self.dtype or self.source.dtype(self._stored_name(self.origin(name))) for name in self.shapes}
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

    ``layer`` counts the target's layers, as the plan's lists do. Along an axis of stacked projections (``q+kv+kv``)
    these are the indices of each, shifted to where it begins.
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


def add_head_residuals(tensor: torch.Tensor, axis: str, plan: PrunePlan, layer: int, head_dim: int) -> torch.Tensor:
    """head_kept += head_kept − head_removed for the plan's pairs (P1 2.3), in the rows of query heads; else unchanged.

    Rows of keys and values take part only without grouping, where every query head has its own; shared ones stay.
    ``axis`` is that of the tensor's rows, stacked perhaps; computed in fp32 and rounded once.
    """
    parts, begin = axis.split("+"), 0
    ungrouped = plan.source_sizes["num_attention_heads"] == plan.source_sizes["num_key_value_heads"]
    residual = ("q", "kv") if ungrouped else ("q",)
    if not set(parts) & set(residual):
        return tensor
    result = tensor.clone()
    for part in parts:
        _, length = _kept_of_one(plan, part, layer, head_dim)
        if part in residual:
            for kept, removed in plan.head_residuals[layer]:
                rows = [slice(begin + head * head_dim, begin + (head + 1) * head_dim) for head in (kept, removed)]
                result[rows[0]] = (2 * tensor[rows[0]].float() - tensor[rows[1]].float()).to(tensor.dtype)
        begin += length
    return result


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
