"""Helpers whose assertions speak as those of a test do."""

import pytest

pytest.register_assert_rewrite(
    "fused_cases", "loss_head_cases", "native_cases", "prefix_attention_cases", "trl_training"
)
