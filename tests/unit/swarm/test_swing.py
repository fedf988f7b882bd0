import pytest

from swarm.swing import Swing


def test_a_swing_is_the_fall_below_the_best_as_a_share_of_it():
    swing, found = Swing(10), []
    assert swing.value == 0
    for value in (0.0, 0.2, 0.4, 0.3, 0.1, 0.4):
        swing.add(value)
        found.append(swing.value)
    assert found == pytest.approx([0, 0, 0, 0.25, 0.75, 0])


def test_a_best_that_is_long_ago_is_forgotten():
    swing = Swing(3)
    for value in (1.0, 0.5, 0.25):
        swing.add(value)
    assert swing.value == 0.75
    swing.add(0.25)
    assert swing.value == 0.5
