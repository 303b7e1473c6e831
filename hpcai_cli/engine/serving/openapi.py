"""OpenAPI of a server, built from the shapes of its models."""

from collections.abc import Sequence

from hpcai_cli import __version__
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.protocol import DATATYPES, LONGEST_ID, Limits, output_names

_ERRORS = {
    "400": "The request cannot be understood", "401": "It does not bear the server's token",
    "404": "There is no such model or version", "408": "The body did not come in time", "411": "There is no body",
    "413": "The body, or what it holds, is too large", "415": "The body is of another type, or compressed",
    "500": "The model failed on it", "503": "There is too much to do; Retry-After tells when to come again",
    "504": "The model did not answer in time"}
_OF_BODIES = ("400", "404", "408", "411", "413", "415", "500", "503", "504")
_ID = {"name": "X-Request-Id", "in": "header", "schema": {"type": "string"},
       "description": "Given back with the answer, and written to the log"}


def document(models: Sequence[tuple[str, Artefact]], *, token: bool, limits: Limits) -> dict:
    """Return the document, OpenAPI 3.1, for models by name."""
    schemas = {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}}
    paths = _server_paths()
    for name, artefact in models:
        paths |= _model_paths(name, artefact, schemas, limits)
    if len(models) == 1:
        paths["/predict"] = paths[f"/v2/models/{models[0][0]}/predict"]
    if token:
        for path, methods in paths.items():
            for operation in () if path.startswith("/v2/health/") else methods.values():
                operation["security"] = [{"token": []}]
                operation["responses"] |= _errors("401")
    security = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}} if token else {}
    return {"openapi": "3.1.0", "info": {"title": "hpcai", "version": __version__, "summary": "Served models"},
            "paths": paths, "components": {"schemas": schemas, **security}}


def _server_paths() -> dict:
    anything = {"type": "object"}
    return {
        "/v2/health/live": {"get": _operation("Whether the server works", anything, errors=("503",))},
        "/v2/health/ready": {"get": _operation("Whether it takes requests", anything, errors=("503",))},
        "/v2": {"get": _operation("Name, version and extensions of the server", anything)},
        "/v2/repository/index": {"post": _operation("All models and versions", {"type": "array", "items": anything})},
        "/metrics": {"get": {"summary": "Counts for Prometheus", "responses": {
            "200": {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}}}},
        "/openapi.json": {"get": _operation("This document", anything)},
    }


def _model_paths(name: str, artefact: Artefact, schemas: dict, limits: Limits) -> dict:
    schemas[f"{name}.InferRequest"] = _infer_request(artefact, limits)
    schemas[f"{name}.InferAnswer"], schemas[f"{name}.Answers"] = _infer_answer(artefact), _answers(artefact)
    at, anything, predict = f"/v2/models/{name}", {"type": "object"}, _predict_body(artefact)
    infer_body = {"application/json": {"schema": _reference(f"{name}.InferRequest")},
                  "application/octet-stream": {"schema": {"description": "JSON, then binary tensors; the header "
                                                          "Inference-Header-Content-Length has the bytes of JSON"}}}
    infer = _operation("Open Inference Protocol v2", _reference(f"{name}.InferAnswer"), infer_body, _OF_BODIES)
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        at: {"get": _operation("Inputs and outputs", anything)},
        f"{at}/ready": {"get": _operation("Whether the model takes requests", anything)},
        f"{at}/infer": {"post": infer},
        f"{at}/versions/{{version}}/infer": {"post": {**infer, "parameters": [_ID, version]}},
        f"{at}/predict": {"post": _operation("Answers for people: images as they are, or rows of a table",
                                             _reference(f"{name}.Answers"), predict, _OF_BODIES)},
        f"{at}/statistics": {"get": _operation("Statistics of inputs and answers", anything)},
        f"/v2/repository/models/{name}/load": {"post": _operation(
            "Load what has changed on disk", anything, errors=("400", "503"))},
    }


