"""The stage ``rpo`` as the command line and recipes run it: rounds of preference optimization, each from the last."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import extract_prompt, is_conversational

from hf_minitron.adapters import LoraArguments, adapter_config
from hf_minitron.align.arguments import RPOArguments
from hf_minitron.align.conversations import Records, load_held_out_records, load_train_records
from hf_minitron.align.divergence import mean_token_kl, whole_models
from hf_minitron.align.pairs import name_rewards
from hf_minitron.align.rewards import label_rewards
from hf_minitron.align.rpo import RPOConfig, RPOTrainer
from hf_minitron.align.samples import Sampling, sample_pairs
from hf_minitron.align.scorers import RewardEndpoint, RewardModel, Scorer
from hf_minitron.align.stage import TOLD_ELSEWHERE, train_and_measure
from hf_minitron.align.templates import check_chat_template
from hf_minitron.checkpoint import Checkpoint, check_output_dir, load_weights
from hf_minitron.data import check_row_length
from hf_minitron.lineage import LINEAGE_FILE, Stage, read_lineage
from hf_minitron.training import (
    SCHEDULE,
    empty_folder,
    last_whole_checkpoint,
    lora_settings,
    save_trained,
    told_settings,
    wants_last,
)

logger = logging.getLogger(__name__)

LOG_FILE = "rpo_log.json"
_ALWAYS_TOLD = ("distance", "beta", "eta", "chosen_sft_weight", *SCHEDULE)
_TOLD_ELSEWHERE = (*TOLD_ELSEWHERE, "rounds", "eval_on_start", "reward_model", "reward_endpoint")
_NOT_THE_MODEL = ("checkpoint-*", "samples-*.jsonl", "rewards.jsonl")  # what a round needs only to go on


@dataclass(frozen=True)
class RPOReport:
    """What the rounds gave: their records in the lineage, oldest first."""

    output_dir: Path
    rounds: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self) | {"output_dir": str(self.output_dir)}


def align_checkpoint(arguments: RPOArguments, config: RPOConfig, lora: LoraArguments | None = None) -> RPOReport:
    """Trains a model on preferences in rounds, each with the result of the one before as its start and reference.

    Rounds lie in ``round-1``, ``round-2``, ... of ``output_dir``, as whole checkpoints with lineage; the last one's
    result is moved up to ``output_dir`` itself. Pairs and rewards are those of the data; or rewards come from a model,
    an endpoint or constants; or the pairs too are made anew in each round, from responses that its model samples. A
    run that was stopped goes on with ``resume_from_checkpoint="true"``: finished rounds are kept, as are responses,
    rewards and ``checkpoint-*`` folders of the one that was stopped. Models train with fp32 weights and are written in
    the dtype of the first.
    """
    lora = lora or LoraArguments()
    output_dir = Path(config.output_dir)
    scorer = _find_scorer(arguments)
    source = _open(arguments.model, arguments.model_revision, config)
    config.max_length = check_row_length(source.config, config.max_length, "max_length")
    train, held_out = load_train_records(arguments, config.seed), load_held_out_records(arguments)
    check_data(arguments, config, source, train, held_out)
    _prepare_folder(output_dir, config.resume_from_checkpoint, arguments.overwrite)
    rewards_dir = output_dir / "rewards"
    if arguments.num_samples is None:
        train = _labelled(train, arguments, scorer, rewards_dir)
    held_out = held_out and _labelled(held_out, arguments, scorer, rewards_dir)
    for number in range(1, arguments.rounds + 1):
        folder = output_dir / f"round-{number}"
        if not (folder / LINEAGE_FILE).is_file():
            _Round(number, folder, arguments, config, lora, scorer).run(source, train, held_out)
        if number < arguments.rounds:  # the last round's folder is emptied by whichever process comes first
            source = _open(str(folder), None, config)
    _move_up(folder, output_dir)
    return RPOReport(output_dir, read_lineage(output_dir)[-arguments.rounds :])


def check_data(
    arguments: RPOArguments, config: RPOConfig, source: Checkpoint, train: Records, held_out: Records | None
) -> None:
    """Raises ValueError for columns that are not there and conversations that cannot be written."""
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    rewards = (config.chosen_reward_column, config.rejected_reward_column)
    for name, records in (("dataset", train), ("eval_dataset", held_out)):
        if records is None:
            continue
        only_prompts = arguments.num_samples is not None and name == "dataset" and "prompt" in records.rows.column_names
        if missing := [] if only_prompts else sorted({"chosen", "rejected"} - set(records.rows.column_names)):
            raise ValueError(
                f"{name} has the columns {', '.join(records.rows.column_names)}, without {' and '.join(missing)}. Name "
                "them so, or sample responses to its prompts by --num-samples and a reward model."
            )
        if not arguments.judged:
            name_rewards(records.rows, rewards, name)
        check_chat_template(tokenizer, None, is_conversational(records.rows[0]))


@dataclass(frozen=True)
class _Round:
    """One round: pairs, training, and what it is recorded as."""

    number: int
    folder: Path
    arguments: RPOArguments
    config: RPOConfig
    lora: LoraArguments
    scorer: Scorer | None

    def run(self, source: Checkpoint, train: Records, held_out: Records | None) -> None:
        """Trains from `source` and leaves a checkpoint in the round's folder."""
        settings = told_settings(self.arguments, self.config, RPOConfig, _ALWAYS_TOLD, _TOLD_ELSEWHERE)
        stage = Stage("rpo", settings={"round": self.number} | settings | lora_settings(self.lora))
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = train.rows if self.arguments.num_samples is None else self._sample(source, train.rows)
        config = copy.copy(self.config)  # another made anew would set up the process's devices anew
        config.output_dir, config.eval_on_start = str(self.folder), held_out is not None
        logger.info("Round %d of %d.", self.number, self.arguments.rounds)
        # accelerate takes the settings of an engine once, and every round has a Trainer of its own.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        if isinstance(self.scorer, RewardModel):
            self.scorer.unload()
        trainer = self._make_trainer(source, config, rows, held_out)
        report = train_and_measure(trainer, self.folder, last_whole_checkpoint(self.folder))
        stage.inputs = {"source": source.described, "reference": source.source}
        if isinstance(self.scorer, RewardModel):
            stage.inputs["reward_model"] = self.scorer.checkpoint.source
        stage.data = {"max_length": config.max_length, "train": train.facts | {"num_pairs": len(trainer.train_dataset)}}
        stage.data |= {"held_out": held_out.facts} if held_out else {}
        report.record(stage)
        pairs = trainer.eval_dataset

        def measure(folder: Path) -> dict[str, Any]:
            count = min(self.arguments.kl_rows, len(pairs)) if held_out else 0
            if not count:
                return {}
            kl = measure_kl(folder, source, pairs.select(range(count)), config)
            trainer.state.log_history.append({"step": trainer.state.global_step, "eval_kl_to_reference": kl})
            return {"after": stage.metrics["after"] | {"kl_to_reference": kl}}

        save_trained(trainer, source, self.folder, stage, LOG_FILE, measure=measure)

    def _sample(self, source: Checkpoint, rows: Dataset) -> Dataset:
        rows = rows if "prompt" in rows.column_names else [extract_prompt(row) for row in rows]
        a = self.arguments
        how = Sampling(a.num_samples, a.max_new_tokens, a.sampling_temperature, a.sampling_top_p, a.sampling_batch_size,
                       self.config.seed)  # fmt: skip
        with whole_models():
            return sample_pairs(
                source, [row["prompt"] for row in rows], self.scorer, how, self.folder, a.reward_batch_size
            )

    def _make_trainer(
        self, source: Checkpoint, config: RPOConfig, rows: Dataset, held_out: Records | None
    ) -> RPOTrainer:
        model = load_weights(source, torch.float32, trust_remote_code=config.trust_remote_code)
        if self.arguments.judged:  # then what the options say of the data's columns is about others
            config.chosen_reward_column, config.rejected_reward_column = "chosen_reward", "rejected_reward"
        # TRL takes the model without adapters as reference when it adds them itself.
        adapters = None if self.lora.lora_r is None else adapter_config(model, self.lora)
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        return RPOTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            eval_dataset=held_out.rows if held_out else None,
            processing_class=tokenizer,
            peft_config=adapters,
        )


