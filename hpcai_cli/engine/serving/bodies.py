"""Bodies of people's requests as examples: forms with image files, an image as it is, a table's rows as JSON."""

import time

import numpy as np

from hpcai_cli.engine.serving import examples
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.protocol import Limits
from hpcai_cli.engine.serving.tensors import RequestError, parse_json
from hpcai_cli.errors import printable

FIELD = "image"
"""Name of a form's fields that hold images."""
_DECODED_BYTES = 256 << 20
"""Bytes of a request's decoded images."""
_LARGEST_HEADER = 8 << 10
"""Bytes of a line of a part's head."""


def examples_of(artefact: Artefact, content_type: str | None, body: bytes, limits: Limits,
                seconds: float) -> np.ndarray:
    """Return the examples in a body, as stored: uint8 (n, height, width, channels) or float32 (n, features).

    Args:
        seconds: for which images are decoded.

    Raises:
        RequestError: 400 the body is broken, 413 it holds too much, 415 it is of another type than the model's.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if artefact.inputs == "features":
        if kind != "application/json":
            raise RequestError(415, "this model takes a table's rows; expected the Content-Type application/json, "
                               f"received: {printable(kind) or 'none'}")
        return examples.row_examples(artefact, rows_in(parse_json(body)), limits)
    if kind == "multipart/form-data":
        contents = images_in_form(content_type, body)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        contents = [body]
    else:
        raise RequestError(415, f"this model takes images; expected a form with the field {FIELD} (curl -F "
                           f"{FIELD}=@FILE), or an image with the Content-Type image/..., "
                           f"received: {printable(kind) or 'none'}")
    most = min(limits.most_examples, max(1, _DECODED_BYTES // int(np.prod(artefact.input_shape))))
    if len(contents) > most:
        raise RequestError(413, f"the form has {len(contents)} images; expected at most {most}")
    until, decoded = time.monotonic() + seconds, []
    for content in contents:
        if time.monotonic() > until:
            raise RequestError(413, f"the images take longer than {seconds:g} s to decode; expected fewer")
        decoded.append(examples.image_example(artefact, content, limits))
    return decoded[0] if len(decoded) == 1 else np.concatenate(decoded)


def rows_in(document: object) -> object:
    """Return the rows of {"rows": [...]}, of a list, or of an object that is one row."""
    if isinstance(document, dict):
        return document["rows"] if isinstance(document.get("rows"), list) else [document]
    return document


def images_in_form(content_type: str, body: bytes) -> list[bytes]:
    """Return the contents of a form's fields named `image`.

    Raises:
        RequestError: 400 the form is broken, or has no such field.
    """
    # Loaded with the first form, so that a server starts sooner.
    from python_multipart import MultipartParser
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import parse_options_header

    form = _Form(parse_options_header)
    try:
        boundary = parse_options_header(content_type)[1][b"boundary"]
        parser = MultipartParser(boundary, form.callbacks, max_header_size=_LARGEST_HEADER)
        parser.write(body)
        parser.finalize()
    except (FormParserError, KeyError, ValueError) as error:
        raise RequestError(400, f"the form cannot be read: {printable(str(error))}") from None
    if not form.ended:
        raise RequestError(400, "the form is cut off; expected its last boundary")
    if not form.images:
        raise RequestError(400, f"the form has no image; expected a field {FIELD} (curl -F {FIELD}=@FILE)")
    return form.images


class _Form:
    """Collects a form's images while it is parsed."""

    def __init__(self, parse_options):
        self._parse_options = parse_options
        self._header, self._value, self._part = b"", b"", None
        self.images: list[bytes] = []
        self.ended = False
        self.callbacks = {
            "on_part_begin": self._begin, "on_header_field": self._on_header, "on_header_value": self._on_value,
            "on_header_end": self._end_header, "on_part_data": self._on_data, "on_part_end": self._end_part,
            "on_end": self._end}

    def _begin(self) -> None:
        self._part = None

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        is_named = self._header.lower() == b"content-disposition"
        if is_named and self._parse_options(self._value)[1].get(b"name") == FIELD.encode():
            self._part = bytearray()
        self._header = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._part is not None:
            self._part += data[start:end]

    def _end_part(self) -> None:
        if self._part is not None:
            self.images.append(bytes(self._part))

    def _end(self) -> None:
        self.ended = True
