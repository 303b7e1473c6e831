"""Where this program keeps what it need not make twice."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: `$HPCAI_CACHE`, else `$XDG_CACHE_HOME/hpcai`, else `~/.cache/hpcai`."""
    own = os.environ.get("HPCAI_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path there is to be ignored.
    root = Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache"
    return root / "hpcai"
