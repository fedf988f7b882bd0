"""What becomes of a group that another node wrote, with a policy of bytes, a source of sums and no process."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from node.config import RunConfig
from node.rescoring import Rescorer, build_rescorer
from protocol.messages import SharedCompletion, SharedGroup, TaskRef
from swarm.config import ModelConfig
from swarm.errors import InvalidTaskRef, PoolClosed, UnknownSource
from swarm.policy import load_policy
from swarm.tasks import build_task_set
from swarm.types import Task

END = 0


class BytePolicy:
    def encode_prompt(self, question):
        return tuple(question.encode())

    def encode_completion(self, text, *, finished):
        if "?" in text:
            return None
        return tuple(text.encode()) + (END,) * finished


class Sums:
    def resolve(self, ref):
        if ref.source != "sums":
            raise UnknownSource("no such source")
        if ref.index > 99:
            raise InvalidTaskRef("no such item")
        return Task(ref, f"{ref.index} + {ref.index} =")

    def is_heldout(self, question):
        return question.startswith("7 ")


class Scorer:
    def __init__(self):
        self.threads = set()
        self.num_started = self.num_scored = self.num_closed = 0
        self.outcomes = {}
        self.closed = threading.Event()
        self.wait_for_close = False
        self.scoring = threading.Event()

    def start(self, *, wait=True):
        assert not wait
        self.num_started += 1

    def score(self, jobs):
        self.threads.add(threading.current_thread().name)
        self.num_scored += len(jobs)
        self.scoring.set()
        if self.wait_for_close:
            assert self.closed.wait(60)
            raise PoolClosed("closed")
        return [
            SimpleNamespace(reward=float(text == str(2 * ref.index)), outcome=self.outcomes.get(text, "scored"))
            for ref, text in jobs
        ]

    def close(self):
        self.num_closed += 1
        self.closed.set()


CONFIG = RunConfig.model_validate({"rollout": {"max_new_tokens": 4, "num_completions": 3}})


@pytest.fixture
def scorer():
    return Scorer()


@pytest.fixture
def judge(scorer):
    """Return a function that judges groups, one after another, by a rescorer of its own."""

    def judge(*groups, config=CONFIG, max_sequence_tokens=1000):
        async def run():
            rescorer = Rescorer(
                config,
                build=lambda: (BytePolicy(), Sums(), scorer),
                max_sequence_tokens=max_sequence_tokens,
                longest_token_chars=1,
            )
            try:
                return [await rescorer(group) for group in groups]
            finally:
                await rescorer.close()

        found = asyncio.run(run())
        return found if len(groups) > 1 else found[0]

    return judge


def group(*texts, index=2, source="sums", finished=True):
    return SharedGroup(TaskRef(source, "0" * 32, 0, index), tuple(SharedCompletion(text, finished) for text in texts))


def test_a_group_becomes_one_of_this_nodes_own_kind_with_its_own_rewards(judge, scorer):
    found = judge(group("4", "5"))
    assert (found.verdict, found.rewards, found.informative) == ("scored", (1.0, 0.0), True)
    own = found.payload
    assert own.task.question == "2 + 2 ="
    assert own.prompt_ids == tuple(b"2 + 2 =")
    assert own.texts == ("4", "5")
    assert own.rewards == (1.0, 0.0)
    assert [one.token_ids for one in own.completions] == [(ord("4"), END), (ord("5"), END)]
    assert {one.finish_reason for one in own.completions} == {"stop"}
    assert {one.logprobs for one in own.completions} == {()}
    assert scorer.num_closed > 0
    assert all(name.startswith("rescoring") for name in scorer.threads)


def test_a_completion_that_ran_into_its_budget_gets_no_end(judge):
    own = judge(group("4", "5", finished=False)).payload
    assert [one.token_ids for one in own.completions] == [(ord("4"),), (ord("5"),)]
    assert {one.finish_reason for one in own.completions} == {"length"}


def test_equal_rewards_are_not_informative(judge):
    assert not judge(group("5", "6")).informative
    assert not judge(group("4", "4")).informative


@pytest.mark.parametrize(
    ("sent", "verdict"),
    [
        (group("4", "5", source="products"), "unknown_task"),
        (group("4", "5", index=100), "invalid"),
        (group("14", "15", index=7), "held_out"),
        (group("4", "what?"), "unencodable"),
        (group("4", "123456789"), "too_long"),
    ],
)
def test_what_is_refused_is_never_scored(judge, scorer, sent, verdict):
    found = judge(sent)
    assert (found.verdict, found.payload) == (verdict, None)
    assert scorer.num_scored == 0


def test_the_longest_that_is_taken_is_twice_the_own_budget_or_what_is_set(judge):
    assert judge(group("4", "12345678")).verdict == "scored"
    other = RunConfig.model_validate(CONFIG.model_dump() | {"sapo": {"max_external_tokens": 9}})
    assert judge(group("4", "123456789"), config=other).verdict == "scored"
    assert judge(group("4", "1234567890"), config=other).verdict == "too_long"
    # "2 + 2 =" has 7 tokens, "1234" and its end 5.
    assert judge(group("4", "1234"), max_sequence_tokens=12).verdict == "scored"
    assert judge(group("4", "1234"), max_sequence_tokens=11).verdict == "too_long"


def test_of_a_very_large_group_only_twice_the_own_number_is_looked_at(judge, scorer):
    found = judge(group("4", "5", "6", "4", "5", "6", "4", "what?", "123456789"))
    assert found.rewards == (1.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    assert scorer.num_scored == 6


def test_answers_that_cost_the_scorer_its_limits_are_an_offence_from_the_second_on(judge, scorer):
    scorer.outcomes = {"8": "cpu_limit", "9": "crashed"}
    assert judge(group("4", "8")).verdict == "scored"
    assert judge(group("4", "8", "9")).verdict == "invalid"


def test_leaving_does_not_wait_for_what_is_being_scored(scorer):
    scorer.wait_for_close = True

    async def run():
        rescorer = Rescorer(
            CONFIG, build=lambda: (BytePolicy(), Sums(), scorer), max_sequence_tokens=99, longest_token_chars=1
        )
        calls = [asyncio.ensure_future(rescorer(group("4", "5"))) for _ in range(3)]
        await asyncio.to_thread(scorer.scoring.wait, 60)
        for call in calls:
            call.cancel()
        await rescorer.close()
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(run())
    assert all(isinstance(one, asyncio.CancelledError) for one in found)
    assert scorer.num_scored == 2, "one group, and none of those that waited"


def test_the_real_parts_score_what_the_built_in_model_might_have_written():
    sources = [{"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}]
    config = RunConfig.model_validate(
        {"tasks": {"sources": sources, "answer": ["whole_text"]}, "rollout": {"max_new_tokens": 8}}
    )
    policy = load_policy(ModelConfig())
    [task] = build_task_set(config.tasks, 0).train_batch(1, 1)
    heldout = build_task_set(config.tasks, 0).heldout(1)[0]
    left, sign, right = task.question.split(":")[-1].split("=")[0].split()
    right_answer = str(int(left) + int(right) if sign == "+" else int(left) - int(right))

    async def run():
        rescorer = build_rescorer(config, policy)
        try:
            texts = (SharedCompletion(right_answer, True), SharedCompletion("77", True))
            return [await rescorer(SharedGroup(ref, texts)) for ref in (task.ref, heldout.ref)]
        finally:
            await rescorer.close()

    scored, refused = asyncio.run(run())
    assert scored.rewards == (1.0, 0.0)
    assert scored.payload.prompt_ids == policy.encode_prompt(task.question)
    assert scored.payload.completions[0].token_ids[-1] == policy.end_token_id
    assert refused.verdict == "held_out"
