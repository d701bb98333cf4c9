"""Multiple-choice questions, by which P2 (arXiv 2408.11796, "Depth") chooses the layers to drop.

A question is a few requests for the log-probability of a continuation after a context, and a judge that turns the
answers into a score. Questions come from a file of one's own or from any task of the lm-evaluation-harness that ranks
given answers; the score of a model is the mean over questions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_minitron.prune.harness import RawQuestion, ask_harness, is_task_file

logger = logging.getLogger(__name__)

FIELDS = {  # what a row of a file has -> the names it goes by in public files
    "context": ("context", "query", "question", "ctx", "prompt"),
    "choices": ("choices", "endings", "options"),
    "context_options": ("context_options",),
    "continuation": ("continuation",),
    "gold": ("gold", "label", "answer"),
}
FILE_METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Request:
    """One log-probability to ask for: that of ``continuation`` after ``context``, token ids, at least one each."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Question:
    """Requests that are judged together.

    ``judge`` takes, per request, the summed log-probability of the continuation (nats) and whether each of its tokens
    was the likeliest, and returns a score in [0, 1].
    """

    requests: tuple[Request, ...]
    judge: Callable[[Sequence[float], Sequence[bool]], float]


@dataclass(frozen=True)
class QuestionSet:
    """Questions, and what the lineage says of them (JSON-ready; no absolute paths)."""

    questions: list[Question]
    description: dict[str, Any]


def load_questions(
    task: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    metric: str = "acc",
    num_questions: int | None = None,
    num_fewshot: int = 0,
    seed: int = 0,
    max_length: int,
) -> QuestionSet:
    """The questions of a file or of a task of the lm-evaluation-harness, tokenized as the harness does.

    A file is JSON lines or a JSON list, a question a row: ``context``, ``choices`` and ``gold``, or as in Winogrande
    ``context_options``, ``continuation`` and ``gold``; ``FIELDS`` lists other names. Gold is an index from 0, also as a
    string, or a letter from A. The continuation is parted from its context by a blank, unless either has white space
    there. Metrics are ``acc`` (the largest log-probability is right) and ``acc_norm`` (the same per UTF-8 byte of the
    continuation).

    Any other ``task`` is the name of a task, tag or group of the harness (``winogrande``, ``mmlu``), or a task's .yaml
    file. The harness makes the contexts, draws ``num_fewshot`` examples (by ``seed``) and judges, so any of its metrics
    will do that gives each question a number from 0 to 1. All questions of a group count alike.

    ``num_questions`` are drawn at random by ``seed``; a larger draw includes the smaller ones. Contexts lose their
    beginning where context and continuation are longer than ``max_length`` together. (The harness does not feed the
    last token and so fits in one more.)

    Raises FileNotFoundError for files and data that are not there, ImportError without the harness, and ValueError for
    unknown tasks and metrics, tasks that let the model write, rows that are no question, and continuations that do not
    fit.
    """
    if num_fewshot < 0 or max_length < 2 or (num_questions is not None and num_questions < 1):
        raise ValueError(f"{num_questions=}, {num_fewshot=}, {max_length=}: the least are 1, 0 and 2.")
    if tokenizer is None:
        raise ValueError("tokenizer=None: questions are text. Give the tokenizer that the model was trained with.")
    path = Path(task).expanduser()
    draw = functools.partial(_draw, num_questions=num_questions, seed=seed)
    facts = {"task": path.name, "metric": metric, "num_fewshot": num_fewshot, "seed": seed}
    # What looks like a path is one, there or not; a bare name is a task's unless there is such a file.
    if not is_task_file(path) and (path.is_file() or path.suffix in (".json", ".jsonl") or len(path.parts) > 1):
        asked = _ask_file(path, metric, draw, num_fewshot)
    else:
        asked = ask_harness(str(task), metric=metric, draw=draw, num_fewshot=num_fewshot, seed=seed)
        facts["lm_eval"] = version("lm_eval")
    questions, fingerprint = _tokenize(asked, tokenizer, max_length)
    return QuestionSet(questions, facts | {"num_questions": len(questions), "fingerprint": fingerprint})


def _tokenize(
    asked: list[RawQuestion], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Question], str]:
    """The questions, and a sha256 of all their token ids and answers."""
    questions, digest, num_cut = [], hashlib.sha256(), 0
    for name, texts, judge, answer in tqdm(asked, desc="tokenizing questions", disable=None):
        requests = []
        for context, continuation in texts:
            context_ids, continuation_ids = _encode(tokenizer, context, continuation, name)
            room = max_length - len(continuation_ids)
            if room < 1:
                raise ValueError(
                    f"{name}: a continuation of {len(continuation_ids)} tokens and at least one of context do not fit "
                    f"into max_length={max_length}. Leave the question out, or raise max_length if the model takes it."
                )
            num_cut += len(context_ids) > room
            requests.append(Request(context_ids[-room:], continuation_ids))
        questions.append(Question(tuple(requests), judge))
        ids = [[request.context, request.continuation] for request in requests]
        digest.update(json.dumps([ids, answer], sort_keys=True, default=str).encode())
    if num_cut:
        logger.warning("%d contexts lost their beginning to fit into max_length=%d tokens.", num_cut, max_length)
    return questions, digest.hexdigest()


