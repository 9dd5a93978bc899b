"""When a step gives work to all threads, and when the calling thread does it alone (csrc/crew.h)."""

from __future__ import annotations

from typing import Any

import pytest

import fastopt
from fastopt.backends import native

pytestmark = pytest.mark.skipif(not fastopt.backends.available("native"), reason=fastopt.backends.why_not("native"))

N, SHORT, LATE = 1000, 1e-4, 1e-2  # units of work, seconds


def crew() -> Any:
    module = native.extension()
    assert module is not None
    return module.Crew()


def alone(crew: Any, seconds: float = 1.5 * SHORT) -> int:
    """How many runs the calling thread does alone."""
    count = 0
    while not crew.together:
        crew.note(N, seconds, 1)
        count += 1
    return count


def test_threads_that_come_are_asked_again() -> None:
    c = crew()
    for k in range(1000):
        c.note(N, SHORT * (1 + k % 5), 2)
        assert c.together


def test_the_first_run_may_take_long() -> None:
    """It touches memory for the first time, and nothing is known yet."""
    c = crew()
    c.note(N, LATE, 2)
    assert c.together


def test_a_late_thread_is_left_alone_for_ever_longer() -> None:
    c = crew()
    c.note(N, SHORT, 2)
    rests = []
    for _ in range(10):
        c.note(N, LATE, 2)
        assert not c.together
        rests.append(alone(c))
    assert rests == [8, 16, 32, 64, 128, 256, 512, 1024, 1024, 1024]


def test_threads_that_came_for_a_while_are_trusted_again() -> None:
    c = crew()
    c.note(N, SHORT, 2)
    for good, rest in ((0, 8), (63, 16), (64, 8), (64, 8)):
        for _ in range(good):
            c.note(N, SHORT, 2)
        c.note(N, LATE, 2)
        assert alone(c) == rest


def test_what_takes_long_for_one_thread_is_no_delay() -> None:
    """All at most do as many times as much as one: of sixteen the slowest may be one of a few that came."""
    c = crew()
    c.note(N, SHORT, 16)
    c.note(N, 16 * 3.9 * SHORT, 16)
    assert c.together
    c.note(N, 16 * 4.1 * SHORT, 16)
    assert not c.together


def test_the_time_of_one_thread_counts_where_it_is_known() -> None:
    c = crew()
    c.note(N, SHORT, 16)
    c.note(N, LATE, 16)
    alone(c, 2 * SHORT)
    c.note(N, 15 * SHORT, 16)
    assert not c.together


def test_short_delays_are_noise() -> None:
    c = crew()
    c.note(N, 1e-6, 2)
    c.note(N, 9e-4, 2)
    assert c.together


def test_time_is_judged_by_the_work_there_was() -> None:
    c = crew()
    c.note(N, SHORT, 2)
    c.note(100 * N, 100 * SHORT, 2)
    assert c.together
    c.note(N // 100, 2e-3, 2)
    assert not c.together


def test_a_pace_that_is_no_longer_reached_is_forgotten() -> None:
    """A colder memory, a lower clock."""
    c = crew()
    c.note(N, SHORT, 2)
    for _ in range(300):
        c.note(N, 7 * SHORT, 2)
    c.note(N, 40 * SHORT, 2)
    assert c.together


def test_threads_that_became_slower_for_good_are_not_left_alone_for_ever() -> None:
    """As after torch.set_num_threads(2) where there were 32: what one does alone tells that they still help."""
    c = crew()
    c.note(N, SHORT, 32)
    c.note(N, 16 * SHORT, 2)
    assert alone(c, 32 * SHORT) == 8
    for _ in range(100):
        c.note(N, 16 * SHORT, 2)
        assert c.together
