"""The recipe: what it refuses, and what its fingerprints depend on."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from distill_ray.config import Recipe, fingerprint, identity_of, kind_of, load_recipe, parse_recipe
from distill_ray.config.recipe import iso_week
from distill_ray.config.values import Range
from distill_ray.errors import UserError

REPO = Path(__file__).parents[2]


def minimal(**changes: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "demo",
        "storage": {"root": "s3://bucket/root"},
        "corpus": {"sources": ["s3://bucket/data/*.parquet"]},
        "teacher": {"model": "s3://bucket/teacher"},
        "student": {"model": "s3://bucket/student"},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return base


def sections(model: type[BaseModel]) -> list[tuple[type[BaseModel], str]]:
    """Every leaf field of a model, nested models included."""
    leaves: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        nested = [
            t
            for t in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(t, type) and issubclass(t, BaseModel)
        ]
        for inner in nested:
            leaves += sections(inner)
        if not nested or kind_of(model, name):
            leaves.append((model, name))
    return leaves


def test_every_field_states_its_kind_and_carries_a_docstring():
    leaves = sections(Recipe)
    assert len(leaves) > 50
    assert [f"{m.__name__}.{n}" for m, n in leaves if kind_of(m, n) is None] == []
    assert [f"{m.__name__}.{n}" for m, n in leaves if not m.model_fields[n].description] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"capture": {"topk": 3}}, "capture.topk: unknown key"),
        ({"capture": {"top_k": "many"}}, "capture.top_k: Input should be a valid integer"),
        ({"capture": {"top_k": 0}}, "capture.top_k: Input should be greater than or equal to 1"),
        ({"capture": {"temperatures": [0.01]}}, "temperature 0.01 is outside"),
        ({"loss": {"temperature": 2.0}}, "loss.temperature=2.0 was not captured"),
        ({"corpus": {"window_tokens": 8192}}, "train.pack_tokens=4096 is less than corpus.window_tokens=8192"),
        ({"corpus": {"window_tokens": 8, "window_overlap": 8}}, "window_overlap=8 must be less than window_tokens=8"),
        ({"train": {"global_batch_tokens": 5000}}, "not a multiple of pack_tokens=4096; use 4096"),
        ({"train": {"workers": {"min": 3, "max": 2}}}, "min=3 is greater than max=2"),
        ({"student": {"teacher_layers": [1]}}, "state exactly one of model, teacher_layers, config"),
        ({"train": {"workers": {"min": 0, "max": 8}}}, "train.workers: min=0: training needs at least one worker"),
        (
            {"train": {"workers": {"min": 1, "max": 65}}},
            "workers.max=65 exceeds the 64 pack(s) of a global batch: some workers would never have one; use workers.",
        ),
        ({"train": {"loss_spike": 0.9}}, "train.loss_spike: 0.9 times the median is met by every second step; use"),
        (
            {"train": {"loss_spike": 3.0}, "loss": {"hard_label_points": [(0.5, 0.0), (0.6, 1.0)]}},
            "train.loss_spike=3.0 compares a step's loss with those of earlier steps, and loss.hard_label_points",
        ),
        (
            {"train": {"loss_spike": 3.0}, "loss": {"objective": "truncated"}},
            'loss.objective="truncated" falls below 0, where no multiple is a bound',
        ),
        ({"train": {"on_bad_loss": "ignore"}}, "train.on_bad_loss: Input should be 'stop' or 'skip'"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate"),
        ({"capture": {"top_k": "16"}}, "capture.top_k: Input should be a valid integer (got '16')"),
        ({"capture": {"top_k": 16.0}}, "capture.top_k: Input should be a valid integer (got 16.0)"),
        ({"capture": {"top_k": True}}, "capture.top_k: Input should be a valid integer (got True)"),
        ({"capture": {"temperatures": ["1.0"]}}, "capture.temperatures.0: Input should be a valid number"),
        ({"teacher": {"use_gpu": "false"}}, "teacher.use_gpu: Input should be a valid boolean (got 'false')"),
        ({"teacher": {"use_gpu": 1}}, "teacher.use_gpu: Input should be a valid boolean"),
        ({"train": {"use_gpu": "yes"}}, "train.use_gpu: Input should be a valid boolean (got 'yes')"),
        ({"train": {"seed": True}}, "train.seed: Input should be a valid integer (got True)"),
        ({"train": {"learning_rate": "1e-3"}}, "train.learning_rate: Input should be a valid number"),
        ({"train": {"zero_stage": True}}, "train.zero_stage: Input should be a valid integer"),
        (
            {"train": {"decay_fraction": 0.5}},
            'decay_fraction=0.5 has no effect on schedule = "cosine"; remove it or use "wsd"',
        ),
        (
            {"train": {"schedule": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.5}},
            "warmup_fraction=0.6 and decay_fraction=0.5 are more than all steps; lower one of them",
        ),
        ({"student": {"lora": {}, "freeze": ["x"]}}, "freeze has nothing to keep"),
        ({"train": {"zero_stage": 4}}, "train.zero_stage: Input should be less than or equal to 3"),
        ({"train": {"workers": {"max": "2"}}}, "train.workers.max: Input should be a valid integer"),
        ({"student": {"teacher_layers": ["0"]}}, "student.teacher_layers.0: Input should be a valid integer"),
        ({"corpus": {"sources": "a.jsonl"}}, "corpus.sources: Input should be a list"),
        ({"corpus": {"sources": [1]}}, "corpus.sources.0: Input should be a valid string"),
        ({"corpus": {"text_column": 5}}, "corpus.text_column: Input should be a valid string"),
        ({"evaluate": {"require": {"kl_t1": "0.1"}}}, "evaluate.require.kl_t1: Input should be a valid number"),
        ({"audit": {"sequences": -1}}, "audit.sequences: Input should be greater than or equal to 0"),
        (
            {"audit": {"engine": "transformers"}, "teacher": {"quantization": "fp8"}},
            "audit.engine=\"transformers\" cannot load teacher.quantization='fp8'",
        ),
        ({"loss": {"objective": "kl"}}, "loss.objective: Input should be 'bucket', 'truncated'"),
        ({"loss": {"skew": 0.2}}, 'skew=0.2 has no effect on objective = "bucket"; remove it or use "skewed_kl"'),
        (
            {"loss": {"objective": "skewed_kl", "jsd_beta": 0.9}},
            'jsd_beta=0.9 has no effect on objective = "skewed_kl"',
        ),
        ({"loss": {"objective": "jsd", "jsd_beta": 1.0}}, "loss.jsd_beta: Input should be less than 1"),
        (
            {"loss": {"objective": "sampled"}},
            "needs tokens drawn from the teacher's whole distribution in the teacher's process, but capture.draws=0 "
            'and capture.draws_from="all"; set capture.draws = 50 and capture.draws_from = "all", or',
        ),
        (
            {"loss": {"objective": "head_tail"}, "capture": {"draws": 20}},
            "needs tokens drawn from outside its top 64 in the teacher's process, but capture.draws=20 and "
            'capture.draws_from="all"; set capture.draws = 20 and capture.draws_from = "tail", or',
        ),
        (
            {"loss": {"objective": "sampled"}, "capture": {"draws": 20, "draws_from": "tail"}},
            'capture.draws_from="tail"; set capture.draws = 20 and capture.draws_from = "all", or',
        ),
        (
            {
                "loss": {"objective": "sampled", "temperature": 2.0},
                "capture": {"draws": 20, "temperatures": [2.0]},
            },
            "loss.temperature=2.0, but tokens are drawn at capture.draws_temperature=1.0",
        ),
        (
            {"capture": {"draws": 20, "draws_temperature": 3.0}},
            "draws_temperature=3.0 is not one of temperatures=[1.0]: log p at T needs that normaliser; add 3.0",
        ),
        (
            {"capture": {"draws_from": "tail"}},
            'draws_from="tail" and draws_temperature=1.0 have no effect with draws=0',
        ),
        ({"capture": {"draws": 4096}}, "capture.draws: Input should be less than or equal to 4095"),
        ({"capture": {"draws": 5, "draws_from": "top"}}, "capture.draws_from: Input should be 'all' or 'tail'"),
        ({"loss": {"objective": "sampled", "temperature_steps": [[0.5, 2.0]]}}, "draws tokens at one temperature"),
        ({"loss": {"temperature_steps": [[0.5, 3.0]]}}, "loss.temperature=3.0 was not captured"),
        ({"loss": {"temperature_steps": [[0.5, 1.0], [0.5, 1.0]]}}, "temperature_steps stands at shares [0.5, 0.5]"),
        ({"loss": {"hard_label_points": [[0.0, 0.3]]}}, "hard_label_points stands at shares [0.0]"),
    ],
)
def test_refuses_with_a_message_that_names_the_key(changes: dict[str, Any], expected: str):
    with pytest.raises(UserError, match="problem") as caught:
        parse_recipe(minimal(**changes))
    assert expected in str(caught.value)


def test_whole_numbers_are_floats_and_lists_are_tuples():
    recipe = parse_recipe(
        minimal(
            loss={"temperature": 1},
            train={"learning_rate": 1, "betas": [0, 0.9]},
            evaluate={"require": {"kl_t1": 1}},
        )
    )
    assert recipe.train.betas == (0.0, 0.9)
    assert isinstance(recipe.train.learning_rate, float)
    assert recipe.corpus.sources == ("s3://bucket/data/*.parquet",)
    layers = {**minimal(), "student": {"teacher_layers": [3, 1]}}
    assert parse_recipe(layers).student.teacher_layers == (3, 1)


@pytest.mark.parametrize("root", [None, "s3://bucket/other"])
def test_a_section_that_is_no_table(root: str | None):
    with pytest.raises(UserError, match="storage: Input should be a table"):
        parse_recipe({**minimal(), "storage": 5}, root=root)


def test_reports_every_problem_at_once():
    with pytest.raises(UserError) as caught:
        parse_recipe({"name": "Bad Name", "storage": {}, "typo": 1})
    for part in ("name", "storage.root", "corpus", "teacher", "student", "typo: unknown key"):
        assert part in str(caught.value)


def test_changes_are_values_as_toml_has_them_and_part_of_the_identity(tmp_path: Path):
    path = REPO / "jobs" / "recipes" / "quickstart.cpu.toml"
    plain = load_recipe(path)
    changes = [
        "train.epochs = 7",
        "corpus.format=text",
        'train.mix={"a/*" = 2.0}',
        "teacher.replicas.max=5",
        "version=7a",
    ]
    found = load_recipe(path, changes=changes)
    assert (found.train.epochs, found.corpus.format, found.version) == (7, "text", "7a")
    assert (list(found.train.mix.values()), found.teacher.replicas.max) == ([2.0], 5)
    assert fingerprint(identity_of(found.train)) != fingerprint(identity_of(plain.train))
    assert load_recipe(path, changes=["storage.root=/a", "train.epochs=1"], root="/b").storage.root == "/b"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.epochs", "--set 'train.epochs': write section.key=value"),
        ("=3", "--set '=3': write section.key=value"),
        ("train..epochs=3", "write section.key=value"),
        ("train.epochs=", "write section.key=value"),
        ("name.short=x", "--set 'name.short=x': name is a value of the recipe, not a section"),
        ("train.epochs=three", "train.epochs: Input should be a valid integer (got 'three')"),
        ("train.epochs=3\nmax_steps=4", "train.epochs: Input should be a valid integer"),
        ("train.epoch=3", "train.epoch: unknown key"),
        ("trian.epochs=3", "trian: unknown key"),
    ],
)
def test_a_change_that_is_none_is_named(change: str, says: str):
    with pytest.raises(UserError) as caught:
        load_recipe(REPO / "jobs" / "recipes" / "quickstart.cpu.toml", changes=[change])
    assert says in str(caught.value)


def test_missing_and_malformed_files(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(broken)


@given(st.randoms(use_true_random=False))
def test_fingerprint_ignores_key_order(random: Any):
    identity = identity_of(parse_recipe(minimal()))
    items = list(identity.items())
    random.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(identity)


def test_prices_leave_no_trace_in_an_identity():
    # Recipes' fingerprints from before there were prices still stand.
    assert "cost" not in identity_of(parse_recipe(minimal(cost={"teacher_gpu_hour": 2.5})))


def test_fingerprint_ignores_placement_and_stated_defaults_but_not_identity():
    plain = fingerprint(identity_of(parse_recipe(minimal())))
    same = [
        {"storage": {"root": "elsewhere"}},
        {"teacher": {"tensor_parallel": 4, "replicas": {"min": 0, "max": 9}}},
        {"train": {"zero_stage": 3, "workers": {"min": 8, "max": 8}}},
        {"train": {"workers": {"min": 1, "max": 8}, "settle_s": 1.0, "max_preemption_failures": 2, "keep_every": 3}},
        {"train": {"on_bad_loss": "stop", "loss_spike": 0.0}},
        {"capture": {"top_k": 64}},
        {"corpus": {"sources": ["other.jsonl"]}},
        {"audit": {"sequences": 0, "units": ["a"], "engine": "transformers"}},
        {"cost": {"teacher_gpu_hour": 2.5, "student_gpu_hour": 2.0}},
    ]
    for change in same:
        assert fingerprint(identity_of(parse_recipe(minimal(**change)))) == plain, change
    other = [
        {"capture": {"top_k": 65}},
        {"teacher": {"revision": "abc"}},
        {"train": {"seed": 1}},
        {"train": {"on_bad_loss": "skip"}},
        {"train": {"loss_spike": 3.0}},
        {"loss": {"hard_label_weight": 0.2}},
        {"corpus": {"window_tokens": 1024}},
    ]
    seen = {fingerprint(identity_of(parse_recipe(minimal(**change)))) for change in other}
    assert len(seen) == len(other)
    assert plain not in seen


def test_draws_are_identity_and_a_recipe_without_any_keeps_its_fingerprint():
    plain = identity_of(parse_recipe(minimal()))
    assert plain["capture"] == {"top_k": 64, "temperatures": (1.0,)}  # as before there were draws
    stated = minimal(capture={"draws": 0, "draws_from": "all", "draws_temperature": 1.0})
    assert fingerprint(identity_of(parse_recipe(stated))) == fingerprint(plain)
    changes = [
        {"draws": 50},
        {"draws": 51},
        {"draws": 50, "draws_from": "tail"},
        {"draws": 50, "draws_temperature": 2.0, "temperatures": [2.0]},
        {"temperatures": [2.0]},
    ]
    seen = {fingerprint(identity_of(parse_recipe(minimal(capture=c)))) for c in changes}
    assert len({*seen, fingerprint(plain)}) == 6


@pytest.mark.parametrize(("objective", "draws_from"), [("sampled", "all"), ("head_tail", "tail"), ("bucket", "tail")])
def test_objectives_on_draws_that_are_captured(objective: str, draws_from: str):
    capture = {"draws": 12, "draws_from": draws_from, "draws_temperature": 2.0, "temperatures": [2.0]}
    recipe = parse_recipe(minimal(capture=capture, loss={"objective": objective, "temperature": 2.0}))
    assert recipe.loss.needs_draws == (objective != "bucket")


def test_temperatures_are_a_sorted_set_with_one():
    recipe = parse_recipe(minimal(capture={"temperatures": [4, 0.5, 4]}, teacher={"engine": "transformers"}))
    assert recipe.capture.temperatures == (0.5, 1.0, 4.0)
    assert recipe.capture.extra_temperatures == (0.5, 4.0)


def test_local_paths_become_absolute_and_s3_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(minimal(storage={"root": "here"}))
    assert recipe.storage.root == str(tmp_path / "here")
    assert recipe.teacher.model == "s3://bucket/teacher"


def test_iso_week_is_the_default_version():
    assert iso_week(dt.date(2026, 11, 22)) == "2026-W47"
    assert parse_recipe(minimal()).version == iso_week()
    assert parse_recipe(minimal(), version="v7").version == "v7"


def test_range_is_a_section():
    assert Range(min=0, max=3).max == 3


@pytest.mark.parametrize("path", sorted((REPO / "jobs" / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_recipe_parses_and_is_short(path: Path):
    load_recipe(path)
    assert len(path.read_text().splitlines()) <= 60


def test_schedules_of_the_loss():
    loss = parse_recipe(
        minimal(
            loss={
                "temperature": 4.0,
                "temperature_steps": [[0.5, 2.0], [0.8, 1.0]],
                "hard_label_weight": 0.1,
                "hard_label_points": [[0.5, 0.3], [1.0, 0.2]],
            },
            capture={"temperatures": [2.0, 4.0]},
            teacher={"engine": "transformers"},
        )
    ).loss
    assert loss.temperatures == (1.0, 2.0, 4.0)
    assert [loss.temperature_at(step, 10) for step in range(10)] == [4.0] * 5 + [2.0] * 3 + [1.0] * 2
    weights = [loss.hard_label_weight_at(step, 10) for step in range(10)]
    assert weights == pytest.approx([0.1, 0.14, 0.18, 0.22, 0.26, 0.3, 0.28, 0.26, 0.24, 0.22])
    constant = parse_recipe(minimal()).loss
    assert {constant.hard_label_weight_at(step, 7) for step in range(7)} == {0.1}
    assert {constant.temperature_at(step, 7) for step in range(7)} == {1.0}
