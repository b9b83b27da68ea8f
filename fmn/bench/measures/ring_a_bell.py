"""Ring-A-Bell: do prompts without the target's words still draw it?

Tsai et al. 2024, arXiv 2310.10012, and its code. docs/robustness.md has the details.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...models.interface import TextEncoder, UNetModel
from ...models.token_positions import CHUNK, word_positions
from ..suite import Suite, Target
from .attacks import check_absent, name_pattern
from .trial import Result, Trial

MERGES = Path(__file__).parents[2] / "assets" / "clip_merges.txt"
Vocabulary = dict[str, list[int]]  # word -> its token ids


@dataclass(frozen=True)
class RingABellSettings:
    """Ring-A-Bell's settings; those of the released code in brackets.

    Attributes:
        strength: factor on the concept vector (3; 5.5 for violence).
        length: words in the prompt (16 tokens).
        population, generations: of the genetic search (200 and 3000).
        mutate: how often a candidate gets another word somewhere (0.25).
        crossover: how often it is composed of two parents (0.5).
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


def ring_a_bell(trial: Trial, settings: RingABellSettings = RingABellSettings()) -> Result:
    """Search for prompts that mean the target to the text encoder, and draw them.

    The search never sees the U-Net, so the same prompts are found for every method. ``untouched``
    in a row is the prompt drawn by the untouched model: if that shows no target either, the search
    failed, and the row says nothing about forgetting.

    Cost: ``searches`` * (``generations`` + 1) / 2 * ``population`` runs of the text encoder, once
    a target; ``trial.count`` pictures, drawn twice; those of the untouched model are kept.

    Returns:
        rows. searches: what each started from and found, losses of the generations, and
        ``start_loss``, that of the plain prompt that names the target.
    """
    words = vocabulary(trial, settings)
    # Kept like pictures of the untouched model: nothing here depends on the patches.
    key = "ring_a_bell", trial.target.name, tuple(words), repr(settings), trial.seed
    if key not in trial.cache:
        trial.cache[key] = _searches(trial, words, settings)
    searches = trial.cache[key]
    asks = [trial.ask(searches[i % len(searches)]["prompt"], i) for i in range(trial.count)]
    rows = trial.judged_rows(asks, trial.shows_target(trial.draw(asks)))
    used = asdict(settings) | {"vocabulary": len(words)}
    return {"rows": rows, "searches": searches, "settings": used}


def _searches(trial: Trial, words: Vocabulary, settings: RingABellSettings) -> list[dict]:
    """What each search started from and found, how far away that was, and the losses."""
    sampler, searches = trial.sampler, []
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
            start_loss = float(direction.square().sum())
            searches.append(
                {"start": start, "start_loss": start_loss, "prompt": prompt, "losses": losses}
            )
    return searches


def vocabulary(trial: Trial, settings: RingABellSettings) -> Vocabulary:
    """Words the search may use; none of them is the target's own.

    The demo model knows the suite's words only, a trained text encoder all of CLIP's whole words.
    """
    model, words = trial.sampler.model, settings.vocabulary
    if not words and model.family.key != "demo":
        ids = whole_words()
    else:
        ids = {word: _ids(model, word) for word in words or suite_words(trial.suite)}
    names = " ".join((trial.target.name, *trial.target.aliases)).lower()
    name_words = set(re.findall(r"[^\W_]+", names))
    most = (CHUNK - 2) // settings.length
    allowed = {
        word: tokens
        for word, tokens in ids.items()
        if 0 < len(tokens) <= most and not any(_names(word.lower(), each) for each in name_words)
    }
    if len(allowed) < 2:
        raise ForgetError(
            f"Ring-A-Bell has {len(allowed)} words to search among for '{trial.target.name}': give "
            "a vocabulary of other words, or a smaller length."
        )
    return allowed


def _names(word: str, name_word: str) -> bool:
    # "dogs" and "bulldog" name a dog; "offer" does not name something with "of" in its name.
    return word == name_word or (len(name_word) > 2 and name_word in word)


def suite_words(suite: Suite) -> list[str]:
    """The words of the suite's phrases and styles, sorted."""
    texts = [*suite.concepts.values(), *(suite.in_style("", style) for style in suite.styles)]
    return sorted({word for text in texts for word in re.findall(r"[\w-]+", text.lower())})


def whole_words() -> Vocabulary:
    """CLIP's tokens that are a whole word of three letters or more.

    The vocabulary is 256 bytes, the same as ends of words, then one token a merge, in order.
    """
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    tokens = {line.replace(" ", ""): [512 + i] for i, line in enumerate(lines)}
    ends = {token.removesuffix("</w>"): ids for token, ids in tokens.items() if "</w>" in token}
    return {word: ids for word, ids in ends.items() if re.fullmatch("[a-z]{3,}", word)}


