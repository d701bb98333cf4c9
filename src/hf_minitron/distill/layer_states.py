"""Hidden states inside a model, recorded by hooks while it runs: what its layers read, and queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_minitron.architectures import Family, get_family, get_head_dim

REENTRANT = (
    "Reentrant activation checkpointing runs the layers without gradients, so nothing can be learnt from their states. "
    'Set activation_checkpointing_kwargs={"use_reentrant": False}, or leave intermediate_losses out.'
)
States = dict[tuple[str, int], tuple[Tensor, ...]]


class StateRecorder:
    """Records states of chosen layers, [rows, length, width], by the names of P1's losses (`intermediate.py`).

    States are those after the norm, as P1 has them: what attention or feed-forward read. OLMo 2 has no norm there and
    gives the residual stream itself. Hooks exist only inside `recording`, so a model that is not watched has none, and
    the second forward pass of activation checkpointing records nothing.

    Raises ValueError for a model whose family is not in the table of `architectures.py`.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], layers: Sequence[int]) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._family, self.config, self._base = get_family(base.config), base.config, base
        self._states: States = {}
        self._with_gradient = False
        self._sites: list[tuple[nn.Module, bool, Callable[..., None]]] = []  # module, its input?, hook
        if "emb" in names:
            self._add("emb", 0, self._attention(0))
        for layer in layers:
            if "att" in names:
                for projection in _projections(self._family):
                    self._add("att", layer, self._module(layer, projection), output=True)
            if "i" in names:
                self._add("i", layer, self._module(layer, self._family.neuron_site.split(".")[0]))
            if "o" in names and layer + 1 < self.config.num_hidden_layers:
                self._add("o", layer, self._attention(layer + 1))
            elif "o" in names:
                self._add("o", layer, base.get_submodule(self._family.final_norm), output=True)

    @contextmanager
    def recording(self) -> Iterator[States]:
        """Fills the dict, by name and layer, with the states of the forward pass that runs in this block.

        "att" has three, queries, keys and values before position embeddings, the others one.
        """
        self._states, self._with_gradient = {}, torch.is_grad_enabled()
        states, handles = self._states, []
        try:
            for module, is_input, hook in self._sites:
                handles.append(
                    module.register_forward_pre_hook(hook, with_kwargs=True)
                    if is_input
                    else module.register_forward_hook(hook)
                )
            yield states
        finally:
            self._states = {}
            for handle in handles:
                handle.remove()
        for key, found in states.items():
            if key[0] == "att" and len(found) == 1:  # stacked in one projection
                rows = [heads * get_head_dim(self.config) for heads in self.num_heads]
                states[key] = found[0].split(rows, dim=-1)

    @property
    def num_heads(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        groups = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        return self.config.num_attention_heads, groups, groups

    def _add(self, name: str, layer: int, module: nn.Module, output: bool = False) -> None:
        """The hook is made once: a compiled backbone keeps calling the one that it was traced with."""

        def keep(state: Tensor) -> None:
            if self._with_gradient and not torch.is_grad_enabled():
                raise ValueError(REENTRANT)
            self._states[name, layer] = (*self._states.get((name, layer), ()), state)

        def on_input(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            keep(args[0] if args else kwargs["hidden_states"])

        def on_output(module: nn.Module, args: Sequence[Any], result: Tensor) -> None:
            keep(result)

        self._sites.append((module, not output, on_output if output else on_input))

    def _attention(self, layer: int) -> nn.Module:
        return self._module(layer, self._family.head_site.split(".")[0])

    def _module(self, layer: int, name: str) -> nn.Module:
        return self._base.get_submodule(self._family.layer_name(layer, name))


def _projections(family: Family) -> list[str]:
    """Names in a layer of the projections of queries, keys and values, or of the one that stacks them."""
    found = [
        name.removesuffix(".weight")
        for name, axes in family.layer_tensors.items()
        if name.endswith(".weight") and axes in ("q hidden", "kv hidden", "q+kv+kv hidden")
    ]
    assert len(found) in (1, 3), found
    return found
