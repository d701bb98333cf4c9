"""The stage ``evaluate`` as the command line and recipes run it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron.checkpoint import Checkpoint
from hf_minitron.data import describe_source, load_text
from hf_minitron.evaluate.perplexity import PerplexityResult, evaluate_perplexity
from hf_minitron.hardware import fast_dtype, parse_dtype
from hf_minitron.lineage import LINEAGE_FILE, Stage, append_stage, settings_dict

_TOLD_ELSEWHERE = {"model", "dataset", "output_file"}  # in inputs and data


@dataclass
class EvaluateArguments:
    """Which model is measured, on which text."""

    model: str = field(metadata={"help": "Hub id or folder of the model to measure."})
    dataset: str = field(
        metadata={"help": "Held-out text: Hub data set id, file, folder or glob (txt, jsonl, json, parquet)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set (files: train)."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column that holds the text; found by itself where only one can."}
    )
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens the model sees at once (default: what it takes, at most 2048)."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens by which the window moves (default: half of context_length)."}
    )
    max_tokens: int | None = field(default=None, metadata={"help": "Stop after so many scored tokens."})
    batch_size: int = field(default=8, metadata={"help": "Windows per forward pass; does not change the result."})
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16 or float16 (auto: bfloat16 where it is fast, else float32)."},
    )
    output_file: str | None = field(default=None, metadata={"help": "Also write the result to this JSON file."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that the model's repository brings along."}
    )


def evaluate_checkpoint(arguments: EvaluateArguments) -> PerplexityResult:
    """Loss, perplexity and bits per byte on held-out text; added to the lineage of a folder that has one."""
    settings = settings_dict(arguments)
    stage = Stage("evaluate", settings={key: value for key, value in settings.items() if key not in _TOLD_ELSEWHERE})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = parse_dtype(arguments.dtype) or fast_dtype(device)
    how_to_read = {
        "config_name": arguments.dataset_config,
        "split": arguments.dataset_split,
        "text_column": arguments.text_column,
    }
    texts = load_text(arguments.dataset, **how_to_read)
    source = Checkpoint.open(
        arguments.model, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=dtype, use_safetensors=True, trust_remote_code=arguments.trust_remote_code
    ).to(device)
    result = evaluate_perplexity(
        model,
        AutoTokenizer.from_pretrained(source.folder),
        texts,
        context_length=arguments.context_length,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
    )
    stage.inputs = {"model": source.source}
    stage.data = describe_source(arguments.dataset, **how_to_read)
    stage.tokens, stage.metrics = result.num_tokens, result.as_dict()
    if (source.folder / LINEAGE_FILE).is_file() and "id" not in source.source:
        append_stage(stage, source.folder, source.folder)
    if arguments.output_file is not None:
        Path(arguments.output_file).write_text(json.dumps(stage.as_dict(), indent=2) + "\n", encoding="utf-8")
    return result
