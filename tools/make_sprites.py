"""Render dataset/emoji/things.tsv into the sprite sheet dataset/emoji/sprites.png.

    python -m tools.make_sprites [--font NotoColorEmoji.ttf]

Only needed to change the list of things: the sheet is in the repo. The font is Noto Color Emoji
(SIL Open Font License 1.1; Debian package fonts-noto-color-emoji). Its pictures are bitmaps of
one size, which is why the font is opened at exactly 109 points.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    args = parser.parse_args()
    if not Path(args.font).exists():
        sys.exit(f"{args.font} not found: install fonts-noto-color-emoji or pass --font PATH")
    font = ImageFont.truetype(args.font, 109)
    rows = (ROOT / "dataset/emoji/things.tsv").read_text(encoding="utf-8").splitlines()[1:]
    columns, side = 12, 96  # the layout that dataset/emoji/world.py cuts up again
    sheet = Image.new("RGBA", (columns * side, -(-len(rows) // columns) * side))
    for number, row in enumerate(rows):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), row.split("\t")[0], font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            sys.exit(f"the font has no picture for {row!r}")
        sprite = canvas.crop(box)
        sprite.thumbnail((side, side), Image.Resampling.LANCZOS)
        left = number % columns * side + (side - sprite.width) // 2
        top = number // columns * side + (side - sprite.height) // 2
        sheet.paste(sprite, (left, top))
    sheet.save(ROOT / "dataset/emoji/sprites.png", optimize=True)
    print(f"{len(rows)} things -> dataset/emoji/sprites.png, {sheet.width} x {sheet.height}")
