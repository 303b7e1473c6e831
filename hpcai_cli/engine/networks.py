"""Convolutional networks of the recipes for images: the tutorials' plain stack, a residual one, a small Xception."""

from keras import layers


def tutorial(filters: tuple[int, ...], units: int, *, dropout: float = 0.0) -> list:
    """Return the tutorials' layers: convolutions of 3x3 with max-pooling after each, then a dense layer.

    uint8 (batch, height, width, channels) in [0, 255] -> features, float32 (batch, units).
    """
    body = [layers.Rescaling(1 / 255)]
    for count in filters:
        body += [layers.Conv2D(count, 3, activation="relu"), layers.MaxPooling2D()]
    body += [layers.Flatten(), layers.Dense(units, activation="relu")]
    return [*body, layers.Dropout(dropout)] if dropout else body


def residual(inputs, *, width: int):
    """Return pooled features, (batch, 8 * width), of a small residual network for images of about 32x32.

    Source: the nine-layer form of arXiv 1512.03385 that is known for training fast on CIFAR-10.

    Args:
        inputs: a Keras tensor of uint8 images, (batch, height, width, channels) in [0, 255].
        width: channels of the first convolution.
    """
    def block(x, filters: int):
        # Keras' default momentum of 0.99 would need a thousand steps to forget its start.
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))

    x = layers.Rescaling(1 / 64, offset=-2.0)(inputs)
    x = layers.MaxPooling2D()(block(block(x, width), 2 * width))
    x = layers.Add()([x, block(block(x, 2 * width), 2 * width)])
    x = layers.MaxPooling2D()(block(x, 4 * width))
    x = layers.Add()([x, block(block(x, 4 * width), 4 * width)])
    return layers.GlobalMaxPooling2D()(block(x, 8 * width))


def separable(inputs, *, width: int, stages: int = 5, strides: int = 2):
    """Return pooled features, (batch, width * 2**(stages - 1)), of a small Xception, for photographs.

    Separable convolutions with shortcuts (arXiv 1610.02357) have few weights to overfit with: from a thousand
    photographs they learn more than plain convolutions do.

    Args:
        inputs: a Keras tensor of uint8 images, (batch, height, width, channels) in [0, 255].
        width: channels of the first stage; each stage has twice as many and half the height and width.
        strides: of the first convolution; 4 leaves a quarter of the work of 2.
    """
    x = layers.Rescaling(1 / 64, offset=-2.0)(inputs)
    x = layers.Conv2D(width, 5, strides=strides, padding="same", use_bias=False)(x)
    for stage in range(stages):
        filters, shortcut = width * 2**stage, x
        for _ in range(2):
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
            x = layers.SeparableConv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
        # Every second pixel by a pooling of 1x1, and not by strides of the convolution: oneDNN's gradient of a 1x1
        # convolution with strides writes beyond its memory where there are fewer than 16 channels (TensorFlow 2.21).
        shortcut = layers.MaxPooling2D(1, strides=2, padding="same")(shortcut)
        x = layers.Add()([x, layers.Conv2D(filters, 1, use_bias=False)(shortcut)])
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    return layers.GlobalAveragePooling2D()(x)
