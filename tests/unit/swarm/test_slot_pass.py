"""Passes over slots as a GPU runs them: buckets, padding, and graphs that are replayed, all of it on the CPU.

That completions are those of any other runner is held by tests/contract, whose device steps are such passes.
"""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.config import EngineConfig
from swarm.drafting.base import Drafter
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.graphs import GraphPool
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.slot_pass import SlotPass
from swarm.engine.torch.slots import Running, Slots
from tests.unit.swarm.recording import OpsRecorder

VOCAB, CAPACITY = 61, 80


@cache
def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.1)
    return made


def asked(num: int, tokens: int = 40) -> list[Request]:
    settings = ((1.0, 1.0, 0), (0.0, 1.0, 0), (0.7, 0.9, 5))  # temperature, top-p, top-k
    return [
        Request(
            at, tuple((7 * at + i * i) % VOCAB for i in range(3 + 5 * at)), 11 * at + 3, SamplingParams(tokens, *one)
        )
        for at, one in zip(range(num), settings * num, strict=False)
    ]


class Oracle(Drafter):
    """Says what is written, up to a number of tokens that differs by sequence, the last of them wrong."""

    name = "oracle"

    def __init__(self, truth: dict[int, tuple[int, ...]], num_states: int = 0) -> None:
        self.truth, self.num_states, self.states = truth, num_states, []  # type: ignore[misc]

    def propose(self, states, depth, budget, worth=None):
        drafts = []
        for state in states:
            ahead = self.truth[state.request_id][state.num_written :]
            draft = list(ahead[: min(depth, state.room, 1 + (state.request_id * 3 + state.num_written) % depth)])
            if len(draft) > 2:
                draft[-1] = (draft[-1] + 1) % VOCAB
            drafts.append(draft)
        return drafts

    def saw(self, seen, states):
        self.states.append((seen(), states.clone(), states))

    def observe(self, state):
        pass


def engine(
    slots: int, graphs: GraphPool | None, drafter: Drafter | None = None, depth: int = 6, runner: Any = LlamaRunner
):
    """With graphs its passes are those of a GPU."""
    made = TorchEngine(
        model(), eos_token_ids=(), config=EngineConfig(max_slots=slots), max_seq_len=CAPACITY, runner=runner,
        speculator=Speculator([drafter], Strategy("oracle", depth, 99)) if drafter else None,
    )  # fmt: skip
    if graphs is not None:
        made._slot_pass = SlotPass(made._runner, slots, CAPACITY, graphs)
    return made


@cache
def truth(num: int) -> dict[int, Any]:
    return {one.request_id: one for one in engine(num, None).generate(asked(num))}


def check(done, num: int) -> None:
    for one in done:
        assert one.token_ids == truth(num)[one.request_id].token_ids
        assert one.logprobs == pytest.approx(truth(num)[one.request_id].logprobs, abs=1e-4)


def oracle(num: int, num_states: int = 0) -> Oracle:
    return Oracle({number: one.token_ids for number, one in truth(num).items()}, num_states)


@pytest.mark.parametrize("runner", [LlamaRunner, GenericRunner])
def test_ragged_drafts_are_verified_by_graphs_as_by_single_operations(runner):
    recorder = OpsRecorder()
    made = engine(5, GraphPool(recorder), oracle(5), runner=runner)
    for _ in range(2):
        check(made.generate(asked(5)), 5)
    stats = made.stats
    assert 0 < stats.num_speculated_tokens_kept < stats.num_speculated_tokens
    assert 0 < recorder.num_recorded <= recorder.num_warmed < stats.num_steps
    assert made._slot_pass.num_graphs == recorder.num_recorded


def test_what_a_recording_may_not_do_is_said_and_everything_runs_as_it_is(monkeypatch):
    """A model whose code waits for the device. Graphs that are there already go as well."""
    recorder = OpsRecorder()
    made = engine(3, GraphPool(recorder), oracle(3))
    check(made.generate(asked(3)), 3)
    assert made._slot_pass.num_graphs > 0
    plain = made._runner.extend_within

    def waits(tokens, positions, longest):
        assert positions.max().item() < longest
        return plain(tokens, positions, longest)

    monkeypatch.setattr(made._runner, "extend_within", waits)
    made._slot_pass._graphs._graphs.clear()
    with pytest.warns(UserWarning, match="decoding without graphs"):
        check(made.generate(asked(3)), 3)
    assert made._slot_pass.num_graphs == 0
    check(made.generate(asked(3)), 3)


