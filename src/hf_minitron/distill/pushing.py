"""Publishing what a Trainer trained: once, when it is done, as one verified commit with its card and lineage."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from hf_minitron.data import describe_source
from hf_minitron.distill.stream_training import StreamTrainer
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.lineage import Stage, read_lineage, settings_dict, write_lineage
from hf_minitron.publish.contents import is_weight_file
from hf_minitron.publish.hub import PushResult, check_may_write, push_checkpoint
from hf_minitron.whole_weights import save_whole

LOG_FILE = "distill_log.json"
_TOLD = ("divergence", "temperature", "ce_weight", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps")
_TOLD += ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
logger = logging.getLogger(__name__)


class PushingTrainer(StreamTrainer):
    """A Trainer whose `push_to_hub` is `push_checkpoint`.

    With `push_to_hub=True` the right to write is checked before training, and nothing is sent while it runs: neither
    unfinished weights nor `checkpoint-*` folders. `hub_model_id`, `hub_private_repo` (private unless False),
    `hub_revision` and `hub_token` are the Trainer's own settings.
    """

    num_tokens_seen: int
    teacher_model: Any
    _stage: Stage | None = None  # since training began

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Settles the repository's name; it is made when there is something to push."""
        self.hub_model_id = hub_name(self.args)
        self.push_in_progress = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, after a look at whether its result may be pushed."""
        if self.args.push_to_hub and self.is_world_process_zero():
            check_may_write(hub_name(self.args), self.args.hub_token)
        self._stage = Stage("distill")
        return super().train(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> PushResult | None:
        """Writes weights, tokenizer and lineage into `output_dir` and pushes it; every process must call this.

        ``kwargs`` go to `push_checkpoint`. Returns its result in the first process, None in the others. It always
        waits (``blocking``), as what was pushed is verified.
        """
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero():
            for path in [path for path in folder.glob("*") if is_weight_file(path.name)]:
                path.unlink()  # of an earlier save, perhaps under other names
        self.accelerator.wait_for_everyone()
        save_whole(self, str(folder))
        data = self.describe_stream() or describe_source(self.train_dataset)  # which every process must ask for
        result = None
        if self.is_world_process_zero():
            self._write_lineage(folder, data)
            how = {"commit_message": commit_message, "token": token, "revision": revision, "private": private}
            result = push_output(self.args, **{key: value for key, value in how.items() if value is not None}, **kwargs)
        self.accelerator.wait_for_everyone()
        return result

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints stay on this machine."""

    def _write_lineage(self, folder: Path, data: dict[str, Any]) -> None:
        """What this object knows of how the student was made."""
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        (folder / LOG_FILE).write_text(json.dumps(self.state.log_history, indent=1) + "\n", encoding="utf-8")
        settings = settings_dict(self.args)
        stage = self._stage or Stage("distill")
        stage.settings = {name: settings[name] for name in _TOLD if name in settings}
        stage.inputs = {"student": _describe(self.model), "teacher": _describe(self.teacher_model)}
        stage.data = {"train": data}
        stage.tokens, stage.files = self.num_tokens_seen, {LOG_FILE: "training log"}
        told = stage.as_dict() | {"seconds": _seconds(self.state.log_history)}
        source = Path(self.model.config.name_or_path or folder)
        earlier = read_lineage(source) if source.is_dir() and source.resolve() != folder.resolve() else []
        write_lineage(folder, [*earlier, {key: value for key, value in told.items() if value is not None}])


def push_output(args: TrainingArguments, **options: Any) -> PushResult:
    """Pushes a finished `output_dir` as the Trainer's settings say; ``options`` of `push_checkpoint` win."""
    chosen = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo is not False}
    result = push_checkpoint(args.output_dir, hub_name(args), **(chosen | options))
    logger.info("pushed to %s", result.pull_request or result.url)
    return result


def hub_name(args: TrainingArguments) -> str:
    """The repository: `hub_model_id`, or the name of `output_dir` under the token's account."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def _describe(model: PreTrainedModel | CachedTeacher) -> dict[str, Any]:
    """A model as far as the object knows where it came from: Hub id and commit, or its folder's name."""
    if isinstance(model, CachedTeacher):
        return model.source
    name, commit = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:
        return {}
    if Path(name).is_dir() or Path(name).is_absolute():
        return {"path": Path(name).name}
    return {"id": name} | ({"commit": commit} if commit else {})


def _seconds(log_history: list[dict[str, Any]]) -> float | None:
    return next((entry["train_runtime"] for entry in reversed(log_history) if "train_runtime" in entry), None)
