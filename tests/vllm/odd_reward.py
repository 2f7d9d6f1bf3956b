"""A reward that differs within most groups whatever a model writes, so that GRPO moves weights."""


def odd_lengths(completions, **columns):
    return [float(len(completion[0]["content"]) % 2) for completion in completions]
