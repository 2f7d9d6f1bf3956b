"""Bases made here, so that everything runs without a model hub: chain_sum's, and a warmed SmolLM2.

In: a recipe. Out: a Hugging Face folder that passed its gate. `base` trains the embedded model
(`char_model`) on what `chain_sum_author` writes, `smollm2` warms up a published one on what
`word_author` writes.
"""
