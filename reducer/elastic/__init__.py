"""Data-parallel training that goes on while workers die and new ones come (docs/elastic.md).

Session: a worker's part in it. Sampler: which samples are whose, whatever the number of workers. Change: what a session
tells of a new set of workers.
"""

from reducer.elastic._sampler import Sampler
from reducer.elastic._session import Change, Session

__all__ = ["Change", "Sampler", "Session"]
