"""From scores and wanted sizes to a plan: which source indices every axis keeps."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_minitron.prune.depth import check_dropped_layers, choose_layers
from hf_minitron.prune.scores import ImportanceScores
from hf_minitron.prune.target import WIDTHS, PruneConfig, source_sizes, target_sizes

SIZE_OF = {"hidden": "hidden_size", "neurons": "intermediate_size", "heads": "num_attention_heads"}
Ranking = Callable[[str, int | None], torch.Tensor]  # (axis, source layer) → importance of each member
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunePlan:
    """Which source indices are kept, ascending; one list per kept layer where an axis is ranked per layer.

    ``sizes`` are the target's config values. ``head_residuals`` lists per kept layer pairs of a kept query head and the
    removed one whose difference it takes on (P1 2.3); it is empty without that option. The plan is all that trimming
    needs, beside the weights; of a model that was refit it only tells what was kept, and ``kept_hidden`` is empty where
    its stream was rotated.
    """

    sizes: dict[str, int]
    source_sizes: dict[str, int]
    kept_layers: list[int]
    kept_hidden: list[int]
    kept_neurons: list[list[int]]
    kept_heads: list[list[int]]
    kept_key_value_heads: list[list[int]]
    head_residuals: list[list[list[int]]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_kept(self)

    @property
    def is_rotated(self) -> bool:
        """Whether directions of the residual stream were kept rather than channels."""
        return self.info.get("basis") == "rotated" and not self.kept_hidden

    @property
    def is_refit(self) -> bool:
        """Whether weights were solved, so that the kept indices alone do not give them."""
        return self.info.get("method") == "refit" and not self.info.get("fell_back", False)

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
        ("kept_layers", [plan.kept_layers], "num_hidden_layers"),
        ("kept_hidden", [plan.kept_hidden], "hidden_size"),
        ("kept_neurons", plan.kept_neurons, "intermediate_size"),
        ("kept_heads", plan.kept_heads, "num_attention_heads"),
        ("kept_key_value_heads", plan.kept_key_value_heads, "num_key_value_heads"),
    ):
        size, source = plan.sizes[key], plan.source_sizes[key]
        if key == "hidden_size" and plan.is_rotated:
            continue
        for kept in layers:
            if kept != sorted(set(kept)) or len(kept) != size or not all(0 <= index < source for index in kept):
                raise ValueError(f"{name} must hold {size} different indices below {source}, ascending. Plan again.")
        if key in WIDTHS[1:] and len(layers) != len(plan.kept_layers):
            raise ValueError(f"{name} must have a list for each of {len(plan.kept_layers)} kept layers. Plan again.")
    per_group = plan.source_sizes["num_attention_heads"] // plan.source_sizes["num_key_value_heads"]
    repeats = plan.sizes["num_attention_heads"] // plan.sizes["num_key_value_heads"]
    for heads, groups in zip(plan.kept_heads, plan.kept_key_value_heads, strict=True):
        if [head // per_group for head in heads] != [group for group in groups for _ in range(repeats)]:
            raise ValueError(f"kept_heads={heads} are not {repeats} of each group in {groups}. Plan again.")
    for heads, pairs in zip(plan.kept_heads, plan.head_residuals, strict=bool(plan.head_residuals)):
        if any(kept not in heads or not 0 <= gone < plan.source_sizes["num_attention_heads"] for kept, gone in pairs):
            raise ValueError(f"head_residuals={pairs} do not go with kept_heads={heads}. Plan again.")


def make_plan(config: PreTrainedConfig, prune: PruneConfig, scores: ImportanceScores | None = None) -> PrunePlan:
    """Ranks every axis that shrinks and keeps its best; ties go to the lower index, so the plan is deterministic.

    Scores are needed only for axes that shrink, and not at all by ``method="random"``. Layers are chosen first; width
    is then ranked by the same scores, layer by layer. Width and depth together draw a warning: P2 keeps them apart,
    and in P1 (Table 1) width alone gave the lower loss at equal parameters.
    """
    if prune.method == "refit":
        raise ValueError("method='refit' solves weights on calibration rows, beyond a plan: call prune(config, rows).")
    sizes, source = target_sizes(config, prune), source_sizes(config)
    if combination := describe_combination(sizes, source):
        logger.warning(combination)
    generator = torch.Generator().manual_seed(prune.seed)
    random = prune.method == "random"
    layers = _keep_layers(prune, source, sizes, None if random else scores, generator)
    rank = _random_ranking(generator, source) if random else _score_ranking(scores, source, config.num_hidden_layers)
    attention = [_keep_heads(source, sizes, lambda i=i: rank("heads", i)) for i in layers]
    return PrunePlan(
        sizes=sizes,
        source_sizes=source,
        kept_layers=layers,
        kept_hidden=_keep(source["hidden_size"], sizes["hidden_size"], lambda: rank("hidden", None)),
        kept_neurons=[
            _keep(source["intermediate_size"], sizes["intermediate_size"], lambda i=i: rank("neurons", i))
            for i in layers
        ],
        kept_heads=[kept.heads for kept in attention],
        kept_key_value_heads=[kept.groups for kept in attention],
        head_residuals=[kept.residuals for kept in attention] if prune.head_residual else [],
        info=_describe(prune, source, sizes, scores),
    )


def keep_all(config: PreTrainedConfig) -> PrunePlan:
    """The plan that keeps everything."""
    sizes = source_sizes(config)
    layers = range(config.num_hidden_layers)
    return PrunePlan(
        sizes=sizes,
        source_sizes=sizes,
        kept_layers=list(layers),
        kept_hidden=list(range(sizes["hidden_size"])),
        kept_neurons=[list(range(sizes["intermediate_size"])) for _ in layers],
        kept_heads=[list(range(sizes["num_attention_heads"])) for _ in layers],
        kept_key_value_heads=[list(range(sizes["num_key_value_heads"])) for _ in layers],
    )


def plan_depth(config: PreTrainedConfig, prune: PruneConfig, scores: ImportanceScores | None = None) -> list[int]:
    """Source layers that stay, ascending: those of ``drop_layers`` go, or the least important ones by the scores."""
    if combination := describe_combination(target_sizes(config, prune), source_sizes(config)):
        logger.warning(combination)
    generator = torch.Generator().manual_seed(prune.seed)
    return _keep_layers(prune, source_sizes(config), target_sizes(config, prune), scores, generator)


def describe_combination(sizes: dict[str, int], source: dict[str, int]) -> str | None:
    """What the papers say of pruning width and depth at once, if these sizes do; else None."""
    shrinking = [key for key in sizes if sizes[key] < source[key]]
    if "num_hidden_layers" not in shrinking or len(shrinking) == 1:
        return None
    return (
        f"{', '.join(shrinking)} shrink together: P2 prunes width or depth, not both, and in P1 (Table 1) width alone "
        "ended at a lower loss (2.049) than depth and width (2.062). Prefer width where speed allows it."
    )


def _keep_layers(
    prune: PruneConfig,
    source: dict[str, int],
    sizes: dict[str, int],
    scores: ImportanceScores | None,
    generator: torch.Generator,
) -> list[int]:
    """Source layers that stay, ascending; without scores at random."""
    num_layers, keep = source["num_hidden_layers"], sizes["num_hidden_layers"]
    if keep == num_layers:
        return list(range(num_layers))
    if prune.drop_layers is not None:
        dropped = check_dropped_layers(prune.drop_layers, num_layers)
    elif prune.method != "random":
        return choose_layers(scores, prune.depth_metric, prune.depth_pattern, num_layers, keep)
    elif prune.depth_pattern == "scattered":
        dropped = torch.randperm(num_layers, generator=generator)[: num_layers - keep].tolist()
    else:
        start = int(torch.randint(keep + 1, (), generator=generator))
        dropped = range(start, start + num_layers - keep)
    return [layer for layer in range(num_layers) if layer not in dropped]


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


def _random_ranking(generator: torch.Generator, source: dict[str, int]) -> Ranking:
    return lambda axis, layer: torch.rand(source[SIZE_OF[axis]], generator=generator)


def _keep(count: int, keep: int, rank: Callable[[], torch.Tensor]) -> list[int]:
    return list(range(count)) if keep == count else _top(rank(), keep)


@dataclass(frozen=True)
class _KeptHeads:
    """Of one layer: kept key/value groups and query heads, and pairs (kept, removed) for the head residual."""

    groups: list[int]
    heads: list[int]
    residuals: list[list[int]]


def _keep_heads(source: dict[str, int], sizes: dict[str, int], rank: Callable[[], torch.Tensor]) -> _KeptHeads:
    """Kept key/value groups and query heads of one layer.

    A group is as important as its query heads together (L2 norm); inside every kept group the best query heads stay,
    equally many in each, so that each still faces its own keys and values. Without grouping every head is its group.
    """
    groups, per_group = source["num_key_value_heads"], source["num_attention_heads"] // source["num_key_value_heads"]
    keep_groups, keep_heads = sizes["num_key_value_heads"], sizes["num_attention_heads"] // sizes["num_key_value_heads"]
    if (keep_groups, keep_heads) == (groups, per_group):
        return _KeptHeads(list(range(groups)), list(range(groups * per_group)), [])
    scores = rank().view(groups, per_group)
    kept = _top(scores.norm(dim=1), keep_groups)
    heads = [group * per_group + head for group in kept for head in _top(scores[group], keep_heads)]
    if per_group == 1:
        return _KeptHeads(kept, heads, _residual_pairs(scores.flatten(), keep_groups))
    pairs = [(group, pair) for group in kept for pair in _residual_pairs(scores[group], keep_heads)]
    return _KeptHeads(kept, heads, [[group * per_group + head for head in pair] for group, pair in pairs])


def _residual_pairs(scores: torch.Tensor, keep: int) -> list[list[int]]:
    """P1 2.3: of L heads ordered by importance K stay, and head i of (2K − L, K] takes on what head 2K − i + 1 lacks.

    Pairs (kept, removed); none where more than half of the heads go, which ``target_sizes`` refuses for this option.
    """
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    first = max(2 * keep - len(order), 0) + 1
    pairs = [(i - 1, 2 * keep - i) for i in range(first, keep + 1)]  # counted from 0
    return [[order[kept], order[removed]] for kept, removed in pairs if removed < len(order)]


def _top(scores: torch.Tensor, keep: int) -> list[int]:
    order = torch.sort(scores, descending=True, stable=True).indices  # stable: ties go to the lower index
    return sorted(order[:keep].tolist())


def _describe(
    prune: PruneConfig, source: dict[str, int], sizes: dict[str, int], scores: ImportanceScores | None
) -> dict[str, Any]:
    """How the plan came about, for the lineage."""
    info: dict[str, Any] = {"method": prune.method}
    if sizes["num_hidden_layers"] < source["num_hidden_layers"]:
        by_hand = prune.drop_layers is not None
        info["depth"] = (
            {"drop_layers": sorted(prune.drop_layers)}
            if by_hand
            else {"pattern": prune.depth_pattern} | ({} if prune.method == "random" else {"metric": prune.depth_metric})
        )
    if prune.head_residual:
        info["head_residual"] = True
    if prune.method == "random":
        return info | {"seed": prune.seed}
    return info | ({} if scores is None else {"aggregation": list(scores.aggregation), **scores.info})