def measure_kl(folder: Path, reference: Checkpoint, pairs: Dataset, config: RPOConfig) -> float:
    """`mean_token_kl` of a checkpoint to its reference on both responses of tokenized pairs, as TRL cuts them."""
    device = PartialState().device
    # On CPUs exact, elsewhere as stored: rounding to bf16 is seen in a divergence of a few thousandths.
    how = {
        "dtype": torch.float32 if device.type == "cpu" else "auto",
        "use_safetensors": True,
        "trust_remote_code": config.trust_remote_code,
    }
    with whole_models():
        models = [AutoModelForCausalLM.from_pretrained(where, **how).to(device).eval()
                  for where in (folder, reference.folder)]  # fmt: skip

    def responses() -> Iterator[tuple[list[int], list[int]]]:
        for row in pairs:
            for side in ("chosen_ids", "rejected_ids"):
                yield row["prompt_ids"], row[side][: config.max_length - len(row["prompt_ids"])]

    return mean_token_kl(*models, responses())


def _find_scorer(arguments: RPOArguments) -> Scorer | None:
    if arguments.reward_model is not None:
        return RewardModel(arguments.reward_model)
    if arguments.reward_endpoint is not None:
        where = (arguments.reward_endpoint, arguments.reward_endpoint_model)
        return RewardEndpoint(*where, attribute=arguments.reward_attribute)
    return None


