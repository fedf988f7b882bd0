"""What decoding and prefill use off the CPU, as far as it can be held without another device."""

import pytest
import torch

from swarm.engine.torch.attention import attend_rectangles, attend_rows, attend_within, rectangles, window_mask
from swarm.engine.torch.graphs import bucket


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(query, keys, values):
    """The definition for one query: [heads, head_dim] over [num_kv_heads, num_keys, head_dim]."""
    group = query.shape[0] // keys.shape[0]
    heads = [(keys[head // group], values[head // group], query[head]) for head in range(len(query))]
    return torch.cat([torch.softmax(k @ q, 0) @ v for k, v, q in heads])


def test_buckets_are_powers_of_two_and_halves_between():
    assert [bucket(n, 1000) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 200)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 256]
    assert [bucket(n, 300, 64) for n in (1, 64, 65, 96, 97, 129, 193, 257, 300)] == [
        64, 64, 128, 128, 128, 192, 256, 300, 300,
    ]  # fmt: skip
    assert bucket(2, 5, 32) == 5
    assert [bucket(n, 100, halves=False) for n in (1, 2, 3, 5, 9, 70)] == [1, 2, 4, 8, 16, 100]


@pytest.mark.parametrize("lengths", [(4, 4, 4), (1,), (3, 17, 5, 16, 2, 40)])
def test_prefill_in_rectangles_attends_within_each_sequence(lengths):
    num_tokens = sum(lengths)
    query, keys, values = (random(num_tokens, heads, 8, seed=seed) for seed, heads in enumerate((6, 2, 2)))
    got = attend_rectangles(query, keys, values, rectangles(lengths, torch.device("cpu")))
    start = 0
    for length in lengths:
        for end in range(start + 1, start + length + 1):
            seen = slice(start, end)
            expected = attended(query[end - 1], keys[seen].transpose(0, 1), values[seen].transpose(0, 1))
            torch.testing.assert_close(got[end - 1], expected, rtol=1e-5, atol=1e-5)
        start += length


@pytest.mark.parametrize("window", [0, 3])
def test_decoding_within_a_bucket_sees_each_slots_own_positions(window):
    totals = torch.tensor([1, 7, 12, 4])
    query = random(4, 2, 3, 8, seed=1)
    keys, values = random(5, 2, 20, 8, seed=2), random(5, 2, 20, 8, seed=3)
    keys[:, :, 12:] = values[:, :, 12:] = 1e4  # what lies beyond may be anything finite
    got = attend_within(query, keys, values, window_mask(totals[:, None], 3, 16, torch.float32, window))
    for slot, total in enumerate(totals.tolist()):
        seen = slice(max(0, total - window) if window else 0, total)
        expected = attended(query[slot].flatten(0, 1), keys[slot, :, seen], values[slot, :, seen])
        torch.testing.assert_close(got[slot], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_several_tokens_of_a_slot_see_its_positions_up_to_their_own(window):
    limits = torch.tensor([[1, 2, 2], [7, 8, 9], [12, 12, 12]])
    query = random(3, 2, 3, 3, 8, seed=1)  # [slots, num_kv_heads, group, num_new, head_dim]
    keys, values = random(4, 2, 20, 8, seed=2), random(4, 2, 20, 8, seed=3)
    keys[:, :, 12:] = values[:, :, 12:] = 1e4
    mask = window_mask(limits, 3, 16, torch.float32, window)
    for fused in (False, True):
        got = attend_rows(query, keys, values, mask, fused=fused)
        for slot, totals in enumerate(limits.tolist()):
            for new, total in enumerate(totals):
                seen = slice(max(0, total - window) if window else 0, total)
                one = query[slot, :, :, new].flatten(0, 1)
                expected = attended(one, keys[slot, :, seen], values[slot, :, seen])
                torch.testing.assert_close(got[slot, new], expected, rtol=1e-5, atol=1e-5)
