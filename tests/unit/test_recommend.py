"""The proposals: valid for every question, and what the rules say."""

from __future__ import annotations

import itertools
import tomllib

import pytest

from compressor.config import validate
from compressor.errors import ConfigError
from compressor.recipe import DistilStage, Recipe
from compressor.recommend import Facts, facts_of, recommend

HERE = ("this-machine",)


def distil(facts: Facts) -> DistilStage:
    return next(stage for stage in recommend(facts).recipe.stage if isinstance(stage, DistilStage))


def test_every_proposal_is_a_valid_recipe_with_reasons() -> None:
    tasks = ("image-classification", "text-classification", "sentence-embedding")
    for task, classes, labelled, unlabelled, teacher in itertools.product(
        tasks, (2, 10, 1000), (0, 500, 5000, 100_000), (0, 2000, 500_000), ("cnn", "transformer", "onnx")
    ):
        if labelled + unlabelled == 0:
            continue
        found = recommend(facts_of(task, classes, labelled, unlabelled, teacher, HERE))
        assert validate(Recipe, tomllib.loads(found.text), "text") == found.recipe
        assert len(found.reasons) >= (2 if teacher == "onnx" else 3)


def test_few_classes_get_a_low_temperature_and_short_data_more_teacher() -> None:
    digits = distil(facts_of("image-classification", 10, 10_000, 0, "cnn", HERE))
    assert digits.objective[0].options["temperature"] == 1.0
    short = distil(facts_of("image-classification", 10, 500, 0, "cnn", HERE))
    assert short.objective[0].weight > digits.objective[0].weight
    assert short.labels < digits.labels
    many = distil(facts_of("image-classification", 1000, 100_000, 0, "cnn", HERE))
    assert many.objective[0].options["temperature"] == 2.0


def test_much_unlabelled_data_needs_no_labels() -> None:
    found = distil(facts_of("image-classification", 10, 1000, 20_000, "cnn", HERE))
    assert (found.objective[0].use, found.labels) == ("symmetric-kl", 0.0)


def test_few_labels_and_few_classes_have_their_methods() -> None:
    assert distil(facts_of("image-classification", 10, 900, 1500, "cnn", HERE)).objective[0].use == "dual-head"
    two = facts_of("image-classification", 2, 8000, 0, "cnn", HERE)
    assert (distil(two).objective[0].use, distil(two).labels) == ("kd", 0.5)  # it beat lelp, which stays worth a run
    assert any(line.startswith("lelp") for line in recommend(two).alternatives)
    agnostic = distil(facts_of("generic", 0, 0, 8000, "transformer", HERE))
    assert agnostic.objective[0].use == "minilm-relations"


def test_encoders_get_shorter_vectors_and_pairs_are_used_where_there_are_some() -> None:
    search = distil(facts_of("retrieval", 0, 4000, 0, "transformer", HERE, 6))
    assert [item.use for item in search.objective] == ["homomorphic-projection", "similarity", "similarity"]
    assert search.objective[2].options["pairs"]
    assert search.labels == 0.1
    alike = distil(facts_of("sentence-embedding", 0, 0, 4000, "transformer", HERE, 6))
    assert [item.use for item in alike.objective] == ["homomorphic-projection", "similarity"]
    assert alike.labels == 0.0


def test_a_file_is_only_quantized() -> None:
    found = recommend(facts_of("image-classification", 10, 100, 0, "onnx", HERE))
    assert [stage.kind for stage in found.recipe.stage] == ["quantize"]


@pytest.mark.parametrize(
    ("words", "key"),
    [(("image", 10, 5, 0, "cnn"), "task"), (("image-classification", 10, 5, 0, "cn"), "teacher"),
     (("image-classification", 1, 5, 0, "cnn"), "classes"), (("image-classification", 10, 0, 0, "cnn"), "labelled")],
)  # fmt: skip
def test_a_wrong_question_is_refused(words, key) -> None:
    with pytest.raises(ConfigError) as caught:
        facts_of(*words, HERE)
    assert caught.value.problems[0].where == key


def test_a_transformer_of_known_depth_loses_half_of_its_layers() -> None:
    found = recommend(facts_of("text-classification", 2, 7172, 13_239, "transformer", HERE, 6))
    assert [stage.kind for stage in found.recipe.stage] == ["student", "distil", "quantize"]
    assert "13,239 unlabelled" in " ".join(found.reasons)
    assert "unlabelled" not in " ".join(
        recommend(facts_of("text-classification", 2, 7172, 0, "transformer", HERE, 6)).reasons
    )
    with pytest.raises(ConfigError, match="belongs to a transformer"):
        facts_of("image-classification", 10, 500, 0, "cnn", HERE, 6)


def test_the_proven_recipe_is_the_recommended_one() -> None:
    from pathlib import Path

    from compressor.recipe import load_recipe

    proven = load_recipe(Path(__file__).parents[2] / "recipes" / "movie-reviews-3-layers.toml")
    found = recommend(facts_of("text-classification", 2, 7172, 13_239, "transformer", HERE, 6)).recipe
    ours = proven.model_dump(exclude={"name", "data"}) | {"teacher": proven.teacher.model_dump(exclude={"model"})}
    assert ours == found.model_dump(exclude={"name", "data"}) | {"teacher": found.teacher.model_dump(exclude={"model"})}
