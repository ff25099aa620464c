"""A study's statistics by hand, and the variants file."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from rich.console import Console

from deploy.app import main
from embedding.errors import UserError
from multimodal.codes.config import AlignedVectors
from pipeline.artifacts import MANIFEST, Manifest, StageFacts
from pipeline.cluster import actors_of, fitting
from pipeline.config import ClusterConfig, EvaluationConfig, Recipe
from pipeline.console import Reporter
from pipeline.evaluate import SLICES, Slices
from pipeline.gate_config import GateConfig
from pipeline.metrics_file import METRICS_FILE, write_metrics
from pipeline.recipe import load_recipe
from pipeline.stages import StageOutput, StageSpec, execute
from pipeline.study.report import (
    chance_note,
    require_metrics,
    shown_metrics,
    slice_metrics,
    slice_tables,
    study_table,
    write_study_report,
)
from pipeline.study.runner import Trial
from pipeline.study.samples import identities, require_unchanged, samples_key, take_over
from pipeline.study.seeds import require_comparable, require_drawn_codes, with_seed
from pipeline.study.slots import actors_of_any, slot_bundles, trial_slots
from pipeline.study.statistics import (
    METRICS,
    OF_A_TRIAL,
    StudyResult,
    differences,
    estimates,
    is_better,
    trial_metrics,
)
from pipeline.study.study import Study, Variant, _line, read_variants
from ranking.task_metrics import SliceMetrics, TaskMetrics
from tests.pipeline.small_log import Row, event, make_recipe, write_catalogue, write_day

FGCNN = "ranking.model.generator={kind: fgcnn}"
ONE_DIM = "ranking.model.field_dim=16"


def test_interval_of_three_seeds_is_students() -> None:
    trials = {0: {"click.auc": 0.1}, 1: {"click.auc": 0.2}, 2: {"click.auc": 0.3}}

    found = estimates(trials)["click.auc"]

    assert found.mean == pytest.approx(0.2)
    # Standard deviation 0.1; 97.5% quantile of t with 2 degrees of freedom: 4.302653.
    assert found.ci95 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert found.values == (0.1, 0.2, 0.3)


def test_differences_are_paired_by_seed() -> None:
    first = {0: {"auc": 0.5}, 1: {"auc": 0.7}, 2: {"auc": 0.9}}
    other = {2: {"auc": 0.93}, 0: {"auc": 0.51}}  # seed 1 failed

    found = differences(other, first)["auc"]

    assert found.diff == pytest.approx(0.02)
    # Differences 0.03 and 0.01: standard deviation 0.0141421; t with 1 degree: 12.706205.
    assert found.ci95 == pytest.approx(12.706205 * 0.0141421 / 2**0.5, rel=1e-5)
    assert not found.excludes_zero
    assert set(found.seeds) == {0, 2}


def test_one_seed_has_no_interval() -> None:
    assert estimates({3: {"auc": 0.6}})["auc"].ci95 is None
    assert differences({3: {"auc": 0.6}}, {3: {"auc": 0.5}})["auc"].ci95 is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must map names to lists"),
        ("a: {b: 1}", "'a' must be a list"),
        ("a/b: []", "'a/b' names a directory"),
        ("a: [", "not valid YAML"),
        ("a: []\nb: []\na: [x=1]", "line 3: a is set a second time"),
    ],
)
def test_variants_of_another_shape_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)

    with pytest.raises(UserError, match=message):
        read_variants(path)


def test_the_yardstick_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text("a: []\nb: [x=1]\nc: []\n")

    assert [variant.name for variant in read_variants(path)] == ["a", "b", "c"]
    assert [variant.name for variant in read_variants(path, "b")] == ["b", "a", "c"]
    with pytest.raises(UserError, match=r"--against 'd' is not among .*: a, b, c"):
        read_variants(path, "d")


def test_every_seed_holds_out_other_items_and_draws_another_model() -> None:
    overrides = ["ranking.trainer.seed=5", "evaluation.held_out_items={share: 0.2, seed: 40}"]
    recipe = load_recipe("demo", [*overrides, "window.warm_start=false"])

    trials = [with_seed(recipe, seed) for seed in (5, 6, 7)]

    assert [trial.ranking.trainer.seed for trial in trials] == [5, 6, 7]
    held_out = [trial.evaluation.held_out_items for trial in trials]
    assert [part.seed for part in held_out if part] == [40, 41, 42]


def test_every_seed_shifts_the_recipes_own_seeds() -> None:
    content = "content={text: {model: tiny, lora: null}, seed: 9}"
    generator = "ranking.model.generator={kind: fgcnn, shuffle_seed: 4}"
    recipe = load_recipe("demo", ["ranking.trainer.seed=5", content, ONE_DIM, generator])

    trials = [with_seed(recipe, seed) for seed in (5, 6, 7)]

    assert trials[0] == recipe
    assert [trial.content.seed for trial in trials if trial.content] == [9, 10, 11]
    orders = [trial.ranking.model.generator for trial in trials]
    assert [order.shuffle_seed for order in orders if order] == [4, 5, 6]
    unordered = with_seed(load_recipe("demo", [ONE_DIM, FGCNN]), 8).ranking.model.generator
    assert unordered is not None
    assert unordered.shuffle_seed is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cluster.num_workers=1", r"cluster.num_workers is 1, but 2 in 'a'"),
        ("cluster.cpus_per_worker=2", r"cluster.cpus_per_worker is 2.0, but 1 in 'a'"),
        ("cluster.use_gpu=true", r"cluster.use_gpu is True, .*--set cluster.use_gpu="),
        ("ranking.trainer.seed=3", r"ranking.trainer.seed is 3, but 0 in 'a'.*leave it out"),
    ],
)
def test_variants_of_another_cluster_or_seed_are_refused(change: str, message: str) -> None:
    """One of one worker waited for ever for a process that only studies of one worker start."""
    recipes = {name: load_recipe("demo", overrides) for name, overrides in (("a", []), ("b", []))}
    require_comparable(recipes)
    with pytest.raises(UserError, match=f"variant 'b': {message}"):
        require_comparable(recipes | {"b": load_recipe("demo", [change])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("window.eval_days=2", r"window.eval_days is 2, but 1 in 'a'; .* the same rows"),
        ("evaluation.group_by=request_id", "evaluation.group_by is request_id, but user_id in 'a'"),
        ("evaluation.rare_max_events=3", "evaluation.rare_max_events is 3, but 10 in 'a'"),
        ("evaluation.popular_share=0.5", r"evaluation.popular_share is 0.5, but 0.1 in 'a'"),
        ("evaluation.held_out_items={}", "evaluation.held_out_items is .*share=0.2.*but None"),
        (
            "ranking.tasks=[{name: click}, {name: like, label: click}]",
            "label of task 'like' is click, but like in 'a'",
        ),
        (
            "ranking.tasks=[{name: like}, {name: click, sample_weight: w}]",
            "sample_weight of task 'click' is w, but None in 'a'",
        ),
    ],
)
def test_variants_that_are_evaluated_on_other_rows_are_refused(change: str, message: str) -> None:
    """AUC of two days minus AUC of one, paired by seed, was shown as what the variant gains."""
    alone = "window.warm_start=false"  # as held-out items demand
    first = load_recipe("demo", [alone, "ranking.tasks=[{name: click}, {name: like}]"])
    with pytest.raises(UserError, match=f"variant 'b': {message}"):
        require_comparable({"a": first, "b": load_recipe("demo", [alone, change])})


def test_variants_may_have_other_tasks() -> None:
    first, change = load_recipe("demo", []), "ranking.tasks=[{name: click}, {name: like}]"
    require_comparable({"a": first, "b": load_recipe("demo", [change])})


def test_every_seed_draws_another_alignment_and_other_codebooks() -> None:
    content = "{text: {model: tiny, lora: null}, seed: 3}"
    codes = f"codes={{vectors: {{kind: aligned, content: {content}}}, rq: {{seed: 20}}}}"
    recipe = load_recipe("demo", ["ranking.trainer.seed=5", codes])

    first, second = (with_seed(recipe, seed).codes for seed in (5, 6))

    assert first == recipe.codes
    assert second is not None
    assert second.rq is not None
    assert isinstance(second.vectors, AlignedVectors)
    assert second.vectors.content is not None
    drawn = (second.rq.seed, second.vectors.seed, second.vectors.content.seed)
    assert drawn == (21, 1, 4)
    assert len({samples_key(with_seed(recipe, seed), "2024-01-02") for seed in (5, 6)}) == 2


def test_taken_codes_are_not_compared_over_draws_of_held_out_items(tmp_path: Path) -> None:
    """Every seed holds out other items: the second one ended at codebooks that know its own."""
    taken = ["codes={taken_from: runs/codes}", "window.warm_start=false"]
    held_out = "evaluation.held_out_items={share: 0.2}"
    recipes = {"ids": load_recipe("demo", []), "codes": load_recipe("demo", taken)}
    require_drawn_codes(recipes, 3)
    recipes["codes"] = load_recipe("demo", [*taken, held_out])
    require_drawn_codes(recipes, 1)
    message = r"variant 'codes': .*each of the 3 seeds .*taken_from=runs/codes .*--seeds 1"
    with pytest.raises(UserError, match=message):
        require_drawn_codes(recipes, 3)
    with pytest.raises(UserError, match="each of the 2 seeds"):
        Study(
            "demo",
            [Variant("codes", (*taken, held_out, f"data.root={tmp_path}"))],
            date=None,
            num_seeds=2,
            out=tmp_path,
        )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("changes", "trials", "per_gpu", "expected"),
    [
        ({}, 99, 1, 16),
        ({"cpus_per_worker": 4}, 99, 1, 4),
        ({"use_gpu": True}, 99, 1, 2),
        ({"use_gpu": True}, 99, 3, 6),
        ({"use_gpu": True, "cpus_per_worker": 4}, 99, 3, 4),
        ({"use_gpu": True}, 5, 3, 5),
        ({"cpus_per_worker": 32}, 99, 1, 1),
    ],
)
def test_trials_side_by_side_are_bound_by_cpus_gpus_and_their_number(
    changes: dict[str, Any], trials: int, per_gpu: int, expected: int
) -> None:
    cluster = ClusterConfig(num_workers=1, **changes)
    room = {"CPU": 16.0, "GPU": 2.0}
    slot = slot_bundles(cluster, trials_per_gpu=per_gpu, actors=[])
    assert trial_slots(room, slot, trials) == expected


def service(**changes: Any) -> str:
    return f"content.placement={ {'kind': 'service', **changes} }"


@pytest.mark.parametrize(
    ("variants", "changes", "expected"),
    [
        # 16 CPUs: a trial's own and two for its actors.
        ([service(num_actors=2)], {}, 5),
        # Beside any trial the actors of one variant, not of all.
        ([None, service(num_actors=2), service(), service(num_actors=2)], {}, 5),
        ([service(), service(num_actors=7)], {}, 2),
        ([service(num_actors=20)], {}, 1),
        # Two GPUs: a third of one for a trial's rank, a half for its actor.
        ([service(cpus_per_actor=0, gpus_per_actor=0.5)], {"use_gpu": True}, 2),
        ([service(cpus_per_actor=0, gpus_per_actor=0.5)], {}, 4),
        # One variant needs 7 CPUs beside the rank, another both GPUs.
        ([service(num_actors=7), service(num_actors=2, gpus_per_actor=1)], {}, 1),
        ([service(num_actors=7), service(num_actors=2, gpus_per_actor=0.5)], {}, 2),
    ],
)
def test_every_trial_has_room_for_the_actors_of_any_variant(
    variants: list[str | None], changes: dict[str, Any], expected: int
) -> None:
    cluster = ClusterConfig(num_workers=1, cpus_per_worker=1, **changes)
    content = "content={text: {}, image: {}}"
    recipes = [load_recipe("demo", [content, v] if v else []) for v in variants]

    slot = slot_bundles(cluster, trials_per_gpu=3, actors=actors_of_any(recipes))

    assert trial_slots({"CPU": 16.0, "GPU": 2.0}, slot, 99) == expected
    for recipe in recipes:
        left = slot[1:]
        for actor in actors_of(recipe):
            left.remove(next(room for room in left if fitting(room, actor)))


def test_actors_that_ask_for_nothing_reserve_nothing() -> None:
    recipe = load_recipe("demo", ["content={text: {}, image: {}}", service(cpus_per_actor=0)])
    cluster = ClusterConfig(num_workers=1, cpus_per_worker=2, use_gpu=True)

    slot = slot_bundles(cluster, trials_per_gpu=2, actors=actors_of_any([recipe]))

    assert slot == [{"CPU": 2, "GPU": 0.5}]


ALIGNED = {
    "vectors": {"kind": "aligned", "content": None},
    "rq": {"num_levels": 2, "codebook_size": 4},
}


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({"ranking": {"trainer": {"epochs": 3}}}, True),
        ({"ranking": {"trainer": {"seed": 3}}}, True),
        ({"content": {"gradient": {"max_items_per_step": 7}}}, True),
        ({"content": {"fusion": {"kind": "concat"}}}, False),
        ({"content": {"dim": 16}}, False),
        ({"content": {"text": {"lora": {"rank": 2}}}}, False),
        ({"codes": {"refit": {"force_on": ["2024-01-02"]}}}, False),
        ({"codes": {"vectors": {"num_steps": 5}}}, False),
        ({"window": {"train_days": 2}}, False),
        ({"window": {"eval_days": 2}}, False),
        ({"window": {"validation_days": 1}}, False),
        ({"window": {"warm_start": False}}, True),
        ({"data": {"user_buckets": 4}}, False),
        ({"data": {"max_quarantined_share": 0.25}}, True),
    ],
)
def test_variants_share_data_only_if_all_artifacts_of_it_are_equal(
    tmp_path: Path, changes: Row, shared: bool
) -> None:
    """Two that share a directory and differ would overwrite each other."""
    recipe = make_recipe(tmp_path).model_dump(mode="json")
    recipe |= {"codes": ALIGNED, "content": {"text": {"model": "tiny"}}}
    other = merged(recipe, changes)

    keys = {samples_key(Recipe.model_validate(data), "2024-01-02") for data in (recipe, other)}

    assert len(keys) == (1 if shared else 2)


def test_codes_of_a_date_do_not_go_on_with_those_of_another_study(tmp_path: Path) -> None:
    """The encoder and the codebooks of an earlier date were gone on with, if it was studied."""
    plain = make_recipe(tmp_path).model_dump(mode="json")
    coded = plain | {"codes": ALIGNED, "content": {"text": {"model": "tiny"}}}
    for settings, count in ((plain, 1), (coded, 2)):
        recipe = Recipe.model_validate(settings)
        assert len({samples_key(recipe, date) for date in ("2024-01-02", "2024-01-03")}) == count


def merged(settings: Row, changes: Row) -> Row:
    """Settings with some of the values below them replaced."""
    nested = {
        key: merged(settings.get(key) or {}, value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return {**settings, **nested}


def test_a_trial_whose_samples_were_written_anew_does_not_start(tmp_path: Path) -> None:
    sources = {"join:a": tmp_path / "a", "join:b": tmp_path / "b"}
    for directory in sources.values():
        directory.mkdir()
        write_id(directory, "first")
    inputs = identities(sources)
    require_unchanged(sources, inputs)
    write_id(tmp_path / "b", "second")

    with pytest.raises(UserError, match=f"{tmp_path / 'b'} was written anew.*command again"):
        require_unchanged(sources, inputs)


def test_a_trial_is_another_one_with_other_plan_files(tmp_path: Path) -> None:
    """A study with a new plan showed the times of the old one, as done before."""
    recipe = make_recipe(tmp_path).model_dump(mode="json")
    files = {name: tmp_path / f"{name}.json" for name in ("plan", "calibration", "traffic")}
    for path in files.values():
        path.write_text("first")
    paths = {name: str(path) for name, path in files.items()}
    recipe = Recipe.model_validate(merged(recipe, {"embedding": {"sharding": paths}}))
    study = object.__new__(Study)
    study.out = tmp_path
    day = Mock()
    day.split.validation, day.content_paths.return_value = [], None
    day.training_days.return_value, day.samples.return_value = ["2024-01-01"], []
    day.evaluation_samples.return_value = []
    day.directory.return_value = tmp_path

    def trial() -> Trial:
        return study._trial(Variant("a", ()), recipe, 0, day)

    begun = trial()
    assert trial().spec.artifact_id == begun.spec.artifact_id
    for path in files.values():
        before = trial()
        before.job(tmp_path)
        path.write_text("second")
        assert trial().spec.artifact_id != before.spec.artifact_id
        with pytest.raises(UserError, match=f"embedding.sharding.{path.stem} has changed"):
            before.job(tmp_path)


def _align_spec(data: Path, variant: str, **config: Any) -> StageSpec:
    def body(scratch: Path) -> StageOutput:
        (scratch / "encoder").mkdir()
        (scratch / "encoder" / "weights").write_text(f"made for {variant}")
        return StageOutput(1, 1, StageFacts())

    return StageSpec("align", data / variant / "2024-01-01" / "align", config, {}, body)


def test_variants_take_over_equal_artifacts_and_no_others(tmp_path: Path) -> None:
    quiet = Reporter(Console(quiet=True))
    first = _align_spec(tmp_path, "first", steps=300)
    execute(first, quiet)
    equal, other = (_align_spec(tmp_path, f"v{n}", steps=n) for n in (300, 400))
    for spec in (equal, other):
        take_over(spec, tmp_path)
        assert execute(spec, quiet).status == ("current" if spec is equal else "ran")
    weights = Path("encoder", "weights")
    assert (equal.directory / weights).read_text() == "made for first"
    assert (equal.directory / weights).samefile(first.directory / weights)
    assert (other.directory / weights).read_text() == "made for v400"

    # Made anew, it leaves the one that it was linked with as it was.
    execute(replace(equal, config={"steps": 500}), quiet)
    assert (equal.directory / weights).read_text() == "made for v300"
    assert (first.directory / weights).read_text() == "made for first"


def test_what_lacks_a_file_is_not_taken_over(tmp_path: Path) -> None:
    first = _align_spec(tmp_path, "first")
    execute(first, Reporter(Console(quiet=True)))
    (first.directory / "encoder" / "weights").unlink()
    second = _align_spec(tmp_path, "second")
    take_over(second, tmp_path)
    assert not second.directory.exists()


def write_id(directory: Path, artifact_id: str) -> None:
    manifest = Manifest(stage="join", artifact_id=artifact_id, config_hash="", facts=StageFacts())
    (directory / MANIFEST).write_text(manifest.model_dump_json())


def test_the_error_of_a_trial_is_shown_as_it_is_and_the_others_go_on(tmp_path: Path) -> None:
    """Gloo writes its errors with paths in brackets, which are markup to a console."""
    text = "[/pytorch/third_party/gloo/pair.cc:537] Connection closed by peer"

    def fails(scratch: Path) -> StageOutput:
        raise RuntimeError(text)

    recipe = make_recipe(tmp_path)  # two ranks: trials run one after the other
    trials = [
        Trial("a", seed, recipe, Mock(), StageSpec("trial", tmp_path / str(seed), {}, {}, fails))
        for seed in range(2)
    ]
    study = object.__new__(Study)
    study.first, study.recipes = recipe, {"a": recipe}
    console = Console(width=200)
    study.reporter = Reporter(console)

    with console.capture() as captured:
        failed = study._run_missing(trials, Mock())

    assert {name: str(error) for name, error in failed.items()} == {
        "a/seed-0": text,
        "a/seed-1": text,
    }
    assert f"x a/seed-1: {text}" in captured.get()


def test_trials_run_seed_by_seed(tmp_path: Path) -> None:
    ran: list[str] = []
    recipe = make_recipe(tmp_path)  # two ranks: trials run one after the other

    def trial(variant: str, seed: int) -> Trial:
        def body(scratch: Path) -> StageOutput:
            ran.append(f"{variant}{seed}")
            raise UserError("enough")

        spec = StageSpec("trial", tmp_path / f"{variant}{seed}", {}, {}, body)
        return Trial(variant, seed, recipe, Mock(), spec)

    study = object.__new__(Study)
    study.first, study.recipes = recipe, {"a": recipe, "b": recipe}
    study.reporter = Reporter(Console(quiet=True))
    study._run_missing([trial(v, seed) for v in "ab" for seed in (0, 1)], Mock())

    assert ran == ["a0", "b0", "a1", "b1"]


def test_a_finished_trial_shows_its_own_gate_task(tmp_path: Path) -> None:
    """A variant without the task of the first one ended the study with a KeyError."""
    recipe = make_recipe(tmp_path).model_copy(update={"gate": GateConfig(task="like")})
    write_metrics(
        {"like": TaskMetrics(num_rows=9, num_positives=4, auc=0.75)}, tmp_path / METRICS_FILE
    )
    spec = StageSpec("trial", tmp_path, {}, {}, Mock())

    assert _line(Trial("a", 0, recipe, Mock(), spec), 61.0).endswith("like auc 0.7500")


def test_variants_on_other_data_are_refused(tmp_path: Path) -> None:
    """Their AUC was subtracted seed by seed, as if the rows were the same."""
    root = f"data.root={tmp_path}"
    first = load_recipe("demo", [root])
    require_comparable({"a": first, "b": load_recipe("demo", [root])})

    elsewhere = load_recipe("demo", [f"data.root={tmp_path / 'b'}"])
    with pytest.raises(UserError, match=rf"variant 'b': data.root is {tmp_path}/b, but .* in 'a'"):
        require_comparable({"a": first, "b": elsewhere})
    other = load_recipe("demo", [root, "data.synthetic.seed=9"])
    with pytest.raises(UserError, match=r"variant 'b': data.synthetic differs .*two studies"):
        require_comparable({"a": first, "b": other})
    both = load_recipe("demo", [f"data.root={tmp_path / 'b'}", "data.synthetic.seed=9"])
    with pytest.raises(UserError, match="variant 'b': data.root"):
        require_comparable({"a": first, "b": both})


def test_which_metrics_are_better_higher() -> None:
    found = {name: is_better(f"next.like.cold.{name}", 0.1) for name in METRICS}
    # A slice or task whose name begins like a metric is not taken for it.
    assert found == {
        **{"auc": True, "gauc": True, "logloss": False, "ne": False},
        **{"calibration": None, "num_rows": None},
    }
    assert is_better("click.new_users.auc", -0.1) is False
    assert is_better("click.new_users.logloss", -0.1) is True
    assert [is_better(name, 1.0) for name in OF_A_TRIAL] == [None, None]


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("click.ac", "did you mean 'click.auc'"),
        ("buy.auc", "TASK.METRIC, TASK.SLICE.METRIC (click;"),
        ("click.warm.auc", "cold, rare, middle, popular, new_users"),
    ],
)
def test_a_metric_that_no_trial_can_have_is_refused(tmp_path: Path, metric: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"--metric {metric}: .*{re.escape(hint)}"):
        require_metrics([make_recipe(tmp_path)], [metric])


def test_metrics_of_trials_are_taken(tmp_path: Path) -> None:
    part = SliceMetrics(
        num_rows=9, num_positives=4, auc=0.5, gauc=0.5, logloss=0.7, ne=1.0, calibration=1.0
    )
    slices = dict.fromkeys(SLICES, part)
    whole = TaskMetrics(**part.model_dump(), slices=slices)

    require_metrics([make_recipe(tmp_path)], [*trial_metrics({"click": whole}), "trial.seconds"])


def test_what_a_study_cannot_write_or_show_is_refused_before_its_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_catalogue(tmp_path / "data")
    for day in (0, 1):
        write_day(tmp_path / "data", day, [[event(day, 1, 60)]])
    recipe = make_recipe(tmp_path / "data").model_dump(mode="json")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "variants.yaml").write_text("a: []")
    study = ["study", "--recipe", str(tmp_path / "small.yaml"), "--seeds", "1"]
    study += ["--variants", str(tmp_path / "variants.yaml"), "--out", str(tmp_path / "out")]

    assert main([*study, "--json", str(tmp_path / "gone" / "study.json")]) == 2
    assert f"no directory {tmp_path / 'gone'}" in capsys.readouterr().err
    assert main([*study, "--metric", "click.ac"]) == 2
    assert "did you mean 'click.auc'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "data").exists()


def result_of(auc: dict[str, dict[str, list[float]]]) -> StudyResult:
    """A study of the task `click` from AUC by variant and slice, one value a seed."""
    trials = {
        variant: {
            seed: trial_metrics(
                {
                    "click": TaskMetrics(
                        num_rows=100,
                        num_positives=50,
                        auc=0.7,
                        slices={
                            name: SliceMetrics(
                                num_rows=ROWS[name], num_positives=1, auc=values[seed]
                            )
                            for name, values in slices.items()
                        },
                    )
                }
            )
            for seed in range(2)
        }
        for variant, slices in auc.items()
    }
    first = next(iter(trials))
    return StudyResult(
        recipe="r",
        date="2024-01-01",
        seeds=(0, 1),
        variants={name: estimates(by_seed) for name, by_seed in trials.items()},
        paired={n: differences(by, trials[first]) for n, by in trials.items() if n != first},
        overrides=dict.fromkeys(trials, ()),
    )


def test_figures_of_fewer_seeds_say_how_many(tmp_path: Path) -> None:
    """A seed of the first variant failed: comparisons lose it, the other's mean does not."""
    auc = {
        "first": {0: 0.5, 2: 0.7},
        "whole": {0: 0.6, 1: 0.1, 2: 0.8},
        "half": {1: 0.4, 2: 0.9},
    }
    trials = {name: {s: {"click.auc": v} for s, v in by.items()} for name, by in auc.items()}
    result = StudyResult(
        recipe="r",
        date="2024-01-01",
        seeds=(0, 1, 2),
        variants={name: estimates(by) for name, by in trials.items()},
        paired={n: differences(trials[n], trials["first"]) for n in ("whole", "half")},
        overrides=dict.fromkeys(trials, ()),
        failed={"first/seed-1": "gone", "half/seed-0": "gone"},
    )

    table = study_table(result, ["click.auc"])
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    rows = [line.split() for line in captured.get().splitlines()]
    shown = {name: row for row in rows for name in auc if name in row[:2]}

    assert shown["first"][-1] == "(n=2)"
    whole = shown["whole"]
    assert whole[whole.index("whole") + 1] == "0.5000"  # of three seeds
    assert whole[-1] == "(n=2)"
    assert whole.count("(n=2)") == 1
    assert shown["half"][-2:] == ["+0.2000", "(n=1)"]  # 0.9 - 0.7
    assert "n: seeds that have the figure" in " ".join(str(table.title).split())
    page = write_study_report(result, ["click.auc"], tmp_path).read_text()
    assert "+0.2000 (n=1)" in page
    assert "n: seeds that have the figure" in page


