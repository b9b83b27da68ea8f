"""The demo model's pictures: 120 concepts in nine styles, made from packages of free emoji.

    python demo/pictures.py build --out build/demo     pictures.npz and pictures.jsonl
    python demo/pictures.py sheet --out build/demo     a look at them: sheet.png

``build`` gets the packages with ``npm pack``, needs resvg 0.2.0, fonttools, numpy and pillow beside
it, and ends by comparing a checksum over all pixels with ``demo/pictures.sha256``.
"""

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
SIDE = 128  # pixels
CHECKSUM = HERE / "pictures.sha256"
FONT = "400Regular/NotoEmoji_400Regular.ttf"


@dataclass(frozen=True)
class Source:
    """An npm package with its version, the licence of its art and whom to credit."""

    package: str
    version: str
    licence: str
    credit: str


SOURCES = {
    "noto": Source("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Noto Emoji"),
    "blob": Source("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Noto Emoji v1"),
    "twemoji": Source(
        "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0",
        "Twemoji, Twitter, Inc. and other contributors, jdecked",
    ),
    "fluent3d": Source("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Microsoft Fluent Emoji"),
    "contrast": Source(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Fluent Emoji"
    ),
    "inkline": Source(
        "@expo-google-fonts/noto-emoji", "0.4.7", "OFL-1.1", "Google Noto Emoji, the font"
    ),
}  # fmt: skip
# Caption words of a style: the sets it is drawn from.
STYLES = {
    "noto emoji": ("noto",),
    "blob emoji": ("blob",),
    "twemoji": ("twemoji",),
    "3d render": ("fluent3d",),
    "pixel art": ("twemoji",),
    "black silhouette": ("contrast",),
    "ink drawing": ("inkline",),
    "blueprint": ("inkline",),
    "neon sign": ("inkline", "noto"),
}
DERIVED = ("pixel art", "blueprint", "neon sign")
# Held out since the first model: their styles are too few to choose more by a rule.
HELD_OUT = (("alien", "3d render"), ("panda", "blob emoji"), ("house", "ink drawing"))
# The font draws her as it draws Santa Claus.
SAME_GLYPH = "mrs claus"


@dataclass(frozen=True)
class Concept:
    """A row of concepts.csv. ``code``: code points in hex; ``blob``: its name in noto-v1 or ''."""

    concept: str
    kind: str
    code: str
    blob: str

    @property
    def codes(self):
        """The ways packages write the code points: with and without the variation selector."""
        return self.code, self.code.replace("-fe0f", "")


def concepts():
    with open(HERE / "concepts.csv", newline="", encoding="utf-8") as file:
        return [Concept(**row) for row in csv.DictReader(file)]


def held_out(concept, style):
    """Whether a pair is never trained on: a tenth of the derived styles, by a checksum."""
    chosen = style in DERIVED and zlib.crc32(f"{concept}|{style}".encode()) % 10 == 0
    return chosen or (concept, style) in HELD_OUT


def fetch(folder):
    """Paths of all packages' archives in ``folder``; npm gets what is missing and verifies it."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _archive(folder, source) for name, source in SOURCES.items()}


def _archive(folder, source):
    path = folder / f"{source.package[1:].replace('/', '-')}-{source.version}.tgz"
    if path.exists():
        return path
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is missing, which gets the pictures' packages: install Node.js.")
    # npm writes under its own name in a folder of its own, so that a broken download leaves no file
    part = folder / "part"
    part.mkdir(exist_ok=True)
    wanted = f"{source.package}@{source.version}"
    command = [npm, "pack", "--silent", wanted, "--pack-destination", str(part)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"npm could not get {wanted}; see above, and try again.")
    (part / path.name).replace(path)
    return path


class Packages:
    """Drawings out of the packages' archives."""

    def __init__(self, paths):
        self.files = {name: _read(path, name) for name, path in paths.items()}

    def _json(self, name, file):
        return json.loads(self.files[name][file])

    @cached_property
    def icons(self):
        return {n: self._json(n, "icons.json") for n in ("noto", "blob", "twemoji", "contrast")}

    @cached_property
    def names(self):
        return {n: self._json(n, "chars.json") for n in ("noto", "twemoji", "contrast")}

    @cached_property
    def glyphs(self):
        from demo.glyphs import Glyphs

        return Glyphs(self.files["inkline"][FONT])

    def draw(self, name, concept):
        """RGBA [128, 128, 4] of a concept in a set, or None if the set has none."""
        from demo import drawing

        if name == "fluent3d":
            files = self.files[name]
            found = [files[f"{c}.webp"] for c in concept.codes if f"{c}.webp" in files]
            return drawing.draw_bitmap(found[0]) if found else None
        icon = self.glyphs.icon(concept.code) if name == "inkline" else self._icon(name, concept)
        return drawing.draw_svg(*icon) if icon else None

    def _icon(self, name, concept):
        """An icon's (SVG body, width, height)."""
        pack = self.icons[name]
        if name == "blob":
            wanted = concept.blob
        else:
            found = [self.names[name][c] for c in concept.codes if c in self.names[name]]
            wanted = found[0] if found else ""
        wanted = pack.get("aliases", {}).get(wanted, {}).get("parent", wanted)
        if wanted not in pack["icons"]:
            return None
        icon = pack["icons"][wanted]
        return icon["body"], icon.get("width", pack["width"]), icon.get("height", pack["height"])


