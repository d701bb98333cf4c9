"""The command that repeats a recorded stage, rebuilt from its settings, inputs and data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

import yaml

MIX_FILE = "mix.yaml"
_MODELS = {  # by the stage's name: command, role of the model it takes first and its option, other models' options
    "distill": ("distill", "student", "student", {"teacher": "teacher"}),
    "correct": ("correct-teacher", "teacher", "teacher", {}),
    "sft": ("sft", "source", "model", {}),
    "rpo": ("rpo", "source", "model", {}),
}
_PRUNE_SCORES = {"num_samples": "num-samples", "sequence_length": "sequence-length", "neuron_signal": "neuron-signal"}
_REFIT = {"mode": "refit-mode", "ridge": "refit-ridge", "without": "refit-without"}


def stage_command(stage: dict[str, Any], output_dir: str) -> str | None:
    """The command line, or None where the record does not tell enough: models or data that were in memory."""
    if stage["stage"] == "prune":
        words = _prune_words(stage)
    elif stage["stage"] in _MODELS:
        words = _training_words(stage)
    else:
        return None
    return None if words is None else _wrapped(["hf-minitron", *words, *_option("output-dir", output_dir)])


def model_name(source: dict[str, Any]) -> str | None:
    """Hub id, or the folder's name."""
    return source.get("id") or source.get("path")


def data_name(data: dict[str, Any]) -> str | None:
    """What stands for a text on the command line: Hub id or file, or DATA for several files."""
    if data.get("kind") == "hub":
        return data["id"]
    if data.get("kind") == "files":
        return data["files"][0] if data.get("num_files") == 1 else "DATA"
    return None


def mix_file(data: dict[str, Any]) -> str | None:
    """The file for ``--dataset-mix`` that lists a stream's sources; None for other texts."""
    if data.get("kind") != "stream" or any(data_name(source) is None for source in data["sources"]):
        return None
    keys = {"config": "config_name", "split": "split", "text_column": "text_column", "commit": "revision"}
    entries = [
        {"source": data_name(source), "weight": source["weight"]}
        | {option: source[key] for key, option in keys.items() if key in source and source["kind"] == "hub"}
        for source in data["sources"]
    ]
    return yaml.safe_dump(entries, sort_keys=False).strip()


def _prune_words(stage: dict[str, Any]) -> list[str] | None:
    settings, source = stage.get("settings") or {}, (stage.get("inputs") or {}).get("source") or {}
    sizes, before = settings.get("sizes"), settings.get("source_sizes") or {}
    name = model_name(source)
    if name is None or sizes is None or (stage.get("data") is not None and data_name(stage["data"]) is None):
        return None
    words = ["prune", name, *_revision("revision", source)]
    for key, size in sizes.items():
        words += _option(key, size) if size != before.get(key) and key != "num_hidden_layers" else []
    words += _depth_words(settings, before["num_hidden_layers"])
    if settings.get("method", "minitron") != "minitron":
        words += _option("method", settings["method"])
    if settings.get("method") == "random":
        words += _option("seed", settings.get("seed", 0))
    for key in ("head_residual", "iterations"):
        words += _option(key, settings[key]) if key in settings else []
    if settings.get("method") == "refit":
        words += [word for key, option in _REFIT.items() if key in settings for word in _option(option, settings[key])]
    words += _calibration_words(stage)
    if aggregation := settings.get("aggregation"):
        words += [*_option("batch-aggregation", aggregation[0]), *_option("sequence-aggregation", aggregation[1])]
    for key, option in _PRUNE_SCORES.items():
        words += _option(option, settings[key]) if key in settings else []
    return words


def _depth_words(settings: dict[str, Any], num_layers: int) -> list[str]:
    """How layers were chosen: by hand, by chance, or by a metric; refit records only which ones stayed."""
    depth = settings.get("depth") or {}
    if "kept_layers" in settings and "pattern" not in depth:
        kept = set(settings["kept_layers"])
        return _option("drop-layers", [layer for layer in range(num_layers) if layer not in kept])
    words = _option("num-hidden-layers", settings["sizes"]["num_hidden_layers"]) if depth else []
    for key in ("metric", "pattern"):
        words += _option(f"depth-{key}", depth[key]) if key in depth else []
    tasks = [scan["task"] for scan in (settings.get("scans") or {}).values() if "task" in scan]
    return words + (_option("depth-task", tasks[0]["task"]) if tasks and "task" in tasks[0] else [])


def _calibration_words(stage: dict[str, Any]) -> list[str]:
    data = stage.get("data") or next(
        (scan["calibration"] for scan in (stage["settings"].get("scans") or {}).values() if "calibration" in scan), None
    )
    if not data:
        return []
    words = [*_option("calibration-dataset", data_name(data)), *_option("calibration-seed", data.get("seed", 0))]
    if data["kind"] == "hub":
        words += _option("calibration-config", data["config"]) if "config" in data else []
        words += _option("calibration-split", data["split"]) if "split" in data else []
    return words


def _training_words(stage: dict[str, Any]) -> list[str] | None:
    command, main, option, others = _MODELS[stage["stage"]]
    settings = dict(stage.get("settings") or {})
    if command == "correct-teacher" and "teacher_correction" in settings:
        return None  # corrected while it taught: the student's own record has the command
    if settings.pop("round", None) is not None:
        settings["rounds"] = 1  # every round is a stage of its own
    inputs, data = stage.get("inputs") or {}, stage.get("data") or {}
    train, held_out = data.get("train") or {}, data.get("held_out")
    name, text = model_name(inputs.get(main) or {}), data_name(train)
    mixed = mix_file(train)
    if name is None or (text is None and mixed is None):
        return None
    words = [command, name, *_revision(f"{option}-revision", inputs[main])]
    for role, option in others.items():
        if (other := inputs.get(role)) and model_name(other):
            words += [*_option(f"{option}-model", model_name(other)), *_revision(f"{option}-revision", other)]
    if mixed is not None:
        words += _option("dataset-mix", MIX_FILE)
        stream = {"shuffle-buffer": "shuffle_buffer", "dataset-epochs": "epochs", "stopping": "stopping"}
        words += [word for option, key in stream.items() if key in train for word in _option(option, train[key])]
    else:
        words += _option("dataset", text)
        words += _option("dataset-config", train["config"]) if "config" in train else []
    if held_out and data_name(held_out):
        words += _option("eval-dataset", data_name(held_out))
    for key, value in settings.items():
        if value is not False and not key.startswith(("hub_", "push_to_hub")):
            words += _option(key, json.dumps(value) if isinstance(value, dict) else value)
    return words


def _revision(option: str, source: dict[str, Any]) -> list[str]:
    return _option(option, source["commit"]) if "id" in source and "commit" in source else []


def _option(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
    return [f"--{name.replace('_', '-')}", *map(str, values)]


def _wrapped(words: list[str], width: int = 100) -> str:
    """The words quoted for a shell, broken before options."""
    lines, line = [], ""
    for piece in _pieces(map(shlex.quote, words)):
        if line and len(line) + len(piece) + 3 > width:
            lines.append(line)
            line = "   "
        line = f"{line} {piece}" if line else piece
    return " \\\n".join([*lines, line])


def _pieces(words: Iterable[str]) -> list[str]:
    """What comes first, then every option with its values."""
    pieces: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            pieces.append([])
        pieces[-1].append(word)
    return [" ".join(piece) for piece in pieces]