def _encode(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, name: str
) -> tuple[list[int], list[int]]:
    """Token ids as the harness's ``HFLM`` makes them: both texts are tokenized as one, then parted.

    White space between them belongs to the continuation. The tokenizer adds what it adds by itself, once. Where there
    is no context, bos (else eos) stands for it.
    """

    def encode(text: str, **options: bool) -> list[int]:
        return tokenizer(text, verbose=False, **options)["input_ids"]

    prefix = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        has_prefix = prefix is not None and stripped.startswith(tokenizer.decode(prefix))
        options = {"add_special_tokens": False} if has_prefix else {}
        context_ids = encode(stripped, **options)
        continuation_ids = encode(stripped + continuation, **options)[len(context_ids) :]
    else:
        continuation_ids = encode(continuation, add_special_tokens=False)
        if prefix is None or continuation_ids[:1] == [prefix]:  # then the first token stands for it
            context_ids, continuation_ids = continuation_ids[:1], continuation_ids[1:]
        else:
            context_ids = [prefix]
    if not context_ids or not continuation_ids:
        raise ValueError(
            f"{name}: {continuation!r} after {stripped[-40:]!r} leaves no token to be scored. Give it more text."
        )
    return context_ids, continuation_ids


def _draw(total: int, num_questions: int | None, seed: int) -> list[int]:
    """Ascending indices of the questions to ask."""
    if num_questions is not None and num_questions > total:
        logger.warning("There are %d questions; num_questions=%d.", total, num_questions)
    return sorted(np.random.default_rng(seed).permutation(total)[:num_questions].tolist())


# Files


def _ask_file(path: Path, metric: str, draw: Callable[[int], list[int]], num_fewshot: int) -> list[RawQuestion]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give one, or the name of a task such as winogrande.")
    if metric not in FILE_METRICS:
        raise ValueError(f"metric={metric!r}: questions of a file are scored by {' or '.join(FILE_METRICS)}.")
    if num_fewshot:
        raise ValueError(
            f"num_fewshot={num_fewshot}: {path.name} is asked as it is. Write examples into its contexts, or describe "
            "the file in a task .yaml (dataset_path: json, dataset_kwargs: data_files: ...)."
        )
    asked = [_read_row(row, name, metric) for name, row in _read_json(path)]
    if not asked:
        raise ValueError(f"{path.name} has no rows. Give a file with a question a line.")
    return [asked[index] for index in draw(len(asked))]


def _read_json(path: Path) -> list[tuple[str, Any]]:
    """Every row after its name, as it is written; `datasets` would turn answers that are dates into dates."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text. Give questions as JSON lines or as a JSON list.") from error
    if text.lstrip().startswith("["):
        return [(f"{path.name} row {number}", row) for number, row in enumerate(_parse(text, path.name), 1)]
    lines = [(f"{path.name} line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return [(name, _parse(line, name)) for name, line in lines if line.strip()]


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}. Give questions as JSON lines or as a JSON list.") from error


def _read_row(row: Any, name: str, metric: str) -> RawQuestion:
    if not isinstance(row, dict):
        raise ValueError(f"{name} is a {type(row).__name__}. A question is an object with fields such as context.")
    found = {field: _find_field(row, field, name) for field in FIELDS}
    has = {field for field, value in found.items() if value is not None}
    if has not in ({"context", "choices", "gold"}, {"context_options", "continuation", "gold"}):
        names = "; ".join(f"{field}: {', '.join(FIELDS[field])}" for field in FIELDS)
        raise ValueError(
            f"{name} has the fields {', '.join(k for k, v in row.items() if v is not None) or 'none'}. A question has "
            f"context, choices and gold, or context_options, continuation and gold, under these names: {names}."
        )
    options = found["choices" if "choices" in has else "context_options"]
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError(f"{name}: options={options!r} must be a list of at least two.")
    if "choices" in has:
        texts = [(found["context"], choice) for choice in options]
    else:
        texts = [(context, found["continuation"]) for context in options]
    if not all(isinstance(c, str) and isinstance(t, str) and t.strip() for c, t in texts):
        raise ValueError(f"{name}: {texts} must be strings, and the continuations not empty.")
    gold = _read_gold(found["gold"], len(texts), name)
    lengths = [len(text.encode()) if metric == "acc_norm" else 1 for _, text in texts]
    texts = [(context, _delimiter(context, text) + text) for context, text in texts]
    return RawQuestion(name, texts, functools.partial(_judge_choice, lengths=lengths, gold=gold), gold)


def _find_field(row: dict[str, Any], field: str, name: str) -> Any:
    """The value under any of the names of ``field``; None if there is none."""
    names = [known for known in FIELDS[field] if row.get(known) is not None]
    if len(names) > 1:
        raise ValueError(f"{name} has {' and '.join(names)}, each of which could be the {field}. Keep one of them.")
    return row[names[0]] if names else None


def _read_gold(gold: Any, num_options: int, name: str) -> int:
    index = None
    if isinstance(gold, int) and not isinstance(gold, bool):
        index = gold
    elif isinstance(gold, str) and gold.strip().isdecimal():
        index = int(gold)
    elif isinstance(gold, str) and len(gold.strip()) == 1:
        index = string.ascii_uppercase.find(gold.strip().upper())
    if index is None or not 0 <= index < num_options:
        last = string.ascii_uppercase[min(num_options, 26) - 1]
        raise ValueError(
            f"{name}: gold={gold!r} is none of its {num_options} options. Give an index from 0 to {num_options - 1} or "
            f"a letter from A to {last}."
        )
    return index


def _delimiter(context: str, continuation: str) -> str:
    return "" if not context or context[-1].isspace() or continuation[0].isspace() else " "


def _judge_choice(log_probs: Sequence[float], greedy: Sequence[bool], *, lengths: list[int], gold: int) -> float:
    """1 if the right option has the largest log-probability per length; of equal ones the first counts."""
    return float(np.argmax(np.divide(log_probs, lengths)) == gold)
