"""Dogs or cats by fine-tuning: a network that has seen ImageNet needs few photographs.

Data: that of dogs-vs-cats.
Model: MobileNetV2 (arXiv 1801.04381) from Keras Applications with ImageNet's weights, a new last layer, all of it
trained at a low learning rate; with `--set frozen=true` the last layer only.
Commands:
    hpcai preprocess dogs-vs-cats --source petimages.zip --output data/dogs-vs-cats.h5
    hpcai train dogs-vs-cats-transfer --data data/dogs-vs-cats.h5
    hpcai train dogs-vs-cats-transfer --data data/dogs-vs-cats.h5 --set weights=mobilenet_v2_no_top.h5
Score: not measured yet: where this was written the weights could not be fetched.
"""

from hpcai_cli.recipe import Recipe

recipe = Recipe(
    name="dogs-vs-cats-transfer",
    summary="photographs of dogs and cats, fine-tuned from ImageNet's weights",
    dataset="dogs-vs-cats",
    input_shape=(150, 150, 3),
    num_classes=2,
    class_names=("cat", "dog"),
    epochs=5,
    batch_size=32,
    optimizer="adamw",
    learning_rate=1e-4,
    learning_rate_scaling="sqrt",
    weight_decay=0.01,
    warmup_epochs=0.5,
    options={"weights": "imagenet", "width": 1.0, "frozen": False, "dropout": 0.2},
)

ADDRESS = "https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
FILE = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{width}_224_no_top.h5"


def augment(images, seed, recipe: Recipe):
    """Cut, mirror and turn each photograph at random."""
    from hpcai_cli.engine import augmentation

    return augmentation.warp(images, seed, zoom=(0.7, 1.0), stretch=0.2, rotation=10.0)


def build_model(recipe: Recipe):
    """Return a Keras model: uint8 (batch, 150, 150, 3) in [0, 255] -> the logit of a dog (batch, 1)."""
    import keras
    from keras import layers

    # Without weights: adapt brings them, once, to rank 0; a resumed training has them in its checkpoint.
    body = keras.applications.MobileNetV2(input_shape=recipe.input_shape, include_top=False, weights=None,
                                          alpha=recipe.options["width"], pooling="avg")
    body.trainable = not recipe.options["frozen"]
    return keras.Sequential([
        keras.Input(recipe.input_shape), layers.Rescaling(1 / 127.5, offset=-1.0), body,
        layers.Dropout(recipe.options["dropout"]), layers.Dense(1, dtype="float32")])


def adapt(model, inputs, labels, recipe: Recipe):
    """Give the network ImageNet's weights, from the file that `weights` names, or from the address of Keras."""
    from hpcai_cli.engine import pretrained

    file = pretrained.weights_file(recipe.options["weights"],
                                   ADDRESS + FILE.format(width=recipe.options["width"]))
    if file is not None:
        pretrained.load_weights(next(layer for layer in model.layers if layer.name.startswith("mobilenet")), file)
