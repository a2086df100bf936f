"""Image files as they come: whether they are whole, and as what a record keeps them.

Pillow, which decodes them, doesn't tell everything. It skips the checksums of a PNG's pixels, and takes a JPEG without
its end for whole if the pixels reach. The checks here catch every change of a PNG, and every JPEG that was cut short.
A JPEG has no checksum, though: a changed byte in its middle decodes to other pixels, and nothing can tell.
"""
import io
import zlib

from ssl_jax.data.source import first_line

_PNG = b'\x89PNG\r\n\x1a\n'
_JPEG = b'\xff\xd8'
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def check_whole(data: bytes) -> str | None:
    """Raises ValueError for a PNG with a false checksum or without its end, and for a JPEG without its end.

    Other formats pass: what decodes them finds what can be found.

    Returns:
      The colours of a PNG or JPEG after its head: 'L', 'RGB' (of a palette or CMYK too) or 'RGBA'; None where it takes
      Pillow to tell.
    """
    if data.startswith(_PNG):
        return _check_png(data)
    return _check_jpeg(data) if data.startswith(_JPEG) else None


def storable(data: bytes) -> bytes:
    """An image file as a record keeps it: JPEG and PNG as they are; what only bears their name (GIF, BMP), as a PNG.

    Raises:
      ValueError: it is not whole, or no image.
    """
    from PIL import Image
    check_whole(data)
    if data.startswith((_PNG, _JPEG)):
        return data
    try:
        with Image.open(io.BytesIO(data)) as picture:
            transparent = 'A' in picture.getbands() or 'transparency' in picture.info
            picture = picture if picture.mode == 'L' else picture.convert('RGBA' if transparent else 'RGB')
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{len(data)} bytes are not a readable image ({first_line(error)})') from error
    stream = io.BytesIO()
    picture.save(stream, 'PNG')
    return stream.getvalue()


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) after the head of an image file.

    Raises:
      ValueError: no image.
    """
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{len(data)} bytes are not a readable image ({first_line(error)})') from error


def _check_png(data: bytes) -> str | None:
    view, position, kind = memoryview(data), len(_PNG), b''
    while kind != b'IEND':
        length = int.from_bytes(view[position:position + 4])
        kind = bytes(view[position + 4:position + 8])
        end = position + 12 + length
        if end > len(data):
            raise ValueError(f'the PNG is truncated, or damaged at byte {position}')
        if zlib.crc32(view[position + 4:end - 4]) != int.from_bytes(view[end - 4:end]):
            raise ValueError(f'the PNG is damaged: the checksum at byte {end - 4} is false')
        position = end
    return {b'\0': 'L', b'\2': 'RGB', b'\3': 'RGB', b'\4': 'RGBA', b'\6': 'RGBA'}.get(data[25:26])


def _check_jpeg(data: bytes) -> str | None:
    position, colours = len(_JPEG), None
    while True:     # over the segments of the head, any of which may hold a smaller JPEG with an end of its own
        position = data.find(b'\xff', position)
        if position < 0 or position + 4 > len(data):
            raise ValueError('the JPEG is truncated: it ends before its pixels')
        marker = data[position + 1]
        if marker == 0xDA:      # the scan; in it the mark of the end occurs nowhere else
            break
        if marker in _FRAMES:
            colours = {b'\1': 'L', b'\3': 'RGB', b'\4': 'RGB'}.get(data[position + 9:position + 10])
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:      # fill bytes, and markers without a length
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + int.from_bytes(data[position + 2:position + 4])
    if data.find(b'\xff\xd9', position) < 0:
        raise ValueError('the JPEG is truncated: its end mark is missing')
    return colours
