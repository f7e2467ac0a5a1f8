"""Settings of rendered pairs with exact flow: `kinema shard layout=rendered`, `kinema train clips=rendered`."""

from __future__ import annotations

from dataclasses import dataclass, field

from kinema.configs.checks import require

RENDERED = "rendered"
"""Value of `clips=` with which training renders what it learns from, and of `layout=` with which it is stored."""


@dataclass(frozen=True)
class EffectsConfig:
    """How probable each photometric effect is in a shot, 0 to 1; none of them touches the flow."""

    motion_blur: float = 0.25
    """Layers blurred along their motion while a shutter is open."""
    lighting: float = 0.6
    """Light that changes over the picture and from frame to frame."""
    shadow: float = 0.3
    """A soft shadow that moves on its own."""
    fog: float = 0.15
    """Fog that thickens with depth."""
    colour: float = 0.6
    """Gain, gamma and offset of the camera that differ between frames."""
    noise: float = 0.5
    """Sensor noise of 1 to 8 grey levels."""
    compression: float = 0.3
    """JPEG compression."""

    @staticmethod
    def none() -> EffectsConfig:
        """No effect at all: frames differ by motion alone."""
        return EffectsConfig(*[0.0] * len(EffectsConfig.__dataclass_fields__))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(0 <= value <= 1, f"rendered.effects.{name}", value, "use a probability, 0 to 1")


@dataclass(frozen=True)
class RenderedConfig:
    """Rendered shots: how many, how large, how they move."""

    count: int = 1000
    """Shots; more may be added to an artifact later."""
    seed: int = 0
    """Shot number i of a seed is always the same."""
    height: int = 384
    """Height in pixels."""
    width: int = 512
    """Width in pixels."""
    num_frames: int = 2
    """Frames of a shot; flow is stored between neighbours, in both directions."""
    objects: tuple[int, int] = (2, 6)
    """Fewest and most objects before the background."""
    speed_px: float = 4.0
    """Median speed of a layer, px a frame at 512 px of width."""
    speed_spread: float = 1.1
    """Standard deviation of the logarithm of the speed."""
    longest_px: float = 100.0
    """No layer is faster."""
    homography: float = 0.3
    """Share of layers that tilt in depth."""
    thin_plate: float = 0.15
    """Share of layers that bend."""
    detail: float = 1.0
    """How many times finer than usual textures are; 512 / width shows in a small frame what a large one shows."""
    match: str = field(default="", metadata={"file": True})
    """A flow artifact whose histogram of motion the speeds are fitted to, instead of speed_px and speed_spread."""
    tracks_grid: int = 0
    """Also store exact tracks of grid x grid points of the first frame, in tracks/truth; 0: none."""
    effects: EffectsConfig = field(default_factory=EffectsConfig)
    """Photometric effects."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "rendered.count", self.count, "use 1 or more shots")
        require(self.seed >= 0, "rendered.seed", self.seed, "use 0 or more")
        for name in ("height", "width"):
            require(32 <= getattr(self, name) <= 1024, f"rendered.{name}", getattr(self, name), "use 32 to 1024 px")
        require(2 <= self.num_frames <= 512, "rendered.num_frames", self.num_frames, "use 2 to 512 frames")
        ordered = 0 <= self.objects[0] <= self.objects[1] <= 64
        require(ordered, "rendered.objects", list(self.objects), "use two numbers, fewest and most, up to 64")
        for name in ("speed_px", "speed_spread", "longest_px"):
            require(getattr(self, name) > 0, f"rendered.{name}", getattr(self, name), "use a positive number")
        for name in ("homography", "thin_plate"):
            require(0 <= getattr(self, name) <= 1, f"rendered.{name}", getattr(self, name), "use a share, 0 to 1")
        require(1 <= self.detail <= 8, "rendered.detail", self.detail, "use 1 to 8")
        require(0 <= self.tracks_grid <= 64, "rendered.tracks_grid", self.tracks_grid, "use 0 to 64 points a side")


@dataclass(frozen=True)
class RenderedSourceConfig(RenderedConfig):
    """Shots that training renders when it needs them (`clips=rendered`)."""

    count: int = 100_000
    """Shots of an epoch; later epochs show the same ones, cropped and coloured anew."""
    textures: str = field(default="", metadata={"file": True})
    """Folder of images for textures; empty: procedural ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "use 0: training reads flow here; tracks come from `kinema shard layout=rendered`"
        require(self.tracks_grid == 0, "rendered.tracks_grid", self.tracks_grid, rule)
