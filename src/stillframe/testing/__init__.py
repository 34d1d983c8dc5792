"""Tools for testing distributed code, stillframe's own and its users': real ranks, and tiny real models."""

from stillframe.testing.launched import RankOutcome
from stillframe.testing.rank_process import RankFailure, hold_at, reached
from stillframe.testing.ranks import RankFailed, Ranks, run_process, run_ranks

__all__ = ["RankFailed", "RankFailure", "RankOutcome", "Ranks", "hold_at", "reached", "run_process", "run_ranks"]