def _labelled(records: Records, arguments: RPOArguments, scorer: Scorer | None, cache_dir: Path) -> Records:
    """Rewards by the judge that was named; those of the data where none is."""
    if not arguments.judged:
        return records
    with whole_models(), PartialState().main_process_first():  # the other processes find the rewards on disk
        rows = label_rewards(records.rows, scorer, batch_size=arguments.reward_batch_size, cache_dir=cache_dir)
    return dataclasses.replace(records, rows=rows)


def _open(model: str, revision: str | None, config: RPOConfig) -> Checkpoint:
    return Checkpoint.open(model, revision=revision, trust_remote_code=config.trust_remote_code)


def _prepare_folder(output_dir: Path, resume: str | None, overwrite: bool) -> None:
    begun = any(output_dir.glob("round-*")) or (output_dir / "rewards").is_dir()
    if resume is not None:
        if not wants_last(resume):
            raise ValueError(f"resume_from_checkpoint={resume}: rounds go on where they stopped. Use true.")
        if (output_dir / LINEAGE_FILE).is_file():
            raise FileExistsError(f"output_dir={output_dir} is finished: there is nothing to go on with.")
        if not begun:
            raise FileNotFoundError(
                f"resume_from_checkpoint={resume}: {output_dir} has no round that was begun. "
                "Leave the option out to start."
            )
        return
    if begun and not overwrite and not (output_dir / LINEAGE_FILE).is_file():
        raise FileExistsError(
            f"output_dir={output_dir} holds rounds of an earlier run. Add --resume-from-checkpoint true to go on with "
            "them, or --overwrite to start again."
        )
    check_output_dir(output_dir, overwrite)
    empty_folder(output_dir)


def _move_up(folder: Path, output_dir: Path) -> None:
    """Makes the last round's checkpoint that of the whole; its lineage goes last. What it was made from stays."""
    if PartialState().is_main_process:
        kept = {path for pattern in _NOT_THE_MODEL for path in folder.glob(pattern)}
        for path in sorted({*folder.iterdir()} - kept, key=lambda path: path.name == LINEAGE_FILE):
            os.replace(path, output_dir / path.name)
    PartialState().wait_for_everyone()
