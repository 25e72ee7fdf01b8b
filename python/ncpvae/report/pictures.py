"""Pictures as PNG in data URIs, with the gaps between them transparent."""

import base64
from dataclasses import dataclass
from io import BytesIO

import torch
from torch import Tensor
from torch.nn import functional

from ..plots import image_grid

MAX_SIDE = 128  # pixels; larger images are shown smaller
MAX_SHOWN = 64  # images in one grid
BUDGET = 5 << 18  # numbers in all pictures of a page together, about as many bytes before compression


@dataclass(frozen=True)
class Picture:
    """A PNG file.

    Attributes:
        uri: with the file inside it.
        width: at which to show it, CSS pixels: a whole multiple of its own where there is room.
        shown: examples in it.
        sharp: whether single pixels are to be seen.
    """

    uri: str
    width: int
    shown: int
    sharp: bool


def prepare(images: Tensor) -> Tensor:
    """The first MAX_SHOWN images [N, C, H, W] within [0, 1], not finite values grey, sides ≤ MAX_SIDE, on the CPU."""
    images = images[:MAX_SHOWN].detach().float().cpu().nan_to_num(0.5, 0.5, 0.5).clamp(0, 1)
    height, width = images.shape[2:]
    if max(height, width) <= MAX_SIDE:
        return images
    scale = MAX_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return functional.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)


def affordable(images: Tensor, grids: int) -> int:
    """How many of prepared images [N, C, H, W] one of `grids` equal grids may show."""
    return min(len(images), MAX_SHOWN, max(6, BUDGET // max(1, grids) // images[0].numel()))


def grid(images: Tensor, room: int, limit: int, square: bool = True) -> Picture:
    """Up to `limit` prepared images [N, C, H, W] tiled to fill `room` CSS pixels; as a square, or in wide rows.

    Incomplete last rows are left off where there is a complete one.
    """
    shown = min(len(images), limit)
    columns = _columns(images.shape[3], shown, room, square)
    shown = shown // columns * columns or shown
    opaque = torch.cat([images[:shown], torch.ones_like(images[:shown, :1])], 1)
    return _picture(image_grid(opaque, columns, background=0.0)[:, 1:-1, 1:-1], room, shown)


def strip(images: Tensor, room: int) -> Picture:
    """All of prepared images [N, C, H, W] in one row."""
    opaque = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    return _picture(image_grid(opaque, len(images), background=0.0)[:, 1:-1, 1:-1], room, len(images))


def pair(above: Tensor, below: Tensor, room: int) -> Picture:
    """One prepared image [C, H, W] over another."""
    return _picture(_stack(above[None], below[None], 2)[0], room, 1)


def pairs(above: Tensor, below: Tensor, room: int, limit: int) -> Picture:
    """Rows of prepared images [N, C, H, W], each over its partner."""
    tiles = _stack(above[:limit], below[:limit], 1)
    columns = _columns(tiles.shape[3], len(tiles), room, square=False)
    shown = len(tiles) // columns * columns or len(tiles)
    tiles = functional.pad(tiles[:shown], (0, 0, 0, 5))  # transparent, so that pairs stand apart
    return _picture(image_grid(tiles, columns, background=0.0)[:, 1:-6, 1:-1], room, shown)


def _stack(above: Tensor, below: Tensor, gap: int) -> Tensor:
    """[N, C + 1, 2H + gap, W], transparent in the gap."""
    above, below = (torch.cat([images, torch.ones_like(images[:, :1])], 1) for images in (above, below))
    return torch.cat([above, above.new_zeros(*above.shape[:2], gap, above.shape[3]), below], 2)


def _columns(width: int, count: int, room: int, square: bool) -> int:
    """The number of columns that fills the room best at a whole multiple of the images' own size, and drops fewest."""
    about = round(count**0.5) if square else max(1, min(count, room // max(width + 1, 56)))
    fewest = max(min(3, count), about - (2 if square else 4))
    candidates = range(fewest, max(fewest, min(count, about + (2 if square else 0))) + 1)

    def score(columns: int) -> float:
        own = columns * (width + 1) - 1
        filled = displayed_width(own, room) / room if own <= room else 0.9 * room / own
        complete = (count // columns * columns or count) / count
        return round(filled * complete, 2)

    return max(candidates, key=lambda columns: (score(columns), -abs(columns - about)))


def _picture(image: Tensor, room: int, shown: int) -> Picture:
    """The image [1 or 3 channels and an opacity, H, W] as a PNG file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a report needs Pillow: pip install 'ncpvae[plot]'") from error
    pixels = (image * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    own = image.shape[2]
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Picture(uri, displayed_width(own, room), shown, own <= room)


def displayed_width(own: int, room: int) -> int:
    """The largest multiple of its own width that fits the room, or all of the room for what does not."""
    return own * (room // own) if own <= room else room
