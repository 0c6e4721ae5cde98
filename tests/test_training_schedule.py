"""Learning-rate schedule and the clock of time-limited runs."""

from __future__ import annotations

import math

import pytest

from visionllm.train.schedule import ActiveClock, learning_rate_factor


def test_warm_up_is_linear():
    factors = [learning_rate_factor(step, 0.0, 4, 0.1) for step in range(6)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert learning_rate_factor(0, 0.0, 0, 0.1) == 1.0


def test_cosine_reaches_its_floor():
    assert learning_rate_factor(99, 0.5, 10, 0.2) == pytest.approx(0.6)
    assert learning_rate_factor(99, 0.25, 10, 0.0) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert learning_rate_factor(99, 1.0, 10, 0.2) == pytest.approx(0.2)
    assert learning_rate_factor(99, 1.7, 10, 0.2) == pytest.approx(0.2)


def test_clock_does_not_count_suspensions():
    clock = ActiveClock(cap=3.0, settle=5)
    for _ in range(10):
        clock.add("step", 1.0)
    clock.add("step", 5000.0)
    assert clock.seconds == pytest.approx(10 + 3)
    clock.add("step", 2.0)
    assert clock.seconds == pytest.approx(10 + 3 + 2)


def test_clock_keeps_kinds_apart():
    clock = ActiveClock(cap=3.0, settle=2)
    for _ in range(3):
        clock.add("step", 1.0)
        clock.add("other", 50.0)
    assert clock.seconds == pytest.approx(153)


def test_clock_state_continues():
    clock = ActiveClock()
    for seconds in (0.1, 0.2, 0.3, 0.4, 0.5, 9.0):
        clock.add("step", seconds)
    other = ActiveClock()
    other.load(clock.state())
    for one in (clock, other):
        one.add("step", 7.0)
    assert other.seconds == clock.seconds
    assert other.state() == clock.state()
