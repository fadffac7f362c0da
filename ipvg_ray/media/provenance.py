"""What a generated picture says of itself: that it is synthetic, and which row of which run it is.

The machine-readable part is IPTC's digital source type (https://cv.iptc.org/newscodes/digitalsourcetype) in XMP, which
search engines and picture programs read; the same in words stands in PNG's text chunks and in JPEG's EXIF.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, PngImagePlugin

SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
<xmp:CreatorTool>ipvg_ray</xmp:CreatorTool>
<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></dc:description>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


def statement(run: str, row: Mapping[str, Any], seed: int) -> str:
    """The sentence that stands in the file."""
    return f"AI-generated, synthetic picture; made by ipvg_ray in run {run}, row {row['sample_id']}, seed {seed}"


def metadata(kind: str, text: str) -> dict[str, Any]:
    """Pillow's arguments that write the mark and `text` into a file; `kind` is png or jpeg."""
    xmp = _XMP.format(source=SYNTHETIC, text=escape(text)).encode("utf-8", "replace")
    if kind == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("Description", text.encode("utf-8", "replace").decode())
        chunks.add_text("Software", "ipvg_ray")
        chunks.add_itxt("XML:com.adobe.xmp", xmp.decode())
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text.encode("ascii", "backslashreplace").decode()
    exif[ExifTags.Base.Software] = "ipvg_ray"
    return {"exif": exif, "xmp": xmp}