def test_graphs_are_bounded_and_go_all_at_once():
    """Torch frees the workspaces of all graphs of a stream with the first of them."""
    recorder, most = OpsRecorder(), []
    graphs = GraphPool(recorder, max_graphs=1)
    made = engine(5, graphs, oracle(5))
    for _ in range(3):
        made.submit(asked(5))
        done = []
        while made.num_unfinished:
            before = graphs.num_graphs
            done += made.step()
            most.append(graphs.num_graphs)
            assert graphs.num_graphs in (before, before + 1, 0)
        check(done, 5)
    assert max(most) == 1
    assert recorder.num_recorded >= recorder.num_renewed > 1


def test_graphs_outlive_new_weights():
    recorder = OpsRecorder()
    made = engine(3, GraphPool(recorder))
    check(made.generate(asked(3)), 3)
    made.generate(asked(3))
    num = recorder.num_recorded
    assert num > 0
    made.load_policy(model(1).state_dict(), 1)
    fresh = TorchEngine(
        model(1), eos_token_ids=(), config=EngineConfig(max_slots=3), max_seq_len=CAPACITY, runner=LlamaRunner
    )
    got, expected = made.generate(asked(3)), fresh.generate(asked(3))
    assert [one.token_ids for one in got] == [one.token_ids for one in expected]
    assert [one.token_ids for one in got] != [truth(3)[at].token_ids for at in range(3)]
    assert recorder.num_recorded == num


def slots_of(num: int, num_slots: int) -> Slots:
    slots = Slots(num_slots, CAPACITY, ())
    for request in asked(num):
        slots.add(Running.of(request), cached=len(request.prompt_ids), version=0)
    return slots


class Shapes(GraphPool):
    """Notes the shapes that are run."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seen: list[Any] = []

    def run(self, key, work):
        self.seen.append((key.num_slots, key.num_new, key.longest))
        super().run(key, work)


@torch.inference_mode()
def test_shapes_are_rounded_up_to_buckets():
    graphs, num_slots = Shapes(), 48
    run = SlotPass(LlamaRunner(model(), num_slots, CAPACITY), num_slots, CAPACITY, graphs)
    expected = []
    for num, drafts, shape in (
        (1, None, (1, 1, 64)), (2, None, (32, 1, 64)), (1, [(1,)], (1, 2, 64)), (3, [(), (1, 2), (1,)], (4, 4, 64)),
        (5, [(1,) * 4, *[()] * 4], (8, 8, 64)), (9, [(1,) * 12, *[()] * 8], (16, 16, 64)),
        (13, [(1,), *[()] * 11, (1, 2)], (16, 4, 80)), (13, None, (32, 1, 64)),
    ):  # fmt: skip
        assert drafts is None or run.fits(drafts)
        run(slots_of(num, num_slots), drafts)
        expected.append(shape)
        assert graphs.seen == expected
    assert run.fits([(1,) * 15] * 32)
    assert run.fits([(1,) * 7] * 48)  # 48 slots, no 64
    assert not run.fits([(1,) * 16])
    assert not run.fits([(1,) * 15] * 33)


def test_beyond_the_buckets_drafts_are_verified_by_single_operations():
    recorder = OpsRecorder()
    made = engine(2, GraphPool(recorder), deep := oracle(2), depth=30)
    deep.propose = lambda states, depth, *_: [list(deep.truth[s.request_id][s.num_written :][: s.room]) for s in states]
    check(made.generate(asked(2)), 2)
    assert made.stats.num_steps < 6
    assert made.stats.num_speculated_tokens_kept == made.stats.num_speculated_tokens > 60
    assert recorder.num_warmed <= 3


def test_states_are_those_of_the_tokens_and_are_not_overwritten():
    graphs = GraphPool(OpsRecorder())
    drafter = oracle(4, num_states=4)
    made = engine(4, graphs, drafter)
    for completion in made.generate(asked(4)):
        request = asked(4)[completion.request_id]
        whole = torch.tensor([request.prompt_ids + completion.token_ids])
        expected = model().model(whole).last_hidden_state[0]
        shown = 0
        for seen, then, now in drafter.states:
            assert torch.equal(then, now)
            for one in seen:
                if one.request_id == request.request_id:
                    for at in range(one.num):
                        # where a draft was wrong the state is that of another token
                        near = torch.allclose(then[one.row + at], expected[one.first + at], atol=1e-3)
                        shown += near
                        assert near or at > 0
        assert shown > 30
    assert graphs.num_graphs > 0


def test_a_slot_holds_nothing_but_its_own_tokens_after_a_padded_pass():
    """Other slots' longer drafts write nothing at positions that a slot does not have, nor into slots beyond."""
    with torch.inference_mode():
        runner = LlamaRunner(model(), 6, CAPACITY)
        runner.cache.fill_(7.0)
        run = SlotPass(runner, 6, CAPACITY, GraphPool(None))
        slots = slots_of(3, 6)
        run(slots, [(1, 2, 3, 4, 5), (), (8, 9)])
        touched = (runner.cache != 7.0).any(-1).any(3).any(0).any(0)  # [num_slots, capacity]
    for slot, (first, num) in enumerate(zip(slots.cached[:3].tolist(), (6, 1, 3), strict=True)):
        assert touched[slot].nonzero()[:, 0].tolist() == list(range(first, first + num))
    assert not touched[4:].any()


