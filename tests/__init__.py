"""A package, so that no installed distribution that also ships a `tests` comes first."""