def _ids(model: UNetModel, text: str) -> list[int]:
    ids = model.tokenize(Prompt(text, text))
    return [token for i in word_positions(ids) if (token := ids[i]) is not None]


def concept_vector(trial: Trial) -> torch.Tensor:  # [1, 77, D]
    """mean(embedding with the concept) - mean(without) (Tsai et al., eq. 3).

    With: prompts of the target in all styles (far concepts, for a style). Without: those of the
    concepts far from every target (the other styles). The released code takes pairs of sentences.
    """
    suite, target, sampler = trial.suite, trial.target, trial.sampler
    plain = [(far, style) for far in suite.far for style in suite.styles]
    with_concept: Sequence[str]
    if target.kind == "unsafe":
        with_concept = target.prompts["pictures"]
    elif target.kind == "style":
        with_concept = [suite.prompt(far, target.name) for far in suite.far]
    else:
        with_concept = [suite.prompt(target.name, style) for style in suite.styles]
    without = [suite.prompt(*pair) for pair in plain if target.name not in pair]
    if not without:
        raise ForgetError(
            f"Suite '{suite.name}' has no prompt without '{target.name}' to compare with: give it "
            "another style, and concepts that are far from it."
        )
    present, absent = (
        sampler.texts(prompts).context.float().cpu().mean(0) for prompts in (with_concept, without)
    )
    return (present - absent)[None]


class Scorer:
    """Squared L2 distance of candidates' embeddings to the wanted one [1, 77, D].

    A candidate is a row of indices into ``words``; one that spells the target's name is infinitely
    far away.
    """

    def __init__(
        self,
        model: UNetModel,
        text: TextEncoder,
        words: Vocabulary,
        wanted: torch.Tensor,
        target: Target,
    ):
        self.text, self.words, self.ids = text, list(words), list(words.values())
        self.wanted = wanted
        self.names = [name_pattern(subject) for subject in (target.name, *target.aliases)]
        empty = model.tokenize(Prompt("", ""))
        self.start, self.end, self.padding = empty[0], empty[1], empty[-1]

    def prompt(self, candidate: torch.Tensor) -> str:
        """The words of a candidate [length]."""
        return " ".join(self.words[i] for i in candidate.tolist())

    def row(self, candidate: torch.Tensor) -> list[int]:
        """The 77 token ids of a candidate [length]."""
        ids = [token for i in candidate.tolist() for token in self.ids[i]]
        row = [self.start, *ids, self.end]
        return row + [self.padding] * (CHUNK - len(row))

    @torch.no_grad()
    def __call__(self, candidates: torch.Tensor) -> torch.Tensor:
        """Distances [N] of candidates [N, length]."""
        rows = torch.tensor([self.row(candidate) for candidate in candidates])
        embedded = self.text.encode_ids(rows[:, None]).context.cpu()
        scores = (embedded - self.wanted).square().sum((1, 2))
        for i, candidate in enumerate(candidates):
            if any(name.search(self.prompt(candidate)) for name in self.names):
                scores[i] = torch.inf
        return scores


def search(
    score: Callable[[torch.Tensor], torch.Tensor],
    choices: int,
    settings: RingABellSettings,
    generator: torch.Generator,
    on_generation: Callable[[int], object] = lambda count: None,
) -> tuple[torch.Tensor, list[float]]:
    """Genetic search for the row of ``settings.length`` indices below ``choices`` of least score.

    The better half lives on unchanged, so that the best score never rises (in the released code
    mutation strikes parents as well); the other half are their children.

    Returns:
        the best row, and the best score of each generation.
    """
    half = settings.population // 2
    shape = settings.population, settings.length
    population = torch.randint(choices, shape, generator=generator)
    scores, best = score(population), []
    for generation in range(settings.generations):
        order = scores.argsort(stable=True)[:half]
        population, scores = population[order], scores[order]
        best.append(float(scores[0]))
        on_generation(0)
        if generation + 1 < settings.generations:
            count = settings.population - half
            offspring = children(population, count, choices, settings, generator)
            population = torch.cat([population, offspring])
            scores = torch.cat([scores, score(offspring)])
    return population[0], best


def children(
    parents: torch.Tensor,
    count: int,
    choices: int,
    settings: RingABellSettings,
    generator: torch.Generator,
) -> torch.Tensor:  # [count, length]
    """Candidates composed of two parents, or with a word replaced, or both."""

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=generator)

    first, second = parents[draw(len(parents))], parents[draw(len(parents))]
    length = parents.shape[1]
    crossed = torch.rand(count, generator=generator) < settings.crossover
    cut = torch.where(crossed, draw(length) + 1, length)
    offspring = torch.where(torch.arange(length) < cut[:, None], first, second)
    # One that is neither crossed nor mutated would be its parent again.
    mutated = (torch.rand(count, generator=generator) < settings.mutate) | ~crossed
    place, word = draw(length), draw(choices)
    offspring[mutated, place[mutated]] = word[mutated]
    return offspring
