from collections import Counter

from protocol.rescoring import RescoreJob, RescoreQueue


def job(author: str, number: int = 0) -> RescoreJob:
    return RescoreJob(author, 0.0, b"frame", bytes([number]))


def test_one_author_has_its_part_of_a_bounded_queue():
    queue = RescoreQueue(max_jobs=8, max_author_share=0.25)
    assert [queue.put(job("flood")) for _ in range(4)] == [True, True, False, False]
    for author in ("a", "b", "c"):
        assert queue.put(job(author))
        assert queue.put(job(author))
    assert not queue.put(job("late"))
    assert len(queue) == 8
    assert queue.num_by_author() == {"flood": 2, "a": 2, "b": 2, "c": 2}


def test_slow_groups_delay_their_own_author():
    queue = RescoreQueue(max_jobs=1000, max_author_share=1.0)
    for number in range(100):
        queue.put(job("slow", number))
        queue.put(job("fast", number))
    time_s, served_s, served = 0.0, Counter[str](), Counter[str]()
    while time_s < 50:
        found = queue.get(time_s)
        assert found is not None
        seconds = 5.0 if found.author == "slow" else 0.5
        time_s += seconds
        queue.spent(found.author, seconds, time_s)
        served_s[found.author] += seconds
        served[found.author] += 1
    assert served_s["fast"] >= 0.4 * time_s
    assert served["fast"] >= 8 * served["slow"]


def test_an_authors_groups_keep_their_order_and_an_empty_queue_gives_none():
    queue = RescoreQueue(max_jobs=10, max_author_share=1.0)
    for number in range(3):
        queue.put(job("a", number))
    assert [queue.get(0.0).key for _ in range(3)] == [b"\0", b"\1", b"\2"]
    assert queue.get(0.0) is None
    assert len(queue) == 0
