"""The stage ``plan``: what pruning would change, from the config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_minitron.checkpoint import read_config
from hf_minitron.prune.plan import PruneConfig, count_parameters, source_sizes, target_config, target_sizes


@dataclass
class ModelArguments:
    """Which model to take."""

    model: str = field(metadata={"help": "Hub id or folder of the model to prune."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model's repository brings along."}
    )


@dataclass(frozen=True)
class PlanReport:
    """What pruning would change, counted on the built configs: parameters by part before and after, and sizes."""

    model: str
    source_sizes: dict[str, int]
    sizes: dict[str, int]
    source_parameters: dict[str, int]
    parameters: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_pruning(model: ModelArguments, prune: PruneConfig) -> PlanReport:
    """Sizes and parameter counts before and after; needs only the model's config."""
    config = read_config(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    sizes = target_sizes(config, prune)
    target = target_config(config, sizes)
    return PlanReport(model.model, source_sizes(config), sizes, count_parameters(config), count_parameters(target))
