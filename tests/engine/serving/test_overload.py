"""What is refused and what is not when there is, or seems to be, too much to do."""

import asyncio
import json
import time

import numpy as np
import pytest

from hpcai_cli.engine.serving.app import Application
from hpcai_cli.engine.serving.batching import WAITING_SECONDS, Batcher, Bounds, Cost
from hpcai_cli.engine.serving.metrics import Metrics
from hpcai_cli.engine.serving.models import Models, Place
from hpcai_cli.engine.serving.request_log import RequestLog
from hpcai_cli.engine.serving.settings import Settings
from hpcai_cli.engine.serving.tensors import RequestError

pytestmark = pytest.mark.alone


def examples(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


@pytest.mark.parametrize("cost", [Cost(0.0001, 0.0001), Cost(0.01, 0.001)], ids=["in the loop", "in a thread"])
def test_a_process_that_was_kept_from_running_takes_what_it_finds(kit, cost):
    async def scenario():
        batcher = Batcher(lambda inputs: inputs, 1, Bounds(), cost)
        first = asyncio.ensure_future(batcher.scores(examples(1)))
        await asyncio.sleep(0)
        # The machine gives its time to others, and nothing has been run of the little that waits.
        time.sleep(WAITING_SECONDS + 0.2)
        assert (await batcher.scores(examples(2))).tolist() == [[2]] and (await first).tolist() == [[1]]
    kit.run(scenario())


def test_what_waits_for_batch_after_batch_of_a_model_that_became_slow_is_refused(kit):
    async def scenario():
        def scores(inputs: np.ndarray) -> np.ndarray:
            time.sleep(0.4)
            return inputs
        # At its warm-up it took a thousandth of that.
        batcher = Batcher(scores, 1, Bounds(max_batch=1), Cost(0.0006, 0.0004))
        taken = [asyncio.ensure_future(batcher.scores(examples(number))) for number in range(4)]
        await asyncio.sleep(0.4 + WAITING_SECONDS)
        with pytest.raises(RequestError) as refused:
            await batcher.scores(examples(9))
        assert refused.value.status == 503 and int(refused.value.headers["Retry-After"]) >= 1
        assert np.concatenate(await asyncio.gather(*taken)).ravel().tolist() == [0, 1, 2, 3]
    kit.run(scenario())


# ---- What an example takes -----------------------------------------------------------------------------------------

def test_batches_of_one_do_not_pass_for_what_full_ones_take(kit):
    async def scenario():
        def scores(inputs: np.ndarray) -> np.ndarray:
            time.sleep(0.005)
            return inputs
        batcher = Batcher(scores, 1, Bounds(max_batch=32), Cost(0.005, 0.005 / 32))
        before = batcher.most

        # While the model runs for one, the next one comes.
        asked = []
        for _ in range(100):
            asked.append(asyncio.ensure_future(batcher.scores(examples(1))))
            await asyncio.sleep(0.004)
        await asyncio.gather(*asked)
        assert batcher.most > before / 2
    kit.run(scenario())


def test_one_bad_moment_of_the_machine_does_not_make_room_scarce(kit):
    async def scenario():
        pauses = iter([0.005, 0.5])

        def scores(inputs: np.ndarray) -> np.ndarray:
            time.sleep(next(pauses, 0.001))
            return inputs
        batcher = Batcher(scores, 1, Bounds(max_batch=1), Cost(0.001, 0.001))
        before = batcher.most
        await asyncio.gather(*(batcher.scores(examples(number)) for number in range(5)))
        assert batcher.most > before / 4
    kit.run(scenario())


# ---- What a refusal costs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["infer", "predict"])
def test_what_is_refused_is_not_looked_into(exports, kit, tmp_path, path):
    settings, names = Settings(("tiny",), trust=True), ["tiny"]
    place = Place(tmp_path, 0, Metrics(names, tmp_path, 0))
    models = Models({"tiny": exports.write(tmp_path / "tiny")}, settings, place)
    models.load(strict=True)
    log = RequestLog(str(tmp_path / "requests.log"))
    app = Application(models, settings, place, log)

    def ask():
        return kit.run(kit.ask(app, "POST", f"/v2/models/tiny/{path}", b"broken", {"Content-Type": "image/png"}))
    assert ask().status in (400, 415)
    batcher = models.find("tiny").batcher
    batcher.taken = batcher.most
    refused = ask()
    assert refused.status == 503 and refused.headers["retry-after"] == "1"
    assert "more to do" in json.loads(refused.body)["error"]
    log.close()
