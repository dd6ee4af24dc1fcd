"""The paper's claims, C1 to C8, and ours, C11: `python -m evolq_lite reproduce`."""

from evolq_lite.experiments import (
    c1_bits,
    c2_landscape,
    c3_rivals,
    c4_losses,
    c5_headline,
    c6_selection,
    c7_budget,
    c8_beyond,
    c11_bits,
    real,
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
)
CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in MODULES}
# No part of "all": C11 until its grid has been measured, REAL because it needs networks and
# photographs that are not in this repo.
KNOWN: dict[str, Claim] = {
    **CLAIMS,
    c11_bits.CLAIM.name: c11_bits.CLAIM,
    real.CLAIM.name: real.CLAIM,
}
