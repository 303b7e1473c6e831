"""What the fault harness trains: images that say which one they are, a model that counts what it is given.

Each step and each batch of an evaluation is marked in a file, with the moment when it began, and takes some
milliseconds, so that a training lasts for seconds and has its checkpoints at a steady pace.
"""

import os
import time

from hpcai_cli.recipe import Recipe

COUNT = 2048
"""Numbers that an image can have: the first two pixels hold it."""

recipe = Recipe(name="faults", summary="what the fault harness trains", input_shape=(64, 64, 1), num_classes=3,
                epochs=6, batch_size=16, optimizer="sgd", momentum=0.9, learning_rate=0.01,
                learning_rate_scaling="none", warmup_epochs=0.5, precision="float32", early_stopping_patience=1000,
                validation_fraction=0.4, options={"milliseconds": 10.0})


def sample():
    import numpy as np

    def images(count, first):
        numbers = first + np.arange(count)
        labels = numbers % 3
        made = np.random.default_rng(first).integers(0, 120, (count, 64, 64, 1), dtype=np.uint8)
        made[np.arange(count), 8 * (1 + labels)] += 90
        made[:, 0, 0, 0], made[:, 0, 1, 0] = numbers % 256, numbers // 256
        return made, labels

    return {"train": images(1600, 0), "test": images(400, 1600)}


def load(source, recipe):
    return sample()


def mark(kind: str, number: int, milliseconds: float) -> None:
    """Write down what begins now; nothing where nobody asks for it."""
    if "FAULTS_MARKS" in os.environ:
        rank = os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        with open(f"{os.environ['FAULTS_MARKS']}.{rank}", "a") as stream:
            stream.write(f"{kind} {number} {time.monotonic():.6f}\n")
        time.sleep(milliseconds / 1000)


def augment(images, seed, recipe):
    """Add noise that is another one for each step and rank, but leave an image's number."""
    import tensorflow as tf

    begun = tf.numpy_function(lambda number: mark("step", int(number), recipe.options["milliseconds"]), [seed[1]], [])
    with tf.control_dependencies([begun]):
        images = tf.cast(images, tf.float32)
    noise = tf.random.stateless_uniform(tf.shape(images[:, 1:]), seed, -20, 20)
    return tf.concat([images[:, :1], images[:, 1:] + noise], axis=1)


def build_model(recipe):
    import keras
    import tensorflow as tf

    class Counter(keras.layers.Layer):
        """Counts how often it was given each image; over ranks, whose statistics are averaged, their mean."""

        def build(self, shape):
            self.seen = self.add_weight(shape=(COUNT,), initializer="zeros", trainable=False, name="seen")

        def call(self, images, training=False):
            if training:
                numbers = tf.cast(images[:, 0, 0, 0] + 256 * images[:, 0, 1, 0], tf.int32)
                self.seen.assign_add(tf.reduce_sum(tf.one_hot(numbers, COUNT), axis=0))
                return images
            begun = tf.numpy_function(lambda: mark("evaluation", 0, 5 * recipe.options["milliseconds"]), [], [])
            with tf.control_dependencies([begun]):
                return tf.identity(images)

        def compute_output_shape(self, shape):
            return shape

    return keras.Sequential([
        keras.Input(recipe.input_shape), Counter(name="counter"), keras.layers.Rescaling(1 / 255),
        keras.layers.Flatten(), keras.layers.Dense(64, activation="relu"), keras.layers.Dropout(0.3),
        keras.layers.Dense(3)])
