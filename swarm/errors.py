"""The errors of `swarm`.

    SwarmError
    ├── UserError            the person who runs the node can fix it; the message is one line that names the fix
    │   ├── ModelError       a model that cannot be found or loaded
    │   ├── TaskError        an unknown task source, a refused scorer, a malformed task file
    │   └── CheckpointError  a checkpoint that cannot be written or read
    └── TrainingDiverged     three non-finite updates in a row; the last good checkpoint is intact
"""

__all__ = ["CheckpointError", "ModelError", "SwarmError", "TaskError", "TrainingDiverged", "UserError"]


class SwarmError(Exception):
    """Root of everything that `swarm` raises on purpose."""


class UserError(SwarmError):
    """Something that the person who runs the node can fix. One line, no traceback, exit status 2."""


class ModelError(UserError):
    """A model that cannot be found or loaded."""


class TaskError(UserError):
    """An unknown task source, a scorer that is refused, or a malformed task file."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class TrainingDiverged(SwarmError):
    """Several non-finite losses or gradients in a row."""
