"""Training on a `RowStream`: every process reads its own rows, and a resumed run goes on at the exact row.

The Trainer would find its place in a stream by reading all that came before, and accelerate would read everything in
one process, or in each. Here every worker of every process is a reader of its own. Each batch brings along where its
reader then stood, so that batches which were read ahead but not trained on are not lost; checkpoints hold these places.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec.asyn
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_minitron.row_stream import RowStream

STREAM_STATE = "stream_state.json"  # in checkpoint-*


class StreamTrainer(Trainer):
    """A Trainer that also takes a `RowStream` as its ``train_dataset``; with any other it is the Trainer.

    ``max_steps`` must be given. A stream that ends before stops the training in all processes when the first of them
    cannot fill another step. To be resumed, a run needs the same stream, number of processes and
    ``dataloader_num_workers``; the batch size may change.
    """

    _stream_loader: StreamLoader | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; it need not skip batches, as the stream finds its place itself."""
        if not isinstance(self.train_dataset, RowStream):
            return super().train(*args, **kwargs)
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.args.accelerator_config, name):
                raise ValueError(
                    f"accelerator_config's {name} has one process read for several, and of a stream every process "
                    "reads its own rows. Leave it out."
                )
        self.add_callback(_StepsAsEpoch())
        skips, self.args.ignore_data_skip = self.args.ignore_data_skip, True
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.ignore_data_skip = skips
            self.remove_callback(_StepsAsEpoch)

    def get_train_dataloader(self) -> Any:
        """The stream's own loader, or the Trainer's."""
        if not isinstance(self.train_dataset, RowStream):
            return super().get_train_dataloader()
        args = self.args
        self._stream_loader = StreamLoader(
            self.train_dataset,
            self.data_collator,
            self._train_batch_size,
            args.process_index,
            args.world_size,
            max(1, args.dataloader_num_workers),
            {
                "num_workers": args.dataloader_num_workers,
                "pin_memory": args.dataloader_pin_memory and torch.cuda.is_available(),
                "prefetch_factor": args.dataloader_prefetch_factor,
                "multiprocessing_context": args.dataloader_multiprocessing_context,
            },
        )
        return self._stream_loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's. Raises ValueError for a stream without end."""
        stream = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(stream, RowStream) and stream.epochs is None:
            raise ValueError("eval_dataset is a stream without end. Open it with epochs=1, or use data.pack_rows.")
        return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step, or none, in all processes, once the stream has ended in one of them."""
        if not isinstance(self.train_dataset, RowStream):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        loader, batches = self._stream_loader, []
        before = loader.states.copy(), loader.next_worker
        if self.state.global_step < self.state.max_steps:  # a finished run may be resumed
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        whole = torch.tensor([len(batches) == num_batches], device=device)
        if self.train_dataset.epochs is not None:  # otherwise it ends nowhere
            whole = self.accelerator.gather(whole)
        if not bool(whole.all()):
            batches, self.control.should_training_stop = [], True
            loader.states, loader.next_worker = before
        return super().get_batch_samples(iter(batches), len(batches), device)

    def describe_stream(self) -> dict[str, Any] | None:
        """For the lineage: sources, weights and what training has read so far. Every process must call it."""
        if not isinstance(self.train_dataset, RowStream):
            return None
        return self.train_dataset.describe(self._stream_states())

    def _stream_states(self) -> list[dict[str, Any] | None]:
        """The states of all readers, in their order."""
        return gather_object(self._stream_loader.states) if self._stream_loader is not None else []

    # The places of the stream are a random state of sorts: saved and restored with the others, in every process.

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, RowStream):
            saved = {"stream": self.train_dataset.identity, "readers": self._stream_states()}
            saved["next_workers"] = gather_object([self._stream_loader.next_worker])  # of each process
            if self.args.should_save:
                Path(output_dir, STREAM_STATE).write_text(json.dumps(saved), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and isinstance(self.train_dataset, RowStream):
            self._stream_loader.load(checkpoint)


class StreamLoader:
    """Batches of one process's readers, in turns: batch n is of worker n modulo their number, as long as all have rows.

    ``states`` are the readers' as of the batches that were given out. A last batch that is not full is left out.
    """

    def __init__(
        self,
        stream: RowStream,
        collate: Callable[[Sequence[Any]], dict[str, Tensor]],
        batch_size: int,
        process_index: int,
        num_processes: int,
        num_readers: int,
        options: dict[str, Any],
    ) -> None:
        self.dataset, self.collate, self.batch_size, self.options = stream, collate, batch_size, options
        self.process_index, self.num_processes, self.num_readers = process_index, num_processes, num_readers
        self.states: list[dict[str, Any] | None] = [None] * num_readers
        self.next_worker = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Goes on from `states`."""
        first = self.process_index * self.num_readers
        readers = _Readers(
            self.dataset, self.collate, self.batch_size, first, self.num_readers * self.num_processes,
            list(self.states), self.next_worker,
        )  # fmt: skip
        generator = torch.Generator()  # or the loader would draw from the one that dropout uses
        for batch, worker, state in DataLoader(
            readers, batch_size=None, collate_fn=_as_it_is, generator=generator, **self.options
        ):
            self.states[worker] = json.loads(state)
            self.next_worker = (worker + 1) % self.num_readers
            yield batch

    def load(self, checkpoint: str) -> None:
        """Goes to where a checkpoint was written. Raises ValueError if that was another stream, or read otherwise."""
        file = Path(checkpoint, STREAM_STATE)
        if not file.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no {STREAM_STATE}: it was not written by a run on a stream. Resume it with the data "
                "that it was trained on, or start a new run."
            )
        saved = json.loads(file.read_text(encoding="utf-8"))
        _check_same("stream", saved["stream"], json.loads(json.dumps(self.dataset.identity)), checkpoint)
        now = {"processes": self.num_processes, "workers in each": self.num_readers}
        number = len(saved["next_workers"])
        then = {"processes": number, "workers in each": len(saved["readers"]) // number}
        _check_same("readers", then, now, checkpoint)
        first = self.process_index * self.num_readers
        self.states = saved["readers"][first : first + self.num_readers]
        self.next_worker = saved["next_workers"][self.process_index]


class _Readers(IterableDataset):
    """What a worker of a process gives: batches, the worker's number and the state of its reader, as JSON."""

    def __init__(
        self,
        stream: RowStream,
        collate: Callable[[Sequence[Any]], dict[str, Tensor]],
        batch_size: int,
        first: int,
        count: int,
        states: list[dict[str, Any] | None],
        next_worker: int,
    ) -> None:
        self.stream, self.collate, self.batch_size = stream, collate, batch_size
        self.first, self.count, self.states, self.next_worker = first, count, states, next_worker

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], int, str]]:
        info = get_worker_info()
        number = 0
        if info is not None:  # the first batch comes from worker 0: it must be the one whose turn it is
            number = (info.id + self.next_worker) % info.num_workers
            fsspec.asyn.reset_lock()  # a forked process would wait for its parent's
        reader = self.stream.read(self.first + number, self.count, self.states[number])
        rows: list[Any] = []
        for row in reader:
            rows.append(row)
            if len(rows) == self.batch_size:
                yield self.collate(rows), number, json.dumps(reader.state_dict())
                rows = []


class _StepsAsEpoch(TrainerCallback):
    """The share of `max_steps` that is done as the epoch, also after resuming; the Trainer would begin at 0 again."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_same(what: str, saved: Any, now: Any, checkpoint: str) -> None:
    """Raises ValueError naming the first difference."""
    if saved == now:
        return
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in [*saved, *now]:
            _check_same(f"{what} {name}", saved.get(name), now.get(name), checkpoint)
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for number, (one, other) in enumerate(zip(saved, now, strict=True), start=1):
            _check_same(f"{what} {number}", one, other, checkpoint)
    remedy = f" (in a --dataset-mix file: 'revision: {saved}')" if what.endswith(" commit") else ""
    raise ValueError(
        f"{os.path.basename(checkpoint)} was written with {what} {saved}, now it is {now}: rows would be repeated or "
        f"left out. Go back to that{remedy}, or start a new run."
    )
