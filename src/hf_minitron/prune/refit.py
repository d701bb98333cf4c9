"""Refit: a smaller model whose weights are solved in closed form so that it reproduces the source's residual stream.

The source and the small model are walked layer by layer over calibration rows, with one layer of each in memory. The
method, its formulas and its costs are in docs/refit.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from hf_minitron.architectures import get_family, get_head_dim
from hf_minitron.checkpoint import TensorSource
from hf_minitron.prune.layerwise import LayerwiseModel, LoadedLayer
from hf_minitron.prune.plan import PrunePlan, keep_all
from hf_minitron.prune.refit_basis import Basis, identity_basis
from hf_minitron.prune.refit_ends import TokenMeans, embed_in, trimmed_norms
from hf_minitron.prune.refit_half import HalfRefit, KeptOfLayers, Walk
from hf_minitron.prune.refit_head import HeadRefit
from hf_minitron.prune.refit_judge import Refitted, judge, mean_loss, plan_by_energy
from hf_minitron.prune.refit_memory import stream_bytes
from hf_minitron.prune.refit_observe import StreamObserver
from hf_minitron.prune.refit_streams import StreamStore, split_rows
from hf_minitron.prune.target import PruneConfig, build_empty, source_sizes, target_config, target_sizes
from hf_minitron.prune.trim import Trimmer

TOKENS_PER_WIDTH = 20  # below that many calibration tokens per max(hidden, ffn) a refit is not to be trusted
logger = logging.getLogger(__name__)


@torch.no_grad()
def refit(
    source: TensorSource,
    config: PreTrainedConfig,
    prune: PruneConfig,
    rows: Sequence[Sequence[int]],
    kept_layers: Sequence[int],
    *,
    sliced_plan: PrunePlan | None = None,
    basis: Basis | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Refitted:
    """The model of ``config`` pruned to the sizes of ``prune`` and to ``kept_layers``, its weights refit on ``rows``.

    Every eighth row is held out: where a solution is worse there than slicing, slicing stays, and if the whole small
    model is worse than the plainly sliced one (by ``sliced_plan``, or by the activations' energies), that is returned.
    ``basis`` overrides the choice of directions. ``dtype`` is that of the result (None: as stored); all else is fp32,
    with float64 for moments and solves.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    walker = _Refitter(source, config, prune, rows, list(kept_layers), batch_size, dtype, torch.device(device))
    with tqdm(total=2 * config.num_hidden_layers, desc="refitting", unit="layer", disable=not progress) as bar:
        return walker.run(bar, basis, sliced_plan)


class _Refitter:
    def __init__(
        self,
        source: TensorSource,
        config: PreTrainedConfig,
        prune: PruneConfig,
        rows: Sequence[Sequence[int]],
        kept_layers: list[int],
        batch_size: int,
        dtype: torch.dtype | None,
        device: torch.device,
    ):
        self.config, self.prune, self.kept_layers, self.device = config, prune, kept_layers, device
        self.family, self.tied = get_family(config), bool(config.tie_word_embeddings)
        self._source = source
        self.sizes, self.source_sizes = target_sizes(config, prune), source_sizes(config)
        self.room = stream_bytes(prune.stats_memory, self.sizes, self.source_sizes, get_head_dim(config))
        whole = Trimmer(source, config, keep_all(config))
        self.dtype = dtype or whole.config.dtype
        self.big = LayerwiseModel(config, whole.trim, device)
        self.small_config = target_config(config, self.sizes, kept_layers)
        self.small_config.architectures, self.small_config.dtype = whole.config.architectures, self.dtype
        self.batches = split_rows(rows, batch_size)
        self.num_tokens = sum(batch.input_ids.numel() for batch in self.batches if not batch.held_out)
        self.tensors: dict[str, Tensor] = {}
        self.info: dict[str, Any] = {"method": "refit", "mode": prune.refit_mode, "ridge": prune.refit_ridge}
        self._check_tokens()

    def run(self, bar: tqdm, basis: Basis | None, sliced_plan: PrunePlan | None) -> Refitted:
        hidden = self.sizes["hidden_size"]
        observer = StreamObserver(self.big, self.batches, self.prune, hidden, self.room / 2)
        if basis is None and hidden == self.source_sizes["hidden_size"]:
            basis = identity_basis(hidden, self.device)
        basis = basis or observer.choose(bar)
        self.info |= observer.info | ({"basis": "rotated"} if basis.rotated else {})
        self.walk = self._start(basis)
        self._walk_layers(bar)
        self._fit_head()
        plan = self._plan()
        found = Refitted(self.small_config, plan, {n: self.tensors[n].to(self.dtype) for n in self._names()})
        if not self.walk.guards or not any(batch.held_out for batch in self.batches):
            return found
        sliced_plan = sliced_plan or plan_by_energy(self.walk.kept, self.kept_layers, observer.energies)
        sliced = Trimmer(self._source, self.config, sliced_plan, self.dtype)
        pairs = (
            (self.walk.load(self.walk.before, number), batch.input_ids)
            for number, batch in enumerate(self.batches)
            if batch.held_out
        )
        source_loss = mean_loss(self.big, pairs)
        return judge(found, sliced, sliced_plan, source_loss, self.batches, self.device, self.room / 4)

    def _check_tokens(self) -> None:
        width = max(self.config.hidden_size, self.config.intermediate_size)
        ratio = self.num_tokens / width
        self.info |= {"num_tokens": self.num_tokens, "tokens_per_width": round(ratio, 1)}
        logger.info("refit on %d tokens, %.1f per width of %d", self.num_tokens, ratio, width)
        if ratio < TOKENS_PER_WIDTH:
            logger.warning(
                "refit has %d calibration tokens for a width of %d: %.1f each, and fewer than %d may do more harm than "
                "good. Give at least %d tokens.",
                self.num_tokens,
                width,
                ratio,
                TOKENS_PER_WIDTH,
                TOKENS_PER_WIDTH * width,
            )

    def _start(self, basis: Basis) -> Walk:
        share = self.room / 4
        kept = KeptOfLayers(self.sizes, self.source_sizes, get_head_dim(self.config))
        kept.kept_hidden = basis.kept_channels or []
        before, after = StreamStore(share), StreamStore(share)
        walk = Walk(self.batches, basis, self.prune, kept, before, after, self.device, share)
        for number, batch in enumerate(self.batches):
            before[number] = self.big.embed(batch.input_ids)
        embedding = self.big.model.get_parameter(self.family.embedding)
        if self.kept_layers[0] > 0:
            embedding = embedding + self._pass_first_layers(before, walk.uses("embedding"))
        self._set_outer(walk, embedding)
        self.small = LayerwiseModel(self.small_config, self._read_small, self.device)
        embedded = [self.small.embed(batch.input_ids) for batch in self.batches]
        if self.prune.refit_mode == "sequential" or self.kept_layers[0] > 0:
            walk.student_states = StreamStore(share)
            for number, states in enumerate(embedded):
                walk.student_states[number] = states
        return walk

    def _pass_first_layers(self, states: StreamStore, absorb: bool) -> Tensor | float:
        """Brings ``states`` before the first kept layer; what the embedding's rows take over of the way there."""
        first = [states[number] for number in range(len(self.batches))]
        for index in range(self.kept_layers[0]):
            self._run_dropped(index, states)
        if self.tied or not absorb:
            return 0.0
        means = TokenMeans(self.config.vocab_size, self.config.hidden_size)
        for number, batch in enumerate(self.batches):
            if not batch.held_out:
                means.add(batch.input_ids, states[number] - first[number])
        return means.rows().to(self.device) / self._embedding_factor()

    def _embedding_factor(self) -> float:
        """What the model multiplies embeddings by, measured on the token with the largest entry."""
        embedding = self.big.model.get_parameter(self.family.embedding)
        token, channel = divmod(int(embedding.abs().argmax()), embedding.shape[1])
        states = self.big.embed(torch.tensor([[token]]))
        return float(states[0, 0, channel] / embedding[token, channel])

    def _run_dropped(self, index: int, states: StreamStore) -> None:
        with self.big.layer(index) as layer:
            for number in range(len(self.batches)):
                states[number] = layer.run(states[number].to(self.device))

    def _set_outer(self, walk: Walk, embedding: Tensor) -> None:
        family, model = self.family, self.big.model
        self.tensors[family.embedding] = embed_in(walk.basis, embedding, family.scales_embedding_by_width)
        norm = model.get_submodule(family.final_norm).named_parameters()
        for name, tensor in trimmed_norms(walk.basis, norm, family.gain_offset, reads=True).items():
            offset = family.gain_offset
            scaled = (tensor + offset) * walk.basis.norm_ratio - offset if self.tied else tensor
            self.tensors[f"{family.final_norm}.{name}"] = scaled
        if not self.tied:
            self.tensors[family.head] = self._sliced_head(walk.basis)

    def _sliced_head(self, basis: Basis) -> Tensor:
        head = self.big.model.get_parameter(self.family.head)
        if basis.is_identity:
            return head
        norm = self.big.model.get_submodule(self.family.final_norm)
        return (head * (norm.weight + self.family.gain_offset) if basis.rotated else head) @ basis.read

    def _read_small(self, name: str) -> Tensor:
        """A tensor of the small model; zeros for what is not solved yet."""
        return self.tensors[name] if name in self.tensors else torch.zeros(self._shapes[name])

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        if not hasattr(self, "_known_shapes"):
            self._known_shapes = {n: tuple(t.shape) for n, t in build_empty(self.small_config).state_dict().items()}
        return self._known_shapes

    def _names(self) -> list[str]:
        return [name for name in self._shapes if not (self.tied and name == self.family.head)]

    def _walk_layers(self, bar: tqdm) -> None:
        self.info["layers"] = {}
        for target, index in enumerate(self.kept_layers):
            following = [*self.kept_layers, self.big.num_layers][target + 1]
            with self.big.layer(index) as big, self.small.layer(target) as small:
                self._set_norms(big, small)
                report = {}
                for half in (0, 1):
                    absorbs = half == 1 and following > index + 1
                    refit_half = HalfRefit(self.walk, big, small, half, absorbs)
                    refit_half.read()
                    for dropped in range(index + 1, following) if half else ():
                        self._run_dropped(dropped, self.walk.after)
                    refit_half.write()
                    report |= refit_half.report
                    self._step()
                for name, tensor in small.module.named_parameters():
                    self.tensors[self.family.layer_name(target, name)] = tensor.to("cpu", self.dtype, copy=True)
            self.info["layers"][str(index)] = report
            _log_layer(index, report)
            bar.update(following - index)

    def _step(self) -> None:
        """The next half reads what this one left behind."""
        self.walk.before, self.walk.after = self.walk.after, self.walk.before
        if self.prune.refit_mode == "teacher_forced":
            self.walk.student_states = None

    def _set_norms(self, big: LoadedLayer, small: LoadedLayer) -> None:
        names = {(name, True) for name in self.family.read_norms} | {(name, False) for name in self.family.write_norms}
        for norm, reads in names:
            if norm is not None:
                weights = big.module.get_submodule(norm).named_parameters()
                trimmed = trimmed_norms(self.walk.basis, weights, self.family.gain_offset, reads)
                for name, tensor in trimmed.items():
                    small.put(f"{norm}.{name}", tensor)

    def _fit_head(self) -> None:
        head = HeadRefit(self.walk, self.big, self.small)
        self.tensors |= {name: tensor.cpu() for name, tensor in head.fit().items()}
        self.info |= head.report

    def _plan(self) -> PrunePlan:
        kept = self.walk.kept
        without = {"without": sorted(self.prune.refit_without)} if self.prune.refit_without else {}
        return PrunePlan(
            sizes=self.sizes,
            source_sizes=self.source_sizes,
            kept_layers=self.kept_layers,
            kept_hidden=kept.kept_hidden,
            kept_neurons=kept.kept_neurons,
            kept_heads=kept.kept_heads,
            kept_key_value_heads=kept.kept_key_value_heads,
            info=self.info | without | {"moments_sha256": self.walk.fingerprint.hexdigest()},
        )


def _log_layer(index: int, report: dict[str, dict[str, Any]]) -> None:
    """One line: error on held-out rows before and after, and the effective rank of what each projection reads."""
    parts = [
        f"{name.rpartition('.')[2]} {fit['before']:.3g} -> {fit['after']:.3g} (rank {fit['effective_rank']:.0f})"
        for name, fit in report.items()
        if fit["before"] is not None
    ]
    if parts:
        logger.info("layer %d, relative error of slicing -> refit (effective rank): %s", index, ", ".join(parts))
