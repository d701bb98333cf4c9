"""From results to a ranking: losses on the same rows, compared row by row."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from hf_minitron.evaluate.perplexity import ratio_standard_error
from hf_minitron.prune.search import Candidate
from hf_minitron.ranking.records import CandidateResult


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate's place. ``difference`` is its loss above the best one's on the same rows, with the paired error."""

    rank: int | None
    name: str
    sizes: dict[str, int]
    total: int
    non_embedding: int
    cost: float
    loss: float | None
    standard_error: float | None
    difference: float | None
    difference_standard_error: float | None
    curve: list[tuple[int, float]]
    num_tokens: int | None
    seconds: float | None
    error: str | None


def best_of(results: dict[str, CandidateResult]) -> str:
    """The lowest loss; of equal ones the first."""
    return min(results, key=lambda name: math.inf if results[name].loss is None else results[name].loss)


def order_candidates(candidates: list[Candidate], results: dict[str, CandidateResult]) -> list[RankedCandidate]:
    """The candidates with their results, best first, failed ones last; equal losses keep the given order."""
    order = sorted(candidates, key=lambda c: math.inf if results[c.name].loss is None else results[c.name].loss)
    best = results[order[0].name]
    return [_describe(rank, candidate, results[candidate.name], best) for rank, candidate in enumerate(order, start=1)]


def _describe(rank: int, candidate: Candidate, result: CandidateResult, best: CandidateResult) -> RankedCandidate:
    known = result.loss is not None
    tokens = best.row_tokens
    return RankedCandidate(
        **dataclasses.asdict(candidate),
        rank=rank if known else None,
        name=candidate.name,
        loss=result.loss,
        standard_error=ratio_standard_error(result.row_nats, tokens) if known else None,
        difference=result.loss - best.loss if known else None,
        difference_standard_error=ratio_standard_error(result.row_nats - best.row_nats, tokens) if known else None,
        curve=result.curve,
        num_tokens=result.num_tokens,
        seconds=result.seconds,
        error=result.error,
    )
