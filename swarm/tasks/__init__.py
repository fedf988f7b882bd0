"""Verifiable tasks by reference.

base          the contract of a source; the hashes that draw and split
gym           reasoning-gym tasks, of which gym_safety says what may be scored and gym_scorers how
jsonl         files of questions, judged by verifiers
mixture       which item is asked when; train and held-out
answers       where the answer stands in a completion
expressions,  hostile text read without evaluating it
literals
"""

from swarm.tasks.answers import extract_answer
from swarm.tasks.base import SourceSpec, TaskSource
from swarm.tasks.mixture import TaskSet, build_source, build_task_set

__all__ = ["SourceSpec", "TaskSet", "TaskSource", "build_source", "build_task_set", "extract_answer"]
