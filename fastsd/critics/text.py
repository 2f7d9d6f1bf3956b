"""A critic made of a writer (a model that answers conversations) and what is done with its text.

    rollout -> conversation -> cache, else writer -> thinking stripped -> validated -> Critique

What a writer sends is kept as it came; stripping and validation are done anew on every read, so a
resumed run gets the same feedback from the cache. A reply that did not arrive is a failure with a
class of its own: it is counted, never replaced by text of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastsd.config.sections import CriticConfig
from fastsd.critics.prompt import critic_messages, solve_messages, strip_thinking
from fastsd.critics.validation import validate_all
from fastsd.critics.writer import Writer, WriterUnavailable
from fastsd.serving.cache import Reply, ReplyCache
from fastsd.types import Conversation, Critique, Prompt, Reward, Rollout


class TextCritic:
    """`fastsd.types.Critic` from a writer.

    folder: of the cache. reward: the run's own, by which a critique's answer is right or wrong;
    None: not checked. tokenizer: the solver's, whose special tokens no critique may hold; None: not
    checked.
    """

    def __init__(
        self, writer: Writer, config: CriticConfig, folder: Path, reward: Reward | None, tokenizer
    ):
        self.writer, self.config = writer, config
        self.cache = ReplyCache(folder)
        self.reward, self.tokenizer = reward, tokenizer
        self.name = writer.name

    def critique(self, rollouts: Sequence[Rollout]) -> list[Critique]:
        """One critique for each rollout. Raises WriterUnavailable; what arrived is in the cache."""
        replies = self._ask([critic_messages(rollout, self.config) for rollout in rollouts])
        return judged(replies, rollouts, self.config, self.reward, self.tokenizer)

    def solve(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """The writer's own answer to each question; None where no whole one came."""
        replies = self._ask([solve_messages(prompt) for prompt in prompts])
        return [None if reply_problem(r) else strip_thinking(r.text or "") for r in replies]

    def _ask(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """Replies in order. A conversation that comes twice, or came before, is asked once."""
        identity = self.writer.identity
        keys = [self.cache.key(identity, conversation) for conversation in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        found = {key: reply for key in distinct if (reply := self.cache.read(key)) is not None}
        missing = [key for key in distinct if key not in found]
        if missing:
            found |= zip(missing, self._write([distinct[key] for key in missing]), strict=True)
        return [found[key] for key in keys]

    def _write(self, conversations: Sequence[Conversation]) -> list[Reply]:
        try:
            replies = self.writer.write(conversations)
        except WriterUnavailable as stop:
            self._keep((conversations[i], reply) for i, reply in stop.partial.items())
            raise
        self._keep(zip(conversations, replies, strict=True))
        return replies

    def _keep(self, pairs: Iterable[tuple[Conversation, Reply]]) -> None:
        """Only what arrived: a failure is asked again next time."""
        for conversation, reply in pairs:
            if reply.text is not None and reply.failure is None:
                self.cache.write(self.writer.identity, conversation, reply)


def reply_problem(reply: Reply) -> str | None:
    """Why a reply cannot be looked into at all; None where it can."""
    if reply.text is None or reply.failure is not None:
        return reply.failure or "no_reply"
    return "too_long" if reply.truncated else None


def judged(
    replies: Sequence[Reply],
    rollouts: Sequence[Rollout],
    config: CriticConfig,
    reward: Reward | None,
    tokenizer,
) -> list[Critique]:
    """Replies as critiques of the rollouts: failures by their class, the others validated."""
    critiques = [Critique(None, problem=reply_problem(reply)) for reply in replies]
    whole = [i for i, critique in enumerate(critiques) if critique.problem is None]
    texts = [strip_thinking(replies[i].text or "") for i in whole]
    attempts = [rollouts[i] for i in whole]
    validated = validate_all(texts, attempts, config, reward, tokenizer)
    for i, critique in zip(whole, validated, strict=True):
        critiques[i] = critique
    return critiques
