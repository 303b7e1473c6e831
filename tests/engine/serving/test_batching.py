"""Requests that come together go together, each gets its own answer, and nobody waits beyond the bounds."""

import asyncio
import threading
import time

import numpy as np
import pytest

from hpcai_cli.engine.serving import batching
from hpcai_cli.engine.serving.batching import Batcher, Bounds, Cost
from hpcai_cli.engine.serving.tensors import RequestError

SLOW, QUICK = Cost(0.01, 0.001), Cost(0.00001, 0.00001)
COSTS = pytest.mark.parametrize("cost", [SLOW, QUICK], ids=["thread", "inline"])


def examples(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32).reshape(-1, 1)


class Model:
    """Scores are the inputs and their doubles; -1 makes it fail.

    Attributes:
        sizes: of the batches it got.
        gate: it runs while this is set.
    """

    def __init__(self, seconds: float = 0.0):
        self.sizes, self.seconds, self.gate = [], seconds, threading.Event()
        self.gate.set()
        self.threads = set()

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        assert self.gate.wait(10)
        self.sizes.append(len(inputs))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if (inputs == -1).any():
            raise ValueError("minus one")
        return np.concatenate([inputs, 2 * inputs], axis=1)


def batcher(model: Model, cost: Cost = SLOW, ran=None, **bounds) -> Batcher:
    return Batcher(model, 2, Bounds(**bounds), cost, ran)


async def refused(asking) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await asking
    return caught.value


# ---- Gathering -----------------------------------------------------------------------------------------------------

def test_what_comes_while_the_model_runs_goes_together(kit):
    async def scenario():
        model = Model()
        asked = batcher(model)
        model.gate.clear()
        first = asyncio.ensure_future(asked.scores(examples(0)))
        await asyncio.sleep(0.05)
        others = [asyncio.ensure_future(asked.scores(examples(number))) for number in range(1, 6)]
        await asyncio.sleep(0.05)
        model.gate.set()
        found = np.concatenate(await asyncio.gather(first, *others))
        assert found[:, 1].tolist() == [0, 2, 4, 6, 8, 10]
        assert model.sizes == [1, 5] and model.threads == {"model"}
    kit.run(scenario())


def test_a_quick_model_runs_in_the_loop_and_batches_too(kit):
    async def scenario():
        model = Model()
        asked = batcher(model, QUICK)
        await asyncio.gather(*(asked.scores(examples(number)) for number in range(5)))
        assert model.sizes == [5] and model.threads == {threading.current_thread().name}
    kit.run(scenario())


def test_a_longer_batch_of_a_quick_model_runs_in_the_thread(kit):
    async def scenario():
        model = Model()
        asked = batcher(model, Cost(0.0002, 0.0001))
        await asked.scores(examples(1))
        assert model.threads == {threading.current_thread().name}
        await asked.scores(examples(*range(10)))
        assert model.threads == {threading.current_thread().name, "model"}
    kit.run(scenario())


@COSTS
def test_no_batch_is_larger_than_the_largest_and_a_large_request_goes_in_parts(kit, cost):
    async def scenario():
        model = Model()
        asked = batcher(model, cost, max_batch=4)
        large, *small = await asyncio.gather(asked.scores(examples(*range(10))),
                                             *(asked.scores(examples(number, number)) for number in range(5)))
        assert large[:, 0].tolist() == list(range(10))
        assert [one[:, 0].tolist() for one in small] == [[number, number] for number in range(5)]
        assert max(model.sizes) == 4 and sum(model.sizes) == 20
    kit.run(scenario())


def test_a_delay_waits_for_more_but_not_for_more_than_a_batch(kit):
    async def scenario():
        model = Model()
        asked = batcher(model, max_batch=3, max_delay=0.15)
        begun = time.monotonic()
        first = asyncio.ensure_future(asked.scores(examples(1)))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, asked.scores(examples(2)))
        assert model.sizes == [2] and 0.14 < time.monotonic() - begun < 1
        begun = time.monotonic()
        await asyncio.gather(*(asked.scores(examples(number)) for number in range(3)))
        assert model.sizes == [2, 3] and time.monotonic() - begun < 0.1
    kit.run(scenario())


@COSTS
def test_no_answer_reaches_another_request(kit, cost, monkeypatch):
    # A machine that stands still for half a second would have some refused.
    monkeypatch.setattr(batching, "WAITING_SECONDS", 60)
    source = np.random.default_rng(0)

    async def one(asked: Batcher, number: int) -> None:
        await asyncio.sleep(source.random() * 0.2)
        inputs = examples(*(number * 100 + np.arange(source.integers(1, 12))))
        scores = await asked.scores(inputs)
        np.testing.assert_array_equal(scores, np.concatenate([inputs, 2 * inputs], axis=1))

    async def scenario():
        asked = batcher(Model(0.001), cost, max_batch=8)
        await asyncio.gather(*(one(asked, number) for number in range(300)))
        assert asked.taken == 0
    kit.run(scenario())


