"""Every combination of quantization rules that a profile states, through the real compiler of its target; and files
that break a rule, to show that the lint tells the truth."""

from __future__ import annotations

import pytest

from compressor.models.onnx_graph import read_model
from compressor.profile import load_profile
from compressor.quantize.checks.lint import lint
from targets import registry
from targets.base import Missing
from tools.generate_targets import attempt
from tools.operator_groups import NETS
from tools.target_rules import (
    FLOATS,
    LEAVES,
    REFUSES,
    breaks,
    broken,
    combinations,
    consequence,
    emitted,
)

COMBINATIONS = combinations()
WEIGHTED = {"cnn": 6, "transformer": 7}  # layers with weights
TRUTH = {
    ("coreml", "16-bit activations"): REFUSES,
    ("coreml", "quantized at run time"): FLOATS,
    ("ethos-u", "16-bit activations"): REFUSES,
    ("ethos-u", "quantized at run time"): LEAVES,
    ("litert", "16-bit activations"): REFUSES,
    ("numpy-reference", "16-bit activations"): REFUSES,
    ("onnxruntime-cpu", "16-bit activations"): FLOATS,
    ("openvino", "16-bit activations"): FLOATS,
    ("openvino", "uint8 weights"): FLOATS,
    ("qnn", "opset 17"): LEAVES,
    ("qnn", "quantized at run time"): LEAVES,
    ("tensorrt", "16-bit activations"): REFUSES,
    ("tensorrt", "asymmetric activations"): REFUSES,
    ("tensorrt", "int32 bias pairs"): REFUSES,
    ("tensorrt", "quantized at run time"): REFUSES,
    ("tensorrt", "stored scalars"): REFUSES,
    ("tensorrt", "uint8 activations"): REFUSES,
    ("tensorrt", "uint8 weights"): REFUSES,
    ("tflite-micro", "16-bit activations"): REFUSES,
    ("tflite-micro", "quantized at run time"): FLOATS,
    ("web", "16-bit activations"): FLOATS,
}
BROKEN = [
    (combination, case)
    for combination in COMBINATIONS
    for case in breaks(combination.rules)
    if (combination.target, case.name) in TRUTH
]


def here(target: str) -> None:
    state = registry.probe(target)
    if isinstance(state, Missing):
        pytest.skip(f"{target} is missing: {state.reason}")


def test_every_rule_of_the_table_is_broken_by_some_file():
    assert {(combination.target, case.name) for combination, case in BROKEN} == set(TRUTH)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_what_is_made_by_the_rules_passes_the_lint_and_the_compiler(combination, net, tmp_path):
    artifact = emitted(net, combination.rules, tmp_path)
    assert lint(read_model(artifact.path), combination.rules) == ()
    here(combination.target)
    backend, profile = registry.get(combination.target), load_profile(combination.profile)
    cell = attempt(backend, profile, net, artifact, tmp_path / "out")
    assert cell.word in ("compiled", "simulated", "measured"), cell.note


@pytest.mark.parametrize(("combination", "case"), BROKEN, ids=lambda item: getattr(item, "name", str(item)))
def test_what_the_lint_refuses_by_name_the_compiler_does_not_take(combination, case, tmp_path):
    artifact, said = broken(case, combination.rules, tmp_path)
    assert said, "the lint lets it pass"
    assert {problem.where.strip("`") for problem in said} <= {
        node.name for node in read_model(artifact.path).graph.node
    }
    here(combination.target)
    profile = load_profile(combination.profile)
    found, words = consequence(combination.target, artifact, said, profile, WEIGHTED[case.net], tmp_path / "out")
    assert found == TRUTH[combination.target, case.name], words
