"""``PrunerForCausalLM``: a checkpoint in, scores, a plan and a smaller ordinary checkpoint out."""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_minitron.architectures import get_family, get_head_dim
from hf_minitron.checkpoint import (
    PLAN_FILE,
    Checkpoint,
    ModelTensors,
    TensorSource,
    atomic_folder,
    check_finite,
    check_output_dir,
    copy_companions,
    read_config,
    write_tensors,
)
from hf_minitron.data import describe_source, fingerprint_rows
from hf_minitron.hardware import fast_dtype, parse_dtype
from hf_minitron.lineage import Stage, append_stage
from hf_minitron.prune.calibration import check_rows, is_text_source, load_calibration
from hf_minitron.prune.depth import check_num_dropped, check_scan_metric
from hf_minitron.prune.importance import (
    check_aggregation,
    check_axes,
    check_batch_size,
    check_neuron_signal,
    score_model,
)
from hf_minitron.prune.multiple_choice import load_questions
from hf_minitron.prune.plan import SIZE_OF, PrunePlan, make_plan, plan_depth
from hf_minitron.prune.refit import Refitted, refit
from hf_minitron.prune.scan import scan_questions, scan_rows
from hf_minitron.prune.scores import AXES, ImportanceScores
from hf_minitron.prune.target import PruneConfig, count_parameters, source_sizes, target_config, target_sizes
from hf_minitron.prune.trim import Trimmer
from hf_minitron.publish.hub import PushResult, push_checkpoint

MAX_QUESTION_LENGTH = 4096  # tokens; of longer questions the beginning is cut off
_WHICH_TEXT = ("config_name", "split", "text_column", "revision", "token")  # options of load_text that pick the text
logger = logging.getLogger(__name__)


