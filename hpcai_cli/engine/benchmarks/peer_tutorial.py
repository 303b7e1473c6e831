"""The peer of the accuracy benchmark: MNIST as the tutorials do it, with Keras alone, run as a script.

Conv 32, Flatten, Dense 128, Dense 10; Adam, batches of 32; all of MNIST's training images in memory; the test accuracy
is looked at after each epoch. Usage: peer_tutorial.py FILE.h5 WANTED_ACCURACY MOST_EPOCHS
"""

import time

STARTED = time.perf_counter()


def main(path: str, wanted: float, most_epochs: int) -> None:
    """Train until the test accuracy is reached, and print one JSON line."""
    import json

    import h5py
    import keras
    import numpy as np
    from keras import layers

    with h5py.File(path, "r") as file:
        # The tutorials train on all 60,000 images, so the validation split goes back to the training images.
        parts = [name for name in ("train", "validation") if name in file]
        images = np.concatenate([file[f"{name}/images"][:] for name in parts]).astype("float32") / 255
        labels = np.concatenate([file[f"{name}/labels"][:] for name in parts])
        test_images, test_labels = file["test/images"][:].astype("float32") / 255, file["test/labels"][:]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((28, 28, 1)), layers.Conv2D(32, 3, activation="relu"), layers.Flatten(),
        layers.Dense(128, activation="relu"), layers.Dense(10, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    epochs, accuracy = 0, 0.0
    while epochs < most_epochs and accuracy < wanted:
        model.fit(images, labels, batch_size=32, verbose=0)
        accuracy = model.evaluate(test_images, test_labels, verbose=0)[1]
        epochs += 1
    print(json.dumps({"seconds": time.perf_counter() - STARTED, "epochs": epochs, "accuracy": accuracy}))


if __name__ == "__main__":
    import sys

    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
