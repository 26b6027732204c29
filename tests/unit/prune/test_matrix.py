"""The matrix: well-known architectures, tiny and with drawn weights; pruned, masked and exported forms agree."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from torch import Tensor, nn  # noqa: E402

from compressor.errors import PlanError  # noqa: E402
from compressor.models.onnx_facts import estimate_macs  # noqa: E402
from compressor.models.rebuild import replay  # noqa: E402
from compressor.prune import Pruned, check, prune  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402
from tests.unit.prune.networks import NETWORKS, MixtureOfExperts, build  # noqa: E402

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # the older exporter's

WORDS = 48
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SIZES | {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TEXT | {"num_key_value_heads": 2, "use_cache": False}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32, "vocab_size": WORDS, "use_cache": False}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("ForSequenceClassification", TEXT),
    "DistilBert": (
        "ForSequenceClassification",
        {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "Roberta": ("ForSequenceClassification", TEXT),
    "DebertaV2": ("ForSequenceClassification", TEXT | DEBERTA),
    "ModernBert": ("ForSequenceClassification", TEXT),
    "ViT": ("ForImageClassification", IMAGE),
    "DeiT": ("ForImageClassification", IMAGE),
    "Swin": ("ForImageClassification", SWIN),
    "GPT2": ("LMHeadModel", GPT2),
    "Llama": ("ForCausalLM", GROUPED),
    "Gemma": ("ForCausalLM", GROUPED | {"head_dim": 8}),
    "OPT": ("ForCausalLM", {k: v for k, v in TEXT.items() if k != "intermediate_size"} | OPT),
    "T5": ("ForConditionalGeneration", T5 | {"vocab_size": WORDS, "decoder_start_token_id": 0, "use_cache": False}),
    "Mixtral": ("ForCausalLM", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


class Logits(nn.Module):
    """Inputs in order, logits out; a decoder is given the first four tokens."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, decodes: bool) -> None:
        super().__init__()
        self.model, self.names, self.decodes = model, names, decodes

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        if self.decodes:
            given["decoder_input_ids"] = given["input_ids"][:, :4]
        return self.model(**given).logits


