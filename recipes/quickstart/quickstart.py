"""The main job in ten minutes on two CPU cores, offline: halve a real model by width and distil it back.

Makes     work/quickstart/student: half of recipes/quickstart/teacher, an ordinary LlamaForCausalLM, with its lineage;
          beside it a table, plots and sample completions in results.md.
Method    Minitron (arXiv 2407.14679, 2408.11796): importance from activations in one forward pass, width pruning,
          distillation by forward KL on logits. The baseline keeps random channels and neurons and trains as long.
Data      the Python standard library's source; calibration and training never see the held-out modules.
Needs     no GPU, no network, 2 GB of memory.
Command   python recipes/quickstart/quickstart.py [--output-dir DIR] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stdlib_corpus import write_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_minitron.data import load_text
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.inputs import DistillArguments
from hf_minitron.distill.stage import distill_checkpoint
from hf_minitron.evaluate.perplexity import PerplexityResult, evaluate_perplexity
from hf_minitron.prune.arguments import CalibrationArguments, PruneOutput, ScoreOutput
from hf_minitron.prune.importance import ImportanceScores
from hf_minitron.prune.preview import ModelArguments
from hf_minitron.prune.stage import prune_checkpoint, score_checkpoint
from hf_minitron.prune.target import PruneConfig
from hf_minitron.publish.plots import plot_importance, plot_losses
from hf_minitron.publish.tables import markdown_table
from hf_minitron.training import TrainingReport

TEACHER = Path(__file__).parent / "teacher"
SIZES = {"hidden_size": 168, "intermediate_size": 320}  # of 256 and 576: half of the parameters
ROW_LENGTH = 256  # tokens
LEARNING_RATE = 2e-3
PROMPT = "def read_lines(path):\n    "
MARKER = "quickstart.json"  # stands in a folder that this script made and may therefore replace


@dataclass(frozen=True)
class Scale:
    """How much is read: ``calibration_rows`` and ``eval_rows`` in rows, ``eval_tokens`` in tokens (None: all)."""

    calibration_rows: int = 256
    steps: int = 150
    rows_per_step: int = 8
    eval_steps: int = 25
    eval_rows: int = 24
    eval_tokens: int | None = None


SMOKE = Scale(calibration_rows=8, steps=4, rows_per_step=2, eval_steps=2, eval_rows=4, eval_tokens=2_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("work/quickstart"))
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="another small Llama to halve")
    parser.add_argument("--smoke", action="store_true", help="run every step on almost no data, to see that it works")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    output_dir, scale = prepare_folder(arguments.output_dir), SMOKE if arguments.smoke else Scale()
    start = time.monotonic()
    corpus = write_corpus(output_dir / "corpus")
    scores = score(arguments.teacher, corpus["train"], output_dir, scale)
    pruned = {method: prune(method, arguments.teacher, output_dir) for method in ("minitron", "random")}
    reports = {method: distil(folder, arguments.teacher, corpus, scale) for method, folder in pruned.items()}
    folders = {
        "teacher": arguments.teacher,
        "pruned": pruned["minitron"],
        "pruned + distilled": reports["minitron"].output_dir,
        "random + distilled": reports["random"].output_dir,
    }
    measured = {name: measure(folder, corpus["held_out"], scale) for name, folder in folders.items()}
    write_results(output_dir, measured, reports, scores, time.monotonic() - start)


def prepare_folder(output_dir: Path) -> Path:
    """An empty folder; one that an earlier quickstart filled is emptied, anything else is left alone."""
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / MARKER).is_file():
        raise SystemExit(
            f"error: {output_dir} is not empty and was not made by the quickstart. Give another --output-dir."
        )
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    (output_dir / MARKER).write_text("{}\n")
    return output_dir


def score(teacher: Path, train: Path, output_dir: Path, scale: Scale) -> ImportanceScores:
    print("\n1/4 score: importance of neurons, heads, channels and layers", flush=True)
    calibration = CalibrationArguments(
        calibration_dataset=str(train), num_samples=scale.calibration_rows, sequence_length=ROW_LENGTH
    )
    return score_checkpoint(
        ModelArguments(str(teacher)), calibration, ScoreOutput(str(output_dir / "scores.safetensors"))
    )


def prune(method: str, teacher: Path, output_dir: Path) -> Path:
    print(f"\n2/4 prune: {method}", flush=True)
    folder = output_dir / f"{method}-pruned"
    output = PruneOutput(str(folder), scores=str(output_dir / "scores.safetensors"))
    prune_checkpoint(ModelArguments(str(teacher)), CalibrationArguments(), PruneConfig(**SIZES, method=method), output)
    return folder


def distil(pruned: Path, teacher: Path, corpus: dict[str, Path], scale: Scale) -> TrainingReport:
    print(f"\n3/4 distil: {pruned.name}", flush=True)
    arguments = DistillArguments(
        student_model=str(pruned),
        teacher_model=str(teacher),
        dataset=str(corpus["train"]),
        eval_dataset=str(corpus["held_out"]),
        max_length=ROW_LENGTH,
        max_train_rows=scale.steps * scale.rows_per_step,
        max_eval_rows=scale.eval_rows,
    )
    config = DistillationConfig(
        output_dir=str(pruned.with_name("student" if pruned.name == "minitron-pruned" else "random-student")),
        per_device_train_batch_size=scale.rows_per_step,
        max_steps=scale.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, scale.steps // 2),
        weight_decay=0.0,
        adam_beta2=0.95,
        eval_strategy="steps",
        eval_steps=scale.eval_steps,
        logging_steps=scale.eval_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        seed=0,
    )
    return distill_checkpoint(arguments, config)


@dataclass(frozen=True)
class Measured:
    """One line of the table: parameters, held-out result, a completion, the lineage's tokens and seconds."""

    parameters: int
    result: PerplexityResult
    completion: str