def last_but_unclamped(self, counts, num_new):
    """Wrong: a slot with fewer tokens goes on at positions that it does not have."""
    return torch.arange(num_new, device=counts.device).expand(len(counts), -1)


def one_short(self, counts, num_new):
    """Wrong: the last token of a draft is left out."""
    return torch.arange(num_new, device=counts.device).minimum((counts[:, None] - 2).clamp(min=0))


def all_of_it() -> None:
    check(engine(5, GraphPool(None), oracle(5)).generate(asked(5)), 5)
    test_a_slot_holds_nothing_but_its_own_tokens_after_a_padded_pass()


@pytest.mark.parametrize("wrong", [last_but_unclamped, one_short])
def test_wrong_padding_does_not_pass(monkeypatch, wrong):
    all_of_it()
    monkeypatch.setattr(SlotPass, "_ahead", wrong)
    with pytest.raises(AssertionError):
        all_of_it()


def test_a_stale_column_does_not_pass(monkeypatch):
    """Drafts leave the device's columns behind: a pass that does not bring them anew writes something else."""
    upload = SlotPass._upload

    def once(self, slots, drafts, counts, num_new):
        upload(self, slots, drafts, counts, num_new)
        slots.changed = False

    check(engine(5, GraphPool(None), Sometimes(oracle(5))).generate(asked(5)), 5)
    monkeypatch.setattr(SlotPass, "_upload", once)
    monkeypatch.setattr(Slots, "verify", keeping(Slots.verify))
    with pytest.raises(AssertionError):
        check(engine(5, GraphPool(None), Sometimes(oracle(5))).generate(asked(5)), 5)


def keeping(verify):
    def unmarked(self, *args):
        changed = self.changed
        outcome = verify(self, *args)
        self.changed = changed
        return outcome

    return unmarked


class Sometimes(Oracle):
    """Drafts in every other step."""

    def __init__(self, other: Oracle) -> None:
        super().__init__(other.truth)
        self.turn = 0

    def propose(self, states, depth, budget, worth=None):
        self.turn += 1
        return super().propose(states, depth, budget) if self.turn % 2 else [[] for _ in states]


def test_recorded_operations_are_replayed_on_what_tensors_hold():
    """The recorder of these tests is as strict as a graph: a number that was read stays as it was."""
    columns, out, read = torch.arange(4.0), torch.zeros(4), [2.0]
    graph = OpsRecorder().record(lambda: out.copy_(columns * read[0] + 1))
    graph.replay()
    read[0] = 5.0
    columns += 1
    graph.replay()
    assert out.tolist() == [3.0, 5.0, 7.0, 9.0]
    with pytest.raises(RuntimeError, match="waits for the device"):
        OpsRecorder().record(lambda: out.fill_(columns.sum().item()))
