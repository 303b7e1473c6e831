"""What any server of the Open Inference Protocol v2 says of its models.

Protocol: https://github.com/kserve/open-inference-protocol
"""

import http.client
import json
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcai_cli.engine.benchmarks.load.open_loop import Address
from hpcai_cli.errors import DataError, HpcaiError, UsageError, printable

BINARY = "binary_tensor_data"
"""What a server calls the extension by which tensors are bytes."""
TYPES = {"BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
         "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
         "FP32": np.float32, "FP64": np.float64, "BF16": np.uint16, "BYTES": np.object_}
"""In which the values of a datatype are kept here; of BF16 the two bytes."""
_LONGEST = 16 << 20
"""Bytes of an answer that are read."""
_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """A server and what it is asked with."""

    address: Address
    host: str
    """As requests name it, with the port."""
    path: str = ""
    """Before `/v2`."""
    token: str = ""
    """Sent as a bearer token."""

    def headers(self) -> dict[str, str]:
        """Return what goes with each request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


@dataclass(frozen=True)
class Tensor:
    """An input as a server declares it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """-1 stands for any size."""


@dataclass(frozen=True)
class Model:
    """A model as its server declares it."""

    name: str
    inputs: tuple[Tensor, ...]
    takes_binary: bool


def server_at(url: str, *, token: str = "", certificate: Path | None = None) -> Server:
    """Return the server at an address such as http://host:8000.

    Args:
        certificate: of the authority that signed the server's own, PEM; None for those that the system knows.

    Raises:
        UsageError: the address is none.
        DataError: the certificate cannot be read.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        if not parts.hostname or parts.query or parts.fragment or parts.username or not url.isprintable():
            raise ValueError
    except (ValueError, KeyError):
        raise UsageError("this is no server's address", expected="http://HOST:PORT or https://HOST:PORT",
                         received=url) from None
    tls = None
    if parts.scheme == "https":
        try:
            tls = ssl.create_default_context(cafile=certificate)
        except (OSError, ssl.SSLError) as error:
            raise DataError(f"cannot use the certificate: {error.strerror or error}", expected="a PEM file",
                            received=str(certificate)) from None
    return Server(Address(parts.hostname, port, tls), parts.netloc, parts.path.rstrip("/"), token)


def describe(server: Server, name: str) -> Model:
    """Return what a server says of a model.

    Raises:
        HpcaiError: nobody listens, or the server refuses.
        DataError: it does not speak the protocol.
        UsageError: it has no such model.
    """
    status, content = ask(server, "GET", f"/v2/models/{urllib.parse.quote(name, safe='')}")
    document = _json(content)
    if status != 200:
        raise _without_model(server, name, status, content)
    if not isinstance(document, dict):
        raise _no_protocol(server, status, content)
    inputs = document.get("inputs")
    try:
        if not inputs:
            raise ValueError
        tensors = tuple(_tensor(each) for each in inputs)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError(f"the server does not say what the model {printable(name)} takes", received=inputs,
                        expected="metadata of the Open Inference Protocol v2 with `inputs`") from None
    status, content = ask(server, "GET", "/v2")
    said = _json(content) if status == 200 else None
    extensions = said.get("extensions") if isinstance(said, dict) else None
    return Model(name, tensors, isinstance(extensions, list) and BINARY in extensions)


def ask(server: Server, method: str, path: str) -> tuple[int, bytes]:
    """Return status and body of one answer.

    Raises:
        HpcaiError: nobody answers.
        DataError: what answers does not speak HTTP.
    """
    where = f"{server.address.host}:{server.address.port}"
    address = server.address
    kind = http.client.HTTPSConnection if address.tls else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=_SECONDS, **({"context": address.tls} if address.tls else {}))
    try:
        connection.request(method, server.path + path, b"{}" if method == "POST" else None,
                           {"Host": server.host, "Accept": "application/json", "Content-Type": "application/json",
                            **server.headers()})
        answer = connection.getresponse()
        return answer.status, answer.read(_LONGEST)
    except OSError as error:
        raise HpcaiError(f"nobody answers at {where}: {error.strerror or error}", received=server.host,
                         expected="a running server of the Open Inference Protocol v2") from None
    except (http.client.HTTPException, ValueError):
        raise DataError(f"what answers at {where} does not speak HTTP", received=server.host,
                        expected="a server of the Open Inference Protocol v2") from None
    finally:
        connection.close()


# ---- What a server says --------------------------------------------------------------------------------------------

def _json(content: bytes):
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def words_of(content: bytes) -> str:
    """Return what a server says of a refusal."""
    said = _json(content)
    said = said.get("error", said) if isinstance(said, dict) else content.decode("utf-8", "replace").strip()
    return printable(str(said)) or "nothing"


def _tensor(said: Mapping) -> Tensor:
    name, datatype, shape = said["name"], said["datatype"], said["shape"]
    shape = tuple(int(size) if not isinstance(size, bool) and int(size) == float(size) else 0 for size in shape)
    if not isinstance(name, str) or datatype not in TYPES or any(size < -1 or size == 0 for size in shape):
        raise ValueError
    return Tensor(name, datatype, shape)


def _without_model(server: Server, name: str, status: int, content: bytes) -> HpcaiError:
    """Return the error for a model's metadata that were not had."""
    if status in (401, 403):
        return HpcaiError(f"the server refuses the {'token' if server.token else 'request without a token'}: "
                          f"{words_of(content)}", mend="give its token with --token-file FILE", received=status)
    alive, _ = ask(server, "GET", "/v2/health/live")
    known, about = ask(server, "GET", "/v2")
    if 200 not in (alive, known if isinstance(_json(about), dict) else 0):
        return _no_protocol(server, status, content)
    _, index = ask(server, "POST", "/v2/repository/index")
    rows = _json(index)
    names = [str(row.get("name")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return UsageError("the server has no such model", received=name,
                      expected=printable(", ".join(names)) or f"another name ({words_of(content)})")


def _no_protocol(server: Server, status: int, content: bytes) -> DataError:
    return DataError(f"the server at {server.host} does not speak the Open Inference Protocol v2",
                     expected="JSON at /v2", received=f"status {status}: {words_of(content)}")
