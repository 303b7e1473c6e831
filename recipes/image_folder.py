"""Any folder of images, a subfolder for each class.

Data: CLASS/*.jpg, or train/CLASS and test/CLASS, as a folder or an archive; the classes are the subfolders' names. All
images are brought to image_size x image_size.
Model: a small Xception of separable convolutions.
Commands:
    hpcai preprocess image-folder --source photographs/ --output data/photographs.h5
    hpcai train image-folder --data data/photographs.h5
    hpcai train image-folder --data data/photographs.h5 --epochs 100 --set width=48
Score: that of your images. The defaults are for some thousand photographs; more of them need fewer epochs.
"""

from pathlib import Path

from hpcai_cli.recipe import Recipe

recipe = Recipe(
    name="image-folder",
    summary="any folder of images, CLASS/*.jpg",
    test_fraction=0.2,
    validation_fraction=0.1,
    epochs=50,
    batch_size=32,
    optimizer="adamw",
    learning_rate=1e-3,
    learning_rate_scaling="sqrt",
    weight_decay=0.05,
    warmup_epochs=2.0,
    label_smoothing=0.05,
    options={"image_size": 128, "width": 32, "dropout": 0.3, "zoom": 0.6, "rotation": 10.0, "flip": True, "color": 0.2},
)


def load(source: Path, recipe: Recipe) -> dict:
    """Find the images; they are decoded in parallel later."""
    from hpcai_cli.engine.raw.image_files import find_image_files

    size = recipe.options["image_size"]
    return find_image_files(source, shape=(size, size, 3), class_names=recipe.class_names)


def sample() -> dict:
    """Return scikit-learn's two photographs, cut into 240 pictures of 64x64: a temple or a flower."""
    import numpy as np
    from sklearn.datasets import load_sample_images

    source, pictures = np.random.default_rng(0), load_sample_images().images
    labels = np.arange(240) % len(pictures)
    places = source.integers(0, (363, 576), (240, 2))
    images = np.stack([pictures[label][y:y + 64, x:x + 64] for label, (y, x) in zip(labels, places, strict=True)])
    return {"train": (images[:180], labels[:180]), "test": (images[180:], labels[180:])}


def augment(images, seed, recipe: Recipe):
    """Cut, mirror, turn and color each image at random."""
    from hpcai_cli.engine import augmentation

    options = recipe.options
    images = augmentation.warp(images, seed, flip=options["flip"], zoom=(options["zoom"], 1.0), stretch=0.3,
                               rotation=options["rotation"])
    change = options["color"]
    return augmentation.color(images, seed, brightness=change, contrast=change, saturation=change)


def build_model(recipe: Recipe):
    """Return a Keras model: uint8 (batch, height, width, channels) in [0, 255] -> logits (batch, num_classes)."""
    import keras
    from keras import layers

    from hpcai_cli.engine import networks

    inputs = keras.Input(recipe.input_shape)
    features = layers.Dropout(recipe.options["dropout"])(networks.separable(inputs, width=recipe.options["width"]))
    return keras.Model(inputs, layers.Dense(recipe.num_classes, dtype="float32")(features))
