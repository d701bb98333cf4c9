"""Which stream a distillation reads, if its options ask for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from hf_minitron.data import SHUFFLE_BUFFER
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.mixes import MixSource, check_stream_options, open_mix, read_mix
from hf_minitron.row_stream import RowStream

if TYPE_CHECKING:
    from hf_minitron.distill.inputs import DistillArguments

# Told in the lineage by the stream's own facts.
STREAM_OPTIONS = ("dataset_mix", "streaming", "shuffle_buffer", "dataset_epochs", "stopping")


def stream_sources(arguments: DistillArguments, config: DistillationConfig) -> list[MixSource] | None:
    """The sources of a stream, checked but not opened; None if rows are to be packed before training."""
    if (arguments.dataset is None) == (arguments.dataset_mix is None):
        raise ValueError(
            f"dataset={arguments.dataset}, dataset_mix={arguments.dataset_mix}: training reads one of the two. Give "
            "--dataset for one source, or --dataset-mix for a file that lists several."
        )
    if arguments.dataset_mix is None and not arguments.streaming:
        given = (arguments.shuffle_buffer, arguments.dataset_epochs, arguments.stopping)
        if given != (None, None, "first"):
            raise ValueError(
                "shuffle_buffer={}, dataset_epochs={}, stopping={} are for streams. Add --streaming, or leave them "
                "out: num_train_epochs repeats rows that are packed before training.".format(*given)
            )
        return None
    check_stream_options(arguments.shuffle_buffer or 0, arguments.dataset_epochs, arguments.stopping)
    if config.max_steps <= 0:
        raise ValueError(
            f"max_steps={config.max_steps}: a stream has no length, by which the learning rate could be scheduled. "
            "Give --max-steps."
        )
    if arguments.max_train_rows is not None:
        raise ValueError(
            f"max_train_rows={arguments.max_train_rows} with a stream: it gives as many rows as training takes. Set "
            "--max-steps instead."
        )
    sources = _mix(arguments) if arguments.dataset_mix is not None else [_only_source(arguments)]
    for source in sources:
        held_out = (arguments.eval_dataset, arguments.eval_split or "train")
        if arguments.dataset_mix is not None and (source.name, source.split) == held_out:
            raise ValueError(
                f"eval_dataset={source.name}, split {source.split}, is in {arguments.dataset_mix} too: held-out text "
                "must not be trained on. Give another --eval-dataset or --eval-split."
            )
    return sources


def open_stream(
    sources: list[MixSource],
    arguments: DistillArguments,
    config: DistillationConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> RowStream:
    """The rows of the sources, as the options want them."""
    return open_mix(
        sources,
        tokenizer,
        max_length,
        seed=data_seed(config),
        shuffle_buffer=SHUFFLE_BUFFER if arguments.shuffle_buffer is None else arguments.shuffle_buffer,
        epochs=arguments.dataset_epochs,
        stopping=arguments.stopping,
    )


def data_seed(config: DistillationConfig) -> int:
    """The seed that orders the training text."""
    return config.seed if config.data_seed is None else config.data_seed


def _mix(arguments: DistillArguments) -> list[MixSource]:
    for name, default in (("dataset_config", None), ("dataset_split", "train")):
        if getattr(arguments, name) != default:
            raise ValueError(
                f"{name}={getattr(arguments, name)} is for --dataset: say it in {arguments.dataset_mix}, for each "
                "source (docs/data.md)."
            )
    if arguments.text_column is not None and arguments.eval_dataset is None:
        raise ValueError(
            f"text_column={arguments.text_column} is for --dataset and --eval-dataset: say it in "
            f"{arguments.dataset_mix}, for each source (docs/data.md)."
        )
    return read_mix(arguments.dataset_mix)


def _only_source(arguments: DistillArguments) -> MixSource:
    how = (arguments.dataset_config, arguments.dataset_split, arguments.text_column)
    return MixSource(arguments.dataset, 1.0, *how)
