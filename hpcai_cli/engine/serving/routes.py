"""Which address is whose."""

METHODS = {
    "infer": "POST", "predict": "POST", "live": "GET", "ready": "GET", "server": "GET", "model": "GET",
    "model_ready": "GET", "statistics": "GET", "index": "POST", "load": "POST", "metrics": "GET", "openapi": "GET",
    "docs": "GET", "page": "GET"}
"""The method of each endpoint."""
OPEN = ("live", "ready", "page", "docs")
"""Endpoints that need no token: they tell nothing of models or requests."""
_FIXED = {
    "/": "page", "/docs": "docs", "/openapi.json": "openapi", "/metrics": "metrics", "/predict": "predict",
    "/v2": "server", "/v2/": "server", "/v2/health/live": "live", "/v2/health/ready": "ready",
    "/v2/repository/index": "index"}
_OF_MODEL = {"infer": "infer", "predict": "predict", "ready": "model_ready", "statistics": "statistics"}


def route(path: str) -> tuple[str, str, str | None]:
    """Return the endpoint at a path, empty for none, the name of a model and its version where the path has them."""
    match path.split("/"):
        case ["", "v2", "models", name, verb] if verb in _OF_MODEL:
            return _OF_MODEL[verb], name, None
        case ["", "v2", "models", name, "versions", version, verb] if verb in _OF_MODEL:
            return _OF_MODEL[verb], name, version
        case ["", "v2", "models", name]:
            return "model", name, None
        case ["", "v2", "models", name, "versions", version]:
            return "model", name, version
        case ["", "v2", "repository", "models", name, "load"]:
            return "load", name, None
    return _FIXED.get(path, ""), "", None
