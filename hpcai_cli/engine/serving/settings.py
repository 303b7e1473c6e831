"""What a server is told on its command line."""

from dataclasses import dataclass
from pathlib import Path

from hpcai_cli.errors import UsageError

_LONGEST_TOKEN = 4096


@dataclass(frozen=True)
class Settings:
    """The options of a server; the sentence below each is its help text."""

    models: tuple[str, ...]
    """Folders of exports, or of numbered versions of one; NAME=FOLDER gives a model another name."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which a token should guard then."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    workers: int = 1
    """Processes that answer."""
    threads: int = 0
    """Threads of a model in each worker, at most; 0 shares the cores out."""
    max_batch: int = 32
    """Examples that a model gets at once."""
    max_delay: float = 0.0
    """Seconds for which a free model waits for more examples."""
    timeout: float = 30.0
    """Seconds in which a request must have come, and then be answered."""
    body_limit: int = 16 << 20
    """Bytes of a request's body."""
    token: str = ""
    """What requests must bear, where it is not empty."""
    tls_cert: str = ""
    """Certificates as PEM, for HTTPS."""
    tls_key: str = ""
    """Their private key."""
    log_file: str = ""
    """Where a line per request goes; empty for stderr."""
    state: str = ""
    """Folder for metrics and statistics; empty for a temporary one."""
    trust: bool = False
    """Whether model files are opened without the checks against what runs code."""


def token_of(path: Path | str) -> str:
    """Return the token in a file.

    Raises:
        UsageError: the file cannot be read, or holds none.
    """
    try:
        with open(path, "rb") as file:
            token = file.read(_LONGEST_TOKEN + 1).strip()
    except OSError as error:
        raise UsageError(f"cannot read the token: {error.strerror}", received=str(path)) from None
    if not 8 <= len(token) <= _LONGEST_TOKEN or not all(33 <= letter < 127 for letter in token):
        raise UsageError("the token cannot be used", expected=f"8 to {_LONGEST_TOKEN} letters, digits and signs "
                         "in one line", mend="make one: openssl rand -hex 32 > FILE")
    return token.decode()
