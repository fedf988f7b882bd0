"""Settings of everything that learns, one frozen section per part. `node.config` adds the process's own.

Units stand in names. Unknown keys are refused. Defaults suit the built-in model `tiny` on two CPU cores;
`node.config` lays a preset over them for larger models.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = [
    "CheckpointConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "RolloutConfig",
    "SapoConfig",
    "ScoringConfig",
    "Section",
    "TaskSourceConfig",
    "TasksConfig",
    "TrainerConfig",
]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(Section):
    """The policy."""

    name: str = Field("tiny", description="hub id, local folder, .gguf file, or built-in: tiny, smollm2-135m")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="computation; auto: bf16 where it is fast"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps (ROCm devices are named cuda)")
    system_prompt: str | None = Field(None, description="system message, for models with a chat template")


class TaskSourceConfig(Section):
    """One source of tasks, and its share of the mixture."""

    name: str = Field(description="a reasoning-gym task, or the path of a .jsonl file")
    weight: float = Field(1.0, gt=0, description="share of the mixture, relative to the other sources")
    config: dict[str, Any] = Field(default_factory=dict, description="settings of the reasoning-gym task")


class TasksConfig(Section):
    """What is asked, and how answers are read."""

    sources: tuple[TaskSourceConfig, ...] = Field((), description="the mixture; empty: what the model's preset names")
    answer: tuple[Literal["answer_tag", "boxed", "last_number", "whole_text"], ...] = Field(
        ("answer_tag", "boxed", "last_number"),
        min_length=1,
        description="where the answer stands in a completion; the first of these that is found counts",
    )
    partial_credit: Literal["none", "scorer"] = Field(
        "none", description="none: a reward is 1 for a fully correct answer and 0 otherwise; scorer: the scorer's float"
    )
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="share of questions that are never trained on")


class RolloutConfig(Section):
    """How completions are written."""

    num_completions: int = Field(8, ge=2, description="completions per group (the paper's L)")
    max_new_tokens: int = Field(32, ge=1, description="budget of a completion, in tokens")
    temperature: float = Field(1.0, gt=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: off")
    top_k: int = Field(0, ge=0, description="top-k sampling; 0: off")
    schedule: Literal["auto", "synchronous", "partial"] = Field(
        "auto", description="partial: go on next round with what is unfinished; auto: where completions may be long"
    )
    partial_above_tokens: int = Field(
        256, ge=1, description="auto: rollouts are partial where max_new_tokens is more than this"
    )
    over_provision: float = Field(
        0.0, ge=0, description="groups in flight for each group of a round, at least 1; 0: adapted to what pays"
    )
    max_over_provision: float = Field(
        6.0,
        ge=1,
        description="the most that over_provision is adapted to; max_age, where tokens of older policies are kept",
    )
    order: Literal["submission", "arrival"] = Field(
        "submission",
        description="submission: a round returns its own groups, without length bias; arrival: what is whole first",
    )
    max_age: int = Field(4, ge=1, description="arrival: rounds after which a group is waited for")
    stale_tokens: Literal["verify", "correct", "mask"] = Field(
        "verify",
        description="tokens of an older policy; verify: keep what the new one writes too, where the engine can; "
        "correct: importance sampling (trainer.tis_cap); mask: not trained on",
    )

    @field_validator("over_provision")
    @classmethod
    def _at_least_one(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("must be 0 or at least 1")
        return value

    @property
    def is_partial(self) -> bool:
        """Whether rollouts are partial under these settings."""
        return self.schedule == "partial" or (
            self.schedule == "auto" and self.max_new_tokens > self.partial_above_tokens
        )


class SapoConfig(Section):
    """Where a training batch comes from (arXiv 2509.08721)."""

    num_local: int = Field(8, ge=1, description="own groups per round (the paper's I)")
    num_external: int = Field(0, ge=0, description="groups from the swarm per round (the paper's J)")
    advantage: Literal["group_std", "group_mean"] = Field(
        "group_std", description="group_std: (reward - mean) / std; group_mean: reward - mean (Dr. GRPO)"
    )
    min_reward_spread: float = Field(
        1e-3, ge=0, description="a group whose rewards have a smaller standard deviation has advantage zero"
    )
    own_filter: bool = Field(
        True, description="whether own groups without an advantage are left out of a batch; the paper leaves it open"
    )
    fill: bool = Field(
        True, description="whether groups of others also take the places of own groups that have no advantage"
    )
    replace_missing: bool = Field(
        True, description="whether as many own groups take the places of external ones that are not there"
    )
    external_negative_weight: float = Field(
        0.3, ge=0, le=1, description="weight of external completions that are worse than their siblings; the paper's: 1"
    )
    own_negative_weight: float = Field(
        1.0, ge=0, le=1, description="the same for own completions: a control for experiments"
    )
    sampling: Literal["uniform", "value"] = Field(
        "uniform",
        description="how groups of others are drawn; value: those that teach this policy most are likelier",
    )
    uniform_share: float = Field(
        0.25, ge=0, le=1, description="sampling by value: weight of a group that is worth nothing, against 1 at best"
    )
    num_broad: int = Field(
        0, ge=0, description="own questions that ask again what drawn groups of others asked; both become one group"
    )
    first_completions: int = Field(
        0,
        ge=0,
        description="completions of each own question before the rest of the round goes to the hard ones; 0: all alike",
    )
    swing_damping: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much smaller J is, and larger I, while held-out pass@1 is below its best of late",
    )
    publish: Literal["informative", "all", "none"] = Field(
        "informative", description="own groups that the swarm is given; informative: those with an advantage"
    )
    max_external_tokens: int = Field(
        0, ge=0, description="tokens of a completion from the swarm; longer: refused; 0: twice rollout.max_new_tokens"
    )

    @field_validator("first_completions")
    @classmethod
    def _none_or_several(cls, value: int) -> int:
        if value == 1:
            raise ValueError("must be 0 or at least 2: one completion says nothing of how hard a question is")
        return value


class LoraConfig(Section):
    """Low-rank adapters, through peft."""

    rank: int = Field(0, ge=0, description="0: train all weights")
    alpha: float = Field(32.0, gt=0, description="scale of the adapter is alpha / rank")
    target_modules: str = Field("all-linear", description="peft's name for the layers that get an adapter")


class TrainerConfig(Section):
    """How the policy is updated."""

    learning_rate: float = Field(1e-4, gt=0, description="AdamW step size after warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first-moment decay")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW second-moment decay")
    epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon")
    warmup_updates: int = Field(0, ge=0, description="optimizer steps over which the learning rate rises from 0")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this global norm")
    clip_low: float = Field(0.2, gt=0, lt=1, description="ratio is clipped below 1 - clip_low")
    clip_high: float = Field(0.28, gt=0, description="ratio is clipped above 1 + clip_high (DAPO's clip-higher)")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL penalty to the initial policy; 0: no reference")
    normalization: Literal["grpo", "dr_grpo", "dapo", "gspo"] = Field(
        "dapo",
        description="grpo: mean over each completion; dapo: over all tokens; dr_grpo: constant; gspo: sequence ratio",
    )
    tis_cap: float = Field(2.0, gt=0, description="cap of the importance weight from engine to trainer log-probs")
    external_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="worse answers of others: tokens to which the own policy gives less than this weigh less; 0: not",
    )
    num_epochs: int = Field(1, ge=1, description="passes over a batch")
    num_minibatches: int = Field(1, ge=1, description="optimizer steps per pass")
    max_tokens_per_microbatch: int = Field(4096, ge=16, description="packed tokens per forward pass; bounds memory")
    logprob_chunk_tokens: int = Field(1024, ge=1, description="positions whose logits exist at one time")
    max_nonfinite_updates: int = Field(3, ge=1, description="consecutive non-finite updates that stop the node")
    lora: LoraConfig = LoraConfig()


class EngineConfig(Section):
    """The rollout engine."""

    backend: Literal["auto", "torch", "vllm"] = Field(
        "auto", description="which engine writes rollouts; auto: vLLM on GPUs where it is installed, else torch"
    )
    max_slots: int = Field(64, ge=1, description="sequences decoded at one time")
    max_seq_len: int = Field(0, ge=0, description="prompt and completion, in tokens; 0: what the run needs")
    speculation: Literal["off", "auto", "suffix", "ngram", "head"] = Field(
        "off",
        description="exact speculative decoding; auto: where it pays; suffix, ngram, head: always, by this drafter",
    )
    kv_cache_mb: int = Field(
        0, ge=0, description="vLLM's KV cache on each GPU; 0: what max_slots need, at most half of what is free"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that vLLM spreads the policy over")


class ScoringConfig(Section):
    """Sandboxed verification of answers."""

    num_workers: int = Field(1, ge=1, description="child processes that score")
    cpu_limit_s: float = Field(2.0, gt=0, description="processor time for one answer")
    wall_limit_s: float = Field(5.0, gt=0, description="time for one answer, waiting for a core aside; then it loses")
    memory_limit_mb: int = Field(1024, ge=256, description="address space a child may add to what it starts with")
    max_answer_chars: int = Field(8192, ge=1, description="a longer extracted answer scores 0 unread")


class EvaluationConfig(Section):
    """Held-out pass@1 of the node's own policy."""

    num_items: int = Field(256, ge=0, description="held-out questions; 0: no evaluation")
    every_rounds: int = Field(100, ge=0, description="rounds between evaluations; 0: only before and after")
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0 is greedy")


class CheckpointConfig(Section):
    """What survives a crash. Every finished round is in the journal; checkpoints bound what a resume replays."""

    interval_s: float = Field(
        30.0, ge=0, description="least seconds between checkpoints; stretched to cost at most 5 %"
    )
    keep: int = Field(2, ge=1, description="checkpoints kept; the newest readable one is used")
