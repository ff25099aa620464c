"""A study: variants of one recipe times seeds, each trained and evaluated, compared with the first.

DIR/data/<hash>/...                 ingest to join, shared by variants with equal samples; of
                                    recipes with codes, of one date
DIR/trials/<variant>/seed-<n>/      one artifact a trial: finished ones are not run again
DIR/study.json, study.html
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.markup import escape

from embedding.errors import UserError
from embedding.files import write_durably
from embedding.yaml_text import load_yaml
from pipeline.artifacts import read_manifest
from pipeline.cluster import RaySession, require_absolute
from pipeline.config import Recipe
from pipeline.consent import Consent
from pipeline.console import Reporter, duration
from pipeline.content.stage import STORES
from pipeline.days import available_days
from pipeline.failures import user_error
from pipeline.identity import training_config
from pipeline.marketplace.synthetic import ensure_data
from pipeline.metrics_file import METRICS_FILE, read_metrics
from pipeline.plan import plan_inputs
from pipeline.recipe import load_recipe
from pipeline.recipe_files import check_recipe_files, tower_folders
from pipeline.run import DayRun
from pipeline.stages import STAGES, StageOutput, StageSpec, execute
from pipeline.study.runner import Outcome, Trial, TrialProcesses, on_groups
from pipeline.study.samples import (
    identities,
    require_same_files,
    require_unchanged,
    samples_key,
    take_over,
)
from pipeline.study.seeds import require_comparable, require_drawn_codes, with_seed
from pipeline.study.slots import actors_of_any, slot_bundles, trial_slots
from pipeline.study.statistics import OF_A_TRIAL, StudyResult, differences, estimates, trial_metrics
from pipeline.study.trial import TrialJob, run_on_group
from pipeline.train_facts import TrainResult

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Variant:
    """A name and what it changes in the recipe."""

    name: str
    overrides: tuple[str, ...]
    """`path.to.key=value` each."""


def read_variants(path: Path, against: str | None = None) -> list[Variant]:
    """Variants of a YAML file: a mapping from names to lists of `path.to.key=value`.

        dnn: []
        fgcnn: ["ranking.model.generator={kind: fgcnn}"]

    Args:
        path: of the file.
        against: name of the variant that comes first; None: that of the file.

    Raises:
        UserError: the file is missing or has another shape, or no variant has that name.
    """
    if not path.is_file():
        raise UserError(f"--variants {path} does not exist; check the path")
    data = load_yaml(path.read_text(), f"--variants {path}")
    if not isinstance(data, dict) or len(data) < 1:
        raise UserError(
            f"--variants {path} must map names to lists of path.to.key=value, the first one being "
            "what the others are compared with"
        )
    variants = []
    for name, overrides in data.items():
        if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
            raise UserError(
                f"--variants {path}: {name!r} must be a list of path.to.key=value strings "
                f"([] for the recipe itself), not {overrides!r}"
            )
        if not str(name).replace("-", "").replace("_", "").replace("+", "").isalnum():
            raise UserError(
                f"--variants {path}: {name!r} names a directory; use letters, digits, -, _ and +"
            )
        variants.append(Variant(str(name), tuple(overrides)))
    if against is not None and against not in data:
        raise UserError(
            f"--against {against!r} is not among the variants of {path}: {', '.join(data)}"
        )
    return sorted(variants, key=lambda variant: variant.name != (against or variants[0].name))


class Study:
    """Prepares the data, runs the trials that are missing, and sums up."""

    def __init__(  # noqa: PLR0913 # options of the command
        self,
        recipe: str,
        variants: Sequence[Variant],
        *,
        date: str | None,
        num_seeds: int,
        out: Path,
        overrides: Sequence[str] = (),
        trials_per_gpu: int = 1,
        max_parallel: int | None = None,
    ) -> None:
        """Load every variant's recipe.

        Args:
            recipe: built-in recipe or path of a YAML file.
            variants: the first one is what the others are compared with.
            date: day to train up to; None: the last one that leaves a day to evaluate on.
            num_seeds: trials of each variant; the recipe's seed and the ones after it.
            out: output directory.
            overrides: `path.to.key=value` for all variants.
            trials_per_gpu: trials of one rank that share a GPU: a small model does not fill one.
            max_parallel: trials side by side at most; None: as many as the cluster has room for.

        Raises:
            UserError: a variant's recipe is not valid, or differs from the first one in what a
                study holds equal; all of them are checked before any work.
        """
        self.variants = list(variants)
        self.out = out
        self.trials_per_gpu = trials_per_gpu
        self.max_parallel = max_parallel
        self.recipes = {}
        for variant in self.variants:
            try:
                loaded = load_recipe(recipe, [*overrides, *variant.overrides])
                check_recipe_files(loaded)
                require_absolute(tower_folders(loaded))
            except UserError as error:
                raise UserError(f"variant {variant.name!r}: {error}") from error
            self.recipes[variant.name] = loaded
        require_comparable(self.recipes)
        require_drawn_codes(self.recipes, num_seeds)
        self.first = self.recipes[self.variants[0].name]
        require_absolute({"--out": out, "data.root": self.first.data.root})
        self._actors = actors_of_any(list(self.recipes.values()))
        self.seeds = [self.first.ranking.trainer.seed + i for i in range(num_seeds)]
        self.reporter = Reporter()
        ensure_data(self.first, self.reporter)
        self.date = date or _last_date(self.first)

    def run(self) -> StudyResult:
        """Run the trials that are not there yet; those that fail are named in the result.

        Raises:
            UserError: the data cannot be prepared, or every trial failed.
        """
        with RaySession(self.first.cluster, actors=self._actors, say=self.reporter.line) as session:
            trials = [
                trial for variant in self.variants for trial in self._trials(variant, session)
            ]
            missing = [trial for trial in trials if not trial.spec.is_current]
            self.reporter.line(
                f"{len(trials)} trials: {len(self.variants)} variants x {len(self.seeds)} seeds, "
                f"{len(trials) - len(missing)} of them done before"
            )
            failed = self._run_missing(missing, session) if missing else {}
        if len(failed) == len(trials):
            raise next(iter(failed.values()))
        return self._result(trials, {name: str(error) for name, error in failed.items()})

    # --- trials ----------------------------------------------------------------------------------

    def _trials(self, variant: Variant, session: RaySession) -> list[Trial]:
        """The trials of a variant; samples are made first, unless another one has them."""
        trials = []
        for seed in self.seeds:
            recipe = with_seed(self.recipes[variant.name], seed)
            trials.append(self._trial(variant, recipe, seed, self._samples(recipe, session)))
        return trials

    def _samples(self, recipe: Recipe, session: RaySession) -> DayRun:
        """The day with its samples, which variants that read the same columns share."""
        window = recipe.window.model_copy(update={"warm_start": False})
        directory = self.out / "data" / samples_key(recipe, self.date)
        # Tokens of items do not depend on the samples, and their stores are big.
        (directory.parent / STORES).mkdir(parents=True, exist_ok=True)
        if not (directory / STORES).exists():
            directory.mkdir(exist_ok=True)
            (directory / STORES).symlink_to(Path("..", STORES), target_is_directory=True)
        day = DayRun(
            recipe.model_copy(update={"window": window}),
            directory,
            self.date,
            session=session,
            reporter=self.reporter,
            publish=_nothing_to_publish,
            consent=Consent(refresh_catalogue=True),  # variants are compared on one catalogue
        )
        stages = STAGES[: STAGES.index("join") + 1]
        if any(not spec.is_current for name in stages for spec in day.specs(name)):
            for name in stages:
                for planned in day.specs(name):
                    spec = planned.completed()
                    take_over(spec, directory.parent)
                    execute(spec, self.reporter)
        return day

    def _trial(self, variant: Variant, recipe: Recipe, seed: int, day: DayRun) -> Trial:
        samples, validation = map(day.samples, (day.training_days(), day.split.validation))
        evaluation = day.evaluation_samples()
        config = training_config(recipe) | {
            "evaluation": recipe.evaluation.model_dump(mode="json"),
            "num_workers": recipe.cluster.num_workers,
            "use_gpu": recipe.cluster.use_gpu,
            "days": day.training_days(),
            "validation_days": day.split.validation,
        }
        directories = sorted({path.parents[2] for path in (*samples, *validation, *evaluation)})
        sources = {f"join:{directory.parent.name}": directory for directory in directories}
        paths = day.content_paths()
        if paths is not None:
            sources["content"] = paths.index
        samples_of, files = identities(sources), plan_inputs(recipe)

        def job(scratch: Path) -> TrialJob:
            require_unchanged(sources, samples_of)
            require_same_files(files, plan_inputs(recipe))
            return TrialJob(
                recipe=recipe,
                samples=[path.absolute() for path in samples],
                validation=[path.absolute() for path in validation],
                evaluation=[path.absolute() for path in evaluation],
                counts=day.directory("ingest").absolute(),
                scratch=scratch.absolute(),
                content=None if paths is None else paths.absolute(),
            )

        directory = self.out / "trials" / variant.name / f"seed-{seed}"
        spec = StageSpec(
            "trial",
            directory,
            config,
            {**samples_of, **files},
            lambda scratch: run_on_group(job(scratch)),
        )
        return Trial(variant.name, seed, recipe, job, spec)

    def _run_missing(self, trials: list[Trial], session: RaySession) -> dict[str, Exception]:
        """Run trials; the errors by trial."""
        session.start()
        done, failed = 0, {}
        outcomes = closing(self._outcomes(trials, session))
        with self.reporter.stage("study", unit="trials"), outcomes as ended:
            for outcome in ended:
                trial, error = outcome.trial, outcome.error
                done += 1
                if outcome.record is not None:
                    self.reporter.line(_line(trial, outcome.record.manifest.seconds))
                elif error is not None:
                    failed[trial.name] = user_error(error) or error
                    why = escape(str(failed[trial.name]))
                    self.reporter.line(f"[red]x[/] {trial.name}: {why}")
                self.reporter.advance(done, len(trials))
        return failed

    def _outcomes(self, trials: list[Trial], session: RaySession) -> Generator[Outcome]:
        """Side by side where trials have one rank; worker groups run one after the other."""
        recipes = list(self.recipes.values())
        if any(recipe.cluster.num_workers > 1 for recipe in recipes):
            yield from on_groups(trials, session)
            return
        slot = slot_bundles(
            self.first.cluster, trials_per_gpu=self.trials_per_gpu, actors=self._actors
        )
        most = min(len(trials), self.max_parallel or len(trials))
        at_once = trial_slots(ray.cluster_resources(), slot, most)
        with TrialProcesses(recipes, slot) as processes:
            yield from processes.outcomes(trials, at_once, self.reporter.line)

    # --- result ----------------------------------------------------------------------------------

    def _result(self, trials: list[Trial], failed: dict[str, str]) -> StudyResult:
        found: dict[str, dict[int, dict[str, float]]] = {v.name: {} for v in self.variants}
        for trial in trials:
            manifest = read_manifest(trial.spec.directory, TrainResult)
            if trial.name in failed or manifest is None:
                continue
            metrics = trial_metrics(read_metrics(trial.spec.directory / METRICS_FILE))
            trial_facts = (manifest.facts.rows_per_s, manifest.seconds)
            metrics |= zip(OF_A_TRIAL, trial_facts, strict=True)
            found[trial.variant][trial.seed] = metrics
        first, *others = self.variants
        result = StudyResult(
            recipe=self.first.name,
            date=self.date,
            seeds=tuple(self.seeds),
            variants={name: estimates(by_seed) for name, by_seed in found.items()},
            paired={v.name: differences(found[v.name], found[first.name]) for v in others},
            overrides={variant.name: variant.overrides for variant in self.variants},
            failed=failed,
        )
        path = self.out / STUDY_FILE
        write_durably(path, result.model_dump_json(indent=2))
        return result


def _line(trial: Trial, seconds: float) -> str:
    task = trial.recipe.gate.task
    auc = read_metrics(trial.spec.directory / METRICS_FILE)[task].auc
    shown = "-" if auc is None else f"{auc:.4f}"
    return f"[green]+[/] {trial.name}  {duration(seconds)}  {task} auc {shown}"


def _last_date(recipe: Recipe) -> str:
    days = available_days(recipe.data.root, recipe.data.complete_marker)
    if len(days) < 2:
        raise UserError(
            f"the event log has the day {days[0]} only: a study trains on one and evaluates on the "
            "next; deliver another day"
        )
    return days[-2]


def _nothing_to_publish(recipe: Recipe, train: Path, scratch: Path) -> StageOutput:
    raise AssertionError("a study publishes no bundle")
