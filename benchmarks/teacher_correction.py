"""Claim: a teacher corrected on the distillation data loses less there, and so does the student distilled from it.

Measures  the quickstart's teacher, which knows only Python, on English: its held-out loss there and on Python, before
          and after correction of all weights, of LoRA adapters and of norms alone; then the held-out loss of one and
          the same student, cut from the original teacher, distilled for equal steps from the original, from each
          corrected one (serial), and from one that is corrected meanwhile (parallel). Also seconds of processor time,
          trained parameters and the growth of peak memory by training, of each method.
Data      the help topics of Python's own documentation, every fifth held out; any other by --train and --held-out.
Command   python benchmarks/teacher_correction.py [--train FILE --held-out FILE] [--seeds 0 1 2] [--json] ...
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from _measuring import describe_machine, peak_growth, run_afresh
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_minitron.adapters import LoraArguments
from hf_minitron.data import load_text, pack_rows
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.correction_trainer import CorrectionTrainer, TeacherCorrectionConfig
from hf_minitron.distill.parallel_correction import ParallelCorrection
from hf_minitron.distill.trained_weights import choose_trained
from hf_minitron.distill.trainer import DistillationTrainer
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.target import PruneConfig
from hf_minitron.publish.plots import plot_losses
from hf_minitron.publish.tables import markdown_table

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
SIZES = PruneConfig(hidden_size=176, intermediate_size=400)  # about half of the teacher
RATES = {"full": 6e-4, "lora": 3e-3, "norm": 3e-2}  # full: a fifth of the teacher's own peak, 3e-3; else the best tried
HELD_OUT_EVERY = 5


def main() -> None:
    """Measures and prints."""
    options = parse_options()
    transformers_logging.disable_progress_bar()
    if options.cost is not None:
        print(json.dumps({"peak_bytes": measure_memory(options)}))
        return
    facts = measure(options)
    if options.plot is not None:
        plot(facts, options.plot)
    print(json.dumps(facts, indent=2) if options.json else report(facts))


def parse_options() -> argparse.Namespace:
    """Data, amounts and methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="text to correct and distil on")
    parser.add_argument("--held-out", help="text of the same kind to measure on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data, order and adapters")
    parser.add_argument("--steps", type=int, default=40, help="of a correction")
    parser.add_argument("--student-steps", type=int, default=40)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=128)
    parser.add_argument("--eval-rows", type=int, default=32)
    parser.add_argument("--methods", nargs="*", default=[*RATES], choices=[*RATES])
    parser.add_argument("--parallel", nargs="*", default=["full", "lora"], choices=[*RATES], help="also in parallel")
    parser.add_argument("--rates", type=float, nargs="*", help="learning rates of the methods, in their order")
    parser.add_argument("--plot", type=Path, help="PNG of the students' losses")
    parser.add_argument("--cost", choices=[*RATES], help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Losses in nats per token, one a seed, and the cost of every method."""
    seeds = [run_seed(options, seed) for seed in options.seeds]
    words = ["--rows-per-step", str(options.rows_per_step), "--row-length", str(options.row_length)]
    memory = {method: run_afresh(__file__, "--cost", method, *words)["peak_bytes"] for method in options.methods}
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in ("json", "plot", "cost")},
        "machine": describe_machine(),
        "seeds": seeds,
        "peak_bytes": memory,
    }


def run_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Corrections and distillations of one seed."""
    rows = load_rows(options, seed)
    original = load_teacher()
    rates = dict(zip(options.methods, options.rates or map(RATES.get, options.methods), strict=True))
    teachers, found = {"original": original}, {"rates": rates, "teachers": {}, "students": {}, "parameters": {}}
    for method, rate in rates.items():
        teacher, facts = correct(copy.deepcopy(original), method, rate, rows, options, seed)
        teachers[method], found["teachers"][method] = teacher, facts
        say(f"seed {seed}: {method}: {facts['before']} -> {facts['after']}, {facts['cpu_seconds']:.0f} s")
    student = prune(original, rows["train"])
    found["parameters"] = {"teacher": original.num_parameters(), "student": student.num_parameters()}
    for name, teacher in teachers.items():
        found["students"][name] = distil(student, teacher, rows, options, seed)
        say(f"seed {seed}: student of {name}: {found['students'][name]['losses'][-1]}")
    for method in options.parallel:
        rate = rates[method]
        parallel = ParallelCorrection(method, teacher_learning_rate=rate, teacher_warmup_steps=0.1)
        found["students"][f"{method}, parallel"] = distil(student, original, rows, options, seed, parallel)
        say(f"seed {seed}: student of {method}, parallel: {found['students'][f'{method}, parallel']['losses'][-1]}")
    return found


def load_teacher() -> PreTrainedModel:
    """The quickstart's, in fp32."""
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "teacher", dtype=torch.float32)


