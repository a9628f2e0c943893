"""Search methods that learn the factors: exact gradient, SPSA, and sampling, which needs no start value.

All three are used in the same way, in an ordinary training loop:

    search = SampledSearch(model, loss_fn, steps=1000, held_out=batches)
    for batch in loader:
        loss = search.loss(batch)   # loss_fn(model, batch), at the dilations that the search tries in this step
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        search.step()               # once per optimizer step; `search.done` is True when the receptive field is final

`search.loss` may be called several times per step (gradient accumulation). All random draws derive from (seed, step),
so all processes of a distributed run draw the same values. Losses are averaged over the processes before they are
compared. Between `search.step()` and the next `search.loss` the network runs at the best dilations found so far, or at
its start where there are none yet: validate and save it there. A search needs eager mode; compile the model after it.
"""

from rfield.search.base import Search
from rfield.search.certainty import Verdict, judge
from rfield.search.curve import curve_minimum, dilation_grid
from rfield.search.factors import factor_parameters, learned_layers, parameter_groups
from rfield.search.gradient import GradientSearch
from rfield.search.paired import class_share_loss, standard_errors
from rfield.search.sampled import NARROWINGS, SampledSearch
from rfield.search.sets import PathLogits
from rfield.search.spsa import SpsaSearch

__all__ = [
    "NARROWINGS",
    "GradientSearch",
    "PathLogits",
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
