"""Refit of one half of a layer, attention or feed-forward: what it keeps, its readers, its writer, its write norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_minitron.prune.layerwise import LoadedLayer
from hf_minitron.prune.refit_basis import Basis
from hf_minitron.prune.refit_choice import eliminate, eliminate_heads, rank_by_energy, rank_heads_by_energy
from hf_minitron.prune.refit_moments import Evidence, MomentsFingerprint
from hf_minitron.prune.refit_solve import Fit, Linear, compensate, fit_linear
from hf_minitron.prune.refit_streams import Batch, StreamStore
from hf_minitron.prune.target import PruneConfig
from hf_minitron.prune.trim import kept_indices

HALVES = ("self_attn", "mlp")


@dataclass
class KeptOfLayers:
    """What is kept so far, with the names of a ``PrunePlan``, and the activations' energies by layer (E[a²])."""

    sizes: dict[str, int]
    source_sizes: dict[str, int]
    head_dim: int
    kept_hidden: list[int] = field(default_factory=list)
    kept_neurons: list[list[int]] = field(default_factory=list)
    kept_heads: list[list[int]] = field(default_factory=list)
    kept_key_value_heads: list[list[int]] = field(default_factory=list)
    energies: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def indices(self, axis: str, layer: int) -> Tensor:
        """Kept source indices along an axis of a layer's tensor."""
        return kept_indices(self, axis, layer, self.head_dim)

    def shrinks(self, half: int) -> bool:
        keys = ("num_attention_heads", "num_key_value_heads") if half == 0 else ("intermediate_size",)
        return any(self.sizes[key] < self.source_sizes[key] for key in keys)


@dataclass
class Walk:
    """What every half needs: batches, the basis, options, the source's stream before and after, the small one's.

    ``student_states`` is None where the small model is fed the ideal stream P h (teacher forcing). ``share`` is how
    many bytes of a stream stay in memory.
    """

    batches: list[Batch]
    basis: Basis
    prune: PruneConfig
    kept: KeptOfLayers
    before: StreamStore
    after: StreamStore
    device: torch.device
    share: float
    fingerprint: MomentsFingerprint = field(default_factory=MomentsFingerprint)
    student_states: StreamStore | None = None

    def uses(self, part: str) -> bool:
        return part not in self.prune.refit_without

    @property
    def guards(self) -> bool:
        return self.uses("guard")

    def load(self, store: StreamStore, number: int) -> Tensor:
        return store[number].to(self.device)

    def ideal(self, states: Tensor) -> Tensor:
        """P h."""
        return states if self.basis.is_identity else states @ self.basis.write.T

    def student(self, number: int) -> Tensor:
        """The small model's stream before this half, of one batch."""
        if self.student_states is not None:
            return self.load(self.student_states, number)
        return self.ideal(self.load(self.before, number))


