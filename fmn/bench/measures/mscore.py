"""The M-Score of the target, as ``fmn.metrics.mscore`` defines it."""

from ...concept import TEMPLATES
from ...metrics.mscore import SEEDS, m_score


def mscore(trial):
    """Invert the untouched model's pictures of the target on the model under test.

    Cost: one inversion a seed; see ``inversion.Settings``.

    Returns:
        scores: M, one a seed of the inversion; start: M of the random tokens it starts from.
    """
    template = TEMPLATES.get(trial.target.kind, TEMPLATES["object"])
    scores = m_score(
        trial.studio.model,
        trial.studio.borrowed,
        trial.untouched(trial.target_asks()),
        trial.suite.phrase(trial.target),
        templates=(template,),
        seeds=[trial.seed + seed for seed in SEEDS],
        on_step=lambda step: trial.studio.on_pictures(0),
    )
    return {
        "scores": [score.value for score in scores],
        "start": [score.start for score in scores],
    }
