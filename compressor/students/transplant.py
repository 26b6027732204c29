"""Another tokenizer for a model: tokens of both keep their rows, the others get new ones (methods V3).

The tokenizer is exchanged when a session is opened, since data and model must read the same ids from then on; rows of
new tokens are then the mean of the rows of their pieces. The student stage makes them well: by orthogonal matching
pursuit a token's embedding in the model that the tokenizer comes from is written with few embeddings of shared tokens,
and the same combination of this model's rows is taken (Goddard and Fernandes Neto, "Training-Free Tokenizer
Transplantation via Orthogonal Matching Pursuit", 2025).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.data.load import load_data
from compressor.data.raw import RawData
from compressor.data.surfaces import Vocabulary, shared_ids, spelt, vocabulary_of
from compressor.data.text import load_tokenizer
from compressor.data.types import DataBundle
from compressor.errors import PlanError, Problem
from compressor.ledger import digest_of
from compressor.models.preprocessing import TOKENIZER_FILE, bare_tokenizer
from compressor.models.types import LoadedModel, TextInput
from compressor.recipe import Recipe, StudentStage, TeacherConfig
from compressor.students.vocabulary import digest_with, outputs_over, rows_of
from compressor.types import LayerFact, file_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "tokenizer"


@dataclass(frozen=True)
class Transplanted:
    """Model and data under the other tokenizer, and what became of the tokens in words."""

    model: LoadedModel
    data: DataBundle
    text: str


def transplant(model: LoadedModel, data: DataBundle, raw: RawData, recipe: Recipe) -> Transplanted | None:
    """Model and data under another tokenizer; None when no stage asks for it.

    Raises:
        PlanError: the model reads no texts, or the tokenizer cannot be read or shares no token with the model's own.
    """
    asked = recipe.student_with("tokenizer")
    if asked is None:
        return None
    where, stage = asked
    try:
        return _transplant(model, data, raw, recipe, stage)
    except PlanError as error:
        problems = [Problem(f"{where}.{item.where}", item.what) for item in error.problems]
        raise PlanError("the tokenizer", problems, hint=error.hint) from error


def _transplant(
    model: LoadedModel, data: DataBundle, raw: RawData, recipe: Recipe, stage: StudentStage
) -> Transplanted:
    from compressor.models.vocabulary import with_tables

    text = model.preprocess
    if not isinstance(text, TextInput) or model.module is None:
        raise PlanError.single(KEY, "matches nothing: only a checkpoint that reads texts has a tokenizer")
    content = tokenizer_content(stage)
    pair = Pair.of(model.files[text.tokenizer_file], content)
    if not pair.shared:
        raise PlanError.single(KEY, "shares no token with the model's own tokenizer")
    rows = start_rows(pair, model, "pieces")
    module = with_tables(model.module, rows, pair.special_ids(text))
    preprocess = text.model_copy(update=pair.ids_of(text))
    weights = [file_digest(file) for file in sorted(Path(str(stage.tokenizer)).glob("*.safetensors"))]
    parts = {"model": model.provenance.digest, "tokenizer": digest_with("", content), "weights": weights}
    digest = digest_of(parts)
    own = replace(
        model,
        module=module,
        preprocess=preprocess,
        outputs=outputs_over(model, module, pair.new.size),
        provenance=replace(model.provenance, digest=digest),
        files={**model.files, text.tokenizer_file: content},
    )
    made = load_data(recipe.data, own, seed=recipe.seed, raw=raw)
    digests = {name: digest_with(value, content) for name, value in data.digests.items()}
    told = f"tokenizer: {pair.old.size:,} -> {pair.new.size:,} tokens, {len(pair.shared):,} of them shared"
    return Transplanted(own, replace(made, digests=digests), told)


def tokenizer_content(stage: StudentStage) -> bytes:
    """The other ``tokenizer.json``, without truncation and padding."""
    path = Path(str(stage.tokenizer))
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if stage.transplant == "omp" and not (path / "config.json").is_file():
        what = (
            f"`{path}` is no checkpoint folder: `omp` needs the embeddings of the model that the tokenizer comes from"
        )
        raise PlanError.single(KEY, what, hint='Give that folder, or transplant = "pieces".')
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError.single(KEY, f"`{file}` cannot be read: {error}") from error
    vocabulary_of(text.encode(), KEY)  # says what is wrong with a file that is none
    return bare_tokenizer(text, KEY)


@dataclass(frozen=True)
class Pair:
    """Two vocabularies, and the ids of the tokens that both have: new id -> old id."""

    old: Vocabulary
    new: Vocabulary
    shared: Mapping[int, int]

    @classmethod
    def of(cls, old: bytes, new: bytes) -> Pair:
        before, after = vocabulary_of(old, "the teacher's tokenizer"), vocabulary_of(new, KEY)
        return cls(before, after, shared_ids(before, after))

    @property
    def absent(self) -> list[int]:
        """New ids that the old vocabulary lacks."""
        return [number for number in range(self.new.size) if number not in self.shared]

    def ids_of(self, text: TextInput) -> dict[str, Any]:
        """The special ids of the input under the new tokenizer."""
        back = {old: new for new, old in reversed(list(self.shared.items()))}
        pad = self.new.role("pad")
        found: dict[str, Any] = {"pad_id": back.get(text.pad_id, pad if pad is not None else 0)}
        for name, role in (("mask_id", "mask"), ("eos_id", "eos")):
            old = getattr(text, name)
            if old is not None:
                found[name] = back.get(old, self.new.role(role))
                if found[name] is None:
                    raise PlanError.single(KEY, f"has no token for the model's `{role}`")
        return found

    def special_ids(self, text: TextInput) -> dict[int, int]:
        """Old id -> new id, for the numbers that the model's own code and configuration hold."""
        found = {old: new for new, old in reversed(list(self.shared.items()))}
        return {**found, text.pad_id: self.ids_of(text)["pad_id"]}


