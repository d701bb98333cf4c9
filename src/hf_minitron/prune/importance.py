"""Importance of neurons, heads, residual channels and layers from activations, in one forward pass (P1 2.2, P2).

P1 is arXiv 2407.14679, P2 is arXiv 2408.11796. A *sample* is one calibration row. Of every activation channel a
statistic over the row's tokens is taken (the sequence aggregation), then one over all samples (the batch aggregation).
Only the running count, mean and sum of squared deviations of the per-sample statistic are kept, in float64 on the
activation's device, so memory is a few vectors, scores do not depend on how rows are batched, and the scores of
several machines can be merged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_minitron.architectures import Family, get_family, get_head_dim

AXES = ("neurons", "heads", "hidden", "layers")
STATISTICS = ("l2", "mean", "var")


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a per-sample statistic, per channel; merges exactly.

    Chan, Golub and LeVeque's update: no cancellation for the variance, associative up to rounding.
    """

    count: int = 0
    mean: torch.Tensor | float = 0.0
    deviation: torch.Tensor | float = 0.0

    def add(self, samples: torch.Tensor) -> None:
        """Adds ``samples`` of shape (samples, channels)."""
        samples = samples.double()
        mean = samples.mean(0)
        self.merge(Moments(len(samples), mean, (samples - mean).square().sum(0)))

    def merge(self, other: Moments) -> None:
        total = self.count + other.count
        delta = other.mean - self.mean
        self.deviation = self.deviation + other.deviation + delta * delta * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    def aggregate(self, statistic: str) -> torch.Tensor:
        """Over all samples: ``l2`` norm, ``mean`` or (population) ``var``; shape (channels,)."""
        if statistic == "mean":
            return self.mean
        if statistic == "var":
            return self.deviation / self.count
        return (self.deviation + self.count * self.mean * self.mean).sqrt()


def aggregate_sequence(activation: torch.Tensor, statistic: str) -> torch.Tensor:
    """Over the tokens of each row: (rows, tokens, channels) → (rows, channels); mean is of absolute values (P1 2.2)."""
    activation = activation.float()
    if statistic == "mean":
        return activation.abs().mean(1)
    if statistic == "var":
        return activation.var(1, correction=0)
    return activation.norm(dim=1)


@dataclass
class ImportanceScores:
    """What one scoring pass saw; ``neurons``, ``heads``, ``hidden`` and ``layers`` give the scores themselves.

    ``moments`` holds one ``Moments`` per site; the keys are ``neurons.<layer>``, ``heads.<layer>`` (per channel of the
    attention output), ``hidden.<layer>.<norm site>`` and ``layers.<layer>`` (the cosine of input and output, one
    channel). ``info`` says which model and rows were scored.
    """

    aggregation: tuple[str, str]
    head_dim: int
    moments: dict[str, Moments] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that were scored."""
        present = {key.split(".")[0] for key in self.moments}
        return tuple(axis for axis in AXES if axis in present)

    @property
    def neurons(self) -> torch.Tensor:
        """(layers, intermediate_size): larger is more important; ranked within a layer."""
        return self._stack("neurons")

    @property
    def heads(self) -> torch.Tensor:
        """(layers, num_attention_heads): L2 norm over the head's channels of their aggregated activation."""
        channels = self._stack("heads")
        return channels.unflatten(1, (-1, self.head_dim)).norm(dim=2)

    @property
    def hidden(self) -> torch.Tensor:
        """(hidden_size,): summed over all per-layer norms, one ranking for the whole residual stream (P1 2.2)."""
        return torch.stack([self._aggregate(key) for key in self._keys("hidden")]).sum(0)

    @property
    def layers(self) -> torch.Tensor:
        """(layers,): block importance 1 − E[cos(input, output)] over tokens (P1 2.2, ShortGPT)."""
        return torch.stack([1 - self.moments[key].mean.reshape(()) for key in self._keys("layers")]).float().cpu()

    def as_dict(self) -> dict[str, Any]:
        """What was scored and how, without the scores themselves, ready for JSON."""
        return {"axes": list(self.axes), "aggregation": list(self.aggregation), **self.info}

    def merge(self, other: ImportanceScores) -> ImportanceScores:
        """Scores over both sets of rows, as if scored together; for shards of one calibration set."""
        mine, theirs = (
            (self.aggregation, self.head_dim, set(self.moments)),
            (other.aggregation, other.head_dim, set(other.moments)),
        )
        if mine != theirs or self.info.get("model") != other.info.get("model"):
            raise ValueError(
                "scores can be merged only when model, aggregation and axes agree. Score the shards with equal "
                "settings."
            )
        merged = ImportanceScores(self.aggregation, self.head_dim, {}, dict(self.info))
        for key in self.moments:
            merged.moments[key] = Moments()
            for part in (self, other):
                merged.moments[key].merge(part.moments[key])
        for key in ("num_samples", "num_tokens"):
            merged.info[key] = self.info.get(key, 0) + other.info.get(key, 0)
        if "fingerprint" in self.info and "fingerprint" in other.info:
            merged.info["fingerprint"] = f"{self.info['fingerprint']}+{other.info['fingerprint']}"
        else:
            merged.info.pop("fingerprint", None)
        return merged

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with everything needed to score, merge and inspect."""
        tensors = {}
        for key, moments in self.moments.items():
            tensors[f"{key}:mean"] = moments.mean.cpu().contiguous()
            tensors[f"{key}:deviation"] = moments.deviation.cpu().contiguous()
        counts = {key: moments.count for key, moments in self.moments.items()}
        facts = {"aggregation": self.aggregation, "head_dim": self.head_dim, "counts": counts, "info": self.info}
        temporary = Path(f"{path}.tmp")
        save_file(tensors, temporary, metadata={"importance": json.dumps(facts)})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> ImportanceScores:
        """Reads what ``save`` wrote; ValueError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["importance"])
                read = file.get_tensor
                moments = {
                    key: Moments(n, read(f"{key}:mean"), read(f"{key}:deviation")) for key, n in facts["counts"].items()
                }
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} holds no importance scores ({error}): give a file written by `hf-minitron score`."
            ) from None
        return cls(tuple(facts["aggregation"]), facts["head_dim"], moments, facts["info"])

    def _keys(self, axis: str) -> list[str]:
        keys = [key for key in self.moments if key.split(".")[0] == axis]
        if not keys:
            raise ValueError(
                f"axis {axis!r} was not scored, only {', '.join(self.axes)}. Score it with axes=(..., {axis!r})."
            )
        return sorted(keys, key=lambda key: int(key.split(".")[1]))

    def _aggregate(self, key: str) -> torch.Tensor:
        return self.moments[key].aggregate(self.aggregation[0]).float().cpu()

    def _stack(self, axis: str) -> torch.Tensor:
        return torch.stack([self._aggregate(key) for key in self._keys(axis)])


