"""Work in idle time: it begins and ends with the context, and what fails in it is heard."""

import threading

import pytest

from swarm.drafting.idle import IdleTime


def test_it_works_within_and_not_without():
    begun, asked_to_stop = threading.Event(), threading.Event()
    parts = []

    def step(given_up):
        begun.set()
        while not given_up():
            parts.append("part")
        asked_to_stop.set()
        return True

    idle = IdleTime(step, moment_s=0.0)
    for _ in range(3):
        begun.clear()
        asked_to_stop.clear()
        with idle:
            assert begun.wait(10)
        assert asked_to_stop.is_set()
        num = len(parts)
        assert num == len(parts)
    assert idle.worked_s > 0
    idle.close()
    assert not any(thread.name == "idle" for thread in threading.enumerate())


def test_leaving_waits_for_the_part_under_way():
    begun, go_on = threading.Event(), threading.Event()
    order = []

    def step(given_up):
        begun.set()
        assert go_on.wait(10)
        order.append("part")
        return True

    idle = IdleTime(step, moment_s=0.0)
    with idle:
        assert begun.wait(10)
        threading.Timer(0.05, go_on.set).start()
    order.append("left")
    assert order[-2:] == ["part", "left"]
    idle.close()


def test_nothing_to_do_is_not_asked_again():
    asked, once = [], threading.Event()

    def step(given_up):
        asked.append(1)
        once.set()
        return False

    idle = IdleTime(step, moment_s=0.0)
    with idle:
        assert once.wait(10)
    with idle:
        pass
    idle.close()
    assert 1 <= len(asked) <= 2


def test_what_fails_is_raised_where_the_time_ends():
    failed = threading.Event()

    def step(given_up):
        failed.set()
        raise RuntimeError("no such layer")

    idle = IdleTime(step, moment_s=0.0)
    with pytest.raises(RuntimeError, match="no such layer"), idle:
        assert failed.wait(10)
    idle.close()


def test_what_is_over_in_a_moment_begins_nothing():
    begun = threading.Event()
    idle = IdleTime(lambda given_up: begun.set() or True, moment_s=60.0)
    for _ in range(3):
        with idle:
            pass
    assert not begun.is_set()
    idle.close()
    assert idle.worked_s == 0


def test_its_thread_is_prepared_before_it_is_used():
    order = []
    idle = IdleTime(lambda given_up: order.append("step") or False, moment_s=0.0, prepare=lambda: order.append("ready"))
    idle.start()
    assert order == ["ready"]
    idle.start()
    idle.close()
    assert order == ["ready"]
