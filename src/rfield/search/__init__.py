"""How factors are learned: by their exact gradient, by SPSA, or by a sampled search that needs no start.

All three are used alike, in a loop that is otherwise an ordinary one:

    search = SampledSearch(model, loss_fn, steps=1000, held_out=batches)
    for batch in loader:
        loss = search.loss(batch)   # loss_fn(model, batch), at the dilations that the search wants to see
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        search.step()               # once an optimizer step; `search.done` tells when the receptive field is final

`search.loss` may be called several times a step (gradient accumulation). All draws derive from (seed, step), so every
process of a distributed run draws the same, and losses are averaged over the processes before they decide anything.
Between `search.step()` and the next `search.loss` the network is at the present best, or at its start where there is
none yet, so that it may be validated and saved there. A search runs eager; compile after it is done.
"""

from rfield.search.base import Search
from rfield.search.certainty import Verdict, judge
from rfield.search.factors import factor_parameters, learned_layers, parameter_groups
from rfield.search.gradient import GradientSearch
from rfield.search.paired import class_share_loss, standard_errors
from rfield.search.sampled import NARROWINGS, SampledSearch, curve_minimum, dilation_grid
from rfield.search.spsa import SpsaSearch

__all__ = [
    "NARROWINGS",
    "GradientSearch",
    "SampledSearch",
    "Search",
    "SpsaSearch",
    "Verdict",
    "class_share_loss",
    "curve_minimum",
    "dilation_grid",
    "factor_parameters",
    "judge",
    "learned_layers",
    "parameter_groups",
    "standard_errors",
]
