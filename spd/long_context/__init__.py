"""What projection does at long contexts: bytes and seconds of the cache by mode, retrieval and perplexity by rank."""

from spd.long_context.experiment import resumes, run
from spd.long_context.settings import Settings

__all__ = ["Settings", "resumes", "run"]
