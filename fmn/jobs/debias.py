"""UCE's debiasing in rounds (Gandikota et al. 2024, arXiv 2308.14761, released code).

Draw the concept, let a judge count its attributes, shift the concept by what is missing, and again:
"a doctor" is to be drawn as a woman as often as a man, whatever the model learnt.
"""

from dataclasses import dataclass, replace

from ..errors import ForgetError
from ..methods import forget, uce
from ..models.image_sampler import open_sampler
from ..models.sampling import Sampling


@dataclass(frozen=True)
class Round:
    """What one round solved with, and what its pictures show.

    Attributes:
        weights: attribute -> r of ``closed_form.debias``.
        shares: attribute -> share of the pictures in which the judge prefers it, 0 to 1.
    """

    weights: dict[str, float]
    shares: dict[str, float]

    def off(self, desired):
        """The largest distance of a share from the one that is desired."""
        return max(abs(desired[name] - self.shares[name]) for name in desired)


def balance(
    model, concept, desired, judge, domain, settings=uce.Settings(), sampling=Sampling(),
    pictures=10, rounds=30, tolerance=0.05, seed=0, on_round=lambda done: None,
):  # fmt: skip
    """A patch with which a concept shows its attributes in the shares that are desired.

    Weights grow by desired minus observed share, as in the released code; each round solves from
    the untouched model. That need not settle: the best round counts.

    Args:
        desired: attribute -> share; words that the judge has as labels too. They add up to 1.
        judge, domain: a ``metrics.judge.Judge``, and where its labels are.
        pictures: drawn a round, of the concept's prompts in turn, always from the same seeds.
        on_round: gets each ``Round``, and may raise to cancel.

    Returns:
        (ForgetPatch or None if nothing has to be done, list of ``Round``).

    Raises:
        ForgetError: shares that do not add up, or labels that the judge lacks.
    """
    _check(desired, judge, domain)
    prompts = [prompt.text for prompt in concept.training_prompts()]
    prompts = [prompts[i % len(prompts)] for i in range(pictures)]
    seeds = range(seed, seed + pictures)
    weights, patches, done = dict.fromkeys(desired, 0.0), [None], []
    while True:
        with open_sampler(model, sampling) as sampler:
            worn = [(patches[-1], 1.0)] if patches[-1] else []
            with sampler.applying(worn):
                drawn = sampler.draw(prompts, seeds)
        done.append(Round(dict(weights), _shares(judge, domain, drawn, desired)))
        on_round(done[-1])
        if done[-1].off(desired) < tolerance or len(done) > rounds:
            break
        for name in weights:
            weights[name] += desired[name] - done[-1].shares[name]
        told = ", ".join(f"{name} {weight:.6f}" for name, weight in weights.items())
        patches.append(forget(model, [concept], replace(settings, attributes=told)))
    best = min(range(len(done)), key=lambda i: done[i].off(desired))
    return patches[best], done


def _check(desired, judge, domain):
    lacking = [name for name in desired if name not in judge.labels.get(domain, ())]
    if lacking or not desired:
        raise ForgetError(
            f"The judge cannot tell {', '.join(map(repr, lacking)) or 'nothing'} in '{domain}': "
            "name attributes that are among its labels."
        )
    if abs(sum(desired.values()) - 1) > 1e-6 or min(desired.values()) < 0:
        raise ForgetError(
            f"The desired shares add up to {sum(desired.values()):g}: make them 1, none below 0."
        )


def _shares(judge, domain, pictures, desired):
    """How often each attribute is the likeliest of those asked for."""
    columns = [judge.labels[domain].index(name) for name in desired]
    likeliest = judge.probabilities(pictures, domain)[:, columns].argmax(1).tolist()
    return {name: likeliest.count(i) / len(likeliest) for i, name in enumerate(desired)}
