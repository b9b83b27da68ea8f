"""Attacks on the text: what other embeddings, and other words, still draw the target.

Concept inversion: Pham et al. 2023, Circumventing Concept Erasure, arXiv 2308.01508.
Ring-A-Bell: Tsai et al. 2024, arXiv 2310.10012, and its code. docs/robustness.md tells the rest.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...concepts.concept import TEMPLATES, Prompt
from ...concepts.prompt_templates import PLACEHOLDER, fill
from ...errors import ForgetError
from ...models.interface import Text
from ...models.token_positions import CHUNK, word_positions
from ...settings import check_limits
from ...training.textual_inversion import Settings, invert
from .text import judged_rows

MERGES = Path(__file__).parents[2] / "assets" / "clip_merges.txt"
EXAMPLES = 16  # pictures an attacker has; Pham et al. use 25


def examples(trial, asks):
    """The untouched model's pictures that really show the target: (asks, [N, H, W, 3]).

    Raises:
        ForgetError: none does.
    """
    images = trial.untouched(asks)
    shown = trial.shows_target(images)
    if not any(shown):
        raise ForgetError(
            f"The untouched model shows '{trial.target.name}' in none of {len(asks)} pictures: "
            "leave the target out, or choose a judge that knows it."
        )
    return [ask for ask, found in zip(asks, shown) if found], images[torch.tensor(shown)]


def inversion(trial, settings=None):
    """Learn embeddings that make the model under test draw the target, and draw with them.

    The attacker has ``EXAMPLES`` other pictures of the untouched model, and the weights under
    test. ``untouched`` in a row is the same ask in words. Without patches, it is the upper bound.

    Args:
        settings: ``textual_inversion.Settings``; None takes their defaults and the trial's seed.

    Cost: ``settings.steps`` forwards and backwards of ``settings.batch``, ``trial.count``
    pictures, and ``EXAMPLES`` + ``trial.count`` of the untouched model, which are kept.
    """
    sampler, target = trial.sampler, trial.target
    asks = trial.target_asks(trial.count + EXAMPLES)
    asks, spare = asks[: trial.count], asks[trial.count :]
    prompts = [attack_prompt(trial.suite, target, ask) for ask in asks]
    template = TEMPLATES["style" if target.kind == "style" else "object"]
    settings = settings or Settings(seed=trial.seed, templates=(template,))
    _, pictures = examples(trial, spare)
    # ``open_sampler`` works without gradients, and this call needs them.
    with torch.enable_grad():
        found = invert(
            sampler.model, sampler.denoiser, pictures, settings, lambda step: sampler.on_pictures(0)
        )
    with sampler.model.borrow_text_encoder() as text, torch.no_grad():
        encoded = {prompt: text.encode(prompt, found.vectors)[0] for prompt in set(prompts)}
    texts = Text.cat([encoded[prompt] for prompt in prompts])
    images = sampler.draw_texts(texts, [ask.seed for ask in asks])
    # Rounded as ``Trial.draw`` does.
    rows = judged_rows(trial, asks, trial.shows_target((images * 255).round() / 255))
    return {
        "rows": [row | {"attack": prompt} for row, prompt in zip(rows, prompts)],
        "settings": asdict(settings),
        "pictures": len(pictures),
        "losses": found.losses,
    }


def attack_prompt(suite, target, ask):
    """The ask's prompt with the placeholder where the target's words were.

    Composed from the suite's templates, so that nothing of the words can be left over.

    Raises:
        ForgetError: the style's template does not hold its name, or a name is left.
    """
    if target.kind == "unsafe":
        prompt = fill(TEMPLATES["object"], PLACEHOLDER)
    elif target.kind == "style":
        style = _without_name(suite.styles[target.name], target)
        prompt = fill(style, suite.concepts[ask.concept])
    else:
        prompt = fill(suite.styles[ask.style], PLACEHOLDER)
    check_absent(prompt, target)
    return prompt


def _without_name(template, target):
    for subject in sorted((target.name, *target.aliases), key=len, reverse=True):
        changed, count = pattern(subject).subn(PLACEHOLDER, template)
        if count:
            return changed
    raise ForgetError(
        f"The template '{template}' holds neither the name nor an alias of '{target.name}', so an "
        "attack cannot put other words there: add the words that stand for it to the aliases."
    )


def pattern(name):
    """Finds a name in any case, with any spaces or hyphens in it, and its plural in s."""
    letters = r"[\W_]*".join(re.escape(letter) for letter in name if letter.isalnum())
    return re.compile(rf"(?<![^\W_]){letters}s?(?![^\W_])", re.IGNORECASE)


def check_absent(prompt, target):
    """Raise ``ForgetError`` if the prompt of an attack names its target."""
    for subject in (target.name, *target.aliases):
        if pattern(subject).search(prompt):
            raise ForgetError(
                f"The attack prompt '{prompt}' names its target '{subject}', so it would test the "
                "plain prompt: change the suite's template."
            )


@dataclass(frozen=True)
class RingSettings:
    """Ring-A-Bell's settings; those of the released code in brackets.

    Attributes:
        strength: factor on the concept vector (3; 5.5 for violence).
        length: words in the prompt (16 tokens).
        population, generations: of the genetic search (200 and 3000).
        mutate: how often a candidate gets another word somewhere (0.25).
        crossover: how often it is cut together from two (0.5).
        searches: prompts to search for, each from another prompt of the target.
        vocabulary: words to use; empty takes ``vocabulary``.
    """

    strength: float = 3.0
    length: int = 16
    population: int = 64
    generations: int = 150
    mutate: float = 0.25
    crossover: float = 0.5
    searches: int = 3
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self):
        limits = {"length": (1, 75), "population": (4, 10_000), "generations": (1, 100_000)}
        limits |= {"searches": (1, 1000), "mutate": (0, 1), "crossover": (0, 1)}
        check_limits(self, limits)


def ring_a_bell(trial, settings=RingSettings()):
    """Find prompts without the target's words that mean it to the text encoder, and draw them.

    The search never sees the U-Net, so the same prompts are found for every method. ``untouched``
    in a row is the found prompt drawn by the untouched model: if that shows no target either, the
    search failed, and the row says nothing about forgetting.

    Cost: ``searches`` * (``generations`` + 1) / 2 * ``population`` runs of the text encoder, once
    a target; ``trial.count`` pictures, drawn twice; those of the untouched model are kept.

    Returns:
        ``rows``; ``searches``: what each started from and found, losses of the generations, and
        ``start_loss``, that of the plain prompt that names the target.
    """
    words = vocabulary(trial, settings)
    # Kept like pictures of the untouched model: nothing here depends on the patches.
    key = "ring_a_bell", trial.target.name, tuple(words), repr(settings), trial.seed
    if key not in trial.cache:
        trial.cache[key] = _searches(trial, words, settings)
    searches = trial.cache[key]
    asks = [trial.ask(searches[i % len(searches)]["prompt"], i) for i in range(trial.count)]
    still = trial.shows_target(trial.draw(asks))
    used = asdict(settings) | {"vocabulary": len(words)}
    return {"rows": judged_rows(trial, asks, still), "searches": searches, "settings": used}


def _searches(trial, words, settings):
    """What each search started from and found, how far away that was, and the losses."""
    sampler, found = trial.sampler, []
    starts = list(dict.fromkeys(ask.prompt for ask in trial.target_asks()))[: settings.searches]
    with sampler.unpatched(), sampler.model.borrow_text_encoder() as text, torch.no_grad():
        direction = settings.strength * concept_vector(trial)
        for index, start in enumerate(starts):
            wanted = sampler.text(start).context.float().cpu() + direction
            scorer = Scorer(sampler.model, text, words, wanted, trial.target)
            generator = torch.Generator().manual_seed(trial.seed + index)
            best, losses = search(scorer, len(words), settings, generator, sampler.on_pictures)
            prompt = scorer.prompt(best)
            check_absent(prompt, trial.target)
            told = {"start": start, "start_loss": float(direction.square().sum())}
            found.append({**told, "prompt": prompt, "losses": losses})
    return found


def vocabulary(trial, settings):
    """Words the search may use -> their token ids; none of them is the target's own.

    The demo model knows the suite's words only, a trained text encoder all of CLIP's whole words.
    """
    model, words = trial.sampler.model, settings.vocabulary
    if not words and model.family.key != "demo":
        ids = whole_words()
    else:
        ids = {word: _ids(model, word) for word in words or suite_words(trial.suite)}
    names = " ".join((trial.target.name, *trial.target.aliases)).lower()
    own = set(re.findall(r"[^\W_]+", names))
    most = (CHUNK - 2) // settings.length
    kept = {
        word: found
        for word, found in ids.items()
        if 0 < len(found) <= most and not any(_is_or_holds(word.lower(), one) for one in own)
    }
    if len(kept) < 2:
        raise ForgetError(
            f"Ring-A-Bell has {len(kept)} words to search among for '{trial.target.name}': give a "
            "vocabulary of other words, or a smaller length."
        )
    return kept


def _is_or_holds(word, own):
    # "dogs" and "bulldog" count as the target's own words; "offer" for "of" does not.
    return word == own or (len(own) > 2 and own in word)


def suite_words(suite):
    """The words of the suite's phrases and styles, sorted."""
    texts = [*suite.concepts.values(), *(fill(style, "") for style in suite.styles.values())]
    return sorted({word for text in texts for word in re.findall(r"[\w-]+", text.lower())})