@COSTS
def test_each_batch_is_told(kit, cost):
    async def scenario():
        told = []
        asked = batcher(Model(), cost, ran=lambda inputs, scores: told.append((len(inputs), scores.shape)))
        await asyncio.gather(*(asked.scores(examples(number)) for number in range(3)))
        await asyncio.sleep(0.05)
        assert sum(count for count, _ in told) == 3 and told[-1][1][1] == 2
    kit.run(scenario())


# ---- What goes wrong -----------------------------------------------------------------------------------------------

@COSTS
def test_who_goes_away_leaves_the_queue_and_spoils_nothing(kit, cost):
    async def scenario():
        model = Model()
        asked = batcher(model, cost)
        if cost is SLOW:
            model.gate.clear()
            running = asyncio.ensure_future(asked.scores(examples(7)))
            await asyncio.sleep(0.05)
            waiting = asyncio.ensure_future(asked.scores(examples(8)))
            await asyncio.sleep(0)
            running.cancel()
        else:
            waiting = asyncio.ensure_future(asked.scores(examples(8)))
            await asyncio.sleep(0)
        other = asyncio.ensure_future(asked.scores(examples(9)))
        await asyncio.sleep(0)
        waiting.cancel()
        model.gate.set()
        assert (await other)[0, 0] == 9
        assert model.sizes[-1] == 1 and asked.taken == 0
    kit.run(scenario())


@COSTS
def test_a_failure_is_of_its_own_batch_alone(kit, cost):
    async def scenario():
        model = Model()
        asked = batcher(model, cost, max_batch=1)
        found = await asyncio.gather(*(asked.scores(examples(number)) for number in (1, -1, 3)),
                                     return_exceptions=True)
        assert found[0][0, 0] == 1 and found[2][0, 0] == 3
        assert (found[1].status, "minus" in found[1].message) == (500, False)
        assert (await asked.scores(examples(4)))[0, 1] == 8
    kit.run(scenario())


@COSTS
def test_scores_of_another_shape_are_a_failure(kit, cost):
    async def scenario():
        asked = Batcher(lambda inputs: inputs, 2, Bounds(), cost)
        assert (await refused(asked.scores(examples(1)))).status == 500
    kit.run(scenario())


def test_a_request_is_told_when_its_time_has_passed_and_a_stuck_model_shows(kit, monkeypatch):
    async def scenario():
        model = Model()
        asked = batcher(model, seconds=0.2)
        model.gate.clear()
        begun = time.monotonic()
        running = asyncio.ensure_future(refused(asked.scores(examples(1))))
        await asyncio.sleep(0.05)
        waiting = await refused(asked.scores(examples(2)))
        running = await running
        assert running.status == waiting.status == 504 and 0.15 < time.monotonic() - begun < 2
        assert asked.taken == 0 and not asked.is_stuck()
        with monkeypatch.context() as later:
            later.setattr(time, "monotonic", lambda real=time.monotonic: real() + 10)
            assert asked.is_stuck()
        model.gate.set()
        assert (await asked.scores(examples(3)))[0, 0] == 3
        # Nobody waited for the second one any more.
        assert model.sizes == [1, 1]
    kit.run(scenario())


def test_more_than_half_a_second_of_work_is_refused(kit):
    async def scenario():
        model = Model()
        # 0.1 s for an example: five of them.
        asked = batcher(model, Cost(0.1, 0.1), max_batch=2)
        assert asked.most == 5
        model.gate.clear()
        taken = [asyncio.ensure_future(asked.scores(examples(number))) for number in range(5)]
        await asyncio.sleep(0.02)
        error = await refused(asked.scores(examples(9)))
        assert (error.status, error.headers) == (503, {"Retry-After": "1"})
        model.gate.set()
        assert np.concatenate(await asyncio.gather(*taken))[:, 0].tolist() == [0, 1, 2, 3, 4]
        # Alone, a request that is larger than that is taken.
        assert len(await asked.scores(examples(*range(20)))) == 20
    kit.run(scenario())


def test_under_three_times_the_load_what_is_taken_is_answered_soon(kit):
    async def scenario():
        asked = batcher(Model(0.02), Cost(0.02, 0.005), max_batch=4)
        waits, refusals = [], []

        async def one():
            begun = time.monotonic()
            try:
                await asked.scores(examples(1))
                waits.append(time.monotonic() - begun)
            except RequestError as error:
                refusals.append(error.status)
        tasks = []
        # 200 a second are possible, 600 come.
        begun = time.monotonic()
        for number in range(900):
            tasks.append(asyncio.ensure_future(one()))
            await asyncio.sleep(max(0, begun + number / 600 - time.monotonic()))
        await asyncio.gather(*tasks)
        assert set(refusals) == {503} and len(refusals) > 200
        assert len(waits) > 150 and np.percentile(waits, 99) < 1.5
    kit.run(scenario())


def test_a_retired_one_ends_its_thread_and_answers_all_the_same(kit):
    async def scenario():
        before = threading.active_count()
        asked = batcher(Model())
        await asked.scores(examples(1))
        assert threading.active_count() == before + 1
        asked.retire()
        for _ in range(2):
            until = time.monotonic() + 5
            while threading.active_count() > before and time.monotonic() < until:
                await asyncio.sleep(0.01)
            assert threading.active_count() == before
            assert (await asked.scores(examples(5)))[0, 0] == 5
    kit.run(scenario())
