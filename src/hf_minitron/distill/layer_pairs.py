"""Which layer of the student is compared with which of the teacher, and where the student was cut from."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from hf_minitron.lineage import read_lineage

PLAN_FILE = "prune_plan.json"


class StudentOrigin(NamedTuple):
    """The teacher's layers and residual channels that a student was cut from, ascending; None where unknown."""

    kept_layers: Sequence[int] | None = None
    kept_channels: Sequence[int] | None = None


def read_origin(folder: str | Path, student: PreTrainedConfig, teacher: PreTrainedConfig) -> StudentOrigin:
    """What a student's folder records of how it was pruned, as far as that leads to a teacher of these sizes."""
    kept_layers: list[int] | None = None
    for stage in reversed(read_lineage(folder)):
        settings = stage.get("settings", {})
        if stage.get("stage") != "prune" or "source_sizes" not in settings:
            continue
        num_layers = settings["source_sizes"]["num_hidden_layers"]
        kept = settings.get("kept_layers", [*range(num_layers)])
        kept_layers = kept if kept_layers is None else [kept[index] for index in kept_layers]
        if num_layers == teacher.num_hidden_layers:
            break
    else:
        kept_layers = None
    plan = Path(folder) / PLAN_FILE
    kept_channels = None
    if plan.is_file():
        facts = json.loads(plan.read_text(encoding="utf-8"))
        if facts["source_sizes"]["hidden_size"] == teacher.hidden_size:
            kept_channels = facts["kept_hidden"]
    return StudentOrigin(
        kept_layers if kept_layers is not None and len(kept_layers) == student.num_hidden_layers else None,
        kept_channels if kept_channels is not None and len(kept_channels) == student.hidden_size else None,
    )


def choose_pairs(
    layers: str | None, num_student: int, num_teacher: int, origin: StudentOrigin | None = None
) -> list[tuple[int, int]]:
    """Pairs of (student layer, teacher layer): those of "s:t,s:t", or the default one, counted from 0.

    P1 (arXiv 2407.14679, appendix A.4) found (last - 2) of the student with (last - 2) of the teacher best, and several
    pairs no better. By default it is the student's (last - 2) with the teacher's layer it was cut from. Where that is
    unknown, or no layer before it was dropped (its state is the teacher's own then, with nothing to learn), it is the
    teacher's (last - 2). In models of fewer than three layers it is the first one.
    """
    if layers is not None:
        return _parse_pairs(layers, num_student, num_teacher)
    student, teacher = max(num_student - 3, 0), max(num_teacher - 3, 0)
    kept = origin.kept_layers if origin else None
    if kept is not None and kept[student] > student:
        teacher = kept[student]
    return [(student, teacher)]


def check_pairs(layers: str) -> list[tuple[int, int]]:
    """The pairs of "s:t,s:t", ascending in both; ValueError for anything else."""
    if not re.fullmatch(r"\s*\d+\s*:\s*\d+\s*(,\s*\d+\s*:\s*\d+\s*)*", layers):
        raise ValueError(
            f"intermediate_layers={layers!r} is no list of student:teacher layers. Write pairs like 13:29 or "
            "5:11,13:29, counted from 0."
        )
    pairs = [tuple(int(index) for index in pair.split(":")) for pair in layers.split(",")]
    for first, second in itertools.pairwise(pairs):
        if not (first[0] < second[0] and first[1] < second[1]):
            raise ValueError(
                f"intermediate_layers={layers!r} does not ascend in both models: after {first[0]}:{first[1]} comes "
                f"{second[0]}:{second[1]}. A later layer of the student learns from a later one of the teacher."
            )
    return pairs


def _parse_pairs(layers: str, num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    pairs = check_pairs(layers)
    sides: dict[str, tuple[int, Any]] = {
        "student": (num_student, [pair[0] for pair in pairs]),
        "teacher": (num_teacher, [pair[1] for pair in pairs]),
    }
    for role, (count, indices) in sides.items():
        if indices[-1] >= count:
            raise ValueError(
                f"intermediate_layers={layers!r}: the {role} has no layer {indices[-1]}. It has {count}, counted from "
                f"0: use at most {count - 1}. Pairs are student:teacher."
            )
    return pairs
