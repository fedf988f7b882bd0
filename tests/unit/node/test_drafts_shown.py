"""Speculation beside the rounds: what is kept of it, what others' completions are to it, what is shown of it."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from node.display import PlainDisplay, RunInfo
from node.drafts_shown import drafts
from node.exchange import SiloExchange
from node.live import LiveDisplay
from node.stats import stats_view
from node.status import build_status, training_status
from protocol.messages import TaskRef
from swarm import cores
from swarm.drafting.drafting import Drafting
from swarm.drafting.idle import IdleTime
from swarm.drafting.speculator import make_speculator
from swarm.engine.base import EngineStats
from swarm.types import Completion, RolloutGroup, Segment, Task

INFO = RunInfo("silo", "tiny", "chain_sum", 100, "runs/x")
ROW = {
    "round": 1, "reward_mean": 0.25, "reward_moving_average": 0.2, "tokens_per_s": 12345.6, "rollout_s": 0.5,
    "scoring_s": 0.1, "update_s": 0.4, "round_s": 2.0, "evaluation_s": 0.0, "peak_rss_bytes": 3 * 2**20,
}  # fmt: skip
DRAFTED = ROW | {
    "accepted_length": 2.5, "draft_acceptance": {"suffix": 0.5, "head": 0.75},
    "num_drafted": {"suffix": 10, "head": 40},
    "num_draft_kept": {"suffix": 5, "head": 30}, "draft_arms": {"1": "head/8/16", "5": "off"}, "drafter_loss": 1.25,
    "num_drafter_steps": 3, "drafter_idle_s": 0.0, "drafter_s": 0.1, "draft_saved_s": 0.5,
}  # fmt: skip
SHOWN = (
    "2.50 tokens a pass; suffix 50% kept, head 75% kept; arms from 1: head/8/16, from 5: off; drafter's loss 1.250; "
)


def test_a_round_says_how_drafts_fared_and_nothing_where_there_are_none():
    assert drafts(ROW) == ""
    assert drafts(DRAFTED) == f"  drafts {SHOWN}saved 0.500 s"
    none = DRAFTED | {
        "accepted_length": None, "draft_acceptance": {}, "draft_arms": {}, "drafter_loss": None, "draft_saved_s": None
    }  # fmt: skip
    assert drafts(none) == "  drafts no arm yet"


def test_plain_lines_and_the_live_panel_show_it():
    out = io.StringIO()
    display = PlainDisplay(out, lambda: 0.0)
    display.begin(INFO)
    display.round(DRAFTED)
    assert SHOWN in out.getvalue()
    live = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None), lambda: 0.0)
    live.begin(INFO)
    live.round(DRAFTED)
    with live._console.capture() as captured:
        live._console.print(live.render())
    live.end()
    assert SHOWN in captured.get()


def test_stats_have_the_mean_of_the_last_rounds():
    rows = [
        DRAFTED,
        DRAFTED | {"accepted_length": 1.5, "num_draft_kept": {"suffix": 0, "head": 10}, "draft_saved_s": 0.1},
    ]
    node = SimpleNamespace(
        rows=rows, pass_at_1_heldout=None, recorder=SimpleNamespace(last_round=2), phase="rollout",
        config=SimpleNamespace(rounds=9, sapo=SimpleNamespace(num_local=8, num_external=0)),
    )  # fmt: skip
    training = training_status(node, "tiny", "chain_sum")
    assert training["drafts"]["accepted_length"] == 2.0
    assert training["drafts"]["draft_acceptance"] == {"head": 0.5, "suffix": 0.25}
    console = Console(file=io.StringIO(), width=250, color_system=None)
    with console.capture() as captured:
        console.print(stats_view(build_status("silo", "runs/x", 0.0, training, None)))
    assert "2.00 tokens a pass; head 50% kept, suffix 25% kept; arms from 1: head/8/16" in captured.get()
    assert "saved 0.300 s a round" in captured.get()
    node.rows = [ROW]
    assert training_status(node, "tiny", "chain_sum")["drafts"] is None


class OneGroup(SiloExchange):
    """Somebody else has answered a question of this round, and one of another."""

    async def sample(self, num_groups):
        written = tuple(Completion(i, (5, 6, i), (-0.1,) * 3, (Segment(0, 0, 3),), "stop") for i in range(2))
        tasks = [Task(TaskRef("numbers", "0" * 32, seed, 0), "?") for seed in (1, 77)]
        return [RolloutGroup(task, (task.ref.seed,), written, ("0", "1"), (0.0, 1.0)) for task in tasks]


def test_what_others_wrote_to_this_rounds_questions_is_learned_from(harness):
    drafting, learned = Drafting(make_speculator("suffix")), []
    drafting.speculator.learn = lambda prompt_ids, token_ids: learned.append((prompt_ids, token_ids))
    harness(exchange=OneGroup(), drafting=drafting).settings(rounds=1).run()
    assert learned == [((1,), (5, 6, 0)), ((1,), (5, 6, 1))]


def test_the_tuner_goes_on_where_it_was(harness):
    drafting = Drafting(make_speculator("auto"))
    tuner = drafting.speculator.strategy
    chosen = next(one for one in tuner.strategies if one.drafter == "suffix")
    for _ in range(400):
        strategy = tuner.choose(3)
        tuner.observe(3, 12 if strategy == chosen else 3, 0.01)
    assert tuner.incumbents()[3] == chosen
    first = harness(drafting=drafting).settings(rounds=2, evaluation={"num_items": 0}).run()
    assert first.rows[-1]["draft_arms"] == {"3": chosen.key}
    again = Drafting(make_speculator("auto"))
    harness(drafting=again).settings(rounds=3, evaluation={"num_items": 0}).run()
    assert again.speculator.strategy.incumbents() == {3: chosen}
    assert again.speculator.strategy.choose(3) == chosen
    other = Drafting(make_speculator("suffix"))  # other settings: nothing of use, and nothing in the way
    harness(drafting=other).settings(rounds=4, evaluation={"num_items": 0}).run()


class Steps:
    """A learner of which each step takes as long as the clock says."""

    can_learn = True

    def __init__(self, clock, step_s):
        self.clock, self.step_s, self.num_steps, self.loss = clock, step_s, 0, None

    def step(self, given_up=lambda: False):
        self.clock.now += self.step_s
        self.num_steps += 1
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("step_s", [0.001, 0.01, 0.3])
def test_learning_takes_less_than_a_twentieth_of_the_time(step_s):
    clock = Clock()
    learner = Steps(clock, step_s)
    drafting = Drafting(make_speculator("auto"), learner, clock)
    for _ in range(200):
        clock.now += 1.0
        drafting.catch_up()
    share = learner.num_steps * step_s / clock.now
    assert 0.03 < share < 0.05
    row = drafting.describe()
    assert (row["num_drafter_steps"], row["drafter_s"]) == (
        learner.num_steps,
        pytest.approx(learner.num_steps * step_s),
    )
    drafting.close()


class Waiting:
    """An engine, as far as it is asked how much it has written."""

    def __init__(self):
        self.stats = EngineStats()


@pytest.mark.parametrize("slower", [1.0, 3.0])
def test_learning_beside_the_engine_goes_on_where_it_slows_nothing(slower):
    clock, engine = Clock(), Waiting()
    learner = Steps(clock, 0.0)
    drafting = Drafting(make_speculator("auto"), learner, clock, num_spare_cores=1)
    entered = []
    drafting._spare.__class__ = type("Told", (IdleTime,), {"__enter__": lambda idle: entered.append(1) or idle})
    for _ in range(400):
        num = len(entered)
        with drafting.beside(engine):
            clock.now += 0.5 * (slower if len(entered) > num else 1.0)
            engine.stats.num_tokens_generated += 100
    assert (len(entered) > 200) == (slower == 1.0)
    assert clock.now < 1.1 * 400 * 0.5
    drafting.close()


def test_a_machine_without_spare_cores_does_not_learn_beside_the_engine():
    clock = Clock()
    drafting = Drafting(make_speculator("auto"), Steps(clock, 1.0), clock)
    with drafting.beside(Waiting()):
        pass
    assert drafting.learner.num_steps == 0
    drafting.close()


def test_spare_cores_are_those_that_no_thread_of_the_engine_has(monkeypatch):
    monkeypatch.setattr(cores, "num_cpus", lambda: 8)
    monkeypatch.setattr(cores.psutil, "cpu_count", lambda logical: 6)
    assert [cores.num_spare_cores(num) for num in (1, 4, 6, 8)] == [5, 2, 0, 0]
    before = torch.get_num_threads()
    drafting = Drafting(make_speculator("auto"), Steps(Clock(), 1.0), num_spare_cores=3)
    assert torch.get_num_threads() == before
    drafting.close()
