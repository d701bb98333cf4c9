"""The license of what is made from a model: inherited from its card, and checked before anything is shared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NO_DERIVATIVES = re.compile(r"(?:^|-)nd(?:-|$)")  # Creative Commons' NoDerivatives, by the Hub's identifiers
_LLAMA = (
    "Built with Llama. Meta's license asks that the name of a derived model begins with “Llama”, and that a copy of "
    "the license goes along with it."
)
_TERMS = {  # what owners want of derived models, by the beginning of the identifier; their own words rule
    "llama2": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc.",
    "llama3": _LLAMA,
    "llama4": _LLAMA,
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. Their "
    "restrictions of use hold for this model too.",
}


def inherit_license(inherited: dict[str, Any], override: str | None = None) -> dict[str, Any]:
    """The card's license entries: those of the source, or ``override``; none where nothing is known.

    Raises ValueError for a license that forbids derived works, which pruned and trained models are.
    """
    if override is not None:
        return {"license": override}
    forbidding = [name for name in _names(inherited) if _NO_DERIVATIVES.search(name.lower())]
    if forbidding:
        raise ValueError(
            f"license={forbidding[0]} of the source forbids to share what is derived from it, and this model is. If "
            "its owner has allowed you to, say under which license with --license ID."
        )
    return {key: value for key, value in inherited.items() if key.startswith("license")}


def license_terms(license: dict[str, Any]) -> str | None:
    """What the license's owner wants said on a derived model's card, as far as it is known here."""
    found = [words for name in _names(license) for start, words in _TERMS.items() if name.lower().startswith(start)]
    return found[0] if found else None


def _names(license: dict[str, Any]) -> Sequence[str]:
    """Identifiers, and the name that goes with ``other``."""
    value = license.get("license") or []
    return [*([value] if isinstance(value, str) else map(str, value)), str(license.get("license_name") or "")]
