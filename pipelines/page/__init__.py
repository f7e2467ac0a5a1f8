"""`kinema demo fpt`: a page on this machine where one pokes an image and sees how it may move."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn

from kinema.configs import PageConfig, build
from kinema.models.backbones.inference_linear import can_keep_fp16
from kinema.models.fpt.model import PRESETS, FlowPokeTransformer
from kinema.models.weights import LEDGER
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.model_address import load_address
from kinema.pipelines.page.predictor import Predictor
from kinema.pipelines.page.server import PageFacts, PageServer
from kinema.pipelines.precision import check_bf16
from kinema.pipelines.progress import format_seconds
from kinema.pipelines.train.checkpoint import read_meta, resolve_checkpoint

__all__ = ["PageSummary", "demo", "run"]

HOST = "127.0.0.1"
PUBLISHED = "published"


@dataclass(frozen=True)
class PageSummary:
    """What the page did until it was closed."""

    url: str
    """Where it was."""
    predictions: int
    """Answered questions."""
    seconds: float
    """How long it was open."""
    exit_status: int = 0
    """Always 0: being closed is how a page ends."""

    is_for_programs = True
    """People were told on stderr."""


def run(config: PageConfig, *, report: Callable[[str], None] | None = None) -> PageSummary:
    """Serve the page until Ctrl-C.

    Raises: ValueError for a model, weights or clips that do not exist, or a port that is taken.
    """
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    with _listen(config.port) as listener:
        server = make_server(config)
        url = f"http://{HOST}:{listener.getsockname()[1]}/"
        say(f"demo: {config.model} on {server.device}")
        if server.facts.note:
            say(f"demo: {server.facts.note}")
        say(f"demo: the page is at {url} (Ctrl-C closes it)")
        started = time.monotonic()
        try:
            # Ctrl-C ends uvicorn in order, which then raises it again for its caller.
            with contextlib.suppress(KeyboardInterrupt):
                web_server(server).run(sockets=[listener])
        finally:
            server.close()
        seconds = round(time.monotonic() - started, 1)
        say(f"demo: page closed after {format_seconds(seconds)} and {server.predictions} predictions")
        return PageSummary(url, server.predictions, seconds)


def make_server(config: PageConfig) -> PageServer:
    """The page's handlers, model loaded and clips opened, before anything listens."""
    clips = ClipIndex.open(config.clips, skip_duplicates=False) if config.clips else None
    model = load_page_model(config.model, config.weights)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but no GPU is at hand; use device=cpu or device=auto")
    model = _in_precision(model.eval().to(device), config, device)
    untrained = config.model in PRESETS and not config.weights
    facts = PageFacts(
        model=_title(config.model),
        note=_note(config.model, config.weights, untrained),
        untrained=untrained,
        max_upload_bytes=round(config.max_upload_mb * 1e6),
        max_megapixels=config.max_megapixels,
        grid=config.grid,
    )
    return PageServer(Predictor(model, device, config.cached_images), facts, clips)


def _in_precision(model: FlowPokeTransformer, config: PageConfig, device: str) -> FlowPokeTransformer:
    check_bf16(config.precision, device, config.model, is_network=True)
    if config.precision == "bf16":
        return model.in_bf16()
    if config.precision == "fp16_weights":
        if device != "cpu" or not can_keep_fp16():
            where = "a GPU" if device != "cpu" else "this CPU"
            raise ValueError(f"precision=fp16_weights is for x86 CPUs, not for {where}; use precision=fp32 or bf16")
        return model.with_fp16_weights()
    return model


def load_page_model(name: str, weights: str = "") -> FlowPokeTransformer:
    """A Flow Poke Transformer by preset, run folder, checkpoint or registry address.

    Args: weights, for a preset: file or URL, `published`, or empty for random ones.
    Raises: ValueError.
    """
    return load_address(name, weights, kind="pokes", user="the page", untrained=True).network


def demo(config_path: str | None = None, overrides: Sequence[str] = ()) -> PageSummary:
    """`kinema demo fpt`."""
    if config_path:
        raise ValueError("`kinema demo fpt` reads no workflow file; give its settings as key=value")
    return run(build(PageConfig, {}, overrides))


class _WebServer(uvicorn.Server):
    """Gives running predictions up before it waits for their answers to be sent."""

    def __init__(self, page: PageServer, config: uvicorn.Config):
        super().__init__(config)
        self._page = page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, after Ctrl-C."""
        self._page.close()
        await super().shutdown(sockets)


def web_server(server: PageServer) -> uvicorn.Server:
    """The HTTP server around the page; it listens nowhere by itself."""
    config = uvicorn.Config(
        server.app(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    return _WebServer(server, config)


@contextlib.contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    """A socket on the loopback address; port 0 takes a free one."""
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise ValueError(f"port={port} cannot be used ({os.strerror(error.errno or 0)}); use port=0") from None
    with listener:
        yield listener


def _title(model: str) -> str:
    """What the page calls the model: runs and checkpoints by folder and step, without the way there."""
    if model in PRESETS or model.startswith("models:/"):
        return model
    return f"{Path(model).resolve().name}, step {read_meta(resolve_checkpoint(model))['step']}"


def _note(model: str, weights: str, untrained: bool) -> str:
    if untrained:
        return (
            f"{model} is UNTRAINED: its weights are random and its predictions mean nothing; give weights=FILE, or "
            "model=RUN, a run of `kinema train`"
        )
    ledger = LEDGER.get(model)
    if ledger is not None and weights == PUBLISHED and ledger.non_commercial:
        return f"The published weights are licensed {ledger.licence}: no commercial use"
    return ""
