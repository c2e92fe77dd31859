"""gandist trains networks that play against each other: any number of processes, stopped at any moment, one result."""

__version__ = "0.1.0"
