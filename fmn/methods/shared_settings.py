"""Settings that several methods have. Each is described once, here."""

from functools import partial

from ..closed_form.text_embeddings import TOKENS
from ..concepts.keep_list import CHOICES
from ..patches.file_check import MAX_RANK
from ..settings import MAX_SEED, advanced, setting

seed = partial(advanced, 0, "The same seed and settings give the same patch.", limits=(0, MAX_SEED))

# Methods that train
steps = partial(
    setting,
    help="Training steps for each concept. More forget more, and harm neighbours.",
    limits=(1, 100_000),
)
lr = partial(advanced, limits=(1e-8, 1.0))
rank = partial(
    setting,
    default=4,
    help="Rank of the patch: how many directions each layer may change. The file grows with it.",
    limits=(1, 128),
)
full_weights = partial(
    advanced,
    False,
    "On: train whole weight matrices, as released, and cut them to the rank when done; needs "
    "far more memory. Off: train the low rank itself.",
)
size = partial(
    advanced,
    0,
    "Pixels a side while training. 0: what the model was made for. Smaller is faster and "
    "needs less memory.",
    limits=(0, 4096, 64),
)
checkpointing = partial(
    advanced, False, "On: save memory by computing some things twice, which takes longer."
)
protect = partial(
    setting,
    False,
    "On: train only directions that cannot change the keep-list's words (SuPLoRA). Needs "
    "keys and values as layers, and a higher learning rate; concepts close to those words "
    "are harder to forget.",
)

# Methods that solve
solved_rank = partial(
    setting,
    default=0,
    help="Largest rank of a layer's change for each concept; the file grows with it. 0: all of it, "
    f"nothing is cut up to rank {MAX_RANK} in all.",
    limits=(0, MAX_RANK),
)
erase = partial(
    setting,
    1.0,
    "Weight of forgetting. 0: nothing happens. Higher forgets more reliably and harms "
    "neighbours more.",
    limits=(0.0, 1000.0, 0.01),
)
damping = partial(
    advanced,
    help="Ridge penalty (lambda). Small: a stronger edit. Large: no edit.",
    limits=(1e-6, 1e6, 0.01),
)
tokens = partial(
    advanced,
    default="last",
    help="Which of the concept's tokens are edited. last: its last one. from-last: that one, the "
    "end of the text and its padding. subject: all of its words. all: every position but the "
    "start.",
    choices=TOKENS,
)
expand = partial(
    advanced, False, "On: also edit five templates around each name, such as 'photo of NAME'."
)

# What is kept
preserve = partial(
    setting,
    default=1.0,
    help="Weight of the keep-list. 0: no keep-list. Higher: listed words change less.",
    limits=(0.0, 1000.0, 0.01),
)
keep_list = partial(
    setting,
    "auto",
    "Shipped keep-list, in addition to what is connected. auto: chosen by the concept's kind.",
    choices=CHOICES,
)
keep_tokens = partial(
    advanced,
    "last",
    "Which tokens of kept words stay. last: the last one. all: every position, padding and "
    "the empty prompt too.",
    choices=("last", "all"),
)


def rank_in_all(rank: int, concepts: int) -> int:
    """Largest rank of a layer's change for so many concepts by ``solved_rank``."""
    return min(rank * concepts or MAX_RANK, MAX_RANK)
