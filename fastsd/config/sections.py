"""The sections of a configuration, each a frozen model with its defaults.

Defaults are for real Hugging Face models. Docstrings are the help text of the flags.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "sampled_token"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class LoraConfig(Section):
    r: int = Field(default=64, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=128, gt=0)
    """Scale of the adapters: updates are multiplied by alpha / r."""
    target_modules: list[str] = [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    """Names of the linear layers that get an adapter."""


class ModelConfig(Section):
    name: str = ""
    """A folder, a Hugging Face model name, or "chain_sum" for the shipped base."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type. auto: bfloat16 where the processor has it. Master weights stay float32."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (peft) instead of all weights."""
    freeze: list[str] = []
    """Train everything except parameters whose name contains one of these strings."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, about a third more time."""


class TeacherConfig(Section):
    kind: Literal["live", "ema", "frozen", "adapter_off"] = "frozen"
    """live: the student's own weights. ema: their moving average. frozen: the initial weights.
    adapter_off: the initial weights by switching LoRA off (no second copy)."""
    ema_rate: float = Field(default=0.05, gt=0, le=1)
    """teacher <- (1 - ema_rate) * teacher + ema_rate * student after each update."""


class DataConfig(Section):
    task: str | None = None
    """A procedural task by name: "chain_sum", "word_problems" or "reasoning_gym"."""
    task_options: dict[str, Any] = {}
    """Options of that task, e.g. reference_phrasing = "own" (chain_sum)."""
    train: str | None = None
    """A .jsonl or .parquet file of training rows."""
    eval: str | None = None
    """A .jsonl or .parquet file of held-out rows."""
    columns: dict[str, str] = {}
    """Our field (prompt, messages, question, problem, answer, solution) -> your column."""
    shuffle: bool = True
    """Shuffle training rows anew in each epoch, by seed."""


TEACHER_TEMPLATE = (
    "{question}\n\nHere is a worked solution to this problem:\n\n"
    "{feedback}\n\nNow solve the problem."
)


class PromptConfig(Section):
    system: str | None = None
    """A system message put before every prompt that has none."""
    reference_template: str = TEACHER_TEMPLATE
    """The teacher's user turn under `reference`. {question} must come first."""
    sibling_template: str = TEACHER_TEMPLATE
    """The teacher's user turn under `sibling`. {question} must come first."""
    critique_template: str = TEACHER_TEMPLATE
    """The teacher's user turn under `critique`. {question} must come first."""
    student_template_kwargs: dict[str, Any] = {}
    """Keyword arguments of the chat template for the student, e.g. enable_thinking = false."""
    teacher_template_kwargs: dict[str, Any] = {}
    """The same for the self-teacher."""
    max_prompt_tokens: int = Field(default=4096, ge=1)
    """Longest student prompt. A longer one is an error: the question is never cut."""
    max_feedback_tokens: int = Field(default=4096, ge=1)
    """Longest feedback text."""
    feedback_overflow: Literal["error", "cut"] = "cut"
    """cut: keep whole steps (lines) from the start of feedback that is too long, also for the
    positions that the model has left, and count it."""


class RolloutConfig(Section):
    engine: Literal["inprocess", "vllm"] = "inprocess"
    """inprocess: the sampler of this process. vllm: servers at rollout.servers."""
    servers: list[str] = []
    """vllm: base URLs of the servers, e.g. http://127.0.0.1:8000."""
    concurrency: int = Field(default=32, ge=1)
    """vllm: groups under way at once at each server."""
    server_tokens: int = Field(default=0, ge=0)
    """vllm: tokens under way at once at each server, prompts and the longest responses counted,
    e.g. the size of its KV cache; 0: no limit. A group that is larger goes alone."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """vllm: longest wait for one group, and for weights over NCCL; a server that takes longer is
    lost."""
    max_staleness: int = Field(default=0, ge=0)
    """vllm: responses may come from weights that are up to this many updates old, which saves
    handing them over; 0: the servers get them before each batch."""
    sync: Literal["auto", "files", "nccl"] = "auto"
    """vllm: how servers get the weights. files: a folder in the run folder, which they must be able
    to read. nccl: vLLM's weight transfer, from GPU to GPU. auto: nccl where all is there for it."""
    prompts_per_step: int = Field(default=4, ge=1)
    """Questions per optimizer step."""
    steps_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps on one batch of rollouts; above 1 the later ones are slightly off-policy."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """G: responses per question."""
    max_new_tokens: int = Field(default=2048, ge=1)
    """Longest response."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the loss divides both sides' logits by it too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: keep the smallest set of tokens with this mass."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    stop: list[str] = []
    """Extra stop tokens beside the generation config's end-of-sequence ids."""
    batch_rows: int = Field(default=256, ge=1)
    """Responses decoded at once. Results do not depend on it."""


