"""A language model under another tokenizer, untrained: what each start of the new tokens is worth.

SmolLM2-135M reads Debian's package descriptions in the tokens of MiniLM's WordPiece (30,522, uncased). Loss is per
token of the new tokenizer, so that only starts compare, not tokenizers. To bound the work, rows are made for the new
tokens that the text holds; the others cannot be read, and as answers they keep the start of their arm.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

TEACHER, DONOR, TEXT = Path("build/smollm2"), Path("build/minilm-l6"), Path("build/debian-text/test.txt")
BLOCKS, LENGTH = 12, 64
ARMS = ("zero", "mean", "pieces", "omp 8", "omp 64")


def page() -> str:
    """The whole page."""
    import torch

    from compressor.models.load import load_model
    from compressor.models.vocabulary import table_parameters, with_tables
    from compressor.recipe import StudentStage, TeacherConfig
    from compressor.students.transplant import Pair, start_rows, tokenizer_content

    model = load_model(TeacherConfig(model=str(TEACHER), task="causal-lm"))
    donor = load_model(TeacherConfig(model=str(DONOR), task="sentence-embedding"))
    assert model.module is not None
    assert donor.module is not None
    content = tokenizer_content(StudentStage(kind="student", tokenizer=str(DONOR)))
    pair = Pair.of(model.files["tokenizer.json"], content)
    blocks = _blocks(content)
    new = sorted(set(np.unique(blocks).tolist()) - set(pair.shared))
    foreign = next(iter(table_parameters(donor.module).values())).detach().float()
    lines = [
        "# Another tokenizer, before any training\n",
        f"`python -m tools.bench transplant`: SmolLM2-135M under MiniLM's tokenizer ({pair.new.size:,} tokens,",
        f"{len(pair.shared):,} of them shared), {BLOCKS} blocks of {LENGTH} tokens of package descriptions, fp32.",
        f"The text holds {len(new)} different tokens that SmolLM2 lacks ({np.isin(blocks, new).mean():.1%} of all).\n",
        "| new tokens start as | loss per token | from shared to shared tokens | seconds for the rows |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        started = time.perf_counter()
        rows = start_rows(pair, model, arm if arm in ("zero", "mean", "pieces") else "pieces")
        if arm.startswith("omp"):
            _combine(rows, pair, model, foreign, new, int(arm.split()[1]))
        seconds = time.perf_counter() - started
        twin = with_tables(model.module, rows, pair.special_ids(model.preprocess))  # type: ignore[arg-type]
        loss, shared = _loss(twin, torch.from_numpy(blocks), new)
        lines.append(f"| {arm} | {loss:.3f} | {shared:.3f} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def _blocks(content: bytes) -> Any:
    """Token ids (BLOCKS, LENGTH) of the first descriptions, int64."""
    from tokenizers import Tokenizer

    text = " ".join(TEXT.read_text(encoding="utf-8").splitlines()[:600])
    ids = Tokenizer.from_str(content.decode()).encode(text, add_special_tokens=False).ids
    return np.array(ids[: BLOCKS * LENGTH], np.int64).reshape(BLOCKS, LENGTH)


def _combine(rows: Any, pair: Any, model: Any, foreign: Any, new: list[int], atoms: int) -> None:
    """The rows of ``new`` tokens by matching pursuit, in place."""
    from compressor.models.omp import pursue
    from compressor.models.vocabulary import table_parameters

    found = pursue(foreign[new], foreign[list(pair.shared)], atoms)
    for name, old in table_parameters(model.module).items():
        rows[name][new] = found.combine(old.detach()[list(pair.shared.values())])


def _loss(module: Any, blocks: Any, new: list[int]) -> tuple[float, float]:
    """Mean cross-entropy of the next token, and of those that follow shared tokens."""
    import torch

    total, after = [], []
    lacking = torch.tensor(new)
    with torch.inference_mode():
        for part in blocks.split(4):
            logits = module(input_ids=part, attention_mask=torch.ones_like(part))[:, :-1].flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(logits.float(), part[:, 1:].flatten(), reduction="none")
            known = ~torch.isin(part[:, :-1].flatten(), lacking) & ~torch.isin(part[:, 1:].flatten(), lacking)
            total.append(losses)
            after.append(losses[known])
    return float(torch.cat(total).mean()), float(torch.cat(after).mean())


if __name__ == "__main__":
    print(page())
