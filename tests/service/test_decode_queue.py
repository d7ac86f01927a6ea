"""The queue of the decode threads: order, and the estimates that admission uses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitserve.service.decode_queue import DecodeQueue

SECONDS = 0.01


def filled(threads: int, running: int, waiting: int) -> DecodeQueue[int]:
    queue = DecodeQueue[int](threads, SECONDS)
    for number in range(running + waiting):
        queue.push(float(number), 4, number, now=0.0)
    for _ in range(running):
        queue.pop()
    return queue


@given(st.lists(st.integers(0, 5), min_size=1))
def test_the_most_urgent_image_is_decoded_first_and_equal_ones_in_order(sort_keys: list[int]) -> None:
    queue = DecodeQueue[int](1)
    for number, sort_key in enumerate(sort_keys):
        queue.push(sort_key, 0, number, now=0.0)
    popped = [queue.pop() for _ in sort_keys]
    assert popped == sorted(range(len(sort_keys)), key=lambda number: sort_keys[number])
    with pytest.raises(IndexError):
        queue.pop()


def test_an_image_that_finds_an_idle_thread_is_decoded_now() -> None:
    """However slow an image was: otherwise one slow image could cause rejections for good."""
    queue = filled(threads=2, running=1, waiting=0)
    queue.done(1e6)
    assert queue.decoded_at(0.0, 0, now=5.0) == 5.0


def test_an_image_waits_for_the_more_urgent_ones() -> None:
    queue = filled(threads=2, running=2, waiting=6)
    assert queue.decoded_at(1e9, 0, now=5.0) == pytest.approx(5.0 + 9 / 2 * SECONDS)
    assert queue.decoded_at(-1.0, 0, now=5.0) == pytest.approx(5.0 + 3 / 2 * SECONDS)


def test_time_is_reserved_for_urgent_images_that_will_arrive() -> None:
    queue = DecodeQueue[int](1, SECONDS)
    for number in range(250):  # 50 per second for five seconds
        queue.push(0.0, 0, number, now=number / 50)
    while len(queue):
        queue.pop()
        queue.done(SECONDS)
    for number in range(10):
        queue.push(1.0, 5, number, now=5.0)
    queue.pop()
    urgent, other = (queue.decoded_at(2.0, level, now=5.0) - 5.0 for level in (0, 9))
    assert urgent == pytest.approx(11 * SECONDS)
    assert other > 1.3 * urgent


def test_an_image_that_was_not_decoded_does_not_count() -> None:
    queue = filled(threads=1, running=1, waiting=0)
    queue.done(None)
    assert queue.seconds == SECONDS
