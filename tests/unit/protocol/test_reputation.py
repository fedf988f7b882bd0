import pytest

from protocol.refusals import Reason
from protocol.reputation import MAX_SCORE, Reputation


def make(**settings: float) -> Reputation:
    return Reputation(
        **({"half_life_s": 600, "min_score": -10, "ban_s": 300, "min_useful": 4, "probation_s": 0} | settings)
    )


def test_scores_halve_in_a_half_life():
    reputation = make()
    for _ in range(8):
        reputation.useful("a", 1000)
    assert reputation.score("a", 1000) == 8
    assert reputation.score("a", 1600) == pytest.approx(4)
    reputation.useful("a", 2200)
    assert reputation.score("a", 2200) == pytest.approx(3)
    assert reputation.score("stranger", 2200) == 0


def test_good_deeds_are_capped():
    reputation = make()
    for _ in range(1000):
        reputation.useful("a", 0)
    assert reputation.score("a", 0) == MAX_SCORE


def test_hostile_peers_are_banned_for_a_while_and_ignored_reasons_cost_nothing():
    reputation = make()
    for _ in range(100):
        for reason in Reason:
            if not reason.penalised:
                assert not reputation.refused("late", reason, 0)
    assert reputation.score("late", 0) == 0
    assert not reputation.refused("liar", Reason.CONFLICT, 0)
    assert reputation.refused("liar", Reason.CONFLICT, 0)
    assert reputation.is_banned("liar", 299)
    assert reputation.banned(299) == {"liar"}
    assert reputation.banned(300) == set()
    assert not reputation.is_banned("liar", 300)
    assert not reputation.is_banned("stranger", 0)


def test_silence_alone_bans_nobody():
    reputation = make()
    for _ in range(1000):
        reputation.unresponsive("slow", 0)
    assert -6 < reputation.score("slow", 0) < -4
    assert not reputation.is_banned("slow", 0)


def test_a_record_is_made_by_useful_groups_and_fades():
    reputation = make()
    for _ in range(3):
        reputation.useful("a", 0)
    assert not reputation.is_established("a", 0)
    reputation.useful("a", 0)
    assert reputation.is_established("a", 0)
    assert reputation.is_established("a", 599)
    assert not reputation.is_established("a", 601)
    reputation.useful("a", 601)  # half of a record is not a record
    assert not reputation.is_established("a", 601)


def test_a_record_takes_time_and_steady_use():
    reputation = make(probation_s=600)
    for at_s in range(0, 600, 60):
        reputation.useful("steady", at_s)
        assert not reputation.is_established("steady", at_s)
    reputation.useful("steady", 600)
    assert reputation.is_established("steady", 600)
    reputation.useful("aged", 0)  # one group, long ago, and then many at a time
    for _ in range(10):
        reputation.useful("aged", 700)
    assert not reputation.is_established("aged", 700)


def test_disgrace_outweighs_a_record():
    reputation = make()
    for _ in range(4):
        reputation.useful("a", 0)
    reputation.refused("a", Reason.CONFLICT, 0)
    assert not reputation.is_established("a", 0)


def test_memory_is_bounded_and_what_matters_stays():
    reputation = Reputation(half_life_s=600, min_score=-10, ban_s=300, min_useful=4, probation_s=0, max_peers=100)
    for _ in range(10):
        reputation.useful("friend", 0)
    for number in range(10_000):
        reputation.served(f"passer-by {number}", 0)
        reputation.refused(f"liar {number}", Reason.CONFLICT, 0)
        reputation.refused(f"liar {number}", Reason.CONFLICT, 0)
    assert len(reputation) <= 100
    assert len(reputation.banned(0)) <= 100
    assert reputation.score("friend", 0) == 10 or reputation.score("friend", 0) == 0


def test_opinions_survive_a_restart():
    reputation = make()
    for _ in range(4):
        reputation.useful("friend", 100)
    for _ in range(2):
        reputation.refused("liar", Reason.CONFLICT, 100)
    again = make()
    again.restore(reputation.state())
    assert again.score("friend", 700) == pytest.approx(2)
    assert again.is_established("friend", 700)
    assert again.is_banned("liar", 399)
    assert not again.is_banned("liar", 400)
