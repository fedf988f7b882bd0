"""What an engine writes with drafters is distributed as the model says: chi-square tests on a small vocabulary.

With 10^5 samples a position they are among the long tests; with fewer they run always.
The probabilities that are tested against come from transformers and a few lines of arithmetic here. A verifier that
keeps what is drafted, or draws anew without regard to why a draft failed, does not pass.
"""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import AutoModelForCausalLM, LlamaConfig

from swarm.config import EngineConfig
from swarm.drafting.base import Drafter
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.slots import Slots

VOCABULARY, LENGTH, PROMPT = 8, 4, (3, 1, 4)
NUM_SAMPLES, FEWER_SAMPLES = 100_000, 10_000
LEAST_P = 1e-6  # of a run that is right: seeds are fixed, so that it is one number that was looked at once
PLAIN = SamplingParams(LENGTH, ignore_eos=True)
TRUNCATED = SamplingParams(LENGTH, temperature=0.8, top_k=6, top_p=0.9, ignore_eos=True)


@cache
def model():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return made


def distribution(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """The distribution that a row of logits is to be sampled from, in plain steps."""
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-weights)
    if sampling.top_k:
        weights[order[sampling.top_k :]] = 0
    weights /= weights.sum()
    mass = 0.0
    for token in order:
        if mass >= sampling.top_p:
            weights[token] = 0
        mass += weights[token]
    return weights / weights.sum()


@cache
def expected(sampling: SamplingParams) -> list[np.ndarray]:
    """The probability of every token at every position, over all that may stand before it."""
    chances = {(): 1.0}
    by_position = []
    for length in range(LENGTH):
        prefixes = list(product(range(VOCABULARY), repeat=length))
        with torch.no_grad():
            logits = model()(torch.tensor([PROMPT + prefix for prefix in prefixes])).logits[:, -1].double().numpy()
        longer, total = {}, np.zeros(VOCABULARY)
        for prefix, row in zip(prefixes, logits, strict=True):
            chance = chances[prefix] * distribution(row, sampling)
            total += chance
            longer |= {(*prefix, token): chance[token] for token in range(VOCABULARY)}
        chances = longer
        by_position.append(total)
    return by_position


class Careless(Drafter):
    """Drafts that know nothing: mostly the same token, now and then others, of any length."""

    name = "careless"

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def propose(self, states, depth, budget, worth=None):
        tokens = np.where(self.rng.random((len(states), depth)) < 0.6, 2, self.rng.integers(0, VOCABULARY, depth))
        lengths = self.rng.integers(0, depth + 1, len(states)).tolist()
        return [row[: min(num, state.room)] for row, num, state in zip(tokens.tolist(), lengths, states, strict=True)]

    def observe(self, state):
        pass


def p_values(sampling: SamplingParams, num_samples: int, verify=None, monkeypatch=None) -> list[float]:
    """Write as many completions, and return how likely so large a deviation is at each position."""
    if verify is not None:
        monkeypatch.setattr(Slots, "verify", verify)
    num_slots = 2000
    engine = TorchEngine(
        model(), eos_token_ids=(), config=EngineConfig(max_slots=num_slots), max_seq_len=len(PROMPT) + LENGTH,
        speculator=Speculator([Careless()], Strategy("careless", LENGTH, num_slots * LENGTH)),
    )  # fmt: skip
    tokens = np.empty((num_samples, LENGTH), dtype=np.int64)
    for first in range(0, num_samples, num_slots):
        requests = [Request(first + i, PROMPT, 7919 * (first + i) + 1, sampling) for i in range(num_slots)]
        tokens[first : first + num_slots] = [one.token_ids for one in engine.generate(requests)]
    stats = engine.stats
    assert 0 < stats.num_speculated_tokens_kept < stats.num_speculated_tokens
    found = []
    for position, probability in enumerate(expected(sampling)):
        counts = np.bincount(tokens[:, position], minlength=VOCABULARY)
        possible = probability * num_samples > 5
        assert counts[probability == 0].sum() == 0
        deviation = ((counts - probability * num_samples) ** 2)[possible] / (probability * num_samples)[possible]
        found.append(float(chi2.sf(deviation.sum(), possible.sum() - 1)))
    return found


@pytest.mark.parametrize("sampling", [PLAIN, TRUNCATED], ids=["plain", "truncated"])
@pytest.mark.parametrize("num_samples", [FEWER_SAMPLES, pytest.param(NUM_SAMPLES, marks=pytest.mark.soak)])
def test_drafts_leave_the_distribution_as_it_is(sampling, num_samples):
    assert min(p_values(sampling, num_samples)) > LEAST_P


def keeps_what_is_drafted(slots, running, draft, tokens, logprobs, verify=Slots.verify):
    """As if a draft that was nearly as likely would do."""
    return verify(slots, running, draft, np.array([*draft[:1], *tokens[len(draft[:1]) :]]), logprobs)


def draws_anew(slots, running, draft, tokens, logprobs, verify=Slots.verify):
    """As if a failed draft's token, which was drawn, were to be thrown away with it: the next one takes its place."""
    failed = len(draft) > 0 and tokens[0] != draft[0]
    return verify(slots, running, draft, np.roll(tokens, -1) if failed else tokens, logprobs)


@pytest.mark.parametrize("wrong", [keeps_what_is_drafted, draws_anew])
def test_a_wrong_verifier_does_not_pass(monkeypatch, wrong):
    assert min(p_values(PLAIN, FEWER_SAMPLES, wrong, monkeypatch)) < LEAST_P / 1000
