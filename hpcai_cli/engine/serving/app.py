"""The server's answers as an ASGI application, without a framework: each layer would cost more than a small model."""

import asyncio
import hmac
import math
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import orjson

from hpcai_cli.engine.serving import bodies, openapi, pages, protocol, statistics
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.call import Call, GoneAway
from hpcai_cli.engine.serving.examples import answers
from hpcai_cli.engine.serving.metrics import NO_MODEL, Row
from hpcai_cli.engine.serving.models import Models, Place, Version
from hpcai_cli.engine.serving.protocol import Limits
from hpcai_cli.engine.serving.request_log import RequestLog
from hpcai_cli.engine.serving.routes import METHODS, OPEN, route
from hpcai_cli.engine.serving.settings import Settings
from hpcai_cli.engine.serving.tensors import RequestError
from hpcai_cli.errors import printable

EXTENSIONS = ("binary_tensor_data", "model_repository", "statistics")
_DECODERS = 2
"""Threads that decode images and encode rows."""
_MOST_DECODING = 32
"""Requests whose images wait for them."""
_MOST_LOADING = 4
_JSON = {"Content-Type": "application/json"}


class Application:
    """Answers requests, and counts and logs them.

    Attributes:
        draining: set when the server is to stop: every answer closes its connection then.
        is_crowded: tells whether an answer had better close its connection too, since other workers have fewer; set by
            the worker.
        load: makes all workers load what has changed on disk, and returns what could not be; set by the worker.
    """

    def __init__(self, models: Models, settings: Settings, place: Place, log: RequestLog):
        self._models, self._settings, self._place, self._log = models, settings, place, log
        self._limits = Limits(most_bytes=settings.body_limit)
        self._token = settings.token.encode()
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decoder")
        self._decoding = self._loading = 0
        self.draining = False
        self.is_crowded: Callable[[], bool] = lambda: False
        self.load: Callable[[], Awaitable[list[str]]] = models.reload
        self._handlers = {name: getattr(self, f"_{name}") for name in METHODS}

    async def __call__(self, scope, receive, send) -> None:
        """Answer a request; the interface of ASGI."""
        if scope["type"] != "http":
            return await _lifespan(receive, send)
        call = Call(scope, receive, send)
        endpoint, name, version = route(call.path)
        row = self._row(endpoint, name)
        row.begin()
        try:
            await self._answer(call, endpoint, name, version)
        except (GoneAway, asyncio.CancelledError) as error:
            # Cancelled is who went away, or, while the server stops, who is still here when its time has passed.
            stopped = self.draining and isinstance(error, asyncio.CancelledError)
            await call.answer(503 if stopped else 499, b'{"error":"the server is stopping"}', close=True)
        finally:
            row.end(call.status, call.seconds)
            self._tell(call)
        await call.finish()

    def _row(self, endpoint: str, name: str) -> Row:
        """Return where a request counts: with its model where it wants an answer of it."""
        if endpoint not in ("infer", "predict"):
            name = NO_MODEL
        elif not name and len(self._models) == 1:
            name = next(iter(self._models))[0]
        return self._place.metrics.row(name if name in self._models else NO_MODEL)

    async def _answer(self, call: Call, endpoint: str, name: str, version: str | None) -> None:
        """Answer a request or say why not."""
        try:
            self._check(call, endpoint)
            status, content, headers = await self._handlers[endpoint](call, name, version)
        except RequestError as error:
            status, headers = error.status, {**_JSON, **error.headers}
            content = orjson.dumps({"error": error.message})
        except GoneAway:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._log.event(f"{call.id}: {type(error).__name__}: {error} at {where.filename}:{where.lineno}")
            status, content, headers = 500, b'{"error":"the server failed on this request"}', _JSON
        await call.answer(status, content, headers, close=self.draining or self.is_crowded())

    def _check(self, call: Call, endpoint: str) -> None:
        """Raise RequestError for what does not exist, for a wrong method, and for who may not ask."""
        if self._token and endpoint not in OPEN:
            scheme, _, token = call.headers.get(b"authorization", b"").partition(b" ")
            if not (hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer"):
                raise RequestError(401, "the request does not bear the server's token; expected the header "
                                   "Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        if not endpoint:
            raise RequestError(404, f"there is nothing at {printable(call.path[:200])}; /docs tells what there is")
        if call.method != METHODS[endpoint] and (call.method, METHODS[endpoint]) != ("HEAD", "GET"):
            allowed = "GET, HEAD" if METHODS[endpoint] == "GET" else METHODS[endpoint]
            raise RequestError(405, f"the method cannot be used here; expected {allowed}; "
                               f"received: {printable(call.method)}", {"Allow": allowed})

    # ---- Inference -------------------------------------------------------------------------------------------------

    async def _infer(self, call: Call, name: str, version: str | None):
        call.served = served = self._models.find(name, version)
        body = await call.body(self._settings.body_limit, self._settings.timeout)
        # Before the body is looked into: under overload, what is refused must cost less than what is answered.
        served.batcher.check()
        request = protocol.parse_infer(served.artefact, body, call.header(b"inference-header-content-length"),
                                       self._limits)
        call.name = request.id or call.id
        scores = await self._scores(call, served, request.inputs)
        content, headers = protocol.render_infer(served.artefact, request, scores, version=served.version,
                                                 request_id=call.id)
        return 200, content, headers

    async def _predict(self, call: Call, name: str, version: str | None):
        if not name:
            names = [name for name, _ in self._models]
            if len(names) > 1:
                raise RequestError(404, "there are several models; expected /v2/models/NAME/predict with "
                                   f"{' or '.join(names[:8])}")
            name = names[0]
        call.served = served = self._models.find(name, version)
        body = await call.body(self._settings.body_limit, self._settings.timeout)
        served.batcher.check()
        if self._decoding >= _MOST_DECODING:
            raise RequestError(503, "too many images wait to be decoded", {"Retry-After": "1"})
        self._decoding += 1
        try:
            inputs = await asyncio.get_running_loop().run_in_executor(
                self._decoders, bodies.examples_of, served.artefact, call.header(b"content-type"), body, self._limits,
                self._settings.timeout)
        finally:
            self._decoding -= 1
        scores = await self._scores(call, served, inputs)
        return 200, orjson.dumps({"model": name, "version": served.version, "id": call.id,
                                  "answers": answers(served.artefact, scores)}), _JSON

    async def _scores(self, call: Call, served: Version, inputs):
        call.examples = len(inputs)
        call.scores = await served.batcher.scores(inputs)
        return call.scores

    # ---- About the server and its models ---------------------------------------------------------------------------

    def is_stuck(self) -> bool:
        """Tell whether a model has been running for longer than any request waits."""
        return any(one.batcher.is_stuck() for _, model in self._models for one in model.versions.values())

    async def _live(self, call, name, version):
        stuck = self.is_stuck()
        return _told({"live": not stuck}, 503 if stuck else 200)

    async def _ready(self, call, name, version):
        return _told({"ready": not self.draining}, 503 if self.draining else 200)

    async def _server(self, call, name, version):
        return _told(protocol.server_metadata(EXTENSIONS))

    async def _model(self, call, name, version):
        return _told(protocol.model_metadata(self._models.find(name, version).artefact,
                                             self._models.model(name).versions))

    async def _model_ready(self, call, name, version):
        self._models.find(name, version)
        return _told({"name": name, "ready": True})

    async def _statistics(self, call, name, version):
        artefact = self._models.find(name, version).artefact
        return _told(await asyncio.get_running_loop().run_in_executor(
            self._decoders, _merged, artefact, self._place, _since(call.query)))

    async def _index(self, call, name, version):
        await self._skip_body(call)
        return _told([{"name": name, "version": version, "state": "READY", "reason": ""}
                      for name, model in self._models for version in model.versions])

    async def _load(self, call, name, version):
        self._models.find(name)
        await self._skip_body(call)
        if self._loading >= _MOST_LOADING:
            raise RequestError(503, "models are being loaded", {"Retry-After": "1"})
        self._loading += 1
        try:
            problems = await self.load()
        finally:
            self._loading -= 1
        if mine := [problem for problem in problems if problem.startswith((f"model {name}:", f"model {name},"))]:
            raise RequestError(400, "; ".join(mine))
        return _told({})

    async def _metrics(self, call, name, version):
        for name, model in self._models:
            self._place.metrics.row(name).queued(sum(one.batcher.taken for one in model.versions.values()))
        text = await asyncio.get_running_loop().run_in_executor(self._decoders, self._place.metrics.text)
        return 200, text, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}

    async def _openapi(self, call, name, version):
        return _told(openapi.document([(name, model.versions[model.current].artefact) for name, model in self._models],
                                      token=bool(self._token), limits=self._limits))

    async def _page(self, call, name, version):
        return pages.answer("page.html")

    async def _docs(self, call, name, version):
        return pages.answer("docs.html")

    async def _skip_body(self, call: Call) -> None:
        """Read a body that may be there and says nothing that matters here."""
        if call.has_body():
            await call.body(1 << 20, self._settings.timeout)

    def _tell(self, call: Call) -> None:
        """Count and log an answer."""
        served = call.served
        said = {"id": printable(call.name), "method": printable(call.method), "path": printable(call.path),
                "status": call.status, "milliseconds": round(1000 * call.seconds, 3)}
        if served is None:
            return self._log.request(said)
        served.recorder.answered(call.status, call.seconds)
        said |= {"model": served.artefact.name, "version": served.version, "examples": call.examples}
        self._log.request(said, served.artefact, call.scores)


def _told(document: object, status: int = 200):
    return status, orjson.dumps(document), _JSON


def _merged(artefact: Artefact, place: Place, since: float | None) -> dict:
    return statistics.merged(artefact, statistics.files_of(artefact, place.state), since=since)


def _since(query: bytes) -> float | None:
    """Return the Unix time in the query since=..., None without one; raise RequestError, 400, for any other query."""
    if not query:
        return None
    name, _, value = query.partition(b"=")
    try:
        since = float(value)
        if name != b"since" or not math.isfinite(since):
            raise ValueError
        return since
    except ValueError:
        raise RequestError(400, "the query cannot be understood; expected since=UNIX_TIME, "
                           f"received: {printable(query[:100].decode('latin-1'))}") from None


async def _lifespan(receive, send) -> None:
    """Answer the start and the end of a server; the models are loaded before and outlive it."""
    while (message := await receive())["type"] != "lifespan.shutdown":
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
