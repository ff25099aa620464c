"""One training run of the small model, with everything a checkpoint would hold kept in memory."""

from typing import Any

import torch

from embedding.loader import SampleFiles, SampleLoader
from ranking.config import RankingConfig
from ranking.model import RankingModel, RankingStep
from ranking.progress import Progress
from ranking.trainer import Reached, Trainer, TrainingHooks, TrainingSummary
from tests.ranking.small_run import SCHEMA, TASKS

CPU = torch.device("cpu")


class Harness:
    """A run on `files`; `held_out` rows, where given, are validated on."""

    def __init__(
        self,
        files: SampleFiles,
        config: RankingConfig,
        *,
        held_out: SampleFiles | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        self.config = config
        self.source = SampleLoader(files, batch_size_per_rank=config.trainer.batch_size_per_rank)
        self.model = RankingModel(SCHEMA, config, tables_device=CPU)
        self.model.tables.initialize(seed=0)
        self.step = RankingStep(self.model, config, embedding_l2=embedding_l2)
        self.optimizer = torch.optim.Adam(self.step.parameters(), lr=1e-2)
        self.held_out = (
            None
            if held_out is None
            else SampleLoader(held_out, batch_size_per_rank=config.trainer.batch_size_per_rank)
        )
        self.reached: list[Reached] = []
        self.reports: dict[int, dict[str, float]] = {}
        self.validations: dict[int, dict[str, float]] = {}
        self.checkpoints: dict[int, dict[str, Any]] = {}

    def fit(
        self, progress: Progress | None = None, *, is_warm_start: bool = False
    ) -> TrainingSummary:
        trainer = Trainer(
            self.config.trainer,
            TASKS,
            model=self.step,
            optimizer=self.optimizer,
            device=CPU,
            hooks=TrainingHooks(
                report=self._report,
                save=self._save,
                validated=lambda at, metrics: self.validations.__setitem__(at.step, metrics),
            ),
        )
        return trainer.fit(
            self.source, progress, validation=self.held_out, is_warm_start=is_warm_start
        )

    def _report(self, reached: Reached, metrics: dict[str, float]) -> None:
        self.reached.append(reached)
        self.reports[reached.step] = metrics

    def restore(self, checkpoint: dict[str, Any]) -> Progress:
        self.step.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        return Progress.from_state_dict(checkpoint["progress"])

    def _save(self, progress: Progress) -> None:
        self.checkpoints[progress.step] = copy_tensors(
            {
                "model": self.step.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": progress.state_dict(),
            }
        )


def copy_tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copy_tensors(item) for key, item in value.items()}
    return [copy_tensors(item) for item in value] if isinstance(value, list) else value


def weights_of(harness: Harness) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in harness.step.parameters()])


def without_clocks(reports: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {
            key: value
            for key, value in metrics.items()
            if not key.startswith(("time/", "memory/")) and key != "train/rows_per_s"
        }
        for step, metrics in reports.items()
    }
