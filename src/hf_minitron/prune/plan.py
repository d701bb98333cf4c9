"""From scores and wanted sizes to a plan: which source indices every axis keeps, and the config that results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_minitron.architectures import get_family, get_head_dim
from hf_minitron.prune.importance import ImportanceScores

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
METHODS = ("minitron", "random")
SIZE_OF = {"hidden": "hidden_size", "neurons": "intermediate_size", "heads": "num_attention_heads"}
Ranking = Callable[[str, int | None], torch.Tensor]  # (axis, layer) → importance of each member


@dataclass(frozen=True)
class PruneConfig:
    """The sizes wanted, by their Hugging Face config keys; None keeps the source's."""

    hidden_size: int | None = field(default=None, metadata={"help": "Channels of the residual stream to keep."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Feed-forward neurons to keep per layer."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Query heads to keep per layer, the same number in every key/value group."}
    )
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "Key/value groups to keep per layer, each with its query heads."}
    )
    method: str = field(
        default="minitron",
        metadata={"help": "minitron keeps what scores highest; random keeps what chance says, the baseline."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of --method random."})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown. Use one of {', '.join(METHODS)}.")


@dataclass(frozen=True)
class PrunePlan:
    """Which source indices are kept, ascending; one list per layer where an axis is ranked per layer.

    ``sizes`` are the target's config values. The plan is all that trimming needs, beside the weights.
    """

    sizes: dict[str, int]
    source_sizes: dict[str, int]
    kept_hidden: list[int]
    kept_neurons: list[list[int]]
    kept_heads: list[list[int]]
    kept_key_value_heads: list[list[int]]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kept(self)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PrunePlan:
        """Reads what ``to_json`` gave; ValueError for anything else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"this is no plan ({error}). Give a prune_plan.json as it was written.") from None

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; its lists of kept indices diff well, since they are ascending."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _check_kept(plan: PrunePlan) -> None:
    """Refuses a plan, edited by hand perhaps, whose kept indices do not fit its sizes: they would trim nonsense."""
    for name, layers, key in (
        ("kept_hidden", [plan.kept_hidden], "hidden_size"),
        ("kept_neurons", plan.kept_neurons, "intermediate_size"),
        ("kept_heads", plan.kept_heads, "num_attention_heads"),
        ("kept_key_value_heads", plan.kept_key_value_heads, "num_key_value_heads"),
    ):
        size, source = plan.sizes[key], plan.source_sizes[key]
        for kept in layers:
            if kept != sorted(set(kept)) or len(kept) != size or not all(0 <= index < source for index in kept):
                raise ValueError(f"{name} must hold {size} different indices below {source}, ascending. Plan again.")
    per_group = plan.source_sizes["num_attention_heads"] // plan.source_sizes["num_key_value_heads"]
    repeats = plan.sizes["num_attention_heads"] // plan.sizes["num_key_value_heads"]
    for heads, groups in zip(plan.kept_heads, plan.kept_key_value_heads, strict=True):
        if [head // per_group for head in heads] != [group for group in groups for _ in range(repeats)]:
            raise ValueError(f"kept_heads={heads} are not {repeats} of each group in {groups}. Plan again.")


def make_plan(config: PreTrainedConfig, prune: PruneConfig, scores: ImportanceScores | None = None) -> PrunePlan:
    """Ranks every axis that shrinks and keeps its best; ties go to the lower index, so the plan is deterministic.

    Scores are needed only for axes that shrink, and not at all by ``method="random"``.
    """
    sizes, source = target_sizes(config, prune), source_sizes(config)
    rank = (
        _random_ranking(prune.seed, source)
        if prune.method == "random"
        else _score_ranking(scores, source, config.num_hidden_layers)
    )
    layers = range(config.num_hidden_layers)
    attention = [_keep_heads(source, sizes, lambda i=i: rank("heads", i)) for i in layers]
    return PrunePlan(
        sizes=sizes,
        source_sizes=source,
        kept_hidden=_keep(source["hidden_size"], sizes["hidden_size"], lambda: rank("hidden", None)),
        kept_neurons=[
            _keep(source["intermediate_size"], sizes["intermediate_size"], lambda i=i: rank("neurons", i))
            for i in layers
        ],
        kept_heads=[heads for _, heads in attention],
        kept_key_value_heads=[groups for groups, _ in attention],
        info={"method": prune.method} | ({"seed": prune.seed} if prune.method == "random" else _score_info(scores)),
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
    return sizes


def target_config(config: PreTrainedConfig, sizes: dict[str, int]) -> PreTrainedConfig:
    """The source's config with the new sizes and an explicit ``head_dim``; everything else stays.

    Without ``head_dim`` a narrower hidden size would silently narrow the heads (96 instead of 128 for
    Llama-3.1-Minitron-4B-Width).
    """
    values = config.to_dict() | sizes | {"head_dim": get_head_dim(config)}
    try:
        return type(config).from_dict(values)
    except StrictDataclassError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{type(config).__name__} cannot represent {', '.join(f'{k}={v}' for k, v in sizes.items())}: {reason} "
            f"{_nearest_hidden_sizes(config, values)}"
        ) from None


def build_empty(config: PreTrainedConfig, dtype: torch.dtype | None = None):
    """The model of a config on the meta device: names, shapes and counts without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


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


def _score_ranking(scores: ImportanceScores | None, source: dict[str, int], num_layers: int) -> Ranking:
    """Importance by axis and layer, refused when it is missing or belongs to a model of another shape."""

    @cache
    def table(axis: str) -> torch.Tensor:
        return getattr(scores, axis)

    def rank(axis: str, layer: int | None) -> torch.Tensor:
        key = SIZE_OF[axis]
        if scores is None:
            raise ValueError(
                f"{key} shrinks, which needs importance scores of {axis!r}. Call score() first, or load saved scores."
            )
        shape = (source[key],) if layer is None else (num_layers, source[key])
        if table(axis).shape != shape:
            raise ValueError(
                f"scores of {axis!r} have shape {tuple(table(axis).shape)}, this model needs {shape}: they belong to "
                f"another model. Score this one."
            )
        values = table(axis) if layer is None else table(axis)[layer]
        if not torch.isfinite(values).all():
            raise ValueError(
                f"scores of {axis!r} hold NaN or Inf, so they rank nothing. Score again with sound weights."
            )
        return values

    return rank


def _random_ranking(seed: int, source: dict[str, int]) -> Ranking:
    generator = torch.Generator().manual_seed(seed)
    return lambda axis, layer: torch.rand(source[SIZE_OF[axis]], generator=generator)


def _keep(count: int, keep: int, rank: Callable[[], torch.Tensor]) -> list[int]:
    return list(range(count)) if keep == count else _top(rank(), keep)


def _keep_heads(
    source: dict[str, int], sizes: dict[str, int], rank: Callable[[], torch.Tensor]
) -> tuple[list[int], list[int]]:
    """Kept key/value groups and query heads of one layer.

    A group is as important as its query heads together (L2 norm); inside every kept group the best query heads stay,
    equally many in each, so that each still faces its own keys and values.
    """
    groups, per_group = source["num_key_value_heads"], source["num_attention_heads"] // source["num_key_value_heads"]
    keep_groups, keep_heads = sizes["num_key_value_heads"], sizes["num_attention_heads"] // sizes["num_key_value_heads"]
    if (keep_groups, keep_heads) == (groups, per_group):
        return list(range(groups)), list(range(groups * per_group))
    scores = rank().view(groups, per_group)
    kept = _top(scores.norm(dim=1), keep_groups)
    return kept, [group * per_group + head for group in kept for head in _top(scores[group], keep_heads)]


def _top(scores: torch.Tensor, keep: int) -> list[int]:
    order = torch.sort(scores, descending=True, stable=True).indices  # stable: ties go to the lower index
    return sorted(order[:keep].tolist())


def _score_info(scores: ImportanceScores | None) -> dict[str, Any]:
    return {} if scores is None else {"aggregation": list(scores.aggregation), **scores.info}


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
