"""Suites: what is forgotten, what must stay, and the prompts that ask for both. Read from YAML."""

from dataclasses import dataclass, field
from pathlib import Path

from ..concepts.concept import Concept
from ..concepts.prompt_templates import fill
from ..errors import ForgetError
from ..models.sampling import Sampling
from ..text import printable

SUITES = Path(__file__).parent / "suites"
KINDS = ("identity", "object", "style", "unsafe")
DOMAINS = {"identity": "concept", "object": "concept", "style": "style", "unsafe": "unsafe"}
SPLITS = ("tune", "report")
# Text-side probes that a suite may give prompts for, by name; the rungs are EMMA's (2512.17320).
RUNGS = ("name", "prefix", "variant", "short", "long")
PROBES = (*RUNGS, "aliases", "paraphrases", "templates", "languages", "misspellings")
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """One thing to forget, and what is asked about it.

    Attributes:
        name: a label of the suite's concepts or styles; for unsafe any name.
        kind: one of ``KINDS``.
        near: names of the same domain that are closest to it; they must stay.
        split: ``tune`` (settings may be chosen on it) or ``report``.
        aliases: other words for it.
        prompts: probe -> prompts that should draw it; see ``PROBES``. For unsafe, ``pictures``
            holds those that are drawn in the first place.
        together: pairs of a prompt that holds the target and something kept, and the kept name.
    """

    name: str
    kind: str
    near: tuple[str, ...] = ()
    split: str = "report"
    aliases: tuple[str, ...] = ()
    prompts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    together: tuple[tuple[str, str], ...] = ()

    @property
    def domain(self):
        return DOMAINS[self.kind]


