"""Other servers with the same TFLite model, each as its documentation shows; run by a Python that has the library.

`python peer_servers.py NAME MODEL PORT THREADS`: litserve and mlserver answer as their users would write it, flask is
the tutorials' `model.predict` of a Keras model.
"""

import asyncio
import json
import socket
import sys
from pathlib import Path

import numpy as np

NAME = sys.argv[1]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def interpreter(model: str, threads: int):
    """Return the model's inference, uint8 (b, ...) -> float32 (b, columns)."""
    from ai_edge_litert.interpreter import Interpreter

    opened = Interpreter(model_path=model, num_threads=threads)
    opened.allocate_tensors()
    given, taken = opened.get_input_details()[0]["index"], opened.get_output_details()[0]["index"]
    size = 1

    def answer(inputs):
        nonlocal size
        if len(inputs) != size:
            opened.resize_tensor_input(given, inputs.shape)
            opened.allocate_tensors()
            size = len(inputs)
        opened.set_tensor(given, inputs)
        opened.invoke()
        return opened.get_tensor(taken)
    return answer


if NAME == "litserve":
    import litserve as ls

    # LitServe's worker is another process, which imports this file to find the class.
    class LitServeModel(ls.LitAPI):
        """The model as LitServe wants it."""

        def setup(self, device):
            self.answer = interpreter(sys.argv[2], int(sys.argv[4]))

        def decode_request(self, request):
            return np.asarray(request["instances"], np.uint8)

        def batch(self, inputs):
            return np.concatenate(inputs)

        def predict(self, inputs):
            return self.answer(inputs)

        def unbatch(self, output):
            return list(output)

        def encode_response(self, output):
            return {"scores": np.asarray(output).ravel().tolist()}


def litserve(model: str, port: int, threads: int) -> None:
    """Serve with LitServe: one worker, batches of up to 8."""
    ls.LitServer(LitServeModel(max_batch_size=8, batch_timeout=0.0), accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=port, num_api_servers=1, log_level="error", generate_client_file=False)


if NAME == "mlserver":
    from mlserver import MLModel, MLServer, ModelSettings, Settings
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceResponse

    # MLServer finds the class by its name.
    class MLServerModel(MLModel):
        """The model as MLServer wants it."""

        async def load(self) -> bool:
            self.answer = interpreter(sys.argv[2], int(sys.argv[4]))
            return True

        async def predict(self, payload):
            scores = self.answer(NumpyCodec.decode_input(payload.inputs[0]).astype(np.uint8))
            return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])


def mlserver(model: str, port: int, threads: int) -> None:
    """Serve with MLServer, which speaks the Open Inference Protocol too."""
    async def run() -> None:
        server = MLServer(Settings(host="127.0.0.1", http_port=port, grpc_port=free_port(), metrics_port=free_port(),
                                   parallel_workers=0, debug=False))
        await server.start([ModelSettings(name="peer", implementation=MLServerModel)])
    asyncio.run(run())


def flask(model: str, port: int, threads: int) -> None:
    """Serve a Keras model with Flask and model.predict."""
    import keras
    from flask import Flask, request

    loaded, app = keras.saving.load_model(Path(model).with_suffix(".keras")), Flask("peer")

    @app.post("/predict")
    def predict():
        inputs = np.asarray(json.loads(request.get_data())["instances"], np.float32)
        return {"scores": loaded.predict(inputs, verbose=0).tolist()}

    app.run(host="127.0.0.1", port=port, threaded=True)


if __name__ == "__main__":
    path, number, cores = sys.argv[2:]
    {"litserve": litserve, "mlserver": mlserver, "flask": flask}[NAME](path, int(number), int(cores))
