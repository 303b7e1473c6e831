"""What each rank runs for `hpcai doctor`: the reduction that training uses, on numbers whose result is known."""

import json
import sys
import time

from hpcai_cli.errors import HpcaiError

_ELEMENTS = 262_144  # 1 MB of float32
_REPETITIONS = 10


def main() -> None:
    """Reduce the ranks' numbers and 1 MB, verify both, and print one JSON line with the time from rank 0."""
    import tensorflow as tf

    from hpcai_cli.engine import distributed

    # Two processes share this machine with their own communication threads.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    ranks = distributed.start()
    if ranks.size < 2:
        raise HpcaiError("this check was started alone", expected="several ranks under horovodrun or mpirun")
    mean = (ranks.size - 1) / 2
    gradient = tf.fill([_ELEMENTS], float(ranks.rank))
    seconds = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        (averaged,), _, total = ranks.reduce([gradient], [], tf.constant([float(ranks.rank)]))
        averaged = averaged.numpy()
        seconds.append(time.perf_counter() - started)
        if abs(averaged - mean).max() > 1e-6 or abs(float(total[0]) - mean * ranks.size) > 1e-4:
            raise HpcaiError("the allreduce gave a wrong result", expected=f"the mean {mean}", received=averaged[:4])
    if ranks.rank == 0:
        # The first ones carry set-up costs; the median leaves them out.
        print(json.dumps({"size": ranks.size, "seconds": sorted(seconds)[len(seconds) // 2]}), flush=True)
    ranks.stop()


if __name__ == "__main__":
    try:
        main()
    except HpcaiError as failure:
        sys.exit(f"error: {failure}")