class HalfRefit:
    """Fits one half of ``small``, whose norms are set, to the same half of ``big``.

    ``absorbs`` says that layers are dropped after it, so that its writer has to stand for them. Call ``read``, then
    bring ``walk.after`` to where the small model's next layer begins, then ``write``.
    """

    def __init__(self, walk: Walk, big: LoadedLayer, small: LoadedLayer, half: int, absorbs: bool = False):
        self.walk, self.big, self.small, self.half, self.absorbs = walk, big, small, half, absorbs
        self.family = big.family
        self.report: dict[str, Any] = {}
        self._written = StreamStore(walk.share)  # P z, for families that norm what is written
        self._inner: Evidence | None = None

    @property
    def _writer(self) -> str:
        return (self.family.head_site, self.family.neuron_site)[self.half]

    @property
    def _writer_norm(self) -> str | None:
        return self.family.write_norms[self.half]

    @property
    def _is_exact(self) -> bool:
        """Whether the small model reads exactly what the source reads."""
        return self.walk.basis.is_identity and self.walk.student_states is None

    def read(self) -> None:
        """Runs the source's half, chooses what stays of it, and fits the readers. ``walk.after`` is then its output."""
        evidence = self._observe()
        self._choose()
        for name, weight in self._readers():
            self._fit_reader(name, weight, evidence)
        for name, parameter in self.big.module.named_parameters():
            axes = self.family.layer_tensors[name].split()
            if name.startswith(HALVES[self.half]) and "hidden" not in axes and not name.endswith("_proj.bias"):
                rows = self._rows(axes[0])
                self.small.put(name, parameter if rows is None else parameter[rows.to(parameter.device)])

    def write(self) -> None:
        """Fits the writer to what is missing in the small stream, and then the norm of what is written, if any."""
        weight, bias = self._linear(self.big, self._writer)
        kept = self._rows("q" if self.half == 0 else "ffn")
        sliced = Linear(
            self.walk.ideal(self._columns(weight, kept).T).T, None if bias is None else self.walk.ideal(bias)
        )
        prior = sliced
        if self.walk.kept.shrinks(self.half) and self.walk.uses("compensation"):
            shorter = compensate(self._inner.fitted.xx, weight, kept, self.walk.prune.refit_ridge)
            prior = Linear(self.walk.ideal(shorter.T).T, sliced.bias)
        self._inner = None  # the largest of all moments: they make room for the writer's
        self._set_linear(self._writer, prior)
        nothing_changed = self._is_exact and not self.walk.kept.shrinks(self.half) and not self.absorbs
        if self.walk.uses("writers") and not nothing_changed:
            evidence = Evidence(center=bias is not None)
            for number, batch, a, _, wanted in self._student_runs():
                target = self.walk.load(self._written, number) if self._writer_norm else wanted
                evidence.add(a, target, batch.held_out)
            self._record(self._writer, self._fit(evidence, prior, sliced=sliced))
            if self._writer_norm:
                self._fit_write_norm()
        if self.walk.student_states is not None:
            self._advance_student()

    def _observe(self) -> Evidence:
        """The source's half over all batches: moments of what is read and, if it shrinks, of what its writer reads."""
        walk, shrinks = self.walk, self.walk.kept.shrinks(self.half)
        evidence = Evidence(center=any(bias is not None for _, (_, bias) in self._readers()))
        self._inner = Evidence(center=self._linear(self.big, self._writer)[1] is not None) if shrinks else None
        for number, batch in enumerate(walk.batches):
            states = walk.load(walk.before, number)
            x = self.big.read(self.half, states)
            a, z = self.big.core(self.half, x)
            if not self._is_exact and walk.uses("readers"):
                evidence.add(self.small.read(self.half, walk.student(number)), x, batch.held_out)
            if shrinks and not batch.held_out:
                self._inner.add(a)
            if self._writer_norm:
                self._written[number] = walk.ideal(z)
            walk.after[number] = self.big.add(self.half, states, z)
        return evidence

    def _choose(self) -> None:
        kept, sizes, source = self.walk.kept, self.walk.kept.sizes, self.walk.kept.source_sizes
        if self._inner is not None:
            covariance = self._inner.fitted.xx
            weight = self.walk.ideal(self._linear(self.big, self._writer)[0].T).T
            self.walk.fingerprint.update(self._inner.fitted)
            kept.energies[self.small.index, self.half] = self._inner.fitted.energy
        if self.half == 1:
            choose = eliminate if self.walk.uses("elimination") else rank_by_energy
            keep = sizes["intermediate_size"]
            everything = list(range(source["intermediate_size"]))
            kept.kept_neurons.append(everything if self._inner is None else choose(covariance, weight, keep))
            return
        groups, heads = list(range(source["num_key_value_heads"])), list(range(source["num_attention_heads"]))
        if self._inner is not None:
            choose = eliminate_heads if self.walk.uses("elimination") else rank_heads_by_energy
            per_group = [size["num_attention_heads"] // size["num_key_value_heads"] for size in (source, sizes)]
            keep = sizes["num_key_value_heads"], per_group[1]
            groups, heads = choose(covariance, weight, kept.head_dim, per_group[0], *keep)
        kept.kept_key_value_heads.append(groups)
        kept.kept_heads.append(heads)

    def _fit_reader(self, name: str, weight_and_bias: tuple[Tensor, Tensor | None], evidence: Evidence) -> None:
        weight, bias = weight_and_bias
        teacher = Linear(weight, bias).rows(self._rows(self.family.layer_tensors[f"{name}.weight"].split()[0]))
        folded = teacher.weight * self._folded_gain()
        prior = Linear(folded if self.walk.basis.is_identity else folded @ self.walk.basis.read, teacher.bias)
        if self._is_exact or not self.walk.uses("readers"):
            self._set_linear(name, prior)
        else:
            self._record(name, self._fit(evidence, prior, teacher))

    def _folded_gain(self) -> Tensor | float:
        """What the read norm multiplies by, where readers take it over because the stream is rotated."""
        norm = self.family.read_norms[self.half]
        if not self.walk.basis.rotated or norm is None:
            return 1.0
        return self.big.module.get_submodule(norm).weight + self.family.gain_offset

    def _student_runs(self) -> Iterator[tuple[int, Batch, Tensor, Tensor, Tensor]]:
        """By batch: what the small writer reads and gives, and what it would have to write into the small stream."""
        for number, batch in enumerate(self.walk.batches):
            states = self.walk.student(number)
            a, z = self.small.core(self.half, self.small.read(self.half, states))
            wanted = (self.walk.ideal(self.walk.load(self.walk.after, number)) - states) / self.small.multiplier
            yield number, batch, a, z, wanted

    def _fit_write_norm(self) -> None:
        """Scales every channel of what is written by c = (E[w y] + λ c̄) / (E[w²] + λ), with c̄ the best scalar.

        w is what the norm gives so far, y what it would have to give.
        """
        products, squares = 0.0, 0.0
        for _, batch, _, z, wanted in self._student_runs():
            if not batch.held_out:
                written = self.small.normalize_written(self.half, z).flatten(0, 1).double()
                products = products + (written * wanted.flatten(0, 1).double()).sum(0)
                squares = squares + written.square().sum(0)
        strength = self.walk.prune.refit_ridge * squares.mean()
        if not strength > 0:  # nothing is ever written
            return
        scale = ((products + strength * products.sum() / squares.sum()) / (squares + strength)).float()
        name = f"{self._writer_norm}.weight"
        gain = self.small.module.get_parameter(name) + self.family.gain_offset
        self.small.put(name, gain * scale - self.family.gain_offset)

    def _advance_student(self) -> None:
        for number in range(len(self.walk.batches)):
            states = self.walk.student(number)
            _, z = self.small.core(self.half, self.small.read(self.half, states))
            self.walk.student_states[number] = self.small.add(self.half, states, z)

    def _fit(
        self, evidence: Evidence, prior: Linear, teacher: Linear | None = None, sliced: Linear | None = None
    ) -> Fit:
        ridge = self.walk.prune.refit_ridge
        return fit_linear(evidence, prior, teacher, sliced=sliced, ridge=ridge, guard=self.walk.guards)

    def _record(self, name: str, fit: Fit) -> None:
        self.report[name] = fit.as_dict()
        self._set_linear(name, fit.linear)

    def _set_linear(self, name: str, linear: Linear) -> None:
        self.small.put(f"{name}.weight", linear.weight)
        if linear.bias is not None:
            self.small.put(f"{name}.bias", linear.bias)

    def _readers(self) -> list[tuple[str, tuple[Tensor, Tensor | None]]]:
        """Names of the projections that read the stream in this half, with their weights and biases."""
        return [(name, self._linear(self.big, name)) for name in self.family.readers(self.half)]

    @staticmethod
    def _linear(layer: LoadedLayer, name: str) -> tuple[Tensor, Tensor | None]:
        module = layer.module.get_submodule(name)
        return module.weight, module.bias

    def _rows(self, axis: str) -> Tensor | None:
        return self.walk.kept.indices(axis, self.small.index)

    @staticmethod
    def _columns(weight: Tensor, kept: Tensor) -> Tensor:
        return weight[:, kept.to(weight.device)]
