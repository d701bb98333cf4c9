"""The target's shape: sizes asked for, checked against the source, the config they make, and its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from hf_minitron.architectures import PER_LAYER_KEYS, get_family, get_head_dim
from hf_minitron.prune.depth import METRICS, PATTERNS, check_dropped_layers

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SIZES = (*WIDTHS, "num_hidden_layers")
METHODS = ("minitron", "refit", "random")
REFIT_MODES = ("teacher_forced", "sequential")
REFIT_PARTS = (  # what ``refit_without`` may leave out
    "rotation",
    "readers_in_basis",
    "elimination",
    "readers",
    "writers",
    "compensation",
    "gain",
    "embedding",
    "guard",
)

_KNOWN = {"method": METHODS, "refit_mode": REFIT_MODES, "depth_metric": METRICS, "depth_pattern": PATTERNS}


@dataclass(frozen=True)
class PruneConfig:
    """The sizes wanted, by their Hugging Face config keys (None keeps the source's), and how to choose what stays."""

    hidden_size: int | None = field(default=None, metadata={"help": "Channels of the residual stream to keep."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Feed-forward neurons to keep per layer."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Query heads to keep per layer, the same number in every key/value group."}
    )
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key/value groups to keep per layer, each with its query heads."}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Layers to keep."})
    drop_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers to drop by hand, counted from 0, instead of by their importance."}
    )
    depth_metric: str = field(
        default="lm_loss",
        metadata={
            "help": "What tells which layers matter when num_hidden_layers shrinks: lm_loss (loss on the calibration "
            "text without them), accuracy (of a multiple-choice task without them, as in P2), or block_importance "
            "(cosine of their input and output)."
        },
    )
    depth_pattern: str = field(
        default="contiguous",
        metadata={"help": "Drop one contiguous block of layers (P2), or scattered ones, each by its own importance."},
    )
    head_residual: bool = field(
        default=False,
        metadata={"help": "Add to kept heads what they had over the removed ones (P1 2.3); under GQA to queries only."},
    )
    iterations: int = field(
        default=1, metadata={"help": "Prune in so many steps, scoring again before each; 1 is the papers' choice."}
    )
    method: str = field(
        default="minitron",
        metadata={
            "help": "minitron keeps what scores highest (the papers); refit solves what is left in closed form on the "
            "calibration text; random keeps what chance says, the baseline."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of --method random."})
    refit_mode: str = field(
        default="teacher_forced",
        metadata={
            "help": "What refit feeds the small model's layers while it solves them: the source's stream "
            "(teacher_forced, for models that are trained afterwards), or what the layers before give (sequential)."
        },
    )
    refit_ridge: float = field(
        default=1e-2, metadata={"help": "Pull of refit toward the sliced weights, as a share of the mean square input."}
    )
    refit_without: list[str] = field(
        default_factory=list, metadata={"help": f"Parts of refit to leave out: {' '.join(REFIT_PARTS)}."}
    )
    stats_memory: float = field(
        default=8.0,
        metadata={"help": "GB of memory for refit's moments and residual streams; streams beyond it go to disk."},
    )

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Use one of {', '.join(known)}.")
        if unknown := [part for part in self.refit_without if part not in REFIT_PARTS]:
            raise ValueError(f"refit_without={unknown[0]!r} is unknown. Use some of {', '.join(REFIT_PARTS)}.")
        if not 0 < self.refit_ridge < float("inf") or not self.stats_memory >= 0:
            raise ValueError(
                f"refit_ridge={self.refit_ridge}, stats_memory={self.stats_memory}: the first must be positive, since "
                "moments may lack rank, the second must not be negative. Use 0.01 and 8."
            )
        if self.method == "refit" and self.head_residual:
            raise ValueError("head_residual goes with minitron: refit solves what kept heads take over. Leave it out.")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: pruning takes at least one step. Use 1, as the papers do.")
        if self.iterations > 1 and (self.drop_layers is not None or self.head_residual or self.method != "minitron"):
            raise ValueError(
                f"iterations={self.iterations} scores again before each step, which drop_layers, head_residual and "
                "other methods than minitron do not go with. Use iterations=1."
            )


def source_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The prunable sizes of a config; query heads without grouping have as many key/value heads."""
    return {key: getattr(config, key) for key in SIZES}


def target_sizes(config: PreTrainedConfig, prune: PruneConfig) -> dict[str, int]:
    """The sizes after pruning, checked one by one against the source; no weights needed."""
    family, source = get_family(config), source_sizes(config)
    wanted = {key: getattr(prune, key) for key in SIZES}
    for key, size in wanted.items():
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= source[key]):
            raise ValueError(
                f"{key}={size!r}: pruning keeps between 1 and the source's {source[key]}. Choose a size in that range."
            )
    if prune.drop_layers is not None:
        wanted["num_hidden_layers"] = _depth_by_hand(source["num_hidden_layers"], prune)
    heads_per_group = source["num_attention_heads"] // source["num_key_value_heads"]
    if wanted["num_attention_heads"] is None and wanted["num_key_value_heads"] is not None:
        wanted["num_attention_heads"] = wanted["num_key_value_heads"] * heads_per_group
    if wanted["num_key_value_heads"] is None and heads_per_group == 1:  # without grouping each head has its own
        wanted["num_key_value_heads"] = wanted["num_attention_heads"]
    sizes = {key: source[key] if wanted[key] is None else wanted[key] for key in SIZES}
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % groups or heads // groups > heads_per_group:
        allowed = ", ".join(str(groups * n) for n in range(1, heads_per_group + 1))
        raise ValueError(
            f"num_attention_heads={heads} does not fit num_key_value_heads={groups}: query heads share "
            f"key/value heads in equal groups of at most the source's {heads_per_group}. Use one of {allowed}."
        )
    for key, reason in family.fixed.items():
        if sizes[key] != source[key]:
            raise ValueError(f"{key}={sizes[key]}: {family.model_type} keeps its {source[key]}, for {reason}.")
    if prune.head_residual:
        _check_head_residual(source, sizes)
    return sizes


def target_config(
    config: PreTrainedConfig, sizes: dict[str, int], kept_layers: Sequence[int] | None = None
) -> PreTrainedConfig:
    """The source's config with the new sizes and an explicit ``head_dim``; everything else stays.

    Without ``head_dim`` a narrower hidden size would silently narrow the heads (96 instead of 128 for
    Llama-3.1-Minitron-4B-Width). Keys with one value per layer keep those of ``kept_layers``, or of the first layers
    where only sizes and counts are asked for.
    """
    kept = range(sizes.get("num_hidden_layers", config.num_hidden_layers)) if kept_layers is None else kept_layers
    values = config.to_dict()
    by_layer = {key: [values[key][layer] for layer in kept] for key in PER_LAYER_KEYS if values.get(key)}
    values |= sizes | by_layer | {"head_dim": get_head_dim(config)}
    try:
        return type(config).from_dict(values)
    except StrictDataclassError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        changed = ", ".join(f"{key}={size}" for key, size in sizes.items() if size != getattr(config, key))
        raise ValueError(
            f"{type(config).__name__} cannot represent {changed}: {reason} {_nearest_hidden_sizes(config, values)}"
        ) from None


def build_empty(config: PreTrainedConfig, dtype: torch.dtype | None = None):
    """The model of a config on the meta device: names, shapes and counts without memory."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # part of the initialisation that is left out
    return model


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters in all, and by part, counted on the built model; ``non_embedding`` leaves out embedding and head.

    A tied head is counted once.
    """
    family, counts = (
        get_family(config),
        {"total": 0, "embedding": 0, "head": 0, "attention": 0, "feed_forward": 0, "norms": 0},
    )
    for name, parameter in build_empty(config).named_parameters():
        axes, inner = family.axes(name), family.split_layer(name)[1]
        if inner is None:
            part = {family.embedding: "embedding", family.head: "head"}.get(name, "norms")
        elif "ffn" in axes or inner.startswith("mlp."):
            part = "feed_forward"
        else:
            part = "attention" if inner.startswith("self_attn.") else "norms"
        counts[part] += parameter.numel()
        counts["total"] += parameter.numel()
    counts["non_embedding"] = counts["total"] - counts["embedding"] - counts["head"]
    return counts


def _depth_by_hand(num_layers: int, prune: PruneConfig) -> int:
    """How many layers stay when ``drop_layers`` go; num_hidden_layers may say the same."""
    dropped = check_dropped_layers(prune.drop_layers, num_layers)
    left = num_layers - len(dropped)
    if prune.num_hidden_layers not in (None, left):
        raise ValueError(
            f"num_hidden_layers={prune.num_hidden_layers}, but drop_layers={dropped} leaves {left} of {num_layers} "
            "layers. Give one of the two."
        )
    return left


def _check_head_residual(source: dict[str, int], sizes: dict[str, int]) -> None:
    """P1 2.3 pairs every removed head with a kept one, so at most half of those that share a group may go."""
    grouped = source["num_attention_heads"] > source["num_key_value_heads"]
    of = [size["num_attention_heads"] // (size["num_key_value_heads"] if grouped else 1) for size in (source, sizes)]
    if of[0] > 2 * of[1]:
        where = "of each key/value group" if grouped else "of each layer"
        raise ValueError(
            f"head_residual adds each removed head to a kept one, but {of[1]} of {of[0]} query heads {where} stay. "
            f"Keep at least {(of[0] + 1) // 2}, or leave head_residual out."
        )


def _nearest_hidden_sizes(config: PreTrainedConfig, values: dict[str, Any]) -> str:
    """The remedy for a config class that refuses: hidden sizes beside the one wanted that it was tried on and takes."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    near = (hidden // heads * heads, (hidden // heads + 1) * heads)
    if fitting := [size for size in near if size <= config.hidden_size and _accepts(config, size, values)]:
        return f"Near hidden sizes that are multiples of {heads} heads: {', '.join(map(str, fitting))}."
    ratio = config.hidden_size // config.num_attention_heads
    return (
        f"Keep the source's {ratio} channels per head: change hidden_size and num_attention_heads together, or neither."
    )


def _accepts(config: PreTrainedConfig, hidden_size: int, values: dict[str, Any]) -> bool:
    try:
        return bool(hidden_size) and type(config).from_dict(values | {"hidden_size": hidden_size}) is not None
    except StrictDataclassError:
        return False
