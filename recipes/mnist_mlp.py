"""Handwritten digits with a small multi-layer perceptron.

Data: MNIST, the file that `hpcai preprocess mnist` writes.
Model: Dense 128, Dropout 0.2, Dense 10; 101,770 parameters.
Command:
    hpcai train mnist-mlp --data data/mnist.h5
Score: 98.0 % on the test images in 13 seconds, start to end (AMD EPYC Zen 5, 2 cores, float32; 2026-11-21).
"""

from hpcai_cli.recipe import Recipe

recipe = Recipe(
    name="mnist-mlp",
    summary="handwritten digits, multi-layer perceptron",
    dataset="mnist",
    input_shape=(28, 28, 1),
    num_classes=10,
    class_names=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    epochs=12,
    batch_size=64,
    optimizer="adam",
    learning_rate=2e-3,
    learning_rate_scaling="sqrt",
    warmup_epochs=0.5,
    options={"units": 128, "dropout": 0.2},
    search={"learning_rate": "log:1e-5:1e-1", "batch_size": "log:32:512", "warmup_epochs": "0:2",
            "units": "log:16:256", "dropout": "0:0.6"},
)


def build_model(recipe: Recipe):
    """Return a Keras model: uint8 (batch, 28, 28, 1) in [0, 255] -> logits (batch, 10)."""
    import keras
    from keras import layers

    return keras.Sequential([
        keras.Input(recipe.input_shape),
        layers.Rescaling(1 / 255),
        layers.Flatten(),
        layers.Dense(recipe.options["units"], activation="relu"),
        layers.Dropout(recipe.options["dropout"]),
        layers.Dense(recipe.num_classes, dtype="float32"),
    ])
