"""kinema: raw videos in, motion models out.

    import kinema

    kinema.shard(videos="videos", out="clips")                        # stages, with the settings of the command line
    kinema.teach(clips="clips", teacher="dis")
    clips = kinema.open("clips", flow="flow/dis")                     # artifacts: iterate, index by key, arrays
    clips[0].frames(), clips[0].flow(0, 1)
    model = kinema.load_model("raft_small", weights="raft-small.pth") # a name, a run, a registry address
    flow = kinema.predict_flow(image1, image2, model)

docs/GALLERY.md shows ten short programs. Everything is imported when it is first used: `import kinema` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kinema.pipelines.api import (
        embed,
        evaluate,
        list_models,
        load_model,
        open,
        predict_features,
        predict_flow,
        register,
        run,
        search,
        shard,
        teach,
        track,
        train,
        transfer,
    )

__all__ = [
    "__version__",
    "embed",
    "evaluate",
    "list_models",
    "load_model",
    "open",
    "predict_features",
    "predict_flow",
    "register",
    "run",
    "search",
    "shard",
    "teach",
    "track",
    "train",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from kinema.pipelines import api

        return getattr(api, name)
    raise AttributeError(f"module 'kinema' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