def _operation(summary: str, answer: dict, body: dict | None = None, errors: Sequence[str] = ()) -> dict:
    found = {"summary": summary, "parameters": [_ID], "responses": {
        "200": {"description": "Done", "content": {"application/json": {"schema": answer}}}, **_errors(*errors)}}
    return found | ({"requestBody": {"required": True, "content": body}} if body else {})


def _errors(*statuses: str) -> dict:
    content = {"application/json": {"schema": _reference("Error")}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _reference(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


def _infer_request(artefact: Artefact, limits: Limits) -> dict:
    number = {"type": "integer", "minimum": 0, "maximum": 255} if artefact.inputs == "images" else {"type": "number"}
    shape = [{"type": "integer", "minimum": 1, "maximum": limits.most_examples},
             *({"type": "integer", "const": dim} for dim in artefact.input_shape)]
    tensor = {"type": "object", "required": ["name", "shape", "datatype", "data"], "properties": {
        "name": {"const": artefact.inputs}, "datatype": {"const": DATATYPES[artefact.inputs]},
        "shape": {"type": "array", "prefixItems": shape, "minItems": len(shape), "maxItems": len(shape)},
        "data": {"type": "array", "items": {"anyOf": [number, {"type": "array"}]},
                 "description": "Row by row, flat or nested as the shape says"}}}
    output = {"type": "object", "required": ["name"], "properties": {"name": {"enum": [*output_names(artefact)]}}}
    return {"type": "object", "required": ["inputs"], "properties": {
        "id": {"type": "string", "maxLength": LONGEST_ID},
        "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
        "outputs": {"type": "array", "items": output, "uniqueItems": True}}}


def _infer_answer(artefact: Artefact) -> dict:
    output = {"type": "object", "required": ["name", "shape", "datatype"], "properties": {
        "name": {"enum": [*output_names(artefact)]}, "datatype": {"enum": ["FP32", "BYTES"]},
        "shape": {"type": "array", "items": {"type": "integer"}}, "data": {"type": "array"}}}
    return {"type": "object", "required": ["model_name", "outputs"], "properties": {
        "model_name": {"type": "string"}, "model_version": {"type": "string"}, "id": {"type": "string"},
        "outputs": {"type": "array", "items": output}}}


def _answers(artefact: Artefact) -> dict:
    chances = {"type": "object", "additionalProperties": {"type": "number"}}
    one = {"label": {"enum": [*artefact.class_names]}, "probability": {"type": "number"}, "probabilities": chances} \
        if artefact.class_names else {"value": {"type": "number"}}
    answer = {"type": "object", "required": [*one], "properties": one}
    said = {name: {"type": "string"} for name in ("model", "version", "id")}
    return {"type": "object", "required": [*said, "answers"],
            "properties": {**said, "answers": {"type": "array", "items": answer}}}


def _predict_body(artefact: Artefact) -> dict:
    if artefact.inputs == "images":
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        form = {"type": "object", "required": ["image"], "properties": {"image": {"type": "array", "items": file}}}
        return {"multipart/form-data": {"schema": form}, "image/*": {}}
    width = artefact.input_shape[0]
    row = {"type": "array", "items": {"type": "number"}, "minItems": width, "maxItems": width}
    example = [0] * min(width, 1000)
    if artefact.encoding is not None:
        columns = artefact.encoding["columns"]
        row = {"type": "object", "required": [column["name"] for column in columns],
               "properties": {column["name"]: _cell(column) for column in columns}}
        example = {column["name"]: _cell_example(column) for column in columns}
    rows = {"type": "object", "required": ["rows"], "properties": {
        "rows": {"type": "array", "items": row, "minItems": 1}}}
    return {"application/json": {"schema": rows, "example": {"rows": [example]}}}


def _cell(column: dict) -> dict:
    kind = {"number": "number", "boolean": "boolean"}.get(column["kind"], "string")
    return {"type": [kind, "string", "null"] if kind != "string" else ["string", "number", "null"]}


def _cell_example(column: dict) -> object:
    if column["kind"] == "category":
        return column["categories"][0] if column.get("categories") else ""
    return bool(column.get("fill")) if column["kind"] == "boolean" else column.get("fill", 0)
