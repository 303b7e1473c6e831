"""The peer of the benchmark against a Horovod script: a small CNN on MNIST as one writes it by hand.

All images in memory, a shuffled order that all ranks draw alike, a compiled step, the gradients averaged in one grouped
operation, rank 0's weights for all. Each rank takes its share of the cores. The network is that of the recipe `mnist`.
Usage, under a launcher: peer_horovod.py FILE.h5 BATCH_SIZE EPOCHS
"""

import json
import sys
import time


def main(path: str, batch_size: int, epochs: int) -> None:
    """Train, and let rank 0 print one JSON line: the time of the first step, unix seconds, and images/s by epoch."""
    import os

    import h5py
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf
    from keras import layers

    hvd.init()
    share = max(1, len(os.sched_getaffinity(0)) // hvd.local_size())
    tf.config.threading.set_intra_op_parallelism_threads(share)
    with h5py.File(path, "r") as file:
        images, labels = file["train/images"][:], file["train/labels"][:]
    keras.utils.set_random_seed(0)

    def block(filters):
        return [layers.Conv2D(filters, 3, use_bias=False), layers.BatchNormalization(momentum=0.9), layers.ReLU()]

    model = keras.Sequential([
        keras.Input((28, 28, 1)), layers.Rescaling(1 / 255), *block(16), layers.MaxPooling2D(), *block(32), *block(32),
        layers.MaxPooling2D(), *block(64), layers.Flatten(), layers.Dropout(0.25), layers.Dense(10)])
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    hvd.broadcast_variables([variable.value for variable in (*model.variables, *optimizer.variables)], root_rank=0)

    @tf.function
    def step(some_images, some_labels):
        with tf.GradientTape() as tape:
            loss = loss_of(some_labels, model(some_images, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(hvd.grouped_allreduce(gradients, op=hvd.Average), model.trainable_variables)
        return loss

    together, first, rates = batch_size * hvd.size(), None, []
    order = np.random.default_rng(0)
    for _ in range(epochs):
        rows, started = order.permutation(len(images)), time.perf_counter()
        steps = len(rows) // together
        for number in range(steps):
            start = number * together + hvd.rank() * batch_size
            mine = rows[start:start + batch_size]
            loss = step(images[mine], labels[mine])
            if first is None:
                float(loss)
                first = time.time()
        float(loss)
        rates.append(steps * together / (time.perf_counter() - started))
    if hvd.rank() == 0:
        print("\n" + json.dumps({"first_step": first, "images_per_second": rates}), flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
