"""A small language model under the tokenizer of a large one, untrained: what each start of the new tokens is worth.

Five models of 1.8 M parameters with a tokenizer of 4,000 tokens learn Debian's package descriptions; each then gets the
49,152 tokens of SmolLM2-135M, which lends its embeddings to the matching pursuit (methods V3). The loss is per token of
the new tokenizer, so that only starts compare, not tokenizers. To bound the work, rows are made for the new tokens that
the text holds, and only tokens that it holds can be the answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from compressor.models import LoadedModel

BUILD = Path("build")
DONOR, TEXT = BUILD / "smollm2", BUILD / "debian-text"
TOKENS, WIDTH, LAYERS, STEPS = 4000, 128, 4, 2000
BLOCKS, LENGTH = 128, 64
SEEDS = range(5)
ARMS = ("zero", "mean", "pieces", "omp 8", "omp 64")


def page(work: Path) -> str:
    """The whole page; the models and the losses that are there already (``work``) are taken."""
    from compressor.distil.probes.paired import weigh
    from compressor.models.load import load_model
    from compressor.recipe import DataConfig, TeacherConfig
    from tools.causal_lm import Results

    donor = load_model(TeacherConfig(model=str(DONOR)), data=DataConfig(max_length=LENGTH))
    results = Results(work / "losses.json")
    for seed in SEEDS:
        if f"seed {seed}" not in results.rows:
            results.add(f"seed {seed}", _seed(work, donor, seed))
    rows = [results.rows[f"seed {seed}"] for seed in SEEDS]
    new, share = rows[0]["new"], rows[0]["share"]
    lines = [
        "# Another tokenizer, before any training\n",
        f"`python -m tools.bench transplant`: language models of {LAYERS} layers, width {WIDTH}, {TOKENS:,} tokens,",
        f"{STEPS:,} steps on Debian's package descriptions; then SmolLM2's tokenizer, whose embeddings OMP reads.",
        f"{BLOCKS} blocks of {LENGTH} tokens of test text, fp32. They hold {new} different tokens that the small",
        f"tokenizer lacks ({share:.1%} of the text).\n",
        "| new tokens start as | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | mean |",
        "|---|" + "---|" * (len(rows) + 1),
    ]
    for arm in ARMS:
        found = [row[arm] for row in rows]
        lines.append(f"| {arm} | " + " | ".join(f"{value:.3f}" for value in found) + f" | {np.mean(found):.3f} |")
    lines += [
        "",
        "Loss per token (nats), lower is better.\n",
        "| paired difference | mean | 90 % interval | seeds won | verdict |",
    ]
    lines.append("|---|---|---|---|---|")
    for better, other in (("omp 64", "zero"), ("omp 64", "mean"), ("pieces", "mean"), ("omp 64", "pieces")):
        result = weigh([row[other] - row[better] for row in rows])
        lines.append(
            f"| {other} - {better} | {result.mean:+.3f} | {result.low:+.3f} to {result.high:+.3f} | "
            f"{result.wins} of {result.pairs} | {result.verdict} |"
        )
    return "\n".join(lines) + "\n"


def _seed(work: Path, donor: LoadedModel, seed: int) -> dict[str, Any]:
    """Train one small model (or load it) and judge every start."""
    import torch

    from compressor.models.load import load_model
    from compressor.models.omp import pursue
    from compressor.models.vocabulary import table_parameters, with_tables
    from compressor.recipe import DataConfig, TeacherConfig
    from compressor.students.transplant import Pair, start_rows

    folder = work / f"base-{seed}"
    if not (folder / "config.json").is_file():
        _taught(work, folder, seed)
    base = load_model(TeacherConfig(model=str(folder)), data=DataConfig(max_length=LENGTH))
    assert base.module is not None
    assert donor.module is not None
    content = donor.files["tokenizer.json"]
    pair = Pair.of(base.files["tokenizer.json"], content)
    blocks = _blocks(content)
    used = np.unique(blocks)
    new = sorted(set(used.tolist()) - set(pair.shared))
    foreign = next(iter(table_parameters(donor.module).values())).detach().float()
    found: dict[str, Any] = {"new": len(new), "share": float(np.isin(blocks, new).mean())}
    for arm in ARMS:
        rows = start_rows(pair, base, arm if arm in ("zero", "mean", "pieces") else "zero")
        if arm.startswith("omp"):
            sparse = pursue(foreign[new], foreign[list(pair.shared)], int(arm.split()[1]))
            for name, old in table_parameters(base.module).items():
                rows[name][new] = sparse.combine(old.detach()[list(pair.shared.values())])
        twin = with_tables(base.module, rows, pair.special_ids(base.preprocess))  # type: ignore[arg-type]
        found[arm] = _loss(twin, torch.from_numpy(blocks), torch.from_numpy(used))
    return found


def _taught(work: Path, folder: Path, seed: int) -> None:
    """A small language model with a tokenizer of its own, as a checkpoint folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from compressor.models.load import load_model
    from compressor.recipe import DataConfig, TeacherConfig
    from tools.causal_lm import BATCH, World, drawn, train

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train([str(TEXT / "train.txt")], learner)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    start = work / f"start-{seed}"
    words = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for place in (start, folder):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words).save_pretrained(place)
    LlamaForCausalLM(config).save_pretrained(start)
    world = World(load_model(TeacherConfig(model=str(start)), data=DataConfig(max_length=LENGTH)), TEXT)
    settings = {"learning_rate": 2e-3, "schedule": "cosine"}
    train(
        world.teacher, None, drawn(world.train, STEPS * BATCH, seed), settings, seed=seed, work=work / f"train-{seed}"
    )
    world.teacher.get_submodule("model").save_pretrained(folder)  # type: ignore[operator]


def _blocks(content: bytes) -> Any:
    """Token ids (BLOCKS, LENGTH) of the first descriptions, int64."""
    from tokenizers import Tokenizer

    text = " ".join(TEXT.joinpath("test.txt").read_text(encoding="utf-8").splitlines()[:600])
    ids = Tokenizer.from_str(content.decode()).encode(text, add_special_tokens=False).ids
    return np.array(ids[: BLOCKS * LENGTH], np.int64).reshape(BLOCKS, LENGTH)


def _loss(module: Any, blocks: Any, used: Any) -> float:
    """Mean cross-entropy of the next token among ``used``."""
    import torch

    total = []
    with torch.inference_mode():
        for part in blocks.split(4):
            logits = module(input_ids=part, attention_mask=torch.ones_like(part))[:, :-1].flatten(0, 1)
            answers = torch.searchsorted(used, part[:, 1:].flatten())
            total.append(torch.nn.functional.cross_entropy(logits[:, used].float(), answers, reduction="none"))
    return float(torch.cat(total).mean())


if __name__ == "__main__":
    print(page(BUILD / "bench" / "transplant"))