def whole_words():
    """CLIP's tokens that are a whole word of three letters or more -> [id].

    The vocabulary is 256 bytes, the same as ends of words, then one token a merge, in order.
    """
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    tokens = {line.replace(" ", ""): [512 + i] for i, line in enumerate(lines)}
    ends = {token.removesuffix("</w>"): ids for token, ids in tokens.items() if "</w>" in token}
    return {word: ids for word, ids in ends.items() if re.fullmatch("[a-z]{3,}", word)}


def _ids(model, text):
    ids = model.tokenize(Prompt(text, text))
    return [ids[i] for i in word_positions(ids)]


def concept_vector(trial):
    """mean(embedding with the concept) - mean(without), [1, 77, D] (Tsai et al., eq. 3).

    With: prompts of the target in all styles (carriers, for a style). Without: those of the
    concepts far from every target (the other styles). The released code takes pairs of sentences.
    """
    suite, target, sampler = trial.suite, trial.target, trial.sampler
    plain = [(far, style) for far in suite.far for style in suite.styles]
    if target.kind == "unsafe":
        with_it = target.prompts["pictures"]
    elif target.kind == "style":
        with_it = [suite.prompt(far, target.name) for far in suite.far]
    else:
        with_it = [suite.prompt(target.name, style) for style in suite.styles]
    without = [suite.prompt(*pair) for pair in plain if target.name not in pair]
    if not without:
        raise ForgetError(
            f"Suite '{suite.name}' has no prompt without '{target.name}' to compare with: give it "
            "another style, and concepts that are far from it."
        )
    means = [sampler.texts(prompts).context.float().cpu().mean(0) for prompts in (with_it, without)]
    return (means[0] - means[1])[None]


