"""Cut out of a large font the few Chinese characters that the emoji world uses.

    apt-get install fonts-droid-fallback
    python -m extras.emoji.make_font /usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf

Writes dataset/emoji/chinese.ttf, with which extras/text_drawing.py writes Chinese on machines that
have no Chinese font. Droid Sans Fallback is by Google, under the Apache License 2.0, as this
project; its name table, which says so, is kept.
"""

import sys
from pathlib import Path

from fontTools import subset  # comes with matplotlib

EMOJI = Path(__file__).resolve().parents[2] / "dataset" / "emoji"


def characters() -> str:
    """All Chinese characters and signs in the world's texts and names."""
    files = EMOJI / "texts.py", EMOJI / "things.tsv"
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return "".join(sorted({c for c in text if 0x2e80 <= ord(c) <= 0xffef and c != "\ufe0f"}))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    options = subset.Options()
    options.notdef_outline = True  # so that a missing character is seen as missing
    options.name_IDs = ["*"]
    options.hinting = False
    options.layout_features = []
    font = subset.load_font(sys.argv[1], options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=characters())
    subsetter.subset(font)
    font["head"].modified = font["head"].created  # the same bytes whenever it is made
    font.recalcTimestamp = False
    subset.save_font(font, str(EMOJI / "chinese.ttf"), options)
    print(f"{len(characters())} characters, {(EMOJI / 'chinese.ttf').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