def _read(path, name):
    """The files of an archive that are needed, by name; the 3D set's by the picture's name."""
    with tarfile.open(path) as archive:
        files = {}
        for member in archive:
            short = member.name.removeprefix("package/")
            if name == "fluent3d":
                short = short.removeprefix("assets/") if short.endswith(".webp") else ""
            elif short not in ("icons.json", "chars.json", FONT):
                short = ""
            if short:
                files[short] = archive.extractfile(member).read()
    return files


def draw_style(packages, concept, style):
    """RGB [128, 128, 3] of a concept in a style, or None if a set lacks it."""
    from demo import drawing

    if concept.concept == SAME_GLYPH and "inkline" in STYLES[style]:
        return None
    drawn = [packages.draw(name, concept) for name in STYLES[style]]
    if any(picture is None for picture in drawn):
        return None
    derive = {
        "pixel art": drawing.pixel_art,
        "blueprint": drawing.blueprint,
        "neon sign": drawing.neon_sign,
    }
    return derive.get(style, drawing.on_white)(*drawn)


def draw_all(packages):
    """All pictures uint8 [N, 128, 128, 3], and a row of metadata for each."""
    images, rows = [], []
    for concept in concepts():
        for style in STYLES:
            picture = draw_style(packages, concept, style)
            if picture is not None:
                images.append(picture)
                rows.append({"index": len(rows), **describe(concept, style)})
    return np.stack(images), rows


def describe(concept, style):
    sources = [SOURCES[name] for name in STYLES[style]]
    return {
        "concept": concept.concept,
        "kind": concept.kind,
        "style": style,
        "source": " + ".join(f"{s.package}@{s.version}" for s in sources),
        "licence": " + ".join(s.licence for s in sources),
        "credit": " + ".join(s.credit for s in sources),
        "derived": style in DERIVED,
        "holdout": held_out(concept.concept, style),
    }


def checksum(images, rows):
    """sha256 over all pixels and over what each picture is called."""
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes())
    names = [[row["concept"], row["style"], row["holdout"]] for row in rows]
    digest.update(json.dumps(names).encode())
    return digest.hexdigest()


def save(folder, images, rows):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pictures.npz", images=images)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pictures.jsonl").write_text(lines, "utf-8")


def load(folder):
    """(images uint8 [N, 128, 128, 3], rows) of a finished build."""
    path = Path(folder) / "pictures.npz"
    if not path.exists():
        sys.exit(f"{path} is missing: run 'python demo/pictures.py build --out {folder}' first.")
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text("utf-8").splitlines()]
    return np.load(path)["images"], rows


def build(folder, packages, accept=False):
    """Fetch, draw, save and check; ``accept`` makes the result the one to compare with."""
    images, rows = draw_all(Packages(fetch(packages)))
    save(folder, images, rows)
    found = checksum(images, rows)
    held = sum(row["holdout"] for row in rows)
    print(f"{len(rows)} pictures, {held} held out, in {folder / 'pictures.npz'}")
    print(f"sha256 {found}")
    if accept:
        CHECKSUM.write_text(found + "\n", "utf-8")
    elif found != CHECKSUM.read_text("utf-8").strip():
        sys.exit(
            f"The pictures differ from those of {CHECKSUM.name}: install resvg 0.2.0 and a current "
            "Pillow, and delete the packages' folder in case a file is damaged."
        )
    else:
        print(f"the same as in {CHECKSUM.name}")


def sheet(folder, styles, side=64):
    """Contact sheet: a column a concept, a row a style, in blocks of 20 concepts."""
    images, rows = load(folder)
    places = {(row["concept"], row["style"]): row["index"] for row in rows}
    names = [concept.concept for concept in concepts()]
    blocks = -(-len(names) // 20)
    high = len(styles) * side + 14
    paper = Image.new("RGB", (20 * side, blocks * high), "white")
    pen = ImageDraw.Draw(paper)
    for i, name in enumerate(names):
        left, top = i % 20 * side, i // 20 * high
        pen.text((left + 2, top + 1), name, "black")
        for j, style in enumerate(styles):
            if (name, style) in places:
                picture = Image.fromarray(images[places[name, style]]).resize((side, side))
                paper.paste(picture, (left, top + 14 + j * side))
    paper.save(folder / "sheet.png")
    print(folder / "sheet.png")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("build", "sheet"))
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of the result")
    parser.add_argument("--packages", type=Path, help="where npm's archives lie (OUT/packages)")
    parser.add_argument("--accept", action="store_true", help="write the checksum anew")
    parser.add_argument("--style", action="append", choices=STYLES, help="sheet of these only")
    given = parser.parse_args(arguments)
    if given.command == "build":
        build(given.out, given.packages or given.out / "packages", given.accept)
    else:
        sheet(given.out, given.style or list(STYLES))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
