"""A teacher with a tokenizer of its own: blocks of one text, aligned by bytes, and training from files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from compressor.cli.session import Request, Session, open_session  # noqa: E402
from compressor.data.alignment import AlignedSplit  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.objectives.base import Batch  # noqa: E402
from compressor.distil.objectives.crossvocab import common_chunks, without_first  # noqa: E402
from compressor.errors import PlanError  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402

pytestmark = pytest.mark.train
RECIPE = """
[teacher]
model = "{folder}/letters"
[[teacher.more]]
name = "big"
model = "{folder}/pieces"
[data]
source = "{folder}/t.txt"
max_length = 24
validation = 6
calibration = 4
[[stage]]
kind = "student"
keep_layers = 1
[[stage]]
kind = "distil"
epochs = 2
batch = 8
precision = "fp32"
learning_rate = 5e-3
{more}
[[stage.objective]]
use = "{use}"
match = {{ student = "logits", teacher = "{teacher}" }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two language models: one over letters, one over byte-level pieces; and a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from tests.e2e.test_tasks import letters, texts

    place = tmp_path_factory.mktemp("two")
    lines = [line.replace("wonder", "wönder") for line in texts(60)]
    (place / "t.txt").write_text("\n".join(lines), encoding="utf-8")
    letters(place / "letters")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    made.save_pretrained(place / "pieces")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.get_vocab_size(), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        initializer_range=0.5,
        eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(place / "pieces")
    return place


def opened(folder: Path, **settings: str) -> Session:
    values = {"use": "alm", "teacher": "big:logits", "more": "", **settings}
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder, **values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_session(Request(recipe, None, None, (), None, None, folder / "out"))


def decoded(session: Session, number: int, ids: list[int]) -> str:
    from compressor.data.text import load_tokenizer

    assert session.panel is not None
    model = session.panel.teachers[number].model
    text: str = load_tokenizer(model, model.preprocess).decode(ids, skip_special_tokens=True)
    return text


def test_common_chunks_hold_the_same_text_for_both_tokenizers(folder: Path) -> None:
    session = opened(folder)
    assert session.panel is not None
    teacher = session.panel.teachers[1]
    assert teacher.foreign
    assert teacher.splits is not None
    split, own = teacher.splits["train"], session.data.splits["train"]
    assert isinstance(split, AlignedSplit)
    assert len(split) == len(own)
    compared = 0
    for row in range(len(own)):
        ends = [torch.from_numpy(x[row : row + 1].astype(np.int64)) for x in (split.student_ends, split.ends)]
        found = common_chunks(ends[0], ends[0] >= 0, ends[1], ends[1] >= 0)
        apart = torch.from_numpy(split.starts[row : row + 1] != 0)
        first, second, count = without_first(*found, apart)
        for chunk in range(int(count)):
            texts = [
                decoded(session, number, labels[row][chunks[0].numpy() == chunk].tolist())
                for number, (labels, chunks) in enumerate([(own.labels, first), (split.labels, second)])
            ]
            assert texts[0] == texts[1].replace("ö", "")  # which the letters do not know, and which is two bytes long
            compared += len(texts[0])
    assert compared > 500


@pytest.mark.parametrize("use", ["alm", "uld", "vocab-match", "vocab-map"])
def test_a_student_learns_from_a_teacher_with_another_tokenizer(folder: Path, tmp_path: Path, use: str) -> None:
    session = opened(folder, use=use)
    assert any("teacher outputs are cached" in line for line in session.plan.banks)
    losses = []
    for cache in ("on", "off"):
        stage = session.recipe.stage[1]
        assert isinstance(stage, DistilStage)
        config = stage.model_copy(update={"cache": cache, "labels": 0.0})
        student = copy.deepcopy(session.model.module)
        result = distil(
            student, session.model.module, session.data, config, seed=0, work=tmp_path / cache, bank=tmp_path / "bank",
            teacher_digest="t", signals={}, panel=session.panel,
        )  # fmt: skip
        assert result.cached == (cache == "on")
        losses.append([record.loss for record in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the bank holds what the teacher says
    assert losses[0][1] < losses[0][0]


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"teacher": "logits"}, "has the student's own tokenizer"),
        ({"more": "sequences = { prompt_tokens = 4, max_new_tokens = 8 }"}, "not what `sequences` writes"),
        ({"more": "rollouts = { prompt_tokens = 4, max_new_tokens = 8 }"}, "makes its inputs while it trains"),
        ({"use": "uld", "teacher": "big:hidden[-1]"}, "`logits` of a teacher"),
    ],
)
def test_what_cannot_be_aligned_is_refused(folder: Path, settings: dict[str, str], hint: str) -> None:
    with pytest.raises(PlanError, match=hint):
        opened(folder, **settings)


def test_texts_that_begin_apart_lose_their_first_chunk() -> None:
    own, other = torch.tensor([[0, 0, 1, -1]]), torch.tensor([[0, 1, 1]])
    first, second, count = without_first(own, other, torch.tensor([2]), torch.tensor([True]))
    assert (first.tolist(), second.tolist(), count.tolist()) == ([[-1, -1, 0, -1]], [[-1, 0, 0]], [1])
    assert Batch(None, None).starts is None
