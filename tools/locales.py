"""Generate the nodes' texts: locales/en from the nodes themselves, locales/zh by a phrase book.

    COMFYUI_PATH=... python tools/locales.py

Starts ComfyUI and asks it for the nodes. ``tools/chinese.json`` maps every English text to Chinese.
Texts without Chinese are listed at the end; pages show them in English. Texts that no node has any
more are dropped.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LOCALES = ROOT / "locales"
BOOK = ROOT / "tools" / "chinese.json"
# The page reads texts as messages of vue-i18n, where these characters are syntax.
SPECIAL = re.compile(r"[{}@|]")


def literal(text):
    """A message that vue-i18n shows as this text."""
    return SPECIAL.sub(lambda found: f"{{'{found.group()}'}}", text)


def node_texts(info):
    """{node: what ComfyUI reads from nodeDefs.json}, of an ``/object_info``."""
    return {name: _texts(node) for name, node in sorted(info.items()) if name.startswith("FMN_")}


def _texts(node):
    inputs = {
        name: _named(options.get("display_name") or name, options.get("tooltip"))
        for part in ("required", "optional")
        for name, (_, options) in node["input"].get(part, {}).items()
    }
    outputs = zip(node["output_name"], node["output_tooltips"])
    texts = {"display_name": node["display_name"], "description": node["description"]}
    if inputs:
        texts["inputs"] = inputs
    return texts | {"outputs": {str(i): _named(*each) for i, each in enumerate(outputs)}}


def _named(name, tooltip):
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def phrases(texts):
    """Every text in it, in order, once."""
    if isinstance(texts, str):
        return [texts]
    return list(dict.fromkeys(each for value in texts.values() for each in phrases(value)))


def translated(texts, translate):
    """The same structure with ``translate(text)`` for each text, without those that are None."""
    if isinstance(texts, str):
        return translate(texts)
    items = {key: translated(value, translate) for key, value in texts.items()}
    return {key: value for key, value in items.items() if value} or None


def missing(texts, book):
    return [phrase for phrase in phrases(texts) if not book.get(phrase)]


def node_defs(texts, book):
    """Contents of nodeDefs.json: {language: texts}."""
    chinese = translated(texts, book.get) or {}
    return {"en": translated(texts, literal), "zh": translated(chinese, literal) or {}}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, content):
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def main():
    from tests.comfyui.conftest import comfyui_path, make_base
    from tests.comfyui.server import Server

    with (
        tempfile.TemporaryDirectory() as folder,
        Server(comfyui_path(), make_base(Path(folder) / "base")) as server,
    ):
        texts = node_texts(server.get("/object_info"))
    book = read(BOOK)
    write(BOOK, {phrase: book.get(phrase, "") for phrase in phrases(texts)})
    for language, content in node_defs(texts, book).items():
        (LOCALES / language).mkdir(parents=True, exist_ok=True)
        write(LOCALES / language / "nodeDefs.json", content)
    if lacking := missing(texts, book):
        print("\n".join(["Write the Chinese of these into tools/chinese.json:", *lacking]))


if __name__ == "__main__":
    main()
