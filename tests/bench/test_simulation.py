"""The serving core in virtual time: what it promises it keeps, to everybody, whatever comes."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from types import FrameType

import pytest

from vitserve.bench.simulation import SECONDS, Arrival, Simulation, capacity, poisson


def assert_promises_kept(simulation: Simulation, arrivals: list[Arrival]) -> None:
    assert not simulation.twice
    assert not simulation.expired
    assert not simulation.finished.keys() & simulation.shed.keys()
    assert len(simulation.finished) + len(simulation.shed) == len(arrivals), "everybody is answered or rejected"
    late = max(
        (simulation.finished[each.id] - each.deadline for each in arrivals if each.id in simulation.finished),
        default=0.0,
    )
    assert late <= 1e-9, f"an admitted image was {late} s late"
    assert simulation.leaks() == 0
    assert min(simulation.shed.values(), default=1.0) > 0, "nobody is told to come back at once"


@pytest.mark.parametrize("count", [40_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_images_are_answered_once_and_in_time(count: int) -> None:
    """At one and a half times what two engines of two streams can do."""
    arrivals = list(poisson(count, 1.5 * capacity(2, 2), workers=2, seed=1))
    simulation = Simulation()
    simulation.run(arrivals)
    assert_promises_kept(simulation, arrivals)
    assert 0.6 * len(arrivals) < len(simulation.finished) < 0.7 * len(arrivals), (
        "it sheds what is too much, and no more"
    )


@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("load", [0.3, 0.9, 3.0])
def test_promises_are_kept_at_every_load(engines: int, streams: int, load: float) -> None:
    arrivals = list(poisson(5_000, load * capacity(engines, streams), workers=2, seed=streams, priorities=(1, 5, 9)))
    simulation = Simulation(engines=engines, streams=streams)
    simulation.run(arrivals)
    assert_promises_kept(simulation, arrivals)
    if load < 0.5:
        assert len(simulation.shed) < 0.1 * len(arrivals)  # bursts, and deadlines tighter than one batch


def test_the_order_of_simultaneous_events_does_not_matter() -> None:
    """Arrivals on a grid of the batch's own seconds, so that they coincide with one another and with the ends of batches."""
    grid = SECONDS[4]
    chance = random.Random(3)
    arrivals = [
        each._replace(at=round(each.at / grid) * grid)
        for each in poisson(20_000, 1.5 * capacity(2, 2), 2, seed=2, priorities=(1, 5, 9))
    ]
    outcomes = []
    for _ in range(3):
        simulation = Simulation()
        simulation.run(arrivals)
        assert_promises_kept(simulation, arrivals)
        outcomes.append((simulation.finished, simulation.shed))
        moments = [list(together) for _, together in itertools.groupby(arrivals, key=lambda each: each.at)]
        for together in moments:
            chance.shuffle(together)
        arrivals = list(itertools.chain.from_iterable(moments))
    assert max(map(len, moments)) > 20
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_the_cost_of_an_image_does_not_grow_with_their_number() -> None:
    """Counted in function calls, which do not depend on the machine; vitserve.bench.simulation measures seconds."""

    def calls_an_image(count: int) -> float:
        calls = 0

        def counting(frame: FrameType, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        arrivals = list(poisson(count, 1.5 * capacity(2, 2), 2, seed=4))
        simulation = Simulation()
        sys.setprofile(counting)
        try:
            simulation.run(arrivals)
        finally:
            sys.setprofile(None)
        return calls / count

    assert calls_an_image(20_000) <= 1.1 * calls_an_image(2_000)


@pytest.mark.parametrize("timeout", [0.2, 1.0], ids=["too little time", "too few slots"])
def test_under_overload_the_urgent_are_served_at_the_cost_of_the_others(timeout: float) -> None:
    """A quarter of twice what can be done is urgent. It has to be learned: counted is what came after the first half."""
    arrivals = list(poisson(40_000, 2.0 * capacity(1, 1), 1, seed=5, priorities=(0, 0, 0, 9), timeouts=(timeout,)))
    simulation = Simulation(workers=1, engines=1, streams=1)
    simulation.run(arrivals)
    assert_promises_kept(simulation, arrivals)
    asked = Counter(each.priority for each in arrivals[20_000:])
    answered = Counter(each.priority for each in arrivals[20_000:] if each.id in simulation.finished)
    assert answered[9] / asked[9] > 0.8
    assert answered[0] / asked[0] < 0.45
