from protocol.quota import Quota, Quotas


def test_a_bucket_gives_its_burst_and_then_its_rate():
    quota = Quota(per_s=2, burst=10, now_s=100)
    assert [quota.take(100) for _ in range(11)] == [True] * 10 + [False]
    assert [quota.take(101) for _ in range(3)] == [True, True, False]
    assert [quota.take(1000) for _ in range(11)] == [True] * 10 + [False]


def test_time_that_goes_back_gives_nothing():
    quota = Quota(per_s=1, burst=1, now_s=100)
    assert quota.take(100)
    assert not quota.take(50)
    assert not quota.take(100.5)
    assert quota.take(101)


def test_names_do_not_spend_for_one_another():
    quotas = Quotas(per_s=1, burst=2, max_names=10)
    assert [quotas.take("a", 0), quotas.take("a", 0), quotas.take("a", 0)] == [True, True, False]
    assert quotas.take("b", 0)


def test_names_are_bounded_and_those_that_rest_are_forgotten():
    quotas = Quotas(per_s=1, burst=2, max_names=10)
    allowed = [quotas.take(f"name {number}", 0) for number in range(100)]
    assert allowed == [True] * 10 + [False] * 90
    assert len(quotas) == 10
    assert quotas.take("late", 5)
    assert len(quotas) == 1
