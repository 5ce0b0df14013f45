//! What differs between agents: packages, launch, environment, state, resume.
