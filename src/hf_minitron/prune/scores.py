"""What scoring saw, as running moments by site, and the importance that follows; saved, loaded and merged exactly.

Only the count, mean and sum of squared deviations of a per-sample statistic are kept, in float64, so a file is a few
vectors, scores do not depend on how rows are batched, and the scores of several machines can be merged.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

AXES = ("neurons", "heads", "hidden", "layers")
STATISTICS = ("l2", "mean", "var")
NEURON_SIGNALS = ("down_proj_input", "first_projection")


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
        """Adds the samples that ``other`` saw."""
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


@dataclass
class ImportanceScores:
    """What one scoring pass saw; ``neurons``, ``heads``, ``hidden`` and ``layers`` give the scores themselves.

    ``moments`` holds one ``Moments`` per site; the keys are ``neurons.<layer>``, ``heads.<layer>`` (per channel of the
    attention output), ``hidden.<layer>.<norm site>`` and ``layers.<layer>`` (the cosine of input and output, one
    channel). Removal scans (``prune.depth``) add ``removal.<metric>.<n>``, which is no axis of its own and is saved and
    merged with the rest. ``info`` says which model and rows were scored, by which neuron signal, and under ``scans``,
    by key, which rows or task each scan saw.
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
    def neuron_signal(self) -> str | None:
        """What neurons were scored by, one of ``NEURON_SIGNALS``; None if they were not scored."""
        return self.info.get("neuron_signal", NEURON_SIGNALS[0]) if "neurons" in self.axes else None

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
        """Scores over both sets of rows, as if scored together; for shards of one calibration set.

        Removal scans that only one of them has come along, and one that both made on the same samples counts once.
        ValueError, naming what differs, for scores of another model, aggregation, neuron signal or axes, for scans on
        another task, and for rows that are in both.
        """
        _check_mergeable(self, other)
        merged = ImportanceScores(self.aggregation, self.head_dim, {}, _merge_info(self.info, other.info))
        for key in self.moments | other.moments:
            merged.moments[key] = Moments()
            parts = [part for part in (self, other) if key in part.moments]
            for part in parts[:1] if _is_same_scan(self, other, key) else parts:
                merged.moments[key].merge(part.moments[key])
        return merged

    def check_model(self, source: dict[str, Any]) -> None:
        """Refuses scores of another model than ``source``, as far as both are known by commit or content."""
        scored = self.info.get("model", {})
        for key in ("commit", "sha256"):
            if scored.get(key, source.get(key)) != source.get(key, scored.get(key)):
                raise ValueError(
                    f"the scores are of {scored}, the model is {source}. Score this model, or give its own scores."
                )

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
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder: give a file written by `hf-minitron score`.")
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


def _check_mergeable(one: ImportanceScores, other: ImportanceScores) -> None:
    """One model, one way of scoring, different rows."""
    mine, theirs = _kind(one), _kind(other)
    if _is_same_model(mine["model"], theirs["model"]):
        theirs["model"] = mine["model"]
    scans = [key for key in one.moments if _is_scan(key) and key in other.moments]
    for key in scans:
        for kind, scores in ((mine, one), (theirs, other)):
            kind[f"the task of {key}"] = _scan_facts(scores, key).get("task")
            kind[f"number of blocks in {key}"] = len(scores.moments[key].mean) - 1
    if differing := [what for what in mine | theirs if mine.get(what) != theirs.get(what)]:
        what = differing[0]
        raise ValueError(
            f"scores cannot be merged: {what} is {mine.get(what)} in one, {theirs.get(what)} in the other. Score all "
            "shards with the same model and settings."
        )
    sources = [(one.info, other.info)]
    sources += [(_scan_facts(one, key), _scan_facts(other, key)) for key in scans if not _is_same_scan(one, other, key)]
    for mine, theirs in sources:
        if again := _fingerprints(mine) & _fingerprints(theirs):
            raise ValueError(
                f"scores cannot be merged: both hold the rows with fingerprint {min(again)[:12]}, which would count "
                "twice. Give every shard once, and score shards of different rows (other files, or --calibration-seed)."
            )


def _kind(scores: ImportanceScores) -> dict[str, Any]:
    """What must agree for two scores to be merged, by name."""
    sites = {key: len(moments.mean) for key, moments in scores.moments.items() if not _is_scan(key)}
    return {
        "model": scores.info.get("model"),
        "aggregation": scores.aggregation,
        "axes": scores.axes,
        "neuron_signal": scores.neuron_signal,
        "head_dim": scores.head_dim,
    } | {f"number of channels at {key}": width for key, width in sites.items()}


def _is_same_model(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """By commit or content where both know it: a folder may have another name on another machine."""
    known = [key for key in ("commit", "sha256") if one and other and key in one and key in other]
    return all(one[key] == other[key] for key in known) if known else one == other


def _is_scan(key: str) -> bool:
    return key.startswith("removal.")


def _scan_facts(scores: ImportanceScores, key: str) -> dict[str, Any]:
    return scores.info.get("scans", {}).get(key, {})


def _is_same_scan(one: ImportanceScores, other: ImportanceScores, key: str) -> bool:
    """Whether both made a scan on the same samples, as far as they say which."""
    return _is_scan(key) and _scan_facts(one, key) == _scan_facts(other, key) != {}


def _fingerprints(info: dict[str, Any]) -> set[str]:
    return set(info["fingerprint"].split("+")) if "fingerprint" in info else set()


def _merge_info(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The facts that hold for both, and those that add up; what is unknown of one part is unknown of the whole."""
    merged = {key: value for key, value in one.items() if key == "model" or other.get(key) == value}
    for key in ("num_samples", "num_tokens"):
        if key in one and key in other:
            merged[key] = one[key] + other[key]
    if "fingerprint" in one and "fingerprint" in other:
        merged["fingerprint"] = f"{one['fingerprint']}+{other['fingerprint']}"
    if "calibration" in one and "calibration" in other and "calibration" not in merged:
        both = (one["calibration"], other["calibration"])
        merged["calibration"] = {"parts": [part for data in both for part in data.get("parts", [data])]}
    if scans := one.get("scans", {}) | other.get("scans", {}):
        merged["scans"] = {key: _merge_scan_facts(one, other, key) for key in scans}
    return merged


def _merge_scan_facts(one: dict[str, Any], other: dict[str, Any], key: str) -> dict[str, Any]:
    mine, theirs = (info.get("scans", {}).get(key) for info in (one, other))
    if mine is None or theirs is None or mine == theirs:
        return mine or theirs
    return _merge_info(mine, theirs)