def measure(folder: Path, held_out: Path, scale: Scale) -> Measured:
    print(f"\n4/4 evaluate: {folder.name}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = model.config.max_position_embeddings
    result = evaluate_perplexity(
        model, tokenizer, load_text(held_out), context_length=context, stride=context, max_tokens=scale.eval_tokens
    )
    return Measured(model.num_parameters(), result, complete(model, tokenizer))


def complete(model: Any, tokenizer: Any) -> str:
    """A continuation of PROMPT, drawn with the same seed for every model."""
    ids = tokenizer(tokenizer.bos_token + PROMPT, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": None, "max_new_tokens": 64}
    output = model.generate(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], **settings)
    return tokenizer.decode(output[0], skip_special_tokens=True).rstrip()


def write_results(
    output_dir: Path,
    measured: dict[str, Measured],
    reports: dict[str, TrainingReport],
    scores: ImportanceScores,
    seconds: float,
) -> None:
    table = results_table(measured, reports)
    curves = {
        f"{'importance' if method == 'minitron' else 'random'}-pruned": loss_curve(report)
        for method, report in reports.items()
    }
    teacher_loss = reports["minitron"].metrics["teacher_lm_loss"]
    plot_losses(output_dir / "losses.png", curves, {"teacher": teacher_loss}, "held-out loss (nats per token)")
    plot_importance(output_dir / "importance.png", scores.neurons, scores.heads, scores.hidden, scores.layers, SIZES)
    completions = "\n\n".join(f"### {name}\n\n```python\n{m.completion}\n```" for name, m in measured.items())
    text = (
        f"# Quickstart\n\n{table}\n\nIn all {seconds:.0f} "
        f"s.\n\n![losses](losses.png)\n\n![importance](importance.png)\n\n## Completions\n\n{completions}\n"
    )
    (output_dir / "results.md").write_text(text, encoding="utf-8")
    facts = {name: {"parameters": m.parameters, **m.result.as_dict()} for name, m in measured.items()}
    (output_dir / MARKER).write_text(json.dumps({"seconds": round(seconds, 1), "models": facts}, indent=2) + "\n")
    for name, m in measured.items():
        print(f"\n--- {name}\n{m.completion}")
    print(
        f"\n{table}\n\nIn all {seconds:.0f} s. The student: {output_dir / 'student'}. Table and plots: "
        f"{output_dir / 'results.md'}"
    )


def results_table(measured: dict[str, Measured], reports: dict[str, TrainingReport]) -> str:
    """Teacher, pruned and distilled models; the gap is that between pruned model and teacher in bits per byte."""
    bits = {name: m.result.bits_per_byte for name, m in measured.items()}
    trained = {"pruned + distilled": reports["minitron"], "random + distilled": reports["random"]}
    rows = []
    for name, m in measured.items():
        report = trained.get(name)
        recovered = (bits["pruned"] - bits[name]) / (bits["pruned"] - bits["teacher"])
        rows.append(
            (
                name,
                f"{m.parameters:,}",
                f"{bits[name]:.3f}",
                f"{100 * recovered:.0f} %" if report else "",
                f"{report.num_tokens:,}" if report else "",
                f"{report.seconds:.0f}" if report else "",
            )
        )
    header = ("model", "parameters", "bits per byte", "gap recovered", "training tokens", "seconds")
    return markdown_table(header, rows)


def loss_curve(report: TrainingReport) -> list[tuple[float, float]]:
    """(training tokens, held-out loss) before training and at every evaluation."""
    tokens_per_step = report.num_tokens / max(entry["step"] for entry in report.log_history)
    evaluations = [entry for entry in report.log_history if "eval_lm_loss" in entry]
    points = [(entry["step"] * tokens_per_step, entry["eval_lm_loss"]) for entry in evaluations]
    return [(0.0, report.metrics_before["lm_loss"]), *points]


if __name__ == "__main__":
    main()