def of_transformers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    suffix, sizes = MODELS[name]
    model = getattr(transformers, name + suffix)(getattr(transformers, f"{name}Config")(**sizes)).eval()
    if "Image" in suffix:
        batch = {"pixel_values": torch.randn(3, 3, 16, 16)}
    else:
        batch = {"input_ids": torch.randint(3, WORDS, (3, 8)), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    return Logits(model, tuple(batch), decodes=name == "T5").eval(), batch


def exported(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, np.ndarray]:
    """The ONNX file (by the fast, older exporter) and what it answers."""
    stream = io.BytesIO()
    values = tuple(batch.values())
    torch.onnx.export(module, values, stream, dynamo=False, input_names=list(batch), opset_version=17)
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
    return onnx.load_from_string(stream.getvalue()), found[0]


def agree(made: Pruned, batch: dict[str, Tensor]) -> np.ndarray:
    with torch.no_grad():
        wanted, found = made.masked(*batch.values()), made.module(*batch.values())
    assert float((wanted - found).abs().max()) <= 1e-4 * max(1.0, float(wanted.abs().max()))
    return wanted.numpy()


def no_cut_failed(made: Pruned) -> None:
    """What was kept says why, and nothing was kept because its cut did not work."""
    kept = [fact for fact in made.facts if fact.action == "kept"]
    assert all(fact.reason for fact in kept)
    assert not [fact for fact in kept if "fails" in fact.reason or "does not compute" in fact.reason]


@pytest.mark.parametrize("name", MODELS)
def test_transformers(name: str) -> None:
    module, batch = of_transformers(name)
    experts = {"experts": 0.5} if name == "Mixtral" else {}
    made = prune(module, batch, PruneStage(kind="prune", ratio=0.5, **experts), [batch])
    wanted = agree(made, batch)
    no_cut_failed(made)
    kinds = {fact.before.split()[-1] for fact in made.facts if fact.action == "pruned"}
    assert kinds == ({"heads", "neurons", "experts"} if experts else {"heads", "neurons"})
    halved = [f for f in made.facts if f.action == "pruned"]
    assert all(2 * int(fact.after.split()[0]) == int(fact.before.split()[0]) for fact in halved)
    assert not [fact for fact in made.facts if fact.action == "kept" and "heads" in fact.before]
    assert made.macs_after < 0.62 * made.macs_before
    assert str(replay(module, made.record)) == str(made.module)
    if name != "Mixtral":  # its grouped products are not exported; a mixture in ONNX is among the networks below
        _, found = exported(made.module, batch)
        assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, float(np.abs(wanted).max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    module = build(name)
    batch = {"input" if isinstance(module, nn.Sequential) else "image": torch.randn(4, 3, 16, 16)}
    experts = {"experts": 0.5} if name == "mixture-of-experts" else {}
    made = prune(module, batch, PruneStage(kind="prune", ratio=0.5, **experts), [batch])
    wanted = agree(made, batch)
    no_cut_failed(made)
    sizes = {}
    for form, each in (("whole", module), ("pruned", made.module)):
        file, answer = exported(each, batch)
        sizes[form] = estimate_macs(file, {}), sum(int(np.prod(tensor.dims)) for tensor in file.graph.initializer)
    assert np.abs(answer - wanted).max() <= 1e-4 * max(1.0, float(np.abs(wanted).max()))
    if not experts:  # one sample there, the whole batch here
        assert sizes["pruned"][0] / sizes["whole"][0] == pytest.approx(made.macs_after / made.macs_before, rel=1e-6)
    planned = made.parameters_after / made.parameters_before
    assert sizes["pruned"][1] / sizes["whole"][1] == pytest.approx(planned, rel=0.1)  # norms are folded there
    assert planned < 0.75


def test_the_least_used_experts_go_with_their_rows() -> None:
    module = build("mixture-of-experts")
    assert isinstance(module, MixtureOfExperts)
    with torch.no_grad():
        module.inner.weight.zero_(), module.inner.bias.fill_(1.0), module.gate.weight.zero_()
        module.gate.weight[:, 0] = torch.tensor([1.0, 5.0, 2.0, 6.0, 3.0, 4.0])  # every token goes to 3 and 1
    batch = {"image": torch.randn(2, 3, 16, 16)}
    made = prune(module, batch, PruneStage(kind="prune", experts=0.5), [batch])
    fact = next(fact for fact in made.facts if "experts" in fact.before)
    assert (fact.before, fact.after) == ("6 experts", "3 experts")
    assert (made.module.num_experts, len(made.module.experts)) == (3, 3)
    assert made.module.gate.weight[:, 0].tolist()[1:] == [5.0, 6.0]
    assert torch.allclose(made.module(**batch), module(**batch), atol=1e-5)  # nobody asked those that went
    random = prune(module, batch, PruneStage(kind="prune", experts=0.5, importance="random"), [], seed=3)
    assert [f.reason for f in random.facts if "experts" in f.before] == ["random control"]


IMPOSSIBLE = [("mixture-of-experts", 0.8, "sends each token to 2"), ("u-net", 0.5, "matches nothing")]


@pytest.mark.parametrize(("name", "ratio", "words"), IMPOSSIBLE)
def test_requests_for_experts_that_cannot_be_met(name: str, ratio: float, words: str) -> None:
    module, batch, config = build(name), {"image": torch.randn(2, 3, 16, 16)}, PruneStage(kind="prune", experts=ratio)
    problems = check(module, batch, config)
    assert [problem.where for problem in problems] == ["experts"]
    assert words in problems[0].what
    with pytest.raises(PlanError):
        prune(module, batch, config, [batch])
