"""The stage ``plan``: what pruning would change, from the config alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_minitron.checkpoint import read_config
from hf_minitron.prune.plan import describe_combination
from hf_minitron.prune.target import PruneConfig, count_parameters, source_sizes, target_config, target_sizes


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
    """What pruning would change, counted on the built configs: parameters by part before and after, and sizes.

    ``kept_layers`` are the source's, once they are chosen; ``warnings`` say what speaks against it.
    """

    model: str
    source_sizes: dict[str, int]
    sizes: dict[str, int]
    source_parameters: dict[str, int]
    parameters: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    kept_layers: list[int] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_pruning(model: ModelArguments, prune: PruneConfig) -> PlanReport:
    """Sizes and parameter counts before and after; needs only the model's config."""
    config = read_config(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    sizes, source = target_sizes(config, prune), source_sizes(config)
    counts = count_parameters(config), count_parameters(target_config(config, sizes))
    combination = describe_combination(sizes, source)
    return PlanReport(model.model, source, sizes, *counts, [combination] if combination else [])
