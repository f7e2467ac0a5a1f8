"""A published head and its encoder's weights as one file: `python -m kinema.models.dinoflow.join HEAD ENCODER OUT`.

The head is published alone, since its encoder's weights may not be passed on; what gives flow needs both.
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

from kinema.models.dinoflow.model import dinoflow_vits16


def join(head: str | Path, encoder: str | Path, out: str | Path) -> None:
    """Write the whole model. Raises: ValueError for files that do not fit, or an `out` that cannot be written."""
    model = dinoflow_vits16(weights=head, backbone_weights=encoder)
    target = Path(out)
    partial = target.with_name(f".{target.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
        partial.replace(target)
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror or error}); choose another file") from None


def main() -> int:
    """Exit status 2 with one line where the files do not fit."""
    parser = argparse.ArgumentParser(description="Put DinoFlow's head and its encoder into one file.")
    for name, what in (("head", "flow-vits16.safetensors"), ("encoder", "DINOv3 ViT-S/16"), ("out", "*.safetensors")):
        parser.add_argument(name, help=what)
    arguments = parser.parse_args()
    try:
        join(arguments.head, arguments.encoder, arguments.out)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
