"""The teacher bank: layouts, interruption, stale keys, sizes, a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.distil import teachers  # noqa: E402
from compressor.distil.bank import CHUNK, Bank, BankKey, Layout  # noqa: E402
from compressor.distil.stream import TrainingSet  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from tests.unit.distil.toy import Pictures, Sentences  # noqa: E402

pytestmark = pytest.mark.train
KEY = BankKey("teacher", "samples", (), 0, 0)
COUNT = 3 * CHUNK - 10


def pictures_teacher(positions, names):
    """Logits and feature maps that only depend on the sample."""
    base = torch.from_numpy(positions).float()
    signals = {
        "logits": torch.stack([base, -base], 1) / 7,
        "hidden[0]": base[:, None, None, None].expand(-1, 3, 2, 2) / 800,
    }
    return {name: signals[name] for name in names}, None


def layouts():
    signals, _ = pictures_teacher(np.arange(4), ("logits", "hidden[0]"))
    return {name: Layout.of(name, signal, None) for name, signal in signals.items()}


def test_logits_are_exact_and_features_are_half_precision(tmp_path):
    bank = Bank(tmp_path, KEY, layouts(), None, COUNT)
    assert bank.fill(pictures_teacher) == COUNT
    positions = np.array([5, COUNT - 1, 0, 300])
    expected, _ = pictures_teacher(positions, ("logits", "hidden[0]"))
    found = Bank(tmp_path, KEY, layouts(), None, COUNT).read(positions, None)
    assert torch.equal(found["logits"], expected["logits"])
    gap = (found["hidden[0]"].float() - expected["hidden[0]"]).abs()
    assert (gap <= expected["hidden[0]"].abs() * 2**-11 + 1e-7).all()


def test_sizes_are_known_before_anything_is_written(tmp_path):
    found = layouts()
    bank = Bank(tmp_path, KEY, found, None, COUNT)
    promised = {name: layout.bytes(COUNT, 0) for name, layout in found.items()}
    assert promised == {"logits": COUNT * 2 * 4, "hidden[0]": COUNT * 12 * 2}
    bank.fill(pictures_teacher)
    assert (bank.folder / "logits.npy").stat().st_size == promised["logits"] + 128
    assert (bank.folder / "hidden-0.npy").stat().st_size == promised["hidden[0]"] + 128


def test_filling_goes_on_where_it_was_interrupted(tmp_path):
    seen = []

    def mortal(positions, names):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(positions)
        return pictures_teacher(positions, names)

    bank = Bank(tmp_path, KEY, layouts(), None, COUNT)
    with pytest.raises(KeyboardInterrupt):
        bank.fill(mortal)
    assert bank.missing() == ("logits", "hidden[0]")
    assert Bank(tmp_path, KEY, layouts(), None, COUNT).fill(pictures_teacher) <= COUNT
    assert bank.missing() == ()
    found = bank.read(np.arange(COUNT), None)["logits"]
    assert torch.equal(found, pictures_teacher(np.arange(COUNT), ("logits",))[0]["logits"])


def test_a_signal_more_is_the_only_one_computed(tmp_path):
    only = {"logits": layouts()["logits"]}
    Bank(tmp_path, KEY, only, None, COUNT).fill(pictures_teacher)
    asked = set()

    def watched(positions, names):
        asked.update(names)
        return pictures_teacher(positions, names)

    Bank(tmp_path, KEY, layouts(), None, COUNT).fill(watched)
    assert asked == {"hidden[0]"}


def test_stale_banks_are_errors(tmp_path):
    bank = Bank(tmp_path, KEY, layouts(), None, COUNT)
    bank.fill(pictures_teacher)
    with pytest.raises(StageError, match=r"stale.*holds `logits`"):
        Bank(tmp_path, KEY, layouts(), None, COUNT + 1).read(np.arange(2), None)
    (bank.folder / "key.json").write_text(BankKey("other", "samples", (), 0, 0).text())
    with pytest.raises(StageError, match="stale: it was made for another teacher"):
        Bank(tmp_path, KEY, layouts(), None, COUNT)


@pytest.mark.parametrize(
    "other",
    [
        BankKey("t", "samples", (), 0, 0),
        BankKey("teacher", "s", (), 0, 0),
        BankKey("teacher", "samples", ("flip",), 0, 0),
        BankKey("teacher", "samples", (), 1, 0),
        BankKey("teacher", "samples", (), 0, 1),
    ],
)
def test_every_part_of_the_key_counts(tmp_path, other):
    assert other.folder(tmp_path) != KEY.folder(tmp_path)


def test_ragged_text_comes_back_in_any_batch(tmp_path):
    data = TrainingSet([Sentences("train", 70, 1)])

    def teacher(positions, names):
        inputs = data.batch(positions)
        ids = inputs["input_ids"].float()
        signals = {
            "hidden[1]": torch.stack([ids, -ids], -1),
            "qkv[0]": ids[None, :, None, :, None].expand(3, -1, 2, -1, 4),
        }
        return {name: signals[name] for name in names}, inputs["attention_mask"]

    signals, mask = teacher(np.arange(4), ("hidden[1]", "qkv[0]"))
    found = {name: Layout.of(name, signal, mask) for name, signal in signals.items()}
    assert all(layout.ragged for layout in found.values())
    assert found["qkv[0]"].row == (3, 2, 4)
    bank = Bank(tmp_path, KEY, found, data.lengths, len(data))
    bank.fill(teacher)
    positions = np.array([69, 3, 40, 3])
    expected, mask = teacher(positions, ("hidden[1]", "qkv[0]"))
    got = bank.read(positions, mask)
    assert torch.equal(got["hidden[1]"].float(), expected["hidden[1]"] * mask[..., None])
    assert torch.equal(got["qkv[0]"].float(), expected["qkv[0]"] * mask[None, :, None, :, None])
    with pytest.raises(StageError, match="another tokenizer"):
        bank.read(positions, mask[:, :-1])


def test_values_that_do_not_fit_half_precision_are_refused(tmp_path):
    def huge(positions, names):
        signals, mask = pictures_teacher(positions, names)
        return {name: value + 1e6 for name, value in signals.items()}, mask

    with pytest.raises(StageError, match="cannot be cached") as caught:
        Bank(tmp_path, KEY, layouts(), None, COUNT).fill(huge)
    assert "cache" in caught.value.hint


def decide(wanted, tmp_path, *, online=False):
    return teachers.decide(wanted, layouts(), TrainingSet([Pictures("train", 50, 1)]), 2, online, tmp_path)


def test_cache_or_online_is_decided_from_needs_and_size(tmp_path, monkeypatch):
    size = 2 * 50 * (8 + 24)
    assert decide("auto", tmp_path).bytes == size
    assert not decide("off", tmp_path).cached
    assert "online" in decide("auto", tmp_path, online=True).reason
    with pytest.raises(StageError, match="online"):
        decide("on", tmp_path, online=True)
    monkeypatch.setattr(teachers, "LIMIT_BYTES", size - 1)
    assert not decide("auto", tmp_path).cached
    assert decide("on", tmp_path).cached


def test_a_full_disk_is_a_stage_error_with_a_hint(tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import numpy as np; from pathlib import Path; from compressor.errors import StageError\n"
        "from compressor.distil.bank import Bank, BankKey, Layout\n"
        "key, layouts = BankKey('t', 's', (), 0, 0), {'x': Layout('x', '<f2', (1000,), False)}\n"
        "bank = Bank(Path(sys.argv[1]), key, layouts, None, 1000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n    bank.fill(None)\n"
        "except StageError as error:\n    print(error, '|', error.hint)\n"
    )
    root = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert "the disk is full" in done.stdout, done.stderr
    assert "Free some space" in done.stdout