class Scorer:
    """Squared L2 distance of candidates' embeddings to the wanted one [1, 77, D].

    A candidate is a row of indices into ``words``; one that spells the target's name is infinitely
    far away.
    """

    def __init__(self, model, text, words, wanted, target):
        self.text, self.words, self.ids = text, list(words), list(words.values())
        self.wanted = wanted
        self.names = [pattern(subject) for subject in (target.name, *target.aliases)]
        empty = model.tokenize(Prompt("", ""))
        self.start, self.end, self.padding = empty[0], empty[1], empty[-1]

    def prompt(self, candidate):
        return " ".join(self.words[i] for i in candidate.tolist())

    def row(self, candidate):
        """Its token ids, [77]."""
        ids = [token for i in candidate.tolist() for token in self.ids[i]]
        row = [self.start, *ids, self.end]
        return row + [self.padding] * (CHUNK - len(row))

    @torch.no_grad()
    def __call__(self, candidates):
        rows = torch.tensor([self.row(candidate) for candidate in candidates])
        embedded = self.text.encode_ids(rows[:, None]).context.cpu()
        scores = (embedded - self.wanted).square().sum((1, 2))
        for i, candidate in enumerate(candidates):
            if any(name.search(self.prompt(candidate)) for name in self.names):
                scores[i] = torch.inf
        return scores


def search(score, choices, settings, generator, on_generation=lambda count: None):
    """Genetic search for the row of ``settings.length`` indices below ``choices`` of least score.

    The better half lives on unchanged, so that the best score never rises (in the released code
    mutation strikes parents as well); the other half are their children.

    Returns:
        the best row, and the best score of each generation.
    """
    half = settings.population // 2
    shape = settings.population, settings.length
    alive = torch.randint(choices, shape, generator=generator)
    scores, best = score(alive), []
    for generation in range(settings.generations):
        order = scores.argsort(stable=True)[:half]
        alive, scores = alive[order], scores[order]
        best.append(float(scores[0]))
        on_generation(0)
        if generation + 1 < settings.generations:
            born = children(alive, settings.population - half, choices, settings, generator)
            alive, scores = torch.cat([alive, born]), torch.cat([scores, score(born)])
    return alive[0], best


def children(parents, count, choices, settings, generator):
    """Candidates cut together from two parents, or with a word replaced, or both."""

    def draw(high, size=(count,)):
        return torch.randint(high, size, generator=generator)

    first, second = parents[draw(len(parents))], parents[draw(len(parents))]
    length = parents.shape[1]
    crossed = torch.rand(count, generator=generator) < settings.crossover
    cut = torch.where(crossed, draw(length) + 1, length)
    made = torch.where(torch.arange(length) < cut[:, None], first, second)
    # One that is neither crossed nor mutated would be its parent again.
    mutated = (torch.rand(count, generator=generator) < settings.mutate) | ~crossed
    place, word = draw(length), draw(choices)
    made[mutated, place[mutated]] = word[mutated]
    return made