class RewardConfig(Section):
    function: str = "math"
    """"task" (the task's own check), "exact", "math" (math-verify), or "module:function" with TRL's
    signature."""
    timeout_s: float = Field(default=1.0, gt=0)
    """An answer that takes longer to check scores 0 and its worker is killed."""


class CriticConfig(Section):
    kind: Literal["rule", "local", "server", "replay"] = "rule"
    """rule: the task's own rules. local: a frozen Hugging Face model in this process. server: an
    OpenAI-compatible endpoint. replay: critiques from a file."""
    variant: str = "local"
    """rule: "local" judges each step on the attempt's own numbers; "continued" goes on from the
    corrected total."""
    sees: Literal["question", "answer", "solution"] = "solution"
    """What the critic is given beside the attempt: nothing more, the answer, or the solution."""
    quoting: Literal["verbatim", "full", "none"] = "verbatim"
    """verbatim: repeats the steps before the first wrong one, then goes on right. For ablations,
    full: quotes the wrong step too; none: comments without quoting."""
    model: str = ""
    """local: a folder or Hugging Face name. server: the name that the endpoint serves."""
    url: str = ""
    """server: base URL of the endpoint, e.g. http://127.0.0.1:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """server: name of the environment variable that holds the key; it is never written anywhere."""
    template_kwargs: dict[str, Any] = {}
    """Keyword arguments of the critic's chat template, e.g. enable_thinking = true."""
    max_tokens: int = Field(default=4096, ge=1)
    """Longest reply, thinking included; a longer one is invalid ("too_long")."""
    min_verbatim: float = Field(default=0.5, ge=0, le=1)
    """With verbatim quoting: the least share of a right attempt's steps that a critique must repeat
    before its first change; less is invalid ("not_verbatim")."""
    on_invalid: Literal["drop_rollout", "drop_group", "reward_only"] = "drop_rollout"
    """What becomes of a rollout without a valid critique; reward_only: the GRPO term keeps it."""
    concurrency: int = Field(default=16, ge=1)
    """server: requests under way at once."""
    timeout_s: float = Field(default=120.0, gt=0)
    """server: longest wait for one reply, from first byte sent to last byte received."""
    retries: int = Field(default=2, ge=0)
    """server: further attempts of a request that failed in transit."""
    budget_s: float = Field(default=600.0, gt=0)
    """server: wall time for all critiques of one batch; what is not there by then is invalid."""
    cache: str = ""
    """Folder of replies by content, shared by runs; empty: critiques/ in the run folder."""
    file: str = ""
    """replay: a completions .parquet, a folder of them, or .jsonl rows with question, response,
    critique."""


class LossConfig(Section):
    divergence: Divergence = "forward_kl"
    """forward_kl = KL(T||S), reverse_kl = KL(S||T), jsd, sampled_token (reverse KL on the sampled
    token)."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """jsd only: beta*KL(T||m) + (1-beta)*KL(S||m), m = (1-beta)*S + beta*T."""
    top_k: int | None = Field(default=None, ge=1)
    """Divergence over the student's k likeliest tokens only."""
    tail: bool = True
    """With top_k: add one bucket for the rest of the vocabulary."""
    entry_clip: float | None = Field(default=None, gt=0)
    """Clamp each vocabulary entry's contribution (OPSD). Off by default: it reverses clipped
    gradients."""
    divergence_weight: float | None = None
    """Weight of the divergence; unset: the condition's own (1 with a teacher, 0 without)."""
    policy_weight: float | None = None
    """Weight of the GRPO term; unset: the condition's own (1 for grpo, else 0). Both: a hybrid."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus."""
    clip: float | None = Field(default=0.2, gt=0)
    """PPO clip of the probability ratio to [1-clip, 1+clip]; none: plain policy gradient."""
    impl: Literal["auto", "reference", "chunked", "native", "triton"] = "auto"
    """Implementation of the loss head."""


