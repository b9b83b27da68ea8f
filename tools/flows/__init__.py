"""The example workflows, by name, and the blueprints of subgraphs."""

from .blueprints import apply_blueprint, forget_blueprint
from .forgetting import (
    correct_a_concept,
    forget_a_concept,
    forget_a_person,
    forget_a_style,
    forget_an_object,
    forget_in_a_transformer,
    forget_many,
    uce_and_keep_list,
)
from .measuring import compare_methods, measure_a_patch
from .using import downloaded_patch, erase_and_repair, gated_patch, safe_latent_diffusion

EXAMPLES = {
    "Forget a concept (demo)": forget_a_concept,
    "Forget a person (demo)": forget_a_person,
    "Forget an object (demo)": forget_an_object,
    "Forget a style (demo)": forget_a_style,
    "Forget with UCE and a keep-list (demo)": uce_and_keep_list,
    "Forget many concepts (demo)": forget_many,
    "Forget in a transformer (demo)": forget_in_a_transformer,
    "Correct a concept (demo)": correct_a_concept,
    "Compare methods (demo)": compare_methods,
    "Measure a patch (demo)": measure_a_patch,
    "Apply a downloaded patch (demo)": downloaded_patch,
    "Gated patch (demo)": gated_patch,
    "Safe Latent Diffusion (demo)": safe_latent_diffusion,
    "Erase and repair, attack rounds (demo)": erase_and_repair,
}
BLUEPRINTS = {"Forget a Concept": forget_blueprint, "Use a Forget Patch": apply_blueprint}
