"""Train a small T5 (1.4 M parameters) that spells words out in phonemes: about ten minutes on one core.

    python -m examples.grapheme_to_phoneme.prepare
    python -m examples.grapheme_to_phoneme.train_teacher --data build/g2p --out build/g2p-teacher

The tokenizer takes letters and phonemes as they are. Validation and calibration are the parts that
``compress-for-device`` draws with the same seed; the test set is scored once, at the end (alone with ``--score``).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from compressor.data.split import split_indices

SPECIAL = ("<pad>", "</s>", "<unk>")
IGNORED = -100


def read(path: Path) -> tuple[list[str], list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [row["word"] for row in rows], [row["phonemes"] for row in rows]


def tokenizer_of(phonemes: list[str]) -> PreTrainedTokenizerFast:
    """One token a letter, one a phoneme; what is written is joined by blanks."""
    known = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *sorted({part for text in phonemes for part in text.split()})]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[A-Z]+|[^A-Z ]"), "removed", invert=True)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def score(folder: Path, data: Path) -> dict[str, float]:
    """Greedily written test words of a trained teacher: phoneme error rate, its standard error, whole words right."""
    from compressor.distil.generation import write_targets
    from compressor.evaluate import written
    from compressor.models.wrappers import EncoderDecoder

    words, phonemes = read(data / "test.csv")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = EncoderDecoder(T5ForConditionalGeneration.from_pretrained(folder)).eval()
    texts: list[str] = []
    for start in range(0, len(words), 256):
        ids = padded([list(row) for row in tokenizer(words[start : start + 256])["input_ids"]], 0)
        made = write_targets(model, {"input_ids": ids, "attention_mask": (ids != 0).long()}, 40)
        texts += tokenizer.batch_decode(made.ids, skip_special_tokens=True)
    rows = np.concatenate([np.zeros((len(texts), 3)), written.judge(texts, phonemes)], axis=1)
    found = written.figures("text2text-generation", rows)
    return {name: found[name] for name in ("word_error_rate", "standard_error", "exact_match")}


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/g2p"))
    parser.add_argument("--out", type=Path, default=Path("build/g2p-teacher"))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--validation", type=int, default=1000, help="as in the recipe")
    parser.add_argument("--calibration", type=int, default=256, help="as in the recipe")
    parser.add_argument("--steps", type=int, help="stop after so many (to try it out)")
    parser.add_argument("--score", action="store_true", help="only score the teacher that stands in --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.score:
        print(json.dumps(score(args.out, args.data)))
        return
    torch.manual_seed(args.seed)
    words, phonemes = read(args.data / "train.csv")
    parts = split_indices(len(words), {"validation": args.validation, "calibration": args.calibration}, seed=args.seed)
    tokenizer = tokenizer_of(phonemes)
    sources = [list(ids) for ids in tokenizer(words)["input_ids"]]
    targets = [list(ids) for ids in tokenizer(phonemes)["input_ids"]]
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=512, num_layers=3, num_decoder_layers=3, num_heads=4,
            dropout_rate=0.0, relative_attention_num_buckets=16, relative_attention_max_distance=32,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip

    def loss_of(index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and right guesses of these pairs, sums over target tokens."""
        ids = padded([sources[i] for i in index], 0)
        labels = padded([targets[i] for i in index], IGNORED)
        logits = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).logits
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, (logits.argmax(-1) == labels).sum()

    @torch.inference_mode()
    def validate() -> tuple[float, float]:
        index = parts["validation"]
        total, right = loss_of(index)
        count = sum(len(targets[i]) for i in index)
        return math.exp(total.item() / count), right.item() / count

    generator = np.random.Generator(np.random.PCG64(args.seed))
    total = args.steps or math.ceil(args.epochs * len(parts["train"]) / args.batch)
    optimiser = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / total))
    )
    order = np.concatenate([generator.permutation(parts["train"]) for _ in range(math.ceil(args.epochs))])
    lengths = np.array([len(ids) for ids in sources])
    started = time.process_time()
    pool = 32 * args.batch  # words of like length share a batch
    step = 0
    for start in range(0, len(order), pool):
        near = order[start : start + pool]
        near = near[np.argsort(lengths[near], kind="stable")]
        cut = [near[at : at + args.batch] for at in range(0, len(near), args.batch)]
        for place in generator.permutation(len(cut)):
            if step >= total:
                break
            loss, _ = loss_of(cut[place])
            (loss / sum(len(targets[i]) for i in cut[place])).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            if step % 100 == 0:
                seconds = time.process_time() - started
                print(f"step {step}/{total}, {seconds:.0f} s: perplexity, accuracy {validate()}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    licence = "---\nlicense: bsd-2-clause\n---\nGrapheme to phoneme, trained on the CMU Pronouncing Dictionary.\n"
    (args.out / "README.md").write_text(licence)
    perplexity, accuracy = validate()
    seconds = round(time.process_time() - started)
    print(json.dumps({"validation_perplexity": perplexity, "token_accuracy": accuracy, "cpu_seconds": seconds}))
    print(json.dumps(score(args.out, args.data)))


if __name__ == "__main__":
    main()
