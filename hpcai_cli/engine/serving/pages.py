"""The pages for people: one file each, which may load nothing from elsewhere."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path


@cache
def answer(name: str) -> tuple[int, bytes, dict[str, str]]:
    """Return status, content and headers of a page beside this file."""
    content = (Path(__file__).parent / name).read_bytes()
    sources = {tag: " ".join(_hash(found) for found in re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), content, re.DOTALL))
               for tag in (b"script", b"style")}
    # What is not in the file runs nowhere, also where an answer held text that a browser would take for code.
    policy = (f"default-src 'none'; script-src {sources[b'script']}; style-src {sources[b'style']}; "
              "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
              "frame-ancestors 'none'")
    return 200, content, {
        "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy, "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def _hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
