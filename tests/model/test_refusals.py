"""Models and calls that fastsd does not compute exactly: each is refused by name."""

import pytest
import torch
from tiny_models import build_tiny, build_tiny_llama
from transformers import (
    Gemma2Config,
    JambaConfig,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)

from fastsd.config.sections import ModelConfig, TeacherConfig
from fastsd.model import load_policy
from fastsd.model.packing import PrefixKeys
from fastsd.model.refusals import ModelError, check_length, refuse_unsupported
from fastsd.teachers.self_teacher import Teacher
from fastsd.types import Branch, TokenTree


def tree(tokens):
    """One row of so many tokens."""
    return TokenTree((5,), (Branch((), (6,) * (tokens - 1)),))


def load(folder):
    return load_policy(ModelConfig(name=str(folder)), "cpu", torch.float32)


@pytest.mark.parametrize(
    "config, words",
    [
        (T5Config(), "t5: encoder-decoder models"),
        (Qwen3NextConfig(), "qwen3_next: hybrid models with linear_attention layers"),
        (Qwen3Config(layer_types=["linear_attention"] * 32), "qwen3: linear_attention layers"),
        (JambaConfig(), "jamba: .*mamba layers"),
        (Gemma2Config(layer_types=["full_attention"] * 26), "gemma2: attention softcapping"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_configurations(config, words):
    with pytest.raises(ModelError, match=words):
        refuse_unsupported(config)


def test_attention_sinks(tmp_path):
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    with pytest.raises(ModelError, match=r"gpt_oss: attention sinks \(.*sinks\)"):
        load(build_tiny("gpt_oss", tmp_path, **sizes))


def test_a_window_shorter_than_the_span(tmp_path):
    policy = load(build_tiny("mistral", tmp_path, sliding_window=8))
    assert policy.hidden([tree(8)]).shape == (7, 32)
    with pytest.raises(ModelError, match="sequence of 9 tokens .* sliding_window = 8"):
        policy.hidden([tree(9)])
    with pytest.raises(ModelError, match="sliding_window = 8"):
        policy.check_length(9)  # what the sampler asks before it starts
    with pytest.raises(ModelError, match="9 positions exceed the layer's window of 8"):
        policy.decoder(input_ids=torch.tensor([[5] * 9]))


def test_windows_count_only_where_a_layer_has_one():
    full = Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=99)
    check_length(full, 9)
    some = Qwen3Config(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ModelError, match="sliding_window = 8"):
        check_length(some, 9)


def test_positions(tmp_path):
    policy = load(build_tiny("llama", tmp_path, max_position_embeddings=16))
    assert len(policy.hidden([tree(16)])) == 15
    with pytest.raises(ModelError, match="17 tokens .* max_position_embeddings = 16"):
        policy.hidden([tree(3), tree(17)])


def test_positions_of_a_teachers_tree(tmp_path):
    """Question, feedback and response together, whatever was read and not computed again."""
    policy = load(build_tiny("llama", tmp_path, max_position_embeddings=16))
    teacher = Teacher(policy, TeacherConfig(kind="live"))
    keys = PrefixKeys()
    policy.hidden([TokenTree((5,) * 8, (Branch((), (6, 7)),))], fills=keys)
    for context, fits in ((4, True), (5, False)):
        trees = [TokenTree((5,) * 8, (Branch((9,) * context, (6,) * 4), Branch((), (6,))))]
        if fits:
            assert teacher.hidden(trees, keys).shape == (5, 32)
            continue
        with pytest.raises(ModelError, match="17 tokens .* max_position_embeddings = 16"):
            teacher.hidden(trees, keys)


def test_multi_head_latent_attention(tmp_path):
    sizes = {
        **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "first_k_dense_replace": 2},
    }
    for value in (16, 24):  # 24: as large as the keys, but not the configuration's head_dim
        folder = build_tiny("deepseek_v3", tmp_path / str(value), v_head_dim=value, **sizes)
        with pytest.raises(ModelError, match=f"deepseek_v3: multi-head latent .*dim = {value}"):
            load(folder)


def test_longrope_beyond_its_short_frequencies():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    config = Qwen3Config(head_dim=8, rope_parameters={"rope_theta": 1e4, **rope})
    check_length(config, 16)
    with pytest.raises(ModelError, match="original_max_position_embeddings = 16"):
        check_length(config, 17)


def test_dropout_is_switched_off_at_load_and_refused_later(tmp_path):
    policy = load(build_tiny("llama", tmp_path, attention_dropout=0.5))
    assert torch.equal(policy.hidden([tree(6)]), policy.hidden([tree(6)]))
    policy.checkpoints = True  # runs the layers in training mode
    policy.hidden([tree(6)])
    for layer in policy.decoder.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ModelError, match="attention dropout 0.5 is not supported"):
        policy.hidden([tree(6)])


def test_functional_dropout_is_switched_off(tmp_path):
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5}
    policy = load(build_tiny("opt", tmp_path, **sizes))
    want = policy.hidden([tree(6)])
    policy.checkpoints = True
    assert torch.equal(policy.hidden([tree(6)]), want)


def test_layers_that_attend_elsewhere(tmp_path):
    policy = load(build_tiny_llama(tmp_path / "llama"))
    policy.decoder.layers[1].self_attn = Passive()
    with pytest.raises(ModelError, match="llama: 1 of 2 layers compute attention through"):
        policy.hidden([tree(3)])
    with pytest.raises(ModelError, match="mamba: "):
        load(build_tiny("mamba", tmp_path / "mamba", state_size=4))


class Passive(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_models_that_are_not_there():
    with pytest.raises(ModelError, match="cannot be loaded"):
        load("/nowhere/to/be/found")
