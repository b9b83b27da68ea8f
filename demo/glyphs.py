"""Outlines of an emoji font as SVG, sequences of code points included."""

from io import BytesIO

from fontTools.pens.boundsPen import BoundsPen
from fontTools.pens.svgPathPen import SVGPathPen
from fontTools.pens.transformPen import TransformPen
from fontTools.ttLib import TTFont

LIGATURE, EXTENSION = 4, 7  # kinds of substitution


class Glyphs:
    """A font from bytes."""

    def __init__(self, data):
        self.font = TTFont(BytesIO(data))
        self.names = self.font.getBestCmap()
        self.shapes = self.font.getGlyphSet()

    def icon(self, code):
        """(SVG body, width, height) of code points like '1f9d1-200d-1f680', or None."""
        points = [int(part, 16) for part in code.split("-") if part != "fe0f"]
        if any(point not in self.names for point in points):
            return None
        name = self._joined([self.names[point] for point in points])
        if name is None:
            return None
        bounds = BoundsPen(self.shapes)
        self.shapes[name].draw(bounds)
        if bounds.bounds is None:
            return None
        left, bottom, right, top = bounds.bounds
        pen = SVGPathPen(self.shapes, ntos=lambda number: f"{number:g}")
        # fonts count upwards
        self.shapes[name].draw(TransformPen(pen, (1, 0, 0, -1, -left, top)))
        return f'<path d="{pen.getCommands()}"/>', right - left, top - bottom

    def _joined(self, names):
        """One glyph for a sequence of glyphs, by the font's ligatures, or None."""
        if len(names) == 1:
            return names[0]
        for lookup in self.font["GSUB"].table.LookupList.Lookup:
            for table in lookup.SubTable:
                if lookup.LookupType == EXTENSION:
                    table = table.ExtSubTable
                if table.LookupType != LIGATURE:
                    continue
                for ligature in table.ligatures.get(names[0], ()):
                    if ligature.Component == names[1:]:
                        return ligature.LigGlyph
        return None
