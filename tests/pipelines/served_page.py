"""The page of `kinema demo fpt` with a miniature model, served in a thread, for tests."""

import http.client
import io
import json
import socket
import threading
import time

import numpy as np
import torch
from PIL import Image

from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines import page
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.page.server import PageFacts, PageServer
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips

MINIATURE = {"width": 64, "depth": 2, "head_dim": 32, "image_encoder": "tiny_vit8", "image_size": 48}
MEGABYTE = 1_000_000


def random_model(fill) -> FlowPokeTransformer:
    """Random weights everywhere, motions of a tenth of the image with narrow densities."""
    model = FlowPokeTransformer(**MINIATURE).eval()
    fill.fill_(model, 0, skip=("input_mlp.coeffs", "transformer.pos_emb.freqs"))
    last = model.out_mlp[-1]
    with torch.no_grad():
        last.weight[4:12] *= 0.25
        last.bias[4:12] *= 0.1
        last.weight[12:] *= 0.02
        last.bias[12:] = torch.tensor([-30.0, 0.0, -30.0]).repeat(4)
    return model


def two_clips(url) -> ClipIndex:
    """Six frames of 64 x 80 pixels each."""
    write_scene_clips([Scene(seed=seed, height=64, width=80, num_frames=6) for seed in (1, 2)], url)
    return ClipIndex.open(url)


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind, **options)
    return buffer.getvalue()


class Served:
    """A page that is served in a thread."""

    def __init__(self, predictor, clips):
        facts = PageFacts("miniature", "random weights", True, MEGABYTE, 1.0, 16)
        self.server = PageServer(predictor, facts, clips)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.web = page.web_server(self.server)
        self.thread = threading.Thread(target=self.web.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        while not self.web.started:
            time.sleep(0.01)

    def ask(self, method, path, body=None, host=None, **headers):
        """Status, headers and body; JSON is decoded."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host or f"127.0.0.1:{self.port}")
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        if answer.headers["Content-Type"] == "application/json":
            data = json.loads(data)
        connection.close()
        return answer.status, answer.headers, data

    def post(self, path, body):
        """The answer to a request that must succeed."""
        status, _, answer = self.ask("POST", path, body)
        assert status == 200, answer
        return answer

    def close(self):
        """End the thread."""
        self.web.should_exit = True
        self.thread.join(20)
        self.server.close()
        self.listener.close()
