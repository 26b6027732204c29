"""What would fail at the first step is found by the plan."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.distil.fit import fit_problems, warnings  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil.toy import Sentences, bundle, convnet, transformer  # noqa: E402

pytestmark = pytest.mark.train


def problems(task="image-classification", module=None, data=None, processes=1, **settings):
    stage = DistilStage.model_validate({"kind": "distil", **settings})
    data = data or bundle()
    example = {name: torch.from_numpy(array) for name, array in data.splits["train"].batch(np.arange(2)).items()}
    module = module or convnet(3, 5)
    found = fit_problems(
        stage, "stage.1.distil", task=task, module=module, example=example, data=data, processes=processes
    )
    return {problem.where.removeprefix("stage.1.distil."): problem.what for problem in found}


def test_a_stage_that_fits_has_no_problems():
    assert problems(accumulate=2, checkpoint_activations=True, strategy=[{"use": "mixup"}]) == {}


def test_probabilities_of_embeddings_are_refused():
    found = problems(
        "sentence-embedding", objective=[{"use": "cosine"}, {"use": "kd"}], strategy=[{"use": "filter", "keep": 0.5}]
    )
    assert set(found) == {"objective.1.use", "strategy.0.use"}
    assert "use `cosine`" in found["objective.1.use"]


def test_labels_beyond_the_classes_are_found():
    data = bundle()
    data.splits["train"].labels = data.splits["train"].labels + 3
    found = problems(data=data)
    assert found["labels"] == "the labels of train go up to 6, the model has 4 classes"


def test_what_cannot_be_cut_blended_or_computed_again():
    text = bundle(Sentences)
    assert (
        "token numbers"
        in problems("text-classification", transformer(2, 1), text, strategy=[{"use": "mixup"}])["strategy"]
    )
    assert "cached" in problems(strategy=[{"use": "mixup"}], cache="on")["cache"]
    assert "one process" in problems(rollouts={"fraction": 0.5}, processes=2)["rollouts"]
    assert "more than one `select`" in problems(strategy=[{"use": "select"}, {"use": "select"}])["strategy"]


class Flat(torch.nn.Module):
    """One layer, nothing to compute again."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(144, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(image.flatten(1))


def test_a_net_without_blocks_cannot_checkpoint_its_activations():
    assert "neither a list" in problems(module=Flat(), checkpoint_activations=True)["checkpoint_activations"]


def test_a_stage_on_transfer_needs_transfer_data():
    stage = DistilStage.model_validate({"kind": "distil", "data": "transfer"})
    data = bundle()
    example = {name: torch.from_numpy(a) for name, a in data.splits["train"].batch(np.arange(2)).items()}
    (found,) = fit_problems(stage, "s", task="image-classification", module=convnet(3, 5), example=example, data=data)
    assert found.where == "s.data"


def test_batch_norm_in_pieces_is_a_warning():
    stage = DistilStage(kind="distil", batch=64, accumulate=4)
    assert "pieces of 16 samples" in warnings(stage, convnet(3, 5))[0]
    assert warnings(stage, transformer(2, 1)) == ()
