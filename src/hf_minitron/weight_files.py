"""The files of a checkpoint folder: which ones travel along, and which hold its tensors. Headers only, no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PLAN_FILE = "prune_plan.json"  # the kept indices; cards of all later stages link them
COMPANIONS = (
    PLAN_FILE,  # travel unchanged from a source checkpoint to what is made from it
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",  # its terms, as most of them demand
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)


def index_tensors(folder: Path) -> dict[str, str]:
    """Tensor name → file name, after checking that all shards are there, readable and of full length.

    Raises FileNotFoundError for what is missing and ValueError for what is damaged.
    """
    if (folder / WEIGHTS).is_file():  # wins over an index, as in transformers
        shard_of = dict.fromkeys(_read_header(folder / WEIGHTS), WEIGHTS)
    elif (folder / WEIGHTS_INDEX).is_file():
        shard_of = _read_index(folder / WEIGHTS_INDEX)
        missing = sorted({shard for shard in shard_of.values() if not (folder / shard).is_file()})
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(missing)}: the index names them, so the checkpoint was not downloaded or "
                f"copied completely. Fetch it again."
            )
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f" It has {', '.join(pickles)}, which are pickles and can run code." if pickles else ""
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}: only safetensors are read.{found} Save the model with "
            f"model.save_pretrained(folder) first."
        )
    stored = {shard: _read_header(folder / shard) for shard in set(shard_of.values())}
    absent = sorted(name for name, shard in shard_of.items() if name not in stored[shard])
    if absent:
        raise ValueError(
            f"{folder}: the index names tensor {absent[0]!r} but {shard_of[absent[0]]} does not hold it. Fetch "
            "it again."
        )
    return shard_of


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole index of shards ({error!r}). Download or copy it again.") from None


def _read_header(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="np") as shard:
            return set(shard.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). Download or copy it again.") from None


def count_parameters(folder: Path) -> int:
    """Numbers in the stored tensors, by their headers; a tied head counts once."""
    total = 0
    for shard in sorted(set(index_tensors(folder).values())):
        with safe_open(folder / shard, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
