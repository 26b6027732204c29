"""Language models as GGUF files, written here by the format's own library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from compressor.errors import ConfigError, PlanError  # noqa: E402
from compressor.models import inspect_model, load_model  # noqa: E402
from compressor.recipe import DataConfig, TeacherConfig  # noqa: E402

pytestmark = pytest.mark.train
LAYERS, WIDTH, NEURONS, HEADS, KEYS = 2, 32, 64, 4, 2
TOKENS = ["<|end|>", *(chr(c) for c in range(ord("a"), ord("z") + 1)), "Ġ", "th", "the", "Ġthe"]
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=64, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def name_in_file(name: str) -> str:
    """What llama.cpp calls a weight of transformers."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key weight as llama.cpp keeps them: the halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file: feed-forward weights in Q8_0, the rest in float32."""
    path = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(path / "tiny.gguf", "llama")
    writer.add_string("general.license", "apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in llama().model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = rotary_order(weight, HEADS if "q_proj" in name else KEYS)
        kind = gguf.GGMLQuantizationType.Q8_0 if "mlp" in name else None
        data = weight if kind is None else gguf.quants.quantize(weight, kind)
        writer.add_tensor(name_in_file(f"model.{name}"), np.ascontiguousarray(data), raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def test_a_gguf_file_is_the_model_that_was_written(folder: Path) -> None:
    model = load_model(TeacherConfig(model=str(folder / "tiny.gguf")), data=DataConfig(max_length=16))
    ids = torch.randint(0, len(TOKENS), (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)), llama()(ids).logits
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()  # Q8_0 keeps 8 bits of a weight
    assert (model.task, model.provenance.licence) == ("causal-lm", "apache-2.0")
    assert model.provenance.notes == (f"its weights are de-quantised, tensors: {3 * LAYERS} of Q8_0",)


def test_its_tokenizer_comes_with_it(folder: Path) -> None:
    from tokenizers import Tokenizer

    model = load_model(TeacherConfig(model=str(folder)), data=DataConfig(max_length=16))
    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    assert tokenizer.encode("a the").tokens == ["a", "Ġthe"]
    assert model.preprocess.eos_id == 0


def test_plan_knows_it_without_loading_it(folder: Path) -> None:
    seen = inspect_model(TeacherConfig(model=str(folder)))
    parameters = sum(weight.numel() for weight in llama().parameters())
    assert (seen.task, seen.layers, seen.parameters, seen.problems) == ("causal-lm", LAYERS, parameters, ())
    assert "de-quantised" in seen.notes[0]


def test_faults_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((folder / "tiny.gguf").read_bytes()[:5000])
    for call in (lambda config: load_model(config), lambda config: _raise(inspect_model(config))):
        with pytest.raises((ConfigError, AssertionError), match="truncated or not a GGUF file"):
            call(TeacherConfig(model=str(broken)))
    with pytest.raises(PlanError, match="is a causal language model"):
        load_model(TeacherConfig(model=str(folder), task="text-classification"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match="need the package `gguf`"):
        load_model(TeacherConfig(model=str(folder)))


def _raise(seen: object) -> None:
    raise AssertionError(str(seen))


def test_a_folder_of_two_is_asked_which(folder: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="has no config") as raised:
        load_model(TeacherConfig(model=str(tmp_path)))
    assert "one.gguf" in str(raised.value.hint)
