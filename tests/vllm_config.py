"""An engine's configuration, with the parts that the plug-in's processors read."""

from types import SimpleNamespace


def config(**fields):
    """A configuration with four slots, without speculative decoding, and with `fields`."""
    scheduler = SimpleNamespace(max_num_seqs=4)
    return SimpleNamespace(scheduler_config=scheduler, speculative_config=None, **fields)
