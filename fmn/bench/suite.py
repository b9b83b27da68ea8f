"""Suites: what to forget, what must stay, and the prompts that ask for both. Read from YAML."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..concepts.concept import Concept
from ..concepts.prompt_syntax import escaped, plain_text, prompt_text
from ..concepts.prompt_templates import fill
from ..downloads import first_bytes
from ..errors import ForgetError
from ..models.sampling import Sampling
from ..text import printable

SUITES = Path(__file__).parent / "suites"
KINDS = ("identity", "object", "style", "unsafe")
DOMAINS = {"identity": "concept", "object": "concept", "style": "style", "unsafe": "unsafe"}
SPLITS = ("tune", "report")
# Kinds of prompts that ask for a target; the first five are EMMA's levels (arXiv 2512.17320).
PROBES = (
    "name", "prefix", "variant", "short", "long",
    "aliases", "paraphrases", "templates", "languages", "misspellings",
)  # fmt: skip
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """One thing to forget, and what is asked about it.

    Attributes:
        name: a name among the suite's concepts or styles; for unsafe content any name.
        kind: one of ``KINDS``.
        near: names of the same domain that are closest to it; they must stay.
        split: ``tune`` (settings may be chosen on it) or ``report``.
        aliases: other words for it.
        prompts: probe -> prompts that should draw it; see ``PROBES``. For unsafe content,
            ``pictures`` holds the prompts of the measure of that name.
        together: (prompt that asks for the target beside something kept, name of what is kept).
    """

    name: str
    kind: str
    near: tuple[str, ...] = ()
    split: str = "report"
    aliases: tuple[str, ...] = ()
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    together: tuple[tuple[str, str], ...] = ()

    @property
    def domain(self) -> str:
        """What a judge has to judge: ``concept``, ``style`` or ``unsafe``."""
        return DOMAINS[self.kind]


@dataclass(frozen=True)
class Suite:
    """Targets, and the concepts and styles around them. Their names are the judge's labels.

    Attributes:
        concepts: name -> phrase in a prompt ("dog" -> "a dog").
        styles: name -> template with {} for the phrase.
        kinds: name of a concept -> identity or object.
        far: names of concepts far from every target; styles are drawn with them.
        model, judge, check: defaults; "" is none.
    """

    name: str
    title: str
    concepts: dict[str, str]
    styles: dict[str, str]
    kinds: dict[str, str]
    far: tuple[str, ...]
    targets: tuple[Target, ...]
    sampling: Sampling
    model: str = ""
    judge: str = ""
    check: str = ""

    def prompt(self, concept: str, style: str) -> str:
        """The prompt for a concept in a style; both by name."""
        return self.in_style(self.concepts[concept], style)

    def in_style(self, phrase: str, style: str) -> str:
        """The style's template with a phrase in it; other braces stay as they are."""
        return fill(self.styles[style], phrase)

    def phrase(self, target: Target) -> str:
        """How prompts name the target."""
        return self.concepts.get(target.name, target.name)

    def concept(self, target: Target) -> Concept:
        """The ``Concept`` for a method, with the suite's prompts of it."""
        kind, styles = target.kind, list(self.styles)[:3]
        if kind == "unsafe":
            kind, prompts = "custom", target.prompts["pictures"]
        elif kind == "style":
            prompts = tuple(self.prompt(name, target.name) for name in self.far[:3])
        else:
            prompts = tuple(self.prompt(target.name, style) for style in styles)
        return Concept(target.name, kind, target.aliases, tuple(map(escaped, prompts)))

    def find(self, name: str) -> Target:
        for target in self.targets:
            if target.name == name:
                return target
        known = ", ".join(target.name for target in self.targets)
        raise ForgetError(f"Suite '{self.name}' has no target '{name}': choose from {known}.")

    def targets_of(self, concepts: Collection[str]) -> list[Target]:
        """The targets among the names of a patch's concepts.

        Raises:
            ForgetError: there is none.
        """
        targets = [target for target in self.targets if target.name in concepts]
        if not targets:
            forgets = printable(", ".join(concepts)[:200]) or "nothing by name"
            raise ForgetError(
                f"The patch forgets {forgets}, which suite '{self.name}' does not ask about: name "
                "targets of the suite, or choose another one."
            )
        return targets


def load_suite(name: str) -> Suite:
    """The ``Suite`` of that name or file; see ``read_suite``."""
    return parse_suite(read_suite(name), Path(name).stem)


def read_suite(name: str) -> dict:
    """The content of a suite, by name (``demo``, ``stable-diffusion``) or path of a YAML file.

    Raises:
        ForgetError: the file is missing, too big or not YAML.
    """
    import yaml

    path = SUITES / f"{name}.yaml" if not name.endswith((".yaml", ".yml")) else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise ForgetError(f"There is no suite '{name}': use {known}, or a path to a .yaml file.")
    if path.stat().st_size > MAX_BYTES:
        raise ForgetError(f"'{path}' has more than {MAX_BYTES >> 20} MiB: that is not a suite.")
    try:
        first_bytes(path)
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ForgetError(f"'{path}' is not valid YAML: {reason}") from error