def load_rows(options: argparse.Namespace, seed: int) -> dict[str, Dataset]:
    """Packed rows: of the new kind to train and to measure on, and general ones, which are Python."""
    sys.path.insert(0, str(QUICKSTART))
    from stdlib_corpus import write_corpus

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "teacher")
    steps = max(options.steps, options.student_steps)
    if options.train is None:
        from pydoc_data.topics import topics

        texts = [text for _, text in sorted(topics.items())]
        held_out = texts[::HELD_OUT_EVERY]
        train = [text for number, text in enumerate(texts) if number % HELD_OUT_EVERY]
    else:
        train, held_out = load_text(options.train), load_text(options.held_out)
    with tempfile.TemporaryDirectory() as folder:
        general = load_text(write_corpus(Path(folder))["held_out"])
        sets = {"train": (train, steps * options.rows_per_step, seed)}
        sets |= {"held_out": (held_out, options.eval_rows, 0), "general": (general, options.eval_rows, 0)}
        return {
            name: pack_rows(text, tokenizer, options.row_length, max_rows=most, seed=shuffled)
            for name, (text, most, shuffled) in sets.items()
        }


def correct(
    teacher: PreTrainedModel, method: str, rate: float, rows: dict, options: argparse.Namespace, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The corrected teacher, whole, and its losses on both sets before and after."""
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(folder, options, seed, rate, options.steps)
        config = TeacherCorrectionConfig(method=method, **settings)
        model = choose_trained(teacher, method, LoraArguments(), seed)
        sets = {name: rows[name] for name in ("held_out", "general")}
        trainer = CorrectionTrainer(model, config, rows["train"], sets)
        before, start = measure_sets(trainer, sets), time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        facts = {"before": before, "after": measure_sets(trainer, sets), "cpu_seconds": seconds}
    facts["num_trained"] = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return (model.merge_and_unload() if method == "lora" else model), facts


def measure_sets(trainer: CorrectionTrainer, sets: dict[str, Dataset]) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {name: round(metrics[f"eval_{name}_lm_loss"], 4) for name in sets}


def prune(teacher: PreTrainedModel, rows: Dataset) -> PreTrainedModel:
    """Half of the original teacher, chosen on the new text."""
    pruner = PrunerForCausalLM(teacher)
    pruner.score(rows["input_ids"][:64], progress=False)
    return pruner.prune(SIZES)


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: dict[str, Dataset],
    options: argparse.Namespace,
    seed: int,
    parallel: ParallelCorrection | None = None,
) -> dict[str, Any]:
    """The student's held-out losses along the way, by steps; student and teacher are copies."""
    every = max(options.student_steps // 3, 1)
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(folder, options, seed, 2e-3, options.student_steps)
        config = DistillationConfig(**settings, eval_strategy="steps", eval_steps=every)
        trainer = DistillationTrainer(
            copy.deepcopy(student),
            copy.deepcopy(teacher),
            config,
            rows["train"],
            rows["held_out"],
            teacher_correction=parallel,
        )
        start, first = time.process_time(), trainer.evaluate()
        trainer.train()
        seconds = time.process_time() - start
    history = {entry["step"]: entry for entry in trainer.state.log_history if "eval_lm_loss" in entry}
    steps, losses = [0, *history], [first["eval_lm_loss"], *(entry["eval_lm_loss"] for entry in history.values())]
    taught = [entry["eval_teacher_lm_loss"] for entry in (first, *history.values())]
    losses, taught = ([round(value, 4) for value in values] for values in (losses, taught))
    return {"steps": steps, "losses": losses, "teacher_losses": taught, "cpu_seconds": seconds}


def trainer_settings(folder: str, options: argparse.Namespace, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """What every training here has in common."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": options.rows_per_step,
        "per_device_eval_batch_size": 16,
        "max_steps": steps,
        "learning_rate": rate,
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "seed": seed,
    }


def measure_memory(options: argparse.Namespace) -> int:
    """Bytes by which three training steps raise the peak of a fresh process; the teacher is there before."""
    options.seeds, options.steps, options.student_steps = [0], 3, 3
    options.eval_rows, options.train = 2, None
    rows, teacher = load_rows(options, 0), load_teacher()
    with tempfile.TemporaryDirectory() as folder:
        config = TeacherCorrectionConfig(**trainer_settings(folder, options, 0, 1e-4, 3), method=options.cost)
        model = choose_trained(teacher, options.cost, LoraArguments(), 0)
        return peak_growth(CorrectionTrainer(model, config, rows["train"]).train)


def report(facts: dict[str, Any]) -> str:
    """Teachers and students as tables: means, and standard errors where there are several seeds."""
    seeds = facts["seeds"]
    first = next(iter(seeds[0]["teachers"].values()))
    rows = [("original", "", *(f"{first['before'][name]:.3f}" for name in ("held_out", "general")), "", "")]
    for method, facts_of in seeds[0]["teachers"].items():
        after = [
            spread([seed["teachers"][method]["after"][name] for seed in seeds]) for name in ("held_out", "general")
        ]
        seconds = fmean(seed["teachers"][method]["cpu_seconds"] for seed in seeds)
        rate = f"{method}, {seeds[0]['rates'][method]:g}"
        memory = f"{facts['peak_bytes'][method] / 2**20:.0f} MiB"
        rows.append((rate, f"{facts_of['num_trained']:,}", *after, f"{seconds:.0f}", memory))
    header = ("teacher, learning rate", "trained", "new text", "Python", "cpu seconds", "memory")
    tables = [markdown_table(header, rows)]
    original = [seed["students"]["original"]["losses"][-1] for seed in seeds]
    rows = []
    for name in seeds[0]["students"]:
        losses = [seed["students"][name]["losses"][-1] for seed in seeds]
        gains = [100 * (loss / other - 1) for loss, other in zip(losses, original, strict=True)]
        taught = [seed["students"][name]["teacher_losses"][-1] for seed in seeds]
        seconds = fmean(seed["students"][name]["cpu_seconds"] for seed in seeds)
        rows.append((name, spread(losses), f"{spread(gains, 1)} %", spread(taught), f"{seconds:.0f}"))
    tables.append(markdown_table(("student of", "new text", "change", "its teacher at the end", "cpu seconds"), rows))
    return "\n\n".join(tables)


def spread(values: list[float], digits: int = 3) -> str:
    """``3.142 ± 0.010``: mean and standard error; the mean alone of a single one."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.{digits}f}"


def plot(facts: dict[str, Any], path: Path) -> None:
    """The students' losses over training tokens, means over seeds."""
    tokens = facts["settings"]["rows_per_step"] * (facts["settings"]["row_length"] - 1)
    curves = {}
    for name, found in facts["seeds"][0]["students"].items():
        each = [seed["students"][name]["losses"] for seed in facts["seeds"]]
        means = map(fmean, zip(*each, strict=True))
        curves[name] = [(tokens * step, loss) for step, loss in zip(found["steps"], means, strict=True) if step]
    plot_losses(path, curves, {}, "student's held-out loss (nats per token)")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
