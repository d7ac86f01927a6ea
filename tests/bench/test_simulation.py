"""The guarantees of admission control in virtual time: no admitted image is late, and no image is lost."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from types import FrameType

import pytest

from vitserve.bench.simulation import SECONDS, Arrival, Simulation, capacity, poisson


def assert_guarantees(simulation: Simulation, arrivals: list[Arrival]) -> None:
    assert not simulation.duplicates
    assert not simulation.expired
    assert not simulation.finished.keys() & simulation.rejected.keys()
    assert len(simulation.finished) + len(simulation.rejected) == len(arrivals), "every image is finished or rejected"
    finished = [arrival for arrival in arrivals if arrival.id in simulation.finished]
    lateness = max((simulation.finished[arrival.id] - arrival.deadline for arrival in finished), default=0.0)
    assert lateness <= 1e-9, f"an admitted image was {lateness} s late"
    assert simulation.leaks() == 0
    assert min(simulation.rejected.values(), default=1.0) > 0, "retry-after is never zero"


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_admitted_images_are_finished_once_and_in_time(count: int) -> None:
    """At 1.5 times the capacity of two engine workers with two streams each."""
    arrivals = list(poisson(count, 1.5 * capacity(2, 2), workers=2, seed=1))
    simulation = Simulation()
    simulation.run(arrivals)
    assert_guarantees(simulation, arrivals)
    assert 0.6 * len(arrivals) < len(simulation.finished) < 0.7 * len(arrivals), "only the excess load is rejected"


@pytest.mark.parametrize("engines", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("streams", [1, pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("load", [0.3, 0.9, 3.0])
def test_admitted_images_are_in_time_at_every_load(engines: int, streams: int, load: float) -> None:
    arrivals = list(poisson(2_500, load * capacity(engines, streams), workers=2, seed=streams, priorities=(1, 5, 9)))
    simulation = Simulation(engines=engines, streams=streams)
    simulation.run(arrivals)
    assert_guarantees(simulation, arrivals)
    if load < 0.5:  # rejected are only bursts, and deadlines shorter than one batch
        assert len(simulation.rejected) < 0.1 * len(arrivals)


@pytest.mark.parametrize("load", [0.9, pytest.param(1.5, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize("share", [0.3, 0.9, 3.0], ids=["rarely", "often", "always"])
def test_images_that_wait_for_a_decode_thread_are_in_time(share: float, load: float) -> None:
    """``share`` is the time that decoding needs, relative to the engines: above 1, decoding is the bottleneck."""
    engines = capacity(1, 1)
    count = 20_000 if share > 1 else 10_000  # until the rates are known, more images wait in vain
    arrivals = list(poisson(count, load * engines / max(1.0, share), 2, seed=6, priorities=(1, 5, 9), timeouts=(0.2,)))
    decode_seconds = share * 4 / engines  # two HTTP workers with two threads each
    simulation = Simulation(engines=1, streams=1, decode_seconds=decode_seconds)
    simulation.run(arrivals)
    assert_guarantees(simulation, arrivals)
    possible = min(1.0, 1 / load) * len(arrivals)
    assert len(simulation.finished) > 0.9 * possible
    # An image that waits for a decode thread may be overtaken by more urgent ones than the rates of the past suggest.
    assert len(simulation.rejected_decoded) <= (0.04 if share > 1 else 0.0002) * len(arrivals)


def test_the_order_of_simultaneous_arrivals_does_not_matter() -> None:
    """Arrivals are on a grid of the duration of a batch, so that they coincide with each other and with batch ends."""
    grid = SECONDS[4]
    generator = random.Random(3)
    arrivals = [
        arrival._replace(at=round(arrival.at / grid) * grid)
        for arrival in poisson(10_000, 1.5 * capacity(2, 2), 2, seed=2, priorities=(1, 5, 9))
    ]
    outcomes = []
    for _ in range(3):
        simulation = Simulation()
        simulation.run(arrivals)
        assert_guarantees(simulation, arrivals)
        outcomes.append((simulation.finished, simulation.rejected))
        groups = [list(group) for _, group in itertools.groupby(arrivals, key=lambda arrival: arrival.at)]
        for group in groups:
            generator.shuffle(group)
        arrivals = list(itertools.chain.from_iterable(groups))
    assert max(map(len, groups)) > 20
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_the_cost_per_image_does_not_grow_with_their_number() -> None:
    """Measured in function calls, which do not depend on the machine."""

    def calls_per_image(count: int) -> float:
        calls = 0

        def count_call(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        arrivals = list(poisson(count, 1.5 * capacity(2, 2), 2, seed=4))
        simulation = Simulation()
        sys.setprofile(count_call)
        try:
            simulation.run(arrivals)
        finally:
            sys.setprofile(None)
        return calls / count

    assert calls_per_image(10_000) <= 1.1 * calls_per_image(2_000)


@pytest.mark.parametrize("timeout", [0.2, 1.0], ids=["limited by time", "limited by slots"])
def test_overload_is_shed_from_low_priorities_first(timeout: float) -> None:
    """At twice the capacity, a quarter of it urgent. Only the second half counts, when arrival rates are known."""
    arrivals = list(poisson(20_000, 2.0 * capacity(1, 1), 1, seed=5, priorities=(0, 0, 0, 9), timeouts=(timeout,)))
    simulation = Simulation(workers=1, engines=1, streams=1)
    simulation.run(arrivals)
    assert_guarantees(simulation, arrivals)
    total = Counter(arrival.priority for arrival in arrivals[10_000:])
    finished = Counter(arrival.priority for arrival in arrivals[10_000:] if arrival.id in simulation.finished)
    assert finished[9] / total[9] > 0.8
    assert finished[0] / total[0] < 0.45
