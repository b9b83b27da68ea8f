"""The M-Score of the target, as ``fmn.metrics.mscore`` defines it."""

from ...concepts.concept import TEMPLATES
from ...metrics.mscore import SEEDS, m_score
from .trial import Ask, Result, Trial


def mscore(trial: Trial) -> Result:
    """Invert the untouched model's pictures of the target on the model under test.

    Cost: one textual inversion a seed.

    Returns:
        scores: M, one a seed of the inversion. start: M of the random tokens it starts from.
    """
    template, asks = template_and_asks(trial)
    scores = m_score(
        trial.sampler.model,
        trial.sampler.denoiser,
        trial.untouched(asks),
        trial.suite.phrase(trial.target),
        templates=(template,),
        seeds=[trial.seed + seed for seed in SEEDS],
        on_step=lambda step: trial.sampler.on_pictures(0),
    )
    return {
        "scores": [score.value for score in scores],
        "start": [score.start for score in scores],
    }


def template_and_asks(trial: Trial) -> tuple[str, list[Ask]]:
    """The template to learn in, {} for the words, and the pictures to learn from.

    A style is learned from one thing that the template names: otherwise words for the thing are
    learned as well.
    """
    suite, target = trial.suite, trial.target
    named = suite.styles.get(target.name, "")
    if target.kind != "style" or named.count(target.name) != 1:
        return TEMPLATES.get(target.kind, TEMPLATES["object"]), trial.target_asks()
    thing = suite.far[0]
    template = suite.prompt(thing, target.name).replace(target.name, "{}")
    return template, trial.pairs([thing], [target.name], trial.count)
