"""The peer of the tutorial benchmark: Dogs-vs-Cats as the tutorials do it, with Keras alone, run as a script.

Three convolutions of 32, 64 and 128 with max-pooling, Dense 512, Dropout 0.5, one sigmoid; Adam, batches of 32;
ImageDataGenerator reads and augments the photographs of 150x150 anew in each epoch. The test accuracy is looked at
once, at the end. Usage: peer_tutorial_photographs.py FOLDER EPOCHS SEED, where FOLDER holds train/ and test/, each
with a folder per class.
"""

import time

STARTED = time.perf_counter()


def main(folder: str, epochs: int, seed: int) -> None:
    """Train, evaluate, and print one JSON line."""
    import json

    from tensorflow import keras
    from tensorflow.keras import layers
    from tensorflow.keras.preprocessing.image import ImageDataGenerator

    keras.utils.set_random_seed(seed)
    augmenting = ImageDataGenerator(rescale=1 / 255, horizontal_flip=True, rotation_range=20, width_shift_range=0.2,
                                    height_shift_range=0.2, zoom_range=0.2)
    wanted = {"target_size": (150, 150), "batch_size": 32, "class_mode": "binary"}
    train = augmenting.flow_from_directory(f"{folder}/train", **wanted)
    test = ImageDataGenerator(rescale=1 / 255).flow_from_directory(f"{folder}/test", shuffle=False, **wanted)
    model = keras.Sequential([keras.Input((150, 150, 3))])
    for filters in (32, 64, 128):
        model.add(layers.Conv2D(filters, 3, activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(512, activation="relu"))
    model.add(layers.Dropout(0.5))
    model.add(layers.Dense(1, activation="sigmoid"))
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy", metrics=["accuracy"])
    model.fit(train, epochs=epochs, verbose=0)
    accuracy = model.evaluate(test, verbose=0)[1]
    print(json.dumps({"seconds": time.perf_counter() - STARTED, "accuracy": accuracy}))


if __name__ == "__main__":
    import sys

    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
