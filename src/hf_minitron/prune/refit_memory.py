"""What refit's second moments take in memory, so that ``stats_memory`` is kept or refused before any long work."""

from __future__ import annotations

BYTES = 8  # of a float64


def moment_bytes(sizes: dict[str, int], source: dict[str, int], head_dim: int) -> dict[str, int]:
    """The most bytes that moments and their factors take at a time, by part of the work; layers come one by one.

    ``sizes`` and ``source`` are config values after and before. Weights, activations of a batch and blocks of rows
    are not counted.
    """
    d, small = source["hidden_size"], sizes["hidden_size"]
    inner = {
        "heads": [size["num_attention_heads"] * head_dim for size in (source, sizes)],
        "neurons": [size["intermediate_size"] for size in (source, sizes)],
    }
    reading = 2 * small * small + 2 * d * small + d * d  # fitted and held-out rows; targets' of the latter
    found = {"readers": reading + 2 * small * small}
    if small < d:
        found["directions"] = 10 * d * d
    for part, (before, after) in inner.items():
        if after < before:
            # Beside what readers need: the moments, their inverse, a copy while inverting, and the writer's weight.
            found[f"the choice of {part}"] = reading + 3 * before * before + 3 * small * before
        found[f"the writer of {part}"] = 4 * after * after + 4 * small * after + small * small
    return {part: BYTES * count for part, count in found.items()}


def stream_bytes(stats_memory: float, sizes: dict[str, int], source: dict[str, int], head_dim: int) -> float:
    """What is left of ``stats_memory`` (GB) for residual streams; ValueError if the moments alone take more."""
    part, needed = max(moment_bytes(sizes, source, head_dim).items(), key=lambda item: item[1])
    room = stats_memory * 1e9 - needed
    if room < 0:
        raise ValueError(
            f"stats_memory={stats_memory:g} GB is less than refit's moments take at these sizes: {needed / 1e9:.3g} GB "
            f"for {part}, whatever the number of tokens. Use --stats-memory {1.05 * needed / 1e9:.2g} or more, or "
            "--method minitron."
        )
    return room
