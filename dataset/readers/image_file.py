"""An image file -> upright RGB. Files come from strangers; odd ones, as in the public processors:

    CMYK, YCbCr, palette, 1 bit   converted to RGB by Pillow
    16 or 32 bits of grey         values above 255 become white; 16 bits of colour lose 8
    transparent                   white behind it
    turned by EXIF                set upright, as exif_transpose does; EXIF that is broken: as it is
    animated, several pages       the first one
    damaged, too large, no photo  OSError: SVG, PDF, PostScript, a pipe, a directory, a bomb
"""

import contextlib
import importlib
import io
import os
import warnings

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# The formats in which images are published. Pillow knows forty more, and for one of them, EPS, it
# starts another program (Ghostscript) that runs what the file says. To load them all would take a
# tenth of a second of every start.
for plugin in ("Avif", "Bmp", "Gif", "Ico", "Jpeg", "Jpeg2K", "Mpo", "Png", "Ppm", "Tiff", "WebP"):
    with contextlib.suppress(ImportError):  # an older Pillow has no AVIF
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
FORMATS = tuple({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO",
                 "ICO"} & Image.OPEN.keys())
MOST_PIXELS = 89_478_485  # 256 MB of RGB; Pillow's own limit, see open_image


def load_image(source, draft: int | None = None) -> Image.Image:
    """A path, the bytes of an image file, a PIL image, or a function that draws one -> upright RGB.

    draft: pixels that the shorter edge must keep at least; a larger JPEG may be decoded smaller.
    Transparency becomes white. A damaged or truncated file raises OSError: Pillow could fill the
    missing part with grey, and the model would learn to describe what it cannot see. So does one
    of more than MOST_PIXELS: a file of 1 KB can unfold to gigabytes.
    """
    name = f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if callable(source):
            source = source()
        if not isinstance(source, Image.Image):
            source = open_image(source, draft)
        image = upright(source)
        image.load()  # of a PIL image nobody may have read more than the header yet
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:  # its own text names a Python object, not the reason
        raise OSError(f"cannot read {name}: no image format that Pillow knows") from error
    except Exception as error:  # a broken file makes Pillow raise half a dozen different types
        raise OSError(f"cannot read {name}: {error or type(error).__name__}") from error


def open_image(source, draft: int | None = None) -> Image.Image:
    """A path or bytes -> the whole first frame. draft: see load_image."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not os.path.isfile(source):  # opening a pipe would wait for ever
        raise OSError("there is no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Pillow copes with; nobody could do anything
        # Pillow raises at twice its limit and between the two only warns.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(source, formats=FORMATS)
        if draft:
            image.draft(None, (draft, draft))  # of formats other than JPEG it changes nothing
        image.load()
    return image


def upright(image: Image.Image) -> Image.Image:
    """Cameras store the turn beside the pixels, in EXIF, and not turned pixels."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # exif_transpose would copy it
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that nobody can read; of the pixels it says nothing
        return image