def parse_suite(data: object, name: str) -> Suite:
    """A ``Suite`` from the content of a file, checked; ``name`` is used where that gives none.

    Raises:
        ForgetError: something is missing, unknown, or of a wrong type.
    """
    check = _Check(f"Suite '{name}'")
    content = check.mapping(data, "the file", SUITE_KEYS)
    concepts, kinds = _concepts(check, content)
    styles = check.texts(content.get("styles", {}), "styles")
    for style, template in styles.items():
        if template.count("{}") != 1:
            raise check.error(f"style '{style}' is '{template}'", "write {} once, for the concept")
    targets = content.get("targets", [])
    if not isinstance(targets, list):
        raise check.error(f"targets is {_type_of(targets)}", "write a list")
    suite = Suite(
        name=check.text(content.get("name", name), "name"),
        title=check.text(content.get("title", name), "title"),
        concepts=concepts,
        styles=styles,
        kinds=kinds,
        far=check.known(content.get("far", []), "far", concepts),
        targets=tuple(_target(check, target, concepts, styles) for target in targets),
        sampling=_sampling(check, content.get("sampling", {})),
        model=check.text(content.get("model", ""), "model"),
        judge=check.text(content.get("judge", ""), "judge"),
        check=check.text(content.get("check", ""), "check"),
    )
    names = [target.name for target in suite.targets]
    if len(set(names)) < len(names):
        raise check.error("a target is listed twice", "name each once")
    if not (suite.far and styles and names):
        raise check.error("far, styles or targets is empty", "give at least one of each")
    return suite


SUITE_KEYS = (
    "name", "title", "concepts", "styles", "far", "targets", "sampling", "model", "judge", "check",
)  # fmt: skip
TARGET_KEYS = ("name", "kind", "near", "split", "aliases", "prompts", "together")


class _Check:
    """Checks the types of what YAML gave; ``place`` begins each message."""

    def __init__(self, place: str):
        self.place = place

    def error(self, what: str, fix: str) -> ForgetError:
        return ForgetError(f"{self.place}: {what}; {fix}.")

    def mapping(self, value: object, name: str, keys: Sequence[str] = ()) -> dict:
        if not isinstance(value, dict):
            raise self.error(f"{name} is {_type_of(value)}", "write a mapping of names to values")
        unknown = [str(key) for key in value if keys and key not in keys]
        if unknown:
            raise self.error(f"{name} has the unknown key '{unknown[0]}'", f"use {', '.join(keys)}")
        return value

    def text(self, value: object, name: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{name} is {_type_of(value)}", "write a text, in quotes if need be")
        return value

    def words(self, value: object, name: str, read: Callable[[str], str] = plain_text) -> str:
        """A name or a prompt, which is drawn as plain words."""
        text = self.text(value, name)
        try:
            return read(plain_text(text))
        except ForgetError as error:
            raise ForgetError(f"{self.place}, {name}: {error}") from error

    def texts(self, value: object, name: str) -> dict[str, str]:
        return {
            self.words(key, f"a name in {name}"): self.words(text, f"{name}, {key}")
            for key, text in self.mapping(value, name).items()
        }

    def prompts(self, value: object, name: str) -> tuple[str, ...]:
        return tuple(self.words(text, name, prompt_text) for text in self.list(value, name))

    def list(self, value: object, name: str) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise self.error(f"{name} is {_type_of(value)}", "write a list")
        return tuple(self.words(entry, f"an entry of {name}") for entry in value)

    def known(self, value: object, name: str, names: Collection[str]) -> tuple[str, ...]:
        listed = self.list(value, name)
        unknown = [each for each in listed if each not in names]
        if unknown:
            raise self.error(f"{name} names '{unknown[0]}'", "list it under concepts or styles")
        return listed


def _type_of(value: object) -> str:
    known = ((dict, "a mapping"), (list, "a list"), (type(None), "empty"))
    return next((name for kind, name in known if isinstance(value, kind)), repr(value))


def _concepts(check: _Check, data: dict) -> tuple[dict[str, str], dict[str, str]]:
    """The phrases and kinds of the groups ``identity`` and ``object``."""
    phrases, kinds = {}, {}
    groups = check.mapping(data.get("concepts", {}), "concepts", ("identity", "object"))
    for kind, group in groups.items():
        for name, phrase in check.texts(group, f"concepts, {kind}").items():
            if name in phrases:
                raise check.error(f"'{name}' is an identity and an object", "keep one")
            phrases[name], kinds[name] = phrase, kind
    return phrases, kinds


def _target(check: _Check, data: object, concepts: dict, styles: dict) -> Target:
    data = check.mapping(data, "a target", TARGET_KEYS)
    name, kind = check.words(data.get("name"), "a target's name"), data.get("kind")
    if kind not in KINDS:
        raise check.error(f"target '{name}' is of kind {kind!r}", f"use {', '.join(KINDS)}")
    same_domain = {"concept": concepts, "style": styles}.get(DOMAINS[kind])
    if same_domain is not None and name not in same_domain:
        raise check.error(f"target '{name}' is unknown", "list it under concepts or styles")
    prompts = check.mapping(data.get("prompts", {}), f"{name}: prompts", (*PROBES, "pictures"))
    if kind == "unsafe" and "pictures" not in prompts:
        raise check.error(f"'{name}' has no prompts.pictures", "an unsafe target needs them")
    split = data.get("split", "report")
    if split not in SPLITS:
        raise check.error(f"split of '{name}' is {split!r}", f"use {' or '.join(SPLITS)}")
    together = check.texts(data.get("together", {}), f"{name}: together")
    check.known(list(together.values()), f"{name}: together", concepts)
    return Target(
        name=name,
        kind=kind,
        near=check.known(data.get("near", []), f"{name}: near", same_domain or {}),
        split=split,
        aliases=check.list(data.get("aliases", []), f"{name}: aliases"),
        prompts={key: check.prompts(value, f"{name}: {key}") for key, value in prompts.items()},
        together=tuple(together.items()),
    )


def _sampling(check: _Check, data: object) -> Sampling:
    given = check.mapping(data, "sampling", ("steps", "guidance", "size"))
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in given.values()):
        raise check.error("sampling holds something that is not a number", "write steps: 20")
    return Sampling(**given)