class PrunerForCausalLM:
    """Prunes a model of a supported family by width and depth, the Minitron way (P1 2407.14679, P2 2408.11796).

    Opening reads headers only. The model itself is loaded when it is scored; trimming reads one tensor at a time::

        pruner = PrunerForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B")
        pruner.score("wikitext-103.jsonl")
        small = pruner.prune(PruneConfig(hidden_size=3072, intermediate_size=9216))
        pruner.save_pretrained("llama-3.1-4b-width")

    ``PrunerForCausalLM(model, tokenizer)`` takes a model that is already in memory.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        _check_prunable(model.config)
        self._set_up(model.config, None, ModelTensors(model))
        self._tokenizer, self._model = tokenizer, model

    def _set_up(self, config: PreTrainedConfig, dtype: torch.dtype | None, tensors: TensorSource) -> None:
        self.config, self.dtype, self._tensors = config, dtype, tensors
        self.scores: ImportanceScores | None = None
        self._plan: PrunePlan | None = None
        self._refitted: Refitted | None = None
        self._calibration: tuple[torch.Tensor, dict[str, Any]] | None = None  # the rows of the last score()
        self._tokenizer = self._model = self._checkpoint = None
        self._stage = Stage("prune")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> PrunerForCausalLM:
        """Opens a Hub model or a checkpoint folder; only safetensors are read.

        ``dtype`` is that of the pruned weights ("auto": as stored). ``device_map`` places the model for scoring, as in
        transformers. Raises before any long work for a family that is not supported and for files that are missing or
        damaged.
        """
        access = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        dtype = parse_dtype(dtype)
        _check_prunable(read_config(model, **access))  # before weights are fetched
        checkpoint = Checkpoint.open(model, **access)
        self = cls.__new__(cls)
        self._set_up(checkpoint.config, dtype, checkpoint)
        self._checkpoint = checkpoint
        self._loading = {"device_map": device_map, "trust_remote_code": trust_remote_code}
        return self

    @property
    def source(self) -> dict[str, Any]:
        """What is pruned, for the lineage: Hub id and commit, or name and content hash."""
        if self._checkpoint:
            return self._checkpoint.source
        name = self.config.name_or_path or "in memory"
        return {"path": Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; ValueError when it has none."""
        if self._tokenizer is None and self._checkpoint:
            self._tokenizer = AutoTokenizer.from_pretrained(self._checkpoint.folder)
        if self._tokenizer is None:
            raise ValueError(
                "the model came without a tokenizer, so text cannot be read. Give PrunerForCausalLM(model, tokenizer)."
            )
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The source model, loaded when first needed."""
        if self._model is None:
            self._model = self._load_model()
        return self._model

    def score(
        self,
        calibration: Any,
        *,
        axes: tuple[str, ...] = AXES,
        aggregation: tuple[str, str] = ("l2", "mean"),
        neuron_signal: str = "down_proj_input",
        batch_size: int = 8,
        progress: bool = True,
        **how_to_read: Any,
    ) -> ImportanceScores:
        """Scores the model in one forward pass and remembers the scores for ``plan``.

        ``calibration`` is text (a Hub data set id, files, or a data set with a text column; ``how_to_read`` goes to
        ``load_calibration``) or rows of token ids of equal length (a data set with ``input_ids``, a tensor, lists).
        """
        check_axes(axes)
        check_aggregation(aggregation)
        check_neuron_signal(neuron_signal)
        check_batch_size(batch_size)
        rows, described = self._read_rows(calibration, how_to_read)
        scores = score_model(
            self.model,
            rows,
            axes=axes,
            aggregation=aggregation,
            neuron_signal=neuron_signal,
            batch_size=batch_size,
            progress=progress,
        )
        self._calibration = torch.tensor(rows, dtype=torch.int32), described
        scores.info |= {"model": self.source, **described, "dtype": str(self.model.dtype).removeprefix("torch.")}
        self.scores = scores
        return scores

    def scan_layers(
        self,
        source: Any,
        *,
        num_dropped: int | Sequence[int],
        metric: str = "lm_loss",
        batch_size: int = 8,
        progress: bool = True,
        **how_to_read: Any,
    ) -> ImportanceScores:
        """Measures what is lost without each block of ``num_dropped`` contiguous layers (1: without each single layer).

        The result joins the scores, where ``plan`` finds it. For the metrics ``lm_loss`` and ``block_importance``
        ``source`` is calibration text or rows, as in ``score``; for ``accuracy`` it is a multiple-choice file or a task
        of the lm-evaluation-harness, and ``how_to_read`` goes to ``load_questions`` (its metric as ``task_metric``).
        """
        lengths = check_num_dropped(num_dropped, self.config.num_hidden_layers)
        check_scan_metric(metric)
        check_batch_size(batch_size)
        how_to_scan = {"num_dropped": lengths, "batch_size": batch_size, "progress": progress}
        if metric == "accuracy":
            longest = min(self.config.max_position_embeddings, MAX_QUESTION_LENGTH)
            how_to_read["metric"] = how_to_read.pop("task_metric", "acc")
            questions = load_questions(source, self.tokenizer, max_length=longest, **how_to_read)
            moments = scan_questions(self.model, questions.questions, **how_to_scan)
            described = {"task": questions.description}
        else:
            rows, described = self._read_rows(source, how_to_read)
            moments = scan_rows(self.model, rows, metric=metric, **how_to_scan)
            described |= {"num_samples": len(rows), "sequence_length": len(rows[0])}
        if self.scores is None:
            self.scores = ImportanceScores(("l2", "mean"), get_head_dim(self.config), info={"model": self.source})
        self.scores.moments |= moments
        self.scores.info["scans"] = self.scores.info.get("scans", {}) | dict.fromkeys(moments, described)
        return self.scores

    def _read_rows(self, calibration: Any, how_to_read: dict[str, Any]) -> tuple[list[list[int]], dict[str, Any]]:
        """Rows of token ids, and what the lineage says of them."""
        described = {}
        if is_text_source(calibration):
            which = {key: how_to_read[key] for key in _WHICH_TEXT if key in how_to_read}
            described = {"calibration": describe_source(calibration, **which) | {"seed": how_to_read.get("seed", 0)}}
            calibration = load_calibration(calibration, self.tokenizer, self.config, **how_to_read)
        rows = check_rows(calibration, self.config.vocab_size)
        return rows, {"fingerprint": fingerprint_rows(Dataset.from_dict({"input_ids": rows})), **described}

    def plan(self, config: PruneConfig) -> PrunePlan:
        """Which indices stay, by the scores of the last ``score`` (or those set as ``pruner.scores``).

        Sizes that the source or its config class cannot take are an error here, before anything is trimmed.
        """
        target_config(self.config, target_sizes(self.config, config))
        if config.iterations > 1:
            raise ValueError(f"iterations={config.iterations} scores between the steps: call plan_iteratively().")
        if self.scores is not None:
            _check_same_model(self.scores.info.get("model", {}), self.source)
        return make_plan(self.config, config, self.scores)

    def prune(
        self, config: PruneConfig | PrunePlan, calibration: Any = None, *, batch_size: int = 8, **how_to_read: Any
    ) -> PreTrainedModel:
        """The pruned model: an ordinary one of the source's class, in the source's dtype, on the CPU.

        ``method="refit"`` solves weights on ``calibration``, given as in ``score``; without it, on the rows of the last
        ``score``. Other methods do not look at it.
        """
        if isinstance(config, PruneConfig) and config.method == "refit":
            self.refit(config, calibration, batch_size=batch_size, **how_to_read)
            trimmer = self._refitted
        else:
            trimmer = self._trim_by(config)
        # Clones: training the result must not change a source that is in memory.
        state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in trimmer}
        model_class = AutoModelForCausalLM._model_mapping[type(trimmer.config)]
        dtype = state[trimmer.family.embedding].dtype
        model = model_class.from_pretrained(None, config=trimmer.config, state_dict=state, dtype=dtype)
        generation_config = self._generation_config()
        if generation_config is not None:
            model.generation_config = generation_config
        return model

    def refit(
        self,
        config: PruneConfig,
        calibration: Any = None,
        *,
        batch_size: int = 8,
        progress: bool = True,
        **how_to_read: Any,
    ) -> PrunePlan:
        """Solves the weights of the pruned model on calibration rows, for ``save_pretrained``; says what was kept.

        Layers are chosen by the scores, as in ``plan``, or by ``drop_layers``. The source is read one layer at a time.
        """
        target_config(self.config, target_sizes(self.config, config))
        check_batch_size(batch_size)
        rows, described = self._rows_to_refit(calibration, how_to_read)
        kept_layers = plan_depth(self.config, config, self.scores)
        self._refitted = refit(
            self._tensors,
            self.config,
            config,
            rows,
            kept_layers,
            sliced_plan=self._plan_of_slicing(config),
            batch_size=batch_size,
            dtype=self.dtype,
            progress=progress,
        )
        self._plan = self._refitted.plan
        self._plan.info.update(described)
        return self._plan

    def _rows_to_refit(self, calibration: Any, how_to_read: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if calibration is not None:
            return self._read_rows(calibration, how_to_read)
        if self._calibration is None:
            raise ValueError(
                "method='refit' solves weights on calibration rows: give prune(config, calibration), or call score() "
                "first."
            )
        return self._calibration[0].tolist(), self._calibration[1]

    def _plan_of_slicing(self, config: PruneConfig) -> PrunePlan | None:
        """What minitron would keep, as the fall-back, where the scores at hand tell."""
        sizes, source = target_sizes(self.config, config), source_sizes(self.config)
        needed = {axis for axis, key in SIZE_OF.items() if sizes[key] < source[key]}
        if self.scores is None or not needed <= set(self.scores.axes):
            return None
        return self.plan(dataclasses.replace(config, method="minitron"))

    def prune_in_memory(self, plan: PrunePlan) -> PrunerForCausalLM:
        """A pruner of the pruned model, which lies where this one's model was scored; for pruning in steps."""
        model = self.prune(plan).to(device=self.model.device, dtype=self.model.dtype)
        smaller = PrunerForCausalLM(model)
        smaller._tokenizer = self._tokenizer or (self.tokenizer if self._checkpoint else None)
        return smaller

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the checkpoint that the last ``prune`` or ``set_plan`` describes, tensor by tensor.

        Beside weights and config go tokenizer, generation config, ``prune_plan.json`` (the kept indices) and the
        lineage. The folder appears only when it is whole; one that is not empty is refused unless ``overwrite``.
        """
        if self._plan is None:
            raise ValueError(
                "nothing is planned yet: call prune(PruneConfig(...)) or set_plan(...) before save_pretrained()."
            )
        path = check_output_dir(folder, overwrite)
        trimmer = self._refitted or self._trim_by(self._plan)
        with atomic_folder(path, overwrite, num_bytes=sum(trimmer.sizes.values())) as temporary:
            write_tensors(temporary, trimmer.sizes, trimmer.trim)
            trimmer.config.save_pretrained(temporary)
            self._save_companions(temporary)
            self._plan.save(temporary / PLAN_FILE)
            source_dir = self._checkpoint.folder if self._checkpoint else None
            append_stage(self._describe_stage(trimmer), temporary, source_dir)
        return path

    def push_to_hub(
        self, repo_id: str, *, folder: str | Path | None = None, overwrite: bool = False, **options: Any
    ) -> PushResult:
        """Saves into ``folder`` and pushes it with its card; without one, by way of a folder that is removed again.

        ``options`` are those of ``publish.hub.push_checkpoint``: ``private`` (True), ``revision``, ``create_pr``, ...
        """
        if folder is not None:
            return push_checkpoint(self.save_pretrained(folder, overwrite=overwrite), repo_id, **options)
        with tempfile.TemporaryDirectory() as temporary:
            path = self.save_pretrained(Path(temporary) / repo_id.rpartition("/")[2])
            return push_checkpoint(path, repo_id, **options)

    @property
    def planned(self) -> PrunePlan | None:
        """What ``save_pretrained`` would write: the plan of the last ``prune``, ``refit`` or ``set_plan``."""
        return self._plan

    def set_plan(self, plan: PrunePlan) -> None:
        """Takes a plan, made here or loaded, as the one to save; it must have been made for a model of this shape."""
        if plan.source_sizes != source_sizes(self.config):
            raise ValueError(
                f"the plan was made for {plan.source_sizes}, this model has {source_sizes(self.config)}. Plan again."
            )
        self._plan, self._refitted = plan, None

    def _trim_by(self, config: PruneConfig | PrunePlan) -> Trimmer:
        self.set_plan(config if isinstance(config, PrunePlan) else self.plan(config))
        return Trimmer(self._tensors, self.config, self._plan, self.dtype)

    def _describe_stage(self, trimmer: Trimmer | Refitted) -> Stage:
        stage, info = self._stage, dict(self._plan.info)
        stage.inputs = {"source": self._checkpoint.described if self._checkpoint else self.source}
        stage.data = info.pop("calibration", None)
        stage.tokens = info.get("num_tokens")
        stage.settings = {"sizes": self._plan.sizes, "source_sizes": self._plan.source_sizes, **info}
        if len(self._plan.kept_layers) < self.config.num_hidden_layers:
            stage.settings["kept_layers"] = self._plan.kept_layers
        stage.metrics = {
            "source_parameters": count_parameters(self.config),
            "parameters": count_parameters(trimmer.config),
        }
        stage.files = {PLAN_FILE: "kept source indices by axis and layer"}
        return stage

    def _generation_config(self) -> GenerationConfig | None:
        if self._model is not None:
            return copy.deepcopy(self._model.generation_config)
        has_one = (self._checkpoint.folder / "generation_config.json").is_file()
        return GenerationConfig.from_pretrained(self._checkpoint.folder) if has_one else None

    def _save_companions(self, folder: Path) -> None:
        if self._checkpoint:
            copy_companions(self._checkpoint.folder, folder)
            return
        if self._model.generation_config is not None:
            self._model.generation_config.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def _load_model(self) -> PreTrainedModel:
        """The model for scoring: as stored, or in fp32 where the machine has no fast bf16 (said in the log)."""
        dtype = self.dtype or self.config.dtype or "auto"
        on_cpu = self._loading["device_map"] in (None, "cpu") and not torch.cuda.is_available()
        if dtype != torch.float32 and on_cpu and fast_dtype("cpu") == torch.float32:
            dtype = torch.float32
            logger.info("scoring in float32: this CPU has no fast bfloat16; the pruned weights keep their dtype")
        device_map = self._loading["device_map"] or ("auto" if torch.cuda.is_available() else None)
        model = AutoModelForCausalLM.from_pretrained(
            self._checkpoint.folder,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=self._loading["trust_remote_code"],
        )
        for name, parameter in model.named_parameters():
            if parameter.device.type != "meta":  # offloaded parts are checked when they are trimmed
                check_finite(name, parameter)
        return model


def _check_prunable(config: PreTrainedConfig) -> None:
    get_family(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "the model is quantized (config.json has a quantization_config): packed weights have no rows and columns "
            "to keep. Prune the unquantized model."
        )


def _check_same_model(scored: dict[str, Any], source: dict[str, Any]) -> None:
    """Refuses scores of another model, as far as both are known by commit or content."""
    for key in ("commit", "sha256"):
        if scored.get(key, source.get(key)) != source.get(key, scored.get(key)):
            raise ValueError(
                f"the scores are of {scored}, the model is {source}. Score this model, or give its own scores."
            )
