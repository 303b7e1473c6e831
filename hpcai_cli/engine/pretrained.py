"""Weights that somebody else has trained: from a local file or from an address, checked before Keras reads them."""

import os
from pathlib import Path

import h5py
import keras

from hpcai_cli.cache import cache_folder
from hpcai_cli.engine.model_file import check_weights
from hpcai_cli.engine.raw.downloads import download_archive, writing_below
from hpcai_cli.errors import DataError


def weights_file(wanted: str, address: str) -> Path | None:
    """Return the weights file that a recipe asks for.

    Args:
        wanted: `imagenet` for the file at the address, which the cache keeps; `none` for none; else a path.

    Raises:
        MissingError: the address does not give it.
        DataError: there is no such file.
    """
    if wanted == "none":
        return None
    if wanted != "imagenet":
        path = Path(os.path.expanduser(wanted))
        if not path.is_file():
            raise DataError("the file with the pretrained weights does not exist", received=wanted,
                            mend="give it with --set weights=FILE, or train from scratch with --set weights=none")
        return path
    target = cache_folder() / "weights" / address.rpartition("/")[2]
    if not target.is_file():
        with writing_below(cache_folder()):
            target.parent.mkdir(parents=True, exist_ok=True)
        download_archive(address, target, cache_folder(), what="ImageNet's weights", mend="fetch the file on another "
                         "machine and give it with --set weights=FILE, or train from scratch with --set weights=none")
    return target


def load_weights(model: keras.Model, path: Path) -> None:
    """Give a model the weights in an HDF5 file of Keras.

    Raises:
        DataError: the file is damaged, hostile, or of another model.
    """
    try:
        with h5py.File(path, "r", locking=False) as weights:
            check_weights(weights, path.stat().st_size)
        model.load_weights(path)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise DataError(f"{path} holds no weights for {model.name}: {first_line}",
                        expected="a weights file (.h5) of the same network, without its last layer") from None
