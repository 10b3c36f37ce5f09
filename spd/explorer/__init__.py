"""Looking into subspaces: their spectra and energies, how they lie to one another, and the tokens behind them."""

from spd.explorer.numbers import explore_json, pairs, read_metrics, read_subspaces
from spd.explorer.page import explore, write_figures
from spd.explorer.token_gradients import TokenGradients, token_gradients

__all__ = [
    "TokenGradients",
    "explore",
    "explore_json",
    "pairs",
    "read_metrics",
    "read_subspaces",
    "token_gradients",
    "write_figures",
]
