"""An engine's complete state, out and in."""

from bilevel.engine_state.resume import resume_engine
from bilevel.engine_state.state import engine_state, load_engine_state

__all__ = ["engine_state", "load_engine_state", "resume_engine"]
