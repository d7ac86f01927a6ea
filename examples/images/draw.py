"""Draws the sample images next to this file: python examples/images/draw.py

The shapes, colors and backgrounds are typical of the classes of the default model. The result is the same on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 256
Color = tuple[int, int, int]
Point = tuple[float, float]


def background(top: Color, bottom: Color, horizon: float = 1.0, ground: Color = (0, 0, 0)) -> Image.Image:
    """A vertical gradient, and below the horizon (a share of the height) the ground."""
    rows = np.linspace(0, 1, SIDE)[:, None, None]
    pixels = (1 - rows) * np.array(top) + rows * np.array(bottom)
    pixels = np.repeat(pixels, SIDE, axis=1)
    pixels[round(horizon * SIDE) :] = ground
    return Image.fromarray(pixels.astype(np.uint8))


def textured(image: Image.Image, seed: int, strength: float = 5.0, blur: float = 1.2) -> Image.Image:
    """Soft edges and noise of two scales, like a photo."""
    random = np.random.default_rng(seed)
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(blur))).astype(np.float32)
    coarse = Image.fromarray(random.normal(0, 1, (32, 32)).astype(np.float32)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    noise = strength * (np.asarray(coarse) + 0.5 * random.normal(0, 1, (SIDE, SIDE)))
    return Image.fromarray((soft + noise[..., None]).clip(0, 255).astype(np.uint8))


def ellipse(draw: ImageDraw.ImageDraw, center: Point, radii: Point, fill: Color) -> None:
    (x, y), (rx, ry) = center, radii
    draw.ellipse([x - rx, y - ry, x + rx, y + ry], fill=fill)


def airplane() -> Image.Image:
    image = background((70, 130, 205), (170, 205, 240))
    draw = ImageDraw.Draw(image)
    body, shade, dark = (232, 236, 240), (170, 178, 190), (60, 70, 90)
    draw.polygon([(128, 128), (226, 196), (206, 200), (96, 146)], fill=shade)
    draw.polygon([(120, 112), (66, 60), (84, 58), (158, 112)], fill=(205, 210, 218))
    draw.polygon([(30, 120), (14, 66), (38, 68), (66, 118)], fill=body)
    draw.polygon([(26, 128), (14, 146), (34, 146), (60, 134)], fill=shade)
    draw.polygon([(22, 118), (200, 106), (236, 122), (242, 132), (226, 142), (120, 146), (50, 134)], fill=body)
    draw.line([(60, 134), (228, 140)], fill=shade, width=6)
    draw.polygon([(214, 116), (232, 122), (218, 124)], fill=dark)
    for x in range(80, 205, 12):
        draw.rectangle([x, 120 - (x - 80) * 0.03, x + 5, 125], fill=dark)
    ellipse(draw, (150, 158), (14, 7), dark)
    return image


def automobile() -> Image.Image:
    image = background((190, 200, 210), (205, 210, 215), 0.62, (112, 112, 116))
    draw = ImageDraw.Draw(image)
    red, dark, glass = (200, 24, 28), (28, 28, 30), (60, 80, 100)
    draw.ellipse([18, 186, 242, 214], fill=(70, 70, 74))
    draw.polygon([(70, 122), (98, 82), (172, 82), (206, 124)], fill=red)
    draw.polygon([(82, 120), (104, 90), (132, 90), (132, 120)], fill=glass)
    draw.polygon([(140, 120), (140, 90), (168, 90), (192, 120)], fill=glass)
    draw.rounded_rectangle([16, 118, 242, 182], 20, fill=red)
    draw.rectangle([20, 164, 238, 184], fill=(140, 14, 18))
    ellipse(draw, (228, 136), (10, 8), (250, 240, 190))
    ellipse(draw, (24, 138), (7, 8), (255, 120, 80))
    for x in (70, 188):
        ellipse(draw, (x, 184), (28, 28), dark)
        ellipse(draw, (x, 184), (15, 15), (190, 190, 195))
    return image


def bird() -> Image.Image:
    image = background((120, 160, 90), (90, 130, 70))
    image = image.filter(ImageFilter.GaussianBlur(6))
    draw = ImageDraw.Draw(image)
    draw.line([(0, 214), (256, 190)], fill=(92, 66, 44), width=14)
    draw.polygon([(60, 150), (6, 204), (26, 214), (96, 176)], fill=(90, 70, 56))
    ellipse(draw, (122, 142), (64, 46), (150, 108, 74))
    ellipse(draw, (140, 158), (46, 34), (226, 200, 160))
    draw.polygon([(76, 128), (150, 120), (120, 168), (50, 176)], fill=(96, 72, 56))
    ellipse(draw, (180, 92), (34, 32), (150, 108, 74))
    draw.polygon([(208, 86), (242, 96), (208, 104)], fill=(60, 50, 40))
    ellipse(draw, (190, 86), (6, 6), (15, 12, 10))
    for x in (124, 146):
        draw.line([(x, 184), (x + 4, 206)], fill=(80, 56, 40), width=5)
    return image


def biplane() -> Image.Image:
    image = background((96, 150, 215), (205, 222, 240))
    draw = ImageDraw.Draw(image)
    red, dark, wing = (190, 40, 36), (50, 40, 44), (214, 66, 52)
    draw.polygon([(40, 104), (196, 96), (222, 122), (196, 150), (60, 134)], fill=red)
    draw.polygon([(40, 104), (22, 60), (52, 66), (74, 108)], fill=wing)
    draw.polygon([(84, 76), (176, 64), (196, 76), (96, 90)], fill=wing)
    draw.polygon([(78, 150), (180, 146), (206, 160), (88, 168)], fill=wing)
    for x in (104, 168):
        draw.line([(x, 82), (x + 4, 156)], fill=dark, width=4)
    ellipse(draw, (126, 100), (14, 8), dark)
    draw.line([(226, 76), (226, 170)], fill=dark, width=4)
    for x in (150, 184):
        draw.line([(160, 140), (x, 186)], fill=dark, width=4)
        ellipse(draw, (x, 192), (11, 11), dark)
    return image


def deer() -> Image.Image:
    image = background((116, 140, 86), (140, 150, 80), 0.66, (122, 132, 66))
    draw = ImageDraw.Draw(image)
    coat, dark = (160, 108, 62), (96, 66, 40)
    for x in (82, 104, 160, 178):
        draw.polygon([(x, 150), (x + 14, 150), (x + 10, 234), (x + 2, 234)], fill=dark)
    ellipse(draw, (128, 142), (66, 34), coat)
    draw.polygon([(166, 150), (148, 120), (178, 62), (204, 76)], fill=coat)
    ellipse(draw, (204, 70), (26, 16), coat)
    ellipse(draw, (228, 76), (8, 7), (40, 30, 24))
    ellipse(draw, (206, 64), (4, 4), (20, 14, 10))
    draw.polygon([(180, 62), (158, 44), (186, 52)], fill=coat)
    for x, sign in ((188, -1), (200, 1)):
        draw.line([(x, 58), (x + sign * 12, 30), (x + sign * 6, 6)], fill=dark, width=5)
        draw.line([(x + sign * 12, 30), (x + sign * 30, 14)], fill=dark, width=4)
    ellipse(draw, (66, 132), (9, 14), (240, 230, 210))
    return image


def dog() -> Image.Image:
    image = background((120, 150, 90), (104, 140, 76))
    draw = ImageDraw.Draw(image)
    fur, ear, white = (190, 138, 84), (120, 76, 44), (240, 232, 220)
    ellipse(draw, (128, 262), (86, 92), fur)
    ellipse(draw, (128, 262), (44, 86), white)
    ellipse(draw, (128, 112), (76, 78), fur)
    for sign in (-1, 1):
        ellipse(draw, (128 + sign * 80, 120), (26, 62), ear)
    draw.polygon([(116, 36), (140, 36), (146, 130), (110, 130)], fill=white)
    ellipse(draw, (128, 152), (44, 38), white)
    ellipse(draw, (128, 136), (20, 14), (20, 18, 18))
    for sign in (-1, 1):
        ellipse(draw, (128 + sign * 36, 100), (10, 11), (30, 20, 14))
    draw.line([(128, 150), (128, 170)], fill=(40, 30, 26), width=4)
    ellipse(draw, (128, 186), (14, 18), (220, 110, 116))
    return image


def frog() -> Image.Image:
    image = background((150, 128, 96), (116, 96, 70))
    draw = ImageDraw.Draw(image)
    green, dark, belly = (96, 142, 46), (58, 92, 30), (196, 204, 130)
    ellipse(draw, (66, 190), (52, 34), dark)
    ellipse(draw, (190, 190), (52, 34), dark)
    ellipse(draw, (128, 158), (86, 66), green)
    ellipse(draw, (128, 186), (58, 36), belly)
    ellipse(draw, (128, 106), (72, 48), green)
    for sign in (-1, 1):
        ellipse(draw, (128 + sign * 46, 72), (22, 22), green)
        ellipse(draw, (128 + sign * 46, 70), (15, 15), (220, 180, 60))
        ellipse(draw, (128 + sign * 46, 70), (9, 7), (10, 10, 10))
        draw.line([(128 + sign * 50, 200), (128 + sign * 76, 232)], fill=green, width=20)
    draw.arc([70, 84, 186, 140], 15, 165, fill=dark, width=6)
    for x, y in ((84, 140), (110, 126), (160, 132), (176, 152), (140, 90)):
        ellipse(draw, (x, y), (9, 7), dark)
    return image


def horse() -> Image.Image:
    image = background((150, 190, 225), (190, 210, 220), 0.6, (104, 140, 62))
    draw = ImageDraw.Draw(image)
    coat, dark = (112, 62, 34), (44, 28, 20)
    for x in (70, 94, 158, 180):
        draw.polygon([(x, 150), (x + 18, 150), (x + 14, 232), (x + 3, 232)], fill=coat)
        draw.rectangle([x + 2, 222, x + 15, 236], fill=dark)
    draw.polygon([(66, 118), (40, 130), (36, 196), (52, 190), (70, 140)], fill=dark)
    ellipse(draw, (126, 134), (70, 40), coat)
    draw.polygon([(150, 146), (146, 110), (186, 48), (214, 66), (196, 130)], fill=coat)
    draw.polygon([(186, 46), (214, 50), (244, 92), (232, 104), (200, 80)], fill=coat)
    draw.polygon([(150, 112), (176, 50), (192, 44), (188, 60), (168, 112)], fill=dark)
    draw.polygon([(188, 52), (192, 30), (202, 50)], fill=coat)
    ellipse(draw, (212, 64), (4, 4), (10, 8, 6))
    return image


def ship() -> Image.Image:
    image = background((150, 190, 225), (200, 220, 235), 0.64, (36, 84, 130))
    draw = ImageDraw.Draw(image)
    hull, white, dark = (34, 44, 70), (240, 242, 244), (40, 50, 60)
    draw.polygon([(14, 142), (244, 134), (218, 186), (42, 186)], fill=hull)
    draw.polygon([(42, 178), (222, 178), (218, 188), (46, 188)], fill=(160, 40, 36))
    draw.rectangle([60, 106, 196, 142], fill=white)
    draw.rectangle([80, 82, 170, 108], fill=white)
    for x in range(68, 190, 16):
        draw.rectangle([x, 116, x + 8, 124], fill=dark)
    draw.polygon([(112, 84), (118, 44), (142, 44), (144, 84)], fill=(200, 60, 40))
    draw.rectangle([117, 44, 142, 54], fill=dark)
    draw.line([(200, 140), (204, 60)], fill=dark, width=4)
    for y, step in ((196, 0), (214, 14), (236, 4)):
        for x in range(step, 256, 34):
            draw.line([(x, y), (x + 18, y - 2)], fill=(110, 150, 190), width=4)
    return image


def sailboat() -> Image.Image:
    image = background((130, 180, 225), (196, 216, 232), 0.7, (40, 92, 140))
    draw = ImageDraw.Draw(image)
    draw.polygon([(122, 22), (122, 168), (34, 168)], fill=(244, 244, 240))
    draw.polygon([(134, 40), (134, 168), (206, 168)], fill=(226, 226, 222))
    draw.line([(128, 12), (128, 184)], fill=(80, 60, 44), width=6)
    draw.polygon([(26, 178), (234, 178), (204, 214), (60, 214)], fill=(120, 40, 34))
    draw.line([(30, 182), (230, 182)], fill=(240, 236, 226), width=6)
    for y, step in ((224, 10), (242, 0)):
        for x in range(step, 256, 36):
            draw.line([(x, y), (x + 20, y - 2)], fill=(120, 160, 196), width=4)
    return image


def truck() -> Image.Image:
    image = background((176, 200, 225), (205, 215, 225), 0.68, (106, 106, 108))
    draw = ImageDraw.Draw(image)
    box, cab, dark, glass = (232, 232, 228), (30, 80, 160), (26, 26, 28), (60, 84, 104)
    draw.ellipse([10, 196, 246, 218], fill=(72, 72, 74))
    draw.rectangle([12, 46, 166, 176], fill=box)
    draw.rectangle([12, 46, 166, 56], fill=(190, 190, 186))
    draw.rectangle([10, 172, 240, 190], fill=(50, 50, 54))
    draw.polygon([(172, 84), (218, 84), (238, 128), (244, 180), (172, 180)], fill=cab)
    draw.polygon([(184, 94), (214, 94), (228, 128), (184, 128)], fill=glass)
    ellipse(draw, (238, 158), (7, 7), (250, 240, 190))
    for x in (50, 92, 208):
        ellipse(draw, (x, 190), (24, 24), dark)
        ellipse(draw, (x, 190), (11, 11), (170, 170, 174))
    return image


DRAWINGS: dict[str, tuple[Callable[[], Image.Image], int]] = {
    "airplane": (airplane, 0),
    "biplane": (biplane, 10),
    "automobile": (automobile, 1),
    "bird": (bird, 2),
    "deer": (deer, 4),
    "dog": (dog, 5),
    "frog": (frog, 6),
    "horse": (horse, 7),
    "ship": (ship, 8),
    "sailboat": (sailboat, 11),
    "truck": (truck, 9),
}


def main() -> None:
    directory = Path(__file__).parent
    for name, (draw, seed) in DRAWINGS.items():
        textured(draw(), seed).save(directory / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
