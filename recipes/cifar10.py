"""Ten kinds of small photographs with a convolutional network.

Data: CIFAR-10, 50,000 training and 10,000 test images of 32x32x3 in ten classes: the binary or the Python version, an
archive or folder of either, or a tree of images in train/CLASS and test/CLASS.
Model: a residual network of nine layers (`--set width=32`), or the tutorials' (`--set architecture=tutorial`:
Conv 32, 64, 64 with max-pooling, Dense 64, ten epochs).
Commands:
    hpcai preprocess cifar10 --output data/cifar10.h5
    hpcai train cifar10 --data data/cifar10.h5
    hpcai train cifar10 --data data/cifar10.h5 --set architecture=tutorial
Score: 85.1 % of 8,000 test images (kept as JPEG) after 14 minutes; the tutorials' form 70.2 % after 91 seconds (AMD
EPYC Zen 5, 2 cores that others used too, float32; 2026-11-21).
"""

from pathlib import Path

from hpcai_cli.recipe import Downloads, File, Recipe

recipe = Recipe(
    name="cifar10",
    summary="ten kinds of small photographs, convolutional network",
    input_shape=(32, 32, 3),
    num_classes=10,
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    epochs=6,
    batch_size=64,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    warmup_epochs=1.0,
    label_smoothing=0.1,
    options={"architecture": "residual", "width": 32, "shift": 4},
    presets={"architecture": {"residual": {}, "tutorial": {
        "epochs": 10, "batch_size": 32, "optimizer": "adam", "learning_rate": 1e-3, "weight_decay": 0.0,
        "schedule": "constant", "warmup_epochs": 0.0, "label_smoothing": 0.0, "shift": 0}}},
)

downloads = Downloads(
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    files=(File("cifar-10-python.tar.gz", bytes=180_000_000,
                sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),),
)


def load(source: Path, recipe: Recipe) -> dict:
    """Read CIFAR's own files, or a tree of images."""
    from hpcai_cli.engine.raw.cifar import has_cifar, read_cifar
    from hpcai_cli.engine.raw.image_files import find_image_files

    if has_cifar(source):
        return read_cifar(source, num_classes=recipe.num_classes)
    return find_image_files(source, shape=recipe.input_shape, class_names=recipe.class_names)


def sample() -> dict:
    """Return 600 made-up images, the classes told apart by color and stripes: enough to try everything offline."""
    import numpy as np

    source = np.random.default_rng(0)
    labels = np.arange(600) % 10
    stripes = (np.arange(32)[None, :] // (1 + labels[:, None] % 5) % 2 * 90)[:, :, None, None]
    colors = 40 + 100 * np.stack([labels % 2, labels // 2 % 2, labels // 4 % 2], axis=1)[:, None, None, :]
    images = (stripes + colors + source.integers(0, 30, (600, 32, 32, 3))).astype(np.uint8).clip(0, 255)
    test = np.arange(600) % 6 == 5
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def augment(images, seed, recipe: Recipe):
    """Move each image by a few pixels and mirror half of them."""
    from hpcai_cli.engine import augmentation

    pixels = recipe.options["shift"]
    return augmentation.shift(images, seed, pixels=pixels) if pixels else images


def build_model(recipe: Recipe):
    """Return a Keras model: uint8 (batch, 32, 32, 3) in [0, 255] -> logits (batch, 10)."""
    import keras
    from keras import layers

    from hpcai_cli.engine import networks

    answer = layers.Dense(recipe.num_classes, dtype="float32")
    if recipe.options["architecture"] == "tutorial":
        return keras.Sequential([
            keras.Input(recipe.input_shape), layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"), layers.Flatten(), layers.Dense(64, activation="relu"), answer])
    inputs = keras.Input(recipe.input_shape)
    return keras.Model(inputs, answer(networks.residual(inputs, width=recipe.options["width"])))
