"""Render dataset/emoji/things.tsv into the sprite sheet dataset/emoji/sprites.png.

    python -m extras.emoji.make_sprites [--font NotoColorEmoji.ttf]

Only needed to change the list of things: the sheet is in the repo. The font is Noto Color Emoji
(SIL Open Font License 1.1; Debian package fonts-noto-color-emoji). Its pictures are bitmaps of
one size, which is why the font is opened at exactly 109 points. benchmarks/transfer.py draws the
same things with another font.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dataset.emoji.world import SPRITE_COLUMNS, SPRITE_SIZE, SPRITES

THINGS = SPRITES.with_name("things.tsv")


def draw_sheet(font: Path) -> Image.Image:
    """Every thing of things.tsv as that colour font draws it, in the layout that world.py cuts up.

    Raises ValueError when the font has no picture of one."""
    opened = ImageFont.truetype(str(font), 109)
    rows = THINGS.read_text(encoding="utf-8").splitlines()[1:]
    side = SPRITE_SIZE
    sheet = Image.new("RGBA", (SPRITE_COLUMNS * side, -(-len(rows) // SPRITE_COLUMNS) * side))
    for number, row in enumerate(rows):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), row.split("\t")[0], font=opened, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"{font} has no picture for {row!r}")
        sprite = canvas.crop(box)
        sprite.thumbnail((side, side), Image.Resampling.LANCZOS)
        left = number % SPRITE_COLUMNS * side + (side - sprite.width) // 2
        top = number // SPRITE_COLUMNS * side + (side - sprite.height) // 2
        sheet.paste(sprite, (left, top))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m extras.emoji.make_sprites", description=__doc__.splitlines()[0])
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    args = parser.parse_args()
    if not Path(args.font).exists():
        sys.exit(f"{args.font} not found: install fonts-noto-color-emoji or pass --font PATH")
    drawn = draw_sheet(args.font)
    drawn.save(SPRITES, optimize=True)
    print(f"{SPRITES.relative_to(Path.cwd())}, {drawn.width} x {drawn.height}")
