"""The paper's claims as experiments: `python -m evolq_lite reproduce`."""

from evolq_lite.experiments import (
    c1_bits,
    c2_landscape,
    c3_rivals,
    c4_losses,
    c5_headline,
    c6_selection,
    c7_budget,
    c8_beyond,
    c9_origin,
    c10_racing,
    c11_bits,
    c12_starts,
    real,
    real_bits,
    real_choice,
    real_gradients,
    real_landscape,
    real_losses,
    real_options,
    real_racing,
    real_settings,
    real_starts,
    real_whole,
)
from evolq_lite.experiments.cells import Claim

MODULES = (
    c1_bits,
    c2_landscape,
    c3_rivals,
    c4_losses,
    c5_headline,
    c6_selection,
    c7_budget,
    c8_beyond,
    c9_origin,
    c10_racing,
    c11_bits,
    c12_starts,
)
CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in MODULES}
# These need networks and photographs that are not in this repo, so they are no part of "all".
ON_FOLDERS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        real.CLAIM,
        real_settings.CLAIM,
        real_landscape.LAYERS_CLAIM,
        real_gradients.CLAIM,
        real_losses.CLAIM,
        real_whole.CLAIM,
        real_whole.PICKS_CLAIM,
        real_options.CLAIM,
        real_choice.CLAIM,
        real_landscape.CLAIM,
        real_racing.CLAIM,
        real_bits.CLAIM,
        real_starts.CLAIM,
    )
}
KNOWN: dict[str, Claim] = {**CLAIMS, **ON_FOLDERS}