@torch.no_grad()
def score_model(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]] | torch.Tensor,
    *,
    axes: Iterable[str] = AXES,
    aggregation: tuple[str, str] = ("l2", "mean"),
    batch_size: int = 8,
    progress: bool = True,
) -> ImportanceScores:
    """Scores every axis in one forward pass over ``rows``, which are token ids of equal length (packed, no padding).

    Neurons are scored by the input of the FFN's last projection, heads by the input of the attention's output
    projection, hidden channels by the outputs of the per-layer norms, layers by the cosine of input and output.
    ``aggregation`` is (over samples, over tokens); ("l2", "mean") is the papers' choice (P1 Table 13).

    Raises ValueError for unknown axes or aggregations before any work, and for NaN or Inf activations.
    """
    axes = check_axes(axes)
    aggregation = check_aggregation(aggregation)
    check_batch_size(batch_size)
    if len(rows) < 1:
        raise ValueError("there are 0 rows: importance needs at least one. Give rows of token ids.")
    family, was_training = get_family(model.config), model.training
    scores = ImportanceScores(aggregation, get_head_dim(model.config))
    hooks = _attach_hooks(model, family, axes, scores)
    device = model.get_input_embeddings().weight.device
    model.eval()
    try:
        for start in tqdm(range(0, len(rows), batch_size), desc="scoring", unit="batch", disable=not progress):
            batch = torch.as_tensor(rows[start : start + batch_size], dtype=torch.long, device=device)
            model.base_model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    _check_scores(scores)
    scores.info = {"num_samples": len(rows), "sequence_length": len(rows[0]), "num_tokens": len(rows) * len(rows[0])}
    return scores


def check_axes(axes: Iterable[str]) -> tuple[str, ...]:
    """The axes in canonical order; an unknown one is an error."""
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise ValueError(f"axes={axes}: importance is defined for {', '.join(AXES)}. Use one or more of these.")
    return tuple(axis for axis in AXES if axis in axes)


def check_aggregation(aggregation: Sequence[str]) -> tuple[str, str]:
    """The pair (over samples, over tokens); anything else is an error."""
    if len(tuple(aggregation)) != 2 or any(statistic not in STATISTICS for statistic in aggregation):
        raise ValueError(
            f"aggregation={aggregation!r}: it is a pair (over samples, over tokens) of {', '.join(STATISTICS)}. "
            f"The papers use ('l2', 'mean')."
        )
    return tuple(aggregation)


def check_batch_size(batch_size: int) -> None:
    """At least one row per forward pass."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a forward pass needs at least one row. Use 1 or more.")


def _attach_hooks(model: PreTrainedModel, family: Family, axes: tuple[str, ...], scores: ImportanceScores) -> list:
    def collect(key: str) -> Callable[[torch.Tensor], None]:
        moments = scores.moments.setdefault(key, Moments())
        return lambda activation: moments.add(aggregate_sequence(activation, scores.aggregation[1]))

    hooks = []
    for index, layer in enumerate(model.get_submodule(family.layers)):
        if "neurons" in axes:
            hooks.append(_on_input(layer.get_submodule(family.neuron_site), collect(f"neurons.{index}")))
        if "heads" in axes:
            hooks.append(_on_input(layer.get_submodule(family.head_site), collect(f"heads.{index}")))
        if "hidden" in axes:
            for site in family.norm_sites:
                hooks.append(_on_output(layer.get_submodule(site), collect(f"hidden.{index}.{site}")))
        if "layers" in axes:
            hooks.append(_on_layer(layer, scores.moments.setdefault(f"layers.{index}", Moments())))
    return hooks


def _on_input(module: torch.nn.Module, collect: Callable[[torch.Tensor], None]):
    return module.register_forward_pre_hook(lambda module, args: collect(args[0]))


def _on_output(module: torch.nn.Module, collect: Callable[[torch.Tensor], None]):
    return module.register_forward_hook(lambda module, args, output: collect(output))


def _on_layer(layer: torch.nn.Module, moments: Moments):
    def hook(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        moments.add(cosine.mean(1, keepdim=True))

    return layer.register_forward_hook(hook, with_kwargs=True)


def _check_scores(scores: ImportanceScores) -> None:
    for key, moments in scores.moments.items():
        if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.deviation).all()):
            raise ValueError(
                f"activations at {key} are NaN or Inf, so nothing can be ranked. Check the checkpoint's weights, or "
                f"score in a wider dtype (dtype='float32')."
            )