def start_rows(pair: Pair, model: LoadedModel, how: str) -> dict[str, Tensor]:
    """New tables by parameter name: shared tokens have their old rows, the others ``pieces``, ``mean`` or ``zero``."""
    import torch

    from compressor.models.vocabulary import table_parameters

    assert model.module is not None
    kept = torch.tensor(list(pair.shared.items()), dtype=torch.long)
    absent = pair.absent
    pieces = _pieces(pair, model, absent) if how == "pieces" else []
    made = {}
    for name, table in table_parameters(model.module).items():
        old = table.detach()
        new = old.new_zeros(pair.new.size, *old.shape[1:])
        new[kept[:, 0]] = old[kept[:, 1]]
        middle = old[: pair.old.size].mean(0)
        if how == "mean":
            new[absent] = middle
        for number, ids in zip(absent, pieces, strict=how == "pieces"):
            new[number] = old[ids].mean(0) if ids else middle
        made[name] = new
    return made


def _pieces(pair: Pair, model: LoadedModel, absent: Sequence[int]) -> list[list[int]]:
    """The old tokens that spell each new one."""
    from tokenizers import Tokenizer

    text = model.preprocess
    assert isinstance(text, TextInput)
    tokenizer = Tokenizer.from_str(model.files[text.tokenizer_file].decode())
    return spelt(pair.new, absent, tokenizer)


def settle(
    module: nn.Module, original: LoadedModel, stage: StudentStage, texts: Sequence[str] = (), seed: int = 0
) -> tuple[nn.Module, list[LayerFact]]:
    """A copy of ``module`` (the model under the new tokenizer) with the rows that the stage asks for, and facts.

    ``original``: the model with its own tokenizer. ``texts`` and ``seed`` are for ``mixed``, which trains.
    """
    from compressor.models.vocabulary import set_rows, table_parameters

    student = copy.deepcopy(module)
    rows, facts = settled_rows(original, stage, texts, seed)
    tables = table_parameters(student)
    for name, table in tables.items():
        set_rows(student, table, rows[name])
    return student, facts


def settled_rows(
    original: LoadedModel, stage: StudentStage, texts: Sequence[str] = (), seed: int = 0
) -> tuple[dict[str, Tensor], list[LayerFact]]:
    """The tables under the new tokenizer, by parameter name."""
    text = original.preprocess
    assert isinstance(text, TextInput)
    pair = Pair.of(original.files[text.tokenizer_file], tokenizer_content(stage))
    absent = pair.absent
    told: str = stage.transplant
    if stage.transplant == "mixed":
        from compressor.students.mixed import learn

        start, content = start_rows(pair, original, "pieces"), tokenizer_content(stage)
        options = {"steps": stage.mixed_steps, "probability": stage.mixed_share, "seed": seed}
        rows, (first, last) = learn(original, content, start, texts, **options)  # type: ignore[arg-type]
        told = f"{stage.mixed_steps} steps on mixed texts, loss {first:.3f} -> {last:.3f}"
    elif stage.transplant != "omp":
        rows = start_rows(pair, original, stage.transplant)
    else:
        rows = start_rows(pair, original, "zero")
        told = _pursued(pair, original, stage, rows)
    facts = []
    for name, table in rows.items():
        after = f"{len(table)} tokens: {len(pair.shared)} kept, {len(absent)} new"
        facts.append(
            LayerFact("student", name.rpartition(".")[0], "transplanted", f"{pair.old.size} tokens", after, told)
        )
    return rows, facts


def texts_of(original: LoadedModel, data: DataBundle) -> list[str]:
    """The training texts as the model's own tokenizer gives them back (a language model's in blocks)."""
    text = original.preprocess
    assert isinstance(text, TextInput)
    rows = [row.tolist() for row in rows_of(data.splits["train"])]
    return list(load_tokenizer(original, text).decode_batch(rows))


def _pursued(pair: Pair, original: LoadedModel, stage: StudentStage, rows: dict[str, Tensor]) -> str:
    """Fill the rows of new tokens in place by matching pursuit in the embeddings of the tokenizer's own model."""
    import torch

    from compressor.models.load import load_model
    from compressor.models.omp import pursue
    from compressor.models.vocabulary import table_parameters, tables_of

    donor = load_model(TeacherConfig(model=str(stage.tokenizer))).module
    tables = None if donor is None else tables_of(donor)
    if donor is None or tables is None:
        raise PlanError.single(KEY, f"`{stage.tokenizer}` has no single embedding of tokens")
    foreign = donor.get_parameter(f"{tables.embedding}.weight").detach().float()
    if len(foreign) < pair.new.size:
        raise PlanError.single(KEY, f"its model has {len(foreign)} rows for {pair.new.size} tokens")
    shared, absent = torch.tensor(list(pair.shared)), torch.tensor(pair.absent, dtype=torch.long)
    found = pursue(foreign[absent], foreign[shared], stage.atoms)
    assert original.module is not None
    for name, old in table_parameters(original.module).items():
        rows[name][absent] = found.combine(old.detach()[torch.tensor(list(pair.shared.values()))])
    left = found.norms[:, -1] / foreign[absent].norm(dim=1).clamp_min(1e-12) if len(absent) else torch.zeros(1)
    return f"matching pursuit, {found.atoms.shape[1]} atoms; {float(left.mean()):.0%} of a token's norm left on average"


__all__ = ["Pair", "Transplanted", "settle", "settled_rows", "start_rows", "texts_of", "transplant"]