def test_a_metric_that_a_seed_lacks_is_of_the_others() -> None:
    """One seed's cold films were all liked: the metric was gone from the whole study."""
    auc = {
        "first": {0: {"like.auc": 0.5, "like.cold.auc": 0.5}, 1: {"like.auc": 0.7}},
        "other": {
            0: {"like.auc": 0.6, "like.cold.auc": 0.7},
            1: {"like.auc": 0.9, "like.cold.auc": 0.2},
        },
        "third": {0: {"like.auc": 0.6}, 1: {"like.auc": 0.6, "like.cold.auc": 0.4}},
    }

    cold = {name: estimates(trials)["like.cold.auc"] for name, trials in auc.items()}
    gains = {name: differences(trials, auc["first"]) for name, trials in auc.items()}

    assert {name: (part.seeds, part.values) for name, part in cold.items()} == {
        "first": ((0,), (0.5,)),
        "other": ((0, 1), (0.7, 0.2)),
        "third": ((1,), (0.4,)),
    }
    assert (cold["other"].mean, cold["first"].ci95) == (pytest.approx(0.45), None)
    gain = gains["other"]["like.cold.auc"]
    assert (gain.seeds, gain.diff, gain.ci95) == ((0,), pytest.approx(0.2), None)
    assert "like.cold.auc" not in gains["third"], "no seed has both"
    whole = gains["other"]["like.auc"]
    assert (whole.seeds, whole.diff) == ((0, 1), pytest.approx((0.1 + 0.2) / 2))
    result = StudyResult(
        recipe="r",
        date="2024-01-01",
        seeds=(0, 1),
        variants={name: estimates(trials) for name, trials in auc.items()},
        paired={name: gains[name] for name in ("other", "third")},
        overrides=dict.fromkeys(auc, ()),
    )
    recipe = load_recipe("demo", [])
    assert shown_metrics(recipe, result, ["like.cold.auc"]) == ["like.cold.auc"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(study_table(result, ["like.cold.auc"]))
    assert "0.5000 (n=1)" in captured.get()
    assert "+0.2000 (n=1)" in captured.get()
    assert "n: seeds that have the figure" in " ".join(captured.get().split())
    with pytest.raises(UserError, match=r"--metric like.rare.auc: no trial that finished has it"):
        shown_metrics(recipe, result, ["like.rare.auc"])


ROWS = {"cold": 30, "popular": 1200}
GAINS = {
    "ids": {"cold": [0.50, 0.52], "popular": [0.80, 0.81]},
    "codes": {"cold": [0.60, 0.6202], "popular": [0.79, 0.83]},
}


def test_gains_are_shown_by_slice_with_paired_differences() -> None:
    (table,) = slice_tables(result_of(GAINS))

    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    lines = [line.split() for line in captured.get().splitlines() if line.strip()]
    assert lines[0] == ["click:", "AUC", "by", "slice"]
    cells = {(line[0], line[1]): line for line in lines if line[0] in ROWS}
    assert cells["cold", "ids"][2:4] == ["30", "0.5100"]
    assert cells["popular", "ids"][2:4] == ["1,200", "0.8050"]
    # Seed by seed +0.1000 and +0.1002, then -0.01 and +0.02; t with 1 degree of freedom: 12.706205.
    codes = [line[-3:] for line in lines if line[0] == "codes"]
    assert codes == [["+0.1001", "+-", "0.0013"], ["+0.0050", "+-", "0.1906"]]


def test_several_metrics_with_their_intervals_fit_eighty_columns() -> None:
    result = result_of({"ids": GAINS["ids"], "vq+rq+crosses-unaligned": GAINS["codes"]})

    console = Console(width=80)
    with console.capture() as captured:
        console.print(study_table(result, ["click.cold.auc", "click.popular.auc"]))
    text = captured.get()
    assert "0.5100 +- 0.1271" in text
    assert "0.6101 +- 0.1283  +0.1001 +- 0.0013" in text
    assert "0.8100 +- 0.2541  +0.0050 +- 0.1906" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_the_page_of_a_study_has_the_slices_too(tmp_path: Path) -> None:
    page = write_study_report(result_of(GAINS), ["click.auc"], tmp_path).read_text()

    assert "<h2>click: AUC by slice</h2>" in page
    assert "popular (1,200)" in page
    assert re.search(r'class="n good">\+0\.1001 \+- 0\.0013<', page)
    assert re.search(r'class="n soft">\+0\.0050 \+- 0\.1906<', page)


def test_tables_and_page_say_how_many_marks_chance_would_make(tmp_path: Path) -> None:
    """Dozens of intervals of 95% were marked better or worse, as if each stood alone."""
    result = result_of({**GAINS, "more": GAINS["codes"]})
    tables = [study_table(result, ["click.auc"]), *slice_tables(result)]
    expected = "not corrected for their number: were all variants equal, {} of them would be marked"

    # Two variants beside the first, of one metric and of two slices: 2, 4 and 6 comparisons.
    captions = [str(table.caption) for table in tables]
    assert captions[0].startswith("2 comparisons, " + expected.format("0.1"))
    assert captions[1].startswith("4 comparisons, " + expected.format("0.2"))
    page = write_study_report(result, ["click.auc"], tmp_path).read_text()
    assert "On this page: 6 comparisons, " + expected.format("0.3") in page


def test_times_and_single_seeds_are_no_comparisons() -> None:
    result = result_of(GAINS)
    assert chance_note(result, ["trial.seconds"]) == ""
    alone = {
        name: difference.model_copy(update={"ci95": None})
        for name, difference in result.paired["codes"].items()
    }
    one_seed = result.model_copy(update={"paired": {"codes": alone}})
    assert chance_note(one_seed, ["click.auc"]) == ""
    assert chance_note(result, ["click.auc", "trial.seconds"]).startswith("1 comparison, ")


def test_only_metrics_with_a_better_side_are_coloured_and_times_do_not_stand_out(
    tmp_path: Path,
) -> None:
    found = {
        "click.new_users.auc": ([0.50, 0.51], [0.60, 0.6101]),
        "click.logloss": ([0.50, 0.51], [0.60, 0.6101]),
        "click.calibration": ([0.50, 0.51], [0.60, 0.6101]),
        "trial.seconds": ([50.0, 51.0], [60.0, 61.01]),
    }
    trials = [
        {seed: {name: values[side][seed] for name, values in found.items()} for seed in (0, 1)}
        for side in (0, 1)
    ]
    result = result_of(GAINS).model_copy(
        update={
            "variants": {n: estimates(t) for n, t in zip(("ids", "codes"), trials, strict=True)},
            "paired": {"codes": differences(trials[1], trials[0])},
        }
    )
    assert all(difference.excludes_zero for difference in result.paired["codes"].values())

    page = write_study_report(result, list(found), tmp_path).read_text()
    tones = re.findall(r'class="(n[a-z ]*)">\+', page)
    assert tones[:4] == ["n good", "n bad", "n", "n soft"]
    table = study_table(result, list(found))
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(table)
    assert len(re.findall(r"\x1b\[1m\+", captured.get())) == 3
    assert "over seeds, given these evaluation days" in str(table.title)


def test_a_slice_that_no_trial_can_measure_is_left_out() -> None:
    assert slice_metrics(result_of({"ids": {}, "codes": {}})) == {}
    assert slice_tables(result_of({"ids": {}, "codes": {}})) == []


def test_items_are_cold_rare_popular_or_in_between() -> None:
    """Events up to the date: items 0 .. 9 have 0 .. 9 of them, item 10 is not known at all."""
    ids = np.arange(10)
    config = EvaluationConfig(rare_max_events=2, popular_share=0.3)
    slices = Slices(ids, ids, np.array([5]), config)

    found = slices.masks(np.arange(11), np.array([5] * 10 + [6]))

    where = {name: np.flatnonzero(mask).tolist() for name, mask in found.items()}
    assert where == {
        "cold": [0, 10],
        "rare": [1, 2],
        "middle": [3, 4, 5, 6],
        "popular": [7, 8, 9],
        "new_users": [10],
    }
