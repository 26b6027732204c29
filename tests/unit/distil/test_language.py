"""Language models: generation, on-policy batches, low-rank adapters, labels of tokens."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from compressor.data.blocks import blocks_of  # noqa: E402
from compressor.data.types import DataBundle  # noqa: E402
from compressor.distil import lora  # noqa: E402
from compressor.distil.generation import beam_search, generate  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.rollouts import OnPolicy, batch_of  # noqa: E402
from compressor.distil.speculative import speculate  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from compressor.language import LoRA, Rollouts  # noqa: E402
from compressor.models.types import TextInput  # noqa: E402
from compressor.models.wrappers import TextModel  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from compressor.types import TensorSpec  # noqa: E402

pytestmark = pytest.mark.train
SPECS = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))


def gpt(seed: int, layers: int = 2) -> TextModel:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=32, n_embd=16, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.1, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return TextModel(transformers.GPT2LMHeadModel(config)).eval()


def llama(seed: int) -> TextModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False, eos_token_id=0, bos_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return TextModel(transformers.LlamaForCausalLM(config)).eval()


def data() -> DataBundle:
    preprocess = TextInput(tokenizer_file="t", max_length=16, pad_id=0, names=("input_ids", "attention_mask"))
    stream = np.random.default_rng(0).integers(1, 12, 16 * 12 + 1).astype(np.int32)
    stream[1::2] = stream[0:-1:2] % 11 + 1  # something to learn
    splits = {name: blocks_of(name, stream, preprocess, SPECS) for name in ("train", "validation")}
    return DataBundle(splits, (), "toy", {name: name for name in splits})


@pytest.mark.parametrize("build", [gpt, llama])
def test_cached_generation_equals_whole_passes(build):
    module = build(0)
    prompts = torch.tensor([[3, 4, 5], [6, 7, 8]])
    made = generate(module, prompts, 6)
    ids = prompts
    for _ in range(6):
        token = module(ids, torch.ones_like(ids))[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
    assert torch.equal(made.ids, ids)


def test_sampling_depends_on_the_seed_alone_and_leaves_the_module_as_it_was():
    module, prompts = gpt(1).train(), torch.tensor([[3, 4, 5]] * 4)
    before = torch.get_rng_state()
    first, again, other = (generate(module, prompts, 8, temperature=1.0, seed=s).ids for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    assert module.training
    assert all(part.training for part in module.modules())


def test_draws_follow_the_distribution():
    module, prompts = gpt(2), torch.tensor([[3, 4]] * 4000)
    drawn = generate(module, prompts, 1, temperature=1.0, seed=1).ids[:, -1]
    wanted = module(prompts[:1], torch.ones_like(prompts[:1]))[0, -1].softmax(-1)
    assert torch.bincount(drawn, minlength=12) / 4000 == pytest.approx(wanted.detach().numpy(), abs=0.03)


def test_nothing_is_written_after_the_end():
    module, prompts = gpt(3), torch.tensor([[3], [4]])
    first = int(generate(module, prompts, 1).ids[0, 1])
    made = generate(module, prompts, 5, end=first)
    assert made.mask[0].tolist()[:2] == [1, 1]
    assert made.mask[0, 2:].sum() == 0
    assert (made.ids[0, 1:] == first).all()


def test_a_wider_beam_is_at_least_as_likely():
    module, prompts = gpt(4), torch.tensor([[3, 4]])

    def likelihood(ids):
        logits = module(ids, torch.ones_like(ids)).log_softmax(-1)[0, 1:-1]
        return float(logits.gather(1, ids[0, 2:, None]).sum())

    greedy, beam = generate(module, prompts, 4).ids, beam_search(module, prompts, 4, 12, None).ids
    assert likelihood(beam) >= likelihood(greedy) - 1e-5


def test_models_without_a_cache_are_refused():
    with pytest.raises(StageError, match="cannot generate"):
        generate(torch.nn.Linear(2, 2), torch.tensor([[1]]), 2)


def test_what_the_student_wrote_is_taught_from_the_last_prompt_token_on():
    rollouts = OnPolicy(Rollouts(fraction=1.0, prompt_tokens=3, max_new_tokens=4), gpt(0), seed=1)
    rollouts.end = None
    found = rollouts.batch({"input_ids": torch.full((2, 8), 3)}, 0)
    assert found is not None
    inputs, batch = found
    assert inputs["input_ids"].shape == (2, 7)
    assert batch.response is not None
    assert batch.response.tolist() == [[False, False, True, True, True, True, False]] * 2
    assert bool((batch.labels == -100).all())
    assert batch.student_made is not None
    assert bool(batch.student_made.all())


def test_labels_of_tokens_are_cut_to_the_batch_and_say_what_is_taught():
    labels = torch.tensor([[-100, 1, -100, 2, -100, -100], [-100] * 6])
    batch = batch_of(labels, {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}, by_token=True)
    assert batch.labels is not None
    assert batch.response is not None
    assert batch.labels.shape == (2, 4)
    assert batch.response.tolist() == [[False, True, False, True], [True, True, False, False]]
    several = batch_of(labels, {"attention_mask": torch.ones(2, 4)}, by_token=False)
    assert several.labels is labels


def train(tmp_path: Path, name: str, **settings: object) -> tuple[dict, object]:
    student = gpt(5, layers=1)
    stage = {
        "kind": "distil", "epochs": 2, "batch": 4, "cache": "off", "precision": "fp32",
        "objective": [{"use": "kd", "options": {"temperature": 1.0}}],
    }  # fmt: skip
    result = distil(
        student, gpt(6), data(), DistilStage.model_validate(stage | settings), seed=3, work=tmp_path / name,
        bank=tmp_path / "bank", teacher_digest="t", signals={},
    )  # fmt: skip
    return student.state_dict(), result


def test_rollouts_of_no_step_are_plain_distillation_bit_for_bit(tmp_path):
    plain, result = train(tmp_path, "plain")
    none, same = train(tmp_path, "none", rollouts={"fraction": 0.0})
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    assert [r.loss for r in result.history] == [r.loss for r in same.history]
    tiny, _ = train(tmp_path, "tiny", rollouts={"fraction": 1e-12})  # the machinery is there, no step is chosen
    assert all(torch.equal(plain[name], tiny[name]) for name in plain)


def test_on_policy_training_repeats_and_differs_from_off_policy(tmp_path):
    settings = {"rollouts": {"fraction": 0.5, "prompt_tokens": 4, "max_new_tokens": 4, "replay": 0.5, "buffer": 2}}
    first, result = train(tmp_path, "first", **settings)
    again, _ = train(tmp_path, "again", **settings)
    plain, _ = train(tmp_path, "plain2")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)
    assert all(np.isfinite(record.loss) for record in result.history)


def test_a_killed_on_policy_run_continues_as_if_undisturbed(tmp_path):
    settings = {"rollouts": {"fraction": 0.7, "prompt_tokens": 4, "max_new_tokens": 4, "replay": 0.5, "buffer": 2}}
    whole, _ = train(tmp_path, "whole", **settings)
    bundle = data()
    split = bundle.splits["train"]

    class Dying:
        calls = 0

        def __getattr__(self, name):
            return getattr(split, name)

        def __len__(self):
            return len(split)

        def batch(self, index):
            Dying.calls += 1
            if Dying.calls == 9:
                raise KeyboardInterrupt
            return split.batch(index)

    stage = DistilStage.model_validate(
        {
            "kind": "distil", "epochs": 2, "batch": 4, "cache": "off", "precision": "fp32",
            "objective": [{"use": "kd", "options": {"temperature": 1.0}}], **settings,
        }
    )  # fmt: skip
    common = {"seed": 3, "work": tmp_path / "killed", "bank": tmp_path / "bank", "teacher_digest": "t", "signals": {}}
    with pytest.raises(KeyboardInterrupt):
        distil(
            gpt(5, layers=1), gpt(6), dataclasses.replace(bundle, splits={**bundle.splits, "train": Dying()}), stage,
            checkpoint_seconds=0.0, **common,
        )  # fmt: skip
    student = gpt(5, layers=1)
    distil(student, gpt(6), bundle, stage, **common)
    assert all(torch.equal(whole[name], tensor) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("build", [gpt, llama])
def test_merged_adapters_compute_what_the_adapters_did(build):
    module = build(7)
    ids = torch.tensor([[3, 4, 5, 6]])
    plain, names = module(ids, torch.ones_like(ids)), set(module.state_dict())
    reference = copy.deepcopy(module.state_dict())
    trained = lora.adapt(module, LoRA(rank=2, alpha=4.0), seed=0)
    assert torch.equal(module(ids, torch.ones_like(ids)), plain)  # the addition starts at zero
    parameters = [p for p in module.parameters() if p.requires_grad]
    assert trained == sum(p.numel() for p in parameters) < sum(p.numel() for p in module.parameters()) / 3
    optimiser = torch.optim.SGD(parameters, lr=0.02)
    for _ in range(3):
        optimiser.zero_grad()
        module(ids, torch.ones_like(ids)).square().sum().backward()
        optimiser.step()
    adapted = module(ids, torch.ones_like(ids))
    lora.merge(module)
    assert set(module.state_dict()) == names
    assert float((module(ids, torch.ones_like(ids)) - adapted).abs().max()) <= 1e-5
    assert float((adapted - plain).abs().max()) > 1e-3
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, reference[name])}
    assert changed
    assert not any("wte" in name or "embed" in name or "lm_head" in name for name in changed if build is gpt)
    assert all(p.requires_grad for p in module.parameters())


def test_adapters_that_match_nothing_are_refused():
    with pytest.raises(StageError, match="matches no linear layer"):
        lora.adapt(gpt(0), LoRA(modules=("nothing",)), seed=0)


@pytest.mark.parametrize("build", [gpt, llama])
@pytest.mark.parametrize("ahead", [1, 3])
def test_speculative_decoding_gives_the_targets_own_text(build, ahead):
    target, draft, prompt = build(0), build(1), torch.tensor([[3, 4, 5]])
    found = speculate(target, draft, prompt, 12, ahead)
    assert torch.equal(found.ids, generate(target, prompt, 12).ids)
    assert all(1 <= count <= ahead + 1 for count in found.gained)


def test_a_draft_that_is_the_target_is_always_right():
    target = gpt(0)
    found = speculate(target, copy.deepcopy(target), torch.tensor([[3, 4, 5]]), 12, 3)
    assert found.mean_gained == 4.0
