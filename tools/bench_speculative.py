"""How often a target accepts its drafts: one trained on labels, one distilled on the target's text (methods X4).

python -m tools.bench_speculative [--text FILE] [--steps N] [--seeds N]

Trains a letter-level target on plain text and, for each seed, two drafts of equal size for equal steps. Prints the mean
tokens a pass of the target gives, and the wall time against the target alone, on prompts that nobody was trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.data.blocks import BlockSplit, blocks_of
from compressor.data.types import DataBundle
from compressor.distil.generation import generate
from compressor.distil.loop import distil
from compressor.distil.speculative import speculate
from compressor.models.types import TextInput
from compressor.models.wrappers import TextModel
from compressor.recipe import DistilStage
from compressor.types import TensorSpec

TEXT = Path("/usr/share/common-licenses/GPL-3")
LETTERS = 128  # ASCII; everything else becomes a blank
BLOCK, PROMPT, NEW, AHEAD = 64, 16, 40, 4


def net(layers: int, width: int, seed: int) -> TextModel:
    """A letter-level GPT-2."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=LETTERS, n_positions=BLOCK, n_embd=width, n_layer=layers, n_head=2, use_cache=False,
        bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return TextModel(GPT2LMHeadModel(config)).eval()


def letters(path: Path) -> tuple[BlockSplit, BlockSplit]:
    """The first nine tenths and the rest of a text in blocks."""
    text = path.read_text(encoding="utf-8", errors="replace")
    stream = np.array([ord(letter) if ord(letter) < LETTERS else 32 for letter in text], np.int32)
    preprocess = TextInput(tokenizer_file="", max_length=BLOCK, pad_id=0, names=("input_ids", "attention_mask"))
    specs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in preprocess.names)
    cut = 9 * len(stream) // 10
    return blocks_of("train", stream[:cut], preprocess, specs), blocks_of("test", stream[cut:], preprocess, specs)


def train(student: TextModel, teacher: TextModel | None, split: BlockSplit, steps: int, seed: int) -> None:
    """Labels only without a teacher; otherwise half of the steps on the student's own text."""
    epochs = max(1, steps // max(1, len(split) // 16))
    settings: dict[str, Any] = {"kind": "distil", "epochs": epochs, "batch": 16, "learning_rate": 3e-3, "objective": []}
    if teacher is not None:
        settings |= {"objective": [{"use": "kd", "options": {"temperature": 1.0}}], "labels": 0.0, "cache": "off"}
        settings["rollouts"] = {"fraction": 0.5, "prompt_tokens": PROMPT, "max_new_tokens": BLOCK - PROMPT}
    data = DataBundle({"train": split}, (), "text", {"train": ""})
    with tempfile.TemporaryDirectory() as folder:
        distil(
            student, teacher, data, DistilStage.model_validate(settings), seed=seed, work=Path(folder),
            bank=Path(folder), teacher_digest="", signals={}, labels_only=teacher is None,
        )  # fmt: skip


def measure(
    target: nn.Module, draft: nn.Module, prompts: torch.Tensor, new_tokens: int = NEW, ahead: int = AHEAD
) -> dict[str, float]:
    """Mean tokens a pass, and speed-up over the target alone in wall time and in processor time.

    One prompt after the other, the two in turns. Prompts int64 (B, P). ``same``: share of prompts after which both gave
    the same text; where it is below 1, two tokens were as likely but for rounding.
    """
    gained: list[int] = []
    same = 0
    alone, together = np.zeros(2), np.zeros(2)
    speculate(target, draft, prompts[:1], 4, ahead)  # warms up
    for prompt in prompts:
        started = _clocks()
        plain = generate(target, prompt[None], new_tokens).ids
        alone += _clocks() - started
        started = _clocks()
        found = speculate(target, draft, prompt[None], new_tokens, ahead)
        together += _clocks() - started
        same += int(torch.equal(found.ids, plain))
        gained += found.gained
    wall, processor = alone / together
    return {
        "tokens_per_pass": float(np.mean(gained)),
        "speedup": float(wall),
        "speedup_processor": float(processor),
        "same": same / len(prompts),
    }


def _clocks() -> np.typing.NDArray[np.float64]:
    """Wall time, and processor time, which other processes disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    """Train, measure, print one line of JSON a draft."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    learned, held = letters(options.text)
    target = net(4, 128, 0)
    train(target, None, learned, options.steps, 0)
    prompts = torch.from_numpy(held.ids[:16, :PROMPT].astype(np.int64))
    for seed in range(options.seeds):
        for name, teacher in (("labels", None), ("distilled", target)):
            draft = net(1, 64, 100 + seed)
            train(draft, teacher, learned, options.steps, seed)
            found = measure(target, draft, prompts)
            if found["same"] < 1:
                raise SystemExit("speculative decoding changed the text")
            print(json.dumps({"seed": seed, "draft": name, **found}), flush=True)


if __name__ == "__main__":
    main()
