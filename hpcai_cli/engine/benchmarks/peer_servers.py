"""Other servers with the same TFLite model, each as its documentation shows; run by a Python that has the library.

`python peer_servers.py NAME MODEL PORT THREADS`: litserve and mlserver answer as their users would write it, flask is
the tutorials' `model.predict` of a Keras model.
"""

import json
import sys
from pathlib import Path

import numpy as np


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


def litserve(model: str, port: int, threads: int) -> None:
    """Serve with LitServe: one worker, batches of up to 8."""
    import litserve as ls

    class Api(ls.LitAPI):
        def setup(self, device):
            self.answer = interpreter(model, threads)

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

    ls.LitServer(Api(max_batch_size=8, batch_timeout=0.0), accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=port, num_api_servers=1, log_level="error", generate_client_file=False)


def mlserver(model: str, port: int, threads: int) -> None:
    """Serve with MLServer, which speaks the Open Inference Protocol too."""
    import asyncio

    from mlserver import MLModel, MLServer, ModelSettings, Settings
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceResponse

    class Model(MLModel):
        async def load(self) -> bool:
            self.answer = interpreter(model, threads)
            return True

        async def predict(self, payload):
            scores = self.answer(NumpyCodec.decode_input(payload.inputs[0]).astype(np.uint8))
            return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])

    async def run() -> None:
        server = MLServer(Settings(host="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2,
                                   parallel_workers=0, debug=False))
        await server.start([ModelSettings(name="peer", implementation=Model)])
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
    name, path, number, cores = sys.argv[1:]
    {"litserve": litserve, "mlserver": mlserver, "flask": flask}[name](path, int(number), int(cores))