class OptimConfig(Section):
    steps: int = Field(default=100, ge=1)
    """Optimizer steps."""
    lr: float = Field(default=5e-6, gt=0)
    """Peak learning rate (AdamW)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay; never on biases and norms."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine decays to zero at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Linear warm-up."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Packed tokens through the network at once, the student's and the teacher's each; more are
    accumulated. A group that does not fit goes in parts. Results change only by rounding."""


class EvalConfig(Section):
    every: int = Field(default=0, ge=0)
    """Evaluate every N updates; 0: at the end only (and before the first update)."""
    questions: int = Field(default=128, ge=1)
    """Held-out questions."""
    samples: int = Field(default=12, ge=1)
    """k of Avg@k, pass@k and maj@k."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the evaluation."""
    seed: int = 7
    """Seed of the evaluation's sampling: the same for every condition."""


class GuardConfig(Section):
    spike_sigma: float = Field(default=6.0, ge=0)
    """Skip an update whose gradient norm or loss lies this many standard deviations above the mean
    of the last guard.spike_window updates, in logarithms; 0: off. A loss of either sign is not
    judged."""
    spike_window: int = Field(default=128, ge=16)
    """Updates that the spike rule looks back on; it is silent until they are there."""
    collapse: Literal["stop", "warn", "off"] = "stop"
    """On signs of collapse (length, entropy, repetition, truncation): stop with a checkpoint and
    exit code 4, print a warning, or do nothing."""


class ReportConfig(Section):
    questions: int = Field(default=16, ge=0)
    """Held-out questions on which each context's advantages are measured before training; 0: none.
    With a model as critic each sample costs a critique."""
    samples: int = Field(default=4, ge=1)
    """Responses per question for it."""
    rollouts: int = Field(default=16, ge=0)
    """Of these, how many the report shows token by token, wrong ones first."""
    alternatives: int = Field(default=3, ge=0)
    """The teacher's likeliest tokens kept for each token."""


class LogConfig(Section):
    completions_every: int = Field(default=10, ge=1)
    """Write completions to completions/*.parquet every N updates (and the first and last)."""
    print_every: int = Field(default=0, ge=0)
    """Print a table of sample completions every N updates; 0: never."""
    print_rows: int = Field(default=4, ge=1)
    """Rows of that table."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Where metrics go beside metrics.jsonl."""
    project: str = "fastsd"
    """The trackers' project name."""


class FilterConfig(Section):
    samples: int = Field(default=16, ge=1)
    """python -m fastsd.data filter: responses of the solver per question."""
    below: float = Field(default=0.3125, ge=0, le=1)
    """Keep questions that the solver gets right in a smaller share of them than this."""
    above: float = Field(default=-1.0, ge=-1, le=1)
    """Keep questions that it gets right in a larger share than this; -1: also hopeless ones."""
    format: Literal["tags", "steps", "any"] = "steps"
    """tags: <step_1> ... </step_1>; steps: any numbered form or tags; any: not checked."""
    format_share: float = Field(default=0.5, ge=0, le=1)
    """Keep questions of which at least this share of responses has that format."""
    critic_solves: bool = True
    """Keep questions that the critic answers right, given the question alone."""


class ParallelConfig(Section):
    timeout_s: float = Field(default=600.0, gt=0)
    """With many processes (torchrun): how far one may fall behind the others, in rollouts above
    all, before the run ends."""
    head: Literal["auto", "gathered", "sharded"] = "auto"
    """The loss head of many processes: each gathers all of it, or each keeps a part of the
    vocabulary and is sent all hidden states; auto: by the size of vocabulary and step."""
    reduce_dtype: Literal["float32", "model"] = "float32"
    """What gradients are summed in over processes; model: the compute type, half the bytes."""


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=0)
    """Save every N updates; 0: at the end only."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
