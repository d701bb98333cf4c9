"""The one set of importance scores that all candidates are pruned by: given, or measured once and kept."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from hf_minitron.data import describe_source, fingerprint_rows
from hf_minitron.prune.arguments import CalibrationArguments
from hf_minitron.prune.calibration import load_calibration
from hf_minitron.prune.depth import removal_key
from hf_minitron.prune.plan import SIZE_OF
from hf_minitron.prune.pruner import PrunerForCausalLM
from hf_minitron.prune.scores import ImportanceScores
from hf_minitron.prune.search import Candidate
from hf_minitron.ranking.arguments import RankingArguments

SCORES_FILE = "scores.safetensors"
logger = logging.getLogger(__name__)


class Scoring:
    """Finds out what the candidates need to be scored on, reads the calibration text, and scores.

    ``facts`` say what the scores depend on: the calibration rows and how they are aggregated, or the scores' file.
    """

    def __init__(
        self,
        pruner: PrunerForCausalLM,
        candidates: list[Candidate],
        calibration: CalibrationArguments,
        arguments: RankingArguments,
    ):
        self.pruner, self.calibration, self.arguments = pruner, calibration, arguments
        smallest = {key: min(c.sizes[key] for c in candidates) for key in candidates[0].sizes}
        self._axes = [axis for axis, key in SIZE_OF.items() if smallest[key] < getattr(pruner.config, key)]
        self._blocks = self._find_blocks(candidates)
        if arguments.scores is None:
            self._check()
            self._rows = load_calibration(
                calibration.calibration_dataset,
                pruner.tokenizer,
                pruner.config,
                num_samples=calibration.num_samples,
                sequence_length=calibration.sequence_length,
                seed=calibration.calibration_seed,
                **self._source,
            )

    @property
    def facts(self) -> dict[str, Any]:
        if self.arguments.scores is not None:
            with Path(self.arguments.scores).open("rb") as file:
                return {"scores": hashlib.file_digest(file, "sha256").hexdigest()}
        return {
            "rows": fingerprint_rows(self._rows),
            "aggregation": [self.calibration.batch_aggregation, self.calibration.sequence_aggregation],
            "neuron_signal": self.calibration.neuron_signal,
            "axes": self.calibration.axes,
        }

    def score(self, output_dir: Path) -> None:
        """Writes the scores that are not in the folder yet; nothing if they were given."""
        if self.arguments.scores is not None:
            return
        path, calibration, pruner = output_dir / SCORES_FILE, self.calibration, self.pruner
        if path.is_file():
            pruner.scores = ImportanceScores.load(path)
        else:
            pruner.score(
                self._rows,
                axes=tuple(calibration.axes),
                aggregation=(calibration.batch_aggregation, calibration.sequence_aggregation),
                neuron_signal=calibration.neuron_signal,
                batch_size=calibration.batch_size,
            )
            described = describe_source(calibration.calibration_dataset, **self._source)
            pruner.scores.info["calibration"] = described | {"seed": calibration.calibration_seed}
            pruner.scores.save(path)
        metric = self.arguments.depth_metric
        missing = [n for n in self._blocks if removal_key(metric, n) not in pruner.scores.moments]
        if missing:
            pruner.scan_layers(self._rows, num_dropped=missing, metric=metric, batch_size=calibration.batch_size)
            pruner.scores.save(path)

    def read(self, output_dir: Path) -> ImportanceScores:
        """The scores, given or written."""
        return ImportanceScores.load(self.arguments.scores or output_dir / SCORES_FILE)

    @property
    def _source(self) -> dict[str, Any]:
        calibration = self.calibration
        which = {"config_name": calibration.calibration_config, "split": calibration.calibration_split}
        return which | {"text_column": calibration.text_column}

    def _find_blocks(self, candidates: list[Candidate]) -> list[int]:
        """Lengths of the blocks of layers whose removal has to be scanned, beyond the scoring pass."""
        dropped = {self.pruner.config.num_hidden_layers - c.sizes["num_hidden_layers"] for c in candidates} - {0}
        lengths = dropped if self.arguments.depth_pattern == "contiguous" else {1} if dropped else set()
        if self.arguments.depth_metric == "block_importance" and 1 in lengths:
            lengths, self._axes = lengths - {1}, [*self._axes, "layers"]  # part of the scoring pass
        return sorted(lengths)

    def _check(self) -> None:
        if missing := [axis for axis in self._axes if axis not in self.calibration.axes]:
            raise ValueError(
                f"axes={' '.join(self.calibration.axes)}: candidates shrink along {', '.join(missing)} too. Use "
                f"--axes {' '.join(self._axes)}."
            )
        if self._blocks and self.arguments.depth_metric == "accuracy":
            blocks = " ".join(map(str, self._blocks))
            raise ValueError(
                "depth_metric='accuracy' is measured on questions, not on calibration text: run hf-minitron score with "
                f"--depth-metric accuracy --num-dropped-layers {blocks} and give its file as --scores."
            )
