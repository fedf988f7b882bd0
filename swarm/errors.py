"""The errors of `swarm`.

SwarmError
├── UserError            the person who runs the node can fix it; the message is one line that names the fix
│   ├── ModelError       a model that cannot be found or loaded
│   ├── EngineError      a rollout engine that is not installed or does not fit
│   ├── TaskError        an unknown task source, a refused scorer, a malformed task file
│   └── CheckpointError  a checkpoint that cannot be written or read
├── TaskRefError         a task reference that cannot be resolved here: data, to be counted
│   ├── UnknownSource    no source of this run has that name and digest: no offence of whoever sent it
│   └── InvalidTaskRef   the source is ours and has no such item
├── ScoringError         scoring processes that do not start, or that the platform cannot confine
│   └── PoolClosed       they were ended by another thread while something was being scored
├── EngineFailed         the process of a rollout engine failed or is gone
└── TrainingDiverged     three non-finite updates in a row; the last good checkpoint is intact
"""

__all__ = [
    "CheckpointError",
    "EngineError",
    "EngineFailed",
    "InvalidTaskRef",
    "ModelError",
    "PoolClosed",
    "ScoringError",
    "SwarmError",
    "TaskError",
    "TaskRefError",
    "TrainingDiverged",
    "UnknownSource",
    "UserError",
]


class SwarmError(Exception):
    """Root of everything that `swarm` raises on purpose."""


class UserError(SwarmError):
    """Something that the person who runs the node can fix. One line, no traceback, exit status 2."""


class ModelError(UserError):
    """A model that cannot be found or loaded."""


class EngineError(UserError):
    """A rollout engine that is not installed or does not fit."""


class TaskError(UserError):
    """An unknown task source, a scorer that is refused, or a malformed task file."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class TaskRefError(SwarmError):
    """A task reference that cannot be resolved here."""


class UnknownSource(TaskRefError):
    """No source of this run has that name and digest."""


class InvalidTaskRef(TaskRefError):
    """The source is ours, and it has no such item."""


class ScoringError(SwarmError):
    """Scoring processes that do not start, or that this platform cannot confine."""


class PoolClosed(ScoringError):
    """The scoring processes were ended while something was being scored."""


class EngineFailed(SwarmError):
    """The process of a rollout engine failed or is gone; the message ends with what it printed last."""


class TrainingDiverged(SwarmError):
    """Several non-finite losses or gradients in a row."""