@dataclass(frozen=True)
class Suite:
    """A set of targets with the world they stand in.

    Attributes:
        concepts: name -> phrase in a prompt ("dog" -> "a dog"). styles: name -> template with {}
            for the phrase. Both also are the judge's labels.
        kinds: name of a concept -> identity or object.
        far: names of concepts far from every target; the carriers of styles.
        model, judge, check: what is meant when nothing else is given; "" is none.
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

    def prompt(self, concept, style):
        """The prompt for a pair; both by name."""
        return fill(self.styles[style], self.concepts[concept])

    def phrase(self, target):
        """What stands for the target in a prompt."""
        return self.concepts.get(target.name, target.name)

    def concept(self, target):
        """The ``Concept`` that a method is given, with the suite's prompts of it."""
        if target.kind == "unsafe":
            kind, prompts = "custom", target.prompts["pictures"]
        elif target.kind == "style":
            kind = "style"
            prompts = tuple(self.prompt(name, target.name) for name in self.far[:3])
        else:
            kind = target.kind
            prompts = tuple(self.prompt(target.name, style) for style in list(self.styles)[:3])
        return Concept(target.name, kind, target.aliases, prompts)

    def find(self, name):
        for target in self.targets:
            if target.name == name:
                return target
        known = ", ".join(target.name for target in self.targets)
        raise ForgetError(f"Suite '{self.name}' has no target '{name}': choose from {known}.")

    def forgotten(self, concepts):
        """The targets among the concepts of a patch, by name.

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


def load_suite(name):
    """The ``Suite`` of that name or file; see ``read_suite``."""
    return parse_suite(read_suite(name), Path(name).stem)


def read_suite(name):
    """The content of a suite, by name (``demo``, ``stable-diffusion``) or path of a YAML file.

    Raises:
        ForgetError: the file is missing, too big, no YAML, or says something impossible.
    """
    import yaml

    path = SUITES / f"{name}.yaml" if not str(name).endswith((".yaml", ".yml")) else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise ForgetError(f"There is no suite '{name}': use {known}, or a path to a .yaml file.")
    if path.stat().st_size > MAX_BYTES:
        raise ForgetError(f"'{path}' has more than {MAX_BYTES >> 20} MiB: that is no suite.")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ForgetError(f"'{path}' is not valid YAML: {_one_line(error)}") from error


def parse_suite(data, name):
    """A ``Suite`` from plain data, checked; ``name`` is used where the data gives none."""
    where = _Where(f"Suite '{name}'")
    data = where.mapping(data, "the file", SUITE_KEYS)
    concepts, kinds = _concepts(where, data)
    styles = where.texts(data.get("styles", {}), "styles")
    for style, template in styles.items():
        if template.count("{}") != 1:
            raise where.wrong(f"style '{style}' is '{template}'", "write {} once, for the concept")
    suite = Suite(
        name=where.text(data.get("name", name), "name"),
        title=where.text(data.get("title", name), "title"),
        concepts=concepts,
        styles=styles,
        kinds=kinds,
        far=where.known(data.get("far", []), "far", concepts),
        targets=tuple(_target(where, one, concepts, styles) for one in _list(where, data)),
        sampling=_sampling(where, data.get("sampling", {})),
        **{key: where.text(data.get(key, ""), key) for key in ("model", "judge", "check")},
    )
    names = [target.name for target in suite.targets]
    if len(set(names)) < len(names):
        raise where.wrong("a target is listed twice", "name each once")
    if not (suite.far and styles and names):
        raise where.wrong("far, styles or targets is empty", "give at least one of each")
    return suite


SUITE_KEYS = (
    "name", "title", "concepts", "styles", "far", "targets", "sampling", "model", "judge", "check",
)  # fmt: skip
TARGET_KEYS = ("name", "kind", "near", "split", "aliases", "prompts", "together")


class _Where:
    """Checks plain data and words what is wrong with it."""

    def __init__(self, place):
        self.place = place

    def wrong(self, what, fix):
        return ForgetError(f"{self.place}: {what}; {fix}.")

    def mapping(self, value, name, keys=None):
        if not isinstance(value, dict):
            raise self.wrong(f"{name} is {_kind(value)}", "write a mapping of names to values")
        unknown = [str(key) for key in value if keys and key not in keys]
        if unknown:
            raise self.wrong(f"{name} has the unknown key '{unknown[0]}'", f"use {', '.join(keys)}")
        return value

    def text(self, value, name):
        if not isinstance(value, str):
            raise self.wrong(f"{name} is {_kind(value)}", "write a text, in quotes if need be")
        return value

    def texts(self, value, name):
        return {
            self.text(key, f"a name in {name}"): self.text(one, f"{name}, {key}")
            for key, one in self.mapping(value, name).items()
        }

    def list(self, value, name):
        if not isinstance(value, list):
            raise self.wrong(f"{name} is {_kind(value)}", "write a list")
        return tuple(self.text(one, f"an entry of {name}") for one in value)

    def known(self, value, name, among):
        names = self.list(value, name)
        unknown = [one for one in names if one not in among]
        if unknown:
            raise self.wrong(f"{name} names '{unknown[0]}'", "list it under concepts or styles")
        return names


def _kind(value):
    return {dict: "a mapping", list: "a list", type(None): "empty"}.get(type(value), repr(value))


def _one_line(error):
    return " ".join(str(error).split())[:200]


def _concepts(where, data):
    """The phrases and kinds of the groups ``identity`` and ``object``."""
    phrases, kinds = {}, {}
    groups = where.mapping(data.get("concepts", {}), "concepts", ("identity", "object"))
    for kind, group in groups.items():
        for name, phrase in where.texts(group, f"concepts, {kind}").items():
            if name in phrases:
                raise where.wrong(f"'{name}' is an identity and an object", "keep one")
            phrases[name], kinds[name] = phrase, kind
    return phrases, kinds


def _list(where, data):
    targets = data.get("targets", [])
    if not isinstance(targets, list):
        raise where.wrong(f"targets is {_kind(targets)}", "write a list")
    return targets


def _target(where, data, concepts, styles):
    data = where.mapping(data, "a target", TARGET_KEYS)
    name, kind = where.text(data.get("name"), "a target's name"), data.get("kind")
    if kind not in KINDS:
        raise where.wrong(f"target '{name}' is of kind {kind!r}", f"use {', '.join(KINDS)}")
    among = {"concept": concepts, "style": styles}.get(DOMAINS[kind])
    if among is not None and name not in among:
        raise where.wrong(f"target '{name}' is unknown", "list it under concepts or styles")
    prompts = where.mapping(data.get("prompts", {}), f"{name}: prompts", (*PROBES, "pictures"))
    if kind == "unsafe" and "pictures" not in prompts:
        raise where.wrong(f"'{name}' has no prompts.pictures", "an unsafe target needs them")
    split = data.get("split", "report")
    if split not in SPLITS:
        raise where.wrong(f"split of '{name}' is {split!r}", f"use {' or '.join(SPLITS)}")
    together = where.texts(data.get("together", {}), f"{name}: together")
    where.known(list(together.values()), f"{name}: together", concepts)
    return Target(
        name=name,
        kind=kind,
        near=where.known(data.get("near", []), f"{name}: near", among or {}),
        split=split,
        aliases=where.list(data.get("aliases", []), f"{name}: aliases"),
        prompts={key: where.list(value, f"{name}: {key}") for key, value in prompts.items()},
        together=tuple(together.items()),
    )


def _sampling(where, data):
    given = where.mapping(data, "sampling", ("steps", "guidance", "size"))
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in given.values()):
        raise where.wrong("sampling holds something that is no number", "write steps: 20")
    return Sampling(**given)
