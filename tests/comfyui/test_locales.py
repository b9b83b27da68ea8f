"""The nodes' texts in English and Chinese: well-formed, and shown by the page as they are.

A missing or outdated translation is a warning.
"""

import re
import warnings

import pytest
from playwright.sync_api import expect

from tools.locales import BOOK, LOCALES, literal, missing, node_defs, node_texts, read

from .frontend import ARTEFACTS, READY, at_rest, setting

HAN = re.compile(r"[\u4e00-\u9fff]")
SAYS = """([locale, key, text]) => document.querySelector("#vue-app").__vue_app__
  .config.globalProperties.$t(key, {}, { locale }) === text"""
SAME_IN_CHINESE = {"clip", "CLIP", "vae", "VAE", "lora", "token", "tokens", "eta"}


@pytest.fixture(scope="module")
def info(server):
    info = server.get("/object_info")
    return {name: node for name, node in info.items() if name.startswith("FMN_")}


@pytest.fixture(scope="module")
def texts(info):
    return node_texts(info)


def test_every_text_has_its_chinese(texts):
    if lacking := missing(texts, read(BOOK)):
        warnings.warn(
            f"write the Chinese of these into tools/chinese.json: {lacking}", stacklevel=1
        )


def test_every_input_and_output_has_a_tooltip(info):
    for name, node in info.items():
        for part in ("required", "optional"):
            for label, (_, options) in node["input"].get(part, {}).items():
                assert options.get("tooltip"), f"{name}: input {label}"
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        assert [label for label, tooltip in outputs if not tooltip] == [], name


def test_a_preset_stands_above_what_it_overrides(info):
    with_presets = [
        list(node["input"]["optional"])
        for name, node in info.items()
        if name.startswith("FMN_Method") and "preset" in node["input"]["optional"]
    ]
    assert len(with_presets) > 10 and {names[0] for names in with_presets} == {"preset"}


def test_the_english_file_is_fresh(texts):
    made = node_defs(texts, read(BOOK))["en"]
    assert read(LOCALES / "en" / "nodeDefs.json") == made, "run tools/locales.py"


def test_the_chinese_file_names_nothing_else(texts):
    """An older file has other texts; names of nodes and inputs in it have to exist."""
    english, chinese = node_defs(texts, {})["en"], read(LOCALES / "zh" / "nodeDefs.json")
    if chinese != node_defs(texts, read(BOOK))["zh"]:
        warnings.warn("locales/zh/nodeDefs.json is outdated: run tools/locales.py", stacklevel=1)
    assert flat(chinese, "nodeDefs").keys() <= flat(english, "nodeDefs").keys()


def test_chinese_is_chinese_and_keeps_numbers():
    outdated = []
    for english, chinese in read(BOOK).items():
        assert isinstance(chinese, str), english
        if not chinese:
            continue
        assert HAN.search(chinese) or english in SAME_IN_CHINESE, english
        numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", text)) for text in (english, chinese)]
        outdated += [english] if numbers[0] != numbers[1] else []
    if outdated:
        warnings.warn(f"the Chinese of these has other numbers: {outdated}", stacklevel=1)


def test_categories_and_sockets_have_their_chinese(info):
    main = read(LOCALES / "zh" / "main.json")
    parts = {part for node in info.values() for part in node["category"].split("/")}
    assert parts == main["nodeCategories"].keys()
    sockets = {kind for node in info.values() for kind in node["output"]}
    ours = {kind for kind in sockets if kind.startswith("FMN_") or kind == "FORGET_PATCH"}
    assert ours == main["dataTypes"].keys()


@pytest.mark.parametrize("text", ["a {} b", "x | y -> z", "{'@'}", "50 % of it"])
def test_a_literal_message_has_no_syntax_left(text):
    message = literal(text)
    assert re.sub(r"\{'[{}@|]'\}", "", message).strip("{}@|") == re.sub(r"[{}@|]", "", text)


def flat(texts, path):
    if isinstance(texts, str):
        return {path: texts}
    pairs = [flat(value, f"{path}.{key}") for key, value in texts.items()]
    return {key: value for pair in pairs for key, value in pair.items()}


def speak(page, language):
    setting(page, "Comfy.Locale", language)
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY)


def test_the_page_shows_what_was_written(page, texts):
    """Through the page's own i18n, in which braces and bars have a meaning."""
    book = read(BOOK)
    for language, say in (("en", str), ("zh", lambda text: book.get(text) or text)):
        wanted = {key: say(text) for key, text in flat(texts, "nodeDefs").items()}
        first = [language, *next(iter(wanted.items()))]
        if not page.evaluate(SAYS, first):  # newer pages load a language when it is chosen
            setting(page, "Comfy.Locale", language)
            page.wait_for_function(SAYS, arg=first)
        shown = page.evaluate(
            """([keys, language]) => {
              const app = document.querySelector("#vue-app").__vue_app__;
              const t = app.config.globalProperties.$t;
              return keys.map(key => [key, t(key, {}, { locale: language })]);
            }""",
            [list(wanted), language],
        )
        assert dict(shown) == wanted
    speak(page, "en")


def open_help(page, title):
    """From the page's own button; returns once the picture of the node has loaded."""
    page.evaluate(
        """() => {
          app.graph.clear();
          const node = LiteGraph.createNode("FMN_MethodResteer");
          node.pos = [300, 200];
          app.graph.add(node);
          app.canvas.selectNode(node);
          app.canvas.setDirty(true, true);
        }"""
    )
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name=title).first.wait_for()
    page.wait_for_function(
        "title => document.querySelector(`img[alt='${title}']`)?.naturalWidth > 300", arg=title
    )


def test_help_opens_with_a_picture(page):
    open_help(page, "Method: Re-steer")
    page.screenshot(path=ARTEFACTS / "help.png")


def test_help_opens_in_chinese(page):
    """On a page that is set to Chinese."""
    try:
        speak(page, "zh")
        open_help(page, read(BOOK)["Method: Re-steer"])
        expect(page.locator("table")).to_have_count(3)
        at_rest(page)
        page.screenshot(path=ARTEFACTS / "help in Chinese.png")
    finally:
        speak(page, "en")


def test_a_label_is_what_the_schema_calls_it(page):
    """1.32 shows an input's display_name only from nodeDefs.json."""
    label = page.evaluate(
        """() => LiteGraph.createNode("FMN_MethodResteer")
                   .widgets.find(widget => widget.name == "lr").label"""
    )
    assert label == "learning rate"
