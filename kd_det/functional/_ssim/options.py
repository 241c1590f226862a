"""What SSIM is taken of, and how: one object that every part reads."""

from dataclasses import dataclass

from kd_det.functional._ssim.min_max import GROUPS

WINDOWS = ("gaussian", "box")
BORDERS = ("reflect", "renorm", "valid")


@dataclass(frozen=True)
class SSIMOptions:
    """
    The choices of `ssim_loss` and `ssim_map`.

    The defaults are what the authors of SSIM-KD used, as far as is known: kornia's SSIM loss on
    maps from kornia's min-max normalisation.

    Args:
        window_size: odd number of positions per side of the window (paper: 11, as Wang et al.).
        sigma: standard deviation of the Gaussian window, in positions, above 0 (1.5, likewise).
        window: "gaussian" (paper) or "box".
        border: "reflect" mirrors about the border position (kornia), "renorm" rescales the part of
            the window inside the map, "valid" keeps only whole windows.
        normalize: what shares one min-max range, which takes part in the gradient: each "channel"
            of each image (kornia), each "image", the whole "level", or "none" for maps that already
            lie in [0, 1].
        exponents: (luminance, contrast, structure), each 0 or 1, not all 0 (paper: all 1, and
            ablations of each).
        chunk_elements: elements of each map worked on at once, at most (one plane at least). The
            transient memory is about 20 times as many. None: 2**18 on CPU, 2**20 elsewhere. It
            changes no result beyond rounding.

    Raises:
        ValueError: a value is out of its range.
    """

    window_size: int = 11
    sigma: float = 1.5
    window: str = "gaussian"
    border: str = "reflect"
    normalize: str = "channel"
    exponents: tuple[int, int, int] = (1, 1, 1)
    chunk_elements: int | None = None

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.window_size % 2 == 0 or not self.sigma > 0:
            raise ValueError(
                "SSIM window_size must be odd and sigma positive, found "
                f"{self.window_size} and {self.sigma}"
            )
        for name, known in (
            ("window", WINDOWS),
            ("border", BORDERS),
            ("normalize", (*GROUPS, "none")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"SSIM {name}={getattr(self, name)!r}: expected one of {known}")
        object.__setattr__(self, "exponents", tuple(self.exponents))  # a list has no hash
        if len(self.exponents) != 3 or not set(self.exponents) <= {0, 1}:
            raise ValueError(f"SSIM exponents are three of 0 and 1, found {self.exponents}")
        if not any(self.exponents):
            raise ValueError("SSIM exponents (0, 0, 0) leave nothing to compare: set one to 1")
        if self.chunk_elements is not None and self.chunk_elements < 1:
            raise ValueError(f"SSIM chunk_elements must be positive, found {self.chunk_elements}")


DEFAULT_SSIM = SSIMOptions()
